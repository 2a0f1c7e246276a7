//! Operators that write elements at constant indices: ScatterElements (and its old name Scatter),
//! ScatterND, TensorScatter, OneHot. Without a reduction they are copies.

use super::binary::{Binary, emit};
use super::gather::{integers, wrapped};
use super::rearrange::{Source, indices, rearrange};
use super::{Rule, axis_index, strides};
use crate::error::{Error, Result};
use crate::graph::ir::{ConstantTensor, DataType, Node};
use crate::graph::plan::{Lower, Needs, Reads, Step, StepState, Target, Value};
use crate::tensor::kernels::Element;

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    Some(match op {
        "Scatter" | "ScatterElements" => scatter_elements,
        "ScatterND" => scatter_nd,
        "TensorScatter" => tensor_scatter,
        "OneHot" => one_hot,
        _ => return None,
    })
}

/// What becomes of an element that is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reduction {
    Replace,
    Add,
    Multiply,
    Max,
    Min,
}

impl Reduction {
    fn of(node: &Node) -> Result<Self> {
        Ok(match node.text("reduction", "none")? {
            "none" => Self::Replace,
            "add" => Self::Add,
            "mul" => Self::Multiply,
            "max" => Self::Max,
            "min" => Self::Min,
            other => return Err(Error::input(format!("reduction `{other}` does not exist"))),
        })
    }
}

/// `output = input 0`, then element `to[i]` combined with element i of input 1, in order.
#[derive(Debug)]
struct Scatter {
    to: Vec<usize>,
    reduction: Reduction,
}

impl<T: Element> Step<T> for Scatter {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], _state: &mut StepState<T>) {
        output.copy_from_slice(inputs[0]);
        for (&to, &update) in self.to.iter().zip(inputs[1]) {
            let y = &mut output[to];
            *y = match self.reduction {
                Reduction::Replace => update,
                Reduction::Add => *y + update,
                Reduction::Multiply => *y * update,
                Reduction::Max => y.max(update),
                Reduction::Min => y.min(update),
            };
        }
    }

    fn needs(&self) -> Needs {
        match self.reduction {
            Reduction::Replace | Reduction::Add => Needs::NOTHING,
            _ => Needs { inputs: Reads::Yes, ..Needs::OUTPUT },
        }
    }

    fn backward(
        &self,
        which: usize,
        inputs: &[&[T]],
        output: &[T],
        d_output: &[T],
        mut target: Target<'_, T>,
        _state: &StepState<T>,
    ) {
        target.clear_if_fresh();
        // The elements that were combined into each output: its own, then the updates.
        let mut members: Vec<Vec<usize>> = vec![Vec::new(); d_output.len()];
        for (i, &to) in self.to.iter().enumerate() {
            members[to].push(i);
        }
        for (to, updates) in members.iter().enumerate() {
            let g = d_output[to];
            let value = |member: usize| match member {
                0 => inputs[0][to],
                i => inputs[1][updates[i - 1]],
            };
            let count = updates.len() + 1;
            for member in 0..count {
                let slope = match self.reduction {
                    Reduction::Replace if member + 1 == count => T::ONE,
                    Reduction::Replace => T::ZERO,
                    Reduction::Add => T::ONE,
                    Reduction::Multiply => (0..count)
                        .filter(|&other| other != member)
                        .fold(T::ONE, |product, other| product * value(other)),
                    Reduction::Max | Reduction::Min if value(member) == output[to] => {
                        let ties = (0..count).filter(|&other| value(other) == output[to]).count();
                        T::ONE / T::of(ties as f64)
                    }
                    Reduction::Max | Reduction::Min => T::ZERO,
                };
                match (which, member) {
                    (0, 0) => target.data[to] += g * slope,
                    (1, i) if i > 0 => target.data[updates[i - 1]] += g * slope,
                    _ => {}
                }
            }
        }
    }
}

/// Emits `x` with `updates` written at flat positions `to`.
fn scatter<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    updates: &Value,
    to: Vec<usize>,
    reduction: Reduction,
) -> Result<Value> {
    if to.len() != updates.len() {
        let text = format!("{} indices for `{}` updates", to.len(), updates.len());
        return Err(Error::input(text));
    }
    let shape = x.shape().to_vec();
    if reduction == Reduction::Replace {
        let mut map: Vec<Source> =
            (0..x.len()).map(|at| Source::Element { input: 0, at }).collect();
        for (at, &to) in to.iter().enumerate() {
            map[to] = Source::Element { input: 1, at };
        }
        return rearrange(lower, &[x.clone(), updates.clone()], shape, 0.0, map.into_iter());
    }
    Ok(lower.emit(Box::new(Scatter { to, reduction }), &[x.clone(), updates.clone()], shape))
}

