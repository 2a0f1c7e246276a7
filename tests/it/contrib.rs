//! Operators of ONNX Runtime's own domain, which its optimiser and its quantiser write: against ONNX
//! Runtime on the same file, and their gradients against central differences.

use std::collections::BTreeMap;
use std::sync::Arc;

use metazoa::access::session::Tensor;
use metazoa::graph::check::check_gradient;
use metazoa::graph::{
    Attribute, CompileOptions, ConstantTensor, DataType, Dimension, Gradient, Graph, Node, Plan,
    Port, Taps,
};
use metazoa::onnx::{ExportInfo, write};
use metazoa::tensor::RngStream;

use crate::support::{runtime, temp_dir};

/// A graph from `x` to `y` under construction.
struct Network {
    graph: Graph,
    rng: RngStream,
}

impl Network {
    fn new(name: &str, input: &[usize]) -> Self {
        let port = |name: &str, shape: Option<&[usize]>| Port {
            name: name.into(),
            dtype: DataType::Float32,
            shape: shape.map(|shape| shape.iter().map(|&d| Dimension::Fixed(d)).collect()),
        };
        let graph = Graph {
            name: name.into(),
            opset: 17,
            inputs: vec![port("x", Some(input))],
            outputs: vec![port("y", None)],
            ..Graph::default()
        };
        Self { graph, rng: RngStream::new(1, "contrib", name, 0) }
    }

    /// A constant of random values around `mean`.
    fn constant(mut self, name: &str, shape: &[usize], mean: f32) -> Self {
        let values = self.rng.normals(shape.iter().product());
        let values = values.into_iter().map(|v| mean + 0.5 * v).collect();
        self.graph.constants.insert(name.into(), Arc::new(ConstantTensor::f32(shape, values)));
        self
    }

    fn scalar(mut self, name: &str, value: f32) -> Self {
        self.graph.constants.insert(name.into(), Arc::new(ConstantTensor::f32([], vec![value])));
        self
    }

    fn bytes(mut self, name: &str, shape: &[usize], values: Vec<i64>) -> Self {
        let tensor =
            ConstantTensor { dtype: DataType::Uint8, ..ConstantTensor::i64(shape, values) };
        self.graph.constants.insert(name.into(), Arc::new(tensor));
        self
    }

    fn node(
        mut self,
        domain: &str,
        op: &str,
        inputs: &[&str],
        outputs: &[&str],
        attributes: &[(&str, Attribute)],
    ) -> Self {
        let name = format!("n{}", self.graph.nodes.len());
        let mut node = Node::new(op, &name, inputs, outputs);
        node.domain = domain.into();
        for (name, value) in attributes {
            node = node.with(name, value.clone());
        }
        self.graph.nodes.push(node);
        self
    }

    fn own(self, op: &str, inputs: &[&str], attributes: &[(&str, Attribute)]) -> Self {
        self.node(MS, op, inputs, &["y"], attributes)
    }
}

const MS: &str = "com.microsoft";

fn int(value: i64) -> Attribute {
    Attribute::Int(value)
}

fn text(value: &str) -> Attribute {
    Attribute::String(value.into())
}

