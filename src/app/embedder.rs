//! What evaluation needs of a meta-model: images in, one vector an image out.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::run_folder::RunFolder;
use super::settings;
use crate::error::{Error, Result, ResultExt};
use crate::graph::{CompileOptions, Dimension, Gradient, Graph, Plan, Taps, Workspace};
use crate::meta::{BnMode, Learner, MetaModel};
use crate::onnx;
use crate::tensor::Images;

/// Images an exported model is compiled for; a smaller batch is filled up.
const ONNX_BATCH: usize = 64;

/// Which statistics the meta-model's batch normalisation uses on test images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BatchNorm {
    /// Those fixed in training: a query's answer does not depend on the other queries.
    Inductive,
    /// Those of the episode's support and query images together. Higher figures; they assume that
    /// the queries come as a batch with every class in equal number.
    Transductive,
}

impl BatchNorm {
    fn mode(self) -> BnMode {
        match self {
            Self::Inductive => BnMode::Running,
            Self::Transductive => BnMode::Batch,
        }
    }

    /// The name in results and flags.
    pub fn name(self) -> &'static str {
        match self {
            Self::Inductive => "inductive",
            Self::Transductive => "transductive",
        }
    }
}

/// A meta-model as evaluation sees it.
pub trait Embedder: Send + Sync {
    /// `[height, width]` of the images it takes.
    fn image_size(&self) -> [usize; 2];

    /// Length of a vector.
    fn dim(&self) -> usize;

    /// Vectors `[n, dim]`, row-major, of `n` canonical images.
    ///
    /// # Errors
    /// When the model fails, or cannot normalise in the way asked for.
    fn embed(&self, images: &Images, batch_norm: BatchNorm) -> Result<Vec<f32>>;

    /// Whether queries go to the nearest class mean of the vectors; else ask [`Embedder::learn`].
    fn rule(&self) -> Rule {
        Rule::NearestMean
    }

    /// The classes of `query` after learning `way` classes from labelled support images.
    ///
    /// # Errors
    /// When the model fails.
    fn learn(&self, episode: &Labelled<'_>, batch_norm: BatchNorm) -> Result<Vec<usize>> {
        let _ = (episode, batch_norm);
        Err(Error::internal("this model answers by its vectors"))
    }
}

/// How a model answers an episode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// By the nearest class mean of its vectors, which can be computed beforehand.
    NearestMean,
    /// By adapting to the support set.
    Adapting,
}

/// An episode's images.
#[derive(Debug)]
pub struct Labelled<'a> {
    /// Support images.
    pub support: &'a Images,
    /// Their labels, in `0..way`.
    pub labels: &'a [usize],
    /// Query images.
    pub query: &'a Images,
    /// Number of classes.
    pub way: usize,
}

/// A trained (or untrained) model in memory.
#[derive(Debug)]
pub struct ModelEmbedder {
    model: MetaModel,
    image_size: [usize; 2],
    dim: usize,
}

impl ModelEmbedder {
    /// `model` for images of `[height, width]`.
    ///
    /// # Errors
    /// When the images are too small for it.
    pub fn new(model: impl Into<MetaModel>, image_size: [usize; 2]) -> Result<Self> {
        let model = model.into();
        let dim = model.backbone().embedding_dim(image_size[0], image_size[1])?;
        Ok(Self { model, image_size, dim })
    }

    /// The network of a run's newest checkpoint.
    ///
    /// # Errors
    /// When the run has no usable checkpoint.
    pub fn trained(run: &RunFolder) -> Result<Self> {
        Self::new(MetaModel::load(&run.latest_checkpoint()?)?, run.config()?.image_size)
    }

    /// The network that the run's training started from.
    ///
    /// # Errors
    /// When the run's settings are damaged.
    pub fn untrained(run: &RunFolder) -> Result<Self> {
        let config = run.config()?;
        Self::new(settings::starting_model(run, &config)?, config.image_size)
    }
}

impl Embedder for ModelEmbedder {
    fn image_size(&self) -> [usize; 2] {
        self.image_size
    }

    fn dim(&self) -> usize {
        self.dim
    }

    fn embed(&self, images: &Images, batch_norm: BatchNorm) -> Result<Vec<f32>> {
        self.model.backbone().embed(images, batch_norm.mode())
    }

    fn rule(&self) -> Rule {
        match self.model.learner() {
            Learner::ProtoNet => Rule::NearestMean,
            Learner::Anil(_) | Learner::Maml(_) => Rule::Adapting,
        }
    }

