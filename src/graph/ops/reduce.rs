//! Reductions over axes: sum, mean, max, min, product, norms, log-sum-exp. A tie of a maximum shares
//! its gradient equally among the tied (PyTorch's amax).

use rayon::prelude::*;

use super::Rule;
use super::arrange::sorted_axes;
use super::elementwise::{CHUNK, Function, apply};
use super::transpose::permute;
use crate::error::Result;
use crate::graph::ir::Node;
use crate::graph::plan::{Lower, Needs, Step, StepState, Target, Value};
#[cfg(any(feature = "cuda", test))]
use crate::tensor::cuda;
use crate::tensor::kernels::Element;
use crate::tensor::kernels::map::sum_axis;

/// How the elements of a group become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reduction {
    Sum,
    Mean,
    Max,
    Min,
    Product,
    LogSumExp,
}

/// Reduces the middle of [outer, group, inner].
#[derive(Debug)]
struct Reduce {
    kind: Reduction,
    group: usize,
    inner: usize,
}

impl Reduce {
    /// The elements of the group of one output, by index into the input.
    fn members(&self, output: usize) -> impl Iterator<Item = usize> + Clone {
        let start = output / self.inner * self.group * self.inner + output % self.inner;
        let inner = self.inner;
        (0..self.group).map(move |i| start + i * inner)
    }

    fn value<T: Element>(&self, x: &[T], output: usize) -> T {
        let values = self.members(output).map(|i| x[i]);
        match self.kind {
            Reduction::Sum => values.sum(),
            Reduction::Mean => values.sum::<T>() / T::of(self.group as f64),
            Reduction::Max => values.reduce(T::max).unwrap_or(T::of(f64::NEG_INFINITY)),
            Reduction::Min => values.reduce(T::min).unwrap_or(T::of(f64::INFINITY)),
            Reduction::Product => values.fold(T::ONE, |a, b| a * b),
            Reduction::LogSumExp => {
                let top = values.clone().reduce(T::max).unwrap_or(T::ZERO);
                top + values.map(|v| (v - top).exp()).sum::<T>().ln()
            }
        }
    }
}

impl<T: Element> Step<T> for Reduce {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], _state: &mut StepState<T>) {
        let x = inputs[0];
        if let Reduction::Sum | Reduction::Mean = self.kind {
            sum_axis(x, self.group, self.inner, output);
            if self.kind == Reduction::Mean {
                let count = T::of(self.group as f64);
                output.iter_mut().for_each(|y| *y /= count);
            }
            return;
        }
        output.par_iter_mut().with_min_len(256).enumerate().for_each(|(o, y)| {
            *y = self.value(x, o);
        });
    }

    #[cfg(any(feature = "cuda", test))]
    fn on_device(&self, site: &cuda::Site<'_>) -> Result<Option<Box<dyn cuda::Operation>>> {
        let (kind, outputs) = (self.kind as i32, site.output);
        let step = cuda::Reduce { kind, group: self.group, inner: self.inner, outputs };
        Ok(Some(Box::new(step)))
    }

    fn needs(&self) -> Needs {
        match self.kind {
            Reduction::Sum | Reduction::Mean => Needs::NOTHING,
            _ => Needs { inputs: crate::graph::plan::Reads::Yes, ..Needs::OUTPUT },
        }
    }

    fn backward(
        &self,
        _which: usize,
        inputs: &[&[T]],
        output: &[T],
        d_output: &[T],
        mut target: Target<'_, T>,
        _state: &StepState<T>,
    ) {
        if let Reduction::Sum | Reduction::Mean = self.kind {
            let share = match self.kind {
                Reduction::Mean => T::ONE / T::of(self.group as f64),
                _ => T::ONE,
            };
            let block = self.group * self.inner;
            let mode = target.mode;
            // Blocks of one value are too small to be a task each.
            let many = (CHUNK / block.max(1)).max(1);
            let rows = target.data.par_chunks_mut(block * many);
            rows.zip(d_output.par_chunks(self.inner * many)).for_each(|(d, dy)| {
                for (d, dy) in d.chunks_exact_mut(block).zip(dy.chunks_exact(self.inner)) {
                    match dy {
                        &[g] => Target { data: d, mode }.put(|_| g * share),
                        _ => {
                            for d in d.chunks_exact_mut(self.inner) {
                                Target { data: d, mode }.put_map(dy, |g| g * share);
                            }
                        }
                    }
                }
            });
            return;
        }
        target.clear_if_fresh();
        let x = inputs[0];
        for o in 0..output.len() {
            let (y, dy) = (output[o], d_output[o]);
            match self.kind {
                Reduction::Max | Reduction::Min => {
                    let ties = self.members(o).filter(|&i| x[i] == y).count().max(1);
                    let share = dy / T::of(ties as f64);
                    self.members(o).filter(|&i| x[i] == y).for_each(|i| target.data[i] += share);
                }
                Reduction::LogSumExp => {
                    self.members(o).for_each(|i| target.data[i] += dy * (x[i] - y).exp());
                }
                _ => {
                    // Product of the others: those before times those after, right also with zeros.
                    let members: Vec<usize> = self.members(o).collect();
                    let mut before = Vec::with_capacity(members.len());
                    let mut product = T::ONE;
                    for &i in &members {
                        before.push(product);
                        product *= x[i];
                    }
                    let mut after = T::ONE;
                    for (&i, &before) in members.iter().zip(&before).rev() {
                        target.data[i] += dy * before * after;
                        after *= x[i];
                    }
                }
            }
        }
    }
}

