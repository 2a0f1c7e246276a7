//! Meta-training on pseudo episodes, as a loop that can be watched, stopped and resumed.
//!
//! Everything a step does follows from (seed, step), the parameters and the images: a resumed run
//! ends with the same bytes as one that was never stopped, for any number of threads.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::augment::{Augmentation, Draw};
use super::backbone::{Backbone, BnMode, Parameter};
use super::drawn::Beside;
use super::early_stop::{Checks, EarlyStop, Samplers};
use super::episodes::{ClassSource, Episode};
use super::learner::{Answer, InnerOrder, Learner, MetaModel};
use super::protonet::first_largest;
use super::task::Task;
use crate::error::{Error, Result, ResultExt};
use crate::tensor::tape::{Order, Var};
use crate::tensor::{Adam, AdamOptions, Images, TensorStore};

mod lessons;

pub use lessons::{Lesson, Mix, MixSpace, TaskGradient, mean_gradient};

/// How the learning rate moves over the steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schedule {
    /// It stays.
    Constant,
    /// Half a cosine from the full rate down to 0 after the last step.
    Cosine,
}

/// What to train with.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainConfig {
    /// Seed of every draw.
    pub seed: u64,
    /// Classes an episode.
    pub way: usize,
    /// Support images a class.
    pub shot: usize,
    /// Query images a class.
    pub query: usize,
    /// Steps of the outer optimiser.
    pub steps: u64,
    /// Episodes a step, whose gradients are averaged.
    pub episodes_per_step: usize,
    /// Learning rate of Adam.
    pub learning_rate: f64,
    /// How it moves.
    pub schedule: Schedule,
    /// Share of the episodes that mix classes of several models, 0 to 1.
    pub cross_model_share: f64,
    /// What is done to the images.
    pub augmentation: Augmentation,
    /// Whether it stops early, and when.
    pub early_stop: Option<EarlyStop>,
}

impl TrainConfig {
    fn learning_rate_at(&self, step: u64) -> f64 {
        match self.schedule {
            Schedule::Constant => self.learning_rate,
            Schedule::Cosine => half_cosine(self.learning_rate, step, self.steps),
        }
    }
}

/// `rate` along half a cosine, down to 0 after the last of `steps`.
pub(super) fn half_cosine(rate: f64, step: u64, steps: u64) -> f64 {
    let done = step as f64 / steps.max(1) as f64;
    rate * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
}

/// Writes the moments of an optimiser of `parameters`.
pub(super) fn write_moments<'a>(
    adam: &Adam,
    parameters: impl Iterator<Item = &'a Parameter>,
    store: &mut TensorStore,
) {
    let (first, second) = adam.moments();
    for ((parameter, first), second) in parameters.zip(first).zip(second) {
        let dims = parameter.value.dims();
        store.insert(format!("adam.first.{}", parameter.name), dims, first.clone());
        store.insert(format!("adam.second.{}", parameter.name), dims, second.clone());
    }
}

/// The optimiser that [`write_moments`] wrote, after `steps`.
pub(super) fn read_moments<'a>(
    steps: u64,
    parameters: impl Iterator<Item = &'a Parameter>,
    store: &TensorStore,
) -> Result<Adam> {
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for parameter in parameters {
        for (what, moments) in [("first", &mut first), ("second", &mut second)] {
            let name = format!("adam.{what}.{}", parameter.name);
            moments.push(store.tensor(&name, parameter.value.dims())?.to_vec());
        }
    }
    Adam::restore(AdamOptions::STANDARD, steps, first, second)
}

/// Where one call of [`Trainer::run`] ends early.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Steps of this call.
    pub steps: Option<u64>,
    /// Wall-clock time of this call.
    pub time: Option<Duration>,
}

/// Why a call of [`Trainer::run`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// All steps of the configuration are done.
    Done,
    /// The limit on steps of this call.
    StepLimit,
    /// The limit on time of this call.
    TimeLimit,
    /// No check on pseudo-validation had a new best for a while.
    EarlyStop,
    /// Nobody can be asked any more, and nothing else was to be done.
    BudgetSpent,
    /// The observer asked to stop.
    Interrupted,
    /// The loss or a gradient is no longer finite; the parameters are those before that step.
    Diverged,
}

/// One step, as the observer sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Iteration {
    /// Number of the step, from 1.
    pub step: u64,
    /// Cross-entropy on the queries.
    pub loss: f64,
    /// Share of the queries that were right before the update.
    pub accuracy: f64,
    /// Accuracy on pseudo-validation after it, 0 to 1, where one was due.
    pub validation: Option<f64>,
    /// Wall-clock time of its parts.
    pub seconds: StepSeconds,
}

