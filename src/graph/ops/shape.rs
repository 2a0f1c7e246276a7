//! Operators on shapes and types: they compute nothing from the images. Shape, Size, Reshape and its
//! kin, Cast, Identity, Constant, ConstantOfShape, Range.

use std::sync::Arc;

use super::elementwise::{Function, apply_as};
use super::{Rule, axis_index};
use crate::error::{Error, Result};
use crate::graph::ir::{Attribute, ConstantData, ConstantTensor, DataType, Node};
use crate::graph::plan::{Lower, Value};
use crate::tensor::kernels::Element;

/// Elements a computed constant may have: a file of some bytes must not ask for gigabytes.
pub(super) const CONSTANT_LIMIT: usize = 1 << 28;

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    Some(match op {
        "Identity" => identity,
        "Dropout" => dropout,
        "Shape" => shape,
        "Size" => size,
        "Reshape" => reshape,
        "Flatten" => flatten,
        "Squeeze" => squeeze,
        "Unsqueeze" => unsqueeze,
        "Cast" => cast,
        "CastLike" => cast_like,
        "Constant" => constant,
        "ConstantOfShape" => constant_of_shape,
        "Range" => range,
        _ => return None,
    })
}

fn constant_value(tensor: ConstantTensor) -> Value {
    Value::Constant(Arc::new(tensor))
}

fn identity<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    lower.set_output(node, 0, x);
    Ok(())
}

/// At inference nothing is dropped: the mask is all true.
fn dropout<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let training = lower.constant_input(node, 2)?;
    if training.is_some_and(|tensor| tensor.to_f64().first().is_some_and(|&v| v != 0.0)) {
        return Err(
            Error::unsupported("is in training mode").hint("export the model after `model.eval()`")
        );
    }
    let x = lower.input(node, 0)?;
    if node.outputs.get(1).is_some_and(|name| !name.is_empty()) {
        let data = ConstantData::I64(vec![1; x.len()]);
        let mask = ConstantTensor { shape: x.shape().to_vec(), dtype: DataType::Bool, data };
        lower.set_output(node, 1, constant_value(mask));
    }
    lower.set_output(node, 0, x);
    Ok(())
}

fn shape<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let rank = x.rank() as i64;
    let clamp = |value: i64| (if value < 0 { value + rank } else { value }).clamp(0, rank) as usize;
    let start = clamp(node.int("start", 0)?);
    let end = clamp(node.int("end", rank)?).max(start);
    let dims: Vec<i64> = x.shape()[start..end].iter().map(|&d| d as i64).collect();
    lower.set_output(node, 0, constant_value(ConstantTensor::i64([dims.len()], dims)));
    Ok(())
}

fn size<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    lower.set_output(node, 0, constant_value(ConstantTensor::i64([], vec![x.len() as i64])));
    Ok(())
}

fn reshape<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let dims = match lower.integers(node, 1)? {
        Some(dims) => dims,
        None => node
            .ints("shape")?
            .map(<[i64]>::to_vec)
            .ok_or_else(|| Error::input("needs a shape, as input 1 or as attribute `shape`"))?,
    };
    let keep_zero = node.int("allowzero", 0)? != 0;
    let mut shape = Vec::with_capacity(dims.len());
    let mut free = None;
    for (axis, &dim) in dims.iter().enumerate() {
        shape.push(match dim {
            -1 if free.is_none() => {
                free = Some(axis);
                1
            }
            0 if !keep_zero => *x.shape().get(axis).ok_or_else(|| {
                Error::input(format!("shape {dims:?} copies axis `{axis}`, which is not there"))
            })?,
            dim => usize::try_from(dim)
                .map_err(|_| Error::input(format!("bad dimension in shape `{dims:?}`")))?,
        });
    }
    if let Some(axis) = free {
        let known: usize = shape.iter().product();
        if known == 0 || !x.len().is_multiple_of(known) {
            return Err(Error::input(format!("cannot reshape {:?} to `{dims:?}`", x.shape())));
        }
        shape[axis] = x.len() / known;
    }
    let y = lower.reshape(&x, shape)?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn flatten<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let axis = node.int("axis", 1)?;
    let rank = x.rank() as i64;
    let axis = if axis < 0 { axis + rank } else { axis };
    if !(0..=rank).contains(&axis) {
        return Err(Error::input(format!("axis `{axis}` is outside a tensor of rank {rank}")));
    }
    let (outer, inner) = x.shape().split_at(axis as usize);
    let shape = vec![outer.iter().product(), inner.iter().product()];
    let y = lower.reshape(&x, shape)?;
    lower.set_output(node, 0, y);
    Ok(())
}

