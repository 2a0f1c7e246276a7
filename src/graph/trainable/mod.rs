//! A graph whose weights are free, run on the tape: what is trained.
//!
//! The graph is compiled for one input shape, as the frozen plan is: shape arithmetic is folded, the
//! rest becomes a list of instructions. The operators of convolutional networks are operations of the
//! tape itself and have derivatives of any order; all others run as the frozen plan's steps, with a
//! first derivative (asking for a second is an error that names the node). Batch normalisation uses
//! the batch's statistics or given ones, as the caller says.

mod compile;
mod instruction;
mod native;
mod parameters;

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::graph::plan::Differentiable;
use crate::tensor::tape::{BatchStatistics, Float, Var};

pub use parameters::free_constants;

use instruction::Instruction;

/// Running statistics of one normalisation layer, one value a channel.
#[derive(Debug, Clone, PartialEq)]
pub struct RunningStatistics {
    /// Mean.
    pub mean: Vec<f32>,
    /// Unbiased variance.
    pub variance: Vec<f32>,
}

/// Which statistics the normalisation layers of a pass use.
#[derive(Debug, Clone, Copy)]
pub enum Statistics<'a> {
    /// Those of the batch at hand.
    Batch,
    /// These, one a layer in the order of [`Trainable::norms`].
    Given(&'a [RunningStatistics]),
}

/// What a pass gives.
#[derive(Debug)]
pub struct Pass {
    /// The output.
    pub output: Var,
    /// Statistics of the batch at each normalisation layer, in order; empty with given ones.
    pub statistics: Vec<BatchStatistics>,
}

/// A normalisation layer of the graph: its name and the statistics its file holds.
#[derive(Debug, Clone, PartialEq)]
pub struct NormLayer {
    /// Name of the node.
    pub name: String,
    /// Names of the constants with running mean and variance.
    pub constants: [String; 2],
    /// Their values.
    pub running: RunningStatistics,
}

/// A graph compiled for training at one input shape.
#[derive(Debug)]
pub struct Trainable<T> {
    program: Vec<Instruction<T>>,
    parameters: Vec<(usize, Vec<usize>)>,
    input: (usize, Vec<usize>),
    output: (usize, Vec<usize>),
    norms: Vec<NormLayer>,
    values: usize,
    /// Instructions after which each value is read no more.
    last_read: BTreeMap<usize, Vec<usize>>,
}

impl<T: Float> Trainable<T> {
    /// Dimensions of the output, batch included.
    pub fn output_shape(&self) -> &[usize] {
        &self.output.1
    }

    /// The normalisation layers, in order.
    pub fn norms(&self) -> &[NormLayer] {
        &self.norms
    }

    /// The first node that a weight's gradient goes through and that has a first derivative only.
    pub fn first_order_node(&self) -> Option<&str> {
        let mut live = vec![false; self.values];
        for (id, _) in &self.parameters {
            live[*id] = true;
        }
        for instruction in &self.program {
            let reads = instruction.reads();
            let smooth = reads.iter().any(|(id, flow)| live[*id] && *flow == Differentiable::Yes);
            if smooth && matches!(instruction, Instruction::Step { .. }) {
                return Some(instruction.name());
            }
            live[instruction.output()] |= smooth;
        }
        None
    }

    /// What is computed from what, a line an instruction, with the values of small constants but not of weights:
    /// the same for two files of one architecture, however they were exported and named.
    pub fn structure(&self) -> Vec<String> {
        let mut number: BTreeMap<usize, usize> = BTreeMap::new();
        let starts = std::iter::once(self.input.0).chain(self.parameters.iter().map(|p| p.0));
        for id in starts {
            number.insert(id, number.len());
        }
        let mut lines: Vec<String> =
            self.parameters.iter().map(|(_, shape)| format!("weight {shape:?}")).collect();
        for instruction in &self.program {
            lines.push(instruction.describe(&number));
            number.insert(instruction.output(), number.len());
        }
        lines
    }

    /// Runs on `input`, of the shape compiled for, with `parameters` in the order they were named in;
    /// all on one tape.
    ///
    /// # Errors
    /// When a shape or a number does not fit, or an operation fails.
    pub fn run(&self, parameters: &[Var], input: &Var, statistics: Statistics<'_>) -> Result<Pass> {
        let expected = self.parameters.iter().map(|(_, shape)| shape.as_slice());
        if input.dims() != self.input.1 || !parameters.iter().map(Var::dims).eq(expected) {
            return Err(Error::internal(format!(
                "{} parameters and an input of {:?} for a network of {} and `{:?}`",
                parameters.len(),
                input.dims(),
                self.parameters.len(),
                self.input.1
            )));
        }
        if let Statistics::Given(given) = statistics
            && given.len() != self.norms.len()
        {
            return Err(Error::internal(format!(
                "statistics of {} layers for `{}`",
                given.len(),
                self.norms.len()
            )));
        }
        let mut values: Vec<Option<Var>> = vec![None; self.values];
        values[self.input.0] = Some(input.clone());
        for ((id, _), parameter) in self.parameters.iter().zip(parameters) {
            values[*id] = Some(parameter.clone());
        }
        let mut own = Vec::new();
        for (index, instruction) in self.program.iter().enumerate() {
            let value = instruction.run(input.tape(), &values, statistics, &mut own)?;
            values[instruction.output()] = Some(value);
            for &id in self.last_read.get(&index).into_iter().flatten() {
                values[id] = None;
            }
        }
        let (id, shape) = &self.output;
        let output = values[*id]
            .take()
            .ok_or_else(|| Error::internal("the network made no output"))?
            .reshape(shape)?;
        Ok(Pass { output, statistics: own })
    }
}
