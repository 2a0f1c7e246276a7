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
use super::embedder::{BatchNorm, Embedder, Labelled, ModelEmbedder, OnnxEmbedder, Rule};
use super::run_folder::RunFolder;
use crate::data::{
    ClassImages, Episode, EpisodeSampler, EpisodeShape, ImageFolder, ImageSet, nearest_neighbour,
    nearest_prototype,
};
use crate::error::{Error, Result, ResultExt};
use crate::report::{mean_with_ci, paired_difference};
use crate::zoo::Rejection;

/// Images embedded at once; fixed, so that results do not depend on the number of threads.
const CHUNK: usize = 64;

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
    /// An ImageFolder.
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
    /// What the same episodes give without the trained model.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub baselines: BTreeMap<String, BaselineResult>,
    /// Baselines that do not apply, and why.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub baselines_left_out: BTreeMap<String, String>,
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
    /// Right answers of each baseline.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub baselines: BTreeMap<String, usize>,
}

/// Evaluates `model`; `rivals` are other networks that answer the same episodes, by name.
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
    let rows = run_episodes(&Contest::new(model, rivals, options, &set, context)?, &sampler)?;
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
        classes: set.classes().len(),
        images: set.len(),
        rejected,
        baselines: baseline_results(&rows, &accuracies),
        baselines_left_out: BTreeMap::new(),
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
    if target.is_file() {
        if options.real_data.is_some() {
            return Err(Error::usage(
                "`--real-data` trains as a run did, which an exported file does not tell",
            )
            .hint("evaluate the run folder"));
        }
        let model = OnnxEmbedder::open(target)?;
        return Ok(evaluate(&model, &[], options, context)?.0);
    }
    let run = RunFolder::open(target)?;
    let model = ModelEmbedder::trained(&run)?;
    let mut rivals = match options.baselines {
        Baselines::Skip => Rivals::none(),
        Baselines::Simple => Rivals::untrained(&run)?,
        Baselines::All => Rivals::all(&run, context)?,
    };
    if let Some(folder) = &options.real_data {
        let evaluated = ImageFolder::open(&options.data, options.split.as_deref())?;
        rivals.add_real_data(&run, folder, &evaluated, context)?;
    }
    let (mut result, rows) = evaluate(&model, &rivals.embedders(), options, context)?;
    for (name, note) in rivals.notes {
        if let Some(baseline) = result.baselines.get_mut(&name) {
            baseline.note = Some(note);
        }
    }
    result.baselines_left_out = rivals.left_out;
    let name = file_name(&result);
    run.write(&format!("eval/{name}.episodes.jsonl"), rows_to_jsonl(&rows)?.as_bytes())?;
    let json = serde_json::to_vec_pretty(&result)
        .map_err(|error| Error::internal(format!("cannot write the result: `{error}`")))?;
    run.write(&format!("eval/{name}.json"), &json)?;
    Ok(result)
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

/// One way to turn an episode's images into vectors.
enum Features<'a> {
    /// Computed once for the whole set: `[images, dim]`.
    Table { values: Vec<f32>, dim: usize },
    /// Computed for each episode from its support and query images together.
    PerEpisode { model: &'a dyn Embedder },
    /// The pixels themselves.
    Pixels,
    /// No vectors: the model adapts to each episode.
    Adapting { model: &'a dyn Embedder, batch_norm: BatchNorm },
}

/// Classes of queries from support and query vectors, their length and the number of classes.
type Nearest = fn(&[f32], &[f32], usize, usize) -> Vec<usize>;

/// Everything that answers the same episodes: the model first, then the baselines.
struct Contest<'a> {
    model: Features<'a>,
    baselines: Vec<(&'static str, Features<'a>, Nearest)>,
    set: &'a ImageSet,
    context: &'a Context,
    episodes: u64,
}

