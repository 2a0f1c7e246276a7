//! 2-D convolution: forward, gradient to the input, gradient to the weights. NCHW, groups, any
//! stride, dilation and (asymmetric) padding.

use super::Element;

/// The sizes of one convolution. All are in elements; pads are `[top, left, bottom, right]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv2dGeometry {
    /// Images.
    pub batch: usize,
    /// Input channels (all groups).
    pub in_channels: usize,
    /// Input height and width.
    pub input: [usize; 2],
    /// Output channels (all groups).
    pub out_channels: usize,
    /// Kernel height and width.
    pub kernel: [usize; 2],
    /// Stride down and right.
    pub stride: [usize; 2],
    /// Dilation down and right.
    pub dilation: [usize; 2],
    /// Zero padding `[top, left, bottom, right]`.
    pub pads: [usize; 4],
    /// Groups; divides both channel counts.
    pub groups: usize,
}

impl Conv2dGeometry {
    /// Output height and width (0 where the padded input is smaller than the dilated kernel).
    pub fn output(&self) -> [usize; 2] {
        let size = |axis: usize| {
            let padded = self.input[axis] + self.pads[axis] + self.pads[axis + 2];
            let reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1;
            if padded < reach { 0 } else { (padded - reach) / self.stride[axis] + 1 }
        };
        [size(0), size(1)]
    }
}

/// `y = conv(x, w) + bias`; `x` [N,C,H,W], `w` [O,C/groups,kh,kw], `y` [N,O,Ho,Wo].
pub fn conv2d<T: Element>(
    _g: &Conv2dGeometry,
    _x: &[T],
    _w: &[T],
    _bias: Option<&[T]>,
    _y: &mut [T],
) {
    todo!("core")
}

/// `dx (+)= gradient to the input`; adds to `dx` when `accumulate`.
pub fn conv2d_input_gradient<T: Element>(
    _g: &Conv2dGeometry,
    _dy: &[T],
    _w: &[T],
    _dx: &mut [T],
    _accumulate: bool,
) {
    todo!("core")
}

/// `dw = gradient to the weights` (overwrites).
pub fn conv2d_weight_gradient<T: Element>(_g: &Conv2dGeometry, _x: &[T], _dy: &[T], _dw: &mut [T]) {
    todo!("core")
}
