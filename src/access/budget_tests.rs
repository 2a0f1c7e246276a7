//! Exactness of the query counter: refusals, threads, retries, the count on disk.

use std::sync::atomic::{AtomicU64, Ordering};

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

#[test]
fn what_was_set_aside_and_not_sent_goes_back() {
    let budget = QueryBudget::new(Some(10));
    let reservation = budget.reserve(8).unwrap();
    assert!(budget.reserve(3).is_err(), "set aside is not free");
    reservation.take(5).unwrap();
    drop(reservation);
    assert_eq!((budget.spent(), budget.remaining()), (5, Some(5)));
}

#[test]
fn a_request_sent_again_is_paid_again_and_one_that_never_left_is_not() {
    let budget = QueryBudget::new(Some(10));
    let reservation = budget.reserve(4).unwrap();
    reservation.take(4).unwrap();
    reservation.take(4).unwrap();
    assert_eq!(budget.spent(), 8);
    assert_eq!(reservation.take(4).unwrap_err().kind(), ErrorKind::Budget);
    assert_eq!(budget.spent(), 8, "a refused retry costs nothing");
    reservation.give_back(4).unwrap();
    assert_eq!(budget.spent(), 4);
    reservation.take(4).unwrap();
    drop(reservation);
    assert_eq!((budget.spent(), budget.remaining()), (8, Some(2)));
}

#[test]
fn a_count_on_disk_is_there_before_the_query_and_goes_on_in_the_next_process() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("deep/model");
    assert_eq!(read_count(&path).unwrap(), 0);
    let budget = QueryBudget::kept(Some(100), &path).unwrap();
    let reservation = budget.reserve(60).unwrap();
    assert_eq!(read_count(&path).unwrap(), 0, "set aside is not spent");
    reservation.take(40).unwrap();
    assert_eq!(read_count(&path).unwrap(), 40);
    reservation.give_back(10).unwrap();
    // No destructor runs in a killed process.
    std::mem::forget(reservation);
    let next = QueryBudget::kept(Some(100), &path).unwrap();
    assert_eq!((next.spent(), next.remaining()), (30, Some(70)));
    next.spend(70).unwrap();
    assert_eq!(next.spend(1).unwrap_err().kind(), ErrorKind::Budget);
    std::fs::write(&path, "many\n").unwrap();
    let error = QueryBudget::kept(None, &path).unwrap_err();
    assert!(error.to_string().contains("not a query count `many`"), "{error}");
}

/// A pool is spent by all its counters together, and what was set aside goes back to both.
#[test]
fn a_pool_holds_for_all_its_counters() {
    let pool = Arc::new(QueryBudget::resumed(Some(100), 30));
    let counter = |limit| QueryBudget::new(limit).within(Arc::clone(&pool));
    let (a, b) = (counter(None), counter(Some(25)));
    let held = a.reserve(50).unwrap();
    held.take(20).unwrap();
    // 30 and 50 are gone or set aside: b could take 25, the pool covers 20.
    assert_eq!(b.spend(21).unwrap_err().kind(), ErrorKind::Budget);
    b.spend(20).unwrap();
    held.give_back(5).unwrap();
    // Sent again: beyond what was set aside nothing is left.
    held.take(35).unwrap();
    assert_eq!(held.take(1).unwrap_err().kind(), ErrorKind::Budget);
    drop(held);
    assert_eq!((a.spent(), b.spent(), pool.spent(), pool.remaining()), (50, 20, 100, Some(0)));
    let small = Arc::new(QueryBudget::new(Some(10)));
    let own = QueryBudget::new(None).within(Arc::clone(&small));
    drop(own.reserve(10).unwrap());
    assert_eq!((own.spent(), small.remaining()), (0, Some(10)));
}
