//! Reading the official cases out of the wheel.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::PathBuf;
use std::sync::Arc;

use candle_onnx::onnx::{GraphProto, ModelProto, TensorProto};
use metazoa::graph::{ConstantTensor, Graph};
use metazoa::onnx::{ExternalData, load_bytes};
use prost::Message;

use crate::support::cache_dir;

/// The wheel `cargo xtask test` fetches: the last release that carries the data as files.
const WHEEL: &str = "onnx-1.22.0.whl";

/// One case: the model with its inputs as constants, and what it must give.
pub(super) struct Case {
    pub(super) graph: Graph,
    pub(super) inputs: Vec<String>,
    pub(super) outputs: Vec<Arc<ConstantTensor>>,
    /// Whether it quantises.
    pub(super) rounds: bool,
    /// Whether the scale of quantising comes from the values (and has no gradient).
    pub(super) measures_range: bool,
}

/// A case as read, and the operators of its model, sub-graphs included.
pub(super) struct Read {
    pub(super) operators: Vec<String>,
    /// The reason why it cannot be read.
    pub(super) case: Result<Case, String>,
}

/// All cases by name; `None` (and a loud line) without the wheel.
pub(super) fn read() -> Option<BTreeMap<String, Read>> {
    let path = cache_dir().join(WHEEL);
    let Ok(file) = File::open(&path) else {
        eprintln!("SKIPPED: no {} (`cargo xtask test` fetches it)", path.display());
        return None;
    };
    let mut archive = zip::ZipArchive::new(file).unwrap();
    let mut files: BTreeMap<String, BTreeMap<String, Vec<u8>>> = BTreeMap::new();
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).unwrap();
        let name = PathBuf::from(entry.name().unwrap().into_owned());
        let parts: Vec<String> =
            name.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        let ["onnx", "backend", "test", "data", suite, case, rest @ ..] =
            &parts.iter().map(String::as_str).collect::<Vec<_>>()[..]
        else {
            continue;
        };
        if !matches!(*suite, "node" | "pytorch-operator" | "pytorch-converted" | "simple") {
            continue;
        }
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        files.entry(format!("{suite}/{case}")).or_default().insert(rest.join("/"), bytes);
    }
    assert!(files.len() > 1500, "the wheel holds {} cases", files.len());
    let read = |files: &BTreeMap<String, Vec<u8>>| {
        let model = ModelProto::decode(files["model.onnx"].as_slice()).unwrap();
        let mut found = Vec::new();
        model.graph.iter().for_each(|graph| operators(graph, &mut found));
        Read { operators: found, case: case(model, files) }
    };
    Some(files.iter().map(|(name, files)| (name.clone(), read(files))).collect())
}

fn tensors(files: &BTreeMap<String, Vec<u8>>, kind: &str) -> Result<Vec<TensorProto>, String> {
    let mut found = Vec::new();
    for index in 0.. {
        let Some(bytes) = files.get(&format!("test_data_set_0/{kind}_{index}.pb")) else { break };
        let tensor = TensorProto::decode(bytes.as_slice());
        found.push(tensor.map_err(|_| format!("{kind} {index} is no tensor"))?);
    }
    Ok(found)
}

fn operators(graph: &GraphProto, found: &mut Vec<String>) {
    for node in &graph.node {
        let standard = node.domain.is_empty() || node.domain == "ai.onnx";
        let domain = if standard { String::new() } else { format!("{}.", node.domain) };
        found.push(format!("{domain}{}", node.op_type));
        for attribute in &node.attribute {
            attribute.g.iter().for_each(|graph| operators(graph, found));
        }
    }
}

fn case(mut model: ModelProto, files: &BTreeMap<String, Vec<u8>>) -> Result<Case, String> {
    let mut names = Vec::new();
    let mut found = Vec::new();
    let graph = model.graph.as_mut().ok_or("has no graph")?;
    operators(graph, &mut found);
    let inputs = tensors(files, "input");
    let outputs = tensors(files, "output");
    let (inputs, outputs) = match (inputs, outputs) {
        (Ok(inputs), Ok(outputs)) => (inputs, outputs),
        (Err(text), _) | (_, Err(text)) => return Err(text),
    };
    let known: Vec<String> = graph.initializer.iter().map(|t| t.name.clone()).collect();
    let fed = graph.input.iter().filter(|info| !known.contains(&info.name));
    let fed: Vec<String> = fed.map(|info| info.name.clone()).collect();
    for (name, tensor) in fed.iter().zip(inputs) {
        graph.initializer.push(TensorProto { name: name.clone(), ..tensor });
        names.push(name.clone());
    }
    let expected = |index: usize| format!("expected output {index}");
    let count = outputs.len();
    for (index, tensor) in outputs.into_iter().enumerate() {
        graph.initializer.push(TensorProto { name: expected(index), ..tensor });
    }
    let loaded = load_bytes(&model.encode_to_vec(), ExternalData::Refused)
        .map_err(|error| error.to_string())?;
    let mut graph = loaded.graph;
    let outputs =
        (0..count).map(|index| graph.constants.remove(&expected(index)).unwrap()).collect();
    let rounds = found.iter().any(|operator| {
        operator.contains("Quantize") || operator.contains("QLinear") || operator == "Round"
    });
    let measures_range =
        found.iter().any(|operator| operator == "DynamicQuantizeLinear" || operator == "Round");
    Ok(Case { graph, inputs: names, outputs, rounds, measures_range })
}
