//! Sliding windows: kernel, stride, dilation and pads of each spatial axis, as Conv, ConvTranspose and
//! the pooling operators give them.

use crate::error::{Error, Result};
use crate::graph::ir::Node;

/// A window that slides along one axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slide {
    pub(super) kernel: usize,
    pub(super) stride: usize,
    pub(super) dilation: usize,
    /// Before the first and after the last element.
    pub(super) pads: [usize; 2],
}

impl Slide {
    /// Elements from the window's first to its last.
    pub(super) fn reach(&self) -> usize {
        self.dilation * (self.kernel - 1) + 1
    }

    /// Positions of the window on `size` elements; 0 where it does not fit.
    pub(super) fn output(&self, size: usize) -> usize {
        let padded = size + self.pads[0] + self.pads[1];
        padded.checked_sub(self.reach()).map_or(0, |room| room / self.stride + 1)
    }
}

/// Sizes, strides and pads of a window over two axes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    pub(super) kernel: [usize; 2],
    pub(super) stride: [usize; 2],
    pub(super) dilation: [usize; 2],
    /// Top, left, bottom, right.
    pub(super) pads: [usize; 4],
}

/// A window over one or two axes as one over two; one axis becomes one row.
///
/// # Errors
/// When there are more axes.
pub(super) fn two_axes(slides: &[Slide]) -> Result<Window> {
    const POINT: Slide = Slide { kernel: 1, stride: 1, dilation: 1, pads: [0, 0] };
    let [y, x] = match slides {
        [x] => [POINT, *x],
        [y, x] => [*y, *x],
        _ => {
            let count = slides.len();
            return Err(Error::unsupported(format!("slides a window over `{count}` axes")));
        }
    };
    Ok(Window {
        kernel: [y.kernel, x.kernel],
        stride: [y.stride, x.stride],
        dilation: [y.dilation, x.dilation],
        pads: [y.pads[0], x.pads[0], y.pads[1], x.pads[1]],
    })
}

/// A list attribute of `count` sizes, all `default` where it is absent.
///
/// # Errors
/// When it has another length or a value that is no size.
pub(super) fn sizes(node: &Node, name: &str, default: usize, count: usize) -> Result<Vec<usize>> {
    let Some(values) = node.ints(name)? else { return Ok(vec![default; count]) };
    let good: Option<Vec<usize>> =
        values.iter().map(|&v| usize::try_from(v).ok().filter(|&v| v < 1 << 20)).collect();
    good.filter(|v| v.len() == count).ok_or_else(|| {
        Error::input(format!("attribute `{name}` must be {count} sizes, got `{values:?}`"))
    })
}

/// Reads `strides`, `dilations`, `pads` and `auto_pad` for a window of `kernel` over `input`.
///
/// # Errors
/// When an attribute has the wrong length or a value that makes no sense.
pub(super) fn slides(node: &Node, kernel: &[usize], input: &[usize]) -> Result<Vec<Slide>> {
    let axes = kernel.len();
    if axes == 0 || input.len() != axes {
        let text = format!("a window over {axes} axes does not fit `{}` axes", input.len());
        return Err(Error::input(text));
    }
    let stride = sizes(node, "strides", 1, axes)?;
    let dilation = sizes(node, "dilations", 1, axes)?;
    let pads = sizes(node, "pads", 0, 2 * axes)?;
    if stride.contains(&0) || dilation.contains(&0) || kernel.contains(&0) {
        return Err(Error::input("strides, dilations and kernel sizes must be positive"));
    }
    let auto = node.text("auto_pad", "NOTSET")?;
    (0..axes)
        .map(|axis| {
            let mut slide = Slide {
                kernel: kernel[axis],
                stride: stride[axis],
                dilation: dilation[axis],
                pads: [pads[axis], pads[axis + axes]],
            };
            match auto {
                "NOTSET" | "" => {}
                "VALID" => slide.pads = [0, 0],
                "SAME_UPPER" | "SAME_LOWER" => {
                    let output = input[axis].div_ceil(slide.stride).max(1);
                    let covered = (output - 1) * slide.stride + slide.reach();
                    let total = covered.saturating_sub(input[axis]);
                    let (small, large) = (total / 2, total - total / 2);
                    let upper = auto == "SAME_UPPER";
                    slide.pads = if upper { [small, large] } else { [large, small] };
                }
                other => return Err(Error::unsupported(format!("auto_pad `{other}`"))),
            }
            Ok(slide)
        })
        .collect()
}
