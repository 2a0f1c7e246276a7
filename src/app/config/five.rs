//! Settings of the meta-generator.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Recovery in a few steps by one generator for all models (FIVE, FREE sec. 3.2), where `recover.by` is `five`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FiveConfig {
    /// Rounds in which the generator learns from visits to models before images are kept.
    pub rounds: u64,
    /// Models visited in a round, side by side.
    pub models: usize,
    /// Images a class in such a visit.
    pub images_per_class: usize,
    /// Most classes in it, drawn anew each time.
    pub classes: usize,
    /// Steps of a visit.
    pub steps: usize,
    /// Adam's learning rate of the generator's weights in a visit.
    pub learning_rate: f64,
    /// And of the latents.
    pub latent_learning_rate: f64,
    /// Spread of an image's own latent about that of its class; null for latents without classes.
    pub class_spread: Option<f32>,
    /// Weight of the normalisation statistics, shared among a model's layers.
    pub statistics_weight: f32,
    /// Weight of the boundary term: images that the meta-model answers otherwise than their model. For methods `free` and `bidf-mkd`.
    pub boundary_weight: f64,
    /// Largest random shift, pixels.
    pub jitter: usize,
    /// What a visit tells the generator.
    pub meta_gradient: MetaGradientName,
    /// Adam's learning rate of the generator from round to round.
    pub meta_learning_rate: f64,
    /// Its moments from round to round.
    pub meta_optimizer: MetaOptimizerName,
    /// Rounds after which the generator is drawn anew: its images differ more, and it has learned less; null never does.
    pub redraw: Option<u64>,
    /// Values of a latent.
    pub latent: usize,
    /// Feature maps of the generator's last layers (64 in the paper).
    pub features: usize,
}

/// What a visit tells the meta-generator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MetaGradientName {
    /// The gradient of its last step (FOMAML; FREE).
    LastStep,
    /// The sum over its steps.
    AllSteps,
    /// Where its weights went (Reptile).
    Reptile,
}

/// Adam's moments of the meta-generator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MetaOptimizerName {
    /// They go on from round to round.
    Persistent,
    /// New in each round, as in the published program: each step is then of the rate's size.
    Fresh,
}

impl FiveConfig {
    pub(super) fn check(&self) -> Result<()> {
        let counts = [
            ("models", self.models),
            ("images_per_class", self.images_per_class),
            ("classes", self.classes),
            ("steps", self.steps),
            ("latent", self.latent),
            ("features", self.features),
            ("redraw", self.redraw.map_or(1, |rounds| rounds as usize)),
        ];
        if let Some((name, _)) = counts.iter().find(|(_, value)| *value == 0) {
            return Err(Error::input(format!("setting must not be 0: `five.{name}`")));
        }
        let rates = [
            ("learning_rate", self.learning_rate),
            ("latent_learning_rate", self.latent_learning_rate),
            ("meta_learning_rate", self.meta_learning_rate),
            ("statistics_weight", self.statistics_weight.into()),
            ("class_spread", self.class_spread.unwrap_or_default().into()),
            ("boundary_weight", self.boundary_weight),
        ];
        match rates.iter().find(|(_, value)| !(value.is_finite() && *value >= 0.0)) {
            Some((name, value)) => Err(Error::input(format!(
                "`five.{name}` must be 0 or a positive number: `{value}`"
            ))),
            None => Ok(()),
        }
    }
}

impl Default for FiveConfig {
    fn default() -> Self {
        Self {
            rounds: 20,
            models: 4,
            images_per_class: 8,
            classes: 5,
            steps: 5,
            learning_rate: 1e-3,
            latent_learning_rate: 0.1,
            class_spread: None,
            statistics_weight: 1.0,
            boundary_weight: 1.0,
            jitter: 2,
            meta_gradient: MetaGradientName::LastStep,
            meta_learning_rate: 2e-3,
            meta_optimizer: MetaOptimizerName::Persistent,
            redraw: None,
            latent: 256,
            features: 16,
        }
    }
}
