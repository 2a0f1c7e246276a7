//! Pooling: MaxPool, AveragePool, LpPool and their global forms over any number of axes, any kernel,
//! stride, pads, dilation, ceil_mode and count_include_pad. A tie in a maximum gives its gradient to
//! the first, as in PyTorch. Windows over more than two axes are pooled axis by axis: maxima, sums and
//! means of rows are those of the whole window.

use rayon::prelude::*;

use super::Rule;
use super::conv::plane;
use super::elementwise::{Function, apply};
use super::reduce::{Reduction, norm, reduce_axes};
use super::window::{Slide, Window, sizes, slides, two_axes};
use crate::error::{Error, Result};
use crate::graph::ir::{DataType, Node};
use crate::graph::plan::{Choice, Chosen, Follower, Lower, Needs, Step, StepState, Target, Value};
#[cfg(any(feature = "cuda", test))]
use crate::tensor::cuda;
use crate::tensor::kernels::Element;
use crate::tensor::kernels::blocks::first_max;

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    Some(match op {
        "MaxPool" | "AveragePool" | "LpPool" => pool,
        "GlobalAveragePool" | "GlobalMaxPool" | "GlobalLpPool" => global,
        _ => return None,
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Max,
    AverageOfInside,
    AverageOfWindow,
    Sum,
}

#[derive(Debug, Clone, Copy)]
struct Pool {
    kind: Kind,
    window: Window,
    input: [usize; 2],
    output: [usize; 2],
}

/// The input positions a window covers along one axis: first, one past last, step; and how many
/// positions it has inside the padded input.
#[derive(Debug, Clone, Copy)]
struct Cover {
    first: usize,
    end: usize,
    step: usize,
    padded: usize,
}

impl Pool {
    fn cover(&self, axis: usize, o: usize) -> Cover {
        let Window { kernel, stride, dilation, pads } = self.window;
        let (size, step) = (self.input[axis] as isize, dilation[axis]);
        let start = (o * stride[axis]) as isize - pads[axis] as isize;
        let reach = (kernel[axis] - 1) * step + 1;
        let skipped = if start < 0 { (-start as usize).div_ceil(step) } else { 0 };
        let first = start + (skipped * step) as isize;
        let end = (start + reach as isize).min(size);
        let limit = size + pads[axis + 2] as isize;
        let padded = ((start + reach as isize).min(limit) - start).max(0) as usize;
        let (first, end) = (first.max(0) as usize, end.max(first.max(0)) as usize);
        Cover { first, end, step, padded: padded.div_ceil(step) }
    }
}

impl<T: Element> Step<T> for Pool {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], state: &mut StepState<T>) {
        let (in_plane, out_plane) =
            (self.input[0] * self.input[1], self.output[0] * self.output[1]);
        let planes = 16;
        let x = inputs[0].par_chunks(planes * in_plane);
        if self.kind == Kind::Max {
            state.indices.resize(output.len(), 0);
            let positions = state.indices.par_chunks_mut(planes * out_plane);
            output.par_chunks_mut(planes * out_plane).zip(positions).zip(x).for_each(
                |((y, at), x)| {
                    let planes = y
                        .chunks_exact_mut(out_plane)
                        .zip(at.chunks_exact_mut(out_plane))
                        .zip(x.chunks_exact(in_plane));
                    for ((y, at), x) in planes {
                        if self.is_plain_halving() {
                            halve(self.input[1], self.output, x, y, at);
                        } else {
                            self.maxima(x, y, at);
                        }
                    }
                },
            );
            return;
        }
        output.par_chunks_mut(planes * out_plane).zip(x).for_each(|(y, x)| {
            for (y, x) in y.chunks_exact_mut(out_plane).zip(x.chunks_exact(in_plane)) {
                self.for_each_window(|o, rows, columns, share: T| {
                    let mut sum = T::ZERO;
                    for iy in (rows.first..rows.end).step_by(rows.step) {
                        for ix in (columns.first..columns.end).step_by(columns.step) {
                            sum += x[iy * self.input[1] + ix];
                        }
                    }
                    y[o] = sum * share;
                });
            }
        });
    }

    fn follower(&self) -> Option<Follower> {
        let halves = self.kind == Kind::Max
            && self.is_plain_halving()
            && [0, 1].map(|axis| self.input[axis] / 2) == self.output;
        halves.then_some(Follower::Halve { width: self.input[1] })
    }

    #[cfg(any(feature = "cuda", test))]
    fn on_device(&self, site: &cuda::Site<'_>) -> Result<Option<Box<dyn cuda::Operation>>> {
        let kind = match self.kind {
            Kind::Max => cuda::PoolKind::Max,
            Kind::AverageOfInside => cuda::PoolKind::AverageOfInside,
            Kind::AverageOfWindow => cuda::PoolKind::AverageOfWindow,
            Kind::Sum => cuda::PoolKind::Sum,
        };
        let Window { kernel, stride, dilation, pads: [top, left, bottom, right] } = self.window;
        let pads = [[top, left], [bottom, right]];
        let window = [self.input, self.output, kernel, stride, dilation, pads[0], pads[1]];
        Ok(Some(Box::new(cuda::Pool::new(site, kind, window)?)))
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING
    }

    fn backward(
        &self,
        _which: usize,
        _inputs: &[&[T]],
        _output: &[T],
        d_output: &[T],
        mut target: Target<'_, T>,
        state: &StepState<T>,
    ) {
        target.clear_if_fresh();
        let (in_plane, out_plane) =
            (self.input[0] * self.input[1], self.output[0] * self.output[1]);
        let planes = 16;
        let dx = target.data.par_chunks_mut(planes * in_plane);
        let dy = d_output.par_chunks(planes * out_plane);
        if self.kind == Kind::Max {
            dx.zip(dy).zip(state.indices.par_chunks(planes * out_plane)).for_each(
                |((dx, dy), at)| {
                    let planes = dx
                        .chunks_exact_mut(in_plane)
                        .zip(dy.chunks_exact(out_plane))
                        .zip(at.chunks_exact(out_plane));
                    for ((dx, dy), at) in planes {
                        for (&dy, &at) in dy.iter().zip(at) {
                            dx[at as usize] += dy;
                        }
                    }
                },
            );
            return;
        }
        dx.zip(dy).for_each(|(dx, dy)| {
            for (dx, dy) in dx.chunks_exact_mut(in_plane).zip(dy.chunks_exact(out_plane)) {
                self.for_each_window(|o, rows, columns, share: T| {
                    let g = dy[o] * share;
                    for iy in (rows.first..rows.end).step_by(rows.step) {
                        for ix in (columns.first..columns.end).step_by(columns.step) {
                            dx[iy * self.input[1] + ix] += g;
                        }
                    }
                });
            }
        });
    }
}

