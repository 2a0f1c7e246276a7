//! Teachers kept open while a method goes back and forth among them.

use std::sync::{Arc, Mutex, PoisonError};

use crate::access::Teacher;
use crate::error::Result;
use crate::methods::Opener;

/// Teachers kept open at once.
const MOST: usize = 64;

/// The teachers in use, by model, least recently used first.
pub struct OpenTeachers<'a> {
    open: &'a Opener<'a>,
    held: Mutex<Vec<(usize, Arc<dyn Teacher>)>>,
}

impl<'a> OpenTeachers<'a> {
    /// None yet; `open` opens them.
    pub fn new(open: &'a Opener<'a>) -> Self {
        Self { open, held: Mutex::default() }
    }

    /// The teacher of `model`.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn get(&self, model: usize) -> Result<Arc<dyn Teacher>> {
        let lock = || self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let mut held = lock();
        if let Some(at) = held.iter().position(|(own, _)| *own == model) {
            let found = held.remove(at);
            held.push(found.clone());
            return Ok(found.1);
        }
        drop(held);
        let opened: Arc<dyn Teacher> = Arc::from((self.open)(model)?);
        let mut held = lock();
        if held.len() >= MOST {
            held.remove(0);
        }
        held.push((model, Arc::clone(&opened)));
        Ok(opened)
    }
}
