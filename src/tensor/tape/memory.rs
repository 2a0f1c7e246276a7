//! Values whose memory is kept for the next step when nobody holds them any more.
//!
//! A step allocates the same sizes as the one before it. Given back to the system, that memory costs a page fault for
//! every 4 KiB and a pass of zeros; kept here, it costs nothing. All tapes share the buffers, up to a limit.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Deref;
use std::rc::Rc;
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor};

use super::value::Float;

/// Bytes kept, most.
const MOST: usize = 1 << 29;

/// Free buffers of one element type, by length.
type Lists<T> = BTreeMap<usize, Vec<Vec<T>>>;

/// The free buffers.
pub struct Free {
    pub(super) single: Lists<f32>,
    pub(super) double: Lists<f64>,
    bytes: usize,
}

static FREE: Mutex<Free> =
    Mutex::new(Free { single: BTreeMap::new(), double: BTreeMap::new(), bytes: 0 });

fn free() -> MutexGuard<'static, Free> {
    // Lists are whole after every statement that may panic.
    FREE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `len` elements of unspecified content.
pub(super) fn empty<T: Float>(len: usize) -> Vec<T> {
    let kept = || {
        let mut free = free();
        let kept = T::lists(&mut free).get_mut(&len).and_then(Vec::pop)?;
        free.bytes -= size_of::<T>() * len;
        Some(kept)
    };
    kept().unwrap_or_else(|| vec![T::ZERO; len])
}

fn keep<T: Float>(buffer: Vec<T>) {
    let mut free = free();
    let bytes = size_of::<T>() * buffer.len();
    if bytes > 0 && free.bytes + bytes <= MOST {
        free.bytes += bytes;
        T::lists(&mut free).entry(buffer.len()).or_default().push(buffer);
    }
}

/// A tensor as the tape holds it.
#[derive(Clone)]
pub(super) struct Value {
    tensor: Tensor,
    /// Who owns its memory; `None` where that is not ours to keep.
    owner: Option<Rc<Owner>>,
}

/// Memory that the tape made; kept for the next value when dropped, unless someone else has seen it.
struct Owner {
    tensor: Tensor,
    lent: Cell<bool>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        if !self.lent.get() {
            // What cannot be kept is freed as usual.
            let _freed = self.tensor.inplace_op1(&Take);
        }
    }
}

/// Takes the memory out of a tensor.
struct Take;

impl InplaceOp1 for Take {
    fn name(&self) -> &'static str {
        "take"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _layout: &Layout) -> candle_core::Result<()> {
        match storage {
            CpuStorage::F32(values) => keep(std::mem::take(values)),
            CpuStorage::F64(values) => keep(std::mem::take(values)),
            _ => {}
        }
        Ok(())
    }
}

impl Value {
    /// A tensor that nobody else holds.
    pub(super) fn own(tensor: Tensor) -> Self {
        let owner = Owner { tensor: tensor.clone(), lent: Cell::new(false) };
        Self { tensor, owner: Some(Rc::new(owner)) }
    }

    /// A tensor that may lie in the memory of this one.
    pub(super) fn view(&self, tensor: Tensor) -> Self {
        Self { tensor, owner: self.owner.clone() }
    }

    /// The tensor for someone who may keep it.
    pub(super) fn lend(&self) -> &Tensor {
        if let Some(owner) = &self.owner {
            owner.lent.set(true);
        }
        &self.tensor
    }
}

impl From<Tensor> for Value {
    fn from(tensor: Tensor) -> Self {
        Self { tensor, owner: None }
    }
}

impl Deref for Value {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        &self.tensor
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Order, Tape, grad};
    use super::*;

    fn address(values: &Tensor) -> usize {
        let (storage, _) = values.storage_and_layout();
        match &*storage {
            candle_core::Storage::Cpu(cpu) => cpu.as_slice::<f64>().unwrap().as_ptr() as usize,
            _ => 0,
        }
    }

    #[test]
    // A length that no other test has.
    fn memory_is_kept_when_the_last_view_goes_unless_it_was_lent() {
        let tape = Tape::new();
        let leaf = tape.leaf(Tensor::arange(0.0f64, 1271.0, &candle_core::Device::Cpu).unwrap());
        let first = leaf.square().unwrap();
        let at = address(&first.value);
        let view = first.reshape(&[31, 41]).unwrap().transpose(0, 1).unwrap();
        drop((first, leaf, tape));
        assert_ne!(
            address(&view.tape.constant(empty_tensor(1271)).value),
            at,
            "a view still holds it"
        );
        drop(view);
        let next = empty_tensor(1271);
        assert_eq!(address(&next), at);

        let tape = Tape::new();
        let leaf = tape.leaf(Tensor::arange(0.0f64, 1271.0, &candle_core::Device::Cpu).unwrap());
        let gradient = grad(&leaf.square().unwrap().sum_all().unwrap(), &[&leaf], Order::First);
        let kept = gradient.unwrap()[0].value().clone();
        drop((leaf, tape));
        let expected: Vec<f64> = (0..1271).map(|i| f64::from(2 * i)).collect();
        assert_eq!(kept.to_vec1::<f64>().unwrap(), expected, "what was lent stays");
    }

    fn empty_tensor(len: usize) -> Tensor {
        Tensor::from_vec(empty::<f64>(len), len, &candle_core::Device::Cpu).unwrap()
    }
}
