//! Normalisation layers: BatchNormalization (inference form, with its input's statistics tapped),
//! LayerNormalization, RMSNormalization, InstanceNormalization, GroupNormalization.

use std::sync::Arc;

use rayon::prelude::*;

use super::attention::floats;
use super::binary::{Binary, emit};
use super::elementwise::{Function, apply};
use super::reduce::{Reduction, norm, reduce_axes};
use super::select::choose;
use super::{Rule, axis_index};
use crate::error::{Error, Result};
use crate::graph::ir::Node;
use crate::graph::plan::{
    Absorbed, Lower, Needs, Step, StepState, TapReference, Taps, Target, Value, elements,
};
use crate::tensor::kernels::Element;
use crate::tensor::kernels::map::{sum, sum_of, sum_zip};

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    Some(match op {
        "BatchNormalization" => batch_normalization,
        "LayerNormalization" | "RMSNormalization" => layer_normalization,
        "InstanceNormalization" | "GroupNormalization" => group_normalization,
        "LpNormalization" => lp_normalization,
        "MeanVarianceNormalization" => mean_variance,
        _ => return None,
    })
}

/// What follows a normalisation in the same pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Activation {
    None,
    Relu,
}

/// Whether a step's input statistics are part of the objective.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Statistics {
    Tapped,
    Unused,
}

/// `y = activation(a * x + b)` per channel, with the mean and biased variance of `x` over batch and
/// space (the quantities DeepInversion compares with the running statistics).
#[derive(Debug)]
pub(super) struct ChannelAffine<T> {
    pub(super) a: Vec<T>,
    pub(super) b: Vec<T>,
    pub(super) plane: usize,
    pub(super) activation: Activation,
    pub(super) statistics: Statistics,
}

impl<T: Element> ChannelAffine<T> {
    /// Two passes: mean, then squared deviations; no cancellation.
    fn measure(&self, x: &[T], state: &mut StepState<T>) {
        let channels = self.a.len();
        let images = x.len() / (channels * self.plane);
        let count = T::of((images * self.plane).max(1) as f64);
        let plane = |n: usize, c: usize| &x[(n * channels + c) * self.plane..][..self.plane];
        let moments: Vec<(T, T)> = (0..channels)
            .into_par_iter()
            .map(|c| {
                let mean = (0..images).map(|n| sum(plane(n, c))).sum::<T>() / count;
                let square = |v: T| (v - mean) * (v - mean);
                let var = (0..images).map(|n| sum_of(plane(n, c), square)).sum::<T>() / count;
                (mean, var)
            })
            .collect();
        state.mean.clear();
        state.var.clear();
        for (mean, var) in moments {
            state.mean.push(mean);
            state.var.push(var);
        }
    }
}

