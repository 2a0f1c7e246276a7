//! Conv4, the few-shot community's standard embedding network, as named parameters and running
//! statistics.
//!
//! Four blocks of conv 3x3 (padding 1, bias), batch normalisation, ReLU, max pooling 2x2; the
//! embedding is the flattened last map, `[width * (H >> 4) * (W >> 4)]`. Images are canonical ([0, 1],
//! RGB); the network normalises them itself. Parameters are plain tensors: a pass takes them as
//! variables of a tape, so the same network runs with its own weights or with fast weights.

use candle_core::{Device, Tensor};

use crate::error::{Error, Result};
use crate::tensor::tape::{Activation, BatchStatistics, ConvOptions, Tape, Var};
use crate::tensor::{Images, RngStream, TensorStore};

/// Added to variances, PyTorch's default.
pub const EPSILON: f64 = 1e-5;
/// Weight of a new batch in the running statistics, PyTorch's default.
pub const MOMENTUM: f64 = 0.1;
/// Mean that canonical images are normalised with, every channel.
pub const IMAGE_MEAN: f64 = 0.5;
/// Standard deviation that canonical images are normalised with, every channel.
pub const IMAGE_STD: f64 = 0.25;
/// Channels of the published Conv4 of PURER, BiDf-MKD and FREE (methods.md 1.3).
pub const STANDARD_WIDTH: usize = 32;

const BLOCKS: usize = 4;
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

/// Running statistics of one normalisation layer, one value a channel.
#[derive(Debug, Clone, PartialEq)]
pub struct RunningStatistics {
    /// Mean.
    pub mean: Vec<f32>,
    /// Unbiased variance.
    pub variance: Vec<f32>,
}

impl RunningStatistics {
    /// Normalisation by these statistics, `factor` and `offset` as one scale and shift per channel.
    fn scale_and_shift(&self, factor: &Var, offset: &Var) -> Result<(Var, Var)> {
        let constant = |values: Vec<f32>| -> Result<Var> {
            let value = tensor(values, factor.dims())?.to_dtype(factor.dtype())?;
            Ok(factor.tape().constant(value.to_device(factor.device())?))
        };
        let inverse_std =
            self.variance.iter().map(|&v| (1.0 / (f64::from(v) + EPSILON).sqrt()) as f32).collect();
        let scale = factor.mul(&constant(inverse_std)?)?;
        let shift = offset.sub(&scale.mul(&constant(self.mean.clone())?)?)?;
        Ok((scale, shift))
    }
}

/// What a pass gives.
#[derive(Debug)]
pub struct Embedded {
    /// Embeddings `[N, d]`.
    pub embedding: Var,
    /// Statistics of the batch at each normalisation, in order; empty in [`BnMode::Running`].
    pub statistics: Vec<BatchStatistics>,
}

/// A Conv4 network.
#[derive(Debug, Clone)]
pub struct Backbone {
    width: usize,
    parameters: Vec<Parameter>,
    running: Vec<RunningStatistics>,
}

impl Backbone {
    /// A fresh network: convolution weights N(0, 2 / (k k C_out)), their biases as PyTorch's
    /// (uniform within 1 / sqrt(fan in)), normalisation 1 and 0 (methods.md 1.3).
    ///
    /// # Errors
    /// When `width` is 0.
    pub fn conv4(width: usize, seed: u64) -> Result<Self> {
        if width == 0 {
            return Err(Error::usage("a backbone needs channels, got width `0`"));
        }
        let mut parameters = Vec::with_capacity(4 * BLOCKS);
        for (name, dims) in layout(width) {
            let n: usize = dims.iter().product();
            let mut rng = RngStream::new(seed, "initialise", &name, 0);
            let fan_in = if name.starts_with("conv1") { CHANNELS * 9 } else { width * 9 };
            let values = match (name.starts_with("conv"), name.ends_with("weight")) {
                (true, true) => {
                    let std = (2.0 / (9 * width) as f32).sqrt();
                    rng.normals(n).into_iter().map(|v| v * std).collect()
                }
                (true, false) => {
                    let bound = 1.0 / (fan_in as f32).sqrt();
                    (0..n).map(|_| rng.uniform_in(-bound, bound)).collect()
                }
                (false, true) => vec![1.0; n],
                (false, false) => vec![0.0; n],
            };
            parameters.push(Parameter { name, value: tensor(values, &dims)? });
        }
        let fresh = RunningStatistics { mean: vec![0.0; width], variance: vec![1.0; width] };
        Ok(Self { width, parameters, running: vec![fresh; BLOCKS] })
    }

    /// Channels of every block.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Parameters in a fixed order: conv weight, conv bias, norm weight, norm bias of each block.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Running statistics of each normalisation, in order.
    pub fn running(&self) -> &[RunningStatistics] {
        &self.running
    }

