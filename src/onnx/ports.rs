//! Declared inputs and outputs: names, element types, dimensions.

use std::collections::HashMap;

use candle_onnx::onnx::tensor_shape_proto::dimension::Value as Dim;
use candle_onnx::onnx::type_proto::{Tensor, Value as Kind};
use candle_onnx::onnx::{TensorShapeProto, TypeProto, ValueInfoProto, tensor_shape_proto};

use super::tensor::{data_type, element_number};
use crate::error::{Error, Result, ResultExt as _};
use crate::graph::{Attribute, DataType, Dimension, Graph, Node, Port};

/// A port as declared; the element type may be left out, which [`settle`] then works out.
pub(super) struct Declared {
    pub(super) name: String,
    dtype: Option<DataType>,
    shape: Option<Vec<Dimension>>,
}

impl Declared {
    /// The element type, if the file gives it.
    pub(super) fn dtype(&self) -> Option<DataType> {
        self.dtype
    }
}

/// Reads a declaration under the name `name`.
///
/// # Errors
/// When the value is no tensor, or of an unknown element type.
pub(super) fn read(info: &ValueInfoProto, name: String) -> Result<Declared> {
    let context = || format!("value `{}`", info.name);
    let (dtype, shape) = match info.r#type.as_ref().and_then(|t| t.value.as_ref()) {
        None => (None, None),
        Some(Kind::TensorType(tensor)) => {
            let dtype = match tensor.elem_type {
                0 => None,
                number => Some(data_type(number).context(context)?),
            };
            (dtype, tensor.shape.as_ref().map(|shape| shape.dim.iter().map(dimension).collect()))
        }
        Some(other) => {
            let kind = match other {
                Kind::SequenceType(_) => "a sequence",
                Kind::MapType(_) => "a map",
                Kind::OptionalType(_) => "an optional",
                _ => "a sparse tensor",
            };
            return Err(Error::unsupported(format!("expected a tensor, found `{kind}`"))
                .context(context())
                .hint("export the model with tensors only (scikit-learn: `options={'zipmap': False}`)"));
        }
    };
    Ok(Declared { name, dtype, shape })
}

fn dimension(dim: &tensor_shape_proto::Dimension) -> Dimension {
    match &dim.value {
        // Old exporters write -1 for "any size".
        Some(Dim::DimValue(value)) => {
            usize::try_from(*value).map_or(Dimension::Symbol(String::new()), Dimension::Fixed)
        }
        Some(Dim::DimParam(name)) => Dimension::Symbol(name.clone()),
        None => Dimension::Symbol(String::new()),
    }
}

/// Fills in element types that the file leaves out; `known` tells the types of outer values. What does
/// not follow becomes `untyped` (sub-graphs, whose ports need no type).
///
/// # Errors
/// When a type is left out and does not follow from the nodes.
pub(super) fn settle(
    declared: Vec<Declared>,
    known: &HashMap<String, DataType>,
    graph: &Graph,
    untyped: Option<DataType>,
) -> Result<Vec<Port>> {
    let mut producers = None;
    declared
        .into_iter()
        .map(|port| {
            let dtype = match port.dtype {
                Some(dtype) => dtype,
                None => {
                    let producers = producers.get_or_insert_with(|| producers_of(graph));
                    infer(&port.name, known, producers, graph).or(untyped).ok_or_else(|| {
                        Error::unsupported("value without an element type")
                            .context(format!("value `{}`", port.name))
                            .hint("run `onnx.shape_inference.infer_shapes` on the model and save it again")
                    })?
                }
            };
            Ok(Port { name: port.name, dtype, shape: port.shape })
        })
        .collect()
}

fn producers_of(graph: &Graph) -> HashMap<&str, &Node> {
    let outputs = |node| -> Vec<(&str, &Node)> {
        let node: &Node = node;
        node.outputs.iter().map(|output| (output.as_str(), node)).collect()
    };
    graph.nodes.iter().flat_map(outputs).collect()
}

/// The element type of `value`, following the operators that keep the type of their first input.
fn infer(
    value: &str,
    known: &HashMap<String, DataType>,
    producers: &HashMap<&str, &Node>,
    graph: &Graph,
) -> Option<DataType> {
    let mut value = value;
    // Each step goes to an earlier node, so there are at most as many steps as nodes.
    for _ in 0..=graph.nodes.len() {
        if let Some(constant) = graph.constants.get(value) {
            return Some(constant.dtype);
        }
        if let Some(dtype) = known.get(value) {
            return Some(*dtype);
        }
        let node = producers.get(value)?;
        if node.outputs.first().map(String::as_str) != Some(value) {
            return None;
        }
        match (node.domain.as_str(), node.op_type.as_str()) {
            ("", "Cast") => {
                return match node.attributes.get("to") {
                    Some(Attribute::Int(number)) => data_type(i32::try_from(*number).ok()?).ok(),
                    _ => None,
                };
            }
            ("", "Shape" | "Size" | "NonZero" | "ArgMax" | "ArgMin") => {
                return Some(DataType::Int64);
            }
            (
                "",
                "Not" | "And" | "Or" | "Xor" | "Equal" | "Less" | "Greater" | "LessOrEqual"
                | "GreaterOrEqual" | "IsNaN" | "IsInf",
            ) => return Some(DataType::Bool),
            ("", "Where" | "CastLike") => value = node.inputs.get(1)?,
            (
                "",
                "Relu" | "LeakyRelu" | "Sigmoid" | "Tanh" | "Clip" | "Identity" | "Dropout" | "Add"
                | "Sub" | "Mul" | "Div" | "Pow" | "Neg" | "Sqrt" | "Exp" | "Log" | "Softmax"
                | "LogSoftmax" | "Conv" | "ConvTranspose" | "Gemm" | "MatMul"
                | "BatchNormalization" | "MaxPool" | "AveragePool" | "GlobalAveragePool"
                | "GlobalMaxPool" | "Flatten" | "Reshape" | "Transpose" | "Squeeze" | "Unsqueeze"
                | "Concat" | "Gather" | "Slice" | "Expand" | "Tile" | "Pad" | "ReduceMean"
                | "ReduceSum" | "ReduceMax" | "ReduceMin",
            ) => value = node.inputs.first()?,
            _ => return None,
        }
    }
    None
}

/// The reverse of [`read`].
pub(super) fn write(port: &Port) -> ValueInfoProto {
    let dim = |dimension: &Dimension| tensor_shape_proto::Dimension {
        value: match dimension {
            Dimension::Fixed(size) => Some(Dim::DimValue(*size as i64)),
            Dimension::Symbol(name) if name.is_empty() => None,
            Dimension::Symbol(name) => Some(Dim::DimParam(name.clone())),
        },
        ..Default::default()
    };
    let tensor = Tensor {
        elem_type: element_number(port.dtype),
        shape: port
            .shape
            .as_ref()
            .map(|shape| TensorShapeProto { dim: shape.iter().map(dim).collect() }),
    };
    ValueInfoProto {
        name: port.name.clone(),
        r#type: Some(TypeProto { value: Some(Kind::TensorType(tensor)), ..Default::default() }),
        ..Default::default()
    }
}