impl<T: Element> Step<T> for ChannelAffine<T> {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], state: &mut StepState<T>) {
        let x = inputs[0];
        if self.statistics == Statistics::Tapped {
            self.measure(x, state);
        }
        let channels = self.a.len();
        let block = channels * self.plane;
        output.par_chunks_mut(block).zip(x.par_chunks(block)).for_each(|(y, x)| {
            let planes = y.chunks_exact_mut(self.plane).zip(x.chunks_exact(self.plane));
            for ((y, x), (&a, &b)) in planes.zip(self.a.iter().zip(&self.b)) {
                match self.activation {
                    Activation::Relu => {
                        for (y, &x) in y.iter_mut().zip(x) {
                            *y = (a * x + b).max(T::ZERO);
                        }
                    }
                    Activation::None => {
                        for (y, &x) in y.iter_mut().zip(x) {
                            *y = a * x + b;
                        }
                    }
                }
            }
        });
    }

    fn absorb_relu(&mut self) -> Absorbed {
        match self.activation {
            Activation::None => {
                self.activation = Activation::Relu;
                Absorbed::Yes
            }
            Activation::Relu => Absorbed::No,
        }
    }

    fn needs(&self) -> Needs {
        if self.activation == Activation::None && self.statistics == Statistics::Unused {
            Needs::NOTHING
        } else {
            Needs::INPUTS
        }
    }

    fn backward(
        &self,
        _which: usize,
        inputs: &[&[T]],
        _output: &[T],
        d_output: &[T],
        target: Target<'_, T>,
        state: &StepState<T>,
    ) {
        let channels = self.a.len();
        let block = channels * self.plane;
        let count = T::of((d_output.len() / channels).max(1) as f64);
        // The gradient through mean and variance is affine in x: `offset + factor * x`.
        let through: Vec<(T, T)> = (0..channels)
            .map(|c| match (state.d_mean.get(c), state.d_var.get(c)) {
                (Some(&d_mean), Some(&d_var)) => {
                    let factor = T::of(2.0) * d_var / count;
                    (d_mean / count - factor * state.mean[c], factor)
                }
                _ => (T::ZERO, T::ZERO),
            })
            .collect();
        let mode = target.mode;
        target.data.par_chunks_mut(block).enumerate().for_each(|(n, d)| {
            for (c, d) in d.chunks_exact_mut(self.plane).enumerate() {
                let start = n * block + c * self.plane;
                let dy = &d_output[start..start + self.plane];
                let (a, b) = (self.a[c], self.b[c]);
                let target = Target { data: d, mode };
                if inputs[0].is_empty() {
                    target.put_map(dy, |g| a * g);
                    continue;
                }
                let x = &inputs[0][start..start + self.plane];
                let (offset, factor) = through[c];
                let relu = self.activation == Activation::Relu;
                target.put_zip(dy, x, |g, x| {
                    let open = if relu && a * x + b <= T::ZERO { T::ZERO } else { a };
                    open * g + offset + factor * x
                });
            }
        });
    }
}

fn batch_normalization<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    if node.int("training_mode", 0)? != 0 {
        return Err(
            Error::unsupported("is in training mode").hint("export the model after `model.eval()`")
        );
    }
    let mut parameters = Vec::new();
    for index in 1..5 {
        let tensor = lower
            .constant_input(node, index)?
            .ok_or_else(|| Error::input(format!("needs input `{index}`")))?;
        parameters.push(tensor.to_f64());
    }
    let channels = x.shape().get(1).copied().unwrap_or(0);
    if channels == 0 || parameters.iter().any(|p| p.len() != channels) {
        let lengths: Vec<usize> = parameters.iter().map(Vec::len).collect();
        return Err(Error::input(format!(
            "parameters of {lengths:?} values do not fit an input of shape `{:?}`",
            x.shape()
        )));
    }
    let epsilon = f64::from(node.float("epsilon", 1e-5)?);
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let columns = parameters[0].iter().zip(&parameters[1]).zip(&parameters[2]).zip(&parameters[3]);
    for (((gamma, beta), mean), var) in columns {
        let scale = gamma / (var + epsilon).sqrt();
        a.push(T::of(scale));
        b.push(T::of(beta - mean * scale));
    }
    let single = |values: &[f64]| values.iter().map(|&v| v as f32).collect();
    let tap = TapReference {
        name: node.name.clone(),
        mean: single(&parameters[2]),
        var: single(&parameters[3]),
        unit: vec![1.0; channels],
    };
    let step = ChannelAffine {
        a,
        b,
        plane: x.shape()[2..].iter().product::<usize>().max(1),
        activation: Activation::None,
        statistics: Statistics::Tapped,
    };
    let shape = x.shape().to_vec();
    let y = lower.emit_tapped(Box::new(step), &[x], shape, Some(tap));
    lower.set_output(node, 0, y);
    Ok(())
}