impl Pool {
    fn is_plain_halving(&self) -> bool {
        let Window { kernel, stride, dilation, pads } = self.window;
        kernel == [2, 2]
            && stride == [2, 2]
            && dilation == [1, 1]
            && pads == [0; 4]
            && self.output[0] * 2 <= self.input[0]
            && self.output[1] * 2 <= self.input[1]
    }

    fn maxima<T: Element>(&self, x: &[T], y: &mut [T], at: &mut [u32]) {
        for oy in 0..self.output[0] {
            let rows = self.cover(0, oy);
            for ox in 0..self.output[1] {
                let columns = self.cover(1, ox);
                let mut best = rows.first * self.input[1] + columns.first;
                for iy in (rows.first..rows.end).step_by(rows.step) {
                    for ix in (columns.first..columns.end).step_by(columns.step) {
                        let i = iy * self.input[1] + ix;
                        if x[i] > x[best] {
                            best = i;
                        }
                    }
                }
                let o = oy * self.output[1] + ox;
                y[o] = x[best];
                at[o] = best as u32;
            }
        }
    }

    /// Calls `visit(output position, rows, columns, 1 / divisor)` for each window.
    fn for_each_window<T: Element>(&self, mut visit: impl FnMut(usize, Cover, Cover, T)) {
        for oy in 0..self.output[0] {
            let rows = self.cover(0, oy);
            for ox in 0..self.output[1] {
                let columns = self.cover(1, ox);
                let inside = |cover: Cover| (cover.end - cover.first).div_ceil(cover.step);
                let count = match self.kind {
                    Kind::AverageOfWindow => rows.padded * columns.padded,
                    Kind::Sum => 1,
                    _ => inside(rows) * inside(columns),
                };
                let share = T::ONE / T::of(count.max(1) as f64);
                visit(oy * self.output[1] + ox, rows, columns, share);
            }
        }
    }
}

