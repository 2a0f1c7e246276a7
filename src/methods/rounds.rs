//! How the meta-generator meets the zoo: rounds of visits to some of its models.

use std::sync::Arc;

use super::five::{MetaGenerator, Visit};
use super::parts::{OpenTeachers, Student};
use super::recover::Watch;
use crate::access::Teacher;
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::RngStream;

/// What a round is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoundConfig {
    /// Seed of every draw.
    pub seed: u64,
    /// Models visited, side by side.
    pub models: usize,
    /// Images a class.
    pub images_per_class: usize,
    /// Most classes of a model, drawn anew each time.
    pub classes: usize,
}

/// A visit and whom it was paid.
pub struct Visited {
    /// Model, by number.
    pub model: usize,
    /// The wanted class of each image.
    pub labels: Vec<usize>,
    /// The model.
    pub teacher: Arc<dyn Teacher>,
    /// What came of it.
    pub visit: Visit,
}

/// The learner that images of a model and of these labels are to be hard for, where there is one.
pub type StudentOf<'a, 't> = dyn Fn(usize, &[usize]) -> Result<Option<Student<'t>>> + Sync + 'a;

/// What came of a round.
#[derive(Default)]
pub struct Round {
    /// Its visits, in the order drawn.
    pub visits: Vec<Visited>,
    /// Models that failed, with the reason.
    pub failed: Vec<(usize, Error)>,
}

impl Round {
    /// Means over its visits of cross-entropy and statistics at the last step.
    pub fn losses(&self) -> [f64; 2] {
        let n = self.visits.len().max(1) as f64;
        let mean = |value: fn(&Visited) -> f64| self.visits.iter().map(value).sum::<f64>() / n;
        [mean(|v| v.visit.last.loss), mean(|v| v.visit.last.statistics)]
    }
}

/// Whom to visit in round `number`, of `models`, and for which classes: the same for the same seed, whoever asks.
pub fn draw(config: &RoundConfig, number: u64, models: &[usize]) -> Vec<usize> {
    let mut rng = RngStream::new(config.seed, "five", "round", number);
    rng.sample(models.len(), config.models).into_iter().map(|at| models[at]).collect()
}

impl RoundConfig {
    /// Labels of a visit to a model of `classes`, class after class.
    pub fn labels(&self, classes: usize, rng: &mut RngStream) -> Vec<usize> {
        let mut chosen = rng.sample(classes, self.classes);
        chosen.sort_unstable();
        let each = self.images_per_class;
        chosen.into_iter().flat_map(|class| std::iter::repeat_n(class, each)).collect()
    }
}

impl MetaGenerator {
    /// One round: visits `chosen` side by side and learns from those that succeed. `visit` pays one.
    ///
    /// # Errors
    /// When an interrupt asks to stop, or the generator would diverge.
    pub fn round(
        &mut self,
        chosen: &[usize],
        visit: impl Fn(&Self, usize) -> Result<Visited> + Sync,
    ) -> Result<Round> {
        let this = &*self;
        let results = this.visit_all(chosen, |&model| visit(this, model));
        let mut round = Round::default();
        for (&model, result) in chosen.iter().zip(results) {
            match result {
                Ok(visited) => round.visits.push(visited),
                Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
                Err(error) => round.failed.push((model, error)),
            }
        }
        let told: Vec<_> = round.visits.iter().map(|v| v.visit.told.as_slice()).collect();
        if !told.is_empty() {
            self.learn(&told)?;
        }
        Ok(round)
    }

    /// One visit of round `number`: classes and latents follow from seed, model and round. `student` gives the learner of
    /// a model's classes that the images are to be hard for, where there is one.
    ///
    /// # Errors
    /// As [`MetaGenerator::visit`], and when the model cannot be opened.
    pub fn visit_of_round<'t>(
        &self,
        (config, number): (&RoundConfig, u64),
        model: usize,
        teachers: &OpenTeachers<'_>,
        student: &StudentOf<'_, 't>,
        watch: &Watch<'_>,
    ) -> Result<Visited> {
        let teacher = teachers.get(model)?;
        let mut rng = RngStream::new(config.seed, "five", &teacher.spec().sha, number);
        let labels = config.labels(teacher.spec().classes, &mut rng);
        let student = student(model, &labels)?;
        let visit = self.visit(teacher.as_ref(), &labels, student.as_ref(), &mut rng, watch)?;
        Ok(Visited { model, labels, teacher, visit })
    }
}