/// Emits `x` unchanged, its statistics tapped over all but the channel axis: axis 1 of [N, C, ...]
/// where `plane` elements lie between channels, the last axis where `plane` is 1. Deviations count in
/// `unit`, one a channel.
pub(super) fn watched<T: Element>(
    lower: &mut Lower<'_, T>,
    node: &Node,
    x: Value,
    unit: Vec<f32>,
    plane: usize,
) -> Value {
    let channels = unit.len();
    if lower.taps == Taps::Norms || x.constant().is_some() || channels == 0 {
        return x;
    }
    let step = ChannelAffine {
        a: vec![T::ONE; channels],
        b: vec![T::ZERO; channels],
        plane,
        activation: Activation::None,
        statistics: Statistics::Tapped,
    };
    let (mean, var) = (vec![0.0; channels], vec![1.0; channels]);
    let tap = TapReference { name: node.name.clone(), mean, var, unit };
    let shape = x.shape().to_vec();
    lower.emit_tapped(Box::new(step), &[x], shape, Some(tap))
}

/// Whether the group mean is subtracted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Centre {
    Mean,
    Zero,
}

/// Each row of `group` values is centred and divided by its root mean square: layer, RMS, instance and
/// group normalisation without their scale and bias.
#[derive(Debug)]
struct Standardize {
    group: usize,
    epsilon: f64,
    centre: Centre,
}

impl<T: Element> Step<T> for Standardize {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], state: &mut StepState<T>) {
        let rows = output.len() / self.group;
        let count = T::of(self.group as f64);
        state.var.resize(rows, T::ZERO);
        let work = output
            .par_chunks_mut(self.group)
            .zip(inputs[0].par_chunks(self.group))
            .zip(&mut state.var);
        work.with_min_len(16).for_each(|((y, x), inverse)| {
            let mean = match self.centre {
                Centre::Mean => sum(x) / count,
                Centre::Zero => T::ZERO,
            };
            let var = sum_of(x, |v| (v - mean) * (v - mean)) / count;
            *inverse = T::ONE / (var + T::of(self.epsilon)).sqrt();
            for (y, &x) in y.iter_mut().zip(x) {
                *y = (x - mean) * *inverse;
            }
        });
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
        state: &StepState<T>,
    ) {
        let count = T::of(self.group as f64);
        let mode = target.mode;
        target.data.par_chunks_mut(self.group).with_min_len(16).enumerate().for_each(|(row, d)| {
            let range = row * self.group..(row + 1) * self.group;
            let (y, dy) = (&output[range.clone()], &d_output[range]);
            let inverse = state.var[row];
            let mean = match self.centre {
                Centre::Mean => sum(dy) / count,
                Centre::Zero => T::ZERO,
            };
            let along = sum_zip(dy, y, |g, y| g * y) / count;
            let target = Target { data: d, mode };
            target.put_zip(dy, y, |g, y| inverse * (g - mean - y * along));
        });
    }
}

/// Emits the standardisation of rows of `group` values.
pub(super) fn standardize<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    group: usize,
    epsilon: f64,
    centre: Centre,
) -> Value {
    let step = Standardize { group: group.max(1), epsilon, centre };
    lower.emit(Box::new(step), std::slice::from_ref(x), x.shape().to_vec())
}

fn layer_normalization<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let axis = axis_index(node.int("axis", -1)?, x.rank())?;
    let group: usize = x.shape()[axis..].iter().product();
    let x = if axis + 1 == x.rank() { watched(lower, node, x, vec![1.0; group], 1) } else { x };
    let centre = if node.op_type == "RMSNormalization" { Centre::Zero } else { Centre::Mean };
    let epsilon = f64::from(node.float("epsilon", 1e-5)?);
    let mut y = standardize(lower, &x, group, epsilon, centre);
    y = emit(lower, Binary::Mul, &y, &lower.input(node, 1)?)?;
    if let Some(bias) = lower.optional(node, 2)? {
        y = emit(lower, Binary::Add, &y, &bias)?;
    }
    lower.set_output(node, 0, y);
    if node.outputs.iter().skip(1).any(|name| !name.is_empty()) {
        let axes: Vec<usize> = (axis..x.rank()).collect();
        let (mean, _, inverse) = moments(lower, &x, &axes, epsilon)?;
        lower.set_output(node, 1, mean);
        lower.set_output(node, 2, inverse);
    }
    Ok(())
}

