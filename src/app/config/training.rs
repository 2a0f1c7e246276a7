//! Settings of meta-training that are more than a number: which classes are one, when it stops early.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Which classes of several models count as one class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MergeClasses {
    /// None: each class of each model is a class of its own.
    Never,
    /// Those that sidecars (`id2label`) give the same name, leading and trailing spaces aside. Classes without a name
    /// stay on their own.
    ByName,
}

/// The meta-model's weights before meta-training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MetaStart {
    /// Those of the backbone: drawn by the seed, or those of its file.
    Random,
    /// The mean of the weights of all white-box models, which must be of one architecture, the backbone's (PURER sec. 3.2).
    MeanOfTeachers,
    /// What distillation makes of the models' answers to drawings (`pretrain`): of any architectures, one query a drawing
    /// of models that are asked.
    Distilled,
}

/// Early stop on pseudo-validation: recovered classes that are never trained on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EarlyStopConfig {
    /// Share of the recovered classes that are held out, between 0 and 1.
    pub share: f64,
    /// Steps between checks; each answers 100 fixed episodes of the held-out classes.
    pub every: u64,
    /// Checks in a row without a new best, after which training stops. The best weights are kept.
    pub patience: u64,
}

impl Default for EarlyStopConfig {
    fn default() -> Self {
        Self { share: 0.2, every: 100, patience: 5 }
    }
}

impl EarlyStopConfig {
    /// # Errors
    /// When a number makes no sense.
    pub(super) fn check(&self) -> Result<()> {
        if !(self.share > 0.0 && self.share < 1.0) {
            return Err(Error::input(format!(
                "`meta.early_stop.share` must be between 0 and 1: `{}`",
                self.share
            )));
        }
        for (name, value) in [("every", self.every), ("patience", self.patience)] {
            if value == 0 {
                let name = format!("meta.early_stop.{name}");
                return Err(Error::input(format!("setting must not be 0: `{name}`")));
            }
        }
        Ok(())
    }
}
