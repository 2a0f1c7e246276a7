//! Everything that answers an evaluation's episodes: the model, and what it is held against.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::{Baselines, EpisodeRow, EvalOptions};
use crate::app::context::Context;
use crate::app::embedder::{BatchNorm, Embedder, Labelled, Rule};
use crate::data::{ClassImages, Episode, ImageSet, nearest_neighbour, nearest_prototype};
use crate::error::{Error, Result};

/// Images embedded at once; fixed, so that results do not depend on the number of threads.
const CHUNK: usize = 64;

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

/// One of those that answer: its vectors, the rule on them, and the images at the size it takes.
struct Entrant<'a> {
    features: Features<'a>,
    rule: Nearest,
    set: &'a ImageSet,
}

/// Everything that answers the same episodes: the model first, then the baselines.
pub(super) struct Contest<'a> {
    model: Entrant<'a>,
    baselines: Vec<(&'static str, Entrant<'a>)>,
    pub(super) context: &'a Context,
    pub(super) episodes: u64,
}

impl<'a> Contest<'a> {
    /// `sets` holds the same images once for each size that one of the models takes, the model's own first.
    pub(super) fn new(
        model: &'a dyn Embedder,
        rivals: &[(&'static str, &'a dyn Embedder)],
        options: &EvalOptions,
        sets: &'a [ImageSet],
        context: &'a Context,
    ) -> Result<Self> {
        let batch_norm = options.batch_norm;
        let entrant = |model: &'a dyn Embedder| {
            let size = model.image_size();
            let set = sets.iter().find(|set| set.size() == size);
            let set =
                set.ok_or_else(|| Error::internal(format!("no images of size `{size:?}`")))?;
            let features = match (model.rule(), batch_norm) {
                (Rule::Adapting, _) => Features::Adapting { model, batch_norm },
                (Rule::NearestMean, BatchNorm::Inductive) => {
                    let values = embed_all(model, set, context)?;
                    Features::Table { values, dim: model.dim() }
                }
                (Rule::NearestMean, BatchNorm::Transductive) => Features::PerEpisode { model },
            };
            Ok::<_, Error>(Entrant { features, rule: nearest_prototype, set })
        };
        let mut baselines = Vec::new();
        for &(name, rival) in rivals {
            baselines.push((name, entrant(rival)?));
        }
        let model = entrant(model)?;
        if options.baselines != Baselines::Skip {
            let pixels = |rule| Entrant { features: Features::Pixels, rule, set: model.set };
            baselines.push(("pixel-nearest", pixels(nearest_neighbour)));
            baselines.push(("pixel-prototype", pixels(nearest_prototype)));
        }
        Ok(Self { model, baselines, context, episodes: options.episodes })
    }

    pub(super) fn answer(&self, episode: &Episode) -> Result<EpisodeRow> {
        let answers = self.model.answers(episode)?;
        let mut baselines = BTreeMap::new();
        for (name, entrant) in &self.baselines {
            let answers = entrant.answers(episode)?;
            baselines.insert((*name).to_owned(), count_right(&answers, episode));
        }
        let classes: Vec<&ClassImages> =
            episode.classes.iter().map(|&class| &self.model.set.classes()[class]).collect();
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
}

impl Entrant<'_> {
    fn answers(&self, episode: &Episode) -> Result<Vec<usize>> {
        if let Features::Adapting { model, batch_norm } = &self.features {
            let way = episode.classes.len();
            let shot = episode.support.len() / way.max(1);
            let labels: Vec<usize> =
                (0..episode.support.len()).map(|at| at / shot.max(1)).collect();
            let (support, query) =
                (self.set.select(&episode.support), self.set.select(&episode.query));
            let images = Labelled { support: &support, labels: &labels, query: &query, way };
            return model.learn(&images, *batch_norm);
        }
        let (support, queries, dim) = self.vectors(episode)?;
        if support.iter().chain(&queries).any(|value| !value.is_finite()) {
            return Err(Error::internal(format!(
                "the model gives infinite or undefined vectors in episode `{}`",
                episode.index
            ))
            .hint("training has diverged: lower `meta.learning_rate`"));
        }
        Ok((self.rule)(&support, &queries, dim, episode.classes.len()))
    }

    /// Support and query vectors and their length.
    fn vectors(&self, episode: &Episode) -> Result<(Vec<f32>, Vec<f32>, usize)> {
        let pixels = |indices: &[usize]| self.set.select(indices).into_data();
        match &self.features {
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
