//! Black-box teachers on the real files of `zoo_edge`: what the adapter feeds them, what they answer,
//! what a gradient estimate is worth and costs. ONNX Runtime must be there (`metazoa setup`).

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use metazoa::ErrorKind;
use metazoa::access::black::{BlackOptions, BlackTeacher};
use metazoa::access::probe::{ProbeRequest, VERB};
use metazoa::access::zero_order::{Estimator, ZeroOrder};
use metazoa::access::{LogitsLoss, Objective, Teacher};
use metazoa::tensor::{Images, RngStream};
use metazoa::zoo::hash::file_sha;
use metazoa::zoo::{
    Access, BatchDimension, Color, ElementType, Layout, ModelSpec, OutputKind, Preprocess, read,
};
use serde_json::Value;

use crate::support::{self, runtime};

const OPTIONS: BlackOptions = BlackOptions {
    zero_order: ZeroOrder {
        directions: 20,
        radius: 0.05,
        estimator: Estimator::Forward,
        frequencies: 8,
        pack: 64,
    },
    batch: 64,
};

/// The spec that `NAME.yaml` beside the model describes. Written out here and not taken from the zoo
/// module: these tests judge access by the sidecars alone.
pub(crate) fn spec_from_sidecar(folder: &Path, name: &str) -> (ModelSpec, f64) {
    let text = std::fs::read_to_string(folder.join(format!("{name}.yaml"))).unwrap();
    let sidecar: Value = serde_yaml::from_str(&text).unwrap();
    let pre = &sidecar["preprocess"];
    let floats = |value: &Value| -> Vec<f32> {
        value.as_array().into_iter().flatten().map(|v| v.as_f64().unwrap() as f32).collect()
    };
    let size: Vec<usize> = pre["input_size"]
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_u64().unwrap() as usize)
        .collect();
    let range = floats(&pre["value_range"]);
    let path = folder.join(format!("{name}.onnx"));
    let session = runtime().open(&path).unwrap();
    let input = &session.inputs()[0];
    let labels: Vec<String> = sidecar["id2label"]
        .as_object()
        .unwrap()
        .values()
        .map(|label| label.as_str().unwrap().to_owned())
        .collect();
    let spec = ModelSpec {
        id: name.to_owned(),
        sha: file_sha(&path).unwrap(),
        path,
        access: Access::BlackBox,
        classes: labels.len(),
        labels,
        preprocess: Preprocess {
            input_size: [size[0], size[1], size[2]],
            layout: if pre["layout"] == "nhwc" { Layout::Nhwc } else { Layout::Nchw },
            dtype: match pre["dtype"].as_str().unwrap() {
                "float32" => ElementType::Float32,
                "float16" => ElementType::Float16,
                "uint8" => ElementType::Uint8,
                other => panic!("{other}"),
            },
            value_range: [range[0], range[1]],
            color: match pre["color"].as_str().unwrap() {
                "rgb" => Color::Rgb,
                "bgr" => Color::Bgr,
                "grey" => Color::Grey,
                other => panic!("{other}"),
            },
            mean: floats(&pre["mean"]),
            std: floats(&pre["std"]),
            crop_pct: 1.0,
        },
        input_name: input.name.clone(),
        logits_output: sidecar["logits_output"].as_str().unwrap().to_owned(),
        output_kind: match sidecar["output_kind"].as_str().unwrap() {
            "logits" => OutputKind::Logits,
            "probabilities" => OutputKind::Probabilities,
            "log-probabilities" => OutputKind::LogProbabilities,
            other => panic!("{other}"),
        },
        batch: input.dims[0].map_or(BatchDimension::Free, BatchDimension::Fixed),
        max_batch_size: None,
        query_budget: None,
        norm_taps: 0,
        unsupported_ops: vec![],
        batch_dependent: false,
        quantised: false,
        external_files: vec![],
        endpoint: None,
    };
    (spec, sidecar["metrics"]["accuracy"].as_f64().unwrap())
}

pub(crate) fn open(spec: ModelSpec) -> BlackTeacher {
    BlackTeacher::open(spec, runtime(), OPTIONS).unwrap()
}

/// Images of `glyphs/meta_train.npz` by class name, canonical.
pub(crate) struct Glyphs(BTreeMap<String, Images>);

