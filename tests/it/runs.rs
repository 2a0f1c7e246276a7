//! Run folders and their settings: what is refused, what survives, what is said.

use metazoa::app::config::Override;
use metazoa::app::run_folder::{UsedModel, versions};
use metazoa::app::{RunConfig, RunFolder, RunRecord};
use metazoa::meta::Backbone;
use metazoa::report::Event;
use metazoa::zoo::{Access, Rejection};
use metazoa::{ErrorKind, Result};

use crate::support::temp_dir;

/// A record as a finished run has it.
pub(crate) fn record() -> RunRecord {
    RunRecord {
        versions: versions(),
        seed: 0,
        command: ["metazoa", "train", "my zoo", "--out", "runs/a"].map(String::from).to_vec(),
        models: vec![UsedModel {
            id: "glyphs/r<10>".into(),
            sha: "ab".repeat(32),
            access: Access::WhiteBox,
            classes: 5,
            norm_taps: 12,
            images: 60,
            queries: 0,
            agreement: Some(0.97),
        }],
        rejected: vec![Rejection {
            path: "broken.onnx".into(),
            reason: "the file ends early".into(),
            hint: Some("export it again".into()),
        }],
        outcomes: vec![],
        query_limits: [].into(),
        stop_reason: Some("done".into()),
        seconds: [("recover".to_owned(), 12.5), ("meta".to_owned(), 80.0)].into(),
        meta_updates: 0,
    }
}

/// A run with an untrained network of width 4 as its checkpoint.
pub(crate) fn finished_run(path: &std::path::Path) -> RunFolder {
    let mut config = RunConfig::default();
    config.meta.width = 4;
    config.image_size = [16, 16];
    let run = RunFolder::create(path, &config, &record()).unwrap();
    let network = Backbone::conv4(4, 7).unwrap();
    run.save_checkpoint(10, |file| network.save(file)).unwrap();
    let log = run.event_log().unwrap();
    for step in 0..20u32 {
        let loss = 2.0 / f64::from(step + 1);
        log.write(&Event::new(0.1, "meta", step.into()).value("loss", loss)).unwrap();
    }
    run
}

fn set(key: &str, value: &str) -> Override {
    Override { key: key.into(), value: value.into(), origin: format!("flag `{key}`") }
}

fn overridden(pairs: &[(&str, &str)]) -> Result<RunConfig> {
    let overrides: Vec<Override> = pairs.iter().map(|(key, value)| set(key, value)).collect();
    RunConfig::default().with_overrides(&overrides)
}

#[test]
fn resolved_settings_are_accepted_back_as_they_are() {
    let here = temp_dir();
    let config = overridden(&[
        ("meta.steps", "7"),
        ("recover.black_box.query_budget", "null"),
        ("eval.data", "pictures"),
        ("eval.shots", "[1]"),
        ("meta.augmentation.color", "null"),
    ])
    .unwrap();
    let path = here.path().join("config.yaml");
    std::fs::write(&path, config.to_yaml().unwrap()).unwrap();
    assert_eq!(RunConfig::read(&path).unwrap(), config);
    assert_eq!((config.meta.steps, config.recover.black_box.query_budget), (7, None));
}

#[test]
fn a_short_file_takes_every_other_value_from_the_defaults() {
    let here = temp_dir();
    let path = here.path().join("a.yaml");
    std::fs::write(&path, "schema_version: 1\nmeta: {steps: 3}\n").unwrap();
    let mut expected = RunConfig::default();
    expected.meta.steps = 3;
    assert_eq!(RunConfig::read(&path).unwrap(), expected);
}

/// The settings that the documentation names are read as they stand, and evaluate on something; a suite is none.
#[test]
fn the_examples_are_settings() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut read: Vec<(String, RunConfig)> = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.ends_with(".yaml") && !name.starts_with("bench_") {
            read.push((name, RunConfig::read(&path).unwrap()));
        }
    }
    assert!(read.len() >= 4, "{read:?}");
    for (name, config) in &read {
        assert!(config.eval.is_some(), "{name}");
        assert_ne!(config, &RunConfig::default(), "{name}");
    }
}

#[test]
fn affine_maps_out_of_their_range_are_refused_by_name() {
    for (name, value) in [("scale", "0.9"), ("rotation", "-1"), ("shear", ".inf")] {
        let key = format!("meta.augmentation.affine.{name}");
        let error = overridden(&[(&key, value)]).unwrap_err();
        assert!(error.to_string().contains(&key), "{error}");
    }
    let config = overridden(&[("meta.augmentation.affine", "{scale: 1.5}")]).unwrap();
    let affine = config.meta.augmentation.affine.unwrap();
    assert_eq!((affine.scale, affine.rotation), (1.5, 15.0));
}

