//! The frozen plan on real models: outputs against ONNX Runtime, gradients against central
//! differences in `f64`.

use std::path::Path;

use metazoa::access::{Borrowing, Surrogate, Teacher, WhiteTeacher};
use metazoa::graph::check::{GradientCheck, check_gradient, relative_error};
use metazoa::graph::unsupported_ops;
use metazoa::tensor::{Images, RngStream};

use crate::black;
use crate::support::{repository, shared};

/// Images on the 8-bit grid, so that `uint8` inputs lose nothing.
fn images(n: usize, size: usize) -> Images {
    let mut rng = RngStream::new(5, "graph-test", "", size as u64);
    let data = (0..n * 3 * size * size).map(|_| rng.below(256) as f32 / 255.0).collect();
    Images::new(data, [n, 3, size, size]).unwrap()
}

fn log_softmax(logits: &[f32], classes: usize) -> Vec<f64> {
    let mut out = Vec::new();
    for row in logits.chunks_exact(classes) {
        let top = row.iter().copied().fold(f32::MIN, f32::max);
        let sum: f64 = row.iter().map(|&v| f64::from(v - top).exp()).sum();
        out.extend(row.iter().map(|&v| f64::from(v - top) - sum.ln()));
    }
    out
}

/// White-box against ONNX Runtime (relative error of the log-softmax) and against itself.
fn measure(folder: &Path, name: &str) -> metazoa::Result<(f64, GradientCheck)> {
    let (spec, _) = black::spec_from_sidecar(folder, name);
    let model = metazoa::onnx::load(&spec.path, folder)?;
    let unsupported = unsupported_ops(&model.graph);
    if !unsupported.is_empty() {
        return Err(metazoa::Error::unsupported(unsupported.join(", ")));
    }
    let classes = spec.classes;
    let white = WhiteTeacher::new(spec.clone(), model.graph, Surrogate::Auto)?;
    let [_, height, _] = spec.preprocess.input_size;
    let batch = images(3, height);
    let reference = black::open(spec).logits(&batch)?;
    let ours = white.logits(&batch)?;
    let error = relative_error(&log_softmax(&ours, classes), &log_softmax(&reference, classes));
    let pair = batch.range(0, 2);
    let n = match white.spec().batch {
        metazoa::zoo::BatchDimension::Fixed(n) => n,
        metazoa::zoo::BatchDimension::Free => 2,
    };
    let input = white.adapter().forward(&pair.select(&vec![0; n]))?;
    let check = check_gradient(white.graph(), &white.options(n), &input, 7)?;
    Ok((error, check))
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .filter_map(|entry| {
            let name = entry.unwrap().file_name().into_string().unwrap();
            name.strip_suffix(".onnx").map(str::to_owned)
        })
        .collect();
    names.sort();
    names
}

/// Checks each model of `folder`; those of `black_only` must be the only ones refused.
fn check_folder(folder: &Path, black_only: &[&str]) {
    let mut refused = Vec::new();
    for name in names(folder) {
        match measure(folder, &name) {
            Ok((output, gradient)) => {
                eprintln!("{name}: output {output:.1e}, {gradient:?}");
                // ONNX Runtime rounds this one's every operation to 11 bits; our engine computes in f32.
                let bound = if name == "edge_fp16_compute" { 2e-3 } else { 1e-4 };
                assert!(output < bound, "{name}: output differs by {output:e} from ONNX Runtime");
                let error = gradient.gradient_rel_err;
                assert!(error < 1e-5, "{name}: gradient off by {error:e} from differences");
            }
            Err(error) => {
                eprintln!("{name}: refused: {error}");
                refused.push(name);
            }
        }
    }
    assert_eq!(refused, black_only);
}

#[test]
fn bundled_models_run_and_differentiate_as_onnx_runtime_says() {
    check_folder(&repository().join("zoo"), &[]);
}

#[test]
fn heterogeneous_models_run_and_differentiate_as_onnx_runtime_says() {
    for zoo in ["data/zoo_sh", "data/zoo_mh"] {
        let Some(folder) = shared(zoo) else { return };
        check_folder(&folder, &[]);
    }
}

