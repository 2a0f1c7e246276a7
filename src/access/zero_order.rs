//! Gradients of something that can only be asked: finite differences along random directions.
//!
//! For one image `x` of `d` values with loss `l` and directions `u_k` uniform on the unit sphere,
//! independent per image (BiDf-MKD sec. 3.1):
//!
//! ```text
//! forward:    g = 1/q sum_k d/mu      [l(x + mu u_k) - l(x)]          u_k
//! antithetic: g = 1/q sum_k d/(2 mu)  [l(x + mu u_k) - l(x - mu u_k)] u_k
//! ```
//!
//! For a linear loss the cosine to the true gradient concentrates at `sqrt(q / (q + d - 1))`. Directions
//! of many images are packed into one request; a direction's stream is keyed by (image, k) and partial
//! sums are added in a fixed order, so the result does not depend on the number of threads.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::tensor::{Images, RngStream};

/// Which difference approximates the slope along a direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Difference {
    /// `l(x + mu u) - l(x)`: one query a direction; what BiDf-MKD uses.
    Forward,
    /// `l(x + mu u) - l(x - mu u)`: two queries a direction; its error has no curvature term.
    Antithetic,
}

/// How a gradient is estimated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ZeroOrder {
    /// Directions per image (`q`; BiDf-MKD: 100).
    pub directions: usize,
    /// Length of a step along a direction (`mu`; BiDf-MKD: 0.005), in canonical pixel units.
    pub radius: f64,
    /// The difference taken.
    pub difference: Difference,
    /// Directions packed into one request, over all images.
    pub pack: usize,
}

impl ZeroOrder {
    /// Queries that the directions of `images` images cost, without the images themselves.
    pub fn queries(&self, images: usize) -> u64 {
        let per_direction = match self.difference {
            Difference::Forward => 1,
            Difference::Antithetic => 2,
        };
        images as u64 * self.directions as u64 * per_direction
    }
}

/// One value per image of a batch; the slice says which original image each belongs to.
pub type BatchLoss<'a> = dyn Fn(&Images, &[usize]) -> Result<Vec<f64>> + Sync + 'a;

/// Gradient of each image's own loss, same shape as `images`.
///
/// `values` are the losses of the images themselves (read by [`Difference::Forward`] only). `loss`
/// answers a batch of moved images; it is called from several threads, on at most `config.pack`
/// directions at a time, always with the same batches for the same input. One draw of `rng` keys all
/// directions.
///
/// # Errors
/// Those of `loss`; a configuration without directions or radius; a loss that is not finite.
pub fn estimate_gradient(
    images: &Images,
    values: &[f64],
    config: &ZeroOrder,
    rng: &mut RngStream,
    loss: &BatchLoss<'_>,
) -> Result<Images> {
    let (n, d, q) = (images.len(), images.stride(), config.directions);
    if q == 0 || config.pack == 0 || !(config.radius.is_finite() && config.radius > 0.0) {
        return Err(Error::usage(format!(
            "zero-order estimate needs directions, a pack size and a radius above 0, got `{config:?}`"
        )));
    }
    if values.len() != n {
        return Err(Error::internal(format!("{n} images with losses of `{}`", values.len())));
    }
    let key = rng.next_u64();
    let total = n * q;
    let packs: Vec<Vec<Partial>> = (0..total.div_ceil(config.pack))
        .into_par_iter()
        .map(|pack| {
            let items = pack * config.pack..((pack + 1) * config.pack).min(total);
            estimate_pack(images, values, config, key, items, loss)
        })
        .collect::<Result<_>>()?;
    let mut sums = vec![0.0f64; n * d];
    for partial in packs.into_iter().flatten() {
        let sum = &mut sums[partial.image * d..(partial.image + 1) * d];
        sum.iter_mut().zip(&partial.sum).for_each(|(sum, value)| *sum += value);
    }
    Images::new(sums.into_iter().map(|sum| sum as f32).collect(), images.shape())
}

/// The share of one image's gradient that the directions of one pack give.
struct Partial {
    image: usize,
    sum: Vec<f64>,
}

