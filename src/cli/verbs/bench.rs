//! `metazoa bench SUITE.yaml`: a grid of runs, and tables of what came of it.

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;

use crate::app::bench::{
    BenchOptions, BenchResult, CellState, Changed, Status, Suite, bench, plan,
};
use crate::cli::printer::Printer;
use crate::cli::settings::Settings;
use crate::cli::{Outcome, overrides, startup};
use crate::error::Result;

/// Arguments of `bench`.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// The suite (YAML): scenarios, methods, ablations, sweeps, shots, seeds
    #[arg(value_name = "SUITE.yaml")]
    suite: PathBuf,
    /// Where runs and results go; a call on the same folder goes on there [default: runs/NAME of the suite's file]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Only list the cells and how far each has come
    #[arg(long)]
    dry_run: bool,
    /// Only cells whose name has PATTERN in it, or fits it where it has a `*`; may be repeated
    #[arg(long, value_name = "PATTERN")]
    only: Vec<String>,
    /// Remove and make anew runs whose settings have changed since
    #[arg(long)]
    redo_changed: bool,
    /// Number of episodes [default: the suite's]
    #[arg(long, value_name = "E")]
    episodes: Option<u64>,
    /// Set one setting of every run, as `meta.steps=100`
    #[arg(short = 's', long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// Computes the grid and prints how it ended. Cells that failed make the exit code 1.
pub(crate) fn run(args: &BenchArgs, settings: &Settings, printer: &Printer) -> Result<Outcome> {
    let mut suite = Suite::read(&args.suite)?;
    suite.episodes = args.episodes.unwrap_or(suite.episodes);
    suite.episode_seed = settings.seed.unwrap_or(suite.episode_seed);
    let stem = args.suite.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let name = stem.unwrap_or_default();
    let context = startup::asking_context(settings, printer)?;
    let options = BenchOptions {
        suite,
        out: args.out.clone().unwrap_or_else(|| PathBuf::from("runs").join(&name)),
        name,
        overrides: overrides::all(&args.set)?,
        only: args.only.clone(),
        changed: if args.redo_changed { Changed::Redo } else { Changed::Refuse },
        command: std::env::args().collect(),
        runtime: context.runtime_options(),
        probe: startup::probe_options(&context),
    };
    let result = if args.dry_run { plan(&options)? } else { bench(&context, &options)? };
    printer.result(&result, |result| table(result, args.dry_run))?;
    Ok(if result.failed > 0 && !args.dry_run { Outcome::Partly } else { Outcome::Done })
}

/// All cells of a plan; of a grid those that were begun.
fn table(result: &BenchResult, plan: bool) -> String {
    let width = result.cells.iter().map(|cell| cell.id.len()).max().unwrap_or(0);
    let mut text = String::new();
    // Writing to a `String` cannot fail.
    let begun = |cell: &&CellState| plan || cell.status != Status::New;
    for cell in result.cells.iter().filter(begun) {
        let _ = writeln!(
            text,
            "{:<width$}  {:<10} {} of {} evaluations",
            cell.id,
            cell.status.name(),
            cell.evaluated,
            cell.evaluations
        );
        if let Some(error) = &cell.error {
            let _ = writeln!(text, "{:<width$}  {error}", "");
        }
    }
    let _ = writeln!(
        text,
        "{} cells, {} finished, {} failed",
        result.cells.len(),
        result.finished,
        result.failed
    );
    for path in result.results.iter().chain(&result.tables).chain(&result.figures) {
        let _ = writeln!(text, "{}", path.display());
    }
    text
}
