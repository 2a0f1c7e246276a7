//! Every operator that the device has, on random data of odd sizes, alone (its gradient is written) and beside a
//! second reader of its input (its gradient is added).

use std::collections::BTreeMap;
use std::sync::Arc;

use super::tests::compare;
use crate::graph::Taps;
use crate::graph::ir::{Attribute, ConstantTensor, DataType, Dimension, Graph, Node, Port};
use crate::tensor::RngStream;

/// Attributes as text: `kernel_shape=3,2 group=2 alpha=0.5f mode="x"`.
fn attributes(mut node: Node, text: &str) -> Node {
    for pair in text.split_whitespace() {
        let (name, value) = pair.split_once('=').unwrap();
        let value = if let Some(float) = value.strip_suffix('f') {
            Attribute::Float(float.parse().unwrap())
        } else if name == "axis"
            || name == "group"
            || value.parse::<i64>().is_ok() && !PLURAL.contains(&name)
        {
            Attribute::Int(value.parse().unwrap())
        } else if value.chars().next().unwrap().is_alphabetic() {
            Attribute::String(value.to_owned())
        } else {
            Attribute::Ints(value.split(',').map(|v| v.parse().unwrap()).collect())
        };
        node = node.with(name, value);
    }
    node
}

const PLURAL: [&str; 7] =
    ["kernel_shape", "strides", "pads", "dilations", "perm", "axes", "output_padding"];

