//! The use-cases: one function a verb, without clap, printing or the environment.
//!
//! A use-case takes plain options and a [`Context`] (progress, interrupt flag, seed, device) and
//! returns a result object that `cli` prints as a table or as JSON. Whoever embeds the library
//! calls these functions.

pub mod adapt;
pub mod baselines;
pub mod bench;
pub mod config;
pub mod context;
pub mod doctor;
pub mod embedder;
pub mod eval;
pub mod export;
pub mod files;
pub mod icfil;
pub mod ingest;
pub mod ingest_output;
pub mod ingest_probe;
pub mod ingest_remote;
pub mod inspect;
pub mod invert;
pub mod mean;
pub mod progress;
pub mod queries;
pub mod report;
pub mod run;
pub mod run_folder;
pub mod schemas;
pub mod settings;
pub mod setup;
pub mod teachers;
pub mod train;

pub use config::RunConfig;
pub use context::Context;
pub use embedder::{BatchNorm, Embedder};
pub use progress::{Progress, Silent, Stage};
pub use run_folder::{RunFolder, RunRecord};
