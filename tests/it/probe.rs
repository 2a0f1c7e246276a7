//! First contact with files, good and hostile, through a child process of the real binary.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_onnx::onnx::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto,
    TensorShapeProto, TypeProto, ValueInfoProto, tensor_shape_proto, type_proto,
};
use metazoa::access::probe::{ProbeLimits, ProbeReport, ProbeRequest, Prober, prefilter, probe};
use metazoa::error::{ErrorKind, Result};
use metazoa::zoo::{BatchDimension, OutputKind};
use prost::Message;
use rayon::prelude::*;

use crate::support::{self, runtime};

fn executable() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_metazoa"))
}

fn contact(model: &Path, limits: &ProbeLimits) -> Result<ProbeReport> {
    let library = runtime().library().path.clone();
    let request = ProbeRequest { model: model.to_owned(), library, input: None };
    probe(executable(), &request, limits)
}

fn models_in(folder: &Path) -> Vec<PathBuf> {
    let mut models: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "onnx"))
        .collect();
    models.sort();
    models
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap().to_str().unwrap().to_owned()
}

/// Files of `hostile/` that do no harm and are valid; everything else there must be rejected.
const HARMLESS: [&str; 4] = ["ir0", "neg_input_dim", "norank_input", "u8_io"];

#[test]
fn no_hostile_file_hangs_or_kills_the_parent() {
    let Some(folder) = support::shared("fixtures/hostile") else { return };
    let models = models_in(&folder);
    assert!(models.len() >= 57, "{}", models.len());
    let limits = ProbeLimits { memory_bytes: 2 << 30, cpu_s: 8, wall_s: 15 };
    let prober = Prober::new(executable(), &runtime().library().path);
    let outcomes: Vec<(String, Result<ProbeReport>, f64)> = models
        .par_iter()
        .map(|model| {
            let started = Instant::now();
            let outcome = prober.probe(model, None, &limits);
            (stem(model), outcome, started.elapsed().as_secs_f64())
        })
        .collect();
    let mut accepted = BTreeSet::new();
    for (name, outcome, seconds) in &outcomes {
        match outcome {
            Ok(report) => {
                accepted.insert(name.as_str());
                eprintln!("{name}: accepted in {seconds:.1} s {:?}", report.outputs);
            }
            Err(error) => eprintln!("{name}: {seconds:.1} s {error}"),
        }
        assert!(*seconds < 20.0, "{name} took {seconds} s");
    }
    for (name, outcome, _) in &outcomes {
        if let Err(error) = outcome {
            assert_eq!(error.kind(), ErrorKind::Input, "{name}: {error}");
            assert!(!error.to_string().contains('\n') && error.to_string().len() < 500, "{name}");
        }
    }
    assert_eq!(accepted, HARMLESS.into_iter().collect());
    // Not one of them reached the processes that start the forks, and the next file finds them as the first did.
    assert!(prober.started() <= rayon::current_num_threads(), "{}", prober.started());
    let good = support::repository().join("zoo/ss_001_glyphs_conv4_32.onnx");
    let limits = ProbeLimits::for_size(1 << 20);
    let reports = [prober.probe(&good, None, &limits).unwrap(), contact(&good, &limits).unwrap()];
    assert_eq!(reports[0], reports[1]);
    assert!(prober.started() <= rayon::current_num_threads());
}

/// A process that ends after its first answer: the next file is tried in a new one, and not blamed.
#[test]
fn a_process_that_died_while_idle_is_replaced() {
    use std::os::unix::fs::PermissionsExt;
    let folder = support::temp_dir();
    let executable = folder.path().join("once");
    let script = r#"#!/bin/sh
read job; echo '{"Refused":{"message":"seen","hint":null}}'"#;
    std::fs::write(&executable, script).unwrap();
    std::fs::set_permissions(&executable, std::fs::Permissions::from_mode(0o755)).unwrap();
    let prober = Prober::new(&executable, Path::new("library"));
    let limits = ProbeLimits { memory_bytes: 1 << 30, cpu_s: 5, wall_s: 5 };
    for started in 1..=3 {
        let error = prober.probe(Path::new("model"), None, &limits).unwrap_err();
        assert_eq!((error.message(), error.kind()), ("seen", ErrorKind::Input));
        assert_eq!(prober.started(), started);
    }
}

/// Fixed batches, layouts, bytes, two outputs, int8, opsets 9 to 26: what the probe reports is so.
#[test]
fn awkward_but_valid_models_are_described_as_they_are() {
    let Some(folder) = support::shared("data/zoo_edge") else { return };
    let models = models_in(&folder);
    runtime();
    let reports: BTreeMap<String, ProbeReport> = models
        .par_iter()
        .map(|model| (stem(model), contact(model, &ProbeLimits::for_size(1 << 20)).unwrap()))
        .collect();
    for (name, report) in &reports {
        let batch = match name.as_str() {
            "edge_fixed_batch1" => BatchDimension::Fixed(1),
            "edge_fixed_batch8" => BatchDimension::Fixed(8),
            _ => BatchDimension::Free,
        };
        assert_eq!(report.batch, batch, "{name}");
        assert!(report.repeatable, "{name}");

        assert!(!report.batch_dependent, "{name}: {}", report.batch_difference);
        assert_eq!(report.inputs.len(), 1, "{name}");
        let scores = report.outputs.iter().find(|port| port.name != "embedding").unwrap();
        assert!(scores.finite);
        let classes = if name == "edge_head64" { 64 } else { 5 };
        assert_eq!(scores.values_per_image, Some(classes), "{name}");
        let kind = match name.as_str() {
            "edge_softmax" => OutputKind::Probabilities,
            "edge_logsoftmax" => OutputKind::LogProbabilities,
            _ => OutputKind::Logits,
        };
        assert_eq!(scores.looks_like, Some(kind), "{name}");
    }
    assert_eq!(reports["edge_opset9_ts"].opset, Some(9));
    assert_eq!(reports["edge_opset26_dynamo"].opset, Some(26));
    assert_eq!(reports["edge_nhwc_uint8"].inputs[0].element, "u8");
    assert_eq!(reports["edge_two_outputs"].outputs.len(), 2);
}

