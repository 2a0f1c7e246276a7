//! Depthwise convolution (one input channel per output channel): shifted rows, multiplied and added,
//! which the compiler vectorises; a matrix product of one row would not pay.

use super::Element;
use super::conv::{Conv2dGeometry, input_row, valid_columns};

/// For each kernel tap and output row: calls `work(tap, input range start, output range)` with the
/// row's offsets inside the input and output planes; the input step is `stride[1]`.
fn for_each_row(g: &Conv2dGeometry, mut work: impl FnMut(usize, usize, usize, usize)) {
    let [height, width] = g.output();
    for ky in 0..g.kernel[0] {
        for kx in 0..g.kernel[1] {
            let (low, high) = valid_columns(g, kx, width);
            if low == high {
                continue;
            }
            let start = low * g.stride[1] + kx * g.dilation[1] - g.pads[1];
            for oy in 0..height {
                let Some(iy) = input_row(g, oy, ky) else { continue };
                let tap = ky * g.kernel[1] + kx;
                work(tap, iy * g.input[1] + start, oy * width + low, high - low);
            }
        }
    }
}

/// Forward for whole images; `x` and `y` hold the same number of images.
pub(super) fn forward<T: Element>(
    g: &Conv2dGeometry,
    x: &[T],
    w: &[T],
    bias: Option<&[T]>,
    y: &mut [T],
) {
    let taps = g.kernel[0] * g.kernel[1];
    let out_plane: usize = g.output().iter().product();
    let in_plane = g.input[0] * g.input[1];
    let step = g.stride[1];
    for (index, (x, y)) in x.chunks_exact(in_plane).zip(y.chunks_exact_mut(out_plane)).enumerate() {
        let channel = index % g.in_channels;
        y.fill(bias.map_or(T::ZERO, |bias| bias[channel]));
        let w = &w[channel * taps..(channel + 1) * taps];
        for_each_row(g, |tap, from, to, count| {
            let w = w[tap];
            let y = &mut y[to..to + count];
            if step == 1 {
                for (y, &x) in y.iter_mut().zip(&x[from..from + count]) {
                    *y += w * x;
                }
            } else {
                for (y, &x) in y.iter_mut().zip(x[from..].iter().step_by(step)) {
                    *y += w * x;
                }
            }
        });
    }
}

/// Adds the gradient to the input for whole images.
pub(super) fn input_gradient<T: Element>(g: &Conv2dGeometry, dy: &[T], w: &[T], dx: &mut [T]) {
    let taps = g.kernel[0] * g.kernel[1];
    let out_plane: usize = g.output().iter().product();
    let in_plane = g.input[0] * g.input[1];
    let step = g.stride[1];
    let planes = dx.chunks_exact_mut(in_plane).zip(dy.chunks_exact(out_plane));
    for (index, (dx, dy)) in planes.enumerate() {
        let channel = index % g.in_channels;
        let w = &w[channel * taps..(channel + 1) * taps];
        for_each_row(g, |tap, from, to, count| {
            let w = w[tap];
            let dy = &dy[to..to + count];
            if step == 1 {
                for (dx, &dy) in dx[from..from + count].iter_mut().zip(dy) {
                    *dx += w * dy;
                }
            } else {
                for (dx, &dy) in dx[from..].iter_mut().step_by(step).zip(dy) {
                    *dx += w * dy;
                }
            }
        });
    }
}