/// Emits a reduction of `x` over `axes` (sorted), keeping them with size 1.
pub(super) fn reduce_axes<T: Element>(
    lower: &mut Lower<'_, T>,
    kind: Reduction,
    x: &Value,
    axes: &[usize],
) -> Result<Value> {
    let mut kept = x.shape().to_vec();
    axes.iter().for_each(|&axis| kept[axis] = 1);
    let contiguous = axes.windows(2).all(|pair| pair[1] == pair[0] + 1);
    let (source, outer_axes): (Value, usize) = if contiguous {
        (x.clone(), axes.first().copied().unwrap_or(0))
    } else {
        let mut permutation: Vec<usize> = (0..x.rank()).filter(|a| !axes.contains(a)).collect();
        permutation.extend_from_slice(axes);
        (permute(lower, x, &permutation)?, x.rank() - axes.len())
    };
    let shape = source.shape();
    let group = shape[outer_axes..outer_axes + axes.len()].iter().product();
    let inner: usize = shape[outer_axes + axes.len()..].iter().product();
    let step = Reduce { kind, group, inner: inner.max(1) };
    Ok(lower.emit(Box::new(step), &[source], kept))
}

/// Emits the `p`-norm of `x` over `axes`, kept with size 1. The gradient of the norm of zeros is 0.
pub(super) fn norm<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    p: f64,
    axes: &[usize],
) -> Result<Value> {
    let size = apply(lower, Function::Abs, (0.0, 0.0), x);
    if p == 1.0 {
        return reduce_axes(lower, Reduction::Sum, &size, axes);
    }
    let powers = match p {
        2.0 => apply(lower, Function::Square, (0.0, 0.0), x),
        _ => apply(lower, Function::Root, (p, 0.0), &size),
    };
    let sum = reduce_axes(lower, Reduction::Sum, &powers, axes)?;
    Ok(apply(lower, Function::Root, (1.0 / p, 0.0), &sum))
}

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    match op {
        "ReduceSum" | "ReduceMean" | "ReduceMax" | "ReduceMin" | "ReduceProd" | "ReduceL1"
        | "ReduceL2" | "ReduceLogSum" | "ReduceLogSumExp" | "ReduceSumSquare" => Some(reduce),
        _ => None,
    }
}

fn reduce<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let given = sorted_axes(lower, node, 1, x.rank())?.filter(|axes| !axes.is_empty());
    let y = match given {
        None if node.int("noop_with_empty_axes", 0)? != 0 => x,
        given => {
            let axes = given.unwrap_or_else(|| (0..x.rank()).collect());
            let none = (0.0, 0.0);
            let mut y = match node.op_type.as_str() {
                "ReduceMean" => reduce_axes(lower, Reduction::Mean, &x, &axes)?,
                "ReduceMax" => reduce_axes(lower, Reduction::Max, &x, &axes)?,
                "ReduceMin" => reduce_axes(lower, Reduction::Min, &x, &axes)?,
                "ReduceProd" => reduce_axes(lower, Reduction::Product, &x, &axes)?,
                "ReduceL1" => norm(lower, &x, 1.0, &axes)?,
                "ReduceL2" => norm(lower, &x, 2.0, &axes)?,
                "ReduceLogSum" => {
                    let sum = reduce_axes(lower, Reduction::Sum, &x, &axes)?;
                    apply(lower, Function::Log, none, &sum)
                }
                "ReduceLogSumExp" => reduce_axes(lower, Reduction::LogSumExp, &x, &axes)?,
                "ReduceSumSquare" => {
                    let square = apply(lower, Function::Square, none, &x);
                    reduce_axes(lower, Reduction::Sum, &square, &axes)?
                }
                _ => reduce_axes(lower, Reduction::Sum, &x, &axes)?,
            };
            if node.int("keepdims", 1)? == 0 {
                let kept = (0..y.rank()).filter(|axis| !axes.contains(axis));
                let shape = kept.map(|axis| y.shape()[axis]).collect();
                y = lower.reshape(&y, shape)?;
            }
            y
        }
    };
    lower.set_output(node, 0, y);
    Ok(())
}
