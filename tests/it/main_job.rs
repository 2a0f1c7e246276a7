//! The main job as a user drives it: the built binary on models of the bundled zoo.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::{metazoa, repository, run_in, temp_dir};

/// Copies models (and their sidecars) of the bundled zoo into `DIR/zoo`.
pub(crate) fn small_zoo(dir: &Path, names: &[&str]) -> PathBuf {
    let zoo = dir.join("zoo");
    std::fs::create_dir_all(&zoo).unwrap();
    for name in names {
        for extension in ["onnx", "yaml"] {
            let file = format!("{name}.{extension}");
            std::fs::copy(repository().join("zoo").join(&file), zoo.join(&file)).unwrap();
        }
    }
    zoo
}

pub(crate) const CONV4: [&str; 2] = ["ss_001_glyphs_conv4_32", "ss_011_glyphs_conv4_32"];
/// Settings that make a run of seconds.
const QUICK: [&str; 8] = [
    "-s",
    "recover.images_per_class=6",
    "-s",
    "recover.white_box.steps=3",
    "-s",
    "meta.shot=2",
    "-s",
    "meta.query=3",
];

pub(crate) fn train(dir: &Path, out: &str, more: &[&str]) -> crate::support::Ran {
    let mut args = vec!["train", "zoo", "--out", out, "--json"];
    args.extend(QUICK);
    args.extend(more);
    run_in(dir, &args)
}

/// The bytes of everything in a run folder that must not depend on time or threads.
fn bytes_of_run(run: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let folders = ["bank", "ckpt", "memory", "pixels"].map(|name| run.join(name));
    for folder in folders.iter().filter(|folder| folder.exists()) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(run).unwrap().display().to_string();
            found.insert(name, std::fs::read(path).unwrap());
        }
    }
    found
}

#[test]
fn the_same_seed_gives_the_same_bytes_for_any_number_of_jobs() {
    let dir = temp_dir();
    small_zoo(dir.path(), &CONV4);
    for (out, jobs, seed) in [("one", "1", "3"), ("two", "2", "3"), ("other", "2", "4")] {
        let more = ["-s", "meta.steps=4", "--jobs", jobs, "--seed", seed];
        let ran = train(dir.path(), out, &more);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let result: Value = serde_json::from_str(&ran.stdout).unwrap();
        assert_eq!(result["models_used"], 2);
        assert_eq!(result["images"], 60);
        assert_eq!(result["stop_reason"], "done");
    }
    let one = bytes_of_run(&dir.path().join("one"));
    assert_eq!(one.len(), 5, "two models, a sheet, a checkpoint, latest: {:?}", one.keys());
    assert!(one == bytes_of_run(&dir.path().join("two")), "jobs changed the bytes");
    assert!(one != bytes_of_run(&dir.path().join("other")), "another seed gave the same bytes");
}

#[test]
fn a_killed_run_resumes_to_the_bytes_of_an_uninterrupted_one() {
    kill_and_resume(&[]);
}

/// With so little memory that the images of one model are always on disk.
#[test]
fn a_killed_run_with_moving_images_resumes_to_the_bytes_of_an_uninterrupted_one() {
    let dir = kill_and_resume(&[
        "--method=purer",
        "-s",
        "curriculum.memory_mib=0",
        "-s",
        "curriculum.candidates=1",
        "-s",
        "curriculum.warm_up=4",
        "-s",
        "curriculum.patience=2",
    ]);
    let log = std::fs::read_to_string(dir.path().join("whole/events.jsonl")).unwrap();
    let events = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let hard: Vec<Value> = events.filter(|event| event["stage"] == "harden").collect();
    assert!(hard.len() > 3, "{log}");
    assert_eq!(hard[0]["step"], 4);
    let climbed = hard.iter().filter(|e| e["after"].as_f64() > e["before"].as_f64()).count();
    assert!(10 * climbed >= 8 * hard.len(), "harder {climbed} of {} times", hard.len());
}

pub(crate) fn kill_and_resume(more: &[&str]) -> tempfile::TempDir {
    // In the middle of meta-training.
    kill_once_there(more, "ckpt/latest")
}

