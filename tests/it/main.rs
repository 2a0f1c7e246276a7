//! One binary for all integration tests (one link, shared helpers).
#![allow(clippy::unwrap_used, unused_crate_dependencies)]
#![allow(clippy::print_stderr, unreachable_pub)]

mod access;
mod architectures;
mod black;
mod cli;
mod contrib;
mod data;
mod eval;
mod graph;
mod main_job;
mod meta;
mod nodes;
mod onnx;
mod pictures;
mod probe;
mod remote;
mod report;
mod runs;
mod schemas;
mod serve;
mod setup;
mod support;
mod tape;
mod tidy;
mod zoo;
