//! Reading images between their pixels: GridSample, and AffineGrid, which makes such a grid. The step
//! is also that of pooled regions (RoiAlign, MaxRoiPool). Places are computed in double precision.

use std::sync::Arc;

use rayon::prelude::*;

use super::rearrange::indices;
use super::resize::{POSITIONS, Sparse, along, cubic};
use super::shape::CONSTANT_LIMIT;
use super::transpose::permute;
use super::{Rule, strides};
use crate::error::{Error, Result};
use crate::graph::ir::Node;
use crate::graph::plan::{Differentiable, Lower, Needs, Step, StepState, Target, elements};
use crate::tensor::kernels::Element;

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    Some(match op {
        "GridSample" => grid_sample,
        "AffineGrid" => affine_grid,
        _ => return None,
    })
}

/// Coefficient of the cubic kernel of GridSample.
const CUBIC: f64 = -0.75;

/// Points of a grid whose gradients one task computes.
const POINTS: usize = 64;

/// Spatial axes that a sampled image may have.
pub(super) const AXES: usize = 8;

/// The position of what is not there.
pub(super) const NOTHING: u32 = u32::MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Interpolation {
    Nearest,
    Linear,
    Cubic,
}

/// What lies outside the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Padding {
    Zeros,
    Border,
    Reflection,
}

/// What one coordinate reads along its axis: distances in the plane, weights, and their slopes in the
/// coordinate.
#[derive(Debug, Clone, Copy, Default)]
struct Taps {
    count: usize,
    at: [usize; 4],
    weight: [f64; 4],
    slope: [f64; 4],
}

/// How the points of a grid, in -1 to 1, read an image.
#[derive(Debug)]
pub(super) struct Grid {
    interpolation: Interpolation,
    padding: Padding,
    /// Whether -1 and 1 are the centres of the first and last pixel, not their outer edges.
    align_corners: bool,
    /// Size of each spatial axis and distance of its neighbours in the plane.
    axes: Vec<[usize; 2]>,
    points: usize,
}

/// `p` folded back at `low` and `high` until it lies between them, and the slope of that.
fn reflect(p: f64, low: f64, high: f64) -> (f64, f64) {
    let span = high - low;
    if span <= 0.0 {
        return (low, 0.0);
    }
    let turns = ((p - low) / span).floor();
    let rest = p - low - turns * span;
    if turns % 2.0 == 0.0 { (low + rest, 1.0) } else { (high - rest, -1.0) }
}

/// Visits each pixel that `taps` combine, with the product of their weights; along axis `sloped` with
/// the slope in place of the weight.
fn for_each_pixel(taps: &[Taps], sloped: Option<usize>, mut visit: impl FnMut(usize, f64)) {
    let count: usize = taps.iter().map(|taps| taps.count).product();
    for pixel in 0..count {
        let (mut rest, mut at, mut weight) = (pixel, 0, 1.0);
        for (axis, taps) in taps.iter().enumerate() {
            let k = rest % taps.count;
            rest /= taps.count;
            at += taps.at[k];
            weight *= if sloped == Some(axis) { taps.slope[k] } else { taps.weight[k] };
        }
        visit(at, weight);
    }
}

impl Grid {
    /// Limits at which the image is mirrored.
    fn limits(&self, size: usize) -> (f64, f64) {
        let last = size as f64 - 1.0;
        if self.align_corners { (0.0, last) } else { (-0.5, last + 0.5) }
    }

    /// The pixel read at whole position `i`; `None` for zero.
    fn pixel(&self, i: f64, size: usize) -> Option<usize> {
        let last = size as f64 - 1.0;
        let (low, high) = self.limits(size);
        let inside = match self.padding {
            _ if (0.0..=last).contains(&i) => i,
            Padding::Zeros => return None,
            Padding::Border => i.clamp(0.0, last),
            Padding::Reflection => reflect(i, low, high).0.round().clamp(0.0, last),
        };
        Some(inside as usize)
    }

