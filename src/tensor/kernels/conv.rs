//! 2-D convolution: forward, gradient to the input, gradient to the weights. NCHW, groups, any
//! stride, dilation and (asymmetric) padding.
//!
//! Kernels 3x3 of stride 1 over many channels go to `winograd`, other kernels of stride 1 to `direct`, depthwise layers to `depthwise`,
//! 1x1 of stride 1 to `pointwise`; the rest is lowered to matrix products over
//! tiles of output rows whose patch matrix stays in the second-level cache. Images, and planes of depthwise layers, are split over rayon's threads; no sum is split
//! by thread count, so results do not depend on it.

use rayon::prelude::*;

use super::gemm::{MatrixRef, gemm};
use super::patches::{RowRun, col2im, im2col, rows_per_tile, tiles};
use super::product::{self, Left, Output, Sizes, Start};
use super::vector::Level;
use super::winograd::Filters;
use super::{Element, scratch};
use super::{depthwise, direct, pointwise, weight_gradient, winograd};

/// Images per partial sum of the weight gradient; fixed so that the sum's order is fixed.
const WEIGHT_GRADIENT_IMAGES: usize = 8;

/// The sizes of one convolution. All are in elements; pads are `[top, left, bottom, right]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv2dGeometry {
    /// Images.
    pub batch: usize,
    /// Input channels (all groups).
    pub in_channels: usize,
    /// Input height and width.
    pub input: [usize; 2],
    /// Output channels (all groups).
    pub out_channels: usize,
    /// Kernel height and width.
    pub kernel: [usize; 2],
    /// Stride down and right.
    pub stride: [usize; 2],
    /// Dilation down and right.
    pub dilation: [usize; 2],
    /// Zero padding `[top, left, bottom, right]`.
    pub pads: [usize; 4],
    /// Groups; divides both channel counts.
    pub groups: usize,
}

impl Conv2dGeometry {
    /// Output height and width (0 where the padded input is smaller than the dilated kernel).
    pub fn output(&self) -> [usize; 2] {
        let size = |axis: usize| {
            let padded = self.input[axis] + self.pads[axis] + self.pads[axis + 2];
            let reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1;
            if padded < reach { 0 } else { (padded - reach) / self.stride[axis] + 1 }
        };
        [size(0), size(1)]
    }

    /// Input values of one image.
    pub fn input_stride(&self) -> usize {
        self.in_channels * self.input[0] * self.input[1]
    }

    /// Output values of one image.
    pub fn output_stride(&self) -> usize {
        let [h, w] = self.output();
        self.out_channels * h * w
    }

    /// Number of weights.
    pub fn weights(&self) -> usize {
        self.out_channels * self.patch()
    }

    /// Weights per output channel: rows of the patch matrix of one group.
    pub(super) fn patch(&self) -> usize {
        self.in_channels / self.groups * self.kernel[0] * self.kernel[1]
    }

    fn is_depthwise(&self) -> bool {
        self.groups > 1 && self.groups == self.in_channels && self.groups == self.out_channels
    }

    /// The convolution that maps an output gradient to the input gradient with rotated weights;
    /// exists for stride 1 when no pad exceeds the kernel's reach.
    pub(super) fn backward_as_forward(&self) -> Option<Self> {
        if self.stride != [1, 1] {
            return None;
        }
        let reach = [0, 1].map(|axis| self.dilation[axis] * (self.kernel[axis] - 1));
        let mut pads = [0; 4];
        for (side, pad) in pads.iter_mut().enumerate() {
            *pad = reach[side % 2].checked_sub(self.pads[side])?;
        }
        let reversed = Self {
            in_channels: self.out_channels,
            input: self.output(),
            out_channels: self.in_channels,
            pads,
            ..*self
        };
        (reversed.output() == self.input).then_some(reversed)
    }
}

/// How many images one task takes: all threads busy, tiles of small images still wide.
fn images_per_task(batch: usize) -> usize {
    batch.div_ceil(4 * rayon::current_num_threads()).clamp(1, 16)
}

/// `y = conv(x, w) + bias`; `x` [N,C,H,W], `w` [O,C/groups,kh,kw], `bias` [O], `y` [N,O,Ho,Wo].
///
/// # Panics
/// When a slice does not have the size the geometry says (a defect of the caller).
pub fn conv2d<T: Element>(g: &Conv2dGeometry, x: &[T], w: &[T], bias: Option<&[T]>, y: &mut [T]) {
    let (input, output) = (g.input_stride(), g.output_stride());
    assert_eq!(x.len(), g.batch * input, "conv2d: input size");
    assert_eq!(w.len(), g.weights(), "conv2d: weight size");
    assert_eq!(y.len(), g.batch * output, "conv2d: output size");
    if y.is_empty() {
        return;
    }
    if input == 0 || w.is_empty() {
        y.fill(T::ZERO);
        return;
    }
    if winograd_2d(g, x, (w, Filters::Stored), bias, y, false) {
        return;
    }
    if T::as_f32(w).is_some() && pointwise::serves(g) {
        pointwise::forward(g, x, w, bias, y);
        return;
    }
    if g.is_depthwise() {
        depthwise::forward(g, x, w, bias, y);
        return;
    }
    let images = images_per_task(g.batch);
    let weights = MatrixRef::rows(w, g.patch());
    Left::with(patches_level(g), weights, [g.out_channels, g.patch()], |left| {
        y.par_chunks_mut(images * output)
            .zip(x.par_chunks(images * input))
            .for_each(|(y, x)| forward_images(g, x, (w, left), bias, y));
    });
}

