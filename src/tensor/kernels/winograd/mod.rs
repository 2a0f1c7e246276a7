//! Convolution 3x3 of stride 1 by Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray 2016): a quarter of the
//! multiplications, for processors with AVX2 or AVX-512.
//!
//! Tiles of 6x6 pixels, four apart, and the filters are transformed to 36 points each; at each point the channels
//! are mixed by a small matrix product, and the sums are transformed back to 4x4 output pixels. Vectors run over
//! channels: strips of an image are transposed on the way in and out, so that tiles may lie anywhere. The points of
//! interpolation are 0, +-a, +-b and infinity with a = 5/8 and b = 3/2: of the pairs tried in the tests they round least.
//! The result does not depend on the number of threads.

#![allow(unsafe_code)]

mod product;
mod tiles;

use rayon::prelude::*;

use self::product::Product;
use self::tiles::{Sums, filter};
use super::conv::Conv2dGeometry;
use super::scratch;
use super::vector::{Level, Vector};

/// Output pixels of a tile, each way.
const TILE: usize = 4;
/// Input pixels of a tile, each way: `TILE + 3 - 1`.
const SIDE: usize = 6;
/// Points of a transformed tile.
const POINTS: usize = SIDE * SIDE;
/// First pair of interpolation points.
const A: f32 = 0.625;
/// Second pair.
const B: f32 = 1.5;
/// Tiles of a product whose output channels stay in registers together.
const ROWS: usize = 6;
/// Floats that the transformed tiles of a block and one panel of its sums may take: within the
/// second-level cache, beside a panel of filters.
const BLOCK: usize = 224 * 1024;
/// Fewest tiles of a block where the filters are larger than the second-level cache: they are
/// read once a block.
const LARGE_BLOCK: usize = 64;
/// Floats of a set of transformed filters that are large.
const LARGE_FILTERS: usize = 512 * 1024;

/// How weights are read: as stored, or as the gradient to the input needs them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filters {
    /// Weights [O, C, 3, 3] of the geometry.
    Stored,
    /// The geometry is of the reversed convolution; weights [C, O, 3, 3] are turned by half a circle.
    Reversed,
}

/// Whether this kernel serves `g`, and is worth it.
pub(super) fn serves(g: &Conv2dGeometry) -> bool {
    let [rows, columns] = g.output();
    let tiles = rows.div_ceil(TILE) * columns.div_ceil(TILE);
    // At 36 products a tile instead of 9 a pixel; transforms cost about as much as 8 channels.
    g.kernel == [3, 3]
        && g.stride == [1, 1]
        && g.dilation == [1, 1]
        && g.groups == 1
        && g.in_channels >= 16
        && g.out_channels >= 16
        && rows > 0
        && columns > 0
        && tiles * POINTS * 3 <= rows * columns * 9 * 2
}

/// Vectors of output channels that stay in registers together.
fn panel_vectors(level: Level) -> usize {
    match level {
        Level::Avx512 => 4,
        Level::Avx2 => 2,
    }
}

/// The sizes of one call.
struct Sizes {
    g: Conv2dGeometry,
    /// Tiles of an image, down and right.
    tiles: [usize; 2],
    lanes: usize,
    /// Output channels of a panel.
    panel: usize,
    /// Input channels in whole vectors.
    depth: usize,
    /// Output channels in whole vectors.
    width: usize,
}

impl Sizes {
    fn new(g: &Conv2dGeometry, level: Level) -> Self {
        let [rows, columns] = g.output();
        let lanes = level.lanes();
        Self {
            g: *g,
            tiles: [rows.div_ceil(TILE), columns.div_ceil(TILE)],
            lanes,
            panel: panel_vectors(level) * lanes,
            depth: g.in_channels.next_multiple_of(lanes),
            width: g.out_channels.next_multiple_of(lanes),
        }
    }

    /// Floats of the transformed filters: panels of [36, depth, channels of the panel].
    fn filters(&self) -> usize {
        POINTS * self.depth * self.width
    }

    /// Strips of consecutive tile rows, at most `limit` tiles in all, that cover `images` images.
    fn blocks(&self, images: usize, limit: usize) -> Vec<Vec<Strip>> {
        let [down, right] = self.tiles;
        let rows = (limit / right).clamp(1, down);
        let mut blocks: Vec<Vec<Strip>> = Vec::new();
        let mut room = 0;
        for image in 0..images {
            for first in (0..down).step_by(rows) {
                let count = rows.min(down - first);
                if count * right > room {
                    blocks.push(Vec::new());
                    room = limit.max(count * right);
                }
                room -= count * right;
                if let Some(block) = blocks.last_mut() {
                    block.push(Strip { image, first, count });
                }
            }
        }
        blocks
    }

