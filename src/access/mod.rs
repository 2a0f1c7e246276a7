//! How a model is reached: one trait, [`Teacher`], and its implementations.
//!
//! White-box teachers differentiate the compiled graph; black-box teachers (ONNX Runtime) and
//! remote ones estimate gradients from counted queries. Methods see only `&dyn Teacher`.

pub mod adapter;
pub mod black;
pub mod borrow;
pub mod budget;
pub mod library;
mod local;
#[cfg(any(feature = "cuda", test))]
mod on_device;
pub mod pool;
pub mod probe;
pub mod remote;
pub mod runtime;
pub mod session;
pub mod surrogate;
pub mod teacher;
pub mod white;
pub mod zero_order;

pub use adapter::Adapter;
pub use black::{BlackOptions, BlackTeacher};
pub use borrow::Borrowing;
pub use pool::SessionPool;
pub use surrogate::Surrogate;
pub use teacher::{
    Guide, ImageGradient, LogitsLoss, Objective, PixelLosses, PixelTask, ResidentPixels, Teacher,
};
pub use white::WhiteTeacher;
