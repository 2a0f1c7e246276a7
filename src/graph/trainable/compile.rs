//! From a graph to instructions.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Trainable;
use super::instruction::{Instruction, Native, Source, Then};
use super::native::Compiler;
use super::parameters::with_free_affine;
use crate::error::{Error, Result, ResultExt};
use crate::graph::ir::{DataType, Graph};
use crate::graph::plan::{Flow, Lower, Value, lower_node, needed_nodes};
use crate::tensor::tape::Float;

impl<T: Float> Trainable<T> {
    /// Compiles what `output` of `graph` needs, for `input` of shape `input_shape` (batch included), the
    /// constants named `parameters` being free.
    ///
    /// # Errors
    /// When a name is unknown, an operator is missing or misused (naming the node), or the output
    /// depends on a parameter or the input through an operator without a gradient.
    pub fn compile(
        graph: &Graph,
        input: &str,
        input_shape: &[usize],
        output: &str,
        parameters: &[String],
    ) -> Result<Self> {
        let graph = with_free_affine(graph, parameters);
        let mut lower = Lower::<T>::new(&graph);
        let port = graph
            .inputs
            .iter()
            .find(|port| port.name == input)
            .ok_or_else(|| Error::input(format!("no graph input `{input}`")))?;
        let x = lower.live(input_shape.to_vec(), DataType::Float32);
        let input_id = live_id(&x)?;
        lower.define(&port.name, x);
        let mut free = Vec::with_capacity(parameters.len());
        for name in parameters {
            let (name, tensor) = graph
                .constants
                .get_key_value(name)
                .ok_or_else(|| Error::input(format!("no constant `{name}` in the graph")))?;
            let value = lower.live(tensor.shape.clone(), tensor.dtype);
            free.push((live_id(&value)?, tensor.shape.clone()));
            lower.define(name, value);
        }
        let needed = needed_nodes(&graph, output);
        let mut compiler = Compiler { lower, program: Vec::new(), norms: Vec::new() };
        for (index, node) in graph.nodes.iter().enumerate() {
            if !needed.contains(&index) {
                continue;
            }
            compiler.lower.enter(node);
            let native = compiler.native(node).context(|| node.describe())?;
            if !native {
                lower_node(&mut compiler.lower, node).context(|| node.describe())?;
            }
            compiler.take_steps(node);
        }
        let Compiler { lower, mut program, norms } = compiler;
        let made = lower
            .lookup(output)
            .cloned()
            .ok_or_else(|| Error::input(format!("the graph makes no value `{output}`")))?;
        let output = (live_id(&made)?, made.shape().to_vec());
        let values = lower.count();
        fuse(&mut program, output.0);
        let mut starts = vec![input_id];
        starts.extend(free.iter().map(|(id, _)| *id));
        check_gradient(&program, values, &starts, output.0)?;
        let last_read = last_reads(&program, output.0);
        let input = (input_id, input_shape.to_vec());
        Ok(Self { program, parameters: free, input, output, norms, values, last_read })
    }
}

fn live_id(value: &Value) -> Result<usize> {
    match value {
        Value::Live { id, .. } => Ok(*id),
        Value::Constant(_) => Err(Error::input("the output does not depend on the input")),
    }
}

/// Joins normalisation with the bias of the convolution before it and with a ReLU after it, and that with
/// maxima of 2 x 2 blocks, where nobody else reads what is between.
fn fuse<T: Float>(program: &mut Vec<Instruction<T>>, output: usize) {
    let mut readers: BTreeMap<usize, usize> = BTreeMap::from([(output, 1)]);
    for instruction in program.iter() {
        for (id, _) in instruction.reads() {
            *readers.entry(id).or_default() += 1;
        }
    }
    let mut joined: Vec<Instruction<T>> = Vec::with_capacity(program.len());
    // Where in `joined` each value is made.
    let mut maker: BTreeMap<usize, usize> = BTreeMap::new();
    for mut instruction in program.drain(..) {
        if let Instruction::Native { op: Native::Norm { .. }, inputs, .. } = &mut instruction
            && let Source::Live(id, _) = inputs[0]
            && readers.get(&id) == Some(&1)
            && let Some(&at) = maker.get(&id)
            && let Instruction::Native { op: Native::Conv(_), inputs: operands, .. } =
                &mut joined[at]
            && operands.len() == 3
        {
            inputs.extend(operands.pop());
        }
        if let Instruction::Native { op, inputs, output, .. } = &instruction
            && let [Source::Live(id, _)] = inputs.as_slice()
            && readers.get(id) == Some(&1)
            && let Some(&at) = maker.get(id)
            && let Instruction::Native { op: Native::Norm { then, .. }, output: made, .. } =
                &mut joined[at]
        {
            let next = match (*then, op) {
                (Then::Nothing, Native::Relu) => Some(Then::Relu),
                (Then::Relu, Native::BlockMaxima(2)) => Some(Then::ReluAndHalve),
                _ => None,
            };
            if let Some(next) = next {
                *then = next;
                *made = *output;
                maker.insert(*output, at);
                continue;
            }
        }
        maker.insert(instruction.output(), joined.len());
        joined.push(instruction);
    }
    *program = joined;
}

/// Refuses a network whose output hangs on a weight or the image through an operation without gradient.
fn check_gradient<T: Float>(
    program: &[Instruction<T>],
    values: usize,
    starts: &[usize],
    output: usize,
) -> Result<()> {
    let mut flows = vec![Flow::Nothing; values];
    for &start in starts {
        flows[start] = Flow::Smooth;
    }
    for (index, instruction) in program.iter().enumerate() {
        for (id, differentiable) in instruction.reads() {
            let flow = flows[id].through(differentiable, index);
            let made = &mut flows[instruction.output()];
            *made = (*made).max(flow);
        }
    }
    match flows[output] {
        Flow::Smooth => Ok(()),
        Flow::Broken(index) => Err(Error::unsupported("no gradient flows through this operator")
            .context(program[index].name().to_owned())),
        Flow::Choice | Flow::Nothing => {
            Err(Error::unsupported("the output does not depend smoothly on the input"))
        }
    }
}

/// After which instruction each value is read no more; the output stays.
fn last_reads<T: Float>(program: &[Instruction<T>], output: usize) -> BTreeMap<usize, Vec<usize>> {
    let mut last: BTreeMap<usize, usize> = BTreeMap::new();
    for (index, instruction) in program.iter().enumerate() {
        for (id, _) in instruction.reads() {
            last.insert(id, index);
        }
    }
    let mut by_instruction: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (id, index) in last {
        if id != output {
            by_instruction.entry(index).or_default().push(id);
        }
    }
    by_instruction
}

impl<T: Float> Compiler<'_, T> {
    /// Steps that the last node's rule emitted, as instructions.
    fn take_steps(&mut self, node: &crate::graph::Node) {
        for record in self.lower.take_steps() {
            let length = self.lower.length(record.output);
            self.program.push(Instruction::Step {
                step: Arc::from(record.step),
                name: node.describe(),
                inputs: record.inputs,
                output: record.output,
                length,
            });
        }
    }
}
