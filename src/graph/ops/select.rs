//! Choices: Where, and the operators that keep a part by a constant rule: Compress, Trilu,
//! ReverseSequence, NonZero.

use std::sync::Arc;

use super::arrange::{broadcast_strides, broadcast_to, dot};
use super::gather::integers;
use super::rearrange::{Source, indices, rearrange};
use super::{Rule, axis_index, broadcast_shape, strides};
use crate::error::{Error, Result};
use crate::graph::ir::{ConstantTensor, Node};
use crate::graph::plan::{Differentiable, Lower, Needs, Reads, Step, StepState, Target, Value};
#[cfg(any(feature = "cuda", test))]
use crate::tensor::cuda;
use crate::tensor::kernels::Element;

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    Some(match op {
        "Where" => select,
        "Compress" => compress,
        "Trilu" => trilu,
        "ReverseSequence" => reverse_sequence,
        "NonZero" => non_zero,
        "EyeLike" => eye_like,
        _ => return None,
    })
}

/// Input 1 where input 0 holds, else input 2; all of one length.
#[derive(Debug)]
struct Choose;

impl<T: Element> Step<T> for Choose {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], _state: &mut StepState<T>) {
        let branches = inputs[1].iter().zip(inputs[2]);
        for ((y, &holds), (&yes, &no)) in output.iter_mut().zip(inputs[0]).zip(branches) {
            *y = if holds != T::ZERO { yes } else { no };
        }
    }

    #[cfg(any(feature = "cuda", test))]
    fn on_device(&self, site: &cuda::Site<'_>) -> Result<Option<Box<dyn cuda::Operation>>> {
        let _ = site;
        Ok(Some(Box::new(cuda::Choose)))
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
        if which == 0 {
            return target.clear_if_fresh();
        }
        let wanted = which == 1;
        target.put_zip(
            d_output,
            inputs[0],
            |g, holds| {
                if (holds != T::ZERO) == wanted { g } else { T::ZERO }
            },
        );
    }

    fn differentiable(&self, which: usize) -> Differentiable {
        if which == 0 { Differentiable::Choice } else { Differentiable::Yes }
    }
}

/// Emits `yes` where `condition` holds, else `no`, all broadcast together.
pub(super) fn choose<T: Element>(
    lower: &mut Lower<'_, T>,
    condition: &Value,
    yes: &Value,
    no: &Value,
) -> Result<Value> {
    let shape = broadcast_shape(&broadcast_shape(condition.shape(), yes.shape())?, no.shape())?;
    let Some(constant) = condition.constant() else {
        let condition = broadcast_to(lower, condition, &shape)?;
        let (yes, no) = (broadcast_to(lower, yes, &shape)?, broadcast_to(lower, no, &shape)?);
        let dtype = yes.dtype();
        return Ok(lower.emit_as(dtype, Box::new(Choose), &[condition, yes, no], shape));
    };
    let spread =
        [&constant.shape[..], yes.shape(), no.shape()].map(|from| broadcast_strides(from, &shape));
    let truth: Vec<bool> = constant.to_f64().iter().map(|&v| v != 0.0).collect();
    let map = indices(&shape).map(move |index| {
        let input = usize::from(!truth[dot(&index, &spread[0])]);
        Source::Element { input, at: dot(&index, &spread[1 + input]) }
    });
    rearrange(lower, &[yes.clone(), no.clone()], shape.clone(), 0.0, map)
}

