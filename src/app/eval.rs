//! Few-shot accuracy of a meta-model on real images, with baselines on the same episodes.
//!
//! The protocol of the field: N-way K-shot episodes, queries classified by the nearest class mean
//! of the embeddings (ProtoNet), mean accuracy over the episodes with its 95 % interval. Episodes
//! depend on the seed alone, so every model and baseline answers the same questions and gains have
//! paired intervals.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::baselines::Rivals;
use super::context::Context;
use super::embedder::{BatchNorm, Embedder, ModelEmbedder, OnnxEmbedder};
use super::icfil::Calibrated;
use super::run_folder::RunFolder;
use crate::data::{EpisodeSampler, EpisodeShape, ImageFolder};
use crate::error::{Error, Result, ResultExt};
use crate::report::{mean_with_ci, paired_difference};
use crate::zoo::Rejection;

mod contest;

use contest::Contest;

/// The calibrated model among those that answer.
pub(super) const ICFIL: &str = "icfil";
/// The other run's model among them.
const AGAINST: &str = "against";

/// Which baselines are evaluated beside the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Baselines {
    /// None.
    Skip,
    /// Nearest pixel neighbour, pixel prototype, and the run's untrained network.
    Simple,
    /// Also the mean of the zoo's models and the best of them.
    All,
}

/// What to evaluate on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EvalOptions {
    /// A data set in any layout that is read, or a list.
    pub data: PathBuf,
    /// Its split.
    pub split: Option<String>,
    /// Size of the episodes.
    pub shape: EpisodeShape,
    /// How many.
    pub episodes: u64,
    /// Normalisation at test time.
    pub batch_norm: BatchNorm,
    /// Baselines on the same episodes.
    pub baselines: Baselines,
    /// Real training images for the upper bound: the run's learner, trained on them.
    pub real_data: Option<PathBuf>,
    /// Whether the run's model also answers with calibration at test time.
    pub calibration: Calibration,
    /// Another run, whose model answers the same episodes.
    pub against: Option<PathBuf>,
}

/// Calibration at test time (ICFIL).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Calibration {
    /// None.
    Skip,
    /// As well, on the same episodes.
    Icfil,
}

/// The result of an evaluation; accuracies in 0..1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EvalResult {
    /// Mean accuracy over the episodes.
    pub accuracy: f64,
    /// 1.96 s / sqrt(episodes), s with ddof 1.
    pub ci95: f64,
    /// Number of episodes.
    pub episodes: u64,
    /// Classes in an episode.
    pub way: usize,
    /// Support images a class.
    pub shot: usize,
    /// Query images a class.
    pub query: usize,
    /// Normalisation at test time.
    pub bn: BatchNorm,
    /// Seed of the episodes.
    pub seed: u64,
    /// Wall time.
    pub seconds: f64,
    /// The images.
    pub data: PathBuf,
    /// The split's folder; empty when there are none.
    pub split: String,
    /// Classes of the split.
    pub classes: usize,
    /// Usable images of the split.
    pub images: usize,
    /// Images that could not be read.
    pub rejected: Vec<Rejection>,
    /// The model with calibration at test time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub icfil: Option<IcfilResult>,
    /// Another run's model on the same episodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub against: Option<AgainstResult>,
    /// What the same episodes give without the trained model.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub baselines: BTreeMap<String, BaselineResult>,
    /// Baselines that do not apply, and why.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub baselines_left_out: BTreeMap<String, String>,
}

/// Accuracy with calibration at test time, and what it gains over that without on the same episodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct IcfilResult {
    /// Mean accuracy.
    pub accuracy: f64,
    /// Its 95 % interval.
    pub ci95: f64,
    /// Mean of (calibrated - model) over the episodes.
    pub gain: f64,
    /// Paired 95 % interval of the gain.
    pub gain_ci95: f64,
    /// What calibration took, over all episodes and threads.
    pub seconds: f64,
}

/// Another run's accuracy, and what the model gains over it on the same episodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AgainstResult {
    /// The other run's folder.
    pub run: PathBuf,
    /// Mean accuracy of its model.
    pub accuracy: f64,
    /// Its 95 % interval.
    pub ci95: f64,
    /// Mean of (model - other run's model) over the episodes.
    pub gain: f64,
    /// Paired 95 % interval of the gain.
    pub gain_ci95: f64,
}

/// A baseline's accuracy, and what the model gains over it on the same episodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BaselineResult {
    /// Mean accuracy.
    pub accuracy: f64,
    /// Its 95 % interval.
    pub ci95: f64,
    /// Mean of (model - baseline) over the episodes.
    pub gain: f64,
    /// Paired 95 % interval of the gain.
    pub gain_ci95: f64,
    /// What it was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// One episode's outcome: a line of `episodes.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EpisodeRow {
    /// Its number; with seed and split it names the episode for ever.
    pub episode: u64,
    /// Names of its classes, in label order.
    pub classes: Vec<String>,
    /// Support images of each class: places among its usable images, in byte order of their names.
    pub support: Vec<Vec<usize>>,
    /// Query images of each class, likewise.
    pub query: Vec<Vec<usize>>,
    /// The model's answers, query after query: labels, places in `classes`.
    pub answers: Vec<usize>,
    /// Queries answered rightly.
    pub correct: usize,
    /// Queries.
    pub queries: usize,
    /// Right answers of each baseline, of the calibrated model as `icfil` and of another run's as `against`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub baselines: BTreeMap<String, usize>,
}

