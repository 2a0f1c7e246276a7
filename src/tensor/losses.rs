//! Losses of one row of logits, their gradients, and what they are made of.

/// `-log softmax(logits)[label]`.
pub fn cross_entropy(logits: &[f32], label: usize) -> f64 {
    log_sum_exp(logits) - f64::from(logits[label])
}

/// The gradient of [`cross_entropy`] to the logits, written to `gradient` of their length.
pub fn cross_entropy_gradient(logits: &[f32], label: usize, gradient: &mut [f32]) {
    let log = log_sum_exp(logits);
    for (class, (g, &v)) in gradient.iter_mut().zip(logits).enumerate() {
        let wanted = if class == label { 1.0 } else { 0.0 };
        *g = ((f64::from(v) - log).exp() - wanted) as f32;
    }
}

/// `ln sum e^logits`, without overflow.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&v| f64::from(v - top).exp()).sum();
    f64::from(top) + sum.ln()
}

/// Probabilities of logits.
pub fn softmax(logits: &[f32]) -> Vec<f32> {
    let all = log_sum_exp(logits);
    logits.iter().map(|&v| (f64::from(v) - all).exp() as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gradient_is_that_of_the_value() {
        let logits = [0.3, -1.2, 0.8, 2.5];
        let mut gradient = [0.0; 4];
        cross_entropy_gradient(&logits, 2, &mut gradient);
        for class in 0..4 {
            let moved = |step: f32| {
                let mut logits = logits;
                logits[class] += step;
                cross_entropy(&logits, 2)
            };
            let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
            assert!((slope - f64::from(gradient[class])).abs() < 1e-4, "class {class}");
        }
    }
}
