//! Settings of meta-training as a user meets them: the built binary on two models of the bundled zoo.

use serde_json::Value;

use metazoa::meta::{Backbone, MetaModel};

use crate::main_job::{CONV4, kill_and_resume, small_zoo, train};
use crate::support::{run_in, temp_dir};

#[test]
fn classes_of_one_name_are_merged_when_the_settings_say_so() {
    let dir = temp_dir();
    let zoo = small_zoo(dir.path(), &CONV4);
    // The second model gets the first one's names; two classes in all would be merged by chance otherwise.
    let sidecar = |name: &str| zoo.join(format!("{name}.yaml"));
    let names = |name: &str| {
        let text = std::fs::read_to_string(sidecar(name)).unwrap();
        let line = text.lines().find(|line| line.starts_with("id2label")).unwrap();
        (line.to_owned(), text.clone())
    };
    let ((wanted, _), (own, text)) = (names(CONV4[0]), names(CONV4[1]));
    std::fs::write(sidecar(CONV4[1]), text.replace(&own, &wanted)).unwrap();
    let ten_ways = ["-s", "meta.steps=2", "-s", "meta.way=10"];
    let apart = train(dir.path(), "apart", &ten_ways);
    assert_eq!(apart.code, 0, "{}", apart.stderr);
    let by_name = ["-s", "meta.merge_classes=by-name"];
    let refused = train(dir.path(), "ten", &[&ten_ways[..], &by_name].concat());
    assert_eq!((refused.code, refused.stdout.as_str()), (1, ""));
    assert!(refused.stderr.contains("10 classes count as 5"), "{}", refused.stderr);
    assert!(refused.stderr.contains("the bank has `5`"), "{}", refused.stderr);
    // Each class now has the six images of both models.
    let wide = ["-s", "meta.steps=2", "-s", "meta.shot=6", "-s", "meta.query=6"];
    let merged = train(dir.path(), "five", &[&wide[..], &by_name].concat());
    let result: Value = serde_json::from_str(&merged.stdout).expect(&merged.stderr);
    assert_eq!((merged.code, &result["stop_reason"]), (0, &Value::from("done")));
}

fn events(run: &std::path::Path, stage: &str) -> Vec<Value> {
    let log = std::fs::read_to_string(run.join("events.jsonl")).unwrap();
    let events = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    events.filter(|event| event["stage"] == stage).collect()
}

/// Half of the ten classes are held out; every checkpoint has the result of a check.
const CHECKED: [&str; 2] = ["-s", "meta.early_stop={share: 0.5, every: 5, patience: 1000}"];

