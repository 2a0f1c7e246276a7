//! A batch of images in the canonical space that every method works in: `[0, 1]`, RGB, NCHW.

use crate::error::{Error, Result};

/// A batch of images, `f32`, row-major NCHW. Canonical images have 3 channels (RGB) in `[0, 1]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Images {
    data: Vec<f32>,
    shape: [usize; 4],
}

impl Images {
    /// A batch from its values; `shape` is `[n, channels, height, width]`.
    ///
    /// # Errors
    /// When `data` does not hold exactly the product of `shape`.
    pub fn new(data: Vec<f32>, shape: [usize; 4]) -> Result<Self> {
        let expected: usize = shape.iter().product();
        if data.len() != expected {
            return Err(Error::internal(format!(
                "image batch {shape:?} needs {expected} values, got `{}`",
                data.len()
            )));
        }
        Ok(Self { data, shape })
    }

    /// A batch of zeros.
    pub fn zeros(shape: [usize; 4]) -> Self {
        Self { data: vec![0.0; shape.iter().product()], shape }
    }

    /// `[n, channels, height, width]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.shape[0]
    }

    /// No image at all.
    pub fn is_empty(&self) -> bool {
        self.shape[0] == 0
    }

    /// Values per image.
    pub fn stride(&self) -> usize {
        self.shape[1] * self.shape[2] * self.shape[3]
    }

    /// All values.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// All values, to change in place.
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// The values, consuming the batch.
    pub fn into_data(self) -> Vec<f32> {
        self.data
    }

    /// One image's values `[channels, height, width]`.
    pub fn image(&self, index: usize) -> &[f32] {
        let stride = self.stride();
        &self.data[index * stride..(index + 1) * stride]
    }

    /// A new batch of the images at `indices`, in that order.
    pub fn select(&self, indices: &[usize]) -> Self {
        let mut data = Vec::with_capacity(indices.len() * self.stride());
        for &index in indices {
            data.extend_from_slice(self.image(index));
        }
        let [_, c, h, w] = self.shape;
        Self { data, shape: [indices.len(), c, h, w] }
    }

    /// The images `start..end` as a new batch.
    pub fn range(&self, start: usize, end: usize) -> Self {
        let stride = self.stride();
        let [_, c, h, w] = self.shape;
        Self {
            data: self.data[start * stride..end * stride].to_vec(),
            shape: [end - start, c, h, w],
        }
    }

    /// Appends the images of `other`, which must have the same channels and size.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn extend(&mut self, other: &Self) -> Result<()> {
        if self.shape[1..] != other.shape[1..] {
            return Err(Error::internal(format!(
                "cannot join images of {:?} and `{:?}`",
                &self.shape[1..],
                &other.shape[1..]
            )));
        }
        self.data.extend_from_slice(&other.data);
        self.shape[0] += other.shape[0];
        Ok(())
    }
}
