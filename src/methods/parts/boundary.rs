//! Images at the boundary of what a learner knows: the adversarial term of FREE (methods.md 4.1) and of BiDf-MKD's
//! query sets (methods.md 3.2).
//!
//! `-mean 1[learner and teacher agree] D(teacher, learner)` over the classes of a task: where both say the same, the
//! image is moved to where they differ; elsewhere cross-entropy alone holds it. The learner's weights stay. `D` is the
//! divergence `KL(teacher || learner)`, or what BiDf-MKD's program takes for it ([`Distance::LogitL1`]).

use candle_core::{Device, Tensor};

use crate::access::{Guide, ImageGradient, LogitsLoss, Objective, Teacher};
use crate::error::{Error, Result};
use crate::meta::protonet::first_largest;
use crate::meta::{Distillation, MetaModel, SoftSupport, Task};
use crate::tensor::losses::{log_sum_exp, softmax};
use crate::tensor::tape::{Order, Tape, Var, vjp};
use crate::tensor::{Images, RngStream};

/// How far a learner's answer is from the teacher's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distance {
    /// `KL(teacher || learner)`, differentiated through both.
    Kl,
    /// The L1 distance of their logits, the learner's taken as a constant (BiDf-MKD's program, methods.md 3.2).
    LogitL1,
}

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
    /// The teacher's answers to what it was shown `[n, way]`, and how they count beside the labels.
    answers: Option<(Vec<f32>, Distillation)>,
    distance: Distance,
}

/// Cross-entropy to the wanted class, less `weight` times the distance.
struct Boundary<'a> {
    wanted: &'a dyn LogitsLoss,
    /// The student's log-probabilities `[n, way]`, its logits for the L1 distance.
    student: &'a [f32],
    classes: &'a [usize],
    weight: f64,
    distance: Distance,
}

impl Boundary<'_> {
    fn student(&self, index: usize) -> &[f32] {
        let way = self.classes.len();
        &self.student[index * way..(index + 1) * way]
    }

    fn teacher(&self, logits: &[f32]) -> Vec<f32> {
        self.distance.scores(pick(logits, self.classes))
    }
}

impl Distance {
    /// What is compared of logits.
    fn scores(self, logits: Vec<f32>) -> Vec<f32> {
        match self {
            Self::Kl => log_probabilities(&logits),
            Self::LogitL1 => logits,
        }
    }

    fn of(self, t: &[f32], s: &[f32]) -> f64 {
        match self {
            Self::Kl => divergence(t, s),
            Self::LogitL1 => t.iter().zip(s).map(|(t, s)| f64::from((t - s).abs())).sum(),
        }
    }

    /// Slope of [`Distance::of`], whose value is `all`, to one of the teacher's logits.
    fn slope(self, t: f32, s: f32, all: f64) -> f64 {
        match self {
            Self::Kl => f64::from(t).exp() * (f64::from(t - s) - all),
            Self::LogitL1 if t == s => 0.0,
            Self::LogitL1 => f64::from((t - s).signum()),
        }
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
        let pull =
            if first_largest(&t) == first_largest(s) { self.distance.of(&t, s) } else { 0.0 };
        self.wanted.value(index, logits) - self.weight * pull
    }

    fn gradient(&self, index: usize, logits: &[f32], gradient: &mut [f32]) {
        self.wanted.gradient(index, logits, gradient);
        let (t, s) = (self.teacher(logits), self.student(index));
        if first_largest(&t) != first_largest(s) {
            return;
        }
        let all = self.distance.of(&t, s);
        for ((&class, &t), &s) in self.classes.iter().zip(&t).zip(s) {
            gradient[class] -= (self.weight * self.distance.slope(t, s, all)) as f32;
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
        let (answers, distance) = (None, Distance::Kl);
        Ok(Self { model, support, labels, classes, answers, distance })
    }

    /// The same, taught by the teacher's `answers` to its support, logits `[n, way]`.
    #[must_use]
    pub fn taught(self, answers: Vec<f32>, how: Distillation) -> Self {
        Self { answers: Some((answers, how)), ..self }
    }

    /// The same, with another distance.
    #[must_use]
    pub fn at(self, distance: Distance) -> Self {
        Self { distance, ..self }
    }

    /// Gradient to `images` of `wanted` on the teacher's logits (and its statistics), less `weight` times the
    /// distance where both agree. The loss told of is that sum. `guide` is for teachers that are asked.
    ///
    /// # Errors
    /// Those of the teacher, and when the learner cannot be differentiated to its queries.
    pub fn image_gradient(
        &self,
        teacher: &dyn Teacher,
        images: &Images,
        (wanted, weight): (&Objective<'_>, f64),
        guide: &Guide<'_>,
        rng: &mut RngStream,
    ) -> Result<ImageGradient> {
        let tape = Tape::new();
        let place = |images: &Images| -> Result<Tensor> {
            Ok(Tensor::from_slice(images.data(), &images.shape(), &Device::Cpu)?)
        };
        let (support, query) = (tape.constant(place(&self.support)?), tape.leaf(place(images)?));
        let way = self.classes.len();
        let both = Var::concat(&[&support, &query], 0)?;
        let mut task = Task::new(&both, &self.labels, way);
        let answers = self.answers.as_ref();
        task.soft = answers.map(|(logits, how)| SoftSupport { logits, how: *how });
        let logits = self.model.respond(&tape, task)?;
        let distance = self.distance;
        let student: Vec<f32> = (logits.value().to_vec2::<f32>()?.into_iter())
            .flat_map(|row| distance.scores(row))
            .collect();
        let loss = Boundary {
            wanted: wanted.logits,
            student: &student,
            classes: &self.classes,
            weight,
            distance,
        };
        let statistics_weight = wanted.statistics_weight;
        let objective = Objective { logits: &loss, statistics_weight };
        let mut found = teacher.guided_gradient(images, &objective, guide, rng)?;
        if distance == Distance::LogitL1 {
            return Ok(found);
        }
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
        let logits = [0.3, -1.2, 0.8, -0.5];
        let distances = [Distance::Kl, Distance::LogitL1];
        let cases = distances.iter().flat_map(|&d| [(d, 0, true), (d, 1, false)]);
        for (distance, index, agrees) in cases {
            let loss = Boundary {
                wanted: &wanted,
                student: &student,
                classes: &classes,
                weight: 0.7,
                distance,
            };
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
