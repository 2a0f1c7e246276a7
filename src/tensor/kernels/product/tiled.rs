//! The product on the matrix unit: operands packed, blocks of the result computed by tasks.

#![allow(unsafe_code)]

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::super::scratch;
use super::amx::{AHEAD, Square, Tiles};
use super::pack::{BLOCK, DEPTH, LINES, Lines, Part};
use super::{Sizes, Start, Threads};

/// Panels of one task.
const TASK_PANELS: usize = 4;
/// Blocks of depth packed at once by a task: with its panels 384 KiB, in the second-level cache.
const PACKED_BLOCKS: usize = 16;
/// Blocks of depth multiplied in one go: a panel of these is 24 KiB, in the first-level cache.
const NEAR_BLOCKS: usize = 4;

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

    /// A square of them, and what it starts from: these for its first blocks of depth, then itself.
    ///
    /// # Safety
    /// The square lies in the results.
    #[inline(always)]
    unsafe fn square(&self, place: &Place, first: bool) -> (Square, Option<(*const f32, usize)>) {
        let Place { item, row, column, size } = *place;
        // SAFETY: the caller's duty.
        unsafe {
            let at = self.data.add(item * self.item_stride + row * self.row_stride + column);
            let itself = Some((at.cast_const(), self.row_stride));
            let start = match self.start {
                _ if !first => itself,
                From::Nothing => None,
                From::Result => itself,
                From::Row(row) => Some((row.add(column), 0)),
            };
            (Square { at, stride: self.row_stride, rows: size[0] }, start)
        }
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
    let run = |(first, panels): (usize, usize)| {
        let task = Task { sizes, order, packed, streamed, first, panels };
        // SAFETY: tasks are of disjoint panels, so they write disjoint blocks of `c`, whose bounds `Results::new`
        // has checked.
        unsafe { task.run(c) };
    };
    if threads == Threads::One {
        return tasks(streamed.panels(), 1).into_iter().for_each(run);
    }
    let workers = rayon::current_num_threads();
    let (tasks, next) = (tasks(streamed.panels(), workers), AtomicUsize::new(0));
    // In their order, to whoever is free: rayon alone would give each worker half, however late it wakes.
    (0..workers.min(tasks.len())).into_par_iter().with_max_len(1).for_each(|_| {
        while let Some(&task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
            run(task);
        }
    });
}

/// First panel and number of panels of each task: smaller ones last, so that all workers end together.
fn tasks(panels: usize, workers: usize) -> Vec<(usize, usize)> {
    let (mut tasks, mut first) = (Vec::new(), 0);
    while first < panels {
        let left = panels - first;
        let share = if workers == 1 { left } else { left.div_ceil(2 * workers) };
        let own = share.min(TASK_PANELS);
        tasks.push((first, own));
        first += own;
    }
    tasks
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

/// What a task has packed of its panels, one after the other: `count` blocks of each, from `first` on.
struct Own<'a> {
    data: &'a [f32],
    first: usize,
    count: usize,
}

/// Where two panels' square lies in the results, and its size.
struct Place {
    item: usize,
    row: usize,
    column: usize,
    size: [usize; 2],
}

