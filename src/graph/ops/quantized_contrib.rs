//! Operators on quantised numbers that ONNX Runtime's quantiser writes (domain com.microsoft): each
//! computes with the numbers its inputs stand for, and quantises the result.

use super::arrange::side_by_side;
use super::binary::{Binary, emit};
use super::elementwise::{Function, apply};
use super::pool::emit_pool;
use super::quantize::{Scaling, dequantize, quantize};
use super::reduce::{Reduction, reduce_axes};
use super::softmax::masked_softmax;
use super::transpose::permute;
use super::{Rule, axis_index};
use crate::error::{Error, Result};
use crate::graph::ir::Node;
use crate::graph::plan::{Lower, Value};
use crate::tensor::kernels::Element;

/// The rule of an operator of ONNX Runtime's own domain.
pub(super) fn microsoft_rule<T: Element>(op: &str) -> Option<Rule<T>> {
    Some(match op {
        "QLinearAdd" | "QLinearMul" => two,
        "QLinearLeakyRelu" | "QLinearSigmoid" => one,
        "QLinearSoftmax" => softmax,
        "QLinearAveragePool" => average_pool,
        "QLinearGlobalAveragePool" => global_average_pool,
        "QLinearConcat" => concat,
        "NhwcMaxPool" => nhwc_max_pool,
        _ => return None,
    })
}

/// The number of axes of a value that has batch, channels and at least one more.
///
/// # Errors
/// When it has fewer.
pub(super) fn image_rank(x: &Value) -> Result<usize> {
    match x.rank() {
        rank @ 3.. => Ok(rank),
        _ => Err(Error::input(format!("needs batch, channels and space, got `{:?}`", x.shape()))),
    }
}

/// Emits [N, ..., C] as [N, C, ...].
///
/// # Errors
/// Those of [`image_rank`].
pub(super) fn channels_first<T: Element>(lower: &mut Lower<'_, T>, x: &Value) -> Result<Value> {
    let rank = image_rank(x)?;
    let order: Vec<usize> = [0, rank - 1].into_iter().chain(1..rank - 1).collect();
    permute(lower, x, &order)
}

/// Emits [N, C, ...] as [N, ..., C].
///
/// # Errors
/// Those of [`image_rank`].
pub(super) fn channels_last<T: Element>(lower: &mut Lower<'_, T>, x: &Value) -> Result<Value> {
    let rank = image_rank(x)?;
    let order: Vec<usize> = std::iter::once(0).chain(2..rank).chain([1]).collect();
    permute(lower, x, &order)
}

/// Emits a softmax over each row of `row` neighbours.
///
/// # Errors
/// When `x` does not divide into such rows.
pub(super) fn softmax_rows<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    row: usize,
) -> Result<Value> {
    let row = row.max(1);
    let rows = lower.reshape(x, vec![x.len() / row, row])?;
    let y = masked_softmax(lower, &rows);
    lower.reshape(&y, x.shape().to_vec())
}

/// Emits what the quantised input `index` stands for; its scale and zero point are the next two.
fn real<T: Element>(lower: &mut Lower<'_, T>, node: &Node, index: usize) -> Result<Value> {
    let (x, scale) = (lower.input(node, index)?, lower.input(node, index + 1)?);
    let zero = lower.optional(node, index + 2)?;
    let dtype = scale.dtype();
    dequantize(lower, &x, &scale, zero.as_ref(), dtype)
}

/// Quantises the result by the scale at input `index` and the zero point after it, and makes it the
/// node's output. Without a zero point it has the type of input `like`.
fn finish<'g, T: Element>(
    lower: &mut Lower<'g, T>,
    node: &'g Node,
    y: &Value,
    index: usize,
    like: usize,
) -> Result<()> {
    let scale = lower.input(node, index)?;
    let zero = lower.optional(node, index + 1)?;
    let dtype = match &zero {
        Some(zero) => zero.dtype(),
        None => lower.input(node, like)?.dtype(),
    };
    let y = quantize(lower, y, &scale, zero.as_ref(), Scaling::Divide, dtype)?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn two<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let (a, b) = (real(lower, node, 0)?, real(lower, node, 3)?);
    let function = if node.op_type == "QLinearAdd" { Binary::Add } else { Binary::Mul };
    let y = emit(lower, function, &a, &b)?;
    finish(lower, node, &y, 6, 0)
}

fn one<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = real(lower, node, 0)?;
    let (function, slope) = match node.op_type.as_str() {
        "QLinearSigmoid" => (Function::Sigmoid, 0.0),
        _ => (Function::LeakyRelu, f64::from(node.float("alpha", 0.01)?)),
    };
    let y = apply(lower, function, (slope, 0.0), &x);
    finish(lower, node, &y, 3, 0)
}

fn softmax<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = real(lower, node, 0)?;
    let rank = x.rank();
    let axis = axis_index(node.int("axis", -1)?, rank)?;
    // The version of the operator that was quantised: before 13 a row is all axes from this one on.
    let old = node.int("opset", 13)? < 13;
    let y = if old || axis + 1 >= rank {
        let row: usize = x.shape()[axis.min(rank)..].iter().product();
        softmax_rows(lower, &x, row)?
    } else {
        let mut swap: Vec<usize> = (0..rank).collect();
        swap.swap(axis, rank - 1);
        let moved = permute(lower, &x, &swap)?;
        let row = x.shape()[axis];
        let y = softmax_rows(lower, &moved, row)?;
        permute(lower, &y, &swap)?
    };
    finish(lower, node, &y, 3, 0)
}

fn average_pool<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let mut x = real(lower, node, 0)?;
    let last = node.int("channels_last", 0)? != 0;
    if last {
        x = channels_first(lower, &x)?;
    }
    let mut y = emit_pool(lower, node, &x, "AveragePool")?;
    if last {
        y = channels_last(lower, &y)?;
    }
    finish(lower, node, &y, 3, 0)
}

fn global_average_pool<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = real(lower, node, 0)?;
    let rank = image_rank(&x)?;
    let last = node.int("channels_last", 0)? != 0;
    let axes: Vec<usize> = if last { (1..rank - 1).collect() } else { (2..rank).collect() };
    let y = reduce_axes(lower, Reduction::Mean, &x, &axes)?;
    finish(lower, node, &y, 3, 0)
}

fn concat<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let mut parts = Vec::new();
    for index in (2..node.inputs.len()).step_by(3) {
        parts.push(real(lower, node, index)?);
    }
    let axis = axis_index(node.int("axis", 1)?, parts.first().map_or(0, Value::rank))?;
    let y = side_by_side(lower, &parts, axis)?;
    finish(lower, node, &y, 0, 2)
}

/// Quantised numbers are as ordered as what they stand for.
fn nhwc_max_pool<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let x = channels_first(lower, &x)?;
    let y = emit_pool(lower, node, &x, "MaxPool")?;
    let y = channels_last(lower, &y)?;
    lower.set_output(node, 0, y);
    Ok(())
}
