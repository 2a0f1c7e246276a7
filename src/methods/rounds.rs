//! How the meta-generator meets the zoo: rounds of visits to some of its models.

use rayon::prelude::*;

use super::five::{MetaGenerator, Visit};
use super::parts::{OpenTeachers, Student};
use super::recover::Watch;
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
    /// What came of it.
    pub visit: Visit,
    /// What the model answers to the images (logits, one row an image), where it was asked.
    pub answers: Vec<f32>,
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
    /// Takes out of `models` those that failed.
    pub fn leave_out_failed(&self, models: &mut Vec<usize>) {
        models.retain(|own| self.failed.iter().all(|(gone, _)| gone != own));
    }

    /// Means over its visits of cross-entropy and statistics at the last step.
    pub fn losses(&self) -> [f64; 2] {
        let n = self.visits.len().max(1) as f64;
        let mean = |value: fn(&Visited) -> f64| self.visits.iter().map(value).sum::<f64>() / n;
        [mean(|v| v.visit.last.loss), mean(|v| v.visit.last.statistics)]
    }
}

/// Whom to visit in round `number`, of `models`: in random order, and nobody again before all had their turn. The last
/// round of a turn may be smaller.
pub fn draw(config: &RoundConfig, number: u64, models: &[usize]) -> Vec<usize> {
    let size = config.models.clamp(1, models.len().max(1));
    let rounds = models.len().div_ceil(size).max(1) as u64;
    let mut order = models.to_vec();
    RngStream::new(config.seed, "five", "turn", number / rounds).shuffle(&mut order);
    order.into_iter().skip((number % rounds) as usize * size).take(size).collect()
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
        let one = |&model: &usize| visit(this, model);
        let results: Vec<Result<Visited>> =
            rayon::scope(|_| chosen.par_iter().with_max_len(1).map(one).collect());
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
        Ok(Visited { model, labels, visit, answers: Vec::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_visited_again_before_all_were() {
        let config = RoundConfig { seed: 1, models: 3, images_per_class: 1, classes: 1 };
        let models = [4, 7, 8, 9, 20];
        let turn = |first: u64| -> Vec<usize> {
            (first..first + 2).flat_map(|number| draw(&config, number, &models)).collect()
        };
        for first in [0, 2, 10] {
            assert_eq!(draw(&config, first, &models).len(), 3);
            let mut all = turn(first);
            all.sort_unstable();
            assert_eq!(all, models);
        }
        assert_ne!(turn(0), turn(2));
        assert_eq!(draw(&config, 5, &[6]), [6]);
        assert!(draw(&config, 5, &[]).is_empty());
    }
}
