//! Any classifier's ONNX file as the backbone: real files of the bundled zoo, checkpoints, the command.

use std::path::{Path, PathBuf};

use metazoa::access::session::Tensor as Values;
use metazoa::access::{Surrogate, Teacher, WhiteTeacher};
use metazoa::graph::{ConstantTensor, DataType, Dimension, Graph, Node, Port};
use metazoa::meta::Task;
use metazoa::meta::{Backbone, BnMode, InnerLoop, InnerOrder, Learner, MetaModel};
use metazoa::onnx::{self, ExportInfo};
use metazoa::tensor::tape::{Order, Tape, Var, grad};
use metazoa::tensor::{Images, RngStream, TensorStore};
use metazoa::zoo::facts::GraphIndex;
use metazoa::zoo::read::read_file;
use serde_json::Value;

use crate::support::{repository, run_in, runtime, shared, temp_dir};

/// Files of the bundled zoo that can be trained.
const TRAINABLE: [&str; 13] = [
    "ss_001_glyphs_conv4_32",
    "ss_011_glyphs_conv4_32",
    "ss_028_glyphs_conv4_32",
    "sh_000_glyphs_conv4_64",
    "sh_003_glyphs_vgg_bn",
    "sh_004_glyphs_mobilenetv2",
    "sh_006_glyphs_convnext_ln_gelu",
    "mh_001_icons_conv4_32",
    "mh_002_textures_conv4_32",
    "mh_003_glyphs_resnet10",
    "mh_006_glyphs_senet_sigmoid",
    "mh_008_textures_densenet",
    "edge_softmax",
];

fn bundled(name: &str) -> PathBuf {
    repository().join("zoo").join(format!("{name}.onnx"))
}

fn images(n: usize, [height, width]: [usize; 2]) -> Images {
    let mut rng = RngStream::new(9, "backbone files", "", 0);
    let pixels = (0..n * 3 * height * width).map(|_| rng.uniform()).collect();
    Images::new(pixels, [n, 3, height, width]).unwrap()
}

fn close(own: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(own.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(1e-3f32, |most, v| most.max(v.abs()));
    for (a, b) in own.iter().zip(expected) {
        assert!((a - b).abs() <= tolerance * scale, "{what}: {a} instead of {b}");
    }
}

/// The file's own last layer on embeddings: `[n, classes]`, for files that end in a Gemm.
fn own_head(graph: &Graph, logits: &str, rows: &[f32], n: usize) -> Option<Vec<f32>> {
    let index = GraphIndex::new(graph);
    let gemm = index.producer(logits).filter(|node| node.op_type == "Gemm")?;
    let weight = index.constant_input(gemm, 1)?;
    let bias = index.constant_input(gemm, 2)?;
    assert_eq!(gemm.int("transB", 0).unwrap(), 1);
    let (values, dim) = (weight.to_f32(), weight.shape[1]);
    assert_eq!(rows.len(), n * dim, "the embedding is what the last layer reads");
    let logit = |x: &[f32], (w, b): (&[f32], f32)| {
        (x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum::<f64>() + f64::from(b))
            as f32
    };
    let heads: Vec<(&[f32], f32)> = values.chunks(dim).zip(bias.to_f32()).collect();
    Some(rows.chunks(dim).flat_map(|x| heads.iter().map(move |h| logit(x, *h))).collect())
}

#[test]
fn a_files_embedding_with_its_own_head_is_the_file_again() {
    let mut heads = 0;
    for name in TRAINABLE {
        let path = bundled(name);
        let spec = read_file(&path).unwrap().spec;
        let graph = onnx::load(&path, &repository().join("zoo")).unwrap().graph;
        let [_, height, width] = spec.preprocess.input_size;
        let backbone = Backbone::from_onnx(&path, [height, width]).unwrap();
        let x = images(3, [height, width]);
        let rows = backbone.embed(&x, BnMode::Running).unwrap();
        let logits = spec.logits_output.clone();
        if let Some(own) = own_head(&graph, &logits, &rows, 3) {
            let teacher = WhiteTeacher::new(spec, graph.clone(), Surrogate::Off).unwrap();
            close(&own, &teacher.logits(&x).unwrap(), 1e-4, name);
            heads += 1;
        }
    }
    assert!(heads >= 8, "{heads} files end in a Gemm");
}

#[test]
fn a_files_embedding_survives_its_checkpoint_and_runs_in_onnx_runtime_at_another_size() {
    let here = temp_dir();
    for name in TRAINABLE {
        // Not the file's own size: resized inside the graph.
        let size = [40, 36];
        let mut backbone = match Backbone::from_onnx(&bundled(name), size) {
            Ok(backbone) => backbone,
            // Older operator sets cannot resize, and say so.
            Err(error) => {
                assert!(error.to_string().contains("must be resized"), "{name}: {error}");
                continue;
            }
        };
        // Other weights than the file's, as after training.
        let moved = |t: &candle_core::Tensor| (t * 1.01).unwrap();
        let values = backbone.parameters().iter().map(|p| moved(&p.value)).collect();
        backbone.set_parameters(values).unwrap();
        let x = images(3, size);
        let rows = backbone.embed(&x, BnMode::Running).unwrap();
        let mut store = TensorStore::default();
        backbone.write_to(&mut store).unwrap();
        let bytes = store.to_bytes().unwrap();
        let again = Backbone::read_from(&TensorStore::from_bytes(&bytes).unwrap()).unwrap();
        assert_eq!(again.embed(&x, BnMode::Running).unwrap(), rows, "{name}");
        let mut second = TensorStore::default();
        again.write_to(&mut second).unwrap();
        assert!(second.to_bytes().unwrap() == bytes, "{name}: other bytes");

        let file = here.path().join(format!("{name}.onnx"));
        let graph = backbone.to_graph(size[0], size[1]).unwrap();
        onnx::write(&file, &graph, &ExportInfo::new([].into())).unwrap();
        let mut session = runtime().open(&file).unwrap();
        let input = Values::f32(x.shape(), x.into_data());
        let theirs = session.run(vec![("images", input)], &["embedding"]).unwrap().remove(0);
        close(&rows, &theirs.values.to_f32(), 1e-4, name);
    }
}

#[test]
fn the_ten_architectures_of_the_heterogeneous_zoo_are_backbones() {
    let Some(zoo) = shared("data/zoo_sh") else { return };
    let mut files: Vec<PathBuf> = std::fs::read_dir(&zoo)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "onnx"))
        .collect();
    files.sort();
    assert!(files.len() >= 10);
    for path in files.iter().take(12) {
        let backbone = Backbone::from_onnx(path, [32, 32]).unwrap();
        let dim = backbone.embedding_dim(32, 32).unwrap();
        let rows = backbone.embed(&images(2, [32, 32]), BnMode::Batch).unwrap();
        assert!(rows.len() == 2 * dim && rows.iter().all(|v| v.is_finite()), "{path:?}");
    }
}

