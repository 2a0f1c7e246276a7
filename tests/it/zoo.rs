//! Ingesting real folders: the bundled zoo, the founders' zoos with and without their sidecars,
//! files made to hurt, a thousand models.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use metazoa::app::Context;
use metazoa::app::ingest::{
    CatalogWriting, Ingest, IngestOptions, ProbeOptions, Strictness, ingest,
};
use metazoa::app::ingest_output;
use metazoa::graph::{Attribute, ConstantTensor, DataType, Dimension, Graph, Node, Port};
use metazoa::onnx::{ExportInfo, write};
use metazoa::zoo::catalog::{Catalog, CatalogModel, Provenance};
use metazoa::zoo::read::Reach;
use metazoa::zoo::{Access, Color, ModelSpec, OutputKind, Sidecar, candidates};

use crate::support::{repository, runtime, shared, temp_dir};

const ZOOS: [(&str, usize); 4] = [("zoo_ss", 40), ("zoo_sh", 12), ("zoo_mh", 12), ("zoo_edge", 38)];

fn look(zoo: &Path) -> Ingest {
    try_look(zoo, CatalogWriting::Skip).unwrap()
}

fn try_look(zoo: &Path, catalog: CatalogWriting) -> metazoa::Result<Ingest> {
    ingest(
        &Context::silent(0),
        &IngestOptions { zoo: zoo.to_path_buf(), catalog, probe: None, reach: Reach::AsFound },
    )
}

fn by_id(ingest: &Ingest) -> BTreeMap<&str, &CatalogModel> {
    ingest.models.iter().map(|model| (model.spec.id.as_str(), model)).collect()
}

/// Copies the files of `from` whose name ends in one of `extensions`.
fn copy(from: &Path, to: &Path, extensions: &[&str]) {
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if extensions.iter().any(|extension| name.ends_with(extension)) {
            std::fs::copy(&path, to.join(name)).unwrap();
        }
    }
}

fn bundled() -> PathBuf {
    repository().join("zoo")
}

#[test]
fn the_bundled_zoo_ingests_with_the_facts_its_sidecars_state() {
    let found = look(&bundled());
    assert_eq!(found.rejected, []);
    assert!(found.models.len() >= 12, "{}", found.models.len());
    for model in &found.models {
        agrees_with_its_sidecar(&model.spec);
    }
    let models = by_id(&found);
    assert_eq!(models["edge_int8_qdq"].spec.access, Access::BlackBox);
    assert_eq!(models["edge_softmax"].spec.output_kind, OutputKind::Probabilities);
    assert!(models["edge_export_dynamo_default"].notes[0].contains("optimize=False"));
    let white = found.models.iter().filter(|m| m.spec.access == Access::WhiteBox).count();
    assert_eq!(white, found.models.len() - 1, "{}", ingest_output::table(&found));
}

fn agrees_with_its_sidecar(spec: &ModelSpec) {
    let said = candidates::beside(&spec.path).unwrap().unwrap();
    let block = said.preprocess();
    assert_eq!(Some(spec.preprocess.input_size), block.input_size, "{}", spec.id);
    assert_eq!(Some(spec.preprocess.layout), block.layout, "{}", spec.id);
    assert_eq!(Some(spec.preprocess.dtype), block.dtype, "{}", spec.id);
    assert_eq!(Some(spec.preprocess.value_range), block.value_range, "{}", spec.id);
    assert_eq!(Some(spec.preprocess.color), block.color, "{}", spec.id);
    assert_eq!(Some(spec.output_kind), said.output_kind, "{}", spec.id);
    assert_eq!(Some(&spec.logits_output), said.logits_output.as_ref(), "{}", spec.id);
    assert_eq!(spec.classes, said.id2label.unwrap().len(), "{}", spec.id);
}

