//! How a model is reached: one trait, [`Teacher`], and its implementations.
//!
//! White-box teachers differentiate the compiled graph; black-box teachers (ONNX Runtime) and
//! remote ones estimate gradients from counted queries. Methods see only `&dyn Teacher`.

pub mod adapter;
pub mod budget;
pub mod teacher;
pub mod zero_order;

pub use adapter::Adapter;
pub use teacher::{ImageGradient, LogitsLoss, Objective, Teacher};
