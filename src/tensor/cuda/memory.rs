//! Memory of a device, and stretches of it.

use std::sync::Arc;

use super::Device;
use crate::error::Result;

/// Memory on a device, given back when dropped.
#[derive(Debug)]
pub struct Memory {
    device: Arc<dyn Device>,
    address: u64,
    length: usize,
}

/// A stretch of memory, without a claim on it: whoever keeps one keeps the [`Memory`] too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    address: u64,
    length: usize,
}

impl Memory {
    /// Memory for `length` elements of arbitrary content.
    ///
    /// # Errors
    /// When the device has not so much.
    pub fn new(device: &Arc<dyn Device>, length: usize) -> Result<Self> {
        let address = device.allocate(length.max(1))?;
        Ok(Self { device: Arc::clone(device), address, length })
    }

    /// Memory that holds `values`.
    ///
    /// # Errors
    /// As [`Memory::new`]; when the copy fails.
    pub fn of(device: &Arc<dyn Device>, values: &[f32]) -> Result<Self> {
        let memory = Self::new(device, values.len())?;
        memory.write(values)?;
        Ok(memory)
    }

    /// Memory that holds `positions`, each as a 32-bit integer.
    ///
    /// # Errors
    /// As [`Memory::of`].
    pub fn of_positions(device: &Arc<dyn Device>, positions: &[u32]) -> Result<Self> {
        let memory = Self::new(device, positions.len())?;
        device.write(memory.address, positions)?;
        Ok(memory)
    }

    /// All of it.
    pub fn view(&self) -> View {
        View { address: self.address, length: self.length }
    }

    /// Overwrites the first elements.
    ///
    /// # Errors
    /// When the copy fails.
    pub fn write(&self, values: &[f32]) -> Result<()> {
        self.view().write(&*self.device, values)
    }

    /// All elements.
    ///
    /// # Errors
    /// When the copy, or any work before it, failed.
    pub fn read(&self) -> Result<Vec<f32>> {
        self.view().read(&*self.device)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.device.free(self.address);
    }
}

impl View {
    /// No memory: stands where a kernel reads nothing.
    pub const NOTHING: Self = Self { address: 0, length: 0 };

    /// Address of the first element.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.length
    }

    /// No element.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// `length` elements from `start` on.
    ///
    /// # Panics
    /// When they lie outside.
    pub fn part(&self, start: usize, length: usize) -> Self {
        assert!(start + length <= self.length, "part {start} + {length} of {}", self.length);
        Self { address: self.address + 4 * start as u64, length }
    }

    /// Overwrites the first elements.
    ///
    /// # Errors
    /// When the copy fails.
    ///
    /// # Panics
    /// When there are more values than elements.
    pub fn write(&self, device: &dyn Device, values: &[f32]) -> Result<()> {
        assert!(values.len() <= self.length, "{} values for {}", values.len(), self.length);
        let words: Vec<u32> = values.iter().map(|v| v.to_bits()).collect();
        device.write(self.address, &words)
    }

    /// All elements.
    ///
    /// # Errors
    /// When the copy, or any work before it, failed.
    pub fn read(&self, device: &dyn Device) -> Result<Vec<f32>> {
        let mut words = vec![0; self.length];
        device.read(self.address, &mut words)?;
        Ok(words.into_iter().map(f32::from_bits).collect())
    }
}
