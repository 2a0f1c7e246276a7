//! BiDf-MKD: meta-learning from models that can only be asked (BiDf-MKD sec. 3; methods.md 3).
//!
//! A visit to a model buys two sets of images by gradients estimated from queries: a support set, and a query set at the
//! boundary of what the learner knows once the support has taught it, where its answers differ from the model's. The
//! meta-model steps on both levels at once: the inner loop distils the model's answers to the support set, the outer loss
//! its answers to the query set. Between rounds of visits it learns from tasks that recombine the classes of all models
//! in its memory, which costs no query.
//!
//! A visit's cost is known before it is paid, so a budget is divided before anybody is asked and results do not depend on
//! who was faster.

mod visits;

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use rayon::prelude::*;

use super::five::MetaGenerator;
use super::generate::GenerateConfig;
use super::parts::{Distance, Memory, OpenTeachers, Patience, Remembered, RememberedOf};
use super::recover::{RecoverStop, Watch};
use super::rounds::RoundConfig;
use super::schedule::Choice;
use crate::access::budget::QueryBudget;
use crate::error::{Error, Result};
use crate::meta::{
    Distillation, EpisodeSampler, Iteration, Lesson, Mix, MixSpace, SoftLabels, StopReason,
    TaskGradient, Trainer, mean_gradient,
};
use crate::tensor::{RngStream, TensorStore};
use visits::Asking;

/// What distils a model's answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Levels {
    /// Inner loop and outer loss (the paper).
    Both,
    /// The outer loss; the inner loop learns the wanted classes.
    Outer,
    /// Neither: images go to the memory alone.
    Off,
}

/// What the images of a visit are made by.
#[derive(Debug, Clone)]
pub enum Recovery {
    /// One generator for all models, adapted in a few steps.
    Shared(Box<MetaGenerator>),
    /// A generator drawn anew for each set (the paper).
    Fresh(GenerateConfig),
}

/// Query sets at the boundary.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BoundaryConfig {
    /// Weight of the term; 0 makes query sets as support sets are made.
    pub weight: f64,
    /// What it holds apart.
    pub distance: Distance,
    /// Updates of the meta-model before it counts.
    pub after: u64,
}

/// Learning from the memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReplayConfig {
    /// Updates without a better accuracy that end it, and the next round of visits follows.
    pub patience: u64,
    /// Images that their own model puts into another class are left out.
    pub only_agreed: bool,
    /// The models' own answers in tasks of one model, beside the wanted classes.
    pub soft: Option<Distillation>,
    /// Interpolation of two tasks, and its alpha.
    pub mix: Option<(MixSpace, f64)>,
}

/// How BiDf-MKD trains.
#[derive(Debug, Clone, PartialEq)]
pub struct BidfConfig {
    /// Seed of every draw.
    pub seed: u64,
    /// `[height, width]` of the images.
    pub image_size: [usize; 2],
    /// A round of visits.
    pub round: RoundConfig,
    /// Whom to visit.
    pub choice: Choice,
    /// What distils.
    pub levels: Levels,
    /// Between answers, on both levels.
    pub distillation: Distillation,
    /// The query sets.
    pub boundary: BoundaryConfig,
    /// Between rounds; `None` goes from round to round.
    pub replay: Option<ReplayConfig>,
}

/// What came of a round of visits.
#[derive(Default)]
pub struct BidfRound {
    /// Its number, from 0.
    pub number: u64,
    /// Models visited.
    pub models: Vec<usize>,
    /// Mean losses at the last step of support and query sets.
    pub losses: [f64; 2],
    /// Models that failed, with the reason; they are visited no more.
    pub failed: Vec<(usize, Error)>,
}

/// What happened.
pub enum BidfEvent<'a> {
    /// A round of visits.
    Round(&'a mut BidfRound),
    /// An outer step on its models.
    Distilled {
        /// The step; its loss is that of the query sets at the boundary.
        iteration: Iteration,
        /// The outer loss of images that were made without regard to the learner: what is left to learn from without the
        /// boundary ("knowledge vanish").
        plain: Option<f64>,
    },
    /// An update on tasks from memory.
    Replayed(Iteration),
}

/// The state between steps.
pub struct Bidf<'a> {
    config: BidfConfig,
    recovery: Recovery,
    teachers: OpenTeachers<'a>,
    memory: Memory,
    /// Models still visited.
    models: Vec<usize>,
    /// Models whose budget covers no visit any more.
    exhausted: Vec<usize>,
    visits: BTreeMap<usize, u64>,
    rounds: u64,
    replay: Patience,
    /// What all models may be asked together.
    pool: &'a QueryBudget,
}

