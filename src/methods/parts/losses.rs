//! Losses on a teacher's logits, as [`LogitsLoss`] wants them: pure, per image.

use crate::access::LogitsLoss;

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

fn log_sum_exp(logits: &[f32]) -> f64 {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&v| f64::from(v - top).exp()).sum();
    f64::from(top) + sum.ln()
}

impl LogitsLoss for CrossEntropy {
    fn labels(&self) -> Option<&[usize]> {
        Some(&self.labels)
    }

    fn value(&self, index: usize, logits: &[f32]) -> f64 {
        log_sum_exp(logits) - f64::from(logits[self.labels[index]])
    }

    fn gradient(&self, index: usize, logits: &[f32], gradient: &mut [f32]) {
        let log = log_sum_exp(logits);
        for (class, (g, &v)) in gradient.iter_mut().zip(logits).enumerate() {
            let wanted = if class == self.labels[index] { 1.0 } else { 0.0 };
            *g = ((f64::from(v) - log).exp() - wanted) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gradient_is_that_of_the_value() {
        let loss = CrossEntropy::new(vec![2]);
        let logits = [0.3, -1.2, 0.8, 2.5];
        let mut gradient = [0.0; 4];
        loss.gradient(0, &logits, &mut gradient);
        for class in 0..4 {
            let moved = |step: f32| {
                let mut logits = logits;
                logits[class] += step;
                loss.value(0, &logits)
            };
            let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
            assert!((slope - f64::from(gradient[class])).abs() < 1e-4, "class {class}");
        }
    }
}
