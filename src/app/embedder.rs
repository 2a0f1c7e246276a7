//! What evaluation needs of a meta-model: images in, one vector an image out.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::tensor::Images;

/// Which statistics the meta-model's batch normalisation uses on test images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BatchNorm {
    /// Those fixed in training: a query's answer does not depend on the other queries.
    Inductive,
    /// Those of the episode's support and query images together. Higher figures; they assume that
    /// the queries come as a batch with every class in equal number.
    Transductive,
}

impl BatchNorm {
    /// The name in results and flags.
    pub fn name(self) -> &'static str {
        match self {
            Self::Inductive => "inductive",
            Self::Transductive => "transductive",
        }
    }
}

/// A meta-model as evaluation sees it.
pub trait Embedder: Send + Sync {
    /// `[height, width]` of the images it takes.
    fn image_size(&self) -> [usize; 2];

    /// Length of a vector.
    fn dim(&self) -> usize;

    /// Vectors `[n, dim]`, row-major, of `n` canonical images.
    ///
    /// # Errors
    /// When the model fails, or cannot normalise in the way asked for.
    fn embed(&self, images: &Images, batch_norm: BatchNorm) -> Result<Vec<f32>>;
}
