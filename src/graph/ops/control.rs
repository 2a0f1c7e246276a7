//! Control flow with conditions known at compile time: `If` takes its branch, `Loop` and `Scan` are
//! unrolled. What the image decides at run time is refused.

use std::sync::Arc;

use super::rearrange::{Source, rearrange};
use super::{Rule, axis_index};
use crate::error::{Error, Result};
use crate::graph::ir::{Attribute, ConstantTensor, DataType, Graph, Node};
use crate::graph::plan::{Lower, Value};
use crate::tensor::kernels::Element;

/// Iterations a loop may be unrolled to: a file of some bytes must not ask for hours.
const ITERATIONS: usize = 10_000;

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    Some(match op {
        "If" => branch,
        "Loop" => unroll,
        "Scan" => scan,
        _ => return None,
    })
}

fn graph_of<'g>(node: &'g Node, name: &str) -> Result<&'g Graph> {
    match node.attributes.get(name) {
        Some(Attribute::Graph(graph)) => Ok(graph),
        _ => Err(Error::input(format!("needs a sub-graph `{name}`"))),
    }
}

/// The truth of a constant scalar.
fn truth(value: &Value, what: &str) -> Result<bool> {
    match value {
        Value::Constant(tensor) => Ok(tensor.to_f64().first().is_some_and(|&v| v != 0.0)),
        Value::Live { .. } => Err(Error::unsupported(format!("its {what} depends on the image"))),
    }
}

fn branch<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let condition = truth(&lower.input(node, 0)?, "condition")?;
    let graph = graph_of(node, if condition { "then_branch" } else { "else_branch" })?;
    let outputs = lower.inline(graph, Vec::new())?;
    for (index, value) in outputs.into_iter().enumerate() {
        lower.set_output(node, index, value);
    }
    Ok(())
}

fn scalar(dtype: DataType, value: i64) -> Value {
    Value::Constant(Arc::new(ConstantTensor { dtype, ..ConstantTensor::i64([], vec![value]) }))
}

/// `parts`, all of one shape, side by side along a new axis.
fn stack<T: Element>(lower: &mut Lower<'_, T>, parts: &[Value], axis: i64) -> Result<Value> {
    let first = parts.first().ok_or_else(|| {
        Error::unsupported("a loop without an iteration has no shape for what it collects")
    })?;
    if parts.iter().any(|part| part.shape() != first.shape()) {
        return Err(Error::unsupported("collects values of different shapes"));
    }
    let axis = axis_index(axis, first.rank() + 1)?;
    let mut shape = first.shape().to_vec();
    shape.insert(axis, parts.len());
    let inner: usize = shape[axis + 1..].iter().product();
    let count = parts.len();
    let map = (0..first.len() * count).map(|i| Source::Element {
        input: i / inner.max(1) % count,
        at: i / (inner.max(1) * count) * inner + i % inner.max(1),
    });
    rearrange(lower, parts, shape, 0.0, map)
}

fn unroll<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let body = graph_of(node, "body")?;
    let limit = match lower.optional(node, 0)? {
        None => None,
        Some(Value::Constant(limit)) => limit.to_f64().first().map(|&v| v.max(0.0) as usize),
        Some(Value::Live { .. }) => {
            return Err(Error::unsupported("its trip count depends on the image"));
        }
    };
    let mut going = match lower.optional(node, 1)? {
        None => true,
        Some(condition) => truth(&condition, "condition")?,
    };
    let mut carried: Vec<Value> =
        (2..node.inputs.len()).map(|index| lower.input(node, index)).collect::<Result<_>>()?;
    let collected_count = body.outputs.len().saturating_sub(1 + carried.len());
    let mut collected: Vec<Vec<Value>> = vec![Vec::new(); collected_count];
    let mut iteration = 0;
    while going && limit.is_none_or(|limit| iteration < limit) {
        if iteration == ITERATIONS {
            return Err(Error::unsupported(format!("loops more than `{ITERATIONS}` times")));
        }
        let mut inputs = vec![scalar(DataType::Int64, iteration as i64), scalar(DataType::Bool, 1)];
        inputs.extend(carried);
        let mut outputs = lower.inline(body, inputs)?.into_iter();
        let condition = outputs.next().ok_or_else(|| Error::input("its body has no output"))?;
        going = truth(&condition, "condition")?;
        carried = outputs.by_ref().take(node.inputs.len() - 2).collect();
        for (list, value) in collected.iter_mut().zip(outputs) {
            list.push(value);
        }
        iteration += 1;
    }
    let kept = carried.len();
    for (index, value) in carried.into_iter().enumerate() {
        lower.set_output(node, index, value);
    }
    for (index, list) in collected.iter().enumerate() {
        let wanted = node.outputs.get(kept + index).is_some_and(|name| !name.is_empty());
        if wanted {
            let value = stack(lower, list, 0)?;
            lower.set_output(node, kept + index, value);
        }
    }
    Ok(())
}

