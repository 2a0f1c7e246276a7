//! Graphs with free weights on the tape: real models against the frozen plan, and the gradient to every
//! weight against central differences in `f64`.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use metazoa::graph::trainable::{RunningStatistics, Statistics, free_constants};
use metazoa::graph::{CompileOptions, Gradient, Graph, Plan, Taps, Trainable};
use metazoa::tensor::RngStream;
use metazoa::tensor::tape::{Order, Tape, Var, grad};

use crate::black;
use crate::support::repository;

/// A model of the bundled zoo: its graph, its input's name and shape for two images, its logits' name.
struct Model {
    graph: Graph,
    input: String,
    shape: Vec<usize>,
    output: String,
}

fn model(name: &str) -> Model {
    let folder = repository().join("zoo");
    let (spec, _) = black::spec_from_sidecar(&folder, name);
    let graph = metazoa::onnx::load(&spec.path, Path::new(&folder)).unwrap().graph;
    let [c, h, w] = spec.preprocess.input_size;
    Model {
        input: graph.inputs[0].name.clone(),
        shape: vec![2, c, h, w],
        output: spec.logits_output,
        graph,
    }
}

fn noise(n: usize, index: u64) -> Vec<f64> {
    RngStream::new(4, "trainable", "", index).normals(n).into_iter().map(f64::from).collect()
}

