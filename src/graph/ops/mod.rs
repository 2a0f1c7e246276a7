//! What the ONNX operators mean: one file a family, one lowering rule an operator.
//!
//! A rule reads its node's inputs and attributes for the graph's operator-set version and emits
//! steps; constants fold by themselves (see [`super::plan::Lower`]). To add an operator, add a line to
//! its family's `rule`.

mod arithmetic;
mod arrange;
mod attention;
mod binary;
mod channel;
mod contrib;
mod control;
mod conv;
mod conv_transpose;
mod deform;
mod einsum;
mod elementwise;
mod function;
mod fusion;
mod gather;
mod local_response;
mod matmul;
mod normalize;
mod order;
mod pool;
mod quantize;
mod quantized;
mod quantized_contrib;
mod rearrange;
mod reduce;
mod region;
mod resize;
mod sample;
mod scatter;
mod select;
mod shape;
mod softmax;
mod transpose;
mod window;

use std::collections::BTreeSet;

use super::ir::{Attribute, Graph, Node};
use super::plan::Lower;
use crate::error::{Error, Result};
use crate::tensor::kernels::Element;

pub(in crate::graph) use conv::conv_geometry;
pub(crate) use elementwise::copy;
pub(crate) use fusion::fuse;
pub(in crate::graph) use pool::block_side;

/// A lowering rule.
pub(crate) type Rule<T> = for<'g> fn(&mut Lower<'g, T>, &'g Node) -> Result<()>;

/// The rule of a node's operator, if this engine has it.
pub(crate) fn lookup<T: Element>(node: &Node) -> Option<Rule<T>> {
    let op = node.op_type.as_str();
    match node.domain.as_str() {
        "" | "ai.onnx" => standard(op),
        "com.microsoft" => quantize::microsoft_rule(op)
            .or_else(|| quantized::microsoft_rule(op))
            .or_else(|| quantized_contrib::microsoft_rule(op))
            .or_else(|| contrib::microsoft_rule(op)),
        _ => None,
    }
}

fn standard<T: Element>(op: &str) -> Option<Rule<T>> {
    shape::rule(op)
        .or_else(|| arrange::rule(op))
        .or_else(|| transpose::rule(op))
        .or_else(|| select::rule(op))
        .or_else(|| gather::rule(op))
        .or_else(|| scatter::rule(op))
        .or_else(|| conv::rule(op))
        .or_else(|| conv_transpose::rule(op))
        .or_else(|| pool::rule(op))
        .or_else(|| normalize::rule(op))
        .or_else(|| local_response::rule(op))
        .or_else(|| elementwise::rule(op))
        .or_else(|| binary::rule(op))
        .or_else(|| reduce::rule(op))
        .or_else(|| matmul::rule(op))
        .or_else(|| softmax::rule(op))
        .or_else(|| order::rule(op))
        .or_else(|| einsum::rule(op))
        .or_else(|| attention::rule(op))
        .or_else(|| control::rule(op))
        .or_else(|| resize::rule(op))
        .or_else(|| sample::rule(op))
        .or_else(|| region::rule(op))
        .or_else(|| deform::rule(op))
        .or_else(|| quantize::rule(op))
        .or_else(|| quantized::rule(op))
        .or_else(|| contrib::rule(op))
}

/// "Conv", or "com.microsoft.FusedConv" outside the standard domain.
pub(crate) fn qualified_name(node: &Node) -> String {
    if node.domain.is_empty() {
        node.op_type.clone()
    } else {
        format!("{}.{}", node.domain, node.op_type)
    }
}

/// The sub-graphs of a node.
fn inner_graphs(node: &Node) -> impl Iterator<Item = &Graph> {
    node.attributes.values().filter_map(|attribute| match attribute {
        Attribute::Graph(graph) => Some(graph.as_ref()),
        _ => None,
    })
}

/// Operators of `graph` (sub-graphs included) that this engine lacks, sorted, each once.
pub fn unsupported_ops(graph: &Graph) -> Vec<String> {
    let mut missing = BTreeSet::new();
    let mut pending = vec![graph];
    while let Some(graph) = pending.pop() {
        for node in &graph.nodes {
            if lookup::<f32>(node).is_none() {
                missing.insert(qualified_name(node));
            }
            pending.extend(inner_graphs(node));
        }
    }
    missing.into_iter().collect()
}

/// Names a node's sub-graphs may read from outside.
pub(crate) fn outer_names(node: &Node) -> Vec<&str> {
    let mut names = Vec::new();
    let mut pending: Vec<&Graph> = inner_graphs(node).collect();
    while let Some(graph) = pending.pop() {
        names.extend(graph.outputs.iter().map(|port| port.name.as_str()));
        for node in &graph.nodes {
            names.extend(node.inputs.iter().map(String::as_str));
            pending.extend(inner_graphs(node));
        }
    }
    names
}

/// An axis in `-rank..rank` as an index.
///
/// # Errors
/// When it is outside that range.
pub(crate) fn axis_index(axis: i64, rank: usize) -> Result<usize> {
    let index = if axis < 0 { axis + rank as i64 } else { axis };
    usize::try_from(index)
        .ok()
        .filter(|&i| i < rank.max(1))
        .ok_or_else(|| Error::input(format!("axis `{axis}` is outside a tensor of rank {rank}")))
}

/// Row-major strides of `shape`.
pub(crate) fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for axis in (0..shape.len().saturating_sub(1)).rev() {
        strides[axis] = strides[axis + 1] * shape[axis + 1];
    }
    strides
}

/// The shape two operands broadcast to (NumPy's rule).
///
/// # Errors
/// When two dimensions differ and neither is 1.
pub(crate) fn broadcast_shape(a: &[usize], b: &[usize]) -> Result<Vec<usize>> {
    let rank = a.len().max(b.len());
    let dim = |shape: &[usize], axis: usize| {
        (axis + shape.len()).checked_sub(rank).map_or(1, |i| shape[i])
    };
    (0..rank)
        .map(|axis| match (dim(a, axis), dim(b, axis)) {
            (x, y) if x == y => Ok(x),
            (1, y) => Ok(y),
            (x, 1) => Ok(x),
            _ => Err(Error::input(format!("shapes {a:?} and `{b:?}` do not broadcast"))),
        })
        .collect()
}
