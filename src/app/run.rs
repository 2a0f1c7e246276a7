//! The use-case `run`, the main job: ingest, train, evaluate, export and report in one go.
//!
//! Evaluation needs images and export needs ONNX Runtime; what the settings leave out is left out.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::config::EvalConfig;
use super::eval::{Baselines, Calibration, EvalOptions, EvalResult, evaluate_target};
use super::export::{ExportResult, export_run, missing_form};
use super::report::{ReportResult, write_report};
use super::train::{TrainOptions, TrainResult, train};
use super::{BatchNorm, Context, RunConfig, RunFolder, settings};
use crate::data::{EpisodeSampler, EpisodeShape, ImageFolder};
use crate::error::{Result, ResultExt};

/// All results of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RunResult {
    /// Training.
    pub train: TrainResult,
    /// One evaluation a shot.
    pub evaluations: Vec<EvalResult>,
    /// The meta-model's files.
    pub exports: Vec<ExportResult>,
    /// The page.
    pub report: ReportResult,
    /// Picture of recovered images.
    pub images: PathBuf,
}

/// Refuses evaluation images that cannot carry the episodes before hours are spent on training.
fn check_images(eval: &EvalConfig, config: &RunConfig) -> Result<()> {
    let folder = ImageFolder::open(&eval.data, eval.split.as_deref())?;
    let (set, _) = folder.load(config.image_size)?;
    for &shot in &eval.shots {
        let shape = EpisodeShape { way: eval.way, shot, query: eval.query };
        EpisodeSampler::new(&set, shape, config.seed, "")
            .context(|| format!("evaluation images `{}`", eval.data.display()))?;
    }
    Ok(())
}

/// Runs the main job; everything lands in the run folder.
///
/// # Errors
/// Those of the steps. A folder of evaluation images that cannot be read is refused before anything
/// is computed.
pub fn run(context: &Context, options: &TrainOptions) -> Result<RunResult> {
    if let Some(eval) = &options.config.eval {
        check_images(eval, &options.config)?;
    }
    let trained = train(context, options)?;
    let run = RunFolder::open(&trained.run)?;
    let config = run.config()?;
    let mut evaluations = Vec::new();
    if let Some(eval) = &config.eval {
        for &shot in &eval.shots {
            let shape = EpisodeShape { way: eval.way, shot, query: eval.query };
            let options = EvalOptions {
                data: eval.data.clone(),
                split: eval.split.clone(),
                shape,
                episodes: eval.episodes,
                batch_norm: BatchNorm::Inductive,
                baselines: Baselines::Simple,
                real_data: None,
                calibration: Calibration::Skip,
                against: None,
            };
            evaluations.push(evaluate_target(run.path(), &options, context)?);
        }
    }
    let mut exports = Vec::new();
    let learner = settings::learner(&config);
    for &form in &config.export {
        if let Some(why) = missing_form(learner, form) {
            context.progress.note(&format!("{}.onnx left out: {why}", form.name()));
            continue;
        }
        let file = run.path().join(format!("{}.onnx", form.name()));
        exports.push(export_run(&run, form, &file, &options.runtime)?);
    }
    let report = write_report(&run)?;
    let images = run.bank().join("sheet.png");
    Ok(RunResult { train: trained, evaluations, exports, report, images })
}