#[test]
fn every_shared_zoo_ingests_whole() {
    let mut taps = BTreeMap::new();
    for (zoo, count) in ZOOS {
        let Some(folder) = shared(&format!("data/{zoo}")) else { return };
        let found = look(&folder);
        assert_eq!(found.rejected, [], "{zoo}");
        assert_eq!(found.models.len(), count, "{zoo}");
        for model in &found.models {
            agrees_with_its_sidecar(&model.spec);
            taps.insert(model.spec.id.clone(), model.spec.norm_taps);
            assert_eq!(model.spec.access, Access::WhiteBox, "{}: {:?}", model.spec.id, model.notes);
        }
    }
    // The table of ../shared/data/README.md.
    let expected = [
        ("ss_000_glyphs_conv4_32", 4),
        ("sh_002_glyphs_resnet18slim", 20),
        ("sh_004_glyphs_mobilenetv2", 20),
        ("sh_005_glyphs_densenet", 15),
        ("sh_006_glyphs_convnext_ln_gelu", 0),
        ("sh_008_glyphs_mobilenetv3_se_hswish", 14),
        ("edge_export_ts_default", 0),
        ("edge_export_dynamo_default", 0),
        ("edge_export_ts_eval_nofold", 4),
        ("edge_constants_not_initializers", 4),
        ("edge_fp16_weights_cast", 4),
        ("edge_int8_qoperator", 0),
    ];
    for (id, count) in expected {
        assert_eq!(taps[id], count, "{id}");
    }
}

/// Values the file alone cannot tell: `mean` and `std` outside the graph.
#[test]
fn without_sidecars_the_files_alone_give_the_same_facts() {
    for (zoo, count) in ZOOS {
        let Some(folder) = shared(&format!("data/{zoo}")) else { return };
        let bare = temp_dir();
        copy(&folder, bare.path(), &[".onnx", ".data"]);
        let found = look(bare.path());
        assert_eq!(found.rejected, [], "{zoo}");
        assert_eq!(found.models.len(), count, "{zoo}");
        let told = look(&folder);
        for (id, model) in by_id(&told) {
            let inferred = by_id(&found)[id];
            let (a, b) = (&inferred.spec, &model.spec);
            assert_eq!(a.preprocess.input_size, b.preprocess.input_size, "{id}");
            assert_eq!(a.preprocess.layout, b.preprocess.layout, "{id}");
            assert_eq!(a.preprocess.dtype, b.preprocess.dtype, "{id}");
            assert_eq!(a.preprocess.value_range, b.preprocess.value_range, "{id}");
            assert_eq!(a.preprocess.color, b.preprocess.color, "{id}");
            assert_eq!(a.classes, b.classes, "{id}");
            assert_eq!(a.logits_output, b.logits_output, "{id}");
            assert_eq!(a.output_kind, b.output_kind, "{id}");
            assert_eq!(a.access, b.access, "{id}");
            assert_eq!((&a.sha, a.batch, a.norm_taps), (&b.sha, b.batch, b.norm_taps), "{id}");
            assert!(inferred.provenance.values().all(|p| *p != Provenance::Sidecar), "{id}");
        }
    }
}

#[test]
fn the_folded_exports_are_told_apart_from_networks_without_normalisation() {
    let (Some(edge), Some(sh)) = (shared("data/zoo_edge"), shared("data/zoo_sh")) else { return };
    let (edge, sh) = (look(&edge), look(&sh));
    let folded = |found: &Ingest| -> Vec<String> {
        let folded =
            |m: &&CatalogModel| m.notes.iter().any(|n| n.contains("TrainingMode.PRESERVE"));
        found.models.iter().filter(folded).map(|m| m.spec.id.clone()).collect()
    };
    let expected = ["edge_export_dynamo_default", "edge_export_ts_default", "edge_opset26_dynamo"];
    let found = folded(&edge);
    for id in &expected[..2] {
        assert!(found.iter().any(|f| f == id), "{found:?}");
    }
    assert_eq!(folded(&sh), Vec::<String>::new());
}

#[test]
fn each_hostile_file_is_rejected_alone_with_reason_or_taken_for_what_it_is() {
    let Some(folder) = shared("fixtures/hostile") else { return };
    let start = std::time::Instant::now();
    let found = look(&folder);
    let accepted: Vec<&str> = found.models.iter().map(|m| m.spec.id.as_str()).collect();
    // Newer operator sets than ONNX Runtime reads, of plain networks.
    assert_eq!(accepted, ["opset27", "opset28"], "{}", ingest_output::table(&found));
    for rejection in &found.rejected {
        assert!(!rejection.reason.is_empty(), "{rejection:?}");
        assert!(!rejection.reason.contains("unforeseen"), "{rejection:?}");
        assert!(rejection.reason.len() < 400, "{rejection:?}");
    }
    assert!(start.elapsed().as_secs() < 30, "{:?}", start.elapsed());
}

