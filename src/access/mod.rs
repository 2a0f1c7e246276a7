//! How a model is reached: one trait, [`Teacher`], and its implementations.
//!
//! White-box teachers differentiate the compiled graph; black-box teachers (ONNX Runtime) and
//! remote ones estimate gradients from counted queries. Methods see only `&dyn Teacher`.

pub mod teacher;

pub use teacher::{ImageGradient, LogitsLoss, Objective, Teacher};