#[test]
fn a_killed_run_with_pseudo_validation_resumes_to_the_same_bytes() {
    let dir = kill_and_resume(&CHECKED);
    let checks = events(&dir.path().join("whole"), "validate");
    let steps: Vec<u64> = checks.iter().map(|event| event["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=8).map(|n| 5 * n).collect::<Vec<_>>());
    let kept = dir.path().join("whole/ckpt/step-40.safetensors");
    let kept = metazoa::tensor::TensorStore::load(&kept).unwrap();
    let best = |event: &&Value| event["accuracy"] == event["best"];
    let newest = checks.iter().rfind(best).unwrap();
    assert!(kept.number::<u64>("early_stop.step").unwrap() <= newest["step"].as_u64().unwrap());
    assert_eq!(kept.tensors["conv1.weight"], kept.tensors["best.conv1.weight"]);
}

#[test]
fn a_killed_run_with_pseudo_validation_and_moving_images_resumes_to_the_same_bytes() {
    let purer = ["--method=purer", "-s", "curriculum.warm_up=4", "-s", "curriculum.patience=2"];
    kill_and_resume(&[&CHECKED[..], &purer].concat());
}

#[test]
fn a_run_that_stops_early_says_so_and_stays_so() {
    let dir = temp_dir();
    small_zoo(dir.path(), &CONV4);
    for method in ["inversion", "purer"] {
        let stop = ["-s", "meta.early_stop={share: 0.5, every: 1, patience: 1}"];
        let more = ["-s", "meta.steps=40", "--method", method];
        let ran = train(dir.path(), method, &[&more[..], &stop].concat());
        let result: Value = serde_json::from_str(&ran.stdout).expect(&ran.stderr);
        assert_eq!(result["stop_reason"], "early-stop", "{result}");
        let steps = result["steps"].as_u64().unwrap();
        assert!((2..40).contains(&steps), "{steps}");
        let best = &result["pseudo_validation"];
        assert_eq!(best["step"], steps - 1, "one check without a new best: {result}");
        let run = dir.path().join(method);
        let check = events(&run, "validate").remove(steps as usize - 2);
        assert!(check["accuracy"] == best["accuracy"] && best["accuracy"].is_number());
        assert_eq!(events(&run, "validate").len() as u64, steps);
        let checkpoint = || {
            let path = run.join(format!("ckpt/step-{steps}.safetensors"));
            std::fs::read(path).unwrap()
        };
        let before = checkpoint();
        let again = run_in(dir.path(), &["train", "--out", method, "--resume", "--json"]);
        let again: Value = serde_json::from_str(&again.stdout).expect(&again.stderr);
        assert_eq!((&again["stop_reason"], &again["steps"]), (&"early-stop".into(), &steps.into()));
        assert!(checkpoint() == before, "resuming changed the checkpoint");
    }
    for (value, said) in [
        ("meta.early_stop.share=1", "`meta.early_stop.share` must be between 0 and 1"),
        ("meta.early_stop.every=0", "`meta.early_stop.every`"),
        ("meta.early_stop.patient=1", "did you mean `patience`"),
        ("meta.early_stop.share=0.2", "hold out 2 of 10 classes"),
    ] {
        let refused = train(dir.path(), "refused", &["-s", value]);
        assert!(refused.code != 0 && refused.stderr.contains(said), "{}", refused.stderr);
    }
}

#[test]
fn the_time_of_a_meta_update_is_told_by_its_parts() {
    let dir = temp_dir();
    small_zoo(dir.path(), &CONV4);
    let settings = ["-s", "meta.steps=20", "-s", "meta.learner=maml", "--method=purer"];
    let harden = ["-s", "curriculum.warm_up=4", "-s", "meta.early_stop={share: 0.5, every: 10}"];
    let ran = train(dir.path(), "r", &[&settings[..], &harden].concat());
    let result: Value = serde_json::from_str(&ran.stdout).expect(&ran.stderr);
    let parts = &result["seconds"]["parts"];
    assert_eq!(parts["updates"], 20);
    let names = ["inner", "outer", "inversion", "hardening", "validation"];
    let seconds = names.map(|name| parts[name].as_f64().unwrap());
    assert!(seconds.iter().all(|s| *s > 0.0), "{parts}");
    let (sum, meta) = (seconds.iter().sum::<f64>(), result["seconds"]["meta"].as_f64().unwrap());
    assert!(sum <= meta && sum > 0.3 * meta, "{sum} of {meta} s");
    let record = std::fs::read_to_string(dir.path().join("r/run.json")).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    assert_eq!(record["meta_updates"], 20);
    for (name, s) in names.iter().zip(seconds) {
        assert_eq!(record["seconds"][format!("meta-{name}")].as_f64(), Some(s), "{name}");
    }
    // Two lines of the log, each the mean of its ten updates.
    let lines = events(&dir.path().join("r"), "seconds");
    let inner: f64 = lines.iter().map(|line| line["meta-inner"].as_f64().unwrap()).sum();
    assert!(lines.len() == 2 && (10.0 * inner - seconds[0]).abs() < 1e-9, "{lines:?}");
    assert_eq!(run_in(dir.path(), &["report", "r"]).code, 0);
    let page = std::fs::read_to_string(dir.path().join("r/report.html")).unwrap();
    assert!(page.contains("meta-inversion, s") && page.contains("ms an update"), "{page}");
}

#[test]
fn training_may_start_from_the_mean_of_its_teachers() {
    let dir = temp_dir();
    // The black box among them has no weights to average.
    let zoo = small_zoo(dir.path(), &[CONV4[0], "ss_028_glyphs_conv4_32", "edge_int8_qdq"]);
    let few = [
        "-s",
        "meta.steps=3",
        "-s",
        "recover.black_box.steps=1",
        "-s",
        "recover.black_box.directions=1",
    ];
    let mean = ["-s", "meta.start=mean-of-teachers"];
    let ran = train(dir.path(), "mean", &[&few[..], &mean].concat());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let open = |name: &str| {
        let network = Backbone::from_onnx(&zoo.join(format!("{name}.onnx")), [32, 32]).unwrap();
        Ok((name.to_owned(), network))
    };
    let networks = [CONV4[0], "ss_028_glyphs_conv4_32"].map(open).into_iter();
    let expected = Backbone::average(networks, [32, 32]).unwrap();
    let values = |network: &Backbone| -> Vec<Vec<f32>> {
        let weights = network.parameters().iter().map(|p| p.value.flatten_all().unwrap());
        let running = network.running().iter().flat_map(|r| [r.mean.clone(), r.variance.clone()]);
        weights.map(|value| value.to_vec1().unwrap()).chain(running).collect()
    };
    let start = MetaModel::load(&dir.path().join("mean/start.safetensors")).unwrap();
    assert_eq!(values(start.backbone()), values(&expected));
    // The trained network is near it, that of another start is not.
    let trained = |run: &str| {
        let path = dir.path().join(run).join("ckpt/step-3.safetensors");
        values(MetaModel::load(&path).unwrap().backbone())[0].clone()
    };
    let far = |run: &str| {
        let (own, mean) = (trained(run), values(&expected));
        own.iter().zip(&mean[0]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    assert_eq!(train(dir.path(), "random", &few).code, 0);
    assert!(0.0 < far("mean") && far("mean") < 0.01 && far("random") > 0.05);

    // Another width than theirs; and two architectures.
    let width = [&few[..], &mean, &["-s", "meta.width=16"]].concat();
    let refused = train(dir.path(), "width", &width);
    assert_eq!((refused.code, refused.stdout.as_str()), (1, ""));
    for words in
        ["`meta.backbone: conv4`", "ss_001_glyphs_conv4_32", "[16, 3, 3, 3]", "meta.start: random"]
    {
        assert!(refused.stderr.contains(words), "{words}: {}", refused.stderr);
    }
    small_zoo(dir.path(), &["sh_000_glyphs_conv4_64"]);
    let refused = train(dir.path(), "mixed", &[&few[..], &mean].concat());
    assert_eq!((refused.code, refused.stdout.as_str()), (1, ""));
    insta::assert_snapshot!(refused.stderr, @r"
    error: cannot start from the mean of teachers
      caused by: the models are of several architectures: `sh_000_glyphs_conv4_64` and `ss_001_glyphs_conv4_32`
    hint: set `meta.start: random`
    ");
    assert!(!dir.path().join("mixed").exists() && !dir.path().join("width").exists());
}
