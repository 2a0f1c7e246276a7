//! One compiled operation of a plan: forward, and the vector-Jacobian product to each live input.

use std::fmt::Debug;
use std::sync::Arc;

use rayon::prelude::*;

#[cfg(any(feature = "cuda", test))]
use crate::error::Result;
#[cfg(any(feature = "cuda", test))]
use crate::tensor::cuda::{Operation, Site};
use crate::tensor::kernels::Element;

/// Where a step reads an operand: a value computed at run time, or data fixed at compile time.
#[derive(Debug, Clone)]
pub enum Operand<T> {
    /// A run-time value.
    Live(usize),
    /// Constant data.
    Constant(Arc<Vec<T>>),
}

/// What a step's gradient does to its target buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The buffer holds nothing yet.
    Write,
    /// Other consumers have written: add.
    Add,
}

/// The gradient buffer of one input of a step.
#[derive(Debug)]
pub struct Target<'a, T> {
    /// Same length as the input.
    pub data: &'a mut [T],
    /// Whether to overwrite or add.
    pub mode: Mode,
}

/// Values of a task.
const CHUNK: usize = 1 << 14;

impl<T: Element> Target<'_, T> {
    /// Puts `value(i)` at each position.
    #[inline(always)]
    pub fn put(self, value: impl Fn(usize) -> T) {
        match self.mode {
            Mode::Write => self.data.iter_mut().enumerate().for_each(|(i, d)| *d = value(i)),
            Mode::Add => self.data.iter_mut().enumerate().for_each(|(i, d)| *d += value(i)),
        }
    }

    /// Puts `f(a)` for each element of `a`.
    #[inline(always)]
    pub fn put_map(self, a: &[T], f: impl Fn(T) -> T) {
        let terms = self.data.iter_mut().zip(a);
        match self.mode {
            Mode::Write => terms.for_each(|(d, &a)| *d = f(a)),
            Mode::Add => terms.for_each(|(d, &a)| *d += f(a)),
        }
    }

    /// Puts `f(a, b)` for each pair.
    #[inline(always)]
    pub fn put_zip(self, a: &[T], b: &[T], f: impl Fn(T, T) -> T) {
        let terms = self.data.iter_mut().zip(a).zip(b);
        match self.mode {
            Mode::Write => terms.for_each(|((d, &a), &b)| *d = f(a, b)),
            Mode::Add => terms.for_each(|((d, &a), &b)| *d += f(a, b)),
        }
    }

    /// As [`Target::put_map`], by all threads.
    pub fn put_map_parallel(self, a: &[T], f: impl Fn(T) -> T + Sync + Send) {
        let mode = self.mode;
        self.data
            .par_chunks_mut(CHUNK)
            .zip(a.par_chunks(CHUNK))
            .for_each(|(data, a)| Target { data, mode }.put_map(a, &f));
    }

    /// Clears a fresh buffer so that everything can be added.
    pub fn clear_if_fresh(&mut self) {
        if self.mode == Mode::Write {
            self.data.par_chunks_mut(CHUNK).for_each(|data| data.fill(T::ZERO));
            self.mode = Mode::Add;
        }
    }
}

/// What one step keeps from its forward for its backward, and the cotangents of its statistics.
#[derive(Debug, Clone, Default)]
pub struct StepState<T> {
    /// Positions (arg-max of pooling).
    pub indices: Vec<u32>,
    /// Per-channel mean of a tapped input, or whatever the step saves.
    pub mean: Vec<T>,
    /// Per-channel biased variance of a tapped input, or whatever the step saves.
    pub var: Vec<T>,
    /// Gradient of the objective to `mean`; set before the backward, empty for none.
    pub d_mean: Vec<T>,
    /// Gradient of the objective to `var`.
    pub d_var: Vec<T>,
}

/// What a step's gradient reads besides the output's gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// The values of its inputs.
    pub inputs: Reads,
    /// The value of its output.
    pub output: Reads,
}

/// Whether a value is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reads {
    /// Read.
    Yes,
    /// Not read: its buffer may be reused before.
    No,
}

