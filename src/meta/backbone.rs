//! The embedding network of the meta-model: a graph with free weights, its named parameters and its
//! running statistics.
//!
//! Images are canonical ([0, 1], RGB); the network normalises them itself. Parameters are plain
//! tensors: a pass takes them as variables of a tape, so the same network runs with its own weights or
//! with fast weights.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};

pub use super::architectures::{Architecture, EPSILON, IMAGE_MEAN, IMAGE_STD, STANDARD_WIDTH};
use super::onnx_file::write_structure;
use crate::error::{Error, Result, ResultExt};
pub use crate::graph::trainable::RunningStatistics;
use crate::graph::trainable::{NormLayer, Statistics, free_constants};
use crate::graph::{ConstantTensor, Dimension, Graph, Trainable};
use crate::tensor::tape::{BatchStatistics, Float, Tape, Var};
use crate::tensor::{Images, TensorStore};

/// Weight of a new batch in the running statistics, PyTorch's default.
pub const MOMENTUM: f64 = 0.1;

const CHANNELS: usize = 3;
/// Images a pass takes at once when statistics are fixed.
const EMBED_BATCH: usize = 64;

/// Which statistics batch normalisation uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BnMode {
    /// Those of the batch at hand: training, and transductive evaluation.
    Batch,
    /// The running averages of training: inductive evaluation.
    Running,
}

/// A parameter by name.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// `conv1.weight`, `conv1.bias`, `norm1.weight`, `norm1.bias`, `conv2.weight`, ...
    pub name: String,
    /// Its value, `f32`.
    pub value: Tensor,
}

/// What a pass gives.
#[derive(Debug)]
pub struct Embedded {
    /// Embeddings `[N, d]`.
    pub embedding: Var,
    /// Statistics of the batch at each normalisation, in order; empty in [`BnMode::Running`].
    pub statistics: Vec<BatchStatistics>,
}

/// The network compiled for the shapes met so far; clones of a backbone share it.
#[derive(Debug, Default)]
struct Compiled {
    single: Mutex<HashMap<Vec<usize>, Arc<Trainable<f32>>>>,
    double: Mutex<HashMap<Vec<usize>, Arc<Trainable<f64>>>>,
}

/// An embedding network.
#[derive(Debug, Clone)]
pub struct Backbone {
    architecture: Architecture,
    graph: Arc<Graph>,
    parameters: Vec<Parameter>,
    norms: Vec<NormLayer>,
    running: Vec<RunningStatistics>,
    compiled: Arc<Compiled>,
}

impl Backbone {
    /// A fresh Conv4 of `width` channels.
    ///
    /// # Errors
    /// When `width` is 0.
    pub fn conv4(width: usize, seed: u64) -> Result<Self> {
        Self::new(Architecture::Conv4 { width }, seed)
    }

    /// A fresh network, its weights drawn by `seed`.
    ///
    /// # Errors
    /// When the architecture has no channels.
    pub fn new(architecture: Architecture, seed: u64) -> Result<Self> {
        let graph = architecture.graph(seed)?;
        let names = free_constants(&graph, "embedding");
        // Any size that every architecture takes.
        Self::of_graph(architecture, graph, &names, [32, 32])
    }

    /// `graph` with the constants `names` as parameters; it takes images of `[height, width]`.
    pub(super) fn of_graph(
        architecture: Architecture,
        graph: Graph,
        names: &[String],
        [height, width]: [usize; 2],
    ) -> Result<Self> {
        let mut parameters = Vec::with_capacity(names.len());
        for name in names {
            let constant = graph
                .constants
                .get(name)
                .ok_or_else(|| Error::internal(format!("no constant `{name}`")))?;
            let name = name.clone();
            let value = tensor(constant.to_f32(), &constant.shape)?;
            parameters.push(Parameter { name, value });
        }
        let mut own = Self {
            architecture,
            graph: Arc::new(graph),
            parameters,
            norms: Vec::new(),
            running: Vec::new(),
            compiled: Arc::default(),
        };
        own.norms = own.compile::<f32>(&[1, CHANNELS, height, width])?.norms().to_vec();
        own.running = own.norms.iter().map(|norm| norm.running.clone()).collect();
        Ok(own)
    }