#[test]
fn one_bad_file_never_stops_the_rest_and_strict_refuses_it() {
    let zoo = temp_dir();
    let good = bundled().join("edge_softmax.onnx");
    std::fs::copy(&good, zoo.path().join("good.onnx")).unwrap();
    let bytes = std::fs::read(&good).unwrap();
    std::fs::write(zoo.path().join("truncated.onnx"), &bytes[..bytes.len() / 2]).unwrap();
    std::fs::copy(&good, zoo.path().join("typo.onnx")).unwrap();
    std::fs::write(zoo.path().join("typo.yaml"), "schema_version: 1\npreproces: {}\n").unwrap();
    std::fs::copy(&good, zoo.path().join("six.onnx")).unwrap();
    let six = "schema_version: 1\nid2label: {0: a, 1: b, 2: c, 3: d, 4: e, 5: f}\n";
    std::fs::write(zoo.path().join("six.yaml"), six).unwrap();
    let remote = "schema_version: 1\nendpoint: {url: 'http://127.0.0.1:9'}\n";
    std::fs::write(zoo.path().join("remote.yaml"), remote).unwrap();

    let found = try_look(zoo.path(), CatalogWriting::Write).unwrap();
    let accepted: Vec<&str> = found.models.iter().map(|m| m.spec.id.as_str()).collect();
    assert_eq!(accepted, ["good"]);
    let reasons: Vec<(&str, &str)> =
        found.rejected.iter().map(|r| (r.path.as_str(), r.reason.as_str())).collect();
    assert_eq!(reasons.len(), 4, "{reasons:?}");
    assert_eq!(reasons[0].0, "remote.yaml");
    assert!(reasons[0].1.contains("connection refused 3 times"), "{reasons:?}");
    assert_eq!(
        reasons[1],
        (
            "six.onnx",
            "`id2label` of `six.yaml` contradicts the model, expected 5 labels (output `probs`), found `6`"
        )
    );
    assert_eq!(reasons[2].0, "truncated.onnx");
    assert_eq!(reasons[3], ("typo.onnx", "`typo.yaml` line 2: unknown key `preproces`"));
    assert!(found.rejected.iter().all(|r| r.hint.is_some()), "{:?}", found.rejected);

    assert!(found.verdict(Strictness::Lenient).is_ok());
    let error = found.verdict(Strictness::Strict).unwrap_err();
    assert_eq!(error.exit_code(), 1);
    assert_eq!(error.to_string(), "4 of 5 files are rejected");

    let catalog = Catalog::read(zoo.path()).unwrap();
    assert_eq!(catalog.models[0].spec.path, zoo.path().join("good.onnx"));
    assert_eq!(catalog.rejected, found.rejected);
    let output = serde_json::to_value(ingest_output::output(&found)).unwrap();
    assert_eq!((&output["accepted"], &output["rejected"]), (&1.into(), &4.into()));
    assert_eq!(output["models"][0]["path"], "good.onnx");
    assert_eq!(output["models"][0]["status"], "accepted");
    assert_eq!(output["models"][0]["access"], "white-box");
    assert_eq!(output["models"][0]["input"], serde_json::json!([3, 32, 32]));
    assert_eq!(output["models"][2]["status"], "rejected");
    assert!(output["models"][2]["access"].is_null());
}

#[test]
fn access_can_be_forced_and_white_box_refused_where_it_is_impossible() {
    let zoo = temp_dir();
    let model = |name: &str| zoo.path().join(format!("{name}.onnx"));
    std::fs::copy(bundled().join("edge_softmax.onnx"), model("forced")).unwrap();
    let image: Vec<Dimension> = [1, 3, 32, 32].map(Dimension::Fixed).into();
    let odd = Node::new("GRU", "pool", &["c", "c"], &["p"]);
    let graph = classifier(&image, odd, 256, &[]);
    write(&model("wanted"), &graph, &ExportInfo::new(BTreeMap::new())).unwrap();
    for (name, access) in [("forced", "black-box"), ("wanted", "white-box")] {
        let sidecar = format!("schema_version: 1\naccess: {access}\n");
        std::fs::write(zoo.path().join(format!("{name}.yaml")), sidecar).unwrap();
    }
    let found = look(zoo.path());
    assert_eq!(found.models[0].spec.access, Access::BlackBox);
    assert_eq!(found.models[0].provenance["access"], Provenance::Sidecar);
    let rejection = &found.rejected[0];
    assert_eq!(rejection.path, "wanted.onnx");
    assert!(rejection.reason.contains("white-box is not possible"), "{rejection:?}");
    assert!(rejection.reason.contains("GRU"), "{rejection:?}");
    assert!(rejection.hint.as_ref().unwrap().contains("wanted.yaml"));
}

