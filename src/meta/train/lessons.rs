//! What a step of meta-training learns from: episodes, the wanted classes of their queries and, beside them, soft labels.

use std::time::Instant;

use candle_core::Tensor;
use rayon::prelude::*;

use super::{Iteration, StepSeconds, Trainer, accuracy, read_images};
use crate::error::{Error, Result};
use crate::meta::augment::Draw;
use crate::meta::distill::{Distillation, SoftLabels, SoftSupport};
use crate::meta::episodes::{ClassSource, Episode, EpisodeSampler};
use crate::meta::learner::Answer;
use crate::meta::task::Partner;
use crate::tensor::RngStream;
use crate::tensor::lists::{add_all, all_finite};
use crate::tensor::tape::{BatchStatistics, Order, Tape, Var, grad};

/// What an episode is answered by, and what it is mixed with.
#[derive(Clone, Copy, Default)]
pub struct Lesson<'a> {
    /// Soft labels and how they count; without them the wanted classes alone.
    pub soft: Option<(&'a dyn SoftLabels, Distillation)>,
    /// Interpolation with a second episode.
    pub mix: Option<Mix<'a>>,
}

/// Task interpolation: images of an episode mixed with those of another in the same places, so that each class of the
/// mixture lies between two (methods.md 5). One share an episode, Beta(`alpha`, `alpha`).
#[derive(Clone, Copy)]
pub struct Mix<'a> {
    /// Draws the other one.
    pub sampler: &'a EpisodeSampler,
    /// Where it happens.
    pub space: MixSpace,
    /// Of the share's distribution.
    pub alpha: f64,
}

/// Where tasks are mixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MixSpace {
    /// The images.
    Pixels,
    /// Their embeddings.
    Features,
}

/// What one episode gives.
#[derive(Debug, Clone)]
pub struct TaskGradient {
    /// The outer loss.
    pub loss: f64,
    /// Share of the queries that were right.
    pub accuracy: f64,
    /// Gradient of the loss to all parameters, in the order of [`crate::meta::MetaModel::parameters`].
    pub gradients: Vec<Tensor>,
    statistics: Vec<BatchStatistics>,
    /// Until the loss was there, and until its gradient was.
    seconds: [f64; 2],
}

/// The mean of the gradients of several episodes.
///
/// # Errors
/// When their shapes differ.
pub fn mean_gradient(tasks: &[TaskGradient]) -> Result<Vec<Tensor>> {
    let Some((first, rest)) = tasks.split_first() else { return Ok(Vec::new()) };
    let mut sums = first.gradients.clone();
    for task in rest {
        add_all(&mut sums, &task.gradients)?;
    }
    if !rest.is_empty() {
        let share = 1.0 / tasks.len() as f64;
        for sum in &mut sums {
            *sum = (&*sum * share)?;
        }
    }
    Ok(sums)
}

impl Trainer {
    /// Loss and gradient of an episode at the parameters `at`; augmentation is drawn from `rng`.
    ///
    /// # Errors
    /// When an image cannot be read or a teacher not be asked.
    pub fn task_gradient(
        &self,
        at: &[Tensor],
        (source, episode): (&dyn ClassSource, &Episode),
        lesson: &Lesson<'_>,
        rng: &mut RngStream,
    ) -> Result<TaskGradient> {
        let begin = Instant::now();
        let tape = Tape::new();
        let parameters: Vec<Var> = at.iter().map(|value| tape.leaf(value.clone())).collect();
        let (loss, answer) = self.taught(&parameters, (source, episode), lesson, rng)?;
        let played = begin.elapsed().as_secs_f64();
        let wrt: Vec<&Var> = parameters.iter().collect();
        let gradients = grad(&loss, &wrt, Order::First)?
            .into_iter()
            .map(|gradient| gradient.value().clone())
            .collect();
        Ok(TaskGradient {
            loss: loss.scalar()?,
            accuracy: accuracy(&answer.logits, episode)?,
            gradients,
            statistics: answer.statistics,
            seconds: [played, begin.elapsed().as_secs_f64() - played],
        })
    }

    /// The loss alone, of the model as it is.
    ///
    /// # Errors
    /// As [`Trainer::task_gradient`].
    pub fn task_loss(
        &self,
        task: (&dyn ClassSource, &Episode),
        lesson: &Lesson<'_>,
        rng: &mut RngStream,
    ) -> Result<f64> {
        let parameters = self.model.leaves(&Tape::new());
        self.taught(&parameters, task, lesson, rng)?.0.scalar()
    }

