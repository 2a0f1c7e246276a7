//! The directions along which one image is moved.

use super::{Space, ZeroOrder};
use crate::access::teacher::Guide;
use crate::error::{Error, Result};
use crate::tensor::{Images, RngStream};

/// Share of a vector's length that must be left once what is spanned already is taken off; less is rounding.
const INDEPENDENT: f64 = 1e-3;

/// The directions of every image of a batch; made anew at each call, since all of them would not fit in memory.
pub(super) struct Directions<'a> {
    config: ZeroOrder,
    guide: Guide<'a>,
    shape: [usize; 3],
    key: u64,
    count: usize,
    images: usize,
    /// Low-frequency cosines along columns and rows, `[frequency, position]`.
    cosines: [Vec<f32>; 2],
}

impl<'a> Directions<'a> {
    /// For images of `shape`; `key` keys the random ones.
    ///
    /// # Errors
    /// When the guide does not fit the images.
    pub(super) fn new(
        config: &ZeroOrder,
        guide: &Guide<'a>,
        shape: [usize; 4],
        key: u64,
    ) -> Result<Self> {
        let [n, c, h, w] = shape;
        let misfit = |what: &str, images: &Images| {
            Error::internal(format!("{what} of {:?} for images of `{shape:?}`", images.shape()))
        };
        if let Some(prior) = guide.prior.filter(|prior| prior.shape() != shape) {
            return Err(misfit("a prior", prior));
        }
        let fits = |basis: &Images| {
            let own = basis.shape();
            own[1..] == shape[1..] && own[0].is_multiple_of(n.max(1))
        };
        if let Some(basis) = guide.basis.filter(|basis| !fits(basis)) {
            return Err(misfit("a basis", basis));
        }
        let cosines = match config.estimator.space() {
            Space::Pixels => [Vec::new(), Vec::new()],
            Space::LowFrequencies => {
                [cosines(config.frequencies, h), cosines(config.frequencies, w)]
            }
        };
        let count = config.count([c, h, w]);
        Ok(Self {
            config: *config,
            guide: *guide,
            shape: [c, h, w],
            key,
            count,
            images: n,
            cosines,
        })
    }

    /// Unit vectors, the promising ones first.
    pub(super) fn of(&self, image: usize) -> Vec<Vec<f32>> {
        let item = |k: usize| (image * self.count + k) as u64;
        if !self.config.estimator.is_orthonormal() {
            return (0..self.count).map(|k| unit(self.random(item(k), 0))).collect();
        }
        let mut found: Vec<Vec<f32>> = Vec::with_capacity(self.count);
        for direction in self.promising(image) {
            if found.len() < self.count {
                found.extend(orthonormal(direction, &found));
            }
        }
        for draw in 0.. {
            if found.len() == self.count {
                break;
            }
            let direction = self.random(item(found.len()), draw);
            found.extend(orthonormal(direction, &found));
            // A prior within the subspace leaves it one dimension short: after many vain draws nothing is left.
            if draw > 8 * self.count as u64 {
                found.resize(self.count, vec![0.0; self.shape.iter().product()]);
            }
        }
        found
    }

    /// What each slope counts in the sum over `count` directions.
    pub(super) fn weight(&self, count: usize) -> f64 {
        let estimator = self.config.estimator;
        let promised = estimator.uses_prior() && self.guide.prior.is_some();
        if promised || (estimator == super::Estimator::Guided && self.guide.basis.is_some()) {
            return 1.0;
        }
        let [c, h, w] = self.shape;
        let dimensions = match estimator.space() {
            Space::Pixels => c * h * w,
            Space::LowFrequencies => {
                c * self.config.frequencies.min(h) * self.config.frequencies.min(w)
            }
        };
        dimensions as f64 / count.max(1) as f64
    }