    /// Floats of the three rooms of a block. The distance between points is no power of two, which
    /// spares the first-level cache.
    fn rooms(&self, block: &[Strip]) -> [usize; 3] {
        let right = self.tiles[1];
        let tiles: usize = block.iter().map(|strip| strip.count * right).sum();
        let rows = block.iter().map(|strip| strip.count).max().unwrap_or(0);
        let strip = (TILE * rows + 2) * (TILE * right + 2) * self.lanes;
        let point = |channels: usize| POINTS * (tiles * channels + 2 * self.lanes);
        [point(self.depth), point(self.panel), strip]
    }

    /// Tiles of a block, about.
    fn block_tiles(&self) -> usize {
        let fitting = BLOCK / (POINTS * (self.depth + self.panel));
        let least = if self.filters() > LARGE_FILTERS { LARGE_BLOCK } else { 2 * ROWS };
        (fitting.max(least) / ROWS * ROWS).max(self.tiles[1])
    }
}

/// Memory that a block works in.
struct Rooms<'a> {
    /// Transformed tiles.
    inputs: &'a mut [f32],
    /// A panel's sums.
    sums: &'a mut [f32],
    /// Pixels of a strip, channels together.
    strip: &'a mut [f32],
}

/// Consecutive rows of tiles of one image.
#[derive(Debug, Clone, Copy)]
struct Strip {
    image: usize,
    first: usize,
    count: usize,
}

/// `y = conv(x, w) + bias`, added to `y` when `accumulate`.
pub(super) fn forward(
    level: Level,
    g: &Conv2dGeometry,
    x: &[f32],
    (w, filters): (&[f32], Filters),
    bias: Option<&[f32]>,
    y: &mut [f32],
    accumulate: bool,
) {
    let sizes = Sizes::new(g, level);
    scratch::with(sizes.filters(), |transformed: &mut [f32]| {
        let panel = POINTS * sizes.depth * sizes.panel;
        transformed.par_chunks_mut(panel).enumerate().for_each(|(index, panel)| {
            let work = FilterWork { sizes: &sizes, w, filters, first: index * sizes.panel };
            work.run(level, panel);
        });
        let transformed = &*transformed;
        let limit = sizes.block_tiles();
        let [down, right] = sizes.tiles;
        let threads = rayon::current_num_threads();
        let images = (limit / (down * right)).clamp(1, g.batch.div_ceil(threads).max(1));
        let (input, output) = (g.input_stride(), g.output_stride());
        let parts = x.par_chunks(images * input).zip(y.par_chunks_mut(images * output));
        parts.for_each(|(x, y)| {
            let work = BlockWork { sizes: &sizes, transformed, x, bias, accumulate };
            for block in sizes.blocks(x.len() / input, limit) {
                let lengths = sizes.rooms(&block);
                scratch::with(lengths.iter().sum(), |room: &mut [f32]| {
                    let (inputs, room) = room.split_at_mut(lengths[0]);
                    let (sums, strip) = room.split_at_mut(lengths[1]);
                    work.run(level, &block, &mut Rooms { inputs, sums, strip }, y);
                });
            }
        });
    });
}

/// One panel of filters to be transformed.
struct FilterWork<'a> {
    sizes: &'a Sizes,
    w: &'a [f32],
    filters: Filters,
    /// First output channel.
    first: usize,
}

/// One block of strips to be convolved.
struct BlockWork<'a> {
    sizes: &'a Sizes,
    transformed: &'a [f32],
    x: &'a [f32],
    bias: Option<&'a [f32]>,
    accumulate: bool,
}

#[cfg(target_arch = "x86_64")]
mod dispatch {
    use super::super::vector::x86::{Avx2, Avx512};
    use super::{BlockWork, FilterWork, Level, Rooms, Strip};

    impl FilterWork<'_> {
        /// Fills `panel` [36, depth, channels].
        pub(super) fn run(&self, level: Level, panel: &mut [f32]) {
            // SAFETY: the processor has the level's instructions (`Level::detected`).
            unsafe {
                match level {
                    Level::Avx512 => self.avx512(panel),
                    Level::Avx2 => self.avx2(panel),
                }
            }
        }

        /// # Safety
        /// The processor must have the instructions.
        #[target_feature(enable = "avx512f")]
        unsafe fn avx512(&self, panel: &mut [f32]) {
            // SAFETY: the instructions are switched on.
            unsafe { self.transform::<Avx512>(panel) }
        }

