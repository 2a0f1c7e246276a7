//! Linear quantisation: QuantizeLinear, DequantizeLinear and DynamicQuantizeLinear, per tensor, per
//! axis or in blocks. Quantised values that depend on the images stay numbers of the network's own
//! type, holding integers. The gradient goes straight through the rounding and is 0 where a value
//! saturates, as in PyTorch's fake quantisation; it reaches a scale computed from the images too
//! (a learned step size), but no zero point.

use rayon::prelude::*;

use super::arrange::broadcast_to;
use super::elementwise::CHUNK;
use super::rearrange::{Source, rearrange};
use super::shape::data_type;
use super::{Rule, axis_index, broadcast_shape};
use crate::error::{Error, Result};
use crate::graph::ir::{DataType, Node};
use crate::graph::plan::{
    Choice, Chosen, Differentiable, Lower, Needs, Rounding, Step, StepState, Target, Value,
};
use crate::tensor::kernels::Element;

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    Some(match op {
        "QuantizeLinear" => quantize_linear,
        "DequantizeLinear" => dequantize_linear,
        "DynamicQuantizeLinear" => dynamic_quantize_linear,
        _ => return None,
    })
}

/// The rule of an operator of ONNX Runtime's own domain.
pub(super) fn microsoft_rule<T: Element>(op: &str) -> Option<Rule<T>> {
    match op {
        "QuantizeLinear" | "DequantizeLinear" => rule(op),
        _ => None,
    }
}

/// How a scale takes a number to the quantised one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scaling {
    /// The number is divided by the scale.
    Divide,
    /// The number is multiplied by it.
    Multiply,
}

/// Which scale and zero point belong to an element: each holds for `run` neighbours, and after
/// `count` runs they start again.
#[derive(Debug, Clone, Copy)]
struct Spread {
    run: usize,
    count: usize,
}

impl Spread {
    /// The scale and the zero point (inputs 1 and 2) of run `row`.
    #[inline(always)]
    fn parameters<T: Element>(self, inputs: &[&[T]], row: usize) -> (T, T) {
        let at = row % self.count;
        (inputs[1][at], inputs.get(2).map_or(T::ZERO, |zero| zero[at]))
    }

    /// Runs that make a parallel task worth its while.
    fn task(self) -> usize {
        (CHUNK / self.run).max(1)
    }

    /// Adds `slope(x, scale, zero point)` times the output's gradient to the scale of each element.
    fn to_scale<T: Element>(
        self,
        inputs: &[&[T]],
        d_output: &[T],
        mut target: Target<'_, T>,
        slope: impl Fn(T, T, T) -> T,
    ) {
        target.clear_if_fresh();
        let runs = inputs[0].chunks(self.run).zip(d_output.chunks(self.run));
        for (row, (x, dy)) in runs.enumerate() {
            let (scale, zero) = self.parameters(inputs, row);
            let sum: T = x.iter().zip(dy).map(|(&x, &g)| g * slope(x, scale, zero)).sum();
            target.data[row % self.count] += sum;
        }
    }
}

/// The integer nearest to `v`, of two the even one; for sizes below 2^51.
#[inline(always)]
fn nearest(v: f64) -> f64 {
    // A sum above 2^52 has no room for a fraction; unlike a call of `rint` this becomes vector
    // code.
    const SHIFT: f64 = 6_755_399_441_055_744.0;
    (v + SHIFT) - SHIFT
}

/// `y = saturate(round(x scaled) + zero point)`; inputs: x, scale, and a zero point if there is
/// one.
#[derive(Debug)]
struct Quantize {
    spread: Spread,
    scaling: Scaling,
    low: f64,
    high: f64,
    rounding: Rounding,
}

impl Quantize {
    #[inline(always)]
    fn scaled<T: Element>(&self, x: T, scale: T) -> f64 {
        match self.scaling {
            Scaling::Divide => (x / scale).f64(),
            Scaling::Multiply => (x * scale).f64(),
        }
    }

    #[inline(always)]
    fn value<T: Element>(&self, x: T, scale: T, zero: T) -> T {
        let zero = zero.f64();
        let inside = self.scaled(x, scale).max(self.low - zero).min(self.high - zero);
        match self.rounding {
            Rounding::Nearest => T::of(nearest(inside) + zero),
            Rounding::Smooth => T::of(inside + zero),
        }
    }

