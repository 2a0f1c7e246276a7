//! Packing an operand for the matrix unit: each `f32` is the exact sum of three bf16 (8 bits of the significand each),
//! and those lie in the order in which tiles are loaded.
//!
//! A *line* is a row of the left or a column of the right operand; *depth* is the axis that is summed over. A panel is
//! [`LINES`] lines; it is a sequence of blocks of [`DEPTH`] deep, a block six tiles of 16 lines: of each part the
//! first 16 lines, then the others. A tile is 256 words of two bf16: depth `p` and depth `p + 16` of a
//! line. The left operand's tiles are line by line, the right's depth by depth. What is missing to whole panels and blocks is 0.

#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m512, __m512i, __mmask16, _MM_HINT_T0, _mm_prefetch, _mm512_add_epi32, _mm512_and_si512,
    _mm512_castps_si512, _mm512_castsi512_ps, _mm512_maskz_loadu_ps, _mm512_or_si512,
    _mm512_set1_epi32, _mm512_setzero_ps, _mm512_srli_epi32, _mm512_storeu_ps, _mm512_sub_ps,
};

use super::super::gemm::MatrixRef;
use super::super::vector::Vector;
use super::super::vector::x86::Avx512;

/// Lines of a panel.
pub(super) const LINES: usize = 32;
/// Depth of a block.
pub(super) const DEPTH: usize = 32;
/// Words of a tile.
const TILE: usize = 256;
/// Words of a block: three parts of two tiles.
pub(super) const BLOCK: usize = 6 * TILE;

/// Which operand a panel is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// The left one: lines are rows.
    Left,
    /// The right one: lines are columns.
    Right,
}

impl Side {
    /// Where the three parts of the first 16 lines lie in a block; those of the others follow each. The order is that
    /// in which the micro-kernel loads them.
    fn places(self) -> [usize; 3] {
        match self {
            Self::Left => [0, 4 * TILE, 2 * TILE],
            Self::Right => [4 * TILE, 2 * TILE, 0],
        }
    }
}

/// Lines to pack: value (line, depth) is at `line * line_stride + depth * depth_stride`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lines<'a> {
    data: &'a [f32],
    line_stride: usize,
    depth_stride: usize,
    lines: usize,
    depth: usize,
    side: Side,
    /// Matrices of these lines, one after the other, and how far apart.
    items: usize,
    item_stride: usize,
}

/// Some panels, over some blocks of depth.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    pub(super) first: usize,
    pub(super) panels: usize,
    pub(super) first_block: usize,
    pub(super) blocks: usize,
}

impl<'a> Lines<'a> {
    /// The rows of a left operand `[rows, depth]`.
    ///
    /// # Panics
    /// When the data is too short (a defect of the caller).
    pub(super) fn rows(a: MatrixRef<'a, f32>, rows: usize, depth: usize) -> Self {
        Self::new(a.data, [a.row_stride, a.column_stride], rows, depth, Side::Left)
    }

    /// The columns of a right operand `[depth, columns]`.
    ///
    /// # Panics
    /// As [`Lines::rows`].
    pub(super) fn columns(b: MatrixRef<'a, f32>, depth: usize, columns: usize) -> Self {
        Self::new(b.data, [b.column_stride, b.row_stride], columns, depth, Side::Right)
    }

    fn new(
        data: &'a [f32],
        [line_stride, depth_stride]: [usize; 2],
        lines: usize,
        depth: usize,
        side: Side,
    ) -> Self {
        assert!(lines > 0 && depth > 0, "product: nothing to pack");
        let last = (lines - 1) * line_stride + (depth - 1) * depth_stride;
        assert!(last < data.len(), "product: operand too short");
        Self { data, line_stride, depth_stride, lines, depth, side, items: 1, item_stride: 0 }
    }

