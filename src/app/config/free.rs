//! Settings of method `free`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// FREE (CVPR 2024): images by the meta-generator of `five` while the meta-model learns from them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FreeConfig {
    /// Rounds of visits in which the generator learns alone.
    pub warm_up: u64,
    /// Updates on episodes from memory without a better accuracy, after which the next round follows.
    pub patience: u64,
    /// Leaves images that their own model puts into another class out of episodes from memory; costs a query an image of
    /// a black-box model.
    pub only_agreed: bool,
    /// Visits to a model whose images are remembered.
    pub visits_kept: usize,
    /// Which images of a round are.
    pub keep: KeepName,
    /// Memory for images, MiB; what does not fit is on disk alone.
    pub memory_mib: usize,
    /// The step on a round's models that draws their gradients together.
    pub align: AlignConfig,
    /// Soft labels in that step, from each model for its own images.
    pub distillation: DistillationConfig,
    /// Soft labels in episodes across models, from each class's own model; null for the wanted classes alone.
    pub cross_task: Option<DistillationConfig>,
}

/// Which images of a round are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum KeepName {
    /// Those of all its models.
    All,
    /// Those of its last model, as the published program does.
    Last,
}

/// Implicit gradient alignment (BELL, FREE sec. 3.3).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AlignConfig {
    /// How the models of a round are put together.
    pub by: AlignName,
    /// The optimiser of the steps, one a model.
    pub optimizer: InnerOptimizerName,
    /// Its learning rate.
    pub learning_rate: f64,
    /// Factor of the way back that the outer optimiser follows (67 in the published program); null makes it a mean
    /// gradient.
    pub scale: Option<f64>,
}

/// How the models of a round are put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AlignName {
    /// A step for each, after each other; the outer step follows their sum (Reptile).
    Sequential,
    /// The mean of their gradients: no alignment.
    Joint,
    /// No such step at all.
    Off,
}

/// The optimiser of the steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum InnerOptimizerName {
    /// Gradient descent, for which the derivation of the alignment holds.
    Sgd,
    /// Adam, fresh in each round, as in the published program.
    Adam,
}

/// Learning from soft labels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DistillationConfig {
    /// What is minimised.
    pub kd_loss: KdLossName,
    /// Temperature of both sides.
    pub temperature: f64,
    /// Share of the soft labels in the loss, 0 to 1; the rest is the cross-entropy of the wanted classes.
    pub weight: f64,
}

/// What is minimised between soft labels and answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum KdLossName {
    /// Kullback-Leibler divergence.
    Kl,
    /// `-mean(p q)`, what the published programs minimise in fact (methods.md 1.8).
    Linear,
}

impl FreeConfig {
    pub(super) fn check(&self) -> Result<()> {
        if self.visits_kept == 0 {
            return Err(Error::input("setting must not be 0: `free.visits_kept`"));
        }
        let align = &self.align;
        for (name, value) in
            [("learning_rate", align.learning_rate), ("scale", align.scale.unwrap_or(1.0))]
        {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::input(format!(
                    "`free.align.{name}` must be a positive number: `{value}`"
                )));
            }
        }
        let cross = self.cross_task.iter().map(|own| ("free.cross_task", own));
        let all = std::iter::once(("free.distillation", &self.distillation)).chain(cross);
        all.into_iter().try_for_each(|(name, own)| own.check(name))
    }
}

impl DistillationConfig {
    /// `name` is where it stands.
    pub(super) fn check(&self, name: &str) -> Result<()> {
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return Err(Error::input(format!(
                "`{name}.temperature` must be a positive number: `{}`",
                self.temperature
            )));
        }
        if !(0.0..=1.0).contains(&self.weight) {
            return Err(Error::input(format!(
                "`{name}.weight` must be between 0 and 1: `{}`",
                self.weight
            )));
        }
        Ok(())
    }
}

impl Default for FreeConfig {
    fn default() -> Self {
        Self {
            warm_up: 20,
            patience: 40,
            // It brought nothing (docs/free.md).
            only_agreed: false,
            visits_kept: 8,
            keep: KeepName::All,
            memory_mib: 1024,
            align: AlignConfig::default(),
            distillation: DistillationConfig { weight: 1.0, ..DistillationConfig::default() },
            // It cost time and brought nothing (docs/free.md).
            cross_task: None,
        }
    }
}

impl Default for AlignConfig {
    fn default() -> Self {
        Self {
            by: AlignName::Sequential,
            optimizer: InnerOptimizerName::Sgd,
            learning_rate: 0.1,
            scale: None,
        }
    }
}

impl Default for DistillationConfig {
    fn default() -> Self {
        Self { kd_loss: KdLossName::Kl, temperature: 1.0, weight: 0.5 }
    }
}
