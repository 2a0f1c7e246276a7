//! Drawings as classes: what a model calls by one of its classes, and is sure of, counts as an image of it.

use std::sync::Arc;

use super::episodes::{ClassSource, EpisodeSampler};
use super::pretrain::Answers;
use super::train::Trainer;
use crate::error::Result;
use crate::tensor::losses::softmax;
use crate::tensor::scenes::Drawings;

/// Probability from which on a model is sure.
const SURE: f32 = 0.5;

/// The classes of many models, each with the drawings that its model takes for it.
#[derive(Debug, Clone)]
pub struct DrawnClasses {
    drawings: Drawings,
    /// Number of a model, and of its drawings.
    classes: Vec<(usize, Vec<u32>)>,
}

impl DrawnClasses {
    /// `answers` are what each model says of the first of `drawings`.
    pub fn new(drawings: Drawings, answers: &[Answers]) -> Self {
        let mut classes = Vec::new();
        for (model, own) in answers.iter().enumerate() {
            let mut of_model = vec![(model, Vec::new()); own.classes];
            for (number, row) in own.logits.chunks_exact(own.classes.max(1)).enumerate() {
                let sure = softmax(row).into_iter().position(|p| p > SURE);
                if let Some(class) = sure {
                    of_model[class].1.push(number as u32);
                }
            }
            classes.extend(of_model);
        }
        Self { drawings, classes }
    }
}

impl ClassSource for DrawnClasses {
    fn n_classes(&self) -> usize {
        self.classes.len()
    }

    fn images_in(&self, class: usize) -> usize {
        self.classes[class].1.len()
    }

    fn source_model(&self, class: usize) -> usize {
        self.classes[class].0
    }

    fn image_size(&self) -> [usize; 2] {
        self.drawings.size
    }

    fn read(&self, class: usize, index: usize, pixels: &mut [f32]) -> Result<()> {
        self.drawings.draw(u64::from(self.classes[class].1[index]), pixels);
        Ok(())
    }
}

/// Episodes beside those of a method.
#[derive(Debug)]
pub(super) struct Beside {
    pub(super) source: DrawnClasses,
    pub(super) sampler: EpisodeSampler,
    /// Share of all episodes.
    pub(super) share: f64,
}

impl Trainer {
    /// Draws a `share` of the episodes of [`Trainer::update`], 0 to 1, from `source` instead. It is no part of what is
    /// saved: a trainer that was read goes on without.
    ///
    /// # Errors
    /// When fewer than `way` classes have enough images.
    pub fn also_from(&mut self, source: DrawnClasses, share: f64) -> Result<()> {
        let c = self.config();
        let sampler = EpisodeSampler::new(&source, c.way, c.shot, c.query, c.cross_model_share)?;
        self.beside = Some(Arc::new(Beside { source, sampler, share }));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drawing_is_of_the_class_that_its_model_is_sure_of() {
        let answers = [
            Answers { classes: 2, logits: vec![3.0, 0.0, 0.0, 0.0, 0.0, 3.0] },
            Answers { classes: 3, logits: vec![0.0, 0.0, 9.0] },
        ];
        let drawings = Drawings { seed: 5, size: [8, 8] };
        let source = DrawnClasses::new(drawings, &answers);
        let counts: Vec<usize> = (0..5).map(|class| source.images_in(class)).collect();
        assert_eq!((source.n_classes(), counts), (5, vec![1, 1, 0, 0, 1]));
        assert_eq!([0, 1, 4].map(|class| source.source_model(class)), [0, 0, 1]);
        let mut pixels = vec![0.0; 192];
        source.read(1, 0, &mut pixels).unwrap();
        assert_eq!(pixels, drawings.images(2..3).data());
    }
}
