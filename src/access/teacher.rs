//! The trait that hides how a model is reached.

use crate::error::Result;
use crate::tensor::{AdamOptions, Images, RngStream};
use crate::zoo::ModelSpec;

/// A per-image loss on a teacher's logits: value, and gradient for teachers that can use it.
///
/// Implementations must be pure: the same index and logits give the same value.
pub trait LogitsLoss: Sync {
    /// Loss of image `index` of the batch given its logits (length = classes).
    fn value(&self, index: usize, logits: &[f32]) -> f64;
    /// Gradient of [`LogitsLoss::value`] to the logits, written to `gradient`.
    fn gradient(&self, index: usize, logits: &[f32], gradient: &mut [f32]);
    /// The wanted class of each image, where the loss is cross-entropy to it: a GPU computes it where the logits are.
    fn labels(&self) -> Option<&[usize]> {
        None
    }
}

/// What is minimised over the images: the mean over the batch of `logits` plus, for teachers with
/// normalisation statistics, `statistics_weight * sum_l (|mean_l - ref| + |var_l - ref|)`, un-squared
/// L2 norms of per-channel vectors (PURER sec. 2.2, DeepInversion).
pub struct Objective<'a> {
    /// Loss on the logits, averaged over the batch.
    pub logits: &'a dyn LogitsLoss,
    /// Weight of the statistics term; ignored by teachers that have none.
    pub statistics_weight: f32,
}

/// What a method knows of where a gradient may lie. Teachers with exact gradients need none of it.
#[derive(Clone, Copy, Default)]
pub struct Guide<'a> {
    /// Directions worth asking along, k an image: image i's are `[i k, (i + 1) k)` (a generator's
    /// Jacobian-vector products). Empty for none.
    pub basis: Option<&'a Images>,
    /// What the gradient was a step ago, same shape as the images.
    pub prior: Option<&'a Images>,
}

/// The gradient of an [`Objective`] to a batch of canonical images, with what was seen on the way.
pub struct ImageGradient {
    /// Gradient of the objective, same shape as the images.
    pub gradient: Images,
    /// Mean loss on the logits.
    pub logits_loss: f64,
    /// Unweighted statistics term (0 for teachers without).
    pub statistics_loss: f64,
    /// Logits `[n, classes]`, row-major.
    pub logits: Vec<f32>,
}

/// Free pixels to be moved by gradient descent.
#[derive(Debug, Clone, Copy)]
pub struct PixelTask<'a> {
    /// Standardised pixels [n, 3, height, width] at the start.
    pub start: &'a [f32],
    /// `[height, width]`.
    pub size: [usize; 2],
    /// The wanted class of each image.
    pub labels: &'a [usize],
    /// Middle, unit (both canonical) and bound (in units) of the pixels.
    pub standard: [f32; 3],
    /// Weight of the statistics term.
    pub statistics: f32,
    /// Weight of total variation.
    pub total_variation: f32,
    /// Weight of the pixel norm.
    pub norm: f32,
    /// The optimiser.
    pub adam: AdamOptions,
}

/// What a step of [`ResidentPixels`] saw before it moved them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PixelLosses {
    /// Mean cross-entropy.
    pub logits: f64,
    /// Unweighted statistics term.
    pub statistics: f64,
    /// Unweighted total variation.
    pub total_variation: f64,
    /// Unweighted pixel norm.
    pub norm: f64,
}

/// Pixels on a device; only scalars leave it until the end.
pub trait ResidentPixels {
    /// One step of `rate` on images shifted cyclically by `[down, right]`.
    ///
    /// # Errors
    /// Those of the device.
    fn step(&mut self, shift: [i64; 2], rate: f64) -> Result<PixelLosses>;

    /// The standardised pixels, bounded.
    ///
    /// # Errors
    /// Those of the device.
    fn read(&self) -> Result<Vec<f32>>;
}

/// A classifier that can be asked and, exactly or by estimate, differentiated.
///
/// Images are canonical ([0,1], RGB, NCHW, any size; the adapter inside resizes to the model's own
/// size); gradients are with respect to these canonical images.
pub trait Teacher: Send + Sync {
    /// What is known of the model.
    fn spec(&self) -> &ModelSpec;

    /// Logits `[n, classes]`, row-major. Where only probabilities come back, their logarithms.
    ///
    /// # Errors
    /// When the model cannot be run, or the query budget does not cover the batch.
    fn logits(&self, images: &Images) -> Result<Vec<f32>>;

    /// Gradient of `objective` to `images`: exact for white-box, estimated from counted queries
    /// otherwise. `rng` gives the estimator's directions; exact teachers do not touch it.
    ///
    /// # Errors
    /// As [`Teacher::logits`].
    fn image_gradient(
        &self,
        images: &Images,
        objective: &Objective<'_>,
        rng: &mut RngStream,
    ) -> Result<ImageGradient>;

    /// As [`Teacher::image_gradient`], for estimators that use `guide`; others ignore it.
    ///
    /// # Errors
    /// As [`Teacher::image_gradient`].
    fn guided_gradient(
        &self,
        images: &Images,
        objective: &Objective<'_>,
        guide: &Guide<'_>,
        rng: &mut RngStream,
    ) -> Result<ImageGradient> {
        let _ = guide;
        self.image_gradient(images, objective, rng)
    }

    /// Pixels `task` says that stay where the model is computed; `None` where each step's gradient
    /// crosses the host ([`Teacher::image_gradient`]).
    ///
    /// # Errors
    /// When the device has no memory for them.
    fn resident(&self, task: &PixelTask<'_>) -> Result<Option<Box<dyn ResidentPixels>>> {
        let _ = task;
        Ok(None)
    }

    /// Layers whose statistics the objective's second term compares.
    fn statistics_layers(&self) -> usize {
        0
    }

    /// Queries spent so far (images sent); 0 for white-box teachers.
    fn queries(&self) -> u64;

    /// Queries that may still be spent; `None` without a limit.
    fn queries_left(&self) -> Option<u64> {
        None
    }

    /// Queries that [`Teacher::logits`] of `n` images spends where nothing is sent twice; 0 for white-box teachers.
    fn logits_cost(&self, n: usize) -> u64 {
        let _ = n;
        0
    }

    /// Queries that [`Teacher::image_gradient`] to images of `shape` spends, likewise.
    fn gradient_cost(&self, shape: [usize; 4]) -> u64 {
        let _ = shape;
        0
    }
}
