//! ONNX files to [`crate::graph::Graph`] and back. Protobuf types come from candle-onnx.
//!
//! Import ([`load`]) checks everything a hostile file can get wrong (paths of external data, sizes,
//! types, names, nesting) before memory is taken; export ([`write()`]) writes what the checker of the
//! `onnx` package accepts. An error of kind [`crate::ErrorKind::Input`] means the file is broken or
//! hostile, [`crate::ErrorKind::Unsupported`] that it may be a sound file which the graph cannot hold
//! (ONNX Runtime may still run it).

mod attributes;
mod build;
mod export;
mod external;
mod functions;
mod import;
mod order;
mod ports;
mod tensor;
mod wire;

pub use export::{ExportInfo, to_bytes, write};
pub use external::ExternalData;
pub use import::{MAX_IR_VERSION, MAX_OPSET, OnnxModel, load, load_bytes};

/// Most nodes of a model, local functions inlined and sub-graphs counted.
pub const MAX_NODES: u64 = 1 << 18;
/// Deepest nesting of sub-graphs and local functions together.
pub const MAX_DEPTH: u32 = 32;
/// Most elements of all constants of a model together.
pub const MAX_ELEMENTS: usize = 1 << 30;
/// Most bytes of a model file: the limit of protobuf itself.
pub const MAX_FILE_BYTES: u64 = (1 << 31) - 1;
