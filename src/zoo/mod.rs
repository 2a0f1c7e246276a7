//! A folder of models: walk it, read sidecars, learn each model's facts, reject what cannot be used.
//!
//! Invariant: one bad file never stops the rest; what cannot be used becomes a [`Rejection`] with
//! file, reason and hint.

pub mod spec;

pub use spec::{
    Access, BatchDimension, Color, ElementType, Layout, ModelSpec, OutputKind, Preprocess,
    Rejection,
};