impl<'a> Contest<'a> {
    fn new(
        model: &'a dyn Embedder,
        rivals: &[(&'static str, &'a dyn Embedder)],
        options: &EvalOptions,
        set: &'a ImageSet,
        context: &'a Context,
    ) -> Result<Self> {
        let batch_norm = options.batch_norm;
        let features = |model: &'a dyn Embedder| match (model.rule(), batch_norm) {
            (Rule::Adapting, _) => Ok(Features::Adapting { model, batch_norm }),
            (Rule::NearestMean, BatchNorm::Inductive) => {
                let values = embed_all(model, set, context)?;
                Ok::<_, Error>(Features::Table { values, dim: model.dim() })
            }
            (Rule::NearestMean, BatchNorm::Transductive) => Ok(Features::PerEpisode { model }),
        };
        let mut baselines: Vec<(&'static str, Features<'a>, Nearest)> = Vec::new();
        for (name, rival) in rivals {
            baselines.push((name, features(*rival)?, nearest_prototype));
        }
        if options.baselines != Baselines::Skip {
            baselines.push(("pixel-nearest", Features::Pixels, nearest_neighbour));
            baselines.push(("pixel-prototype", Features::Pixels, nearest_prototype));
        }
        Ok(Self { model: features(model)?, baselines, set, context, episodes: options.episodes })
    }

    fn answer(&self, episode: &Episode) -> Result<EpisodeRow> {
        let answers = self.answers(&self.model, nearest_prototype, episode)?;
        let mut baselines = BTreeMap::new();
        for (name, features, rule) in &self.baselines {
            let answers = self.answers(features, *rule, episode)?;
            baselines.insert((*name).to_owned(), count_right(&answers, episode));
        }
        let classes: Vec<&ClassImages> =
            episode.classes.iter().map(|&class| &self.set.classes()[class]).collect();
        let places = |images: &[usize]| {
            let by_class = images.chunks_exact((images.len() / classes.len()).max(1));
            let of = |(images, class): (&[usize], &&ClassImages)| {
                images.iter().map(|image| image - class.range.start).collect()
            };
            by_class.zip(&classes).map(of).collect()
        };
        Ok(EpisodeRow {
            episode: episode.index,
            classes: classes.iter().map(|class| class.name.clone()).collect(),
            support: places(&episode.support),
            query: places(&episode.query),
            correct: count_right(&answers, episode),
            answers,
            queries: episode.query.len(),
            baselines,
        })
    }

    fn answers(
        &self,
        features: &Features<'_>,
        rule: Nearest,
        episode: &Episode,
    ) -> Result<Vec<usize>> {
        if let Features::Adapting { model, batch_norm } = features {
            let way = episode.classes.len();
            let shot = episode.support.len() / way.max(1);
            let labels: Vec<usize> =
                (0..episode.support.len()).map(|at| at / shot.max(1)).collect();
            let (support, query) =
                (self.set.select(&episode.support), self.set.select(&episode.query));
            let images = Labelled { support: &support, labels: &labels, query: &query, way };
            return model.learn(&images, *batch_norm);
        }
        let (support, queries, dim) = self.vectors(features, episode)?;
        if support.iter().chain(&queries).any(|value| !value.is_finite()) {
            return Err(Error::internal(format!(
                "the model gives infinite or undefined vectors in episode `{}`",
                episode.index
            ))
            .hint("training has diverged: lower `meta.learning_rate`"));
        }
        Ok(rule(&support, &queries, dim, episode.classes.len()))
    }

    /// Support and query vectors and their length.
    fn vectors(
        &self,
        features: &Features<'_>,
        episode: &Episode,
    ) -> Result<(Vec<f32>, Vec<f32>, usize)> {
        let pixels = |indices: &[usize]| self.set.select(indices).into_data();
        match features {
            Features::Table { values, dim } => {
                let gather = |indices: &[usize]| {
                    indices.iter().flat_map(|&i| &values[i * dim..(i + 1) * dim]).copied().collect()
                };
                Ok((gather(&episode.support), gather(&episode.query), *dim))
            }
            Features::PerEpisode { model } => {
                let together = [episode.support.as_slice(), &episode.query].concat();
                let mut support =
                    model.embed(&self.set.select(&together), BatchNorm::Transductive)?;
                let queries = support.split_off(episode.support.len() * model.dim());
                Ok((support, queries, model.dim()))
            }
            Features::Pixels => {
                let [height, width] = self.set.size();
                Ok((pixels(&episode.support), pixels(&episode.query), 3 * height * width))
            }
            Features::Adapting { .. } => {
                Err(Error::internal("a model that adapts answers without vectors"))
            }
        }
    }
}

fn count_right(answers: &[usize], episode: &Episode) -> usize {
    let right = |(position, answer): &(usize, &usize)| **answer == episode.query_label(*position);
    answers.iter().enumerate().filter(right).count()
}

/// Vectors of every image, in order.
fn embed_all(model: &dyn Embedder, set: &ImageSet, context: &Context) -> Result<Vec<f32>> {
    let stage = context.progress.stage("embed", Some(set.len() as u64));
    let starts: Vec<usize> = (0..set.len()).step_by(CHUNK).collect();
    let chunks: Vec<Vec<f32>> = starts
        .into_par_iter()
        .map(|start| {
            context.check_interrupt()?;
            let indices: Vec<usize> = (start..set.len().min(start + CHUNK)).collect();
            let vectors = model.embed(&set.select(&indices), BatchNorm::Inductive)?;
            stage.advance(indices.len() as u64);
            Ok(vectors)
        })
        .collect::<Result<_>>()?;
    Ok(chunks.concat())
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