impl Task<'_> {
    /// # Safety
    /// Nobody else uses this task's part of `c`, which has the sizes of the product.
    unsafe fn run(&self, c: Results) {
        let blocks = self.sizes.k.div_ceil(DEPTH);
        let Some(tiles) = Tiles::take() else { return };
        let others = self.packed.len() / (blocks * BLOCK);
        let own_groups = by_size(self.panels, |own| self.place(own, 0).size);
        let other_groups = by_size(others, |other| self.place(0, other).size);
        aligned(self.panels * PACKED_BLOCKS.min(blocks) * BLOCK, |own| {
            for first in (0..blocks).step_by(PACKED_BLOCKS) {
                let count = PACKED_BLOCKS.min(blocks - first);
                let part = Part {
                    first: self.first,
                    panels: self.panels,
                    first_block: first,
                    blocks: count,
                };
                // SAFETY: the processor has AVX-512 F and BW (tiles are only there with them).
                unsafe { self.streamed.pack(part, own) };
                let own = Own { data: own, first, count };
                for panels in &own_groups {
                    for others in &other_groups {
                        // SAFETY: the caller's duty; the groups are of one size each, and of panels that there are.
                        unsafe { self.times(&tiles, &own, [panels, others], c) };
                    }
                }
            }
        });
    }

    /// Where the square of an own panel (counted in this task) and another lies.
    fn place(&self, own: usize, other: usize) -> Place {
        let Sizes { m, n, .. } = self.sizes;
        let own = self.first + own;
        let (row, column) = match self.order {
            Order::RowsInTasks => (own, other),
            Order::ColumnsInTasks => (other, own),
        };
        let in_one = n.div_ceil(LINES);
        let (item, row, column) = (column / in_one, row * LINES, column % in_one * LINES);
        Place { item, row, column, size: [LINES.min(m - row), LINES.min(n - column)] }
    }

    /// Some own panels times some others.
    ///
    /// # Safety
    /// As [`Task::run`]. The panels are packed in `own` and `self.packed`, and all their squares are of one size.
    #[inline(always)]
    unsafe fn times(
        &self,
        tiles: &Tiles,
        own: &Own<'_>,
        [panels, others]: [&[usize]; 2],
        c: Results,
    ) {
        let (Some(&panel), Some(&other)) = (panels.first(), others.first()) else { return };
        let [rows, columns] = self.place(panel, other).size;
        // A square that has no right half is computed in one beside the result; a lower half that is not there goes to a
        // row of its own.
        let mut beside = [0.0; (LINES + 1) * LINES];
        let beside = beside.as_mut_ptr();
        let nowhere = beside.wrapping_add(LINES * LINES);
        let narrow = columns <= LINES / 2;
        tiles.shape([rows, if narrow { LINES } else { columns }]);
        let blocks = self.sizes.k.div_ceil(DEPTH);
        for &other in others {
            let whole = &self.packed[other * blocks * BLOCK..][..blocks * BLOCK];
            for near in (0..own.count).step_by(NEAR_BLOCKS) {
                let count = NEAR_BLOCKS.min(own.count - near);
                let block = own.first + near;
                let other_panel = &whole[block * BLOCK..][..count * BLOCK];
                let next =
                    if near + count < own.count { block + count } else { blocks + own.first };
                for (i, &panel) in panels.iter().enumerate() {
                    let own_panel =
                        &own.data[(panel * own.count + near) * BLOCK..][..count * BLOCK];
                    let operands = match self.order {
                        Order::RowsInTasks => [own_panel.as_ptr(), other_panel.as_ptr()],
                        Order::ColumnsInTasks => [other_panel.as_ptr(), own_panel.as_ptr()],
                    };
                    // Each own panel has a share of the other operand's next blocks fetched.
                    let ahead = whole.as_ptr().wrapping_add(next * BLOCK + i * count * AHEAD);
                    // SAFETY: panels lie in the operands, so their square in `c`; a row to start from is as long as
                    // the result's; `beside` is a square and a row more; the registers were given the shape above.
                    unsafe {
                        let (square, start) = c.square(&self.place(panel, other), block == 0);
                        if narrow {
                            let inner = Square { at: beside, stride: LINES, rows };
                            let size = [rows, columns];
                            let start = start.map(|(from, stride)| {
                                copy_rows(from, stride, beside, LINES, size);
                                (beside.cast_const(), LINES)
                            });
                            tiles.square(operands, count, inner, start, ahead, nowhere);
                            copy_rows(beside, LINES, square.at, square.stride, size);
                        } else {
                            tiles.square(operands, count, square, start, ahead, nowhere);
                        }
                    }
                }
            }
        }
    }
}

/// The numbers up to `count` in groups of one size; there are two at most, whole panels and those that are cut off.
fn by_size(count: usize, size: impl Fn(usize) -> [usize; 2]) -> [Vec<usize>; 2] {
    let (same, other) = (0..count).partition(|&panel| size(panel) == size(0));
    [same, other]
}

/// Copies rows of a matrix.
///
/// # Safety
/// Both have so many rows and columns, and do not overlap.
unsafe fn copy_rows(
    from: *const f32,
    from_stride: usize,
    to: *mut f32,
    to_stride: usize,
    [rows, columns]: [usize; 2],
) {
    for row in 0..rows {
        // SAFETY: the caller's duty.
        unsafe {
            std::ptr::copy_nonoverlapping(
                from.add(row * from_stride),
                to.add(row * to_stride),
                columns,
            );
        }
    }
}
