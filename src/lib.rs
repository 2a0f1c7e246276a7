//! **metazoa** turns a folder of pre-trained ONNX classifiers into one few-shot learner, without
//! any of their training data.
//!
//! The layers, one arrow (a module uses only what stands to its left; `tests/it/tidy.rs` holds it):
//! `error <- tensor <- graph <- onnx <- zoo <- {data, access, meta} <- methods <- report <- app <- cli`.
//! ARCHITECTURE.md tells the whole; start reading at [`app`] for what a run does, at [`graph`] for
//! how a model is compiled and differentiated, at [`access`] for what a method sees of a model.

pub mod access;
pub mod app;
pub mod cli;
pub mod data;
pub mod error;
pub mod graph;
pub mod meta;
pub mod methods;
pub mod onnx;
pub mod report;
pub mod tensor;
pub mod zoo;

pub use error::{Error, ErrorKind, Result};