/// A file with one node after another, images `[batch, 3, 8, 8]` in, `logits` out.
fn write_graph(path: &Path, nodes: Vec<Node>, constants: &[(&str, ConstantTensor)]) {
    let symbol = || Dimension::Symbol("batch".into());
    let port = |name: &str, shape: Vec<Dimension>| Port {
        name: name.into(),
        dtype: DataType::Float32,
        shape: Some(shape),
    };
    let sizes = [3, 8, 8].map(Dimension::Fixed);
    let graph = Graph {
        name: "test".into(),
        opset: 17,
        inputs: vec![port("x", std::iter::once(symbol()).chain(sizes).collect())],
        outputs: vec![port("logits", vec![symbol(), Dimension::Fixed(3)])],
        nodes,
        constants: constants
            .iter()
            .map(|(name, value)| ((*name).to_owned(), std::sync::Arc::new(value.clone())))
            .collect(),
    };
    onnx::write(path, &graph, &ExportInfo::new([].into())).unwrap();
}

#[test]
fn files_that_cannot_be_a_backbone_are_refused_with_node_file_and_what_to_do() {
    let here = temp_dir();
    let pooled = here.path().join("pooled.onnx");
    let nodes = vec![
        Node::new("GlobalMaxPool", "pool", &["x"], &["peaks"]),
        Node::new("Flatten", "flatten", &["peaks"], &["logits"]),
    ];
    write_graph(&pooled, nodes, &[]);
    let direct = here.path().join("direct.onnx");
    let weight = ConstantTensor::f32(vec![192, 3], vec![0.1; 576]);
    let nodes = vec![
        Node::new("Flatten", "flatten", &["x"], &["rows"]),
        Node::new("MatMul", "last", &["rows", "w"], &["logits"]),
    ];
    write_graph(&direct, nodes, &[("w", weight)]);
    for (path, words) in [
        (pooled, "node `pool` (GlobalMaxPool)"),
        (direct, "no weight before the last linear layer"),
        (bundled("edge_int8_qdq"), "cannot be trained"),
        (bundled("edge_nhwc_uint8"), "must be float32"),
        (here.path().join("gone.onnx"), "No such file"),
    ] {
        let error = Backbone::from_onnx(&path, [8, 8]).unwrap_err();
        let text = error.to_string();
        let file = path.file_name().unwrap().to_str().unwrap();
        assert!(text.contains(words) && text.contains(file), "{text}");
    }
}

