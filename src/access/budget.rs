//! The query counter of a black-box or remote teacher, with a hard limit.
//!
//! One query is one image answered. A request that does not fit in what is left is refused whole and
//! costs nothing, so a budget is never overdrawn and never half-spent by a request that could not be
//! served, whatever the number of threads.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

/// Counts queries and refuses those beyond the limit.
#[derive(Debug, Default)]
pub struct QueryBudget {
    limit: Option<u64>,
    spent: AtomicU64,
}

impl QueryBudget {
    /// A counter that stops at `limit` queries, or never.
    pub fn new(limit: Option<u64>) -> Self {
        Self { limit, spent: AtomicU64::new(0) }
    }

    /// A counter that has already spent `spent` queries (a resumed run).
    pub fn resumed(limit: Option<u64>, spent: u64) -> Self {
        Self { limit, spent: AtomicU64::new(spent) }
    }

    /// Takes `queries` from the budget.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Budget`] when fewer are left; then none is taken.
    pub fn spend(&self, queries: u64) -> Result<()> {
        let limit = self.limit.unwrap_or(u64::MAX);
        self.spent
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |spent| {
                spent.checked_add(queries).filter(|&total| total <= limit)
            })
            .map(|_| ())
            .map_err(|spent| {
                Error::budget(format!(
                    "{queries} queries asked, {} of {limit} left",
                    limit.saturating_sub(spent)
                ))
                .hint("raise `query_budget` in the model's sidecar, or ask for fewer images or directions")
            })
    }

    /// Queries spent so far.
    pub fn spent(&self) -> u64 {
        self.spent.load(Ordering::Relaxed)
    }

    /// Queries left; `None` without a limit.
    pub fn remaining(&self) -> Option<u64> {
        self.limit.map(|limit| limit.saturating_sub(self.spent()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn a_request_that_does_not_fit_is_refused_whole_and_costs_nothing() {
        let budget = QueryBudget::new(Some(10));
        budget.spend(7).unwrap();
        let error = budget.spend(4).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Budget);
        assert!(error.to_string().contains("3 of 10 left"), "{error}");
        assert_eq!((budget.spent(), budget.remaining()), (7, Some(3)));
        budget.spend(3).unwrap();
        budget.spend(0).unwrap();
        assert!(budget.spend(1).is_err());
    }

    #[test]
    fn many_threads_never_overdraw_it() {
        let budget = QueryBudget::new(Some(1000));
        let granted = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for step in 0..500 {
                        let ask = 1 + step % 3;
                        if budget.spend(ask).is_ok() {
                            granted.fetch_add(ask, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!(granted.load(Ordering::Relaxed), budget.spent());
        assert_eq!(budget.spent(), 1000);
    }

    #[test]
    fn without_a_limit_it_only_counts() {
        let budget = QueryBudget::resumed(None, 5);
        budget.spend(1 << 40).unwrap();
        assert_eq!((budget.spent(), budget.remaining()), (5 + (1 << 40), None));
        assert!(budget.spend(u64::MAX).is_err(), "the counter itself must not wrap");
    }
}