#[test]
fn an_unknown_key_is_refused_with_file_line_and_nearest_name() {
    let here = temp_dir();
    let path = here.path().join("a.yaml");
    std::fs::write(&path, "schema_version: 1\nmeta:\n  learning_rat: 0.1\n").unwrap();
    let error = RunConfig::read(&path).unwrap_err();
    assert!(error.to_string().contains("line 3"), "{error}");
    assert!(error.message().contains("learning_rat`"), "{error}");
    assert!(error.hint_text().unwrap().contains("did you mean `learning_rate`?"), "{error:?}");
}

#[test]
fn a_wrong_override_names_where_it_was_set_and_the_nearest_key() {
    let error = overridden(&[("meta.stepps", "3")]).unwrap_err();
    assert_eq!(error.to_string(), "flag `meta.stepps`: unknown setting `meta.stepps`");
    assert_eq!(error.hint_text(), Some("did you mean `steps`?"));
    let error = overridden(&[("meta.steps", "many")]).unwrap_err();
    assert_eq!(error.message(), "setting `meta.steps` cannot be `many`");
    assert_eq!(error.kind(), ErrorKind::Usage);
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    for (key, value, said) in [
        ("schema_version", "2", "`schema_version: 1`"),
        ("meta.way", "1", "`meta.way`"),
        ("meta.query", "0", "`meta.query`"),
        ("meta.cross_model_share", "1.5", "`meta.cross_model_share`"),
        ("eval.way", "5", "`eval.data`"),
    ] {
        let error = overridden(&[(key, value)]).unwrap_err();
        assert!(error.message().contains(said), "{key}: {error}");
    }
}

#[test]
fn a_run_folder_comes_whole_and_keeps_what_it_was_given() {
    let here = temp_dir();
    let path = here.path().join("deep/runs/a");
    let run = RunFolder::create(&path, &RunConfig::default(), &record()).unwrap();
    assert_eq!(run.record().unwrap(), record());
    assert_eq!(run.config().unwrap(), RunConfig::default());
    let names = |path: &std::path::Path| {
        let mut names: Vec<String> = std::fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(&path), ["bank", "ckpt", "config.yaml", "eval", "run.json"]);
    assert_eq!(names(path.parent().unwrap()), ["a"], "nothing temporary is left");
    assert_eq!(RunFolder::open(&path).unwrap(), run);
}

#[test]
fn a_folder_with_anything_in_it_is_never_written_into() {
    let here = temp_dir();
    let run = here.path().join("run");
    RunFolder::create(&run, &RunConfig::default(), &record()).unwrap();
    let error = RunFolder::create(&run, &RunConfig::default(), &record()).unwrap_err();
    assert!(error.message().starts_with("there is a run already in"), "{error}");

    let other = here.path().join("thesis");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("thesis.tex"), "years of work").unwrap();
    let error = RunFolder::create(&other, &RunConfig::default(), &record()).unwrap_err();
    assert_eq!(error.exit_code(), 1);
    assert_eq!(std::fs::read_dir(&other).unwrap().count(), 1);

    let empty = here.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    RunFolder::create(&empty, &RunConfig::default(), &record()).unwrap();
}

#[test]
fn what_is_no_run_is_not_opened_as_one() {
    let here = temp_dir();
    let error = RunFolder::open(here.path()).unwrap_err();
    assert!(error.message().starts_with("not a run folder"), "{error}");
    let error = RunFolder::open(&here.path().join("nowhere")).unwrap_err();
    assert!(error.hint_text().unwrap().contains("metazoa train"));
}

#[test]
fn the_newest_checkpoint_is_found_and_old_ones_are_dropped() {
    let here = temp_dir();
    let config = RunConfig::default();
    let run = RunFolder::create(&here.path().join("r"), &config, &record()).unwrap();
    assert!(run.latest_checkpoint().unwrap_err().message().starts_with("no checkpoint"));
    for step in [5, 10, 100, 20] {
        let text = step.to_string();
        run.save_checkpoint(step, |path| {
            std::fs::write(path, &text).unwrap();
            Ok(())
        })
        .unwrap();
    }
    let latest = run.latest_checkpoint().unwrap();
    assert_eq!(std::fs::read_to_string(latest).unwrap(), "20");
    assert!(!run.path().join("ckpt/step-5.safetensors").exists());
    assert!(run.path().join("ckpt/step-100.safetensors").exists());
}

#[test]
fn a_failed_checkpoint_leaves_the_last_one_in_place() {
    let here = temp_dir();
    let run = finished_run(&here.path().join("r"));
    let before = run.latest_checkpoint().unwrap();
    let failed = run.save_checkpoint(11, |_| Err(metazoa::Error::internal("disk full")));
    assert!(failed.is_err());
    assert_eq!(run.latest_checkpoint().unwrap(), before);
}