fn tensor(values: Vec<f64>, shape: &[usize], dtype: DType) -> Tensor {
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// Values of the weights `names`.
fn weights(graph: &Graph, names: &[String], dtype: DType) -> Vec<Tensor> {
    let value = |name: &String| {
        let constant = &graph.constants[name];
        tensor(constant.to_f64(), &constant.shape, dtype)
    };
    names.iter().map(value).collect()
}

/// All models of the bundled zoo that are white-box and in `f32`, with how many weights are free at least.
const MODELS: [(&str, usize); 11] = [
    ("ss_001_glyphs_conv4_32", 16),
    ("sh_003_glyphs_vgg_bn", 12),
    ("sh_004_glyphs_mobilenetv2", 30),
    ("sh_006_glyphs_convnext_ln_gelu", 20),
    ("mh_003_glyphs_resnet10", 20),
    ("mh_006_glyphs_senet_sigmoid", 10),
    ("mh_008_textures_densenet", 20),
    ("sh_000_glyphs_conv4_64", 16),
    ("mh_001_icons_conv4_32", 16),
    ("edge_softmax", 4),
    ("edge_export_dynamo_default", 4),
];

#[test]
fn a_graph_with_free_weights_computes_what_the_plan_does() {
    for (name, least) in MODELS {
        let Model { graph, input, shape, output } = model(name);
        let names = free_constants(&graph, &output);
        assert!(names.len() >= least, "{name}: {} free weights", names.len());
        let options = CompileOptions {
            input: input.clone(),
            input_shape: shape.clone(),
            output: output.clone(),
            gradient: Gradient::Unused,
            taps: Taps::Norms,
        };
        let plan = Plan::<f64>::compile(&graph, &options).unwrap();
        let x = noise(shape.iter().product(), 0);
        let expected = plan.forward(&mut plan.workspace(), &x).to_vec();

        let network = Trainable::<f64>::compile(&graph, &input, &shape, &output, &names).unwrap();
        let running: Vec<RunningStatistics> =
            network.norms().iter().map(|norm| norm.running.clone()).collect();
        let tape = Tape::new();
        let free: Vec<Var> =
            weights(&graph, &names, DType::F64).into_iter().map(|w| tape.leaf(w)).collect();
        let x = tape.constant(tensor(x, &shape, DType::F64));
        let pass = network.run(&free, &x, Statistics::Given(&running)).unwrap();
        let own: Vec<f64> = pass.output.value().flatten_all().unwrap().to_vec1().unwrap();
        let scale = expected.iter().fold(1e-3f64, |most, v| most.max(v.abs()));
        for (a, b) in own.iter().zip(&expected) {
            assert!((a - b).abs() < 1e-7 * scale, "{name}: {a} instead of {b}");
        }
    }
}

#[test]
fn gradients_to_all_weights_are_those_of_central_differences() {
    for (name, _) in MODELS {
        let Model { graph, input, shape, output } = model(name);
        let names = free_constants(&graph, &output);
        let network = Trainable::<f64>::compile(&graph, &input, &shape, &output, &names).unwrap();
        let values = weights(&graph, &names, DType::F64);
        let x = tensor(noise(shape.iter().product(), 0), &shape, DType::F64);
        let cotangent = noise(network.output_shape().iter().product(), 1);
        // The batch's own statistics: what training uses.
        let objective = |values: &[Tensor]| -> (Var, Vec<Var>) {
            let tape = Tape::new();
            let free: Vec<Var> = values.iter().map(|w| tape.leaf(w.clone())).collect();
            let pass = network.run(&free, &tape.constant(x.clone()), Statistics::Batch).unwrap();
            assert_eq!(pass.statistics.len(), network.norms().len());
            let weight = tensor(cotangent.clone(), network.output_shape(), DType::F64);
            let loss = pass.output.mul(&tape.constant(weight)).unwrap().sum_all().unwrap();
            (loss, free)
        };
        let (loss, free) = objective(&values);
        let gradients = grad(&loss, &free.iter().collect::<Vec<_>>(), Order::First).unwrap();
        let mut good = 0;
        for attempt in 0..4 {
            let directions: Vec<Tensor> = values
                .iter()
                .enumerate()
                .map(|(at, value)| {
                    let n = value.elem_count();
                    tensor(noise(n, 100 * (attempt + 1) + at as u64), value.dims(), DType::F64)
                })
                .collect();
            let exact: f64 = gradients
                .iter()
                .zip(&directions)
                .map(|(gradient, d)| {
                    (gradient.value() * d).unwrap().sum_all().unwrap().to_vec0::<f64>().unwrap()
                })
                .sum();
            // Steps of which some cross no kink of a ReLU.
            let best = [1e-6, 1e-8, 1e-9, 1e-10]
                .into_iter()
                .map(|h| {
                    let at = |sign: f64| {
                        let moved: Vec<Tensor> = values
                            .iter()
                            .zip(&directions)
                            .map(|(value, d)| (value + (d * (sign * h)).unwrap()).unwrap())
                            .collect();
                        objective(&moved).0.scalar().unwrap()
                    };
                    let slope = (at(1.0) - at(-1.0)) / (2.0 * h);
                    (slope - exact).abs() / slope.abs().max(1e-3)
                })
                .fold(f64::INFINITY, f64::min);
            good += usize::from(best < 1e-5);
        }
        assert!(good >= 3, "{name}: {good} of 4 directions agree");
    }
}

#[test]
fn a_second_derivative_that_is_missing_names_its_node() {
    // The softmax-free ConvNeXt has GELU and layer normalisation, which are steps of the plan.
    let Model { graph, input, shape, output } = model("sh_006_glyphs_convnext_ln_gelu");
    let names = free_constants(&graph, &output);
    let network = Trainable::<f32>::compile(&graph, &input, &shape, &output, &names).unwrap();
    let tape = Tape::new();
    let free: Vec<Var> =
        weights(&graph, &names, DType::F32).into_iter().map(|w| tape.leaf(w)).collect();
    let x = tape.constant(tensor(noise(shape.iter().product(), 0), &shape, DType::F32));
    let pass = network.run(&free, &x, Statistics::Batch).unwrap();
    let loss = pass.output.cross_entropy(&[0, 1]).unwrap();
    let wrt: Vec<&Var> = free.iter().collect();
    let error = grad(&loss, &wrt, Order::Higher).unwrap_err();
    assert!(error.to_string().contains("second derivative"), "{error}");
    assert!(error.to_string().contains("node `"), "{error}");
    assert!(grad(&loss, &wrt, Order::First).is_ok());
}