/// Axes given as input `input` (opset 13 on) or as attribute `axes`.
pub(super) fn axes<T: Element>(
    lower: &Lower<'_, T>,
    node: &Node,
    input: usize,
) -> Result<Option<Vec<i64>>> {
    match lower.integers(node, input)? {
        Some(axes) => Ok(Some(axes)),
        None => Ok(node.ints("axes")?.map(<[i64]>::to_vec)),
    }
}

fn squeeze<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let rank = x.rank();
    let dropped: Vec<usize> = match axes(lower, node, 1)? {
        Some(axes) => axes.iter().map(|&a| axis_index(a, rank)).collect::<Result<_>>()?,
        None => (0..rank).filter(|&axis| x.shape()[axis] == 1).collect(),
    };
    if let Some(&axis) = dropped.iter().find(|&&axis| x.shape().get(axis) != Some(&1)) {
        return Err(Error::input(format!("cannot squeeze axis {axis} of `{:?}`", x.shape())));
    }
    let kept = (0..rank).filter(|axis| !dropped.contains(axis)).map(|axis| x.shape()[axis]);
    let y = lower.reshape(&x, kept.collect())?;
    lower.set_output(node, 0, y);
    Ok(())
}

fn unsqueeze<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let axes = axes(lower, node, 1)?.ok_or_else(|| Error::input("needs `axes`"))?;
    let rank = x.rank() + axes.len();
    let added: Vec<usize> = axes.iter().map(|&a| axis_index(a, rank)).collect::<Result<_>>()?;
    let mut old = x.shape().iter();
    let shape: Vec<usize> = (0..rank)
        .map(|axis| if added.contains(&axis) { 1 } else { old.next().copied().unwrap_or(1) })
        .collect();
    let y = lower.reshape(&x, shape)?;
    lower.set_output(node, 0, y);
    Ok(())
}

/// The type behind ONNX's number for it.
pub(super) fn data_type(code: i64) -> Result<DataType> {
    Ok(match code {
        1 => DataType::Float32,
        2 => DataType::Uint8,
        3 => DataType::Int8,
        4 => DataType::Uint16,
        5 => DataType::Int16,
        6 => DataType::Int32,
        7 => DataType::Int64,
        9 => DataType::Bool,
        10 => DataType::Float16,
        11 => DataType::Float64,
        12 => DataType::Uint32,
        13 => DataType::Uint64,
        16 => DataType::BFloat16,
        _ => return Err(Error::unsupported(format!("tensor type number `{code}`"))),
    })
}

/// Converts a constant's values to `dtype` as ONNX's Cast does.
pub(super) fn convert(tensor: &ConstantTensor, dtype: DataType) -> ConstantTensor {
    let data = match (&tensor.data, dtype) {
        (ConstantData::I64(v), DataType::Bool) => {
            ConstantData::I64(v.iter().map(|&x| i64::from(x != 0)).collect())
        }
        (ConstantData::I64(v), dtype) if !dtype.is_float() => {
            ConstantData::I64(v.iter().map(|&x| wrap(x, dtype)).collect())
        }
        (_, DataType::Float64) => ConstantData::F64(tensor.to_f64()),
        (_, dtype) if dtype.is_float() => ConstantData::F32(tensor.to_f32()),
        (_, DataType::Bool) => {
            ConstantData::I64(tensor.to_f64().iter().map(|&x| i64::from(x != 0.0)).collect())
        }
        _ => ConstantData::I64(tensor.to_f64().iter().map(|&x| wrap(x as i64, dtype)).collect()),
    };
    ConstantTensor { shape: tensor.shape.clone(), dtype, data }
}

/// The value an integer type keeps of `x`.
pub(super) fn wrap(x: i64, dtype: DataType) -> i64 {
    match dtype {
        DataType::Bool => i64::from(x != 0),
        DataType::Int8 => i64::from(x as i8),
        DataType::Int16 => i64::from(x as i16),
        DataType::Int32 => i64::from(x as i32),
        DataType::Uint8 => i64::from(x as u8),
        DataType::Uint16 => i64::from(x as u16),
        DataType::Uint32 => i64::from(x as u32),
        _ => x,
    }
}