    /// Derivatives to x and to the scale: the rounding counts as none.
    #[inline(always)]
    fn slopes<T: Element>(&self, x: T, scale: T, zero: T) -> [T; 2] {
        let (low, high) = (self.low - zero.f64(), self.high - zero.f64());
        let near = self.scaled(x, scale).max(low - 1.0).min(high + 1.0);
        let reached = if self.rounding == Rounding::Nearest { nearest(near) } else { near };
        if reached < low || reached > high {
            return [T::ZERO; 2];
        }
        match self.scaling {
            Scaling::Divide => [T::ONE / scale, -(x / (scale * scale))],
            Scaling::Multiply => [scale, x],
        }
    }
}

impl<T: Element> Step<T> for Quantize {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], _state: &mut StepState<T>) {
        let run = self.spread.run;
        let rows = output.par_chunks_mut(run).zip(inputs[0].par_chunks(run));
        rows.with_min_len(self.spread.task()).enumerate().for_each(|(row, (y, x))| {
            let (scale, zero) = self.spread.parameters(inputs, row);
            for (y, &x) in y.iter_mut().zip(x) {
                *y = self.value(x, scale, zero);
            }
        });
    }

    fn needs(&self) -> Needs {
        Needs::INPUTS
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
        match which {
            0 => {
                let (run, mode) = (self.spread.run, target.mode);
                let rows = target.data.par_chunks_mut(run).with_min_len(self.spread.task());
                rows.enumerate().for_each(|(row, d)| {
                    let (scale, zero) = self.spread.parameters(inputs, row);
                    let range = row * run..row * run + d.len();
                    let (x, dy) = (&inputs[0][range.clone()], &d_output[range]);
                    let target = Target { data: d, mode };
                    target.put_zip(dy, x, |g, x| g * self.slopes(x, scale, zero)[0]);
                });
            }
            1 => {
                let slope = |x: T, scale: T, zero: T| self.slopes(x, scale, zero)[1];
                self.spread.to_scale(inputs, d_output, target, slope);
            }
            _ => target.clear_if_fresh(),
        }
    }

    fn differentiable(&self, which: usize) -> Differentiable {
        if which == 2 { Differentiable::Choice } else { Differentiable::Yes }
    }
}

/// `y = (x - zero point) * scale`; inputs as those of [`Quantize`].
#[derive(Debug)]
struct Dequantize {
    spread: Spread,
    /// The inputs where the scale is live, else nothing.
    needs: Needs,
}

impl<T: Element> Step<T> for Dequantize {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], _state: &mut StepState<T>) {
        let run = self.spread.run;
        let rows = output.par_chunks_mut(run).zip(inputs[0].par_chunks(run));
        rows.with_min_len(self.spread.task()).enumerate().for_each(|(row, (y, x))| {
            let (scale, zero) = self.spread.parameters(inputs, row);
            for (y, &x) in y.iter_mut().zip(x) {
                *y = (x - zero) * scale;
            }
        });
    }

    fn needs(&self) -> Needs {
        self.needs
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
        match which {
            0 => {
                let (run, mode) = (self.spread.run, target.mode);
                let rows = target.data.par_chunks_mut(run).with_min_len(self.spread.task());
                rows.enumerate().for_each(|(row, d)| {
                    // The zero point may not be there to read.
                    let scale = inputs[1][row % self.spread.count];
                    let dy = &d_output[row * run..row * run + d.len()];
                    Target { data: d, mode }.put_map(dy, |g| g * scale);
                });
            }
            1 => self.spread.to_scale(inputs, d_output, target, |x, _, zero| x - zero),
            _ => target.clear_if_fresh(),
        }
    }

    fn differentiable(&self, which: usize) -> Differentiable {
        if which == 2 { Differentiable::Choice } else { Differentiable::Yes }
    }
}

/// What DynamicQuantizeLinear measures on a whole tensor; it counts as fixed for the gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Measured {
    Scale,
    ZeroPoint,
}

