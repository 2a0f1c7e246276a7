//! Open sessions of all black-box models of a run, bounded.
//!
//! A session costs memory (weights, arenas) and its opening costs time, so each is kept for the next worker
//! that asks the same model, and at most `max_open` exist: beyond that the one idle longest is closed, and
//! where none is idle the worker waits. A worker holds a session for one run of the model and needs nothing
//! else meanwhile, so waiting always ends.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::session::Session;
use crate::error::Result;

/// Sessions of many models, at most `max_open` at a time.
#[derive(Debug)]
pub struct SessionPool {
    max_open: usize,
    state: Mutex<State>,
    freed: Condvar,
    owners: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// Sessions that exist, in use or idle.
    open: usize,
    /// The most that ever existed at once.
    most: usize,
    /// Sessions opened so far.
    opened: u64,
    /// Longest idle first.
    idle: Vec<(u64, Session)>,
}

impl SessionPool {
    /// A pool of at most `max_open` sessions (at least one).
    pub fn new(max_open: usize) -> Self {
        Self {
            max_open: max_open.max(1),
            state: Mutex::default(),
            freed: Condvar::new(),
            owners: AtomicU64::new(0),
        }
    }

    /// The most sessions that existed at once, and how many were opened in all.
    pub fn usage(&self) -> (usize, u64) {
        let state = self.lock();
        (state.most, state.opened)
    }

    /// Sessions that exist now, in use or idle.
    pub fn open_now(&self) -> usize {
        self.lock().open
    }

    /// A number for one model's sessions.
    pub(super) fn owner(&self) -> u64 {
        self.owners.fetch_add(1, Ordering::Relaxed)
    }

    /// A session of `owner` for one run: an idle one, else what `open` gives once there is room.
    ///
    /// # Errors
    /// Those of `open`.
    pub(super) fn lease(
        &self,
        owner: u64,
        open: impl FnOnce() -> Result<Session>,
    ) -> Result<Lease<'_>> {
        let mut state = self.lock();
        let evicted = loop {
            if let Some(at) = state.idle.iter().rposition(|(other, _)| *other == owner) {
                let (_, session) = state.idle.remove(at);
                return Ok(Lease { pool: self, owner, session: Some(session) });
            }
            if state.open < self.max_open {
                state.open += 1;
                state.most = state.most.max(state.open);
                break None;
            }
            if !state.idle.is_empty() {
                break Some(state.idle.remove(0));
            }
            state = self.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        state.opened += 1;
        drop(state);
        // Closed first: the bound holds for memory too.
        drop(evicted);
        match open() {
            Ok(session) => Ok(Lease { pool: self, owner, session: Some(session) }),
            Err(error) => {
                self.lock().open -= 1;
                self.freed.notify_one();
                Err(error)
            }
        }
    }

    /// Closes the idle sessions of a model that is done.
    pub(super) fn close(&self, owner: u64) {
        let mut state = self.lock();
        let (own, others): (Vec<_>, Vec<_>) =
            std::mem::take(&mut state.idle).into_iter().partition(|(other, _)| *other == owner);
        state.idle = others;
        state.open -= own.len();
        drop(state);
        self.freed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A session in use; idle again when dropped.
#[derive(Debug)]
pub(super) struct Lease<'a> {
    pool: &'a SessionPool,
    owner: u64,
    session: Option<Session>,
}

impl Lease<'_> {
    pub(super) fn session(&mut self) -> &mut Session {
        self.session.as_mut().expect("only `drop` takes it")
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        // A session that failed once is still sound: ONNX Runtime keeps no state between runs.
        let Some(session) = self.session.take() else { return };
        self.pool.lock().idle.push((self.owner, session));
        // All: the one woken may be of a model that an idle session does not serve, yet can replace it.
        self.pool.freed.notify_all();
    }
}