        /// # Safety
        /// The processor must have the instructions.
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2(&self, panel: &mut [f32]) {
            // SAFETY: the instructions are switched on.
            unsafe { self.transform::<Avx2>(panel) }
        }
    }

    impl BlockWork<'_> {
        /// Convolves the strips of `block`, into their places in `y`.
        pub(super) fn run(
            &self,
            level: Level,
            block: &[Strip],
            rooms: &mut Rooms<'_>,
            y: &mut [f32],
        ) {
            // SAFETY: the processor has the level's instructions (`Level::detected`).
            unsafe {
                match level {
                    Level::Avx512 => self.avx512(block, rooms, y),
                    Level::Avx2 => self.avx2(block, rooms, y),
                }
            }
        }

        /// # Safety
        /// The processor must have the instructions.
        #[target_feature(enable = "avx512f")]
        unsafe fn avx512(&self, block: &[Strip], rooms: &mut Rooms<'_>, y: &mut [f32]) {
            // SAFETY: the instructions are switched on.
            unsafe { self.convolve::<Avx512, 4>(block, rooms, y) }
        }

        /// # Safety
        /// The processor must have the instructions.
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2(&self, block: &[Strip], rooms: &mut Rooms<'_>, y: &mut [f32]) {
            // SAFETY: the instructions are switched on.
            unsafe { self.convolve::<Avx2, 2>(block, rooms, y) }
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod dispatch {
    use super::{BlockWork, FilterWork, Level, Rooms, Strip};

    // No level is ever detected here.
    impl FilterWork<'_> {
        pub(super) fn run(&self, _level: Level, _panel: &mut [f32]) {}
    }
    impl BlockWork<'_> {
        pub(super) fn run(&self, _: Level, _: &[Strip], _: &mut Rooms<'_>, _: &mut [f32]) {}
    }
}

#[allow(clippy::needless_range_loop)]
impl FilterWork<'_> {
    /// # Safety
    /// The instructions of `V` must be switched on.
    #[inline(always)]
    unsafe fn transform<V: Vector>(&self, panel: &mut [f32]) {
        let (g, depth) = (&self.sizes.g, self.sizes.depth);
        let channels = panel.len() / (POINTS * depth);
        let used = channels.min(g.out_channels - self.first);
        // Distance in the weights of the next output channel, of the next input channel.
        let [next_out, next_in] = match self.filters {
            Filters::Stored => [g.in_channels * 9, 9],
            Filters::Reversed => [9, g.out_channels * 9],
        };
        for c in 0..depth {
            for o in (0..channels).step_by(V::LANES) {
                let lanes = used.saturating_sub(o).min(V::LANES);
                let mut taps = [[0.0f32; 16]; 9];
                if c < g.in_channels {
                    for lane in 0..lanes {
                        let at = (self.first + o + lane) * next_out + c * next_in;
                        let w = &self.w[at..at + 9];
                        for (tap, &w) in w.iter().enumerate() {
                            let tap = match self.filters {
                                Filters::Stored => tap,
                                Filters::Reversed => 8 - tap,
                            };
                            taps[tap][lane] = w;
                        }
                    }
                }
                // SAFETY: a row of taps holds 16 floats, and the stores lie in the panel, which holds
                // `channels` floats for each point and input channel.
                unsafe {
                    let mut half = [[V::splat(0.0); 3]; SIDE];
                    for column in 0..3 {
                        let mut g = [V::splat(0.0); 3];
                        for row in 0..3 {
                            g[row] = V::load(taps[3 * row + column].as_ptr());
                        }
                        let rows = filter(g);
                        for row in 0..SIDE {
                            half[row][column] = rows[row];
                        }
                    }
                    for row in 0..SIDE {
                        let points = filter(half[row]);
                        for column in 0..SIDE {
                            let point = SIDE * row + column;
                            let at = (point * depth + c) * channels + o;
                            points[column].store(panel[at..at + V::LANES].as_mut_ptr());
                        }
                    }
                }
            }
        }
    }
}

