//! Which constants of a graph are weights, and the rewriting that frees those of layer normalisation.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::graph::ir::{ConstantTensor, Graph, Node};
use crate::graph::ops::outer_names;
use crate::graph::plan::needed_nodes;

/// Operators that only move what they read, so that a weight behind one is still a weight.
const MOVERS: [&str; 7] =
    ["Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Expand"];

/// Inputs of an operator that may be free weights.
fn weight_inputs(node: &Node) -> &'static [usize] {
    if !matches!(node.domain.as_str(), "" | "ai.onnx") {
        return &[];
    }
    match node.op_type.as_str() {
        "Conv" | "BatchNormalization" | "LayerNormalization" => &[1, 2],
        "Gemm" => &[0, 1, 2],
        "MatMul" | "Add" | "Sub" | "Mul" | "Div" => &[0, 1],
        _ => &[],
    }
}

/// Names of the constants of `graph` that are weights of what `output` needs: floating, of more than
/// one element, and read only where a weight may be free (convolutions over two axes, products,
/// normalisation, sums and factors), in the order in which they are first read.
pub fn free_constants(graph: &Graph, output: &str) -> Vec<String> {
    let needed = needed_nodes(graph, output);
    // A mover's output stands for the constant it moves.
    let mut stands_for: HashMap<&str, &str> = HashMap::new();
    let mut found: Vec<&str> = Vec::new();
    let mut fixed: BTreeSet<&str> = BTreeSet::new();
    let nodes = graph.nodes.iter().enumerate().filter(|(index, _)| needed.contains(index));
    for (_, node) in nodes {
        let is_mover = MOVERS.contains(&node.op_type.as_str()) && node.domain.is_empty();
        for (at, input) in node.inputs.iter().enumerate() {
            let root = stands_for.get(input.as_str()).copied().unwrap_or(input);
            let Some(tensor) = graph.constants.get(root) else { continue };
            let free = tensor.dtype.is_float() && tensor.data.len() > 1;
            if is_mover && at == 0 && free {
                if let Some(output) = node.outputs.first() {
                    stands_for.insert(output, root);
                }
            } else if free && weight_inputs(node).contains(&at) && fits(graph, node) {
                if !found.contains(&root) {
                    found.push(root);
                }
            } else {
                fixed.insert(root);
            }
        }
        for name in outer_names(node) {
            fixed.insert(stands_for.get(name).copied().unwrap_or(name));
        }
    }
    found.into_iter().filter(|name| !fixed.contains(name)).map(str::to_owned).collect()
}

/// Only convolutions over two axes have free weights.
fn fits(graph: &Graph, node: &Node) -> bool {
    let weight = node.inputs.get(1).and_then(|name| graph.constants.get(name));
    node.op_type != "Conv" || weight.is_some_and(|tensor| tensor.shape.len() == 4)
}

/// The same graph with the scale and shift of layer normalisation as a product and a sum after it.
pub(super) fn with_free_affine(graph: &Graph, parameters: &[String]) -> Graph {
    let mut nodes = Vec::with_capacity(graph.nodes.len());
    let mut constants = graph.constants.clone();
    for node in &graph.nodes {
        let free = |at: usize| node.inputs.get(at).is_some_and(|name| parameters.contains(name));
        if node.op_type != "LayerNormalization" || !(free(1) || free(2)) {
            nodes.push(node.clone());
            continue;
        }
        let mut plain = node.clone();
        let plain_output = format!("{}/standardized", node.outputs[0]);
        plain.outputs[0].clone_from(&plain_output);
        let mut last = plain_output;
        let affine: Vec<(usize, &str)> = [(1, "Mul"), (2, "Add")]
            .into_iter()
            .filter(|&(at, _)| node.inputs.get(at).is_some_and(|name| !name.is_empty()))
            .collect();
        plain.inputs.truncate(2);
        if let Some(scale) = graph.constants.get(&node.inputs[1]) {
            let ones = ConstantTensor::f32(scale.shape.clone(), vec![1.0; scale.data.len()]);
            let name = format!("{}/ones", node.outputs[0]);
            constants.insert(name.clone(), Arc::new(ones));
            plain.inputs[1] = name;
        }
        nodes.push(plain);
        for (number, &(at, op)) in affine.iter().enumerate() {
            let output = if number + 1 == affine.len() {
                node.outputs[0].clone()
            } else {
                format!("{}/scaled", node.outputs[0])
            };
            let name = format!("{}/{op}", node.name);
            nodes.push(Node::new(op, &name, &[&last, &node.inputs[at]], &[&output]));
            last = output;
        }
    }
    Graph { nodes, constants, ..graph.clone() }
}