/// The smallest and the largest value, 0 among them.
fn extremes<T: Element>(x: &[T]) -> (T, T) {
    let none = || (T::ZERO, T::ZERO);
    x.par_chunks(CHUNK)
        .map(|x| x.iter().fold(none(), |(low, high), &v| (low.min(v), high.max(v))))
        .reduce(none, |a, b| (a.0.min(b.0), a.1.max(b.1)))
}

impl<T: Element> Choice<T> for Measured {
    fn choose(&self, inputs: &[&[T]], output: &mut [T]) {
        let (low, high) = extremes(inputs[0]);
        let scale = if high > low { (high - low) / T::of(255.0) } else { T::ONE };
        let value = match self {
            Self::Scale => scale,
            Self::ZeroPoint => T::of(nearest((-low / scale).f64().clamp(0.0, 255.0))),
        };
        output.fill(value);
    }
}

/// Brings scale and zero point to one shape: how that lies over `x`, and a step's inputs.
fn spread_over<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    scale: &Value,
    zero: Option<&Value>,
) -> Result<(Spread, Vec<Value>)> {
    let mut shape: Vec<usize> = Vec::new();
    let mut parameters = Vec::new();
    for value in std::iter::once(scale).chain(zero) {
        let one = value.len() == 1;
        let value = if one { lower.reshape(value, Vec::new())? } else { value.clone() };
        shape = broadcast_shape(&shape, value.shape())?;
        parameters.push(value);
    }
    if broadcast_shape(&shape, x.shape())? != x.shape() {
        return Err(Error::input(format!(
            "scales of shape {shape:?} do not fit an input of shape `{:?}`",
            x.shape()
        )));
    }
    let lead = x.rank() - shape.len();
    let wide: Vec<usize> = (0..shape.len()).filter(|&axis| shape[axis] != 1).collect();
    let spread = match wide[..] {
        [] => Spread { run: CHUNK, count: 1 },
        [axis] => {
            let inner: usize = x.shape()[lead + axis + 1..].iter().product();
            Spread { run: inner.max(1), count: shape[axis].max(1) }
        }
        _ => {
            shape = x.shape().to_vec();
            Spread { run: 1, count: x.len().max(1) }
        }
    };
    let mut inputs = vec![x.clone()];
    for value in &parameters {
        inputs.push(broadcast_to(lower, value, &shape)?);
    }
    Ok((spread, inputs))
}

/// Emits `x` scaled, rounded (halves to even), moved by the zero point and cut to the range of
/// `dtype`. Scale and zero point broadcast to `x`.
///
/// # Errors
/// When they do not, or `dtype` is no integer type.
pub(super) fn quantize<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    scale: &Value,
    zero: Option<&Value>,
    scaling: Scaling,
    dtype: DataType,
) -> Result<Value> {
    let range = dtype.integer_range().filter(|&(_, high)| high <= i64::from(u32::MAX));
    let Some((low, high)) = range else {
        return Err(Error::unsupported(format!("quantises to type `{dtype:?}`")));
    };
    let (spread, inputs) = spread_over(lower, x, scale, zero)?;
    let rounding = lower.rounding;
    let step = Quantize { spread, scaling, low: low as f64, high: high as f64, rounding };
    Ok(lower.emit_as(dtype, Box::new(step), &inputs, x.shape().to_vec()))
}

/// Emits the numbers of type `dtype` that quantised `x` stands for. Scale and zero point broadcast
/// to `x`.
///
/// # Errors
/// When they do not.
pub(super) fn dequantize<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    scale: &Value,
    zero: Option<&Value>,
    dtype: DataType,
) -> Result<Value> {
    let (spread, inputs) = spread_over(lower, x, scale, zero)?;
    let needs = if scale.constant().is_some() { Needs::NOTHING } else { Needs::INPUTS };
    let step = Dequantize { spread, needs };
    Ok(lower.emit_as(dtype, Box::new(step), &inputs, x.shape().to_vec()))
}

