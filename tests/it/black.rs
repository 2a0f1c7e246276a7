//! Black-box teachers on the real files of `zoo_edge`: what the adapter feeds them, what they answer,
//! what a gradient estimate is worth and costs. ONNX Runtime must be there (`metazoa setup`).

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use metazoa::access::Teacher;
use metazoa::access::black::{BlackOptions, BlackTeacher};
use metazoa::access::zero_order::{Difference, ZeroOrder};
use metazoa::tensor::Images;
use metazoa::zoo::{
    Access, BatchDimension, Color, ElementType, Layout, ModelSpec, OutputKind, Preprocess,
};
use serde_json::Value;

use crate::support::{self, runtime};

const OPTIONS: BlackOptions = BlackOptions {
    zero_order: ZeroOrder {
        directions: 20,
        radius: 0.05,
        difference: Difference::Forward,
        pack: 64,
    },
    batch: 64,
    spent: 0,
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
        path,
        sha: String::new(),
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
