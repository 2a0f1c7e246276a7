//! Convolutions and matrix products of quantised numbers. The numbers minus their zero points are
//! multiplied and summed as they are, which is exact (in `f32` as long as the sums stay below
//! 2^24), and the sums are requantised in one step. Between the operators of ONNX and those of ONNX
//! Runtime's own domain only the scales differ.

use std::sync::Arc;

use super::Rule;
use super::binary::{Binary, emit};
use super::conv::emit_conv;
use super::elementwise::{Function, apply};
use super::matmul::product;
use super::quantize::{Scaling, along, dynamic, quantize};
use super::quantized_contrib::{channels_first, channels_last};
use super::shape::convert;
use super::transpose::permute;
use crate::error::{Error, Result};
use crate::graph::ir::{ConstantTensor, DataType, Node};
use crate::graph::plan::{Lower, Value, data_dependent};
use crate::tensor::kernels::Element;

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    Some(match op {
        "QLinearConv" => qlinear_conv,
        "QLinearMatMul" => qlinear_matmul,
        "ConvInteger" => conv_integer,
        "MatMulInteger" => matmul_integer,
        _ => return None,
    })
}

/// The rule of an operator of ONNX Runtime's own domain.
pub(super) fn microsoft_rule<T: Element>(op: &str) -> Option<Rule<T>> {
    Some(match op {
        "QLinearConv" => qlinear_conv,
        "QGemm" => qgemm,
        "DynamicQuantizeMatMul" => dynamic_quantize_matmul,
        "MatMulIntegerToFloat" => matmul_integer_to_float,
        _ => return None,
    })
}

/// The same numbers under another type; constants are converted.
fn retyped(x: &Value, dtype: DataType) -> Value {
    match x {
        Value::Constant(tensor) => Value::Constant(Arc::new(convert(tensor, dtype))),
        live => live.clone().of_type(dtype),
    }
}

fn is_zero(value: &Value) -> bool {
    let zeros = |tensor: &Arc<ConstantTensor>| tensor.to_f64().iter().all(|&v| v == 0.0);
    value.len() == 1 && value.constant().is_some_and(zeros)
}

/// Emits the int32 difference of quantised `x` and its zero point, which broadcasts to it.
fn centred<T: Element>(lower: &mut Lower<'_, T>, x: &Value, zero: Option<&Value>) -> Result<Value> {
    let x = retyped(x, DataType::Int32);
    match zero {
        Some(zero) if !is_zero(zero) => {
            emit(lower, Binary::Sub, &x, &retyped(zero, DataType::Int32))
        }
        _ => Ok(x),
    }
}

/// Constant weights [O, ...] at input `index` minus their zero points, one or one an output
/// channel, at input `zero`.
fn centred_weight<T: Element>(
    lower: &mut Lower<'_, T>,
    node: &Node,
    index: usize,
    zero: usize,
) -> Result<Arc<ConstantTensor>> {
    let weight = lower.input(node, index)?;
    let zero = match lower.optional(node, zero)? {
        Some(zero) => Some(along(lower, &zero, 0, weight.rank())?),
        None => None,
    };
    let weight = centred(lower, &weight, zero.as_ref())?;
    weight.constant().cloned().ok_or_else(|| data_dependent(node, index))
}

/// Input `index` with a vector turned into a column: one value a row of a matrix.
fn row_wise<T: Element>(
    lower: &mut Lower<'_, T>,
    node: &Node,
    index: usize,
) -> Result<Option<Value>> {
    let Some(value) = lower.optional(node, index)? else { return Ok(None) };
    let mut shape = value.shape().to_vec();
    if shape.len() == 1 && shape != [1] {
        shape.push(1);
    }
    lower.reshape(&value, shape).map(Some)
}

/// The row-wise scale at input `index`.
fn row_scale<T: Element>(lower: &mut Lower<'_, T>, node: &Node, index: usize) -> Result<Value> {
    row_wise(lower, node, index)?
        .ok_or_else(|| Error::input(format!("needs input `{index}`, a scale")))
}

/// The type of a quantised output: that of its zero point, else that of `x`.
fn output_type(zero: Option<&Value>, x: &Value) -> DataType {
    zero.map_or(x.dtype(), Value::dtype)
}

fn qlinear_conv<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let x_zero = lower.optional(node, 2)?;
    let last = node.int("channels_last", 0)? != 0;
    let mut centre = centred(lower, &x, x_zero.as_ref())?;
    if last {
        centre = channels_first(lower, &centre)?;
    }
    let weight = centred_weight(lower, node, 3, 5)?;
    let bias = lower.constant_input(node, 8)?;
    let sums = emit_conv(lower, node, &centre, &weight, bias.as_deref())?;
    let (x_scale, y_scale) = (lower.input(node, 1)?, lower.input(node, 6)?);
    let weight_scale = lower.input(node, 4)?;
    let weight_scale = along(lower, &weight_scale, 1, sums.rank())?;
    let factor = emit(lower, Binary::Mul, &x_scale, &weight_scale)?;
    let factor = emit(lower, Binary::Div, &factor, &y_scale)?;
    let zero = lower.optional(node, 7)?;
    let dtype = output_type(zero.as_ref(), &x);
    let mut y = quantize(lower, &sums, &factor, zero.as_ref(), Scaling::Multiply, dtype)?;
    if last {
        y = channels_last(lower, &y)?;
    }
    lower.set_output(node, 0, y);
    Ok(())
}

