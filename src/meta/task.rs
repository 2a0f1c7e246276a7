//! A task as a learner sees it: labelled images, what teachers say of them, a second task to be mixed in.

use std::ops::Range;

use super::distill::SoftSupport;
use crate::error::Result;
use crate::tensor::tape::Var;

/// What a task looks like to the learner.
#[derive(Debug, Clone, Copy)]
pub struct Task<'a> {
    /// Support images, then query images: `[n, 3, H, W]`.
    pub images: &'a Var,
    /// Labels of the support images, in `0..way`.
    pub labels: &'a [usize],
    /// Number of classes.
    pub way: usize,
    /// What teachers answer on the support images; without it the labels alone.
    pub soft: Option<SoftSupport<'a>>,
    /// A second task of the same form, mixed into this one.
    pub partner: Option<Partner<'a>>,
}

/// Interpolation of two tasks in feature space (Trustworthy DFML and MLTI, methods.md 5): embedding i of the task is its
/// own times `share`, the partner's image i's for the rest.
#[derive(Debug, Clone, Copy)]
pub struct Partner<'a> {
    /// As [`Task::images`].
    pub images: &'a Var,
    /// Of the task itself, 0 to 1.
    pub share: f64,
}

impl<'a> Task<'a> {
    /// A task of labelled images and nothing else.
    pub fn new(images: &'a Var, labels: &'a [usize], way: usize) -> Self {
        Self { images, labels, way, soft: None, partner: None }
    }

    pub(super) fn wanted(&self) -> Wanted<'a> {
        Wanted { labels: self.labels, soft: self.soft }
    }

    pub(super) fn support(&self) -> Range<usize> {
        0..self.labels.len()
    }

    pub(super) fn query(&self) -> Range<usize> {
        self.labels.len()..self.images.dims()[0]
    }
}

/// What the inner loop learns of the support images.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    labels: &'a [usize],
    soft: Option<SoftSupport<'a>>,
}

impl<'a> From<&'a [usize]> for Wanted<'a> {
    fn from(labels: &'a [usize]) -> Self {
        Self { labels, soft: None }
    }
}

impl Wanted<'_> {
    pub(super) fn loss(&self, logits: &Var) -> Result<Var> {
        match self.soft {
            Some(soft) => soft.how.loss(logits, self.labels, soft.logits),
            None => logits.cross_entropy(self.labels),
        }
    }
}
