//! Losses on a teacher's logits, as [`LogitsLoss`] wants them: pure, per image.

use crate::access::LogitsLoss;
use crate::tensor::losses::{cross_entropy, cross_entropy_gradient};

/// Cross-entropy to a hard label per image (PURER sec. 2.2, BiDf-MKD sec. 3.1).
#[derive(Debug, Clone)]
pub struct CrossEntropy {
    labels: Vec<usize>,
}

impl CrossEntropy {
    /// `labels[i]` is the wanted class of image `i`.
    pub fn new(labels: Vec<usize>) -> Self {
        Self { labels }
    }
}

impl LogitsLoss for CrossEntropy {
    fn labels(&self) -> Option<&[usize]> {
        Some(&self.labels)
    }

    fn value(&self, index: usize, logits: &[f32]) -> f64 {
        cross_entropy(logits, self.labels[index])
    }

    fn gradient(&self, index: usize, logits: &[f32], gradient: &mut [f32]) {
        cross_entropy_gradient(logits, self.labels[index], gradient);
    }
}
