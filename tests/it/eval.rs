//! Evaluation: accuracies that can be worked out, independence of threads, the command.

use std::path::Path;

use metazoa::access::library::RuntimeOptions;
use metazoa::app::config::ExportForm;
use metazoa::app::config::{BackboneName, LearnerName};
use metazoa::app::embedder::OnnxEmbedder;
use metazoa::app::eval::{Baselines, Calibration, EvalOptions, evaluate};
use metazoa::app::export::export_run;
use metazoa::app::settings::untrained_model;
use metazoa::app::{BatchNorm, Context, Embedder, RunConfig, RunFolder};
use metazoa::data::EpisodeShape;
use metazoa::meta::{Backbone, BnMode};
use metazoa::tensor::{Images, RngStream};
use metazoa::{Result, onnx};

use crate::pictures::write_classes;
use crate::runs::{finished_run, record};
use crate::support::{run_in, runtime_options, temp_dir};

const CLASSES: [&str; 6] = ["ant", "bee", "cat", "dog", "elk", "fox"];

/// The mean colour of an image; transductive: minus the batch's mean.
struct MeanColor;

impl Embedder for MeanColor {
    fn image_size(&self) -> [usize; 2] {
        [16, 16]
    }

    fn dim(&self) -> usize {
        3
    }

    fn embed(&self, images: &Images, batch_norm: BatchNorm) -> Result<Vec<f32>> {
        let mut vectors: Vec<f32> =
            images.data().chunks_exact(256).map(|p| p.iter().sum::<f32>() / 256.0).collect();
        if batch_norm == BatchNorm::Transductive {
            assert_eq!(images.len(), 3 * (1 + 4), "support and queries come together");
            for channel in 0..3 {
                let of = |vectors: &[f32]| vectors.iter().skip(channel).step_by(3).sum::<f32>();
                let mean = of(&vectors) / images.len() as f32;
                vectors.iter_mut().skip(channel).step_by(3).for_each(|v| *v -= mean);
            }
        }
        Ok(vectors)
    }
}

/// The same vector for everything: the first class always wins.
struct Blind;

impl Embedder for Blind {
    fn image_size(&self) -> [usize; 2] {
        [16, 16]
    }

    fn dim(&self) -> usize {
        1
    }

    fn embed(&self, images: &Images, _: BatchNorm) -> Result<Vec<f32>> {
        Ok(vec![0.25; images.len()])
    }
}

fn options(data: &Path, batch_norm: BatchNorm) -> EvalOptions {
    EvalOptions {
        data: data.into(),
        split: None,
        shape: EpisodeShape { way: 3, shot: 1, query: 4 },
        episodes: 40,
        batch_norm,
        baselines: Baselines::All,
        real_data: None,
        calibration: Calibration::Skip,
        against: None,
    }
}

#[test]
fn classes_that_differ_in_colour_are_told_apart_by_colour_and_by_nothing_blind() {
    let here = temp_dir();
    write_classes(here.path(), &CLASSES, 6, [16, 16]);
    for batch_norm in [BatchNorm::Inductive, BatchNorm::Transductive] {
        let options = options(here.path(), batch_norm);
        let context = Context::silent(0);
        let (result, rows) =
            evaluate(&MeanColor, &[("untrained", &Blind)], &options, &context).unwrap();
        assert_eq!((result.accuracy, result.ci95), (1.0, 0.0));
        assert_eq!(rows.len(), 40);
        let blind = &result.baselines["untrained"];
        assert!((blind.accuracy - 1.0 / 3.0).abs() < 1e-12, "{blind:?}");
        assert!((blind.gain - 2.0 / 3.0).abs() < 1e-12 && blind.gain_ci95 < 1e-12);
        assert_eq!(result.baselines["pixel-prototype"].accuracy, 1.0);
    }
}

