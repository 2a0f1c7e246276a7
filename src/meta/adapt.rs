//! A learner that has seen a user's images, as an ordinary classifier: its network and a linear head.
//!
//! What [`MetaModel::classify`] does anew for each episode is done once: ProtoNet's class means become
//! a linear head, ANIL's steps on the head and MAML's steps on all weights are taken, and what comes
//! out answers any image. Statistics of normalisation are those of training, so images may come in
//! batches of any size and a support set of any size fits into memory.

use std::ops::Range;

use candle_core::{Device, Tensor};

use super::backbone::{Backbone, BnMode};
use super::export::classifier_graph;
use super::learner::{InnerLoop, Learner, MetaModel, adapt_head, linear, spread};
use super::protonet::{first_largest, linear_head};
use crate::error::{Error, Result};
use crate::graph::{ConstantTensor, Graph};
use crate::tensor::Images;
use crate::tensor::tape::{Order, Tape, Var, grad};

/// Support images in memory at once.
const BATCH: usize = 64;

/// Labelled images, read in batches.
pub struct SupportImages<'a> {
    /// Their labels, in `0..way`.
    pub labels: &'a [usize],
    /// Number of classes.
    pub way: usize,
    /// The canonical images at some places.
    pub read: &'a dyn Fn(Range<usize>) -> Result<Images>,
}

/// A network with a linear head for `way` classes.
#[derive(Debug, Clone)]
pub struct Classifier {
    backbone: Backbone,
    way: usize,
    /// `[way, d]`.
    weight: Vec<f32>,
    /// `[way]`.
    bias: Vec<f32>,
}

impl MetaModel {
    /// The classifier that this learner makes of a support set, with the test steps of the rule and the
    /// normalisation statistics of training ([`BnMode::Running`]).
    ///
    /// # Errors
    /// When an image cannot be read or is not of one size with the others, a class has no image, or the
    /// classifier's weights are not finite.
    pub fn adapt(&self, support: &SupportImages<'_>) -> Result<Classifier> {
        let mut backbone = self.backbone().clone();
        let [weight, bias] = match self.learner() {
            Learner::ProtoNet => {
                let features = support.embed(&backbone)?;
                let dim = features.len() / support.labels.len().max(1);
                linear_head(&features, support.labels, dim, support.way)?
            }
            Learner::Anil(inner) => self.adapted_head(support, inner)?,
            Learner::Maml(inner) => {
                let mut body = self.adapted_weights(support, inner)?;
                let head = body.split_off(backbone.parameters().len());
                backbone.set_parameters(body)?;
                values_of(&head)?
            }
        };
        if weight.iter().chain(&bias).any(|value| !value.is_finite()) {
            return Err(Error::internal("the adapted classifier has infinite or undefined weights")
                .hint("training has diverged: lower `meta.learning_rate` or `meta.inner.learning_rate` and train again"));
        }
        Ok(Classifier { backbone, way: support.way, weight, bias })
    }

    /// ANIL: the head after its steps, on features that stay.
    fn adapted_head(&self, support: &SupportImages<'_>, inner: InnerLoop) -> Result<[Vec<f32>; 2]> {
        let features = support.embed(self.backbone())?;
        let n = support.labels.len();
        let tape = Tape::new();
        let shape = (n, features.len() / n.max(1));
        let features = tape.constant(Tensor::from_vec(features, shape, &Device::Cpu)?);
        let leaves = self.leaves(&tape);
        let head = spread(&leaves[self.backbone().parameters().len()..], support.way)?;
        let how = (inner.learning_rate, inner.test_steps, Order::First);
        let head = adapt_head(&features, support.labels.into(), head, how)?;
        let head: Vec<Tensor> = head.iter().map(|var| var.value().clone()).collect();
        values_of(&head)
    }

    /// MAML: all weights after their steps, the head's `[way, d]` and `[way]` last.
    fn adapted_weights(
        &self,
        support: &SupportImages<'_>,
        inner: InnerLoop,
    ) -> Result<Vec<Tensor>> {
        let tape = Tape::new();
        let mut start = self.leaves(&tape);
        let head = start.split_off(self.backbone().parameters().len());
        start.extend(spread(&head, support.way)?);
        let mut fast: Vec<Tensor> = start.iter().map(|var| var.value().clone()).collect();
        for _ in 0..inner.test_steps {
            let gradients = support.gradients(self.backbone(), &fast)?;
            for (weight, gradient) in fast.iter_mut().zip(gradients) {
                *weight = (&*weight - (gradient * inner.learning_rate)?)?;
            }
        }
        Ok(fast)
    }
}

