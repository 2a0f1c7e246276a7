//! Look-ups over a graph: who makes a value, who reads it, what constant stands behind it.
//!
//! Exporters hide constants behind `Constant`, `Identity` and `Cast` nodes (shared initialisers,
//! half-precision weights); every question about weights goes through [`GraphIndex::constant`],
//! which sees through them.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::graph::{Attribute, ConstantTensor, Graph, Node};

/// Longest chain of pass-through nodes followed; real files have a handful.
const MAX_CHAIN: usize = 256;

/// A graph with its producers and consumers by value name.
pub struct GraphIndex<'a> {
    /// The graph.
    pub graph: &'a Graph,
    producers: BTreeMap<&'a str, &'a Node>,
    consumers: BTreeMap<&'a str, Vec<&'a Node>>,
}

impl<'a> GraphIndex<'a> {
    /// Indexes `graph` in one pass.
    pub fn new(graph: &'a Graph) -> Self {
        let mut producers = BTreeMap::new();
        let mut consumers: BTreeMap<&str, Vec<&Node>> = BTreeMap::new();
        for node in &graph.nodes {
            for output in node.outputs.iter().filter(|name| !name.is_empty()) {
                producers.insert(output.as_str(), node);
            }
            for input in node.inputs.iter().filter(|name| !name.is_empty()) {
                consumers.entry(input).or_default().push(node);
            }
        }
        Self { graph, producers, consumers }
    }

    /// The node that makes `value`.
    pub fn producer(&self, value: &str) -> Option<&'a Node> {
        self.producers.get(value).copied()
    }

    /// The nodes that read `value`, in graph order.
    pub fn consumers(&self, value: &str) -> &[&'a Node] {
        self.consumers.get(value).map_or(&[], Vec::as_slice)
    }

    /// The constant behind `value`, through `Constant`, `Identity` and `Cast` nodes.
    pub fn constant(&self, value: &str) -> Option<Arc<ConstantTensor>> {
        let mut value = value;
        for _ in 0..MAX_CHAIN {
            if let Some(constant) = self.graph.constants.get(value) {
                return Some(Arc::clone(constant));
            }
            let node = self.producer(value)?;
            match node.op_type.as_str() {
                "Identity" | "Cast" => value = node.inputs.first()?,
                "Constant" => return constant_node(node),
                _ => return None,
            }
        }
        None
    }

    /// The constant behind input `position` of `node`.
    pub fn constant_input(&self, node: &Node, position: usize) -> Option<Arc<ConstantTensor>> {
        let name = node.inputs.get(position).filter(|name| !name.is_empty())?;
        self.constant(name)
    }

    /// Every value that `value` is computed from, itself excluded.
    pub fn ancestors(&self, value: &str) -> std::collections::BTreeSet<&'a str> {
        let mut seen = std::collections::BTreeSet::new();
        let mut open: Vec<&'a Node> = self.producer(value).into_iter().collect();
        while let Some(node) = open.pop() {
            for input in node.inputs.iter().filter(|name| !name.is_empty()) {
                if seen.insert(input.as_str()) {
                    open.extend(self.producer(input));
                }
            }
        }
        seen
    }
}

fn constant_node(node: &Node) -> Option<Arc<ConstantTensor>> {
    node.attributes.iter().find_map(|(name, attribute)| match (name.as_str(), attribute) {
        ("value", Attribute::Tensor(tensor)) => Some(Arc::clone(tensor)),
        ("value_float", Attribute::Float(v)) => Some(Arc::new(ConstantTensor::f32([], vec![*v]))),
        ("value_int", Attribute::Int(v)) => Some(Arc::new(ConstantTensor::i64([], vec![*v]))),
        ("value_floats", Attribute::Floats(v)) => {
            Some(Arc::new(ConstantTensor::f32([v.len()], v.clone())))
        }
        ("value_ints", Attribute::Ints(v)) => {
            Some(Arc::new(ConstantTensor::i64([v.len()], v.clone())))
        }
        _ => None,
    })
}
