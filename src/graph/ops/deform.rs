//! Operators that put values elsewhere: DeformConv, Col2Im, MaxUnpool and CenterCropPad.

use rayon::prelude::*;

use super::rearrange::{Source, indices, rearrange};
use super::resize::{POSITIONS, along};
use super::sample::{AXES, NOTHING, check_length};
use super::shape::CONSTANT_LIMIT;
use super::window::{sizes, slides};
use super::{Rule, axis_index, strides};
use crate::error::{Error, Result};
use crate::graph::ir::Node;
use crate::graph::plan::{
    Differentiable, Lower, Needs, Step, StepState, Target, Value, data_dependent, elements,
};
use crate::tensor::kernels::Element;
use crate::tensor::kernels::gemm::{MatrixRef, gemm};
use crate::tensor::kernels::scratch;

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    Some(match op {
        "DeformConv" => deform_conv,
        "Col2Im" => column_to_image,
        "MaxUnpool" => max_unpool,
        "CenterCropPad" => center_crop_pad,
        _ => return None,
    })
}

/// Rows of a product one task computes.
const ROWS: usize = 32;

/// A convolution with frozen weights whose taps are moved by offsets (input 1) and scaled by a mask
/// (input 2): the moved values are gathered in columns, which the weights multiply. What lies outside
/// the image is zero, and so is the far neighbour of a place less than one pixel outside.
#[derive(Debug)]
struct DeformConv<T> {
    /// [O, C / groups * taps].
    weight: Vec<T>,
    bias: Option<Vec<T>>,
    /// Where the taps read without offsets: [taps, axes, points].
    base: Vec<T>,
    /// Spatial sizes of the image.
    input: Vec<usize>,
    plane: usize,
    channels: usize,
    outputs: usize,
    groups: usize,
    offset_groups: usize,
    taps: usize,
    points: usize,
    /// Taps times points.
    cells: usize,
    needs: Needs,
}

/// The operands of one image.
struct Image<'a, T> {
    x: &'a [T],
    /// [offset groups, taps, axes, points].
    offset: &'a [T],
    /// [offset groups, taps, points].
    mask: Option<&'a [T]>,
}

