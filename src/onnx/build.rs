//! Protobuf graphs to [`Graph`]: nodes, attributes, constants, inlined local functions.
//!
//! Recursion goes over sub-graphs and function calls only, and [`Functions::check`] has bounded both
//! before this module runs.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use candle_onnx::onnx::attribute_proto::AttributeType as Type;
use candle_onnx::onnx::tensor_proto::DataType as Element;
use candle_onnx::onnx::{AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto};

use super::functions::{Functions, describe, domain};
use super::order::{Built, Captures, sort};
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
struct Call {
    prefix: String,
    values: HashMap<String, String>,
    attributes: BTreeMap<String, (Attribute, Captures)>,
}

/// A graph under construction.
#[derive(Default)]
struct Parts {
    nodes: Vec<Built>,
    constants: BTreeMap<String, Arc<ConstantTensor>>,
    /// String tensors: an error only when a node reads one.
    texts: BTreeSet<String>,
    names: HashSet<String>,
}

impl Builder<'_> {
    /// The main graph.
    ///
    /// # Errors
    /// Everything a graph can get wrong; see the module documentation of `onnx`.
    pub(super) fn main(&mut self, proto: GraphProto) -> Result<Graph> {
        let (graph, captures) = self.graph(proto, None)?;
        if let Some((name, reader)) = captures.first_key_value() {
            return Err(Error::input(format!("nothing makes the value that is read: `{name}`"))
                .context(reader.clone())
                .hint("the graph is incomplete; export the model again"));
        }
        Ok(graph)
    }

    fn graph(
        &mut self,
        proto: GraphProto,
        mut call: Option<&mut Call>,
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
        graph.inputs = ports::settle(inputs, &known, &graph)?;
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
        graph.outputs = ports::settle(outputs, &known, &graph)?;
        Ok((graph, captures))
    }

    fn constant(&mut self, name: String, tensor: TensorProto, parts: &mut Parts) -> Result<()> {
        if parts.constants.contains_key(&name) || parts.texts.contains(&name) {
            return Err(Error::input(format!("value defined more than once: `{name}`"))
                .hint("names of values must be unique; export the model again"));
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

    fn attributes(
        &mut self,
        protos: Vec<AttributeProto>,
        call: &mut Option<&mut Call>,
    ) -> Result<BTreeMap<String, (Attribute, Captures)>> {
        let mut attributes = BTreeMap::new();
        for proto in protos {
            let name = proto.name.clone();
            let context = || format!("attribute `{name}`");
            if let Some(attribute) = self.attribute(proto, call).context(context)?
                && attributes.insert(name.clone(), attribute).is_some()
            {
                return Err(Error::input(format!("attribute given twice: `{name}`"))
                    .hint("export the model again"));
            }
        }
        Ok(attributes)
    }

    /// One attribute; `None` when it refers to an argument that the caller leaves out.
    fn attribute(
        &mut self,
        mut proto: AttributeProto,
        call: &mut Option<&mut Call>,
    ) -> Result<Option<(Attribute, Captures)>> {
        if !proto.ref_attr_name.is_empty() {
            let Some(call) = call else {
                return Err(Error::input(format!(
                    "refers to a function's argument outside of a function: `{}`",
                    proto.ref_attr_name
                )));
            };
            return Ok(call.attributes.get(&proto.ref_attr_name).cloned());
        }
        let mut captures = Captures::new();
        let attribute = match attribute_type(&proto)? {
            Type::Float => Attribute::Float(proto.f),
            Type::Int => Attribute::Int(proto.i),
            Type::String => Attribute::String(text(proto.s)?),
            Type::Floats => Attribute::Floats(proto.floats),
            Type::Ints => Attribute::Ints(proto.ints),
            Type::Strings => {
                Attribute::Strings(proto.strings.into_iter().map(text).collect::<Result<_>>()?)
            }
            Type::Tensor => {
                let tensor = proto.t.take().ok_or_else(|| missing("t"))?;
                match self.tensors.read(tensor)? {
                    Decoded::Numbers(constant) => Attribute::Tensor(constant),
                    Decoded::Text => {
                        return Err(Error::unsupported("string tensor as attribute")
                            .hint("remove the text processing from the model"));
                    }
                }
            }
            Type::Graph => {
                let graph = proto.g.take().ok_or_else(|| missing("g"))?;
                let (graph, inner) = self.graph(graph, call.as_deref_mut())?;
                captures = inner;
                Attribute::Graph(Arc::new(graph))
            }
            other => {
                return Err(Error::unsupported(format!(
                    "attribute of type `{}`",
                    other.as_str_name()
                )));
            }
        };
        Ok(Some((attribute, captures)))
    }

    /// A `Constant` node becomes a constant of the graph, whichever attribute holds its value.
    fn constant_node(
        &mut self,
        protos: Vec<AttributeProto>,
        outputs: Vec<String>,
        parts: &mut Parts,
        call: &mut Option<&mut Call>,
    ) -> Result<()> {
        let [output] = outputs.try_into().map_err(|outputs: Vec<String>| {
            Error::input(format!("a constant has one output, found `{}`", outputs.len()))
        })?;
        let is_text = |proto: &AttributeProto| {
            let text = Element::String as i32;
            matches!(proto.name.as_str(), "value_string" | "value_strings")
                || proto.t.as_ref().is_some_and(|tensor| tensor.data_type == text)
        };
        if protos.iter().any(is_text) {
            parts.texts.insert(output);
            return Ok(());
        }
        if protos.iter().any(|proto| proto.name == "sparse_value") {
            return Err(Error::unsupported("sparse constant")
                .hint("store the constant as a dense tensor (`value`)"));
        }
        let mut attributes = self.attributes(protos, call)?.into_iter();
        let (Some((name, (value, _))), None) = (attributes.next(), attributes.next()) else {
            return Err(Error::input("a constant must have exactly one value attribute")
                .hint("export the model again"));
        };
        let float = |shape: Vec<usize>, data| Arc::new(ConstantTensor::f32(shape, data));
        let int = |shape: Vec<usize>, data| Arc::new(ConstantTensor::i64(shape, data));
        let constant = match (name.as_str(), value) {
            ("value", Attribute::Tensor(tensor)) => tensor,
            ("value_float", Attribute::Float(v)) => float(vec![], vec![v]),
            ("value_floats", Attribute::Floats(v)) => float(vec![v.len()], v),
            ("value_int", Attribute::Int(v)) => int(vec![], vec![v]),
            ("value_ints", Attribute::Ints(v)) => int(vec![v.len()], v),
            _ => {
                return Err(Error::input(format!("not a value attribute of its type: `{name}`"))
                    .hint("export the model again"));
            }
        };
        if output.is_empty()
            || parts.texts.contains(&output)
            || parts.constants.contains_key(&output)
        {
            return Err(Error::input(format!("value defined more than once: `{output}`"))
                .hint("names of values must be unique; export the model again"));
        }
        parts.constants.insert(output, constant);
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

fn missing(field: &str) -> Error {
    Error::input(format!("field is missing: `{field}`")).hint("the file is damaged")
}

fn text(bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|_| Error::unsupported("a text that is not UTF-8"))
}

/// The declared type, or for the oldest files, which declare none, the field that is set.
fn attribute_type(proto: &AttributeProto) -> Result<Type> {
    let declared = Type::try_from(proto.r#type)
        .map_err(|_| Error::input(format!("attribute type does not exist: `{}`", proto.r#type)))?;
    Ok(match declared {
        Type::Undefined if proto.t.is_some() => Type::Tensor,
        Type::Undefined if proto.g.is_some() => Type::Graph,
        Type::Undefined if !proto.s.is_empty() => Type::String,
        Type::Undefined if !proto.floats.is_empty() => Type::Floats,
        Type::Undefined if !proto.ints.is_empty() => Type::Ints,
        Type::Undefined if !proto.strings.is_empty() => Type::Strings,
        Type::Undefined if proto.f != 0.0 => Type::Float,
        Type::Undefined if proto.i != 0 => Type::Int,
        Type::Undefined => {
            return Err(Error::input("attribute without a type")
                .hint("save the model again with a newer version of the `onnx` package"));
        }
        declared => declared,
    })
}
