//! Tensors of the file to constants of the graph and back, for every numeric element type.
//!
//! The number of elements comes from the shape with overflow checks, and the bytes that are really
//! there must match it before anything is allocated: a 100-byte file can claim 2^62 elements.

use std::sync::Arc;

use candle_onnx::onnx::TensorProto;
use candle_onnx::onnx::tensor_proto::{DataLocation, DataType as Element};
use half::{bf16, f16};

use super::MAX_ELEMENTS;
use super::external::External;
use crate::error::{Error, Result};
use crate::graph::{ConstantData, ConstantTensor, DataType};

/// Reads the tensors of one model, counting elements against [`MAX_ELEMENTS`].
pub(super) struct TensorReader<'a> {
    external: External<'a>,
    elements_left: usize,
}

/// A tensor of the file.
pub(super) enum Decoded {
    Numbers(Arc<ConstantTensor>),
    /// A string tensor: harmless unless something computes with it.
    Text,
}

impl<'a> TensorReader<'a> {
    pub(super) fn new(external: External<'a>) -> Self {
        Self { external, elements_left: MAX_ELEMENTS }
    }

    pub(super) fn into_external(self) -> External<'a> {
        self.external
    }

    /// Decodes a tensor; the caller adds which one it is.
    ///
    /// # Errors
    /// When type, shape and data do not fit each other, or external data is refused.
    pub(super) fn read(&mut self, tensor: TensorProto) -> Result<Decoded> {
        if tensor.data_type == Element::String as i32 {
            return Ok(Decoded::Text);
        }
        let dtype = data_type(tensor.data_type)?;
        let shape = shape(&tensor.dims)?;
        let elements = elements(&shape)?;
        if elements > self.elements_left {
            return Err(Error::unsupported(format!(
                "constants hold more than {MAX_ELEMENTS} elements together, here `{elements}` more"
            ))
            .hint("use a smaller model"));
        }
        if tensor.segment.is_some() {
            return Err(Error::unsupported("tensor stored in segments"));
        }
        let data = if tensor.data_location == DataLocation::External as i32 {
            let length = elements as u64 * width(dtype) as u64;
            let raw = self.external.read(&tensor.external_data, length)?;
            from_raw(dtype, &raw)?
        } else {
            from_fields(dtype, &shape, elements, &tensor)?
        };
        self.elements_left -= elements;
        Ok(Decoded::Numbers(Arc::new(ConstantTensor { shape, dtype, data })))
    }
}

/// The element type of a tensor or port.
///
/// # Errors
/// When the number is no type of ONNX (input) or one the graph does not hold (unsupported).
pub(super) fn data_type(number: i32) -> Result<DataType> {
    let element = Element::try_from(number).ok();
    Ok(match element {
        Some(Element::Float) => DataType::Float32,
        Some(Element::Double) => DataType::Float64,
        Some(Element::Float16) => DataType::Float16,
        Some(Element::Bfloat16) => DataType::BFloat16,
        Some(Element::Int8) => DataType::Int8,
        Some(Element::Int16) => DataType::Int16,
        Some(Element::Int32) => DataType::Int32,
        Some(Element::Int64) => DataType::Int64,
        Some(Element::Uint8) => DataType::Uint8,
        Some(Element::Uint16) => DataType::Uint16,
        Some(Element::Uint32) => DataType::Uint32,
        Some(Element::Uint64) => DataType::Uint64,
        Some(Element::Bool) => DataType::Bool,
        Some(Element::String) => DataType::String,
        Some(Element::Undefined) => {
            return Err(Error::input("element type is not set").hint("export the model again"));
        }
        Some(other) => {
            return Err(Error::unsupported(format!("element type `{}`", other.as_str_name()))
                .hint("export the model in float32"));
        }
        // 4-bit, 2-bit and newer 8-bit floats came after the protobuf definition in use.
        None if (21..=32).contains(&number) => {
            return Err(Error::unsupported(format!("element type number `{number}`"))
                .hint("export the model in float32 or 8-bit integers"));
        }
        None => {
            return Err(Error::input(format!("element type number `{number}` does not exist"))
                .hint("the file is damaged; export the model again"));
        }
    })
}

/// The number ONNX gives an element type.
pub(super) fn element_number(dtype: DataType) -> i32 {
    (match dtype {
        DataType::Float32 => Element::Float,
        DataType::Float64 => Element::Double,
        DataType::Float16 => Element::Float16,
        DataType::BFloat16 => Element::Bfloat16,
        DataType::Int8 => Element::Int8,
        DataType::Int16 => Element::Int16,
        DataType::Int32 => Element::Int32,
        DataType::Int64 => Element::Int64,
        DataType::Uint8 => Element::Uint8,
        DataType::Uint16 => Element::Uint16,
        DataType::Uint32 => Element::Uint32,
        DataType::Uint64 => Element::Uint64,
        DataType::Bool => Element::Bool,
        DataType::String => Element::String,
    }) as i32
}