impl<T: Element> DeformConv<T> {
    fn image<'a>(&self, inputs: &[&'a [T]], n: usize) -> Image<'a, T> {
        // Operands that are not read are empty.
        let part = |data: &'a [T], len: usize| data.get(n * len..(n + 1) * len).unwrap_or_default();
        let cells = self.offset_groups * self.cells;
        Image {
            x: part(inputs[0], self.channels * self.plane),
            offset: part(inputs[1], cells * self.input.len()),
            mask: inputs.get(2).map(|&mask| part(mask, cells)),
        }
    }

    /// Visits the pixels around the place that `cell` of an offset group reads, with their shares, or
    /// with the slopes of those along axis `sloped`.
    #[inline(always)]
    fn for_each_pixel(
        &self,
        image: &Image<'_, T>,
        [group, cell]: [usize; 2],
        sloped: Option<usize>,
        mut visit: impl FnMut(usize, T),
    ) {
        let axes = self.input.len();
        let first = cell / self.points * axes * self.points + cell % self.points;
        let offset = &image.offset[group * axes * self.cells..];
        let mut places = [(0, T::ZERO); AXES];
        for (axis, (place, &size)) in places.iter_mut().zip(&self.input).enumerate() {
            let at = first + axis * self.points;
            let p = self.base[at] + offset[at];
            let near = p > -T::ONE && p < T::of(size as f64);
            if !near {
                return;
            }
            let floor = p.floor();
            *place = (floor.f64() as isize, p - floor);
        }
        for corner in 0..1usize << axes {
            let (mut at, mut weight) = (0, T::ONE);
            let mut inside = true;
            for (axis, (&(floor, share), &size)) in places.iter().zip(&self.input).enumerate() {
                let upper = (corner >> axis) & 1 == 1;
                weight *= match (sloped == Some(axis), upper) {
                    (true, true) => T::ONE,
                    (true, false) => -T::ONE,
                    (false, true) => share,
                    (false, false) => T::ONE - share,
                };
                let pixel = usize::try_from(floor + isize::from(upper)).unwrap_or(usize::MAX);
                inside &= pixel < size;
                at = at * size + pixel.min(size);
            }
            if inside {
                visit(at, weight);
            }
        }
    }

    /// The moved and scaled values of each channel: [channels, taps, points].
    fn columns(&self, image: &Image<'_, T>, columns: &mut [T]) {
        let (cells, share) = (self.cells, self.channels / self.offset_groups);
        let planes = columns.par_chunks_mut(cells).zip(image.x.par_chunks(self.plane));
        planes.enumerate().for_each(|(channel, (columns, x))| {
            let group = channel / share;
            for (cell, y) in columns.iter_mut().enumerate() {
                let mut sum = T::ZERO;
                self.for_each_pixel(image, [group, cell], None, |at, w| sum += w * x[at]);
                *y = sum * self.scale(image, group, cell);
            }
        });
    }

    fn scale(&self, image: &Image<'_, T>, group: usize, cell: usize) -> T {
        image.mask.map_or(T::ONE, |mask| mask[group * self.cells + cell])
    }

    /// The gradient to the columns.
    fn column_gradient(&self, dy: &[T], columns: &mut [T]) {
        let (rows, points) = (self.outputs / self.groups, self.points);
        let depth = self.channels / self.groups * self.taps;
        columns.par_chunks_mut(depth * points).enumerate().for_each(|(group, columns)| {
            let weight = &self.weight[group * rows * depth..][..rows * depth];
            let dy = MatrixRef::rows(&dy[group * rows * points..][..rows * points], points);
            columns.par_chunks_mut(ROWS * points).enumerate().for_each(|(chunk, columns)| {
                let weight = MatrixRef::transposed(&weight[chunk * ROWS..], depth);
                gemm(columns.len() / points, points, rows, weight, dy, columns, points, false);
            });
        });
    }

    /// What a change of the value read at a place, or of the place along an axis, is worth, by the
    /// gradient `d` to the columns.
    fn worth(&self, image: &Image<'_, T>, d: &[T], place: [usize; 2], sloped: Option<usize>) -> T {
        let ([group, cell], share) = (place, self.channels / self.offset_groups);
        let mut sum = T::ZERO;
        self.for_each_pixel(image, place, sloped, |at, weight| {
            for c in group * share..(group + 1) * share {
                sum += weight * d[c * self.cells + cell] * image.x[c * self.plane + at];
            }
        });
        sum
    }
}

impl<T: Element> Step<T> for DeformConv<T> {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], _state: &mut StepState<T>) {
        let (rows, points) = (self.outputs / self.groups, self.points);
        let depth = self.channels / self.groups * self.taps;
        for (n, y) in output.chunks_exact_mut(self.outputs * points).enumerate() {
            let image = self.image(inputs, n);
            scratch::with(self.channels * self.cells, |columns: &mut [T]| {
                self.columns(&image, columns);
                let columns: &[T] = columns;
                y.par_chunks_mut(rows * points).enumerate().for_each(|(group, y)| {
                    let columns = &columns[group * depth * points..][..depth * points];
                    let columns = MatrixRef::rows(columns, points);
                    y.par_chunks_mut(ROWS * points).enumerate().for_each(|(chunk, y)| {
                        let first = group * rows + chunk * ROWS;
                        let weight = MatrixRef::rows(&self.weight[first * depth..], depth);
                        gemm(y.len() / points, points, depth, weight, columns, y, points, false);
                        let bias = self.bias.iter().flat_map(|bias| &bias[first..]);
                        for (y, &b) in y.chunks_exact_mut(points).zip(bias) {
                            y.iter_mut().for_each(|y| *y += b);
                        }
                    });
                });
            });
        }
    }

    fn needs(&self) -> Needs {
        self.needs
    }

    fn backward(
        &self,
        which: usize,
        inputs: &[&[T]],
        _output: &[T],
        d_output: &[T],
        mut target: Target<'_, T>,
        _state: &StepState<T>,
    ) {
        target.clear_if_fresh();
        let (cells, points, taps) = (self.cells, self.points, self.taps);
        let (axes, plane) = (self.input.len(), self.plane);
        let share = self.channels / self.offset_groups;
        // One image's part of the target, and one task's part of that.
        let (own, part) = match which {
            0 => (self.channels * plane, plane),
            1 => (self.offset_groups * cells * axes, axes * points),
            _ => (self.offset_groups * cells, points),
        };
        let images = target.data.chunks_exact_mut(own);
        for (n, (d, dy)) in images.zip(d_output.chunks_exact(self.outputs * points)).enumerate() {
            let image = self.image(inputs, n);
            scratch::with(self.channels * cells, |columns: &mut [T]| {
                self.column_gradient(dy, columns);
                let columns: &[T] = columns;
                d.par_chunks_mut(part).enumerate().for_each(|(i, d)| {
                    if which == 0 {
                        let group = i / share;
                        for (cell, &g) in columns[i * cells..][..cells].iter().enumerate() {
                            let g = g * self.scale(&image, group, cell);
                            let place = [group, cell];
                            self.for_each_pixel(&image, place, None, |at, w| d[at] += w * g);
                        }
                        return;
                    }
                    let (group, tap) = (i / taps, i % taps);
                    for (j, d) in d.iter_mut().enumerate() {
                        let cell = tap * points + j % points;
                        let sloped = (which == 1).then_some(j / points);
                        let worth = self.worth(&image, columns, [group, cell], sloped);
                        let scale = |_| self.scale(&image, group, cell);
                        *d += worth * sloped.map_or(T::ONE, scale);
                    }
                });
            });
        }
    }
}

