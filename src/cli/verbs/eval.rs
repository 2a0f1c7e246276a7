//! `metazoa eval RUN|META.onnx --data DIR`: few-shot accuracy on real images.

use std::fmt::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::app::BatchNorm;
use crate::app::eval::{Baselines, Calibration, EvalOptions, EvalResult, evaluate_target};
use crate::cli::printer::Printer;
use crate::cli::settings::Settings;
use crate::cli::{Outcome, startup};
use crate::data::EpisodeShape;
use crate::error::Result;

/// Arguments of `eval`.
#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    /// A run folder, or an exported embedding
    #[arg(value_name = "RUN|META.onnx")]
    target: PathBuf,
    /// Images: a folder a class (DIR/CLASS/*.png, DIR/SPLIT/CLASS/*.png), a benchmark as it is unpacked (CUB, Omniglot, ...),
    /// or a list (CSV, JSON, text)
    #[arg(long, value_name = "DIR|LIST")]
    data: PathBuf,
    /// The split, where there are several: a folder or a list
    #[arg(long, value_name = "S")]
    split: Option<String>,
    /// Classes in an episode
    #[arg(long, value_name = "N", default_value_t = 5)]
    way: usize,
    /// Support images a class
    #[arg(long, value_name = "K", default_value_t = 1)]
    shot: usize,
    /// Query images a class
    #[arg(long, value_name = "Q", default_value_t = 15)]
    query: usize,
    /// Number of episodes
    #[arg(long, value_name = "E", default_value_t = 600)]
    episodes: u64,
    /// Batch normalisation at test time: statistics of training, or of the episode's own images
    #[arg(long, value_enum, default_value_t = Bn::Inductive)]
    bn: Bn,
    /// Also the untrained network, the mean and the best of the zoo's models, and pixel rules on the same episodes
    #[arg(long)]
    baselines: bool,
    /// Also the model calibrated to each episode by inverting it (ICFIL); settings `icfil` of the run
    #[arg(long)]
    icfil: bool,
    /// Also the run's learner trained on real images (its training split where it has one): the upper bound
    #[arg(long, value_name = "DIR")]
    real_data: Option<PathBuf>,
    /// Also another run's model on the same episodes, and the paired difference
    #[arg(long, value_name = "RUN")]
    against: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Bn {
    Inductive,
    Transductive,
}

/// Evaluates and prints accuracy and baselines.
pub(crate) fn run(args: &EvalArgs, settings: &Settings, printer: &Printer) -> Result<Outcome> {
    let context = startup::context(settings, printer)?;
    let options = EvalOptions {
        data: args.data.clone(),
        split: args.split.clone(),
        shape: EpisodeShape { way: args.way, shot: args.shot, query: args.query },
        episodes: args.episodes,
        batch_norm: match args.bn {
            Bn::Inductive => BatchNorm::Inductive,
            Bn::Transductive => BatchNorm::Transductive,
        },
        baselines: if args.baselines { Baselines::All } else { Baselines::Skip },
        real_data: args.real_data.clone(),
        calibration: if args.icfil { Calibration::Icfil } else { Calibration::Skip },
        against: args.against.clone(),
    };
    let result = evaluate_target(&args.target, &options, &context)?;
    printer.result(&result, table)?;
    Ok(Outcome::Done)
}

pub(crate) fn table(result: &EvalResult) -> String {
    let mut text = format!(
        "{}-way {}-shot, {} queries a class, {} episodes, {}, seed {}\n",
        result.way,
        result.shot,
        result.query,
        result.episodes,
        result.bn.name(),
        result.seed
    );
    let percent = |x: f64| 100.0 * x;
    let (accuracy, ci) = (percent(result.accuracy), percent(result.ci95));
    // Writing to a `String` cannot fail.
    let _ = writeln!(text, "{:<16} {accuracy:5.1} \u{b1} {ci:.1} %", "meta-model");
    if let Some(icfil) = &result.icfil {
        let _ = writeln!(
            text,
            "{:<16} {:5.1} \u{b1} {:.1} %   gain of calibration {:+.1} \u{b1} {:.1}, {:.2} s an episode",
            "with ICFIL",
            percent(icfil.accuracy),
            percent(icfil.ci95),
            percent(icfil.gain),
            percent(icfil.gain_ci95),
            icfil.seconds / result.episodes.max(1) as f64
        );
    }
    if let Some(other) = &result.against {
        let _ = writeln!(
            text,
            "{:<16} {:5.1} \u{b1} {:.1} %   gain over it {:+.1} \u{b1} {:.1}, `{}`",
            "other run",
            percent(other.accuracy),
            percent(other.ci95),
            percent(other.gain),
            percent(other.gain_ci95),
            other.run.display()
        );
    }
    for (name, b) in &result.baselines {
        let _ = writeln!(
            text,
            "{name:<16} {:5.1} \u{b1} {:.1} %   gain {:+.1} \u{b1} {:.1}",
            percent(b.accuracy),
            percent(b.ci95),
            percent(b.gain),
            percent(b.gain_ci95)
        );
        if let Some(note) = &b.note {
            let _ = writeln!(text, "{:<16} {note}", "");
        }
    }
    for (name, why) in &result.baselines_left_out {
        let _ = writeln!(text, "{name:<16} left out: {why}");
    }
    text
}