    /// Its architecture.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// Parameters in the order in which the network reads them.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Running statistics of each normalisation, in order.
    pub fn running(&self) -> &[RunningStatistics] {
        &self.running
    }

    /// What it computes but for its weights ([`Trainable::structure`]), for images of `[height, width]`.
    ///
    /// # Errors
    /// As [`Backbone::embedding_dim`].
    pub(super) fn structure(&self, [height, width]: [usize; 2]) -> Result<Vec<String>> {
        let program = self.cached(&self.compiled.single, &[1, CHANNELS, height, width])?;
        Ok(program.structure())
    }

    /// Values of all parameters, then of all running means and variances.
    pub(super) fn numbers(&self) -> Result<Vec<Vec<f64>>> {
        let wide = |values: &[f32]| values.iter().copied().map(f64::from).collect();
        let mut all = Vec::new();
        for parameter in &self.parameters {
            all.push(wide(&numbers(&parameter.value)?));
        }
        all.extend(self.running.iter().flat_map(|r| [wide(&r.mean), wide(&r.variance)]));
        Ok(all)
    }

    /// Sets what [`Backbone::numbers`] gives.
    pub(super) fn set_numbers(&mut self, values: Vec<Vec<f32>>) -> Result<()> {
        let mut values = values.into_iter();
        let mut next = || values.next().ok_or_else(|| Error::internal("too few numbers"));
        for parameter in &mut self.parameters {
            parameter.value = tensor(next()?, parameter.value.dims())?;
        }
        for running in &mut self.running {
            running.mean = next()?;
            running.variance = next()?;
        }
        Ok(())
    }

    /// Length of an embedding for images of `height` x `width`.
    ///
    /// # Errors
    /// When nothing is left of so small an image.
    pub fn embedding_dim(&self, height: usize, width: usize) -> Result<usize> {
        let program = self.cached(&self.compiled.single, &[1, CHANNELS, height, width])?;
        Ok(program.output_shape().iter().skip(1).product())
    }

    /// The first node that a weight's gradient goes through and that has a first derivative only, for
    /// images of `[height, width]`.
    ///
    /// # Errors
    /// As [`Backbone::embedding_dim`].
    pub fn first_order_node(&self, [height, width]: [usize; 2]) -> Result<Option<String>> {
        let program = self.cached(&self.compiled.single, &[1, CHANNELS, height, width])?;
        Ok(program.first_order_node().map(str::to_owned))
    }

    /// The parameters as variables of a tape.
    pub fn leaves(&self, tape: &Tape) -> Vec<Var> {
        self.parameters.iter().map(|p| tape.leaf(p.value.clone())).collect()
    }

    /// The parameters as constants of a tape.
    pub fn constants(&self, tape: &Tape) -> Vec<Var> {
        self.parameters.iter().map(|p| tape.constant(p.value.clone())).collect()
    }

    /// Replaces the parameters, in the order of [`Backbone::parameters`].
    ///
    /// # Errors
    /// When the number or a shape differs.
    pub fn set_parameters(&mut self, values: Vec<Tensor>) -> Result<()> {
        let dims = |t: &Tensor| t.dims().to_vec();
        if !values.iter().map(dims).eq(self.parameters.iter().map(|p| dims(&p.value))) {
            return Err(Error::internal("parameters do not fit this backbone"));
        }
        for (parameter, value) in self.parameters.iter_mut().zip(values) {
            parameter.value = value;
        }
        Ok(())
    }

    /// Embeds `images` `[N, 3, H, W]` with the given parameters (the network's own or fast weights).
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(&self, parameters: &[Var], images: &Var, mode: BnMode) -> Result<Embedded> {
        let statistics = match mode {
            BnMode::Batch => Statistics::Batch,
            BnMode::Running => Statistics::Given(&self.running),
        };
        let pass = match self.program(images.dtype(), images.dims())? {
            Program::Single(program) => program.run(parameters, images, statistics)?,
            Program::Double(program) => program.run(parameters, images, statistics)?,
        };
        Ok(Embedded { embedding: pass.output.flatten_rows()?, statistics: pass.statistics })
    }