/// Bytes of an element in `raw_data`.
fn width(dtype: DataType) -> usize {
    match dtype {
        DataType::Int8 | DataType::Uint8 | DataType::Bool | DataType::String => 1,
        DataType::Float16 | DataType::BFloat16 | DataType::Int16 | DataType::Uint16 => 2,
        DataType::Float32 | DataType::Int32 | DataType::Uint32 => 4,
        DataType::Float64 | DataType::Int64 | DataType::Uint64 => 8,
    }
}

fn shape(dims: &[i64]) -> Result<Vec<usize>> {
    dims.iter()
        .map(|&dim| {
            usize::try_from(dim).map_err(|_| {
                Error::input(format!("field `dims` holds a negative size: `{dims:?}`"))
                    .hint("the file is damaged; export the model again")
            })
        })
        .collect()
}

fn elements(shape: &[usize]) -> Result<usize> {
    if shape.contains(&0) {
        return Ok(0);
    }
    let mut product = 1_usize;
    for &dim in shape {
        product = product.checked_mul(dim).filter(|&n| n <= MAX_ELEMENTS).ok_or_else(|| {
            Error::input(format!("a tensor of more than {MAX_ELEMENTS} elements: `{shape:?}`"))
                .hint("the file is damaged or made to exhaust memory; leave it out")
        })?;
    }
    Ok(product)
}

fn from_fields(
    dtype: DataType,
    shape: &[usize],
    elements: usize,
    tensor: &TensorProto,
) -> Result<ConstantData> {
    let typed = [
        ("float_data", tensor.float_data.len()),
        ("double_data", tensor.double_data.len()),
        ("int32_data", tensor.int32_data.len()),
        ("int64_data", tensor.int64_data.len()),
        ("uint64_data", tensor.uint64_data.len()),
    ];
    let given: Vec<_> = typed.into_iter().filter(|&(_, len)| len > 0).collect();
    let damaged = "the file is damaged; export the model again";
    if !tensor.raw_data.is_empty() {
        if let Some((name, _)) = given.first() {
            return Err(Error::input(format!("data in both `raw_data` and `{name}`")).hint(damaged));
        }
        let wanted = elements * width(dtype);
        if tensor.raw_data.len() != wanted {
            return Err(Error::input(format!(
                "field `raw_data` must hold {wanted} bytes for shape {shape:?}, found `{}`",
                tensor.raw_data.len()
            ))
            .hint(damaged));
        }
        return from_raw(dtype, &tensor.raw_data);
    }
    let field = match dtype {
        DataType::Float32 => "float_data",
        DataType::Float64 => "double_data",
        DataType::Int64 => "int64_data",
        DataType::Uint32 | DataType::Uint64 => "uint64_data",
        _ => "int32_data",
    };
    if let Some((other, _)) = given.iter().find(|(name, _)| *name != field) {
        return Err(
            Error::input(format!("data must be in field `{field}`, found `{other}`")).hint(damaged)
        );
    }
    let found = given.first().map_or(0, |&(_, len)| len);
    if found != elements {
        return Err(Error::input(format!(
            "field `{field}` must hold {elements} values for shape {shape:?}, found `{found}`"
        ))
        .hint(damaged));
    }
    Ok(match dtype {
        DataType::Float32 => ConstantData::F32(tensor.float_data.clone()),
        DataType::Float64 => ConstantData::F64(tensor.double_data.clone()),
        DataType::Int64 => ConstantData::I64(tensor.int64_data.clone()),
        DataType::Uint32 | DataType::Uint64 => {
            let max = if dtype == DataType::Uint32 { u64::from(u32::MAX) } else { i64::MAX as u64 };
            ConstantData::I64(collect(&tensor.uint64_data, field, |&v| {
                (v <= max).then_some(v).and_then(|v| i64::try_from(v).ok())
            })?)
        }
        DataType::Float16 | DataType::BFloat16 => {
            let half = dtype == DataType::Float16;
            ConstantData::F32(collect(&tensor.int32_data, field, |&v| {
                let bits = u16::try_from(v).ok()?;
                Some(if half {
                    f16::from_bits(bits).to_f32()
                } else {
                    bf16::from_bits(bits).to_f32()
                })
            })?)
        }
        _ => {
            let (low, high) = dtype.integer_range().unwrap_or((i64::MIN, i64::MAX));
            ConstantData::I64(collect(&tensor.int32_data, field, |&v| {
                Some(i64::from(v)).filter(|v| (low..=high).contains(v))
            })?)
        }
    })
}

