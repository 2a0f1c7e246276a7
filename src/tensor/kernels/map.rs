//! Element-wise maps and sums over slices, split into fixed blocks.
//!
//! candle's element-wise operations run on one thread and its sums at 0.1 G elements a second
//! (findings: design.md 3); these vectorise. Blocks have a fixed size, so a sum is the same for any
//! number of threads.

use rayon::prelude::*;

use super::Element;
use super::vector::at_each_level;

/// Elements per task: 64 KiB of `f32`, well inside a second-level cache.
const BLOCK: usize = 1 << 14;
/// Partial sums kept apart so that the compiler can use vector registers.
const LANES: usize = 16;

/// `y = f(x)`.
pub fn map<T: Element>(x: &[T], y: &mut [T], f: impl One<T>) {
    let blocks = y.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK));
    blocks.for_each(|(y, x)| block(x, y, f));
}

/// `y = f(a, b)`.
pub fn zip<T: Element>(a: &[T], b: &[T], y: &mut [T], f: impl Two<T>) {
    let blocks = y.par_chunks_mut(BLOCK).zip(a.par_chunks(BLOCK)).zip(b.par_chunks(BLOCK));
    blocks.for_each(|((y, a), b)| block_two(a, b, y, f));
}

/// `y = f(a, b)` for `a` and `y` `[any, middle, inner]` and `b` `[middle]`.
///
/// # Panics
/// When the sizes do not fit (a defect of the caller).
pub fn spread<T: Element>(a: &[T], b: &[T], inner: usize, y: &mut [T], f: impl Two<T>) {
    let middle = b.len();
    assert!(a.len() == y.len() && y.len().is_multiple_of(middle * inner), "sizes of a spread map");
    if y.is_empty() {
        return;
    }
    if let [b] = *b {
        return map(a, y, |a| f(a, b));
    }
    if middle == y.len() {
        return zip(a, b, y, f);
    }
    if inner == 1 {
        let rows = y.par_chunks_exact_mut(middle).zip(a.par_chunks_exact(middle));
        rows.with_min_len(BLOCK.div_ceil(middle)).for_each(|(y, a)| block_two(a, b, y, f));
        return;
    }
    y.par_chunks_exact_mut(inner)
        .zip(a.par_chunks_exact(inner))
        .enumerate()
        .with_min_len(BLOCK.div_ceil(inner))
        .for_each(|(plane, (y, a))| {
            let b = b[plane % middle];
            block(a, y, |a| f(a, b));
        });
}

/// A function of one number that may run on many threads.
pub trait One<T>: Fn(T) -> T + Copy + Sync + Send {}
impl<T, F: Fn(T) -> T + Copy + Sync + Send> One<T> for F {}

/// A function of two numbers that may run on many threads.
pub trait Two<T>: Fn(T, T) -> T + Copy + Sync + Send {}
impl<T, F: Fn(T, T) -> T + Copy + Sync + Send> Two<T> for F {}

/// A function of three numbers that may run on many threads. Large ones are types of their own with
/// `#[inline(always)]`: a closure that is not inlined is compiled without the level's instructions.
pub trait Three<T>: Copy + Sync + Send {
    /// The value.
    fn at(self, a: T, b: T, c: T) -> T;
}
impl<T, F: Fn(T, T, T) -> T + Copy + Sync + Send> Three<T> for F {
    #[inline(always)]
    fn at(self, a: T, b: T, c: T) -> T {
        self(a, b, c)
    }
}

at_each_level! {
    /// `y = f(x)` on one thread, with the best vector instructions.
    pub block<F: One<T>> = block_body(x: &[T], y: &mut [T], f: F)
}

at_each_level! {
    /// `y = f(a, b)` on one thread, with the best vector instructions.
    block_two<F: Two<T>> = block_two_body(a: &[T], b: &[T], y: &mut [T], f: F)
}

at_each_level! {
    /// `to = f(a, b, c)` on one thread, with the best vector instructions; added to `to` when `add`.
    pub block_three<F: Three<T>> = block_three_body(
        a: &[T], b: &[T], c: &[T], to: &mut [T], add: bool, f: F
    )
}

#[inline(always)]
fn block_body<T: Element, F: One<T>>(x: &[T], y: &mut [T], f: F) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = f(x);
    }
}

#[inline(always)]
fn block_two_body<T: Element, F: Two<T>>(a: &[T], b: &[T], y: &mut [T], f: F) {
    for ((y, &a), &b) in y.iter_mut().zip(a).zip(b) {
        *y = f(a, b);
    }
}