fn conv_integer<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let zero = lower.optional(node, 2)?;
    let x = centred(lower, &x, zero.as_ref())?;
    let weight = centred_weight(lower, node, 1, 3)?;
    let y = emit_conv(lower, node, &x, &weight, None)?;
    lower.set_output(node, 0, y);
    Ok(())
}

/// Emits the int32 product of the matrices at inputs `a` and `b`, each minus the zero points at the
/// input beside it: one for all, one a row of `a`, one a column of `b`.
fn integer_product<T: Element>(
    lower: &mut Lower<'_, T>,
    node: &Node,
    [a, a_zero]: [usize; 2],
    [b, b_zero]: [usize; 2],
) -> Result<Value> {
    let (a, b) = (lower.input(node, a)?, lower.input(node, b)?);
    let a_zero = row_wise(lower, node, a_zero)?;
    let b_zero = lower.optional(node, b_zero)?;
    let a = centred(lower, &a, a_zero.as_ref())?;
    let b = centred(lower, &b, b_zero.as_ref())?;
    product(lower, &a, &b)
}

fn matmul_integer<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let y = integer_product(lower, node, [0, 2], [1, 3])?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn qlinear_matmul<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let sums = integer_product(lower, node, [0, 2], [3, 5])?;
    let (a_scale, b_scale) = (row_scale(lower, node, 1)?, lower.input(node, 4)?);
    let y_scale = row_scale(lower, node, 6)?;
    let factor = emit(lower, Binary::Mul, &a_scale, &b_scale)?;
    let factor = emit(lower, Binary::Div, &factor, &y_scale)?;
    let zero = row_wise(lower, node, 7)?;
    let dtype = output_type(zero.as_ref(), &lower.input(node, 0)?);
    let y = quantize(lower, &sums, &factor, zero.as_ref(), Scaling::Multiply, dtype)?;
    lower.set_output(node, 0, y);
    Ok(())
}

/// Emits the numbers that an int32 product stands for, plus the bias at input `bias`.
fn real_product<T: Element>(
    lower: &mut Lower<'_, T>,
    node: &Node,
    sums: &Value,
    [a_scale, b_scale]: [&Value; 2],
    bias: usize,
) -> Result<Value> {
    let scale = emit(lower, Binary::Mul, a_scale, b_scale)?;
    let mut y = emit(lower, Binary::Mul, &retyped(sums, scale.dtype()), &scale)?;
    if let Some(bias) = lower.optional(node, bias)? {
        y = emit(lower, Binary::Add, &y, &bias)?;
    }
    Ok(y)
}

fn matmul_integer_to_float<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let sums = integer_product(lower, node, [0, 4], [1, 5])?;
    let (a_scale, b_scale) = (row_scale(lower, node, 2)?, lower.input(node, 3)?);
    let y = real_product(lower, node, &sums, [&a_scale, &b_scale], 6)?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn dynamic_quantize_matmul<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let (a, b) = (lower.input(node, 0)?, lower.input(node, 1)?);
    let [a, a_scale, a_zero] = dynamic(lower, &a)?;
    let b_zero = lower.optional(node, 3)?;
    let a = centred(lower, &a, Some(&a_zero))?;
    let b = centred(lower, &b, b_zero.as_ref())?;
    let sums = product(lower, &a, &b)?;
    let b_scale = lower.input(node, 2)?;
    let y = real_product(lower, node, &sums, [&a_scale, &b_scale], 4)?;
    lower.set_output(node, 0, y);
    Ok(())
}

/// The matrix at input `index`, transposed where the attribute says so.
fn matrix<T: Element>(
    lower: &mut Lower<'_, T>,
    node: &Node,
    index: usize,
    transposed: &str,
) -> Result<Value> {
    let x = lower.input(node, index)?;
    if x.rank() != 2 {
        return Err(Error::input(format!("needs a matrix, got shape `{:?}`", x.shape())));
    }
    if node.int(transposed, 0)? != 0 { permute(lower, &x, &[1, 0]) } else { Ok(x) }
}

/// The int32 sums start at `C`, so `alpha` and the scales apply to it too.
fn qgemm<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let (a, b) = (matrix(lower, node, 0, "transA")?, matrix(lower, node, 3, "transB")?);
    let zeros = [lower.optional(node, 2)?, lower.optional(node, 5)?];
    let left = centred(lower, &a, zeros[0].as_ref())?;
    let right = centred(lower, &b, zeros[1].as_ref())?;
    let mut sums = product(lower, &left, &right)?;
    if let Some(c) = lower.optional(node, 6)? {
        sums = emit(lower, Binary::Add, &sums, &retyped(&c, DataType::Int32))?;
    }
    let (a_scale, b_scale) = (lower.input(node, 1)?, lower.input(node, 4)?);
    let alpha = f64::from(node.float("alpha", 1.0)?);
    let scale = emit(lower, Binary::Mul, &a_scale, &b_scale)?;
    let scale = apply(lower, Function::Scale, (alpha, 0.0), &scale);
    let y = match lower.optional(node, 7)? {
        None => emit(lower, Binary::Mul, &retyped(&sums, scale.dtype()), &scale)?,
        Some(y_scale) => {
            let factor = emit(lower, Binary::Div, &scale, &y_scale)?;
            let zero = lower.optional(node, 8)?;
            let dtype = output_type(zero.as_ref(), &a);
            quantize(lower, &sums, &factor, zero.as_ref(), Scaling::Multiply, dtype)?
        }
    };
    lower.set_output(node, 0, y);
    Ok(())
}
