//! Settings of calibration at test time.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Calibration at test time (ICFIL, PURER sec. 3.3): `eval --icfil`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct IcfilConfig {
    /// Pseudo images a class, recovered from the adapted model.
    pub images_per_class: usize,
    /// Steps of their inversion.
    pub inversion_steps: usize,
    /// Adam's learning rate in it, in units of the canonical image's range.
    pub inversion_learning_rate: f64,
    /// Weight of the total variation.
    pub total_variation_weight: f64,
    /// Weight of the L2 norm.
    pub l2_weight: f64,
    /// Gradient steps of the network on the calibration loss.
    pub steps: usize,
    /// Their learning rate.
    pub learning_rate: f64,
    /// Temperature of the contrast.
    pub temperature: f64,
    /// Gradient steps of the head on support and pseudo images.
    pub head_steps: usize,
    /// Their learning rate.
    pub head_learning_rate: f64,
}

impl Default for IcfilConfig {
    fn default() -> Self {
        Self {
            images_per_class: 5,
            inversion_steps: 20,
            inversion_learning_rate: 0.0625,
            total_variation_weight: 1e-4,
            l2_weight: 1e-5,
            steps: 3,
            learning_rate: 0.001,
            temperature: 0.2,
            head_steps: 0,
            head_learning_rate: 0.01,
        }
    }
}
