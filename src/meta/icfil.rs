//! Calibration at test time: inversion calibrates feature and label head (ICFIL; PURER sec. 3.3).
//!
//! Meta-training saw recovered images only; a new task has real ones. After the inner loop the adapted model is itself
//! inverted, and its features of the real support images are drawn to those of its own pseudo images of the same class
//! and away from the others'. No program of the authors' is known: steps, rates and temperature are ours, chosen on
//! meta-val (methods.md 2.4; docs/purer.md).

use candle_core::{Device, Tensor};

use super::adapt::{Classifier, SupportImages};
use super::backbone::{Backbone, BnMode};
use super::learner::{Learner, MetaModel, adapt_head};
use crate::error::Result;
use crate::graph::{CompileOptions, Gradient, Plan, Taps};
use crate::tensor::losses::cross_entropy_gradient;
use crate::tensor::priors::{size, total_variation};
use crate::tensor::tape::{KeepDims, Order, Tape, Var, grad};
use crate::tensor::{Adam, AdamOptions, Images, RngStream};

/// Middle and unit of the standardised pixels that are inverted, in canonical values.
const STANDARD: [f32; 2] = [0.5, 0.25];
/// Standardised pixels of canonical 0 and 1.
const RANGE: f32 = 2.0;
/// Added to squared lengths.
const TINY: f64 = 1e-12;

/// How a model is inverted and calibrated.
#[derive(Debug, Clone, PartialEq)]
pub struct IcfilConfig {
    /// Pseudo images a class.
    pub images_per_class: usize,
    /// Adam steps of the inversion, from noise.
    pub inversion_steps: usize,
    /// Their size, in standardised pixels.
    pub inversion_rate: f64,
    /// Weight of total variation.
    pub total_variation: f64,
    /// Weight of the pixel norm.
    pub size: f64,
    /// Gradient steps of the network on the calibration loss.
    pub steps: usize,
    /// Their learning rate.
    pub rate: f64,
    /// Gradient steps of the head on the cross-entropy of support and pseudo images.
    pub head_steps: usize,
    /// Their learning rate.
    pub head_rate: f64,
}

/// What calibration minimises, on features `[n, d]` of real images and `[m, d]` of pseudo images.
pub trait CalibrationLoss: Send + Sync {
    /// The loss, a scalar; labels are in `0..way`.
    ///
    /// # Errors
    /// When shapes do not fit.
    fn value(&self, real: Labelled<'_>, pseudo: Labelled<'_>, way: usize) -> Result<Var>;
}

/// Features and their labels.
#[derive(Debug, Clone, Copy)]
pub struct Labelled<'a> {
    /// `[n, d]`.
    pub features: &'a Var,
    /// Of each row.
    pub labels: &'a [usize],
}

/// Contrast of cosines: `-mean log (sum over pseudo images of the own class e^(cos / t) / sum over all)`, the real
/// image being the anchor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Contrast {
    /// `t`.
    pub temperature: f64,
}

impl CalibrationLoss for Contrast {
    fn value(&self, real: Labelled<'_>, pseudo: Labelled<'_>, way: usize) -> Result<Var> {
        let cosines =
            unit_rows(real.features)?.matmul(&unit_rows(pseudo.features)?.transpose(0, 1)?)?;
        // Cosines are at most 1: the exponentials are bounded without their largest taken out.
        let masses = cosines.affine(1.0 / self.temperature, -1.0 / self.temperature)?.exp()?;
        let mut one_hot = vec![0.0f32; pseudo.labels.len() * way];
        for (row, &label) in one_hot.chunks_exact_mut(way).zip(pseudo.labels) {
            row[label] = 1.0;
        }
        let one_hot = Tensor::from_vec(one_hot, (pseudo.labels.len(), way), &Device::Cpu)?;
        let of_class = masses.matmul(&masses.tape().constant(one_hot))?;
        of_class.affine(1.0, TINY)?.log()?.cross_entropy(real.labels)
    }
}

/// Rows of length 1.
fn unit_rows(features: &Var) -> Result<Var> {
    let length = features.square()?.sum(&[1], KeepDims::Keep)?.affine(1.0, TINY)?.sqrt()?;
    features.div(&length.broadcast_to(features.dims())?)
}

