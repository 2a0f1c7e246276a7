//! One binary for all integration tests (one link, shared helpers).
#![allow(clippy::unwrap_used, unused_crate_dependencies)]
#![allow(clippy::print_stderr, unreachable_pub)]

mod black;
mod cli;
mod data;
mod pictures;
mod probe;
mod meta;
mod support;
mod tape;
mod tidy;