/// 2x2 maxima of one plane `width` wide, first of equals.
fn halve<T: Element>(width: usize, output: [usize; 2], x: &[T], y: &mut [T], at: &mut [u32]) {
    for oy in 0..output[0] {
        let (top, bottom) = (2 * oy * width, (2 * oy + 1) * width);
        let (upper, lower) = (&x[top..top + width], &x[bottom..bottom + width]);
        let row = oy * output[1]..(oy + 1) * output[1];
        let pairs = upper.chunks_exact(2).zip(lower.chunks_exact(2));
        let outputs = y[row.clone()].iter_mut().zip(&mut at[row]);
        for (ox, ((y, at), (u, l))) in outputs.zip(pairs).enumerate() {
            let (best, corner) = first_max([u[0], u[1], l[0], l[1]]);
            let (row, column) = (usize::from(corner / 2), usize::from(corner % 2));
            *y = best;
            *at = (top + row * width + 2 * ox + column) as u32;
        }
    }
}

/// The flat positions of the maxima, in the whole input.
#[derive(Debug)]
struct MaxPositions {
    pool: Pool,
    column_major: bool,
}

impl<T: Element> Choice<T> for MaxPositions {
    fn choose(&self, inputs: &[&[T]], output: &mut [T]) {
        let [height, width] = self.pool.input;
        let out_plane = self.pool.output[0] * self.pool.output[1];
        let (mut values, mut at) = (vec![T::ZERO; out_plane], vec![0; out_plane]);
        let planes = inputs[0].chunks_exact(height * width).zip(output.chunks_exact_mut(out_plane));
        for (plane, (x, y)) in planes.enumerate() {
            self.pool.maxima(x, &mut values, &mut at);
            for (y, &at) in y.iter_mut().zip(&at) {
                let at = at as usize;
                let inside = if self.column_major { at % width * height + at / width } else { at };
                *y = T::of((plane * height * width + inside) as f64);
            }
        }
    }
}

/// The window's positions along one axis.
///
/// # Errors
/// When it does not fit, or a pad is as long as the window.
fn positions(slide: &Slide, size: usize, ceil: bool) -> Result<usize> {
    let padded = size + slide.pads[0] + slide.pads[1];
    let room = padded.checked_sub(slide.reach()).ok_or_else(|| {
        Error::input(format!("a window of {} exceeds `{size}` elements", slide.reach()))
    })?;
    if slide.pads.iter().any(|&pad| pad >= slide.reach()) {
        return Err(Error::input(format!("pads `{:?}` exceed the window", slide.pads)));
    }
    let count = if ceil { room.div_ceil(slide.stride) } else { room / slide.stride } + 1;
    // A last window that starts in the right padding is dropped.
    let beyond = ceil && (count - 1) * slide.stride >= size + slide.pads[0];
    Ok(count - usize::from(beyond))
}

/// Emits pooling over the trailing `slides.len()` axes of `x` to `output` positions.
fn pooled<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    kind: Kind,
    slides: &[Slide],
    output: &[usize],
) -> Result<Value> {
    let lead = x.rank() - slides.len();
    let spatial = x.shape()[lead..].to_vec();
    if slides.len() <= 2 {
        let pool = planar(kind, slides, &spatial, output)?;
        let mut shape = x.shape()[..lead].to_vec();
        shape.extend_from_slice(output);
        return Ok(lower.emit(Box::new(pool), std::slice::from_ref(x), shape));
    }
    let y = pooled(lower, x, kind, &slides[1..], &output[1..])?;
    let mut shape = y.shape().to_vec();
    // The first axis is pooled over rows of all the others: a window one column wide.
    let rest: usize = output[1..].iter().product();
    let outer: usize = shape[..lead].iter().product();
    let rows = lower.reshape(&y, vec![outer, spatial[0], rest])?;
    let point = Slide { kernel: 1, stride: 1, dilation: 1, pads: [0, 0] };
    let y = pooled(lower, &rows, kind, &[slides[0], point], &[output[0], rest])?;
    shape[lead] = output[0];
    lower.reshape(&y, shape)
}

fn planar(kind: Kind, slides: &[Slide], spatial: &[usize], output: &[usize]) -> Result<Pool> {
    Ok(Pool { kind, window: two_axes(slides)?, input: plane(spatial), output: plane(output) })
}

