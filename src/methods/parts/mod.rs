//! The pieces methods are made of: losses on logits, the generator, the image bank,
//! the dynamic dataset.

pub mod bank;
pub mod boundary;
pub mod dynamic;
pub mod generator;
pub mod losses;
pub mod memory;
pub mod open;

pub use bank::{ImageBank, ModelImages, Naming};
pub use boundary::Student;
pub use dynamic::DynamicSet;
pub use generator::Generator;
pub use losses::CrossEntropy;
pub use memory::Memory;
pub use open::OpenTeachers;