#[inline(always)]
fn block_three_body<T: Element, F: Three<T>>(
    a: &[T],
    b: &[T],
    c: &[T],
    to: &mut [T],
    add: bool,
    f: F,
) {
    let terms = to.iter_mut().zip(a).zip(b).zip(c);
    if add {
        for (((to, &a), &b), &c) in terms {
            *to += f.at(a, b, c);
        }
    } else {
        for (((to, &a), &b), &c) in terms {
            *to = f.at(a, b, c);
        }
    }
}

/// Puts `value(i)` at each position of `to`, or adds it.
#[inline(always)]
pub(super) fn put<T: Element>(to: &mut [T], add: bool, value: impl Fn(usize) -> T) {
    if add {
        for (i, to) in to.iter_mut().enumerate() {
            *to += value(i);
        }
    } else {
        for (i, to) in to.iter_mut().enumerate() {
            *to = value(i);
        }
    }
}

/// Sum of a slice in a fixed order (16 interleaved partial sums).
pub fn sum<T: Element>(x: &[T]) -> T {
    sum_of(x, |value| value)
}

/// Sum of `f(x)` over a slice in a fixed order.
pub fn sum_of<T: Element>(x: &[T], f: impl Fn(T) -> T) -> T {
    let mut lanes = [T::ZERO; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f(value);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane += f(value);
    }
    fold(lanes)
}

/// Sum of `f(a, b)` over two slices in a fixed order.
pub fn sum_zip<T: Element>(a: &[T], b: &[T], f: impl Fn(T, T) -> T) -> T {
    let mut lanes = [T::ZERO; LANES];
    let (left, right) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (left_rest, right_rest) = (left.remainder(), right.remainder());
    for (a, b) in left.zip(right) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += f(a, b);
        }
    }
    for ((lane, &a), &b) in lanes.iter_mut().zip(left_rest).zip(right_rest) {
        *lane += f(a, b);
    }
    fold(lanes)
}

fn fold<T: Element>(mut lanes: [T; LANES]) -> T {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            let other = lanes[i + width];
            lanes[i] += other;
        }
        width /= 2;
    }
    lanes[0]
}

/// `y[outer, inner] = sum over r of x[outer, r, inner]`.
pub fn sum_axis<T: Element>(x: &[T], reduced: usize, inner: usize, y: &mut [T]) {
    if y.is_empty() {
        return;
    }
    if reduced == 0 {
        y.fill(T::ZERO);
        return;
    }
    if inner == 1 {
        if y.len() == 1 {
            let parts: Vec<T> = x.par_chunks(BLOCK).map(sum).collect();
            y[0] = sum(&parts);
            return;
        }
        let rows = (BLOCK / reduced).max(1);
        y.par_chunks_mut(rows).zip(x.par_chunks(rows * reduced)).for_each(|(y, x)| {
            for (y, row) in y.iter_mut().zip(x.chunks_exact(reduced)) {
                *y = sum(row);
            }
        });
        return;
    }
    y.par_chunks_mut(inner).zip(x.par_chunks(inner * reduced)).for_each(|(y, x)| {
        y.fill(T::ZERO);
        for row in x.chunks_exact(inner) {
            for (y, &value) in y.iter_mut().zip(row) {
                *y += value;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_any_length_are_exact_on_integers() {
        for n in [0usize, 1, 15, 16, 17, 100, 40_000] {
            let x: Vec<f64> = (0..n).map(|i| i as f64).collect();
            let expected = (n * n.saturating_sub(1) / 2) as f64;
            assert_eq!(sum(&x), expected);
            assert_eq!(sum_zip(&x, &x, |a, b| a * b), x.iter().map(|v| v * v).sum::<f64>());
            let mut y = [0.0];
            sum_axis(&x, n, 1, &mut y);
            assert_eq!(y[0], expected);
        }
    }

    #[test]
    fn sums_over_a_middle_axis() {
        let x: Vec<f64> = (0..24).map(f64::from).collect();
        let mut y = vec![0.0; 8];
        sum_axis(&x, 3, 4, &mut y);
        for outer in 0..2 {
            for inner in 0..4 {
                let expected: f64 = (0..3).map(|r| x[outer * 12 + r * 4 + inner]).sum();
                assert_eq!(y[outer * 4 + inner], expected);
            }
        }
    }
}