    /// Length of an embedding for images of `height` x `width`.
    ///
    /// # Errors
    /// When the image is smaller than 16 pixels on a side: nothing is left of it after four poolings.
    pub fn embedding_dim(&self, height: usize, width: usize) -> Result<usize> {
        let dim = self.width * (height >> BLOCKS) * (width >> BLOCKS);
        if dim == 0 {
            return Err(Error::usage(format!(
                "Conv4 needs images of 16 x 16 or more, got `{height} x {width}`"
            ))
            .hint("choose a larger `image_size`"));
        }
        Ok(dim)
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
        if parameters.len() != self.parameters.len() {
            return Err(Error::internal(format!(
                "Conv4 takes {} parameters, got `{}`",
                self.parameters.len(),
                parameters.len()
            )));
        }
        let mut statistics = Vec::new();
        let mut x = images.affine(1.0 / IMAGE_STD, -IMAGE_MEAN / IMAGE_STD)?;
        for (block, running) in parameters.chunks_exact(4).zip(&self.running) {
            let (factor, offset) = (&block[2], &block[3]);
            let same = ConvOptions::same(3);
            x = match mode {
                BnMode::Batch => {
                    // The mean takes the bias away again, so its gradient is 0: it moves the mean alone.
                    let y = x.conv2d(&block[0], None, same)?;
                    let (y, mut own) = y.batch_norm_relu_pool(factor, offset, EPSILON)?;
                    for (mean, bias) in own.mean.iter_mut().zip(block[1].numbers()?) {
                        *mean += bias;
                    }
                    statistics.push(own);
                    y
                }
                BnMode::Running => {
                    let y = x.conv2d(&block[0], Some(&block[1]), same)?;
                    let (scale, shift) = running.scale_and_shift(factor, offset)?;
                    y.channel_affine(&scale, &shift, Activation::Relu)?.max_pool2d(2)?
                }
            };
        }
        Ok(Embedded { embedding: x.flatten_rows()?, statistics })
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
                "Conv4 takes RGB images, got channels `{channels}`"
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

    /// Writes parameters, running statistics and architecture into a store.
    ///
    /// # Errors
    /// When a parameter cannot be read from its device.
    pub fn write_to(&self, store: &mut TensorStore) -> Result<()> {
        store.words.insert("architecture".into(), "conv4".into());
        store.words.insert("width".into(), self.width.to_string());
        for parameter in &self.parameters {
            store.insert(&parameter.name, parameter.value.dims(), numbers(&parameter.value)?);
        }
        for (at, running) in self.running.iter().enumerate() {
            let name = |what| format!("norm{}.running_{what}", at + 1);
            store.insert(name("mean"), &[self.width], running.mean.clone());
            store.insert(name("var"), &[self.width], running.variance.clone());
        }
        Ok(())
    }

    /// The network that [`Backbone::write_to`] wrote.
    ///
    /// # Errors
    /// When the store holds no such network, or values that are not finite.
    pub fn read_from(store: &TensorStore) -> Result<Self> {
        let architecture = store.word("architecture")?;
        if architecture != "conv4" {
            return Err(Error::unsupported(format!("backbone architecture `{architecture}`")));
        }
        let width: usize = store.number("width")?;
        let first = store.tensors.get("conv1.weight").and_then(|t| t.shape.first().copied());
        if width == 0 || first != Some(width) {
            return Err(Error::input(format!("the file's weights are not of width `{width}`")));
        }
        let values = |name: &str, dims: &[usize]| -> Result<Vec<f32>> {
            let values = store.tensor(name, dims)?;
            if values.iter().any(|v| !v.is_finite()) {
                return Err(Error::input(format!("values that are not finite in tensor `{name}`")));
            }
            Ok(values.to_vec())
        };
        let mut parameters = Vec::with_capacity(4 * BLOCKS);
        for (name, dims) in layout(width) {
            parameters.push(Parameter { value: tensor(values(&name, &dims)?, &dims)?, name });
        }
        let mut running = Vec::with_capacity(BLOCKS);
        for block in 1..=BLOCKS {
            running.push(RunningStatistics {
                mean: values(&format!("norm{block}.running_mean"), &[width])?,
                variance: values(&format!("norm{block}.running_var"), &[width])?,
            });
        }
        Ok(Self { width, parameters, running })
    }

    /// Writes the network to a safetensors file.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn save(&self, path: &std::path::Path) -> Result<()> {
        let mut store = TensorStore::default();
        self.write_to(&mut store)?;
        store.save(path)
    }

    /// Reads a network from a safetensors file.
    ///
    /// # Errors
    /// When the file cannot be read or holds no such network.
    pub fn load(path: &std::path::Path) -> Result<Self> {
        Self::read_from(&TensorStore::load(path)?)
            .map_err(|error| error.context(format!("`{}`", path.display())))
    }
}

/// Names and shapes of the parameters, in order.
fn layout(width: usize) -> Vec<(String, Vec<usize>)> {
    (1..=BLOCKS)
        .flat_map(|block| {
            let inputs = if block == 1 { CHANNELS } else { width };
            [
                (format!("conv{block}.weight"), vec![width, inputs, 3, 3]),
                (format!("conv{block}.bias"), vec![width]),
                (format!("norm{block}.weight"), vec![width]),
                (format!("norm{block}.bias"), vec![width]),
            ]
        })
        .collect()
}

fn tensor(values: Vec<f32>, dims: &[usize]) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, dims, &Device::Cpu)?)
}

pub(super) fn numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1::<f32>()?)
}
