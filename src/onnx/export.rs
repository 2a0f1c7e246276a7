//! Graphs to ONNX files that the checker of the `onnx` package accepts in full.
//!
//! The reverse of import: reading what was written gives the same graph.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::Path;

use candle_onnx::onnx::attribute_proto::AttributeType as Type;
use candle_onnx::onnx::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto,
};
use prost::Message as _;

use super::import::{MAX_OPSET, OnnxModel};
use super::{MAX_DEPTH, MAX_FILE_BYTES, ports, tensor};
use crate::error::{Error, Result, ResultExt as _};
use crate::graph::{Attribute, Graph, Node};

/// What a written file says about itself beside its graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// Program that wrote it.
    pub producer: String,
    /// Version of that program.
    pub producer_version: String,
    /// `metadata_props`, written in the order of the keys.
    pub metadata: BTreeMap<String, String>,
    /// Versions of operator sets other than the standard one, whose version is [`Graph::opset`]; a
    /// domain that nodes use and this leaves out gets version 1.
    pub domains: BTreeMap<String, i64>,
}

impl ExportInfo {
    /// A file written by this crate, with metadata.
    pub fn new(metadata: BTreeMap<String, String>) -> Self {
        Self {
            producer: env!("CARGO_PKG_NAME").into(),
            producer_version: env!("CARGO_PKG_VERSION").into(),
            metadata,
            domains: BTreeMap::new(),
        }
    }
}

impl OnnxModel {
    /// What writing this model again should say: its metadata and domains, this crate as producer.
    pub fn export_info(&self) -> ExportInfo {
        ExportInfo { domains: self.domains.clone(), ..ExportInfo::new(self.metadata.clone()) }
    }
}

/// The bytes of an ONNX file.
///
/// # Errors
/// When the graph is larger than a protobuf may be, nests too deep, or holds a constant whose values
/// do not fit its type.
pub fn to_bytes(graph: &Graph, info: &ExportInfo) -> Result<Vec<u8>> {
    if !(1..=MAX_OPSET).contains(&graph.opset) {
        return Err(Error::internal(format!("no such operator set: `{}`", graph.opset)));
    }
    let mut domains = BTreeSet::new();
    let proto = graph_proto(graph, MAX_DEPTH, &mut domains)?;
    let standard = OperatorSetIdProto { domain: String::new(), version: graph.opset };
    let others = domains.into_iter().map(|domain| OperatorSetIdProto {
        version: info.domains.get(&domain).copied().unwrap_or(1),
        domain,
    });
    let model = ModelProto {
        ir_version: ir_version(graph.opset),
        opset_import: std::iter::once(standard).chain(others).collect(),
        producer_name: info.producer.clone(),
        producer_version: info.producer_version.clone(),
        graph: Some(proto),
        metadata_props: info
            .metadata
            .iter()
            .map(|(key, value)| StringStringEntryProto { key: key.clone(), value: value.clone() })
            .collect(),
        ..Default::default()
    };
    let length = model.encoded_len();
    if length as u64 > MAX_FILE_BYTES {
        return Err(Error::unsupported(format!(
            "an ONNX file holds 2 GiB at most, this needs `{length}` bytes"
        ))
        .hint("choose a smaller backbone"));
    }
    Ok(model.encode_to_vec())
}

/// Writes an ONNX file, whole or not at all: a temporary file beside `path`, then a rename.
///
/// # Errors
/// As [`to_bytes`], and when the folder cannot be written.
pub fn write(path: &Path, graph: &Graph, info: &ExportInfo) -> Result<()> {
    let bytes = to_bytes(graph, info).context(|| format!("model `{}`", path.display()))?;
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".metazoa-").suffix(".onnx.part");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        // As any new file: the process's umask decides. Temporary files are private by default.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut file = builder.tempfile_in(folder).map_err(|error| Error::io(folder, &error))?;
    file.write_all(&bytes).map_err(|error| Error::io(path, &error))?;
    file.persist(path).map_err(|error| Error::io(path, &error.error))?;
    Ok(())
}

/// The oldest version of the format for an operator set, at least 4: there initialisers need not be
/// inputs.
fn ir_version(opset: i64) -> i64 {
    match opset {
        ..=9 => 4,
        10 => 5,
        11 => 6,
        12..=14 => 7,
        15..=18 => 8,
        19..=20 => 9,
        21..=22 => 10,
        23 => 11,
        24 => 12,
        _ => 13,
    }
}

fn graph_proto(graph: &Graph, depth: u32, domains: &mut BTreeSet<String>) -> Result<GraphProto> {
    let Some(depth) = depth.checked_sub(1) else {
        return Err(Error::internal(format!("sub-graphs nest deeper than {MAX_DEPTH} levels")));
    };
    let nodes =
        graph.nodes.iter().map(|node| node_proto(node, depth, domains).context(|| node.describe()));
    Ok(GraphProto {
        // The checker wants a name.
        name: if graph.name.is_empty() { "graph".into() } else { graph.name.clone() },
        node: nodes.collect::<Result<_>>()?,
        initializer: graph
            .constants
            .iter()
            .map(|(name, constant)| tensor::encode(name, constant))
            .collect::<Result<_>>()?,
        input: graph.inputs.iter().map(ports::write).collect(),
        output: graph.outputs.iter().map(ports::write).collect(),
        ..Default::default()
    })
}

fn node_proto(node: &Node, depth: u32, domains: &mut BTreeSet<String>) -> Result<NodeProto> {
    if !node.domain.is_empty() {
        domains.insert(node.domain.clone());
    }
    Ok(NodeProto {
        input: node.inputs.clone(),
        output: node.outputs.clone(),
        name: node.name.clone(),
        op_type: node.op_type.clone(),
        domain: node.domain.clone(),
        attribute: node
            .attributes
            .iter()
            .map(|(name, attribute)| attribute_proto(name, attribute, depth, domains))
            .collect::<Result<_>>()?,
        ..Default::default()
    })
}

fn attribute_proto(
    name: &str,
    attribute: &Attribute,
    depth: u32,
    domains: &mut BTreeSet<String>,
) -> Result<AttributeProto> {
    let mut proto = AttributeProto { name: name.into(), ..Default::default() };
    let kind = match attribute {
        Attribute::Float(value) => {
            proto.f = *value;
            Type::Float
        }
        Attribute::Int(value) => {
            proto.i = *value;
            Type::Int
        }
        Attribute::String(value) => {
            proto.s = value.clone().into_bytes();
            Type::String
        }
        Attribute::Tensor(value) => {
            proto.t = Some(tensor::encode("", value)?);
            Type::Tensor
        }
        Attribute::Floats(values) => {
            proto.floats.clone_from(values);
            Type::Floats
        }
        Attribute::Ints(values) => {
            proto.ints.clone_from(values);
            Type::Ints
        }
        Attribute::Strings(values) => {
            proto.strings = values.iter().map(|value| value.clone().into_bytes()).collect();
            Type::Strings
        }
        Attribute::Graph(graph) => {
            proto.g = Some(graph_proto(graph, depth, domains)?);
            Type::Graph
        }
    };
    proto.r#type = kind as i32;
    Ok(proto)
}
