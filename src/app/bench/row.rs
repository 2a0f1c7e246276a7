//! `results.jsonl`: one flat object for each cell, domain, shot and whoever answered.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::cells::{Cell, Kind, Part, Wanted};
use super::record::CellRecord;
use crate::app::BatchNorm;
use crate::report::mean_with_ci;

/// One line of `results.jsonl`. What is not known is null.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Row {
    /// The scenario's name.
    pub scenario: String,
    /// The method's, ablation's or sweep point's name.
    pub variant: String,
    /// Which of these it is.
    pub kind: Kind,
    /// The method of the suite that it is or belongs to.
    pub method: String,
    /// `method` of its settings.
    pub algorithm: String,
    /// The sweep's name.
    pub sweep: Option<String>,
    /// The swept setting.
    pub setting: Option<String>,
    /// Its value.
    pub value: Option<String>,
    /// Who answered instead of the run's model: a baseline, `real-data` or `icfil`.
    pub answered_by: Option<String>,
    /// The run's seed.
    pub seed: u64,
    /// The domain of the images.
    pub domain: String,
    /// Whether they are for reporting or for choosing.
    pub part: Part,
    /// The images.
    pub data: PathBuf,
    /// Their split.
    pub split: Option<String>,
    /// Classes in an episode.
    pub way: usize,
    /// Support images a class.
    pub shot: usize,
    /// Query images a class.
    pub query: usize,
    /// Number of episodes.
    pub episodes: u64,
    /// Seed of the episodes.
    pub episode_seed: u64,
    /// Normalisation at test time.
    pub bn: BatchNorm,
    /// Mean accuracy over the episodes, in 0..1.
    pub accuracy: Option<f64>,
    /// Half width of its 95 % interval over the episodes.
    pub ci95: Option<f64>,
    /// Wall time of training, over all attempts.
    pub seconds: Option<f64>,
    /// Processor time of training, over all threads and attempts.
    pub busy_seconds: Option<f64>,
    /// Wall time of recovery.
    pub recover_seconds: Option<f64>,
    /// Wall time of meta-training.
    pub meta_seconds: Option<f64>,
    /// Wall time of this evaluation, baselines included.
    pub eval_seconds: Option<f64>,
    /// Attempts to train it; more than one when it was interrupted.
    pub attempts: u64,
    /// Meta-training steps.
    pub steps: Option<u64>,
    /// How training ended.
    pub stop_reason: Option<String>,
    /// Models that gave images.
    pub models_used: Option<usize>,
    /// Models that could not be used.
    pub models_rejected: Option<usize>,
    /// Images recovered.
    pub images: Option<usize>,
    /// Queries spent.
    pub queries: Option<u64>,
    /// SHA-256 of the settings without the seed, 16 digits.
    pub settings_hash: String,
    /// The program's version.
    pub version: String,
    /// The day of the last attempt, UTC.
    pub date: String,
    /// What is to be known of who answered.
    pub note: Option<String>,
    /// Why there is no accuracy.
    pub error: Option<String>,
}

/// The rows of a cell: whatever was evaluated, and, when its last attempt failed, one with the error for each evaluation
/// that is missing.
pub(super) fn rows(cell: &Cell, record: &CellRecord) -> Vec<Row> {
    let mut rows = Vec::new();
    for wanted in &cell.wanted {
        let row = row(cell, record, wanted);
        match record.evaluation(wanted) {
            Some(made) => rows.extend(made.answers.iter().map(|answers| {
                let accuracies = made.accuracies(answers.name.as_deref()).unwrap_or_default();
                let estimate = mean_with_ci(&accuracies);
                Row {
                    answered_by: answers.name.clone(),
                    accuracy: Some(estimate.accuracy),
                    ci95: Some(estimate.ci95),
                    eval_seconds: Some(made.seconds),
                    note: answers.note.clone(),
                    ..row.clone()
                }
            })),
            None if record.error.is_some() => {
                rows.push(Row { error: record.error.clone(), note: record.hint.clone(), ..row });
            }
            None => {}
        }
    }
    rows
}

fn row(cell: &Cell, record: &CellRecord, wanted: &Wanted) -> Row {
    let trained = record.trained.as_ref();
    let point = cell.variant.point.as_ref();
    Row {
        scenario: cell.scenario.clone(),
        variant: cell.variant.name.clone(),
        kind: cell.variant.kind,
        method: cell.variant.method.clone(),
        algorithm: cell.config.method.name().into(),
        sweep: point.map(|point| point.sweep.clone()),
        setting: point.map(|point| point.setting.clone()),
        value: point.map(|point| point.value.clone()),
        answered_by: None,
        seed: cell.seed,
        domain: wanted.domain.clone(),
        part: wanted.part,
        data: wanted.data.clone(),
        split: wanted.split.clone(),
        way: wanted.way,
        shot: wanted.shot,
        query: wanted.query,
        episodes: wanted.episodes,
        episode_seed: wanted.episode_seed,
        bn: wanted.bn,
        accuracy: None,
        ci95: None,
        seconds: (record.attempts > 0).then_some(record.seconds),
        busy_seconds: record.busy_seconds.filter(|_| record.attempts > 0),
        recover_seconds: trained.map(|trained| trained.recover_seconds),
        meta_seconds: trained.map(|trained| trained.meta_seconds),
        eval_seconds: None,
        attempts: record.attempts,
        steps: trained.map(|trained| trained.steps),
        stop_reason: trained.map(|trained| trained.stop_reason.clone()),
        models_used: trained.map(|trained| trained.models_used),
        models_rejected: trained.map(|trained| trained.models_rejected),
        images: trained.map(|trained| trained.images),
        queries: trained.map(|trained| trained.queries),
        settings_hash: cell.settings_hash.clone(),
        version: record.version.clone(),
        date: record.date.clone(),
        note: None,
        error: None,
    }
}