#[test]
fn an_empty_zoo_and_one_of_only_bad_files_are_one_error_and_write_nothing() {
    let zoo = temp_dir();
    let error = try_look(zoo.path(), CatalogWriting::Write).unwrap_err();
    assert_eq!(error.exit_code(), 1);
    assert!(error.to_string().starts_with("no model in the zoo"), "{error}");
    for name in ["a.onnx", "b.onnx"] {
        std::fs::write(zoo.path().join(name), "<html>not here</html>").unwrap();
    }
    let found = try_look(zoo.path(), CatalogWriting::Write).unwrap();
    let error = found.verdict(Strictness::Lenient).unwrap_err();
    assert_eq!(error.exit_code(), 1);
    assert!(error.to_string().contains("all 2 files are rejected"), "{error}");
    assert!(error.hint_text().unwrap().starts_with("first: `a.onnx`: "), "{error:?}");
    let names: Vec<_> =
        std::fs::read_dir(zoo.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
}

#[test]
fn the_catalog_has_the_same_bytes_for_any_number_of_workers() {
    let bytes = |jobs: usize| {
        let zoo = temp_dir();
        copy(&bundled(), zoo.path(), &[".onnx", ".yaml"]);
        std::fs::write(zoo.path().join("bad.onnx"), "x").unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(jobs).build().unwrap();
        pool.install(|| try_look(zoo.path(), CatalogWriting::Write)).unwrap();
        let first = std::fs::read(zoo.path().join("catalog.json")).unwrap();
        pool.install(|| try_look(zoo.path(), CatalogWriting::Write)).unwrap();
        assert_eq!(first, std::fs::read(zoo.path().join("catalog.json")).unwrap());
        first
    };
    let one = bytes(1);
    assert!(!String::from_utf8_lossy(&one).contains("/tmp"));
    assert_eq!(one, bytes(4));
}

#[test]
fn a_model_is_known_by_the_hash_of_its_file_and_of_its_external_data() {
    let Some(edge) = shared("data/zoo_edge") else { return };
    let zoo = temp_dir();
    copy(&edge, zoo.path(), &["edge_external_data.onnx", "edge_external_data.onnx.data"]);
    let found = look(zoo.path());
    assert_eq!(found.models[0].external_files, ["edge_external_data.onnx.data"]);
    let before = found.models[0].spec.sha.clone();
    let data = zoo.path().join("edge_external_data.onnx.data");
    let mut bytes = std::fs::read(&data).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&data, bytes).unwrap();
    assert_ne!(look(zoo.path()).models[0].spec.sha, before);
    std::fs::remove_file(&data).unwrap();
    let found = look(zoo.path());
    assert!(found.rejected[0].reason.contains("edge_external_data.onnx.data"), "{found:?}");
}

/// Ingests `TEST_CHILD_ZOO` and prints the table and the peak memory; does nothing in a normal run.
#[test]
fn child_that_ingests_and_prints_its_peak_memory() {
    let Ok(zoo) = std::env::var("TEST_CHILD_ZOO") else { return };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let found = pool.install(|| look(Path::new(&zoo)));
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    eprintln!("{}", ingest_output::table(&found));
    println!("INGESTED {} {}", found.models.len(), peak.split_whitespace().nth(1).unwrap());
}

#[cfg(target_os = "linux")]
#[test]
fn a_thousand_models_ingest_with_flat_memory() {
    let model = bundled().join("ss_001_glyphs_conv4_32.onnx");
    let peak = |count: usize| -> u64 {
        let zoo = temp_dir();
        for index in 0..count {
            std::fs::copy(&model, zoo.path().join(format!("m{index:04}.onnx"))).unwrap();
        }
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["zoo::child_that_ingests_and_prints_its_peak_memory", "--exact", "--nocapture"])
            .env("TEST_CHILD_ZOO", zoo.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = text.lines().find_map(|line| line.split_once("INGESTED ")).unwrap().1.to_owned();
        let numbers: Vec<u64> = line.split_whitespace().map(|n| n.parse().unwrap()).collect();
        assert_eq!(numbers[0], count as u64);
        numbers[1]
    };
    let (few, many) = (peak(50), peak(1000));
    eprintln!("peak memory: 50 models {few} kB, 1000 models {many} kB");
    // A model's weights are 110 kB, so keeping them would cost 100 MB; catalog entries are 3 kB.
    assert!(many < few + 16 * 1024, "{few} kB with 50 models, {many} kB with 1000");
}