/// The same, killed once the file `sign` of the run folder is there.
pub(crate) fn kill_once_there(more: &[&str], sign: &str) -> tempfile::TempDir {
    let dir = temp_dir();
    small_zoo(dir.path(), &CONV4);
    let mut settings = vec!["-s", "meta.steps=40", "-s", "meta.checkpoint_every=5"];
    settings.extend(more);
    let settings = settings.as_slice();
    let whole = train(dir.path(), "whole", settings);
    assert_eq!(whole.code, 0, "{}", whole.stderr);
    let mut args = vec!["train", "zoo", "--out", "killed", "--json"];
    args.extend(QUICK);
    args.extend(settings);
    let mut child = std::process::Command::new(metazoa(dir.path()).get_program())
        .args(&args)
        .current_dir(dir.path())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let sign = dir.path().join("killed").join(sign);
    while !sign.exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let again = run_in(dir.path(), &["train", "--out", "killed", "--resume"]);
    assert_eq!(again.code, 0, "{}", again.stderr);
    let run = |name: &str| {
        let mut bytes = bytes_of_run(&dir.path().join(name));
        // Which older checkpoints are still there depends on the moment of the kill.
        bytes.retain(|name, _| !name.starts_with("ckpt/step-") || name.contains("step-40."));
        bytes
    };
    assert!(run("whole") == run("killed"), "resuming changed the bytes");
    dir
}