// Index loops of constant length keep the vectors in registers; iterators do not.
#[allow(clippy::needless_range_loop)]
impl BlockWork<'_> {
    /// # Safety
    /// The instructions of `V` must be switched on.
    #[inline(always)]
    unsafe fn convolve<V: Vector, const PANEL: usize>(
        &self,
        block: &[Strip],
        rooms: &mut Rooms<'_>,
        y: &mut [f32],
    ) {
        let sizes = self.sizes;
        let tiles: usize = block.iter().map(|strip| strip.count * sizes.tiles[1]).sum();
        let Rooms { inputs, sums, strip: room } = rooms;
        let (point, sum_point) = (inputs.len() / POINTS, sums.len() / POINTS);
        let mut tile = 0;
        for strip in block {
            // SAFETY: passed on; the strip's tiles have room from `tile` on.
            unsafe {
                self.transform_input::<V>(strip, room, &mut inputs[tile * sizes.depth..], point);
            }
            tile += strip.count * sizes.tiles[1];
        }
        for first in (0..sizes.width).step_by(sizes.panel) {
            let channels = sizes.panel.min(sizes.width - first);
            let filters = &self.transformed[POINTS * sizes.depth * first..];
            for at in 0..POINTS {
                let product = Product {
                    rows: tiles,
                    depth: sizes.depth,
                    a: &inputs[at * point..],
                    b: &filters[at * sizes.depth * channels..],
                    to: &mut sums[at * sum_point..],
                };
                // SAFETY: passed on.
                unsafe {
                    match channels / V::LANES {
                        1 => product.run::<V, 1>(),
                        2 => product.run::<V, 2>(),
                        3 => product.run::<V, 3>(),
                        _ => product.run::<V, PANEL>(),
                    }
                }
            }
            let mut tile = 0;
            for strip in block {
                for o in (0..channels).step_by(V::LANES) {
                    let sums = Sums {
                        data: &sums[tile * channels + o..],
                        point: sum_point,
                        tile: channels,
                    };
                    // SAFETY: passed on.
                    unsafe { self.transform_output::<V>(strip, &sums, room, first + o, y) };
                }
                tile += strip.count * sizes.tiles[1];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::RngStream;
    use crate::tensor::kernels::conv::{conv2d, conv2d_input_gradient};

    fn wide(v: &[f32]) -> Vec<f64> {
        v.iter().map(|&v| f64::from(v)).collect()
    }

    /// Every level this processor has, against the plain kernel in `f64`, forward and as the gradient.
    #[test]
    fn agrees_with_the_plain_kernel_within_rounding() {
        let mut rng = RngStream::new(1, "winograd", "", 0);
        let mut served = 0;
        for case in 0..60 {
            let g = Conv2dGeometry {
                batch: 1 + rng.below(4),
                in_channels: 16 + rng.below(50),
                input: [4 + rng.below(30), 4 + rng.below(30)],
                out_channels: 16 + rng.below(100),
                kernel: [3, 3],
                stride: [1, 1],
                dilation: [1, 1],
                pads: [0; 4].map(|_| rng.below(3)),
                groups: 1,
            };
            if !serves(&g) {
                continue;
            }
            served += 1;
            let (x, w) = (rng.normals(g.batch * g.input_stride()), rng.normals(g.weights()));
            let bias = rng.normals(g.out_channels);
            let mut expected = vec![0.0; g.batch * g.output_stride()];
            conv2d(&g, &wide(&x), &wide(&w), Some(&wide(&bias)), &mut expected);
            for level in Level::all() {
                let mut y = vec![f32::NAN; expected.len()];
                forward(level, &g, &x, (&w, Filters::Stored), Some(&bias), &mut y, false);
                assert_near(&y, &expected, &format!("case {case} {level:?} {g:?}"));
                forward(level, &g, &x, (&w, Filters::Stored), Some(&bias), &mut y, true);
                y.iter_mut().for_each(|v| *v /= 2.0);
                assert_near(&y, &expected, &format!("added, case {case} {level:?} {g:?}"));
            }
        }
        assert!(served > 30, "{served}");
    }

    #[test]
    fn reversed_filters_give_the_gradient_to_the_input() {
        let mut rng = RngStream::new(2, "winograd", "", 0);
        let g = Conv2dGeometry {
            batch: 2,
            in_channels: 24,
            input: [9, 13],
            out_channels: 40,
            kernel: [3, 3],
            stride: [1, 1],
            dilation: [1, 1],
            pads: [1, 0, 2, 1],
            groups: 1,
        };
        let [top, left, bottom, right] = g.pads;
        let reversed = Conv2dGeometry {
            in_channels: g.out_channels,
            input: g.output(),
            out_channels: g.in_channels,
            pads: [2 - top, 2 - left, 2 - bottom, 2 - right],
            ..g
        };
        let (dy, w) = (rng.normals(g.batch * g.output_stride()), rng.normals(g.weights()));
        let mut expected = vec![0.0; g.batch * g.input_stride()];
        conv2d_input_gradient(&g, &wide(&dy), &wide(&w), &mut expected, false);
        for level in Level::all() {
            let mut dx = vec![f32::NAN; expected.len()];
            forward(level, &reversed, &dy, (&w, Filters::Reversed), None, &mut dx, false);
            assert_near(&dx, &expected, &format!("{level:?}"));
        }
    }

    /// Relative to the length of the result: sums of products of unit normals.
    fn assert_near(found: &[f32], expected: &[f64], what: &str) {
        let length = expected.iter().map(|v| v * v).sum::<f64>().sqrt();
        let away =
            found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>();
        let error = away.sqrt() / length;
        assert!(error < 2e-6, "{what}: {error:e}");
    }
}
