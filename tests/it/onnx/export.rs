//! What is written is what was read, and ONNX Runtime computes the same with it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use metazoa::graph::{ConstantTensor, Graph};
use metazoa::onnx::{ExportInfo, ExternalData, load, load_bytes, to_bytes, write};

use super::*;
use crate::support::{repository, shared, temp_dir};

/// The `.onnx` files of a folder, by name.
pub(super) fn models(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "onnx"))
        .collect();
    files.sort();
    files
}

/// Reads, writes and reads every model of a folder; returns how many there were.
fn round_trip(folder: &Path) -> usize {
    let temp = temp_dir();
    let files = models(folder);
    for file in &files {
        let first = load(file, folder).unwrap();
        let copy = temp.path().join("copy.onnx");
        write(&copy, &first.graph, &first.export_info()).unwrap();
        let second = load(&copy, temp.path()).unwrap();
        assert!(second.graph == first.graph, "{} changes by writing", file.display());
        assert_eq!(second.metadata, first.metadata);
        assert!(second.external_files.is_empty());
    }
    files.len()
}

#[test]
fn bundled_models_survive_reading_and_writing() {
    assert!(round_trip(&repository().join("zoo")) >= 12);
}

#[test]
fn every_model_of_the_shared_zoos_survives_reading_and_writing() {
    for (zoo, count) in [("zoo_ss", 40), ("zoo_sh", 12), ("zoo_mh", 12), ("zoo_edge", 38)] {
        let Some(folder) = shared(&format!("data/{zoo}")) else { return };
        assert_eq!(round_trip(&folder), count, "{zoo}");
    }
}

#[test]
fn the_file_says_who_wrote_it_and_what_for() {
    let mut file = model(graph(vec![node("Relu", &["x"], &["y"])]));
    file.opset_import.push(opset("com.microsoft", 3));
    file.graph.as_mut().unwrap().node =
        vec![NodeProto { domain: "com.microsoft".into(), ..node("Gelu", &["x"], &["y"]) }];
    let read_model = read(&file).unwrap();
    let metadata = BTreeMap::from([("labels".into(), "[\"a\"]".into()), ("a".into(), "b".into())]);
    let info =
        ExportInfo { domains: read_model.domains.clone(), ..ExportInfo::new(metadata.clone()) };
    let bytes = to_bytes(&read_model.graph, &info).unwrap();
    let written = ModelProto::decode(bytes.as_slice()).unwrap();
    assert_eq!(written.producer_name, "metazoa");
    assert_eq!(written.ir_version, 8);
    assert_eq!(written.opset_import, [opset("", 17), opset("com.microsoft", 3)]);
    let keys: Vec<_> = written.metadata_props.iter().map(|entry| entry.key.as_str()).collect();
    assert_eq!(keys, ["a", "labels"]);
    assert_eq!(load_bytes(&bytes, ExternalData::Refused).unwrap().metadata, metadata);
    assert_eq!(bytes, to_bytes(&read_model.graph, &info).unwrap());
}

#[test]
fn a_constant_that_does_not_fit_its_type_is_not_written() {
    let mut graph = read(&model(graph(vec![node("Relu", &["x"], &["y"])]))).unwrap().graph;
    let mut refuse = |constant: ConstantTensor| {
        graph.constants.insert("k".into(), constant.into());
        let error = to_bytes(&graph, &ExportInfo::new(BTreeMap::new())).unwrap_err().to_string();
        assert!(error.contains("constant `k`"), "{error}");
    };
    refuse(ConstantTensor::f32(vec![3], vec![1.0]));
    let dtype = metazoa::graph::DataType::Int8;
    refuse(ConstantTensor { dtype, ..ConstantTensor::i64(vec![1], vec![200]) });
}

#[test]
fn a_failed_write_leaves_the_old_file() {
    let temp = temp_dir();
    let path = temp.path().join("m.onnx");
    let good = read(&model(graph(vec![node("Relu", &["x"], &["y"])]))).unwrap().graph;
    write(&path, &good, &ExportInfo::new(BTreeMap::new())).unwrap();
    let before = std::fs::read(&path).unwrap();
    let bad = Graph { opset: 99, ..good };
    write(&path, &bad, &ExportInfo::new(BTreeMap::new())).unwrap_err();
    assert_eq!(std::fs::read(&path).unwrap(), before);
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 1, "a temporary file was left");
}