impl Glyphs {
    /// The first `per_class` images of each class.
    pub(crate) fn load(per_class: usize) -> Option<Self> {
        let file = std::fs::File::open(support::shared("data/glyphs/meta_train.npz")?).unwrap();
        let mut archive = zip::ZipArchive::new(file).unwrap();
        let mut read = |name: &str| {
            let mut bytes = Vec::new();
            archive.by_name(name).unwrap().read_to_end(&mut bytes).unwrap();
            let header = u16::from_le_bytes([bytes[8], bytes[9]]) as usize;
            let text = String::from_utf8(bytes[10..10 + header].to_vec()).unwrap();
            assert!(text.contains("'fortran_order': False"), "{text}");
            (text, bytes.split_off(10 + header))
        };
        let (header, pixels) = read("images.npy");
        assert!(header.contains("|u1") && header.contains("32, 32, 3)"), "{header}");
        let (header, labels) = read("labels.npy");
        assert!(header.contains("<i8"), "{header}");
        let labels = labels.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()));
        let (header, names) = read("class_names.npy");
        let width: usize =
            header.split("<U").nth(1).unwrap().split('\'').next().unwrap().parse().unwrap();
        let names: Vec<String> = names
            .chunks_exact(4 * width)
            .map(|name| {
                let points =
                    name.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap()));
                points.take_while(|&p| p != 0).map(|p| char::from_u32(p).unwrap()).collect()
            })
            .collect();
        let mut classes: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        for (label, image) in labels.zip(pixels.chunks_exact(3072)) {
            let data = classes.entry(names[label as usize].clone()).or_default();
            if data.len() < per_class * 3072 {
                for channel in 0..3 {
                    data.extend(image[channel..].iter().step_by(3).map(|&v| f32::from(v) / 255.0));
                }
            }
        }
        Some(Self(
            classes
                .into_iter()
                .map(|(name, data)| {
                    let n = data.len() / 3072;
                    (name, Images::new(data, [n, 3, 32, 32]).unwrap())
                })
                .collect(),
        ))
    }

    /// Images of `labels`, class by class, and their class numbers.
    pub(crate) fn batch(&self, labels: &[String], per_class: usize) -> (Images, Vec<usize>) {
        let mut images = Images::zeros([0, 3, 32, 32]);
        let mut classes = Vec::new();
        for (class, label) in labels.iter().enumerate() {
            images.extend(&self.0[label].range(0, per_class)).unwrap();
            classes.extend(std::iter::repeat_n(class, per_class));
        }
        (images, classes)
    }
}

fn accuracy(logits: &[f32], classes: usize, truth: &[usize]) -> f64 {
    let right = logits.chunks_exact(classes).zip(truth).filter(|(row, truth)| {
        let best = (0..classes).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
        best == **truth
    });
    right.count() as f64 / truth.len() as f64
}

fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "onnx"))
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    names.sort();
    names
}

/// Each file was scored on 40 unseen images a class when it was made. Through our preprocessing it must
/// reach that: wrong colours, ranges, layouts or sizes cost tens of points. The images here are those of
/// `meta_train.npz`, partly seen in training, so the score may be higher; lower only by chance.
#[test]
fn every_awkward_model_scores_through_the_adapter_what_its_sidecar_says() {
    let Some(folder) = support::shared("data/zoo_edge") else { return };
    let Some(glyphs) = Glyphs::load(120) else { return };
    let names = names_in(&folder);
    assert_eq!(names.len(), 38);
    for name in names {
        let (spec, expected) = spec_from_sidecar(&folder, &name);
        let per_class = if spec.classes > 5 { 20 } else { 120 };
        let (images, truth) = glyphs.batch(&spec.labels, per_class);
        let classes = spec.classes;
        let teacher = open(spec);
        let logits = teacher.logits(&images).unwrap();
        let got = accuracy(&logits, classes, &truth);
        eprintln!("{name}: {got:.3}, sidecar {expected:.3}");
        assert_eq!(teacher.queries(), images.len() as u64);
        // 200 images gave the expected figure: three standard errors of the difference.
        let error = (expected * (1.0 - expected) * (1.0 / 200.0 + 1.0 / truth.len() as f64)).sqrt();
        assert!(got > expected - (3.0 * error).max(0.015), "{name}: {got} against {expected}");
    }
}

/// Cross-entropy to a fixed class per image.
struct CrossEntropy(Vec<usize>);

impl LogitsLoss for CrossEntropy {
    fn value(&self, index: usize, logits: &[f32]) -> f64 {
        let top = f64::from(logits.iter().fold(f32::MIN, |top, value| top.max(*value)));
        let sum: f64 = logits.iter().map(|&value| (f64::from(value) - top).exp()).sum();
        top + sum.ln() - f64::from(logits[self.0[index]])
    }

