//! Gradients of something that can only be asked: finite differences along chosen directions.
//!
//! For one image `x` of `d` values with loss `l` and directions `u_k` of length 1:
//!
//! ```text
//! forward:    s_k = [l(x + mu u_k) - l(x)] / mu            one query a direction (BiDf-MKD sec. 3.1)
//! antithetic: s_k = [l(x + mu u_k) - l(x - mu u_k)] / 2 mu two queries a direction, no curvature term
//! hard-label: s_k = [l(x + mu u_k) - mean_j l(x + mu u_j)] / mu   (HopSkipJumpAttack eq. 9 and 16)
//! g = sum_k w_k s_k u_k
//! ```
//!
//! Independent directions on the sphere have `w = d / q`: the estimate is unbiased, and for a linear loss its
//! cosine to the true gradient concentrates at `sqrt(q / (q + d - 1))`. Orthonormal directions make the sum a
//! projection: `sqrt(q / d)` over all pixels, and `sqrt(q / m)` of the part of the gradient that lies in a
//! subspace of `m` dimensions. A prior `p` (the estimate of a step ago) is one more orthonormal direction: with
//! `w = 1` for all the sum is the projection of the gradient onto everything asked, of which no mixture of the
//! answers is nearer to it (Cheng et al. 2019, "Improving black-box adversarial attacks with a transfer-based
//! prior", sec. 3; Meier et al. 2019, "Improving gradient estimation by incorporating surrogate gradients").
//!
//! Directions of several images are packed into one request. A direction's stream is keyed by (image, k) and each
//! image's sum has a fixed order, so the result does not depend on the number of threads.

mod directions;

use rayon::prelude::*;

use self::directions::Directions;
use super::teacher::Guide;
use crate::error::{Error, Result};
use crate::tensor::{Images, RngStream};

/// How a gradient is estimated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Estimator {
    /// Forward differences, independent directions: what BiDf-MKD uses.
    Forward,
    /// Differences of opposite points, independent directions.
    Antithetic,
    /// Forward differences, orthonormal directions.
    Orthogonal,
    /// Forward differences, orthonormal directions of low spatial frequency.
    LowFrequency,
    /// Forward differences along the guide's basis, made orthonormal; filled up with low frequencies.
    Guided,
    /// Forward differences along the last estimate and orthonormal directions.
    Prior,
    /// Forward differences along the last estimate and orthonormal directions of low spatial frequency.
    PriorLowFrequency,
    /// For labels only: long steps of low spatial frequency, each answer against the mean of all.
    HardLabel,
}

/// Where directions come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Space {
    Pixels,
    LowFrequencies,
}

impl Estimator {
    fn space(self) -> Space {
        match self {
            Self::LowFrequency | Self::PriorLowFrequency | Self::Guided | Self::HardLabel => {
                Space::LowFrequencies
            }
            _ => Space::Pixels,
        }
    }

    fn is_orthonormal(self) -> bool {
        !matches!(self, Self::Forward | Self::Antithetic | Self::HardLabel)
    }

    /// Whether the last estimate is one of the directions.
    pub fn uses_prior(self) -> bool {
        matches!(self, Self::Prior | Self::PriorLowFrequency)
    }

    /// Signs of the steps along one direction.
    fn signs(self) -> &'static [f64] {
        if self == Self::Antithetic { &[1.0, -1.0] } else { &[1.0] }
    }
}

/// How a gradient is estimated, in figures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ZeroOrder {
    /// The estimator.
    pub estimator: Estimator,
    /// Directions per image (`q`; BiDf-MKD: 100); at most as many as the directions' space has dimensions.
    pub directions: usize,
    /// Length of a step along a direction (`mu`; BiDf-MKD: 0.005), in canonical pixel units.
    pub radius: f64,
    /// Frequencies each way that count as low: the subspace has `3 frequencies^2` dimensions.
    pub frequencies: usize,
    /// Directions packed into one request, about; an image's directions stay together.
    pub pack: usize,
}

impl ZeroOrder {
    /// Directions asked per image of `[channels, height, width]`.
    fn count(&self, [c, h, w]: [usize; 3]) -> usize {
        let all = c * h * w;
        let low = c * self.frequencies.min(h) * self.frequencies.min(w);
        match (self.estimator.is_orthonormal(), self.estimator.space()) {
            (false, _) => self.directions,
            (true, Space::Pixels) => self.directions.min(all),
            (true, Space::LowFrequencies) => self.directions.min(low),
        }
    }

    /// Images asked at once, without the images themselves, for a batch of `shape`.
    pub fn requests(&self, shape: [usize; 4]) -> impl Iterator<Item = usize> + use<> {
        let [n, c, h, w] = shape;
        let per_image = self.count([c, h, w]) * self.estimator.signs().len();
        let group = self.group([c, h, w]);
        (0..n.div_ceil(group)).map(move |at| group.min(n - at * group) * per_image)
    }