/// Emits mean, centred values and inverse standard deviation of `x` over `axes`, kept with size 1.
pub(super) fn moments<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    axes: &[usize],
    epsilon: f64,
) -> Result<(Value, Value, Value)> {
    let mean = reduce_axes(lower, Reduction::Mean, x, axes)?;
    let centred = emit(lower, Binary::Sub, x, &mean)?;
    let square = apply(lower, Function::Square, (0.0, 0.0), &centred);
    let var = reduce_axes(lower, Reduction::Mean, &square, axes)?;
    let var = apply(lower, Function::Scale, (1.0, epsilon), &var);
    let deviation = apply(lower, Function::Sqrt, (0.0, 0.0), &var);
    let inverse = apply(lower, Function::Reciprocal, (0.0, 0.0), &deviation);
    Ok((mean, centred, inverse))
}

fn mean_variance<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let given = node.ints("axes")?.unwrap_or(&[0, 2, 3]);
    let mut axes: Vec<usize> =
        given.iter().map(|&axis| axis_index(axis, x.rank())).collect::<Result<_>>()?;
    axes.sort_unstable();
    // The guard of the operator's definition, against a variance of 0.
    let (_, centred, inverse) = moments(lower, &x, &axes, 1e-9)?;
    let y = emit(lower, Binary::Mul, &centred, &inverse)?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn lp_normalization<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let axis = axis_index(node.int("axis", -1)?, x.rank())?;
    let size = norm(lower, &x, node.int("p", 2)? as f64, &[axis])?;
    // A row of zeros stays zero.
    let zero = floats(Vec::new(), vec![0.0]);
    let one = floats(Vec::new(), vec![1.0]);
    let empty = emit(lower, Binary::Equal, &size, &zero)?;
    let divisor = choose(lower, &empty, &one, &size)?;
    let y = emit(lower, Binary::Div, &x, &divisor)?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn group_normalization<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let channels = x.shape().get(1).copied().unwrap_or(0);
    let groups = if node.op_type == "GroupNormalization" {
        usize::try_from(node.int("num_groups", 1)?).unwrap_or(0)
    } else {
        channels
    };
    if groups == 0 || !channels.is_multiple_of(groups) {
        return Err(Error::input(format!("{channels} channels in `{groups}` groups")));
    }
    let group = x.shape()[1..].iter().product::<usize>() / groups;
    let epsilon = f64::from(node.float("epsilon", 1e-5)?);
    let mut y = standardize(lower, &x, group, epsilon, Centre::Mean);
    for (index, function) in [(1, Binary::Mul), (2, Binary::Add)] {
        let tensor = lower
            .constant_input(node, index)?
            .ok_or_else(|| Error::input(format!("needs input `{index}`")))?;
        let given: Vec<f64> = elements(&tensor);
        // GroupNormalization-18 gives one value a group, 21 and Instance one a channel.
        let repeat = channels / given.len().max(1);
        let values: Vec<f64> = given.iter().flat_map(|&v| std::iter::repeat_n(v, repeat)).collect();
        if values.len() != channels {
            return Err(Error::input(format!("{} values for `{channels}` channels", given.len())));
        }
        let mut shape = vec![channels];
        shape.resize(x.rank() - 1, 1);
        let operand = Value::Constant(Arc::new(crate::graph::plan::from_elements(
            shape,
            tensor.dtype,
            &values,
        )));
        y = emit(lower, function, &y, &operand)?;
    }
    lower.set_output(node, 0, y);
    Ok(())
}
