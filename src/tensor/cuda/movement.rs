//! Steps that only move values: transpositions, and copies by tables of positions.

use std::sync::Arc;

use super::{Argument, Device, Memory, Operation, Run, Site, Target, View, blocks, each};
use crate::error::Result;

/// Blocks of a launch of tiles.
const GRID: usize = 1 << 14;

/// [outer, rows, columns, piece] to [outer, columns, rows, piece].
#[derive(Debug, Clone, Copy)]
pub struct Swap {
    /// Rows of the input.
    pub rows: usize,
    /// Columns of the input.
    pub columns: usize,
    /// Elements that stay together.
    pub piece: usize,
}

impl Swap {
    fn run(self, run: &Run<'_>, from: View, to: View, add: bool) -> Result<()> {
        let Self { rows, columns, piece } = self;
        let n = to.len();
        if piece > 1 {
            let sizes = [rows, columns, piece, n].map(Argument::from);
            let arguments = [&[from.into(), to.into()], &sizes[..], &[add.into()]].concat();
            return each(run.device, "swap_pieces", n, &arguments);
        }
        let outer = n / (rows * columns).max(1);
        let tiles = outer * rows.div_ceil(32) * columns.div_ceil(32);
        let arguments =
            [from.into(), to.into(), outer.into(), rows.into(), columns.into(), add.into()];
        blocks(run.device, "transpose", [tiles.min(GRID), 1], &arguments)
    }
}

impl Operation for Swap {
    fn forward(&self, run: &Run<'_>, inputs: &[View], output: View) -> Result<()> {
        self.run(run, inputs[0], output, false)
    }

    fn backward(
        &self,
        run: &Run<'_>,
        _which: usize,
        _inputs: &[View],
        _output: View,
        gradient: View,
        target: Target,
    ) -> Result<()> {
        let reversed = Self { rows: self.columns, columns: self.rows, ..*self };
        reversed.run(run, gradient, target.view, target.add)
    }
}

/// For each element of an input, the outputs it went to: rows of places, one after the other.
#[derive(Debug)]
pub(super) struct Listed {
    offsets: Memory,
    places: Memory,
}

impl Listed {
    /// From (input, output) positions; the input has `length` elements.
    pub(super) fn new(
        device: &Arc<dyn Device>,
        pairs: impl Iterator<Item = (u32, u32)> + Clone,
        length: usize,
    ) -> Result<Self> {
        let mut offsets = vec![0_u32; length + 1];
        for (from, _) in pairs.clone() {
            offsets[from as usize + 1] += 1;
        }
        for i in 0..length {
            offsets[i + 1] += offsets[i];
        }
        let mut next = offsets.clone();
        let mut places = vec![0; offsets[length] as usize];
        for (from, to) in pairs {
            let at = &mut next[from as usize];
            places[*at as usize] = to;
            *at += 1;
        }
        let offsets = Memory::of_positions(device, &offsets)?;
        Ok(Self { offsets, places: Memory::of_positions(device, &places)? })
    }

    /// Sums what each input went to.
    pub(super) fn sum(&self, device: &dyn Device, from: View, target: Target) -> Result<()> {
        let n = target.view.len();
        let arguments = [
            from.into(),
            target.view.into(),
            self.offsets.view().into(),
            self.places.view().into(),
            n.into(),
            target.add.into(),
        ];
        each(device, "sum_listed", n, &arguments)
    }
}

/// What one input of a [`Movement`] gives.
#[derive(Debug)]
struct Given {
    from: Memory,
    to: Memory,
    count: usize,
    listed: Listed,
}

/// Each output element is one element of one input, or a fill value.
#[derive(Debug)]
pub struct Movement {
    given: Vec<Given>,
    /// Where some output comes from no input.
    fill: Option<f32>,
}

impl Movement {
    /// `pairs[k]` are the (input, output) positions of what input k gives; the rest is `fill`.
    ///
    /// # Errors
    /// When the device has no memory for the tables.
    pub fn new(site: &Site<'_>, pairs: &[Vec<(u32, u32)>], fill: f32) -> Result<Self> {
        let positions = |values: Vec<u32>| Memory::of_positions(site.device, &values);
        let given = pairs
            .iter()
            .zip(site.inputs)
            .map(|(pairs, &length)| {
                Ok(Given {
                    from: positions(pairs.iter().map(|pair| pair.0).collect())?,
                    to: positions(pairs.iter().map(|pair| pair.1).collect())?,
                    count: pairs.len(),
                    listed: Listed::new(site.device, pairs.iter().copied(), length)?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let covered: usize = pairs.iter().map(Vec::len).sum();
        Ok(Self { given, fill: (covered < site.output).then_some(fill) })
    }
}

impl Operation for Movement {
    fn forward(&self, run: &Run<'_>, inputs: &[View], output: View) -> Result<()> {
        let n = output.len();
        if let Some(fill) = self.fill {
            each(run.device, "fill", n, &[output.into(), fill.into(), n.into()])?;
        }
        for (given, &input) in self.given.iter().zip(inputs) {
            let (from, to) = (given.from.view(), given.to.view());
            let arguments =
                [input.into(), output.into(), from.into(), to.into(), given.count.into()];
            each(run.device, "copy_listed", given.count, &arguments)?;
        }
        Ok(())
    }

    fn backward(
        &self,
        run: &Run<'_>,
        which: usize,
        _inputs: &[View],
        _output: View,
        gradient: View,
        target: Target,
    ) -> Result<()> {
        self.given[which].listed.sum(run.device, gradient, target)
    }
}