    fn gradient(&self, _: usize, _: &[f32], _: &mut [f32]) {
        unreachable!("a black-box teacher asks for values only");
    }
}

fn objective(loss: &CrossEntropy) -> Objective<'_> {
    Objective { logits: loss, statistics_weight: 1.0 }
}

fn stream(index: u64) -> RngStream {
    RngStream::new(5, "test", "black", index)
}

/// Images of uniform 8-bit noise around grey.
fn noise(n: usize) -> Images {
    let mut rng = stream(99);
    let level = |_| (128.0 + (25.0 * rng.normal()).round()).clamp(5.0, 250.0) / 255.0;
    Images::new((0..n * 3072).map(level).collect(), [n, 3, 32, 32]).unwrap()
}

fn with_budget(
    name: &str,
    query_budget: Option<u64>,
    options: BlackOptions,
) -> Option<BlackTeacher> {
    let (spec, _) = spec_from_sidecar(&support::shared("data/zoo_edge")?, name);
    Some(BlackTeacher::open(ModelSpec { query_budget, ..spec }, runtime(), options).unwrap())
}

/// One central difference a pixel value: slow, and as near the truth as queries come.
fn gradient_by_pixels(
    teacher: &BlackTeacher,
    image: &[f32],
    loss: &CrossEntropy,
    step: f32,
) -> Vec<f32> {
    let mut moved = Vec::with_capacity(2 * image.len() * image.len());
    for pixel in 0..image.len() {
        for sign in [1.0, -1.0] {
            let start = moved.len();
            moved.extend_from_slice(image);
            moved[start + pixel] += sign * step;
        }
    }
    let moved = Images::new(moved, [2 * image.len(), 3, 32, 32]).unwrap();
    let logits = teacher.logits(&moved).unwrap();
    let values: Vec<f64> =
        logits.chunks_exact(teacher.spec().classes).map(|row| loss.value(0, row)).collect();
    values
        .chunks_exact(2)
        .map(|pair| ((pair[0] - pair[1]) / (2.0 * f64::from(step))) as f32)
        .collect()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn queries_are_counted_exactly_and_a_request_beyond_the_budget_is_refused_whole() {
    let Some(teacher) = with_budget("edge_fixed_batch8", Some(100), OPTIONS) else { return };
    let images = noise(3);
    let loss = CrossEntropy(vec![0, 1, 2]);
    teacher.logits(&images).unwrap();
    assert_eq!(teacher.queries(), 3, "filling a fixed batch of 8 costs nothing");
    // 3 images and 20 directions each.
    let seen = teacher.image_gradient(&images, &objective(&loss), &mut stream(1)).unwrap();
    assert_eq!(teacher.queries(), 3 + 3 * 21);
    assert_eq!((seen.gradient.shape(), seen.logits.len()), (images.shape(), 15));
    assert_eq!(seen.statistics_loss, 0.0);
    let error = teacher.image_gradient(&images, &objective(&loss), &mut stream(2)).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Budget, "{error}");
    assert_eq!(teacher.queries(), 66, "a refused request costs nothing");
    teacher.logits(&noise(34)).unwrap();
    assert!(teacher.logits(&noise(1)).is_err());
    assert_eq!(teacher.budget().remaining(), Some(0));
}

/// The same images one by one, in batches of 3 and of 64, on a free and on fixed batches.
#[test]
fn an_answer_does_not_depend_on_how_batches_are_cut() {
    for name in ["edge_auto_pad_same", "edge_fixed_batch1", "edge_fixed_batch8", "edge_int8_qdq"] {
        let Some(teacher) = with_budget(name, None, OPTIONS) else { return };
        let Some(small) = with_budget(name, None, BlackOptions { batch: 3, ..OPTIONS }) else {
            return;
        };
        let images = noise(19);
        let all = teacher.logits(&images).unwrap();
        assert_eq!(all.len(), 19 * 5);
        let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
        assert!(close(&small.logits(&images).unwrap(), &all), "{name}");
        for index in [0, 7, 18] {
            let one = teacher.logits(&images.range(index, index + 1)).unwrap();
            assert!(close(&one, &all[index * 5..(index + 1) * 5]), "{name} {index}");
        }
        assert!(teacher.logits(&images.range(0, 0)).unwrap().is_empty());
    }
}

