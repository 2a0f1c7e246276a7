//! Distillation: images answered as teachers answer them, in the outer loss (BiDf-MKD eq. 5; FREE sec. 3.3, "cross-task
//! distillation") and in the inner loop (BiDf-MKD eq. 4).

use candle_core::{Device, Tensor};

use super::episodes::Episode;
use crate::error::{Error, Result};
use crate::tensor::losses::softmax;
use crate::tensor::tape::{KeepDims, Var};

/// What is minimised between soft labels and the learner's answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KdLoss {
    /// `KL(soft || learner)` at a temperature, times its square (Hinton et al. 2015).
    Kl,
    /// `-mean(soft * learner)` over queries and classes: the gradient of the published programs' loss, which is no
    /// divergence (methods.md 1.8). Its best answer is one-hot.
    Linear,
}

/// How soft labels enter the outer loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distillation {
    /// Between soft labels and answers.
    pub loss: KdLoss,
    /// Of both sides.
    pub temperature: f64,
    /// Share of the soft labels in the loss, 0 to 1; the rest is cross-entropy to the wanted class.
    pub weight: f64,
}

/// What teachers answer on the support of an episode, and how it counts beside the wanted classes.
#[derive(Debug, Clone, Copy)]
pub struct SoftSupport<'a> {
    /// Logits `[support, way]`, row-major.
    pub logits: &'a [f32],
    /// How they count.
    pub how: Distillation,
}

/// Gives the queries of an episode soft labels, and its support where it can.
pub trait SoftLabels: Sync {
    /// Logits `[queries, way]`, row-major, in the order of the episode's queries; `None` leaves the wanted class alone.
    ///
    /// # Errors
    /// When a teacher cannot be asked.
    fn logits(&self, episode: &Episode) -> Result<Option<Vec<f32>>>;

    /// Logits `[support, way]` likewise, for the inner level (BiDf-MKD eq. 4); `None` leaves it the wanted classes.
    ///
    /// # Errors
    /// As [`SoftLabels::logits`].
    fn support(&self, episode: &Episode) -> Result<Option<Vec<f32>>> {
        let _ = episode;
        Ok(None)
    }
}

impl Distillation {
    /// Shares `[n, way]` of each image in each class: softmax of the `soft` logits at the temperature, and the wanted
    /// class for the rest.
    pub(super) fn shares(&self, labels: &[usize], soft: &[f32]) -> Vec<f64> {
        let way = soft.len() / labels.len().max(1);
        let mut shares = Vec::with_capacity(soft.len());
        for (row, &label) in soft.chunks_exact(way.max(1)).zip(labels) {
            let scaled: Vec<f32> =
                row.iter().map(|v| (f64::from(*v) / self.temperature) as f32).collect();
            let wanted = |class: usize| if class == label { 1.0 - self.weight } else { 0.0 };
            let soft = softmax(&scaled).into_iter().enumerate();
            shares.extend(soft.map(|(class, p)| self.weight * f64::from(p) + wanted(class)));
        }
        shares
    }

    /// The loss of learner's `logits` `[queries, way]` with wanted `labels` and soft ones (logits), a scalar.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn loss(&self, logits: &Var, labels: &[usize], soft: &[f32]) -> Result<Var> {
        let &[n, way] = logits.dims() else {
            return Err(Error::internal("distillation into logits that are no matrix"));
        };
        if soft.len() != n * way {
            return Err(Error::internal(format!(
                "{} soft labels for `{n}` queries of {way} ways",
                soft.len()
            )));
        }
        let scaled: Vec<f32> =
            soft.iter().map(|v| (f64::from(*v) / self.temperature) as f32).collect();
        let tape = logits.tape();
        let constant = Tensor::from_vec(scaled, (n, way), &Device::Cpu)?;
        let target = tape.constant(constant.to_dtype(logits.dtype())?).log_softmax()?;
        let probabilities = target.exp()?;
        let own = logits.scale(1.0 / self.temperature)?.log_softmax()?;
        let distance = match self.loss {
            KdLoss::Kl => {
                let rows = probabilities.mul(&target.sub(&own)?)?;
                rows.sum(&[0, 1], KeepDims::Drop)?
                    .scale(self.temperature * self.temperature / n as f64)?
            }
            KdLoss::Linear => {
                let rows = probabilities.mul(&own.exp()?)?;
                rows.sum(&[0, 1], KeepDims::Drop)?.scale(-1.0 / (n * way) as f64)?
            }
        };
        if self.weight >= 1.0 {
            return Ok(distance);
        }
        let wanted = logits.cross_entropy(labels)?.scale(1.0 - self.weight)?;
        wanted.add(&distance.scale(self.weight)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::tape::{Order, Tape, grad};

    fn value_and_gradient(how: Distillation, logits: &[f64], soft: &[f32]) -> (f64, Vec<f64>) {
        let tape = Tape::new();
        let x = tape.leaf(Tensor::from_slice(logits, (2, 3), &Device::Cpu).unwrap());
        let loss = how.loss(&x, &[1, 0], soft).unwrap();
        let gradient = grad(&loss, &[&x], Order::First).unwrap().remove(0);
        let gradient = gradient.value().flatten_all().unwrap().to_vec1().unwrap();
        (loss.scalar().unwrap(), gradient)
    }

    /// Against the definitions, by hand and by central differences.
    #[test]
    fn both_losses_are_what_they_say_and_so_are_their_gradients() {
        let logits = [0.2, 1.4, -0.3, 2.0, 0.1, 0.4];
        let soft = [0.5f32, 1.0, -1.0, 0.3, 0.2, 1.1];
        for loss in [KdLoss::Kl, KdLoss::Linear] {
            for weight in [1.0, 0.4] {
                let how = Distillation { loss, temperature: 2.0, weight };
                let (value, gradient) = value_and_gradient(how, &logits, &soft);
                let softmax = |row: &[f64], t: f64| -> Vec<f64> {
                    let sum: f64 = row.iter().map(|v| (v / t).exp()).sum();
                    row.iter().map(|v| (v / t).exp() / sum).collect()
                };
                let mut expected = 0.0;
                for (i, label) in [1, 0].into_iter().enumerate() {
                    let own = &logits[3 * i..3 * i + 3];
                    let wanted: Vec<f64> =
                        soft[3 * i..3 * i + 3].iter().map(|v| f64::from(*v)).collect();
                    let (p, q) = (softmax(&wanted, 2.0), softmax(own, 2.0));
                    let distance: f64 = match loss {
                        KdLoss::Kl => {
                            4.0 / 2.0 * p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum::<f64>()
                        }
                        KdLoss::Linear => -p.iter().zip(&q).map(|(p, q)| p * q).sum::<f64>() / 6.0,
                    };
                    expected +=
                        weight * distance - (1.0 - weight) / 2.0 * softmax(own, 1.0)[label].ln();
                }
                assert!((value - expected).abs() < 1e-6, "{value} {expected}");
                for at in 0..6 {
                    let moved = |step: f64| {
                        let mut logits = logits;
                        logits[at] += step;
                        value_and_gradient(how, &logits, &soft).0
                    };
                    let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                    assert!((slope - gradient[at]).abs() < 1e-7, "{slope} {}", gradient[at]);
                }
            }
        }
    }
}
