//! Convolutions of 1x1 and stride 1 without padding: a matrix product an image, weights by planes, with nothing
//! moved before. Both directions are the same product; the way back reads the weights transposed.

use rayon::prelude::*;

use super::Element;
use super::conv::Conv2dGeometry;
use super::product::{Each, Level, MatrixRef, Output, Sizes, Start, Threads, product_of_each};

/// Whether this is such a convolution, and large enough for the matrix unit.
pub(super) fn serves(g: &Conv2dGeometry) -> bool {
    let n = g.input[0] * g.input[1];
    let sizes = Sizes { m: g.out_channels / g.groups, n, k: g.in_channels / g.groups };
    g.kernel == [1, 1] && g.stride == [1, 1] && g.pads == [0; 4] && Level::of(sizes) == Level::Tiles
}

/// `y = conv(x, w) + bias` for all images.
pub(super) fn forward<T: Element>(
    g: &Conv2dGeometry,
    x: &[T],
    w: &[T],
    bias: Option<&[T]>,
    y: &mut [T],
) {
    let plane = g.input[0] * g.input[1];
    let start = if bias.is_some() { Start::Result } else { Start::Nothing };
    if let Some(bias) = bias {
        y.par_chunks_mut(plane).enumerate().for_each(|(i, y)| y.fill(bias[i % g.out_channels]));
    }
    let [rows, depth] = [g.out_channels / g.groups, g.in_channels / g.groups];
    for (group, w) in w.chunks_exact(rows * depth).enumerate() {
        let each = Each { items: g.batch, right: g.input_stride(), result: g.output_stride() };
        let x = MatrixRef::rows(&x[group * depth * plane..], plane);
        let data = &mut y[group * rows * plane..];
        let y = Output { data, row_stride: plane, start };
        let sizes = Sizes { m: rows, n: plane, k: depth };
        let w = MatrixRef::rows(w, depth);
        product_of_each(Level::Tiles, sizes, w, (x, each), y, Threads::All);
    }
}

/// The gradient to the input of all images; added to `dx` when `accumulate`.
pub(super) fn input_gradient<T: Element>(
    g: &Conv2dGeometry,
    dy: &[T],
    w: &[T],
    dx: &mut [T],
    accumulate: bool,
) {
    let plane = g.input[0] * g.input[1];
    let start = if accumulate { Start::Result } else { Start::Nothing };
    let [rows, depth] = [g.in_channels / g.groups, g.out_channels / g.groups];
    for (group, w) in w.chunks_exact(rows * depth).enumerate() {
        let each = Each { items: g.batch, right: g.output_stride(), result: g.input_stride() };
        let dy = MatrixRef::rows(&dy[group * depth * plane..], plane);
        let data = &mut dx[group * rows * plane..];
        let dx = Output { data, row_stride: plane, start };
        let sizes = Sizes { m: rows, n: plane, k: depth };
        let w = MatrixRef::transposed(w, rows);
        product_of_each(Level::Tiles, sizes, w, (dy, each), dx, Threads::All);
    }
}