    fn program(&self, dtype: DType, shape: &[usize]) -> Result<Program> {
        let Compiled { single, double } = &*self.compiled;
        Ok(match dtype {
            DType::F64 => Program::Double(self.cached(double, shape)?),
            _ => Program::Single(self.cached(single, shape)?),
        })
    }

    fn cached<T: Float>(
        &self,
        cache: &Mutex<HashMap<Vec<usize>, Arc<Trainable<T>>>>,
        shape: &[usize],
    ) -> Result<Arc<Trainable<T>>> {
        let lock = || cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(program) = lock().get(shape) {
            return Ok(Arc::clone(program));
        }
        let program = Arc::new(self.compile::<T>(shape)?);
        lock().insert(shape.to_vec(), Arc::clone(&program));
        Ok(program)
    }

    fn compile<T: Float>(&self, shape: &[usize]) -> Result<Trainable<T>> {
        let names: Vec<String> = self.parameters.iter().map(|p| p.name.clone()).collect();
        let compiled = Trainable::compile(&self.graph, "images", shape, "embedding", &names);
        if self.architecture == Architecture::Onnx {
            let program = compiled.context(|| "its weights cannot be trained".into())?;
            return match program.output_shape() {
                [rows, ..] if *rows == shape[0] => Ok(program),
                other => Err(Error::unsupported(format!(
                    "{} images make an embedding of shape `{other:?}`",
                    shape[0]
                ))
                .hint("export the file with a dynamic batch dimension")),
            };
        }
        compiled.map_err(|error| {
            Error::usage(format!("{} cannot take images of shape `{shape:?}`", self.architecture))
                .hint("choose a larger `image_size`")
                .context(error.to_string())
        })
    }

    /// Moves the running statistics towards those of a batch, as PyTorch: weight 0.1, the variance
    /// unbiased.
    pub fn update_running(&mut self, statistics: &[BatchStatistics]) {
        for (running, own) in self.running.iter_mut().zip(statistics) {
            let unbias = own.count as f64 / (own.count as f64 - 1.0).max(1.0);
            let mix = |old: &mut f32, new: f64| {
                *old = (f64::from(*old) * (1.0 - MOMENTUM) + new * MOMENTUM) as f32;
            };
            running.mean.iter_mut().zip(&own.mean).for_each(|(old, &new)| mix(old, new));
            for (old, &new) in running.variance.iter_mut().zip(&own.variance) {
                mix(old, new * unbias);
            }
        }
    }

