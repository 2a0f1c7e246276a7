//! Convolution of stride 1 without a patch matrix, for processors with AVX2 or AVX-512.
//!
//! Each image is copied once into padded planes. There the pixels that one kernel tap reads are the output
//! pixels moved by a constant, also across row ends, so a vector of output pixels is a sum of unaligned loads times
//! broadcast weights; the few values between rows are computed and dropped. A block of output channels stays in
//! registers over all taps and input channels. Sums run in a fixed order: the result does not depend on the number of
//! threads. Other processors and element types use the patch matrix.

#![allow(unsafe_code)]

use super::conv::Conv2dGeometry;
use super::vector::Level;
#[cfg(target_arch = "x86_64")]
use super::vector::Vector;
#[cfg(target_arch = "x86_64")]
use super::vector::x86::{Avx2, Avx512};
use super::{Element, scratch};

/// Floats that padded images of one pass may take, so that they stay in the second-level cache.
const PASS: usize = 192 * 1024;
/// Floats past the last plane that a vector may read.
const SLACK: usize = 64;

/// Output channels that one pass over an image computes, for groups of `outputs`: half as many waste
/// less where there are few (the gradient to an image has three).
fn block_channels(level: Level, outputs: usize) -> usize {
    match level {
        Level::Avx512 if outputs > 4 => 8,
        Level::Avx512 | Level::Avx2 => 4,
    }
}

/// Vectors of pixels a block holds in registers, most.
const VECTORS: usize = 3;

/// The padded planes of one geometry.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    /// Elements of a padded row.
    pub(super) width: usize,
    /// Elements of a padded plane.
    pub(super) plane: usize,
    /// Output pixels, those between rows included.
    span: usize,
    /// Elements that one channel's results take: `span` in whole vectors.
    pub(super) room: usize,
    /// Distance of each tap from the first.
    pub(super) taps: Vec<usize>,
}

impl Layout {
    /// For vectors of `lanes` elements.
    pub(super) fn new(g: &Conv2dGeometry, lanes: usize) -> Self {
        let [height, width] = g.input;
        let [top, left, bottom, right] = g.pads;
        let padded = width + left + right;
        let plane = (height + top + bottom) * padded;
        let [rows, columns] = g.output();
        let span = (rows - 1) * padded + columns;
        let taps = (0..g.kernel[0])
            .flat_map(|y| (0..g.kernel[1]).map(move |x| (y, x)))
            .map(|(y, x)| y * g.dilation[0] * padded + x * g.dilation[1])
            .collect();
        Self { width: padded, plane, span, room: span.next_multiple_of(lanes), taps }
    }
}

/// Whether this kernel serves `g`, and is worth it: stride 1, more than one tap, and rows long enough
/// that little is dropped.
pub(super) fn serves(g: &Conv2dGeometry) -> bool {
    let [rows, columns] = g.output();
    g.stride == [1, 1]
        && g.kernel != [1, 1]
        && rows > 0
        && columns > 0
        && g.input[1] + g.pads[1] + g.pads[3] <= 2 * columns
}

/// `y = conv(x, w) + bias` for whole images.
pub(super) fn forward(
    level: Level,
    g: &Conv2dGeometry,
    x: &[f32],
    w: &[f32],
    bias: Option<&[f32]>,
    y: &mut [f32],
) {
    let layout = Layout::new(g, level.lanes());
    let image = g.in_channels * layout.plane;
    let blocks = Blocks::new(g, level);
    scratch::with(blocks.packed_len(g), |packed: &mut [f32]| {
        blocks.pack(g, w, packed);
        let images = (PASS / image.max(1)).clamp(1, 16);
        let parts =
            x.chunks(images * g.input_stride()).zip(y.chunks_mut(images * g.output_stride()));
        scratch::with(images * image + SLACK, |padded: &mut [f32]| {
            for (x, y) in parts {
                pad(g, &layout, x, padded);
                for block in 0..blocks.count * g.groups {
                    let outputs = y.chunks_exact_mut(g.output_stride());
                    for (padded, y) in
                        padded.chunks_exact(image).zip(outputs).take(x.len() / g.input_stride())
                    {
                        // Reads run past a plane, for the last one into the slack.
                        debug_assert!(padded.len() == image);
                        blocks.run(level, g, &layout, block, padded.as_ptr(), packed, bias, y);
                    }
                }
            }
        });
    });
}

