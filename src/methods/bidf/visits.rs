//! Rounds of visits: whom, and what they buy.

use rayon::prelude::*;

use super::{Bidf, BidfRound, BoundaryConfig, Levels, Recovery};
use crate::access::Teacher;
use crate::error::{Error, ErrorKind, Result};
use crate::meta::{Episode, Lesson, Trainer};
use crate::methods::five::distinct;
use crate::methods::generate::{Against, generate};
use crate::methods::parts::{Remembered, Student};
use crate::methods::recover::Watch;
use crate::methods::schedule::{Choice, Known, Plan, plan};
use crate::tensor::{Images, RngStream};

/// Models looked at, at most, to choose those of a round.
const LOOKED_AT: usize = 64;

/// One set of images and what its model answers to them.
struct Bought {
    images: Images,
    /// Logits of all classes, one row an image.
    answers: Vec<f32>,
}

/// A visit and whom it was paid.
struct Visited {
    model: usize,
    labels: Vec<usize>,
    sets: [Bought; 2],
    told: Vec<Vec<candle_core::Tensor>>,
    /// Loss of support and query set at the last step.
    losses: [f64; 2],
}

/// Which images of a model's newest visit an episode asks about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asking {
    /// What is left of the support set.
    Plain,
    /// The query set.
    Boundary,
}