#[test]
fn the_main_job_evaluates_exports_and_reports() {
    let dir = temp_dir();
    small_zoo(dir.path(), &["ss_001_glyphs_conv4_32", "edge_int8_qdq"]);
    let data = repository().join("zoo/images/glyphs");
    let config = format!(
        "schema_version: 1\nzoo: zoo\nrecover:\n  images_per_class: 6\n  white_box: {{steps: 3}}\n  \
         black_box: {{steps: 2, directions: 2, features: 4}}\nmeta: {{steps: 20, shot: 2, query: 3}}\n\
         eval:\n  data: {}\n  split: meta_test\n  shots: [1, 5]\n  episodes: 20\n",
        data.display()
    );
    std::fs::write(dir.path().join("config.yaml"), config).unwrap();
    let ran = run_in(dir.path(), &["run", "config.yaml", "--out", "out", "--json"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let result: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(result["train"]["models_used"], 2);
    // Per step and image one query and two directions; one query more to judge each image.
    assert_eq!(result["train"]["queries"], 30 * (2 * 3 + 1));
    for evaluation in result["evaluations"].as_array().unwrap() {
        for baseline in ["untrained", "pixel-nearest", "pixel-prototype"] {
            assert!(evaluation["baselines"][baseline]["accuracy"].is_number(), "{baseline}");
        }
    }
    for export in result["exports"].as_array().unwrap() {
        assert!(export["max_abs_diff_ort"].as_f64().unwrap() < 1e-3, "{export}");
        assert!(dir.path().join(export["path"].as_str().unwrap()).is_file());
    }
    let report = std::fs::read_to_string(dir.path().join("out/report.html")).unwrap();
    assert!(report.contains("edge_int8_qdq") && report.contains("<svg"), "report is incomplete");
}

#[test]
fn every_learner_trains_evaluates_and_exports_what_it_can() {
    let dir = temp_dir();
    small_zoo(dir.path(), &CONV4);
    let data = repository().join("zoo/images/glyphs");
    let eval = [
        "--data",
        data.to_str().unwrap(),
        "--split",
        "meta_test",
        "--way",
        "4",
        "--episodes",
        "10",
    ];
    for (learner, backbone, episode) in
        [("maml", "conv4", false), ("anil", "conv4", true), ("protonet", "resnet10", true)]
    {
        let (learner_is, backbone_is) =
            (format!("meta.learner={learner}"), format!("meta.backbone={backbone}"));
        let steps = ["-s", "meta.steps=2", "-s", "meta.episodes_per_step=2"];
        let choice = ["-s", &learner_is, "-s", &backbone_is, "-s", "meta.inner.train_steps=2"];
        let ran = train(dir.path(), learner, &[steps.as_slice(), &choice].concat());
        assert_eq!(ran.code, 0, "{learner}: {}", ran.stderr);
        for bn in ["inductive", "transductive"] {
            let ran =
                run_in(dir.path(), &[&["eval", learner, "--json", "--bn", bn], &eval[..]].concat());
            assert_eq!(ran.code, 0, "{learner}: {}", ran.stderr);
            let result: Value = serde_json::from_str(&ran.stdout).unwrap();
            assert_eq!(result["bn"], bn);
            assert!(result["accuracy"].as_f64().unwrap() > 0.0, "{learner} {bn}");
        }
        if backbone == "conv4" {
            let args = [&["eval", learner, "--json", "--icfil"], &eval[..]].concat();
            let ran = run_in(dir.path(), &args);
            assert_eq!(ran.code, 0, "{learner}: {}", ran.stderr);
            let result: Value = serde_json::from_str(&ran.stdout).unwrap();
            let icfil = &result["icfil"];
            let number = |value: &Value| value.as_f64().unwrap();
            let gain = number(&icfil["accuracy"]) - number(&result["accuracy"]);
            assert!((gain - number(&icfil["gain"])).abs() < 1e-12, "{learner}: {result}");
        }
        let file = format!("{learner}-classifier.onnx");
        let ran = run_in(
            dir.path(),
            &["adapt", learner, data.to_str().unwrap(), "--split", "meta_test", "--out", &file],
        );
        assert_eq!(ran.code, 0, "{learner}: {}", ran.stderr);
        assert!(ran.stdout.contains("(inductive)"), "{}", ran.stdout);
        for (form, expressible) in [("embedding", true), ("episode", episode)] {
            let file = format!("{learner}-{form}.onnx");
            let ran = run_in(dir.path(), &["export", learner, "--form", form, "--out", &file]);
            assert_eq!(ran.code == 0, expressible, "{learner} {form}: {}", ran.stderr);
            assert_eq!(dir.path().join(&file).is_file(), expressible, "{file}");
            if !expressible {
                assert!(ran.stderr.contains("anil"), "{}", ran.stderr);
            }
        }
    }
}

#[test]
fn a_bad_zoo_or_data_folder_is_one_clear_error_and_leaves_nothing() {
    let dir = temp_dir();
    std::fs::create_dir(dir.path().join("zoo")).unwrap();
    let empty = train(dir.path(), "run", &[]);
    assert_eq!((empty.code, empty.stdout.as_str()), (1, ""), "{}", empty.stderr);
    assert!(empty.stderr.contains("no model in the zoo"), "{}", empty.stderr);
    let truncated = std::fs::read(repository().join("zoo/ss_001_glyphs_conv4_32.onnx")).unwrap();
    std::fs::write(dir.path().join("zoo/cut.onnx"), &truncated[..truncated.len() / 2]).unwrap();
    let bad = train(dir.path(), "run", &[]);
    assert_eq!(bad.code, 1, "{}", bad.stderr);
    assert!(bad.stderr.contains("no usable model") && bad.stderr.contains("cut.onnx"));
    assert!(!dir.path().join("run").exists(), "a refused zoo left a run folder");
    // Too few images a class: refused by the evaluation settings before any work.
    let images = dir.path().join("images/only_class");
    std::fs::create_dir_all(&images).unwrap();
    let config = "schema_version: 1\nzoo: zoo\neval: {data: images, episodes: 5}\n";
    std::fs::write(dir.path().join("config.yaml"), config).unwrap();
    let few = run_in(dir.path(), &["run", "config.yaml", "--out", "run"]);
    assert_eq!(few.code, 1, "{}", few.stderr);
    assert!(!dir.path().join("run").exists(), "refused evaluation images left a run folder");
}

#[test]
fn inspect_measures_the_engine_on_a_model() {
    let model = repository().join("zoo/mh_003_glyphs_resnet10.onnx");
    let args = ["inspect", &model.display().to_string(), "--check-gradient", "--json"];
    let ran = run_in(temp_dir().path(), &args);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let result: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(result["access"], "white-box");
    assert_eq!(result["norm_taps"], 12);
    assert!(result["output_rel_err"].as_f64().unwrap() < 1e-4, "{result}");
    assert!(result["gradient_rel_err"].as_f64().unwrap() < 1e-5, "{result}");
    assert!(result["peak_mib"].as_f64().unwrap() > 0.1);
}

#[test]
fn invert_writes_an_image_folder() {
    let dir = temp_dir();
    let model = repository().join("zoo/ss_001_glyphs_conv4_32.onnx");
    let model = model.display().to_string();
    let steps = "recover.white_box.steps=60";
    let args = ["invert", &model, "--per-class", "4", "--out", "out", "--json", "-s", steps];
    let ran = run_in(dir.path(), &args);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let result: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(result["images"], 20);
    assert!(result["agreement"].as_f64().unwrap() > 0.9, "{result}");
    let folders = std::fs::read_dir(dir.path().join("out"))
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().path().is_dir());
    assert_eq!(folders.count(), 5);
    assert!(dir.path().join("out/sheet.png").is_file());
    assert!(dir.path().join("out/loss.svg").is_file());
    let again = run_in(dir.path(), &args);
    assert_eq!(again.code, 1, "an occupied folder was taken");
}
