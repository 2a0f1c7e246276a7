//! Pooling over one or two axes.

use super::{Argument, Memory, Operation, Run, Site, Target, View, each};
use crate::error::Result;

/// What becomes of a window; the numbers of `kernels/pool.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolKind {
    /// The largest value; its gradient goes to the first of equals.
    Max = 0,
    /// The mean of what lies inside the input.
    AverageOfInside = 1,
    /// The mean of what lies inside input and pads.
    AverageOfWindow = 2,
    /// The sum.
    Sum = 3,
}

/// Planes of `input` pixels become planes of `output` pixels.
#[derive(Debug)]
pub struct Pool {
    kind: PoolKind,
    planes: usize,
    /// Input, output, kernel, stride, dilation, pads before, pads after: down and right.
    window: [[usize; 2]; 7],
    /// Where the maxima were.
    places: Memory,
}

impl Pool {
    /// Sets the step up; `window` is input, output, kernel, stride, dilation, pads before, pads after.
    ///
    /// # Errors
    /// When the device has no memory for the places of the maxima.
    pub fn new(site: &Site<'_>, kind: PoolKind, window: [[usize; 2]; 7]) -> Result<Self> {
        let planes = site.output / (window[1][0] * window[1][1]).max(1);
        let places = if kind == PoolKind::Max { site.output } else { 0 };
        Ok(Self { kind, planes, window, places: Memory::new(site.device, places)? })
    }

    fn arguments(&self, views: &[View]) -> Vec<Argument> {
        let max = self.kind == PoolKind::Max;
        let mut arguments: Vec<Argument> = views.iter().map(|&view| view.into()).collect();
        if !max {
            arguments.push(Argument::Integer(self.kind as i32));
        }
        arguments.push(self.planes.into());
        // A maximum minds no pad behind the input.
        let pairs = if max { 6 } else { 7 };
        arguments.extend(self.window[..pairs].iter().flatten().map(|&size| Argument::from(size)));
        arguments
    }
}

impl Operation for Pool {
    fn forward(&self, run: &Run<'_>, inputs: &[View], output: View) -> Result<()> {
        let n = output.len();
        if self.kind == PoolKind::Max {
            let arguments = self.arguments(&[inputs[0], output, self.places.view()]);
            return each(run.device, "max_pool_forward", n, &arguments);
        }
        each(run.device, "mean_pool_forward", n, &self.arguments(&[inputs[0], output]))
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
        let (n, add) = (target.view.len(), Argument::from(target.add));
        if self.kind == PoolKind::Max {
            let mut arguments = self.arguments(&[gradient, self.places.view(), target.view]);
            arguments.push(add);
            return each(run.device, "max_pool_backward", n, &arguments);
        }
        let mut arguments = self.arguments(&[gradient, target.view]);
        arguments.push(add);
        each(run.device, "mean_pool_backward", n, &arguments)
    }
}
