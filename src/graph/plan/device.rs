//! A frozen plan on a device: the same steps in the same buffers, everything in device memory.
//!
//! Constants go up once. A run is a fixed list of operations, made when the plan is; between the images
//! (or pixels) that go up and what is asked for nothing waits for the host.

use std::sync::Arc;

use super::{Mode, Operand, Plan, Reads, TapReference};
use crate::error::{Error, Result, ResultExt};
use crate::tensor::cuda::{
    Device, LONGEST, Memory, Objective, Operation, Run, Site, TapViews, Target, View, Wanted,
    cross_entropy, each,
};

/// A plan and its one workspace, on a device.
#[derive(Debug)]
pub struct DevicePlan {
    device: Arc<dyn Device>,
    operations: Vec<Box<dyn Operation>>,
    forward: Vec<Forward>,
    backward: Vec<Backward>,
    input: View,
    output: View,
    d_input: View,
    d_output: View,
    /// Tap of each operation.
    taps: Vec<Option<usize>>,
    objective: Objective,
    losses: Memory,
    labels: Memory,
    scratch: Memory,
    /// What the views lie in.
    _buffers: Vec<Memory>,
    _constants: Vec<Memory>,
}

#[derive(Debug)]
struct Forward {
    operation: usize,
    inputs: Vec<View>,
    output: View,
}

#[derive(Debug)]
enum Backward {
    /// Nothing has written this gradient, and somebody reads it.
    Clear(View),
    Step {
        operation: usize,
        which: usize,
        inputs: Vec<View>,
        output: View,
        gradient: View,
        target: Target,
    },
}

/// What a pass of an inversion step comes to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Losses {
    /// Cross-entropy summed over the images that count.
    pub cross_entropy: f64,
    /// Unweighted statistics term.
    pub statistics: f64,
}

/// Views of a plan's values in its buffers.
struct Layout<'a> {
    plan: &'a Plan<f32>,
    buffers: Vec<Memory>,
}

impl Layout<'_> {
    fn value(&self, id: usize) -> View {
        self.buffers[self.plan.schedule.forward[id]].view().part(0, self.plan.lengths[id])
    }

    fn gradient(&self, id: usize) -> Option<View> {
        let slot = self.plan.schedule.gradient[id]?;
        Some(self.buffers[slot].view().part(0, self.plan.lengths[id]))
    }
}

impl DevicePlan {
    /// Sets `plan` up on `device`. `references` stand for what the plan's taps should see (mean and variance a tap)
    /// where they are not the file's.
    ///
    /// # Errors
    /// When a step is not on the device (naming its node), a tensor is too long, or memory runs out.
    pub fn new(
        plan: &Plan<f32>,
        device: &Arc<dyn Device>,
        references: Option<&[[Vec<f32>; 2]]>,
    ) -> Result<Self> {
        let mut operations = Vec::with_capacity(plan.steps.len());
        for record in &plan.steps {
            let node = || format!("node `{}` ({})", record.name, record.op_type);
            let length = |operand: &Operand<f32>| match operand {
                Operand::Live(id) => plan.lengths[*id],
                Operand::Constant(data) => data.len(),
            };
            let inputs: Vec<usize> = record.inputs.iter().map(length).collect();
            let output = plan.lengths[record.output];
            if inputs.iter().chain([&output]).any(|&length| length >= LONGEST) {
                return Err(Error::unsupported(
                    "a tensor of 2^30 elements or more is not for CUDA",
                )
                .hint("make the batch smaller (`recover.batch`)")
                .context(node()));
            }
            let site = Site { device, inputs: &inputs, output };
            let operation = record.step.on_device(&site).context(node)?.ok_or_else(|| {
                Error::unsupported("this operator is not on CUDA yet")
                    .hint("use `--device cpu`")
                    .context(node())
            })?;
            operations.push(operation);
        }
        let sizes = &plan.schedule.sizes;
        let buffers = sizes.iter().map(|&size| Memory::new(device, size)).collect::<Result<_>>()?;
        let layout = Layout { plan, buffers };
        let mut constants = Vec::new();
        let forward = forward_calls(&layout, device, &mut constants)?;
        let backward = backward_calls(&layout, &forward);
        let tap_references: Vec<&TapReference> =
            plan.taps.iter().filter_map(|&index| plan.steps[index].tap.as_ref()).collect();
        let wanted: Vec<Wanted<'_>> = tap_references
            .iter()
            .enumerate()
            .map(|(tap, reference)| {
                let [mean, var] = match references {
                    Some(references) => references[tap].each_ref(),
                    None => [&reference.mean, &reference.var],
                };
                Wanted { mean, var, unit: &reference.unit }
            })
            .collect();
        let mut taps = vec![None; operations.len()];
        plan.taps.iter().enumerate().for_each(|(tap, &index)| taps[index] = Some(tap));
        let images = plan.output_shape.first().copied().unwrap_or(1);
        let scratch = operations.iter().map(|operation| operation.scratch()).max().unwrap_or(0);
        let nothing = View::NOTHING;
        Ok(Self {
            forward,
            backward,
            input: layout.value(plan.input),
            output: layout.value(plan.output),
            d_input: layout.gradient(plan.input).unwrap_or(nothing),
            d_output: layout.gradient(plan.output).unwrap_or(nothing),
            taps,
            objective: Objective::new(device, &wanted)?,
            losses: Memory::new(device, images)?,
            labels: Memory::new(device, images)?,
            scratch: Memory::new(device, scratch)?,
            operations,
            _buffers: layout.buffers,
            _constants: constants,
            device: Arc::clone(device),
        })
    }

