//! FREE: recovery in a few steps (FIVE), and a meta-model whose steps for different teachers agree (BELL; FREE sec. 3.2,
//! 3.3; methods.md 4).
//!
//! An epoch: a round of visits to some teachers; one outer step on what they teach, after each other in random order,
//! which draws their gradients together; then episodes from the memory of all images, until accuracy has had no new best
//! for a while. Queries of episodes across teachers get soft labels from each class's own teacher.

use std::ops::ControlFlow;

use candle_core::Tensor;

use super::five::{MetaGenerator, distinct};
use super::parts::{Agreed, Memory, OpenTeachers, Patience, Student};
use super::recover::Watch;
use super::rounds::{Round, RoundConfig, draw};
use crate::error::{Error, ErrorKind, Result};
use crate::meta::{
    ClassSource, Distillation, Episode, EpisodeSampler, Iteration, Lesson, SoftLabels, StopReason,
    TaskGradient, Trainer, mean_gradient,
};
use crate::tensor::losses::log_sum_exp;
use crate::tensor::{Adam, AdamOptions, Images, RngStream, TensorStore};

/// What the outer step of an epoch is made of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Align {
    /// Teachers after each other, one step of the inner optimiser each; the outer optimiser follows the way back
    /// (Reptile), which ascends the inner products of their gradients (methods.md 4.2).
    Sequential(Inner),
    /// The mean of the teachers' gradients at one point: the same without alignment.
    Joint,
    /// None.
    Off,
}

/// The steps between the outer ones.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Inner {
    /// Learning rate.
    pub rate: f64,
    /// Adam, fresh each epoch, as in the published program; plain gradient descent otherwise, for which alone the
    /// derivation holds.
    pub adam: bool,
    /// Factor of the way back; `None` makes it a mean gradient.
    pub scale: Option<f64>,
}

/// Which of a round's images are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// All.
    All,
    /// Those of the last teacher: a defect of the published program (methods.md 4.3).
    Last,
}

/// How FREE trains.
#[derive(Debug, Clone, PartialEq)]
pub struct FreeConfig {
    /// Seed of every draw.
    pub seed: u64,
    /// A round of visits.
    pub round: RoundConfig,
    /// Rounds before the meta-model learns; their images are not kept.
    pub warm_up: u64,
    /// Updates without a better accuracy that end an epoch.
    pub patience: u64,
    /// Images that their own model puts into another class are left out of episodes from memory.
    pub only_agreed: bool,
    /// The outer step of an epoch.
    pub align: Align,
    /// Its loss.
    pub distillation: Distillation,
    /// Soft labels in episodes from memory; `None` for the wanted classes alone.
    pub cross: Option<Distillation>,
    /// Which images are kept.
    pub keep: Keep,
}

/// What happened.
pub enum FreeEvent<'a> {
    /// A round of visits, and its number.
    Round(u64, &'a mut Round),
    /// An outer step on the teachers of a round: mean loss, and mean cosine of each pair of their gradients before it.
    Aligned {
        /// The step.
        iteration: Iteration,
        /// `None` of fewer than two teachers.
        cosine: Option<f64>,
    },
    /// An update on episodes from memory.
    Replayed(Iteration),
}

/// The state between steps.
pub struct Free<'a> {
    config: FreeConfig,
    generator: MetaGenerator,
    teachers: OpenTeachers<'a>,
    memory: Memory,
    /// Models still visited.
    models: Vec<usize>,
    /// Of an epoch's episodes from memory.
    replay: Patience,
}

/// Soft labels of the teachers: each class's own is asked how likely it is.
struct Asked<'a> {
    source: &'a Agreed<'a>,
    teachers: &'a OpenTeachers<'a>,
}

impl SoftLabels for Asked<'_> {
    fn logits(&self, episode: &Episode) -> Result<Option<Vec<f32>>> {
        let memory = self.source.memory();
        let queries = &episode.images[episode.support_labels.len()..];
        let way = episode.way();
        let slots: Vec<(usize, usize)> =
            episode.slots().into_iter().map(|class| memory.origin(class)).collect();
        let mut images = Vec::new();
        for &(class, index) in queries {
            images.extend(memory.image(class, self.source.index(class, index))?);
        }
        let [h, w] = memory.image_size();
        let images = Images::new(images, [queries.len(), 3, h, w])?;
        let mut soft = vec![0.0f32; queries.len() * way];
        let mut models: Vec<usize> = slots.iter().map(|&(model, _)| model).collect();
        models.sort_unstable();
        models.dedup();
        for model in models {
            let teacher = self.teachers.get(model)?;
            let logits = match teacher.logits(&images) {
                Ok(logits) => logits,
                Err(error) if error.kind() == ErrorKind::Budget => return Ok(None),
                Err(error) => return Err(error),
            };
            let rows = logits.chunks_exact(teacher.spec().classes);
            for (out, row) in soft.chunks_exact_mut(way).zip(rows) {
                let all = log_sum_exp(row);
                for (out, &(own, class)) in out.iter_mut().zip(&slots) {
                    if own == model {
                        *out = (f64::from(row[class]) - all) as f32;
                    }
                }
            }
        }
        Ok(Some(soft))
    }
}