/// Wall-clock time of the parts of one step; of episodes side by side, in the ratio of their own times.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepSeconds {
    /// Reading and augmenting images, the inner loop and the loss on the queries.
    pub inner: f64,
    /// The gradient of that loss to the parameters (through the inner loop, where the learner is of second order) and
    /// the optimiser's step.
    pub outer: f64,
    /// The check on pseudo-validation.
    pub validation: f64,
}

/// A model in training: parameters, optimiser and position.
#[derive(Debug, Clone)]
pub struct Trainer {
    config: TrainConfig,
    model: MetaModel,
    adam: Adam,
    step: u64,
    checks: Checks,
    /// Episodes of another source.
    pub(super) beside: Option<Arc<Beside>>,
}

/// The images of a training.
#[derive(Clone, Copy)]
pub struct Sources<'a> {
    /// Those that it sees.
    pub train: &'a dyn ClassSource,
    /// Those of its checks: of the same classes, but they do not move.
    pub validation: &'a dyn ClassSource,
    /// What draws from both ([`Trainer::samplers`]).
    pub samplers: &'a Samplers,
}

impl Trainer {
    /// Starts training `model`; a backbone alone is a ProtoNet.
    pub fn new(config: TrainConfig, model: impl Into<MetaModel>) -> Self {
        let model = model.into();
        let lengths: Vec<usize> = model.parameters().map(|p| p.value.elem_count()).collect();
        let adam = Adam::new(AdamOptions::STANDARD, lengths);
        Self { config, model, adam, step: 0, checks: Checks::default(), beside: None }
    }

    /// What it trains with.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// The model as it stands.
    pub fn model(&self) -> &MetaModel {
        &self.model
    }

    /// Its network as it stands.
    pub fn backbone(&self) -> &Backbone {
        self.model.backbone()
    }

