//! The gradient of a convolution of stride 1 to its weights without a matrix of patches, for processors with AVX2 or
//! AVX-512.
//!
//! Each image is copied once into padded pixels whose channels lie together; then the gradient at one tap is the product
//! of the output's gradient (channels by pixels, as it lies in memory) and those pixels moved by the tap. Vectors run over
//! input channels, so nothing is added across lanes and small images waste nothing. After nearest up-sampling by two, nine taps
//! see only four different pixels from each of the four places in a block: the small image is enough, at 16 products of a
//! quarter of the pixels. Where channels are few the taps
//! lie beside them: pixels of patches. A block of output channels stays in registers over all pixels of an image.
//!
//! Images are summed in a number of parts that depends on the sizes only, parts in order: the result does not depend on the
//! number of threads.

#![allow(unsafe_code)]

mod planes;

use rayon::prelude::*;

use self::planes::Planes;
use super::Element;
use super::conv::Conv2dGeometry;
use super::patches::{RowRun, im2col};
use super::scratch;
use super::vector::Level;
use super::vector::Vector;
#[cfg(target_arch = "x86_64")]
use super::vector::x86::{Avx2, Avx512};

/// Partial sums over images, most.
const PARTS: usize = 16;
/// Floats that all partial sums may take.
const SUMS: usize = 4 << 20;
/// Tasks wanted at least: output channels are split where images are few.
const TASKS: usize = 8;
/// Input channels up to which patches are made.
const FEW: usize = 8;
/// Output channels that stay in registers together.
const ROWS: usize = 8;

/// Whether this kernel serves `g`.
pub(super) fn serves(g: &Conv2dGeometry) -> bool {
    g.stride == [1, 1] && g.groups == 1 && g.kernel != [1, 1] && g.output_stride() > 0
}

/// One product: gradients from `dy` on against pixels from `pixel` on.
struct Tap {
    dy: usize,
    pixel: usize,
}

/// The pixels of one geometry, channels together.
struct Layout<'a> {
    g: &'a Conv2dGeometry,
    /// Height and width of the input: half of the geometry's after up-sampling.
    input: [usize; 2],
    /// Zeros above and on the left.
    pads: [usize; 2],
    /// Rows and columns of a product.
    size: [usize; 2],
    /// Distance between the gradients of a product, 1 or 2, each way.
    step: usize,
    /// Whether a pixel holds its whole patch.
    patches: bool,
    /// Distance between pixels, in whole vectors.
    depth: usize,
    /// Values of a pixel in use.
    used: usize,
    /// Distance between rows of pixels, in pixels.
    row: usize,
    /// The products.
    taps: Vec<Tap>,
    /// The products whose sum is the gradient at each tap of the kernel; empty for patches.
    of: Vec<Vec<usize>>,
    /// Pixels.
    len: usize,
}

impl<'a> Layout<'a> {
    fn new(g: &'a Conv2dGeometry, lanes: usize) -> Self {
        let size = g.output();
        let base = Self {
            g,
            input: g.input,
            pads: [g.pads[0], g.pads[1]],
            size,
            step: 1,
            patches: false,
            depth: g.in_channels.next_multiple_of(lanes),
            used: g.in_channels,
            row: g.input[1] + g.pads[1] + g.pads[3],
            taps: Vec::new(),
            of: Vec::new(),
            len: 0,
        };
        if g.in_channels <= FEW {
            return Self {
                patches: true,
                depth: g.patch().next_multiple_of(lanes),
                used: g.patch(),
                row: size[1],
                taps: vec![Tap { dy: 0, pixel: 0 }],
                len: size[0] * size[1],
                ..base
            };
        }
        let pixel = |at: usize| {
            let (y, x) = (at / g.kernel[1], at % g.kernel[1]);
            y * g.dilation[0] * base.row + x * g.dilation[1]
        };
        let count = g.kernel[0] * g.kernel[1];
        Self {
            taps: (0..count).map(|at| Tap { dy: 0, pixel: pixel(at) }).collect(),
            of: (0..count).map(|at| vec![at]).collect(),
            len: (g.input[0] + g.pads[0] + g.pads[2]) * base.row,
            ..base
        }
    }

