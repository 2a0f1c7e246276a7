//! Early stop on pseudo-validation: some classes of the source are never trained on; the accuracy on episodes of them
//! tells when training has stopped getting better, and which weights were best.
//!
//! The episodes are fixed by the seed, augmented as those of training (recovered images of one model share a colour
//! style, which would give the answer away), and answered as new tasks are: test steps, statistics of training.
//! No real image is read. All of it is part of a checkpoint, so a resumed run stops where an uninterrupted one does.

use rayon::prelude::*;

use super::augment::Draw;
use super::backbone::BnMode;
use super::episodes::{ClassSource, EpisodeSampler};
use super::learner::MetaModel;
use super::train::{TrainConfig, Trainer, read_pixels};
use crate::error::{Error, Result};
use crate::tensor::{RngStream, TensorStore};

/// Episodes of one check.
const EPISODES: u64 = 100;

/// When training stops early.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EarlyStop {
    /// Share of the usable classes that are held out, between 0 and 1.
    pub share: f64,
    /// Steps between checks.
    pub every: u64,
    /// Checks in a row without a new best, after which training stops.
    pub patience: u64,
}

/// What the checks have found so far.
#[derive(Debug, Clone, Default)]
pub(super) struct Checks {
    best: Option<Best>,
    /// Checks since then.
    since: u64,
}

/// The best model so far.
#[derive(Debug, Clone)]
struct Best {
    accuracy: f64,
    step: u64,
    model: MetaModel,
}

impl Checks {
    /// Hears of a check after `step`.
    pub(super) fn tell(&mut self, step: u64, accuracy: f64, model: &MetaModel) {
        if self.best.as_ref().is_none_or(|best| accuracy > best.accuracy) {
            *self = Self { best: Some(Best { accuracy, step, model: model.clone() }), since: 0 };
        } else {
            self.since += 1;
        }
    }

    /// Whether training should end.
    pub(super) fn stalled(&self, config: &TrainConfig) -> bool {
        config.early_stop.is_some_and(|own| self.since >= own.patience.max(1))
    }

    /// Accuracy (0 to 1) and step of the best check.
    pub(super) fn best(&self) -> Option<(f64, u64)> {
        self.best.as_ref().map(|best| (best.accuracy, best.step))
    }

    /// Its model.
    pub(super) fn best_model(&self) -> Option<&MetaModel> {
        self.best.as_ref().map(|best| &best.model)
    }

    /// Into a checkpoint: the best model's tensors as `best.NAME`.
    pub(super) fn write_to(&self, store: &mut TensorStore) -> Result<()> {
        let Some(best) = &self.best else { return Ok(()) };
        let mut own = TensorStore::default();
        best.model.write_to(&mut own)?;
        let tensors = own.tensors.into_iter();
        store.tensors.extend(tensors.map(|(name, tensor)| (format!("best.{name}"), tensor)));
        let mut word = |name: &str, value: String| store.words.insert(name.into(), value);
        word("early_stop.accuracy", format!("{:?}", best.accuracy));
        word("early_stop.step", best.step.to_string());
        word("early_stop.since", self.since.to_string());
        Ok(())
    }

    /// Out of the checkpoint of a training with this configuration.
    pub(super) fn read_from(store: &TensorStore) -> Result<Self> {
        if !store.words.contains_key("early_stop.step") {
            return Ok(Self::default());
        }
        // Rule and structure are those of the model in training.
        let mut own = store.clone();
        for (name, tensor) in &store.tensors {
            if let Some(name) = name.strip_prefix("best.") {
                own.tensors.insert(name.into(), tensor.clone());
            }
        }
        let best = Best {
            accuracy: store.number("early_stop.accuracy")?,
            step: store.number("early_stop.step")?,
            model: MetaModel::read_from(&own)?,
        };
        Ok(Self { best: Some(best), since: store.number("early_stop.since")? })
    }
}

/// Draws the episodes of a training, those of its checks from classes of their own.
#[derive(Debug, Clone)]
pub struct Samplers {
    train: EpisodeSampler,
    validation: Option<EpisodeSampler>,
}

impl Samplers {
    /// The samplers for `source`. Classes that mean the same are held out together.
    pub(super) fn new(c: &TrainConfig, source: &dyn ClassSource) -> Result<Self> {
        let size = [c.way, c.shot, c.query];
        let sampler = |own: &[usize]| EpisodeSampler::among(source, own, size, c.cross_model_share);
        let all: Vec<usize> = (0..source.n_classes()).collect();
        let Some(early) = c.early_stop else {
            return Ok(Self { train: sampler(&all)?, validation: None });
        };
        let usable = sampler(&all)?.meanings(source);
        let held = (early.share * usable.len() as f64).round() as usize;
        if held < c.way || usable.len() < held + c.way {
            return Err(Error::input(format!(
                "pseudo-validation would hold out {held} of {} classes; it and training each need {} (the ways), got `{}` and {}",
                usable.len(),
                c.way,
                held,
                usable.len() - held.min(usable.len())
            ))
            .hint("change `meta.early_stop.share`, lower `meta.way`, or set `meta.early_stop: null`"));
        }
        let mut rng = RngStream::new(c.seed, "pseudo-validation", "classes", 0);
        let held: Vec<usize> =
            rng.sample(usable.len(), held).into_iter().map(|at| usable[at]).collect();
        let (validation, train): (Vec<usize>, Vec<usize>) =
            all.iter().partition(|&&class| held.contains(&source.meaning(class)));
        Ok(Self { train: sampler(&train)?, validation: Some(sampler(&validation)?) })
    }

    /// The sampler of training.
    pub fn train(&self) -> &EpisodeSampler {
        &self.train
    }
}

impl Trainer {
    /// The accuracy of the model as it stands on the pseudo-validation episodes, 0 to 1, where it is time for a check.
    pub(super) fn check(
        &self,
        source: &dyn ClassSource,
        samplers: &Samplers,
    ) -> Result<Option<f64>> {
        let c = self.config();
        let (Some(early), Some(sampler)) = (c.early_stop, &samplers.validation) else {
            return Ok(None);
        };
        if !self.step().is_multiple_of(early.every.max(1)) && self.step() != c.steps {
            return Ok(None);
        }
        let one = |index: u64| self.accuracy_on(source, sampler, index);
        let accuracies: Vec<f64> =
            rayon::scope(|_| (0..EPISODES).into_par_iter().map(one).collect::<Result<_>>())?;
        Ok(Some(accuracies.iter().sum::<f64>() / EPISODES as f64))
    }

    fn accuracy_on(
        &self,
        source: &dyn ClassSource,
        sampler: &EpisodeSampler,
        index: u64,
    ) -> Result<f64> {
        let c = self.config();
        let mut rng = RngStream::new(c.seed, "pseudo-validation", "episode", index);
        let episode = sampler.draw(&mut rng);
        let draws: Vec<Draw> =
            episode.images.iter().map(|_| c.augmentation.draw(&mut rng)).collect();
        let images = read_pixels(source, &episode, &draws)?;
        let support = images.range(0, episode.support_labels.len());
        let query = images.range(episode.support_labels.len(), images.len());
        let labels = &episode.support_labels;
        let answer = self.model().classify(&support, labels, &query, c.way, BnMode::Running)?;
        let pairs = answer.predictions.iter().zip(&episode.query_labels);
        Ok(pairs.filter(|(own, wanted)| own == wanted).count() as f64 / query.len().max(1) as f64)
    }
}