fn deform_conv<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let (x, weight) = (lower.input(node, 0)?, lower.input(node, 1)?);
    let Some(weight) = weight.constant() else { return Err(data_dependent(node, 1)) };
    let (offset, mask) = (lower.input(node, 2)?, lower.optional(node, 4)?);
    let bias = lower.constant_input(node, 3)?;
    let (xs, ws) = (x.shape(), &weight.shape);
    let count = |name| node.int(name, 1).map(|count| usize::try_from(count).unwrap_or(0));
    let (groups, offset_groups) = (count("group")?, count("offset_group")?);
    let axes = xs.len().saturating_sub(2);
    let fits = ws.len() == xs.len()
        && (1..=AXES).contains(&axes)
        && groups.min(offset_groups) > 0
        && !xs.contains(&0)
        && !ws.contains(&0)
        && ws[1].checked_mul(groups) == Some(xs[1])
        && ws[0].is_multiple_of(groups)
        && xs[1].is_multiple_of(offset_groups);
    if !fits {
        let text = format!("weights {ws:?} in {groups} groups do not fit an input of `{xs:?}`");
        return Err(Error::input(text));
    }
    if sizes(node, "kernel_shape", 0, axes)? != ws[2..] && node.ints("kernel_shape")?.is_some() {
        return Err(Error::input(format!("kernel_shape differs from weights `{ws:?}`")));
    }
    let slides = slides(node, &ws[2..], &xs[2..])?;
    let output: Vec<usize> =
        slides.iter().zip(&xs[2..]).map(|(slide, &size)| slide.output(size)).collect();
    let (taps, points) = (length(&ws[2..]), length(&output));
    let with = |channels: usize| [&[xs[0], channels][..], &output[..]].concat();
    let moved = offset.shape() == with(offset_groups * taps * axes)
        && mask.as_ref().is_none_or(|mask| mask.shape() == with(offset_groups * taps))
        && bias.as_ref().is_none_or(|bias| bias.data.len() == ws[0]);
    if points == 0 || !moved {
        let (os, ys) = (offset.shape(), with(ws[0]));
        return Err(Error::input(format!("offsets {os:?}, mask or bias do not fit `{ys:?}`")));
    }
    check_length(&with(ws[0]))?;
    check_length(&[xs[1].max(axes), taps, points])?;
    let mut base = Vec::with_capacity(taps * axes * points);
    for tap in indices(&ws[2..]) {
        for (axis, slide) in slides.iter().enumerate() {
            base.extend(indices(&output).map(|point| {
                let at = point[axis] * slide.stride + tap[axis] * slide.dilation;
                T::of(at as f64 - slide.pads[0] as f64)
            }));
        }
    }
    let live = offset.constant().is_none() || mask.as_ref().is_some_and(|m| m.constant().is_none());
    let step = DeformConv {
        weight: elements(weight),
        bias: bias.map(|bias| elements(&bias)),
        base,
        input: xs[2..].to_vec(),
        plane: length(&xs[2..]),
        channels: xs[1],
        outputs: ws[0],
        groups,
        offset_groups,
        taps,
        points,
        cells: taps * points,
        needs: if live { Needs::INPUTS } else { Needs::NOTHING },
    };
    let shape = with(ws[0]);
    let operands: Vec<_> = [Some(x), Some(offset), mask].into_iter().flatten().collect();
    let y = lower.emit(Box::new(step), &operands, shape);
    lower.set_output(node, 0, y);
    Ok(())
}