    /// For a 3x3 convolution of padding 1 after nearest up-sampling by two; `g` is that of the convolution.
    fn upsampled(g: &'a Conv2dGeometry, lanes: usize) -> Self {
        let [height, width] = g.input.map(|side| side / 2);
        let row = width + 2;
        // Place (p, q) of a block sees, one above or below the other, the small rows p - 1 + a of its own, a in 0..2.
        let taps = (0..16).map(|at| {
            let [p, q, a, b] = [at / 8, at / 4 % 2, at / 2 % 2, at % 2];
            Tap { dy: p * g.input[1] + q, pixel: (p + a) * row + q + b }
        });
        // Of the three taps one way, those at place 0 fall on rows (-1, 0, 0), those at place 1 on (0, 0, 1).
        let falls = |place: usize, tap: usize| usize::from(tap > place);
        let of = (0..9).map(|tap| {
            let [y, x] = [tap / 3, tap % 3];
            (0..4)
                .map(|place| {
                    let [p, q] = [place / 2, place % 2];
                    place * 4 + falls(p, y) * 2 + falls(q, x)
                })
                .collect()
        });
        Self {
            g,
            input: [height, width],
            pads: [1, 1],
            size: [height, width],
            step: 2,
            patches: false,
            depth: g.in_channels.next_multiple_of(lanes),
            used: g.in_channels,
            row,
            taps: taps.collect(),
            of: of.collect(),
            len: (height + 2) * row,
        }
    }

    /// Floats of one output channel's sums: `[taps, depth]`.
    fn sums(&self) -> usize {
        self.taps.len() * self.depth
    }
}

/// `dw = gradient to the weights`, summed over the batch.
pub(super) fn weight_gradient(
    level: Level,
    g: &Conv2dGeometry,
    x: &[f32],
    dy: &[f32],
    dw: &mut [f32],
) {
    run(level, &Layout::new(g, level.lanes()), x, dy, dw);
}

/// The gradient to the weights of a 3x3 convolution with padding 1 of images up-sampled by two (each pixel four times), from
/// the images `x` before that; `g` is the convolution's geometry. Whether this processor and type have the kernel.
///
/// # Panics
/// When a slice does not have the size the geometry says (a defect of the caller).
pub fn upsampled_weight_gradient<T: Element>(
    g: &Conv2dGeometry,
    x: &[T],
    dy: &[T],
    dw: &mut [T],
) -> bool {
    assert!(g.kernel == [3, 3] && g.pads == [1; 4] && g.dilation == [1, 1], "{g:?}");
    assert_eq!(x.len() * 4, g.batch * g.input_stride(), "up-sampled: input size");
    assert_eq!(dy.len(), g.batch * g.output_stride(), "up-sampled: output size");
    assert_eq!(dw.len(), g.weights(), "up-sampled: weight size");
    let Some(level) = Level::detected().filter(|_| serves(g) && !x.is_empty()) else {
        return false;
    };
    let (Some(x), Some(dy)) = (T::as_f32(x), T::as_f32(dy)) else { return false };
    let Some(dw) = T::as_f32_mut(dw) else { return false };
    run(level, &Layout::upsampled(g, level.lanes()), x, dy, dw);
    true
}