fn scatter_elements<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let (x, updates) = (lower.input(node, 0)?, lower.input(node, 2)?);
    let chosen = lower.constant_input(node, 1)?.ok_or_else(|| Error::input("needs input `1`"))?;
    let axis = axis_index(node.int("axis", 0)?, x.rank())?;
    let own = strides(x.shape());
    let shape = &chosen.shape;
    let fits =
        shape.len() == x.rank() && (0..shape.len()).all(|a| a == axis || shape[a] <= x.shape()[a]);
    if !fits {
        let text = format!("indices of shape {shape:?} do not fit `{:?}`", x.shape());
        return Err(Error::input(text));
    }
    let mut to = Vec::with_capacity(chosen.data.len());
    for (index, &pick) in indices(shape).zip(integers(&chosen)?) {
        let others: usize =
            (0..index.len()).filter(|&a| a != axis).map(|a| index[a] * own[a]).sum();
        to.push(others + own[axis] * wrapped(pick, x.shape()[axis])?);
    }
    let y = scatter(lower, &x, &updates, to, Reduction::of(node)?)?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn scatter_nd<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let (x, updates) = (lower.input(node, 0)?, lower.input(node, 2)?);
    let chosen = lower.constant_input(node, 1)?.ok_or_else(|| Error::input("needs input `1`"))?;
    let depth = chosen.shape.last().copied().unwrap_or(0);
    if depth > x.rank() {
        let text = format!("indices of shape {:?} do not fit `{:?}`", chosen.shape, x.shape());
        return Err(Error::input(text));
    }
    let own = strides(x.shape());
    let inner: usize = x.shape()[depth..].iter().product();
    let mut to = Vec::new();
    for row in integers(&chosen)?.chunks_exact(depth.max(1)) {
        let mut start = 0;
        for (axis, &pick) in row.iter().enumerate() {
            start += own[axis] * wrapped(pick, x.shape()[axis])?;
        }
        to.extend(start..start + inner);
    }
    let y = scatter(lower, &x, &updates, to, Reduction::of(node)?)?;
    lower.set_output(node, 0, y);
    Ok(())
}

/// A cache of keys or values with new rows written in: from `write_indices[batch]` on along `axis`.
fn tensor_scatter<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let (x, updates) = (lower.input(node, 0)?, lower.input(node, 1)?);
    let axis = axis_index(node.int("axis", -2)?, x.rank())?;
    let batch = x.shape().first().copied().unwrap_or(0);
    let starts = lower.integers(node, 2)?.unwrap_or_else(|| vec![0; batch]);
    let circular = node.text("mode", "linear")? == "circular";
    let (own, size) = (strides(x.shape()), x.shape()[axis]);
    if axis == 0 || updates.rank() != x.rank() || starts.len() != batch {
        return Err(Error::input(format!("updates of shape `{:?}` do not fit", updates.shape())));
    }
    let mut to = Vec::with_capacity(updates.len());
    for mut index in indices(updates.shape()) {
        let row = starts[index[0]] + index[axis] as i64;
        let row = if circular { row.rem_euclid(size as i64) } else { row };
        index[axis] = wrapped(row, size)?;
        to.push(index.iter().zip(&own).map(|(i, s)| i * s).sum());
    }
    let y = scatter(lower, &x, &updates, to, Reduction::Replace)?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn one_hot<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let (chosen, values) = (lower.input(node, 0)?, lower.input(node, 2)?);
    let depth = lower.constant_input(node, 1)?.ok_or_else(|| Error::input("needs `depth`"))?;
    let depth = depth.to_f64().first().copied().unwrap_or(0.0);
    if !(1.0..1e6).contains(&depth) || values.len() != 2 {
        return Err(Error::input(format!("depth `{depth}` or values make no sense")));
    }
    let rank = chosen.rank() + 1;
    let axis = axis_index(node.int("axis", -1)?, rank)?;
    let mut shape = chosen.shape().to_vec();
    shape.insert(axis, 1);
    let chosen = lower.reshape(&chosen, shape)?;
    let constant = |shape: Vec<usize>, values: Vec<i64>| {
        let tensor = ConstantTensor { dtype: chosen.dtype(), ..ConstantTensor::i64(shape, values) };
        Value::Constant(std::sync::Arc::new(super::shape::convert(&tensor, chosen.dtype())))
    };
    let mut along = vec![1; rank];
    along[axis] = depth as usize;
    let places = constant(along, (0..depth as i64).collect());
    let end = constant(Vec::new(), vec![depth as i64]);
    // A negative index counts from the end; one outside -depth..depth is nowhere.
    let from_end = emit(lower, Binary::Add, &chosen, &end)?;
    let first = emit(lower, Binary::Equal, &chosen, &places)?;
    let second = emit(lower, Binary::Equal, &from_end, &places)?;
    let hot = emit(lower, Binary::Or, &first, &second)?.of_type(DataType::Bool);
    let pick = |lower: &mut Lower<'_, T>, at| {
        let map = std::iter::once(Source::Element { input: 0, at });
        rearrange(lower, std::slice::from_ref(&values), Vec::new(), 0.0, map)
    };
    let (off, on) = (pick(lower, 0)?, pick(lower, 1)?);
    let y = super::select::choose(lower, &hot, &on, &off)?;
    lower.set_output(node, 0, y);
    Ok(())
}
