//! `metazoa probe-model` (hidden): the child that `ingest` and `inspect` start for first contact with a
//! file; see [`crate::access::probe`].

use clap::Args;

use crate::access::probe::child;
use crate::cli::Outcome;
use crate::cli::printer::Printer;
use crate::error::Result;

/// Arguments of `probe-model`.
#[derive(Debug, Args)]
pub(crate) struct ProbeModelArgs {
    /// The request as JSON
    request: String,
}

/// Answers the request on stdout.
pub(crate) fn run(args: &ProbeModelArgs, printer: &Printer) -> Result<Outcome> {
    printer.data(&child::answer(&args.request)?)?;
    Ok(Outcome::Done)
}
