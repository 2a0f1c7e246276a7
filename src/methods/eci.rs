//! Episode curriculum inversion (PURER sec. 3.2; methods.md 2.2, 2.3): the images go on being inverted while the
//! meta-model learns from them, and when it stops improving they are made harder for it.
//!
//! Per meta-update: some teachers take one step on their own images, and once the meta-model has had no better accuracy
//! for a while, one of these steps also climbs the outer loss of an episode, through the inner loop into the pixels.
//! Teachers weigh the same. Models that can only be asked keep the images recovered from them.

use std::ops::ControlFlow;
use std::time::Instant;

use rayon::prelude::*;

use super::invert::{FreePixels, InvertConfig};
use super::parts::{CrossEntropy, DynamicSet, OpenTeachers};
use super::recover::Opener;
use crate::error::{Error, ErrorKind, Result};
use crate::meta::{EpisodeSampler, Iteration, Limits, Sources, StopReason, Trainer};
use crate::tensor::{RngStream, TensorStore};

/// When and how images get harder.
#[derive(Debug, Clone, PartialEq)]
pub struct EciConfig {
    /// Seed of every draw.
    pub seed: u64,
    /// Teachers that take a step after each meta-update.
    pub candidates: usize,
    /// Size of these steps, in standardised pixels.
    pub rate: f64,
    /// Weight of the outer loss in a hardening step; 0 for none (inversion alone goes on).
    pub weight: f32,
    /// Meta-updates before the first hardening.
    pub warm_up: u64,
    /// Meta-updates without a better accuracy, after which images get harder.
    pub patience: u64,
    /// The objective of a teacher.
    pub invert: InvertConfig,
}

/// The meta-model's feedback: has it stopped improving (methods.md 2.3)?
#[derive(Debug, Clone, Copy, PartialEq)]
struct Feedback {
    best: Option<f64>,
    /// Updates since then.
    since: u64,
}

impl Feedback {
    /// Hears of update `step` with this accuracy; whether images should get harder now.
    fn tell(&mut self, config: &EciConfig, step: u64, accuracy: f64) -> bool {
        if step <= config.warm_up {
            return step == config.warm_up && config.warm_up > 0;
        }
        if self.best.is_none_or(|best| accuracy > best) {
            *self = Self { best: Some(accuracy), since: 0 };
            return false;
        }
        self.since += 1;
        let stalled = self.since >= config.patience.max(1);
        if stalled {
            *self = Self { best: None, since: 0 };
        }
        stalled
    }
}

/// One hardening.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hardening {
    /// Outer loss of its episode before the step: the difficulty.
    pub before: f64,
    /// And after.
    pub after: f64,
    /// Models whose images moved.
    pub models: usize,
}

/// What happened after one meta-update.
#[derive(Debug, Default)]
pub struct EciStep {
    /// Mean cross-entropy of the teachers on their own images.
    pub loss: f64,
    /// Where images were made harder.
    pub hardening: Option<Hardening>,
    /// Models that failed, with the reason: their images stay as they are from now on.
    pub failed: Vec<(usize, Error)>,
    /// Wall-clock time of the teachers' inversion steps.
    pub inversion_seconds: f64,
    /// Wall-clock time of the outer loss of the episode made harder and of its gradient to the pixels.
    pub hardening_seconds: f64,
}

/// The state between meta-updates.
pub struct Eci<'a> {
    config: EciConfig,
    set: DynamicSet<'a>,
    /// Models whose images move.
    moving: Vec<usize>,
    feedback: Feedback,
    teachers: OpenTeachers<'a>,
}

impl<'a> Eci<'a> {
    /// Starts from `set`; the images of the models `moving` move, whose teachers `open` opens.
    pub fn new(
        config: EciConfig,
        set: DynamicSet<'a>,
        moving: Vec<usize>,
        open: &'a Opener<'a>,
    ) -> Self {
        let feedback = Feedback { best: None, since: 0 };
        Self { config, set, moving, feedback, teachers: OpenTeachers::new(open) }
    }