#[test]
fn the_same_seed_gives_the_same_rows_for_any_number_of_threads() {
    let here = temp_dir();
    write_classes(here.path(), &CLASSES, 6, [16, 16]);
    let rows = |threads: usize, seed: u64| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let options = options(here.path(), BatchNorm::Inductive);
        pool.install(|| evaluate(&MeanColor, &[], &options, &Context::silent(seed)).unwrap().1)
    };
    assert_eq!(rows(1, 5), rows(4, 5));
    assert_ne!(rows(1, 5), rows(1, 6));
}

#[test]
fn an_interrupted_evaluation_stops() {
    let here = temp_dir();
    write_classes(here.path(), &CLASSES, 6, [16, 16]);
    let context = Context::silent(0);
    context.interrupt.store(true, std::sync::atomic::Ordering::Relaxed);
    let options = options(here.path(), BatchNorm::Inductive);
    let error = evaluate(&MeanColor, &[], &options, &context).unwrap_err();
    assert_eq!(error.exit_code(), 130);
}

#[test]
fn an_exported_embedding_gives_the_vectors_of_its_network() {
    let here = temp_dir();
    let network = Backbone::conv4(8, 3).unwrap();
    let path = here.path().join("meta.onnx");
    let graph = network.to_graph(32, 32).unwrap();
    onnx::write(&path, &graph, &onnx::ExportInfo::new([].into())).unwrap();
    let exported = OnnxEmbedder::open(&path).unwrap();
    let values = RngStream::new(0, "test", "", 0).normals(70 * 3 * 32 * 32);
    let images = Images::new(values, [70, 3, 32, 32]).unwrap();
    let own = network.embed(&images, BnMode::Running).unwrap();
    let theirs = exported.embed(&images, BatchNorm::Inductive).unwrap();
    let norm = |v: &[f32]| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let gap: Vec<f32> = own.iter().zip(&theirs).map(|(a, b)| a - b).collect();
    assert_eq!(own.len(), theirs.len());
    assert!(norm(&gap) / norm(&own) < 1e-5, "{}", norm(&gap) / norm(&own));
    assert!(exported.embed(&images, BatchNorm::Transductive).is_err());
}

#[test]
fn the_command_evaluates_a_run_and_keeps_result_and_episodes() {
    let here = temp_dir();
    let run = finished_run(&here.path().join("r"));
    write_classes(&here.path().join("pictures"), &CLASSES, 8, [20, 12]);
    let ran = run_in(
        here.path(),
        &[
            "eval",
            "r",
            "--data",
            "pictures",
            "--query",
            "4",
            "--episodes",
            "30",
            "--baselines",
            "--icfil",
            "--json",
        ],
    );
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let result: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(
        ["episodes", "way", "shot", "query", "seed"].map(|key| result[key].as_u64().unwrap()),
        [30, 5, 1, 4, 0]
    );
    assert_eq!(result["bn"], "inductive");
    for name in ["untrained", "pixel-nearest", "pixel-prototype"] {
        let accuracy = result["baselines"][name]["accuracy"].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&accuracy), "{name}");
    }
    let number = |name: &str| result["icfil"][name].as_f64().unwrap();
    assert!((0.0..=1.0).contains(&number("accuracy")) && number("seconds") > 0.0, "{result}");
    let gain = number("accuracy") - result["accuracy"].as_f64().unwrap();
    assert!((gain - number("gain")).abs() < 1e-12 && result["baselines"]["icfil"].is_null());
    // The models of this run are nowhere: said, and no failure.
    for name in ["average", "best-model"] {
        let why = result["baselines_left_out"][name].as_str().unwrap();
        assert!(!why.is_empty() && result["baselines"][name].is_null(), "{result}");
    }
    let schema = run_in(here.path(), &["schema", "eval"]).stdout;
    let schema: serde_json::Value = serde_json::from_str(&schema).unwrap();
    assert!(jsonschema::is_valid(&schema, &result), "the result fits its own schema");

    let rows = run.path().join("eval/pictures-5way-1shot-inductive.episodes.jsonl");
    let rows: Vec<serde_json::Value> = std::fs::read_to_string(rows)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let share: f64 = rows.iter().map(|row| row["correct"].as_f64().unwrap() / 20.0).sum();
    assert!((share / 30.0 - result["accuracy"].as_f64().unwrap()).abs() < 1e-12);

    let both =
        ["eval", "r", "--data", "pictures", "--query", "4", "--icfil", "--bn", "transductive"];
    let refused = run_in(here.path(), &both);
    assert_eq!(refused.code, 2, "{}", refused.stderr);
    assert!(refused.stderr.contains("--icfil"), "{}", refused.stderr);

    let ran = run_in(here.path(), &["report", "r"]);
    assert_eq!((ran.code, ran.stdout.trim()), (0, "r/report.html"));
    let page = std::fs::read_to_string(run.path().join("report.html")).unwrap();
    assert!(page.contains("5-way 1-shot") && page.contains("pixel-nearest"));
}

