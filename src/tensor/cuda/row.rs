//! Normalisations along rows, one block a row.

use super::{Argument, Memory, Operation, Run, Site, Target, View, blocks};
use crate::error::Result;

/// Rows of `row` values, centred (or not) and divided by their root mean square, then scaled and shifted.
#[derive(Debug)]
pub struct Standardize {
    row: usize,
    epsilon: f32,
    centre: bool,
    affine: Option<[Memory; 2]>,
    mean: Memory,
    inverse: Memory,
}

impl Standardize {
    /// Sets the step up; `affine` is scale and shift of a row's elements.
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn new(
        site: &Site<'_>,
        row: usize,
        epsilon: f32,
        centre: bool,
        affine: Option<[&[f32]; 2]>,
    ) -> Result<Self> {
        let affine = match affine {
            Some([scale, shift]) => {
                Some([Memory::of(site.device, scale)?, Memory::of(site.device, shift)?])
            }
            None => None,
        };
        let rows = site.output / row.max(1);
        let (mean, inverse) = (Memory::new(site.device, rows)?, Memory::new(site.device, rows)?);
        Ok(Self { row, epsilon, centre, affine, mean, inverse })
    }

    fn affine(&self) -> [View; 2] {
        let view = |which: usize| self.affine.as_ref().map_or(View::NOTHING, |a| a[which].view());
        [view(0), view(1)]
    }
}

impl Operation for Standardize {
    fn forward(&self, run: &Run<'_>, inputs: &[View], output: View) -> Result<()> {
        let [scale, shift] = self.affine();
        let arguments = [
            inputs[0].into(),
            output.into(),
            self.mean.view().into(),
            self.inverse.view().into(),
            self.row.into(),
            self.epsilon.into(),
            self.centre.into(),
            scale.into(),
            shift.into(),
            self.affine.is_some().into(),
        ];
        let rows = output.len() / self.row;
        blocks(run.device, "standardize_forward", [rows, 1], &arguments)
    }

    fn backward(
        &self,
        run: &Run<'_>,
        _which: usize,
        inputs: &[View],
        _output: View,
        gradient: View,
        target: Target,
    ) -> Result<()> {
        let arguments = [
            inputs[0].into(),
            gradient.into(),
            target.view.into(),
            self.mean.view().into(),
            self.inverse.view().into(),
            self.row.into(),
            self.centre.into(),
            self.affine()[0].into(),
            self.affine.is_some().into(),
            target.add.into(),
        ];
        let rows = gradient.len() / self.row;
        blocks(run.device, "standardize_backward", [rows, 1], &arguments)
    }
}

/// Softmax of rows of `row` values; the numbers of `kernels/row.cu`.
#[derive(Debug, Clone, Copy)]
pub struct Softmax {
    /// Values of a row.
    pub row: usize,
    /// 0 softmax, 1 its logarithm, 2 softmax that makes zeros of a row of minus infinities.
    pub kind: i32,
}

impl Operation for Softmax {
    fn forward(&self, run: &Run<'_>, inputs: &[View], output: View) -> Result<()> {
        let arguments = [inputs[0].into(), output.into(), self.row.into(), self.kind.into()];
        blocks(run.device, "softmax_forward", [output.len() / self.row, 1], &arguments)
    }

    fn backward(
        &self,
        run: &Run<'_>,
        _which: usize,
        _inputs: &[View],
        output: View,
        gradient: View,
        target: Target,
    ) -> Result<()> {
        let arguments: [Argument; 6] = [
            output.into(),
            gradient.into(),
            target.view.into(),
            self.row.into(),
            self.kind.into(),
            target.add.into(),
        ];
        blocks(run.device, "softmax_backward", [gradient.len() / self.row, 1], &arguments)
    }
}
