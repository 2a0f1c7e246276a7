//! Depthwise convolution (one input channel per output channel); a matrix product of one row would not pay.
//!
//! Of stride 1: on a plane padded once, the pixels of one kernel tap are the output pixels moved by a constant (as in
//! `direct`), so a stretch of output pixels is summed in registers over all taps. Of other strides: shifted rows,
//! multiplied and added. Tasks are planes.

#![allow(unsafe_code)]

use rayon::prelude::*;

use super::conv::{Conv2dGeometry, input_row, valid_columns};
use super::direct::{Layout, pad};
use super::vector::at_each_level;
#[cfg(target_arch = "x86_64")]
use super::vector::x86::{Avx2, Avx512};
#[cfg(target_arch = "x86_64")]
use super::vector::{Level, Vector};
use super::{Element, scratch};

/// Output pixels summed in registers together.
const STRETCH: usize = 64;
/// Multiplications of a task, about: tens of microseconds.
const TASK: usize = 1 << 20;

/// `y[i] = sum over taps of w * x[i + tap]`; `y` holds whole stretches.
///
/// # Panics
/// When `x` does not reach as far as the last stretch and tap (a defect of the caller).
fn slide<T: Element>(x: &[T], taps: &[usize], w: &[T], y: &mut [T]) {
    #[cfg(target_arch = "x86_64")]
    if let Some(level) = Level::detected()
        && let (Some(x), Some(w)) = (T::as_f32(x), T::as_f32(w))
        && let Some(y) = T::as_f32_mut(y)
    {
        return slide_single(level, x, taps, w, y);
    }
    slide_any(x, taps, w, y);
}

/// [`slide`] in `f32`, multiplied and added in one.
#[cfg(target_arch = "x86_64")]
fn slide_single(level: Level, x: &[f32], taps: &[usize], w: &[f32], y: &mut [f32]) {
    let reach = taps.iter().max().map_or(0, |tap| tap + y.len());
    assert!(reach <= x.len() && taps.len() == w.len() && y.len().is_multiple_of(STRETCH));
    // SAFETY: the processor has the level's instructions; the bounds were checked.
    unsafe {
        match level {
            Level::Avx512 => slide_avx512(x, taps, w, y),
            Level::Avx2 => slide_avx2(x, taps, w, y),
        }
    }
}

at_each_level! {
    slide_any = slide_body(x: &[T], taps: &[usize], w: &[T], y: &mut [T])
}

/// # Safety
/// As [`slide_vectors`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn slide_avx512(x: &[f32], taps: &[usize], w: &[f32], y: &mut [f32]) {
    // SAFETY: the caller's duty.
    unsafe { slide_vectors::<Avx512, { STRETCH / 16 }>(x, taps, w, y) }
}

/// # Safety
/// As [`slide_vectors`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn slide_avx2(x: &[f32], taps: &[usize], w: &[f32], y: &mut [f32]) {
    // SAFETY: the caller's duty.
    unsafe { slide_vectors::<Avx2, { STRETCH / 8 }>(x, taps, w, y) }
}

/// [`slide`] in `f32`, `N` vectors a stretch.
///
/// # Safety
/// The instructions of `V` are there; `x` is as long as `y` and the largest tap together, a weight a tap.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn slide_vectors<V: Vector, const N: usize>(
    x: &[f32],
    taps: &[usize],
    w: &[f32],
    y: &mut [f32],
) {
    const { assert!(N * V::LANES == STRETCH) };
    for (stretch, y) in y.chunks_exact_mut(STRETCH).enumerate() {
        // SAFETY: the caller's duty.
        unsafe {
            let mut sums = [V::splat(0.0); N];
            for (&tap, &w) in taps.iter().zip(w) {
                let from = x.as_ptr().add(stretch * STRETCH + tap);
                let w = V::splat(w);
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = V::load(from.add(i * V::LANES)).fma(w, *sum);
                }
            }
            for (sum, y) in sums.iter().zip(y.chunks_exact_mut(V::LANES)) {
                sum.store(y.as_mut_ptr());
            }
        }
    }
}

// Over plain numbers, index loops of constant length keep the sums in registers; iterators do not.
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

