//! Protobuf graphs to [`Graph`]: nodes, attributes, constants, inlined local functions.
//!
//! Recursion goes over sub-graphs and function calls only, and [`Functions::check`] has bounded both
//! before this module runs.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use candle_onnx::onnx::{FunctionProto, GraphProto, NodeProto, TensorProto};

use super::functions::{Functions, describe, domain};
use super::order::{Built, Captures, sort, twice};
use super::ports;
use super::tensor::{Decoded, TensorReader};
use crate::error::{Error, Result, ResultExt as _};
use crate::graph::{Attribute, ConstantTensor, DataType, Graph, Node};

/// Builds the graphs of one model.
pub(super) struct Builder<'a> {
    pub(super) functions: &'a Functions,
    pub(super) tensors: TensorReader<'a>,
    pub(super) opset: i64,
    /// All value names of the file, so that names made for inlined values are new.
    pub(super) taken: HashSet<String>,
}

/// How names and attribute references of a function body translate at one call.
pub(super) struct Call {
    prefix: String,
    values: HashMap<String, String>,
    pub(super) attributes: BTreeMap<String, (Attribute, Captures)>,
}

/// A graph under construction.
#[derive(Default)]
pub(super) struct Parts {
    nodes: Vec<Built>,
    pub(super) constants: BTreeMap<String, Arc<ConstantTensor>>,
    /// String tensors: an error only when a node reads one.
    pub(super) texts: BTreeSet<String>,
    names: HashSet<String>,
}

