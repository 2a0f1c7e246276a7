//! The product on the matrix unit: operands packed, blocks of the result computed by tasks.

#![allow(unsafe_code)]

use rayon::prelude::*;

use super::super::scratch;
use super::amx::Tiles;
use super::pack::{BLOCK, DEPTH, LINES, Lines, Part};
use super::{Sizes, Start, Threads};

/// Panels of one task.
const TASK_PANELS: usize = 4;
/// Blocks of depth packed at once by a task: with its panels 384 KiB, in the second-level cache.
const PACKED_BLOCKS: usize = 16;
/// Blocks of depth multiplied in one go: a panel of these is 24 KiB, in the first-level cache.
const NEAR_BLOCKS: usize = 4;
/// Tasks that a product is cut into at least, where it has as many panels.
const TASKS: usize = 8;

/// Results that tasks write disjoint blocks of.
#[derive(Clone, Copy)]
pub(super) struct Results {
    data: *mut f32,
    row_stride: usize,
    item_stride: usize,
    start: From,
}

/// What a block of the result starts from.
#[derive(Clone, Copy)]
enum From {
    Nothing,
    /// What is there.
    Result,
    /// A row for all rows, as long as they.
    Row(*const f32),
}

// SAFETY: tasks write disjoint blocks (`multiply`).
unsafe impl Send for Results {}
// SAFETY: as above.
unsafe impl Sync for Results {}

impl Results {
    /// The results `[m, n]` of `items` products in `data`.
    ///
    /// # Panics
    /// When the data is too short or the results overlap (a defect of the caller).
    pub(super) fn new(
        Sizes { m, n, .. }: Sizes,
        data: &mut [f32],
        row_stride: usize,
        [items, item_stride]: [usize; 2],
        start: Start<'_, f32>,
    ) -> Self {
        let one = (m - 1) * row_stride + n;
        assert!((items - 1) * item_stride + one <= data.len(), "product: output too short");
        assert!(row_stride >= n || m == 1, "product: rows of the output overlap");
        assert!(item_stride >= one || items == 1, "product: outputs overlap");
        let start = match start {
            Start::Nothing => From::Nothing,
            Start::Result => From::Result,
            Start::Row(row) => {
                assert!(row.len() >= n, "product: row too short");
                From::Row(row.as_ptr())
            }
        };
        Self { data: data.as_mut_ptr(), row_stride, item_stride, start }
    }
}

/// Scratch words on a cache line's border.
fn aligned<R>(words: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    scratch::with(words + 16, |buffer: &mut [f32]| {
        let skip = buffer.as_ptr().align_offset(64).min(16);
        work(&mut buffer[skip..skip + words])
    })
}

/// Calls `work` with all panels of `lines`, packed.
pub(super) fn with_packed<R>(
    lines: &Lines<'_>,
    depth: usize,
    threads: Threads,
    work: impl FnOnce(&[f32]) -> R,
) -> R {
    let blocks = depth.div_ceil(DEPTH);
    aligned(lines.panels() * blocks * BLOCK, |packed| {
        let pack = |(first, to): (usize, &mut [f32])| {
            let part = Part { first, panels: 1, first_block: 0, blocks };
            // SAFETY: the processor has AVX-512 F and BW (`amx::usable`, which led here).
            unsafe { lines.pack(part, to) };
        };
        match threads {
            Threads::One => packed.chunks_exact_mut(blocks * BLOCK).enumerate().for_each(pack),
            Threads::All => packed.par_chunks_exact_mut(blocks * BLOCK).enumerate().for_each(pack),
        }
        work(packed)
    })
}

/// Which operand is packed by the tasks, each its part; the other is packed ahead, for all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// The left one.
    RowsInTasks,
    /// The right one.
    ColumnsInTasks,
}

/// `c (+)= a b`: one operand `packed` whole, the other `streamed`.
pub(super) fn multiply(
    sizes: Sizes,
    order: Order,
    packed: &[f32],
    streamed: &Lines<'_>,
    c: Results,
    threads: Threads,
) {
    let panels = streamed.panels().div_ceil(TASKS).clamp(1, TASK_PANELS);
    let task = |i: usize| {
        let first = i * panels;
        let panels = panels.min(streamed.panels() - first);
        let task = Task { sizes, order, packed, streamed, first, panels };
        // SAFETY: tasks are of disjoint panels, so they write disjoint blocks of `c`, whose bounds `Results::new`
        // has checked.
        unsafe { task.run(c) };
    };
    let tasks = streamed.panels().div_ceil(panels);
    match threads {
        Threads::One => (0..tasks).for_each(task),
        Threads::All => (0..tasks).into_par_iter().for_each(task),
    }
}

