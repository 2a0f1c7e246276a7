//! A folder of models: walk it, read sidecars, learn each model's facts, reject what cannot be used.
//!
//! Invariant: one bad file never stops the rest; what cannot be used becomes a [`Rejection`] with
//! file, reason and hint.

pub mod candidates;
pub mod catalog;
pub mod facts;
pub mod hash;
pub mod read;
pub mod remote;
pub mod resolve;
pub mod sidecar;
pub mod spec;
pub mod walk;
pub mod yaml;

pub use sidecar::Sidecar;
pub use spec::{
    Access, BatchDimension, Color, ElementType, Layout, ModelSpec, OutputKind, Preprocess,
    Rejection,
};
