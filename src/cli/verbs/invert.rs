//! `metazoa invert MODEL.onnx`: images of a model's classes.

use std::path::PathBuf;

use clap::Args;

use crate::app::RunConfig;
use crate::app::invert::{InvertOptions, InvertResult, invert};
use crate::cli::printer::Printer;
use crate::cli::settings::Settings;
use crate::cli::{Outcome, overrides, startup};
use crate::error::Result;

/// Arguments of `invert`.
#[derive(Debug, Args)]
pub(crate) struct InvertArgs {
    /// The model; of a served one its sidecar (`NAME.yaml`)
    #[arg(value_name = "MODEL.onnx")]
    model: PathBuf,
    /// Images of each class
    #[arg(long, value_name = "N", default_value_t = 12)]
    per_class: usize,
    /// The folder to make: CLASS/NNN.png, sheet.png, loss.svg
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Set one setting of `recover`, as `recover.white_box.steps=300`
    #[arg(short = 's', long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// Inverts and prints what was written.
pub(crate) fn run(args: &InvertArgs, settings: &Settings, printer: &Printer) -> Result<Outcome> {
    let mut config = RunConfig::default();
    config.recover.images_per_class = args.per_class;
    let config = overrides::resolved(&config, &args.set, settings)?;
    let context = startup::asking_context(settings, printer)?;
    let options = InvertOptions {
        model: args.model.clone(),
        out: args.out.clone(),
        config,
        runtime: settings.runtime_options(),
        probe: startup::probe_options(&context),
    };
    let result = invert(&context, &options)?;
    printer.result(&result, table)?;
    Ok(Outcome::Done)
}

fn table(result: &InvertResult) -> String {
    let agreement = match result.agreement {
        Some(share) => format!("{:.0} %", 100.0 * share),
        None => "unknown".into(),
    };
    format!(
        "{}: {}, {} images, agreement {agreement}, loss {:.3}, {} queries, {:.0} s\n",
        result.path.display(),
        result.stop_reason,
        result.images,
        result.loss,
        result.queries,
        result.seconds
    )
}