#[test]
fn the_sidecar_schema_accepts_every_real_sidecar_and_refuses_wrong_ones() {
    let schema: serde_json::Value = serde_json::from_str(
        &std::fs::read_to_string(repository().join("schemas/sidecar.schema.json")).unwrap(),
    )
    .unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let mut folders = vec![bundled()];
    folders.extend(ZOOS.iter().filter_map(|(zoo, _)| shared(&format!("data/{zoo}"))));
    let mut checked = 0;
    for folder in folders {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "yaml") {
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let json = to_json(serde_yaml::from_str(&text).unwrap());
            let errors: Vec<String> =
                validator.iter_errors(&json).map(|error| error.to_string()).collect();
            assert!(errors.is_empty(), "{}: {errors:?}", path.display());
            // What the type writes, the schema accepts and the type reads back.
            let sidecar = Sidecar::parse(&text, &path).unwrap();
            let again = serde_json::to_value(&sidecar).unwrap();
            assert!(validator.is_valid(&again), "{}", path.display());
            let text = serde_yaml::to_string(&sidecar).unwrap();
            assert_eq!(Sidecar::parse(&text, &path).unwrap(), sidecar);
            checked += 1;
        }
    }
    assert!(checked >= 12, "{checked}");
    for wrong in [
        r#"{}"#,
        r#"{"schema_version": 2}"#,
        r#"{"schema_version": 1, "preproces": {}}"#,
        r#"{"schema_version": 1, "preprocess": {"layout": "nhcw"}}"#,
        r#"{"schema_version": 1, "preprocess": {"input_size": [3, 32]}}"#,
        r#"{"schema_version": 1, "id2label": {"a": "b"}}"#,
        r#"{"schema_version": 1, "endpoint": {}}"#,
        r#"{"schema_version": 1, "model_sha": "abc"}"#,
        r#"{"schema_version": 1, "max_batch_size": 0}"#,
    ] {
        let json: serde_json::Value = serde_json::from_str(wrong).unwrap();
        assert!(!validator.is_valid(&json), "{wrong}");
    }
}

/// YAML with integer keys as JSON.
fn to_json(value: serde_yaml::Value) -> serde_json::Value {
    match value {
        serde_yaml::Value::Mapping(map) => map
            .into_iter()
            .map(|(key, value)| {
                let key = match key {
                    serde_yaml::Value::String(text) => text,
                    other => serde_yaml::to_string(&other).unwrap().trim().to_owned(),
                };
                (key, to_json(value))
            })
            .collect::<serde_json::Map<_, _>>()
            .into(),
        serde_yaml::Value::Sequence(list) => list.into_iter().map(to_json).collect(),
        other => serde_json::to_value(other).unwrap(),
    }
}

#[test]
fn the_catalog_and_the_ingest_object_satisfy_their_schemas() {
    let found = look(&bundled());
    let catalog = Catalog::new(&found.zoo, &found.models, &found.rejected);
    for (name, value) in [
        ("catalog", serde_json::to_value(&catalog).unwrap()),
        ("ingest", serde_json::to_value(ingest_output::output(&found)).unwrap()),
    ] {
        let path = repository().join(format!("schemas/{name}.schema.json"));
        let schema: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let validator = jsonschema::validator_for(&schema).unwrap();
        let errors: Vec<String> =
            validator.iter_errors(&value).map(|error| error.to_string()).collect();
        assert!(errors.is_empty(), "{name}: {errors:?}");
    }
}

#[test]
fn the_table_shows_what_is_inferred_and_why_files_are_rejected() {
    let zoo = temp_dir();
    for name in ["edge_nhwc_uint8.onnx", "edge_int8_qdq.onnx", "edge_int8_qdq.yaml"] {
        std::fs::copy(bundled().join(name), zoo.path().join(name)).unwrap();
    }
    std::fs::write(zoo.path().join("bad.onnx"), "<!DOCTYPE html><html></html>").unwrap();
    let table = ingest_output::table(&look(zoo.path()));
    insta::assert_snapshot!(table);
    let sheet = ingest_output::sheet(&look(zoo.path()).models[1]);
    assert!(sheet.contains("preprocess.layout"), "{sheet}");
    assert!(
        sheet.lines().any(|l| l.starts_with("preprocess.layout") && l.ends_with("inferred")),
        "{sheet}"
    );
}

