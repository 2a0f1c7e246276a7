//! `metazoa run [CONFIG.yaml]`: the main job.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::Args;

use super::{eval, train};
use crate::app::RunConfig;
use crate::app::run::{RunResult, run as run_all};
use crate::app::train::Start;
use crate::cli::printer::Printer;
use crate::cli::settings::Settings;
use crate::cli::{Outcome, overrides, startup};
use crate::error::Result;

/// Arguments of `run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Settings (YAML) [default: the quickstart on the bundled `zoo`]
    config: Option<PathBuf>,
    /// The run folder to make
    #[arg(long, value_name = "DIR", default_value = "runs/quickstart")]
    out: PathBuf,
    /// Go on with an unfinished run, with its own settings
    #[arg(long)]
    resume: bool,
    /// Queries that may be spent in the whole run, shared among the models that can only be asked
    #[arg(long, value_name = "N")]
    budget: Option<u64>,
    /// ONNX Runtime sessions open at once [default: two for every worker]
    #[arg(long, value_name = "N")]
    max_open: Option<std::num::NonZeroUsize>,
    /// Set one setting, as `meta.steps=100`
    #[arg(short = 's', long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// The main job on the bundled zoo and its images.
const QUICKSTART: &str = include_str!("../../../examples/quickstart.yaml");

/// Runs and prints training, accuracies and files.
pub(crate) fn run(args: &RunArgs, settings: &Settings, printer: &Printer) -> Result<Outcome> {
    let config = match &args.config {
        Some(path) => RunConfig::read(path)?,
        None => RunConfig::parse(QUICKSTART, Path::new("examples/quickstart.yaml"))?,
    };
    let mut config = overrides::resolved(&config, &args.set, settings)?;
    overrides::queries(&mut config, args.budget, args.max_open);
    let context = startup::asking_context(settings, printer)?;
    let start = if args.resume { Start::Resume } else { Start::New };
    let options = startup::train_options(&context, config, &args.out, start);
    let result = run_all(&context, &options)?;
    printer.result(&result, table)?;
    Ok(Outcome::Done)
}

fn table(result: &RunResult) -> String {
    let mut text = train::table(&result.train);
    for evaluation in &result.evaluations {
        text.push('\n');
        text.push_str(&eval::table(evaluation));
    }
    text.push('\n');
    for export in &result.exports {
        // Writing to a `String` cannot fail.
        let _ = writeln!(
            text,
            "{} ({} bytes, within {:.1e} of ONNX Runtime)",
            export.path.display(),
            export.bytes,
            export.max_abs_diff_ort
        );
    }
    let _ = writeln!(text, "{}", result.images.display());
    let _ = writeln!(text, "{}", result.report.path.display());
    text
}