    fn learn(&self, episode: &Labelled<'_>, batch_norm: BatchNorm) -> Result<Vec<usize>> {
        let Labelled { support, labels, query, way } = *episode;
        let answer = self.model.classify(support, labels, query, way, batch_norm.mode())?;
        all_finite(&answer.logits).map_err(|error| {
            error.hint(
                "training has diverged: lower `meta.learning_rate` or `meta.inner.learning_rate`",
            )
        })?;
        Ok(answer.predictions)
    }
}

/// Refuses logits that are no numbers.
pub(super) fn all_finite(logits: &[f32]) -> Result<()> {
    if logits.iter().all(|logit| logit.is_finite()) {
        return Ok(());
    }
    Err(Error::internal("the model gives infinite or undefined logits"))
}

/// An exported embedding, run by our own engine.
#[derive(Debug)]
pub struct OnnxEmbedder {
    plan: Plan<f32>,
    image_size: [usize; 2],
    dim: usize,
    /// Buffers not in use; at most one a thread.
    spare: Mutex<Vec<Workspace<f32>>>,
}

impl OnnxEmbedder {
    /// Opens a file with one image input `[batch, 3, height, width]`; of its outputs the one called
    /// `embedding`, else the first, is used.
    ///
    /// # Errors
    /// When the file is no such model, or has an operator that our engine lacks.
    pub fn open(path: &Path) -> Result<Self> {
        let root = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let model = onnx::load(path, root)?;
        Self::compile(&model.graph).context(|| format!("meta-model `{}`", path.display()))
    }

    fn compile(graph: &Graph) -> Result<Self> {
        let hint = || "`metazoa export RUN --form embedding` writes such a file".to_owned();
        let inputs: Vec<&str> = graph.inputs.iter().map(|port| port.name.as_str()).collect();
        let [input] = graph.inputs.as_slice() else {
            return Err(Error::input(format!(
                "an embedding has one input, this model has `{}`",
                inputs.join("`, `")
            ))
            .hint(hint()));
        };
        let Some([_, Dimension::Fixed(3), Dimension::Fixed(height), Dimension::Fixed(width)]) =
            input.shape.as_deref()
        else {
            return Err(Error::input(format!(
                "input must be RGB images [batch, 3, height, width] of a fixed size: `{}`",
                input.name
            ))
            .hint(hint()));
        };
        let named = graph.outputs.iter().find(|port| port.name == "embedding");
        let output = named.or(graph.outputs.first());
        let output = output.ok_or_else(|| Error::input("the model has no output"))?;
        let plan = Plan::compile(
            graph,
            &CompileOptions {
                input: input.name.clone(),
                input_shape: vec![ONNX_BATCH, 3, *height, *width],
                output: output.name.clone(),
                gradient: Gradient::Unused,
                taps: Taps::Norms,
            },
        )?;
        let dim = match plan.output_shape() {
            [ONNX_BATCH, rest @ ..] if !rest.is_empty() => rest.iter().product(),
            other => {
                return Err(Error::input(format!(
                    "output must hold one vector an image, its shape is `{other:?}`"
                ))
                .hint(hint()));
            }
        };
        Ok(Self { plan, image_size: [*height, *width], dim, spare: Mutex::default() })
    }
}

impl Embedder for OnnxEmbedder {
    fn image_size(&self) -> [usize; 2] {
        self.image_size
    }

    fn dim(&self) -> usize {
        self.dim
    }

    fn embed(&self, images: &Images, batch_norm: BatchNorm) -> Result<Vec<f32>> {
        if batch_norm == BatchNorm::Transductive {
            return Err(Error::unsupported(
                "an exported model has its statistics fixed: `--bn transductive` needs the run",
            )
            .hint("evaluate the run folder, or leave out `--bn`"));
        }
        let lock = || self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        let spare = lock().pop();
        let mut workspace = spare.unwrap_or_else(|| self.plan.workspace());
        let mut vectors = Vec::with_capacity(images.len() * self.dim);
        let mut batch = vec![0.0; ONNX_BATCH * images.stride()];
        for start in (0..images.len()).step_by(ONNX_BATCH) {
            let part = images.range(start, images.len().min(start + ONNX_BATCH));
            batch[..part.data().len()].copy_from_slice(part.data());
            let output = self.plan.forward(&mut workspace, &batch);
            vectors.extend_from_slice(&output[..part.len() * self.dim]);
        }
        lock().push(workspace);
        Ok(vectors)
    }
}