impl MetaModel {
    /// The classifier that this learner makes of `support` (`labels` in `0..way`), calibrated. Normalisation has the
    /// statistics of training ([`BnMode::Running`]). The noise that pseudo images start from is drawn from `rng`.
    ///
    /// # Errors
    /// As [`MetaModel::adapt`].
    pub fn calibrate(
        &self,
        support: &Images,
        labels: &[usize],
        way: usize,
        (config, loss): (&IcfilConfig, &dyn CalibrationLoss),
        rng: &mut RngStream,
    ) -> Result<Classifier> {
        let read = |range: std::ops::Range<usize>| Ok(support.select(&range.collect::<Vec<_>>()));
        let adapted = self.adapt(&SupportImages { labels, way, read: &read })?;
        let [_, _, height, width] = support.shape();
        let (pseudo, own) = invert(&adapted, [height, width], config, rng)?;
        let mut backbone = adapted.backbone().clone();
        let mut both = support.clone();
        both.extend(&pseudo)?;
        for _ in 0..config.steps {
            let tape = Tape::new();
            let body = backbone.leaves(&tape);
            let images = Tensor::from_slice(both.data(), &both.shape(), &Device::Cpu)?;
            let seen = backbone.forward(&body, &tape.constant(images), BnMode::Running)?.embedding;
            let real = seen.narrow(0, 0, labels.len())?;
            let fake = seen.narrow(0, labels.len(), own.len())?;
            let value = loss.value(
                Labelled { features: &real, labels },
                Labelled { features: &fake, labels: &own },
                way,
            )?;
            let gradients = grad(&value, &body.iter().collect::<Vec<_>>(), Order::First)?;
            let step = |(weight, gradient): (&Var, Var)| {
                Ok((weight.value() - (gradient.value() * config.rate)?)?)
            };
            let moved: Result<Vec<Tensor>> = body.iter().zip(gradients).map(step).collect();
            backbone.set_parameters(moved?)?;
        }
        self.calibrate_head(&adapted, backbone, (support, labels), (&both, &own), config)
    }

    /// The classifier of a calibrated network: its head (ProtoNet's from the new features of the support images) takes its
    /// own steps on `both`, support and then pseudo images, which `own` labels.
    fn calibrate_head(
        &self,
        adapted: &Classifier,
        backbone: Backbone,
        (support, labels): (&Images, &[usize]),
        (both, own): (&Images, &[usize]),
        config: &IcfilConfig,
    ) -> Result<Classifier> {
        let mut classifier = match self.learner() {
            Learner::ProtoNet => {
                let features = backbone.embed(support, BnMode::Running)?;
                Classifier::nearest_mean(backbone, &features, labels, adapted.way())?
            }
            Learner::Anil(_) | Learner::Maml(_) => adapted.with_backbone(backbone),
        };
        if config.head_steps == 0 {
            return Ok(classifier);
        }
        let all: Vec<usize> = labels.iter().chain(own).copied().collect();
        let features = classifier.backbone().embed(both, BnMode::Running)?;
        let shape = (all.len(), features.len() / all.len().max(1));
        let tape = Tape::new();
        let features = tape.constant(Tensor::from_vec(features, shape, &Device::Cpu)?);
        let head = classifier.head()?.map(|value| tape.leaf(value)).to_vec();
        let how = (config.head_rate, config.head_steps, Order::First);
        let head = adapt_head(&features, all.as_slice().into(), head, how)?;
        classifier.set_head(&head)?;
        Ok(classifier)
    }
}

/// Pseudo images of an adapted model, class after class, and their labels: cross-entropy, total variation and size
/// over free pixels that start as noise (PURER sec. 2.2 without the statistics, which the model does not hold of the
/// new task). Only pixels move, so the network is compiled once for all steps.
fn invert(
    classifier: &Classifier,
    [height, width]: [usize; 2],
    config: &IcfilConfig,
    rng: &mut RngStream,
) -> Result<(Images, Vec<usize>)> {
    let (each, way) = (config.images_per_class, classifier.way());
    let labels: Vec<usize> = (0..way * each).map(|i| i / each).collect();
    let shape = [labels.len(), 3, height, width];
    let mut z = rng.normals(shape.iter().product());
    let mut adam = Adam::new(AdamOptions::STANDARD, [z.len()]);
    let [middle, unit] = STANDARD;
    let plan = Plan::<f32>::compile(
        &classifier.to_graph([height, width])?,
        &CompileOptions {
            input: "images".into(),
            input_shape: shape.to_vec(),
            output: "logits".into(),
            gradient: Gradient::Wanted,
            taps: Taps::Norms,
        },
    )?;
    let mut workspace = plan.workspace();
    let (mut images, mut d_logits) = (vec![0.0; z.len()], vec![0.0; labels.len() * way]);
    let share = 1.0 / labels.len().max(1) as f32;
    for _ in 0..config.inversion_steps {
        z.iter_mut().for_each(|v| *v = v.clamp(-RANGE, RANGE));
        images.iter_mut().zip(&z).for_each(|(image, z)| *image = middle + unit * z);
        let logits = plan.forward(&mut workspace, &images);
        let rows = logits.chunks_exact(way).zip(d_logits.chunks_exact_mut(way));
        for ((logits, d_logits), &label) in rows.zip(&labels) {
            cross_entropy_gradient(logits, label, d_logits);
            d_logits.iter_mut().for_each(|d| *d *= share);
        }
        let d_images = plan.backward(&mut workspace, &d_logits);
        let mut gradient: Vec<f32> = d_images.iter().map(|d| unit * d).collect();
        total_variation(&z, height, width, config.total_variation as f32, &mut gradient);
        size(&z, config.size as f32, &mut gradient);
        adam.step(config.inversion_rate, &mut [&mut z], &[&gradient])?;
    }
    let pixels = z.iter().map(|v| middle + unit * v.clamp(-RANGE, RANGE));
    Ok((Images::new(pixels.collect(), shape)?, labels))
}

#[cfg(test)]
#[path = "icfil_tests.rs"]
mod tests;
