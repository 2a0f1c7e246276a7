//! Reading and writing ONNX files. Small models are built here from the protobuf types.

mod episode;
mod export;
mod hostile;
mod import;

use candle_onnx::onnx::attribute_proto::AttributeType;
use candle_onnx::onnx::tensor_proto::DataType as Element;
use candle_onnx::onnx::tensor_shape_proto::{Dimension, dimension};
use candle_onnx::onnx::type_proto::{Tensor, Value};
use candle_onnx::onnx::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
    TensorProto, TensorShapeProto, TypeProto, ValueInfoProto,
};
use metazoa::Result;
use metazoa::onnx::{ExternalData, OnnxModel, load_bytes};
use prost::Message as _;

fn floats(name: &str, dims: &[i64], values: &[f32]) -> TensorProto {
    TensorProto {
        name: name.into(),
        dims: dims.to_vec(),
        data_type: Element::Float as i32,
        float_data: values.to_vec(),
        ..Default::default()
    }
}

/// A float32 input or output; -1 is a free size.
fn value(name: &str, dims: &[i64]) -> ValueInfoProto {
    typed(name, Element::Float, dims)
}

fn typed(name: &str, element: Element, dims: &[i64]) -> ValueInfoProto {
    let dim = |&size: &i64| Dimension {
        value: Some(match size {
            -1 => dimension::Value::DimParam("n".into()),
            _ => dimension::Value::DimValue(size),
        }),
        ..Default::default()
    };
    let shape = TensorShapeProto { dim: dims.iter().map(dim).collect() };
    let tensor = Tensor { elem_type: element as i32, shape: Some(shape) };
    let kind = TypeProto { value: Some(Value::TensorType(tensor)), ..Default::default() };
    ValueInfoProto { name: name.into(), r#type: Some(kind), ..Default::default() }
}

fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    NodeProto {
        op_type: op.into(),
        input: inputs.iter().map(|&name| name.into()).collect(),
        output: outputs.iter().map(|&name| name.into()).collect(),
        ..Default::default()
    }
}

fn call(function: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    NodeProto { domain: "local".into(), ..node(function, inputs, outputs) }
}

fn float_attribute(name: &str, value: f32) -> AttributeProto {
    let kind = AttributeType::Float as i32;
    AttributeProto { name: name.into(), r#type: kind, f: value, ..Default::default() }
}

fn graph_attribute(name: &str, graph: GraphProto) -> AttributeProto {
    let kind = AttributeType::Graph as i32;
    AttributeProto { name: name.into(), r#type: kind, g: Some(graph), ..Default::default() }
}

fn tensor_attribute(tensor: TensorProto) -> AttributeProto {
    let kind = AttributeType::Tensor as i32;
    AttributeProto { name: "value".into(), r#type: kind, t: Some(tensor), ..Default::default() }
}

/// An attribute of a function body that takes its value from the call.
fn reference(name: &str, argument: &str) -> AttributeProto {
    AttributeProto {
        name: name.into(),
        r#type: AttributeType::Float as i32,
        ref_attr_name: argument.into(),
        ..Default::default()
    }
}

fn with(mut node: NodeProto, attribute: AttributeProto) -> NodeProto {
    node.attribute.push(attribute);
    node
}

fn graph(nodes: Vec<NodeProto>) -> GraphProto {
    GraphProto {
        name: "g".into(),
        node: nodes,
        input: vec![value("x", &[-1, 4])],
        output: vec![value("y", &[-1, 4])],
        ..Default::default()
    }
}

fn function(name: &str, inputs: &[&str], outputs: &[&str], nodes: Vec<NodeProto>) -> FunctionProto {
    FunctionProto {
        name: name.into(),
        domain: "local".into(),
        input: inputs.iter().map(|&name| name.into()).collect(),
        output: outputs.iter().map(|&name| name.into()).collect(),
        node: nodes,
        opset_import: vec![opset("", 17)],
        ..Default::default()
    }
}

fn opset(domain: &str, version: i64) -> OperatorSetIdProto {
    OperatorSetIdProto { domain: domain.into(), version }
}

fn model(graph: GraphProto) -> ModelProto {
    ModelProto {
        ir_version: 8,
        opset_import: vec![opset("", 17), opset("local", 1)],
        graph: Some(graph),
        ..Default::default()
    }
}

fn read(model: &ModelProto) -> Result<OnnxModel> {
    load_bytes(&model.encode_to_vec(), ExternalData::Refused)
}

/// Reads a model that must be refused with every one of `parts` in the message or the hint.
#[track_caller]
fn refused(model: &ModelProto, parts: &[&str]) {
    let error = read(model).expect_err("the model must be refused");
    let text = format!("{error}; {}", error.hint_text().unwrap_or_default());
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

/// "op(inputs) -> outputs" of every node, to compare graphs at a glance.
fn listing(graph: &metazoa::graph::Graph) -> Vec<String> {
    let line = |node: &metazoa::graph::Node| {
        format!("{}({}) -> {}", node.op_type, node.inputs.join(", "), node.outputs.join(", "))
    };
    graph.nodes.iter().map(line).collect()
}
