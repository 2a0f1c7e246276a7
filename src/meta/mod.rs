//! meta (being written).
pub mod export;