impl SupportImages<'_> {
    fn batches(&self) -> impl Iterator<Item = Range<usize>> {
        let n = self.labels.len();
        (0..n).step_by(BATCH).map(move |start| start..n.min(start + BATCH))
    }

    /// Embeddings `[n, d]`, row-major.
    fn embed(&self, backbone: &Backbone) -> Result<Vec<f32>> {
        let mut all = Vec::new();
        for range in self.batches() {
            all.extend(backbone.embed(&(self.read)(range)?, BnMode::Running)?);
        }
        Ok(all)
    }

    /// Gradients of the mean cross-entropy to `weights`, the network's and then the head's, summed batch
    /// after batch.
    fn gradients(&self, backbone: &Backbone, weights: &[Tensor]) -> Result<Vec<Tensor>> {
        let mut total: Vec<Tensor> = Vec::new();
        for range in self.batches() {
            let images = (self.read)(range.clone())?;
            let tape = Tape::new();
            let leaves: Vec<Var> = weights.iter().map(|w| tape.leaf(w.clone())).collect();
            let shape = images.shape();
            let images = tape.constant(Tensor::from_vec(images.into_data(), &shape, &Device::Cpu)?);
            let (body, head) = leaves.split_at(backbone.parameters().len());
            let seen = backbone.forward(body, &images, BnMode::Running)?;
            let share = range.len() as f64 / self.labels.len() as f64;
            let loss =
                linear(&seen.embedding, head)?.cross_entropy(&self.labels[range])?.scale(share)?;
            let own = grad(&loss, &leaves.iter().collect::<Vec<_>>(), Order::First)?;
            if total.is_empty() {
                total = own.iter().map(|gradient| gradient.value().clone()).collect();
                continue;
            }
            for (sum, gradient) in total.iter_mut().zip(&own) {
                *sum = (&*sum + gradient.value())?;
            }
        }
        Ok(total)
    }
}

/// Values of a head's weight and bias.
fn values_of(head: &[Tensor]) -> Result<[Vec<f32>; 2]> {
    let [weight, bias] = head else {
        return Err(Error::internal("a head has a weight and a bias"));
    };
    Ok([weight.flatten_all()?.to_vec1()?, bias.flatten_all()?.to_vec1()?])
}

impl Classifier {
    /// Nearest class mean of `features` `[n, d]` of a network, labelled in `0..way` (ProtoNet).
    ///
    /// # Errors
    /// When a class has no feature.
    pub(super) fn nearest_mean(
        backbone: Backbone,
        features: &[f32],
        labels: &[usize],
        way: usize,
    ) -> Result<Self> {
        let dim = features.len() / labels.len().max(1);
        let [weight, bias] = linear_head(features, labels, dim, way)?;
        Ok(Self { backbone, way, weight, bias })
    }

    /// The same head on another network.
    pub(super) fn with_backbone(&self, backbone: Backbone) -> Self {
        Self { backbone, ..self.clone() }
    }

    /// The network.
    pub(super) fn backbone(&self) -> &Backbone {
        &self.backbone
    }

    /// The head: `[way, d]` and `[way]`.
    pub(super) fn head(&self) -> Result<[Tensor; 2]> {
        let shape = (self.way, self.weight.len() / self.way.max(1));
        let weight = Tensor::from_slice(&self.weight, shape, &Device::Cpu)?;
        Ok([weight, Tensor::from_slice(&self.bias, self.way, &Device::Cpu)?])
    }

    /// Replaces the head.
    pub(super) fn set_head(&mut self, head: &[Var]) -> Result<()> {
        let head: Vec<Tensor> = head.iter().map(|var| var.value().clone()).collect();
        [self.weight, self.bias] = values_of(&head)?;
        Ok(())
    }

    /// Number of classes.
    pub fn way(&self) -> usize {
        self.way
    }

    /// Logits `[n, way]`, row-major, of canonical images.
    ///
    /// # Errors
    /// When the images are not RGB or of another size than it was made for.
    pub fn logits(&self, images: &Images) -> Result<Vec<f32>> {
        let features = self.backbone.embed(images, BnMode::Running)?;
        let dim = self.weight.len() / self.way.max(1);
        let head = || self.weight.chunks_exact(dim.max(1)).zip(&self.bias);
        let logit = |x: &[f32], (row, bias): (&[f32], &f32)| {
            let product: f64 = x.iter().zip(row).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
            (product + f64::from(*bias)) as f32
        };
        let rows = features.chunks_exact(dim.max(1));
        Ok(rows.flat_map(|x| head().map(move |own| logit(x, own))).collect())
    }

    /// The class of each row of logits: the largest, the first of equals.
    pub fn predictions(&self, logits: &[f32]) -> Vec<usize> {
        logits.chunks_exact(self.way.max(1)).map(first_largest).collect()
    }

    /// As one graph: input `images` `[batch, 3, height, width]`, canonical, output `logits` `[batch, way]`.
    ///
    /// # Errors
    /// When the network cannot be composed.
    pub fn to_graph(&self, [height, width]: [usize; 2]) -> Result<Graph> {
        let embedding = self.backbone.to_graph(height, width)?;
        let dim = self.weight.len() / self.way.max(1);
        classifier_graph(
            &embedding,
            ConstantTensor::f32(vec![self.way, dim], self.weight.clone()),
            ConstantTensor::f32(vec![self.way], self.bias.clone()),
        )
    }
}