/// Elements of a tensor of `shape`.
fn length(shape: &[usize]) -> usize {
    shape.iter().fold(1, |length: usize, &size| length.saturating_mul(size))
}

/// Input `index` as sizes; none when absent.
fn dims<T: Element>(lower: &Lower<'_, T>, node: &Node, index: usize) -> Result<Vec<usize>> {
    let values = lower.integers(node, index)?.unwrap_or_default();
    let good = |&value: &i64| usize::try_from(value).ok().filter(|&size| size <= CONSTANT_LIMIT);
    match values.iter().map(good).collect::<Option<Vec<usize>>>() {
        Some(sizes) if length(&sizes) <= CONSTANT_LIMIT => Ok(sizes),
        _ => Err(Error::input(format!("bad shape `{values:?}`"))),
    }
}

fn column_to_image<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let (image, kernel) = (dims(lower, node, 1)?, dims(lower, node, 2)?);
    let slides = slides(node, &kernel, &image)?;
    let places: Vec<usize> =
        slides.iter().zip(&image).map(|(slide, &size)| slide.output(size)).collect();
    let (taps, blocks, pixels) = (length(&kernel), length(&places), length(&image));
    let some = !x.is_empty() && (1..=POSITIONS).contains(&pixels);
    let [images, channels] = match x.shape() {
        &[n, c, l] if some && l == blocks && c.is_multiple_of(taps) => [n, c / taps],
        other => {
            let text = format!("{other:?} does not hold blocks of {kernel:?} of `{image:?}`");
            return Err(Error::input(text));
        }
    };
    let mut shape = vec![images, channels];
    shape.extend_from_slice(&image);
    check_length(&shape)?;
    // Each pixel is the sum of the block elements that lie on it.
    let mut rows = vec![Some(Vec::new()); pixels];
    let own = strides(&image);
    for (t, tap) in indices(&kernel).enumerate() {
        for (b, place) in indices(&places).enumerate() {
            let pixel = slides.iter().enumerate().try_fold(0, |sum, (axis, slide)| {
                let at = place[axis] * slide.stride + tap[axis] * slide.dilation;
                let at = at.checked_sub(slide.pads[0]).filter(|&at| at < image[axis])?;
                Some(sum + at * own[axis])
            });
            let Some(pixel) = pixel else { continue };
            if let Some(taps) = &mut rows[pixel] {
                taps.push((t * blocks + b, 1.0));
            }
        }
    }
    let x = lower.reshape(&x, vec![images * channels, taps * blocks])?;
    let y = along(lower, &x, 1, &rows, 0.0);
    let y = lower.reshape(&y, shape)?;
    lower.set_output(node, 0, y);
    Ok(())
}

/// Puts each value (input 0) at its position (input 1) among zeros; of equal ones the last counts.
#[derive(Debug)]
struct Unpool;

impl<T: Element> Step<T> for Unpool {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], state: &mut StepState<T>) {
        output.fill(T::ZERO);
        state.indices.clear();
        state.indices.resize(output.len(), NOTHING);
        for (i, (&value, at)) in inputs[0].iter().zip(inputs[1]).enumerate() {
            if (0.0..output.len() as f64).contains(&at.f64()) {
                let at = at.f64() as usize;
                output[at] = value;
                state.indices[at] = i as u32;
            }
        }
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING
    }

    fn differentiable(&self, which: usize) -> Differentiable {
        if which == 0 { Differentiable::Yes } else { Differentiable::Choice }
    }

    fn backward(
        &self,
        which: usize,
        _inputs: &[&[T]],
        _output: &[T],
        d_output: &[T],
        mut target: Target<'_, T>,
        state: &StepState<T>,
    ) {
        target.clear_if_fresh();
        let placed = state.indices.iter().zip(d_output).filter(|(i, _)| **i != NOTHING);
        for (&i, &g) in placed.filter(|_| which == 0) {
            target.data[i as usize] += g;
        }
    }
}