#[test]
fn the_upper_bound_is_the_runs_learner_trained_on_real_images() {
    let here = temp_dir();
    let run = finished_run(&here.path().join("r"));
    let config = run.path().join("config.yaml");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("steps: 600", "steps: 12")).unwrap();
    write_classes(&here.path().join("pictures"), &CLASSES, 6, [16, 16]);
    let others = ["gnu", "hen", "ibis", "jay", "kiwi", "fox"];
    write_classes(&here.path().join("real/meta_train"), &others, 12, [16, 16]);
    write_classes(&here.path().join("real/meta_val"), &others[..2], 12, [16, 16]);
    let eval = |real: &str| {
        let args = ["eval", "r", "--data", "pictures", "--query", "5", "--episodes", "20"];
        run_in(here.path(), &[&args[..], &["--json", "--real-data", real]].concat())
    };
    let ran = eval("real");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    // `fox` is evaluated too.
    assert!(ran.stderr.contains("1 classes of `real/meta_train`"), "{}", ran.stderr);
    let result: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    let bound = &result["baselines"]["real-data"];
    assert!(bound["accuracy"].is_number() && bound["gain_ci95"].is_number(), "{result}");
    assert_eq!(bound["note"], "6 classes, 72 images, 12 steps");
    let rows = |name: &str| {
        let path = run.path().join("eval/pictures-5way-1shot-inductive.episodes.jsonl");
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| line.matches(name).count()).sum::<usize>()
    };
    assert_eq!(rows("real-data"), 20, "every episode counts its right answers");
    for (real, words) in [
        ("pictures", "the images evaluated on"),
        ("nowhere", "nowhere"),
        ("real/meta_val", "needs 5 classes"),
    ] {
        let refused = eval(real);
        assert_eq!((refused.code, refused.stdout.as_str()), (1, ""), "{}", refused.stderr);
        assert!(refused.stderr.contains(words), "{}", refused.stderr);
    }
}

/// A run of another image size, backbone and learner than [`finished_run`]'s, with an untrained network as checkpoint.
fn other_run(path: &Path) -> RunFolder {
    let mut config = RunConfig { image_size: [32, 24], ..RunConfig::default() };
    config.meta.backbone = BackboneName::ResNet10;
    config.meta.learner = LearnerName::Anil;
    let run = RunFolder::create(path, &config, &record()).unwrap();
    let network = untrained_model(&config).unwrap();
    run.save_checkpoint(1, |file| network.save(file)).unwrap();
    run
}