/// Runs the network in both engines and differentiates it.
fn check(network: Network) {
    let Network { graph, mut rng } = network;
    let name = graph.name.clone();
    let shape: Vec<usize> = graph.inputs[0]
        .shape
        .iter()
        .flatten()
        .map(|d| if let Dimension::Fixed(size) = d { *size } else { 1 })
        .collect();
    let x = rng.normals(shape.iter().product());
    let mut options = CompileOptions {
        input: "x".into(),
        input_shape: shape.clone(),
        output: "y".into(),
        gradient: Gradient::Wanted,
        taps: Taps::Norms,
    };
    let plan = Plan::<f32>::compile(&graph, &options).unwrap_or_else(|e| panic!("{name}: {e}"));
    let ours = plan.forward(&mut plan.workspace(), &x).to_vec();

    let folder = temp_dir();
    let path = folder.path().join("m.onnx");
    let mut info = ExportInfo::new(BTreeMap::new());
    info.domains.insert(MS.into(), 1);
    write(&path, &graph, &info).unwrap();
    let mut session = runtime().open(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
    let theirs = session.run(vec![("x", Tensor::f32(shape, x.clone()))], &["y"]).unwrap();
    let theirs = theirs[0].values.to_f32().into_owned();
    assert_eq!(ours.len(), theirs.len(), "{name}");
    for (a, b) in ours.iter().zip(&theirs) {
        assert!((a - b).abs() <= 1e-5 + 1e-4 * b.abs(), "{name}: {a} against {b}");
    }

    options.gradient = Gradient::Smooth;
    let found = check_gradient(&graph, &options, &x, 5).unwrap();
    assert!(found.gradient_rel_err < 1e-5, "{name}: {found:?}");
}

#[test]
fn fused_operators_are_those_of_onnx_runtime() {
    let float = Attribute::Float;
    check(Network::new("gelu", &[2, 3, 4]).own("Gelu", &["x"], &[]));
    check(Network::new("fast gelu", &[2, 4]).constant("b", &[4], 0.0).own(
        "FastGelu",
        &["x", "b"],
        &[],
    ));
    check(Network::new("quick gelu", &[2, 4]).own("QuickGelu", &["x"], &[("alpha", float(1.5))]));
    check(Network::new("bias gelu", &[2, 4]).constant("b", &[4], 0.0).own(
        "BiasGelu",
        &["x", "b"],
        &[],
    ));
    check(Network::new("fused matmul", &[2, 3, 4]).constant("b", &[2, 5, 4], 0.0).own(
        "FusedMatMul",
        &["x", "b"],
        &[("transB", int(1)), ("alpha", float(0.5))],
    ));
    for (activation, parameters) in [
        ("Relu", vec![]),
        ("LeakyRelu", vec![0.2]),
        ("HardSigmoid", vec![0.3, 0.4]),
        ("Clip", vec![-0.5, 0.7]),
    ] {
        let mut attributes =
            vec![("activation", text(activation)), ("pads", Attribute::Ints(vec![1; 4]))];
        if !parameters.is_empty() {
            attributes.push(("activation_params", Attribute::Floats(parameters)));
        }
        let network = Network::new(&format!("fused conv {activation}"), &[1, 2, 5, 5])
            .constant("w", &[3, 2, 3, 3], 0.0)
            .constant("b", &[3], 0.0);
        check(network.own("FusedConv", &["x", "w", "b"], &attributes));
    }
}

#[test]
fn fused_normalisations_are_those_of_onnx_runtime() {
    let norm = |name: &str| {
        Network::new(name, &[2, 3, 8])
            .constant("skip", &[2, 3, 8], 0.0)
            .constant("gamma", &[8], 1.0)
            .constant("beta", &[8], 0.0)
            .constant("bias", &[8], 0.0)
    };
    let epsilon = [("epsilon", Attribute::Float(1e-4))];
    check(norm("skip layer norm").own(
        "SkipLayerNormalization",
        &["x", "skip", "gamma", "beta", "bias"],
        &epsilon,
    ));
    check(norm("skip rms norm").own(
        "SkipSimplifiedLayerNormalization",
        &["x", "skip", "gamma", "bias"],
        &epsilon,
    ));
    let simplified = norm("rms norm");
    check(simplified.node("", "SimplifiedLayerNormalization", &["x", "gamma"], &["y"], &epsilon));
}

#[test]
fn fused_attention_is_that_of_onnx_runtime() {
    check(
        Network::new("multi-head attention", &[1, 4, 8])
            .constant("k", &[1, 5, 8], 0.0)
            .constant("v", &[1, 5, 8], 0.0)
            .constant("b", &[24], 0.0)
            .own("MultiHeadAttention", &["x", "k", "v", "b"], &[("num_heads", int(2))]),
    );
    for unidirectional in [0, 1] {
        check(
            Network::new("attention", &[2, 4, 8])
                .constant("w", &[8, 24], 0.0)
                .constant("b", &[24], 0.0)
                .own(
                    "Attention",
                    &["x", "w", "b"],
                    &[("num_heads", int(2)), ("unidirectional", int(unidirectional))],
                ),
        );
    }
}

#[test]
fn quantised_operators_are_those_of_onnx_runtime_to_the_bit() {
    // x quantised, an operator on bytes, back to numbers. The scales make no ties: there the last bit of a
    // division decides.
    let network = |name: &str, shape: &[usize]| {
        Network::new(name, shape)
            .scalar("xs", 0.0317)
            .scalar("ys", 0.0479)
            .bytes("xz", &[], vec![128])
            .bytes("yz", &[], vec![100])
            .node("", "QuantizeLinear", &["x", "xs", "xz"], &["q"], &[])
    };
    let back = |network: Network| {
        check(network.node("", "DequantizeLinear", &["r", "ys", "yz"], &["y"], &[]));
    };
    let quantisation = ["xs", "xz", "ys", "yz"];
    for op in ["QLinearLeakyRelu", "QLinearSigmoid", "QLinearGlobalAveragePool"] {
        let inputs = [&["q"], &quantisation[..]].concat();
        back(network(op, &[1, 3, 4, 4]).node(MS, op, &inputs, &["r"], &[]));
    }
    let window =
        [("kernel_shape", Attribute::Ints(vec![2, 2])), ("strides", Attribute::Ints(vec![2, 2]))];
    let inputs = [&["q"], &quantisation[..]].concat();
    back(network("pool", &[1, 3, 4, 4]).node(MS, "QLinearAveragePool", &inputs, &["r"], &window));
    for op in ["QLinearAdd", "QLinearMul"] {
        let other = (0..16).map(|v| v * 16).collect();
        back(network(op, &[1, 4, 4]).bytes("o", &[4, 4], other).node(
            MS,
            op,
            &["q", "xs", "xz", "o", "xs", "xz", "ys", "yz"],
            &["r"],
            &[],
        ));
    }
    back(network("concat", &[1, 4, 4]).node(
        MS,
        "QLinearConcat",
        &["ys", "yz", "q", "xs", "xz", "q", "xs", "xz"],
        &["r"],
        &[("axis", int(1))],
    ));
    let weights = (0..24).map(|v| (v * 37) % 256).collect();
    back(
        network("gemm", &[2, 4])
            .bytes("w", &[4, 6], weights)
            .scalar("ws", 0.02)
            .bytes("wz", &[], vec![120])
            .node(
                MS,
                "QGemm",
                &["q", "xs", "xz", "w", "ws", "wz", "", "ys", "yz"],
                &["r"],
                &[("alpha", Attribute::Float(1.0))],
            ),
    );
}