/// Flatten, DynamicQuantizeLinear, MatMulInteger, Cast, Mul: the activation's scale is that of the whole
/// batch, so an image's answer moves with its company.
fn dynamically_quantised_model() -> Vec<u8> {
    let node =
        |op: &str, inputs: &[&str], outputs: &[&str], attribute: Option<(&str, i64)>| NodeProto {
            op_type: op.to_owned(),
            name: op.to_owned(),
            input: inputs.iter().map(|name| (*name).to_owned()).collect(),
            output: outputs.iter().map(|name| (*name).to_owned()).collect(),
            attribute: attribute
                .map(|(name, i)| AttributeProto {
                    name: name.to_owned(),
                    i,
                    r#type: 2,
                    ..Default::default()
                })
                .into_iter()
                .collect(),
            ..Default::default()
        };
    let weights: Vec<u8> = (0..48 * 4).map(|i| ((i * 37) % 61) as u8).collect();
    let weights = TensorProto {
        name: "w".to_owned(),
        data_type: 3, // int8
        dims: vec![48, 4],
        raw_data: weights,
        ..Default::default()
    };
    let port = |name: &str, dims: &[i64]| ValueInfoProto {
        name: name.to_owned(),
        r#type: Some(TypeProto {
            value: Some(type_proto::Value::TensorType(type_proto::Tensor {
                elem_type: 1,
                shape: Some(TensorShapeProto {
                    dim: dims
                        .iter()
                        .map(|&dim| tensor_shape_proto::Dimension {
                            value: Some(if dim < 0 {
                                tensor_shape_proto::dimension::Value::DimParam("N".to_owned())
                            } else {
                                tensor_shape_proto::dimension::Value::DimValue(dim)
                            }),
                            ..Default::default()
                        })
                        .collect(),
                }),
            })),
            ..Default::default()
        }),
        ..Default::default()
    };
    let graph = GraphProto {
        name: "dynamic".to_owned(),
        node: vec![
            node("Flatten", &["image"], &["flat"], Some(("axis", 1))),
            node("DynamicQuantizeLinear", &["flat"], &["bytes", "scale", "zero"], None),
            node("MatMulInteger", &["bytes", "w", "zero"], &["sums"], None),
            node("Cast", &["sums"], &["floats"], Some(("to", 1))),
            node("Mul", &["floats", "scale"], &["logits"], None),
        ],
        initializer: vec![weights],
        input: vec![port("image", &[-1, 3, 4, 4])],
        output: vec![port("logits", &[-1, 4])],
        ..Default::default()
    };
    ModelProto {
        ir_version: 8,
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: 13 }],
        graph: Some(graph),
        ..Default::default()
    }
    .encode_to_vec()
}

#[test]
fn a_dynamically_quantised_model_is_found_to_mix_its_batch() {
    let folder = support::temp_dir();
    let model = folder.path().join("dynamic.onnx");
    std::fs::write(&model, dynamically_quantised_model()).unwrap();
    let report = contact(&model, &ProbeLimits::for_size(1 << 20)).unwrap();
    assert!(report.batch_dependent, "{}", report.batch_difference);
    assert_eq!(report.batch, BatchDimension::Free);
}

#[test]
fn only_regular_files_inside_the_zoo_pass_the_prefilter() {
    let folder = support::temp_dir();
    let zoo = folder.path().join("zoo");
    std::fs::create_dir(&zoo).unwrap();
    let outside = folder.path().join("outside.onnx");
    std::fs::write(&outside, "x").unwrap();
    let good = zoo.join("good.onnx");
    std::fs::write(&good, "x").unwrap();
    let link = |to: &Path, name: &str| {
        std::os::unix::fs::symlink(to, zoo.join(name)).unwrap();
        zoo.join(name)
    };
    let inner = link(&good, "inner.onnx");
    assert_eq!(prefilter(&inner, &zoo).unwrap(), good.canonicalize().unwrap());
    let empty = zoo.join("empty.onnx");
    std::fs::write(&empty, "").unwrap();
    let fifo = zoo.join("fifo.onnx");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let directory = zoo.join("directory.onnx");
    std::fs::create_dir(&directory).unwrap();
    let cases = [
        (link(&outside, "escape.onnx"), "outside the zoo"),
        (link(Path::new("/dev/zero"), "device.onnx"), "outside the zoo"),
        (empty, "empty"),
        (fifo, "regular"),
        (directory, "regular"),
        (zoo.join("missing.onnx"), "No such file"),
    ];
    for (path, word) in cases {
        let error = prefilter(&path, &zoo).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Input);
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[test]
fn a_missing_library_is_not_blamed_on_the_model() {
    let folder = support::temp_dir();
    let model = folder.path().join("dynamic.onnx");
    std::fs::write(&model, dynamically_quantised_model()).unwrap();
    let library = folder.path().join("libonnxruntime.so");
    let request = ProbeRequest { model, library, input: None };
    let error = probe(executable(), &request, &ProbeLimits::for_size(0)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal, "{error}");
    assert!(error.hint_text().unwrap().contains("metazoa setup"));
}
