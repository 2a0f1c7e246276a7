//! Evaluation images: real pictures as benchmarks lie on disk, episodes drawn from them, pixel baselines.
//!
//! Invariants: order never depends on the file system or on threads; a picture that cannot be read
//! is rejected alone; a folder that cannot carry the episodes asked for is refused before any
//! episode is drawn.

pub mod decode;
pub mod episode;
pub mod folder;
mod lists;
pub mod nearest;
mod places;
pub mod resize;
pub mod set;
pub mod source;

pub use episode::{Episode, EpisodeSampler, EpisodeShape};
pub use folder::ImageFolder;
pub use nearest::{nearest_neighbour, nearest_prototype};
pub use set::{ClassImages, ImageSet};
pub use source::{ClassFiles, DataSource};