    fn taps(&self, coordinate: f64, size: usize, stride: usize) -> Taps {
        let mut taps = Taps::default();
        if coordinate.is_nan() {
            return taps;
        }
        let last = size as f64 - 1.0;
        let (low, high) = self.limits(size);
        let (position, mut slope) = if self.align_corners {
            ((coordinate + 1.0) / 2.0 * last, last / 2.0)
        } else {
            (((coordinate + 1.0) * size as f64 - 1.0) / 2.0, size as f64 / 2.0)
        };
        let mut p = position.clamp(-1e9, 1e9);
        if self.interpolation == Interpolation::Nearest {
            p = p.round_ties_even();
        }
        // As in PyTorch, cubic weights come from the position itself, and only the pixels are mapped.
        if self.interpolation != Interpolation::Cubic && !(low..=high).contains(&p) {
            match self.padding {
                Padding::Zeros => {}
                Padding::Border => (p, slope) = (p.clamp(0.0, last), 0.0),
                Padding::Reflection => {
                    let (inside, sign) = reflect(p, low, high);
                    (p, slope) = (inside, slope * sign);
                }
            }
        }
        let floor = p.floor();
        let share = p - floor;
        let mut push = |i: f64, weight: f64, slope: f64| {
            if let Some(pixel) = self.pixel(i, size) {
                taps.at[taps.count] = pixel * stride;
                taps.weight[taps.count] = weight;
                taps.slope[taps.count] = slope;
                taps.count += 1;
            }
        };
        match self.interpolation {
            Interpolation::Nearest => push(p.round_ties_even(), 1.0, 0.0),
            Interpolation::Linear => {
                push(floor, 1.0 - share, -slope);
                push(floor + 1.0, share, slope);
            }
            Interpolation::Cubic => {
                for k in [-1.0, 0.0, 1.0, 2.0] {
                    let [weight, steepness] = cubic(CUBIC, share - k);
                    push(floor + k, weight, slope * steepness);
                }
            }
        }
        taps
    }

    /// The taps of each spatial axis at one point of a grid, whose first coordinate is the last axis's.
    fn taps_at<T: Element>(&self, point: &[T], taps: &mut Vec<Taps>) {
        let coordinates = point.iter().rev();
        taps.clear();
        taps.extend(
            self.axes
                .iter()
                .zip(coordinates)
                .map(|(&[size, stride], coordinate)| self.taps(coordinate.f64(), size, stride)),
        );
    }

    /// The pixels that each point of one image's grid reads.
    fn table<T: Element>(&self, grid: &[T]) -> Sparse<T> {
        let mut table = Sparse::new();
        let mut taps = Vec::new();
        for point in grid.chunks_exact(self.axes.len()) {
            self.taps_at(point, &mut taps);
            for_each_pixel(&taps, None, |at, weight| table.push(at, T::of(weight)));
            table.end_row();
        }
        table
    }

    /// The tables of a batch's grids; those of equal grids, one after the other, are one.
    fn tables<T: Element>(&self, grids: &[T]) -> Vec<Table<T>> {
        let grids: Vec<&[T]> = grids.chunks_exact(self.axes.len() * self.points).collect();
        let fresh = |n: usize| n == 0 || grids[n] != grids[n - 1];
        let made: Vec<Option<Sparse<T>>> = (0..grids.len())
            .into_par_iter()
            .map(|n| fresh(n).then(|| self.table(grids[n])))
            .collect();
        let mut tables: Vec<Table<T>> = Vec::new();
        for (n, made) in made.into_iter().enumerate() {
            let table = match (made, tables.last()) {
                (None, Some((_, last))) => Arc::clone(last),
                (made, _) => Arc::new(made.unwrap_or_else(Sparse::new)),
            };
            tables.push((n, table));
        }
        tables
    }

    /// The gradient to one image's grid.
    fn gradient<T: Element>(&self, grid: &[T], x: &[T], dy: &[T], d: &mut [T]) {
        let (axes, points) = (self.axes.len(), self.points);
        let plane: usize = self.axes.iter().map(|&[size, _]| size).product();
        let blocks = d.par_chunks_mut(axes * POINTS).zip(grid.par_chunks(axes * POINTS));
        blocks.enumerate().for_each(|(block, (d, grid))| {
            let mut taps = Vec::new();
            let rows = d.chunks_exact_mut(axes).zip(grid.chunks_exact(axes));
            for (point, (d, coordinates)) in (block * POINTS..).zip(rows) {
                self.taps_at(coordinates, &mut taps);
                for (axis, d) in d.iter_mut().rev().enumerate() {
                    for_each_pixel(&taps, Some(axis), |at, slope| {
                        let planes = dy.chunks_exact(points).zip(x.chunks_exact(plane));
                        let sum: T = planes.map(|(dy, x)| dy[point] * x[at]).sum();
                        *d += T::of(slope) * sum;
                    });
                }
            }
        });
    }
}

/// The image that an output image reads, and the pixels of each output position.
type Table<T> = (usize, Arc<Sparse<T>>);

/// The table of each output image.
#[derive(Debug)]
pub(super) enum Tables<T> {
    Fixed(Vec<Table<T>>),
    /// Made from input 1.
    Of(Grid),
}

/// How the pixels of an output position become one value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pooling {
    Sum,
    Max,
}

