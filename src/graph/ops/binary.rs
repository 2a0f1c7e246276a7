//! Operators of two inputs with broadcasting: arithmetic, Min, Max, Pow, PRelu, and, on constants
//! only, comparisons and logic. Sum, Mean, Max and Min of many inputs chain the two-input form.

use std::sync::Arc;

use super::arrange::broadcast_strides;
use super::elementwise::{Function, apply};
use super::rearrange::indices;
use super::{Rule, broadcast_shape};
use crate::error::{Error, Result};
use crate::graph::ir::{ConstantData, ConstantTensor, DataType, Node};
use crate::graph::plan::{Lower, Needs, Step, StepState, Target, Value, from_elements};
use crate::tensor::kernels::Element;

/// A function of two numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Binary {
    Add,
    Sub,
    Mul,
    Div,
    Pow,
    Min,
    Max,
    PRelu,
}

/// How positions of one operand follow the output's.
#[derive(Debug, Clone)]
enum Spread {
    /// Same position.
    Same,
    /// One element for all.
    Scalar,
    /// `position / inner % count`: one element a channel.
    Channel { inner: usize, count: usize },
    /// Any other broadcast: one entry an output element.
    Map(Vec<u32>),
}

impl Spread {
    fn new(from: &[usize], to: &[usize]) -> Self {
        let length: usize = from.iter().product();
        if length == to.iter().product::<usize>() {
            return Self::Same;
        }
        if length == 1 {
            return Self::Scalar;
        }
        let lead = to.len() - from.len();
        let wide: Vec<usize> =
            (0..to.len()).filter(|&a| a >= lead && from[a - lead] != 1).collect();
        if let (Some(&first), Some(&last)) = (wide.first(), wide.last())
            && (first..=last).all(|a| from[a - lead] == to[a])
        {
            let inner = to[last + 1..].iter().product();
            return Self::Channel { inner, count: length };
        }
        let strides = broadcast_strides(from, to);
        let position = |index: Vec<usize>| {
            index.iter().zip(&strides).map(|(i, s)| i * s).sum::<usize>() as u32
        };
        Self::Map(indices(to).map(position).collect())
    }

    #[inline(always)]
    fn at(&self, i: usize) -> usize {
        match self {
            Self::Same => i,
            Self::Scalar => 0,
            Self::Channel { inner, count } => i / inner % count,
            Self::Map(map) => map[i] as usize,
        }
    }
}

#[derive(Debug)]
struct BinaryStep {
    function: Binary,
    spreads: [Spread; 2],
}

impl Binary {
    #[inline(always)]
    fn value<T: Element>(self, a: T, b: T) -> T {
        match self {
            Self::Add => a + b,
            Self::Sub => a - b,
            Self::Mul => a * b,
            Self::Div => a / b,
            Self::Pow => power(a, b),
            Self::Min => a.min(b),
            Self::Max => a.max(b),
            Self::PRelu => {
                if a > T::ZERO {
                    a
                } else {
                    a * b
                }
            }
        }
    }

    /// Partial derivatives at (a, b); ties of Min and Max are shared in halves, as in PyTorch.
    #[inline(always)]
    fn slopes<T: Element>(self, a: T, b: T) -> [T; 2] {
        let (zero, one, half) = (T::ZERO, T::ONE, T::of(0.5));
        match self {
            Self::Add => [one, one],
            Self::Sub => [one, -one],
            Self::Mul => [b, a],
            Self::Div => [one / b, -(a / (b * b))],
            Self::Pow => {
                let db = if a > zero { power(a, b) * a.ln() } else { zero };
                [if b == zero { zero } else { b * power(a, b - one) }, db]
            }
            Self::Min if a == b => [half, half],
            Self::Min => {
                if a < b {
                    [one, zero]
                } else {
                    [zero, one]
                }
            }
            Self::Max if a == b => [half, half],
            Self::Max => {
                if a > b {
                    [one, zero]
                } else {
                    [zero, one]
                }
            }
            Self::PRelu => {
                if a > zero {
                    [one, zero]
                } else {
                    [b, a]
                }
            }
        }
    }
}

