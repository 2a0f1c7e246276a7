//! From canonical images ([0,1], RGB, NCHW, any size) to a model's own input, and back for gradients.
//!
//! One linear map per [`Preprocess`]: crop and resize (bilinear, antialiased when shrinking, as Pillow
//! does), mix the colour channels, scale to `value_range`, subtract `mean`, divide by `std`, lay out the
//! axes; then the rounding of the element type. [`Adapter::backward`] is the exact transpose of the
//! linear part, built from the same weights; rounding is passed straight through. White-box, black-box
//! and remote teachers share it, so an image means the same to each.

use std::borrow::Cow;
use std::ops::Range;

use half::f16;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::tensor::Images;
#[cfg(any(feature = "cuda", test))]
use crate::tensor::cuda;
use crate::zoo::{Color, ElementType, Layout, Preprocess};

/// Share of red, green and blue in grey (ITU-R BT.601, what Pillow's `convert("L")` uses).
const GREY: [f32; 3] = [0.299, 0.587, 0.114];

/// Channels of a canonical image.
const CANONICAL_CHANNELS: usize = 3;

/// What one channel of the model's input takes from the canonical channels.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Channel {
    /// One canonical channel, by index.
    One(usize),
    /// All three, weighted by [`GREY`].
    Grey,
}

/// The map from canonical images to the input of one model.
#[derive(Debug, Clone)]
pub struct Adapter {
    height: usize,
    width: usize,
    layout: Layout,
    dtype: ElementType,
    crop: f64,
    channels: Vec<Channel>,
    /// Input value = `scale * canonical + offset`, per channel.
    scale: Vec<f32>,
    offset: Vec<f32>,
}

impl Adapter {
    /// The map that `preprocess` describes. `mean` and `std` hold one value a channel (in the model's
    /// own channel order), one for all, or none (0 and 1).
    ///
    /// # Errors
    /// When the fields contradict each other (channel count against colour, a zero `std`, a crop
    /// outside `0..=1`).
    pub fn new(preprocess: &Preprocess) -> Result<Self> {
        let [count, height, width] = preprocess.input_size;
        let channels = match (preprocess.color, count) {
            (Color::Rgb, 3) => vec![Channel::One(0), Channel::One(1), Channel::One(2)],
            (Color::Bgr, 3) => vec![Channel::One(2), Channel::One(1), Channel::One(0)],
            (Color::Grey, 1) => vec![Channel::Grey],
            (color, _) => {
                return Err(Error::input(format!(
                    "color {color:?} cannot fill `{count}` channels"
                ))
                .hint("set `preprocess.color` to grey for 1 channel, rgb or bgr for 3"));
            }
        };
        if height == 0 || width == 0 {
            return Err(Error::input(format!("input size is empty `{height}x{width}`")));
        }
        let crop = f64::from(preprocess.crop_pct);
        if !(crop > 0.0 && crop <= 1.0) {
            return Err(Error::input(format!("crop_pct is not in (0, 1] `{crop}`")));
        }
        let [low, high] = preprocess.value_range;
        let mean = per_channel("mean", &preprocess.mean, count, 0.0)?;
        let std = per_channel("std", &preprocess.std, count, 1.0)?;
        if let Some(bad) = std.iter().find(|value| !value.is_normal()) {
            return Err(Error::input(format!("std holds a value that cannot divide `{bad}`")));
        }
        if !(low.is_finite() && high.is_finite()) || low == high {
            return Err(Error::input(format!("value_range is empty `[{low}, {high}]`")));
        }
        Ok(Self {
            height,
            width,
            layout: preprocess.layout,
            dtype: preprocess.dtype,
            crop,
            channels,
            scale: std.iter().map(|std| (high - low) / std).collect(),
            offset: mean.iter().zip(&std).map(|(mean, std)| (low - mean) / std).collect(),
        })
    }

    /// Shape of the model's input for `n` images, in the model's own axis order.
    pub fn input_shape(&self, n: usize) -> [usize; 4] {
        let (c, h, w) = (self.channels.len(), self.height, self.width);
        match self.layout {
            Layout::Nchw => [n, c, h, w],
            Layout::Nhwc => [n, h, w, c],
        }
    }

    /// Element type of the model's input.
    pub fn dtype(&self) -> ElementType {
        self.dtype
    }

    /// The smallest change of a canonical value that the input can tell apart: 0 for float inputs, one
    /// level for `uint8`.
    pub fn quantum(&self) -> f32 {
        match self.dtype {
            ElementType::Uint8 => {
                self.scale.iter().map(|scale| scale.abs().recip()).fold(0.0, f32::max)
            }
            _ => 0.0,
        }
    }