/// Planes from number `first` on, of stride 1; `w` is `[channels, taps]`, turned by half a circle where `turned`. Adds to
/// `y`.
fn sliding<T: Element>(
    g: &Conv2dGeometry,
    first: usize,
    x: &[T],
    (w, turned): (&[T], bool),
    y: &mut [T],
) {
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
                    let channel = (first + index) % g.in_channels;
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

/// Planes that one task takes.
fn planes_per_task(g: &Conv2dGeometry) -> usize {
    let [rows, columns] = g.output();
    (TASK / (rows * columns * g.kernel[0] * g.kernel[1]).max(1)).max(1)
}

/// Forward; `x` and `y` hold the same number of images.
pub(super) fn forward<T: Element>(
    g: &Conv2dGeometry,
    x: &[T],
    w: &[T],
    bias: Option<&[T]>,
    y: &mut [T],
) {
    let planes = planes_per_task(g);
    let out_plane: usize = g.output().iter().product();
    y.par_chunks_mut(planes * out_plane)
        .zip(x.par_chunks(planes * g.input[0] * g.input[1]))
        .enumerate()
        .for_each(|(task, (y, x))| forward_planes(g, task * planes, x, (w, bias), y));
}

/// Planes from number `first` on.
fn forward_planes<T: Element>(
    g: &Conv2dGeometry,
    first: usize,
    x: &[T],
    (w, bias): (&[T], Option<&[T]>),
    y: &mut [T],
) {
    let taps = g.kernel[0] * g.kernel[1];
    let out_plane: usize = g.output().iter().product();
    let in_plane = g.input[0] * g.input[1];
    let step = g.stride[1];
    for (index, y) in y.chunks_exact_mut(out_plane).enumerate() {
        y.fill(bias.map_or(T::ZERO, |bias| bias[(first + index) % g.in_channels]));
    }
    if g.stride == [1, 1] {
        sliding(g, first, x, (w, false), y);
        return;
    }
    for (index, (x, y)) in x.chunks_exact(in_plane).zip(y.chunks_exact_mut(out_plane)).enumerate() {
        let channel = (first + index) % g.in_channels;
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

/// Adds the gradient to the input.
pub(super) fn input_gradient<T: Element>(g: &Conv2dGeometry, dy: &[T], w: &[T], dx: &mut [T]) {
    let planes = planes_per_task(g);
    let out_plane: usize = g.output().iter().product();
    dx.par_chunks_mut(planes * g.input[0] * g.input[1])
        .zip(dy.par_chunks(planes * out_plane))
        .enumerate()
        .for_each(|(task, (dx, dy))| input_gradient_planes(g, task * planes, dy, w, dx));
}

/// Planes from number `first` on.
fn input_gradient_planes<T: Element>(
    g: &Conv2dGeometry,
    first: usize,
    dy: &[T],
    w: &[T],
    dx: &mut [T],
) {
    if let Some(reversed) = g.backward_as_forward() {
        sliding(&reversed, first, dy, (w, true), dx);
        return;
    }
    let taps = g.kernel[0] * g.kernel[1];
    let out_plane: usize = g.output().iter().product();
    let in_plane = g.input[0] * g.input[1];
    let step = g.stride[1];
    let planes = dx.chunks_exact_mut(in_plane).zip(dy.chunks_exact(out_plane));
    for (index, (dx, dy)) in planes.enumerate() {
        let channel = (first + index) % g.in_channels;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::RngStream;

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn each_level_sums_the_taps() {
        let mut rng = RngStream::new(0, "depthwise", "slide", 0);
        let taps = [0, 1, 2, 17, 18, 40];
        let (x, w) = (rng.normals(5 * STRETCH + 40), rng.normals(taps.len()));
        for level in Level::all() {
            let mut y = vec![f32::NAN; 5 * STRETCH];
            slide_single(level, &x, &taps, &w, &mut y);
            for (i, &y) in y.iter().enumerate() {
                let terms =
                    taps.iter().zip(&w).map(|(tap, &w)| f64::from(w) * f64::from(x[i + tap]));
                let exact: f64 = terms.sum();
                assert!((f64::from(y) - exact).abs() < 1e-5, "{level:?} {i}: {y} of {exact}");
            }
        }
    }
}