#[test]
fn colour_and_range_are_inferred_only_where_the_graph_shows_them() {
    let Some(edge) = shared("data/zoo_edge") else { return };
    let bare = temp_dir();
    copy(&edge, bare.path(), &["bgr_float255.onnx", "size28.onnx"]);
    let found = look(bare.path());
    let models = by_id(&found);
    let bgr = models["edge_bgr_float255"];
    assert_eq!(bgr.spec.preprocess.color, Color::Bgr);
    assert_eq!(bgr.provenance["preprocess.color"], Provenance::Inferred);
    assert_eq!(bgr.provenance["preprocess.mean"], Provenance::Inferred);
    let plain = models["edge_size28"];
    assert_eq!(plain.provenance["preprocess.color"], Provenance::Default);
    assert_eq!(plain.provenance["preprocess.mean"], Provenance::Default);
    assert!(plain.notes.iter().any(|note| note.contains("normalisation unknown")));
}

/// Ingests with first contact in child processes of the real binary.
fn look_closely(zoo: &Path) -> Ingest {
    let probe = ProbeOptions {
        executable: env!("CARGO_BIN_EXE_metazoa").into(),
        library: runtime().library().path.clone(),
    };
    let options = IngestOptions {
        zoo: zoo.to_path_buf(),
        catalog: CatalogWriting::Skip,
        probe: Some(probe),
        reach: Reach::AsFound,
    };
    ingest(&Context::silent(0), &options).unwrap()
}

#[test]
fn black_box_models_are_tried_out_in_onnx_runtime_at_ingest() {
    let zoo = temp_dir();
    copy(
        &bundled(),
        zoo.path(),
        &["edge_int8_qdq.onnx", "edge_int8_qdq.yaml", "edge_softmax.onnx"],
    );
    std::fs::write(zoo.path().join("edge_softmax.yaml"), "schema_version: 1\naccess: black-box\n")
        .unwrap();
    let untried = look(zoo.path());
    let note = |found: &Ingest, text: &str| {
        found.models.iter().filter(|m| m.notes.iter().any(|n| n.contains(text))).count()
    };
    assert_eq!(note(&untried, "not tried in ONNX Runtime"), 2);
    let tried = look_closely(zoo.path());
    assert_eq!(tried.rejected, []);
    assert_eq!(note(&tried, "not tried"), 0);
    for model in &tried.models {
        assert_eq!(model.spec.access, Access::BlackBox);
        assert!(!model.spec.batch_dependent, "{}", model.spec.id);
    }

    // Nothing but running it tells that a black-box model cannot be run.
    let broken = break_operator(&std::fs::read(bundled().join("edge_softmax.onnx")).unwrap());
    std::fs::write(zoo.path().join("edge_softmax.onnx"), broken).unwrap();
    let found = look_closely(zoo.path());
    assert_eq!(found.rejected.len(), 1, "{}", ingest_output::table(&found));
    assert_eq!(found.rejected[0].path, "edge_softmax.onnx");
    assert!(found.rejected[0].reason.contains("ONNX Runtime"), "{:?}", found.rejected);
}

/// The model with the first `MaxPool` renamed to an operator that does not exist.
fn break_operator(bytes: &[u8]) -> Vec<u8> {
    // NodeProto.op_type: field 4, length 7.
    let field = b"\x22\x07MaxPool";
    let at = bytes.windows(field.len()).position(|window| window == field).unwrap();
    let mut broken = bytes.to_vec();
    broken[at + 2..at + 9].copy_from_slice(b"NoxPool");
    broken
}