#[test]
fn awkward_models_run_and_differentiate_as_onnx_runtime_says() {
    let Some(folder) = shared("data/zoo_edge") else { return };
    check_folder(&folder, &[]);
}

#[test]
fn models_without_statistics_get_stand_ins_and_the_others_keep_their_own() {
    let folder = repository().join("zoo");
    let layers = |name: &str, surrogate| {
        let (spec, _) = black::spec_from_sidecar(&folder, name);
        let model = metazoa::onnx::load(&spec.path, &folder).unwrap();
        WhiteTeacher::new(spec, model.graph, surrogate).unwrap().statistics_layers()
    };
    // Four convolutions, their BatchNormalization folded into them or beside them.
    let folded = "edge_export_dynamo_default";
    assert_eq!(layers(folded, Surrogate::Off), 0);
    assert_eq!(layers(folded, Surrogate::Auto), 4);
    assert_eq!(layers("edge_softmax", Surrogate::Off), 4);
    assert_eq!(layers("edge_softmax", Surrogate::Procedural), 4);
}

/// The statistics of images that fit are nearer to the stand-ins than those of noise.
#[test]
fn stand_ins_tell_the_training_images_from_noise() {
    let folder = repository().join("zoo");
    let (spec, _) = black::spec_from_sidecar(&folder, "edge_export_dynamo_default");
    let model = metazoa::onnx::load(&spec.path, &folder).unwrap();
    let white = WhiteTeacher::new(spec, model.graph, Surrogate::Unit).unwrap();
    let glyphs = folder.join("images/glyphs");
    let glyphs = metazoa::data::ImageFolder::open(&glyphs, Some("meta_val")).unwrap();
    let (set, _) = glyphs.load([32, 32]).unwrap();
    let glyphs = set.select(&(0..24).map(|i| i * set.len() / 24).collect::<Vec<_>>());
    let loss = metazoa::methods::parts::CrossEntropy::new(vec![0; 24]);
    let objective = metazoa::access::Objective { logits: &loss, statistics_weight: 1.0 };
    let statistics = |images: &Images| {
        let mut rng = RngStream::new(0, "test", "", 0);
        white.image_gradient(images, &objective, &mut rng).unwrap().statistics_loss
    };
    let (ours, noise) = (statistics(&glyphs), statistics(&images(24, 32)));
    assert!(ours < 0.7 * noise, "glyphs {ours:.2}, noise {noise:.2}");
}

/// A model with layer normalisation is held to the statistics of a lender; a model with its own keeps them.
#[test]
fn statistics_are_borrowed_where_a_model_has_none() {
    let folder = repository().join("zoo");
    let open = |name: &str| {
        let (spec, _) = black::spec_from_sidecar(&folder, name);
        let model = metazoa::onnx::load(&spec.path, &folder).unwrap();
        WhiteTeacher::new(spec, model.graph, Surrogate::Off).unwrap()
    };
    let lender = std::sync::Arc::new(open("sh_000_glyphs_conv4_64"));
    let lenders = [std::sync::Arc::clone(&lender)];
    let name = "sh_006_glyphs_convnext_ln_gelu";
    let (own, borrowing) = (open(name), Borrowing::over(Box::new(open(name)), &lenders, 2.0));
    assert_eq!((own.statistics_layers(), borrowing.statistics_layers()), (0, 1));

    let images = images(4, 32);
    let loss = metazoa::methods::parts::CrossEntropy::new(vec![0, 1, 2, 3]);
    let gradient = |teacher: &dyn Teacher, statistics_weight| {
        let objective = metazoa::access::Objective { logits: &loss, statistics_weight };
        let mut rng = RngStream::new(0, "test", "", 0);
        teacher.image_gradient(&images, &objective, &mut rng).unwrap()
    };
    let found = gradient(borrowing.as_ref(), 0.4);
    let layers = lender.statistics_layers() as f32;
    // What the statistics add to the lender's own gradient is what the borrower's gains.
    let (with, without) = (gradient(&*lender, 0.8 / layers), gradient(&*lender, 0.0));
    let expected: Vec<f32> = (gradient(&own, 0.0).gradient.data().iter())
        .zip(with.gradient.data().iter().zip(without.gradient.data()))
        .map(|(own, (with, without))| own + (with - without))
        .collect();
    let wide = |v: &[f32]| v.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
    let error = relative_error(&wide(found.gradient.data()), &wide(&expected));
    assert!(error < 1e-5, "{error:e}");
    let share = with.statistics_loss / f64::from(layers);
    assert!((found.statistics_loss - share).abs() < 1e-9);

    let rich = Borrowing::over(Box::new(open("sh_003_glyphs_vgg_bn")), &lenders, 2.0);
    assert_eq!(rich.statistics_layers(), open("sh_003_glyphs_vgg_bn").statistics_layers());
    assert_eq!(Borrowing::over(Box::new(open(name)), &[], 2.0).statistics_layers(), 0);
}

