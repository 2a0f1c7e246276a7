//! Compiling a graph to a [`Plan`] for one input shape.

use std::collections::HashSet;

use super::Plan;
use super::lower::{Lower, StepRecord, Value};
use super::schedule::Schedule;
use super::step::{Differentiable, Operand};
use crate::error::{Error, Result, ResultExt};
use crate::graph::ir::{DataType, Graph, Node};
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
}

impl<T: Element> Plan<T> {
    /// Compiles `graph`: only what `options.output` needs.
    ///
    /// # Errors
    /// When an operator is missing or misused (naming the node), a shape does not fit, or a value
    /// that must be constant depends on the images.
    pub fn compile(graph: &Graph, options: &CompileOptions) -> Result<Self> {
        let mut lower = Lower::<T>::new(graph);
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
        let (Value::Live { id: input, .. }, Value::Live { id: output, shape: output_shape, .. }) =
            (input, output)
        else {
            return Err(Error::input(format!(
                "value `{}` does not depend on input `{}`",
                options.output, options.input
            )));
        };
        if input == output {
            return Err(Error::input(format!("value `{}` is the input itself", options.output)));
        }
        let Lower { mut steps, mut lengths, .. } = lower;
        ops::fuse(&mut steps, &mut lengths, output);
        check_differentiable(&steps, lengths.len(), input)?;
        let schedule = Schedule::new(&steps, &lengths, input, output);
        let taps = (0..steps.len()).filter(|&i| steps[i].tap.is_some()).collect();
        let input_shape = options.input_shape.clone();
        Ok(Self { steps, lengths, schedule, input, input_shape, output, output_shape, taps })
    }
}

/// Indices of the nodes that `output` depends on.
fn needed_nodes(graph: &Graph, output: &str) -> HashSet<usize> {
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

/// Lowers one node into `lower`.
pub(crate) fn lower_node<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let rule = ops::lookup::<T>(node).ok_or_else(|| {
        Error::unsupported(format!("operator `{}` is not supported", ops::qualified_name(node)))
            .hint("set `access: black-box` in the model's sidecar to query it through ONNX Runtime")
    })?;
    rule(lower, node)
}

/// Refuses a plan in which the images reach the output only, or partly, through a step that has no
/// gradient: the result would be silently wrong.
fn check_differentiable<T: Element>(
    steps: &[StepRecord<T>],
    values: usize,
    input: usize,
) -> Result<()> {
    let mut depends = vec![false; values];
    depends[input] = true;
    for record in steps {
        for (which, operand) in record.inputs.iter().enumerate() {
            if !matches!(operand, Operand::Live(id) if depends[*id]) {
                continue;
            }
            depends[record.output] = true;
            if record.step.differentiable(which) == Differentiable::No {
                return Err(Error::unsupported("no gradient flows through this operator")
                    .context(format!("node `{}` ({})", record.name, record.op_type))
                    .hint("set `access: black-box` in the model's sidecar"));
            }
        }
    }
    Ok(())
}