#[test]
fn two_runs_answer_the_same_episodes_and_their_difference_is_paired() {
    let here = temp_dir();
    let run = finished_run(&here.path().join("r"));
    let other = other_run(&here.path().join("other"));
    write_classes(&here.path().join("pictures"), &CLASSES, 8, [20, 12]);
    let eval = |run: &str, more: &[&str]| {
        let args = ["eval", run, "--data", "pictures", "--query", "4", "--episodes", "12"];
        run_in(here.path(), &[&args[..], more].concat())
    };
    let json = |run: &str, more: &[&str]| -> serde_json::Value {
        let ran = eval(run, &[more, &["--json"]].concat());
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
        serde_json::from_str(&ran.stdout).unwrap()
    };
    let correct = |run: &RunFolder| -> Vec<(f64, Option<f64>)> {
        let path = run.path().join("eval/pictures-5way-1shot-inductive.episodes.jsonl");
        let text = std::fs::read_to_string(path).unwrap();
        let rows =
            text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        rows.map(|row| {
            (row["correct"].as_f64().unwrap() / 20.0, row["baselines"]["against"].as_f64())
        })
        .collect()
    };
    let result = json("r", &["--against", "other"]);
    let number = |name: &str| result["against"][name].as_f64().unwrap();
    // The other run alone answers as it did here, so both saw the same images at their own sizes.
    let (rows, alone) = (correct(&run), json("other", &[]));
    let theirs: Vec<f64> = correct(&other).into_iter().map(|row| row.0).collect();
    assert_eq!(alone["accuracy"], result["against"]["accuracy"]);
    assert!(rows.iter().zip(&theirs).all(|(row, own)| row.1 == Some(own * 20.0)));
    let gaps: Vec<f64> = rows.iter().zip(&theirs).map(|(row, own)| row.0 - own).collect();
    assert!(gaps.iter().any(|gap| *gap != gaps[0]), "nothing to compare: {gaps:?}");
    let mean = gaps.iter().sum::<f64>() / 12.0;
    let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / 11.0;
    assert!((number("gain") - mean).abs() < 1e-12);
    assert!((number("gain_ci95") - 1.96 * (variance / 12.0).sqrt()).abs() < 1e-12, "{result}");
    assert!(result["baselines"].is_null() && result["against"]["run"] == "other");
    let kept = run.path().join("eval/pictures-5way-1shot-inductive.json");
    let kept: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(kept).unwrap()).unwrap();
    assert_eq!(kept, result);
    let schema = run_in(here.path(), &["schema", "eval"]).stdout;
    let schema: serde_json::Value = serde_json::from_str(&schema).unwrap();
    assert!(jsonschema::is_valid(&schema, &result), "the result fits its own schema");

    let same = eval("r", &["--against", "r"]);
    assert!(same.stdout.contains("other run") && same.stdout.contains("+0.0 \u{b1} 0.0, `r`"));
    assert_eq!(run_in(here.path(), &["report", "r"]).code, 0);
    let page = std::fs::read_to_string(run.path().join("report.html")).unwrap();
    assert!(page.contains("run r"), "the page has a row of the other run");

    let refused = eval("r", &["--against", "pictures"]);
    assert_eq!((refused.code, refused.stdout.as_str()), (1, ""));
    insta::assert_snapshot!(refused.stderr, @r"
    error: cannot compare with `pictures`
      caused by: not a run folder: `pictures`
    hint: a run folder holds `run.json` and `config.yaml`, made by `metazoa train`
    ");
}