    /// The same of `items` matrices, `item_stride` apart; no panel holds lines of two.
    ///
    /// # Panics
    /// As [`Lines::rows`].
    pub(super) fn of_each(self, items: usize, item_stride: usize) -> Self {
        let last = (self.lines - 1) * self.line_stride + (self.depth - 1) * self.depth_stride;
        assert!(
            items > 0 && (items - 1) * item_stride + last < self.data.len(),
            "product: too few"
        );
        Self { items, item_stride, ..self }
    }

    /// Panels of one matrix.
    pub(super) fn panels_of_one(&self) -> usize {
        self.lines.div_ceil(LINES)
    }

    /// Panels of all.
    pub(super) fn panels(&self) -> usize {
        self.items * self.panels_of_one()
    }

    /// Packs blocks `first_block..first_block + blocks` of `panels` panels from `first` on; `to` holds
    /// `panels * blocks * BLOCK` words, panel by panel.
    ///
    /// # Safety
    /// Needs AVX-512 F and BW.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) fn pack(&self, part: Part, to: &mut [f32]) {
        let Part { first, panels, first_block, blocks } = part;
        if self.depth_stride == 1 {
            for (panel, to) in to.chunks_exact_mut(blocks * BLOCK).take(panels).enumerate() {
                for (block, to) in to.chunks_exact_mut(BLOCK).enumerate() {
                    self.block(first + panel, first_block + block, to);
                }
            }
        } else {
            // Neighbouring lines lie side by side: all panels of a depth before the next.
            for block in 0..blocks {
                for panel in 0..panels {
                    let to = &mut to[(panel * blocks + block) * BLOCK..][..BLOCK];
                    self.block(first + panel, first_block + block, to);
                }
            }
        }
    }

    /// Six tiles.
    #[target_feature(enable = "avx512f,avx512bw")]
    fn block(&self, panel: usize, block: usize, to: &mut [f32]) {
        let depth = block * DEPTH;
        let (item, panel) = (panel / self.panels_of_one(), panel % self.panels_of_one());
        for half in 0..2 {
            let to = &mut to[half * TILE..];
            let line = panel * LINES + half * 16;
            let lines = self.lines.saturating_sub(line).min(16);
            let depths = self.depth.saturating_sub(depth).min(DEPTH);
            if lines == 0 || depths == 0 {
                for at in self.side.places() {
                    to[at..at + TILE].fill(0.0);
                }
                continue;
            }
            let from =
                item * self.item_stride + line * self.line_stride + depth * self.depth_stride;
            let from = &self.data[from..];
            self.tiles(from, lines, depths, to);
        }
    }

    /// Three tiles of at most 16 lines and `DEPTH` deep, whose first value is `from`'s first.
    #[target_feature(enable = "avx512f,avx512bw")]
    fn tiles(&self, from: &[f32], lines: usize, depths: usize, to: &mut [f32]) {
        let (along, across) = (self.depth_stride, self.line_stride);
        // Which of the two axes is contiguous gives the order in which words come out, the side the order wanted.
        let by_line = along == 1 || across != 1;
        let wanted = (self.side == Side::Left) == by_line;
        let places = self.side.places();
        if along != 1 && across == 1 && wanted {
            return depth_by_depth(from, along, lines, depths, to, places);
        } else if along == 1 && wanted {
            return line_by_line(from, across, lines, depths, to, places);
        }
        let apart = [0, TILE, 2 * TILE];
        let mut turned = [0.0; 3 * TILE];
        let out = &mut turned[..];
        if along == 1 {
            line_by_line(from, across, lines, depths, out, apart);
        } else if across == 1 {
            depth_by_depth(from, along, lines, depths, out, apart);
        } else {
            let mut gathered = [0.0; 16 * DEPTH];
            for (line, row) in gathered.chunks_exact_mut(DEPTH).take(lines).enumerate() {
                for (depth, value) in row.iter_mut().take(depths).enumerate() {
                    *value = from[line * across + depth * along];
                }
            }
            line_by_line(&gathered, DEPTH, lines, depths, out, apart);
        }
        for (from, at) in turned.chunks_exact(TILE).zip(places) {
            let to = &mut to[at..at + TILE];
            if wanted {
                to.copy_from_slice(from);
            } else {
                // SAFETY: both are 16 rows of 16 words; AVX-512 is on.
                unsafe { Avx512::transpose(from.as_ptr(), 16, to.as_mut_ptr(), 16) };
            }
        }
    }
}

