//! One ONNX Runtime session: named tensors in, named tensors out.
//!
//! The only file that speaks `ort`'s session and tensor types, so that the binding can change behind it.
//! A session runs on one thread (workers own a session each; measured 1.8 times faster than sharing),
//! without spinning and memory pattern, at the full optimisation level, and from the ONNX format only.

use std::borrow::Cow;
use std::path::Path;

use half::f16;
use ort::environment::Environment;
use ort::ep::{self, ExecutionProvider};
use ort::session::builder::GraphOptimizationLevel;
use ort::session::{OutputSelector, RunOptions, SessionInputValue};
use ort::value::{
    DynValue, Outlet, PrimitiveTensorElementType, Tensor as OrtTensor, TensorElementType, ValueType,
};

use crate::error::{Error, Result};
use crate::tensor::Device;

/// Values of a tensor, row-major.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // The variants say their element type.
pub enum Values {
    F32(Vec<f32>),
    F16(Vec<f16>),
    F64(Vec<f64>),
    U8(Vec<u8>),
    I8(Vec<i8>),
    I32(Vec<i32>),
    I64(Vec<i64>),
    Bool(Vec<bool>),
}

impl Values {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::F64(v) => v.len(),
            Self::U8(v) => v.len(),
            Self::I8(v) => v.len(),
            Self::I32(v) => v.len(),
            Self::I64(v) => v.len(),
            Self::Bool(v) => v.len(),
        }
    }

    /// No value at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values as `f32`, rounded where they do not fit.
    pub fn to_f32(&self) -> Cow<'_, [f32]> {
        Cow::Owned(match self {
            Self::F32(v) => return Cow::Borrowed(v),
            Self::F16(v) => v.iter().map(|x| x.to_f32()).collect(),
            Self::F64(v) => v.iter().map(|&x| x as f32).collect(),
            Self::U8(v) => v.iter().map(|&x| f32::from(x)).collect(),
            Self::I8(v) => v.iter().map(|&x| f32::from(x)).collect(),
            Self::I32(v) => v.iter().map(|&x| x as f32).collect(),
            Self::I64(v) => v.iter().map(|&x| x as f32).collect(),
            Self::Bool(v) => v.iter().map(|&x| f32::from(u8::from(x))).collect(),
        })
    }
}

/// A tensor with its shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// One size an axis.
    pub shape: Vec<usize>,
    /// As many values as the product of `shape`.
    pub values: Values,
}

impl Tensor {
    /// A tensor of `f32` values.
    pub fn f32(shape: impl Into<Vec<usize>>, values: Vec<f32>) -> Self {
        Self { shape: shape.into(), values: Values::F32(values) }
    }

    /// A tensor of `i64` values.
    pub fn i64(shape: impl Into<Vec<usize>>, values: Vec<i64>) -> Self {
        Self { shape: shape.into(), values: Values::I64(values) }
    }
}

/// An input or output as the model declares it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// Element type in ONNX Runtime's words (`f32`, `u8`, ...); what is not a tensor says so.
    pub element: String,
    /// One entry an axis, `None` where it is free; empty also when no rank is declared.
    pub dims: Vec<Option<usize>>,
}

/// An open model.
#[derive(Debug)]
pub struct Session {
    inner: ort::session::Session,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
}

/// Whether the loaded library was built with CUDA.
pub(super) fn has_cuda() -> bool {
    ep::CUDA::is_available().unwrap_or(false)
}

/// Opens `model` in `environment` on `device`.
pub(super) fn open(environment: &Environment, model: &Path, device: Device) -> Result<Session> {
    // Beside a link, ONNX Runtime looks for external data in the link's folder, then refuses it.
    let real = model.canonicalize().map_err(|error| Error::io(model, &error))?;
    let inner = configure(environment, device)
        .and_then(|mut builder| builder.commit_from_file(&real))
        .map_err(|error| {
            Error::input(format!("ONNX Runtime refuses the model: {}", brief(&error)))
        })?;
    let inputs = inner.inputs().iter().map(port).collect();
    let outputs = inner.outputs().iter().map(port).collect();
    Ok(Session { inner, inputs, outputs })
}

