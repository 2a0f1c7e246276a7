//! The dense matrix product. In `f32` and on a processor with a matrix unit (AMX, bf16) the unit computes it, about 1.6
//! times as fast as AVX-512 for large sizes; else, and for small products, the crate `gemm` does.
//!
//! The unit multiplies bf16 only, so each number is split into three of them, exactly, and the six products that count
//! are added: `a1 b1 + a1 b2 + a2 b1 + a2 b2 + a1 b3 + a3 b1`. What is dropped is below 2^-23 of `|a| |b|` and has no
//! sign of its own; the sums are of `f32`. Measured against `f64` the error is below that of plain sums in `f32`
//! (test). Numbers below 2^-126 count as 0, and those below 2^-110 lose digits. An infinite number or NaN makes its row
//! or column NaN, also where plain sums would give an infinity.
//!
//! Blocks of the result are fixed by the sizes alone: the same result for any number of threads.

#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod pack;
#[cfg(target_arch = "x86_64")]
mod tiled;

use super::Element;
pub use super::gemm::MatrixRef;
use super::gemm::gemm;

/// How a product is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// The matrix unit, for `f32`; else as [`Level::Vectors`].
    Tiles,
    /// The crate `gemm`: AVX-512, AVX2 or neither.
    Vectors,
}

impl Level {
    /// All that this processor has, best first.
    pub fn all() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        if amx::usable() {
            return vec![Self::Tiles, Self::Vectors];
        }
        vec![Self::Vectors]
    }

    /// The faster for a product of these sizes. Measured on one core (Sapphire Rapids, `cargo kernels`), in units of a
    /// multiply-add of the vectors: one of the unit, padding included, takes 6/13, packing a number 18, storing a
    /// result 12.
    pub fn of(Sizes { m, n, k }: Sizes) -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let [rows, columns, depth] = [m, n, k].map(|size| size.next_multiple_of(pack::DEPTH));
            let tiles = rows * columns * depth * 6 / 13 + (m + n) * k * 18 + m * n * 12;
            if tiles < m * n * k && amx::usable() {
                return Self::Tiles;
            }
        }
        let _ = (m, n, k);
        Self::Vectors
    }
}

/// Who does the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The caller's thread alone: it has split the work.
    One,
    /// rayon's.
    All,
}

/// Sizes of a product `[m, k] x [k, n]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
}

/// Where a product goes: `m` rows of `n`, `row_stride` apart.
#[derive(Debug)]
pub struct Output<'a, T> {
    /// Values; those between rows are left alone.
    pub data: &'a mut [T],
    /// Distance between rows.
    pub row_stride: usize,
    /// What the product is added to.
    pub start: Start<'a, T>,
}

/// What a product is added to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Start<'a, T> {
    /// Nothing: the result is overwritten.
    Nothing,
    /// The values there.
    Result,
    /// `n` values, the same for each row: a bias.
    Row(&'a [T]),
}

impl<'a, T: Element> Start<'a, T> {
    /// In `f32`.
    fn single(self) -> Start<'a, f32> {
        match self {
            Self::Nothing => Start::Nothing,
            Self::Result => Start::Result,
            Self::Row(row) => T::as_f32(row).map_or(Start::Nothing, Start::Row),
        }
    }
}

/// The matrix product `c = a b`, or `c += a b`, at the best level there is.
///
/// # Panics
/// When a slice is too short for the sizes given (a defect of the caller).
pub fn product<T: Element>(
    sizes: Sizes,
    a: MatrixRef<'_, T>,
    b: MatrixRef<'_, T>,
    c: Output<'_, T>,
    threads: Threads,
) {
    product_at(Level::of(sizes), sizes, a, b, c, threads);
}

/// [`product`] at a level that this processor has.
///
/// # Panics
/// As [`product`].
pub fn product_at<T: Element>(
    level: Level,
    sizes: Sizes,
    a: MatrixRef<'_, T>,
    b: MatrixRef<'_, T>,
    c: Output<'_, T>,
    threads: Threads,
) {
    let each = Each { items: 1, right: 0, result: 0 };
    product_of_each(level, sizes, a, (b, each), c, threads);
}

/// Right operands and results of several products: how many, and the distance from one to the next.
#[derive(Debug, Clone, Copy)]
pub struct Each {
    /// Products.
    pub items: usize,
    /// Distance of right operands.
    pub right: usize,
    /// Distance of results.
    pub result: usize,
}

/// `c[i] (+)= a b[i]` for each item: one left operand times several right ones, of `sizes` each.
///
/// # Panics
/// When a slice is too short for the sizes given, or results overlap (a defect of the caller).
pub fn product_of_each<T: Element>(
    level: Level,
    sizes: Sizes,
    a: MatrixRef<'_, T>,
    (b, each): (MatrixRef<'_, T>, Each),
    c: Output<'_, T>,
    threads: Threads,
) {
    let Sizes { m, n, k } = sizes;
    if m == 0 || n == 0 || each.items == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if level == Level::Tiles
        && k > 0
        && let (Some(a), Some(b)) = (single(a), single(b))
        && T::as_f32(c.data).is_some()
    {
        use tiled::Order::{ColumnsInTasks, RowsInTasks};
        let (row_stride, start) = (c.row_stride, c.start.single());
        let Some(data) = T::as_f32_mut(c.data) else { return };
        let items = [each.items, each.result];
        let c = tiled::Results::new(sizes, data, row_stride, items, start);
        let rows = pack::Lines::rows(a, m, k);
        let columns = pack::Lines::columns(b, k, n).of_each(each.items, each.right);
        // The shorter operand is packed before, the longer by tasks.
        let (order, shorter, longer) = if m >= n * each.items {
            (RowsInTasks, &columns, &rows)
        } else {
            (ColumnsInTasks, &rows, &columns)
        };
        tiled::with_packed(shorter, k, threads, |packed| {
            tiled::multiply(sizes, order, packed, longer, c, threads);
        });
        return;
    }
    let _ = level;
    by_vectors(sizes, a, (b, each), c, threads);
}

/// A left operand, packed once for several products.
#[derive(Debug, Clone, Copy)]
pub struct Left<'a, T> {
    matrix: MatrixRef<'a, T>,
    m: usize,
    k: usize,
    /// For the matrix unit.
    packed: Option<&'a [f32]>,
}