/// Copies images [n, C, H, W] into zero-padded planes.
pub(super) fn pad<T: Element>(g: &Conv2dGeometry, layout: &Layout, x: &[T], padded: &mut [T]) {
    let [height, width] = g.input;
    let planes = x.chunks_exact(height * width).zip(padded.chunks_exact_mut(layout.plane));
    for (x, padded) in planes {
        let (top, body) = padded.split_at_mut(g.pads[0] * layout.width);
        let (body, bottom) = body.split_at_mut(height * layout.width);
        top.fill(T::ZERO);
        bottom.fill(T::ZERO);
        for (row, padded) in x.chunks_exact(width).zip(body.chunks_exact_mut(layout.width)) {
            padded[..g.pads[1]].fill(T::ZERO);
            padded[g.pads[1]..g.pads[1] + width].copy_from_slice(row);
            padded[g.pads[1] + width..].fill(T::ZERO);
        }
    }
}

/// Blocks of output channels, those of a group together.
struct Blocks {
    /// Channels of a block.
    channels: usize,
    /// Blocks of a group.
    count: usize,
}

impl Blocks {
    fn new(g: &Conv2dGeometry, level: Level) -> Self {
        let outputs = g.out_channels / g.groups;
        let channels = block_channels(level, outputs);
        Self { channels, count: outputs.div_ceil(channels) }
    }

    /// Weights of one block.
    fn block_len(&self, g: &Conv2dGeometry) -> usize {
        g.in_channels / g.groups * g.kernel[0] * g.kernel[1] * self.channels
    }

    fn packed_len(&self, g: &Conv2dGeometry) -> usize {
        self.block_len(g) * self.count * g.groups
    }

    /// Weights [O, C/groups, taps] as [block, C/groups, taps, channels of the block], zero where a
    /// block has no channel.
    fn pack(&self, g: &Conv2dGeometry, w: &[f32], packed: &mut [f32]) {
        let (out_group, patch) = (g.out_channels / g.groups, self.block_len(g) / self.channels);
        packed.fill(0.0);
        for (o, row) in w.chunks_exact(patch).enumerate() {
            let (group, within) = (o / out_group, o % out_group);
            let block = group * self.count + within / self.channels;
            let packed = &mut packed[block * self.block_len(g)..][within % self.channels..];
            for (to, &value) in packed.iter_mut().step_by(self.channels).zip(row) {
                *to = value;
            }
        }
    }

    /// Computes block number `block` of one image and stores its rows, with the bias, in `y`.
    #[allow(clippy::too_many_arguments)]
    fn run(
        &self,
        level: Level,
        g: &Conv2dGeometry,
        layout: &Layout,
        block: usize,
        padded: *const f32,
        packed: &[f32],
        bias: Option<&[f32]>,
        y: &mut [f32],
    ) {
        let out_group = g.out_channels / g.groups;
        let in_group = g.in_channels / g.groups;
        let (group, first) = (block / self.count, block % self.count * self.channels);
        let used = self.channels.min(out_group - first);
        let w = &packed[block * self.block_len(g)..][..self.block_len(g)];
        let [rows, columns] = g.output();
        scratch::with(self.channels * layout.room, |sums: &mut [f32]| {
            let vectors = layout.span.div_ceil(level.lanes());
            let mut done = 0;
            while done < vectors {
                let now = (vectors - done).min(VECTORS);
                let at = done * level.lanes();
                let work = Work {
                    // SAFETY: the group's planes and `at` lie inside the image's padded planes.
                    x: unsafe { padded.add(group * in_group * layout.plane + at) },
                    plane: layout.plane,
                    channels: in_group,
                    taps: &layout.taps,
                    w,
                    sums: &mut sums[at..],
                    room: layout.room,
                };
                // SAFETY: the processor has the level's instructions (`Level::detected`). Reads reach at
                // most `lanes` floats past the span of the last tap: into the next plane or the slack.
                // Writes stay below `room` of each channel.
                unsafe { work.run(level, self.channels, now) };
                done += now;
            }
            for channel in 0..used {
                let o = group * out_group + first + channel;
                let bias = bias.map_or(0.0, |bias| bias[o]);
                let y = &mut y[o * rows * columns..][..rows * columns];
                let sums = &sums[channel * layout.room..];
                for (row, y) in y.chunks_exact_mut(columns).enumerate() {
                    let sums = &sums[row * layout.width..][..columns];
                    for (y, &sum) in y.iter_mut().zip(sums) {
                        *y = sum + bias;
                    }
                }
            }
        });
    }
}

/// A few vectors of output pixels of a block of channels.
struct Work<'a> {
    x: *const f32,
    plane: usize,
    channels: usize,
    taps: &'a [usize],
    w: &'a [f32],
    sums: &'a mut [f32],
    room: usize,
}

