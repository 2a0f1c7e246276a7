//! Images at the boundary of what a learner knows: the adversarial term of FREE (methods.md 4.1) and of BiDf-MKD's
//! query sets (methods.md 3.2).
//!
//! `-mean 1[learner and teacher agree] KL(teacher || learner)` over the classes of a task: where both say the same, the
//! image is moved to where they differ; elsewhere cross-entropy alone holds it. The learner's weights stay.

use candle_core::{Device, Tensor};

use crate::access::{ImageGradient, LogitsLoss, Objective, Teacher};
use crate::error::{Error, Result};
use crate::meta::protonet::first_largest;
use crate::meta::{MetaModel, Task};
use crate::tensor::losses::{log_sum_exp, softmax};
use crate::tensor::tape::{Order, Tape, Var, vjp};
use crate::tensor::{Images, RngStream};

/// A learner that was shown some images of a teacher's classes.
#[derive(Debug)]
pub struct Student<'a> {
    model: &'a MetaModel,
    /// What it was shown.
    support: Images,
    /// Of each, in `0..classes.len()`.
    labels: Vec<usize>,
    /// The teacher's classes that its answers stand for.
    classes: Vec<usize>,
}

/// Cross-entropy to the wanted class, less `weight` times the divergence.
struct Boundary<'a> {
    wanted: &'a dyn LogitsLoss,
    /// The student's log-probabilities `[n, way]`.
    student: &'a [f32],
    classes: &'a [usize],
    weight: f64,
}

impl Boundary<'_> {
    fn student(&self, index: usize) -> &[f32] {
        let way = self.classes.len();
        &self.student[index * way..(index + 1) * way]
    }

    fn teacher(&self, logits: &[f32]) -> Vec<f32> {
        log_probabilities(&pick(logits, self.classes))
    }
}

fn pick(logits: &[f32], classes: &[usize]) -> Vec<f32> {
    classes.iter().map(|&class| logits[class]).collect()
}

fn log_probabilities(logits: &[f32]) -> Vec<f32> {
    let all = log_sum_exp(logits);
    logits.iter().map(|&v| (f64::from(v) - all) as f32).collect()
}

/// `KL(t || s)` of log-probabilities.
fn divergence(t: &[f32], s: &[f32]) -> f64 {
    t.iter().zip(s).map(|(&t, &s)| f64::from(t).exp() * f64::from(t - s)).sum()
}

impl LogitsLoss for Boundary<'_> {
    fn value(&self, index: usize, logits: &[f32]) -> f64 {
        let (t, s) = (self.teacher(logits), self.student(index));
        let pull = if first_largest(&t) == first_largest(s) { divergence(&t, s) } else { 0.0 };
        self.wanted.value(index, logits) - self.weight * pull
    }

    fn gradient(&self, index: usize, logits: &[f32], gradient: &mut [f32]) {
        self.wanted.gradient(index, logits, gradient);
        let (t, s) = (self.teacher(logits), self.student(index));
        if first_largest(&t) != first_largest(s) {
            return;
        }
        let all = divergence(&t, s);
        for ((&class, &t), &s) in self.classes.iter().zip(&t).zip(s) {
            let slope = f64::from(t).exp() * (f64::from(t - s) - all);
            gradient[class] -= (self.weight * slope) as f32;
        }
    }
}

impl<'a> Student<'a> {
    /// `model` as it answers after `support`, whose `labels` are positions in `classes`, classes of the teacher.
    ///
    /// # Errors
    /// When there are fewer than two classes, or labels do not fit.
    pub fn new(
        model: &'a MetaModel,
        support: Images,
        labels: Vec<usize>,
        classes: Vec<usize>,
    ) -> Result<Self> {
        let fits = labels.len() == support.len() && labels.iter().all(|&l| l < classes.len());
        if classes.len() < 2 || !fits {
            return Err(Error::internal("a student's labels do not fit its classes"));
        }
        Ok(Self { model, support, labels, classes })
    }