fn max_unpool<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let (x, positions) = (lower.input(node, 0)?, lower.input(node, 1)?);
    let (xs, at) = (x.shape(), positions.shape());
    if xs.len() < 3 || x.is_empty() || at != xs {
        return Err(Error::input(format!("values of shape {xs:?} at positions of `{at:?}`")));
    }
    let axes = xs.len() - 2;
    let kernel = sizes(node, "kernel_shape", 1, axes)?;
    let stride = sizes(node, "strides", 1, axes)?;
    let pads = sizes(node, "pads", 0, 2 * axes)?;
    let mut inferred = xs[..2].to_vec();
    for axis in 0..axes {
        let full = (xs[axis + 2] - 1) * stride[axis] + kernel[axis];
        inferred.push(full.saturating_sub(pads[axis] + pads[axis + axes]));
    }
    let given = dims(lower, node, 2)?;
    let shape = if given.is_empty() { inferred.clone() } else { given };
    // Positions are numbers of the type computed in, which must hold each of them.
    let most = if size_of::<T>() == 4 { 1 << 24 } else { CONSTANT_LIMIT };
    if shape.len() != xs.len() || shape[..2] != xs[..2] || !(1..=most).contains(&length(&shape)) {
        return Err(Error::input(format!("cannot unpool {xs:?} to `{shape:?}`")));
    }
    let mut counted = &shape;
    if let Some(constant) = positions.constant() {
        let all = constant.as_i64().ok_or_else(|| Error::input("positions must be integers"))?;
        let within = |shape: &[usize]| all.iter().all(|at| (0..length(shape) as i64).contains(at));
        // In the test data of ONNX positions count in the shape that kernel, strides and pads infer,
        // whatever shape is given; those of a MaxPool, as live ones are, count in the given one.
        if within(&inferred) && inferred.iter().zip(&shape).all(|(from, to)| from <= to) {
            counted = &inferred;
        } else if !within(&shape) {
            return Err(Error::input(format!("positions outside a tensor of shape `{shape:?}`")));
        }
    }
    let y = lower.emit(Box::new(Unpool), &[x, positions], counted.clone());
    let y = if counted == &shape { y } else { framed(lower, &y, &vec![0; axes + 2], shape)? };
    lower.set_output(node, 0, y);
    Ok(())
}

/// Emits a tensor of `shape` whose element `i` is element `i + first` of `x`, or zero outside.
fn framed<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    first: &[i64],
    shape: Vec<usize>,
) -> Result<Value> {
    let own = strides(x.shape());
    let map = indices(&shape).map(|index| {
        let at = index.iter().zip(first).zip(x.shape().iter().zip(&own));
        let at = at.map(|((&i, first), (&size, stride))| {
            let i = usize::try_from(i as i64 + first).ok().filter(|&i| i < size);
            i.map(|i| i * stride)
        });
        match at.sum::<Option<usize>>() {
            Some(at) => Source::Element { input: 0, at },
            None => Source::Fill,
        }
    });
    rearrange(lower, std::slice::from_ref(x), shape.clone(), 0.0, map)
}

fn center_crop_pad<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let rank = x.rank();
    let wanted = dims(lower, node, 1)?;
    let axes: Vec<usize> = match node.ints("axes")? {
        Some(axes) => axes.iter().map(|&axis| axis_index(axis, rank)).collect::<Result<_>>()?,
        None => (0..rank).collect(),
    };
    if axes.len() != wanted.len() || axes.iter().any(|&axis| axis >= rank) {
        return Err(Error::input(format!("{} axes for the shape `{wanted:?}`", axes.len())));
    }
    let (mut shape, mut first) = (x.shape().to_vec(), vec![0; rank]);
    for (&axis, &size) in axes.iter().zip(&wanted) {
        // Half of what is cut, or of what is added, rounded down.
        first[axis] = (x.shape()[axis] as i64 - size as i64) / 2;
        shape[axis] = size;
    }
    check_length(&shape)?;
    let y = framed(lower, &x, &first, shape)?;
    lower.set_output(node, 0, y);
    Ok(())
}