    /// Embeddings `[n, d]`, row-major, of canonical images. In [`BnMode::Batch`] all images are
    /// normalised together; in [`BnMode::Running`] each is on its own.
    ///
    /// # Errors
    /// When the images are not RGB or too small.
    pub fn embed(&self, images: &Images, mode: BnMode) -> Result<Vec<f32>> {
        let [n, channels, height, width] = images.shape();
        let dim = self.embedding_dim(height, width)?;
        if channels != CHANNELS {
            return Err(Error::internal(format!(
                "the backbone takes RGB images, got channels `{channels}`"
            )));
        }
        let batch = if mode == BnMode::Batch { n.max(1) } else { EMBED_BATCH };
        let mut all = Vec::with_capacity(n * dim);
        for start in (0..n).step_by(batch) {
            let part = images.range(start, (start + batch).min(n));
            let tape = Tape::new();
            let dims = part.shape();
            let x = tape.constant(tensor(part.into_data(), &dims)?);
            let embedded = self.forward(&self.constants(&tape), &x, mode)?;
            all.extend(embedded.embedding.value().flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(all)
    }

    /// The network as a graph for images of `height` x `width`: input `images` `[batch, 3, H, W]`, canonical
    /// ([0, 1], RGB), normalised inside; output `embedding` `[batch, d]`. Normalisation uses the running
    /// statistics.
    ///
    /// # Errors
    /// When the images are too small.
    pub fn to_graph(&self, height: usize, width: usize) -> Result<Graph> {
        let dim = self.embedding_dim(height, width)?;
        let mut graph = Graph::clone(&self.graph);
        let batch = Dimension::Symbol("batch".into());
        let sizes = |sizes: &[usize]| -> Option<Vec<Dimension>> {
            let sizes = sizes.iter().map(|&size| Dimension::Fixed(size));
            Some(std::iter::once(batch.clone()).chain(sizes).collect())
        };
        graph.inputs[0].shape = sizes(&[CHANNELS, height, width]);
        graph.outputs[0].shape = sizes(&[dim]);
        let mut set = |name: &str, shape: &[usize], values: Vec<f32>| {
            graph.constants.insert(name.into(), Arc::new(ConstantTensor::f32(shape, values)));
        };
        for parameter in &self.parameters {
            set(&parameter.name, parameter.value.dims(), numbers(&parameter.value)?);
        }
        for (name, shape, values) in self.statistics() {
            set(name, &shape, values.to_vec());
        }
        Ok(graph)
    }

    /// Names, shapes and values of the running statistics.
    fn statistics(&self) -> impl Iterator<Item = (&str, [usize; 1], &[f32])> {
        self.norms.iter().zip(&self.running).flat_map(|(norm, running)| {
            let [mean, variance] = norm.constants.each_ref().map(String::as_str);
            let size = [running.mean.len()];
            [(mean, size, running.mean.as_slice()), (variance, size, running.variance.as_slice())]
        })
    }

    /// Writes parameters, running statistics and architecture into a store.
    ///
    /// # Errors
    /// When a parameter cannot be read from its device.
    pub fn write_to(&self, store: &mut TensorStore) -> Result<()> {
        store.words.insert("architecture".into(), self.architecture.to_string());
        for parameter in &self.parameters {
            store.insert(&parameter.name, parameter.value.dims(), numbers(&parameter.value)?);
        }
        for (name, shape, values) in self.statistics() {
            store.insert(name, &shape, values.to_vec());
        }
        if self.architecture == Architecture::Onnx {
            let stored = self.parameters.iter().map(|p| p.name.as_str());
            let stored = stored.chain(self.statistics().map(|(name, ..)| name));
            write_structure(&self.graph, stored, store)?;
        }
        Ok(())
    }

    /// The network that [`Backbone::write_to`] wrote.
    ///
    /// # Errors
    /// When the store holds no such network, or values that are not finite.
    pub fn read_from(store: &TensorStore) -> Result<Self> {
        let architecture: Architecture = store.word("architecture")?.parse()?;
        if let Architecture::Conv4 { width } = architecture {
            // Before a network of that size is made.
            let first = store.tensors.get("conv1.weight").and_then(|t| t.shape.first().copied());
            if width == 0 || first != Some(width) {
                return Err(Error::input(format!("the file's weights are not of width `{width}`")));
            }
        }
        let values = |name: &str, dims: &[usize]| -> Result<Vec<f32>> {
            let values = store.tensor(name, dims)?;
            if values.iter().any(|v| !v.is_finite()) {
                return Err(Error::input(format!("values that are not finite in tensor `{name}`")));
            }
            Ok(values.to_vec())
        };
        let mut own = match architecture {
            Architecture::Onnx => Self::of_structure(store)?,
            _ => Self::new(architecture, 0)?,
        };
        for parameter in &mut own.parameters {
            let dims = parameter.value.dims().to_vec();
            parameter.value = tensor(values(&parameter.name, &dims)?, &dims)?;
        }
        for (norm, running) in own.norms.iter().zip(&mut own.running) {
            let size = [running.mean.len()];
            running.mean = values(&norm.constants[0], &size)?;
            running.variance = values(&norm.constants[1], &size)?;
        }
        Ok(own)
    }

    /// Writes the network to a safetensors file.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut store = TensorStore::default();
        self.write_to(&mut store)?;
        store.save(path)
    }

    /// Reads a network from a safetensors file.
    ///
    /// # Errors
    /// When the file cannot be read or holds no such network.
    pub fn load(path: &Path) -> Result<Self> {
        Self::read_from(&TensorStore::load(path)?).context(|| format!("`{}`", path.display()))
    }
}

enum Program {
    Single(Arc<Trainable<f32>>),
    Double(Arc<Trainable<f64>>),
}

fn tensor(values: Vec<f32>, dims: &[usize]) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, dims, &Device::Cpu)?)
}

fn numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1::<f32>()?)
}
