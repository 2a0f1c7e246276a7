//! Normalisation layers: BatchNormalization (inference form, with its input's statistics tapped),
//! LayerNormalization, RMSNormalization, InstanceNormalization, GroupNormalization.

use std::sync::Arc;

use rayon::prelude::*;

use super::attention::floats;
use super::binary::{Binary, emit};
use super::channel::ChannelAffine;
use super::elementwise::{Function, apply};
use super::reduce::{Reduction, norm, reduce_axes};
use super::select::choose;
use super::{Rule, axis_index};
use crate::error::{Error, Result};
use crate::graph::ir::{ConstantTensor, Node};
#[cfg(any(feature = "cuda", test))]
use crate::graph::plan::singles;
use crate::graph::plan::{
    Lower, Mode, Needs, Step, StepState, TapReference, Taps, Target, Value, elements, from_elements,
};
#[cfg(any(feature = "cuda", test))]
use crate::tensor::cuda;
use crate::tensor::kernels::{Element, row};

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

fn batch_normalization<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let mut parameters = Vec::new();
    for index in 1..5 {
        let tensor = lower
            .constant_input(node, index)?
            .ok_or_else(|| Error::input(format!("needs input `{index}`")))?;
        parameters.push(tensor.to_f64());
    }
    if node.int("training_mode", 0)? != 0 {
        let Value::Constant(tensor) = &x else {
            return Err(Error::unsupported("is in training mode")
                .hint("export the model after `model.eval()`"));
        };
        return standardized_weights(lower, node, tensor, &parameters);
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
    let spatial = x.shape()[2..].iter().product::<usize>().max(1);
    let step = ChannelAffine::new(a, b, spatial, &tap);
    let shape = x.shape().to_vec();
    let y = lower.emit_tapped(Box::new(step), &[x], shape, Some(tap));
    lower.set_output(node, 0, y);
    Ok(())
}

/// BatchNormalization in training mode of a constant: how exporters write the standardisation of weights
/// (normalisation-free networks), by the constant's own mean and variance.
fn standardized_weights<'g, T: Element>(
    lower: &mut Lower<'g, T>,
    node: &'g Node,
    x: &ConstantTensor,
    parameters: &[Vec<f64>],
) -> Result<()> {
    let &[batch, channels, ref rest @ ..] = x.shape.as_slice() else {
        return Err(Error::input(format!("input of shape `{:?}`", x.shape)));
    };
    let plane: usize = rest.iter().product();
    if batch * plane == 0 || parameters.iter().any(|p| p.len() != channels) {
        let lengths: Vec<usize> = parameters.iter().map(Vec::len).collect();
        return Err(Error::input(format!(
            "parameters of {lengths:?} values do not fit an input of shape `{:?}`",
            x.shape
        )));
    }
    let epsilon = f64::from(node.float("epsilon", 1e-5)?);
    let momentum = f64::from(node.float("momentum", 0.9)?);
    let mut values = x.to_f64();
    let mut running = [parameters[2].clone(), parameters[3].clone()];
    let places = |channel: usize| {
        (0..batch).flat_map(move |image| {
            let start = (image * channels + channel) * plane;
            start..start + plane
        })
    };
    let count = (batch * plane) as f64;
    for channel in 0..channels {
        let mean = places(channel).map(|i| values[i]).sum::<f64>() / count;
        let variance = places(channel).map(|i| (values[i] - mean).powi(2)).sum::<f64>() / count;
        let scale = parameters[0][channel] / (variance + epsilon).sqrt();
        for i in places(channel) {
            values[i] = (values[i] - mean) * scale + parameters[1][channel];
        }
        for (running, seen) in running.iter_mut().zip([mean, variance]) {
            running[channel] = running[channel] * momentum + seen * (1.0 - momentum);
        }
    }
    let dtype = x.dtype;
    let constant = |shape: Vec<usize>, values: &[f64]| {
        let values: Vec<T> = values.iter().map(|&v| T::of(v)).collect();
        Value::Constant(Arc::new(from_elements(shape, dtype, &values)))
    };
    lower.set_output(node, 0, constant(x.shape.clone(), &values));
    for (index, running) in running.iter().enumerate() {
        lower.set_output(node, index + 1, constant(vec![channels], running));
    }
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
    let (mean, var) = (vec![0.0; channels], vec![1.0; channels]);
    let tap = TapReference { name: node.name.clone(), mean, var, unit };
    let step = ChannelAffine::new(vec![T::ONE; channels], vec![T::ZERO; channels], plane, &tap);
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
/// group normalisation; then, for layer and RMS normalisation, scaled and shifted element by element.
#[derive(Debug)]
struct Standardize<T> {
    group: usize,
    epsilon: f64,
    centre: Centre,
    affine: Option<(Vec<T>, Vec<T>)>,
}

impl<T: Element> Standardize<T> {
    fn affine(&self) -> row::Affine<'_, T> {
        self.affine.as_ref().map(|(scale, shift)| (scale.as_slice(), shift.as_slice()))
    }
}

