//! `metazoa inspect MODEL.onnx`: everything known of one model.

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;

use crate::app::inspect::{GradientChecking, InspectOptions, InspectResult, inspect};
use crate::cli::printer::Printer;
use crate::cli::settings::Settings;
use crate::cli::{Outcome, startup};
use crate::error::Result;

/// Arguments of `inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// The model
    #[arg(value_name = "MODEL.onnx")]
    model: PathBuf,
    /// Compare the output with ONNX Runtime and the gradient with central differences
    #[arg(long)]
    check_gradient: bool,
}

/// Inspects and prints.
pub(crate) fn run(args: &InspectArgs, settings: &Settings, printer: &Printer) -> Result<Outcome> {
    let gradient =
        if args.check_gradient { GradientChecking::Check } else { GradientChecking::Skip };
    let context = startup::context(settings, printer)?;
    let options = InspectOptions {
        model: args.model.clone(),
        gradient,
        runtime: settings.runtime_options(),
        probe: startup::probe_options(&context),
    };
    let result = inspect(&context, &options)?;
    printer.result(&result, table)?;
    Ok(Outcome::Done)
}

fn table(result: &InspectResult) -> String {
    let spec = &result.model.spec;
    let mut text = String::new();
    let mut row = |name: &str, value: String| {
        // Writing to a `String` cannot fail.
        let _ = writeln!(text, "{name:<18} {value}");
    };
    let source = |key: &str| match result.model.provenance.get(key) {
        Some(provenance) => format!(" ({provenance:?})").to_lowercase(),
        None => String::new(),
    };
    let word = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
    row("path", result.path.display().to_string());
    row("access", word(&result.access));
    row("classes", format!("{}{}", spec.classes, source("classes")));
    let pre = &spec.preprocess;
    row(
        "input",
        format!("{} {:?}{}", spec.input_name, pre.input_size, source("preprocess.input_size")),
    );
    row("layout, type", format!("{} {}", word(&pre.layout), word(&pre.dtype)));
    row("range, mean, std", format!("{:?} {:?} {:?}", pre.value_range, pre.mean, pre.std));
    row("color", format!("{}{}", word(&pre.color), source("preprocess.color")));
    row("batch", word(&spec.batch));
    row("scores", format!("{} as {}", spec.logits_output, word(&spec.output_kind)));
    row("statistics", format!("{} normalisation nodes", result.norm_taps));
    let ops: Vec<String> = result.ops.iter().map(|(op, n)| format!("{op} {n}")).collect();
    row("operators", ops.join(", "));
    if !result.unsupported_ops.is_empty() {
        row("not supported", result.unsupported_ops.join(", "));
    }
    let figure = |value: Option<f64>| value.map(|v| format!("{v:.2e}"));
    for (name, value) in [
        ("output error", figure(result.output_rel_err)),
        ("output noise", figure(result.output_noise)),
        ("gradient error", figure(result.gradient_rel_err)),
        ("gradient noise", figure(result.gradient_noise)),
        ("compile", result.compile_ms.map(|v| format!("{v:.1} ms"))),
        ("ONNX Runtime opens", result.runtime_open_ms.map(|v| format!("{v:.1} ms"))),
        ("memory", result.peak_mib.map(|v| format!("{v:.1} MiB"))),
    ] {
        if let Some(value) = value {
            row(name, value);
        }
    }
    for note in &result.model.notes {
        row("note", note.clone());
    }
    text
}