fn collect<T: std::fmt::Display, U>(
    values: &[T],
    field: &str,
    convert: impl Fn(&T) -> Option<U>,
) -> Result<Vec<U>> {
    values
        .iter()
        .map(|value| {
            convert(value).ok_or_else(|| {
                Error::input(format!("field `{field}` holds a value outside its type: `{value}`"))
                    .hint("the file is damaged; export the model again")
            })
        })
        .collect()
}

/// Little-endian bytes to values; the length is a multiple of the width.
fn from_raw(dtype: DataType, raw: &[u8]) -> Result<ConstantData> {
    Ok(match dtype {
        DataType::Float32 => ConstantData::F32(map(raw, f32::from_le_bytes)),
        DataType::Float64 => ConstantData::F64(map(raw, f64::from_le_bytes)),
        DataType::Float16 => ConstantData::F32(map(raw, |b| f16::from_le_bytes(b).to_f32())),
        DataType::BFloat16 => ConstantData::F32(map(raw, |b| bf16::from_le_bytes(b).to_f32())),
        DataType::Int8 => ConstantData::I64(map(raw, |b| i64::from(i8::from_le_bytes(b)))),
        DataType::Int16 => ConstantData::I64(map(raw, |b| i64::from(i16::from_le_bytes(b)))),
        DataType::Int32 => ConstantData::I64(map(raw, |b| i64::from(i32::from_le_bytes(b)))),
        DataType::Int64 => ConstantData::I64(map(raw, i64::from_le_bytes)),
        DataType::Uint8 => ConstantData::I64(map(raw, |b: [u8; 1]| i64::from(b[0]))),
        DataType::Uint16 => ConstantData::I64(map(raw, |b| i64::from(u16::from_le_bytes(b)))),
        DataType::Uint32 => ConstantData::I64(map(raw, |b| i64::from(u32::from_le_bytes(b)))),
        DataType::Bool => ConstantData::I64(map(raw, |b: [u8; 1]| i64::from(b[0] != 0))),
        DataType::Uint64 => {
            let values = map(raw, i64::from_le_bytes);
            if values.iter().any(|&value| value < 0) {
                return Err(Error::unsupported("a uint64 value above the largest int64"));
            }
            ConstantData::I64(values)
        }
        DataType::String => return Err(Error::unsupported("a string tensor used as numbers")),
    })
}

fn map<const N: usize, T>(raw: &[u8], convert: impl Fn([u8; N]) -> T) -> Vec<T> {
    raw.as_chunks::<N>().0.iter().map(|&chunk| convert(chunk)).collect()
}

/// A constant as `raw_data` of its declared type.
///
/// # Errors
/// Internal: a constant whose values do not fit its declared type or shape.
pub(super) fn encode(name: &str, constant: &ConstantTensor) -> Result<TensorProto> {
    let misfit = || {
        Error::internal(format!(
            "constant of type {:?} and shape {:?} does not hold such values",
            constant.dtype, constant.shape
        ))
        .context(format!("constant `{name}`"))
    };
    let count = elements(&constant.shape).map_err(|_| misfit())?;
    if count != constant.data.len() {
        return Err(misfit());
    }
    let raw_data = match (&constant.data, constant.dtype) {
        (ConstantData::F32(v), DataType::Float32) => bytes(v, |x| x.to_le_bytes()),
        (ConstantData::F32(v), DataType::Float16) => bytes(v, |&x| f16::from_f32(x).to_le_bytes()),
        (ConstantData::F32(v), DataType::BFloat16) => {
            bytes(v, |&x| bf16::from_f32(x).to_le_bytes())
        }
        (ConstantData::F64(v), DataType::Float64) => bytes(v, |x| x.to_le_bytes()),
        (ConstantData::I64(v), dtype) => {
            let (low, high) = dtype.integer_range().ok_or_else(misfit)?;
            if v.iter().any(|x| !(low..=high).contains(x)) {
                return Err(misfit());
            }
            // In range: the low bytes of the two's complement are the narrow value.
            let width = width(dtype);
            let mut raw = Vec::with_capacity(v.len() * width);
            for x in v {
                raw.extend_from_slice(&x.to_le_bytes()[..width]);
            }
            raw
        }
        _ => return Err(misfit()),
    };
    Ok(TensorProto {
        name: name.into(),
        dims: constant.shape.iter().map(|&dim| dim as i64).collect(),
        data_type: element_number(constant.dtype),
        raw_data,
        ..Default::default()
    })
}

fn bytes<const N: usize, T>(values: &[T], convert: impl Fn(&T) -> [u8; N]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(values.len() * N);
    for value in values {
        bytes.extend_from_slice(&convert(value));
    }
    bytes
}
