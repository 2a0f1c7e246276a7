//! `metazoa doctor`: what this machine has.

use clap::Args;

use crate::app::doctor::{DoctorOptions, Finding, Health, diagnose};
use crate::cli::Outcome;
use crate::cli::printer::Printer;
use crate::cli::settings::Settings;
use crate::error::Result;

/// Arguments of `doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {}

/// Prints what was found and how to get what is missing.
pub(crate) fn run(_args: &DoctorArgs, settings: &Settings, printer: &Printer) -> Result<Outcome> {
    let protoc = std::env::var_os("PROTOC").filter(|path| !path.is_empty());
    let diagnosis = diagnose(&DoctorOptions {
        runtime: settings.runtime_options(),
        protoc: protoc.map_or_else(|| "protoc".into(), Into::into),
    });
    printer.result(&diagnosis, |diagnosis| {
        let lines: Vec<String> = diagnosis.findings.iter().map(line).collect();
        let end = if diagnosis.ready { "ready" } else { "not ready" };
        format!("{}\n{end}", lines.join("\n"))
    })?;
    Ok(Outcome::Done)
}

fn line(finding: &Finding) -> String {
    let mark = match finding.health {
        Health::Ok => "ok     ",
        Health::Note => "note   ",
        Health::Missing => "MISSING",
    };
    let hint =
        finding.hint.as_ref().map_or_else(String::new, |hint| format!("\n          hint: {hint}"));
    format!("{mark} {}: {}{hint}", finding.name, finding.found)
}
