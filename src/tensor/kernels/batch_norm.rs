//! Batch normalisation with the statistics of the batch, fused with ReLU: forward and backward.
//!
//! Work is split by image, sums are taken per (image, channel) plane and then added over images in
//! order, so results do not depend on the number of threads.

use rayon::prelude::*;

use super::Element;
use super::channel::moments;
use super::vector::at_each_level;

/// Values of a task.
const TASK: usize = 1 << 14;
/// Partial sums kept apart so that the compiler can use vector registers.
const LANES: usize = 32;

/// What follows the normalisation in the same pass.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// Nothing.
    None,
    /// max(x, 0), with derivative 0 at 0; NaN stays NaN.
    Relu,
    /// x where positive, else this slope (positive) times x; NaN stays NaN.
    LeakyRelu(f64),
}

impl Activation {
    /// The slope where the value is not positive.
    pub(crate) fn below(self) -> f64 {
        match self {
            Self::None => 1.0,
            Self::Relu => 0.0,
            Self::LeakyRelu(slope) => slope,
        }
    }
}

/// Sizes of a batch `[images, channels, plane]`, the plane being height times width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planes {
    /// Images.
    pub images: usize,
    /// Channels.
    pub channels: usize,
    /// Height times width.
    pub plane: usize,
}

impl Planes {
    /// Values per channel.
    pub fn per_channel(&self) -> usize {
        self.images * self.plane
    }

    /// Planes of a task.
    fn part(&self) -> usize {
        (TASK / self.plane.max(1)).max(1)
    }
}

/// Mean and biased variance of each channel over images and positions. Each plane is centred on its
/// own mean first and the parts are joined (Chan, Golub and LeVeque 1983), so nothing cancels.
pub fn batch_statistics<T: Element>(p: &Planes, x: &[T], mean: &mut [T], variance: &mut [T]) {
    if p.per_channel() == 0 {
        mean.fill(T::ZERO);
        variance.fill(T::ZERO);
        return;
    }
    let n = T::of(p.plane as f64);
    let parts: Vec<(T, T)> = x
        .par_chunks(p.plane)
        .with_min_len(p.part())
        .map(|plane| {
            let mean = moments(T::ZERO, plane)[0] / n;
            (mean, moments(mean, plane)[1])
        })
        .collect();
    let images = T::of(p.images as f64);
    for (channel, (mean, variance)) in mean.iter_mut().zip(variance).enumerate() {
        let own = || parts.iter().skip(channel).step_by(p.channels);
        let centre = own().map(|part| part.0).sum::<T>() / images;
        let spread: T = own().map(|&(m, s)| s + n * (m - centre) * (m - centre)).sum();
        *mean = centre;
        *variance = spread / (n * images);
    }
}

/// `y = act(x * scale + shift)` per channel.
pub fn channel_affine<T: Element>(
    p: &Planes,
    x: &[T],
    scale: &[T],
    shift: &[T],
    activation: Activation,
    y: &mut [T],
) {
    if y.is_empty() {
        return;
    }
    let part = p.part();
    let tasks = y.par_chunks_mut(part * p.plane).zip(x.par_chunks(part * p.plane));
    tasks.enumerate().for_each(|(task, (y, x))| {
        let planes = y.chunks_exact_mut(p.plane).zip(x.chunks_exact(p.plane));
        for (at, (y, x)) in planes.enumerate() {
            let c = (task * part + at) % p.channels;
            affine(activation, scale[c], shift[c], x, y);
        }
    });
}

at_each_level! {
    /// `y = act(x * scale + shift)`.
    affine = affine_body(activation: Activation, scale: T, shift: T, x: &[T], y: &mut [T])
}

at_each_level! {
    /// Sums of `d` and of `d (x - mean)`, `d` being `dy` before the activation.
    sums = sums_body(normal: Plane<T>, x: &[T], dy: &[T]) -> [T; 2]
}

at_each_level! {
    /// `dx = scale * d + offset + slope * x`, `d` being `dy` before the activation.
    spread = spread_body(normal: Plane<T>, offset: T, slope: T, x: &[T], dy: &[T], dx: &mut [T])
}

/// One channel's normalisation and the slope of the activation where the value is not positive.
#[derive(Clone, Copy)]
struct Plane<T> {
    mean: T,
    scale: T,
    shift: T,
    below: T,
}

impl<T: Element> Plane<T> {
    /// The gradient before the activation.
    #[inline(always)]
    fn before(&self, x: T, dy: T) -> T {
        if x * self.scale + self.shift > T::ZERO { dy } else { self.below * dy }
    }
}

