//! Functions of two numbers with broadcasting, and choices.

use std::sync::Arc;

use super::movement::Listed;
use super::{Argument, Device, Memory, Operation, Run, Site, Target, View, blocks, each};
use crate::error::Result;

/// How positions of one operand follow the output's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Spread {
    /// Same position.
    Same,
    /// `position / inner % count`.
    Channel {
        /// Neighbours that share an element.
        inner: usize,
        /// Elements.
        count: usize,
    },
    /// One entry an output element.
    Map(Vec<u32>),
}

/// Parts that a channel's sum is cut into at most.
const PARTS: usize = 64;
/// Terms that a part has at least.
const TERMS: usize = 2048;

#[derive(Debug)]
struct Operand {
    spread: Spread,
    map: Option<Memory>,
    /// Outputs by element of the operand, for its gradient.
    listed: Option<Listed>,
}

impl Operand {
    fn new(device: &Arc<dyn Device>, spread: Spread, length: usize) -> Result<Self> {
        let (map, listed) = match &spread {
            Spread::Map(map) => {
                let pairs = map.iter().enumerate().map(|(to, &from)| (from, to as u32));
                let listed = Listed::new(device, pairs, length)?;
                (Some(Memory::of_positions(device, map)?), Some(listed))
            }
            _ => (None, None),
        };
        Ok(Self { spread, map, listed })
    }

    fn arguments(&self, view: View) -> [Argument; 5] {
        spread_arguments(view, &self.spread, self.map.as_ref().map_or(View::NOTHING, Memory::view))
    }
}

fn spread_arguments(view: View, spread: &Spread, map: View) -> [Argument; 5] {
    let (kind, inner, count) = match *spread {
        Spread::Same => (0, 1, 1),
        Spread::Channel { inner, count } => (1, inner, count),
        Spread::Map(_) => (2, 1, 1),
    };
    [view.into(), Argument::Integer(kind), inner.into(), count.into(), map.into()]
}

/// The number that `kernels/elementwise.cu` gives addition.
const ADD: i32 = 0;

/// `y += b`, `b` by position or by channel: each element is read and written by one thread.
///
/// # Errors
/// When the device refuses the launch.
pub(super) fn add_in_place(run: &Run<'_>, y: View, b: View, spread: &Spread) -> Result<()> {
    let mut arguments = vec![ADD.into()];
    arguments.extend(spread_arguments(y, &Spread::Same, View::NOTHING));
    arguments.extend(spread_arguments(b, spread, View::NOTHING));
    arguments.extend::<[Argument; 2]>([y.into(), y.len().into()]);
    each(run.device, "binary_forward", y.len(), &arguments)
}

/// `y = f(a, b)`; `function` is the number that `kernels/elementwise.cu` gives it.
#[derive(Debug)]
pub struct Binary {
    function: i32,
    operands: [Operand; 2],
    output: usize,
}

impl Binary {
    /// Sets the step up.
    ///
    /// # Errors
    /// When the device has no memory for the maps.
    pub fn new(site: &Site<'_>, function: i32, [a, b]: [Spread; 2]) -> Result<Self> {
        let a = Operand::new(site.device, a, site.inputs[0])?;
        let b = Operand::new(site.device, b, site.inputs[1])?;
        Ok(Self { function, operands: [a, b], output: site.output })
    }

    fn values(&self, inputs: &[View]) -> Vec<Argument> {
        let pairs = self.operands.iter().zip(inputs);
        pairs.flat_map(|(operand, &view)| operand.arguments(view)).collect()
    }

    fn is_same(&self, which: usize) -> bool {
        self.operands[which].spread == Spread::Same
    }
}

fn parts(terms: usize) -> usize {
    (terms / TERMS).clamp(1, PARTS)
}

impl Operation for Binary {
    fn scratch(&self) -> usize {
        let count = |operand: &Operand| match operand.spread {
            Spread::Channel { count, .. } => count,
            _ => 0,
        };
        if self.is_same(0) && self.is_same(1) {
            return 0;
        }
        self.output + PARTS * self.operands.iter().map(count).max().unwrap_or(0)
    }

    fn forward(&self, run: &Run<'_>, inputs: &[View], output: View) -> Result<()> {
        let n = output.len();
        let mut arguments = vec![self.function.into()];
        arguments.extend(self.values(inputs));
        arguments.extend::<[Argument; 2]>([output.into(), n.into()]);
        each(run.device, "binary_forward", n, &arguments)
    }

    fn backward(
        &self,
        run: &Run<'_>,
        which: usize,
        inputs: &[View],
        _output: View,
        gradient: View,
        target: Target,
    ) -> Result<()> {
        let n = gradient.len();
        // Sums and differences read no value: any memory stands in.
        let inputs = [0, 1].map(|i| if inputs[i].is_empty() { gradient } else { inputs[i] });
        let terms = |to: View, add: bool| {
            let which = Argument::Integer(which as i32);
            let mut arguments = vec![self.function.into(), which];
            arguments.extend(self.values(&inputs));
            arguments.extend::<[Argument; 4]>([gradient.into(), to.into(), n.into(), add.into()]);
            each(run.device, "binary_terms", n, &arguments)
        };
        if self.is_same(which) {
            return terms(target.view, target.add);
        }
        let own = run.scratch.part(0, n);
        terms(own, false)?;
        let operand = &self.operands[which];
        if let Some(listed) = &operand.listed {
            return listed.sum(run.device, own, target);
        }
        let Spread::Channel { inner, count } = operand.spread else { return Ok(()) };
        let outer = n / (inner * count).max(1);
        let parts = parts(outer * inner);
        let partial = run.scratch.part(n, parts * count);
        let arguments = [own.into(), partial.into(), outer.into(), count.into(), inner.into()];
        blocks(run.device, "channel_sums", [count, parts], &arguments)?;
        let arguments =
            [partial.into(), target.view.into(), count.into(), parts.into(), target.add.into()];
        each(run.device, "sum_parts", count, &arguments)
    }
}

/// Input 1 where input 0 holds, else input 2; all of one length.
#[derive(Debug, Clone, Copy)]
pub struct Choose;

impl Operation for Choose {
    fn forward(&self, run: &Run<'_>, inputs: &[View], output: View) -> Result<()> {
        let n = output.len();
        let [condition, yes, no] = [0, 1, 2].map(|i| Argument::from(inputs[i]));
        each(run.device, "choose_forward", n, &[condition, yes, no, output.into(), n.into()])
    }

    fn backward(
        &self,
        run: &Run<'_>,
        which: usize,
        inputs: &[View],
        _output: View,
        gradient: View,
        target: Target,
    ) -> Result<()> {
        let (n, wanted) = (gradient.len(), which == 1);
        if which == 0 {
            return match target.add {
                true => Ok(()),
                false => each(
                    run.device,
                    "fill",
                    target.view.len(),
                    &[target.view.into(), 0.0.into(), target.view.len().into()],
                ),
            };
        }
        let arguments = [
            inputs[0].into(),
            gradient.into(),
            target.view.into(),
            wanted.into(),
            n.into(),
            target.add.into(),
        ];
        each(run.device, "choose_backward", n, &arguments)
    }
}
