//! `metazoa train [ZOO]`: recover images from a zoo and meta-train on them.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::app::RunConfig;
use crate::app::config::Method;
use crate::app::train::{Start, TrainResult, train};
use crate::cli::printer::Printer;
use crate::cli::settings::Settings;
use crate::cli::{Outcome, overrides, startup};
use crate::error::{Error, Result};

/// Arguments of `train`.
#[derive(Debug, Args)]
pub(crate) struct TrainArgs {
    /// The folder of models [default: the settings' `zoo`]
    zoo: Option<PathBuf>,
    /// The method
    #[arg(long, value_enum)]
    method: Option<MethodName>,
    /// The settings of the method's published program, defects included: for comparisons. Over those of --config, under
    /// METAZOA_* variables and -s
    #[arg(long)]
    faithful: bool,
    /// Settings (YAML); flags and METAZOA_* variables override them
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The run folder to make
    #[arg(long, value_name = "RUN")]
    out: PathBuf,
    /// Go on with an unfinished run, with its own settings
    #[arg(long)]
    resume: bool,
    /// Queries that may be spent in the whole run, shared among the models that can only be asked
    #[arg(long, value_name = "N")]
    budget: Option<u64>,
    /// ONNX Runtime sessions open at once [default: two for every worker]
    #[arg(long, value_name = "N")]
    max_open: Option<std::num::NonZeroUsize>,
    /// Set one setting, as `meta.steps=100`
    #[arg(short = 's', long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum MethodName {
    Inversion,
    Purer,
    Free,
    BidfMkd,
}

impl From<MethodName> for Method {
    fn from(name: MethodName) -> Self {
        match name {
            MethodName::Inversion => Self::Inversion,
            MethodName::Purer => Self::Purer,
            MethodName::Free => Self::Free,
            MethodName::BidfMkd => Self::BidfMkd,
        }
    }
}

/// Trains and prints what came of it.
pub(crate) fn run(args: &TrainArgs, settings: &Settings, printer: &Printer) -> Result<Outcome> {
    let mut config = match &args.config {
        Some(path) => RunConfig::read(path)?,
        None => RunConfig::default(),
    };
    if let Some(method) = args.method {
        config.method = method.into();
    }
    if args.faithful {
        let preset = config.method.faithful().ok_or_else(|| {
            let method = config.method.name();
            Error::usage(format!("method has no published program to be faithful to: `{method}`"))
                .hint("use `--method purer`, `free` or `bidf-mkd`, or leave `--faithful` out")
        })?;
        config = config.with_overrides(&preset)?;
    }
    let mut config = overrides::resolved(&config, &args.set, settings)?;
    overrides::queries(&mut config, args.budget, args.max_open);
    if let Some(method) = args.method {
        config.method = method.into();
    }
    if let Some(zoo) = &args.zoo {
        config.zoo.clone_from(zoo);
    }
    let context = startup::asking_context(settings, printer)?;
    let start = if args.resume { Start::Resume } else { Start::New };
    let options = startup::train_options(&context, config, &args.out, start);
    let result = train(&context, &options)?;
    printer.result(&result, table)?;
    Ok(Outcome::Done)
}

pub(crate) fn table(result: &TrainResult) -> String {
    let parts = result.seconds.parts;
    let each = |seconds: f64| 1e3 * seconds / parts.updates.max(1) as f64;
    let mut text = format!(
        "run {}: {}, {} steps on {} images of {} models ({} rejected), {} queries; \
         recovery {:.0} s, meta-training {:.0} s, total {:.0} s\n",
        result.run.display(),
        result.stop_reason,
        result.steps,
        result.images,
        result.models_used,
        result.models_rejected,
        result.queries,
        result.seconds.recover,
        result.seconds.meta,
        result.seconds.total
    );
    if result.seconds.pretrain > 0.0 {
        text += &format!("of these, distillation before it {:.0} s\n", result.seconds.pretrain);
    }
    if let Some(best) = result.pseudo_validation {
        text += &format!(
            "pseudo-validation {:.1} % after step {}, whose weights are kept\n",
            100.0 * best.accuracy,
            best.step
        );
    }
    if parts.updates > 0 {
        text += &format!(
            "a meta-update: inner loop {:.1} ms, outer step {:.1} ms, inversion {:.1} ms, hardening {:.1} ms, \
             pseudo-validation {:.1} ms\n",
            each(parts.inner),
            each(parts.outer),
            each(parts.inversion),
            each(parts.hardening),
            each(parts.validation)
        );
    }
    text
}