/// Each position of an output plane pools weighted pixels of one plane of [N, C, ...].
#[derive(Debug)]
pub(super) struct Sampled<T> {
    pub(super) pooling: Pooling,
    pub(super) tables: Tables<T>,
    pub(super) channels: usize,
    pub(super) plane: usize,
    pub(super) points: usize,
}

impl<T: Element> Sparse<T> {
    /// Entry `k` of a row.
    fn entry(&self, row: usize, k: usize) -> (usize, T) {
        let at = self.starts[row] + k;
        (self.columns[at] as usize, self.weights[at])
    }

    /// Adds the product of the transpose with `dy` to `d`.
    fn scatter(&self, dy: &[T], d: &mut [T]) {
        for (row, &g) in dy.iter().enumerate() {
            for (column, weight) in self.row(row) {
                d[column] += weight * g;
            }
        }
    }
}

impl<T: Element> Sampled<T> {
    fn with_tables(&self, inputs: &[&[T]], work: impl FnOnce(&[Table<T>])) {
        match &self.tables {
            Tables::Fixed(tables) => work(tables),
            Tables::Of(grid) => work(&grid.tables(inputs[1])),
        }
    }
}

impl<T: Element> Step<T> for Sampled<T> {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], state: &mut StepState<T>) {
        let length = output.len();
        if length == 0 {
            return;
        }
        self.with_tables(inputs, |tables| {
            let source = |i: usize| {
                let (image, table) = &tables[i / self.channels];
                let plane = image * self.channels + i % self.channels;
                (table, &inputs[0][plane * self.plane..][..self.plane])
            };
            let planes = output.par_chunks_mut(self.points);
            if self.pooling == Pooling::Sum {
                planes.enumerate().for_each(|(i, y)| {
                    let (table, x) = source(i);
                    y.iter_mut().enumerate().for_each(|(point, y)| *y = table.dot(point, x));
                });
                return;
            }
            state.indices.resize(length, NOTHING);
            let planes = planes.zip(state.indices.par_chunks_mut(self.points));
            planes.enumerate().for_each(|(i, (y, best))| {
                let (table, x) = source(i);
                for (point, (y, best)) in y.iter_mut().zip(best).enumerate() {
                    (*y, *best) = (T::ZERO, NOTHING);
                    for (k, (at, weight)) in table.row(point).enumerate() {
                        let value = weight * x[at];
                        if *best == NOTHING || value > *y {
                            (*y, *best) = (value, k as u32);
                        }
                    }
                }
            });
        });
    }

    fn needs(&self) -> Needs {
        match self.tables {
            Tables::Fixed(_) => Needs::NOTHING,
            Tables::Of(_) => Needs::INPUTS,
        }
    }

    fn differentiable(&self, which: usize) -> Differentiable {
        match &self.tables {
            Tables::Of(grid) if which == 1 && grid.interpolation == Interpolation::Nearest => {
                Differentiable::Choice
            }
            _ => Differentiable::Yes,
        }
    }

    fn backward(
        &self,
        which: usize,
        inputs: &[&[T]],
        _output: &[T],
        d_output: &[T],
        mut target: Target<'_, T>,
        state: &StepState<T>,
    ) {
        target.clear_if_fresh();
        if d_output.is_empty() {
            return;
        }
        if let (Tables::Of(grid), 1) = (&self.tables, which) {
            let own = grid.axes.len() * self.points;
            let images = target.data.par_chunks_mut(own).zip(inputs[1].par_chunks(own));
            let planes = inputs[0].par_chunks(self.channels * self.plane);
            let planes = planes.zip(d_output.par_chunks(self.channels * self.points));
            images.zip(planes).for_each(|((d, at), (x, dy))| grid.gradient(at, x, dy, d));
            return;
        }
        self.with_tables(inputs, |tables| {
            target.data.par_chunks_mut(self.plane).enumerate().for_each(|(plane, d)| {
                let (image, channel) = (plane / self.channels, plane % self.channels);
                let own = tables.iter().enumerate().filter(|(_, (of, _))| *of == image);
                for (i, (_, table)) in own {
                    let start = (i * self.channels + channel) * self.points;
                    let range = start..start + self.points;
                    let dy = &d_output[range.clone()];
                    if self.pooling == Pooling::Sum {
                        table.scatter(dy, d);
                        continue;
                    }
                    for (point, (&g, &k)) in dy.iter().zip(&state.indices[range]).enumerate() {
                        if k != NOTHING {
                            let (at, weight) = table.entry(point, k as usize);
                            d[at] += weight * g;
                        }
                    }
                }
            });
        });
    }
}