/// Evaluates `model`; `rivals` are other networks that answer the same episodes, by name, each from images of its own size.
///
/// # Errors
/// When the images cannot carry the episodes, the model fails, or the user interrupts.
pub fn evaluate(
    model: &dyn Embedder,
    rivals: &[(&'static str, &dyn Embedder)],
    options: &EvalOptions,
    context: &Context,
) -> Result<(EvalResult, Vec<EpisodeRow>)> {
    let start = Instant::now();
    if options.episodes == 0 {
        return Err(Error::usage("an evaluation needs at least one episode, got `0`"));
    }
    let folder = ImageFolder::open(&options.data, options.split.as_deref())?;
    let (set, rejected) = folder.load(model.image_size())?;
    for rejection in &rejected {
        context
            .progress
            .note(&format!("image `{}` left out: {}", rejection.path, rejection.reason));
    }
    let sampler = EpisodeSampler::new(&set, options.shape, context.seed, &folder.split)
        .context(|| format!("cannot evaluate on `{}`", folder.root.display()))?;
    let mut sets = vec![set];
    for (_, rival) in rivals {
        let size = rival.image_size();
        if sets.iter().all(|set| set.size() != size) {
            let (other, _) = folder.load(size)?;
            if other.len() != sets[0].len() {
                return Err(Error::input(format!(
                    "the images of `{}` have changed while they were read",
                    folder.root.display()
                ))
                .hint("evaluate again"));
            }
            sets.push(other);
        }
    }
    let rows = run_episodes(&Contest::new(model, rivals, options, &sets, context)?, &sampler)?;
    let EpisodeShape { way, shot, query } = options.shape;
    let accuracies: Vec<f64> = rows.iter().map(|row| share(row.correct, row)).collect();
    let estimate = mean_with_ci(&accuracies);
    let result = EvalResult {
        accuracy: estimate.accuracy,
        ci95: estimate.ci95,
        episodes: options.episodes,
        way,
        shot,
        query,
        bn: options.batch_norm,
        seed: context.seed,
        seconds: start.elapsed().as_secs_f64(),
        data: options.data.clone(),
        split: folder.split,
        classes: sets[0].classes().len(),
        images: sets[0].len(),
        rejected,
        baselines: baseline_results(&rows, &accuracies),
        baselines_left_out: BTreeMap::new(),
        icfil: None,
        against: None,
    };
    Ok((result, rows))
}

/// Evaluates `target`: a run folder, which keeps the result under `eval/`, or an exported embedding.
///
/// # Errors
/// As [`evaluate`]; and when the target is neither.
pub fn evaluate_target(
    target: &Path,
    options: &EvalOptions,
    context: &Context,
) -> Result<EvalResult> {
    let other = match &options.against {
        Some(path) => Some((path, other_run(path)?)),
        None => None,
    };
    if target.is_file() {
        if options.real_data.is_some() {
            return Err(Error::usage(
                "`--real-data` trains as a run did, which an exported file does not tell",
            )
            .hint("evaluate the run folder"));
        }
        if options.calibration == Calibration::Icfil {
            return Err(Error::usage(
                "`--icfil` inverts and changes the network, which an exported file does not allow",
            )
            .hint("evaluate the run folder"));
        }
        let model = OnnxEmbedder::open(target)?;
        let against = other.iter().map(|(_, model)| (AGAINST, model as &dyn Embedder));
        let rivals: Vec<_> = against.collect();
        let mut result = evaluate(&model, &rivals, options, context)?.0;
        result.against = take_against(&mut result.baselines, other.as_ref().map(|(path, _)| *path));
        return Ok(result);
    }
    let run = RunFolder::open(target)?;
    let model = ModelEmbedder::trained(&run)?;
    let mut rivals = Rivals::asked_for(&run, options.baselines, context)?;
    if let Some(folder) = &options.real_data {
        let evaluated = ImageFolder::open(&options.data, options.split.as_deref())?;
        rivals.add_real_data(&run, folder, &evaluated, context)?;
    }
    let other = other.as_ref().map(|(path, model)| (*path, model));
    Ok(evaluate_run((&run, &model), &rivals, other, options, context)?.0)
}

/// Evaluates a run whose model and rivals are open already, as is the other run's: several evaluations share them. The
/// result and its episodes are kept under `eval/`.
///
/// # Errors
/// As [`evaluate`].
pub fn evaluate_run(
    (run, model): (&RunFolder, &ModelEmbedder),
    rivals: &Rivals,
    other: Option<(&PathBuf, &ModelEmbedder)>,
    options: &EvalOptions,
    context: &Context,
) -> Result<(EvalResult, Vec<EpisodeRow>)> {
    let calibrated = match options.calibration {
        Calibration::Skip => None,
        Calibration::Icfil => Some(Calibrated::of(run, options.batch_norm)?),
    };
    let mut embedders = rivals.embedders();
    embedders.extend(calibrated.iter().map(|model| (ICFIL, model as &dyn Embedder)));
    embedders.extend(other.map(|(_, model)| (AGAINST, model as &dyn Embedder)));
    let (mut result, rows) = evaluate(model, &embedders, options, context)?;
    result.against = take_against(&mut result.baselines, other.map(|(path, _)| path));
    result.icfil =
        result.baselines.remove(ICFIL).zip(calibrated).map(|(found, model)| IcfilResult {
            accuracy: found.accuracy,
            ci95: found.ci95,
            gain: -found.gain,
            gain_ci95: found.gain_ci95,
            seconds: model.time().as_secs_f64(),
        });
    for (name, note) in &rivals.notes {
        if let Some(baseline) = result.baselines.get_mut(name) {
            baseline.note = Some(note.clone());
        }
    }
    result.baselines_left_out.clone_from(&rivals.left_out);
    let name = file_name(&result);
    run.write(&format!("eval/{name}.episodes.jsonl"), rows_to_jsonl(&rows)?.as_bytes())?;
    let json = serde_json::to_vec_pretty(&result)
        .map_err(|error| Error::internal(format!("cannot write the result: `{error}`")))?;
    run.write(&format!("eval/{name}.json"), &json)?;
    Ok((result, rows))
}

/// The model of the run that is compared with.
fn other_run(path: &Path) -> Result<ModelEmbedder> {
    RunFolder::open(path)
        .and_then(|run| ModelEmbedder::trained(&run))
        .context(|| format!("cannot compare with `{}`", path.display()))
}

/// The other run among the baselines, taken out of them.
fn take_against(
    baselines: &mut BTreeMap<String, BaselineResult>,
    run: Option<&PathBuf>,
) -> Option<AgainstResult> {
    let (run, found) = run.zip(baselines.remove(AGAINST))?;
    Some(AgainstResult {
        run: run.clone(),
        accuracy: found.accuracy,
        ci95: found.ci95,
        gain: found.gain,
        gain_ci95: found.gain_ci95,
    })
}

/// `glyphs-meta_test-5way-1shot-inductive`: one file for each thing evaluated, replaced when it is
/// evaluated again.
fn file_name(result: &EvalResult) -> String {
    let data = result.data.file_name().map(|n| n.to_string_lossy().into_owned());
    let parts = [
        data.unwrap_or_default(),
        result.split.clone(),
        format!("{}way", result.way),
        format!("{}shot", result.shot),
        result.bn.name().to_owned(),
    ];
    let parts: Vec<&str> = parts.iter().map(String::as_str).filter(|p| !p.is_empty()).collect();
    parts.join("-")
}

/// The rows as the text of `episodes.jsonl`.
///
/// # Errors
/// Never for rows made here.
pub fn rows_to_jsonl(rows: &[EpisodeRow]) -> Result<String> {
    let mut text = String::new();
    for row in rows {
        let line = serde_json::to_string(row)
            .map_err(|error| Error::internal(format!("cannot write an episode: `{error}`")))?;
        text.push_str(&line);
        text.push('\n');
    }
    Ok(text)
}

fn run_episodes(contest: &Contest<'_>, sampler: &EpisodeSampler) -> Result<Vec<EpisodeRow>> {
    let stage = contest.context.progress.stage("episodes", Some(contest.episodes));
    (0..contest.episodes)
        .into_par_iter()
        .map(|index| {
            contest.context.check_interrupt()?;
            let row = contest.answer(&sampler.episode(index))?;
            stage.advance(1);
            Ok(row)
        })
        .collect()
}

fn share(correct: usize, row: &EpisodeRow) -> f64 {
    correct as f64 / row.queries as f64
}

fn baseline_results(rows: &[EpisodeRow], model: &[f64]) -> BTreeMap<String, BaselineResult> {
    let names = rows.first().map(|row| row.baselines.keys()).into_iter().flatten();
    names
        .map(|name| {
            let correct = |row: &EpisodeRow| row.baselines.get(name).copied().unwrap_or_default();
            let own: Vec<f64> = rows.iter().map(|row| share(correct(row), row)).collect();
            let (estimate, gain) = (mean_with_ci(&own), paired_difference(model, &own));
            let result = BaselineResult {
                accuracy: estimate.accuracy,
                ci95: estimate.ci95,
                gain: gain.accuracy,
                gain_ci95: gain.ci95,
                note: None,
            };
            (name.clone(), result)
        })
        .collect()
}