/// Some panels of one operand times all of the other.
struct Task<'a> {
    sizes: Sizes,
    order: Order,
    packed: &'a [f32],
    streamed: &'a Lines<'a>,
    first: usize,
    panels: usize,
}

impl Task<'_> {
    /// # Safety
    /// Nobody else uses this task's part of `c`, which has the sizes of the product.
    unsafe fn run(&self, c: Results) {
        let blocks = self.sizes.k.div_ceil(DEPTH);
        let Some(tiles) = Tiles::configure() else { return };
        aligned(self.panels * PACKED_BLOCKS.min(blocks) * BLOCK, |own| {
            for start in (0..blocks).step_by(PACKED_BLOCKS) {
                let packed = PACKED_BLOCKS.min(blocks - start);
                let part = Part {
                    first: self.first,
                    panels: self.panels,
                    first_block: start,
                    blocks: packed,
                };
                // SAFETY: the processor has AVX-512 F and BW (tiles are only there with them).
                unsafe { self.streamed.pack(part, own) };
                for (other, whole) in self.packed.chunks_exact(blocks * BLOCK).enumerate() {
                    for near in (0..packed).step_by(NEAR_BLOCKS) {
                        let count = NEAR_BLOCKS.min(packed - near);
                        let other_panel = &whole[(start + near) * BLOCK..][..count * BLOCK];
                        let c = match start + near {
                            0 => c,
                            _ => Results { start: From::Result, ..c },
                        };
                        for i in 0..self.panels {
                            let panel = &own[(i * packed + near) * BLOCK..][..count * BLOCK];
                            // SAFETY: panels lie in the operands, so their square in `c`.
                            unsafe {
                                match self.order {
                                    Order::RowsInTasks => {
                                        let at = [self.first + i, other];
                                        self.square(&tiles, at, [panel, other_panel], c);
                                    }
                                    Order::ColumnsInTasks => {
                                        let at = [other, self.first + i];
                                        self.square(&tiles, at, [other_panel, panel], c);
                                    }
                                }
                            }
                        }
                    }
                }
            }
        });
    }

    /// The product of two panels (or as much of their depth as is given), at panel row and column `at` of `c`.
    ///
    /// # Safety
    /// Both are panels of the product; nobody else uses the square.
    #[inline(always)]
    unsafe fn square(
        &self,
        tiles: &Tiles,
        [row, column]: [usize; 2],
        [a, b]: [&[f32]; 2],
        c: Results,
    ) {
        let Sizes { m, n, .. } = self.sizes;
        let in_one = n.div_ceil(LINES);
        let (item, row, column) = (column / in_one, row * LINES, column % in_one * LINES);
        let (rows, columns) = (LINES.min(m - row), LINES.min(n - column));
        // SAFETY: the caller's duty; a row to start from is as long as the result's.
        unsafe {
            let to = c.data.add(item * c.item_stride + row * c.row_stride + column);
            let start = match c.start {
                From::Nothing => None,
                From::Result => Some((to.cast_const(), c.row_stride)),
                From::Row(from) => Some((from.add(column), 0)),
            };
            if rows == LINES && columns == LINES {
                let (a, b, count) = (a.as_ptr(), b.as_ptr(), a.len() / BLOCK);
                tiles.square(a, b, count, to, c.row_stride, start);
            } else {
                Edge { to, row_stride: c.row_stride, rows, columns }.fill(tiles, a, b, start);
            }
        }
    }
}

/// A block at the edge of the result.
struct Edge {
    to: *mut f32,
    row_stride: usize,
    rows: usize,
    columns: usize,
}

/// A whole block of the result, on a cache line's border.
#[repr(align(64))]
struct Square([f32; LINES * LINES]);

impl Edge {
    /// # Safety
    /// The part lies in the result and is nobody else's; the panels are of the same blocks.
    unsafe fn fill(&self, tiles: &Tiles, a: &[f32], b: &[f32], start: Option<(*const f32, usize)>) {
        let mut square = Square([0.0; LINES * LINES]);
        // SAFETY: the square is 32 rows of 32; rows and columns lie in the result and in what it starts from.
        unsafe {
            if let Some((from, stride)) = start {
                for row in 0..self.rows {
                    let to = square.0.as_mut_ptr().add(row * LINES);
                    std::ptr::copy_nonoverlapping(from.add(row * stride), to, self.columns);
                }
            }
            let to = square.0.as_mut_ptr();
            let blocks = a.len() / BLOCK;
            tiles.square(a.as_ptr(), b.as_ptr(), blocks, to, LINES, Some((to, LINES)));
            for row in 0..self.rows {
                let to = self.to.add(row * self.row_stride);
                let from = square.0.as_ptr().add(row * LINES);
                std::ptr::copy_nonoverlapping(from, to, self.columns);
            }
        }
    }
}