fn run(level: Level, layout: &Layout<'_>, x: &[f32], dy: &[f32], dw: &mut [f32]) {
    let g = layout.g;
    let [height, width] = layout.input;
    let (input, output) = (g.in_channels * height * width, g.output_stride());
    let all = g.out_channels * layout.sums();
    let images = g.batch.div_ceil((SUMS / all).clamp(1, PARTS));
    let parts = g.batch.div_ceil(images);
    let channels = g.out_channels.div_ceil(TASKS.div_ceil(parts)).next_multiple_of(ROWS);
    let plane = output / g.out_channels;
    scratch::with(parts * all, |sums: &mut [f32]| {
        let tasks = sums
            .par_chunks_mut(all)
            .zip(x.par_chunks(images * input))
            .zip(dy.par_chunks(images * output));
        tasks.for_each(|((sums, x), dy)| {
            sums.par_chunks_mut(channels * layout.sums()).enumerate().for_each(|(at, sums)| {
                sums.fill(0.0);
                let first = at * channels * plane;
                let len = layout.len * layout.depth;
                let room = if layout.patches { 2 * len } else { len };
                scratch::with(room, |room: &mut [f32]| {
                    let (pixels, patches) = room.split_at_mut(len);
                    if !layout.patches {
                        pixels.fill(0.0);
                    }
                    for (x, dy) in x.chunks_exact(input).zip(dy.chunks_exact(output)) {
                        let work = Work { layout, x, dy: &dy[first..] };
                        work.run(level, [pixels, patches], sums);
                    }
                });
            });
        });
        let (patch, taps) = (g.patch(), g.kernel[0] * g.kernel[1]);
        let (row, depth) = (layout.sums(), layout.depth);
        dw.par_chunks_mut(patch).with_min_len(ROWS).enumerate().for_each(|(channel, dw)| {
            scratch::with(row, |total: &mut [f32]| {
                total.copy_from_slice(&sums[channel * row..][..row]);
                for part in sums.chunks_exact(all).skip(1) {
                    for (total, part) in total.iter_mut().zip(&part[channel * row..]) {
                        *total += part;
                    }
                }
                for (tap, of) in layout.of.iter().enumerate() {
                    for (c, dw) in dw.iter_mut().skip(tap).step_by(taps).enumerate() {
                        *dw = of.iter().map(|product| total[product * depth + c]).sum();
                    }
                }
                if layout.patches {
                    dw.copy_from_slice(&total[..patch]);
                }
            });
        });
    });
}

/// One image and some output channels of its gradient.
struct Work<'a> {
    layout: &'a Layout<'a>,
    x: &'a [f32],
    dy: &'a [f32],
}

#[cfg(target_arch = "x86_64")]
impl Work<'_> {
    fn run(&self, level: Level, room: [&mut [f32]; 2], sums: &mut [f32]) {
        // SAFETY: the processor has the level's instructions (`Level::detected`).
        unsafe {
            match level {
                Level::Avx512 => self.avx512(room, sums),
                Level::Avx2 => self.avx2(room, sums),
            }
        }
    }

    /// # Safety
    /// The processor must have the instructions.
    #[target_feature(enable = "avx512f")]
    unsafe fn avx512(&self, room: [&mut [f32]; 2], sums: &mut [f32]) {
        // SAFETY: the instructions are switched on.
        unsafe { self.add::<Avx512, 8>(room, sums) }
    }

    /// # Safety
    /// The processor must have the instructions.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2(&self, room: [&mut [f32]; 2], sums: &mut [f32]) {
        // SAFETY: the instructions are switched on.
        unsafe { self.add::<Avx2, 4>(room, sums) }
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl Work<'_> {
    // No level is ever detected here.
    fn run(&self, _level: Level, _room: [&mut [f32]; 2], _sums: &mut [f32]) {}
}

