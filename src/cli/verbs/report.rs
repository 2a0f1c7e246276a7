//! `metazoa report RUN`: the run as one HTML page.

use std::path::PathBuf;

use clap::Args;

use crate::app::{RunFolder, report};
use crate::cli::Outcome;
use crate::cli::printer::Printer;
use crate::error::Result;

/// Arguments of `report`.
#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    /// The run folder
    run: PathBuf,
}

/// Writes the page and prints its path.
pub(crate) fn run(args: &ReportArgs, printer: &Printer) -> Result<Outcome> {
    let result = report::write_report(&RunFolder::open(&args.run)?)?;
    printer.result(&result, |result| result.path.display().to_string())?;
    Ok(Outcome::Done)
}