fn cast_to<'g, T: Element>(
    lower: &mut Lower<'g, T>,
    node: &'g Node,
    x: &Value,
    dtype: DataType,
) -> Result<()> {
    let y = match x {
        Value::Constant(tensor) => constant_value(convert(tensor, dtype)),
        live if dtype.is_float() => live.clone().of_type(dtype),
        live if !live.dtype().is_float() && dtype != DataType::Bool => live.clone().of_type(dtype),
        live => {
            let bool = dtype == DataType::Bool;
            let function = if bool { Function::Truth } else { Function::Truncate };
            apply_as(lower, dtype, function, (0.0, 0.0), live)
        }
    };
    lower.set_output(node, 0, y);
    Ok(())
}

fn cast<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let dtype = data_type(node.int("to", 1)?)?;
    cast_to(lower, node, &x, dtype)
}

fn cast_like<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let dtype = lower.input(node, 1)?.dtype();
    cast_to(lower, node, &x, dtype)
}

fn constant<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let tensor = match node.attributes.iter().find(|(name, _)| name.starts_with("value")) {
        Some((_, Attribute::Tensor(tensor))) => Arc::clone(tensor),
        Some((_, Attribute::Float(v))) => Arc::new(ConstantTensor::f32([], vec![*v])),
        Some((_, Attribute::Int(v))) => Arc::new(ConstantTensor::i64([], vec![*v])),
        Some((_, Attribute::Floats(v))) => Arc::new(ConstantTensor::f32([v.len()], v.clone())),
        Some((_, Attribute::Ints(v))) => Arc::new(ConstantTensor::i64([v.len()], v.clone())),
        _ => return Err(Error::unsupported("holds no numeric value")),
    };
    lower.set_output(node, 0, Value::Constant(tensor));
    Ok(())
}

fn constant_of_shape<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let dims = lower.integers(node, 0)?.unwrap_or_default();
    let mut length = 1usize;
    let mut shape = Vec::new();
    for &dim in &dims {
        let dim = usize::try_from(dim)
            .map_err(|_| Error::input(format!("negative dimension in shape `{dims:?}`")))?;
        length = length.saturating_mul(dim);
        shape.push(dim);
    }
    if length > CONSTANT_LIMIT {
        return Err(Error::input(format!("asks for a constant of shape `{dims:?}`")));
    }
    fn repeated<E: Copy + Default>(values: &[E], length: usize) -> Vec<E> {
        vec![values.first().copied().unwrap_or_default(); length]
    }
    let (dtype, data) = match node.attributes.get("value") {
        Some(Attribute::Tensor(value)) => {
            let data = match &value.data {
                ConstantData::F32(v) => ConstantData::F32(repeated(v, length)),
                ConstantData::F64(v) => ConstantData::F64(repeated(v, length)),
                ConstantData::I64(v) => ConstantData::I64(repeated(v, length)),
            };
            (value.dtype, data)
        }
        _ => (DataType::Float32, ConstantData::F32(vec![0.0; length])),
    };
    lower.set_output(node, 0, constant_value(ConstantTensor { shape, dtype, data }));
    Ok(())
}

fn range<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let mut values = [0.0; 3];
    let mut dtype = DataType::Int64;
    for (index, value) in values.iter_mut().enumerate() {
        let tensor = lower
            .constant_input(node, index)?
            .ok_or_else(|| Error::input(format!("needs input `{index}`")))?;
        *value = tensor.to_f64().first().copied().unwrap_or_default();
        dtype = tensor.dtype;
    }
    let [start, limit, delta] = values;
    let count = if delta == 0.0 { f64::NAN } else { ((limit - start) / delta).ceil().max(0.0) };
    if !count.is_finite() || count > CONSTANT_LIMIT as f64 {
        return Err(Error::input(format!("bad range {start}..{limit} by `{delta}`")));
    }
    let data = if dtype.is_float() {
        ConstantData::F32((0..count as usize).map(|i| (start + i as f64 * delta) as f32).collect())
    } else {
        ConstantData::I64((0..count as i64).map(|i| start as i64 + i * delta as i64).collect())
    };
    let tensor = ConstantTensor { shape: vec![data.len()], dtype, data };
    lower.set_output(node, 0, constant_value(tensor));
    Ok(())
}
