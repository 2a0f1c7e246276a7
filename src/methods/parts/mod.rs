//! The pieces methods are made of: losses on logits, the generator, the image bank,
//! the dynamic dataset.

pub mod bank;
pub mod boundary;
pub mod dynamic;
pub mod generator;
pub mod losses;
pub mod memory;
pub mod open;
pub mod patience;
pub mod remembered;

pub use bank::{ImageBank, ModelImages, Naming};
pub use boundary::{Distance, Student};
pub use dynamic::DynamicSet;
pub use generator::Generator;
pub use losses::CrossEntropy;
pub use memory::{Agreed, Memory};
pub use open::OpenTeachers;
pub use patience::Patience;
pub use remembered::{Remembered, RememberedOf};