#[test]
fn one_worker_and_four_give_the_same_bytes() {
    let Some(teacher) = with_budget("edge_softmax", None, OPTIONS) else { return };
    let images = noise(5);
    let loss = CrossEntropy(vec![0, 1, 2, 3, 4]);
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| teacher.image_gradient(&images, &objective(&loss), &mut stream(3)).unwrap())
    };
    let (one, four) = (run(1), run(4));
    assert_eq!(one.gradient, four.gradient);
    assert_eq!(one.logits, four.logits);
    assert_eq!(one.logits_loss.to_bits(), four.logits_loss.to_bits());
}

/// Probabilities come back as logarithms: exponentials that sum to one, and the same classes.
#[test]
fn probabilities_and_log_probabilities_are_both_log_scores() {
    for name in ["edge_softmax", "edge_logsoftmax"] {
        let Some(teacher) = with_budget(name, None, OPTIONS) else { return };
        for row in teacher.logits(&noise(8)).unwrap().chunks_exact(5) {
            let total: f64 = row.iter().map(|&score| f64::from(score).exp()).sum();
            assert!(
                (total - 1.0).abs() < 1e-5 && row.iter().all(|score| *score <= 1e-6),
                "{name} {row:?}"
            );
        }
    }
}

/// Against a difference a pixel: float, float16, and bytes, whose rounding would hide short steps.
#[test]
fn the_estimate_points_along_the_gradient_as_theory_says() {
    let images = noise(1);
    let loss = CrossEntropy(vec![2]);
    let q = 600;
    let theory = (q as f64 / (q as f64 + 3071.0)).sqrt();
    let zero_order = ZeroOrder { directions: q, radius: 0.05, ..OPTIONS.zero_order };
    for (name, step) in [
        ("edge_auto_pad_same", 0.01),
        ("edge_fp16_compute", 4.0 / 255.0),
        ("edge_nhwc_uint8", 2.0 / 255.0),
    ] {
        let options = BlackOptions { zero_order, ..OPTIONS };
        let Some(teacher) = with_budget(name, None, options) else { return };
        let truth = gradient_by_pixels(&teacher, images.image(0), &loss, step);
        let seen = teacher.image_gradient(&images, &objective(&loss), &mut stream(4)).unwrap();
        let got = cosine(seen.gradient.data(), &truth);
        eprintln!("{name}: cosine {got:.3}, theory {theory:.3}");
        assert!(got > 0.7 * theory, "{name}: {got} against {theory}");
    }
}

/// An int8 model answers in steps: the estimator lengthens its own until they show, and following it helps.
#[test]
fn a_quantised_model_is_asked_with_longer_steps() {
    let Some(folder) = support::shared("data/zoo_edge") else { return };
    let Some(glyphs) = Glyphs::load(2) else { return };
    let (spec, _) = spec_from_sidecar(&folder, "edge_int8_qdq");
    let (images, truth) = glyphs.batch(&spec.labels, 2);
    let loss = CrossEntropy(truth.iter().map(|class| (class + 2) % 5).collect());
    let zero_order = ZeroOrder { directions: 400, ..OPTIONS.zero_order };
    let drop = |quantised: bool| {
        let spec = ModelSpec { quantised, ..spec.clone() };
        let options = BlackOptions { zero_order, ..OPTIONS };
        let teacher = BlackTeacher::open(spec, runtime(), options).unwrap();
        let seen = teacher.image_gradient(&images, &objective(&loss), &mut stream(6)).unwrap();
        let mut moved = images.clone();
        for index in 0..images.len() {
            let gradient = seen.gradient.image(index);
            let norm = gradient.iter().map(|v| v * v).sum::<f32>().sqrt();
            let pixels = &mut moved.data_mut()[index * 3072..(index + 1) * 3072];
            pixels.iter_mut().zip(gradient).for_each(|(x, g)| *x -= 2.0 * g / norm);
        }
        let logits = teacher.logits(&moved).unwrap();
        let values = logits.chunks_exact(5).enumerate().map(|(i, row)| loss.value(i, row));
        seen.logits_loss - values.sum::<f64>() / images.len() as f64
    };
    let (short, long) = (drop(false), drop(true));
    eprintln!("loss falls by {short:.2} with short steps, by {long:.2} with long ones");
    assert!(long > 1.5 * short && long > 1.8, "{short} {long}");
}

