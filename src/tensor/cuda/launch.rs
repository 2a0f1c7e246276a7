//! A launch of a kernel: its name, its grid and its arguments.

use super::{Device, View};
use crate::error::Result;

/// Threads of a block.
pub(super) const BLOCK: usize = 256;
/// Blocks of a launch whose threads take several elements each.
const GRID: usize = 1 << 14;

/// One argument of a kernel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Argument {
    /// The address of a tensor.
    Pointer(u64),
    /// An `int`.
    Integer(i32),
    /// A `float`.
    Float(f32),
}

impl From<View> for Argument {
    fn from(view: View) -> Self {
        Self::Pointer(view.address())
    }
}

impl From<usize> for Argument {
    /// # Panics
    /// When the number does not fit; the executor refuses such tensors before.
    fn from(value: usize) -> Self {
        Self::Integer(i32::try_from(value).expect("the executor refuses longer tensors"))
    }
}

impl From<i32> for Argument {
    fn from(value: i32) -> Self {
        Self::Integer(value)
    }
}

impl From<bool> for Argument {
    fn from(value: bool) -> Self {
        Self::Integer(i32::from(value))
    }
}

impl From<f32> for Argument {
    fn from(value: f32) -> Self {
        Self::Float(value)
    }
}

/// A kernel, how many blocks it takes (across, down), and its arguments.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    /// Name in the program.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: [usize; 2],
    /// What it is called with.
    pub arguments: &'a [Argument],
}

/// Launches `kernel` with about a thread for each of `n` elements.
///
/// # Errors
/// Those of [`Device::launch`].
pub fn each(
    device: &dyn Device,
    kernel: &'static str,
    n: usize,
    arguments: &[Argument],
) -> Result<()> {
    blocks(device, kernel, [n.div_ceil(BLOCK).min(GRID), 1], arguments)
}

/// Launches `kernel` on a grid of blocks; nothing where that is empty.
///
/// # Errors
/// Those of [`Device::launch`].
pub fn blocks(
    device: &dyn Device,
    kernel: &'static str,
    grid: [usize; 2],
    arguments: &[Argument],
) -> Result<()> {
    if grid.contains(&0) {
        return Ok(());
    }
    device.launch(&Launch { kernel, grid, arguments })
}
