//! What the rest of the crate needs to know of a model, after inference and the sidecar are merged.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::sidecar::Endpoint;

/// How a model is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// Compiled and differentiated by our graph engine.
    WhiteBox,
    /// Queried through ONNX Runtime; gradients are estimated.
    BlackBox,
    /// Queried over HTTP; gradients are estimated.
    Remote,
}

/// Order of the image axes at the model's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// Batch, channels, height, width.
    Nchw,
    /// Batch, height, width, channels.
    Nhwc,
}

/// Element type of the model's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ElementType {
    /// 32-bit float.
    Float32,
    /// 16-bit float.
    Float16,
    /// 64-bit float.
    Float64,
    /// Unsigned byte.
    Uint8,
}

/// Channel order and count at the model's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Color {
    /// Red, green, blue.
    Rgb,
    /// Blue, green, red.
    Bgr,
    /// One channel, 0.299 R + 0.587 G + 0.114 B.
    Grey,
}

/// What the model's class output holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OutputKind {
    /// Unnormalised scores.
    Logits,
    /// Softmax of the logits.
    Probabilities,
    /// Log-softmax of the logits.
    LogProbabilities,
    /// Only the index of the best class.
    Labels,
}

/// The batch axis of the model's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BatchDimension {
    /// Any number of images at once.
    Free,
    /// Exactly this many images at once.
    Fixed(usize),
}

/// From the canonical image ([0,1], RGB, NCHW) to the model's input. Order: resize to
/// `input_size`, colour, scale to `value_range`, subtract `mean`, divide by `std`, layout, dtype.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Preprocess {
    /// `[channels, height, width]`.
    pub input_size: [usize; 3],
    /// Axis order at the input.
    pub layout: Layout,
    /// Element type at the input.
    pub dtype: ElementType,
    /// What 0 and 1 of the canonical image become before `mean` and `std`.
    pub value_range: [f32; 2],
    /// Channel order.
    pub color: Color,
    /// Per channel, in units of `value_range`.
    pub mean: Vec<f32>,
    /// Per channel, in units of `value_range`.
    pub std: Vec<f32>,
    /// Share of the image kept by the crop before resizing (timm); 1 keeps all.
    pub crop_pct: f32,
}

/// A model ready to be opened: the file's facts merged with its sidecar.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ModelSpec {
    /// Path below the zoo without extension, `/`-separated; unique in a zoo.
    pub id: String,
    /// The file.
    pub path: PathBuf,
    /// SHA-256 of the file (and of its external data, in the order of their paths).
    pub sha: String,
    /// How it is reached.
    pub access: Access,
    /// Number of classes.
    pub classes: usize,
    /// One label a class, from `id2label`; empty when unknown.
    pub labels: Vec<String>,
    /// From canonical images to the input.
    pub preprocess: Preprocess,
    /// Name of the image input.
    pub input_name: String,
    /// Name of the output (or inner value) that holds the class scores as the file gives them.
    pub logits_output: String,
    /// What that output holds.
    pub output_kind: OutputKind,
    /// The batch axis.
    pub batch: BatchDimension,
    /// Largest batch a query may carry, from the sidecar.
    pub max_batch_size: Option<usize>,
    /// Queries that may be spent on it, from the sidecar.
    pub query_budget: Option<u64>,
    /// Normalisation nodes with running statistics left in the file.
    pub norm_taps: usize,
    /// Operators our engine lacks, each once; empty for a white-box model.
    pub unsupported_ops: Vec<String>,
    /// Samples of one batch influence each other (dynamic quantisation): run one by one.
    pub batch_dependent: bool,
    /// It rounds what it computes to integers of 8 bits or fewer, so that short steps of an image may change no
    /// answer. Unknown, and false, for a served model.
    #[serde(default)]
    pub quantised: bool,
    /// Real paths of the files with weights beside `path`, in the order in which `sha` takes them. Not serialized.
    #[serde(skip)]
    pub external_files: Vec<PathBuf>,
    /// Where a remote model is served, with its name there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<Endpoint>,
}

/// A model that cannot be used, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Rejection {
    /// The file, relative to the zoo.
    pub path: String,
    /// What is wrong with it.
    pub reason: String,
    /// What to do about it.
    pub hint: Option<String>,
}
