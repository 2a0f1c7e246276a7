//! Operators that pick elements by index: Gather, GatherElements, GatherND. With constant indices they
//! are copies (`rearrange`); with indices that depend on the image, a step that looks them up.

use super::rearrange::{Source, indices, rearrange};
use super::{Rule, axis_index, strides};
use crate::error::{Error, Result};
use crate::graph::ir::{ConstantTensor, Node};
use crate::graph::plan::{Differentiable, Lower, Needs, Reads, Step, StepState, Target, Value};
use crate::tensor::kernels::Element;

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    Some(match op {
        "Gather" => gather,
        "GatherElements" => gather_elements,
        "GatherND" => gather_nd,
        _ => return None,
    })
}

/// One index that takes part in an address: `stride * (index[at] wrapped into 0..size)`.
#[derive(Debug, Clone, Copy)]
struct Term {
    at: usize,
    stride: usize,
    size: usize,
}

/// Where each output element comes from: a fixed part and, the same number for each, index terms.
#[derive(Debug)]
struct Addresses {
    shape: Vec<usize>,
    base: Vec<usize>,
    terms: Vec<Term>,
}

impl Addresses {
    fn terms_of(&self, output: usize) -> &[Term] {
        let each = self.terms.len() / self.base.len().max(1);
        &self.terms[output * each..(output + 1) * each]
    }
}

/// `index` in `0..size`, counted from the end when negative.
///
/// # Errors
/// When it is outside.
pub(super) fn wrapped(index: i64, size: usize) -> Result<usize> {
    let from_start = if index < 0 { index + size as i64 } else { index };
    usize::try_from(from_start)
        .ok()
        .filter(|&i| i < size)
        .ok_or_else(|| Error::input(format!("index `{index}` is outside an axis of {size}")))
}

/// Looks up elements of input 0 at run-time indices, input 1; an index outside counts as the nearest.
#[derive(Debug)]
struct LookUp {
    addresses: Addresses,
}

impl LookUp {
    fn position<T: Element>(&self, output: usize, chosen: &[T]) -> usize {
        let terms = self.addresses.terms_of(output).iter();
        let offset: usize = terms
            .map(|term| {
                let index = chosen[term.at].f64() as i64;
                let last = term.size as i64 - 1;
                let index = if index < 0 { index + term.size as i64 } else { index };
                term.stride * index.clamp(0, last) as usize
            })
            .sum();
        self.addresses.base[output] + offset
    }
}

impl<T: Element> Step<T> for LookUp {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], _state: &mut StepState<T>) {
        for (i, y) in output.iter_mut().enumerate() {
            *y = inputs[0][self.position(i, inputs[1])];
        }
    }

    fn needs(&self) -> Needs {
        Needs { inputs: Reads::Yes, ..Needs::NOTHING }
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
        if which == 0 {
            for (i, &g) in d_output.iter().enumerate() {
                target.data[self.position(i, inputs[1])] += g;
            }
        }
    }

    fn differentiable(&self, which: usize) -> Differentiable {
        if which == 0 { Differentiable::Yes } else { Differentiable::Choice }
    }
}

/// Emits the elements of `x` at `addresses` under indices `chosen`.
fn look_up<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    chosen: &Value,
    addresses: Addresses,
) -> Result<Value> {
    let shape = addresses.shape.clone();
    let Some(constant) = chosen.constant() else {
        if x.is_empty() {
            return Err(Error::input("cannot pick from an empty tensor"));
        }
        let dtype = x.dtype();
        let step = LookUp { addresses };
        return Ok(lower.emit_as(dtype, Box::new(step), &[x.clone(), chosen.clone()], shape));
    };
    let picks = integers(constant)?;
    let mut positions = Vec::with_capacity(addresses.base.len());
    for (output, &base) in addresses.base.iter().enumerate() {
        let mut position = base;
        for term in addresses.terms_of(output) {
            position += term.stride * wrapped(picks[term.at], term.size)?;
        }
        positions.push(position);
    }
    let map = positions.into_iter().map(|at| Source::Element { input: 0, at });
    rearrange(lower, std::slice::from_ref(x), shape, 0.0, map)
}

