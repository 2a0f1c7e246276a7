//! Pseudo episodes: which classes and images one training step sees.

use std::collections::BTreeMap;

use super::task::Task;
use crate::error::{Error, Result};
use crate::tensor::RngStream;
use crate::tensor::tape::Var;

/// Labelled images to draw episodes from, for instance those recovered from the models of a zoo.
/// The classes of different models are different classes, even where they mean the same thing: nobody
/// knows. Where somebody does, [`ClassSource::meaning`] tells.
pub trait ClassSource: Sync {
    /// Number of classes, of all models together.
    fn n_classes(&self) -> usize;

    /// Number of images of a class.
    fn images_in(&self, class: usize) -> usize;

    /// The model that a class comes from, any number that tells models apart.
    fn source_model(&self, class: usize) -> usize;

    /// The class that `class` counts as: of several that mean the same, the lowest number. Such classes are one class
    /// in episodes that mix models.
    fn meaning(&self, class: usize) -> usize {
        class
    }

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

impl Episode {
    /// Number of classes.
    pub fn way(&self) -> usize {
        self.query_labels.iter().max().map_or(0, |&label| label + 1)
    }

    /// The task that it is with these `images` `[n, 3, H, W]`.
    pub(super) fn task<'a>(&'a self, images: &'a Var) -> Task<'a> {
        Task::new(images, &self.support_labels, self.way())
    }

    /// The class of the source that each label stands for.
    pub fn slots(&self) -> Vec<usize> {
        let mut slots = vec![0; self.way()];
        let queries = &self.images[self.support_labels.len()..];
        for (&(class, _), &label) in queries.iter().zip(&self.query_labels) {
            slots[label] = class;
        }
        slots
    }
}

/// A class as episodes see it: the source's classes that mean it, each with its number of images.
type Group = Vec<(usize, usize)>;

/// Draws episodes from a source.
#[derive(Debug, Clone)]
pub struct EpisodeSampler {
    way: usize,
    shot: usize,
    query: usize,
    cross_model_share: f64,
    /// Usable classes.
    classes: Vec<Group>,
    /// Those of each model that can fill an episode on its own, with its own images only.
    by_model: Vec<Vec<Group>>,
}

impl EpisodeSampler {
    /// A sampler over the classes of `source` that have `shot + query` images, where those that mean the same count as
    /// one. A share `cross_model_share` of the episodes draws from all classes, the rest from the classes and images of
    /// one model; where no model has `way` usable classes, every episode draws from all.
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
        let all: Vec<usize> = (0..source.n_classes()).collect();
        Self::among(source, &all, [way, shot, query], cross_model_share)
    }

    /// The same over `classes` only.
    ///
    /// # Errors
    /// As [`EpisodeSampler::new`].
    pub(super) fn among(
        source: &dyn ClassSource,
        classes: &[usize],
        [way, shot, query]: [usize; 3],
        cross_model_share: f64,
    ) -> Result<Self> {
        if way < 2 || shot == 0 || query == 0 || !(0.0..=1.0).contains(&cross_model_share) {
            return Err(Error::usage(format!(
                "an episode of {way} ways, {shot} shots, {query} queries with a cross-model share of `{cross_model_share}`"
            ))
            .hint("use at least 2 ways, 1 shot, 1 query and a share from 0 to 1"));
        }
        let usable = groups(source, classes, shot + query);
        if usable.len() < way {
            return Err(Error::input(format!(
                "a {way}-way episode needs {way} classes of {} images, the bank has `{}`",
                shot + query,
                usable.len()
            ))
            .hint("recover more images a class, or lower `shot` and `query`"));
        }
        let mut models: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for &class in classes {
            models.entry(source.source_model(class)).or_default().push(class);
        }
        let by_model = models
            .values()
            .map(|own| groups(source, own, shot + query))
            .filter(|own| own.len() >= way)
            .collect();
        Ok(Self { way, shot, query, cross_model_share, classes: usable, by_model })
    }

    /// What its classes mean, once each, in order.
    pub(super) fn meanings(&self, source: &dyn ClassSource) -> Vec<usize> {
        self.classes.iter().map(|group| source.meaning(group[0].0)).collect()
    }

    /// Draws one episode.
    pub fn draw(&self, rng: &mut RngStream) -> Episode {
        let across = f64::from(rng.uniform()) < self.cross_model_share || self.by_model.is_empty();
        let from =
            if across { &self.classes } else { &self.by_model[rng.below(self.by_model.len())] };
        let mut support = Vec::with_capacity(self.way * self.shot);
        let mut query = Vec::with_capacity(self.way * self.query);
        for at in rng.sample(from.len(), self.way) {
            let group = &from[at];
            let images = group.iter().map(|(_, images)| images).sum();
            let drawn = rng.sample(images, self.shot + self.query);
            let (first, rest) = drawn.split_at(self.shot);
            support.extend(first.iter().map(|&image| place(group, image)));
            query.extend(rest.iter().map(|&image| place(group, image)));
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

/// `classes` by what they mean, in the order of their first; those with fewer than `least` images are left out.
fn groups(source: &dyn ClassSource, classes: &[usize], least: usize) -> Vec<Group> {
    let mut groups: BTreeMap<usize, Group> = BTreeMap::new();
    for &class in classes {
        let group = groups.entry(source.meaning(class)).or_default();
        group.push((class, source.images_in(class)));
    }
    let images = |group: &Group| group.iter().map(|(_, images)| images).sum::<usize>();
    groups.into_values().filter(|group| images(group) >= least).collect()
}

/// Class and index of image `image` of a group.
fn place(group: &Group, image: usize) -> (usize, usize) {
    let (mut at, mut index) = (0, image);
    while index >= group[at].1 {
        index -= group[at].1;
        at += 1;
    }
    (group[at].0, index)
}
