//! What the meta-model says back of an episode: its outer loss, and the gradient of that loss to every pixel of support
//! and queries, through the inner loop (PURER sec. 3.2, "end-to-end"; methods.md 2.2, 2.3).

use super::augment::Draw;
use super::episodes::{ClassSource, Episode, EpisodeSampler};
use super::train::{Trainer, read_images};
use crate::error::Result;
use crate::tensor::RngStream;
use crate::tensor::tape::{Order, Tape, grad};

/// An episode and how its outer loss moves with its pixels.
#[derive(Debug, Clone, PartialEq)]
pub struct PixelGradient {
    /// Which images it is of.
    pub episode: Episode,
    draws: Vec<Draw>,
    /// Mean cross-entropy on the queries after the inner loop.
    pub loss: f64,
    /// Gradient of `loss` to the canonical pixels, `[n, 3, H, W]`, in the order of the episode's images.
    pub gradient: Vec<f32>,
}

impl Trainer {
    /// Draws an episode from `source` by `sampler` as meta-training does, augmentation included, and differentiates its
    /// outer loss to the pixels before augmentation. Second order where the learner's inner loop is.
    ///
    /// # Errors
    /// When an image cannot be read, or the network cannot be differentiated so far.
    pub fn pixel_gradient(
        &self,
        source: &dyn ClassSource,
        sampler: &EpisodeSampler,
        rng: &mut RngStream,
    ) -> Result<PixelGradient> {
        let c = self.config();
        let episode = sampler.draw(rng);
        let tape = Tape::new();
        let draws: Vec<Draw> = episode.images.iter().map(|_| c.augmentation.draw(rng)).collect();
        let images = tape.leaf(read_images(source, &episode, &draws)?);
        let parameters = self.model().leaves(&tape);
        let (loss, _) = self.play(&parameters, episode.task(&images), &episode)?;
        let gradient = grad(&loss, &[&images], Order::First)?.remove(0);
        let augmented = gradient.value().flatten_all()?.to_vec1::<f32>()?;
        let mut gradient = vec![0.0; augmented.len()];
        let [height, width] = source.image_size();
        let stride = 3 * height * width;
        let parts = augmented.chunks_exact(stride).zip(gradient.chunks_exact_mut(stride));
        for (draw, (from, to)) in draws.iter().zip(parts) {
            draw.pull_back(from, height, width, to);
        }
        Ok(PixelGradient { episode, draws, loss: loss.scalar()?, gradient })
    }

    /// The outer loss of the episode of `before`, augmented as then, with its images as they are in `source` now.
    ///
    /// # Errors
    /// When an image cannot be read.
    pub fn outer_loss(&self, source: &dyn ClassSource, before: &PixelGradient) -> Result<f64> {
        let tape = Tape::new();
        let images = tape.constant(read_images(source, &before.episode, &before.draws)?);
        let parameters = self.model().leaves(&tape);
        self.play(&parameters, before.episode.task(&images), &before.episode)?.0.scalar()
    }
}
