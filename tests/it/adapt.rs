//! `adapt`: a user's folder of classes to a ready classifier, for every learner.

use std::path::Path;

use metazoa::access::session::Tensor as Values;
use metazoa::app::config::LearnerName;
use metazoa::app::{RunConfig, RunFolder};
use metazoa::data::ImageFolder;
use metazoa::meta::{Backbone, BnMode, InnerLoop, InnerOrder, Learner, MetaModel, SupportImages};
use metazoa::tensor::{Images, RngStream};
use metazoa::{ErrorKind, onnx};
use serde_json::Value;

use crate::pictures::{write_classes, write_picture};
use crate::runs::record;
use crate::support::{repository, run_in, runtime, temp_dir};

const INNER: InnerLoop =
    InnerLoop { train_steps: 2, test_steps: 4, learning_rate: 0.05, order: InnerOrder::Second };
const LEARNERS: [Learner; 3] = [Learner::ProtoNet, Learner::Anil(INNER), Learner::Maml(INNER)];

fn model(learner: Learner) -> MetaModel {
    MetaModel::new(Backbone::conv4(4, 2).unwrap(), learner, [16, 16], 2).unwrap()
}

/// A run whose checkpoint is `model`.
fn run_of(path: &Path, model: &MetaModel, image_size: [usize; 2]) -> RunFolder {
    let mut config = RunConfig { image_size, ..RunConfig::default() };
    config.meta.learner = match model.learner() {
        Learner::ProtoNet => LearnerName::ProtoNet,
        Learner::Anil(_) => LearnerName::Anil,
        Learner::Maml(_) => LearnerName::Maml,
    };
    let run = RunFolder::create(path, &config, &record()).unwrap();
    run.save_checkpoint(3, |file| model.save(file)).unwrap();
    run
}

fn noise(n: usize, index: u64) -> Images {
    let mut rng = RngStream::new(5, "adapt test", "", index);
    let pixels = (0..n * 3 * 256).map(|_| rng.uniform()).collect();
    Images::new(pixels, [n, 3, 16, 16]).unwrap()
}

#[test]
fn a_classifier_answers_as_the_learner_does_when_it_sees_the_support_set_anew() {
    // More than are held in memory at once, and not as many of each class.
    let labels: Vec<usize> = (0..100).map(|at| (at % 7) % 3).collect();
    let (support, query) = (noise(100, 0), noise(20, 1));
    for learner in LEARNERS {
        let model = model(learner);
        let expected = model.classify(&support, &labels, &query, 3, BnMode::Running).unwrap();
        let read = |range: std::ops::Range<usize>| Ok(support.range(range.start, range.end));
        let images = SupportImages { labels: &labels, way: 3, read: &read };
        let classifier = model.adapt(&images).unwrap();
        let own = classifier.logits(&query).unwrap();
        assert_eq!(classifier.predictions(&own), expected.predictions, "{}", learner.name());
        // ProtoNet's logits here are those of training: scaled, without the query's own length.
        let factor = match learner {
            Learner::ProtoNet => metazoa::meta::protonet::logit_factor(4) as f32,
            _ => 1.0,
        };
        for (own, expected) in own.chunks_exact(3).zip(expected.logits.chunks_exact(3)) {
            for class in 1..3 {
                let gap = own[class] - own[0];
                let wanted = factor * (expected[class] - expected[0]);
                let tolerance = 1e-4 * (1.0 + factor * expected[0].abs());
                assert!((gap - wanted).abs() < tolerance, "{}: {gap} {wanted}", learner.name());
            }
        }
    }
}

