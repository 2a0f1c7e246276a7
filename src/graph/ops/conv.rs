//! Convolutions with constant weights: Conv over one, two or more axes, with groups, strides,
//! dilations, asymmetric pads and auto_pad. One axis is one row of two; more than two are a sum of
//! two-axis convolutions over the taps of the leading axes, so that every case runs on one kernel.

use std::sync::Arc;

use super::Rule;
use super::binary::{Binary, emit};
use super::normalize::watched;
use super::rearrange::{Source, rearrange};
use super::window::{Slide, Window, slides, two_axes};
use crate::error::{Error, Result};
use crate::graph::ir::{ConstantTensor, Node};
#[cfg(any(feature = "cuda", test))]
use crate::graph::plan::singles;
use crate::graph::plan::{
    Lower, Mode, Needs, Step, StepState, Taps, Target, Value, data_dependent, elements,
};
#[cfg(any(feature = "cuda", test))]
use crate::tensor::cuda;
use crate::tensor::kernels::Element;
use crate::tensor::kernels::conv::{Conv2dGeometry, conv2d, conv2d_input_gradient};
use crate::tensor::kernels::map::sum_of;

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    match op {
        "Conv" => Some(conv),
        _ => None,
    }
}

/// A convolution with frozen weights and bias.
#[derive(Debug)]
pub(super) struct Conv<T> {
    pub(super) geometry: Conv2dGeometry,
    pub(super) weight: Arc<Vec<T>>,
    pub(super) bias: Option<Arc<Vec<T>>>,
}

impl<T: Element> Step<T> for Conv<T> {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], _state: &mut StepState<T>) {
        let bias = self.bias.as_ref().map(|bias| bias.as_slice());
        conv2d(&self.geometry, inputs[0], &self.weight, bias, output);
    }

    #[cfg(any(feature = "cuda", test))]
    fn on_device(&self, site: &cuda::Site<'_>) -> Result<Option<Box<dyn cuda::Operation>>> {
        let bias = self.bias.as_ref().map(|bias| singles(bias));
        let weight = singles(&self.weight);
        let step = cuda::Convolution::new(site, self.geometry, &weight, bias.as_deref())?;
        Ok(Some(Box::new(step)))
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING
    }

    fn backward(
        &self,
        _which: usize,
        _inputs: &[&[T]],
        _output: &[T],
        d_output: &[T],
        target: Target<'_, T>,
        _state: &StepState<T>,
    ) {
        let accumulate = target.mode == Mode::Add;
        conv2d_input_gradient(&self.geometry, d_output, &self.weight, target.data, accumulate);
    }
}

/// Checks weights [O, C/groups, ...] against an input [N, C, ...] and returns the groups.
///
/// # Errors
/// When they do not fit.
fn checked_groups(node: &Node, x: &[usize], w: &[usize]) -> Result<usize> {
    if x.len() != w.len() || x.len() < 3 {
        return Err(Error::input(format!("input of shape {x:?} with weights `{w:?}`")));
    }
    if let Some(kernel) = node.ints("kernel_shape")?
        && kernel.iter().map(|&k| k as usize).ne(w[2..].iter().copied())
    {
        return Err(Error::input(format!("kernel_shape {kernel:?} differs from weights `{w:?}`")));
    }
    let groups = usize::try_from(node.int("group", 1)?).unwrap_or(0);
    if groups == 0
        || !w[0].is_multiple_of(groups)
        || w[1] * groups != x[1]
        || w.contains(&0)
        || x.contains(&0)
    {
        return Err(Error::input(format!(
            "weights {w:?} in {groups} groups do not fit an input of shape `{x:?}`"
        )));
    }
    Ok(groups)
}