/// A mask of the first `count` (at most 16) lanes.
fn first_lanes(count: usize) -> __mmask16 {
    if count >= 16 { u16::MAX } else { (1 << count) - 1 }
}

/// `count` floats, 0 beyond.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn load(from: &[f32], count: usize) -> __m512 {
    let count = count.min(16);
    let from = &from[..count];
    // SAFETY: masked to the slice.
    unsafe { _mm512_maskz_loadu_ps(first_lanes(count), from.as_ptr()) }
}

/// Rows of words: (depth p, depth p + 16) for p in 0..16 of each line.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn line_by_line(
    from: &[f32],
    stride: usize,
    lines: usize,
    depths: usize,
    to: &mut [f32],
    places: [usize; 3],
) {
    for line in 0..16 {
        let (low, high) = if line < lines {
            let from = &from[line * stride..];
            let next = from.as_ptr().wrapping_add(DEPTH);
            _mm_prefetch::<_MM_HINT_T0>(next.cast());
            _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(16).cast());
            let low = load(from, depths);
            let high =
                if depths > 16 { load(&from[16..], depths - 16) } else { _mm512_setzero_ps() };
            (low, high)
        } else {
            (_mm512_setzero_ps(), _mm512_setzero_ps())
        };
        put(low, high, &mut to[line * 16..], places);
    }
}

/// Rows of words: depth p and depth p + 16 of each of the lines.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn depth_by_depth(
    from: &[f32],
    stride: usize,
    lines: usize,
    depths: usize,
    to: &mut [f32],
    places: [usize; 3],
) {
    for depth in 0..16 {
        let low = row(from, stride, lines, depth, depths);
        let high = row(from, stride, lines, depth + 16, depths);
        put(low, high, &mut to[depth * 16..], places);
    }
}

/// Depth `depth` of the lines, 0 beyond `depths`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn row(from: &[f32], stride: usize, lines: usize, depth: usize, depths: usize) -> __m512 {
    let next = from.as_ptr().wrapping_add((depth + DEPTH) * stride);
    _mm_prefetch::<_MM_HINT_T0>(next.cast());
    if depth < depths { load(&from[depth * stride..], lines) } else { _mm512_setzero_ps() }
}

/// Splits two vectors and puts the words of each part at its place in `to`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn put(low: __m512, high: __m512, to: &mut [f32], places: [usize; 3]) {
    let upper = _mm512_set1_epi32(0xFFFF_0000_u32.cast_signed());
    let [low, high] = [split(low), split(high)];
    for part in 0..3 {
        let word = _mm512_or_si512(
            _mm512_srli_epi32::<16>(low[part]),
            _mm512_and_si512(high[part], upper),
        );
        let to = &mut to[places[part]..places[part] + 16];
        // SAFETY: the slice is 16 words.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), _mm512_castsi512_ps(word)) };
    }
}

/// Three bf16 that add up to each number, in the upper halves; the lower halves are not clean. The first is cut, so
/// that no number overflows; the second is rounded, so that what the product drops has no sign of its own.
/// What is not finite has a part that is not.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn split(x: __m512) -> [__m512i; 3] {
    let upper = _mm512_set1_epi32(0xFFFF_0000_u32.cast_signed());
    let first = _mm512_and_si512(_mm512_castps_si512(x), upper);
    let rest = _mm512_sub_ps(x, _mm512_castsi512_ps(first));
    let half = _mm512_set1_epi32(0x8000);
    let second = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(rest), half), upper);
    let third = _mm512_sub_ps(rest, _mm512_castsi512_ps(second));
    [first, second, _mm512_castps_si512(third)]
}
