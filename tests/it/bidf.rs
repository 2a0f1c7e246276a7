//! BiDf-MKD as a user runs it: models that are asked, budgets to the query, each of its parts left out.

use std::path::Path;

use candle_onnx::onnx::attribute_proto::AttributeType;
use candle_onnx::onnx::tensor_proto::DataType;
use candle_onnx::onnx::type_proto::{Tensor, Value};
use candle_onnx::onnx::{AttributeProto, ModelProto, NodeProto, TypeProto, ValueInfoProto};
use prost::Message;
use serde_json::Value as Json;

use crate::free::events;
use crate::main_job::{CONV4, kill_and_resume, small_zoo, train};
use crate::remote::{copy_model, model, outcome, said, serve_in};
use crate::serve::{Data, Server};
use crate::support::temp_dir;

/// A short run on two models that are asked.
const SHORT: [&str; 17] = [
    "--method=bidf-mkd",
    "-s",
    "access=black-box",
    "-s",
    "bidf.replay.patience=3",
    "-s",
    "five.images_per_class=4",
    "-s",
    "five.features=4",
    "-s",
    "five.steps=2",
    "-s",
    "five.models=2",
    "-s",
    "recover.black_box.directions=3",
    "-s",
    "bidf.sets_kept=4",
];
/// Queries of a visit to a model of five classes: two sets of 20 images, two steps of 3 directions, the answers.
const VISIT: u64 = 2 * 20 * (2 * 4 + 1);

fn ran(dir: &Path, name: &str, more: &[&str]) -> Json {
    let ran =
        train(dir, name, &[&SHORT[..], &["-s", "meta.steps=8", "--no-progress"], more].concat());
    assert_eq!(ran.code, 0, "{name}: {}", ran.stderr);
    serde_json::from_str(&ran.stdout).expect(&ran.stderr)
}

/// A file that answers with a label alone.
pub(crate) fn labels_only(zoo: &Path, name: &str) {
    let bytes = std::fs::read(model(CONV4[1])).unwrap();
    let mut file = ModelProto::decode(bytes.as_slice()).unwrap();
    let graph = file.graph.as_mut().unwrap();
    let scores = graph.output[0].name.clone();
    let attribute = |name: &str, value: i64| AttributeProto {
        name: name.into(),
        r#type: AttributeType::Int.into(),
        i: value,
        ..AttributeProto::default()
    };
    graph.node.push(NodeProto {
        op_type: "ArgMax".into(),
        input: vec![scores],
        output: vec!["label".into()],
        attribute: vec![attribute("axis", 1), attribute("keepdims", 0)],
        ..NodeProto::default()
    });
    let tensor_type = Value::TensorType(Tensor { elem_type: DataType::Int64.into(), shape: None });
    graph.output = vec![ValueInfoProto {
        name: "label".into(),
        r#type: Some(TypeProto { value: Some(tensor_type), ..TypeProto::default() }),
        ..ValueInfoProto::default()
    }];
    std::fs::write(zoo.join(format!("{name}.onnx")), file.encode_to_vec()).unwrap();
    let said = said(CONV4[1])
        .replace("output_kind: logits", "output_kind: labels")
        .replace("logits_output: logits", "logits_output: label");
    let sidecar = format!("schema_version: 1\n{said}");
    std::fs::write(zoo.join(format!("{name}.yaml")), sidecar).unwrap();
}

#[test]
fn a_killed_run_of_bidf_mkd_resumes_to_the_bytes_of_an_uninterrupted_one() {
    let dir = kill_and_resume(&SHORT);
    let run = dir.path().join("whole");
    let rounds = events(&run, "round");
    assert!(rounds.len() > 4, "{}", rounds.len());
    let spent: Vec<f64> = rounds.iter().map(|e| e["queries"].as_f64().unwrap()).collect();
    assert!(spent.windows(2).all(|pair| pair[1] - pair[0] == 2.0 * VISIT as f64), "{spent:?}");
    assert!(events(&run, "distil").iter().all(|e| e["plain"].is_number()));
    // Two models, two visits of two sets each.
    assert_eq!(std::fs::read_dir(run.join("memory")).unwrap().count(), 8);
}

#[test]
fn bidf_mkd_does_without_each_of_its_parts() {
    let dir = temp_dir();
    small_zoo(dir.path(), &CONV4);
    for (name, own) in [
        ("outer", "bidf.levels=outer"),
        ("off", "bidf.levels=off"),
        ("no-replay", "bidf.replay=null"),
        ("mix", "bidf.replay={mix: {space: features}}"),
        ("pixels", "bidf.replay={mix: {space: pixels, alpha: 1}}"),
        ("soft", "bidf.replay={distillation: {temperature: 2}}"),
        ("knowledge", "bidf={choice: knowledge, depth: 2}"),
        ("no-boundary", "five.boundary_weight=0"),
        ("l1", "bidf.boundary_distance=logit-l1"),
        ("linear", "bidf.distillation.kd_loss=linear"),
        ("maml", "meta.learner=maml"),
        ("anil", "meta.learner=anil"),
        ("white", "access=auto"),
    ] {
        let result = ran(dir.path(), name, &["-s", own]);
        let run = dir.path().join(name);
        assert_eq!(
            (&result["method"], &result["steps"]),
            (&"bidf-mkd".into(), &8.into()),
            "{name}"
        );
        let rounds = events(&run, "round").len() as u64;
        let queries = if name == "white" { 0 } else { 2 * VISIT * rounds };
        assert_eq!(result["queries"], queries, "{name}");
        assert_eq!(events(&run, "distil").is_empty(), name == "off", "{name}");
        for model in result["models"].as_array().unwrap() {
            assert_eq!((&model["stop_reason"], &model["images"]), (&"done".into(), &30.into()));
        }
    }
}

