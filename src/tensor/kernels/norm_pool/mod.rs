//! Batch normalisation, ReLU and 2x2 max pooling in one pass: forward, backward, and the derivative of backward.
//!
//! The block of Conv4 and ResNet-12 after each convolution. Fused, neither the normalised map nor its gradient is
//! ever written: only one value in four of them is needed. Where the maxima lie is found again from the input in every
//! pass instead of being kept. With u = (x - mean) / std, G the gradient of the pooled output at the places of the open
//! maxima and m values a channel, the gradient to the input is
//! `dx = factor / std (G - sum(G) / m - u sum(G u) / m)` (Ioffe and Szegedy 2015, section 3); that is again a sum over
//! selected places and over all, so its own gradient takes the same two passes: sums a channel, then one map.
//!
//! Work is split by planes in parts of a fixed size, sums are taken per plane and then added over images in order, so
//! results do not depend on the number of threads.

mod plain;
#[cfg(target_arch = "x86_64")]
mod vectors;

use rayon::prelude::*;

use super::Element;
use super::batch_norm::Planes;

/// Values of a task.
const TASK: usize = 1 << 14;

/// A batch `[images, channels, height, width]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Maps {
    /// Images.
    pub images: usize,
    /// Channels.
    pub channels: usize,
    /// Height and width, each at least 2.
    pub size: [usize; 2],
}

impl Maps {
    /// The same as planes of one length.
    pub fn planes(&self) -> Planes {
        Planes { images: self.images, channels: self.channels, plane: self.plane() }
    }

    /// Height and width after pooling; odd edges are left out.
    pub fn pooled(&self) -> [usize; 2] {
        [self.size[0] / 2, self.size[1] / 2]
    }

    fn plane(&self) -> usize {
        self.size[0] * self.size[1]
    }

    fn pooled_plane(&self) -> usize {
        self.pooled()[0] * self.pooled()[1]
    }

    /// Planes of a task.
    fn part(&self) -> usize {
        (TASK / self.plane()).max(1)
    }

    fn assert_fits<T>(&self, large: &[T], small: &[T]) {
        let planes = self.images * self.channels;
        assert!(self.size[0] >= 2 && self.size[1] >= 2, "pooling of {:?}", self.size);
        assert_eq!(large.len(), planes * self.plane(), "size of a map");
        assert_eq!(small.len(), planes * self.pooled_plane(), "size of a pooled map");
    }

    /// `[K]` sums of each channel, of which `of` gives a plane's.
    fn sum<T: Element, const K: usize>(
        &self,
        of: impl Fn(usize) -> [T; K] + Sync + Send,
    ) -> Vec<[f64; K]> {
        let planes = self.images * self.channels;
        let parts: Vec<[T; K]> =
            (0..planes).into_par_iter().with_min_len(self.part()).map(of).collect();
        let mut sums = vec![[0.0; K]; self.channels];
        for image in parts.chunks_exact(self.channels) {
            for (sums, part) in sums.iter_mut().zip(image) {
                for (sum, part) in sums.iter_mut().zip(part) {
                    *sum += part.f64();
                }
            }
        }
        sums
    }
}

/// One channel's normalisation, as the forward pass had it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Channel<T> {
    /// Mean of the batch.
    pub mean: T,
    /// 1 / sqrt(variance + epsilon).
    pub inverse_std: T,
    /// Learned factor times `inverse_std`.
    pub scale: T,
    /// Learned offset minus `mean * scale`.
    pub shift: T,
}

/// One plane of the input with its channel.
#[derive(Clone, Copy)]
struct Plane<'a, T> {
    channel: Channel<T>,
    width: usize,
    x: &'a [T],
}

/// The batch and its normalisation: what every pass takes.
#[derive(Debug, Clone, Copy)]
pub struct Block<'a, T> {
    /// Sizes.
    pub maps: Maps,
    /// One a channel.
    pub channels: &'a [Channel<T>],
    /// The input, before the normalisation.
    pub x: &'a [T],
}

/// `sum(G)` and `sum(G u)` of a channel: the gradients to its offset and to its factor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FirstSums {
    /// `sum(G)`.
    pub direct: f64,
    /// `sum(G u)`.
    pub along: f64,
}

/// Cotangents of a channel's [`FirstSums`].
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct FirstCotangents {
    /// Of `sum(G)`.
    pub direct: f64,
    /// Of `sum(G u)`.
    pub along: f64,
}

/// What one plane of [`Block::second`] is made of.
#[derive(Clone, Copy)]
struct Second<T> {
    /// `dx = c[0] + c[1] x + c[2] h + c[3] G`.
    dense: [T; 4],
    /// `dg = c[0] + c[1] x + c[2] h` at the open maxima.
    picked: [T; 3],
}