    /// The outer loss of an episode on the tape of `parameters`, and the learner's answer.
    fn taught(
        &self,
        parameters: &[Var],
        (source, episode): (&dyn ClassSource, &Episode),
        lesson: &Lesson<'_>,
        rng: &mut RngStream,
    ) -> Result<(Var, Answer)> {
        let Some(tape) = parameters.first().map(Var::tape) else {
            return Err(Error::internal("a model without parameters"));
        };
        let augmentation = &self.config.augmentation;
        let read = |episode: &Episode, rng: &mut RngStream| -> Result<Tensor> {
            let draws: Vec<Draw> = episode.images.iter().map(|_| augmentation.draw(rng)).collect();
            read_images(source, episode, &draws)
        };
        let mut images = read(episode, rng)?;
        let mut partner = None;
        if let Some(mix) = lesson.mix {
            let other = mix.sampler.draw(rng);
            let other = read(&other, rng)?;
            let share = rng.beta(mix.alpha);
            match mix.space {
                MixSpace::Pixels => images = ((images * share)? + (other * (1.0 - share))?)?,
                MixSpace::Features => partner = Some((tape.constant(other), share)),
            }
        }
        let images = tape.constant(images);
        let mut task = episode.task(&images);
        task.partner = partner.as_ref().map(|(images, share)| Partner { images, share: *share });
        let support = match lesson.soft {
            Some((teachers, how)) => teachers.support(episode)?.map(|logits| (logits, how)),
            None => None,
        };
        task.soft = support.as_ref().map(|(logits, how)| SoftSupport { logits, how: *how });
        let (mut loss, answer) = self.play(parameters, task, episode)?;
        if let Some((teachers, how)) = lesson.soft
            && let Some(soft) = teachers.logits(episode)?
        {
            loss = how.loss(&answer.logits, &episode.query_labels, &soft)?;
        }
        Ok((loss, answer))
    }

    /// One step of the outer optimiser along `gradients`, which came of `tasks`; `None` when loss or gradient are not
    /// finite, and then nothing has changed.
    ///
    /// # Errors
    /// When the gradients are not those of this model.
    pub fn descend(
        &mut self,
        gradients: &[Tensor],
        tasks: &[TaskGradient],
    ) -> Result<Option<Iteration>> {
        let begin = Instant::now();
        let share = 1.0 / tasks.len().max(1) as f64;
        let mean = |value: fn(&TaskGradient) -> f64| tasks.iter().map(value).sum::<f64>() * share;
        let (loss, accuracy) = (mean(|task| task.loss), mean(|task| task.accuracy));
        if !loss.is_finite() || !all_finite(gradients)? {
            return Ok(None);
        }
        let mut values: Vec<Tensor> = self.model.parameters().map(|p| p.value.clone()).collect();
        let rate = self.config.learning_rate_at(self.step);
        self.adam.step_tensors(rate, &mut values, gradients)?;
        self.model.set_parameters(values)?;
        for task in tasks {
            self.model.backbone_mut().update_running(&task.statistics);
        }
        self.step += 1;
        let [inner, outer] =
            [0, 1].map(|part| tasks.iter().map(|task| task.seconds[part]).sum::<f64>());
        let outer = outer + begin.elapsed().as_secs_f64();
        let seconds = StepSeconds { inner, outer, validation: 0.0 };
        Ok(Some(Iteration { step: self.step, loss, accuracy, validation: None, seconds }))
    }

    /// One step of the outer optimiser on episodes that `sampler` draws from `source`; `None` when loss or gradient are
    /// not finite, and then nothing has changed. Episodes follow from seed and step.
    ///
    /// # Errors
    /// As [`Trainer::task_gradient`].
    pub fn update(
        &mut self,
        source: &dyn ClassSource,
        sampler: &EpisodeSampler,
        lesson: &Lesson<'_>,
    ) -> Result<Option<Iteration>> {
        let begin = Instant::now();
        let episodes = self.config.episodes_per_step.max(1);
        let start: Vec<Tensor> = self.model.parameters().map(|p| p.value.clone()).collect();
        let this = &*self;
        let one = |number: usize| {
            let index = this.step * episodes as u64 + number as u64;
            let mut rng = RngStream::new(this.config.seed, "episode", "", index);
            let mut other = RngStream::new(this.config.seed, "beside", "", index);
            let beside =
                this.beside.as_ref().filter(|beside| f64::from(other.uniform()) < beside.share);
            if let Some(beside) = beside {
                let episode = beside.sampler.draw(&mut rng);
                let task = (&beside.source as &dyn ClassSource, &episode);
                return this.task_gradient(&start, task, &Lesson::default(), &mut rng);
            }
            let episode = sampler.draw(&mut rng);
            this.task_gradient(&start, (source, &episode), lesson, &mut rng)
        };
        // In the pool already: a kernel called from outside it wakes and awaits a worker each time.
        let tasks: Vec<TaskGradient> =
            rayon::scope(|_| (0..episodes).into_par_iter().map(one).collect::<Result<_>>())?;
        let gradients = mean_gradient(&tasks)?;
        let mut iteration = self.descend(&gradients, &tasks)?;
        if let Some(iteration) = &mut iteration {
            // Episodes ran side by side: the wall's time, in the ratio of their own.
            let StepSeconds { inner, outer, .. } = iteration.seconds;
            let wall = begin.elapsed().as_secs_f64();
            let share = inner / (inner + outer).max(f64::MIN_POSITIVE);
            iteration.seconds.inner = wall * share;
            iteration.seconds.outer = wall * (1.0 - share);
        }
        Ok(iteration)
    }
}