#[test]
fn exact_second_order_on_an_operator_without_it_names_the_node() {
    let inner = |order| InnerLoop { train_steps: 1, test_steps: 1, learning_rate: 0.01, order };
    let network = |name| Backbone::from_onnx(&bundled(name), [32, 32]).unwrap();
    let make = |name, learner| MetaModel::new(network(name), learner, [32, 32], 0);
    let convnext = "sh_006_glyphs_convnext_ln_gelu";
    let error = make(convnext, Learner::Maml(inner(InnerOrder::Second))).unwrap_err();
    assert!(error.to_string().contains("node `"), "{error}");
    assert!(error.hint_text().unwrap().contains("order: first"), "{error}");
    make(convnext, Learner::Maml(inner(InnerOrder::First))).unwrap();
    make(convnext, Learner::Anil(inner(InnerOrder::Second))).unwrap();
    make(convnext, Learner::ProtoNet).unwrap();
    for name in ["ss_001_glyphs_conv4_32", "mh_003_glyphs_resnet10"] {
        make(name, Learner::Maml(inner(InnerOrder::Second))).unwrap();
    }
}

#[test]
fn the_mean_of_models_is_that_of_their_weights_however_they_were_exported() {
    let size = [32, 32];
    let open = |name: &str| (name.to_owned(), Backbone::from_onnx(&bundled(name), size).unwrap());
    // Two exporters: other names, and shapes computed in one file and fixed in the other.
    let (a, b) = (open("ss_001_glyphs_conv4_32"), open("ss_028_glyphs_conv4_32"));
    let mean = Backbone::average([a.clone(), b.clone()].into_iter().map(Ok), size).unwrap();
    let values = |network: &Backbone| -> Vec<f32> {
        let own = network.parameters().iter();
        let weights = own.flat_map(|p| p.value.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        let running = network.running().iter().flat_map(|r| [r.mean.clone(), r.variance.clone()]);
        weights.chain(running.flatten()).collect()
    };
    let (left, right) = (values(&a.1), values(&b.1));
    let expected: Vec<f32> = left.iter().zip(&right).map(|(a, b)| 0.5 * (a + b)).collect();
    close(&values(&mean), &expected, 1e-6, "mean");
    let x = images(2, size);
    let alone = Backbone::average(std::iter::once(Ok(a.clone())), size).unwrap();
    let embed = |network: &Backbone| network.embed(&x, BnMode::Running).unwrap();
    assert_eq!(embed(&alone), embed(&a.1));
    let other = open("mh_003_glyphs_resnet10");
    let error = Backbone::average([a, other].into_iter().map(Ok), size).unwrap_err();
    assert!(error.to_string().contains("several architectures"), "{error}");
}

#[test]
fn second_order_goes_through_a_file_whose_images_are_resized() {
    let inner =
        InnerLoop { train_steps: 2, test_steps: 2, learning_rate: 0.05, order: InnerOrder::Second };
    let size = [40, 36];
    let network = Backbone::from_onnx(&bundled("ss_001_glyphs_conv4_32"), size).unwrap();
    let model = MetaModel::new(network, Learner::Maml(inner), size, 1).unwrap();
    let gradients = |order| -> Vec<f32> {
        let tape = Tape::new();
        let leaves = model.leaves(&tape);
        let mut both = images(4, size);
        both.extend(&images(6, size)).unwrap();
        let shape = both.shape();
        let value =
            candle_core::Tensor::from_vec(both.into_data(), &shape, &candle_core::Device::Cpu);
        let both = tape.constant(value.unwrap());
        let task = Task::new(&both, &[0, 0, 1, 1], 2);
        let answer = model.answer(&leaves, task, 2, order, BnMode::Batch).unwrap();
        let loss = answer.logits.cross_entropy(&[0, 0, 0, 1, 1, 1]).unwrap();
        let found = grad(&loss, &leaves.iter().collect::<Vec<_>>(), Order::First).unwrap();
        let values = |g: &Var| g.value().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        found.iter().flat_map(values).collect()
    };
    let (exact, first) = (gradients(Order::Higher), gradients(Order::First));
    let norm = |v: &[f32]| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let gap: Vec<f32> = exact.iter().zip(&first).map(|(a, b)| a - b).collect();
    assert!(norm(&exact).is_finite() && norm(&gap) > 1e-3 * norm(&exact), "{}", norm(&gap));
}

/// A zoo of two Conv4 models and a backbone file beside it.
fn set_up(dir: &Path, backbone: &str) {
    std::fs::create_dir(dir.join("zoo")).unwrap();
    let from = repository().join("zoo");
    for name in ["ss_001_glyphs_conv4_32", "ss_028_glyphs_conv4_32"] {
        for extension in ["onnx", "yaml"] {
            let file = format!("{name}.{extension}");
            std::fs::copy(from.join(&file), dir.join("zoo").join(&file)).unwrap();
        }
    }
    for extension in ["onnx", "yaml"] {
        let yaml = std::fs::read(from.join(format!("{backbone}.{extension}"))).unwrap();
        let text = String::from_utf8_lossy(&yaml).replace(&format!("{backbone}.onnx"), "mine.onnx");
        let target = dir.join(format!("mine.{extension}"));
        if extension == "yaml" {
            std::fs::write(target, text).unwrap();
        } else {
            std::fs::write(target, &yaml).unwrap();
        }
    }
}

#[test]
fn a_run_on_a_file_trains_evaluates_exports_and_adapts_after_the_file_is_gone() {
    let data = repository().join("zoo/images/glyphs");
    let data = data.to_str().unwrap();
    for (learner, backbone) in [
        ("protonet", "sh_004_glyphs_mobilenetv2"),
        ("anil", "sh_006_glyphs_convnext_ln_gelu"),
        ("maml", "ss_028_glyphs_conv4_32"),
    ] {
        let dir = temp_dir();
        set_up(dir.path(), backbone);
        let learner_is = format!("meta.learner={learner}");
        let settings = [
            "recover.images_per_class=5",
            "recover.white_box.steps=2",
            "meta.shot=2",
            "meta.query=2",
            "meta.steps=3",
            "meta.inner.train_steps=1",
            "meta.inner.test_steps=2",
            "meta.backbone=mine.onnx",
            &learner_is,
        ];
        let mut args = vec!["train", "zoo", "--out", "r", "--json"];
        args.extend(settings.iter().flat_map(|setting| ["-s", setting]));
        let ran = run_in(dir.path(), &args);
        assert_eq!(ran.code, 0, "{learner}: {}", ran.stderr);
        std::fs::remove_file(dir.path().join("mine.onnx")).unwrap();
        for bn in ["inductive", "transductive"] {
            let args = ["eval", "r", "--data", data, "--split", "meta_test", "--episodes", "6"];
            let more = ["--query", "5", "--bn", bn, "--baselines", "--json"];
            let ran = run_in(dir.path(), &[&args[..], &more].concat());
            assert_eq!(ran.code, 0, "{learner}: {}", ran.stderr);
            let result: Value = serde_json::from_str(&ran.stdout).unwrap();
            assert_eq!(result["bn"], bn);
            for name in ["untrained", "average", "best-model", "pixel-nearest"] {
                let accuracy = &result["baselines"][name]["accuracy"];
                assert!(accuracy.is_number(), "{learner} {name}: {result}");
            }
        }
        for form in ["embedding", "episode"] {
            let ran = run_in(dir.path(), &["export", "r", "--form", form, "--out", "e.onnx"]);
            let expected = i32::from(learner == "maml" && form == "episode");
            assert_eq!(ran.code, expected, "{learner} {form}: {}", ran.stderr);
        }
        let args = ["adapt", "r", data, "--split", "meta_test", "--shot", "3", "--out", "a.onnx"];
        let ran = run_in(dir.path(), &args);
        assert_eq!(ran.code, 0, "{learner}: {}", ran.stderr);
        // What was adapted is a classifier again, and so a backbone.
        Backbone::from_onnx(&dir.path().join("a.onnx"), [32, 32]).unwrap();
    }
}

#[test]
fn a_backbone_that_cannot_be_trained_is_refused_before_anything_is_recovered() {
    let dir = temp_dir();
    set_up(dir.path(), "sh_006_glyphs_convnext_ln_gelu");
    for (settings, words) in [
        (&["meta.backbone=mine.onnx", "meta.learner=maml"][..], "has no second derivative here"),
        (&["meta.backbone=gone.onnx"], "gone.onnx"),
        (&["meta.backbone=conv5"], "conv5"),
    ] {
        let mut args = vec!["train", "zoo", "--out", "r"];
        args.extend(settings.iter().flat_map(|setting| ["-s", setting]));
        let ran = run_in(dir.path(), &args);
        assert!(matches!(ran.code, 1 | 2), "{}", ran.stderr);
        assert!(ran.stderr.contains(words), "{}", ran.stderr);
        assert!(!dir.path().join("r").exists(), "a refused backbone left a run folder");
    }
}