/// Emits the convolution that `node`'s attributes describe, of `x` [N, C, ...] with `weight`
/// [O, C/groups, ...] and `bias` [O].
///
/// # Errors
/// When sizes or attributes do not fit.
pub(super) fn emit_conv<T: Element>(
    lower: &mut Lower<'_, T>,
    node: &Node,
    x: &Value,
    weight: &ConstantTensor,
    bias: Option<&ConstantTensor>,
) -> Result<Value> {
    let (xs, ws) = (x.shape().to_vec(), &weight.shape);
    let groups = checked_groups(node, &xs, ws)?;
    let slides = slides(node, &ws[2..], &xs[2..])?;
    for (slide, &size) in slides.iter().zip(&xs[2..]) {
        if slide.output(size) == 0 {
            let kernel = &ws[2..];
            return Err(Error::input(format!("kernel {kernel:?} is larger than input `{xs:?}`")));
        }
    }
    if let Some(bias) = bias
        && bias.data.len() != ws[0]
    {
        return Err(Error::input(format!("bias of {} for `{}` channels", bias.data.len(), ws[0])));
    }
    let bias = bias.map(|bias| Arc::new(elements(bias)));
    let weights = Weights { shape: ws.clone(), values: elements(weight) };
    sliding(lower, x, weights, bias, &slides, groups)
}

/// The geometry of a `Conv` node over two axes: input `x` [N, C, H, W], weights `w` [O, C/groups, kh, kw].
///
/// # Errors
/// When sizes or attributes do not fit.
pub(in crate::graph) fn conv_geometry(
    node: &Node,
    x: &[usize],
    w: &[usize],
) -> Result<Conv2dGeometry> {
    let groups = checked_groups(node, x, w)?;
    let Window { kernel, stride, dilation, pads } = two_axes(&slides(node, &w[2..], &x[2..])?)?;
    let geometry = Conv2dGeometry {
        batch: x[0],
        in_channels: x[1],
        input: [x[2], x[3]],
        out_channels: w[0],
        kernel,
        stride,
        dilation,
        pads,
        groups,
    };
    if geometry.output().contains(&0) {
        return Err(Error::input(format!("kernel {kernel:?} is larger than input `{x:?}`")));
    }
    Ok(geometry)
}

/// Weights [O, C/groups, ...].
struct Weights<T> {
    shape: Vec<usize>,
    values: Vec<T>,
}

/// The weights at `tap` of the first axis of a kernel [outer, inner, taps, ...].
pub(super) fn at_tap<T: Copy>(shape: &[usize], values: &[T], tap: usize) -> Vec<T> {
    let rest: usize = shape[3..].iter().product();
    values
        .chunks_exact(shape[2] * rest)
        .flat_map(|row| &row[tap * rest..][..rest])
        .copied()
        .collect()
}

fn sliding<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    weights: Weights<T>,
    bias: Option<Arc<Vec<T>>>,
    slides: &[Slide],
    groups: usize,
) -> Result<Value> {
    let (xs, ws) = (x.shape().to_vec(), weights.shape);
    let [first, rest @ ..] = slides else { return Err(Error::input("has no spatial axis")) };
    if rest.len() < 2 {
        let window = two_axes(slides)?;
        let geometry = Conv2dGeometry {
            batch: xs[0],
            in_channels: xs[1],
            input: plane(&xs[2..]),
            out_channels: ws[0],
            kernel: window.kernel,
            stride: window.stride,
            dilation: window.dilation,
            pads: window.pads,
            groups,
        };
        let mut shape = vec![xs[0], ws[0]];
        shape.extend(slides.iter().zip(&xs[2..]).map(|(slide, &size)| slide.output(size)));
        let step = Conv { geometry, weight: Arc::new(weights.values), bias };
        return Ok(lower.emit(Box::new(step), std::slice::from_ref(x), shape));
    }
    let depth = first.output(xs[2]);
    let mut total: Option<Value> = None;
    for tap in 0..first.kernel {
        let picked = planes_at(lower, x, first, tap, depth)?;
        let mut shape = ws[..2].to_vec();
        shape.extend_from_slice(&ws[3..]);
        let part = Weights { shape, values: at_tap(&ws, &weights.values, tap) };
        let bias = if tap == 0 { bias.clone() } else { None };
        let y = sliding(lower, &picked, part, bias, rest, groups)?;
        total = Some(match total {
            None => y,
            Some(sum) => emit(lower, Binary::Add, &sum, &y)?,
        });
    }
    let y = total.ok_or_else(|| Error::input("empty kernel"))?;
    depth_first(lower, &y, xs[0])
}

