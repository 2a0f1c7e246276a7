//! The model's local functions, and a bound on what inlining them costs.
//!
//! 25 functions that each call the previous one twice make a file of 1.8 kB and a graph of 2^24
//! nodes. So the number of nodes and the nesting after inlining are computed first, function by
//! function, and a recursive or exploding model is refused before a node is copied.

use std::collections::HashMap;

use candle_onnx::onnx::{FunctionProto, GraphProto, NodeProto};
use prost::Message as _;

use super::{MAX_DEPTH, MAX_NODES};
use crate::error::{Error, Result};

/// Most bytes of all function bodies together, each counted as often as it is called.
const MAX_INLINED_BYTES: u64 = 1 << 29;

/// The local functions of a model by domain and name.
pub(super) struct Functions {
    list: Vec<FunctionProto>,
    index: HashMap<(String, String), usize>,
}

/// The standard domain has two spellings.
pub(super) fn domain(name: &str) -> &str {
    if name == "ai.onnx" { "" } else { name }
}

/// Nodes and nesting of a function or graph with all calls inlined.
#[derive(Clone, Copy)]
struct Cost {
    nodes: u64,
    bytes: u64,
    depth: u32,
}

/// What a list of nodes holds itself: nodes, sub-graph nesting, and calls with the nesting they
/// stand at.
struct Body {
    nodes: u64,
    bytes: u64,
    depth: u32,
    calls: Vec<(usize, u32)>,
}

impl Functions {
    /// Takes the functions of a model whose standard operator set is `opset`.
    ///
    /// # Errors
    /// When two share a name, or one is written for another standard operator set.
    pub(super) fn new(list: Vec<FunctionProto>, opset: i64) -> Result<Self> {
        let mut index = HashMap::new();
        for (position, function) in list.iter().enumerate() {
            let context = || describe(function);
            let standard = function.opset_import.iter().find(|o| domain(&o.domain).is_empty());
            if let Some(other) = standard.filter(|o| o.version != opset) {
                return Err(Error::unsupported(format!(
                    "function uses operator set {}, the model `{opset}`",
                    other.version
                ))
                .context(context())
                .hint("inline the functions first (`onnx.inliner.inline_local_functions`)"));
            }
            let key = (domain(&function.domain).to_owned(), function.name.clone());
            if index.insert(key, position).is_some() {
                return Err(Error::unsupported("function defined more than once")
                    .context(context())
                    .hint("inline the functions first (`onnx.inliner.inline_local_functions`)"));
            }
        }
        Ok(Self { list, index })
    }

    /// The model has no local functions.
    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The function a node calls, if it is a local one.
    pub(super) fn called(&self, node: &NodeProto) -> Option<&FunctionProto> {
        self.position(node).and_then(|position| self.list.get(position))
    }

    fn position(&self, node: &NodeProto) -> Option<usize> {
        if self.index.is_empty() {
            return None;
        }
        self.index.get(&(domain(&node.domain).to_owned(), node.op_type.clone())).copied()
    }

    /// Refuses a graph that is recursive, too big or too deep once all calls are inlined.
    ///
    /// # Errors
    /// See above.
    pub(super) fn check(&self, graph: &GraphProto) -> Result<()> {
        let bodies: Vec<Body> = self
            .list
            .iter()
            .map(|function| Body {
                bytes: function.encoded_len() as u64,
                ..self.body(&function.node)
            })
            .collect();
        let mut costs: Vec<Option<Cost>> = vec![None; bodies.len()];
        let mut open = vec![false; bodies.len()];
        for start in 0..bodies.len() {
            self.cost_from(start, &bodies, &mut open, &mut costs)?;
        }
        let cost = total(&self.body(&graph.node), &costs);
        if cost.nodes > MAX_NODES {
            return Err(Error::input(format!(
                "the model has more than {MAX_NODES} nodes once its functions are inlined"
            ))
            .hint("it is made to exhaust memory or far beyond an image classifier; leave it out"));
        }
        if cost.bytes > MAX_INLINED_BYTES {
            return Err(Error::input(format!(
                "inlining the functions of the model needs more than {MAX_INLINED_BYTES} bytes"
            ))
            .hint("keep weights out of the function bodies, or leave the model out"));
        }
        if cost.depth > MAX_DEPTH {
            return Err(Error::input(format!(
                "sub-graphs and functions nest deeper than {MAX_DEPTH} levels: `{}`",
                cost.depth
            ))
            .hint("flatten the nested sub-graphs of the model"));
        }
        Ok(())
    }

    /// Costs of `start` and all it calls, children first, on a stack of our own.
    fn cost_from(
        &self,
        start: usize,
        bodies: &[Body],
        open: &mut [bool],
        costs: &mut [Option<Cost>],
    ) -> Result<()> {
        let mut stack = vec![(start, 0)];
        while let Some((position, next)) = stack.pop() {
            if costs[position].is_some() {
                continue;
            }
            open[position] = true;
            let body = &bodies[position];
            match body.calls.get(next) {
                Some(&(callee, _)) => {
                    if open[callee] && costs[callee].is_none() {
                        return Err(Error::input("function calls itself")
                            .context(describe(&self.list[callee]))
                            .hint("ONNX forbids recursion; the file is damaged or hostile"));
                    }
                    stack.push((position, next + 1));
                    stack.push((callee, 0));
                }
                None => costs[position] = Some(total(body, costs)),
            }
        }
        Ok(())
    }

    /// Walks nodes and their sub-graphs without recursion.
    fn body(&self, nodes: &[NodeProto]) -> Body {
        let mut body = Body { nodes: 0, bytes: 0, depth: 1, calls: Vec::new() };
        let mut stack = vec![(nodes, 1_u32)];
        while let Some((nodes, depth)) = stack.pop() {
            body.depth = body.depth.max(depth);
            body.nodes += nodes.len() as u64;
            for node in nodes {
                body.calls.extend(self.position(node).map(|callee| (callee, depth)));
                for attribute in &node.attribute {
                    stack.extend(attribute.g.iter().map(|g| (g.node.as_slice(), depth + 1)));
                }
            }
        }
        body
    }
}

/// Nodes and depth of a body; callees not costed yet count as nothing.
fn total(body: &Body, costs: &[Option<Cost>]) -> Cost {
    let mut cost = Cost { nodes: body.nodes, bytes: body.bytes, depth: body.depth };
    for &(callee, depth) in &body.calls {
        if let Some(inner) = costs.get(callee).copied().flatten() {
            cost.nodes = cost.nodes.saturating_add(inner.nodes);
            cost.bytes = cost.bytes.saturating_add(inner.bytes);
            cost.depth = cost.depth.max(depth.saturating_add(inner.depth));
        }
    }
    cost
}

/// "function `pkg.Name`", for messages.
pub(super) fn describe(function: &FunctionProto) -> String {
    format!("function `{}.{}`", function.domain, function.name)
}