impl Builder<'_> {
    /// The main graph.
    ///
    /// # Errors
    /// Everything a graph can get wrong; see the module documentation of `onnx`.
    pub(super) fn main(&mut self, proto: GraphProto) -> Result<Graph> {
        let (graph, captures) = self.graph(proto, None, None)?;
        if let Some((name, reader)) = captures.first_key_value() {
            return Err(Error::input(format!("nothing makes the value that is read: `{name}`"))
                .context(reader.clone())
                .hint("the graph is incomplete; export the model again"));
        }
        Ok(graph)
    }

    pub(super) fn graph(
        &mut self,
        proto: GraphProto,
        mut call: Option<&mut Call>,
        untyped: Option<DataType>,
    ) -> Result<(Graph, Captures)> {
        if let Some(sparse) = proto.sparse_initializer.first() {
            let name = sparse.values.as_ref().map_or("", |values| values.name.as_str());
            return Err(Error::unsupported("sparse initialiser")
                .context(format!("initialiser `{name}`"))
                .hint("store the weights as dense tensors"));
        }
        let mut parts = Parts::default();
        for tensor in proto.initializer {
            let name = self.value(&tensor.name, &mut call);
            let context = || format!("initialiser `{name}`");
            if name.is_empty() {
                return Err(
                    Error::input("initialiser without a name").hint("export the model again")
                );
            }
            self.constant(name.clone(), tensor, &mut parts).context(context)?;
        }
        let mut inputs = Vec::new();
        for info in &proto.input {
            let name = self.value(&info.name, &mut call);
            // Up to IR version 3 initialisers are listed as inputs too.
            if !parts.constants.contains_key(&name) && !parts.texts.contains(&name) {
                inputs.push(ports::read(info, name).context(|| "graph input".into())?);
            }
        }
        let mut known: HashMap<String, DataType> = HashMap::new();
        let mut outputs = Vec::new();
        for info in &proto.output {
            let name = self.value(&info.name, &mut call);
            outputs.push(ports::read(info, name).context(|| "graph output".into())?);
        }
        parts.names = proto.node.iter().map(|node| node.name.clone()).collect();
        self.nodes(proto.node, &mut parts, &mut call)?;
        let (nodes, mut captures) = sort(parts.nodes, &inputs, &parts.constants)?;
        let mut graph = Graph {
            name: proto.name,
            opset: self.opset,
            nodes,
            constants: parts.constants,
            ..Graph::default()
        };
        alias_identities(&mut graph);
        graph.inputs = ports::settle(inputs, &known, &graph, untyped)?;
        known.extend(graph.inputs.iter().map(|port| (port.name.clone(), port.dtype)));
        let defined: HashSet<&str> = (graph.nodes.iter().flat_map(|node| &node.outputs))
            .chain(graph.inputs.iter().map(|port| &port.name))
            .chain(graph.constants.keys())
            .map(String::as_str)
            .collect();
        let mut seen = HashSet::new();
        for output in &outputs {
            if output.name.is_empty() || !defined.contains(output.name.as_str()) {
                captures.entry(output.name.clone()).or_insert_with(|| "graph output".into());
            }
            if !seen.insert(output.name.as_str()) {
                return Err(Error::input(format!("graph output listed twice: `{}`", output.name))
                    .hint("export the model again"));
            }
        }
        if let Some((name, reader)) = captures.iter().find(|(name, _)| parts.texts.contains(*name))
        {
            return Err(Error::unsupported(format!("string tensor used as input: `{name}`"))
                .context(reader.clone())
                .hint("remove the text processing from the model; keep the network only"));
        }
        for value_info in &proto.value_info {
            let name = self.value(&value_info.name, &mut call);
            let missing = outputs.iter().any(|output| output.name == name);
            if let (true, Ok(declared)) = (missing, ports::read(value_info, name)) {
                known.extend(declared.dtype().map(|dtype| (declared.name.clone(), dtype)));
            }
        }
        graph.outputs = ports::settle(outputs, &known, &graph, untyped)?;
        Ok((graph, captures))
    }

    fn constant(&mut self, name: String, tensor: TensorProto, parts: &mut Parts) -> Result<()> {
        if parts.constants.contains_key(&name) || parts.texts.contains(&name) {
            return Err(twice(&name));
        }
        match self.tensors.read(tensor)? {
            Decoded::Numbers(constant) => {
                parts.constants.insert(name, constant);
            }
            Decoded::Text => {
                parts.texts.insert(name);
            }
        }
        Ok(())
    }

    fn nodes(
        &mut self,
        nodes: Vec<NodeProto>,
        parts: &mut Parts,
        call: &mut Option<&mut Call>,
    ) -> Result<()> {
        for (position, mut proto) in nodes.into_iter().enumerate() {
            if proto.name.is_empty() {
                proto.name = unnamed(&proto.op_type, position, &mut parts.names);
            }
            if let Some(call) = call {
                proto.name = format!("{}/{}", call.prefix, proto.name);
            }
            let context = format!("node `{}` ({})", proto.name, proto.op_type);
            self.node(proto, parts, call).context(|| context)?;
        }
        Ok(())
    }

    fn node(
        &mut self,
        proto: NodeProto,
        parts: &mut Parts,
        call: &mut Option<&mut Call>,
    ) -> Result<()> {
        if proto.op_type.is_empty() {
            return Err(Error::input("node without an operator").hint("export the model again"));
        }
        let functions = self.functions;
        if let Some(function) = functions.called(&proto) {
            return self.inline(proto, function, parts, call);
        }
        let inputs = proto.input.iter().map(|name| self.value(name, call)).collect();
        let outputs: Vec<String> = proto.output.iter().map(|name| self.value(name, call)).collect();
        let standard = domain(&proto.domain).is_empty();
        if standard && proto.op_type == "Constant" {
            return self.constant_node(proto.attribute, outputs, parts, call);
        }
        let mut captures = Captures::new();
        let mut attributes = BTreeMap::new();
        for (name, (attribute, inner)) in self.attributes(proto.attribute, call)? {
            attributes.insert(name, attribute);
            captures.extend(inner);
        }
        let node = Node {
            name: proto.name,
            op_type: proto.op_type,
            domain: domain(&proto.domain).into(),
            inputs,
            outputs,
            attributes,
        };
        parts.nodes.push(Built { node, captures });
        Ok(())
    }

    /// Puts the body of a local function in the place of a call.
    fn inline(
        &mut self,
        node: NodeProto,
        function: &FunctionProto,
        parts: &mut Parts,
        outer: &mut Option<&mut Call>,
    ) -> Result<()> {
        let too_many = |what: &str, given: usize, takes: usize| {
            Error::input(format!("{} takes {takes} {what}, found `{given}`", describe(function)))
        };
        if node.input.len() > function.input.len() {
            return Err(too_many("inputs", node.input.len(), function.input.len()));
        }
        if node.output.len() > function.output.len() {
            return Err(too_many("outputs", node.output.len(), function.output.len()));
        }
        let mut call = Call {
            // Cut: it goes in front of every name inside, and names may be of any length.
            prefix: node.name.chars().take(96).collect(),
            values: HashMap::new(),
            attributes: self.attributes(node.attribute, outer)?,
        };
        for default in &function.attribute_proto {
            if !call.attributes.contains_key(&default.name)
                && let Some(value) = self.attribute(default.clone(), outer)?
            {
                call.attributes.insert(default.name.clone(), value);
            }
        }
        for (position, formal) in function.input.iter().enumerate() {
            let actual =
                node.input.get(position).map_or(String::new(), |name| self.value(name, outer));
            if call.values.insert(formal.clone(), actual).is_some() {
                return Err(Error::input(format!("input named twice: `{formal}`"))
                    .context(describe(function)));
            }
        }
        let mut copies = Vec::new();
        for (formal, actual) in function.output.iter().zip(&node.output) {
            let actual = self.value(actual, outer);
            if actual.is_empty() {
                continue;
            }
            match call.values.get(formal) {
                // An input or an earlier output handed out again needs a node of its own.
                Some(source) => copies.push((source.clone(), actual)),
                None => {
                    call.values.insert(formal.clone(), actual);
                }
            }
        }
        // Names of the nodes inside are kept apart from those of the caller.
        let mut names: HashSet<String> = function.node.iter().map(|n| n.name.clone()).collect();
        std::mem::swap(&mut names, &mut parts.names);
        self.nodes(function.node.clone(), parts, &mut Some(&mut call))
            .context(|| describe(function))?;
        std::mem::swap(&mut names, &mut parts.names);
        for (position, (source, target)) in copies.into_iter().enumerate() {
            let name = format!("{}/output_{position}", call.prefix);
            let node = Node::new("Identity", &name, &[&source], &[&target]);
            parts.nodes.push(Built { node, captures: Captures::new() });
        }
        Ok(())
    }

    /// The name of a value here: as written, or inside an inlined function a new one.
    fn value(&mut self, name: &str, call: &mut Option<&mut Call>) -> String {
        let Some(call) = call else { return name.into() };
        if name.is_empty() {
            return String::new();
        }
        if let Some(known) = call.values.get(name) {
            return known.clone();
        }
        let mut fresh = format!("{}/{name}", call.prefix);
        while !self.taken.insert(fresh.clone()) {
            fresh.push('_');
        }
        call.values.insert(name.into(), fresh.clone());
        fresh
    }
}

/// A name for a node that has none, new among `names`.
fn unnamed(op_type: &str, position: usize, names: &mut HashSet<String>) -> String {
    let mut name = format!("{op_type}_{position}");
    while !names.insert(name.clone()) {
        name.push('_');
    }
    name
}

/// Replaces `Identity` of a constant by a second name for it: exporters share equal tensors that
/// way, BatchNorm statistics among them.
fn alias_identities(graph: &mut Graph) {
    let Graph { nodes, constants, .. } = graph;
    nodes.retain(|node| {
        let copies = node.op_type == "Identity" && node.domain.is_empty();
        if let (true, [input], [output]) = (copies, &node.inputs[..], &node.outputs[..])
            && !output.is_empty()
            && let Some(constant) = constants.get(input).cloned()
        {
            constants.insert(output.clone(), constant);
            return false;
        }
        true
    });
}