// Index loops of constant length keep the sums in registers; iterators do not.
#[allow(clippy::needless_range_loop)]
impl Work<'_> {
    /// Adds this image to `sums` [channels, taps, depth], `R` channels at a time.
    ///
    /// # Safety
    /// The instructions of `V` must be switched on.
    #[inline(always)]
    unsafe fn add<V: Vector, const R: usize>(
        &self,
        [pixels, patches]: [&mut [f32]; 2],
        sums: &mut [f32],
    ) {
        // SAFETY: passed on.
        unsafe { self.gather::<V>(pixels, patches) };
        let layout = self.layout;
        let [rows, columns] = layout.g.output();
        let ([height, width], plane, depth) = (layout.size, rows * columns, layout.depth);
        let channels = sums.len() / layout.sums();
        assert!(channels * plane <= self.dy.len());
        for tap in &layout.taps {
            let last = tap.pixel + (height - 1) * layout.row + width;
            let last_dy = tap.dy + (height - 1) * layout.step * columns + (width - 1) * layout.step;
            assert!(last * depth <= pixels.len() && last_dy < plane);
        }
        let mut first = 0;
        while first < channels {
            let left = channels - first;
            let rows = [R, 4, 2, 1].into_iter().find(|&rows| rows <= left).unwrap_or(1);
            for (at, tap) in layout.taps.iter().enumerate() {
                for over in (0..depth).step_by(2 * V::LANES) {
                    let to = (first * layout.taps.len() + at) * depth + over;
                    let to = &mut sums[to..];
                    assert!((rows - 1) * layout.sums() + V::LANES <= to.len());
                    let part = Part {
                        dy: self.dy[first * plane + tap.dy..].as_ptr(),
                        pixels: pixels[tap.pixel * depth + over..].as_ptr(),
                        to: to.as_mut_ptr(),
                        next: layout.sums(),
                        size: [height, width],
                        plane,
                        step: layout.step,
                        dy_row: layout.step * columns,
                        row: layout.row * depth,
                        depth,
                    };
                    let two = over + V::LANES < depth;
                    // SAFETY: passed on; the places lie in the slices (asserted above).
                    unsafe {
                        match (rows, two) {
                            (1, false) => part.add::<V, 1, 1>(),
                            (1, true) => part.add::<V, 1, 2>(),
                            (2, false) => part.add::<V, 2, 1>(),
                            (2, true) => part.add::<V, 2, 2>(),
                            (4, false) => part.add::<V, 4, 1>(),
                            (4, true) => part.add::<V, 4, 2>(),
                            (_, false) => part.add::<V, R, 1>(),
                            (_, true) => part.add::<V, R, 2>(),
                        }
                    }
                }
            }
            first += rows;
        }
    }

    /// Fills `pixels`; padding stays as it is. `patches` is room for them, where they are made.
    ///
    /// # Safety
    /// The instructions of `V` must be switched on.
    // No closure: what it holds would be compiled without the instructions.
    #[inline(always)]
    unsafe fn gather<V: Vector>(&self, pixels: &mut [f32], patches: &mut [f32]) {
        let (layout, g) = (self.layout, self.layout.g);
        if layout.patches {
            let columns = layout.len;
            patches[layout.used * columns..].fill(0.0);
            let [count, _] = g.output();
            let run = RowRun { image: 0, first: 0, count };
            im2col(g, self.x, 0, &[run], columns, patches);
            let source = Planes {
                values: patches,
                channels: layout.depth,
                width: columns,
                row: columns,
                start: 0,
            };
            // SAFETY: passed on.
            unsafe { source.turn::<V>(layout.depth, pixels) };
        } else {
            let start = layout.pads[0] * layout.row + layout.pads[1];
            let source = Planes {
                values: self.x,
                channels: g.in_channels,
                width: layout.input[1],
                row: layout.row,
                start,
            };
            // SAFETY: passed on.
            unsafe { source.turn::<V>(layout.depth, pixels) };
        }
    }
}

/// One tap, a few output channels and one or two vectors of input channels.
struct Part {
    /// First pixel of the first output channel.
    dy: *const f32,
    /// Pixels as this tap sees them.
    pixels: *const f32,
    /// Sums of the first output channel.
    to: *mut f32,
    /// Distance of the next output channel's sums.
    next: usize,
    /// Rows and columns.
    size: [usize; 2],
    /// Distance of the next output channel's gradients.
    plane: usize,
    /// Distance between gradients.
    step: usize,
    /// Distance between rows of gradients.
    dy_row: usize,
    /// Distance between rows of pixels.
    row: usize,
    /// Distance between pixels.
    depth: usize,
}