/// Emits `x` quantised to uint8 over its own range; returns it, its scale and its zero point.
///
/// # Errors
/// Those of [`quantize`].
pub(super) fn dynamic<T: Element>(lower: &mut Lower<'_, T>, x: &Value) -> Result<[Value; 3]> {
    let source = std::slice::from_ref(x);
    let scale = lower.emit(Box::new(Chosen(Measured::Scale)), source, Vec::new());
    let zero =
        lower.emit_as(DataType::Uint8, Box::new(Chosen(Measured::ZeroPoint)), source, Vec::new());
    let y = quantize(lower, x, &scale, Some(&zero), Scaling::Divide, DataType::Uint8)?;
    Ok([y, scale, zero])
}

/// A scalar, or a vector along `axis` of tensors of `rank` axes.
///
/// # Errors
/// When there is no such axis.
pub(super) fn along<T: Element>(
    lower: &mut Lower<'_, T>,
    value: &Value,
    axis: usize,
    rank: usize,
) -> Result<Value> {
    if value.len() == 1 {
        return lower.reshape(value, Vec::new());
    }
    let mut shape = vec![value.len()];
    shape.resize(rank.saturating_sub(axis), 1);
    lower.reshape(value, shape)
}

/// Input `index`, a scale or zero point, laid out as the node's axis and block size say so that it
/// broadcasts to `x`.
fn parameter<T: Element>(
    lower: &mut Lower<'_, T>,
    node: &Node,
    index: usize,
    x: &Value,
) -> Result<Option<Value>> {
    let Some(value) = lower.optional(node, index)? else { return Ok(None) };
    let rank = x.rank();
    if value.len() == 1 {
        return along(lower, &value, 0, rank).map(Some);
    }
    let misfit = |what: &str| {
        let (from, to) = (value.shape(), x.shape());
        Error::input(format!("{what} of shape {from:?} do not fit an input of shape `{to:?}`"))
    };
    // A vector has one axis, whatever the default says.
    let axis = if rank == 1 { 0 } else { axis_index(node.int("axis", 1)?, rank)? };
    let block = usize::try_from(node.int("block_size", 0)?)
        .map_err(|_| Error::input("`block_size` must not be negative"))?;
    if block == 0 {
        if value.rank() != 1 || x.shape().get(axis) != Some(&value.len()) {
            return Err(misfit("scales"));
        }
        return along(lower, &value, axis, rank).map(Some);
    }
    let mut blocks = x.shape().to_vec();
    if let Some(size) = blocks.get_mut(axis) {
        *size = size.div_ceil(block);
    }
    if value.shape() != blocks {
        return Err(misfit("blocks of scales"));
    }
    let (size, count) = (x.shape()[axis], blocks[axis]);
    let inner: usize = x.shape()[axis + 1..].iter().product();
    let map = (0..x.len()).map(|i| {
        let (row, column) = (i / inner, i % inner);
        let (outer, position) = (row / size, row % size);
        Source::Element { input: 0, at: (outer * count + position / block) * inner + column }
    });
    let source = std::slice::from_ref(&value);
    rearrange(lower, source, x.shape().to_vec(), 0.0, map).map(Some)
}

fn scale_of<T: Element>(lower: &mut Lower<'_, T>, node: &Node, x: &Value) -> Result<Value> {
    parameter(lower, node, 1, x)?.ok_or_else(|| Error::input("needs input `1`, the scale"))
}

fn quantize_linear<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let scale = scale_of(lower, node, &x)?;
    let zero = parameter(lower, node, 2, &x)?;
    let dtype = match (&zero, node.int("output_dtype", 0)?) {
        (Some(zero), _) => zero.dtype(),
        (None, 0) => DataType::Uint8,
        (None, code) => data_type(code)?,
    };
    let y = quantize(lower, &x, &scale, zero.as_ref(), Scaling::Divide, dtype)?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn dequantize_linear<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let scale = scale_of(lower, node, &x)?;
    let zero = parameter(lower, node, 2, &x)?;
    let dtype = match node.int("output_dtype", 0)? {
        0 => scale.dtype(),
        code => data_type(code)?,
    };
    let y = dequantize(lower, &x, &scale, zero.as_ref(), dtype)?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn dynamic_quantize_linear<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    for (index, value) in dynamic(lower, &x)?.into_iter().enumerate() {
        lower.set_output(node, index, value);
    }
    Ok(())
}