    /// Where the plan's input lies: whoever computes it on the device writes there.
    pub fn input(&self) -> View {
        self.input
    }

    /// Where the gradient to the input lies after [`DevicePlan::backward`].
    pub fn input_gradient(&self) -> View {
        self.d_input
    }

    /// Where the output lies after [`DevicePlan::forward`].
    pub fn output(&self) -> View {
        self.output
    }

    /// Where the output's gradient is expected by [`DevicePlan::backward`].
    pub fn output_gradient(&self) -> View {
        self.d_output
    }

    /// Images of the batch.
    pub fn images(&self) -> usize {
        self.losses.view().len()
    }

    /// The machine.
    pub fn device(&self) -> &dyn Device {
        &*self.device
    }

    /// Mean and variance that tap `tap` saw in the last forward.
    pub fn seen(&self, tap: usize) -> [View; 2] {
        self.objective.seen(tap)
    }

    fn run(&self, operation: usize, active: bool) -> Run<'_> {
        let tap = self.taps[operation].map(|tap| {
            let [mean, var] = self.objective.seen(tap);
            let [d_mean, d_var] = self.objective.gradient(tap);
            TapViews { mean, var, d_mean, d_var, active }
        });
        Run { device: &*self.device, scratch: self.scratch.view(), tap }
    }

    /// Runs the network on what [`DevicePlan::input`] holds.
    ///
    /// # Errors
    /// Those of the device.
    pub fn forward(&self) -> Result<()> {
        for Forward { operation, inputs, output } in &self.forward {
            self.operations[*operation].forward(&self.run(*operation, false), inputs, *output)?;
        }
        Ok(())
    }

    /// Uploads the wanted class of each image, for [`DevicePlan::objective`].
    ///
    /// # Errors
    /// When there are more labels than images in the batch; those of the device.
    pub fn set_labels(&self, labels: &[usize]) -> Result<()> {
        let classes = self.output.len() / self.losses.view().len().max(1);
        if labels.len() > self.labels.view().len() || labels.iter().any(|&l| l >= classes) {
            return Err(Error::internal("labels that do not fit the batch"));
        }
        let labels: Vec<u32> = labels.iter().map(|&label| label as u32).collect();
        self.device.write(self.labels.view().address(), &labels)
    }

    /// Sets the gradients of cross-entropy to the labels (over the first `used` images, `scale` times) and of
    /// `weight` times the statistics term.
    ///
    /// # Errors
    /// Those of the device.
    pub fn objective(&self, used: usize, scale: f32, weight: f32) -> Result<()> {
        let to = [self.d_output, self.losses.view()];
        cross_entropy(&*self.device, self.output, self.labels.view(), to, used, scale)?;
        self.statistics(weight)
    }

    /// As [`DevicePlan::objective`], the gradient to the output written by the caller.
    ///
    /// # Errors
    /// Those of the device.
    pub fn statistics(&self, weight: f32) -> Result<()> {
        self.objective.match_statistics(&*self.device, weight)
    }

    /// What the last [`DevicePlan::objective`] found. Waits for the device.
    ///
    /// # Errors
    /// Those of the device.
    pub fn losses(&self) -> Result<Losses> {
        let cross_entropy = self.losses.read()?.into_iter().map(f64::from).sum();
        Ok(Losses { cross_entropy, statistics: self.objective.statistics_loss()? })
    }

    /// The unweighted statistics term of the last [`DevicePlan::statistics`]. Waits for the device.
    ///
    /// # Errors
    /// Those of the device.
    pub fn statistics_loss(&self) -> Result<f64> {
        self.objective.statistics_loss()
    }

    /// The gradient to the input of what was set; `statistics` says whether their term counts.
    ///
    /// # Errors
    /// Those of the device.
    pub fn backward(&self, statistics: bool) -> Result<()> {
        for call in &self.backward {
            match call {
                Backward::Clear(view) => {
                    let arguments = [(*view).into(), 0.0.into(), view.len().into()];
                    each(&*self.device, "fill", view.len(), &arguments)?;
                }
                Backward::Step { operation, which, inputs, output, gradient, target } => {
                    let run = self.run(*operation, statistics);
                    let step = &self.operations[*operation];
                    step.backward(&run, *which, inputs, *output, *gradient, *target)?;
                }
            }
        }
        Ok(())
    }
}

