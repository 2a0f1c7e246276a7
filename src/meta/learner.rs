//! The few-shot rule around a backbone: ProtoNet, ANIL or MAML.
//!
//! * *ProtoNet* (Snell et al. 2017): queries go to the nearest class mean of the embeddings.
//! * *MAML* (Finn et al. 2017; methods.md 1.5): all weights take gradient steps on the support set.
//! * *ANIL* (Raghu et al. 2020): only the linear head does, on embeddings that stay.
//!
//! The head of the last two is one row, the same for every class before the first step (Ye and Chao
//! 2022): nothing depends on the order of the classes, and a model trained with any number of ways is
//! tested with any other.

use std::ops::Range;

use candle_core::{Device, Tensor};

use super::backbone::{Backbone, BnMode, Embedded, Parameter};
use super::export::Head;
use super::protonet::{
    Classification, classify, first_largest, logit_factor, prototype_logits, prototypes,
    weighted_prototypes,
};
use super::task::{Task, Wanted};
use crate::error::{Error, Result, ResultExt};
use crate::graph::ConstantTensor;
use crate::tensor::tape::{BatchStatistics, Order, Tape, Var, grad};
use crate::tensor::{Images, RngStream, TensorStore};

/// Which derivatives of the inner loop the outer gradient sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InnerOrder {
    /// All: the gradient through the inner steps.
    Second,
    /// The inner gradients count as constants.
    First,
}

/// Gradient steps on the support set.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InnerLoop {
    /// Steps in meta-training.
    pub train_steps: usize,
    /// Steps on a new task.
    pub test_steps: usize,
    /// Their learning rate.
    pub learning_rate: f64,
    /// What the outer gradient sees of them.
    pub order: InnerOrder,
}

/// The few-shot rule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Learner {
    /// Nearest class mean.
    ProtoNet,
    /// A linear head that adapts.
    Anil(InnerLoop),
    /// Backbone and head that adapt.
    Maml(InnerLoop),
}

impl Learner {
    /// The name in settings and files.
    pub fn name(&self) -> &'static str {
        match self {
            Self::ProtoNet => "protonet",
            Self::Anil(_) => "anil",
            Self::Maml(_) => "maml",
        }
    }

    fn inner(&self) -> Option<InnerLoop> {
        match self {
            Self::ProtoNet => None,
            Self::Anil(inner) | Self::Maml(inner) => Some(*inner),
        }
    }
}

/// Logits of the queries and what was seen on the way.
#[derive(Debug)]
pub struct Answer {
    /// `[queries, way]`; ProtoNet's are times the factor of training.
    pub logits: Var,
    /// Batch statistics of the last pass, for the running averages.
    pub statistics: Vec<BatchStatistics>,
}

/// Backbone and rule: what is meta-trained.
#[derive(Debug, Clone)]
pub struct MetaModel {
    backbone: Backbone,
    learner: Learner,
    /// The head's row `[1, d]` and offset `[1]`; empty for ProtoNet.
    head: Vec<Parameter>,
}

impl From<Backbone> for MetaModel {
    /// ProtoNet.
    fn from(backbone: Backbone) -> Self {
        Self { backbone, learner: Learner::ProtoNet, head: Vec::new() }
    }
}

impl MetaModel {
    /// `backbone` under `learner` for images of `[height, width]`; a head is drawn by `seed`, uniform
    /// within 1 / sqrt(d) as PyTorch's linear layer, its offset 0.
    ///
    /// # Errors
    /// When the images are too small for the backbone, or it has no second derivative and MAML asks for it.
    pub fn new(
        backbone: Backbone,
        learner: Learner,
        [height, width]: [usize; 2],
        seed: u64,
    ) -> Result<Self> {
        let dim = backbone.embedding_dim(height, width)?;
        if matches!(learner, Learner::Maml(inner) if inner.order == InnerOrder::Second)
            && let Some(node) = backbone.first_order_node([height, width])?
        {
            return Err(Error::unsupported(format!("{node} has no second derivative here"))
                .context("MAML of second order cannot train this backbone")
                .hint("set `meta.inner.order: first`, or `meta.learner: anil` or `protonet`"));
        }
        let mut head = Vec::new();
        if learner != Learner::ProtoNet {
            let mut rng = RngStream::new(seed, "initialise", "head.weight", 0);
            let bound = 1.0 / (dim as f32).sqrt();
            let row: Vec<f32> = (0..dim).map(|_| rng.uniform_in(-bound, bound)).collect();
            let parameter = |name: &str, values: Vec<f32>, dims: &[usize]| -> Result<Parameter> {
                let value = Tensor::from_vec(values, dims, &Device::Cpu)?;
                Ok(Parameter { name: name.into(), value })
            };
            head.push(parameter("head.weight", row, &[1, dim])?);
            head.push(parameter("head.bias", vec![0.0], &[1])?);
        }
        Ok(Self { backbone, learner, head })
    }

