//! Convolutions with constant weights: Conv (1-D as a one-row 2-D), with groups, strides, dilations,
//! asymmetric pads and auto_pad.

use std::sync::Arc;

use super::Rule;
use crate::error::{Error, Result};
use crate::graph::ir::Node;
use crate::graph::plan::{
    Lower, Mode, Needs, Step, StepState, Target, Value, data_dependent, elements,
};
use crate::tensor::kernels::Element;
use crate::tensor::kernels::conv::{Conv2dGeometry, conv2d, conv2d_input_gradient};

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

/// Sizes, strides and pads of a sliding window over two axes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    pub(super) kernel: [usize; 2],
    pub(super) stride: [usize; 2],
    pub(super) dilation: [usize; 2],
    pub(super) pads: [usize; 4],
}

/// Reads `strides`, `dilations`, `pads` and `auto_pad` for a window of `kernel` over `input`; a
/// one-axis window becomes one row of two.
///
/// # Errors
/// When an attribute has the wrong length or a value that makes no sense.
pub(super) fn window(node: &Node, kernel: &[usize], input: &[usize]) -> Result<Window> {
    let axes = kernel.len();
    if axes == 0 || axes > 2 || input.len() != axes {
        return Err(Error::unsupported(format!("slides a window over `{}` axes", input.len())));
    }
    let list = |name: &str, default: usize, count: usize| -> Result<Vec<usize>> {
        let Some(values) = node.ints(name)? else { return Ok(vec![default; count]) };
        let good: Option<Vec<usize>> =
            values.iter().map(|&v| usize::try_from(v).ok().filter(|&v| v < 1 << 20)).collect();
        good.filter(|v| v.len() == count).ok_or_else(|| {
            Error::input(format!("attribute `{name}` must be {count} sizes, got `{values:?}`"))
        })
    };
    let stride = list("strides", 1, axes)?;
    let dilation = list("dilations", 1, axes)?;
    let mut pads = list("pads", 0, 2 * axes)?;
    if stride.contains(&0) || dilation.contains(&0) || kernel.contains(&0) {
        return Err(Error::input("strides, dilations and kernel sizes must be positive"));
    }
    match node.text("auto_pad", "NOTSET")? {
        "NOTSET" | "" => {}
        "VALID" => pads.fill(0),
        same @ ("SAME_UPPER" | "SAME_LOWER") => {
            for axis in 0..axes {
                let output = input[axis].div_ceil(stride[axis]);
                let reach = dilation[axis] * (kernel[axis] - 1) + 1;
                let total =
                    ((output.max(1) - 1) * stride[axis] + reach).saturating_sub(input[axis]);
                let small = total / 2;
                let large = total - small;
                let upper = same == "SAME_UPPER";
                pads[axis] = if upper { small } else { large };
                pads[axis + axes] = if upper { large } else { small };
            }
        }
        other => return Err(Error::unsupported(format!("auto_pad `{other}`"))),
    }
    Ok(match axes {
        1 => Window {
            kernel: [1, kernel[0]],
            stride: [1, stride[0]],
            dilation: [1, dilation[0]],
            pads: [0, pads[0], 0, pads[1]],
        },
        _ => Window {
            kernel: [kernel[0], kernel[1]],
            stride: [stride[0], stride[1]],
            dilation: [dilation[0], dilation[1]],
            pads: [pads[0], pads[1], pads[2], pads[3]],
        },
    })
}

/// Height and width of the spatial axes of an [N, C, ...] value; one axis becomes one row.
pub(super) fn plane(spatial: &[usize]) -> [usize; 2] {
    match spatial {
        [w] => [1, *w],
        [h, w, ..] => [*h, *w],
        [] => [1, 1],
    }
}

fn conv<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let weight = lower.input(node, 1)?;
    let Some(weight) = weight.constant().cloned() else { return Err(data_dependent(node, 1)) };
    let bias = lower.constant_input(node, 2)?;
    let (xs, ws) = (x.shape().to_vec(), weight.shape.clone());
    if xs.len() != ws.len() || !(3..=4).contains(&xs.len()) {
        return Err(Error::unsupported(format!("input of shape {xs:?} with weights `{ws:?}`")));
    }
    if let Some(kernel) = node.ints("kernel_shape")?
        && kernel.iter().map(|&k| k as usize).ne(ws[2..].iter().copied())
    {
        return Err(Error::input(format!("kernel_shape {kernel:?} differs from weights `{ws:?}`")));
    }
    let groups = usize::try_from(node.int("group", 1)?).unwrap_or(0);
    if groups == 0
        || !ws[0].is_multiple_of(groups)
        || ws[1] * groups != xs[1]
        || ws.contains(&0)
        || xs.contains(&0)
    {
        return Err(Error::input(format!(
            "weights {ws:?} in {groups} groups do not fit an input of shape `{xs:?}`"
        )));
    }
    let window = window(node, &ws[2..], &xs[2..])?;
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
    let [height, width] = geometry.output();
    if height == 0 || width == 0 {
        return Err(Error::input(format!("kernel {:?} is larger than input `{xs:?}`", &ws[2..])));
    }
    if let Some(bias) = &bias
        && bias.data.len() != ws[0]
    {
        return Err(Error::input(format!("bias of {} for `{}` channels", bias.data.len(), ws[0])));
    }
    let mut shape = vec![xs[0], ws[0], height, width];
    if xs.len() == 3 {
        shape.remove(2);
    }
    let step = Conv {
        geometry,
        weight: Arc::new(elements(&weight)),
        bias: bias.map(|bias| Arc::new(elements(&bias))),
    };
    let y = lower.emit(Box::new(step), &[x], shape);
    lower.set_output(node, 0, y);
    Ok(())
}

/// Whether a value's leading axes are batch and channels with one or two spatial axes.
pub(super) fn image_shape(x: &Value) -> Result<(usize, usize, Vec<usize>)> {
    match x.shape() {
        [n, c, spatial @ ..] if (1..=2).contains(&spatial.len()) => Ok((*n, *c, spatial.to_vec())),
        other => Err(Error::unsupported(format!("needs [N, C, H, W], got shape `{other:?}`"))),
    }
}
