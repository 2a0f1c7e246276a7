//! Compiling a graph to a [`Plan`] for one input shape.

use std::collections::HashSet;
use std::sync::Arc;

use super::Plan;
use super::lower::{Lower, Rounding, StepRecord, Taps, Value};
use super::schedule::Schedule;
use super::step::{Differentiable, Operand};
use crate::error::{Error, Result, ResultExt};
use crate::graph::ir::{ConstantTensor, DataType, Graph, Node, Port};
use crate::graph::ops;
use crate::tensor::kernels::Element;

/// What to compile a graph for.
#[derive(Debug, Clone)]
pub struct CompileOptions {
    /// Name of the input that is fed; other inputs must be constants.
    pub input: String,
    /// Its shape, batch included.
    pub input_shape: Vec<usize>,
    /// Name of the value to compute (usually the logits); any value of the graph will do.
    pub output: String,
    /// Whether the plan must have a gradient.
    pub gradient: Gradient,
    /// Where statistics are seen.
    pub taps: Taps,
}

/// Whether a plan that has no gradient is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gradient {
    /// Refused.
    Wanted,
    /// Taken: only its forward will be run.
    Unused,
    /// Refused; and quantisers do not round, so that the straight-through gradient is exact.
    Smooth,
}

/// The outputs of a graph all of whose inputs are constants, computed in `T`.
///
/// # Errors
/// As [`Plan::compile`].
pub fn evaluate<T: Element>(graph: &Graph) -> Result<Vec<Arc<ConstantTensor>>> {
    let mut lower = Lower::<T>::new(graph);
    for node in &graph.nodes {
        lower.enter(node);
        lower_node(&mut lower, node).context(|| node.describe())?;
    }
    let value = |name: &str| match lower.lookup(name) {
        Some(Value::Constant(tensor)) => Ok(Arc::clone(tensor)),
        _ => Err(Error::input(format!("the graph makes no value `{name}`"))),
    };
    graph.outputs.iter().map(|port| value(&port.name)).collect()
}

impl<T: Element> Plan<T> {
    /// Compiles `graph`: only what `options.output` needs.
    ///
    /// # Errors
    /// When an operator is missing or misused (naming the node), a shape does not fit, or a value
    /// that must be constant depends on the images.
    pub fn compile(graph: &Graph, options: &CompileOptions) -> Result<Self> {
        let mut lower = Lower::<T>::new(graph);
        if options.gradient == Gradient::Smooth {
            lower.rounding = Rounding::Smooth;
        }
        lower.taps = options.taps;
        let port =
            graph.inputs.iter().find(|port| port.name == options.input).ok_or_else(|| {
                let names: Vec<&str> = graph.inputs.iter().map(|p| p.name.as_str()).collect();
                Error::input(format!("no graph input `{}` among {names:?}", options.input))
            })?;
        let dtype = if port.dtype.is_float() { port.dtype } else { DataType::Float32 };
        let input = lower.live(options.input_shape.clone(), dtype);
        lower.define(&port.name, input.clone());
        let needed = needed_nodes(graph, &options.output);
        for (index, node) in graph.nodes.iter().enumerate() {
            if needed.contains(&index) {
                lower.enter(node);
                lower_node(&mut lower, node).context(|| node.describe())?;
            }
        }
        let output = lower.lookup(&options.output).cloned().ok_or_else(|| {
            Error::input(format!("the graph makes no value `{}`", options.output))
        })?;
        // A network that only reshapes still has a step: input and output are separate buffers.
        let output = match (&input, &output) {
            (Value::Live { id: a, .. }, Value::Live { id: b, .. }) if a == b => {
                ops::copy(&mut lower, &output)
            }
            _ => output,
        };
        let (Value::Live { id: input, .. }, Value::Live { id: output, shape: output_shape, .. }) =
            (input, output)
        else {
            return Err(Error::input(format!(
                "value `{}` does not depend on input `{}`",
                options.output, options.input
            )));
        };
        let Lower { mut steps, mut lengths, .. } = lower;
        ops::fuse(&mut steps, &mut lengths, output);
        if options.gradient != Gradient::Unused {
            check_differentiable(&steps, lengths.len(), [input, output])?;
        }
        let schedule = Schedule::new(&steps, &lengths, input, output);
        let taps = (0..steps.len()).filter(|&i| steps[i].tap.is_some()).collect();
        let input_shape = options.input_shape.clone();
        Ok(Self { steps, lengths, schedule, input, input_shape, output, output_shape, taps })
    }
}