    /// The embedding network.
    pub fn backbone(&self) -> &Backbone {
        &self.backbone
    }

    /// The embedding network, for its running statistics.
    pub fn backbone_mut(&mut self) -> &mut Backbone {
        &mut self.backbone
    }

    /// The embedding network, consuming the model.
    pub fn into_backbone(self) -> Backbone {
        self.backbone
    }

    /// The rule.
    pub fn learner(&self) -> Learner {
        self.learner
    }

    /// The head before its first step, with the steps of a new task.
    ///
    /// # Errors
    /// When the rule has no head.
    pub fn head(&self, inner: InnerLoop) -> Result<Head> {
        let [row, offset] = self.head.as_slice() else {
            return Err(Error::internal("this learner has no head"));
        };
        let constant = |parameter: &Parameter| -> Result<ConstantTensor> {
            let values = parameter.value.flatten_all()?.to_vec1::<f32>()?;
            Ok(ConstantTensor::f32(parameter.value.dims(), values))
        };
        Ok(Head {
            row: constant(row)?,
            offset: constant(offset)?,
            steps: inner.test_steps,
            learning_rate: inner.learning_rate,
        })
    }

    /// All that is trained: the backbone's parameters, then the head's.
    pub fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        self.backbone.parameters().iter().chain(&self.head)
    }

    /// The parameters as variables of a tape.
    pub fn leaves(&self, tape: &Tape) -> Vec<Var> {
        self.parameters().map(|p| tape.leaf(p.value.clone())).collect()
    }

    /// Replaces the parameters, in the order of [`MetaModel::parameters`].
    ///
    /// # Errors
    /// When the number or a shape differs.
    pub fn set_parameters(&mut self, mut values: Vec<Tensor>) -> Result<()> {
        let head = values.split_off(self.backbone.parameters().len().min(values.len()));
        if head.len() != self.head.len() {
            return Err(Error::internal("parameters do not fit this model"));
        }
        self.backbone.set_parameters(values)?;
        for (parameter, value) in self.head.iter_mut().zip(head) {
            parameter.value = value;
        }
        Ok(())
    }

    /// Logits of the queries after `steps` inner steps (ProtoNet takes none), with `parameters` in the
    /// order of [`MetaModel::parameters`], on the task's tape. In [`BnMode::Batch`] ProtoNet normalises
    /// support and queries together, the others each on its own.
    ///
    /// # Errors
    /// When shapes do not fit, or an operation has no second derivative and `order` asks for it.
    pub fn answer(
        &self,
        parameters: &[Var],
        task: Task<'_>,
        steps: usize,
        order: Order,
        mode: BnMode,
    ) -> Result<Answer> {
        let (body, head) = parameters.split_at(self.backbone.parameters().len());
        match self.learner {
            Learner::ProtoNet => self.nearest_mean(body, task, mode),
            Learner::Anil(inner) => {
                let seen = self.embed_of(body, task, task.support(), mode)?;
                let head = spread(head, task.way)?;
                let head = adapt_head(
                    &seen.embedding,
                    task.wanted(),
                    head,
                    (inner.learning_rate, steps, order),
                )?;
                let seen = self.embed_of(body, task, task.query(), mode)?;
                Ok(Answer { logits: linear(&seen.embedding, &head)?, statistics: seen.statistics })
            }
            Learner::Maml(inner) => {
                let mut fast = body.to_vec();
                fast.extend(spread(head, task.way)?);
                for _ in 0..steps {
                    let (body, head) = fast.split_at(body.len());
                    let seen = self.embed_of(body, task, task.support(), mode)?;
                    let loss = task.wanted().loss(&linear(&seen.embedding, head)?)?;
                    fast = descend(&loss, &fast, inner.learning_rate, order)?;
                }
                let (body, head) = fast.split_at(body.len());
                let seen = self.embed_of(body, task, task.query(), mode)?;
                Ok(Answer { logits: linear(&seen.embedding, head)?, statistics: seen.statistics })
            }
        }
    }

    /// Embeddings of the images `part` of a task, its partner's mixed in.
    fn embed_of(
        &self,
        body: &[Var],
        task: Task<'_>,
        part: Range<usize>,
        mode: BnMode,
    ) -> Result<Embedded> {
        let cut = |images: &Var| match part.len() == images.dims()[0] {
            true => Ok(images.clone()),
            false => images.narrow(0, part.start, part.len()),
        };
        let images = cut(task.images)?;
        let Some(partner) = task.partner else { return self.backbone.forward(body, &images, mode) };
        let others = cut(partner.images)?;
        let seen = self.backbone.forward(body, &Var::concat(&[&images, &others], 0)?, mode)?;
        let own = seen.embedding.narrow(0, 0, part.len())?.scale(partner.share)?;
        let rest = seen.embedding.narrow(0, part.len(), part.len())?.scale(1.0 - partner.share)?;
        Ok(Embedded { embedding: own.add(&rest)?, statistics: seen.statistics })
    }

    /// Logits of the task's queries as after training, with the test steps of the rule and weights that stay, but on
    /// the tape of the task: what differentiates the learner to the images it is asked about. The task's batch normalises
    /// it, as in training.
    ///
    /// # Errors
    /// As [`MetaModel::answer`].
    pub fn respond(&self, tape: &Tape, task: Task<'_>) -> Result<Var> {
        let steps = self.learner.inner().map_or(0, |inner| inner.test_steps);
        // Leaves, since inner steps differentiate to them.
        let parameters = self.leaves(tape);
        Ok(self.answer(&parameters, task, steps, Order::First, BnMode::Batch)?.logits)
    }

    fn nearest_mean(&self, body: &[Var], task: Task<'_>, mode: BnMode) -> Result<Answer> {
        let seen = self.embed_of(body, task, 0..task.images.dims()[0], mode)?;
        let n_support = task.labels.len();
        let support = seen.embedding.narrow(0, 0, n_support)?;
        let n_query = task.images.dims()[0] - n_support;
        let query = seen.embedding.narrow(0, n_support, n_query)?;
        // Soft labels make soft means: what the inner level of a learner without steps can learn of them.
        let means = match task.soft {
            Some(soft) => {
                let shares = soft.how.shares(task.labels, soft.logits);
                weighted_prototypes(&support, &shares, task.way)?
            }
            None => prototypes(&support, task.labels, task.way)?,
        };
        let factor = logit_factor(seen.embedding.dims()[1]);
        let logits = prototype_logits(&query, &means)?.scale(factor)?;
        Ok(Answer { logits, statistics: seen.statistics })
    }

    /// Learns `way` classes from labelled support images and classifies `query`, as after training:
    /// with the test steps of the rule.
    ///
    /// # Errors
    /// When the images are not RGB or too small, or a class has no support.
    pub fn classify(
        &self,
        support: &Images,
        labels: &[usize],
        query: &Images,
        way: usize,
        mode: BnMode,
    ) -> Result<Classification> {
        let mut both = support.clone();
        both.extend(query)?;
        let Some(inner) = self.learner.inner() else {
            let [_, _, height, width] = support.shape();
            let dim = self.backbone.embedding_dim(height, width)?;
            let mut support = self.backbone.embed(&both, mode)?;
            let query = support.split_off(labels.len() * dim);
            return classify(&support, labels, &query, dim, way);
        };
        let tape = Tape::new();
        let shape = both.shape();
        let images = tape.constant(Tensor::from_vec(both.into_data(), &shape, &Device::Cpu)?);
        let task = Task::new(&images, labels, way);
        let answer =
            self.answer(&self.leaves(&tape), task, inner.test_steps, Order::First, mode)?;
        let logits = answer.logits.value().flatten_all()?.to_vec1::<f32>()?;
        let predictions = logits.chunks_exact(way.max(1)).map(first_largest).collect();
        Ok(Classification { logits, predictions })
    }

    /// Writes backbone, rule and head into a store.
    ///
    /// # Errors
    /// When a parameter cannot be read from its device.
    pub fn write_to(&self, store: &mut TensorStore) -> Result<()> {
        self.backbone.write_to(store)?;
        store.words.insert("learner".into(), self.learner.name().into());
        if let Some(inner) = self.learner.inner() {
            let mut word = |name: &str, value: String| store.words.insert(name.into(), value);
            word("inner.train_steps", inner.train_steps.to_string());
            word("inner.test_steps", inner.test_steps.to_string());
            word("inner.learning_rate", inner.learning_rate.to_string());
            let order = if inner.order == InnerOrder::First { "first" } else { "second" };
            word("inner.order", order.into());
        }
        for parameter in &self.head {
            let values = parameter.value.flatten_all()?.to_vec1::<f32>()?;
            store.insert(&parameter.name, parameter.value.dims(), values);
        }
        Ok(())
    }

    /// The model that [`MetaModel::write_to`] wrote.
    ///
    /// # Errors
    /// When the store holds no such model, or values that are not finite.
    pub fn read_from(store: &TensorStore) -> Result<Self> {
        let backbone = Backbone::read_from(store)?;
        let inner = || -> Result<InnerLoop> {
            Ok(InnerLoop {
                train_steps: store.number("inner.train_steps")?,
                test_steps: store.number("inner.test_steps")?,
                learning_rate: store.number("inner.learning_rate")?,
                order: match store.word("inner.order")? {
                    "first" => InnerOrder::First,
                    "second" => InnerOrder::Second,
                    other => return Err(Error::input(format!("inner order `{other}`"))),
                },
            })
        };
        // A saved backbone alone is a ProtoNet.
        let learner = match store.words.get("learner").map_or("protonet", String::as_str) {
            "protonet" => return Ok(backbone.into()),
            "anil" => Learner::Anil(inner()?),
            "maml" => Learner::Maml(inner()?),
            other => return Err(Error::unsupported(format!("learner `{other}`"))),
        };
        let shape = store.tensors.get("head.weight").map(|tensor| tensor.shape.clone());
        let mut head = Vec::new();
        for (name, dims) in [("head.weight", shape.unwrap_or_default()), ("head.bias", vec![1])] {
            let values = store.tensor(name, &dims)?.to_vec();
            if values.iter().any(|value| !value.is_finite()) {
                return Err(Error::input(format!("values that are not finite in tensor `{name}`")));
            }
            let value = Tensor::from_vec(values, dims, &Device::Cpu)?;
            head.push(Parameter { name: name.into(), value });
        }
        Ok(Self { backbone, learner, head })
    }

    /// Writes the model to a safetensors file.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn save(&self, path: &std::path::Path) -> Result<()> {
        let mut store = TensorStore::default();
        self.write_to(&mut store)?;
        store.save(path)
    }

    /// Reads a model from a safetensors file.
    ///
    /// # Errors
    /// When the file cannot be read or holds no such model.
    pub fn load(path: &std::path::Path) -> Result<Self> {
        Self::read_from(&TensorStore::load(path)?).context(|| format!("`{}`", path.display()))
    }
}