    /// The images as they are.
    pub fn set(&self) -> &DynamicSet<'a> {
        &self.set
    }

    /// One step of one model's images; its mean cross-entropy.
    fn step(&self, step: u64, model: usize, pull: Option<&[f32]>) -> Result<f64> {
        let teacher = self.teachers.get(model)?;
        let mut pixels = FreePixels::clone(&*self.set.pixels(model)?);
        let loss = CrossEntropy::new(self.set.bank().models()[model].classes.clone());
        let mut rng = RngStream::new(self.config.seed, "eci", &teacher.spec().sha, step);
        let (rate, invert) = (self.config.rate, &self.config.invert);
        let found = pixels.step(teacher.as_ref(), &loss, invert, rate, pull, &mut rng)?;
        self.set.replace(model, pixels)?;
        Ok(found.loss)
    }

    /// What follows a meta-update: the images move, and get harder where the meta-model has stopped improving. A model
    /// that fails is told of and its images stay.
    ///
    /// # Errors
    /// When an interrupt asks to stop, the disk refuses, or the meta-model cannot be differentiated to its pixels.
    pub fn after(
        &mut self,
        trainer: &Trainer,
        sampler: &EpisodeSampler,
        iteration: &Iteration,
    ) -> Result<EciStep> {
        let config = &self.config;
        let (step, seed) = (iteration.step, config.seed);
        let stalled = self.feedback.tell(config, step, iteration.accuracy);
        let harder = stalled && config.weight > 0.0 && !self.moving.is_empty();
        let mut rng = RngStream::new(seed, "eci", "candidates", step);
        let count = config.candidates.min(self.moving.len());
        let mut work: Vec<(usize, Option<Vec<f32>>)> = (rng.sample(self.moving.len(), count))
            .into_iter()
            .map(|at| (self.moving[at], None))
            .collect();
        let mut episode = None;
        let mut happened = EciStep::default();
        let begin = Instant::now();
        if harder {
            let mut rng = RngStream::new(seed, "eci", "episode", step);
            let found = trainer.pixel_gradient(&self.set, sampler, &mut rng)?;
            let pulls = self.set.by_model(&found.episode, &found.gradient, -config.weight);
            for (model, pull) in pulls {
                if self.moving.contains(&model) {
                    work.retain(|(own, _)| *own != model);
                    work.push((model, Some(pull)));
                }
            }
            episode = Some(found);
            happened.hardening_seconds = begin.elapsed().as_secs_f64();
        }
        let this = &*self;
        let one = |(model, pull): &(usize, Option<Vec<f32>>)| {
            (*model, this.step(step, *model, pull.as_deref()))
        };
        let begin = Instant::now();
        let results: Vec<(usize, Result<f64>)> =
            rayon::scope(|_| work.par_iter().with_max_len(1).map(one).collect());
        happened.inversion_seconds = begin.elapsed().as_secs_f64();
        let (mut total, mut stepped) = (0.0, 0);
        for (model, result) in results {
            match result {
                Ok(loss) => (total, stepped) = (total + loss, stepped + 1),
                Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
                Err(error) => {
                    self.moving.retain(|own| *own != model);
                    happened.failed.push((model, error));
                }
            }
        }
        happened.loss = total / f64::from(stepped.max(1));
        if let Some(before) = episode {
            let begin = Instant::now();
            happened.hardening = Some(Hardening {
                before: before.loss,
                after: trainer.outer_loss(&self.set, &before)?,
                models: work.iter().filter(|(_, pull)| pull.is_some()).count(),
            });
            happened.hardening_seconds += begin.elapsed().as_secs_f64();
        }
        Ok(happened)
    }

    /// Trains to the end, the images moving along; `observe` is called after each meta-update and what followed it.
    /// Pseudo-validation sees the images as they were recovered.
    ///
    /// # Errors
    /// Those of [`Trainer::samplers`], [`Trainer::run_on`] and [`Eci::after`].
    pub fn train(
        &mut self,
        trainer: &mut Trainer,
        observe: &mut dyn FnMut(&Self, &Trainer, &Iteration, EciStep) -> ControlFlow<()>,
    ) -> Result<StopReason> {
        let one = Limits { steps: Some(1), time: None };
        let samplers = trainer.samplers(&self.set)?;
        loop {
            let mut last = None;
            let sources =
                Sources { train: &self.set, validation: self.set.bank(), samplers: &samplers };
            let reason = trainer.run_on(sources, one, &mut |_, iteration| {
                last = Some(*iteration);
                ControlFlow::Continue(())
            })?;
            let Some(iteration) = last else {
                if matches!(reason, StopReason::Done | StopReason::EarlyStop) {
                    trainer.take_best();
                }
                return Ok(reason);
            };
            let happened = self.after(trainer, samplers.train(), &iteration)?;
            if observe(self, trainer, &iteration, happened).is_break() {
                return Ok(StopReason::Interrupted);
            }
        }
    }

    /// Writes into a checkpoint what [`Eci::restore`] needs; the pixels go to their own files.
    ///
    /// # Errors
    /// When the disk cannot be written.
    pub fn write_to(&self, store: &mut TensorStore) -> Result<()> {
        self.set.write_to(store)?;
        let mut word = |name: &str, value: String| store.words.insert(name.into(), value);
        word("eci.since", self.feedback.since.to_string());
        if let Some(best) = self.feedback.best {
            word("eci.best", format!("{best:?}"));
        }
        let moving: Vec<String> = self.moving.iter().map(usize::to_string).collect();
        word("eci.moving", moving.join(" "));
        Ok(())
    }

    /// Goes on where a checkpoint was made.
    ///
    /// # Errors
    /// When the checkpoint is of another run.
    pub fn restore(&mut self, store: &TensorStore) -> Result<()> {
        self.set.restore(store)?;
        let best = store.words.contains_key("eci.best").then(|| store.number("eci.best"));
        self.feedback = Feedback { best: best.transpose()?, since: store.number("eci.since")? };
        let moving = store.word("eci.moving")?;
        self.moving = moving.split_whitespace().filter_map(|model| model.parse().ok()).collect();
        Ok(())
    }
}

#[cfg(test)]
#[path = "eci_tests.rs"]
mod tests;