/// Normalisation-free networks standardise their weights; exporters write that as BatchNormalization in
/// training mode of a constant.
#[test]
fn standardised_weights_are_folded() {
    use metazoa::graph::{
        Attribute, CompileOptions, ConstantTensor, DataType, Dimension, Gradient, Graph, Node,
        Plan, Port, Taps,
    };
    let port = |name: &str| Port {
        name: name.into(),
        dtype: DataType::Float32,
        shape: Some([1, 2, 4].map(Dimension::Fixed).to_vec()),
    };
    let mut graph =
        Graph { opset: 17, inputs: vec![port("x")], outputs: vec![port("y")], ..Graph::default() };
    let mut constant = |name: &str, shape: &[usize], values: &[f32]| {
        let tensor = ConstantTensor::f32(shape, values.to_vec());
        graph.constants.insert(name.into(), std::sync::Arc::new(tensor));
    };
    constant("w", &[1, 2, 4], &[0.0, 1.0, 2.0, 3.0, 5.0, 5.0, 5.0, 9.0]);
    constant("scale", &[2], &[2.0, 1.0]);
    constant("shift", &[2], &[0.0, 10.0]);
    constant("mean", &[2], &[1.0, 1.0]);
    constant("var", &[2], &[1.0, 1.0]);
    let parameters = ["w", "scale", "shift", "mean", "var"];
    let outputs = ["v", "new_mean", "new_var"];
    graph.nodes = vec![
        Node::new("BatchNormalization", "standardise", &parameters, &outputs)
            .with("training_mode", Attribute::Int(1))
            .with("epsilon", Attribute::Float(0.0))
            .with("momentum", Attribute::Float(0.75)),
        Node::new("ReduceSum", "sum", &["new_var"], &["total"]).with("keepdims", Attribute::Int(0)),
        Node::new("Add", "add", &["x", "v"], &["s"]),
        Node::new("Add", "more", &["s", "total"], &["y"]),
    ];
    let options = CompileOptions {
        input: "x".into(),
        input_shape: vec![1, 2, 4],
        output: "y".into(),
        gradient: Gradient::Wanted,
        taps: Taps::Norms,
    };
    let plan = Plan::<f64>::compile(&graph, &options).unwrap();
    let found = plan.forward(&mut plan.workspace(), &[0.0; 8]).to_vec();
    // Channel 0: mean 1.5, variance 1.25; channel 1: mean 6, variance 3. New variances 0.75 + v / 4.
    let total = (0.75 + 1.25 / 4.0) + (0.75 + 3.0 / 4.0);
    let of = |w: f64| total + 2.0 * (w - 1.5) / 1.25f64.sqrt();
    let and = |w: f64| total + 10.0 + (w - 6.0) / 3f64.sqrt();
    let expected = [of(0.0), of(1.0), of(2.0), of(3.0), and(5.0), and(5.0), and(5.0), and(9.0)];
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-6, "{found} instead of {expected}");
    }

    graph.nodes[0].inputs[0] = "x".into();
    let error = Plan::<f64>::compile(&graph, &options).unwrap_err();
    assert!(error.to_string().contains("training mode"), "{error}");
}
