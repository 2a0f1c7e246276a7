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
/// Buffers asked for, after which those that nobody needed meanwhile may be given back: many steps.
const WINDOW: u64 = 1 << 13;

/// Free buffers of one length.
pub struct Shelf<T> {
    buffers: Vec<Vec<T>>,
    /// The fewest there were since the last clearing: so many nobody needed.
    least: usize,
}

/// Free buffers of one element type, by length.
pub(super) type Shelves<T> = BTreeMap<usize, Shelf<T>>;

/// The free buffers.
pub struct Free {
    pub(super) single: Shelves<f32>,
    pub(super) double: Shelves<f64>,
    bytes: usize,
    most: usize,
    /// Buffers asked for since the last clearing.
    asked: u64,
}

static FREE: Mutex<Free> = Mutex::new(Free::new(MOST));

fn free() -> MutexGuard<'static, Free> {
    // Shelves are whole after every statement that may panic.
    FREE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T> Shelf<T> {
    /// Gives back what nobody needed since it was last asked; the bytes of it.
    fn clear(&mut self) -> usize {
        let gone: usize = self.buffers.drain(..self.least).map(|b| size_of::<T>() * b.len()).sum();
        self.least = self.buffers.len();
        gone
    }
}

impl Free {
    const fn new(most: usize) -> Self {
        Self { single: BTreeMap::new(), double: BTreeMap::new(), bytes: 0, most, asked: 0 }
    }

    fn take<T: Float>(&mut self, len: usize) -> Option<Vec<T>> {
        self.asked += 1;
        let shelf = T::shelves(self).get_mut(&len)?;
        let taken = shelf.buffers.pop()?;
        shelf.least = shelf.least.min(shelf.buffers.len());
        self.bytes -= size_of::<T>() * len;
        Some(taken)
    }

    /// Values come from elsewhere too, so a length may come in more often than it is asked for: without clearing, such
    /// lengths would in time fill all there is.
    fn keep<T: Float>(&mut self, buffer: Vec<T>) {
        let bytes = size_of::<T>() * buffer.len();
        if self.bytes + bytes > self.most && self.asked >= WINDOW {
            self.asked = 0;
            let gone: usize = self.single.values_mut().map(Shelf::clear).sum::<usize>()
                + self.double.values_mut().map(Shelf::clear).sum::<usize>();
            self.bytes -= gone;
        }
        if bytes > 0 && self.bytes + bytes <= self.most {
            self.bytes += bytes;
            let shelves = T::shelves(self).entry(buffer.len());
            shelves.or_insert_with(|| Shelf { buffers: Vec::new(), least: 0 }).buffers.push(buffer);
        }
    }
}

/// `len` elements of unspecified content.
pub(super) fn empty<T: Float>(len: usize) -> Vec<T> {
    let kept = free().take(len);
    kept.unwrap_or_else(|| vec![T::ZERO; len])
}

fn keep<T: Float>(buffer: Vec<T>) {
    free().keep(buffer);
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

    /// A length that comes in and is never asked for makes room for one that is; what was needed lately stays.
    #[test]
    fn buffers_that_nobody_asks_for_make_room() {
        let mut free = Free::new(1000 * size_of::<f32>());
        for _ in 0..3 {
            free.keep(vec![0.0f32; 100]);
        }
        for _ in 0..20 {
            free.keep(vec![0.0f32; 70]);
        }
        assert_eq!((free.bytes, free.single[&70].buffers.len()), (4 * 1000, 10));
        free.keep(vec![0.0f64; 50]);
        assert!(free.double.is_empty(), "no room, and it is too early to clear");
        let window = |free: &mut Free| (0..WINDOW).for_each(|_| drop(free.take::<f32>(5)));
        window(&mut free);
        free.keep(vec![0.0f64; 50]);
        assert!(free.double.is_empty(), "all of it came in since the last clearing");
        let needed: Vec<Vec<f32>> = (0..2).filter_map(|_| free.take(100)).collect();
        assert_eq!((needed.len(), free.bytes), (2, 4 * 800));
        needed.into_iter().for_each(|buffer| free.keep(buffer));
        window(&mut free);
        free.keep(vec![0.0f64; 50]);
        let left = [100, 70].map(|len| free.single[&len].buffers.len());
        assert_eq!((left, free.double[&50].buffers.len()), ([2, 0], 1));
        assert_eq!(free.bytes, 4 * 200 + 8 * 50);
    }

    fn empty_tensor(len: usize) -> Tensor {
        Tensor::from_vec(empty::<f64>(len), len, &candle_core::Device::Cpu).unwrap()
    }
}