impl<'a> Bidf<'a> {
    /// Starts with an empty `memory`; `models` are visited, which `teachers` opens and whose queries are taken
    /// from `pool` too.
    pub fn new(
        config: BidfConfig,
        recovery: Recovery,
        teachers: OpenTeachers<'a>,
        memory: Memory,
        models: Vec<usize>,
        pool: &'a QueryBudget,
    ) -> Self {
        let replay = Patience::new(config.replay.map_or(1, |replay| replay.patience));
        Self {
            config,
            recovery,
            teachers,
            memory,
            models,
            exhausted: Vec::new(),
            visits: BTreeMap::new(),
            rounds: 0,
            replay,
            pool,
        }
    }

    /// The images as they are.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// How the visits to a model ended, or stand.
    pub fn ended(&self, model: usize) -> RecoverStop {
        match self.visits.contains_key(&model) {
            _ if self.exhausted.contains(&model) => RecoverStop::BudgetSpent,
            true => RecoverStop::Done,
            false => RecoverStop::NotVisited,
        }
    }

    /// The outer step on the models of a round; `None` where there is nothing to step on.
    fn distil(
        &self,
        trainer: &mut Trainer,
        models: &[usize],
    ) -> Result<Option<(Option<Iteration>, Option<f64>)>> {
        let remembered = Remembered(&self.memory);
        let all = self.memory.all();
        let outer = RememberedOf(&all);
        let soft: &dyn SoftLabels = match self.config.levels {
            Levels::Both => &remembered,
            Levels::Outer => &outer,
            Levels::Off => return Ok(None),
        };
        let lesson = Lesson { soft: Some((soft, self.config.distillation)), ..Lesson::default() };
        let start: Vec<_> = trainer.model().parameters().map(|p| p.value.clone()).collect();
        let seed = self.config.seed;
        let now: &Trainer = trainer;
        let one = |&model: &usize| -> Result<Option<(TaskGradient, Option<f64>)>> {
            let Some(episode) = self.episode(now, model, Asking::Boundary) else {
                return Ok(None);
            };
            let rng = RngStream::new(seed, "bidf", "distil", now.step());
            let source = &self.memory;
            let (task, plain) = ((source as _, &episode), self.episode(now, model, Asking::Plain));
            let gradient = now.task_gradient(&start, task, &lesson, &mut rng.clone())?;
            let plain = match plain {
                Some(plain) => Some(now.task_loss((source, &plain), &lesson, &mut rng.clone())?),
                None => None,
            };
            Ok(Some((gradient, plain)))
        };
        let found: Vec<Option<(TaskGradient, Option<f64>)>> =
            rayon::scope(|_| models.par_iter().with_max_len(1).map(one).collect::<Result<_>>())?;
        let (tasks, plain): (Vec<TaskGradient>, Vec<Option<f64>>) =
            found.into_iter().flatten().unzip();
        if tasks.is_empty() {
            return Ok(None);
        }
        let plain: Option<Vec<f64>> = plain.into_iter().collect();
        let plain = plain.map(|all| all.iter().sum::<f64>() / all.len() as f64);
        let gradients = mean_gradient(&tasks)?;
        Ok(Some((trainer.descend(&gradients, &tasks)?, plain)))
    }