/// The gradient of episode `number` at these parameters.
type GradientAt<'a> = dyn FnMut(usize, &[Tensor]) -> Result<Vec<Tensor>> + 'a;

/// What the outer optimiser follows after `count` steps from `start`, each along the gradient that `gradient` finds where
/// it stands. By gradient descent of rate `e` that is the sum of the gradients at the start less `e` times the sum over
/// pairs j < k of `H_k g_j`: descent on the losses, and, over random orders, ascent on the inner products of the gradients
/// (methods.md 4.2).
fn way_back(
    start: &[Tensor],
    inner: Inner,
    count: usize,
    gradient: &mut GradientAt<'_>,
) -> Result<Vec<Tensor>> {
    let mut at = start.to_vec();
    let mut adam = Adam::new(AdamOptions::STANDARD, start.iter().map(Tensor::elem_count));
    for number in 0..count {
        let gradients = gradient(number, &at)?;
        if inner.adam {
            adam.step_tensors(inner.rate, &mut at, &gradients)?;
        } else {
            for (weight, gradient) in at.iter_mut().zip(&gradients) {
                *weight = (&*weight - (gradient * inner.rate)?)?;
            }
        }
    }
    let scale = inner.scale.unwrap_or(1.0 / (inner.rate * count as f64));
    start.iter().zip(&at).map(|(start, end)| Ok(((start - end)? * scale)?)).collect()
}

