//! Softmax and LogSoftmax along one axis (opset 13 on) or over all axes from one on (before 13).

use rayon::prelude::*;

use super::order::axis_last;
use super::{Rule, axis_index};
use crate::error::Result;
use crate::graph::ir::Node;
use crate::graph::plan::{Lower, Mode, Needs, Step, StepState, Target, Value};
#[cfg(any(feature = "cuda", test))]
use crate::tensor::cuda;
use crate::tensor::kernels::Element;
use crate::tensor::kernels::map::sum;
use crate::tensor::kernels::row;
use crate::tensor::kernels::special::exp;

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    match op {
        "Softmax" | "LogSoftmax" => Some(softmax),
        _ => None,
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Softmax,
    LogSoftmax,
    /// Softmax of scores some of which are minus infinity: a row of nothing else becomes zeros.
    Masked,
}

/// Normalises each row of `row` values.
#[derive(Debug)]
struct Softmax {
    kind: Kind,
    row: usize,
}

impl<T: Element> Step<T> for Softmax {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], _state: &mut StepState<T>) {
        let rows = output.par_chunks_mut(self.row).zip(inputs[0].par_chunks(self.row));
        rows.with_min_len(32).for_each(|(y, x)| {
            let top = row::largest(x);
            if self.kind == Kind::Masked && top.f64() == f64::NEG_INFINITY {
                y.fill(T::ZERO);
                return;
            }
            let sum = row::exponentials(x, y, top);
            match self.kind {
                Kind::Softmax | Kind::Masked => row::scale(y, T::ONE / sum),
                Kind::LogSoftmax => {
                    let log = top + sum.ln();
                    y.iter_mut().zip(x).for_each(|(y, &x)| *y = x - log);
                }
            }
        });
    }

    #[cfg(any(feature = "cuda", test))]
    fn on_device(&self, site: &cuda::Site<'_>) -> Result<Option<Box<dyn cuda::Operation>>> {
        let _ = site;
        Ok(Some(Box::new(cuda::Softmax { row: self.row, kind: self.kind as i32 })))
    }

    fn needs(&self) -> Needs {
        Needs::OUTPUT
    }

    fn backward(
        &self,
        _which: usize,
        _inputs: &[&[T]],
        output: &[T],
        d_output: &[T],
        target: Target<'_, T>,
        _state: &StepState<T>,
    ) {
        let mode = target.mode;
        target.data.par_chunks_mut(self.row).with_min_len(32).enumerate().for_each(|(at, d)| {
            let range = at * self.row..(at + 1) * self.row;
            let (y, dy) = (&output[range.clone()], &d_output[range]);
            match self.kind {
                Kind::Softmax | Kind::Masked => {
                    row::softmax_backward(y, dy, d, mode == Mode::Add);
                }
                Kind::LogSoftmax => {
                    let total = sum(dy);
                    Target { data: d, mode }.put_zip(dy, y, |g, y| g - exp(y) * total);
                }
            }
        });
    }
}

/// Emits a softmax over the last axis in which a row of minus infinities becomes zeros.
pub(super) fn masked_softmax<T: Element>(lower: &mut Lower<'_, T>, x: &Value) -> Value {
    let row = x.shape().last().copied().unwrap_or(1).max(1);
    let step = Softmax { kind: Kind::Masked, row };
    lower.emit(Box::new(step), std::slice::from_ref(x), x.shape().to_vec())
}

fn softmax<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let kind = if node.op_type == "Softmax" { Kind::Softmax } else { Kind::LogSoftmax };
    let old = lower.opset < 13;
    let axis = axis_index(node.int("axis", if old { 1 } else { -1 })?, x.rank())?;
    let rank = x.rank();
    if old || axis + 1 == rank {
        let row = if old { x.shape()[axis..].iter().product() } else { x.shape()[axis] };
        let shape = x.shape().to_vec();
        let y = lower.emit(Box::new(Softmax { kind, row }), &[x], shape);
        lower.set_output(node, 0, y);
        return Ok(());
    }
    let moved = axis_last(lower, &x, axis)?;
    let (row, shape) = (moved.shape()[rank - 1], moved.shape().to_vec());
    let y = lower.emit(Box::new(Softmax { kind, row }), &[moved], shape);
    let y = axis_last(lower, &y, axis)?;
    lower.set_output(node, 0, y);
    Ok(())
}
