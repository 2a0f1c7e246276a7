//! Reading candle tensors as slices and making them from vectors: the door to the CPU kernels.

use std::marker::PhantomData;
use std::ops::Deref;

use candle_core::{DType, Storage, StorageRef, Tensor, WithDType};

use super::memory::{Free, Shelves, Value, empty};
use crate::error::{Error, Result};
use crate::tensor::kernels::Element;

/// Element types the tape computes in.
pub trait Float: Element + WithDType {
    /// Its free buffers.
    fn shelves(free: &mut Free) -> &mut Shelves<Self>;
}

impl Float for f32 {
    fn shelves(free: &mut Free) -> &mut Shelves<Self> {
        &mut free.single
    }
}

impl Float for f64 {
    fn shelves(free: &mut Free) -> &mut Shelves<Self> {
        &mut free.double
    }
}

/// The elements of a contiguous CPU tensor, held for reading.
pub(super) struct Slice<'a, T> {
    storage: StorageRef<'a>,
    range: (usize, usize),
    element: PhantomData<T>,
}

impl<'a, T: Float> Slice<'a, T> {
    /// # Errors
    /// When the tensor is not contiguous, not on the CPU, or of another type.
    pub(super) fn new(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let range = layout
            .contiguous_offsets()
            .ok_or_else(|| Error::internal("kernel called on a tensor that is not contiguous"))?;
        match &*storage {
            Storage::Cpu(cpu) => drop(cpu.as_slice::<T>()?),
            _ => return Err(Error::internal("CPU kernel called on a tensor of another device")),
        }
        Ok(Self { storage, range, element: PhantomData })
    }
}

impl<T: Float> Deref for Slice<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &*self.storage {
            Storage::Cpu(cpu) => {
                let all = cpu.as_slice::<T>().expect("the type was checked by `new`");
                &all[self.range.0..self.range.1]
            }
            _ => unreachable!("the device was checked by `new`"),
        }
    }
}

/// Calls `f32` or `f64` by the tensor's element type.
pub(super) fn by_dtype<R>(
    dtype: DType,
    f32: impl FnOnce() -> Result<R>,
    f64: impl FnOnce() -> Result<R>,
) -> Result<R> {
    match dtype {
        DType::F32 => f32(),
        DType::F64 => f64(),
        other => Err(Error::internal(format!("the tape computes in f32 and f64, not `{other:?}`"))),
    }
}

/// A CPU tensor of the shape of `dims` filled by a kernel, which must write every element.
pub(super) fn build<T: Float>(dims: &[usize], fill: impl FnOnce(&mut [T])) -> Result<Value> {
    let mut data = empty(dims.iter().product());
    fill(&mut data);
    from_vec(data, dims)
}

/// A CPU tensor from its values.
pub(super) fn from_vec<T: Float>(data: Vec<T>, dims: &[usize]) -> Result<Value> {
    Ok(Value::own(Tensor::from_vec(data, dims, &candle_core::Device::Cpu)?))
}

/// A tensor from `f64` values, converted to `dtype` and moved to the device of `like`.
pub(super) fn small(values: &[f64], dims: &[usize], like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::from_slice(values, dims, &candle_core::Device::Cpu)?
        .to_dtype(like.dtype())?
        .to_device(like.device())?)
}