fn grid_sample<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let (x, grid) = (lower.input(node, 0)?, lower.input(node, 1)?);
    let (xs, gs) = (x.shape().to_vec(), grid.shape().to_vec());
    let axes = xs.len().saturating_sub(2);
    let fits = (1..=AXES).contains(&axes)
        && gs.len() == xs.len()
        && gs[0] == xs[0]
        && gs[axes + 1] == axes
        && !xs.contains(&0);
    if !fits {
        return Err(Error::input(format!("cannot sample {xs:?} at a grid of shape `{gs:?}`")));
    }
    let interpolation = match node.text("mode", "linear")? {
        "linear" | "bilinear" => Interpolation::Linear,
        "nearest" => Interpolation::Nearest,
        "cubic" | "bicubic" => Interpolation::Cubic,
        other => return Err(Error::unsupported(format!("sampling mode `{other}`"))),
    };
    let padding = match node.text("padding_mode", "zeros")? {
        "zeros" => Padding::Zeros,
        "border" => Padding::Border,
        "reflection" => Padding::Reflection,
        other => return Err(Error::unsupported(format!("padding_mode `{other}`"))),
    };
    let mut shape = xs[..2].to_vec();
    shape.extend_from_slice(&gs[1..=axes]);
    check_length(&shape)?;
    let (plane, points): (usize, usize) = (xs[2..].iter().product(), gs[1..=axes].iter().product());
    let each: usize = match interpolation {
        Interpolation::Nearest => 1,
        Interpolation::Linear => 2,
        Interpolation::Cubic => 4,
    };
    check_length(&[xs[0], points, each.pow(axes as u32)])?;
    let spatial = xs[2..].iter().zip(strides(&xs[2..]));
    let how = Grid {
        interpolation,
        padding,
        align_corners: node.int("align_corners", 0)? != 0,
        axes: spatial.map(|(&size, stride)| [size, stride]).collect(),
        points,
    };
    let known = grid.constant().filter(|_| points > 0).map(|grid| elements::<T>(grid));
    let (tables, inputs) = match known {
        Some(grid) => (Tables::Fixed(how.tables(&grid)), vec![x]),
        None => (Tables::Of(how), vec![x, grid]),
    };
    let step = Sampled { pooling: Pooling::Sum, tables, channels: xs[1], plane, points };
    let y = lower.emit(Box::new(step), &inputs, shape);
    lower.set_output(node, 0, y);
    Ok(())
}

/// Refuses a tensor too large to make.
///
/// # Errors
/// When `shape` is that of one.
pub(super) fn check_length(shape: &[usize]) -> Result<()> {
    match shape.iter().fold(1usize, |a, &b| a.saturating_mul(b)) {
        length if length <= CONSTANT_LIMIT => Ok(()),
        _ => Err(Error::input(format!("makes a tensor of shape `{shape:?}`"))),
    }
}

fn affine_grid<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let theta = lower.input(node, 0)?;
    let size = lower.integers(node, 1)?.ok_or_else(|| Error::input("needs input `1`, the size"))?;
    let shape: Vec<usize> = size.iter().map(|&s| s.clamp(0, 1 << 40) as usize).collect();
    let maps = theta.shape();
    let axes = shape.len().saturating_sub(2);
    if !(2..=3).contains(&axes) || maps != [shape[0], axes, axes + 1] || shape.contains(&0) {
        return Err(Error::input(format!("maps of shape {maps:?} for a grid of size `{size:?}`")));
    }
    let align = node.int("align_corners", 0)? != 0;
    let coordinate = |i: usize, size: usize| match (align, size) {
        (true, 1) => 0.0,
        (true, size) => (2 * i) as f64 / (size as f64 - 1.0) - 1.0,
        (false, size) => (2 * i + 1) as f64 / size as f64 - 1.0,
    };
    let mut output = vec![shape[0]];
    output.extend_from_slice(&shape[2..]);
    output.push(axes);
    check_length(&output)?;
    if shape[2..].iter().product::<usize>() > POSITIONS {
        return Err(Error::input(format!("makes a grid of size `{size:?}`")));
    }
    // Each place is a sum of the columns of its map, weighted by the pixel's coordinates and 1.
    let rows: Vec<Option<Vec<(usize, f64)>>> = indices(&shape[2..])
        .map(|index| {
            let places = index.iter().zip(&shape[2..]).rev().map(|(&i, &size)| coordinate(i, size));
            Some(places.chain([1.0]).enumerate().collect())
        })
        .collect();
    let columns = permute(lower, &theta, &[0, 2, 1])?;
    let y = along(lower, &columns, 1, &rows, 0.0);
    let y = lower.reshape(&y, output)?;
    lower.set_output(node, 0, y);
    Ok(())
}