/// The paper's generator, drawn anew for each set, and its L1 boundary from some update on.
#[test]
fn a_generator_of_each_sets_own_costs_what_it_says() {
    let dir = temp_dir();
    small_zoo(dir.path(), &CONV4);
    let own = [
        "-s",
        "bidf.generator=fresh",
        "-s",
        "recover.black_box.steps=3",
        "-s",
        "recover.black_box.features=4",
        "-s",
        "recover.black_box.best=surrogate",
        "-s",
        "bidf.boundary_after=2",
    ];
    let result = ran(dir.path(), "fresh", &own);
    let rounds = events(&dir.path().join("fresh"), "round").len() as u64;
    assert_eq!(result["queries"], 2 * rounds * 2 * 20 * (3 * 4 + 1));
}

/// The run's budget is spent by whole visits, never beyond it; then the memory is all there is.
#[test]
fn a_budget_of_the_run_ends_the_visits_and_not_the_run() {
    let dir = temp_dir();
    small_zoo(dir.path(), &CONV4);
    for (name, budget, visits, more) in [
        ("two", 2 * VISIT + VISIT / 2, 2, ["-s", "meta.steps=8"]),
        ("exact", 3 * VISIT, 3, ["-s", "meta.steps=20"]),
        ("no-replay", 2 * VISIT, 2, ["-s", "bidf.replay=null"]),
    ] {
        let budget = budget.to_string();
        let args = [&more[..], &["--budget", &budget]].concat();
        let result = ran(dir.path(), name, &args);
        assert_eq!(result["queries"], visits * VISIT, "{name}");
        let run = dir.path().join(name);
        assert_eq!(events(&run, "visit").len() as u64, visits, "{name}");
        for model in result["models"].as_array().unwrap() {
            assert_eq!(model["stop_reason"], "budget-spent", "{name}: {model}");
        }
        let reason = if name == "no-replay" { "budget-spent" } else { "done" };
        assert_eq!(result["stop_reason"], reason, "{name}");
    }
    let poor = train(dir.path(), "poor", &[&SHORT[..], &["--budget", "100"]].concat());
    assert!(poor.code != 0 && poor.stderr.contains("covers no visit"), "{}", poor.stderr);
}

/// An int8 file, two served models of which one dies, one that tells labels only, one with a small budget of its own: one
/// run, and each server has seen what the run reports.
#[test]
fn a_mixed_zoo_is_learned_from_in_one_run() {
    let dir = temp_dir();
    let zoo = dir.path().join("zoo");
    copy_model(&zoo, CONV4[0], "a_scores", "");
    copy_model(&zoo, CONV4[1], "b_poor", &format!("query_budget: {}\n", VISIT + 10));
    for extension in ["onnx", "yaml"] {
        let from = model("edge_int8_qdq").with_extension(extension);
        let to = zoo.join(format!("edge_int8_qdq.{extension}"));
        std::fs::copy(from, to).unwrap();
    }
    labels_only(&zoo, "l_labels");
    let servers: Vec<Server> =
        (0..2).map(|_| Server::start(&model(CONV4[0]), "m", Data::Json)).collect();
    serve_in(&zoo, &servers[0], "d_served", "");
    serve_in(&zoo, &servers[1], "e_dying", "");
    servers[1].die_after(100);
    let result = ran(dir.path(), "run", &["-s", "meta.steps=60", "-s", "bidf.choice=uniform"]);
    for (id, stop) in [
        ("a_scores", "done"),
        ("b_poor", "budget-spent"),
        ("edge_int8_qdq", "done"),
        ("d_served", "done"),
        ("e_dying", "failed"),
        ("l_labels", "done"),
    ] {
        let row = outcome(&result, id);
        assert_eq!(row["stop_reason"], stop, "{row}");
        let whole = row["queries"].as_u64().unwrap().is_multiple_of(VISIT);
        assert_eq!(whole, id != "e_dying", "{row}");
        assert_eq!(row["images"].as_u64().unwrap() > 0, id != "e_dying", "{row}");
    }
    assert_eq!(outcome(&result, "b_poor")["queries"], VISIT);
    for (id, server) in [("d_served", &servers[0]), ("e_dying", &servers[1])] {
        assert_eq!(outcome(&result, id)["queries"], server.queries(), "{id}");
    }
}

#[test]
fn what_bidf_mkd_cannot_do_is_said_before_anything_is_asked() {
    let dir = temp_dir();
    small_zoo(dir.path(), &CONV4);
    for (value, said) in [
        ("bidf.sets_kept=1", "`bidf.sets_kept`"),
        ("bidf.depth=0", "`bidf.depth`"),
        ("bidf.distillation.temperature=0", "`bidf.distillation.temperature`"),
        ("bidf.replay={mix: {alpha: 0}}", "`bidf.replay.mix.alpha`"),
        ("bidf.replay={distillation: {weight: 3}}", "`bidf.replay.distillation.weight`"),
        ("bidf={replay: null, levels: off}", "nothing is learned"),
        ("meta.early_stop={share: 0.5}", "`meta.early_stop`"),
        ("meta.merge_classes=by-name", "`meta.merge_classes`"),
    ] {
        let refused = train(dir.path(), "refused", &[&SHORT[..], &["-s", value]].concat());
        assert!(refused.code != 0 && refused.stderr.contains(said), "{value}: {}", refused.stderr);
        assert!(!dir.path().join("refused/queries").exists(), "{value}");
    }
    // More classes an episode than all models have: told, not visited for ever.
    let args = [&SHORT[..], &["-s", "meta.way=20", "-s", "bidf.levels=off"]].concat();
    let refused = train(dir.path(), "many", &args);
    assert!(refused.code != 0 && refused.stderr.contains("20-way"), "{}", refused.stderr);
}
