//! What can be typed. Nothing is done here; names, flags and help texts are public.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};

use super::verbs;
use crate::tensor::Device;

/// Turns a folder of pre-trained ONNX classifiers into one few-shot learner, without their
/// training data.
#[derive(Debug, Parser)]
#[command(name = "metazoa", version, about, max_term_width = 100, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Flags of every verb.
    #[command(flatten)]
    pub(crate) global: GlobalArgs,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// The main job: ingest, train, evaluate, export and report in one go
    Run(verbs::run::RunArgs),
    /// Check every model of a folder and write its catalog.json
    Ingest(verbs::ingest::IngestArgs),
    /// Everything known of one model
    Inspect(verbs::inspect::InspectArgs),
    /// Images of a model's classes, recovered from it
    Invert(verbs::invert::InvertArgs),
    /// Recover images from a zoo and meta-train on them
    Train(verbs::train::TrainArgs),
    /// Few-shot accuracy of a run or an exported meta-model on real images
    Eval(verbs::eval::EvalArgs),
    /// A grid of runs - scenarios, methods, ablations, seeds - evaluated, with tables and figures
    Bench(verbs::bench::BenchArgs),
    /// Turn a run and your own images, a folder a class, into a ready ONNX classifier
    Adapt(verbs::adapt::AdaptArgs),
    /// Write a run's meta-model as ONNX, checked against ONNX Runtime
    Export(verbs::export::ExportArgs),
    /// Write a run's self-contained report.html
    Report(verbs::report::ReportArgs),
    /// Fetch ONNX Runtime through your own pip index into metazoa's cache
    Setup(verbs::setup::SetupArgs),
    /// Show what was found on this machine and how to get what is missing
    Doctor(verbs::doctor::DoctorArgs),
    /// Print the JSON schemas of the files and results
    Schema(verbs::schema::SchemaArgs),
    /// Print shell completions
    Completions(verbs::completions::CompletionsArgs),
    /// First contact with a model file, called by `ingest` in a child process under limits
    #[command(hide = true)]
    ProbeModel(verbs::probe_model::ProbeModelArgs),
}

/// Flags that every verb takes.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct GlobalArgs {
    /// Print one JSON object on stdout instead of a table
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Seed of all randomness: same seed, same bytes [default: 0]
    #[arg(long, global = true, env = "METAZOA_SEED", hide_env = true)]
    pub(crate) seed: Option<u64>,
    /// Worker threads; never changes a result [default: all cores]
    #[arg(long, global = true, value_name = "N", env = "METAZOA_JOBS", hide_env = true)]
    pub(crate) jobs: Option<std::num::NonZeroUsize>,
    #[cfg_attr(
        not(feature = "cuda"),
        doc = "Where ONNX Runtime computes, cpu or cuda[:INDEX]; all else uses the cpu [default: cpu]"
    )]
    #[cfg_attr(
        feature = "cuda",
        doc = "Where teachers are computed: cpu or cuda[:INDEX][+tf32]; all else uses the cpu [default: cpu]"
    )]
    #[arg(long, global = true, env = "METAZOA_DEVICE", hide_env = true)]
    pub(crate) device: Option<Device>,
    /// The ONNX Runtime library to load (else ORT_DYLIB_PATH, the cache of `setup`, Python's)
    #[arg(long, global = true, value_name = "FILE", env = "ORT_DYLIB_PATH", hide_env = true)]
    pub(crate) ort_lib: Option<PathBuf>,
    /// Say nothing but errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
    /// Say more (-vv: everything)
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub(crate) verbose: u8,
    /// Draw no progress bars
    #[arg(long, global = true)]
    pub(crate) no_progress: bool,
}
