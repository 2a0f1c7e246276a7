//! CPU kernels on row-major slices, generic over `f32` and `f64`.
//!
//! Each kernel's result is the same for any number of threads: work is split into disjoint output
//! pieces, and sums over pieces are added in a fixed order.

pub mod batch_norm;
pub mod blocks;
pub mod channel;
pub mod conv;
mod depthwise;
mod direct;
pub mod element;
pub mod gemm;
pub mod map;
pub mod norm_pool;
mod patches;
mod pointwise;
pub mod product;
pub mod row;
pub mod scratch;
pub mod special;
pub mod turn;
mod vector;
pub mod weight_gradient;
mod winograd;

pub use element::Element;