/// Asks for the directions `items` (numbered image by image) and weighs them.
fn estimate_pack(
    images: &Images,
    values: &[f64],
    config: &ZeroOrder,
    key: u64,
    items: std::ops::Range<usize>,
    loss: &BatchLoss<'_>,
) -> Result<Vec<Partial>> {
    let (d, q) = (images.stride(), config.directions);
    let signs: &[f64] = match config.difference {
        Difference::Forward => &[1.0],
        Difference::Antithetic => &[1.0, -1.0],
    };
    let directions: Vec<Vec<f32>> =
        items.clone().map(|item| unit_direction(key, item as u64, d)).collect();
    let mut moved = Vec::with_capacity(items.len() * signs.len() * d);
    let mut owners = Vec::with_capacity(items.len() * signs.len());
    for (item, direction) in items.clone().zip(&directions) {
        for sign in signs {
            let step = (sign * config.radius) as f32;
            moved.extend(images.image(item / q).iter().zip(direction).map(|(x, u)| x + step * u));
            owners.push(item / q);
        }
    }
    let [_, c, h, w] = images.shape();
    let answers = loss(&Images::new(moved, [owners.len(), c, h, w])?, &owners)?;
    if answers.len() != owners.len() {
        return Err(Error::internal(format!(
            "{} moved images with losses of `{}`",
            owners.len(),
            answers.len()
        )));
    }
    let mut partials: Vec<Partial> = Vec::new();
    for ((item, direction), answer) in items.zip(&directions).zip(answers.chunks_exact(signs.len()))
    {
        let image = item / q;
        let slope = match *answer {
            [plus, minus] => (plus - minus) / (2.0 * config.radius),
            _ => (answer[0] - values[image]) / config.radius,
        };
        if !slope.is_finite() {
            return Err(Error::input(format!(
                "the loss near image {image} is not finite `{slope}`"
            )));
        }
        let weight = slope * d as f64 / q as f64;
        if partials.last().is_none_or(|partial| partial.image != image) {
            partials.push(Partial { image, sum: vec![0.0; d] });
        }
        if let Some(partial) = partials.last_mut() {
            let terms = partial.sum.iter_mut().zip(direction);
            terms.for_each(|(sum, &u)| *sum += weight * f64::from(u));
        }
    }
    Ok(partials)
}