    /// Trains to the end; `observe` is called after each round and each update.
    ///
    /// # Errors
    /// When nobody can be visited and nothing was bought, when an image cannot be read or written, and when `watch` asks
    /// to stop within a round, which is then done again on resuming.
    pub fn train(
        &mut self,
        trainer: &mut Trainer,
        watch: &Watch<'_>,
        observe: &mut dyn FnMut(&Self, &Trainer, BidfEvent<'_>) -> ControlFlow<()>,
    ) -> Result<StopReason> {
        while trainer.step() < trainer.config().steps {
            if !self.replay.lasts() && !self.models.is_empty() {
                let Some(mut round) = self.round(trainer, watch)? else { continue };
                let distilled = self.distil(trainer, &round.models)?;
                if self.config.replay.is_some() {
                    // The step is done: what follows must not do it again.
                    self.replay.begin();
                }
                if observe(self, trainer, BidfEvent::Round(&mut round)).is_break() {
                    return Ok(StopReason::Interrupted);
                }
                if let Some((iteration, plain)) = distilled {
                    let Some(iteration) = iteration else { return Ok(StopReason::Diverged) };
                    let event = BidfEvent::Distilled { iteration, plain };
                    if observe(self, trainer, event).is_break() {
                        return Ok(StopReason::Interrupted);
                    }
                }
            }
            let Some(replay) = self.config.replay else {
                if self.models.is_empty() {
                    return Ok(StopReason::BudgetSpent);
                }
                continue;
            };
            let c = trainer.config();
            let (share, least) = (c.cross_model_share, c.shot + c.query);
            let source = self.memory.episodes_from(replay.only_agreed, least);
            match EpisodeSampler::new(&source, c.way, c.shot, c.query, share) {
                Ok(sampler) => {
                    if !self.replay.lasts() {
                        self.replay.begin();
                    }
                    if let Some(reason) = self.recall(trainer, &sampler, replay, observe)? {
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

    /// More visits add no image: each model has as many in memory as are kept of it.
    fn settled(&self) -> bool {
        let full =
            |model| self.visits.get(model).is_some_and(|n| 2 * n >= self.memory.visits_kept());
        self.models.iter().all(full)
    }

    /// Tasks from memory until patience is over; a reason where training ends.
    fn recall(
        &mut self,
        trainer: &mut Trainer,
        sampler: &EpisodeSampler,
        config: ReplayConfig,
        observe: &mut dyn FnMut(&Self, &Trainer, BidfEvent<'_>) -> ControlFlow<()>,
    ) -> Result<Option<StopReason>> {
        let least = trainer.config().shot + trainer.config().query;
        let source = self.memory.episodes_from(config.only_agreed, least);
        let remembered = RememberedOf(&source);
        let lesson = Lesson {
            soft: config.soft.map(|how| (&remembered as &dyn SoftLabels, how)),
            mix: config.mix.map(|(space, alpha)| Mix { sampler, space, alpha }),
        };
        while trainer.step() < trainer.config().steps && self.replay.lasts() {
            let Some(iteration) = trainer.update(&source, sampler, &lesson)? else {
                return Ok(Some(StopReason::Diverged));
            };
            self.replay.tell(iteration.accuracy, self.models.is_empty());
            if observe(self, trainer, BidfEvent::Replayed(iteration)).is_break() {
                return Ok(Some(StopReason::Interrupted));
            }
        }
        Ok(None)
    }

    /// Writes into a checkpoint what [`Bidf::restore`] needs; the images are in files of their own.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    pub fn write_to(&self, store: &mut TensorStore) -> Result<()> {
        if let Recovery::Shared(generator) = &self.recovery {
            generator.write_to(store)?;
        }
        self.memory.write_to(store);
        self.replay.write_to("bidf", store);
        let words =
            |list: &[usize]| list.iter().map(usize::to_string).collect::<Vec<_>>().join(" ");
        let visits: Vec<String> =
            self.visits.iter().map(|(model, n)| format!("{model}:{n}")).collect();
        for (name, value) in [
            ("bidf.models", words(&self.models)),
            ("bidf.exhausted", words(&self.exhausted)),
            ("bidf.visits", visits.join(" ")),
            ("bidf.rounds", self.rounds.to_string()),
        ] {
            store.words.insert(name.into(), value);
        }
        Ok(())
    }

    /// Goes on where a checkpoint was made.
    ///
    /// # Errors
    /// When the checkpoint is of another run.
    pub fn restore(&mut self, store: &TensorStore) -> Result<()> {
        if let Recovery::Shared(generator) = &mut self.recovery {
            **generator = MetaGenerator::read_from(generator.config().clone(), store)?;
        }
        self.memory.restore(store)?;
        self.replay.restore("bidf", store)?;
        let broken = || Error::input("the checkpoint's list of visits is damaged");
        let list = |name: &str| -> Result<Vec<usize>> {
            let words = store.word(name)?.split_whitespace();
            words.map(|word| word.parse().map_err(|_| broken())).collect()
        };
        (self.models, self.exhausted) = (list("bidf.models")?, list("bidf.exhausted")?);
        let pair = |word: &str| -> Option<(usize, u64)> {
            let (model, visits) = word.split_once(':')?;
            Some((model.parse().ok()?, visits.parse().ok()?))
        };
        let words = store.word("bidf.visits")?.split_whitespace();
        self.visits = words.map(|word| pair(word).ok_or_else(broken)).collect::<Result<_>>()?;
        self.rounds = store.number("bidf.rounds")?;
        Ok(())
    }
}
