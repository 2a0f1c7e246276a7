//! Depthwise convolution (one input channel per output channel); a matrix product of one row would not pay.
//!
//! Of stride 1: on a plane padded once, the pixels of one kernel tap are the output pixels moved by a constant (as in
//! `direct`), so a stretch of output pixels is summed in registers over all taps. Of other strides: shifted rows,
//! multiplied and added.

use super::conv::{Conv2dGeometry, input_row, valid_columns};
use super::direct::{Layout, pad};
use super::vector::at_each_level;
use super::{Element, scratch};

/// Output pixels summed in registers together.
const STRETCH: usize = 64;

at_each_level! {
    /// `y[i] = sum over taps of w * x[i + tap]`; `y` holds whole stretches.
    slide = slide_body(x: &[T], taps: &[usize], w: &[T], y: &mut [T])
}

// Index loops of constant length keep the sums in registers; iterators do not.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
fn slide_body<T: Element>(x: &[T], taps: &[usize], w: &[T], y: &mut [T]) {
    for (stretch, y) in y.chunks_exact_mut(STRETCH).enumerate() {
        let x = &x[stretch * STRETCH..];
        let mut sums = [T::ZERO; STRETCH];
        for (&tap, &w) in taps.iter().zip(w) {
            let x = &x[tap..tap + STRETCH];
            for i in 0..STRETCH {
                sums[i] += w * x[i];
            }
        }
        y.copy_from_slice(&sums);
    }
}

/// Whole images of stride 1; `w` is `[channels, taps]`, turned by half a circle where `turned`. Adds to `y`.
fn sliding<T: Element>(g: &Conv2dGeometry, x: &[T], w: &[T], turned: bool, y: &mut [T]) {
    let layout = Layout::new(g, STRETCH);
    let [_, columns] = g.output();
    let count = layout.taps.len();
    let (in_plane, out_plane) = (g.input[0] * g.input[1], g.output().iter().product());
    scratch::with(layout.plane + layout.room + STRETCH, |padded: &mut [T]| {
        padded.fill(T::ZERO);
        scratch::with(layout.room, |sums: &mut [T]| {
            scratch::with(count, |taps: &mut [T]| {
                let planes = x.chunks_exact(in_plane).zip(y.chunks_exact_mut(out_plane));
                for (index, (x, y)) in planes.enumerate() {
                    let channel = index % g.in_channels;
                    taps.copy_from_slice(&w[channel * count..(channel + 1) * count]);
                    if turned {
                        taps.reverse();
                    }
                    pad(g, &layout, x, &mut padded[..layout.plane]);
                    slide(padded, &layout.taps, taps, sums);
                    for (y, sums) in y.chunks_exact_mut(columns).zip(sums.chunks(layout.width)) {
                        for (y, &sum) in y.iter_mut().zip(sums) {
                            *y += sum;
                        }
                    }
                }
            });
        });
    });
}

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
    if g.stride == [1, 1] {
        for (index, y) in y.chunks_exact_mut(out_plane).enumerate() {
            y.fill(bias.map_or(T::ZERO, |bias| bias[index % g.in_channels]));
        }
        sliding(g, x, w, false, y);
        return;
    }
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
    if let Some(reversed) = g.backward_as_forward() {
        sliding(&reversed, dy, w, true, dx);
        return;
    }
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