/// Power, exact for the exponents that networks use.
fn power<T: Element>(a: T, b: T) -> T {
    if b == T::of(2.0) {
        a * a
    } else if b == T::ONE {
        a
    } else if b == T::of(0.5) {
        a.sqrt()
    } else if b == T::of(3.0) {
        a * a * a
    } else {
        a.powf(b)
    }
}

/// Visits (i, position in a, position in b) for all outputs, with loops the compiler can unroll for
/// the common spreads.
#[inline(always)]
fn for_each(length: usize, spreads: &[Spread; 2], mut visit: impl FnMut(usize, usize, usize)) {
    match spreads {
        [Spread::Same, Spread::Same] => (0..length).for_each(|i| visit(i, i, i)),
        [Spread::Same, Spread::Scalar] => (0..length).for_each(|i| visit(i, i, 0)),
        [Spread::Same, Spread::Channel { inner, count }] => {
            for row in 0..length / inner {
                let channel = row % count;
                for i in row * inner..(row + 1) * inner {
                    visit(i, i, channel);
                }
            }
        }
        [Spread::Channel { inner, count }, Spread::Same] => {
            for row in 0..length / inner {
                let channel = row % count;
                for i in row * inner..(row + 1) * inner {
                    visit(i, channel, i);
                }
            }
        }
        [a, b] => (0..length).for_each(|i| visit(i, a.at(i), b.at(i))),
    }
}

impl<T: Element> Step<T> for BinaryStep {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], _state: &mut StepState<T>) {
        let (a, b) = (inputs[0], inputs[1]);
        let length = output.len();
        match self.function {
            Binary::Add => for_each(length, &self.spreads, |i, j, k| output[i] = a[j] + b[k]),
            Binary::Mul => for_each(length, &self.spreads, |i, j, k| output[i] = a[j] * b[k]),
            f => for_each(length, &self.spreads, |i, j, k| output[i] = f.value(a[j], b[k])),
        }
    }

    fn needs(&self) -> Needs {
        match self.function {
            Binary::Add | Binary::Sub => Needs::NOTHING,
            _ => Needs::INPUTS,
        }
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
        if matches!(self.spreads[which], Spread::Same) {
            match (self.function, which) {
                (Binary::Add, _) | (Binary::Sub, 0) => return target.put(|i| d_output[i]),
                (Binary::Sub, _) => return target.put(|i| -d_output[i]),
                _ => {}
            }
        }
        target.clear_if_fresh();
        let length = d_output.len();
        let data = target.data;
        let own = |j, k| if which == 0 { j } else { k };
        match self.function {
            Binary::Add => {
                for_each(length, &self.spreads, |i, j, k| data[own(j, k)] += d_output[i]);
            }
            Binary::Sub => {
                let sign = if which == 0 { T::ONE } else { -T::ONE };
                for_each(length, &self.spreads, |i, j, k| data[own(j, k)] += sign * d_output[i]);
            }
            Binary::Mul if which == 0 => {
                let b = inputs[1];
                for_each(length, &self.spreads, |i, j, k| data[j] += d_output[i] * b[k]);
            }
            Binary::Mul => {
                let a = inputs[0];
                for_each(length, &self.spreads, |i, j, k| data[k] += d_output[i] * a[j]);
            }
            f => {
                let (a, b) = (inputs[0], inputs[1]);
                for_each(length, &self.spreads, |i, j, k| {
                    data[own(j, k)] += d_output[i] * f.slopes(a[j], b[k])[which];
                });
            }
        }
    }
}

