//! Names and order of one graph: every value defined once and before it is read.
//!
//! ONNX asks for topological order, but tools that edit graphs append nodes at the end; the order is
//! made here. It is stable: a sorted file keeps its order.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};
use std::sync::Arc;

use super::ports::Declared;
use crate::error::{Error, Result};
use crate::graph::{ConstantTensor, Node};

/// Values that a graph reads but does not define, each with the node that reads it.
pub(super) type Captures = BTreeMap<String, String>;

/// A node with what its sub-graphs read from outside of them.
pub(super) struct Built {
    pub(super) node: Node,
    pub(super) captures: Captures,
}

/// Sorts nodes so that each stands after the nodes it reads.
///
/// Returns the nodes and the values the graph takes from outside.
///
/// # Errors
/// When a value is defined twice or the nodes form a cycle.
pub(super) fn sort(
    built: Vec<Built>,
    inputs: &[Declared],
    constants: &BTreeMap<String, Arc<ConstantTensor>>,
) -> Result<(Vec<Node>, Captures)> {
    let mut producers: HashMap<&str, usize> = HashMap::new();
    let mut given: HashSet<&str> = constants.keys().map(String::as_str).collect();
    for input in inputs {
        if !given.insert(&input.name) {
            return Err(twice(&input.name));
        }
    }
    for (position, Built { node, .. }) in built.iter().enumerate() {
        for output in node.outputs.iter().filter(|output| !output.is_empty()) {
            if given.contains(output.as_str()) || producers.insert(output, position).is_some() {
                return Err(twice(output).context(node.describe()));
            }
        }
    }
    let mut captures = Captures::new();
    let mut readers: Vec<Vec<usize>> = vec![Vec::new(); built.len()];
    let mut waits: Vec<usize> = vec![0; built.len()];
    for (position, Built { node, captures: inner }) in built.iter().enumerate() {
        let direct = node.inputs.iter().filter(|name| !name.is_empty()).map(|name| (name, None));
        for (name, reader) in direct.chain(inner.iter().map(|(name, reader)| (name, Some(reader))))
        {
            if let Some(&producer) = producers.get(name.as_str()) {
                readers[producer].push(position);
                waits[position] += 1;
            } else if !given.contains(name.as_str()) {
                captures
                    .entry(name.clone())
                    .or_insert_with(|| reader.cloned().unwrap_or_else(|| node.describe()));
            }
        }
    }
    let mut ready: BinaryHeap<Reverse<usize>> = waits
        .iter()
        .enumerate()
        .filter(|(_, waits)| **waits == 0)
        .map(|(at, _)| Reverse(at))
        .collect();
    let mut order = Vec::with_capacity(built.len());
    while let Some(Reverse(position)) = ready.pop() {
        order.push(position);
        for &reader in &readers[position] {
            waits[reader] -= 1;
            if waits[reader] == 0 {
                ready.push(Reverse(reader));
            }
        }
    }
    if order.len() < built.len() {
        return Err(cycle(&built, &producers, &waits));
    }
    let mut nodes: Vec<Option<Node>> = built.into_iter().map(|built| Some(built.node)).collect();
    Ok((order.into_iter().filter_map(|position| nodes[position].take()).collect(), captures))
}

/// The error for a name that is given to two values.
pub(super) fn twice(name: &str) -> Error {
    Error::input(format!("value defined more than once: `{name}`"))
        .hint("names of values must be unique; export the model again")
}

/// Names one cycle: from a node that waits for ever, back along inputs that wait too.
fn cycle(built: &[Built], producers: &HashMap<&str, usize>, waits: &[usize]) -> Error {
    let mut path = Vec::new();
    let mut at = waits.iter().position(|&waits| waits > 0).unwrap_or_default();
    while !path.contains(&at) {
        path.push(at);
        let Built { node, captures } = &built[at];
        let blocked = node.inputs.iter().chain(captures.keys()).find_map(|name| {
            producers.get(name.as_str()).copied().filter(|&producer| waits[producer] > 0)
        });
        match blocked {
            Some(producer) => at = producer,
            None => break,
        }
    }
    let start = path.iter().position(|&position| position == at).unwrap_or_default();
    let mut names: Vec<&str> = path[start..]
        .iter()
        .rev()
        .take(6)
        .map(|&position| built[position].node.name.as_str())
        .collect();
    names.extend(names.first().copied());
    Error::input(format!("nodes form a cycle: `{}`", names.join("` -> `")))
        .hint("a graph must not feed back into itself; export the model again")
}