fn configure(
    environment: &Environment,
    device: Device,
) -> ort::Result<ort::session::builder::SessionBuilder> {
    let builder = ort::session::Session::builder(environment)?
        .with_intra_threads(1)?
        .with_inter_threads(1)?
        .with_intra_op_spinning(false)?
        .with_inter_op_spinning(false)?
        .with_memory_pattern(false)?
        .with_optimization_level(GraphOptimizationLevel::All)?
        .with_config_entry("session.load_model_format", "ONNX")?;
    let Device::Cuda(index, _) = device else { return Ok(builder) };
    let index = i32::try_from(index).unwrap_or(i32::MAX);
    // Without this ONNX Runtime falls back to the processor and says nothing.
    let cuda = ep::CUDA::default().with_device_id(index).build().error_on_failure();
    Ok(builder.with_execution_providers([cuda])?)
}

impl Session {
    /// Inputs that must be given, in the model's order (initialisers listed as inputs are not).
    pub fn inputs(&self) -> &[Port] {
        &self.inputs
    }

    /// Outputs in the model's order.
    pub fn outputs(&self) -> &[Port] {
        &self.outputs
    }

    /// Version of the standard operator set the model uses.
    pub fn opset(&self) -> Option<u32> {
        self.inner.opset_for_domain("")
    }

    /// Runs the model; only the outputs named are computed and returned, in that order.
    ///
    /// # Errors
    /// When an input or output does not exist or does not fit, or the run fails.
    pub fn run(&mut self, inputs: Vec<(&str, Tensor)>, outputs: &[&str]) -> Result<Vec<Tensor>> {
        let failed = |error: ort::Error| Error::input(format!("ONNX Runtime: {}", brief(&error)));
        for name in outputs {
            if !self.outputs.iter().any(|port| port.name == *name) {
                return Err(Error::input(format!("the model has no output `{name}`")));
            }
        }
        let mut values: Vec<(Cow<'_, str>, SessionInputValue<'_>)> = Vec::new();
        for (name, tensor) in inputs {
            values.push((Cow::Borrowed(name), into_value(tensor).map_err(failed)?));
        }
        let selector =
            outputs.iter().fold(OutputSelector::no_default(), |all, name| all.with(*name));
        let options = RunOptions::new().map_err(failed)?.with_outputs(selector);
        let results = self.inner.run_with_options(values, &options).map_err(failed)?;
        outputs
            .iter()
            .map(|name| {
                let value = results
                    .get(name)
                    .ok_or_else(|| Error::internal(format!("ONNX Runtime lost output `{name}`")))?;
                from_value(value).map_err(failed)?.ok_or_else(|| {
                    Error::unsupported(format!("output `{name}` holds no numbers we read"))
                })
            })
            .collect()
    }
}

/// What ONNX Runtime's message says to a user: one line, without C++ places, at most 300 characters (it
/// quotes strings of the model).
fn brief(error: &ort::Error) -> String {
    readable(error.message())
}

fn readable(message: &str) -> String {
    let line = message.lines().find(|line| !line.trim().is_empty()).unwrap_or("no reason given");
    let line = line.split_once("Status Message: ").map_or(line, |(_, text)| text);
    let line = match line.split_once(" failed:") {
        Some((start, text)) if start.starts_with("Load model from") => text,
        _ => line,
    };
    let line: String = line.chars().filter(|c| !c.is_control()).collect();
    let line = match line.find("/onnxruntime_src/") {
        // `WHAT: /onnxruntime_src/FILE.cc:12 TYPE FUNCTION(ARGUMENTS) const [with T = X] TEXT`
        Some(at) => {
            let (before, place) = line.split_at(at);
            after_signature(place)
                .map_or_else(|| before.to_owned(), |text| format!("{before}{text}"))
        }
        None => line,
    };
    line.trim().chars().take(300).collect()
}

/// The text behind a C++ function signature.
fn after_signature(place: &str) -> Option<&str> {
    let rest = after_brackets(&place[place.find('(')?..], ['(', ')'])?;
    let rest = rest.trim_start().trim_start_matches("const ");
    if rest.starts_with("[with ") { after_brackets(rest, ['[', ']']) } else { Some(rest) }
}

