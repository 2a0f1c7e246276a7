//! Pooling of regions of images: RoiAlign and MaxRoiPool, with constant regions. Each bin of a region is
//! a weighted sum, or the largest, of pixels known in advance; of equal maxima the first counts.

use std::sync::Arc;

use super::Rule;
use super::resize::Sparse;
use super::sample::{Pooling, Sampled, Tables, check_length};
use crate::error::{Error, Result};
use crate::graph::ir::Node;
use crate::graph::plan::{Lower, Value};
use crate::tensor::kernels::Element;

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    match op {
        "RoiAlign" => Some(roi_align),
        "MaxRoiPool" => Some(max_roi_pool),
        _ => None,
    }
}

/// Pixels that the regions of a node may read.
const READS: f64 = (1 << 26) as f64;

/// The two pixels that a position lies between, and their shares; `None` outside.
fn between(position: f64, size: usize) -> Option<[(usize, f64); 2]> {
    if !(-1.0..=size as f64).contains(&position) {
        return None;
    }
    let position = position.max(0.0);
    let low = position as usize;
    if low + 1 >= size {
        return Some([(size - 1, 1.0), (size - 1, 0.0)]);
    }
    let share = position - low as f64;
    Some([(low, 1.0 - share), (low + 1, share)])
}

/// An image [N, C, H, W] whose regions are pooled to [height, width] bins each.
struct Pooled {
    x: Value,
    size: [usize; 4],
    bins: [usize; 2],
    regions: Vec<f64>,
}

impl Pooled {
    /// Reads the image and its regions, `numbers` each.
    fn new<T: Element>(
        lower: &Lower<'_, T>,
        node: &Node,
        bins: [i64; 2],
        numbers: usize,
    ) -> Result<Self> {
        let x = lower.input(node, 0)?;
        let regions = lower.constant_input(node, 1)?;
        let regions = regions.ok_or_else(|| Error::input("needs input `1`, the regions"))?;
        let size = <[usize; 4]>::try_from(x.shape()).ok().filter(|size| !size.contains(&0));
        let good = regions.shape.len() == 2 && regions.shape[1] == numbers;
        let (Some(size), true) = (size, good) else {
            let (xs, rs) = (x.shape(), &regions.shape);
            return Err(Error::input(format!("regions of shape {rs:?} of an image of `{xs:?}`")));
        };
        if bins.iter().any(|bin| !(1..=1 << 16).contains(bin)) {
            return Err(Error::input(format!("cannot pool to bins `{bins:?}`")));
        }
        Ok(Self { x, size, bins: bins.map(|bin| bin as usize), regions: regions.to_f64() })
    }

    /// Emits the pooling of each region, given its image and table.
    fn emit<'g, T: Element>(
        self,
        lower: &mut Lower<'g, T>,
        node: &'g Node,
        pooling: Pooling,
        tables: Vec<(i64, Sparse<T>)>,
    ) -> Result<()> {
        let [images, channels, height, width] = self.size;
        let shape = vec![tables.len(), channels, self.bins[0], self.bins[1]];
        check_length(&shape)?;
        let tables = tables.into_iter().map(|(image, table)| match usize::try_from(image) {
            Ok(n) if n < images => Ok((n, Arc::new(table))),
            _ => Err(Error::input(format!("{images} images have no image `{image}`"))),
        });
        let tables = Tables::Fixed(tables.collect::<Result<_>>()?);
        let (plane, points) = (height * width, self.bins[0] * self.bins[1]);
        let step = Sampled { pooling, tables, channels, plane, points };
        let y = lower.emit(Box::new(step), &[self.x], shape);
        lower.set_output(node, 0, y);
        Ok(())
    }
}

fn too_large(region: &[f64]) -> Error {
    Error::input(format!("too many pixels to read for region `{region:?}`"))
}

