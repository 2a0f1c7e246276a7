//! LRN: local response normalisation.

use rayon::prelude::*;

use super::Rule;
use crate::error::{Error, Result};
use crate::graph::ir::Node;
use crate::graph::plan::{Lower, Needs, Step, StepState, Target};
use crate::tensor::kernels::Element;

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    match op {
        "LRN" => Some(local_response),
        _ => None,
    }
}

/// Local response normalisation across channels (AlexNet, GoogLeNet).
#[derive(Debug)]
struct LocalResponse {
    channels: usize,
    plane: usize,
    size: usize,
    alpha: f64,
    beta: f64,
    bias: f64,
}

impl LocalResponse {
    /// Channels whose squares enter channel `c`'s divisor.
    fn window(&self, c: usize) -> std::ops::Range<usize> {
        c.saturating_sub((self.size - 1) / 2)..(c + self.size / 2 + 1).min(self.channels)
    }

    fn divisor<T: Element>(&self, x: &[T], c: usize, i: usize) -> T {
        let sum = self.window(c).map(|k| x[k * self.plane + i] * x[k * self.plane + i]).sum::<T>();
        T::of(self.bias) + T::of(self.alpha / self.size as f64) * sum
    }
}

impl<T: Element> Step<T> for LocalResponse {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], _state: &mut StepState<T>) {
        let block = self.channels * self.plane;
        output.par_chunks_mut(block).zip(inputs[0].par_chunks(block)).for_each(|(y, x)| {
            for c in 0..self.channels {
                for i in 0..self.plane {
                    let at = c * self.plane + i;
                    y[at] = x[at] * self.divisor(x, c, i).powf(T::of(-self.beta));
                }
            }
        });
    }

    fn needs(&self) -> Needs {
        Needs::INPUTS
    }

    fn backward(
        &self,
        _which: usize,
        inputs: &[&[T]],
        _output: &[T],
        d_output: &[T],
        mut target: Target<'_, T>,
        _state: &StepState<T>,
    ) {
        target.clear_if_fresh();
        let block = self.channels * self.plane;
        let rows = target.data.par_chunks_mut(block).zip(inputs[0].par_chunks(block));
        rows.zip(d_output.par_chunks(block)).for_each(|((d, x), dy)| {
            let factor = T::of(-2.0 * self.beta * self.alpha / self.size as f64);
            for c in 0..self.channels {
                for i in 0..self.plane {
                    let at = c * self.plane + i;
                    let divisor = self.divisor(x, c, i);
                    let scaled = divisor.powf(T::of(-self.beta));
                    d[at] += dy[at] * scaled;
                    let shared = factor * dy[at] * x[at] * scaled / divisor;
                    for k in self.window(c) {
                        d[k * self.plane + i] += shared * x[k * self.plane + i];
                    }
                }
            }
        });
    }
}

fn local_response<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let [_, channels, spatial @ ..] = x.shape() else {
        return Err(Error::input(format!("needs [N, C, ...], got shape `{:?}`", x.shape())));
    };
    let step = LocalResponse {
        channels: *channels,
        plane: spatial.iter().product::<usize>().max(1),
        size: usize::try_from(node.int("size", 1)?)
            .ok()
            .filter(|&s| s > 0)
            .ok_or_else(|| Error::input("`size` must be positive"))?,
        alpha: f64::from(node.float("alpha", 1e-4)?),
        beta: f64::from(node.float("beta", 0.75)?),
        bias: f64::from(node.float("bias", 1.0)?),
    };
    let shape = x.shape().to_vec();
    let y = lower.emit(Box::new(step), &[x], shape);
    lower.set_output(node, 0, y);
    Ok(())
}
