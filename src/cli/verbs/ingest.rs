//! `metazoa ingest [ZOO]`: check every model, write `ZOO/catalog.json`.

use std::path::PathBuf;

use clap::Args;

use crate::app::ingest::{CatalogWriting, IngestOptions, Strictness, ingest};
use crate::app::ingest_output::{output, table};
use crate::cli::printer::Printer;
use crate::cli::settings::Settings;
use crate::cli::{Outcome, startup};
use crate::error::Result;
use crate::zoo::read::Reach;

/// Arguments of `ingest`.
#[derive(Debug, Args)]
pub(crate) struct IngestArgs {
    /// The folder of models
    #[arg(default_value = "zoo")]
    zoo: PathBuf,
    /// Exit with 1 when any file is rejected
    #[arg(long)]
    strict: bool,
}

/// Ingests and prints a row a model; then refuses a zoo without any usable one.
pub(crate) fn run(args: &IngestArgs, settings: &Settings, printer: &Printer) -> Result<Outcome> {
    let context = startup::context(settings, printer)?;
    let options = IngestOptions {
        reach: Reach::AsFound,
        zoo: args.zoo.clone(),
        catalog: CatalogWriting::Write,
        probe: startup::probe_options(&context),
    };
    let found = ingest(&context, &options)?;
    printer.result(&output(&found), |_| table(&found))?;
    found.verdict(if args.strict { Strictness::Strict } else { Strictness::Lenient })?;
    Ok(Outcome::Done)
}