    /// Queries that the directions of a batch of `shape` cost, without the images themselves.
    pub fn queries(&self, shape: [usize; 4]) -> u64 {
        self.requests(shape).sum::<usize>() as u64
    }

    /// Images whose directions share a request.
    fn group(&self, shape: [usize; 3]) -> usize {
        (self.pack / self.count(shape).max(1)).max(1)
    }

    fn check(&self) -> Result<()> {
        let usable = self.directions > 0 && self.pack > 0 && self.frequencies > 0;
        if usable && self.radius.is_finite() && self.radius > 0.0 {
            return Ok(());
        }
        Err(Error::usage(format!(
            "zero-order estimate needs directions, frequencies, a pack size and a radius above 0, got `{self:?}`"
        )))
    }
}

/// One value per image of a batch; the slice says which original image each belongs to.
pub type BatchLoss<'a> = dyn Fn(&Images, &[usize]) -> Result<Vec<f64>> + Sync + 'a;

/// Gradient of each image's own loss, same shape as `images`.
///
/// `values` are the losses of the images themselves (read where the difference is a forward one). `loss` answers a
/// batch of moved images; it is called from several threads, always with the same batches for the same input
/// ([`ZeroOrder::requests`]). One draw of `rng` keys all directions.
///
/// # Errors
/// Those of `loss`; a configuration without directions or radius; a guide of another shape; a loss that is not
/// finite.
pub fn estimate_gradient(
    images: &Images,
    values: &[f64],
    config: &ZeroOrder,
    guide: &Guide<'_>,
    rng: &mut RngStream,
    loss: &BatchLoss<'_>,
) -> Result<Images> {
    config.check()?;
    let [n, c, h, w] = images.shape();
    if values.len() != n {
        return Err(Error::internal(format!("{n} images with losses of `{}`", values.len())));
    }
    let directions = Directions::new(config, guide, images.shape(), rng.next_u64())?;
    let group = config.group([c, h, w]);
    let groups: Vec<Vec<f32>> = (0..n.div_ceil(group))
        .into_par_iter()
        .map(|at| {
            let members = at * group..((at + 1) * group).min(n);
            estimate_group(images, values, config, &directions, members, loss)
        })
        .collect::<Result<_>>()?;
    Images::new(groups.concat(), images.shape())
}

/// The gradients of the images `members`, asked in one request.
fn estimate_group(
    images: &Images,
    values: &[f64],
    config: &ZeroOrder,
    directions: &Directions<'_>,
    members: std::ops::Range<usize>,
    loss: &BatchLoss<'_>,
) -> Result<Vec<f32>> {
    let (signs, [_, c, h, w]) = (config.estimator.signs(), images.shape());
    let mut moved = Vec::new();
    let mut owners = Vec::new();
    let mut all = Vec::with_capacity(members.len());
    for image in members.clone() {
        let own = directions.of(image);
        for direction in &own {
            for sign in signs {
                let step = (sign * config.radius) as f32;
                moved.extend(images.image(image).iter().zip(direction).map(|(x, u)| x + step * u));
                owners.push(image);
            }
        }
        all.push(own);
    }
    let answers = loss(&Images::new(moved, [owners.len(), c, h, w])?, &owners)?;
    if answers.len() != owners.len() {
        return Err(Error::internal(format!(
            "{} moved images with losses of `{}`",
            owners.len(),
            answers.len()
        )));
    }
    let mut gradients = Vec::with_capacity(members.len() * images.stride());
    let per_image = config.count([c, h, w]) * signs.len();
    for ((image, own), answers) in members.zip(&all).zip(answers.chunks_exact(per_image)) {
        let slopes = slopes(config, answers, values[image]);
        if let Some(slope) = slopes.iter().find(|slope| !slope.is_finite()) {
            return Err(Error::input(format!(
                "the loss near image {image} is not finite `{slope}`"
            )));
        }
        let mut sum = vec![0.0f64; images.stride()];
        let weight = directions.weight(own.len());
        for (direction, slope) in own.iter().zip(slopes) {
            let step = weight * slope;
            sum.iter_mut().zip(direction).for_each(|(sum, &u)| *sum += step * f64::from(u));
        }
        gradients.extend(sum.into_iter().map(|value| value as f32));
    }
    Ok(gradients)
}

/// Slope along each direction from its answers; `value` is the loss of the image itself.
fn slopes(config: &ZeroOrder, answers: &[f64], value: f64) -> Vec<f64> {
    let radius = config.radius;
    match config.estimator {
        Estimator::Antithetic => {
            answers.chunks_exact(2).map(|pair| (pair[0] - pair[1]) / (2.0 * radius)).collect()
        }
        Estimator::HardLabel => {
            let mean = answers.iter().sum::<f64>() / answers.len().max(1) as f64;
            answers.iter().map(|answer| (answer - mean) / radius).collect()
        }
        _ => answers.iter().map(|answer| (answer - value) / radius).collect(),
    }
}

#[cfg(test)]
mod tests;