/// Read as a zoo is read: of both zoos' files the int8 ones, and no other, are asked with long steps.
#[test]
fn every_int8_file_gets_the_longer_steps_whether_or_not_its_operators_are_supported() {
    let mut folders = vec![support::repository().join("zoo")];
    folders.extend(support::shared("data/zoo_edge"));
    let mut longer = Vec::new();
    for folder in &folders {
        for name in names_in(folder) {
            let spec = read::read_file(&folder.join(format!("{name}.onnx"))).unwrap().spec;
            if spec.preprocess.dtype == ElementType::Uint8 {
                continue; // Asked with steps of a level for another reason.
            }
            let spec = ModelSpec { access: Access::BlackBox, ..spec };
            let zero_order = ZeroOrder { radius: 0.005, ..OPTIONS.zero_order };
            let teacher =
                BlackTeacher::open(spec, runtime(), BlackOptions { zero_order, ..OPTIONS });
            let radius = teacher.unwrap().zero_order(&noise(1)).radius;
            if radius > 0.005 {
                assert!((radius - 0.011 * 3072f64.sqrt()).abs() < 1e-9, "{name}: {radius}");
                longer.push(name);
            }
        }
    }
    let expected: &[&str] = match folders.len() {
        1 => &["edge_int8_qdq"],
        _ => &["edge_int8_qdq", "edge_int8_qdq", "edge_int8_qoperator"],
    };
    assert_eq!(longer, expected);
}

/// The objective is a mean, so twice the same image has half the gradient each.
#[test]
fn the_gradient_is_that_of_the_mean_over_the_batch() {
    let Some(teacher) = with_budget("edge_nhwc_float", None, OPTIONS) else { return };
    let (one, two) = (noise(1), noise(2));
    let norm = |images: &Images| {
        let loss = CrossEntropy(vec![1, 1]);
        let seen = teacher.image_gradient(images, &objective(&loss), &mut stream(5)).unwrap();
        seen.gradient.image(0).iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
    };
    // The directions of the first image are the same in both batches: same stream, same key.
    let ratio = norm(&one) / norm(&two);
    assert!((ratio - 2.0).abs() < 0.05, "{ratio}");
}

#[test]
fn a_spec_that_does_not_fit_the_file_is_refused_by_name() {
    let Some(folder) = support::shared("data/zoo_edge") else { return };
    let (spec, _) = spec_from_sidecar(&folder, "edge_two_outputs");
    let refuse = |spec: ModelSpec, word: &str| {
        let outcome = BlackTeacher::open(spec, runtime(), OPTIONS);
        let error = match outcome.map(|teacher| teacher.logits(&noise(2))) {
            Ok(answer) => answer.unwrap_err(),
            Err(error) => error,
        };
        assert_eq!(error.kind(), ErrorKind::Input);
        assert!(
            error.to_string().contains(word) && error.to_string().contains("edge_two"),
            "{error}"
        );
    };
    refuse(ModelSpec { logits_output: "scores".into(), ..spec.clone() }, "`logits`");
    refuse(ModelSpec { input_name: "image".into(), ..spec.clone() }, "`image`");
    refuse(ModelSpec { logits_output: "embedding".into(), ..spec.clone() }, "[2, 128]");
    refuse(ModelSpec { classes: 7, ..spec.clone() }, "7 values");
    let wide = Preprocess { input_size: [3, 40, 40], ..spec.preprocess.clone() };
    refuse(ModelSpec { preprocess: wide, ..spec }, "nvalid");
}

/// ONNX Runtime 1.29 and later write a database and a device id below HOME unless told not to.
#[test]
fn an_inference_writes_no_telemetry() {
    let Some(folder) = support::shared("data/zoo_edge") else { return };
    let home = support::temp_dir();
    let request = ProbeRequest {
        model: folder.join("edge_auto_pad_same.onnx"),
        library: runtime().library().path.clone(),
        input: None,
    };
    let mut command = support::metazoa(home.path());
    command.args([VERB, &serde_json::to_string(&request).unwrap()]);
    for name in
        ["ORT_DISABLE_TELEMETRY", "CI", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"]
    {
        command.env_remove(name);
    }
    let output = command.env("HOME", home.path()).env("TMPDIR", home.path()).output().unwrap();
    let answer = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && answer.contains("Report"), "{answer}");
    let written: Vec<_> = walkdir::WalkDir::new(home.path())
        .min_depth(1)
        .into_iter()
        .map(|entry| entry.unwrap().into_path())
        .collect();
    assert!(written.is_empty(), "{written:?}");
}