/// Emits `function` of `a` and `b`; integer constants stay exact integers.
pub(super) fn emit<T: Element>(
    lower: &mut Lower<'_, T>,
    function: Binary,
    a: &Value,
    b: &Value,
) -> Result<Value> {
    let shape = broadcast_shape(a.shape(), b.shape())?;
    if let (Some(x), Some(y)) = (a.constant(), b.constant())
        && x.as_i64().is_some()
        && y.as_i64().is_some()
    {
        let dtype = x.dtype;
        return fold_integers(x, y, shape, dtype, |a, b| match function {
            Binary::Add => a.checked_add(b),
            Binary::Sub => a.checked_sub(b),
            Binary::Mul => a.checked_mul(b),
            Binary::Div => a.checked_div(b),
            Binary::Pow => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
            Binary::Min => Some(a.min(b)),
            Binary::Max => Some(a.max(b)),
            Binary::PRelu => Some(if a > 0 { a } else { a * b }),
        });
    }
    // A scalar constant beside a live value needs no second operand at run time.
    if let (Value::Live { .. }, Some(constant)) = (a, b.constant())
        && constant.data.len() == 1
        && shape == a.shape()
    {
        let c = constant.to_f64()[0];
        match function {
            Binary::Add => return Ok(apply(lower, Function::Scale, (1.0, c), a)),
            Binary::Sub => return Ok(apply(lower, Function::Scale, (1.0, -c), a)),
            Binary::Mul => return Ok(apply(lower, Function::Scale, (c, 0.0), a)),
            Binary::Pow if c == 2.0 => return Ok(apply(lower, Function::Square, (0.0, 0.0), a)),
            Binary::Pow if c == 0.5 => return Ok(apply(lower, Function::Sqrt, (0.0, 0.0), a)),
            _ => {}
        }
    }
    let spreads = [Spread::new(a.shape(), &shape), Spread::new(b.shape(), &shape)];
    let step = BinaryStep { function, spreads };
    Ok(lower.emit(Box::new(step), &[a.clone(), b.clone()], shape))
}

fn fold_integers(
    a: &ConstantTensor,
    b: &ConstantTensor,
    shape: Vec<usize>,
    dtype: DataType,
    function: impl Fn(i64, i64) -> Option<i64>,
) -> Result<Value> {
    let (x, y) = (a.as_i64().unwrap_or_default(), b.as_i64().unwrap_or_default());
    let spreads = [Spread::new(&a.shape, &shape), Spread::new(&b.shape, &shape)];
    let values: Vec<i64> = (0..shape.iter().product())
        .map(|i| {
            let (a, b) = (x[spreads[0].at(i)], y[spreads[1].at(i)]);
            function(a, b).ok_or_else(|| {
                Error::input(format!("integer arithmetic on {a} and `{b}` has no result"))
            })
        })
        .collect::<Result<_>>()?;
    Ok(Value::Constant(Arc::new(ConstantTensor { shape, dtype, data: ConstantData::I64(values) })))
}

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    Some(match op {
        "Add" | "Sub" | "Mul" | "Div" | "Pow" => two,
        "Sum" | "Mean" | "Max" | "Min" => many,
        "Equal" | "Greater" | "GreaterOrEqual" | "Less" | "LessOrEqual" | "And" | "Or" | "Xor"
        | "Mod" => constant_only,
        "Not" => not,
        _ => return None,
    })
}

fn binary_function(op: &str) -> Binary {
    match op {
        "Sub" => Binary::Sub,
        "Mul" => Binary::Mul,
        "Div" => Binary::Div,
        "Pow" => Binary::Pow,
        "Max" => Binary::Max,
        "Min" => Binary::Min,
        _ => Binary::Add,
    }
}

fn two<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let (a, mut b) = (lower.input(node, 0)?, lower.input(node, 1)?);
    // Opset 6 and before: explicit broadcast of b along `axis`.
    if lower.opset < 7 && node.int("broadcast", 0)? != 0 {
        let axis =
            super::axis_index(node.int("axis", a.rank() as i64 - b.rank() as i64)?, a.rank())?;
        let mut shape = b.shape().to_vec();
        shape.resize(a.rank() - axis, 1);
        b = lower.reshape(&b, shape)?;
    }
    let y = emit(lower, binary_function(&node.op_type), &a, &b)?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn many<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let mut total = lower.input(node, 0)?;
    for index in 1..node.inputs.len() {
        let next = lower.input(node, index)?;
        total = emit(lower, binary_function(&node.op_type), &total, &next)?;
    }
    if node.op_type == "Mean" {
        let share = 1.0 / node.inputs.len() as f64;
        total = apply(lower, Function::Scale, (share, 0.0), &total);
    }
    lower.set_output(node, 0, total);
    Ok(())
}

