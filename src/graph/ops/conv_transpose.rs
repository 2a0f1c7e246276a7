//! ConvTranspose: the gradient of a convolution to its input, and so that kernel; its own gradient is
//! the convolution.

use std::sync::Arc;

use super::Rule;
use super::binary::{Binary, emit};
use super::conv::{at_tap, depth_first, plane};
use super::rearrange::{Source, indices, rearrange};
use super::strides;
use super::window::{Slide, sizes, two_axes};
use crate::error::{Error, Result};
use crate::graph::ir::Node;
#[cfg(any(feature = "cuda", test))]
use crate::graph::plan::singles;
use crate::graph::plan::{
    Lower, Mode, Needs, Step, StepState, Target, Value, data_dependent, elements,
};
#[cfg(any(feature = "cuda", test))]
use crate::tensor::cuda;
use crate::tensor::kernels::Element;
use crate::tensor::kernels::conv::{Conv2dGeometry, conv2d, conv2d_input_gradient};

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    match op {
        "ConvTranspose" => Some(conv_transpose),
        _ => None,
    }
}

/// A transposed convolution with frozen weights [C, O/groups, kh, kw]. `geometry` is that of the
/// convolution it transposes: its input is this output.
#[derive(Debug)]
struct ConvTranspose<T> {
    geometry: Conv2dGeometry,
    weight: Arc<Vec<T>>,
}

impl<T: Element> Step<T> for ConvTranspose<T> {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], _state: &mut StepState<T>) {
        conv2d_input_gradient(&self.geometry, inputs[0], &self.weight, output, false);
    }

    #[cfg(any(feature = "cuda", test))]
    fn on_device(&self, site: &cuda::Site<'_>) -> Result<Option<Box<dyn cuda::Operation>>> {
        let weight = singles(&self.weight);
        let step = cuda::Convolution::new(site, self.geometry, &weight, None)?;
        Ok(Some(Box::new(cuda::ConvolutionTransposed(step))))
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
        if target.mode == Mode::Write {
            conv2d(&self.geometry, d_output, &self.weight, None, target.data);
            return;
        }
        let mut part = vec![T::ZERO; target.data.len()];
        conv2d(&self.geometry, d_output, &self.weight, None, &mut part);
        target.put_map(&part, |g| g);
    }
}

/// The output along one axis: its length, and what is cut off the full reach in front.
#[derive(Debug, Clone, Copy)]
struct Extent {
    size: usize,
    cut: usize,
}

/// Reads pads, output_padding, output_shape and auto_pad for `slides` on `input`.
fn extents(node: &Node, slides: &[Slide], input: &[usize]) -> Result<Vec<Extent>> {
    let axes = slides.len();
    let extra = sizes(node, "output_padding", 0, axes)?;
    let pads = sizes(node, "pads", 0, 2 * axes)?;
    let wanted = node.ints("output_shape")?;
    let auto = node.text("auto_pad", "NOTSET")?;
    (0..axes)
        .map(|axis| {
            let slide = &slides[axis];
            let full = slide.stride * (input[axis].max(1) - 1) + slide.reach() + extra[axis];
            let same = auto.starts_with("SAME").then(|| input[axis] * slide.stride);
            // An old form of output_shape counts batch and channels too.
            let given = wanted.and_then(|w| w.get(w.len().checked_sub(axes)? + axis)).copied();
            let size = match (given, same) {
                (Some(size), _) => usize::try_from(size).ok().filter(|&size| size < 1 << 20),
                (None, Some(size)) => Some(size),
                (None, None) if auto == "VALID" => Some(full),
                (None, None) => full.checked_sub(pads[axis] + pads[axis + axes]),
            };
            let size = size.filter(|&size| size > 0).ok_or_else(|| {
                Error::input(format!("pads `{pads:?}` or `output_shape` leave no output"))
            })?;
            let total = full.saturating_sub(size);
            let computed = given.is_some() || same.is_some();
            let cut = match computed {
                true if auto == "SAME_UPPER" => total / 2,
                true => total - total / 2,
                false if auto == "VALID" => 0,
                false => pads[axis],
            };
            Ok(Extent { size, cut })
        })
        .collect()
}

/// Weights [C, O/groups, ...].
struct Weights<T> {
    shape: Vec<usize>,
    values: Vec<T>,
}

/// Emits the transposed convolution of `x` [N, C, ...], each axis cut to its extent.
fn transposed<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    weights: Weights<T>,
    slides: &[Slide],
    extents: &[Extent],
    groups: usize,
) -> Result<Value> {
    let (xs, ws) = (x.shape().to_vec(), weights.shape);
    let [first, rest @ ..] = slides else { return Err(Error::input("has no spatial axis")) };
    if rest.len() < 2 {
        return planar(
            lower,
            x,
            Weights { shape: ws, values: weights.values },
            slides,
            extents,
            groups,
        );
    }
    // Leading axes one tap at a time: each tap's result is laid where it belongs, and all are added.
    let [n, d] = [xs[0], xs[2]];
    let mut order: Vec<usize> = (0..xs.len()).collect();
    order.swap(1, 2);
    let planes = super::transpose::permute(lower, x, &order)?;
    let mut flat = vec![n * d, xs[1]];
    flat.extend_from_slice(&xs[3..]);
    let planes = lower.reshape(&planes, flat)?;
    let mut total: Option<Value> = None;
    for tap in 0..first.kernel {
        let mut shape = ws[..2].to_vec();
        shape.extend_from_slice(&ws[3..]);
        let part = Weights { shape, values: at_tap(&ws, &weights.values, tap) };
        let y = transposed(lower, &planes, part, rest, &extents[1..], groups)?;
        let y = depth_first(lower, &y, n)?;
        let y = spread(lower, &y, first, tap, extents[0])?;
        total = Some(match total {
            None => y,
            Some(sum) => emit(lower, Binary::Add, &sum, &y)?,
        });
    }
    total.ok_or_else(|| Error::input("empty kernel"))
}

