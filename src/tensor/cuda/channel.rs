//! The fused pass over channels: a frozen BatchNormalization, what follows it, and the statistics of its input.

use super::{Argument, Memory, Operation, Run, Site, Target, View, blocks, each};
use crate::error::{Error, Result};

/// Values that a block takes at least.
const TASK: usize = 4096;
/// Blocks that a launch needs to fill a large card.
const BLOCKS: usize = 1024;

const RESIDUAL: i32 = 1;
const BOUNDED: i32 = 2;
const HALVED: i32 = 4;

/// `y = halve(bounds(a x + b + residual))` per channel, with mean and biased variance of `x`.
#[derive(Debug)]
pub struct Channel {
    channels: usize,
    /// Elements of a channel of an image; where it is 1, channels lie side by side.
    plane: usize,
    images: usize,
    factor: Memory,
    offset: Memory,
    shift: Memory,
    /// Least value, largest value, least value that the gradient passes at.
    bounds: Option<[f32; 3]>,
    residual: bool,
    halved: Option<usize>,
}

/// What a [`Channel`] computes; slices hold one value a channel.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'a> {
    /// `a`.
    pub factor: &'a [f32],
    /// `b`.
    pub offset: &'a [f32],
    /// Near the mean of `x`.
    pub shift: &'a [f32],
    /// Elements of a channel of an image.
    pub plane: usize,
    /// Least value, largest value, least value that the gradient passes at.
    pub bounds: Option<[f32; 3]>,
    /// Whether input 1 is added.
    pub residual: bool,
    /// Width of the planes, where 2x2 maxima are taken.
    pub halved: Option<usize>,
}

impl Channel {
    /// Sets the step up.
    ///
    /// # Errors
    /// When the device has no memory for the constants.
    pub fn new(site: &Site<'_>, parts: &Parts<'_>) -> Result<Self> {
        let memory = |values| Memory::of(site.device, values);
        let channels = parts.factor.len();
        Ok(Self {
            channels,
            plane: parts.plane,
            images: site.inputs[0] / (channels * parts.plane).max(1),
            factor: memory(parts.factor)?,
            offset: memory(parts.offset)?,
            shift: memory(parts.shift)?,
            bounds: parts.bounds,
            residual: parts.residual,
            halved: parts.halved,
        })
    }

    fn mode(&self) -> i32 {
        let bit = |set: bool, bit: i32| if set { bit } else { 0 };
        bit(self.residual, RESIDUAL)
            | bit(self.bounds.is_some(), BOUNDED)
            | bit(self.halved.is_some(), HALVED)
    }

    /// Low, high, and from where the gradient passes.
    fn bounds(&self) -> [f32; 3] {
        self.bounds.unwrap_or([f32::NEG_INFINITY, f32::INFINITY, f32::NEG_INFINITY])
    }

    /// Blocks that share a channel.
    fn parts(&self) -> usize {
        let values = self.images * self.plane;
        let each = if self.plane == 1 { TASK / 32 } else { TASK };
        let columns = if self.plane == 1 { self.channels.div_ceil(32) } else { self.channels };
        values.div_ceil(each).clamp(1, BLOCKS.div_ceil(columns.max(1)))
    }

    fn grid(&self) -> [usize; 2] {
        let columns = if self.plane == 1 { self.channels.div_ceil(32) } else { self.channels };
        [columns, self.parts()]
    }
}

impl Operation for Channel {
    fn scratch(&self) -> usize {
        2 * self.channels * self.parts()
    }

    fn forward(&self, run: &Run<'_>, inputs: &[View], output: View) -> Result<()> {
        let tap = run.tap.ok_or_else(|| Error::internal("a channel pass without a tap"))?;
        let parts = self.parts();
        let partial = run.scratch.part(0, 2 * self.channels * parts);
        let [low, high, _] = self.bounds();
        let residual = inputs.get(1).copied().unwrap_or(View::NOTHING);
        let mut arguments: Vec<Argument> = vec![
            inputs[0].into(),
            residual.into(),
            output.into(),
            partial.into(),
            self.factor.view().into(),
            self.offset.view().into(),
            self.shift.view().into(),
            self.images.into(),
            self.channels.into(),
        ];
        let end: [Argument; 3] = [low.into(), high.into(), self.mode().into()];
        if self.plane == 1 {
            arguments.extend(end);
            blocks(run.device, "channel_rows_forward", self.grid(), &arguments)?;
        } else {
            arguments.extend::<[Argument; 2]>([self.plane.into(), self.halved.unwrap_or(1).into()]);
            arguments.extend(end);
            blocks(run.device, "channel_forward", self.grid(), &arguments)?;
        }
        let arguments = [
            partial.into(),
            self.shift.view().into(),
            tap.mean.into(),
            tap.var.into(),
            self.channels.into(),
            parts.into(),
            (self.images * self.plane).max(1).into(),
        ];
        each(run.device, "channel_merge", self.channels, &arguments)
    }

    fn backward(
        &self,
        run: &Run<'_>,
        which: usize,
        inputs: &[View],
        output: View,
        gradient: View,
        target: Target,
    ) -> Result<()> {
        let tap = run.tap.ok_or_else(|| Error::internal("a channel pass without a tap"))?;
        let [_, high, open] = self.bounds();
        let mode = Argument::Integer(self.mode());
        if which == 1 {
            let n = gradient.len();
            let y = if output.is_empty() { gradient } else { output };
            let arguments = [
                y.into(),
                gradient.into(),
                target.view.into(),
                open.into(),
                high.into(),
                mode,
                n.into(),
                target.add.into(),
            ];
            return each(run.device, "residual_backward", n, &arguments);
        }
        let mut arguments: Vec<Argument> = vec![
            inputs[0].into(),
            output.into(),
            gradient.into(),
            target.view.into(),
            self.factor.view().into(),
            self.offset.view().into(),
            tap.mean.into(),
            tap.d_mean.into(),
            tap.d_var.into(),
            tap.active.into(),
            self.images.into(),
            self.channels.into(),
        ];
        let end: [Argument; 4] = [open.into(), high.into(), mode, target.add.into()];
        if self.plane == 1 {
            arguments.extend(end);
            let n = self.images * self.channels;
            return each(run.device, "channel_rows_backward", n, &arguments);
        }
        arguments.extend::<[Argument; 2]>([self.plane.into(), self.halved.unwrap_or(1).into()]);
        arguments.extend(end);
        blocks(run.device, "channel_backward", self.grid(), &arguments)
    }
}