pub(super) fn prelu<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let (x, mut slope) = (lower.input(node, 0)?, lower.input(node, 1)?);
    // Old exports give one slope a channel without the spatial axes.
    if slope.rank() == 1 && x.rank() > 2 && slope.len() == x.shape()[1] {
        let mut shape = vec![slope.len()];
        shape.resize(x.rank() - 1, 1);
        slope = lower.reshape(&slope, shape)?;
    }
    let y = emit(lower, Binary::PRelu, &x, &slope)?;
    lower.set_output(node, 0, y);
    Ok(())
}

/// Comparisons, logic and Mod: they appear in shape chains, and have no gradient elsewhere.
fn constant_only<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let constant = |lower: &Lower<'g, T>, index| {
        lower.constant_input(node, index)?.ok_or_else(|| Error::input("needs two inputs"))
    };
    let (a, b) = (constant(lower, 0)?, constant(lower, 1)?);
    let shape = broadcast_shape(&a.shape, &b.shape)?;
    let op = node.op_type.as_str();
    let floor_mod = node.int("fmod", 0)? == 0;
    if a.as_i64().is_some() && b.as_i64().is_some() {
        let dtype = if op == "Mod" { a.dtype } else { DataType::Bool };
        let y = fold_integers(&a, &b, shape, dtype, |a, b| {
            Some(match op {
                "Equal" => i64::from(a == b),
                "Greater" => i64::from(a > b),
                "GreaterOrEqual" => i64::from(a >= b),
                "Less" => i64::from(a < b),
                "LessOrEqual" => i64::from(a <= b),
                "And" => i64::from(a != 0 && b != 0),
                "Or" => i64::from(a != 0 || b != 0),
                "Xor" => i64::from((a != 0) != (b != 0)),
                _ if b == 0 => return None,
                _ if floor_mod => {
                    let r = a.checked_rem(b)?;
                    if r != 0 && (r < 0) != (b < 0) { r + b } else { r }
                }
                _ => a.checked_rem(b)?,
            })
        })?;
        lower.set_output(node, 0, y);
        return Ok(());
    }
    let (x, y) = (a.to_f64(), b.to_f64());
    let spreads = [Spread::new(&a.shape, &shape), Spread::new(&b.shape, &shape)];
    let values: Vec<f64> = (0..shape.iter().product())
        .map(|i| {
            let (a, b) = (x[spreads[0].at(i)], y[spreads[1].at(i)]);
            let truth = |t: bool| f64::from(u8::from(t));
            match op {
                "Equal" => truth(a == b),
                "Greater" => truth(a > b),
                "GreaterOrEqual" => truth(a >= b),
                "Less" => truth(a < b),
                "LessOrEqual" => truth(a <= b),
                "Mod" => a % b,
                _ => f64::NAN,
            }
        })
        .collect();
    let dtype = if op == "Mod" { a.dtype } else { DataType::Bool };
    let tensor = from_elements(shape, dtype, &values);
    lower.set_output(node, 0, Value::Constant(Arc::new(tensor)));
    Ok(())
}

fn not<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.constant_input(node, 0)?.ok_or_else(|| Error::input("needs an input"))?;
    let values = x.to_f64().iter().map(|&v| i64::from(v == 0.0)).collect();
    let data = ConstantData::I64(values);
    let tensor = ConstantTensor { shape: x.shape.clone(), dtype: DataType::Bool, data };
    lower.set_output(node, 0, Value::Constant(Arc::new(tensor)));
    Ok(())
}
