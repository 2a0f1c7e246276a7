//! Batch normalisation with the statistics of the batch, fused with ReLU: forward and backward.
//!
//! Work is split by image, sums are taken per (image, channel) plane and then added over images in
//! order, so results do not depend on the number of threads.

use rayon::prelude::*;

use super::Element;
use super::map::{sum, sum_zip};

/// What follows the normalisation in the same pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// Nothing.
    None,
    /// max(x, 0), with derivative 0 at 0; NaN stays NaN.
    Relu,
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

    fn image(&self) -> usize {
        self.channels * self.plane
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
        .with_min_len(p.channels)
        .map(|plane| {
            let mean = sum(plane) / n;
            (mean, sum_zip(plane, plane, |a, _| (a - mean) * (a - mean)))
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
    if p.image() == 0 {
        return;
    }
    y.par_chunks_mut(p.image()).zip(x.par_chunks(p.image())).for_each(|(y, x)| {
        let planes = y.chunks_exact_mut(p.plane).zip(x.chunks_exact(p.plane));
        for (((y, x), &scale), &shift) in planes.zip(scale).zip(shift) {
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
            }
        }
    });
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
    if p.image() == 0 || p.images == 0 {
        return;
    }
    let parts: Vec<(T, T)> = x
        .par_chunks(p.plane)
        .with_min_len(p.channels)
        .zip(dy.par_chunks(p.plane))
        .enumerate()
        .map(|(at, (x, dy))| {
            let c = at % p.channels;
            let (scale, shift, mean) = (norm.scale[c], norm.shift[c], norm.mean[c]);
            match norm.activation {
                Activation::None => (sum(dy), sum_zip(x, dy, |x, d| d * (x - mean))),
                Activation::Relu => {
                    let pass = |x: T, d: T| if x * scale + shift > T::ZERO { d } else { T::ZERO };
                    (sum_zip(x, dy, pass), sum_zip(x, dy, |x, d| pass(x, d) * (x - mean)))
                }
            }
        })
        .collect();
    for channel in 0..p.channels {
        let own = || parts.iter().skip(channel).step_by(p.channels);
        d_offset[channel] = own().map(|part| part.0).sum();
        d_factor[channel] = own().map(|part| part.1).sum::<T>() * norm.inverse_std[channel];
    }
    let count = T::of(p.per_channel() as f64);
    let (d_factor, d_offset) = (&*d_factor, &*d_offset);
    dx.par_chunks_mut(p.image())
        .zip(x.par_chunks(p.image()))
        .zip(dy.par_chunks(p.image()))
        .for_each(|((dx, x), dy)| {
            let planes = dx
                .chunks_exact_mut(p.plane)
                .zip(x.chunks_exact(p.plane))
                .zip(dy.chunks_exact(p.plane));
            for (c, ((dx, x), dy)) in planes.enumerate() {
                let (scale, shift) = (norm.scale[c], norm.shift[c]);
                let along = d_factor[c] / count * norm.inverse_std[c];
                let constant = d_offset[c] / count - norm.mean[c] * along;
                match norm.activation {
                    Activation::None => {
                        for ((dx, &x), &d) in dx.iter_mut().zip(x).zip(dy) {
                            *dx = scale * (d - constant - x * along);
                        }
                    }
                    Activation::Relu => {
                        for ((dx, &x), &d) in dx.iter_mut().zip(x).zip(dy) {
                            let d = if x * scale + shift > T::ZERO { d } else { T::ZERO };
                            *dx = scale * (d - constant - x * along);
                        }
                    }
                }
            }
        });
}