// Plain index loops of constant length: the compiler unrolls them and keeps the sums in registers, which it
// does not with iterators.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::needless_range_loop)]
impl Work<'_> {
    /// # Safety
    /// The processor must have the level's instructions; `x` must be readable `vectors` vectors from
    /// each tap of each plane, `sums` writable so far from each channel's start.
    unsafe fn run(self, level: Level, channels: usize, vectors: usize) {
        // SAFETY: passed on.
        unsafe {
            match (level, channels, vectors) {
                (Level::Avx512, 8, 1) => self.avx512::<8, 1>(),
                (Level::Avx512, 8, 2) => self.avx512::<8, 2>(),
                (Level::Avx512, 8, _) => self.avx512::<8, 3>(),
                (Level::Avx512, _, 1) => self.avx512::<4, 1>(),
                (Level::Avx512, _, 2) => self.avx512::<4, 2>(),
                (Level::Avx512, _, _) => self.avx512::<4, 3>(),
                (Level::Avx2, _, 1) => self.avx2::<4, 1>(),
                (Level::Avx2, _, 2) => self.avx2::<4, 2>(),
                (Level::Avx2, _, _) => self.avx2::<4, 3>(),
            }
        }
    }

    /// # Safety
    /// As [`Work::run`].
    #[target_feature(enable = "avx512f")]
    unsafe fn avx512<const O: usize, const N: usize>(self) {
        // SAFETY: the instructions are switched on; else the caller's duty.
        unsafe { self.sum::<Avx512, O, N>() }
    }

    /// # Safety
    /// As [`Work::run`].
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2<const O: usize, const N: usize>(self) {
        // SAFETY: the instructions are switched on; else the caller's duty.
        unsafe { self.sum::<Avx2, O, N>() }
    }

    /// `N` vectors of `O` channels.
    ///
    /// # Safety
    /// The instructions of `V` must be switched on; else as [`Work::run`].
    #[inline(always)]
    unsafe fn sum<V: Vector, const O: usize, const N: usize>(self) {
        // SAFETY: reads lie inside the padded planes (the caller's duty), `w` holds O values for each channel and
        // tap, and stores go to LANES floats, as sliced.
        unsafe {
            let mut sums = [[V::splat(0.0); N]; O];
            let mut w = self.w.as_ptr();
            for channel in 0..self.channels {
                let plane = self.x.add(channel * self.plane);
                for &tap in self.taps {
                    let mut x = [V::splat(0.0); N];
                    for n in 0..N {
                        x[n] = V::load(plane.add(tap + V::LANES * n));
                    }
                    for o in 0..O {
                        let w = V::splat(*w.add(o));
                        for n in 0..N {
                            sums[o][n] = x[n].fma(w, sums[o][n]);
                        }
                    }
                    w = w.add(O);
                }
            }
            for o in 0..O {
                for n in 0..N {
                    let to = &mut self.sums[o * self.room + V::LANES * n..][..V::LANES];
                    sums[o][n].store(to.as_mut_ptr());
                }
            }
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl Work<'_> {
    /// # Safety
    /// None: no level is ever detected here.
    unsafe fn run(self, _level: Level, _channels: usize, _vectors: usize) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::RngStream;
    use crate::tensor::kernels::conv::conv2d;

    /// Every level this processor has, against the plain kernel in `f64`.
    #[test]
    fn agrees_with_the_plain_kernel_within_rounding() {
        let mut rng = RngStream::new(1, "direct", "", 0);
        let mut served = 0;
        for case in 0..200 {
            let groups = [1, 1, 1, 2][rng.below(4)];
            let g = Conv2dGeometry {
                batch: 1 + rng.below(20),
                in_channels: groups * (1 + rng.below(9)),
                input: [1 + rng.below(20), 1 + rng.below(36)],
                out_channels: groups * (1 + rng.below(19)),
                kernel: [1 + rng.below(3), 1 + rng.below(5)],
                stride: [1, 1],
                dilation: [1 + rng.below(2), 1 + rng.below(2)],
                pads: [0; 4].map(|_| rng.below(3)),
                groups,
            };
            if g.output().contains(&0) || !serves(&g) {
                continue;
            }
            served += 1;
            let (x, w) = (rng.normals(g.batch * g.input_stride()), rng.normals(g.weights()));
            let bias = rng.normals(g.out_channels);
            let wide = |v: &[f32]| v.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
            let mut expected = vec![0.0; g.batch * g.output_stride()];
            conv2d(&g, &wide(&x), &wide(&w), Some(&wide(&bias)), &mut expected);
            for level in Level::all() {
                let mut y = vec![f32::NAN; expected.len()];
                forward(level, &g, &x, &w, Some(&bias), &mut y);
                // A sum of n products of unit normals rounds to about sqrt(n) units in the last place.
                let bound = 1e-6 * (1.0 + (g.weights() / g.out_channels) as f64);
                for (a, b) in y.iter().zip(&expected) {
                    assert!(
                        (f64::from(*a) - b).abs() < bound,
                        "case {case} {level:?} {g:?}: {a} {b}"
                    );
                }
            }
        }
        assert!(served > 40, "{served}");
    }
}