fn forward_calls(
    layout: &Layout<'_>,
    device: &Arc<dyn Device>,
    constants: &mut Vec<Memory>,
) -> Result<Vec<Forward>> {
    let mut calls = Vec::new();
    for (operation, record) in layout.plan.steps.iter().enumerate() {
        let mut inputs = Vec::new();
        for operand in &record.inputs {
            inputs.push(match operand {
                Operand::Live(id) => layout.value(*id),
                Operand::Constant(data) => {
                    let memory = Memory::of(device, data)?;
                    let view = memory.view();
                    constants.push(memory);
                    view
                }
            });
        }
        calls.push(Forward { operation, inputs, output: layout.value(record.output) });
    }
    Ok(calls)
}

/// The backward of [`Plan::backward`], unrolled: which gradients are written, added or cleared does not depend on
/// the values.
fn backward_calls(layout: &Layout<'_>, forward: &[Forward]) -> Vec<Backward> {
    let plan = layout.plan;
    let mut calls = Vec::new();
    let mut written = vec![Mode::Write; plan.lengths.len()];
    written[plan.output] = Mode::Add;
    for (operation, record) in plan.steps.iter().enumerate().rev() {
        let Some(gradient) = layout.gradient(record.output) else { continue };
        if written[record.output] == Mode::Write {
            calls.push(Backward::Clear(gradient));
        }
        let needs = record.step.needs();
        for (which, operand) in record.inputs.iter().enumerate() {
            let Operand::Live(id) = operand else { continue };
            let Some(view) = layout.gradient(*id) else { continue };
            let read = |(operand, &view): (&Operand<f32>, &View)| match operand {
                Operand::Live(_) if needs.inputs == Reads::No => View::NOTHING,
                _ => view,
            };
            let output = match needs.output {
                Reads::Yes => forward[operation].output,
                Reads::No => View::NOTHING,
            };
            calls.push(Backward::Step {
                operation,
                which,
                inputs: record.inputs.iter().zip(&forward[operation].inputs).map(read).collect(),
                output,
                gradient,
                target: Target { view, add: written[*id] == Mode::Add },
            });
            written[*id] = Mode::Add;
        }
    }
    if let (Some(view), Mode::Write) = (layout.gradient(plan.input), written[plan.input]) {
        calls.push(Backward::Clear(view));
    }
    calls
}

#[cfg(test)]
#[path = "device_node_tests.rs"]
mod node_tests;
#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