/// Mean cosine of all pairs.
fn mean_cosine(gradients: &[TaskGradient]) -> Result<Option<f64>> {
    let flat = |task: &TaskGradient| -> Result<Vec<f32>> {
        let mut all = Vec::new();
        for gradient in &task.gradients {
            all.extend(gradient.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(all)
    };
    let all: Vec<Vec<f32>> = gradients.iter().map(flat).collect::<Result<_>>()?;
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let (mut total, mut pairs) = (0.0, 0);
    for (i, a) in all.iter().enumerate() {
        for b in &all[..i] {
            let norms = (dot(a, a) * dot(b, b)).sqrt();
            if norms > 0.0 {
                total += dot(a, b) / norms;
                pairs += 1;
            }
        }
    }
    Ok((pairs > 0).then(|| total / f64::from(pairs)))
}

impl<'a> Free<'a> {
    /// Starts with an empty `memory`; `models` are visited, which `teachers` opens.
    pub fn new(
        config: FreeConfig,
        generator: MetaGenerator,
        teachers: OpenTeachers<'a>,
        memory: Memory,
        models: Vec<usize>,
    ) -> Self {
        let replay = Patience::new(config.patience);
        Self { config, generator, teachers, memory, models, replay }
    }

    /// The images as they are.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The meta-generator as it is.
    pub fn generator(&self) -> &MetaGenerator {
        &self.generator
    }

    /// The learner that a visit's images are to be hard for, where the memory has images of all its classes.
    fn student<'t>(
        &self,
        trainer: &'t Trainer,
        model: usize,
        labels: &[usize],
    ) -> Result<Option<Student<'t>>> {
        let classes = distinct(labels);
        if self.generator.config().boundary <= 0.0 || classes.len() < 2 {
            return Ok(None);
        }
        let (images, found) = self.memory.newest(model, trainer.config().shot)?;
        let of_visit: Vec<usize> =
            (0..found.len()).filter(|&i| classes.contains(&found[i])).collect();
        let slots: Vec<usize> = (of_visit.iter())
            .filter_map(|&i| classes.iter().position(|&class| class == found[i]))
            .collect();
        if (0..classes.len()).any(|slot| !slots.contains(&slot)) {
            return Ok(None);
        }
        Student::new(trainer.model(), images.select(&of_visit), slots, classes).map(Some)
    }

    /// A round of visits; what they made is kept unless the generator is still warming up.
    fn visit(&mut self, trainer: &Trainer, watch: &Watch<'_>) -> Result<(u64, Round)> {
        let number = self.generator.rounds();
        let plan = self.config.round;
        let chosen = draw(&plan, number, &self.models);
        let mut generator = self.generator.clone();
        let this = &*self;
        let student = |model: usize, labels: &[usize]| this.student(trainer, model, labels);
        let mut round = generator.round(&chosen, |generator, model| {
            let mut visited = generator.visit_of_round(
                (&plan, number),
                model,
                &this.teachers,
                &student,
                watch,
            )?;
            if this.config.only_agreed && number >= this.config.warm_up {
                visited.answers = this.teachers.get(model)?.logits(&visited.visit.images)?;
            }
            Ok(visited)
        })?;
        round.leave_out_failed(&mut self.models);
        if self.models.is_empty() && self.memory.is_empty() {
            return Err(match round.failed.pop() {
                Some((_, error)) => error,
                None => Error::input("no model is left to learn from"),
            });
        }
        // Without visits nothing was learned, but the next round is another one.
        self.generator = generator;
        if round.visits.is_empty() {
            self.generator.end_round()?;
        }
        if number >= self.config.warm_up {
            for visited in &round.visits {
                let (images, answers) = (visited.visit.images.clone(), visited.answers.clone());
                self.memory.push(visited.model, &visited.labels, images, answers)?;
            }
        }
        Ok((number, round))
    }

    /// An episode of a model's newest visit.
    fn episode_of(&self, trainer: &Trainer, model: usize, labels: &[usize]) -> Option<Episode> {
        let classes = distinct(labels);
        let each = labels.len() / classes.len().max(1);
        let shot = trainer.config().shot.min(each / 2);
        if classes.len() < 2 || shot == 0 {
            return None;
        }
        let (mut support, mut query) = (Vec::new(), Vec::new());
        for &label in &classes {
            let (class, count) = self.memory.find(model, label)?;
            let newest: Vec<(usize, usize)> =
                (count.checked_sub(each)?..count).map(|index| (class, index)).collect();
            let (first, rest) = newest.split_at(shot);
            support.extend_from_slice(first);
            query.extend_from_slice(rest);
        }
        let way = classes.len();
        let numbered = |each: usize| (0..way * each).map(|i| i / each).collect();
        support.extend(query);
        Some(Episode {
            images: support,
            support_labels: numbered(shot),
            query_labels: numbered(each - shot),
        })
    }

    /// The outer step on the teachers of a round; `None` where there is nothing to step on.
    fn align(
        &self,
        trainer: &mut Trainer,
        round: &Round,
    ) -> Result<Option<(Option<Iteration>, Option<f64>)>> {
        let mut rng = RngStream::new(self.config.seed, "free", "align", trainer.step());
        let mut episodes: Vec<Episode> = (round.visits.iter())
            .filter_map(|v| self.episode_of(trainer, v.model, &v.labels))
            .collect();
        rng.shuffle(&mut episodes);
        if episodes.is_empty() || self.config.align == Align::Off {
            return Ok(None);
        }
        let all = self.memory.all();
        let asked = Asked { source: &all, teachers: &self.teachers };
        let lesson = Lesson { soft: Some((&asked, self.config.distillation)), mix: None };
        let start: Vec<Tensor> = trainer.model().parameters().map(|p| p.value.clone()).collect();
        let tasks: Vec<TaskGradient> = episodes
            .iter()
            .map(|episode| {
                let mut rng = rng.clone();
                trainer.task_gradient(&start, (&self.memory, episode), &lesson, &mut rng)
            })
            .collect::<Result<_>>()?;
        let cosine = mean_cosine(&tasks)?;
        let gradients = match self.config.align {
            Align::Sequential(inner) => {
                way_back(&start, inner, episodes.len(), &mut |number, at| {
                    if number == 0 {
                        return Ok(tasks[0].gradients.clone());
                    }
                    let own = (&self.memory as &dyn ClassSource, &episodes[number]);
                    Ok(trainer.task_gradient(at, own, &lesson, &mut rng.clone())?.gradients)
                })?
            }
            Align::Joint | Align::Off => mean_gradient(&tasks)?,
        };
        let iteration = trainer.descend(&gradients, &tasks)?;
        Ok(Some((iteration, cosine)))
    }

    /// Trains to the end; `observe` is called after each round and each outer step.
    ///
    /// # Errors
    /// When no model is left and nothing was recovered, when an image cannot be read or written, and when `watch` asks
    /// to stop within a round, which is then done again on resuming.
    pub fn train(
        &mut self,
        trainer: &mut Trainer,
        watch: &Watch<'_>,
        observe: &mut dyn FnMut(&Self, &Trainer, FreeEvent<'_>) -> ControlFlow<()>,
    ) -> Result<StopReason> {
        while trainer.step() < trainer.config().steps {
            if !self.replay.lasts() {
                if !self.models.is_empty() {
                    let (number, mut round) = self.visit(trainer, watch)?;
                    if observe(self, trainer, FreeEvent::Round(number, &mut round)).is_break() {
                        return Ok(StopReason::Interrupted);
                    }
                    if number < self.config.warm_up {
                        continue;
                    }
                    let aligned = self.align(trainer, &round)?;
                    if self.config.keep == Keep::Last {
                        let others = round.visits.len().saturating_sub(1);
                        self.memory.forget_before_newest(others);
                    }
                    if let Some((iteration, cosine)) = aligned {
                        let Some(iteration) = iteration else { return Ok(StopReason::Diverged) };
                        // The step is done: what follows must not do it again.
                        self.replay.begin();
                        let event = FreeEvent::Aligned { iteration, cosine };
                        if observe(self, trainer, event).is_break() {
                            return Ok(StopReason::Interrupted);
                        }
                    }
                }
                self.replay.begin();
            }
            match self.sampler(trainer) {
                Ok(sampler) => {
                    if let Some(reason) = self.replay(trainer, &sampler, observe)? {
                        return Ok(reason);
                    }
                }
                // Too few images yet.
                Err(_) if !self.models.is_empty() && !self.settled() => self.replay.end(),
                Err(error) => return Err(error),
            }
        }
        Ok(StopReason::Done)
    }

    /// More visits add no image: each model had as many turns as visits are kept of it.
    fn settled(&self) -> bool {
        let a_turn = self.models.len().div_ceil(self.config.round.models.max(1)) as u64;
        let kept = self.generator.rounds().saturating_sub(self.config.warm_up);
        kept >= a_turn * (self.memory.visits_kept() + 1)
    }

    fn sampler(&self, trainer: &Trainer) -> Result<EpisodeSampler> {
        let c = trainer.config();
        let source = self.memory.episodes_from(self.config.only_agreed, c.shot + c.query);
        EpisodeSampler::new(&source, c.way, c.shot, c.query, c.cross_model_share)
    }

    /// Episodes from memory until patience is over; a reason where training ends.
    fn replay(
        &mut self,
        trainer: &mut Trainer,
        sampler: &EpisodeSampler,
        observe: &mut dyn FnMut(&Self, &Trainer, FreeEvent<'_>) -> ControlFlow<()>,
    ) -> Result<Option<StopReason>> {
        let least = trainer.config().shot + trainer.config().query;
        let source = self.memory.episodes_from(self.config.only_agreed, least);
        let asked = Asked { source: &source, teachers: &self.teachers };
        let soft = self.config.cross.map(|how| (&asked as &dyn SoftLabels, how));
        while trainer.step() < trainer.config().steps && self.replay.lasts() {
            let Some(iteration) = trainer.update(&source, sampler, &Lesson { soft, mix: None })?
            else {
                return Ok(Some(StopReason::Diverged));
            };
            self.replay.tell(iteration.accuracy, self.models.is_empty());
            if observe(self, trainer, FreeEvent::Replayed(iteration)).is_break() {
                return Ok(Some(StopReason::Interrupted));
            }
        }
        Ok(None)
    }

    /// Writes into a checkpoint what [`Free::restore`] needs; the images are in files of their own.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    pub fn write_to(&self, store: &mut TensorStore) -> Result<()> {
        self.generator.write_to(store)?;
        self.memory.write_to(store);
        self.replay.write_to("free", store);
        let models: Vec<String> = self.models.iter().map(usize::to_string).collect();
        store.words.insert("free.models".into(), models.join(" "));
        Ok(())
    }

    /// Goes on where a checkpoint was made.
    ///
    /// # Errors
    /// When the checkpoint is of another run.
    pub fn restore(&mut self, store: &TensorStore) -> Result<()> {
        self.generator = MetaGenerator::read_from(self.generator.config().clone(), store)?;
        self.memory.restore(store)?;
        self.replay.restore("free", store)?;
        let models = store.word("free.models")?;
        self.models = models.split_whitespace().filter_map(|model| model.parse().ok()).collect();
        Ok(())
    }
}

#[cfg(test)]
#[path = "free_tests.rs"]
mod tests;
