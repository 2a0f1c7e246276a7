//! Reading a model file: the header checks, then the graph.

use std::collections::{BTreeMap, HashSet};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use candle_onnx::onnx::{ModelProto, NodeProto};

use super::build::Builder;
use super::external::{External, ExternalData, open_regular};
use super::functions::{Functions, domain};
use super::tensor::TensorReader;
use super::{MAX_FILE_BYTES, wire};
use crate::error::{Error, Result, ResultExt as _};
use crate::graph::Graph;

/// Newest standard operator set that is read (ONNX 1.23; ONNX Runtime 1.31 stops at 26).
pub const MAX_OPSET: i64 = 28;
/// Newest version of the file format that is read (ONNX 1.23).
pub const MAX_IR_VERSION: i64 = 14;

/// A model as read from a file: its graph and what the file says about itself.
#[derive(Debug, Clone, PartialEq)]
pub struct OnnxModel {
    /// The graph, local functions inlined.
    pub graph: Graph,
    /// Version of the standard operator set.
    pub opset: i64,
    /// Versions of the other operator sets by domain.
    pub domains: BTreeMap<String, i64>,
    /// Version of the file format.
    pub ir_version: i64,
    /// Who wrote the file: "pytorch 2.15.0"; empty when it does not say.
    pub producer: String,
    /// Real paths of the data files that hold weights of the model, sorted.
    pub external_files: Vec<PathBuf>,
    /// `metadata_props`; of a repeated key the last.
    pub metadata: BTreeMap<String, String>,
}

/// Reads the model at `path`; its external data must lie inside the real path of `root`.
///
/// # Errors
/// [`crate::ErrorKind::Input`] when the file is broken or hostile,
/// [`crate::ErrorKind::Unsupported`] when the graph cannot hold what it says.
pub fn load(path: &Path, root: &Path) -> Result<OnnxModel> {
    let context = || format!("model `{}`", path.display());
    let (file, size) = open_regular(path).context(|| "model".into())?;
    let too_large = || {
        Error::input(format!(
            "the file is larger than 2 GiB, the limit of protobuf: `{size}` bytes"
        ))
        .hint("keep the weights in a file beside it (`save_as_external_data=True`)")
        .context(context())
    };
    if size > MAX_FILE_BYTES {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(usize::try_from(size).unwrap_or_default()).map_err(|_| too_large())?;
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(|error| Error::io(path, &error))?;
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let proto = wire::decode(&bytes).context(context)?;
    let foreign = proto.graph.is_none().then(|| wire::foreign(&bytes)).flatten();
    drop(bytes);
    if let Some(error) = foreign {
        return Err(error.context(context()));
    }
    model(proto, ExternalData::Within { folder, root }).context(context)
}

/// Reads a model from memory.
///
/// # Errors
/// As [`load`].
pub fn load_bytes(bytes: &[u8], external: ExternalData<'_>) -> Result<OnnxModel> {
    let proto = wire::decode(bytes)?;
    if proto.graph.is_none()
        && let Some(error) = wire::foreign(bytes)
    {
        return Err(error);
    }
    model(proto, external)
}

fn model(proto: ModelProto, external: ExternalData<'_>) -> Result<OnnxModel> {
    let Some(graph) = proto.graph else {
        return Err(Error::input("the file holds no graph")
            .hint("not an ONNX model, or an empty one; export it again"));
    };
    let newer = |what: &str, found: i64, max: i64| {
        Error::unsupported(format!("{what} is newer than {max}, the newest known: `{found}`"))
            .hint(format!("export with `opset_version={MAX_OPSET}` or older"))
    };
    match proto.ir_version {
        1..=MAX_IR_VERSION => {}
        version if version > MAX_IR_VERSION => {
            return Err(newer("the file format (ir_version)", version, MAX_IR_VERSION));
        }
        version => {
            return Err(Error::input(format!(
                "field `ir_version` must be 1 or more, found `{version}`"
            ))
            .hint("not an ONNX model, or damaged; export it again"));
        }
    }
    let mut domains = BTreeMap::new();
    for import in &proto.opset_import {
        let name = domain(&import.domain).to_owned();
        if domains.insert(name, import.version).is_some_and(|other| other != import.version) {
            return Err(Error::input(format!(
                "two versions of one operator set in `opset_import`: `{}`",
                if import.domain.is_empty() { "ai.onnx" } else { &import.domain }
            ))
            .hint("export the model again"));
        }
    }
    let opset = match domains.remove("") {
        Some(version @ 1..=MAX_OPSET) => version,
        Some(version) if version > MAX_OPSET => {
            return Err(newer("the operator set", version, MAX_OPSET));
        }
        Some(version) => {
            return Err(Error::input(format!(
                "version of the standard operator set must be 1 or more, found `{version}`"
            ))
            .hint("export the model again"));
        }
        None => {
            return Err(Error::input(
                "field `opset_import` does not name the standard operator set",
            )
            .hint("export the model again"));
        }
    };
    let functions = Functions::new(proto.functions, opset)?;
    functions.check(&graph)?;
    let taken = if functions.is_empty() { HashSet::new() } else { value_names(&graph.node) };
    let mut builder = Builder {
        functions: &functions,
        tensors: TensorReader::new(External::new(external)),
        opset,
        taken,
    };
    let graph = builder.main(graph)?;
    let producer = [proto.producer_name.as_str(), proto.producer_version.as_str()];
    Ok(OnnxModel {
        graph,
        opset,
        domains,
        ir_version: proto.ir_version,
        producer: producer.join(" ").trim().into(),
        external_files: builder.tensors.into_external().into_files(),
        metadata: proto.metadata_props.into_iter().map(|entry| (entry.key, entry.value)).collect(),
    })
}

/// Names of all values that nodes read or make, sub-graphs included.
fn value_names(nodes: &[NodeProto]) -> HashSet<String> {
    let mut names = HashSet::new();
    let mut stack = vec![nodes];
    while let Some(nodes) = stack.pop() {
        for node in nodes {
            names.extend(node.input.iter().chain(&node.output).cloned());
            for graph in node.attribute.iter().filter_map(|attribute| attribute.g.as_ref()) {
                names.extend(graph.initializer.iter().map(|tensor| tensor.name.clone()));
                names.extend(graph.input.iter().map(|info| info.name.clone()));
                stack.push(&graph.node);
            }
        }
    }
    names
}
