//! Numbers and what computes with them: seeded random streams, image batches, priors on pixels, CPU kernels, the tape.
//!
//! Nothing here knows of ONNX, files of images or methods. Kernels take plain row-major slices (NCHW
//! for images) so that the frozen plan (`graph`) and the tape share them.

pub mod adam;
#[cfg(any(feature = "cuda", test))]
pub mod cuda;
pub mod device;
pub mod images;
pub mod kernels;
pub mod lists;
pub mod losses;
pub mod priors;
pub mod rng;
pub mod scenes;
pub mod store;
pub mod tape;

pub use adam::{Adam, AdamOptions};
pub use device::Device;
pub use images::Images;
pub use rng::RngStream;
pub use store::TensorStore;