impl Bidf<'_> {
    /// Queries of a visit.
    fn cost(&self, teacher: &dyn Teacher) -> u64 {
        let n = self.config.round.classes.min(teacher.spec().classes)
            * self.config.round.images_per_class;
        let [h, w] = self.config.image_size;
        let steps = match &self.recovery {
            Recovery::Shared(generator) => generator.config().steps,
            Recovery::Fresh(config) => config.steps,
        };
        2 * (steps as u64 * teacher.gradient_cost([n, 3, h, w]) + teacher.logits_cost(n))
    }

    /// Whom to visit, and who can pay no visit any more.
    fn choose(&self, trainer: &Trainer) -> Result<(Plan, Vec<(usize, Error)>)> {
        let mut rng = RngStream::new(self.config.seed, "bidf", "choice", self.rounds);
        let drawn = rng.sample(self.models.len(), self.models.len().min(LOOKED_AT));
        let drawn: Vec<usize> = drawn.into_iter().map(|at| self.models[at]).collect();
        let choice = self.config.choice;
        let visits = |model: &usize| self.visits.get(model).copied().unwrap_or_default();
        // What was begun is looked at, drawn or not.
        let begun = self.models.iter();
        let begun = begun.filter(|model| choice.goes_on(visits(model)) && !drawn.contains(model));
        let mut failed = Vec::new();
        let mut known = Vec::new();
        for model in drawn.iter().chain(begun) {
            match self.teachers.get(*model) {
                Ok(teacher) => known.push(Known {
                    model: *model,
                    visits: visits(model),
                    cost: self.cost(teacher.as_ref()),
                    left: teacher.queries_left(),
                    gap: None,
                }),
                Err(error) => failed.push((*model, error)),
            }
        }
        if matches!(choice, Choice::Knowledge { .. }) {
            let gaps: Vec<Option<f64>> = known
                .par_iter()
                .map(|known| self.gap(trainer, known.model))
                .collect::<Result<_>>()?;
            known.iter_mut().zip(gaps).for_each(|(known, gap)| known.gap = gap);
        }
        let left = self.pool.remaining();
        Ok((plan(known, choice, self.config.round.models, left), failed))
    }

    /// How far the meta-model's answers are from the model's own, on the images of its newest visit; nothing is asked.
    fn gap(&self, trainer: &Trainer, model: usize) -> Result<Option<f64>> {
        let Some(episode) = self.episode(trainer, model, Asking::Boundary) else { return Ok(None) };
        let mut rng = RngStream::new(self.config.seed, "bidf", "gap", self.rounds);
        let remembered = Remembered(&self.memory);
        let lesson =
            Lesson { soft: Some((&remembered, self.config.distillation)), ..Lesson::default() };
        trainer.task_loss((&self.memory, &episode), &lesson, &mut rng).map(Some)
    }

    /// An episode of a model's newest visit: its support set teaches, a part of it or the query set asks.
    pub(super) fn episode(
        &self,
        trainer: &Trainer,
        model: usize,
        asking: Asking,
    ) -> Option<Episode> {
        let labels = self.memory.newest_labels(model)?;
        let classes = distinct(labels);
        let each = labels.len() / classes.len().max(1);
        let shot = trainer.config().shot.min(each / 2);
        if classes.len() < 2 || shot == 0 {
            return None;
        }
        let (mut support, mut query) = (Vec::new(), Vec::new());
        for &label in &classes {
            let (class, count) = self.memory.find(model, label)?;
            let place = |index: usize| (class, index);
            let first = count.checked_sub(2 * each)?;
            support.extend((first..first + shot).map(place));
            match asking {
                Asking::Plain => query.extend((first + shot..first + each).map(place)),
                Asking::Boundary => query.extend((first + each..count).map(place)),
            }
        }
        let way = classes.len();
        let numbered = |n: usize| (0..n).map(|i| i * way / n).collect();
        let (support_labels, query_labels) = (numbered(support.len()), numbered(query.len()));
        support.extend(query);
        Some(Episode { images: support, support_labels, query_labels })
    }

    /// One image a label, bought from `teacher`.
    fn buy(
        &self,
        teacher: &dyn Teacher,
        labels: &[usize],
        student: Option<&Student<'_>>,
        rng: &mut RngStream,
        watch: &Watch<'_>,
    ) -> Result<(Bought, Vec<candle_core::Tensor>, f64)> {
        let (images, told, loss) = match &self.recovery {
            Recovery::Shared(generator) => {
                let visit = generator.visit(teacher, labels, student, rng, watch)?;
                (visit.images, visit.told, visit.last.loss)
            }
            Recovery::Fresh(config) => {
                let weight = self.config.boundary.weight;
                let against = student.map(|student| Against { student, weight });
                let size = self.config.image_size;
                let fresh = RngStream::new(rng.next_u64(), "generate", &teacher.spec().sha, 0);
                let made = generate(teacher, labels, size, config, against, fresh, watch)?;
                (made.images, Vec::new(), made.loss)
            }
        };
        let answers = teacher.logits(&images)?;
        Ok((Bought { images, answers }, told, loss))
    }

    /// A visit: the support set, the learner that it makes, the query set at this one's boundary.
    fn visit(&self, trainer: &Trainer, model: usize, watch: &Watch<'_>) -> Result<Visited> {
        let teacher = self.teachers.get(model)?;
        let mut rng = RngStream::new(self.config.seed, "bidf", &teacher.spec().sha, self.rounds);
        let labels = self.config.round.labels(teacher.spec().classes, &mut rng);
        let (support, told, loss) = self.buy(teacher.as_ref(), &labels, None, &mut rng, watch)?;
        let student = self.student(trainer, &labels, &support, teacher.spec().classes)?;
        let (query, more, harder) =
            self.buy(teacher.as_ref(), &labels, student.as_ref(), &mut rng, watch)?;
        Ok(Visited {
            model,
            labels,
            sets: [support, query],
            told: vec![told, more],
            losses: [loss, harder],
        })
    }

    /// The learner that a support set makes of the meta-model, where query sets are to be hard for it.
    fn student<'t>(
        &self,
        trainer: &'t Trainer,
        labels: &[usize],
        support: &Bought,
        n_classes: usize,
    ) -> Result<Option<Student<'t>>> {
        let BoundaryConfig { weight, distance, after } = self.config.boundary;
        let classes = distinct(labels);
        let shot = trainer.config().shot.min(self.config.round.images_per_class / 2);
        if weight <= 0.0 || trainer.step() < after || classes.len() < 2 || shot == 0 {
            return Ok(None);
        }
        let each = labels.len() / classes.len();
        let shown: Vec<usize> = (0..labels.len()).filter(|i| i % each < shot).collect();
        let slots = shown.iter().map(|i| i / each).collect();
        let mut answers = Vec::with_capacity(shown.len() * classes.len());
        for &i in &shown {
            let row = &support.answers[i * n_classes..(i + 1) * n_classes];
            answers.extend(classes.iter().map(|&class| row[class]));
        }
        let student = Student::new(trainer.model(), support.images.select(&shown), slots, classes)?;
        let student = match self.config.levels {
            Levels::Both => student.taught(answers, self.config.distillation),
            Levels::Outer | Levels::Off => student,
        };
        Ok(Some(student.at(distance)))
    }

    /// A round of visits, side by side; what they made is kept. `None` when nobody can be visited any more.
    pub(super) fn round(
        &mut self,
        trainer: &Trainer,
        watch: &Watch<'_>,
    ) -> Result<Option<BidfRound>> {
        let (plan, unopened) = self.choose(trainer)?;
        self.exhausted.extend(&plan.exhausted);
        let mut round = BidfRound { number: self.rounds, failed: unopened, ..BidfRound::default() };
        let this = &*self;
        let one = |&model: &usize| this.visit(trainer, model, watch);
        let results: Vec<Result<Visited>> =
            rayon::scope(|_| plan.chosen.par_iter().with_max_len(1).map(one).collect());
        let mut visits = Vec::new();
        for (&model, result) in plan.chosen.iter().zip(results) {
            match result {
                Ok(visited) => visits.push(visited),
                Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
                // Sending something twice cost more than was planned.
                Err(error) if error.kind() == ErrorKind::Budget => self.exhausted.push(model),
                Err(error) => round.failed.push((model, error)),
            }
        }
        let gone = |model: &usize| {
            self.exhausted.contains(model) || round.failed.iter().any(|(lost, _)| lost == model)
        };
        self.models.retain(|model| !gone(model));
        if let Recovery::Shared(generator) = &mut self.recovery {
            let told: Vec<&[candle_core::Tensor]> =
                visits.iter().flat_map(|v| v.told.iter().map(Vec::as_slice)).collect();
            if !told.is_empty() {
                generator.learn(&told)?;
            }
        }
        self.rounds += 1;
        let n = visits.len().max(1) as f64;
        for Visited { model, labels, sets, losses, .. } in visits {
            for Bought { images, answers } in sets {
                self.memory.push(model, &labels, images, answers)?;
            }
            *self.visits.entry(model).or_default() += 1;
            round.models.push(model);
            round.losses.iter_mut().zip(losses).for_each(|(sum, loss)| *sum += loss / n);
        }
        if round.models.is_empty() && self.models.is_empty() && self.memory.is_empty() {
            return Err(match round.failed.pop() {
                Some((_, error)) => error,
                None => Error::budget("the query budget covers no visit to any model")
                    .hint("raise `--budget` or `query_budget`, or ask for fewer images, steps or directions (`five`, `recover.black_box`)"),
            });
        }
        let over = round.models.is_empty() && round.failed.is_empty() && self.models.is_empty();
        Ok((!over).then_some(round))
    }
}