fn roi_align<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let bins = [node.int("output_height", 1)?, node.int("output_width", 1)?];
    let pooled = Pooled::new(lower, node, bins, 4)?;
    let images = lower.integers(node, 2)?.unwrap_or_default();
    if images.len() * 4 != pooled.regions.len() {
        return Err(Error::input(format!("the regions have `{}` image numbers", images.len())));
    }
    let pooling = match node.text("mode", "avg")? {
        "avg" => Pooling::Sum,
        "max" => Pooling::Max,
        other => return Err(Error::unsupported(format!("pooling mode `{other}`"))),
    };
    // Before opset 16 there was no shift.
    let default = if lower.opset < 16 { "output_half_pixel" } else { "half_pixel" };
    let (shift, least) = match node.text("coordinate_transformation_mode", default)? {
        "half_pixel" => (0.5, f64::NEG_INFINITY),
        "output_half_pixel" => (0.0, 1.0),
        other => return Err(Error::unsupported(format!("coordinates `{other}`"))),
    };
    let scale = f64::from(node.float("spatial_scale", 1.0)?);
    let ratio = node.int("sampling_ratio", 0)?;
    let mut tables = Vec::new();
    let mut reads = 0.0;
    for (region, &image) in pooled.regions.chunks_exact(4).zip(&images) {
        // Of rows, then of columns: length of a bin, and places read in it.
        let bin = [0, 1].map(|axis: usize| {
            let length = (region[3 - axis] - region[1 - axis]) * scale;
            length.max(least) / pooled.bins[axis] as f64
        });
        let count = bin.map(|bin| if ratio > 0 { ratio as f64 } else { bin.ceil().max(0.0) });
        let samples = count[0] * count[1];
        reads += 4.0 * samples * (pooled.bins[0] * pooled.bins[1]) as f64;
        if reads > READS || count.iter().any(|&count| count > 65536.0) {
            return Err(too_large(region));
        }
        let places = [0, 1].map(|axis: usize| {
            let (start, size) = (region[1 - axis] * scale - shift, pooled.size[axis + 2]);
            let place = |b: usize, i: usize| b as f64 + (i as f64 + 0.5) / count[axis];
            let read = |b: usize, i: usize| between(start + place(b, i) * bin[axis], size);
            let of_bin =
                |b: usize| (0..count[axis] as usize).map(|i| read(b, i)).collect::<Vec<_>>();
            (0..pooled.bins[axis]).map(of_bin).collect::<Vec<_>>()
        });
        let share = if pooling == Pooling::Sum { 1.0 / samples.max(1.0) } else { 1.0 };
        let mut table = Sparse::new();
        for (row, column) in pairs(&places[0], &places[1]) {
            for place in pairs(row, column) {
                // A place outside is zero. The maximum is that of the weighted pixels, not of their
                // sums: so the test data of ONNX have it.
                let (Some(y), Some(x)) = place else {
                    table.push(0, T::ZERO);
                    continue;
                };
                for (&(y, a), &(x, b)) in pairs(y, x) {
                    table.push(y * pooled.size[3] + x, T::of(a * b * share));
                }
            }
            table.end_row();
        }
        tables.push((image, table));
    }
    pooled.emit(lower, node, pooling, tables)
}

/// Every element of `a` with every one of `b`.
fn pairs<'a, A, B>(a: &'a [A], b: &'a [B]) -> impl Iterator<Item = (&'a A, &'a B)> {
    a.iter().flat_map(move |a| b.iter().map(move |b| (a, b)))
}

fn max_roi_pool<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let Some(&[height, width]) = node.ints("pooled_shape")? else {
        return Err(Error::input("needs two sizes in `pooled_shape`"));
    };
    let pooled = Pooled::new(lower, node, [height, width], 5)?;
    let scale = f64::from(node.float("spatial_scale", 1.0)?);
    let mut tables = Vec::new();
    let mut reads = 0;
    for region in pooled.regions.chunks_exact(5) {
        let corner = |k: usize| (region[k] * scale).round().clamp(-1e6, 1e6) as i64;
        let covered = |axis: usize, b: usize| {
            let (start, end) = (corner(2 - axis), corner(4 - axis));
            let (size, bins) = (pooled.size[axis + 2] as i64, pooled.bins[axis] as i64);
            let (length, b) = ((end - start + 1).max(1), b as i64);
            let (from, to) = (b * length / bins, ((b + 1) * length + bins - 1) / bins);
            (start + from).clamp(0, size) as usize..(start + to).clamp(0, size) as usize
        };
        let mut table = Sparse::new();
        for row in 0..pooled.bins[0] {
            for column in 0..pooled.bins[1] {
                for y in covered(0, row) {
                    covered(1, column).for_each(|x| table.push(y * pooled.size[3] + x, T::ONE));
                }
                table.end_row();
                if (reads + table.columns.len()) as f64 > READS {
                    return Err(too_large(region));
                }
            }
        }
        reads += table.columns.len();
        tables.push((region[0] as i64, table));
    }
    pooled.emit(lower, node, Pooling::Max, tables)
}