    /// The network, consuming the trainer.
    pub fn into_backbone(self) -> Backbone {
        self.model.into_backbone()
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Accuracy (0 to 1) and step of the best check on pseudo-validation so far.
    pub fn best_check(&self) -> Option<(f64, u64)> {
        self.checks.best()
    }

    /// What draws episodes from `source`, whose classes and numbers of images must then stay.
    ///
    /// # Errors
    /// When the source has too few images, for training or for pseudo-validation, or they are too small.
    pub fn samplers(&self, source: &dyn ClassSource) -> Result<Samplers> {
        let [height, width] = source.image_size();
        self.model.backbone().embedding_dim(height, width)?;
        Samplers::new(&self.config, source)
    }

    /// Trains until the last step, an early stop, a limit, or until `observe` breaks; it is called after each step.
    /// After the last step or an early stop the model is the best one ([`Trainer::take_best`]).
    ///
    /// # Errors
    /// When the source has too few images or an image cannot be read.
    pub fn run(
        &mut self,
        source: &dyn ClassSource,
        limits: Limits,
        observe: &mut dyn FnMut(&Self, &Iteration) -> ControlFlow<()>,
    ) -> Result<StopReason> {
        let samplers = self.samplers(source)?;
        let sources = Sources { train: source, validation: source, samplers: &samplers };
        let reason = self.run_on(sources, limits, observe)?;
        if matches!(reason, StopReason::Done | StopReason::EarlyStop) {
            self.take_best();
        }
        Ok(reason)
    }

    /// The model becomes the one of the best check on pseudo-validation, where there was one.
    pub fn take_best(&mut self) {
        if let Some(best) = self.checks.best_model() {
            self.model = best.clone();
        }
    }

    /// [`Trainer::run`] with samplers made before, the model staying the newest.
    ///
    /// # Errors
    /// When an image cannot be read.
    pub fn run_on(
        &mut self,
        sources: Sources<'_>,
        limits: Limits,
        observe: &mut dyn FnMut(&Self, &Iteration) -> ControlFlow<()>,
    ) -> Result<StopReason> {
        let (start, first) = (Instant::now(), self.step);
        while self.step < self.config.steps {
            if self.checks.stalled(&self.config) {
                return Ok(StopReason::EarlyStop);
            }
            if limits.steps.is_some_and(|most| self.step - first >= most) {
                return Ok(StopReason::StepLimit);
            }
            if limits.time.is_some_and(|most| start.elapsed() >= most) {
                return Ok(StopReason::TimeLimit);
            }
            let (train, sampler) = (sources.train, sources.samplers.train());
            let Some(mut iteration) = self.update(train, sampler, &Lesson::default())? else {
                return Ok(StopReason::Diverged);
            };
            let begin = Instant::now();
            iteration.validation = self.check(sources.validation, sources.samplers)?;
            if let Some(accuracy) = iteration.validation {
                self.checks.tell(self.step, accuracy, &self.model);
                iteration.seconds.validation = begin.elapsed().as_secs_f64();
            }
            if observe(self, &iteration).is_break() {
                return Ok(StopReason::Interrupted);
            }
        }
        Ok(StopReason::Done)
    }

    /// The outer loss of the task of an episode, and the learner's answer.
    pub(super) fn play(
        &self,
        parameters: &[Var],
        task: Task<'_>,
        episode: &Episode,
    ) -> Result<(Var, Answer)> {
        let (steps, order) = match self.model.learner() {
            Learner::ProtoNet => (0, Order::First),
            Learner::Anil(inner) | Learner::Maml(inner) => match inner.order {
                InnerOrder::Second => (inner.train_steps, Order::Higher),
                InnerOrder::First => (inner.train_steps, Order::First),
            },
        };
        let answer = self.model.answer(parameters, task, steps, order, BnMode::Batch)?;
        Ok((answer.logits.cross_entropy(&episode.query_labels)?, answer))
    }

    /// The whole state: network, optimiser, position, configuration.
    ///
    /// # Errors
    /// When a parameter cannot be read from its device.
    pub fn to_store(&self) -> Result<TensorStore> {
        let mut store = TensorStore::default();
        self.model.write_to(&mut store)?;
        write_moments(&self.adam, self.model.parameters(), &mut store);
        store.words.insert("step".into(), self.step.to_string());
        store.words.insert("adam.steps".into(), self.adam.steps().to_string());
        store.words.insert("config".into(), format!("{:?}", self.config));
        self.checks.write_to(&mut store)?;
        Ok(store)
    }

    /// Continues from a state under the same configuration.
    ///
    /// # Errors
    /// When the state is incomplete or was made under another configuration.
    pub fn from_store(config: TrainConfig, store: &TensorStore) -> Result<Self> {
        let model = MetaModel::read_from(store)?;
        let own = format!("{config:?}");
        if store.word("config")? != own {
            return Err(Error::input(format!(
                "the saved training state was made under another configuration: `{}`",
                store.word("config")?
            ))
            .hint("resume with the configuration of that run, or start a new run"));
        }
        let adam = read_moments(store.number("adam.steps")?, model.parameters(), store)?;
        let checks = Checks::read_from(store)?;
        Ok(Self { config, adam, step: store.number("step")?, model, checks, beside: None })
    }

    /// Writes the state to a safetensors file, which appears whole or not at all.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        self.to_store()?.save(path)
    }

    /// Continues from a file of [`Trainer::save`].
    ///
    /// # Errors
    /// As [`Trainer::from_store`], and when the file cannot be read.
    pub fn restore(config: TrainConfig, path: &Path) -> Result<Self> {
        let store = TensorStore::load(path)?;
        Self::from_store(config, &store).context(|| format!("`{}`", path.display()))
    }
}

fn accuracy(logits: &Var, episode: &Episode) -> Result<f64> {
    let rows = logits.value().to_vec2::<f32>()?;
    let right = rows
        .iter()
        .zip(&episode.query_labels)
        .filter(|(row, label)| first_largest(row) == **label)
        .count();
    Ok(right as f64 / rows.len().max(1) as f64)
}

/// The episode's images, augmented, as a tensor `[n, 3, H, W]`.
pub(super) fn read_images(
    source: &dyn ClassSource,
    episode: &Episode,
    draws: &[Draw],
) -> Result<Tensor> {
    let images = read_pixels(source, episode, draws)?;
    let shape = images.shape();
    Ok(Tensor::from_vec(images.into_data(), &shape, &Device::Cpu)?)
}

/// The episode's images, augmented.
pub(super) fn read_pixels(
    source: &dyn ClassSource,
    episode: &Episode,
    draws: &[Draw],
) -> Result<Images> {
    let [height, width] = source.image_size();
    let stride = 3 * height * width;
    let mut images = Images::zeros([episode.images.len(), 3, height, width]);
    images.data_mut().par_chunks_mut(stride).zip(&episode.images).zip(draws).try_for_each(
        |((target, &(class, index)), draw)| {
            let mut own = vec![0.0; stride];
            source.read(class, index, &mut own)?;
            draw.apply(&own, height, width, target);
            Ok::<(), Error>(())
        },
    )?;
    Ok(images)
}