#[allow(clippy::needless_range_loop)]
impl Part {
    /// # Safety
    /// The instructions of `V` must be switched on; `R` planes must lie at `dy`, `N` vectors at each pixel and at the sums
    /// of each of the `R` channels.
    #[inline(always)]
    unsafe fn add<V: Vector, const R: usize, const N: usize>(self) {
        let ([height, width], plane) = (self.size, self.plane);
        // SAFETY: the caller's duty.
        unsafe {
            let mut sums = [[V::splat(0.0); N]; R];
            for r in 0..R {
                for n in 0..N {
                    sums[r][n] = V::load(self.to.add(r * self.next + n * V::LANES));
                }
            }
            for y in 0..height {
                let mut dy = self.dy.add(y * self.dy_row);
                let mut pixel = self.pixels.add(y * self.row);
                for _ in 0..width {
                    let mut x = [V::splat(0.0); N];
                    for n in 0..N {
                        x[n] = V::load(pixel.add(n * V::LANES));
                    }
                    for r in 0..R {
                        let factor = V::splat(*dy.add(r * plane));
                        for n in 0..N {
                            sums[r][n] = x[n].fma(factor, sums[r][n]);
                        }
                    }
                    dy = dy.add(self.step);
                    pixel = pixel.add(self.depth);
                }
            }
            for r in 0..R {
                for n in 0..N {
                    sums[r][n].store(self.to.add(r * self.next + n * V::LANES));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::RngStream;
    use crate::tensor::kernels::conv::conv2d_weight_gradient;

    /// Every level this processor has, against the matrix of patches in `f64`.
    #[test]
    fn agrees_with_patches_within_rounding_for_any_number_of_threads() {
        let mut rng = RngStream::new(1, "weight-gradient", "", 0);
        let mut served = 0;
        for case in 0..150 {
            let g = Conv2dGeometry {
                batch: 1 + rng.below(40),
                in_channels: [1, 3, 8, 9, 16, 20, 33, 48][rng.below(8)],
                input: [1 + rng.below(9), 1 + rng.below(20)],
                out_channels: 1 + rng.below(40),
                kernel: [1 + rng.below(3), 1 + rng.below(4)],
                stride: [1, 1],
                dilation: [1 + rng.below(2), 1 + rng.below(2)],
                pads: [0; 4].map(|_| rng.below(3)),
                groups: 1,
            };
            if g.output().contains(&0) || !serves(&g) {
                continue;
            }
            served += 1;
            let x = rng.normals(g.batch * g.input_stride());
            let dy = rng.normals(g.batch * g.output_stride());
            let wide = |v: &[f32]| v.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
            let mut expected = vec![0.0; g.weights()];
            conv2d_weight_gradient(&g, &wide(&x), &wide(&dy), &mut expected);
            for level in Level::all() {
                let pool = |threads| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                    let mut dw = vec![f32::NAN; expected.len()];
                    pool.unwrap().install(|| weight_gradient(level, &g, &x, &dy, &mut dw));
                    dw
                };
                let dw = pool(1);
                // A sum of n products of unit normals rounds to about sqrt(n) units in the last place.
                let [rows, columns] = g.output();
                let bound = 1e-6 * (1.0 + ((g.batch * rows * columns) as f64).sqrt() * 4.0);
                for (a, b) in dw.iter().zip(&expected) {
                    assert!(
                        (f64::from(*a) - b).abs() < bound,
                        "case {case} {level:?} {g:?}: {a} {b}"
                    );
                }
                if case % 10 == 0 {
                    assert_eq!(dw, pool(3), "case {case} {level:?} {g:?}");
                }
            }
        }
        assert!(served > 80, "{served}");
    }

    #[test]
    fn small_images_are_enough_after_up_sampling() {
        let mut rng = RngStream::new(2, "weight-gradient", "", 0);
        for [batch, in_channels, out_channels, height, width] in
            [[1, 1, 1, 1, 1], [3, 9, 5, 2, 3], [7, 20, 12, 8, 8], [20, 32, 3, 5, 6]]
        {
            let g = Conv2dGeometry {
                batch,
                in_channels,
                input: [2 * height, 2 * width],
                out_channels,
                kernel: [3, 3],
                stride: [1, 1],
                dilation: [1, 1],
                pads: [1; 4],
                groups: 1,
            };
            let x = rng.normals(batch * in_channels * height * width);
            let dy = rng.normals(batch * g.output_stride());
            let mut large = vec![0.0f64; batch * g.input_stride()];
            for (at, value) in large.iter_mut().enumerate() {
                let [plane, row, column] =
                    [at / (4 * height * width), at / (2 * width) % (2 * height), at % (2 * width)];
                *value = f64::from(x[(plane * height + row / 2) * width + column / 2]);
            }
            let wide = dy.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
            let mut expected = vec![0.0; g.weights()];
            conv2d_weight_gradient(&g, &large, &wide, &mut expected);
            let mut dw = vec![f32::NAN; expected.len()];
            if !upsampled_weight_gradient(&g, &x, &dy, &mut dw) {
                assert!(Level::detected().is_none());
                return;
            }
            let bound = 4e-6 * (1.0 + ((batch * height * width) as f64).sqrt() * 4.0);
            for (a, b) in dw.iter().zip(&expected) {
                assert!((f64::from(*a) - b).abs() < bound, "{g:?}: {a} {b}");
            }
        }
    }
}
