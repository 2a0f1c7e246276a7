//! Meta-training on pseudo episodes, as a loop that can be watched, stopped and resumed.
//!
//! Everything a step does follows from (seed, step), the parameters and the images: a resumed run
//! ends with the same bytes as one that was never stopped, for any number of threads.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::augment::{Augmentation, Draw};
use super::backbone::{Backbone, BnMode};
use super::episodes::{ClassSource, Episode, EpisodeSampler};
use super::learner::{Answer, InnerOrder, Learner, MetaModel, Task};
use super::protonet::first_largest;
use crate::error::{Error, Result, ResultExt};
use crate::tensor::tape::{BatchStatistics, Order, Tape, Var, grad};
use crate::tensor::{Adam, AdamOptions, RngStream, TensorStore};

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
}

impl TrainConfig {
    fn learning_rate_at(&self, step: u64) -> f64 {
        match self.schedule {
            Schedule::Constant => self.learning_rate,
            Schedule::Cosine => {
                let done = step as f64 / self.steps.max(1) as f64;
                self.learning_rate * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
            }
        }
    }
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
    /// Wall-clock time of the step.
    pub seconds: f64,
}

/// A model in training: parameters, optimiser and position.
#[derive(Debug, Clone)]
pub struct Trainer {
    config: TrainConfig,
    model: MetaModel,
    adam: Adam,
    step: u64,
}

/// What one episode gives.
struct Outcome {
    loss: f64,
    accuracy: f64,
    gradients: Vec<Tensor>,
    statistics: Vec<BatchStatistics>,
}