impl<T: Element> Step<T> for Standardize<T> {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], state: &mut StepState<T>) {
        let rows = output.len() / self.group;
        state.mean.resize(rows, T::ZERO);
        state.var.resize(rows, T::ZERO);
        let moments = state.mean.par_iter_mut().zip(&mut state.var);
        let work =
            output.par_chunks_mut(self.group).zip(inputs[0].par_chunks(self.group)).zip(moments);
        let (epsilon, centre) = (T::of(self.epsilon), self.centre == Centre::Mean);
        work.with_min_len(16).for_each(|((y, x), (mean, inverse))| {
            [*mean, *inverse] = row::standardize(x, y, epsilon, centre, self.affine());
        });
    }

    #[cfg(any(feature = "cuda", test))]
    fn on_device(&self, site: &cuda::Site<'_>) -> Result<Option<Box<dyn cuda::Operation>>> {
        let affine = self.affine.as_ref().map(|(scale, shift)| [singles(scale), singles(shift)]);
        let affine = affine.as_ref().map(|pair| pair.each_ref().map(Vec::as_slice));
        let centre = self.centre == Centre::Mean;
        let step = cuda::Standardize::new(site, self.group, self.epsilon as f32, centre, affine)?;
        Ok(Some(Box::new(step)))
    }

    fn needs(&self) -> Needs {
        Needs::INPUTS
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
        let (add, centre) = (target.mode == Mode::Add, self.centre == Centre::Mean);
        target.data.par_chunks_mut(self.group).with_min_len(16).enumerate().for_each(|(at, d)| {
            let range = at * self.group..(at + 1) * self.group;
            let (x, dy) = (&inputs[0][range.clone()], &d_output[range]);
            let moments = [state.mean[at], state.var[at]];
            row::standardize_backward(x, dy, d, moments, centre, self.affine(), add);
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
    let step = Standardize { group: group.max(1), epsilon, centre, affine: None };
    lower.emit(Box::new(step), std::slice::from_ref(x), x.shape().to_vec())
}

/// Scale and shift of rows of `group` elements, where both are constants of that length.
fn row_affine<T: Element>(
    scale: &Value,
    shift: Option<&Value>,
    group: usize,
) -> Option<(Vec<T>, Vec<T>)> {
    let values = |value: &Value| {
        value.constant().map(|tensor| elements::<T>(tensor)).filter(|v| v.len() == group)
    };
    let shift = match shift {
        Some(shift) => values(shift)?,
        None => vec![T::ZERO; group],
    };
    Some((values(scale)?, shift))
}

fn layer_normalization<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let axis = axis_index(node.int("axis", -1)?, x.rank())?;
    let group: usize = x.shape()[axis..].iter().product();
    let x = if axis + 1 == x.rank() { watched(lower, node, x, vec![1.0; group], 1) } else { x };
    let centre = if node.op_type == "RMSNormalization" { Centre::Zero } else { Centre::Mean };
    let epsilon = f64::from(node.float("epsilon", 1e-5)?);
    let (scale, bias) = (lower.input(node, 1)?, lower.optional(node, 2)?);
    let y = match row_affine(&scale, bias.as_ref(), group) {
        Some(affine) => {
            let step = Standardize { group: group.max(1), epsilon, centre, affine: Some(affine) };
            lower.emit(Box::new(step), std::slice::from_ref(&x), x.shape().to_vec())
        }
        None => {
            let y = standardize(lower, &x, group, epsilon, centre);
            let y = emit(lower, Binary::Mul, &y, &scale)?;
            match &bias {
                Some(bias) => emit(lower, Binary::Add, &y, bias)?,
                None => y,
            }
        }
    };
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
