//! The frozen plan: a graph compiled for one input shape, with the exact gradient to that input.
//!
//! Compiling folds everything that does not depend on the images (shape chains, weight arithmetic),
//! lowers the rest to steps, and lays all activations and gradients out in reused buffers; running
//! allocates nothing after the first pass. A [`Plan`] is immutable and shared; each thread brings its
//! own [`Workspace`]. No gradient is computed for weights.

mod compile;
#[cfg(any(feature = "cuda", test))]
pub mod device;
mod lower;
mod schedule;
mod step;

pub use compile::{CompileOptions, Gradient, evaluate};
pub(in crate::graph) use compile::{Flow, lower_node, needed_nodes};

pub use lower::{
    Lower, Rounding, TapReference, Taps, Value, data_dependent, elements, from_elements,
};
pub use step::{
    Absorbed, Choice, Chosen, Differentiable, Follower, Mode, Needs, Operand, Reads, Step,
    StepState, Target,
};

pub(crate) use lower::StepRecord;
use schedule::Schedule;
#[cfg(any(feature = "cuda", test))]
pub use step::singles;

use crate::tensor::kernels::Element;

/// A graph compiled for one input shape.
#[derive(Debug)]
pub struct Plan<T> {
    steps: Vec<StepRecord<T>>,
    lengths: Vec<usize>,
    schedule: Schedule,
    input: usize,
    input_shape: Vec<usize>,
    output: usize,
    output_shape: Vec<usize>,
    taps: Vec<usize>,
}

/// The buffers of one run of a [`Plan`]; reuse it for the next.
#[derive(Debug)]
pub struct Workspace<T> {
    buffers: Vec<Vec<T>>,
    states: Vec<StepState<T>>,
}

/// Statistics seen at a normalisation layer in the last forward, and what the file holds.
#[derive(Debug, Clone, Copy)]
pub struct Tap<'a, T> {
    /// Name and running statistics from the file.
    pub reference: &'a TapReference,
    /// Mean over batch and space, one a channel.
    pub mean: &'a [T],
    /// Biased variance over batch and space, one a channel.
    pub var: &'a [T],
}

impl<T: Element> Plan<T> {
    /// Shape of the input, batch included.
    pub fn input_shape(&self) -> &[usize] {
        &self.input_shape
    }

    /// Shape of the output, batch included.
    pub fn output_shape(&self) -> &[usize] {
        &self.output_shape
    }

    /// Number of tapped normalisation layers.
    pub fn tap_count(&self) -> usize {
        self.taps.len()
    }

    /// Number of compiled steps.
    pub fn step_count(&self) -> usize {
        self.steps.len()
    }

    /// Bytes of all buffers of one workspace.
    pub fn workspace_bytes(&self) -> usize {
        self.schedule.sizes.iter().sum::<usize>() * size_of::<T>()
    }

    /// Fresh buffers for this plan.
    pub fn workspace(&self) -> Workspace<T> {
        Workspace {
            buffers: self.schedule.sizes.iter().map(|&size| vec![T::ZERO; size]).collect(),
            states: self.steps.iter().map(|_| StepState::default()).collect(),
        }
    }