#[test]
fn too_few_images_in_a_class_is_one_error() {
    let here = temp_dir();
    finished_run(&here.path().join("r"));
    write_classes(&here.path().join("pictures"), &CLASSES, 5, [16, 16]);
    std::fs::remove_file(here.path().join("pictures/dog/003.png")).unwrap();
    let args = ["eval", "r", "--data", "pictures", "--query", "4", "--shot", "1"];
    let ran = run_in(here.path(), &args);
    assert_eq!((ran.code, ran.stdout.as_str()), (1, ""));
    insta::assert_snapshot!(ran.stderr, @r"
    error: cannot evaluate on `pictures`
      caused by: class `dog` has 4 usable images, an episode needs 5
    hint: need = shot + query = 1 + 4: lower `--shot` or `--query`, or add images
    ");
    assert_eq!(std::fs::read_dir(here.path().join("r/eval")).unwrap().count(), 0);
}

#[test]
fn a_model_that_is_no_embedding_is_refused() {
    let here = temp_dir();
    std::fs::write(here.path().join("a.onnx"), b"rubbish").unwrap();
    write_classes(&here.path().join("pictures"), &CLASSES, 20, [16, 16]);
    let ran = run_in(here.path(), &["eval", "a.onnx", "--data", "pictures"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (1, ""));
    assert!(ran.stderr.starts_with("error: "), "{}", ran.stderr);
    let ran = run_in(here.path(), &["eval", "nowhere", "--data", "pictures"]);
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("no run folder `nowhere`"), "{}", ran.stderr);
}

#[test]
fn exports_are_checked_against_onnx_runtime_and_a_failed_one_leaves_nothing() {
    let here = temp_dir();
    let run = finished_run(&here.path().join("r"));
    for form in [ExportForm::Embedding, ExportForm::Episode] {
        let out = here.path().join(format!("{}.onnx", form.name()));
        let result = export_run(&run, form, &out, &runtime_options()).unwrap();
        assert_eq!(result.bytes, std::fs::metadata(&out).unwrap().len());
        // Zero would mean that nothing was compared: sums are taken in another order there.
        assert!(result.max_abs_diff_ort > 0.0 && result.max_abs_diff_ort < 1e-2, "{result:?}");
    }
    let model = OnnxEmbedder::open(&here.path().join("embedding.onnx")).unwrap();
    assert_eq!((model.image_size(), model.dim()), ([16, 16], 4));
    let error = OnnxEmbedder::open(&here.path().join("episode.onnx")).unwrap_err();
    assert!(error.message().starts_with("an embedding has one input"), "{error}");

    let before = std::fs::read_dir(here.path()).unwrap().count();
    let nowhere =
        RuntimeOptions { library: Some(here.path().join("no-library.so")), ..runtime_options() };
    let out = here.path().join("never.onnx");
    assert!(export_run(&run, ExportForm::Embedding, &out, &nowhere).is_err());
    assert_eq!(std::fs::read_dir(here.path()).unwrap().count(), before);
}

#[test]
fn a_gpu_is_refused_rather_than_passed_over() {
    let here = temp_dir();
    let ran = run_in(here.path(), &["eval", "r", "--data", "pictures", "--device", "cuda"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (1, ""));
    insta::assert_snapshot!(ran.stderr, @r"
    error: this version computes on the processor only, not on `cuda:0`
    hint: leave out `--device`
    ");
}

/// The signals a process handles, from Linux.
#[cfg(target_os = "linux")]
fn caught_signals(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    line.map_or(0, |mask| u64::from_str_radix(mask.trim(), 16).unwrap())
}

#[cfg(target_os = "linux")]
#[test]
fn sigterm_ends_a_long_evaluation_with_130_and_nothing_half_written() {
    let here = temp_dir();
    let run = finished_run(&here.path().join("r"));
    write_classes(&here.path().join("pictures"), &CLASSES, 20, [16, 16]);
    let child = std::process::Command::new(env!("CARGO_BIN_EXE_metazoa"))
        .args(["eval", "r", "--data", "pictures", "--baselines", "--episodes", "100000000"])
        .current_dir(here.path())
        .env("NO_COLOR", "1")
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let terminate = 1 << (libc::SIGTERM - 1);
    while caught_signals(child.id()) & terminate == 0 {
        std::thread::yield_now();
    }
    let kill = std::process::Command::new("kill").arg(child.id().to_string()).status().unwrap();
    assert!(kill.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(output.stdout.is_empty());
    let said = String::from_utf8(output.stderr).unwrap();
    insta::assert_snapshot!(said, @r"
    interrupted: finishing the step (again to stop at once)
    error: interrupted
    ");
    assert_eq!(std::fs::read_dir(run.path().join("eval")).unwrap().count(), 0);
}