    /// What the guide names for this image.
    fn promising(&self, image: usize) -> Vec<Vec<f32>> {
        if self.config.estimator.uses_prior() {
            return self.guide.prior.iter().map(|prior| prior.image(image).to_vec()).collect();
        }
        let Some(basis) = self.guide.basis else { return Vec::new() };
        if self.config.estimator != super::Estimator::Guided {
            return Vec::new();
        }
        let per_image = basis.len() / self.images.max(1);
        (0..per_image).map(|k| basis.image(image * per_image + k).to_vec()).collect()
    }

    fn random(&self, item: u64, draw: u64) -> Vec<f32> {
        let [c, h, w] = self.shape;
        let mut rng = match draw {
            0 => RngStream::new(self.key, "direction", "", item),
            _ => RngStream::new(self.key, "direction", "again", draw),
        };
        match self.config.estimator.space() {
            Space::Pixels => rng.normals(c * h * w),
            Space::LowFrequencies => {
                let (rows, columns) =
                    (self.config.frequencies.min(h), self.config.frequencies.min(w));
                let [vertical, horizontal] = &self.cosines;
                let mut pixels = vec![0.0f32; c * h * w];
                for plane in pixels.chunks_exact_mut(h * w) {
                    let amplitudes = rng.normals(rows * columns);
                    smooth(&amplitudes, vertical, horizontal, [h, w], plane);
                }
                pixels
            }
        }
    }
}

/// The `frequencies` lowest vectors of the orthonormal DCT-II of `size` points, one after the other.
fn cosines(frequencies: usize, size: usize) -> Vec<f32> {
    let mut all = Vec::with_capacity(frequencies.min(size) * size);
    for frequency in 0..frequencies.min(size) {
        let scale = if frequency == 0 { 1.0 } else { 2.0 } / size as f64;
        for position in 0..size {
            let angle = std::f64::consts::PI * (2 * position + 1) as f64 * frequency as f64;
            all.push((scale.sqrt() * (angle / (2 * size) as f64).cos()) as f32);
        }
    }
    all
}

/// `plane[y, x] = sum_uv amplitudes[u, v] vertical[u, y] horizontal[v, x]`.
fn smooth(
    amplitudes: &[f32],
    vertical: &[f32],
    horizontal: &[f32],
    [h, w]: [usize; 2],
    plane: &mut [f32],
) {
    let columns = horizontal.len() / w;
    for (row, waves) in amplitudes.chunks_exact(columns).zip(vertical.chunks_exact(h)) {
        let mut line = vec![0.0f32; w];
        for (amplitude, wave) in row.iter().zip(horizontal.chunks_exact(w)) {
            line.iter_mut().zip(wave).for_each(|(out, value)| *out += amplitude * value);
        }
        for (out, wave) in plane.chunks_exact_mut(w).zip(waves) {
            out.iter_mut().zip(&line).for_each(|(out, value)| *out += wave * value);
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// `direction` with length 1; zeros stay zeros.
fn unit(mut direction: Vec<f32>) -> Vec<f32> {
    let norm = dot(&direction, &direction).sqrt();
    let scale = if norm > 0.0 { norm.recip() as f32 } else { 0.0 };
    direction.iter_mut().for_each(|value| *value *= scale);
    direction
}

/// The part of `direction` at right angles to `others`, with length 1; `None` when hardly any is left.
fn orthonormal(direction: Vec<f32>, others: &[Vec<f32>]) -> Option<Vec<f32>> {
    let mut direction = unit(direction);
    // Twice is enough: the second pass takes off what rounding left of the first (Kahan).
    for _ in 0..2 {
        for other in others {
            let share = dot(&direction, other) as f32;
            direction.iter_mut().zip(other).for_each(|(value, o)| *value -= share * o);
        }
        if dot(&direction, &direction).sqrt() < INDEPENDENT {
            return None;
        }
        direction = unit(direction);
    }
    Some(direction)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_frequency_waves_are_orthonormal() {
        let waves = cosines(6, 10);
        for (i, a) in waves.chunks(10).enumerate() {
            for (j, b) in waves.chunks(10).enumerate() {
                let expected = if i == j { 1.0 } else { 0.0 };
                assert!((dot(a, b) - expected).abs() < 1e-6, "{i} {j}");
            }
        }
    }
}
