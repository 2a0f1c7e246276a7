//! Attributes of nodes, and `Constant` nodes, whose attribute is the value.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_onnx::onnx::AttributeProto;
use candle_onnx::onnx::attribute_proto::AttributeType as Type;
use candle_onnx::onnx::tensor_proto::DataType as Element;

use super::build::{Builder, Call, Parts};
use super::order::{Captures, twice};
use super::tensor::Decoded;
use crate::error::{Error, Result, ResultExt as _};
use crate::graph::{Attribute, ConstantTensor, DataType};

impl Builder<'_> {
    pub(super) fn attributes(
        &mut self,
        protos: Vec<AttributeProto>,
        call: &mut Option<&mut Call>,
    ) -> Result<BTreeMap<String, (Attribute, Captures)>> {
        let mut attributes = BTreeMap::new();
        for proto in protos {
            let name = proto.name.clone();
            let context = || format!("attribute `{name}`");
            if let Some(attribute) = self.attribute(proto, call).context(context)?
                && attributes.insert(name.clone(), attribute).is_some()
            {
                return Err(Error::input(format!("attribute given twice: `{name}`"))
                    .hint("export the model again"));
            }
        }
        Ok(attributes)
    }

    /// One attribute; `None` when it refers to an argument that the caller leaves out.
    pub(super) fn attribute(
        &mut self,
        mut proto: AttributeProto,
        call: &mut Option<&mut Call>,
    ) -> Result<Option<(Attribute, Captures)>> {
        if !proto.ref_attr_name.is_empty() {
            let Some(call) = call else {
                return Err(Error::input(format!(
                    "refers to a function's argument outside of a function: `{}`",
                    proto.ref_attr_name
                )));
            };
            return Ok(call.attributes.get(&proto.ref_attr_name).cloned());
        }
        let mut captures = Captures::new();
        let attribute = match attribute_type(&proto)? {
            Type::Float => Attribute::Float(proto.f),
            Type::Int => Attribute::Int(proto.i),
            Type::String => Attribute::String(text(proto.s)?),
            Type::Floats => Attribute::Floats(proto.floats),
            Type::Ints => Attribute::Ints(proto.ints),
            Type::Strings => {
                Attribute::Strings(proto.strings.into_iter().map(text).collect::<Result<_>>()?)
            }
            Type::Tensor => {
                let tensor = proto.t.take().ok_or_else(|| missing("t"))?;
                match self.tensors.read(tensor)? {
                    Decoded::Numbers(constant) => Attribute::Tensor(constant),
                    Decoded::Text => {
                        return Err(Error::unsupported("string tensor as attribute")
                            .hint("remove the text processing from the model"));
                    }
                }
            }
            Type::Graph => {
                let graph = proto.g.take().ok_or_else(|| missing("g"))?;
                let (graph, inner) =
                    self.graph(graph, call.as_deref_mut(), Some(DataType::Float32))?;
                captures = inner;
                Attribute::Graph(Arc::new(graph))
            }
            other => {
                return Err(Error::unsupported(format!(
                    "attribute of type `{}`",
                    other.as_str_name()
                )));
            }
        };
        Ok(Some((attribute, captures)))
    }

    /// A `Constant` node becomes a constant of the graph, whichever attribute holds its value.
    pub(super) fn constant_node(
        &mut self,
        protos: Vec<AttributeProto>,
        outputs: Vec<String>,
        parts: &mut Parts,
        call: &mut Option<&mut Call>,
    ) -> Result<()> {
        let [output] = outputs.try_into().map_err(|outputs: Vec<String>| {
            Error::input(format!("a constant has one output, found `{}`", outputs.len()))
        })?;
        let is_text = |proto: &AttributeProto| {
            let text = Element::String as i32;
            matches!(proto.name.as_str(), "value_string" | "value_strings")
                || proto.t.as_ref().is_some_and(|tensor| tensor.data_type == text)
        };
        if protos.iter().any(is_text) {
            parts.texts.insert(output);
            return Ok(());
        }
        if protos.iter().any(|proto| proto.name == "sparse_value") {
            return Err(Error::unsupported("sparse constant")
                .hint("store the constant as a dense tensor (`value`)"));
        }
        let mut attributes = self.attributes(protos, call)?.into_iter();
        let (Some((name, (value, _))), None) = (attributes.next(), attributes.next()) else {
            return Err(Error::input("a constant must have exactly one value attribute")
                .hint("export the model again"));
        };
        let float = |shape: Vec<usize>, data| Arc::new(ConstantTensor::f32(shape, data));
        let int = |shape: Vec<usize>, data| Arc::new(ConstantTensor::i64(shape, data));
        let constant = match (name.as_str(), value) {
            ("value", Attribute::Tensor(tensor)) => tensor,
            ("value_float", Attribute::Float(v)) => float(vec![], vec![v]),
            ("value_floats", Attribute::Floats(v)) => float(vec![v.len()], v),
            ("value_int", Attribute::Int(v)) => int(vec![], vec![v]),
            ("value_ints", Attribute::Ints(v)) => int(vec![v.len()], v),
            _ => {
                return Err(Error::input(format!("not a value attribute of its type: `{name}`"))
                    .hint("export the model again"));
            }
        };
        if output.is_empty()
            || parts.texts.contains(&output)
            || parts.constants.contains_key(&output)
        {
            return Err(twice(&output));
        }
        parts.constants.insert(output, constant);
        Ok(())
    }
}

fn missing(field: &str) -> Error {
    Error::input(format!("field is missing: `{field}`")).hint("the file is damaged")
}

fn text(bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|_| Error::unsupported("a text that is not UTF-8"))
}

/// The declared type, or for the oldest files, which declare none, the field that is set.
fn attribute_type(proto: &AttributeProto) -> Result<Type> {
    let declared = Type::try_from(proto.r#type)
        .map_err(|_| Error::input(format!("attribute type does not exist: `{}`", proto.r#type)))?;
    Ok(match declared {
        Type::Undefined if proto.t.is_some() => Type::Tensor,
        Type::Undefined if proto.g.is_some() => Type::Graph,
        Type::Undefined if !proto.s.is_empty() => Type::String,
        Type::Undefined if !proto.floats.is_empty() => Type::Floats,
        Type::Undefined if !proto.ints.is_empty() => Type::Ints,
        Type::Undefined if !proto.strings.is_empty() => Type::Strings,
        Type::Undefined if proto.f != 0.0 => Type::Float,
        Type::Undefined if proto.i != 0 => Type::Int,
        Type::Undefined => {
            return Err(Error::input("attribute without a type")
                .hint("save the model again with a newer version of the `onnx` package"));
        }
        declared => declared,
    })
}
