//! The losses of an inversion step, computed where the network is: cross-entropy, and the distance of batch
//! statistics from what they should be, each with its gradient. Only scalars come back.

use std::sync::Arc;

use super::{Device, Memory, View, blocks};
use crate::error::Result;

/// Wanted statistics of all taps of a plan, and where the seen ones and their gradients lie: `[2, total]`, means
/// before variances, tap after tap.
#[derive(Debug)]
pub struct Objective {
    seen: Memory,
    wanted: Memory,
    unit: Memory,
    gradient: Memory,
    norms: Memory,
    offsets: Memory,
    starts: Vec<usize>,
}

/// What one tap should see, one value a channel.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// Mean.
    pub mean: &'a [f32],
    /// Biased variance.
    pub var: &'a [f32],
    /// Unit of the mean's deviation (of the variance's: its square).
    pub unit: &'a [f32],
}

impl Objective {
    /// Memory for the statistics of `taps`.
    ///
    /// # Errors
    /// When the device has none.
    pub fn new(device: &Arc<dyn Device>, taps: &[Wanted<'_>]) -> Result<Self> {
        let mut starts = vec![0];
        for tap in taps {
            starts.push(starts[starts.len() - 1] + tap.mean.len());
        }
        let total = starts[taps.len()];
        let all =
            |pick: fn(&Wanted<'_>) -> Vec<f32>| taps.iter().flat_map(pick).collect::<Vec<_>>();
        let wanted = [all(|tap| tap.mean.to_vec()), all(|tap| tap.var.to_vec())].concat();
        let offsets: Vec<u32> = starts.iter().map(|&start| start as u32).collect();
        Ok(Self {
            seen: Memory::new(device, 2 * total)?,
            wanted: Memory::of(device, &wanted)?,
            unit: Memory::of(device, &all(|tap| tap.unit.to_vec()))?,
            gradient: Memory::new(device, 2 * total)?,
            norms: Memory::new(device, 2 * taps.len())?,
            offsets: Memory::of_positions(device, &offsets)?,
            starts,
        })
    }

    fn total(&self) -> usize {
        self.starts[self.starts.len() - 1]
    }

    fn sides(&self, memory: &Memory, tap: usize) -> [View; 2] {
        let (start, length) = (self.starts[tap], self.starts[tap + 1] - self.starts[tap]);
        [0, self.total()].map(|side| memory.view().part(side + start, length))
    }

    /// Mean and variance of a tap.
    pub fn seen(&self, tap: usize) -> [View; 2] {
        self.sides(&self.seen, tap)
    }

    /// Their gradients.
    pub fn gradient(&self, tap: usize) -> [View; 2] {
        self.sides(&self.gradient, tap)
    }

    /// Writes `weight` times the gradient of `sum_l (||mean_l - wanted|| + ||var_l - wanted||)` (PURER sec. 2.2) for the
    /// statistics seen; the norms wait on the device.
    ///
    /// # Errors
    /// Those of the device.
    pub fn match_statistics(&self, device: &dyn Device, weight: f32) -> Result<()> {
        let taps = self.starts.len() - 1;
        let arguments = [
            self.seen.view().into(),
            self.wanted.view().into(),
            self.unit.view().into(),
            self.offsets.view().into(),
            self.gradient.view().into(),
            self.norms.view().into(),
            self.total().into(),
            weight.into(),
        ];
        blocks(device, "match_statistics", [taps, 2], &arguments)
    }

    /// The unweighted sum of the last [`Objective::match_statistics`].
    ///
    /// # Errors
    /// Those of the device.
    pub fn statistics_loss(&self) -> Result<f64> {
        if self.total() == 0 {
            return Ok(0.0);
        }
        Ok(self.norms.read()?.into_iter().map(f64::from).sum())
    }
}

/// Cross-entropy of the first `used` rows of `logits` to `labels`, summed by image into `losses`; `scale` times its
/// gradient goes to `gradient`.
///
/// # Errors
/// Those of the device.
pub fn cross_entropy(
    device: &dyn Device,
    logits: View,
    labels: View,
    [gradient, losses]: [View; 2],
    used: usize,
    scale: f32,
) -> Result<()> {
    let images = losses.len();
    let arguments = [
        logits.into(),
        labels.into(),
        gradient.into(),
        losses.into(),
        (logits.len() / images.max(1)).into(),
        used.into(),
        scale.into(),
    ];
    blocks(device, "cross_entropy", [images, 1], &arguments)
}
