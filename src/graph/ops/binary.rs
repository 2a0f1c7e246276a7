//! Operators of two inputs with broadcasting: arithmetic, Min, Max, Pow, Mod, PRelu, comparisons and
//! logic (1 and 0; they choose and carry no gradient), and bit operations on constants. Sum, Mean, Max
//! and Min of many inputs chain the two-input form.

use std::sync::Arc;

use rayon::prelude::*;

pub(super) use super::arithmetic::Binary;
use super::arrange::broadcast_strides;
use super::elementwise::{CHUNK, Function, apply};
use super::rearrange::indices;
use super::shape::wrap;
use super::{Rule, broadcast_shape};
use crate::error::{Error, Result};
use crate::graph::ir::{ConstantData, ConstantTensor, DataType, Node};
use crate::graph::plan::{
    Differentiable, Follower, Lower, Mode, Needs, Step, StepState, Target, Value,
};
#[cfg(any(feature = "cuda", test))]
use crate::tensor::cuda;
use crate::tensor::kernels::{Element, map};

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

    #[cfg(any(feature = "cuda", test))]
    fn on_device(&self, outputs: usize) -> cuda::Spread {
        match self {
            Self::Same => cuda::Spread::Same,
            Self::Scalar => cuda::Spread::Channel { inner: outputs.max(1), count: 1 },
            &Self::Channel { inner, count } => cuda::Spread::Channel { inner, count },
            Self::Map(map) => cuda::Spread::Map(map.clone()),
        }
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

/// One step of two operands.
#[derive(Debug)]
pub(super) struct BinaryStep {
    pub(super) function: Binary,
    spreads: [Spread; 2],
}

impl BinaryStep {
    /// Of an addition of one value a column to each row of an operand: which operand the rows are.
    pub(super) fn rows_plus_row(&self) -> Option<usize> {
        match (&self.function, &self.spreads) {
            (Binary::Add, [Spread::Same, Spread::Channel { inner: 1, .. }]) => Some(0),
            (Binary::Add, [Spread::Channel { inner: 1, .. }, Spread::Same]) => Some(1),
            _ => None,
        }
    }
}

/// What lies beside a stretch of an operand that has the output's shape.
enum Beside<'a, T> {
    /// As many values.
    Many(&'a [T]),
    /// One for all.
    One(T),
}

/// Cuts `data` into stretches, many to a task, and calls `work(range, stretch, what of `other` lies
/// beside it)` for each; false where `other` is spread in no such way.
fn stretches<T: Element>(
    spread: &Spread,
    other: &[T],
    data: &mut [T],
    work: impl Fn(std::ops::Range<usize>, &mut [T], Beside<'_, T>) + Sync + Send,
) -> bool {
    let (length, period) = match spread {
        Spread::Same | Spread::Scalar => (CHUNK, 1),
        Spread::Channel { inner: 1, count } => (*count, 1),
        Spread::Channel { inner, count } => (*inner, *count),
        Spread::Map(_) => return false,
    };
    let many = (CHUNK / length.max(1)).max(1);
    data.par_chunks_mut((length * many).max(1)).enumerate().for_each(|(task, data)| {
        for (i, part) in data.chunks_mut(length).enumerate() {
            let row = task * many + i;
            let range = row * length..row * length + part.len();
            let beside = match spread {
                Spread::Same => Beside::Many(&other[range.clone()]),
                Spread::Channel { inner: 1, .. } => Beside::Many(other),
                _ => Beside::One(other[row % period]),
            };
            work(range, part, beside);
        }
    });
    true
}

impl BinaryStep {
    /// `output = f(a, b)`, tasks of whole rows of one channel or of plain stretches.
    fn fill<T: Element>(
        &self,
        a: &[T],
        b: &[T],
        output: &mut [T],
        f: impl Fn(T, T) -> T + Copy + Sync + Send,
    ) {
        let done = match &self.spreads {
            [Spread::Same, spread] => stretches(spread, b, output, |range, y, beside| {
                let a = &a[range];
                match beside {
                    Beside::Many(b) => map::block_three(a, b, a, y, false, move |a, b, _| f(a, b)),
                    Beside::One(b) => map::block(a, y, move |a| f(a, b)),
                }
            }),
            [spread, Spread::Same] => stretches(spread, a, output, |range, y, beside| {
                let b = &b[range];
                match beside {
                    Beside::Many(a) => map::block_three(a, b, a, y, false, move |a, b, _| f(a, b)),
                    Beside::One(a) => map::block(b, y, move |b| f(a, b)),
                }
            }),
            _ => false,
        };
        if !done {
            for_each(output.len(), &self.spreads, |i, j, k| output[i] = f(a[j], b[k]));
        }
    }

    /// The gradient to operand `which`, which has the output's shape, `slope(own, other)` times the
    /// output's gradient; false where the other operand is spread in an irregular way.
    fn slopes<T: Element>(
        &self,
        which: usize,
        inputs: &[&[T]],
        d_output: &[T],
        target: &mut Target<'_, T>,
        slope: impl Fn(T, T) -> T + Copy + Sync + Send,
    ) -> bool {
        let (own, other) = (inputs[which], inputs[1 - which]);
        let add = target.mode == Mode::Add;
        stretches(&self.spreads[1 - which], other, target.data, |range, d, beside| {
            let (own, dy) = (&own[range.clone()], &d_output[range]);
            match beside {
                Beside::Many(other) => {
                    map::block_three(own, other, dy, d, add, move |x, y, dy| dy * slope(x, y));
                }
                Beside::One(y) => {
                    map::block_three(own, own, dy, d, add, move |x, _, dy| dy * slope(x, y));
                }
            }
        })
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
    fn as_any(&self) -> Option<&dyn std::any::Any> {
        Some(self)
    }

    fn follower(&self) -> Option<Follower> {
        let plain = matches!(self.spreads, [Spread::Same, Spread::Same]);
        (self.function == Binary::Add && plain).then_some(Follower::Add)
    }

    fn forward(&self, inputs: &[&[T]], output: &mut [T], _state: &mut StepState<T>) {
        let (a, b) = (inputs[0], inputs[1]);
        // The common functions get loops of their own, which the compiler vectorises.
        match self.function {
            Binary::Add => self.fill(a, b, output, |a, b| a + b),
            Binary::Mul => self.fill(a, b, output, |a, b| a * b),
            f => self.fill(a, b, output, |a, b| f.value(a, b)),
        }
    }

    #[cfg(any(feature = "cuda", test))]
    fn on_device(&self, site: &cuda::Site<'_>) -> Result<Option<Box<dyn cuda::Operation>>> {
        let spread = |which: usize| self.spreads[which].on_device(site.output);
        let step = cuda::Binary::new(site, self.function as i32, [spread(0), spread(1)])?;
        Ok(Some(Box::new(step)))
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
                (Binary::Add, _) | (Binary::Sub, 0) => {
                    return target.put_map_parallel(d_output, |g| g);
                }
                (Binary::Sub, _) => return target.put_map_parallel(d_output, |g| -g),
                _ => {}
            }
        }
        if matches!(self.spreads[which], Spread::Same) {
            let f = self.function;
            let done = match (f, which) {
                (Binary::Mul, _) => self.slopes(which, inputs, d_output, &mut target, |_, y| y),
                (_, 0) => {
                    self.slopes(which, inputs, d_output, &mut target, |x, y| f.slopes(x, y)[0])
                }
                _ => self.slopes(which, inputs, d_output, &mut target, |x, y| f.slopes(y, x)[1]),
            };
            if done {
                return;
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

    fn differentiable(&self, _which: usize) -> Differentiable {
        match self.function {
            Binary::Quotient => Differentiable::No,
            question if question.is_question() => Differentiable::Choice,
            _ => Differentiable::Yes,
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
        let dtype = if function.is_question() { DataType::Bool } else { x.dtype };
        return fold_integers(x, y, shape, dtype, |a, b| function.integer(a, b));
    }
    let dtype = match function {
        question if question.is_question() => DataType::Bool,
        _ => a.dtype(),
    };
    let function = match function {
        Binary::Div if !dtype.is_float() => Binary::Quotient,
        other => other,
    };
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
    Ok(lower.emit_as(dtype, Box::new(step), &[a.clone(), b.clone()], shape))
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
            function(a, b).map(|v| wrap(v, dtype)).ok_or_else(|| {
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
        | "Mod" => two,
        "BitwiseAnd" | "BitwiseOr" | "BitwiseXor" | "BitShift" => bits,
        "BitwiseNot" => bitwise_not,
        _ => return None,
    })
}

fn binary_function(node: &Node) -> Result<Binary> {
    Ok(match node.op_type.as_str() {
        "Mod" if node.int("fmod", 0)? == 0 => Binary::Modulo,
        "Mod" => Binary::Remainder,
        "Equal" => Binary::Equal,
        "Greater" => Binary::Greater,
        "GreaterOrEqual" => Binary::GreaterOrEqual,
        "Less" => Binary::Less,
        "LessOrEqual" => Binary::LessOrEqual,
        "And" => Binary::And,
        "Or" => Binary::Or,
        "Xor" => Binary::Xor,
        "Sub" => Binary::Sub,
        "Mul" => Binary::Mul,
        "Div" => Binary::Div,
        "Pow" => Binary::Pow,
        "Max" => Binary::Max,
        "Min" => Binary::Min,
        _ => Binary::Add,
    })
}

fn two<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let (a, mut b) = (lower.input(node, 0)?, lower.input(node, 1)?);
    // Opset 6 and before: explicit broadcast of b along `axis`.
    if lower.opset < 7 && node.int("broadcast", 0)? != 0 && b.len() > 1 {
        let axis =
            super::axis_index(node.int("axis", a.rank() as i64 - b.rank() as i64)?, a.rank())?;
        let mut shape = b.shape().to_vec();
        shape.resize(a.rank() - axis, 1);
        b = lower.reshape(&b, shape)?;
    }
    let y = emit(lower, binary_function(node)?, &a, &b)?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn many<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let mut total = lower.input(node, 0)?;
    for index in 1..node.inputs.len() {
        let next = lower.input(node, index)?;
        total = emit(lower, binary_function(node)?, &total, &next)?;
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

/// Bit operations on constants: they appear in shape chains and in decoded indices.
fn bits<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let constant = |lower: &Lower<'g, T>, index| {
        lower.constant_input(node, index)?.ok_or_else(|| Error::input("needs two inputs"))
    };
    let (a, b) = (constant(lower, 0)?, constant(lower, 1)?);
    let shape = broadcast_shape(&a.shape, &b.shape)?;
    let op = node.op_type.as_str();
    let left = node.text("direction", "LEFT")? == "LEFT";
    let dtype = a.dtype;
    let y = fold_integers(&a, &b, shape, dtype, |a, b| {
        Some(match op {
            "BitwiseAnd" => a & b,
            "BitwiseOr" => a | b,
            "BitwiseXor" => a ^ b,
            _ if !(0..64).contains(&b) => 0,
            _ if left => ((a as u64) << b) as i64,
            _ => ((a as u64) >> b) as i64,
        })
    })?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn bitwise_not<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.constant_input(node, 0)?.ok_or_else(|| Error::input("needs an input"))?;
    let values = x.as_i64().ok_or_else(|| Error::input("needs integers"))?;
    let data = ConstantData::I64(values.iter().map(|&v| wrap(!v, x.dtype)).collect());
    let tensor = ConstantTensor { shape: x.shape.clone(), dtype: x.dtype, data };
    lower.set_output(node, 0, Value::Constant(Arc::new(tensor)));
    Ok(())
}