/// How the products with patch matrices are computed: one answer for all tiles.
fn patches_level(g: &Conv2dGeometry) -> product::Level {
    let [height, width] = g.output();
    let n = rows_per_tile(g).min(height) * width;
    if g.groups > 1 || Level::detected().is_some_and(|_| direct::serves(g)) {
        return product::Level::Vectors;
    }
    product::Level::of(Sizes { m: g.out_channels, n, k: g.patch() })
}

/// The fast way of a 3x3 convolution, where the element type and the processor have it.
fn winograd_2d<T: Element>(
    g: &Conv2dGeometry,
    x: &[T],
    (w, filters): (&[T], Filters),
    bias: Option<&[T]>,
    y: &mut [T],
    accumulate: bool,
) -> bool {
    let Some(level) = Level::detected().filter(|_| winograd::serves(g)) else { return false };
    let (Some(x), Some(w)) = (T::as_f32(x), T::as_f32(w)) else { return false };
    let Some(y) = T::as_f32_mut(y) else { return false };
    winograd::forward(level, g, x, (w, filters), bias.and_then(T::as_f32), y, accumulate);
    true
}

fn forward_images<T: Element>(
    g: &Conv2dGeometry,
    x: &[T],
    (w, left): (&[T], &Left<'_, T>),
    bias: Option<&[T]>,
    y: &mut [T],
) {
    if let Some(level) = Level::detected()
        && direct::serves(g)
        && let (Some(x), Some(w)) = (T::as_f32(x), T::as_f32(w))
        && let Some(y) = T::as_f32_mut(y)
    {
        direct::forward(level, g, x, w, bias.and_then(T::as_f32), y);
        return;
    }
    let images = x.len() / g.input_stride();
    let [height, width] = g.output();
    let plane = height * width;
    let (in_group, out_group, patch) =
        (g.in_channels / g.groups, g.out_channels / g.groups, g.patch());
    match bias {
        Some(bias) => {
            for (channel, row) in y.chunks_exact_mut(plane).enumerate() {
                row.fill(bias[channel % g.out_channels]);
            }
        }
        None => y.fill(T::ZERO),
    }
    let direct = g.kernel == [1, 1] && g.stride == [1, 1] && g.pads == [0; 4] && plane >= 64;
    for tile in tiles(images, height, rows_per_tile(g)) {
        let columns: usize = tile.iter().map(|run| run.count * width).sum();
        for group in 0..g.groups {
            let w = &w[group * out_group * patch..(group + 1) * out_group * patch];
            let w = MatrixRef::rows(w, patch);
            let times = |n: usize, b: MatrixRef<'_, T>, c: Output<'_, T>| {
                if g.groups == 1 {
                    left.times(n, b, c);
                } else {
                    gemm(out_group, n, patch, w, b, c.data, c.row_stride, c.start == Start::Result);
                }
            };
            if direct {
                for run in &tile {
                    let start = run.first * width;
                    let from = run.image * g.input_stride() + group * in_group * plane + start;
                    let to = run.image * g.output_stride() + group * out_group * plane + start;
                    let n = run.count * width;
                    let b = MatrixRef::rows(&x[from..from + (in_group - 1) * plane + n], plane);
                    let data = &mut y[to..];
                    times(n, b, Output { data, row_stride: plane, start: Start::Result });
                }
                continue;
            }
            scratch::with(patch * columns, |col: &mut [T]| {
                im2col(g, x, group, &tile, columns, col);
                let b = MatrixRef::rows(col, columns);
                if let [run] = tile[..] {
                    let to = run.image * g.output_stride()
                        + group * out_group * plane
                        + run.first * width;
                    let data = &mut y[to..];
                    times(columns, b, Output { data, row_stride: plane, start: Start::Result });
                } else {
                    scratch::with(out_group * columns, |product: &mut [T]| {
                        let data = &mut *product;
                        times(
                            columns,
                            b,
                            Output { data, row_stride: columns, start: Start::Nothing },
                        );
                        for (i, run) in tile.iter().enumerate() {
                            for channel in 0..out_group {
                                let from = channel * columns + i * plane;
                                let to = run.image * g.output_stride()
                                    + (group * out_group + channel) * plane;
                                let product = &product[from..from + plane];
                                for (y, &p) in y[to..to + plane].iter_mut().zip(product) {
                                    *y += p;
                                }
                            }
                        }
                    });
                }
            });
        }
    }
}

/// For output column `ox` and kernel column offset: the range of `ox` that reads inside the input.
pub(super) fn valid_columns(g: &Conv2dGeometry, kx: usize, width: usize) -> (usize, usize) {
    let offset = kx * g.dilation[1];
    let low = g.pads[1].saturating_sub(offset).div_ceil(g.stride[1]).min(width);
    let limit = (g.input[1] + g.pads[1]).saturating_sub(offset);
    let high = if limit == 0 { 0 } else { ((limit - 1) / g.stride[1] + 1).min(width) };
    (low, high.max(low))
}

/// The input row that output row `oy` reads at kernel row `ky`, if inside.
pub(super) fn input_row(g: &Conv2dGeometry, oy: usize, ky: usize) -> Option<usize> {
    (oy * g.stride[0] + ky * g.dilation[0]).checked_sub(g.pads[0]).filter(|&iy| iy < g.input[0])
}

/// Rotated, transposed weights: `[C, O/groups, kh, kw]` grouped, from `[O, C/groups, kh, kw]`.
fn rotated_weights<T: Element>(g: &Conv2dGeometry, w: &[T], rotated: &mut [T]) {
    let (in_group, out_group) = (g.in_channels / g.groups, g.out_channels / g.groups);
    let taps = g.kernel[0] * g.kernel[1];
    for group in 0..g.groups {
        for o in 0..out_group {
            for c in 0..in_group {
                let from = ((group * out_group + o) * in_group + c) * taps;
                let to = ((group * in_group + c) * out_group + o) * taps;
                for tap in 0..taps {
                    rotated[to + taps - 1 - tap] = w[from + tap];
                }
            }
        }
    }
}

/// `dx = gradient to the input` from `dy` [N,O,Ho,Wo]; adds to `dx` when `accumulate`.
///
/// # Panics
/// When a slice does not have the size the geometry says (a defect of the caller).
pub fn conv2d_input_gradient<T: Element>(
    g: &Conv2dGeometry,
    dy: &[T],
    w: &[T],
    dx: &mut [T],
    accumulate: bool,
) {
    let (input, output) = (g.input_stride(), g.output_stride());
    assert_eq!(dx.len(), g.batch * input, "conv2d_input_gradient: input size");
    assert_eq!(dy.len(), g.batch * output, "conv2d_input_gradient: output size");
    if dx.is_empty() || dy.is_empty() {
        if !accumulate {
            dx.fill(T::ZERO);
        }
        return;
    }
    if T::as_f32(w).is_some() && pointwise::serves(g) {
        pointwise::input_gradient(g, dy, w, dx, accumulate);
        return;
    }
    let reversed = g.backward_as_forward().filter(|_| !g.is_depthwise());
    if let Some(reversed) = &reversed
        && winograd_2d(reversed, dy, (w, Filters::Reversed), None, dx, accumulate)
    {
        return;
    }
    // The way forward writes all it makes; the others add.
    if !accumulate && reversed.is_none() {
        dx.fill(T::ZERO);
    }
    if g.is_depthwise() {
        depthwise::input_gradient(g, dy, w, dx);
        return;
    }
    let images = images_per_task(g.batch);
    let tasks = dx.par_chunks_mut(images * input).zip(dy.par_chunks(images * output));
    if let Some(reversed) = reversed {
        let mut rotated = vec![T::ZERO; w.len()];
        rotated_weights(g, w, &mut rotated);
        let sizes = [reversed.out_channels, reversed.patch()];
        let weights = MatrixRef::rows(&rotated, reversed.patch());
        Left::with(patches_level(&reversed), weights, sizes, |left| {
            tasks.for_each(|(dx, dy)| {
                if !accumulate {
                    forward_images(&reversed, dy, (&rotated, left), None, dx);
                    return;
                }
                scratch::with(dx.len(), |fresh: &mut [T]| {
                    forward_images(&reversed, dy, (&rotated, left), None, fresh);
                    for (dx, &f) in dx.iter_mut().zip(&*fresh) {
                        *dx += f;
                    }
                });
            });
        });
        return;
    }
    let (rows, columns) = (g.patch(), rows_per_tile(g).min(g.output()[0]) * g.output()[1]);
    let level = match g.groups {
        1 => product::Level::of(Sizes { m: rows, n: columns, k: g.out_channels }),
        _ => product::Level::Vectors,
    };
    let weights = MatrixRef::transposed(w, rows);
    Left::with(level, weights, [rows, g.out_channels], |left| {
        tasks.for_each(|(dx, dy)| {
            for (dx, dy) in dx.chunks_exact_mut(input).zip(dy.chunks_exact(output)) {
                input_gradient_by_patches(g, dy, (w, left), dx);
            }
        });
    });
}

fn input_gradient_by_patches<T: Element>(
    g: &Conv2dGeometry,
    dy: &[T],
    (w, left): (&[T], &Left<'_, T>),
    dx: &mut [T],
) {
    let [height, width] = g.output();
    let plane = height * width;
    let (out_group, patch) = (g.out_channels / g.groups, g.patch());
    for tile in tiles(1, height, rows_per_tile(g).min(height)) {
        for run in tile {
            let columns = run.count * width;
            for group in 0..g.groups {
                let w = &w[group * out_group * patch..(group + 1) * out_group * patch];
                let from = group * out_group * plane + run.first * width;
                let dy = MatrixRef::rows(&dy[from..], plane);
                scratch::with(patch * columns, |col: &mut [T]| {
                    let w = MatrixRef::transposed(w, patch);
                    if g.groups == 1 {
                        let data = &mut *col;
                        let c = Output { data, row_stride: columns, start: Start::Nothing };
                        left.times(columns, dy, c);
                    } else {
                        gemm(patch, columns, out_group, w, dy, col, columns, false);
                    }
                    col2im(g, col, group, run, dx);
                });
            }
        }
    }
}

/// `dw = gradient to the weights` from `x` and `dy`, summed over the batch (overwrites `dw`).
///
/// # Panics
/// When a slice does not have the size the geometry says (a defect of the caller).
pub fn conv2d_weight_gradient<T: Element>(g: &Conv2dGeometry, x: &[T], dy: &[T], dw: &mut [T]) {
    let (input, output) = (g.input_stride(), g.output_stride());
    assert_eq!(x.len(), g.batch * input, "conv2d_weight_gradient: input size");
    assert_eq!(dy.len(), g.batch * output, "conv2d_weight_gradient: output size");
    assert_eq!(dw.len(), g.weights(), "conv2d_weight_gradient: weight size");
    if let Some(level) = Level::detected()
        && weight_gradient::serves(g)
        && let (Some(x), Some(dy)) = (T::as_f32(x), T::as_f32(dy))
        && let Some(dw) = T::as_f32_mut(dw)
        && !x.is_empty()
        && !dy.is_empty()
    {
        weight_gradient::weight_gradient(level, g, x, dy, dw);
        return;
    }
    dw.fill(T::ZERO);
    if x.is_empty() || dy.is_empty() {
        return;
    }
    let partial: Vec<Vec<T>> = x
        .par_chunks(WEIGHT_GRADIENT_IMAGES * input)
        .zip(dy.par_chunks(WEIGHT_GRADIENT_IMAGES * output))
        .map(|(x, dy)| {
            let mut dw = vec![T::ZERO; g.weights()];
            weight_gradient_images(g, x, dy, &mut dw);
            dw
        })
        .collect();
    for part in partial {
        for (dw, p) in dw.iter_mut().zip(part) {
            *dw += p;
        }
    }
}

fn weight_gradient_images<T: Element>(g: &Conv2dGeometry, x: &[T], dy: &[T], dw: &mut [T]) {
    let images = x.len() / g.input_stride();
    let [height, width] = g.output();
    let plane = height * width;
    let (out_group, patch) = (g.out_channels / g.groups, g.patch());
    for tile in tiles(images, height, rows_per_tile(g)) {
        let columns: usize = tile.iter().map(|run| run.count * width).sum();
        for group in 0..g.groups {
            let dw = &mut dw[group * out_group * patch..(group + 1) * out_group * patch];
            scratch::with(patch * columns, |col: &mut [T]| {
                im2col(g, x, group, &tile, columns, col);
                let col = MatrixRef::transposed(col, columns);
                let first = |run: &RowRun| {
                    run.image * g.output_stride() + group * out_group * plane + run.first * width
                };
                if let [run] = &tile[..] {
                    let dy = MatrixRef::rows(&dy[first(run)..], plane);
                    gemm(out_group, patch, columns, dy, col, dw, patch, true);
                } else {
                    scratch::with(out_group * columns, |gathered: &mut [T]| {
                        for (i, run) in tile.iter().enumerate() {
                            for channel in 0..out_group {
                                let from = first(run) + channel * plane;
                                gathered[channel * columns + i * plane..][..plane]
                                    .copy_from_slice(&dy[from..from + plane]);
                            }
                        }
                        let dy = MatrixRef::rows(gathered, columns);
                        gemm(out_group, patch, columns, dy, col, dw, patch, true);
                    });
                }
            });
        }
    }
}

#[cfg(test)]
#[path = "conv_tests.rs"]
mod tests;
