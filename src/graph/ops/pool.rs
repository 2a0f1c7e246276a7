//! Pooling: MaxPool, AveragePool, GlobalMaxPool, GlobalAveragePool, any kernel, stride, pads,
//! dilation, ceil_mode and count_include_pad. A tie in a maximum gives its gradient to the first, as
//! in PyTorch.

use rayon::prelude::*;

use super::Rule;
use super::conv::{Window, image_shape, plane, window};
use super::reduce::{Reduction, reduce_axes};
use crate::error::{Error, Result};
use crate::graph::ir::Node;
use crate::graph::plan::{Lower, Needs, Step, StepState, Target};
use crate::tensor::kernels::Element;

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    Some(match op {
        "MaxPool" | "AveragePool" => pool,
        "GlobalAveragePool" | "GlobalMaxPool" => global,
        _ => return None,
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Max,
    AverageOfInside,
    AverageOfWindow,
}

#[derive(Debug)]
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
                let count = if self.kind == Kind::AverageOfWindow {
                    rows.padded * columns.padded
                } else {
                    (rows.end - rows.first).div_ceil(rows.step)
                        * (columns.end - columns.first).div_ceil(columns.step)
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
            let column = 2 * ox;
            let (mut best, mut position) = (u[0], top + column);
            if u[1] > best {
                (best, position) = (u[1], top + column + 1);
            }
            if l[0] > best {
                (best, position) = (l[0], bottom + column);
            }
            if l[1] > best {
                (best, position) = (l[1], bottom + column + 1);
            }
            *y = best;
            *at = position as u32;
        }
    }
}

fn pool<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let (n, c, spatial) = image_shape(&x)?;
    let kernel: Vec<usize> = node
        .ints("kernel_shape")?
        .ok_or_else(|| Error::input("needs attribute `kernel_shape`"))?
        .iter()
        .map(|&k| k.clamp(0, 1 << 20) as usize)
        .collect();
    let window = window(node, &kernel, &spatial)?;
    let input = plane(&spatial);
    let ceil = node.int("ceil_mode", 0)? != 0;
    let mut output = [0; 2];
    for axis in 0..2 {
        let Window { kernel, stride, dilation, pads } = window;
        let reach = dilation[axis] * (kernel[axis] - 1) + 1;
        let room =
            (input[axis] + pads[axis] + pads[axis + 2]).checked_sub(reach).ok_or_else(|| {
                Error::input(format!("window {kernel:?} exceeds input `{spatial:?}`"))
            })?;
        if pads[axis] >= reach || pads[axis + 2] >= reach {
            return Err(Error::input(format!("pads `{pads:?}` exceed the window")));
        }
        output[axis] = if ceil { room.div_ceil(stride[axis]) } else { room / stride[axis] } + 1;
        // A last window that starts in the right padding is dropped.
        if ceil && (output[axis] - 1) * stride[axis] >= input[axis] + pads[axis] {
            output[axis] -= 1;
        }
    }
    if node.op_type == "MaxPool" && node.outputs.get(1).is_some_and(|name| !name.is_empty()) {
        return Err(Error::unsupported("its second output, the positions of the maxima"));
    }
    let kind = match (node.op_type.as_str(), node.int("count_include_pad", 0)?) {
        ("MaxPool", _) => Kind::Max,
        (_, 0) => Kind::AverageOfInside,
        _ => Kind::AverageOfWindow,
    };
    let mut shape = vec![n, c, output[0], output[1]];
    if spatial.len() == 1 {
        shape.remove(2);
    }
    let y = lower.emit(Box::new(Pool { kind, window, input, output }), &[x], shape);
    lower.set_output(node, 0, y);
    Ok(())
}

fn global<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let axes: Vec<usize> = (2..x.rank()).collect();
    let kind = if node.op_type == "GlobalMaxPool" { Reduction::Max } else { Reduction::Mean };
    let y = reduce_axes(lower, kind, &x, &axes)?;
    lower.set_output(node, 0, y);
    Ok(())
}