/// Emits pooling `op` of `x` as `node`'s attributes say.
///
/// # Errors
/// When the window does not fit.
pub(super) fn emit_pool<T: Element>(
    lower: &mut Lower<'_, T>,
    node: &Node,
    x: &Value,
    op: &str,
) -> Result<Value> {
    let Windows { kind, slides, output } = windows(node, x, op)?;
    if kind != Kind::Sum {
        return pooled(lower, x, kind, &slides, &output);
    }
    let p = node.int("p", 2)? as f64;
    let size = apply(lower, Function::Abs, (0.0, 0.0), x);
    let powers = apply(lower, Function::Root, (p, 0.0), &size);
    let sums = pooled(lower, &powers, kind, &slides, &output)?;
    Ok(apply(lower, Function::Root, (1.0 / p, 0.0), &sums))
}

/// What a pooling operator slides over its input.
struct Windows {
    kind: Kind,
    slides: Vec<Slide>,
    output: Vec<usize>,
}

fn windows(node: &Node, x: &Value, op: &str) -> Result<Windows> {
    if x.rank() < 3 || x.is_empty() {
        let shape = x.shape();
        return Err(Error::input(format!("needs [N, C, ...], got shape `{shape:?}`")));
    }
    let spatial = &x.shape()[2..];
    let kernel = sizes(node, "kernel_shape", 0, spatial.len())?;
    let slides = slides(node, &kernel, spatial)?;
    let ceil = node.int("ceil_mode", 0)? != 0;
    let output = slides
        .iter()
        .zip(spatial)
        .map(|(slide, &size)| positions(slide, size, ceil))
        .collect::<Result<_>>()?;
    let kind = match (op, node.int("count_include_pad", 0)?) {
        ("MaxPool", _) => Kind::Max,
        ("LpPool", _) => Kind::Sum,
        (_, 0) => Kind::AverageOfInside,
        _ => Kind::AverageOfWindow,
    };
    Ok(Windows { kind, slides, output })
}

/// The side of the square blocks, without overlap or gap, that a pooling node of an `[height, width]` image
/// cuts it into; `None` where its windows are others.
///
/// # Errors
/// When the windows do not fit.
pub(in crate::graph) fn block_side(node: &Node, size: [usize; 2]) -> Result<Option<usize>> {
    let kernel = sizes(node, "kernel_shape", 0, 2)?;
    let slides = slides(node, &kernel, &size)?;
    let ceil = node.int("ceil_mode", 0)? != 0;
    let side = slides[0].kernel;
    let block = Slide { kernel: side, stride: side, dilation: 1, pads: [0, 0] };
    for (slide, &size) in slides.iter().zip(&size) {
        if *slide != block || side > LARGEST_BLOCK || positions(slide, size, ceil)? != size / side {
            return Ok(None);
        }
    }
    Ok(Some(side))
}

/// Side of the largest block that the tape pools.
const LARGEST_BLOCK: usize = 15;

fn pool<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let y = emit_pool(lower, node, &x, &node.op_type)?;
    lower.set_output(node, 0, y);
    if node.op_type == "MaxPool" && node.outputs.get(1).is_some_and(|name| !name.is_empty()) {
        let Windows { kind, slides, output } = windows(node, &x, "MaxPool")?;
        if slides.len() > 2 {
            return Err(Error::unsupported("its second output, over more than two axes"));
        }
        let column_major = node.int("storage_order", 0)? != 0;
        let pool = planar(kind, &slides, &x.shape()[2..], &output)?;
        let mut shape = x.shape()[..2].to_vec();
        shape.extend_from_slice(&output);
        let step = MaxPositions { pool, column_major };
        let y = lower.emit_as(DataType::Int64, Box::new(Chosen(step)), &[x], shape);
        lower.set_output(node, 1, y);
    }
    Ok(())
}

fn global<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let axes: Vec<usize> = (2..x.rank()).collect();
    let y = match node.op_type.as_str() {
        "GlobalMaxPool" => reduce_axes(lower, Reduction::Max, &x, &axes)?,
        "GlobalLpPool" => norm(lower, &x, node.int("p", 2)? as f64, &axes)?,
        _ => reduce_axes(lower, Reduction::Mean, &x, &axes)?,
    };
    lower.set_output(node, 0, y);
    Ok(())
}
