//! Means and their 95 % confidence intervals over episodes and over seeds.
//!
//! The convention of the field: mean over n episodes +- 1.96 s / sqrt(n), here with the sample
//! standard deviation s (ddof 1; the population one differs by less than 0.1 % at n = 600).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The field's 0.975 quantile of the normal distribution.
const NORMAL: f64 = 1.96;

/// A mean with the half width of its 95 % confidence interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Estimate {
    /// Mean accuracy over the episodes, in 0..1.
    pub accuracy: f64,
    /// Half width of the 95 % confidence interval, in the same unit; 0 for fewer than two values.
    pub ci95: f64,
}

/// Mean and 1.96 s / sqrt(n), s with ddof 1.
pub fn mean_with_ci(values: &[f64]) -> Estimate {
    if values.is_empty() {
        return Estimate { accuracy: 0.0, ci95: 0.0 };
    }
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    if values.len() < 2 {
        return Estimate { accuracy: mean, ci95: 0.0 };
    }
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
    Estimate { accuracy: mean, ci95: NORMAL * (variance / n).sqrt() }
}

/// The mean of `a - b` over episodes seen by both, with its own interval: narrower than the two
/// intervals apart, since the same episode is hard for both. Extra values of the longer are unused.
pub fn paired_difference(a: &[f64], b: &[f64]) -> Estimate {
    let differences: Vec<f64> = a.iter().zip(b).map(|(x, y)| x - y).collect();
    mean_with_ci(&differences)
}

/// The 0.975 quantiles of Student's t for 1 to 30 degrees of freedom.
const STUDENT: [f64; 30] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
];

/// Half width of the 95 % interval of the mean of a few values, such as the accuracies of runs that differ by their seed:
/// t s / sqrt(n) with Student's t of n - 1 degrees of freedom. `None` for fewer than two values.
pub fn student_ci95(values: &[f64]) -> Option<f64> {
    let freedom = values.len().checked_sub(1).filter(|freedom| *freedom > 0)?;
    let t = STUDENT.get(freedom - 1).copied().unwrap_or_else(|| {
        // Expansion of Cornish and Fisher around the normal quantile: off by 1e-5 at 31 degrees.
        let (z, v) = (1.959_964_f64, freedom as f64);
        z + (z.powi(3) + z) / (4.0 * v)
            + (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / (96.0 * v * v)
    });
    Some(t / NORMAL * mean_with_ci(values).ci95)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_over_seeds_uses_students_t() {
        // By integrating the density in Python: t(0.975, 2) s / sqrt(3).
        let few = student_ci95(&[0.53, 0.561, 0.548]).unwrap();
        assert!((few - 0.038_670_7).abs() < 1e-5, "{few}");
        assert_eq!((student_ci95(&[]), student_ci95(&[0.5])), (None, None));
        assert_eq!(student_ci95(&[0.5, 0.5]), Some(0.0));
        // t(0.975, 40) = 2.021075; deviation of 0 and 1 by turns, 41 values.
        let many: Vec<f64> = (0..41).map(|i| f64::from(i % 2)).collect();
        let estimate = mean_with_ci(&many);
        let ratio = student_ci95(&many).unwrap() / estimate.ci95 * 1.96;
        assert!((ratio - 2.021_075).abs() < 1e-4, "{ratio}");
    }

    #[test]
    fn agrees_with_numpy_on_eight_values() {
        // numpy: x.mean(), 1.96 * x.std(ddof=1) / sqrt(8)
        let x = [0.2, 0.4, 0.4, 0.4, 0.5, 0.5, 0.7, 0.9];
        let estimate = mean_with_ci(&x);
        assert!((estimate.accuracy - 0.5).abs() < 1e-12);
        assert!((estimate.ci95 - 0.148_162_073_419_617).abs() < 1e-9, "{}", estimate.ci95);
    }

    #[test]
    fn one_value_has_no_interval() {
        assert_eq!(mean_with_ci(&[0.3]), Estimate { accuracy: 0.3, ci95: 0.0 });
    }

    #[test]
    fn a_constant_gain_has_a_paired_interval_of_zero() {
        let b = [0.1, 0.9, 0.4, 0.6];
        let a: Vec<f64> = b.iter().map(|x| x + 0.05).collect();
        let gain = paired_difference(&a, &b);
        assert!((gain.accuracy - 0.05).abs() < 1e-12 && gain.ci95 < 1e-12);
        assert!(mean_with_ci(&a).ci95 > 0.1, "the unpaired interval is wide");
    }
}
