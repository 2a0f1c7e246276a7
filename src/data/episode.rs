//! Episodes: N classes drawn at random, K support and Q query images of each.
//!
//! Episode i depends on (seed, split, i) only, so any number of them may be drawn in any order and
//! by any number of threads.

use super::set::{ClassImages, ImageSet};
use crate::error::{Error, Result};
use crate::tensor::RngStream;

/// The size of an episode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpisodeShape {
    /// Classes in an episode.
    pub way: usize,
    /// Support images a class.
    pub shot: usize,
    /// Query images a class.
    pub query: usize,
}

impl EpisodeShape {
    /// Whether classes of these names and numbers of images can carry such episodes.
    ///
    /// # Errors
    /// When a number is zero, when there are fewer classes than `way`, or when a class has fewer images than
    /// `shot + query` (the class, its count and the need are named).
    pub fn fits<'a>(self, classes: impl Iterator<Item = (&'a str, usize)>) -> Result<()> {
        let Self { way, shot, query } = self;
        if way < 2 || shot == 0 || query == 0 {
            return Err(Error::usage(format!(
                "episodes need at least 2 ways, 1 shot and 1 query, got `{way}, {shot}, {query}`"
            )));
        }
        let classes: Vec<(&str, usize)> = classes.collect();
        if classes.len() < way {
            return Err(Error::input(format!(
                "{way}-way episodes need {way} classes, there are `{}`",
                classes.len()
            ))
            .hint("lower `--way` or add class folders"));
        }
        let need = shot + query;
        let short: Vec<_> = classes.iter().filter(|(_, images)| *images < need).collect();
        if let Some((name, images)) = short.iter().min_by_key(|(_, images)| *images) {
            let others = match short.len() - 1 {
                0 => String::new(),
                n => format!(" (and {n} more are short)"),
            };
            return Err(Error::input(format!(
                "class `{name}` has {images} usable images, an episode needs {need}{others}"
            ))
            .hint(format!(
                "need = shot + query = {shot} + {query}: lower `--shot` or `--query`, or add images"
            )));
        }
        Ok(())
    }
}

/// One episode: indices into the [`ImageSet`] it was drawn from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Episode {
    /// Its number.
    pub index: u64,
    /// The classes drawn, in label order.
    pub classes: Vec<usize>,
    /// `way * shot` images, label-major.
    pub support: Vec<usize>,
    /// `way * query` images, label-major; none is a support image.
    pub query: Vec<usize>,
}

impl Episode {
    /// The label (0..way) of query `position`.
    pub fn query_label(&self, position: usize) -> usize {
        position * self.classes.len() / self.query.len().max(1)
    }
}

/// Draws episodes of one shape.
#[derive(Debug, Clone)]
pub struct EpisodeSampler {
    classes: Vec<ClassImages>,
    shape: EpisodeShape,
    seed: u64,
    split: String,
}

impl EpisodeSampler {
    /// A sampler over `set`; `split` keys the random streams.
    ///
    /// # Errors
    /// When a number of `shape` is zero, when there are fewer classes than `way`, or when a class
    /// has fewer images than `shot + query` (the class, its count and the need are named).
    pub fn new(set: &ImageSet, shape: EpisodeShape, seed: u64, split: &str) -> Result<Self> {
        let classes = set.classes();
        shape.fits(classes.iter().map(|class| (class.name.as_str(), class.range.len())))?;
        Ok(Self { classes: classes.to_vec(), shape, seed, split: split.into() })
    }

    /// Episode `index`.
    pub fn episode(&self, index: u64) -> Episode {
        let EpisodeShape { way, shot, query } = self.shape;
        let mut rng = RngStream::new(self.seed, "episode", &self.split, index);
        let classes = rng.sample(self.classes.len(), way);
        let mut episode = Episode {
            index,
            classes,
            support: Vec::with_capacity(way * shot),
            query: Vec::with_capacity(way * query),
        };
        for &class in &episode.classes {
            let range = &self.classes[class].range;
            let drawn = rng.sample(range.len(), shot + query);
            let (support, queries) = drawn.split_at(shot);
            episode.support.extend(support.iter().map(|at| range.start + at));
            episode.query.extend(queries.iter().map(|at| range.start + at));
        }
        episode
    }

    /// The size of its episodes.
    pub fn shape(&self) -> EpisodeShape {
        self.shape
    }
}
