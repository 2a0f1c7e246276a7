//! Batch normalisation, ReLU and 2x2 max pooling in one pass, forward and backward.
//!
//! The block of Conv4 and ResNet-12 after each convolution. Fused, the normalised map and its
//! gradient are never written: only one value in four of them is needed. Work is split as in
//! [`super::batch_norm`].

use rayon::prelude::*;

use super::Element;
use super::batch_norm::{Normalisation, Planes};
use super::blocks::first_max;
use super::map::sum;

/// A batch `[images, channels, height, width]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Maps {
    /// Images.
    pub images: usize,
    /// Channels.
    pub channels: usize,
    /// Height and width.
    pub size: [usize; 2],
}

impl Maps {
    /// The same as planes of one length.
    pub fn planes(&self) -> Planes {
        let plane = self.size[0] * self.size[1];
        Planes { images: self.images, channels: self.channels, plane }
    }

    /// Height and width after pooling.
    pub fn pooled(&self) -> [usize; 2] {
        [self.size[0] / 2, self.size[1] / 2]
    }

    fn plane(&self) -> usize {
        self.size[0] * self.size[1]
    }

    fn pooled_plane(&self) -> usize {
        self.pooled()[0] * self.pooled()[1]
    }

    /// Offset in the plane of block `(row, column)`'s element `place`.
    fn offset(&self, row: usize, column: usize, place: u8) -> usize {
        let place = usize::from(place);
        (2 * row + place / 2) * self.size[1] + 2 * column + place % 2
    }
}

/// `y = max over 2x2 of max(x * scale + shift, 0)` and the place of the maximum in its block
/// (row-major, the first of equals).
pub fn affine_relu_pool<T: Element>(
    maps: &Maps,
    x: &[T],
    scale: &[T],
    shift: &[T],
    y: &mut [T],
    place: &mut [u8],
) {
    let ([_, width], [_, columns], channels) = (maps.size, maps.pooled(), maps.channels);
    if y.is_empty() {
        return;
    }
    y.par_chunks_mut(channels * maps.pooled_plane())
        .zip(place.par_chunks_mut(channels * maps.pooled_plane()))
        .zip(x.par_chunks(channels * maps.plane()))
        .for_each(|((y, place), x)| {
            let outputs = y
                .chunks_exact_mut(maps.pooled_plane())
                .zip(place.chunks_exact_mut(maps.pooled_plane()));
            let planes = outputs.zip(x.chunks_exact(maps.plane()));
            for (((y, place), x), (&a, &b)) in planes.zip(scale.iter().zip(shift)) {
                let rows = y.chunks_exact_mut(columns).zip(place.chunks_exact_mut(columns));
                for ((y, place), x) in rows.zip(x.chunks_exact(2 * width)) {
                    let (top, bottom) = x.split_at(width);
                    let cells = y.iter_mut().zip(place);
                    let blocks = top.chunks_exact(2).zip(bottom.chunks_exact(2));
                    for ((y, place), (t, u)) in cells.zip(blocks) {
                        let affine = [t[0], t[1], u[0], u[1]].map(|x| x * a + b);
                        let (value, at) = first_max(affine);
                        *y = if value <= T::ZERO { T::ZERO } else { value };
                        *place = at;
                    }
                }
            }
        });
}

/// Gradients to the input, the factor and the offset, given the gradient `dy` of the pooled output
/// `y` and the places of the maxima. `norm.activation` is not looked at: it is ReLU.
#[allow(clippy::too_many_arguments)]
pub fn norm_relu_pool_backward<T: Element>(
    maps: &Maps,
    norm: &Normalisation<'_, T>,
    x: &[T],
    y: &[T],
    place: &[u8],
    dy: &[T],
    dx: &mut [T],
    d_factor: &mut [T],
    d_offset: &mut [T],
) {
    let (plane, pooled, channels) = (maps.plane(), maps.pooled_plane(), maps.channels);
    let columns = maps.pooled()[1];
    if dx.is_empty() || pooled == 0 {
        dx.fill(T::ZERO);
        return;
    }
    let parts: Vec<(T, T)> = (0..maps.images * channels)
        .into_par_iter()
        .with_min_len(channels)
        .map(|at| {
            let (x, mean) = (&x[at * plane..][..plane], norm.mean[at % channels]);
            let own = at * pooled..(at + 1) * pooled;
            let (y, place, dy) = (&y[own.clone()], &place[own.clone()], &dy[own]);
            let (mut direct, mut along) = (T::ZERO, T::ZERO);
            for row in 0..pooled / columns {
                for column in 0..columns {
                    let cell = row * columns + column;
                    let d = if y[cell] > T::ZERO { dy[cell] } else { T::ZERO };
                    direct += d;
                    along += d * (x[maps.offset(row, column, place[cell])] - mean);
                }
            }
            (direct, along)
        })
        .collect();
    for channel in 0..channels {
        let of = |part: fn(&(T, T)) -> T| -> T {
            sum(&parts.iter().skip(channel).step_by(channels).map(part).collect::<Vec<T>>())
        };
        d_offset[channel] = of(|part| part.0);
        d_factor[channel] = of(|part| part.1) * norm.inverse_std[channel];
    }
    let count = T::of((maps.images * plane) as f64);
    let (d_factor, d_offset) = (&*d_factor, &*d_offset);
    dx.par_chunks_mut(channels * plane).enumerate().for_each(|(image, dx)| {
        for (c, dx) in dx.chunks_exact_mut(plane).enumerate() {
            let at = image * channels + c;
            let scale = norm.scale[c];
            let slope = -scale * (d_factor[c] / count * norm.inverse_std[c]);
            let constant = -scale * (d_offset[c] / count) - norm.mean[c] * slope;
            for (dx, &x) in dx.iter_mut().zip(&x[at * plane..][..plane]) {
                *dx = constant + x * slope;
            }
            let own = at * pooled..(at + 1) * pooled;
            let (y, place, dy) = (&y[own.clone()], &place[own.clone()], &dy[own]);
            for row in 0..pooled / columns {
                for column in 0..columns {
                    let cell = row * columns + column;
                    let d = if y[cell] > T::ZERO { dy[cell] } else { T::ZERO };
                    dx[maps.offset(row, column, place[cell])] += scale * d;
                }
            }
        }
    });
}
