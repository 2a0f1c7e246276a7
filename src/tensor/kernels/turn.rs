//! Transposition of matrices: squares of vector registers turned in registers, the rest element by element.

#![allow(unsafe_code)]

use rayon::prelude::*;

use super::Element;
#[cfg(target_arch = "x86_64")]
use super::vector::{
    Level, Vector,
    x86::{Avx2, Avx512},
};

/// Columns of a task: a cache line of `f32`, twice.
const LINES: usize = 32;

/// `y[o, c, r] = x[o, r, c]` for `x` [.., rows, columns]; added to `y` when `add`.
///
/// # Panics
/// When the slices differ in length or hold no whole matrices (a defect of the caller).
pub fn turn<T: Element>(x: &[T], [rows, columns]: [usize; 2], y: &mut [T], add: bool) {
    let matrix = rows * columns;
    assert!(x.len() == y.len(), "turn: {} values to {}", x.len(), y.len());
    if matrix == 0 {
        return;
    }
    assert!(x.len().is_multiple_of(matrix), "turn: {} values in matrices of {matrix}", x.len());
    y.par_chunks_mut(matrix).zip(x.par_chunks(matrix)).for_each(|(y, x)| {
        y.par_chunks_mut(LINES * rows).enumerate().for_each(|(task, y)| {
            let x = &x[task * LINES..];
            let done = squares(x, columns, y, rows, add);
            rest(x, columns, y, rows, done, add);
        });
    });
}

/// Turns the whole squares of a register's width at the top left; returns how many rows and columns of `x` that is.
#[cfg(target_arch = "x86_64")]
fn squares<T: Element>(x: &[T], columns: usize, y: &mut [T], rows: usize, add: bool) -> [usize; 2] {
    let (Some(level), Some(x)) = (Level::detected(), T::as_f32(x)) else { return [0, 0] };
    let wide = y.len() / rows;
    let Some(y) = T::as_f32_mut(y) else { return [0, 0] };
    // The last value read is at the last row of the last square.
    assert!(y.len() == wide * rows && (rows - 1) * columns + wide <= x.len(), "turn: too short");
    // SAFETY: the processor has the level's instructions; the squares lie in `x` and `y` (asserted).
    unsafe {
        match level {
            Level::Avx512 => avx512(x, columns, y, rows, add),
            Level::Avx2 => avx2(x, columns, y, rows, add),
        }
    }
    let side = level.lanes();
    [rows - rows % side, wide - wide % side]
}

#[cfg(not(target_arch = "x86_64"))]
fn squares<T: Element>(_: &[T], _: usize, _: &mut [T], _: usize, _: bool) -> [usize; 2] {
    [0, 0]
}

/// # Safety
/// As [`each_square`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512(x: &[f32], columns: usize, y: &mut [f32], rows: usize, add: bool) {
    // SAFETY: the caller's duty.
    unsafe { each_square::<Avx512>(x, columns, y, rows, add) }
}

/// # Safety
/// As [`each_square`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(x: &[f32], columns: usize, y: &mut [f32], rows: usize, add: bool) {
    // SAFETY: the caller's duty.
    unsafe { each_square::<Avx2>(x, columns, y, rows, add) }
}

/// # Safety
/// The instructions of `V` are there; `y` is whole lines of `rows`, `x` has `rows` rows of as many values, `columns`
/// apart.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn each_square<V: Vector>(x: &[f32], columns: usize, y: &mut [f32], rows: usize, add: bool) {
    let wide = y.len() / rows;
    let mut turned = [0.0_f32; 256];
    for row in (0..rows - rows % V::LANES).step_by(V::LANES) {
        for column in (0..wide - wide % V::LANES).step_by(V::LANES) {
            // SAFETY: the square lies in both (the caller's duty).
            unsafe {
                let from = x.as_ptr().add(row * columns + column);
                let to = y.as_mut_ptr().add(column * rows + row);
                if !add {
                    V::transpose(from, columns, to, rows);
                    continue;
                }
                V::transpose(from, columns, turned.as_mut_ptr(), V::LANES);
                for line in 0..V::LANES {
                    let to = to.add(line * rows);
                    V::load(to).add(V::load(turned.as_ptr().add(line * V::LANES))).store(to);
                }
            }
        }
    }
}

/// What the squares left: all but the first `done` rows and columns.
fn rest<T: Element>(
    x: &[T],
    columns: usize,
    y: &mut [T],
    rows: usize,
    done: [usize; 2],
    add: bool,
) {
    for (column, y) in y.chunks_exact_mut(rows).enumerate() {
        let first = if column < done[1] { done[0] } else { 0 };
        for (row, y) in y.iter_mut().enumerate().skip(first) {
            let value = x[row * columns + column];
            *y = if add { *y + value } else { value };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: Element>(outer: usize, rows: usize, columns: usize) {
        let x: Vec<T> = (0..outer * rows * columns).map(|v| T::of(v as f64)).collect();
        let before: Vec<T> = x.iter().map(|&v| T::of(-3.0) * v).collect();
        for add in [false, true] {
            let mut y = before.clone();
            turn(&x, [rows, columns], &mut y, add);
            for o in 0..outer {
                for r in 0..rows {
                    for c in 0..columns {
                        let at = (o * columns + c) * rows + r;
                        let sum = if add { before[at] } else { T::ZERO };
                        assert!(y[at] == sum + x[(o * rows + r) * columns + c]);
                    }
                }
            }
        }
    }

    #[test]
    fn every_value_changes_its_row_for_its_column() {
        for (outer, rows, columns) in
            [(1, 1, 1), (2, 16, 16), (3, 17, 33), (1, 49, 96), (2, 196, 7), (1, 5, 70), (0, 3, 4)]
        {
            check::<f32>(outer, rows, columns);
            check::<f64>(outer, rows, columns);
        }
    }
}