impl<'a, T: Element> Left<'a, T> {
    /// Calls `work` with `matrix` [m, k], packed for `level`.
    ///
    /// # Panics
    /// When the slice is too short for the sizes given (a defect of the caller).
    pub fn with<R>(
        level: Level,
        matrix: MatrixRef<'a, T>,
        [m, k]: [usize; 2],
        work: impl FnOnce(&Left<'_, T>) -> R,
    ) -> R {
        #[cfg(target_arch = "x86_64")]
        if level == Level::Tiles
            && m > 0
            && k > 0
            && let Some(a) = single(matrix)
        {
            return tiled::with_packed(&pack::Lines::rows(a, m, k), k, Threads::All, |packed| {
                work(&Left { matrix, m, k, packed: Some(packed) })
            });
        }
        let _ = level;
        work(&Left { matrix, m, k, packed: None })
    }

    /// `c (+)= a b` for `b` [k, n], on this thread.
    ///
    /// # Panics
    /// When a slice is too short for the sizes given (a defect of the caller).
    pub fn times(&self, n: usize, b: MatrixRef<'_, T>, c: Output<'_, T>) {
        let Output { data, row_stride, start } = c;
        let (m, k) = (self.m, self.k);
        #[cfg(target_arch = "x86_64")]
        if let (Some(packed), Some(b)) = (self.packed, single(b))
            && m > 0
            && n > 0
        {
            if let Some(data) = T::as_f32_mut(data) {
                let sizes = Sizes { m, n, k };
                let columns = pack::Lines::columns(b, k, n);
                let c = tiled::Results::new(sizes, data, row_stride, [1, 0], start.single());
                let order = tiled::Order::ColumnsInTasks;
                tiled::multiply(sizes, order, packed, &columns, c, Threads::One);
            }
            return;
        }
        plain(Sizes { m, n, k }, self.matrix, b, Output { data, row_stride, start });
    }
}

/// The crate's product.
fn plain<T: Element>(
    Sizes { m, n, k }: Sizes,
    a: MatrixRef<'_, T>,
    b: MatrixRef<'_, T>,
    c: Output<'_, T>,
) {
    if let Start::Row(row) = c.start {
        c.data
            .chunks_mut(c.row_stride.max(1))
            .take(m)
            .for_each(|c| c[..n].copy_from_slice(&row[..n]));
    }
    gemm(m, n, k, a, b, c.data, c.row_stride, c.start != Start::Nothing);
}

/// Products by the crate: each by tasks of rows where there is one, an item a task where there are many.
fn by_vectors<T: Element>(
    Sizes { m, n, k }: Sizes,
    a: MatrixRef<'_, T>,
    (b, each): (MatrixRef<'_, T>, Each),
    c: Output<'_, T>,
    threads: Threads,
) {
    use rayon::prelude::*;
    let Output { data, row_stride, start } = c;
    let item = |(i, data): (usize, &mut [T])| {
        let b = MatrixRef { data: &b.data[(i * each.right).min(b.data.len())..], ..b };
        plain(Sizes { m, n, k }, a, b, Output { data, row_stride, start });
    };
    if each.items > 1 {
        assert!(each.result > 0, "product: outputs overlap");
        match threads {
            Threads::One => {
                data.chunks_mut(each.result).take(each.items).enumerate().for_each(item);
            }
            Threads::All => {
                data.par_chunks_mut(each.result).take(each.items).enumerate().for_each(item);
            }
        }
        return;
    }
    if threads == Threads::One || m <= ROWS || row_stride < n {
        item((0, data));
        return;
    }
    let used = (m - 1) * row_stride + n;
    assert!(used <= data.len(), "product: output too short");
    data[..used].par_chunks_mut(ROWS * row_stride).enumerate().for_each(|(block, data)| {
        let from = (block * ROWS * a.row_stride).min(a.data.len());
        let a = MatrixRef { data: &a.data[from..], ..a };
        let sizes = Sizes { m: ROWS.min(m - block * ROWS), n, k };
        plain(sizes, a, b, Output { data, row_stride, start });
    });
}

/// Rows that one task of the crate's computes.
const ROWS: usize = 64;

/// The matrix, where it is of `f32`.
fn single<T: Element>(m: MatrixRef<'_, T>) -> Option<MatrixRef<'_, f32>> {
    let MatrixRef { data, row_stride, column_stride } = m;
    T::as_f32(data).map(|data| MatrixRef { data, row_stride, column_stride })
}

#[cfg(test)]
mod tests;
