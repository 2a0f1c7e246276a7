//! Settings of recovery by queries.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Generator with zero-order gradients (BiDf-MKD sec. 3.1).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BlackBoxConfig {
    /// Generator steps.
    pub steps: usize,
    /// Adam's learning rate of generator and latents.
    pub learning_rate: f64,
    /// Values of a latent.
    pub latent: usize,
    /// Feature maps of the generator's last layers (64 in the paper).
    pub features: usize,
    /// Which iterate of a generator's steps is kept.
    pub best: BestName,
    /// How gradients are estimated from queries.
    pub estimator: EstimatorName,
    /// Directions q of an estimate.
    pub directions: usize,
    /// Spatial frequencies each way that the low-frequency estimators ask along; null is a quarter of the image's
    /// shorter side, the grid that the generator starts from.
    pub frequencies: Option<usize>,
    /// Smoothing mu of the finite differences.
    pub smoothing: f64,
    /// Queries that may be spent on a model without a budget of its own; null is no limit.
    pub query_budget: Option<u64>,
    /// Queries that may be spent in the whole run, shared among its models before the first is asked; null is no
    /// limit.
    pub run_budget: Option<u64>,
    /// ONNX Runtime sessions open at once; null is two for every worker.
    pub max_open: Option<usize>,
}

/// Which iterate is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum BestName {
    /// The one of lowest loss.
    Loss,
    /// The one of lowest `<image, estimated gradient>`, as BiDf-MKD's program does.
    Surrogate,
}

/// How gradients are estimated from queries (docs/black-box.md holds them against each other).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EstimatorName {
    /// Forward differences along random directions: what BiDf-MKD does.
    Forward,
    /// Differences of opposite points along random directions; two queries each.
    Antithetic,
    /// Forward differences along orthonormal directions.
    Orthogonal,
    /// As `orthogonal`, within low spatial frequencies.
    LowFrequency,
    /// Forward differences along the directions in which the generator's latents move an image.
    Guided,
    /// As `orthogonal`, with the last step's estimate as one direction.
    Prior,
    /// As `low-frequency`, with the last step's estimate as one direction.
    PriorLowFrequency,
    /// For labels only: long steps of low spatial frequency, each answer against the mean of all. Taken by itself where a model gives
    /// nothing else.
    HardLabel,
}

impl Default for BlackBoxConfig {
    fn default() -> Self {
        Self {
            steps: 60,
            learning_rate: 1e-3,
            latent: 256,
            features: 32,
            best: BestName::Loss,
            estimator: EstimatorName::LowFrequency,
            directions: 20,
            frequencies: None,
            smoothing: 0.005,
            query_budget: Some(500_000),
            run_budget: None,
            max_open: None,
        }
    }
}