#[inline(always)]
fn affine_body<T: Element>(activation: Activation, scale: T, shift: T, x: &[T], y: &mut [T]) {
    match activation {
        Activation::None => {
            for (y, &x) in y.iter_mut().zip(x) {
                *y = x * scale + shift;
            }
        }
        Activation::Relu => {
            for (y, &x) in y.iter_mut().zip(x) {
                let value = x * scale + shift;
                *y = if value <= T::ZERO { T::ZERO } else { value };
            }
        }
        Activation::LeakyRelu(slope) => {
            let slope = T::of(slope);
            for (y, &x) in y.iter_mut().zip(x) {
                let value = x * scale + shift;
                *y = if value <= T::ZERO { slope * value } else { value };
            }
        }
    }
}

#[inline(always)]
fn sums_body<T: Element>(normal: Plane<T>, x: &[T], dy: &[T]) -> [T; 2] {
    let (mut direct, mut along) = ([T::ZERO; LANES], [T::ZERO; LANES]);
    let (xs, ds) = (x.chunks_exact(LANES), dy.chunks_exact(LANES));
    let rest = xs.remainder().iter().zip(ds.remainder());
    for (x, dy) in xs.zip(ds) {
        for i in 0..LANES {
            let d = normal.before(x[i], dy[i]);
            direct[i] += d;
            along[i] += d * (x[i] - normal.mean);
        }
    }
    for (i, (&x, &dy)) in rest.enumerate() {
        let d = normal.before(x, dy);
        direct[i] += d;
        along[i] += d * (x - normal.mean);
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            let (other, tilted) = (direct[i + half], along[i + half]);
            direct[i] += other;
            along[i] += tilted;
        }
        half /= 2;
    }
    [direct[0], along[0]]
}

#[inline(always)]
fn spread_body<T: Element>(normal: Plane<T>, offset: T, slope: T, x: &[T], dy: &[T], dx: &mut [T]) {
    for ((dx, &x), &dy) in dx.iter_mut().zip(x).zip(dy) {
        *dx = normal.scale * normal.before(x, dy) + (offset + slope * x);
    }
}

/// What the forward pass leaves for the backward pass: one value a channel each.
#[derive(Debug, Clone, Copy)]
pub struct Normalisation<'a, T> {
    /// Batch mean.
    pub mean: &'a [T],
    /// 1 / sqrt(variance + epsilon).
    pub inverse_std: &'a [T],
    /// Learned factor times `inverse_std`, as in the forward pass.
    pub scale: &'a [T],
    /// Learned offset minus `mean * scale`, as in the forward pass.
    pub shift: &'a [T],
    /// What followed.
    pub activation: Activation,
}

/// Gradients of batch normalisation (+ activation): `dx`, to the factor and to the offset, given the
/// gradient `dy` of its output. Ioffe and Szegedy 2015, section 3, with the sums over the batch.
pub fn batch_norm_backward<T: Element>(
    p: &Planes,
    norm: &Normalisation<'_, T>,
    x: &[T],
    dy: &[T],
    dx: &mut [T],
    d_factor: &mut [T],
    d_offset: &mut [T],
) {
    if dx.is_empty() {
        return;
    }
    let normal = |c: usize| Plane {
        mean: norm.mean[c],
        scale: norm.scale[c],
        shift: norm.shift[c],
        below: T::of(norm.activation.below()),
    };
    let parts: Vec<[T; 2]> = x
        .par_chunks(p.plane)
        .with_min_len(p.part())
        .zip(dy.par_chunks(p.plane))
        .enumerate()
        .map(|(at, (x, dy))| sums(normal(at % p.channels), x, dy))
        .collect();
    for channel in 0..p.channels {
        let own = || parts.iter().skip(channel).step_by(p.channels);
        d_offset[channel] = own().map(|part| part[0]).sum();
        d_factor[channel] = own().map(|part| part[1]).sum::<T>() * norm.inverse_std[channel];
    }
    let count = T::of(p.per_channel() as f64);
    let (d_factor, d_offset) = (&*d_factor, &*d_offset);
    let part = p.part();
    let tasks = dx
        .par_chunks_mut(part * p.plane)
        .zip(x.par_chunks(part * p.plane))
        .zip(dy.par_chunks(part * p.plane));
    tasks.enumerate().for_each(|(task, ((dx, x), dy))| {
        let planes =
            dx.chunks_exact_mut(p.plane).zip(x.chunks_exact(p.plane)).zip(dy.chunks_exact(p.plane));
        for (at, ((dx, x), dy)) in planes.enumerate() {
            let c = (task * part + at) % p.channels;
            let slope = -norm.scale[c] * (d_factor[c] / count * norm.inverse_std[c]);
            let offset = -norm.scale[c] * (d_offset[c] / count) - norm.mean[c] * slope;
            spread(normal(c), offset, slope, x, dy, dx);
        }
    });
}
