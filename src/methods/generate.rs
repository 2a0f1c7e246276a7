//! Recovery from a teacher that can only be asked: a generator trained on estimated gradients.
//!
//! BiDf-MKD sec. 3.1 and 3.3: weights and latents of a fresh generator follow the cross-entropy of the
//! wanted labels, its image gradient estimated from queries. The iterate with the lowest true loss is
//! kept (the published program compares a surrogate). A spent budget is a normal end.

use crate::access::{Guide, Objective, Teacher};
use crate::error::{ErrorKind, Result};
use crate::tensor::{Images, RngStream};

use super::invert::shared_weight;
use super::parts::{CrossEntropy, Generator, Student};
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
    /// Which iterate is kept.
    pub best: Best,
    /// Tangents of the generator handed to an estimator that is guided by them; 0 for others.
    pub tangents: usize,
}

/// What images of a model are made for, beside their labels.
#[derive(Clone, Copy)]
pub struct Against<'a> {
    /// The learner that they are to be hard for.
    pub student: &'a Student<'a>,
    /// Weight of that term.
    pub weight: f64,
}

/// What came of a generator's training.
#[derive(Debug)]
pub struct Generated {
    /// One image a label, of the iterate that was kept.
    pub images: Images,
    /// Whether the budget ended it.
    pub stop: RecoverStop,
    /// Loss at the last step; NaN where there was none.
    pub loss: f64,
}

/// Which iterate of a generator is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Best {
    /// The one of lowest loss.
    Loss,
    /// The one of lowest `mean <x, gradient>`, as BiDf-MKD's program does (a defect, methods.md 3.3).
    Surrogate,
}

/// Recovers one image per entry of `labels`, hard for a learner where there is one.
///
/// # Errors
/// Those of the teacher but a spent budget, which ends the loop; a budget that is spent before the first
/// step is an error.
pub fn generate(
    teacher: &dyn Teacher,
    labels: &[usize],
    image_size: [usize; 2],
    config: &GenerateConfig,
    against: Option<Against<'_>>,
    mut rng: RngStream,
    watch: &Watch<'_>,
) -> Result<Generated> {
    let mut generator =
        Generator::new(labels.len(), config.latent, config.features, image_size, &mut rng)?;
    let loss = CrossEntropy::new(labels.to_vec());
    let statistics_weight = shared_weight(config.statistics, teacher);
    let objective = Objective { logits: &loss, statistics_weight };
    let mut best: Option<(f64, Images)> = None;
    let mut prior: Option<Images> = None;
    let (mut stop, mut loss_now) = (RecoverStop::Done, f64::NAN);
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
            let found = match against {
                Some(Against { student, weight }) => {
                    let wanted = (&objective, weight);
                    student.image_gradient(teacher, images, wanted, &guide, &mut rng)?
                }
                None => teacher.guided_gradient(images, &objective, &guide, &mut rng)?,
            };
            let rank = match config.best {
                Best::Loss => found.logits_loss,
                Best::Surrogate => surrogate(images, &found.gradient),
            };
            seen = Some((found.logits_loss, found.statistics_loss, rank));
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
        let (value, statistics, rank) = seen.unwrap_or_default();
        if best.as_ref().is_none_or(|(lowest, _)| rank < *lowest) {
            best = Some((rank, images));
        }
        loss_now = value;
        watch.tell(&RecoverIteration { step: step + 1, loss: value, statistics, prior: 0.0 });
    }
    let images = match best {
        Some((_, images)) => images,
        None => generator.images()?,
    };
    Ok(Generated { images, stop, loss: loss_now })
}

/// `<x, gradient>` of the whole batch: the gradient is that of a mean already.
fn surrogate(images: &Images, gradient: &Images) -> f64 {
    images.data().iter().zip(gradient.data()).map(|(x, g)| f64::from(x * g)).sum()
}