/// [N, O, D, ...] laid at `d * stride + tap * dilation - cut` of an axis of the extent's size.
fn spread<T: Element>(
    lower: &mut Lower<'_, T>,
    y: &Value,
    slide: &Slide,
    tap: usize,
    extent: Extent,
) -> Result<Value> {
    let mut shape = y.shape().to_vec();
    let (d, inner): (usize, usize) = (shape[2], shape[3..].iter().product());
    let outer = shape[0] * shape[1];
    shape[2] = extent.size;
    let from = |o: usize| {
        let position = (o + extent.cut).checked_sub(tap * slide.dilation)?;
        let at = position / slide.stride;
        (position.is_multiple_of(slide.stride) && at < d).then_some(at)
    };
    let map = (0..outer).flat_map(|row| {
        (0..extent.size).flat_map(move |o| {
            (0..inner).map(move |i| match from(o) {
                Some(at) => Source::Element { input: 0, at: (row * d + at) * inner + i },
                None => Source::Fill,
            })
        })
    });
    rearrange(lower, std::slice::from_ref(y), shape, 0.0, map)
}

/// One or two axes: one kernel call when the sizes are those of a convolution's gradient, else the
/// uncut result, cut or filled up.
fn planar<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    weights: Weights<T>,
    slides: &[Slide],
    extents: &[Extent],
    groups: usize,
) -> Result<Value> {
    let xs = x.shape().to_vec();
    let channels = weights.shape[1] * groups;
    let full = |slide: &Slide, size: usize| slide.stride * (size - 1) + slide.reach();
    // Pads of the convolution that this transposes, where they exist.
    let fits: Option<Vec<Slide>> = slides
        .iter()
        .zip(extents)
        .zip(&xs[2..])
        .map(|((slide, extent), &size)| {
            let after = full(slide, size).saturating_sub(extent.size + extent.cut);
            let padded = Slide { pads: [extent.cut, after], ..*slide };
            (padded.output(extent.size) == size).then_some(padded)
        })
        .collect();
    let direct = fits.is_some();
    let sizes: Vec<usize> = match direct {
        true => extents.iter().map(|extent| extent.size).collect(),
        false => slides.iter().zip(&xs[2..]).map(|(slide, &size)| full(slide, size)).collect(),
    };
    let uncut = || slides.iter().map(|slide| Slide { pads: [0, 0], ..*slide }).collect();
    let window = two_axes(&fits.unwrap_or_else(uncut))?;
    let geometry = Conv2dGeometry {
        batch: xs[0],
        in_channels: channels,
        input: plane(&sizes),
        out_channels: xs[1],
        kernel: window.kernel,
        stride: window.stride,
        dilation: window.dilation,
        pads: window.pads,
        groups,
    };
    let mut shape = vec![xs[0], channels];
    shape.extend(&sizes);
    let step = ConvTranspose { geometry, weight: Arc::new(weights.values) };
    let y = lower.emit(Box::new(step), std::slice::from_ref(x), shape.clone());
    if direct {
        return Ok(y);
    }
    let own = strides(&shape);
    for (axis, extent) in extents.iter().enumerate() {
        shape[axis + 2] = extent.size;
    }
    let map = indices(&shape).map(|mut index| {
        for (axis, extent) in extents.iter().enumerate() {
            index[axis + 2] += extent.cut;
            if index[axis + 2] >= sizes[axis] {
                return Source::Fill;
            }
        }
        let at = index.iter().zip(&own).map(|(i, s)| i * s).sum();
        Source::Element { input: 0, at }
    });
    rearrange(lower, &[y], shape.clone(), 0.0, map)
}

fn conv_transpose<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let Some(weight) = lower.input(node, 1)?.constant().cloned() else {
        return Err(data_dependent(node, 1));
    };
    let (xs, ws) = (x.shape().to_vec(), weight.shape.clone());
    let groups = usize::try_from(node.int("group", 1)?).unwrap_or(0);
    let fits = xs.len() == ws.len()
        && xs.len() >= 3
        && groups > 0
        && xs[1] == ws[0]
        && xs[1].is_multiple_of(groups)
        && !ws.contains(&0)
        && !xs.contains(&0);
    if !fits {
        return Err(Error::input(format!(
            "weights {ws:?} in {groups} groups do not fit an input of shape `{xs:?}`"
        )));
    }
    let axes = xs.len() - 2;
    let stride = sizes(node, "strides", 1, axes)?;
    let dilation = sizes(node, "dilations", 1, axes)?;
    if stride.contains(&0) || dilation.contains(&0) {
        return Err(Error::input("strides and dilations must be positive"));
    }
    let slides: Vec<Slide> = (0..axes)
        .map(|axis| Slide {
            kernel: ws[axis + 2],
            stride: stride[axis],
            dilation: dilation[axis],
            pads: [0, 0],
        })
        .collect();
    let extents = extents(node, &slides, &xs[2..])?;
    let channels = ws[1] * groups;
    let weights = Weights { shape: ws, values: elements(&weight) };
    let mut y = transposed(lower, &x, weights, &slides, &extents, groups)?;
    if let Some(bias) = lower.optional(node, 2)? {
        let mut shape = vec![channels];
        shape.resize(axes + 1, 1);
        let bias = lower.reshape(&bias, shape)?;
        y = emit(lower, Binary::Add, &y, &bias)?;
    }
    lower.set_output(node, 0, y);
    Ok(())
}
