//! Per-thread scratch memory for kernels: taken, used, given back, never returned to the system.
//!
//! Steady-state steps then allocate nothing (a third of a naive step's time is page faults, design.md
//! 3). Uses may nest (each takes its own buffer) and may be interrupted by work stealing.

use std::any::{Any, TypeId};
use std::cell::RefCell;
use std::collections::HashMap;

use super::Element;

thread_local! {
    static FREE: RefCell<HashMap<TypeId, Vec<Box<dyn Any>>>> = RefCell::new(HashMap::new());
}

/// Calls `work` with a scratch slice of `len` elements of unspecified content.
pub fn with<T: Element, R>(len: usize, work: impl FnOnce(&mut [T]) -> R) -> R {
    let taken = FREE.with_borrow_mut(|free| free.get_mut(&TypeId::of::<T>()).and_then(Vec::pop));
    let mut buffer: Box<Vec<T>> =
        taken.and_then(|any| any.downcast().ok()).unwrap_or_else(|| Box::new(Vec::new()));
    if buffer.len() < len {
        buffer.resize(len, T::ZERO);
    }
    let result = work(&mut buffer[..len]);
    FREE.with_borrow_mut(|free| free.entry(TypeId::of::<T>()).or_default().push(buffer));
    result
}