/// The integers of an index tensor.
///
/// # Errors
/// When it holds other numbers.
pub(super) fn integers(tensor: &ConstantTensor) -> Result<&[i64]> {
    tensor.as_i64().ok_or_else(|| Error::input("indices must be integers"))
}

fn gather<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let (x, chosen) = (lower.input(node, 0)?, lower.input(node, 1)?);
    let axis = axis_index(node.int("axis", 0)?, x.rank())?;
    let size = *x.shape().get(axis).ok_or_else(|| Error::input("cannot pick from a scalar"))?;
    let inner: usize = x.shape()[axis + 1..].iter().product();
    let outer: usize = x.shape()[..axis].iter().product();
    let count = chosen.len();
    let mut shape = x.shape()[..axis].to_vec();
    shape.extend_from_slice(chosen.shape());
    shape.extend_from_slice(&x.shape()[axis + 1..]);
    let outputs =
        || (0..outer * count * inner).map(|i| (i / (count * inner), i / inner % count, i));
    let base = outputs().map(|(row, _, i)| row * size * inner + i % inner).collect();
    let terms = outputs().map(|(_, at, _)| Term { at, stride: inner, size }).collect();
    let y = look_up(lower, &x, &chosen, Addresses { shape, base, terms })?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn gather_elements<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let (x, chosen) = (lower.input(node, 0)?, lower.input(node, 1)?);
    let axis = axis_index(node.int("axis", 0)?, x.rank())?;
    let shape = chosen.shape().to_vec();
    let fits =
        shape.len() == x.rank() && (0..shape.len()).all(|a| a == axis || shape[a] <= x.shape()[a]);
    if !fits {
        let text = format!("indices of shape {shape:?} do not fit `{:?}`", x.shape());
        return Err(Error::input(text));
    }
    let own = strides(x.shape());
    let (stride, size) = (own[axis], x.shape()[axis]);
    let base = indices(&shape)
        .map(|index| (0..index.len()).filter(|&a| a != axis).map(|a| index[a] * own[a]).sum())
        .collect();
    let terms = (0..chosen.len()).map(|at| Term { at, stride, size }).collect();
    let y = look_up(lower, &x, &chosen, Addresses { shape, base, terms })?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn gather_nd<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let (x, chosen) = (lower.input(node, 0)?, lower.input(node, 1)?);
    let batch = usize::try_from(node.int("batch_dims", 0)?).unwrap_or(usize::MAX);
    let depth = chosen.shape().last().copied().unwrap_or(0);
    let lead = chosen.rank().saturating_sub(1);
    if batch > lead || batch + depth > x.rank() || x.shape()[..batch] != chosen.shape()[..batch] {
        let (indices, shape) = (chosen.shape(), x.shape());
        return Err(Error::input(format!("indices of shape {indices:?} do not fit `{shape:?}`")));
    }
    let own = strides(x.shape());
    let mut shape = chosen.shape()[..lead].to_vec();
    shape.extend_from_slice(&x.shape()[batch + depth..]);
    let inner: usize = x.shape()[batch + depth..].iter().product();
    let per_batch: usize = x.shape()[batch..].iter().product();
    let rows: usize = chosen.shape()[..lead].iter().product();
    let rows_per_batch: usize = chosen.shape()[batch..lead].iter().product();
    let mut base = Vec::with_capacity(rows * inner);
    let mut terms = Vec::with_capacity(rows * inner * depth);
    for row in 0..rows {
        for i in 0..inner {
            base.push(row / rows_per_batch.max(1) * per_batch + i);
            terms.extend((0..depth).map(|d| Term {
                at: row * depth + d,
                stride: own[batch + d],
                size: x.shape()[batch + d],
            }));
        }
    }
    let y = look_up(lower, &x, &chosen, Addresses { shape, base, terms })?;
    lower.set_output(node, 0, y);
    Ok(())
}
