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
    /// One request as JSON, answered without limits; without it, jobs are read from stdin, a line each
    request: Option<String>,
}

/// Answers on stdout.
pub(crate) fn run(args: &ProbeModelArgs, printer: &Printer) -> Result<Outcome> {
    match &args.request {
        Some(request) => printer.data(&child::answer(request)?)?,
        None => child::serve(std::io::stdin().lock(), |line| printer.data(line))?,
    }
    Ok(Outcome::Done)
}