/// Element `at` of `x` along `axis`, without that axis.
fn element<T: Element>(
    lower: &mut Lower<'_, T>,
    x: &Value,
    axis: usize,
    at: usize,
) -> Result<Value> {
    let mut shape = x.shape().to_vec();
    let size = shape.remove(axis);
    let inner: usize = shape[axis..].iter().product();
    let outer: usize = shape[..axis].iter().product();
    let map = (0..outer).flat_map(move |row| {
        (0..inner).map(move |i| Source::Element { input: 0, at: (row * size + at) * inner + i })
    });
    rearrange(lower, std::slice::from_ref(x), shape, 0.0, map)
}

fn scan<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    if lower.opset < 9 {
        return Err(Error::unsupported("the form of operator set 8, with a batch axis"));
    }
    let body = graph_of(node, "body")?;
    let count = usize::try_from(node.int("num_scan_inputs", 0)?).unwrap_or(0);
    let states = node.inputs.len().checked_sub(count).filter(|_| count > 0);
    let states = states.ok_or_else(|| Error::input("num_scan_inputs does not fit its inputs"))?;
    let list = |name: &str, index: usize| -> Result<i64> {
        Ok(node.ints(name)?.and_then(|values| values.get(index)).copied().unwrap_or(0))
    };
    let mut carried: Vec<Value> =
        (0..states).map(|index| lower.input(node, index)).collect::<Result<_>>()?;
    let mut sequences = Vec::new();
    for index in 0..count {
        let x = lower.input(node, states + index)?;
        let axis = axis_index(list("scan_input_axes", index)?, x.rank())?;
        sequences.push((x, axis, list("scan_input_directions", index)? != 0));
    }
    let length = sequences.first().map_or(0, |(x, axis, _)| x.shape()[*axis]);
    if length > ITERATIONS || sequences.iter().any(|(x, axis, _)| x.shape()[*axis] != length) {
        return Err(Error::unsupported(format!("scans sequences of `{length}` elements")));
    }
    let mut collected: Vec<Vec<Value>> =
        vec![Vec::new(); body.outputs.len().saturating_sub(states)];
    for step in 0..length {
        let mut inputs = carried;
        for (x, axis, backwards) in &sequences {
            let at = if *backwards { length - 1 - step } else { step };
            inputs.push(element(lower, x, *axis, at)?);
        }
        let mut outputs = lower.inline(body, inputs)?.into_iter();
        carried = outputs.by_ref().take(states).collect();
        for (list, value) in collected.iter_mut().zip(outputs) {
            list.push(value);
        }
    }
    for (index, value) in carried.into_iter().enumerate() {
        lower.set_output(node, index, value);
    }
    for (index, parts) in collected.iter_mut().enumerate() {
        if list("scan_output_directions", index)? != 0 {
            parts.reverse();
        }
        let value = stack(lower, parts, list("scan_output_axes", index)?)?;
        lower.set_output(node, states + index, value);
    }
    Ok(())
}