#[test]
fn the_command_writes_a_checked_classifier_with_labels_that_can_stand_in_a_zoo() {
    let here = temp_dir();
    let classes = ["ant", "no", "zebra 7"];
    let pictures = here.path().join("pictures");
    write_classes(&pictures, &classes[..2], 5, [16, 16]);
    // Another size, another number; and one that cannot be read.
    for number in 0..7 {
        let path = pictures.join(format!("zebra 7/{number}.png"));
        write_picture(&path, [40, 25], |x, y| [200, (x * 5) as u8, (y * number) as u8]);
    }
    std::fs::write(pictures.join("ant/broken.png"), b"no picture").unwrap();
    for learner in LEARNERS {
        let name = learner.name();
        run_of(&here.path().join(name), &model(learner), [16, 16]);
        let out = format!("zoo/{name}.onnx");
        std::fs::create_dir_all(here.path().join("zoo")).unwrap();
        let args = ["adapt", name, "pictures", "--out", &out, "--shot", "3", "--json"];
        let ran = run_in(here.path(), &args);
        assert_eq!(ran.code, 0, "{name}: {}", ran.stderr);
        assert!(ran.stderr.contains("broken.png"), "{}", ran.stderr);
        let result: Value = serde_json::from_str(&ran.stdout).unwrap();
        let schema = run_in(here.path(), &["schema", "adapt"]).stdout;
        assert!(jsonschema::is_valid(&serde_json::from_str(&schema).unwrap(), &result));
        assert_eq!((&result["learner"], &result["form"]), (&name.into(), &"classifier".into()));
        assert_eq!((&result["way"], &result["images"]), (&3.into(), &17.into()));
        assert_eq!(result["classes"][2]["held_out"], 4);
        assert_eq!(result["rejected"][0]["path"], "ant/broken.png");
        assert!(result["max_abs_diff_ort"].as_f64().unwrap() > 0.0, "nothing was compared");

        // What the file itself says and does.
        let file = here.path().join(&out);
        let saved = onnx::load(&file, &here.path().join("zoo")).unwrap();
        assert_eq!(saved.metadata["metazoa.labels"], r#"["ant","no","zebra 7"]"#);
        for (key, value) in [("learner", name), ("shots", "[3,3,3]"), ("bn", "inductive")] {
            assert_eq!(saved.metadata[&format!("metazoa.{key}")], value);
        }
        assert_eq!(saved.metadata["metazoa.run"], name);
        let (set, _) = ImageFolder::open(&pictures, None).unwrap().load([16, 16]).unwrap();
        let images = set.select(&(0..17).collect::<Vec<_>>());
        let input = Values::f32(images.shape(), images.into_data());
        let mut session = runtime().open(&file).unwrap();
        let logits = session.run(vec![("images", input)], &["logits"]).unwrap().remove(0);
        assert_eq!(logits.shape, [17, 3]);
        let logits = logits.values.to_f32().into_owned();
        let right = logits
            .chunks(3)
            .zip(set_labels())
            .filter(|(row, label)| row.iter().all(|value| *value <= row[*label]));
        let support = result["support_accuracy"].as_f64().unwrap() * 9.0;
        let held_out = result["held_out_accuracy"].as_f64().unwrap() * 8.0;
        assert!((support + held_out - right.count() as f64).abs() < 1e-9, "{result}");

        // The same seed: the same bytes.
        let again = "again.onnx";
        let args = ["adapt", name, "--support", "pictures", "--out", again, "--shot", "3"];
        assert_eq!(run_in(here.path(), &args).code, 0);
        let bytes = |path: &Path| std::fs::read(path).unwrap();
        assert!(bytes(&here.path().join(again)) == bytes(&file), "{name}: other bytes");
    }
    let ran = run_in(here.path(), &["ingest", "zoo", "--json", "--strict"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let found: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(found["accepted"], 3);
    for model in found["models"].as_array().unwrap() {
        assert_eq!((&model["access"], &model["classes"]), (&"white-box".into(), &3.into()));
    }
}

/// Labels of 5, 5 and 7 images.
fn set_labels() -> impl Iterator<Item = usize> {
    [5, 5, 7].into_iter().enumerate().flat_map(|(class, n)| std::iter::repeat_n(class, n))
}

#[test]
fn what_cannot_be_adapted_to_is_one_clear_error_and_leaves_nothing() {
    let here = temp_dir();
    run_of(&here.path().join("r"), &model(Learner::ProtoNet), [16, 16]);
    write_classes(&here.path().join("one"), &["ant"], 3, [8, 8]);
    write_classes(&here.path().join("empty"), &["ant", "bee"], 3, [8, 8]);
    std::fs::create_dir(here.path().join("empty/cat")).unwrap();
    write_classes(&here.path().join("bad"), &["ant", "bee"], 3, [8, 8]);
    std::fs::create_dir(here.path().join("bad/cat")).unwrap();
    std::fs::write(here.path().join("bad/cat/a.png"), b"no picture").unwrap();
    write_classes(&here.path().join("good"), &["ant", "bee"], 3, [8, 8]);
    std::fs::write(here.path().join("mine.yaml"), "shopping: [milk]\n").unwrap();
    let before = std::fs::read_dir(here.path()).unwrap().count();
    let cases: [(&[&str], i32, &str); 9] = [
        (&["one", "--out", "a.onnx"], 1, "two classes or more, found one: `ant`"),
        (&["empty", "--out", "a.onnx"], 1, "class has no images: `cat`"),
        (&["bad", "--out", "a.onnx"], 1, "no image that can be read: `cat`"),
        (&["good", "--out", "a.onnx", "--shot", "4"], 1, "has 3 usable images"),
        (&["good", "--out", "a.bin"], 2, "must end in .onnx"),
        (&["good", "--out", "nowhere/a.onnx"], 1, "no folder `nowhere`"),
        (&["good", "--out", "mine.onnx"], 1, "no sidecar: `mine.yaml`"),
        (&["nothing", "--out", "a.onnx"], 1, "nothing"),
        (&["good", "--out", "a.onnx", "--ort-lib", "no-library.so"], 2, "no-library.so"),
    ];
    for (args, code, words) in cases {
        let ran = run_in(here.path(), &[&["adapt", "r"], args].concat());
        assert_eq!((ran.code, ran.stdout.as_str()), (code, ""), "{args:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(words), "{args:?}: {}", ran.stderr);
        assert!(ran.stderr.contains("hint: "), "{args:?}: {}", ran.stderr);
    }
    assert_eq!(std::fs::read_dir(here.path()).unwrap().count(), before);
    assert!(!here.path().join("r/nothing").exists());
}

#[test]
fn a_learner_that_diverged_makes_no_classifier() {
    let mut model = model(Learner::Anil(INNER));
    let values: Vec<candle_core::Tensor> =
        model.parameters().map(|p| (&p.value * f64::INFINITY).unwrap()).collect();
    model.set_parameters(values).unwrap();
    let read = |range: std::ops::Range<usize>| Ok(noise(range.len(), 0));
    let images = SupportImages { labels: &[0, 1], way: 2, read: &read };
    let error = model.adapt(&images).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal);
    assert!(error.hint_text().unwrap().contains("learning_rate"), "{error}");
}

#[test]
fn real_images_of_new_classes_are_recognised_by_the_features_of_one_model() {
    let here = temp_dir();
    // A classifier of five other characters.
    let file = repository().join("zoo/ss_028_glyphs_conv4_32.onnx");
    let network = Backbone::from_onnx(&file, [32, 32]).unwrap();
    run_of(&here.path().join("r"), &network.into(), [32, 32]);
    let data = repository().join("zoo/images/glyphs");
    let data = data.to_str().unwrap();
    let split = ["--split", "meta_test", "--out", "a.onnx", "--shot", "5", "--json"];
    let ran = run_in(here.path(), &[&["adapt", "r", data], &split[..]].concat());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let result: Value = serde_json::from_str(&ran.stdout).unwrap();
    let way = result["way"].as_f64().unwrap();
    let held_out = result["held_out_accuracy"].as_f64().unwrap();
    assert!(held_out > 3.0 / way, "hardly better than chance: {result}");
}