    /// Gradient to `images` of `wanted` on the teacher's logits (and its statistics), less `weight` times the
    /// divergence where both agree. The loss told of is that sum.
    ///
    /// # Errors
    /// Those of the teacher, and when the learner cannot be differentiated to its queries.
    pub fn image_gradient(
        &self,
        teacher: &dyn Teacher,
        images: &Images,
        wanted: &Objective<'_>,
        weight: f64,
        rng: &mut RngStream,
    ) -> Result<ImageGradient> {
        let tape = Tape::new();
        let place = |images: &Images| -> Result<Tensor> {
            Ok(Tensor::from_slice(images.data(), &images.shape(), &Device::Cpu)?)
        };
        let (support, query) = (tape.constant(place(&self.support)?), tape.leaf(place(images)?));
        let way = self.classes.len();
        let both = Var::concat(&[&support, &query], 0)?;
        let task = Task { images: &both, labels: &self.labels, way };
        let logits = self.model.respond(&tape, task)?;
        let student: Vec<f32> = (logits.value().to_vec2::<f32>()?.iter())
            .flat_map(|row| log_probabilities(row))
            .collect();
        let loss =
            Boundary { wanted: wanted.logits, student: &student, classes: &self.classes, weight };
        let statistics_weight = wanted.statistics_weight;
        let objective = Objective { logits: &loss, statistics_weight };
        let mut found = teacher.image_gradient(images, &objective, rng)?;
        let cotangent = self.cotangent(&found.logits, &student, weight)?;
        let own: Var = vjp(&logits, &tape.constant(cotangent), &[&query], Order::First)?.remove(0);
        let own = own.value().flatten_all()?.to_vec1::<f32>()?;
        found.gradient.data_mut().iter_mut().zip(own).for_each(|(g, own)| *g += own);
        Ok(found)
    }

    /// Gradient of the mean of the adversarial term to the student's logits: `-weight (p_s - p_t) / n` where both agree.
    fn cotangent(&self, teacher: &[f32], student: &[f32], weight: f64) -> Result<Tensor> {
        let way = self.classes.len();
        let n = student.len() / way;
        let mut all = vec![0.0f32; student.len()];
        let rows = teacher.chunks_exact(teacher.len() / n.max(1)).zip(student.chunks_exact(way));
        for (out, (t, s)) in all.chunks_exact_mut(way).zip(rows) {
            let t = softmax(&pick(t, &self.classes));
            if first_largest(&t) != first_largest(s) {
                continue;
            }
            for ((out, t), &s) in out.iter_mut().zip(t).zip(s) {
                *out = (-weight * (f64::from(s).exp() - f64::from(t)) / n as f64) as f32;
            }
        }
        Ok(Tensor::from_vec(all, (n, way), &Device::Cpu)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::parts::CrossEntropy;

    /// Where both agree the gradient is that of the value; where they do not, cross-entropy's alone.
    #[test]
    fn the_gradient_to_the_teachers_logits_is_that_of_the_value() {
        let wanted = CrossEntropy::new(vec![2, 0]);
        let student: Vec<f32> =
            [log_probabilities(&[0.1, 0.9, -0.4]), log_probabilities(&[2.0, 0.0, 0.0])].concat();
        let classes = [0, 2, 3];
        let loss = Boundary { wanted: &wanted, student: &student, classes: &classes, weight: 0.7 };
        let logits = [0.3, -1.2, 0.8, -0.5];
        for (index, agrees) in [(0, true), (1, false)] {
            let mut gradient = [0.0; 4];
            loss.gradient(index, &logits, &mut gradient);
            for class in 0..4 {
                let moved = |step: f32| {
                    let mut logits = logits;
                    logits[class] += step;
                    loss.value(index, &logits)
                };
                let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                assert!((slope - f64::from(gradient[class])).abs() < 1e-4, "class {class}");
            }
            let mut alone = [0.0; 4];
            wanted.gradient(index, &logits, &mut alone);
            assert_eq!(alone != gradient, agrees);
        }
    }
}