/// For each image and output position of the first spatial axis, the planes that kernel tap `tap`
/// reads: [N, C, D, ...] to [N * depth, C, ...], zero outside.
fn planes_at<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    slide: &Slide,
    tap: usize,
    depth: usize,
) -> Result<Value> {
    let xs = x.shape().to_vec();
    let [n, c, d] = [xs[0], xs[1], xs[2]];
    let rest: usize = xs[3..].iter().product();
    let reads = |o: usize| {
        (o * slide.stride + tap * slide.dilation).checked_sub(slide.pads[0]).filter(|&i| i < d)
    };
    let map = (0..n * depth * c * rest).map(|to| {
        let (image, o) = (to / (depth * c * rest), to / (c * rest) % depth);
        match reads(o) {
            None => Source::Fill,
            Some(i) => {
                let (channel, inner) = (to / rest % c, to % rest);
                Source::Element { input: 0, at: ((image * c + channel) * d + i) * rest + inner }
            }
        }
    });
    let mut shape = vec![n * depth, c];
    shape.extend_from_slice(&xs[3..]);
    rearrange(lower, std::slice::from_ref(x), shape, 0.0, map)
}

/// [N * D, C, ...] to [N, C, D, ...].
pub(super) fn depth_first<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    images: usize,
) -> Result<Value> {
    let xs = x.shape().to_vec();
    let mut split = vec![images, xs[0] / images.max(1)];
    split.extend_from_slice(&xs[1..]);
    let x = lower.reshape(x, split)?;
    let mut order: Vec<usize> = (0..x.rank()).collect();
    order.swap(1, 2);
    super::transpose::permute(lower, &x, &order)
}

/// Height and width of the spatial axes of an [N, C, ...] value; one axis becomes one row.
pub(super) fn plane(spatial: &[usize]) -> [usize; 2] {
    match spatial {
        [w] => [1, *w],
        [h, w, ..] => [*h, *w],
        [] => [1, 1],
    }
}

/// The deviation that each output channel had before a normalisation was folded into `weight`, from
/// the length of its weights: training hardly changes the length that initialisation gives
/// (PyTorch's default: 1 / sqrt(3), whatever the layer), and folding divides it by the deviation.
fn units<T: Element>(weights: &[T], channels: usize) -> Vec<f32> {
    const LENGTH: f64 = 0.577_350_269_189_625_8;
    let each = (weights.len() / channels.max(1)).max(1);
    let length = |row: &[T]| sum_of(row, |v| v * v).f64().sqrt();
    weights.chunks_exact(each).map(|row| (LENGTH / length(row).max(1e-6)) as f32).collect()
}

fn conv<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let weight = lower.input(node, 1)?;
    let Some(weight) = weight.constant().cloned() else { return Err(data_dependent(node, 1)) };
    let bias = lower.constant_input(node, 2)?;
    let y = emit_conv(lower, node, &x, &weight, bias.as_deref())?;
    let plane: usize = y.shape()[2..].iter().product();
    // Gates of one value a channel (squeeze-and-excitation) were never normalised.
    let tapped = plane > 1 && lower.taps == Taps::Activations;
    let y = match tapped {
        true => {
            let units = units(&elements::<T>(&weight), weight.shape[0]);
            watched(lower, node, y, units, plane)
        }
        false => y,
    };
    lower.set_output(node, 0, y);
    Ok(())
}