impl Trainer {
    /// Starts training `model`; a backbone alone is a ProtoNet.
    pub fn new(config: TrainConfig, model: impl Into<MetaModel>) -> Self {
        let model = model.into();
        let lengths: Vec<usize> = model.parameters().map(|p| p.value.elem_count()).collect();
        let adam = Adam::new(AdamOptions::STANDARD, lengths);
        Self { config, model, adam, step: 0 }
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

    /// Trains until the last step, a limit, or until `observe` breaks; it is called after each step.
    ///
    /// # Errors
    /// When the source has too few images or an image cannot be read.
    pub fn run(
        &mut self,
        source: &dyn ClassSource,
        limits: Limits,
        observe: &mut dyn FnMut(&Self, &Iteration) -> ControlFlow<()>,
    ) -> Result<StopReason> {
        let c = &self.config;
        let sampler = EpisodeSampler::new(source, c.way, c.shot, c.query, c.cross_model_share)?;
        let [height, width] = source.image_size();
        self.model.backbone().embedding_dim(height, width)?;
        let (start, first) = (Instant::now(), self.step);
        while self.step < self.config.steps {
            if limits.steps.is_some_and(|most| self.step - first >= most) {
                return Ok(StopReason::StepLimit);
            }
            if limits.time.is_some_and(|most| start.elapsed() >= most) {
                return Ok(StopReason::TimeLimit);
            }
            let begin = Instant::now();
            let Some([loss, accuracy]) = self.one_step(source, &sampler)? else {
                return Ok(StopReason::Diverged);
            };
            self.step += 1;
            let seconds = begin.elapsed().as_secs_f64();
            let iteration = Iteration { step: self.step, loss, accuracy, seconds };
            if observe(self, &iteration).is_break() {
                return Ok(StopReason::Interrupted);
            }
        }
        Ok(StopReason::Done)
    }

    /// One step of the outer optimiser: mean loss and accuracy, or `None` when they are not finite, and
    /// then nothing has changed.
    fn one_step(
        &mut self,
        source: &dyn ClassSource,
        sampler: &EpisodeSampler,
    ) -> Result<Option<[f64; 2]>> {
        let episodes = self.config.episodes_per_step.max(1);
        let this = &*self;
        let outcome = |number| this.one_episode(source, sampler, number as u64);
        // In the pool already: a kernel called from outside it wakes and awaits a worker each time.
        let outcomes: Vec<Outcome> =
            rayon::scope(|_| (0..episodes).into_par_iter().map(outcome).collect::<Result<_>>())?;
        let share = 1.0 / episodes as f64;
        let mean = |value: fn(&Outcome) -> f64| outcomes.iter().map(value).sum::<f64>() * share;
        let (loss, accuracy) = (mean(|o| o.loss), mean(|o| o.accuracy));
        let mut gradients = outcomes[0].gradients.clone();
        for outcome in &outcomes[1..] {
            for (sum, gradient) in gradients.iter_mut().zip(&outcome.gradients) {
                *sum = (&*sum + gradient)?;
            }
        }
        if episodes > 1 {
            for gradient in &mut gradients {
                *gradient = (&*gradient * share)?;
            }
        }
        if !loss.is_finite() || !all_finite(&gradients)? {
            return Ok(None);
        }
        let mut values: Vec<Tensor> = self.model.parameters().map(|p| p.value.clone()).collect();
        let rate = self.config.learning_rate_at(self.step);
        self.adam.step_tensors(rate, &mut values, &gradients)?;
        self.model.set_parameters(values)?;
        for outcome in &outcomes {
            self.model.backbone_mut().update_running(&outcome.statistics);
        }
        Ok(Some([loss, accuracy]))
    }

    /// Loss, accuracy and gradients of episode `number` of this step.
    fn one_episode(
        &self,
        source: &dyn ClassSource,
        sampler: &EpisodeSampler,
        number: u64,
    ) -> Result<Outcome> {
        let c = &self.config;
        let index = self.step * c.episodes_per_step.max(1) as u64 + number;
        let mut rng = RngStream::new(c.seed, "episode", "", index);
        let episode = sampler.draw(&mut rng);
        let draws: Vec<Draw> =
            episode.images.iter().map(|_| c.augmentation.draw(&mut rng)).collect();
        let tape = Tape::new();
        let images = tape.constant(read_images(source, &episode, &draws)?);
        let parameters = self.model.leaves(&tape);
        let (loss, answer) = self.play(&parameters, &images, &episode)?;
        let wrt: Vec<&Var> = parameters.iter().collect();
        let gradients = grad(&loss, &wrt, Order::First)?
            .into_iter()
            .map(|gradient| gradient.value().clone())
            .collect();
        Ok(Outcome {
            loss: loss.scalar()?,
            accuracy: accuracy(&answer.logits, &episode)?,
            gradients,
            statistics: answer.statistics,
        })
    }

    /// The outer loss of an episode with these images, support then queries `[n, 3, H, W]`, and the learner's answer.
    pub(super) fn play(
        &self,
        parameters: &[Var],
        images: &Var,
        episode: &Episode,
    ) -> Result<(Var, Answer)> {
        let n_support = episode.support_labels.len();
        let support = images.narrow(0, 0, n_support)?;
        let query = images.narrow(0, n_support, episode.query_labels.len())?;
        let labels = episode.support_labels.as_slice();
        let task = Task { support: &support, labels, query: &query, way: self.config.way };
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
        let (first, second) = self.adam.moments();
        for (at, parameter) in self.model.parameters().enumerate() {
            let dims = parameter.value.dims();
            store.insert(format!("adam.first.{}", parameter.name), dims, first[at].clone());
            store.insert(format!("adam.second.{}", parameter.name), dims, second[at].clone());
        }
        store.words.insert("step".into(), self.step.to_string());
        store.words.insert("adam.steps".into(), self.adam.steps().to_string());
        store.words.insert("config".into(), format!("{:?}", self.config));
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
        let moments = |what: &str| -> Result<Vec<Vec<f32>>> {
            model
                .parameters()
                .map(|p| {
                    let name = format!("adam.{what}.{}", p.name);
                    Ok(store.tensor(&name, p.value.dims())?.to_vec())
                })
                .collect()
        };
        let adam = Adam::restore(
            AdamOptions::STANDARD,
            store.number("adam.steps")?,
            moments("first")?,
            moments("second")?,
        )?;
        Ok(Self { config, adam, step: store.number("step")?, model })
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

fn all_finite(tensors: &[Tensor]) -> Result<bool> {
    for tensor in tensors {
        if tensor.flatten_all()?.to_vec1::<f32>()?.iter().any(|v| !v.is_finite()) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The episode's images, augmented: `[n, 3, H, W]`.
pub(super) fn read_images(
    source: &dyn ClassSource,
    episode: &Episode,
    draws: &[Draw],
) -> Result<Tensor> {
    let [height, width] = source.image_size();
    let stride = 3 * height * width;
    let mut pixels = vec![0.0f32; episode.images.len() * stride];
    pixels.par_chunks_mut(stride).zip(&episode.images).zip(draws).try_for_each(
        |((target, &(class, index)), draw)| {
            let mut own = vec![0.0; stride];
            source.read(class, index, &mut own)?;
            draw.apply(&own, height, width, target);
            Ok::<(), Error>(())
        },
    )?;
    Ok(Tensor::from_vec(pixels, (episode.images.len(), 3, height, width), &Device::Cpu)?)
}