impl<'a, T: Element> Block<'a, T> {
    fn plane(&self, index: usize) -> Plane<'a, T> {
        let plane = self.maps.plane();
        Plane {
            channel: self.channels[index % self.maps.channels],
            width: self.maps.size[1],
            x: &self.x[index * plane..][..plane],
        }
    }

    /// Values a channel.
    fn count(&self) -> f64 {
        (self.maps.images * self.maps.plane()) as f64
    }

    /// `y = max over 2x2 of max(x * scale + shift, 0)`; NaN where the channel's scale or shift is NaN, which a NaN
    /// in `x` makes them.
    ///
    /// # Panics
    /// When a slice does not have the size the maps say (a defect of the caller), here and below.
    pub fn forward(&self, y: &mut [T]) {
        let (maps, pooled) = (self.maps, self.maps.pooled_plane());
        maps.assert_fits(self.x, y);
        y.par_chunks_mut(maps.part() * pooled).enumerate().for_each(|(part, y)| {
            for (at, y) in y.chunks_exact_mut(pooled).enumerate() {
                let plane = self.plane(part * maps.part() + at);
                // A number differs from itself only when it is NaN.
                #[allow(clippy::eq_op)]
                if plane.channel.scale != plane.channel.scale
                    || plane.channel.shift != plane.channel.shift
                {
                    y.fill(T::of(f64::NAN));
                } else {
                    plane.forward(y);
                }
            }
        });
    }

    /// The sums that [`Block::backward`] needs, a channel each; `g` is the gradient of the pooled output.
    pub fn first_sums(&self, g: &[T]) -> Vec<FirstSums> {
        let pooled = self.maps.pooled_plane();
        self.maps.assert_fits(self.x, g);
        let sums = self.maps.sum(|at| self.plane(at).first_sums(&g[at * pooled..][..pooled]));
        let named = |(&[direct, along], channel): (&[f64; 2], &Channel<T>)| FirstSums {
            direct,
            along: along * channel.inverse_std.f64(),
        };
        sums.iter().zip(self.channels).map(named).collect()
    }

    /// The gradient to the input.
    pub fn backward(&self, g: &[T], sums: &[FirstSums], dx: &mut [T]) {
        let (maps, size, pooled) = (self.maps, self.maps.plane(), self.maps.pooled_plane());
        maps.assert_fits(dx, g);
        let count = self.count();
        dx.par_chunks_mut(maps.part() * size).enumerate().for_each(|(part, dx)| {
            for (at, dx) in dx.chunks_exact_mut(size).enumerate() {
                let index = part * maps.part() + at;
                let (plane, sums) = (self.plane(index), sums[index % maps.channels]);
                let Channel { mean, inverse_std, scale, .. } = plane.channel;
                let slope = -scale.f64() * inverse_std.f64() * sums.along / count;
                let offset = -scale.f64() * sums.direct / count - mean.f64() * slope;
                plane.backward(T::of(offset), T::of(slope), &g[index * pooled..][..pooled], dx);
            }
        });
    }

    /// The gradient of [`Block::backward`] and [`Block::first_sums`] together: `h` is the cotangent of the gradient to
    /// the input, `cotangents` those of the sums. Writes the gradient to `x` and to `g`; returns that to each
    /// channel's factor.
    pub fn second(
        &self,
        g: &[T],
        h: &[T],
        sums: &[FirstSums],
        cotangents: &[FirstCotangents],
        dx: &mut [T],
        dg: &mut [T],
    ) -> Vec<f64> {
        let (maps, size, pooled) = (self.maps, self.maps.plane(), self.maps.pooled_plane());
        maps.assert_fits(h, g);
        maps.assert_fits(dx, dg);
        let m = self.count();
        let totals = maps.sum(|at| {
            self.plane(at).second_sums(&g[at * pooled..][..pooled], &h[at * size..][..size])
        });
        // L = scale (Q - A H / m - D E / m) + a D + b A with A = sum(G), D = sum(G u), H = sum(h), E = sum(h u),
        // Q = sum(G h); u and the scale depend on x.
        let mut d_factor = Vec::with_capacity(maps.channels);
        let mut second = Vec::with_capacity(maps.channels);
        for (c, &[total, tilted, product]) in totals.iter().enumerate() {
            let [mean, s, scale] =
                [self.channels[c].mean, self.channels[c].inverse_std, self.channels[c].scale]
                    .map(T::f64);
            let (direct, d) = (sums[c].direct, sums[c].along);
            let (b, a) = (cotangents[c].direct, cotangents[c].along);
            let e = tilted * s;
            let t = product - direct * total / m - d * e / m;
            d_factor.push(s * t);
            // dL / du = v = sum_g G + sum_h h, as a direct dependence.
            let (of_g, of_h) = (a - scale * e / m, -scale * d / m);
            let v = of_g * direct + of_h * total;
            let v_along = of_g * d + of_h * e;
            let slope = -s * (s * v_along / m + s * scale * t / m);
            let picked = s * of_g;
            second.push(Second {
                dense: [-s * v / m - mean * slope, slope, s * of_h, picked].map(T::of),
                picked: [b - scale * total / m - mean * picked, picked, scale].map(T::of),
            });
        }
        let part = maps.part();
        let tasks = dx.par_chunks_mut(part * size).zip(dg.par_chunks_mut(part * pooled));
        tasks.enumerate().for_each(|(task, (dx, dg))| {
            let planes = dx.chunks_exact_mut(size).zip(dg.chunks_exact_mut(pooled));
            for (at, (dx, dg)) in planes.enumerate() {
                let index = task * part + at;
                let (g, h) = (&g[index * pooled..][..pooled], &h[index * size..][..size]);
                self.plane(index).second(&second[index % maps.channels], g, h, dx, dg);
            }
        });
        d_factor
    }
}

#[cfg(test)]
mod tests;