    /// Input values of `images` in the order of [`Adapter::input_shape`], already rounded to what the
    /// element type can hold (`uint8`: nearest, kept in 0..=255) but stored as `f32`.
    ///
    /// # Errors
    /// When the images are not canonical (3 channels, at least one pixel).
    pub fn forward(&self, images: &Images) -> Result<Vec<f32>> {
        self.forward_part(images, 0..images.len())
    }

    /// As [`Adapter::forward`], of the images at `part` alone.
    ///
    /// # Errors
    /// As [`Adapter::forward`].
    pub fn forward_part(&self, images: &Images, part: Range<usize>) -> Result<Vec<f32>> {
        let mut input = vec![0.0; part.len() * self.stride()];
        self.forward_into(images, part, &mut input)?;
        Ok(input)
    }

    /// As [`Adapter::forward_part`], into `input`; what it holds beyond those images is filled with the last of them.
    ///
    /// # Errors
    /// As [`Adapter::forward`], and when there are no such images, or `input` has no room for them or not for whole ones.
    pub fn forward_into(
        &self,
        images: &Images,
        part: Range<usize>,
        input: &mut [f32],
    ) -> Result<()> {
        let resize = self.resize(images.shape())?;
        let count = part.len() * self.stride();
        if part.is_empty() && input.is_empty() {
            return Ok(());
        }
        let whole = input.len() >= count && input.len().is_multiple_of(self.stride());
        if part.is_empty() || !whole || part.end > images.len() {
            let found = input.len();
            let text = format!("images `{part:?}` of {} for {found} input values", images.len());
            return Err(Error::internal(text));
        }
        let (own, rest) = input.split_at_mut(count);
        // One loop each, so that the compiler makes vectors of it.
        match self.dtype {
            ElementType::Uint8 => {
                self.map(images, part, &resize, own, |x| x.round().clamp(0.0, 255.0));
            }
            ElementType::Float16 => {
                self.map(images, part, &resize, own, |x| f16::from_f32(x).to_f32());
            }
            ElementType::Float32 | ElementType::Float64 => {
                self.map(images, part, &resize, own, |x| x);
            }
        }
        let last = &own[count - self.stride()..];
        rest.chunks_exact_mut(self.stride()).for_each(|to| to.copy_from_slice(last));
        Ok(())
    }

    fn map(
        &self,
        images: &Images,
        part: Range<usize>,
        resize: &Resize,
        out: &mut [f32],
        round: impl Fn(f32) -> f32 + Sync,
    ) {
        let pixels = self.height * self.width;
        let (channel_step, pixel_step) = self.steps();
        out.par_chunks_exact_mut(self.stride()).zip(part).for_each(|(target, index)| {
            let mut rows = Vec::new();
            let mut resized = vec![0.0; if resize.is_identity() { 0 } else { pixels }];
            let image = images.image(index);
            for (channel, &mix) in self.channels.iter().enumerate() {
                let mixed = mixed(image, mix);
                let plane = if resize.is_identity() {
                    &mixed
                } else {
                    resize.forward(&mixed, &mut rows, &mut resized);
                    resized.as_slice()
                };
                let (scale, offset) = (self.scale[channel], self.offset[channel]);
                let target = &mut target[channel * channel_step..];
                let values = plane.iter().map(|&x| round(scale * x + offset));
                if pixel_step == 1 {
                    target.iter_mut().zip(values).for_each(|(out, value)| *out = value);
                } else {
                    let target = target.iter_mut().step_by(pixel_step);
                    target.zip(values).for_each(|(out, value)| *out = value);
                }
            }
        });
    }

    /// Values of one image's input.
    fn stride(&self) -> usize {
        self.channels.len() * self.height * self.width
    }

    /// Gradient to the canonical images (`image_shape` = `[n, 3, height, width]`) from the gradient to
    /// the model's input, in the order of [`Adapter::input_shape`].
    ///
    /// # Errors
    /// When `d_input` does not hold the gradient of `n` inputs, or the images are not canonical.
    pub fn backward(&self, d_input: &[f32], image_shape: [usize; 4]) -> Result<Images> {
        let mut images = Images::zeros(image_shape);
        self.backward_into(d_input, image_shape, images.data_mut())?;
        Ok(images)
    }

