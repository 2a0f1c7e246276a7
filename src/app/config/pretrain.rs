//! Settings of what happens before meta-training.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Multi-teacher distillation on drawings, where `meta.start` is `distilled`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PretrainConfig {
    /// Drawings that every model answers, a query each where it is asked (more where its batches are filled up).
    pub images: usize,
    /// Most that they may take of the budget of a model that is asked, 0 to 1.
    pub query_share: f64,
    /// Share of the episodes drawn from recovered images that are drawn from drawings instead, each of the class that its
    /// model is sure of, 0 to 1; the steps of `free` and `bidf-mkd` on a round's visits are no such episodes.
    pub episode_share: f64,
    /// Steps of distillation.
    pub steps: u64,
    /// Images a step.
    pub batch: usize,
    /// Adam's learning rate, along half a cosine.
    pub learning_rate: f64,
    /// Of the models' answers and the learner's.
    pub temperature: f64,
}

impl PretrainConfig {
    pub(super) fn check(&self) -> Result<()> {
        let counts = [("images", self.images), ("batch", self.batch)];
        if let Some((name, _)) = counts.iter().find(|(_, value)| *value == 0) {
            return Err(Error::input(format!("setting must not be 0: `pretrain.{name}`")));
        }
        if !(0.0..=1.0).contains(&self.episode_share) {
            let text =
                format!("`pretrain.episode_share` must be from 0 to 1: `{}`", self.episode_share);
            return Err(Error::input(text));
        }
        let within = |value: f64, least: f64, most: f64| value > least && value <= most;
        let positive = [
            ("query_share", self.query_share, 1.0),
            ("learning_rate", self.learning_rate, f64::MAX),
            ("temperature", self.temperature, f64::MAX),
        ];
        match positive.iter().find(|(_, value, most)| !within(*value, 0.0, *most)) {
            Some((name, value, most)) => {
                let bound = if *most == 1.0 { " and at most 1" } else { "" };
                Err(Error::input(format!("`pretrain.{name}` must be above 0{bound}: `{value}`")))
            }
            None => Ok(()),
        }
    }
}

impl Default for PretrainConfig {
    fn default() -> Self {
        Self {
            images: 15_000,
            query_share: 0.8,
            episode_share: 0.5,
            steps: 3000,
            batch: 128,
            learning_rate: 2e-3,
            temperature: 1.0,
        }
    }
}
