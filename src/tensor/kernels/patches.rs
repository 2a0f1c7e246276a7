//! The patch matrix of a convolution: a column for each output pixel, over tiles of output rows small enough for
//! the second-level cache.

use super::Element;
use super::conv::{Conv2dGeometry, input_row, valid_columns};

/// Elements of the patch matrix of one tile (512 KiB of `f32`).
const TILE_ELEMENTS: usize = 128 * 1024;

/// One run of output rows: image, first row, number of rows (all within one image).
#[derive(Clone, Copy)]
pub(super) struct RowRun {
    pub(super) image: usize,
    pub(super) first: usize,
    pub(super) count: usize,
}

/// Cuts `images * height` output rows into tiles of at most `rows` rows.
pub(super) fn tiles(images: usize, height: usize, rows: usize) -> Vec<Vec<RowRun>> {
    let mut tiles = Vec::new();
    if rows >= height {
        let per_tile = rows / height;
        let mut image = 0;
        while image < images {
            let end = (image + per_tile).min(images);
            tiles
                .push((image..end).map(|i| RowRun { image: i, first: 0, count: height }).collect());
            image = end;
        }
    } else {
        for image in 0..images {
            let mut first = 0;
            while first < height {
                let count = rows.min(height - first);
                tiles.push(vec![RowRun { image, first, count }]);
                first += count;
            }
        }
    }
    tiles
}

pub(super) fn rows_per_tile(g: &Conv2dGeometry) -> usize {
    let width = g.output()[1];
    (TILE_ELEMENTS / (g.patch() * width).max(1)).max(1)
}

/// Fills `col` [patch, columns] with the patches of the tile's output pixels.
pub(super) fn im2col<T: Element>(
    g: &Conv2dGeometry,
    x: &[T],
    group: usize,
    tile: &[RowRun],
    columns: usize,
    col: &mut [T],
) {
    let width = g.output()[1];
    let in_group = g.in_channels / g.groups;
    let plane = g.input[0] * g.input[1];
    let mut rows = col.chunks_exact_mut(columns);
    for channel in 0..in_group {
        for ky in 0..g.kernel[0] {
            for kx in 0..g.kernel[1] {
                let Some(row) = rows.next() else { return };
                let (low, high) = valid_columns(g, kx, width);
                let mut out = row.chunks_exact_mut(width);
                for run in tile {
                    let x = &x
                        [run.image * g.input_stride() + (group * in_group + channel) * plane..]
                        [..plane];
                    for oy in run.first..run.first + run.count {
                        let Some(out) = out.next() else { return };
                        let Some(iy) = input_row(g, oy, ky) else {
                            out.fill(T::ZERO);
                            continue;
                        };
                        let x = &x[iy * g.input[1]..(iy + 1) * g.input[1]];
                        out[..low].fill(T::ZERO);
                        out[high..].fill(T::ZERO);
                        if low == high {
                            continue;
                        }
                        let start = low * g.stride[1] + kx * g.dilation[1] - g.pads[1];
                        if g.stride[1] == 1 {
                            out[low..high].copy_from_slice(&x[start..start + high - low]);
                        } else {
                            let x = x[start..].iter().step_by(g.stride[1]);
                            for (out, &x) in out[low..high].iter_mut().zip(x) {
                                *out = x;
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Adds the patch gradients `col` [patch, columns] of one image's row run to its input gradient.
pub(super) fn col2im<T: Element>(
    g: &Conv2dGeometry,
    col: &[T],
    group: usize,
    run: RowRun,
    dx: &mut [T],
) {
    let width = g.output()[1];
    let in_group = g.in_channels / g.groups;
    let plane = g.input[0] * g.input[1];
    let columns = run.count * width;
    let mut rows = col.chunks_exact(columns);
    for channel in 0..in_group {
        let dx = &mut dx[(group * in_group + channel) * plane..][..plane];
        for ky in 0..g.kernel[0] {
            for kx in 0..g.kernel[1] {
                let Some(row) = rows.next() else { return };
                let (low, high) = valid_columns(g, kx, width);
                if low == high {
                    continue;
                }
                let start = low * g.stride[1] + kx * g.dilation[1] - g.pads[1];
                for (oy, col) in (run.first..).zip(row.chunks_exact(width)) {
                    let Some(iy) = input_row(g, oy, ky) else { continue };
                    let dx = &mut dx[iy * g.input[1] + start..(iy + 1) * g.input[1]];
                    for (dx, &c) in dx.iter_mut().step_by(g.stride[1]).zip(&col[low..high]) {
                        *dx += c;
                    }
                }
            }
        }
    }
}