    /// As [`Adapter::backward`], added to `d_images`.
    ///
    /// # Errors
    /// As [`Adapter::backward`].
    pub fn backward_into(
        &self,
        d_input: &[f32],
        image_shape: [usize; 4],
        d_images: &mut [f32],
    ) -> Result<()> {
        let resize = self.resize(image_shape)?;
        let [n, channels, h, w] = image_shape;
        let stride = channels * h * w;
        if d_input.len() != n * self.stride() || d_images.len() != n * stride {
            return Err(Error::internal(format!(
                "gradient of `{}` values for inputs of shape {:?}",
                d_input.len(),
                self.input_shape(n)
            )));
        }
        let (channel_step, pixel_step) = self.steps();
        let each = |(source, target): (&[f32], &mut [f32])| {
            let mut rows = Vec::new();
            let mut plane = vec![0.0; self.height * self.width];
            let mut d_mixed = vec![0.0; if resize.is_identity() { 0 } else { h * w }];
            for (channel, &mix) in self.channels.iter().enumerate() {
                let scale = self.scale[channel];
                let values = source[channel * channel_step..].iter().step_by(pixel_step);
                for (x, &value) in plane.iter_mut().zip(values) {
                    *x = scale * value;
                }
                let d_mixed = if resize.is_identity() {
                    &plane
                } else {
                    resize.backward(&plane, &mut rows, &mut d_mixed);
                    &d_mixed
                };
                for (index, weight) in shares(mix) {
                    let plane = &mut target[index * h * w..(index + 1) * h * w];
                    plane.iter_mut().zip(d_mixed).for_each(|(out, &d)| *out += weight * d);
                }
            }
        };
        d_input
            .par_chunks_exact(self.stride())
            .zip(d_images.par_chunks_exact_mut(stride))
            .for_each(each);
        Ok(())
    }

    /// The same map for kernels that compute it on a device; `None` where its rounding is not there.
    #[cfg(any(feature = "cuda", test))]
    pub(super) fn input_map(&self, [height, width]: [usize; 2]) -> Option<cuda::InputMap> {
        let taps = |axis: Axis| cuda::AxisTaps {
            from: axis.from,
            starts: axis.starts,
            ends: axis.ends,
            weights: axis.weights,
        };
        let mix = |channel: &Channel| {
            let mut mix = [0.0; CANONICAL_CHANNELS];
            shares(*channel).for_each(|(index, weight)| mix[index] = weight);
            mix
        };
        let (channel_step, pixel_step) = self.steps();
        (self.dtype != ElementType::Float16).then(|| cuda::InputMap {
            vertical: taps(Axis::new(height, self.height, self.crop)),
            horizontal: taps(Axis::new(width, self.width, self.crop)),
            mix: self.channels.iter().map(mix).collect(),
            scale: self.scale.clone(),
            offset: self.offset.clone(),
            steps: [channel_step, pixel_step],
            bytes: self.dtype == ElementType::Uint8,
        })
    }

    /// Distance in the input between two channels and between two pixels of one image.
    fn steps(&self) -> (usize, usize) {
        match self.layout {
            Layout::Nchw => (self.height * self.width, 1),
            Layout::Nhwc => (1, self.channels.len()),
        }
    }

    fn resize(&self, image_shape: [usize; 4]) -> Result<Resize> {
        let [_, channels, height, width] = image_shape;
        if channels != CANONICAL_CHANNELS || height == 0 || width == 0 {
            return Err(Error::internal(format!(
                "canonical images have 3 channels and pixels, got `{image_shape:?}`"
            )));
        }
        Ok(Resize {
            vertical: Axis::new(height, self.height, self.crop),
            horizontal: Axis::new(width, self.width, self.crop),
        })
    }
}

/// `values` spread over `count` channels.
fn per_channel(field: &str, values: &[f32], count: usize, default: f32) -> Result<Vec<f32>> {
    if let Some(bad) = values.iter().find(|value| !value.is_finite()) {
        return Err(Error::input(format!("{field} holds a value that is not finite `{bad}`")));
    }
    match *values {
        [] => Ok(vec![default; count]),
        [one] => Ok(vec![one; count]),
        _ if values.len() == count => Ok(values.to_vec()),
        _ => Err(Error::input(format!(
            "{field} needs {count} values, one a channel, got `{values:?}`"
        ))),
    }
}

/// The canonical channels that make up `mix`, with their weights.
fn shares(mix: Channel) -> impl Iterator<Item = (usize, f32)> {
    let weights = match mix {
        Channel::Grey => GREY,
        Channel::One(index) => std::array::from_fn(|i| f32::from(i == index)),
    };
    weights.into_iter().enumerate().filter(|&(_, weight)| weight != 0.0)
}

