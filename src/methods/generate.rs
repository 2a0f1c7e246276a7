//! Recovery from a teacher that can only be asked: a generator trained on estimated gradients.
//!
//! BiDf-MKD sec. 3.1 and 3.3: weights and latents of a fresh generator follow the cross-entropy of the
//! wanted labels, its image gradient estimated from queries. The iterate with the lowest true loss is
//! kept (the published program compares a surrogate). A spent budget is a normal end.

use crate::access::{Guide, Objective, Teacher};
use crate::error::{ErrorKind, Result};
use crate::tensor::{Images, RngStream};

use super::invert::shared_weight;
use super::parts::{CrossEntropy, Generator};
use super::recover::{RecoverIteration, RecoverStop, Watch};

/// How the generator is trained.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateConfig {
    /// Steps; each costs `images * (1 + directions)` queries.
    pub steps: usize,
    /// Step size of Adam for weights and latents.
    pub learning_rate: f64,
    /// Values of a latent.
    pub latent: usize,
    /// Feature maps of the last layers (`f`; 64 in the paper).
    pub features: usize,
    /// Weight of the statistics term where gradients are exact, divided by the number of tapped layers.
    pub statistics: f32,
    /// Tangents of the generator handed to an estimator that is guided by them; 0 for others.
    pub tangents: usize,
}

/// Recovers one image per entry of `labels`; also tells whether the budget ended it.
///
/// # Errors
/// Those of the teacher but a spent budget, which ends the loop; a budget that is spent before the first
/// step is an error.
pub fn generate(
    teacher: &dyn Teacher,
    labels: &[usize],
    image_size: [usize; 2],
    config: &GenerateConfig,
    seed: u64,
    block: u64,
    watch: &Watch<'_>,
) -> Result<(Images, RecoverStop)> {
    let mut rng = RngStream::new(seed, "generate", &teacher.spec().sha, block);
    let mut generator =
        Generator::new(labels.len(), config.latent, config.features, image_size, &mut rng)?;
    let loss = CrossEntropy::new(labels.to_vec());
    let statistics_weight = shared_weight(config.statistics, teacher);
    let objective = Objective { logits: &loss, statistics_weight };
    let mut best: Option<(f64, Images)> = None;
    let mut prior: Option<Images> = None;
    let mut stop = RecoverStop::Done;
    for step in 0..config.steps {
        watch.check()?;
        let mut seen = None;
        let basis = match config.tangents {
            0 => None,
            count => Some(generator.tangents(count, &mut rng)?),
        };
        let last = prior.take();
        let guide = Guide { basis: basis.as_ref(), prior: last.as_ref() };
        let made = generator.step([config.learning_rate; 2], |images| {
            let found = teacher.guided_gradient(images, &objective, &guide, &mut rng)?;
            seen = Some((found.logits_loss, found.statistics_loss));
            prior = Some(found.gradient.clone());
            Ok(found.gradient)
        });
        let images = match made {
            Ok(made) => made.images,
            Err(error) if error.kind() == ErrorKind::Budget && best.is_some() => {
                stop = RecoverStop::BudgetSpent;
                break;
            }
            Err(error) => return Err(error),
        };
        let (value, statistics) = seen.unwrap_or_default();
        if best.as_ref().is_none_or(|(lowest, _)| value < *lowest) {
            best = Some((value, images));
        }
        watch.tell(&RecoverIteration { step: step + 1, loss: value, statistics, prior: 0.0 });
    }
    match best {
        Some((_, images)) => Ok((images, stop)),
        None => Ok((generator.images()?, stop)),
    }
}