/// Image -> conv 3x3 (4 channels) -> `pool` -> flatten -> dense (`features` to 6) -> `tail`.
fn classifier(image: &[Dimension], pool: Node, features: usize, tail: &[Node]) -> Graph {
    let ones = |shape: &[usize]| {
        std::sync::Arc::new(ConstantTensor::f32(shape, vec![0.5; shape.iter().product()]))
    };
    let mut nodes = vec![
        Node::new("Conv", "conv", &["x", "w"], &["c"])
            .with("pads", Attribute::Ints(vec![1; 4]))
            .with("kernel_shape", Attribute::Ints(vec![3, 3])),
        pool,
        Node::new("Flatten", "flatten", &["p"], &["f"]),
        Node::new("Gemm", "head", &["f", "h"], &["scores"]),
    ];
    nodes.extend_from_slice(tail);
    let free = Dimension::Symbol("n".into());
    let (name, dtype, shape) = match tail.last() {
        Some(node) => (node.outputs[0].clone(), DataType::Int64, vec![free]),
        None => ("scores".into(), DataType::Float32, vec![free, Dimension::Fixed(6)]),
    };
    Graph {
        name: "test".into(),
        opset: 17,
        inputs: vec![Port {
            name: "x".into(),
            dtype: DataType::Float32,
            shape: Some(image.to_vec()),
        }],
        outputs: vec![Port { name, dtype, shape: Some(shape) }],
        nodes,
        constants: [("w".to_owned(), ones(&[4, 3, 3, 3])), ("h".to_owned(), ones(&[features, 6]))]
            .into(),
    }
}

fn max_pool() -> Node {
    Node::new("MaxPool", "pool", &["c"], &["p"])
        .with("kernel_shape", Attribute::Ints(vec![4, 4]))
        .with("strides", Attribute::Ints(vec![4, 4]))
}

fn ingest_graph(graph: &Graph) -> CatalogModel {
    let zoo = temp_dir();
    write(&zoo.path().join("m.onnx"), graph, &ExportInfo::new(BTreeMap::new())).unwrap();
    let found = look(zoo.path());
    assert_eq!(found.rejected, []);
    found.models.into_iter().next().unwrap()
}

#[test]
fn an_open_image_size_is_fitted_to_the_network() {
    let symbol = |name: &str| Dimension::Symbol(name.into());
    let open = [symbol("n"), Dimension::Fixed(3), symbol("h"), symbol("w")];
    // 64 -> 16x16 after the pool, 4 channels: 1024 features. No other usual size gives that.
    let model = ingest_graph(&classifier(&open, max_pool(), 1024, &[]));
    assert_eq!(model.spec.preprocess.input_size, [3, 64, 64]);
    assert_eq!(model.provenance["preprocess.input_size"], Provenance::Inferred);
    assert_eq!(model.spec.access, Access::WhiteBox);
    assert!(model.notes.iter().any(|note| note.contains("64 is the first usual one")));
    // With global pooling every size fits; the usual default is taken and said.
    let global = Node::new("GlobalAveragePool", "pool", &["c"], &["p"]);
    let model = ingest_graph(&classifier(&open, global, 4, &[]));
    assert_eq!(model.spec.preprocess.input_size, [3, 224, 224]);
    assert_eq!(model.provenance["preprocess.input_size"], Provenance::Default);
    assert!(model.notes.iter().any(|note| note.contains("224 is assumed")));
}

#[test]
fn a_model_that_gives_only_labels_is_read_behind_its_argmax() {
    let image: Vec<Dimension> = [2, 3, 32, 32].map(Dimension::Fixed).into();
    let argmax = Node::new("ArgMax", "best", &["scores"], &["label"])
        .with("axis", Attribute::Int(1))
        .with("keepdims", Attribute::Int(0));
    let model = ingest_graph(&classifier(&image, max_pool(), 256, &[argmax]));
    assert_eq!(model.spec.access, Access::WhiteBox);
    assert_eq!(model.spec.logits_output, "scores");
    assert_eq!((model.spec.output_kind, model.spec.classes), (OutputKind::Logits, 6));
    assert_eq!(model.spec.batch, metazoa::zoo::BatchDimension::Fixed(2));
}

#[test]
fn an_operator_outside_the_set_is_listed_and_the_model_falls_to_black_box() {
    let image: Vec<Dimension> = [1, 3, 32, 32].map(Dimension::Fixed).into();
    let odd = Node::new("GRU", "pool", &["c", "c"], &["p"]);
    let model = ingest_graph(&classifier(&image, odd, 256, &[]));
    assert_eq!(model.spec.access, Access::BlackBox);
    assert_eq!(model.spec.unsupported_ops, ["GRU"]);
    assert!(model.notes[0].contains("GRU") || model.notes[1].contains("GRU"));
}