/// One operator: attributes, the image's shape (batch first), and the other inputs' shapes. `(n)` after a shape makes
/// it the image scaled by n instead of a constant; `+` keeps its values positive; `i:` gives integers.
struct Case(&'static str, &'static str, &'static [usize], &'static [&'static str]);

fn constant(text: &str, rng: &mut RngStream) -> ConstantTensor {
    if let Some(values) = text.strip_prefix("i:") {
        let values: Vec<i64> = values.split(',').map(|v| v.parse().unwrap()).collect();
        return ConstantTensor::i64([values.len()], values);
    }
    let (text, positive) = match text.strip_prefix('+') {
        Some(text) => (text, true),
        None => (text, false),
    };
    let shape: Vec<usize> =
        text.split('x').filter(|s| !s.is_empty()).map(|s| s.parse().unwrap()).collect();
    let values = rng.normals(shape.iter().product());
    let values = values.into_iter().map(|v| if positive { v.abs() + 0.3 } else { v });
    ConstantTensor::f32(shape, values.collect())
}

/// y = op(x, ...); beside it z = -x where `shared`, both flattened and joined.
fn graph(case: &Case, shared: bool) -> Graph {
    let Case(op, text, shape, others) = case;
    let mut rng = RngStream::new(3, op, text, 0);
    let mut constants = BTreeMap::new();
    let mut nodes = Vec::new();
    let mut inputs = vec!["x".to_owned()];
    for (index, other) in others.iter().enumerate() {
        let name = format!("c{index}");
        if let Some(wanted) = other.strip_prefix("live:") {
            // A live value of that shape, made of the image: a mean over the axes of size 1.
            let wanted: Vec<usize> = wanted.split('x').map(|s| s.parse().unwrap()).collect();
            let axes: Vec<i64> = (0..shape.len())
                .filter(|&a| wanted[a] == 1 && shape[a] != 1)
                .map(|a| a as i64)
                .collect();
            if axes.is_empty() {
                nodes.push(Node::new("Tanh", &name, &["x"], &[&name]));
                inputs.push(name);
                continue;
            }
            constants
                .insert(format!("{name}_axes"), Arc::new(ConstantTensor::i64([axes.len()], axes)));
            constants.insert(format!("{name}_scale"), Arc::new(ConstantTensor::f32([], vec![1.5])));
            let (mean, axes, scale) =
                (format!("{name}_m"), format!("{name}_axes"), format!("{name}_scale"));
            nodes.push(Node::new("ReduceMean", &mean, &["x", &axes], &[&mean]));
            nodes.push(Node::new("Mul", &name, &[&mean, &scale], &[&name]));
        } else if *other == "condition" {
            constants.insert("zero".into(), Arc::new(ConstantTensor::f32([], vec![0.2])));
            nodes.push(Node::new("Greater", &name, &["x", "zero"], &[&name]));
        } else if !other.is_empty() {
            constants.insert(name.clone(), Arc::new(constant(other, &mut rng)));
        }
        inputs.push(if other.is_empty() { String::new() } else { name });
    }
    if *op == "Where" {
        inputs.swap(0, 1);
    }
    if text.contains("reversed") {
        inputs.swap(0, 1);
    }
    let text = text.replace("reversed", "");
    let names: Vec<&str> = inputs.iter().map(String::as_str).collect();
    nodes.push(attributes(Node::new(op, op, &names, &["y"]), &text));
    let mut output = "y";
    if shared {
        constants.insert("flat".into(), Arc::new(ConstantTensor::i64([2], vec![1, -1])));
        nodes.push(Node::new("Neg", "beside", &["x"], &["z"]));
        nodes.push(Node::new("Reshape", "r1", &["y", "flat"], &["y1"]));
        nodes.push(Node::new("Reshape", "r2", &["z", "flat"], &["z1"]));
        nodes.push(
            Node::new("Concat", "joined", &["y1", "z1"], &["o"]).with("axis", Attribute::Int(1)),
        );
        output = "o";
    }
    let port = |name: &str, shape: Option<&[usize]>| Port {
        name: name.into(),
        dtype: DataType::Float32,
        shape: shape.map(|shape| shape.iter().map(|&d| Dimension::Fixed(d)).collect()),
    };
    Graph {
        name: (*op).into(),
        opset: 20,
        inputs: vec![port("x", Some(shape))],
        outputs: vec![port(output, None)],
        nodes,
        constants,
    }
}

fn check(cases: &[Case]) {
    for case in cases {
        for shared in [false, true] {
            let name = format!("{} {} {:?} {:?} shared {shared}", case.0, case.1, case.2, case.3);
            compare(&name, &graph(case, shared), 2, Taps::Norms)
                .unwrap_or_else(|error| panic!("{name}: {error:#}"));
        }
    }
}

#[test]
fn functions_of_one_number() {
    let plain = [
        "Relu",
        "LeakyRelu",
        "ThresholdedRelu",
        "Elu",
        "Celu",
        "Selu",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
        "Mish",
        "Gelu",
        "Softplus",
        "Softsign",
        "Tanh",
        "Erf",
        "Exp",
        "Reciprocal",
        "Neg",
        "Abs",
        "Sin",
        "Cos",
        "Tan",
        "Atan",
        "Sinh",
        "Cosh",
        "Asinh",
        "Shrink",
    ];
    let cases: Vec<Case> = plain.iter().map(|op| Case(op, "", &[2, 3, 17, 5], &[])).collect();
    check(&cases);
    check(&[
        Case("Gelu", "approximate=tanh", &[2, 333], &[]),
        Case("Swish", "alpha=1.5f", &[2, 333], &[]),
        Case("Clip", "min=-0.5f max=0.7f", &[2, 333], &[]),
    ]);
}

#[test]
fn functions_of_two_numbers() {
    check(&[
        Case("Add", "", &[2, 3, 5, 7], &["3x1x1"]),
        Case("Sub", "reversed=1", &[2, 3, 5, 7], &["3x1x1"]),
        Case("Mul", "", &[2, 3, 5, 7], &["live:2x3x1x1"]),
        Case("Mul", "", &[2, 3, 5, 7], &["live:1x3x1x1"]),
        Case("Add", "", &[2, 3, 5, 7], &["live:2x1x5x1"]),
        Case("Sub", "", &[2, 3, 37, 41], &["live:1x1x1x1"]),
        Case("Div", "", &[2, 3, 5, 7], &["+2x1x5x1"]),
        Case("Pow", "", &[2, 3, 5, 7], &["i:2"]),
        Case("Min", "", &[2, 3, 5, 7], &["live:2x3x5x1"]),
        Case("Max", "", &[2, 3, 5, 7], &["1x3x5x7"]),
        Case("PRelu", "", &[2, 3, 5, 7], &["3x1x1"]),
        Case("Where", "", &[2, 3, 5, 7], &["condition", "2x3x5x7"]),
    ]);
}

#[test]
fn convolutions() {
    check(&[
        Case("Conv", "pads=1,1,1,1", &[2, 3, 13, 11], &["5x3x3x3", "5"]),
        Case("Conv", "strides=2,2 pads=1,1,1,1", &[3, 3, 9, 10], &["4x3x3x3"]),
        Case("Conv", "strides=2,3 pads=3,2,1,0 dilations=1,2", &[2, 4, 23, 29], &["6x4x5x3", "6"]),
        Case("Conv", "group=2 pads=1,0,1,2", &[2, 4, 12, 13], &["6x2x3x3", "6"]),
        Case("Conv", "group=4 pads=1,1,1,1 strides=2,2", &[2, 4, 9, 12], &["4x1x3x3", "4"]),
        Case("Conv", "group=3 pads=2,2,2,2 dilations=2,2", &[2, 3, 9, 12], &["6x1x3x3"]),
        Case("Conv", "", &[2, 5, 13, 12], &["7x5x1x1", "7"]),
        Case("Conv", "", &[3, 5, 3, 4], &["7x5x1x1", "7"]),
        Case("Conv", "strides=2,2", &[1, 5, 13, 12], &["7x5x1x1"]),
        Case("Conv", "pads=1,2", &[2, 5, 37], &["7x5x4"]),
        Case("Conv", "pads=1,1,1,1,1,1", &[1, 2, 5, 4, 6], &["3x2x3x3x3", "3"]),
        Case("ConvTranspose", "strides=2,2 pads=1,1,0,1", &[2, 4, 5, 6], &["4x3x3x3", "3"]),
        Case("ConvTranspose", "group=2", &[2, 4, 5, 6], &["4x3x2x2"]),
    ]);
}

#[test]
fn pooling() {
    check(&[
        Case("MaxPool", "kernel_shape=2,2 strides=2,2", &[2, 3, 7, 9], &[]),
        Case("MaxPool", "kernel_shape=3,3 strides=2,2 pads=1,1,1,1", &[2, 3, 9, 11], &[]),
        Case(
            "MaxPool",
            "kernel_shape=3,2 strides=1,2 dilations=2,1 ceil_mode=1",
            &[1, 3, 9, 11],
            &[],
        ),
        Case("AveragePool", "kernel_shape=3,3 strides=2,2 pads=1,1,1,1", &[2, 3, 9, 11], &[]),
        Case(
            "AveragePool",
            "kernel_shape=3,3 strides=2,2 pads=1,1,1,1 count_include_pad=1",
            &[2, 3, 9, 11],
            &[],
        ),
        Case(
            "AveragePool",
            "kernel_shape=3,2 strides=2,2 pads=0,1,1,0 ceil_mode=1",
            &[2, 3, 10, 11],
            &[],
        ),
        Case("LpPool", "kernel_shape=2,3", &[2, 3, 7, 9], &[]),
        Case("MaxPool", "kernel_shape=3 strides=2", &[2, 3, 17], &[]),
        Case("GlobalAveragePool", "", &[2, 3, 7, 9], &[]),
        Case("GlobalMaxPool", "", &[2, 3, 7, 9], &[]),
    ]);
}

#[test]
fn normalisation_along_channels_with_what_follows() {
    let bn: &[&str] = &["5", "5", "5", "+5"];
    check(&[
        Case("BatchNormalization", "", &[3, 5, 9, 7], bn),
        Case("BatchNormalization", "", &[2, 5, 67, 61], bn),
        Case("BatchNormalization", "", &[7, 5], bn),
        Case("BatchNormalization", "", &[2, 45], &["45", "45", "45", "+45"]),
    ]);
    // Fused with ReLU, with Clip, with pooling, and with a residual.
    for (end, shape) in [
        (vec![("Relu", "")], [3, 5, 9, 7]),
        (vec![("Clip", "min=-0.4f max=0.8f")], [3, 5, 9, 7]),
        (vec![("Relu", ""), ("MaxPool", "kernel_shape=2,2 strides=2,2")], [3, 5, 9, 7]),
        (vec![("MaxPool", "kernel_shape=2,2 strides=2,2")], [2, 5, 16, 8]),
        (vec![("Add", ""), ("Relu", "")], [3, 5, 9, 7]),
        (vec![("Add", "")], [3, 5, 9, 7]),
    ] {
        let mut whole = graph(&Case("BatchNormalization", "", &[3, 5, 9, 7], bn), false);
        whole.inputs[0].shape = Some(shape.iter().map(|&d| Dimension::Fixed(d)).collect());
        let mut last = "y".to_owned();
        for (index, (op, text)) in end.iter().enumerate() {
            let next = format!("e{index}");
            let mut inputs = vec![last.as_str()];
            if *op == "Add" {
                whole.nodes.insert(0, Node::new("Tanh", "t", &["x"], &["t"]));
                inputs.push("t");
            }
            whole.nodes.push(attributes(Node::new(op, op, &inputs, &[&next]), text));
            last = next;
        }
        whole.outputs[0].name = last;
        let name = format!("BatchNormalization and {end:?}");
        compare(&name, &whole, 3, Taps::Norms).unwrap_or_else(|error| panic!("{name}: {error:#}"));
    }
}

#[test]
fn normalisation_along_rows() {
    check(&[
        Case("LayerNormalization", "axis=-1", &[2, 5, 37], &["37", "37"]),
        Case("LayerNormalization", "axis=1", &[2, 3, 5, 67], &["3x5x67"]),
        Case("InstanceNormalization", "", &[2, 3, 7, 9], &["3", "3"]),
        Case("Softmax", "axis=-1", &[2, 5, 37], &[]),
        Case("Softmax", "axis=1", &[2, 5, 37], &[]),
        Case("LogSoftmax", "axis=-1", &[2, 5, 301], &[]),
        Case("LpNormalization", "axis=1", &[2, 5, 37], &[]),
    ]);
}

#[test]
fn reductions() {
    check(&[
        Case("ReduceSum", "", &[2, 3, 7, 9], &["i:1"]),
        Case("ReduceMean", "", &[2, 3, 7, 9], &["i:2,3"]),
        Case("ReduceMean", "", &[2, 3, 71, 93], &["i:2,3"]),
        Case("ReduceMean", "", &[2, 3001, 3], &["i:1"]),
        Case("ReduceSum", "", &[2, 9, 5], &["i:0,2"]),
        Case("ReduceMax", "", &[2, 3, 71, 93], &["i:1,2,3"]),
        Case("ReduceMin", "", &[2, 3, 7], &["i:1"]),
        Case("ReduceProd", "", &[2, 3, 7], &["i:1"]),
        Case("ReduceLogSumExp", "", &[2, 5, 81], &["i:2"]),
        Case("ReduceL2", "", &[2, 5, 81], &["i:2"]),
    ]);
}

#[test]
fn movements() {
    check(&[
        Case("Transpose", "perm=0,2,3,1", &[2, 3, 37, 9], &[]),
        Case("Transpose", "perm=0,2,1,3", &[2, 3, 7, 9], &[]),
        Case("Transpose", "perm=0,3,2,1", &[2, 3, 7, 9], &[]),
        Case("Transpose", "perm=1,0", &[65, 33], &[]),
        Case("Concat", "axis=1", &[2, 3, 7], &["2x4x7"]),
        Case("Slice", "", &[2, 9, 7], &["i:1", "i:8", "i:1", "i:2"]),
        Case("Pad", "", &[2, 3, 7], &["i:0,1,2,0,0,3"]),
        Case("Expand", "", &[2, 1, 7], &["i:2,5,7"]),
        Case("Gather", "axis=1", &[2, 5, 7], &["i:0,3,3,1"]),
    ]);
}

#[test]
fn products() {
    check(&[
        Case("MatMul", "", &[2, 5, 7], &["7x9"]),
        Case("MatMul", "", &[2, 3, 5, 7], &["3x7x4"]),
        Case("MatMul", "reversed=1", &[3, 7, 5], &["2x1x4x7"]),
        Case("Gemm", "transB=1 alpha=0.5f beta=2.0f", &[6, 7], &["9x7", "9"]),
        Case("Gemm", "transA=1", &[6, 7], &["6x4"]),
        Case("Gemm", "reversed=1 transB=1 transA=1", &[6, 7], &["7x4"]),
        Case("Einsum", "equation=bij,bkj->bik", &[3, 5, 7], &["live:3x5x7"]),
    ]);
}