/// A linear head after gradient steps on labelled `features` `[n, d]`.
pub(super) fn adapt_head(
    features: &Var,
    wanted: Wanted<'_>,
    mut head: Vec<Var>,
    (rate, steps, order): (f64, usize, Order),
) -> Result<Vec<Var>> {
    for _ in 0..steps {
        let loss = wanted.loss(&linear(features, &head)?)?;
        head = descend(&loss, &head, rate, order)?;
    }
    Ok(head)
}

/// The head's one row and offset for each of `way` classes: `[way, d]` and `[way]`.
pub(super) fn spread(head: &[Var], way: usize) -> Result<Vec<Var>> {
    let [row, offset] = head else {
        return Err(Error::internal("a head has a weight and a bias"));
    };
    Ok(vec![row.broadcast_to(&[way, row.dims()[1]])?, offset.broadcast_to(&[way])?])
}

/// Logits `[n, way]` of embeddings `[n, d]`.
pub(super) fn linear(features: &Var, head: &[Var]) -> Result<Var> {
    features.matmul(&head[0].transpose(0, 1)?)?.add(&head[1])
}

/// One gradient step.
fn descend(loss: &Var, weights: &[Var], rate: f64, order: Order) -> Result<Vec<Var>> {
    let gradients = grad(loss, &weights.iter().collect::<Vec<_>>(), order)?;
    weights.iter().zip(gradients).map(|(weight, g)| weight.sub(&g.scale(rate)?)).collect()
}