/// Indices of the nodes that `output` depends on.
pub(in crate::graph) fn needed_nodes(graph: &Graph, output: &str) -> HashSet<usize> {
    let mut wanted: HashSet<&str> = HashSet::from([output]);
    let mut needed = HashSet::new();
    for (index, node) in graph.nodes.iter().enumerate().rev() {
        if node.outputs.iter().any(|name| !name.is_empty() && wanted.contains(name.as_str())) {
            needed.insert(index);
            wanted.extend(node.inputs.iter().map(String::as_str));
            wanted.extend(ops::outer_names(node));
        }
    }
    needed
}

impl Graph {
    /// The part that `output` depends on: its nodes and constants, with the same inputs and `output` as
    /// the only output, of a shape that is not declared.
    #[must_use]
    pub fn restricted_to(&self, output: &str) -> Self {
        let needed = needed_nodes(self, output);
        let nodes: Vec<Node> = self
            .nodes
            .iter()
            .enumerate()
            .filter(|(index, _)| needed.contains(index))
            .map(|(_, node)| node.clone())
            .collect();
        let read: HashSet<&str> = nodes
            .iter()
            .flat_map(|node| node.inputs.iter().map(String::as_str).chain(ops::outer_names(node)))
            .chain([output])
            .collect();
        let kept = self.constants.iter().filter(|(name, _)| read.contains(name.as_str()));
        let constants = kept.map(|(name, value)| (name.clone(), Arc::clone(value))).collect();
        let port = Port { name: output.into(), dtype: DataType::Float32, shape: None };
        Self {
            name: self.name.clone(),
            opset: self.opset,
            inputs: self.inputs.clone(),
            outputs: vec![port],
            nodes,
            constants,
        }
    }
}

/// Lowers one node into `lower`.
pub(crate) fn lower_node<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let rule = ops::lookup::<T>(node).ok_or_else(|| {
        Error::unsupported(format!("operator `{}` is not supported", ops::qualified_name(node)))
            .hint("set `access: black-box` in the model's sidecar to query it through ONNX Runtime")
    })?;
    rule(lower, node)
}

/// How a value depends on the images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::graph) enum Flow {
    /// Not at all.
    Nothing,
    /// Through choices alone (a mask, an index).
    Choice,
    /// With a gradient.
    Smooth,
    /// Partly through the step of this number, which has none: what is made of it is silently wrong.
    Broken(usize),
}

impl Flow {
    /// How the result of step `index` depends on the images through an operand of this flow.
    pub(in crate::graph) fn through(self, differentiable: Differentiable, index: usize) -> Self {
        match (differentiable, self) {
            (_, Self::Nothing) => Self::Nothing,
            (Differentiable::Yes, flow) => flow,
            (Differentiable::Choice, _) | (Differentiable::No, Self::Choice) => Self::Choice,
            (Differentiable::No, _) => Self::Broken(index),
        }
    }
}

/// Refuses a plan in which the images reach the output only, or partly, through a step that has no
/// gradient. A value that only chooses (a mask) may depend on the images in any way.
fn check_differentiable<T: Element>(
    steps: &[StepRecord<T>],
    values: usize,
    [input, output]: [usize; 2],
) -> Result<()> {
    let mut flows = vec![Flow::Nothing; values];
    flows[input] = Flow::Smooth;
    for (index, record) in steps.iter().enumerate() {
        for (which, operand) in record.inputs.iter().enumerate() {
            let Operand::Live(id) = operand else { continue };
            let flow = flows[*id].through(record.step.differentiable(which), index);
            flows[record.output] = flows[record.output].max(flow);
        }
    }
    let refuse = |text: &str| {
        Error::unsupported(text.to_owned()).hint("set `access: black-box` in the model's sidecar")
    };
    match flows[output] {
        Flow::Smooth => Ok(()),
        Flow::Broken(step) => {
            let StepRecord { name, op_type, .. } = &steps[step];
            Err(refuse("no gradient flows through this operator")
                .context(format!("node `{name}` ({op_type})")))
        }
        Flow::Choice | Flow::Nothing => {
            Err(refuse("the output depends on the image through comparisons and indices alone"))
        }
    }
}
