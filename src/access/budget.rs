//! The query counter of a black-box or remote teacher, with a hard limit.
//!
//! One query is one image sent to the model. A whole request is reserved first: one that does not fit in what
//! is left is refused and costs nothing. Each part of it is then taken from the reservation *before* it is
//! sent, and the count is on disk by then where a run keeps one ([`QueryBudget::kept`]): a process killed at
//! any moment has never sent a query that is not counted. Parts never sent go back when the reservation ends.
//! Invariant: spent and reserved together never exceed the limit, whatever the number of threads.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};

/// Digits of a count on disk: any `u64`. Always the same length, so that one write replaces it whole.
const DIGITS: usize = 20;

/// Counts queries and refuses those beyond the limit.
#[derive(Debug, Default)]
pub struct QueryBudget {
    limit: Option<u64>,
    state: Mutex<State>,
    /// What several counters may spend together.
    pool: Option<Arc<QueryBudget>>,
}

#[derive(Debug, Default)]
struct State {
    spent: u64,
    reserved: u64,
    file: Option<CountFile>,
}

/// The count on disk.
#[derive(Debug)]
struct CountFile {
    path: PathBuf,
    file: File,
}

impl QueryBudget {
    /// A counter that stops at `limit` queries, or never.
    pub fn new(limit: Option<u64>) -> Self {
        Self::resumed(limit, 0)
    }

    /// A counter that has already spent `spent` queries.
    pub fn resumed(limit: Option<u64>, spent: u64) -> Self {
        Self { limit, state: Mutex::new(State { spent, ..State::default() }), pool: None }
    }

    /// A counter kept in the file at `path`, which goes on from the count it finds there. The count outlives
    /// the process however it ends; it is not synchronised to the disk, so it may not outlive the machine.
    ///
    /// # Errors
    /// When the file cannot be read or written, or holds no count.
    pub fn kept(limit: Option<u64>, path: &Path) -> Result<Self> {
        let failed = |error: std::io::Error| Error::io(path, &error).context("query count");
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        let spent = read_count(path)?;
        let mut options = OpenOptions::new();
        let file = options.create(true).truncate(false).write(true).open(path).map_err(failed)?;
        let mut count = CountFile { path: path.to_path_buf(), file };
        count.write(spent)?;
        let state = Mutex::new(State { spent, reserved: 0, file: Some(count) });
        Ok(Self { limit, state, pool: None })
    }

    /// The same counter, which from now on takes each query from `pool` too, or not at all.
    #[must_use]
    pub fn within(self, pool: Arc<Self>) -> Self {
        Self { pool: Some(pool), ..self }
    }

    /// Sets `queries` aside for a request that is about to be sent in parts.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Budget`] when fewer are left; then none is set aside.
    pub fn reserve(&self, queries: u64) -> Result<Reservation<'_>> {
        let mut state = self.lock();
        self.check(&state, queries)?;
        let pooled = match &self.pool {
            Some(pool) => Some(Box::new(pool.reserve(queries)?)),
            None => None,
        };
        state.reserved += queries;
        Ok(Reservation { budget: self, left: Mutex::new(queries), pooled })
    }

    /// Takes `queries` at once.
    ///
    /// # Errors
    /// As [`QueryBudget::reserve`]; when the count cannot be written.
    pub fn spend(&self, queries: u64) -> Result<()> {
        self.reserve(queries)?.take(queries)
    }

    /// Queries spent so far.
    pub fn spent(&self) -> u64 {
        self.lock().spent
    }

    /// Queries neither spent nor set aside, the pool aside; `None` without a limit.
    pub fn remaining(&self) -> Option<u64> {
        let state = self.lock();
        self.limit.map(|limit| limit.saturating_sub(state.spent).saturating_sub(state.reserved))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, state: &State, queries: u64) -> Result<()> {
        let limit = self.limit.unwrap_or(u64::MAX);
        let taken = state.spent.saturating_add(state.reserved);
        if taken.checked_add(queries).is_some_and(|total| total <= limit) {
            return Ok(());
        }
        Err(Error::budget(format!(
            "{queries} queries asked, {} of {limit} left",
            limit.saturating_sub(taken)
        ))
        .hint("raise `query_budget` in the model's sidecar or `--budget`, or ask for fewer images or directions"))
    }
}

/// Queries set aside; what was not taken goes back when it is dropped.
#[derive(Debug)]
pub struct Reservation<'a> {
    budget: &'a QueryBudget,
    left: Mutex<u64>,
    /// The same in the pool.
    pooled: Option<Box<Reservation<'a>>>,
}

impl Reservation<'_> {
    /// Spends `queries` that are about to be sent. A request sent again (a retry) may need more than was set
    /// aside: the rest comes from the budget itself.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Budget`] when that has not enough left, then none is spent; when the count cannot
    /// be written.
    pub fn take(&self, queries: u64) -> Result<()> {
        let mut left = self.left();
        let mut state = self.budget.lock();
        let own = queries.min(*left);
        self.budget.check(&state, queries - own)?;
        if let Some(pooled) = &self.pooled {
            pooled.take(queries)?;
        }
        let spent = state.spent + queries;
        if let Some(file) = &mut state.file {
            file.write(spent)?;
        }
        state.spent = spent;
        state.reserved -= own;
        *left -= own;
        Ok(())
    }

    /// Takes back `queries` of [`Reservation::take`] that never left this machine.
    ///
    /// # Errors
    /// When the count cannot be written.
    pub fn give_back(&self, queries: u64) -> Result<()> {
        let mut left = self.left();
        let mut state = self.budget.lock();
        if let Some(pooled) = &self.pooled {
            pooled.give_back(queries)?;
        }
        let spent = state.spent.saturating_sub(queries);
        if let Some(file) = &mut state.file {
            file.write(spent)?;
        }
        state.spent = spent;
        state.reserved += queries;
        *left += queries;
        Ok(())
    }

    fn left(&self) -> MutexGuard<'_, u64> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let left = *self.left();
        self.budget.lock().reserved -= left;
    }
}

impl CountFile {
    /// One write of fixed length at the start: a process killed meanwhile leaves the old count or the new one.
    fn write(&mut self, count: u64) -> Result<()> {
        let text = format!("{count:0DIGITS$}\n");
        self.file
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.file.write_all(text.as_bytes()))
            .map_err(|error| Error::io(&self.path, &error).context("query count"))
    }
}

/// The count in the file at `path`; 0 where there is none.
///
/// # Errors
/// When the file cannot be read or holds no count.
pub fn read_count(path: &Path) -> Result<u64> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(64).read_to_string(&mut text));
    match read {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(Error::io(path, &error).context("query count")),
        Ok(_) => {}
    }
    text.trim().parse().map_err(|_| {
        Error::input(format!("not a query count `{}`", text.trim()))
            .context(format!("`{}`", path.display()))
            .hint("write the number of queries already spent into it, or start a new run")
    })
}

#[cfg(test)]
#[path = "budget_tests.rs"]
mod tests;
