//! Labelled pictures in memory, grouped by class.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::tensor::Images;

/// The images of one class within an [`ImageSet`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassImages {
    /// The class name (the folder's).
    pub name: String,
    /// Which images of the set are its.
    pub range: Range<usize>,
}

/// RGB images of one size, class after class. Held as bytes: four times smaller than canonical
/// images, which are made for the ones asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSet {
    size: [usize; 2],
    bytes: Vec<u8>,
    classes: Vec<ClassImages>,
}

impl ImageSet {
    /// A set from `bytes` (8-bit, channel-major `[n, 3, height, width]`) and the number of images of
    /// each class in order; `size` is `[height, width]`.
    ///
    /// # Errors
    /// When the bytes are not as many as the counts say.
    pub fn new(size: [usize; 2], bytes: Vec<u8>, counts: &[(String, usize)]) -> Result<Self> {
        let n: usize = counts.iter().map(|(_, count)| count).sum();
        let expected = n * 3 * size[0] * size[1];
        if bytes.len() != expected {
            return Err(Error::internal(format!(
                "an image set of {n} images needs {expected} bytes, got `{}`",
                bytes.len()
            )));
        }
        let mut start = 0;
        let classes = counts
            .iter()
            .map(|(name, count)| {
                let range = start..start + count;
                start += count;
                ClassImages { name: name.clone(), range }
            })
            .collect();
        Ok(Self { size, bytes, classes })
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.classes.last().map_or(0, |class| class.range.end)
    }

    /// No image at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `[height, width]`.
    pub fn size(&self) -> [usize; 2] {
        self.size
    }

    /// The classes in the order of their images.
    pub fn classes(&self) -> &[ClassImages] {
        &self.classes
    }

    /// Canonical images at `indices`, in that order.
    pub fn select(&self, indices: &[usize]) -> Images {
        let stride = 3 * self.size[0] * self.size[1];
        let mut images = Images::zeros([indices.len(), 3, self.size[0], self.size[1]]);
        for (target, &index) in images.data_mut().chunks_exact_mut(stride.max(1)).zip(indices) {
            let source = &self.bytes[index * stride..(index + 1) * stride];
            for (value, &byte) in target.iter_mut().zip(source) {
                *value = f32::from(byte) / 255.0;
            }
        }
        images
    }
}
