//! `metazoa export RUN --out META.onnx`: the meta-model to ONNX.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::app::config::ExportForm;
use crate::app::{RunFolder, export};
use crate::cli::Outcome;
use crate::cli::printer::Printer;
use crate::cli::settings::Settings;
use crate::error::Result;

/// Arguments of `export`.
#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// The run folder
    run: PathBuf,
    /// The file to write
    #[arg(long, value_name = "META.onnx")]
    out: PathBuf,
    /// Images to vectors, or support and query images to logits in one graph
    #[arg(long, value_enum, default_value_t = Form::Embedding)]
    form: Form,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Form {
    Embedding,
    Episode,
}

/// Writes the file, checked against ONNX Runtime, and prints its path.
pub(crate) fn run(args: &ExportArgs, settings: &Settings, printer: &Printer) -> Result<Outcome> {
    let form = match args.form {
        Form::Embedding => ExportForm::Embedding,
        Form::Episode => ExportForm::Episode,
    };
    let run = RunFolder::open(&args.run)?;
    let result = export::export_run(&run, form, &args.out, &settings.runtime_options())?;
    printer.result(&result, |result| {
        format!(
            "{} ({} bytes, opset {}, within {:.1e} of ONNX Runtime)",
            result.path.display(),
            result.bytes,
            result.opset,
            result.max_abs_diff_ort
        )
    })?;
    Ok(Outcome::Done)
}
