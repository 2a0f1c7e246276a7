//! Pseudo episodes: which classes and images one training step sees.

use crate::error::{Error, Result};
use crate::tensor::RngStream;

/// Labelled images to draw episodes from, for instance those recovered from the models of a zoo.
/// The classes of different models are different classes here, even where they mean the same thing:
/// nobody knows.
pub trait ClassSource: Sync {
    /// Number of classes, of all models together.
    fn n_classes(&self) -> usize;

    /// Number of images of a class.
    fn images_in(&self, class: usize) -> usize;

    /// The model that a class comes from, any number that tells models apart.
    fn source_model(&self, class: usize) -> usize;

    /// Height and width of every image.
    fn image_size(&self) -> [usize; 2];

    /// Writes image `index` of `class` as canonical pixels ([0, 1], RGB, `[3, height, width]`).
    ///
    /// # Errors
    /// When the image cannot be read.
    fn read(&self, class: usize, index: usize, pixels: &mut [f32]) -> Result<()>;
}

/// One episode: images by (class, index), and what each is in the episode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Episode {
    /// Support images, then query images, each class after class.
    pub images: Vec<(usize, usize)>,
    /// Labels of the support images, in `0..way`.
    pub support_labels: Vec<usize>,
    /// Labels of the query images, in `0..way`.
    pub query_labels: Vec<usize>,
}

/// Draws episodes from a source.
#[derive(Debug, Clone)]
pub struct EpisodeSampler {
    way: usize,
    shot: usize,
    query: usize,
    cross_model_share: f64,
    /// Usable classes with their number of images.
    classes: Vec<(usize, usize)>,
    /// Positions in `classes` of each model that can fill an episode on its own.
    by_model: Vec<Vec<usize>>,
}

impl EpisodeSampler {
    /// A sampler over the classes of `source` that have `shot + query` images. A share
    /// `cross_model_share` of the episodes draws from all classes, the rest from the classes of one
    /// model; where no model has `way` usable classes, every episode draws from all.
    ///
    /// # Errors
    /// When fewer than `way` classes have enough images, or a number makes no sense.
    pub fn new(
        source: &dyn ClassSource,
        way: usize,
        shot: usize,
        query: usize,
        cross_model_share: f64,
    ) -> Result<Self> {
        if way < 2 || shot == 0 || query == 0 || !(0.0..=1.0).contains(&cross_model_share) {
            return Err(Error::usage(format!(
                "an episode of {way} ways, {shot} shots, {query} queries with a cross-model share of `{cross_model_share}`"
            ))
            .hint("use at least 2 ways, 1 shot, 1 query and a share from 0 to 1"));
        }
        let classes: Vec<(usize, usize)> = (0..source.n_classes())
            .map(|class| (class, source.images_in(class)))
            .filter(|&(_, images)| images >= shot + query)
            .collect();
        if classes.len() < way {
            return Err(Error::input(format!(
                "a {way}-way episode needs {way} classes of {} images, the bank has `{}`",
                shot + query,
                classes.len()
            ))
            .hint("recover more images a class, or lower `shot` and `query`"));
        }
        let mut models: Vec<usize> =
            classes.iter().map(|&(class, _)| source.source_model(class)).collect();
        models.sort_unstable();
        models.dedup();
        let by_model = models
            .into_iter()
            .map(|model| -> Vec<usize> {
                (0..classes.len())
                    .filter(|&at| source.source_model(classes[at].0) == model)
                    .collect()
            })
            .filter(|own| own.len() >= way)
            .collect();
        Ok(Self { way, shot, query, cross_model_share, classes, by_model })
    }

    /// Draws one episode.
    pub fn draw(&self, rng: &mut RngStream) -> Episode {
        let across = f64::from(rng.uniform()) < self.cross_model_share || self.by_model.is_empty();
        let chosen: Vec<usize> = if across {
            rng.sample(self.classes.len(), self.way)
        } else {
            let own = &self.by_model[rng.below(self.by_model.len())];
            rng.sample(own.len(), self.way).into_iter().map(|at| own[at]).collect()
        };
        let mut support = Vec::with_capacity(self.way * self.shot);
        let mut query = Vec::with_capacity(self.way * self.query);
        for at in chosen {
            let (class, images) = self.classes[at];
            let drawn = rng.sample(images, self.shot + self.query);
            let (first, rest) = drawn.split_at(self.shot);
            support.extend(first.iter().map(|&index| (class, index)));
            query.extend(rest.iter().map(|&index| (class, index)));
        }
        let labels = |each: usize| (0..self.way * each).map(|i| i / each).collect();
        support.append(&mut query);
        Episode {
            images: support,
            support_labels: labels(self.shot),
            query_labels: labels(self.query),
        }
    }
}