/// The plane of `image` that `mix` asks for.
fn mixed(image: &[f32], mix: Channel) -> Cow<'_, [f32]> {
    let pixels = image.len() / CANONICAL_CHANNELS;
    match mix {
        Channel::One(index) => Cow::Borrowed(&image[index * pixels..(index + 1) * pixels]),
        Channel::Grey => Cow::Owned(
            (0..pixels)
                .map(|i| {
                    GREY[0] * image[i]
                        + GREY[1] * image[pixels + i]
                        + GREY[2] * image[2 * pixels + i]
                })
                .collect(),
        ),
    }
}

/// A separable resize of one plane.
struct Resize {
    vertical: Axis,
    horizontal: Axis,
}

impl Resize {
    /// Whether nothing is cropped and the size stays.
    fn is_identity(&self) -> bool {
        self.vertical.identity && self.horizontal.identity
    }

    /// Resizes `plane` into `out`: columns first, then rows; `rows` is scratch.
    fn forward(&self, plane: &[f32], rows: &mut Vec<f32>, out: &mut [f32]) {
        let (from, to) = (self.horizontal.from, self.horizontal.to());
        rows.clear();
        for row in plane.chunks_exact(from) {
            rows.extend((0..to).map(|x| {
                let (start, weights) = self.horizontal.taps(x);
                row[start..].iter().zip(weights).map(|(value, weight)| value * weight).sum::<f32>()
            }));
        }
        out.fill(0.0);
        for (y, target) in out.chunks_exact_mut(to).enumerate() {
            let (start, weights) = self.vertical.taps(y);
            for (row, &weight) in rows[start * to..].chunks_exact(to).zip(weights) {
                target.iter_mut().zip(row).for_each(|(out, value)| *out += weight * value);
            }
        }
    }

    /// The transpose of [`Resize::forward`]: `d_plane` is overwritten.
    fn backward(&self, d_out: &[f32], rows: &mut Vec<f32>, d_plane: &mut [f32]) {
        let (from, to) = (self.horizontal.from, self.horizontal.to());
        rows.clear();
        rows.resize(self.vertical.from * to, 0.0);
        for (y, source) in d_out.chunks_exact(to).enumerate() {
            let (start, weights) = self.vertical.taps(y);
            for (row, &weight) in rows[start * to..].chunks_exact_mut(to).zip(weights) {
                row.iter_mut().zip(source).for_each(|(out, value)| *out += weight * value);
            }
        }
        d_plane.fill(0.0);
        for (row, source) in d_plane.chunks_exact_mut(from).zip(rows.chunks_exact(to)) {
            for (x, &value) in source.iter().enumerate() {
                let (start, weights) = self.horizontal.taps(x);
                row[start..]
                    .iter_mut()
                    .zip(weights)
                    .for_each(|(out, weight)| *out += weight * value);
            }
        }
    }
}

/// Which old values, with which weights, make each new value along one axis.
struct Axis {
    from: usize,
    /// Every old value is its new one.
    identity: bool,
    starts: Vec<usize>,
    /// Weights of output `i` are `weights[ends[i - 1]..ends[i]]`.
    ends: Vec<usize>,
    weights: Vec<f32>,
}

impl Axis {
    /// Bilinear taps from the middle `crop` of `from` values to `to` values. When shrinking, the
    /// triangle widens by the factor, so that every old value counts (no aliasing).
    fn new(from: usize, to: usize, crop: f64) -> Self {
        let kept = from as f64 * crop;
        let low = (from as f64 - kept) / 2.0;
        let step = kept / to as f64;
        let reach = step.max(1.0);
        let identity = from == to && kept == from as f64;
        let (starts, ends, weights) = (Vec::new(), Vec::new(), Vec::new());
        let mut axis = Self { from, identity, starts, ends, weights };
        for i in 0..to {
            let center = low + (i as f64 + 0.5) * step;
            let start = ((center - reach + 0.5).floor().max(0.0) as usize).min(from - 1);
            let end = ((center + reach + 0.5).floor() as usize).clamp(start + 1, from);
            let taps: Vec<f64> = (start..end)
                .map(|old| (1.0 - ((old as f64 + 0.5 - center) / reach).abs()).max(0.0))
                .collect();
            let total: f64 = taps.iter().sum();
            axis.starts.push(start);
            axis.weights.extend(taps.iter().map(|tap| (tap / total) as f32));
            axis.ends.push(axis.weights.len());
        }
        axis
    }

    fn to(&self) -> usize {
        self.starts.len()
    }

    /// First old value and the weights for new value `i`.
    fn taps(&self, i: usize) -> (usize, &[f32]) {
        let begin = if i == 0 { 0 } else { self.ends[i - 1] };
        (self.starts[i], &self.weights[begin..self.ends[i]])
    }
}

#[cfg(test)]
mod tests;
