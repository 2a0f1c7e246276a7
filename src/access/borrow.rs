//! Statistics on loan: a teacher that holds none, held to those of other models of the zoo.
//!
//! A network with layer normalisation, a transformer or a model that can only be queried says nothing of the data it was
//! trained on beyond its scores. Its neighbours in the zoo do: at each step one of them, drawn at random, looks at the
//! same images, and the distance of what its BatchNormalization layers see to their running statistics joins the
//! objective. Over many steps no single lender's classes are imposed, but what images of the zoo look like is.

use std::sync::Arc;

use super::teacher::{ImageGradient, LogitsLoss, Objective, Teacher};
use super::white::WhiteTeacher;
use crate::error::Result;
use crate::tensor::{Images, RngStream};
use crate::zoo::ModelSpec;

/// A teacher and the models whose statistics it borrows.
pub struct Borrowing {
    own: Box<dyn Teacher>,
    lenders: Vec<Arc<WhiteTeacher>>,
    factor: f32,
}

impl Borrowing {
    /// `own` with the statistics of `lenders`, which weigh `factor` times what own ones would; `own` as it is where
    /// it has statistics or nobody lends.
    pub fn over(
        own: Box<dyn Teacher>,
        lenders: &[Arc<WhiteTeacher>],
        factor: f32,
    ) -> Box<dyn Teacher> {
        let lenders: Vec<_> =
            lenders.iter().filter(|lender| lender.statistics_layers() > 0).cloned().collect();
        if own.statistics_layers() > 0 || lenders.is_empty() {
            return own;
        }
        Box::new(Self { own, lenders, factor })
    }
}

/// No loss at all: the lender's own opinion of the images does not count.
struct Silent;

impl LogitsLoss for Silent {
    fn value(&self, _index: usize, _logits: &[f32]) -> f64 {
        0.0
    }

    fn gradient(&self, _index: usize, _logits: &[f32], gradient: &mut [f32]) {
        gradient.fill(0.0);
    }
}

impl Teacher for Borrowing {
    fn spec(&self) -> &ModelSpec {
        self.own.spec()
    }

    fn logits(&self, images: &Images) -> Result<Vec<f32>> {
        self.own.logits(images)
    }

    fn image_gradient(
        &self,
        images: &Images,
        objective: &Objective<'_>,
        rng: &mut RngStream,
    ) -> Result<ImageGradient> {
        let own = Objective { logits: objective.logits, statistics_weight: 0.0 };
        let mut found = self.own.image_gradient(images, &own, rng)?;
        let lender = &self.lenders[rng.below(self.lenders.len())];
        let layers = lender.statistics_layers() as f32;
        let statistics_weight = objective.statistics_weight * self.factor / layers;
        let borrowed = Objective { logits: &Silent, statistics_weight };
        let lent = lender.image_gradient(images, &borrowed, rng)?;
        for (sum, part) in found.gradient.data_mut().iter_mut().zip(lent.gradient.data()) {
            *sum += part;
        }
        found.statistics_loss = lent.statistics_loss / f64::from(layers);
        Ok(found)
    }

    /// One: what is borrowed is a mean over the lender's layers.
    fn statistics_layers(&self) -> usize {
        1
    }

    fn queries(&self) -> u64 {
        self.own.queries()
    }
}
