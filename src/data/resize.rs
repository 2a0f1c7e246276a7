//! Bilinear resizing with the arithmetic of Pillow, so that accuracies compare with PyTorch's.
//!
//! Pillow's bilinear filter is a triangle whose support grows with the reduction (it averages when
//! shrinking), applied along rows and then along columns; each pass works on integers (22-bit
//! weights) and rounds to 8 bits. Checked byte for byte against Pillow 12 (tests/it/data.rs).

use super::decode::Picture;

/// Bits of the integer weights: 8-bit sample, 2 bits of head room, in 32.
const WEIGHT_BITS: u32 = 32 - 8 - 2;

/// The source samples of one output sample: first index and weights.
struct Window {
    first: usize,
    weights: Vec<i32>,
}

/// `picture` at `height` x `width`; unchanged when it has that size already.
#[must_use]
pub fn resize_bilinear(picture: Picture, height: usize, width: usize) -> Picture {
    let mut picture = picture;
    if picture.width != width {
        picture = resize_rows(&picture, width);
    }
    if picture.height != height {
        picture = resize_columns(&picture, height);
    }
    picture
}

fn resize_rows(picture: &Picture, width: usize) -> Picture {
    let windows = triangle_windows(picture.width, width);
    let mut rgb = vec![0; picture.height * width * 3];
    let rows = picture.rgb.chunks_exact(picture.width * 3);
    for (source, target) in rows.zip(rgb.chunks_exact_mut(width * 3)) {
        for (pixel, window) in target.chunks_exact_mut(3).zip(&windows) {
            let samples = source[window.first * 3..].chunks_exact(3);
            for (channel, value) in pixel.iter_mut().enumerate() {
                *value = weigh(&window.weights, samples.clone().map(|sample| sample[channel]));
            }
        }
    }
    Picture { width, height: picture.height, rgb }
}

fn resize_columns(picture: &Picture, height: usize) -> Picture {
    let stride = picture.width * 3;
    let mut rgb = vec![0; height * stride];
    let windows = triangle_windows(picture.height, height);
    for (target, window) in rgb.chunks_exact_mut(stride.max(1)).zip(&windows) {
        let rows = picture.rgb[window.first * stride..].chunks_exact(stride.max(1));
        for (column, value) in target.iter_mut().enumerate() {
            *value = weigh(&window.weights, rows.clone().map(|row| row[column]));
        }
    }
    Picture { width: picture.width, height, rgb }
}

fn weigh(weights: &[i32], samples: impl Iterator<Item = u8>) -> u8 {
    let half = 1 << (WEIGHT_BITS - 1);
    let sum: i32 = weights.iter().zip(samples).map(|(weight, s)| weight * i32::from(s)).sum();
    ((sum + half) >> WEIGHT_BITS).clamp(0, 255) as u8
}

/// For each of `to` output samples, the normalised triangle over the `from` input samples.
fn triangle_windows(from: usize, to: usize) -> Vec<Window> {
    let scale = from as f64 / to as f64;
    let support = scale.max(1.0);
    let inverse = 1.0 / support;
    (0..to)
        .map(|index| {
            let center = (index as f64 + 0.5) * scale;
            let first = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(from);
            let raw: Vec<f64> = (first..end)
                .map(|at| (1.0 - ((at as f64 - center + 0.5) * inverse).abs()).max(0.0))
                .collect();
            let norm = 1.0 / raw.iter().sum::<f64>();
            let unit = f64::from(1u32 << WEIGHT_BITS);
            let weights = raw.iter().map(|w| (w * norm * unit + 0.5) as i32).collect();
            Window { first, weights }
        })
        .collect()
}
