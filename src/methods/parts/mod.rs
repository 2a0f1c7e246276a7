//! The pieces methods are made of: losses on logits, the generator, the image bank,
//! the dynamic dataset.

pub mod bank;
pub mod dynamic;
pub mod generator;
pub mod losses;

pub use bank::{ImageBank, ModelImages, Naming};
pub use dynamic::DynamicSet;
pub use generator::Generator;
pub use losses::CrossEntropy;