    /// Runs the network on `input` (length of [`Plan::input_shape`]); returns the output.
    ///
    /// # Panics
    /// When `input` has another length, or the workspace is another plan's.
    pub fn forward<'w>(&self, workspace: &'w mut Workspace<T>, input: &[T]) -> &'w [T] {
        assert_eq!(input.len(), self.lengths[self.input], "plan input length");
        self.input_mut(workspace).copy_from_slice(input);
        self.forward_written(workspace)
    }

    /// Where the input of the next [`Plan::forward_written`] is written.
    ///
    /// # Panics
    /// When the workspace is another plan's.
    pub fn input_mut<'w>(&self, workspace: &'w mut Workspace<T>) -> &'w mut [T] {
        let slot = self.schedule.forward[self.input];
        &mut workspace.buffers[slot][..self.lengths[self.input]]
    }

    /// Runs the network on what was written to [`Plan::input_mut`] since the last pass; returns the output.
    ///
    /// # Panics
    /// When the workspace is another plan's.
    pub fn forward_written<'w>(&self, workspace: &'w mut Workspace<T>) -> &'w [T] {
        let slots = &self.schedule.forward;
        for (index, record) in self.steps.iter().enumerate() {
            let mut output = std::mem::take(&mut workspace.buffers[slots[record.output]]);
            {
                let inputs = self.operands(record, &workspace.buffers, true);
                let length = self.lengths[record.output];
                record.step.forward(&inputs, &mut output[..length], &mut workspace.states[index]);
            }
            workspace.buffers[slots[record.output]] = output;
        }
        &workspace.buffers[slots[self.output]][..self.lengths[self.output]]
    }

    /// The tapped statistics of the last forward, in network order.
    pub fn taps<'w>(&'w self, workspace: &'w Workspace<T>) -> impl Iterator<Item = Tap<'w, T>> {
        self.taps.iter().filter_map(|&index| {
            let reference = self.steps[index].tap.as_ref()?;
            let state = &workspace.states[index];
            Some(Tap { reference, mean: &state.mean, var: &state.var })
        })
    }

    /// Sets the gradient of the objective to the statistics of tap `tap`, for the next backward.
    pub fn set_tap_gradient(
        &self,
        workspace: &mut Workspace<T>,
        tap: usize,
        mean: &[T],
        var: &[T],
    ) {
        let state = &mut workspace.states[self.taps[tap]];
        state.d_mean.clear();
        state.d_mean.extend_from_slice(mean);
        state.d_var.clear();
        state.d_var.extend_from_slice(var);
    }

    /// Forgets all tap gradients: the next backward is of the output alone.
    pub fn clear_tap_gradients(&self, workspace: &mut Workspace<T>) {
        for &index in &self.taps {
            workspace.states[index].d_mean.clear();
            workspace.states[index].d_var.clear();
        }
    }

    /// The gradient to the input of the last forward, given the output's gradient (and the tap
    /// gradients set). Consumes the forward's values: one backward a forward.
    ///
    /// # Panics
    /// When `d_output` has another length than the output.
    pub fn backward<'w>(&self, workspace: &'w mut Workspace<T>, d_output: &[T]) -> &'w [T] {
        assert_eq!(d_output.len(), self.lengths[self.output], "plan output length");
        let Schedule { forward, gradient, .. } = &self.schedule;
        if let Some(slot) = gradient[self.output] {
            workspace.buffers[slot][..d_output.len()].copy_from_slice(d_output);
        }
        let mut written = vec![Mode::Write; self.lengths.len()];
        written[self.output] = Mode::Add;
        for (index, record) in self.steps.iter().enumerate().rev() {
            let Some(slot) = gradient[record.output] else { continue };
            let length = self.lengths[record.output];
            if written[record.output] == Mode::Write {
                // Only statistics behind this step feed it: the output's own gradient is zero.
                workspace.buffers[slot][..length].fill(T::ZERO);
            }
            for which in 0..record.inputs.len() {
                let Operand::Live(id) = record.inputs[which] else { continue };
                let Some(target) = gradient[id] else { continue };
                let mut data = std::mem::take(&mut workspace.buffers[target]);
                {
                    let needs = record.step.needs();
                    let inputs =
                        self.operands(record, &workspace.buffers, needs.inputs == Reads::Yes);
                    let output: &[T] = match needs.output {
                        Reads::Yes => &workspace.buffers[forward[record.output]][..length],
                        Reads::No => &[],
                    };
                    let d_output = &workspace.buffers[slot][..length];
                    let target = Target { data: &mut data[..self.lengths[id]], mode: written[id] };
                    let state = &workspace.states[index];
                    record.step.backward(which, &inputs, output, d_output, target, state);
                }
                workspace.buffers[target] = data;
                written[id] = Mode::Add;
            }
        }
        let length = self.lengths[self.input];
        match gradient[self.input] {
            Some(slot) => {
                if written[self.input] == Mode::Write {
                    workspace.buffers[slot][..length].fill(T::ZERO);
                }
                &workspace.buffers[slot][..length]
            }
            None => &[],
        }
    }

    fn operands<'w>(
        &'w self,
        record: &'w StepRecord<T>,
        buffers: &'w [Vec<T>],
        live: bool,
    ) -> Vec<&'w [T]> {
        record
            .inputs
            .iter()
            .map(|operand| match operand {
                Operand::Constant(data) => data.as_slice(),
                Operand::Live(id) if live => {
                    &buffers[self.schedule.forward[*id]][..self.lengths[*id]]
                }
                Operand::Live(_) => &[],
            })
            .collect()
    }
}