fn select<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let (condition, yes) = (lower.input(node, 0)?, lower.input(node, 1)?);
    let no = lower.input(node, 2)?;
    let y = choose(lower, &condition, &yes, &no)?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn compress<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let mut x = lower.input(node, 0)?;
    let keep = lower.constant_input(node, 1)?.ok_or_else(|| Error::input("needs input `1`"))?;
    let axis = match node.attributes.contains_key("axis") {
        true => axis_index(node.int("axis", 0)?, x.rank())?,
        false => {
            x = lower.reshape(&x, vec![x.len()])?;
            0
        }
    };
    let size = x.shape()[axis];
    let kept: Vec<usize> = integers(&keep)?
        .iter()
        .enumerate()
        .filter_map(|(i, &v)| (v != 0 && i < size).then_some(i))
        .collect();
    let mut shape = x.shape().to_vec();
    shape[axis] = kept.len();
    let own = strides(x.shape());
    let map = indices(&shape).map(|mut index| {
        index[axis] = kept[index[axis]];
        Source::Element { input: 0, at: dot(&index, &own) }
    });
    let y = rearrange(lower, &[x], shape.clone(), 0.0, map)?;
    lower.set_output(node, 0, y);
    Ok(())
}

/// Emits the upper (or lower) triangle of the last two axes from diagonal `k` on, 0 elsewhere.
pub(super) fn triangle<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    upper: bool,
    k: i64,
) -> Result<Value> {
    let [.., rows, columns] = x.shape() else {
        return Err(Error::input(format!("needs a matrix, got shape `{:?}`", x.shape())));
    };
    let (rows, columns) = (*rows, *columns);
    let map = (0..x.len()).map(|at| {
        let (row, column) = ((at / columns % rows) as i64, (at % columns) as i64);
        let inside = if upper { column >= row + k } else { column <= row + k };
        if inside { Source::Element { input: 0, at } } else { Source::Fill }
    });
    rearrange(lower, std::slice::from_ref(x), x.shape().to_vec(), 0.0, map)
}

fn trilu<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let k = lower.integers(node, 1)?.and_then(|k| k.first().copied()).unwrap_or(0);
    let y = triangle(lower, &x, node.int("upper", 1)? != 0, k)?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn reverse_sequence<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let lengths = lower.integers(node, 1)?.ok_or_else(|| Error::input("needs input `1`"))?;
    let time = axis_index(node.int("time_axis", 0)?, x.rank())?;
    let batch = axis_index(node.int("batch_axis", 1)?, x.rank())?;
    if time == batch || lengths.len() != x.shape()[batch] {
        return Err(Error::input(format!("{} sequence lengths do not fit", lengths.len())));
    }
    let own = strides(x.shape());
    let map = indices(x.shape()).map(|mut index| {
        let length = lengths[index[batch]].max(0) as usize;
        if index[time] < length {
            index[time] = length - 1 - index[time];
        }
        Source::Element { input: 0, at: dot(&index, &own) }
    });
    let y = rearrange(lower, std::slice::from_ref(&x), x.shape().to_vec(), 0.0, map)?;
    lower.set_output(node, 0, y);
    Ok(())
}

/// Only of a constant: how many there are decides a shape.
fn non_zero<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.constant_input(node, 0)?.ok_or_else(|| Error::input("needs input `0`"))?;
    let found: Vec<Vec<usize>> = indices(&x.shape)
        .zip(x.to_f64())
        .filter_map(|(index, value)| (value != 0.0).then_some(index))
        .collect();
    let rank = x.shape.len();
    let values: Vec<i64> =
        (0..rank).flat_map(|axis| found.iter().map(move |index| index[axis] as i64)).collect();
    let tensor = ConstantTensor::i64([rank, found.len()], values);
    lower.set_output(node, 0, Value::Constant(Arc::new(tensor)));
    Ok(())
}

fn eye_like<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let &[rows, columns] = x.shape() else {
        return Err(Error::input(format!("needs a matrix, got shape `{:?}`", x.shape())));
    };
    let k = node.int("k", 0)?;
    let values = (0..rows as i64)
        .flat_map(|row| (0..columns as i64).map(move |column| i64::from(column == row + k)))
        .collect();
    let dtype = match node.int("dtype", 0)? {
        0 => x.dtype(),
        code => super::shape::data_type(code)?,
    };
    let tensor = super::shape::convert(&ConstantTensor::i64([rows, columns], values), dtype);
    lower.set_output(node, 0, Value::Constant(Arc::new(tensor)));
    Ok(())
}