/// A direction uniform on the unit sphere of `d` dimensions (a normalised Gaussian).
fn unit_direction(key: u64, item: u64, d: usize) -> Vec<f32> {
    let mut direction = RngStream::new(key, "direction", "", item).normals(d);
    let norm = direction.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt();
    let scale = if norm > 0.0 { norm.recip() as f32 } else { 0.0 };
    direction.iter_mut().for_each(|value| *value *= scale);
    direction
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: ZeroOrder =
        ZeroOrder { directions: 100, radius: 0.005, difference: Difference::Forward, pack: 64 };

    fn stream(index: u64) -> RngStream {
        RngStream::new(11, "test", "zero-order", index)
    }

    fn random_images(n: usize) -> Images {
        let mut rng = stream(1_000_000);
        let shape = [n, 3, 8, 8];
        Images::new((0..n * 192).map(|_| rng.uniform()).collect(), shape).unwrap()
    }

    fn cosine(a: &[f32], b: &[f32]) -> f64 {
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    }

    /// Image `i` has the loss `sum_j a_ij sin(3 x_j)`, gradient `3 a_ij cos(3 x_j)`.
    struct Waves(Vec<Vec<f32>>);

    impl Waves {
        fn new(n: usize) -> Self {
            Self((0..n).map(|i| stream(2_000_000 + i as u64).normals(192)).collect())
        }

        fn values(&self, images: &Images, owners: &[usize]) -> Vec<f64> {
            let value = |(index, &owner): (usize, &usize)| {
                let terms = images.image(index).iter().zip(&self.0[owner]);
                terms.map(|(&x, &a)| f64::from(a) * (3.0 * f64::from(x)).sin()).sum()
            };
            owners.iter().enumerate().map(value).collect()
        }

        fn gradient(&self, images: &Images, index: usize) -> Vec<f32> {
            let terms = images.image(index).iter().zip(&self.0[index]);
            terms.map(|(x, a)| 3.0 * a * (3.0 * x).cos()).collect()
        }

        fn estimate(&self, images: &Images, config: &ZeroOrder, index: u64) -> Images {
            let owners: Vec<usize> = (0..images.len()).collect();
            let values = self.values(images, &owners);
            let loss = |moved: &Images, owners: &[usize]| Ok(self.values(moved, owners));
            estimate_gradient(images, &values, config, &mut stream(index), &loss).unwrap()
        }
    }

    /// `cos = sqrt(q / (q + d - 1))`: mean over 24 images within 3 standard errors or 2 %.
    #[test]
    fn the_cosine_to_the_true_gradient_follows_the_theory() {
        let (images, n) = (random_images(24), 24);
        let waves = Waves::new(n);
        for difference in [Difference::Forward, Difference::Antithetic] {
            for q in [10, 50, 200, 1000] {
                let config = ZeroOrder { directions: q, difference, ..CONFIG };
                let estimate = waves.estimate(&images, &config, q as u64);
                let cosines: Vec<f64> = (0..n)
                    .map(|i| cosine(estimate.image(i), &waves.gradient(&images, i)))
                    .collect();
                let mean = cosines.iter().sum::<f64>() / n as f64;
                let spread = cosines.iter().map(|c| (c - mean).powi(2)).sum::<f64>() / n as f64;
                let error = (spread / n as f64).sqrt();
                let theory = (q as f64 / (q as f64 + 191.0)).sqrt();
                let allowed = (3.0 * error).max(0.02 * theory);
                assert!((mean - theory).abs() < allowed, "{difference:?} q={q}: {mean} {theory}");
            }
        }
    }

    /// The estimate is unbiased: its component along the true gradient averages to the true length.
    #[test]
    fn the_length_along_the_true_gradient_is_right() {
        let images = random_images(24);
        let waves = Waves::new(24);
        let config = ZeroOrder { directions: 1000, ..CONFIG };
        let estimate = waves.estimate(&images, &config, 3);
        let ratios: Vec<f64> = (0..24)
            .map(|i| {
                let truth = waves.gradient(&images, i);
                let dot = |a: &[f32]| -> f64 {
                    a.iter().zip(&truth).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
                };
                dot(estimate.image(i)) / dot(&truth)
            })
            .collect();
        let mean = ratios.iter().sum::<f64>() / 24.0;
        // Standard deviation of one ratio is sqrt(2/q) = 0.045, of the mean 0.009.
        assert!((mean - 1.0).abs() < 0.03, "{mean}");
    }

    /// On `l = k/2 |x - c|^2` around its minimum a forward difference sees `k mu / 2` on every direction,
    /// an antithetic one sees 0.
    #[test]
    fn antithetic_differences_cancel_the_curvature() {
        let center = random_images(1);
        let loss = |moved: &Images, owners: &[usize]| {
            let value = |i: usize| {
                let terms = moved.image(i).iter().zip(center.data());
                terms.map(|(x, c)| 1e4 * f64::from(x - c).powi(2)).sum()
            };
            Ok((0..owners.len()).map(value).collect())
        };
        let norm = |difference| {
            let config = ZeroOrder { difference, ..CONFIG };
            let estimate =
                estimate_gradient(&center, &[0.0], &config, &mut stream(4), &loss).unwrap();
            estimate.data().iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
        };
        let (forward, antithetic) = (norm(Difference::Forward), norm(Difference::Antithetic));
        assert!(forward > 100.0, "{forward}");
        assert!(antithetic < forward * 1e-3, "{antithetic} {forward}");
    }

    #[test]
    fn the_pack_size_and_the_threads_change_no_more_than_the_last_bits() {
        let images = random_images(5);
        let waves = Waves::new(5);
        let base = waves.estimate(&images, &CONFIG, 7);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(pool.install(|| waves.estimate(&images, &CONFIG, 7)), base, "threads");
        for pack in [1, 33, 10_000] {
            let other = waves.estimate(&images, &ZeroOrder { pack, ..CONFIG }, 7);
            let far = other.data().iter().zip(base.data()).any(|(a, b)| (a - b).abs() > 1e-4);
            assert!(!far, "pack {pack}");
        }
        assert_ne!(waves.estimate(&images, &CONFIG, 8), base, "another stream");
    }

    #[test]
    fn directions_of_different_images_are_independent() {
        let one = random_images(1);
        let mut twice = one.clone();
        twice.extend(&one).unwrap();
        let loss = |moved: &Images, owners: &[usize]| -> Result<Vec<f64>> {
            let value = |i: usize| moved.image(i).iter().map(|&x| f64::from(x)).sum();
            Ok((0..owners.len()).map(value).collect())
        };
        let values = loss(&twice, &[0, 1]).unwrap();
        let estimate = estimate_gradient(&twice, &values, &CONFIG, &mut stream(5), &loss).unwrap();
        assert!(cosine(estimate.image(0), estimate.image(1)) < 0.6);
    }

    #[test]
    fn errors_of_the_teacher_and_losses_that_are_not_finite_come_through() {
        let images = random_images(2);
        let run = |config: &ZeroOrder, loss: &BatchLoss<'_>| {
            estimate_gradient(&images, &[0.0, 0.0], config, &mut stream(6), loss).unwrap_err()
        };
        let spent = run(&CONFIG, &|_, _| Err(Error::budget("0 left")));
        assert_eq!(spent.kind(), crate::ErrorKind::Budget);
        let nan = run(&CONFIG, &|_, owners| Ok(vec![f64::NAN; owners.len()]));
        assert!(nan.to_string().contains("not finite"), "{nan}");
        let none = run(&ZeroOrder { directions: 0, ..CONFIG }, &|_, _| Ok(vec![]));
        assert_eq!(none.kind(), crate::ErrorKind::Usage);
    }

    #[test]
    fn counts_its_queries() {
        assert_eq!(CONFIG.queries(3), 300);
        assert_eq!(ZeroOrder { difference: Difference::Antithetic, ..CONFIG }.queries(3), 600);
    }
}