/// What follows the bracket that `text` opens with.
fn after_brackets(text: &str, [open, close]: [char; 2]) -> Option<&str> {
    let mut depth = 0usize;
    for (at, c) in text.char_indices() {
        if c == open {
            depth += 1;
        } else if c == close {
            depth = depth.checked_sub(1)?;
            if depth == 0 {
                return Some(&text[at + c.len_utf8()..]);
            }
        }
    }
    None
}

fn port(outlet: &Outlet) -> Port {
    let (element, dims) = match outlet.dtype() {
        ValueType::Tensor { ty, shape, .. } => {
            (ty.to_string(), shape.iter().map(|&dim| usize::try_from(dim).ok()).collect())
        }
        other => (other.to_string(), Vec::new()),
    };
    Port { name: outlet.name().to_owned(), element, dims }
}

fn into_value(tensor: Tensor) -> ort::Result<SessionInputValue<'static>> {
    let shape = tensor.shape;
    Ok(match tensor.values {
        Values::F32(v) => OrtTensor::from_array((shape, v))?.into_dyn(),
        Values::F16(v) => OrtTensor::from_array((shape, v))?.into_dyn(),
        Values::F64(v) => OrtTensor::from_array((shape, v))?.into_dyn(),
        Values::U8(v) => OrtTensor::from_array((shape, v))?.into_dyn(),
        Values::I8(v) => OrtTensor::from_array((shape, v))?.into_dyn(),
        Values::I32(v) => OrtTensor::from_array((shape, v))?.into_dyn(),
        Values::I64(v) => OrtTensor::from_array((shape, v))?.into_dyn(),
        Values::Bool(v) => OrtTensor::from_array((shape, v))?.into_dyn(),
    }
    .into())
}

/// The tensor in `value`; `None` when it is not one of numbers.
fn from_value(value: &DynValue) -> ort::Result<Option<Tensor>> {
    let ValueType::Tensor { ty, .. } = value.dtype() else { return Ok(None) };
    let (shape, values) = match ty {
        TensorElementType::Float32 => read(value, Values::F32)?,
        TensorElementType::Float16 => read(value, Values::F16)?,
        TensorElementType::Float64 => read(value, Values::F64)?,
        TensorElementType::Uint8 => read(value, Values::U8)?,
        TensorElementType::Int8 => read(value, Values::I8)?,
        TensorElementType::Int32 => read(value, Values::I32)?,
        TensorElementType::Int64 => read(value, Values::I64)?,
        TensorElementType::Bool => read(value, Values::Bool)?,
        _ => return Ok(None),
    };
    Ok(Some(Tensor { shape, values }))
}

fn read<T: PrimitiveTensorElementType + Clone>(
    value: &DynValue,
    wrap: fn(Vec<T>) -> Values,
) -> ort::Result<(Vec<usize>, Values)> {
    let (shape, values) = value.try_extract_tensor::<T>()?;
    let shape = shape.iter().map(|&dim| usize::try_from(dim).unwrap_or(0)).collect();
    Ok((shape, wrap(values.to_vec())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_lose_their_cpp_places_and_keep_their_meaning() {
        let cases = [
            (
                "Load model from /a/b.onnx failed:Protobuf parsing failed.",
                "Protobuf parsing failed.",
            ),
            (
                "Non-zero status code returned while running Pad node. Name:'' Status Message: \
                 /onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:360 void* \
                 onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, onnxruntime::Stream*) \
                 Failed to allocate memory for requested buffer of size 68719476992",
                "Failed to allocate memory for requested buffer of size 68719476992",
            ),
            (
                "Exception during initialization: /onnxruntime_src/a/element_wise_ops.h:256 \
                 onnxruntime::Div<T>::Div(const onnxruntime::OpKernelInfo&) [with T = long int] \
                 b_data[i] != T{0} was false. Integer division by zero\nsecond line",
                "Exception during initialization:  b_data[i] != T{0} was false. Integer division by zero",
            ),
            ("\n\n", "no reason given"),
        ];
        for (message, expected) in cases {
            assert_eq!(readable(message), expected);
        }
        assert_eq!(readable(&"x".repeat(1000)).len(), 300);
    }
}
