//! Kernels for CUDA: what a step of the frozen plan runs on a GPU, and the two machines it can run on.
//!
//! An [`Operation`] is one compiled step: it owns its constants on the device and launches kernels there; nothing
//! comes back to the host. A [`Device`] is memory, launches and matrix products: the card (`driver`, feature
//! `cuda`), or, in tests, the same kernels compiled as C++ (`emulation`). The kernels' text (`kernels/*.cu`)
//! is compiled for the card at hand by NVRTC: no build script, no compiler of CUDA at build time, no PTX that is newer
//! than the driver's.
//!
//! Kernels index with 32 bits; [`LONGEST`] holds.

mod binary;
mod channel;
mod convolution;
#[cfg(feature = "cuda")]
pub mod driver;
mod elementwise;
mod launch;
mod memory;
mod movement;
mod objective;
mod pixels;
mod pool;
mod product;
mod reduce;
mod row;
pub mod source;
#[cfg(test)]
pub(crate) mod tests;
#[cfg(test)]
pub(crate) use tests::emulation;

use std::fmt::Debug;
use std::sync::Arc;

pub use binary::{Binary, Choose, Spread};
pub use channel::{Channel, Parts as ChannelParts};
pub use convolution::{Convolution, ConvolutionTransposed};
pub use elementwise::Elementwise;
pub use launch::{Argument, Launch, blocks, each};
pub use memory::{Memory, View};
pub use movement::{Movement, Swap};
pub use objective::{Objective, Wanted, cross_entropy};
pub use pixels::{AxisTaps, InputMap, Pixels, Standard};
pub use pool::{Pool, PoolKind};
pub use product::{ColumnMajor, Factor, MatMul, Product};
pub use reduce::Reduce;
pub use row::{Softmax, Standardize};

use crate::error::Result;

/// Elements of the longest tensor: positions and strides of loops fit 32 bits.
pub const LONGEST: usize = 1 << 30;

/// A machine for kernels: memory of 32-bit words, launches and products, all in the order of the calls.
pub trait Device: Debug + Send + Sync {
    /// Its name, for messages.
    fn describe(&self) -> String;

    /// Takes memory for `words` (at least one); its content is arbitrary.
    ///
    /// # Errors
    /// When there is not so much.
    fn allocate(&self, words: usize) -> Result<u64>;

    /// Gives memory back.
    fn free(&self, address: u64);

    /// Copies `words` to `address`.
    ///
    /// # Errors
    /// When the device fails.
    fn write(&self, address: u64, words: &[u32]) -> Result<()>;

    /// Waits for all work and copies from `address`.
    ///
    /// # Errors
    /// When the device, or any work before, failed.
    fn read(&self, address: u64, words: &mut [u32]) -> Result<()>;

    /// Starts a kernel. Its arguments are compared with the kernel's own list.
    ///
    /// # Errors
    /// When there is no such kernel, the arguments are of other kinds, or the device fails.
    fn launch(&self, launch: &Launch<'_>) -> Result<()>;

    /// Starts a batch of matrix products in the terms of BLAS.
    ///
    /// # Errors
    /// When the device fails.
    fn multiply(&self, product: &ColumnMajor) -> Result<()>;
}

/// Where an operation is set up: the device, and how long the step's values are.
#[derive(Debug, Clone, Copy)]
pub struct Site<'a> {
    /// Keeps the operation's constants.
    pub device: &'a Arc<dyn Device>,
    /// Elements of each input.
    pub inputs: &'a [usize],
    /// Elements of the output.
    pub output: usize,
}

/// Statistics of a tapped step's input, one value a channel each.
#[derive(Debug, Clone, Copy)]
pub struct TapViews {
    /// Written by the forward.
    pub mean: View,
    /// Biased; written by the forward.
    pub var: View,
    /// Gradient of the objective to `mean`, read by the backward where `active`.
    pub d_mean: View,
    /// Gradient to `var`.
    pub d_var: View,
    /// Whether the objective looks at statistics.
    pub active: bool,
}

/// What an operation runs with.
#[derive(Debug, Clone, Copy)]
pub struct Run<'a> {
    /// The machine.
    pub device: &'a dyn Device,
    /// At least [`Operation::scratch`] elements; nothing stays in it.
    pub scratch: View,
    /// Where the step's statistics go.
    pub tap: Option<TapViews>,
}

/// Where a gradient goes.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Same length as the input.
    pub view: View,
    /// Whether others have written: then it is added.
    pub add: bool,
}

/// A step of a plan on a device. What it keeps from its forward for its backward is its own memory.
pub trait Operation: Debug + Send + Sync {
    /// Elements of scratch memory it wants.
    fn scratch(&self) -> usize {
        0
    }

    /// Computes `output` from `inputs`.
    ///
    /// # Errors
    /// Those of the device.
    fn forward(&self, run: &Run<'_>, inputs: &[View], output: View) -> Result<()>;

    /// Puts the gradient to input `which`. `inputs` and `output` hold values only where the step's needs say so.
    ///
    /// # Errors
    /// Those of the device.
    fn backward(
        &self,
        run: &Run<'_>,
        which: usize,
        inputs: &[View],
        output: View,
        gradient: View,
        target: Target,
    ) -> Result<()>;
}
