//! The command line: clap types, settings, output. Only this layer prints, reads the environment
//! and exits.
//!
//! A verb is one file in `verbs`: it turns arguments into a use-case's options, calls the use-case
//! in [`crate::app`], and prints what comes back. stdout is data, stderr is talk.

mod args;
mod overrides;
mod printer;
mod progress;
mod settings;
mod startup;
mod verbs;

use std::process::ExitCode;

use clap::Parser;

use args::Cli;
use printer::Printer;
use settings::Settings;

use crate::error::Result;

/// How a verb that did not fail ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// All done.
    Done,
    /// Done but for parts that were refused or failed, each of which was told.
    Partly,
}

impl Outcome {
    fn exit_code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Partly => 1,
        }
    }
}

/// Runs the command on the process's arguments.
pub fn main() -> ExitCode {
    startup::prepare_process();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // A closed stdout (`metazoa --help | head -0`) is no failure.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let settings = Settings::resolve(cli.global);
    let printer = Printer::new(&settings);
    match run(&cli.command, &settings, &printer) {
        Ok(outcome) => ExitCode::from(outcome.exit_code()),
        Err(error) => {
            printer.error(&error);
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(command: &args::Command, settings: &Settings, printer: &Printer) -> Result<Outcome> {
    if let args::Command::ProbeModel(args) = command {
        // It forks, so it has no threads.
        return verbs::probe_model::run(args, printer);
    }
    startup::start_threads(settings)?;
    startup::start_logging(settings, printer);
    match command {
        args::Command::Run(args) => verbs::run::run(args, settings, printer),
        args::Command::Ingest(args) => verbs::ingest::run(args, settings, printer),
        args::Command::Inspect(args) => verbs::inspect::run(args, settings, printer),
        args::Command::Invert(args) => verbs::invert::run(args, settings, printer),
        args::Command::Train(args) => verbs::train::run(args, settings, printer),
        args::Command::Eval(args) => verbs::eval::run(args, settings, printer),
        args::Command::Bench(args) => verbs::bench::run(args, settings, printer),
        args::Command::Adapt(args) => verbs::adapt::run(args, settings, printer),
        args::Command::Export(args) => verbs::export::run(args, settings, printer),
        args::Command::Report(args) => verbs::report::run(args, printer),
        args::Command::Setup(args) => verbs::setup::run(args, settings, printer),
        args::Command::Doctor(args) => verbs::doctor::run(args, settings, printer),
        args::Command::Schema(args) => verbs::schema::run(args, printer),
        args::Command::Completions(args) => verbs::completions::run(args, printer),
        args::Command::ProbeModel(args) => verbs::probe_model::run(args, printer),
    }
}