impl Needs {
    /// Nothing but the output's gradient.
    pub const NOTHING: Self = Self { inputs: Reads::No, output: Reads::No };
    /// The inputs.
    pub const INPUTS: Self = Self { inputs: Reads::Yes, output: Reads::No };
    /// The output.
    pub const OUTPUT: Self = Self { inputs: Reads::No, output: Reads::Yes };
}

/// A compiled operation with one output. Shapes are fixed at compile time, inside the step.
pub trait Step<T: Element>: Send + Sync + Debug {
    /// Computes `output` from `inputs`.
    fn forward(&self, inputs: &[&[T]], output: &mut [T], state: &mut StepState<T>);

    /// What [`Step::backward`] reads.
    fn needs(&self) -> Needs;

    /// Adds or writes the gradient to input `which`. `inputs` and `output` are empty slices where
    /// [`Step::needs`] says they are not read.
    fn backward(
        &self,
        which: usize,
        inputs: &[&[T]],
        output: &[T],
        d_output: &[T],
        target: Target<'_, T>,
        state: &StepState<T>,
    );

    /// Whether a gradient exists to input `which`; a path without one is an error, not a zero.
    fn differentiable(&self, which: usize) -> Differentiable {
        let _ = which;
        Differentiable::Yes
    }

    /// The step itself, where a fusion looks for its kind.
    fn as_any(&self) -> Option<&dyn std::any::Any> {
        None
    }

    /// What this step is to one before it that could take it in.
    fn follower(&self) -> Option<Follower> {
        None
    }

    /// The same step on a GPU; `None` where only the processor has it.
    ///
    /// # Errors
    /// When the device has no memory for its constants.
    #[cfg(any(feature = "cuda", test))]
    fn on_device(&self, site: &Site<'_>) -> Result<Option<Box<dyn Operation>>> {
        let _ = site;
        Ok(None)
    }

    /// Takes a following step into this one, if it can.
    fn absorb(&mut self, follower: &Follower) -> Absorbed {
        let _ = follower;
        Absorbed::No
    }
}

/// Values as the GPU computes with them.
#[cfg(any(feature = "cuda", test))]
pub fn singles<T: Element>(values: &[T]) -> Vec<f32> {
    values.iter().map(|value| value.f64() as f32).collect()
}

/// A function whose result only chooses: positions, masks, measured ranges. It is piecewise constant.
pub trait Choice<T: Element>: Send + Sync + Debug {
    /// Computes `output` from `inputs`.
    fn choose(&self, inputs: &[&[T]], output: &mut [T]);
}

/// The step of a [`Choice`]: it reads nothing for its gradient, which is zero.
#[derive(Debug)]
pub struct Chosen<C>(pub C);

impl<T: Element, C: Choice<T>> Step<T> for Chosen<C> {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], _state: &mut StepState<T>) {
        self.0.choose(inputs, output);
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING
    }

    fn backward(
        &self,
        _which: usize,
        _inputs: &[&[T]],
        _output: &[T],
        _d_output: &[T],
        mut target: Target<'_, T>,
        _state: &StepState<T>,
    ) {
        target.clear_if_fresh();
    }

    fn differentiable(&self, _which: usize) -> Differentiable {
        Differentiable::Choice
    }
}

/// A step that one before it may take in, to compute both in one pass.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Follower {
    /// Addition of a second value of the same shape, which becomes one more input.
    Add,
    /// Values held between two bounds.
    Bounded {
        /// Least value.
        low: f64,
        /// Largest value.
        high: f64,
        /// ReLU, whose gradient at its bound is 0; else it is 1.
        relu: bool,
    },
    /// Maxima of 2x2 blocks.
    Halve {
        /// Width of the planes.
        width: usize,
    },
}

/// Whether a step took its follower in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absorbed {
    /// It now computes both.
    Yes,
    /// It cannot; nothing changed.
    No,
}

/// Whether a gradient flows to an input of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Differentiable {
    /// It does.
    Yes,
    /// The input only chooses (a condition, an index, a comparison): piecewise constant, and so
    /// without a gradient in every framework, but the values chosen keep theirs.
    Choice,
    /// The operation rounds a value away: a network behind it would train on a gradient of zero.
    No,
}
