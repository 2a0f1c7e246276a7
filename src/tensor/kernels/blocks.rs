//! Non-overlapping `k x k` blocks of image planes: maximum, gather and scatter at the maximum, sum,
//! and repetition (nearest up-sampling). Rows and columns beyond the last whole block are left out,
//! as ONNX and PyTorch do.

use rayon::prelude::*;

use super::Element;
use super::vector::at_each_level;

/// Planes `[planes, height, width]` cut into `k x k` blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// Images times channels.
    pub planes: usize,
    /// Height and width of the large side.
    pub large: [usize; 2],
    /// Side of a block, at most 15.
    pub side: usize,
}

impl Blocks {
    /// Height and width of the small side.
    pub fn small(&self) -> [usize; 2] {
        [self.large[0] / self.side, self.large[1] / self.side]
    }

    fn large_len(&self) -> usize {
        self.large[0] * self.large[1]
    }

    fn small_len(&self) -> usize {
        self.small()[0] * self.small()[1]
    }

    /// Calls `work(plane, small index, large index of the block's first element)` for one plane.
    fn each(&self, mut work: impl FnMut(usize, usize)) {
        let [rows, columns] = self.small();
        for row in 0..rows {
            let first = row * self.side * self.large[1];
            for column in 0..columns {
                work(row * columns + column, first + column * self.side);
            }
        }
    }

    /// Offset inside the plane of element `index` (row-major) of a block.
    fn offset(&self, index: u8) -> usize {
        let index = usize::from(index);
        index / self.side * self.large[1] + index % self.side
    }
}

/// Largest value of each block and its place in the block (row-major; the first of equals; a NaN
/// wins, as in PyTorch).
pub fn block_max<T: Element>(blocks: &Blocks, x: &[T], y: &mut [T], place: &mut [u8]) {
    if blocks.large_len() == 0 || blocks.small_len() == 0 {
        return;
    }
    let [rows, columns] = blocks.small();
    let width = blocks.large[1];
    y.par_chunks_mut(blocks.small_len())
        .zip(place.par_chunks_mut(blocks.small_len()))
        .zip(x.par_chunks(blocks.large_len()))
        .for_each(|((y, place), x)| {
            if blocks.side == 2 {
                for row in 0..rows {
                    let top = &x[2 * row * width..][..2 * columns];
                    let bottom = &x[(2 * row + 1) * width..][..2 * columns];
                    let y = &mut y[row * columns..][..columns];
                    let place = &mut place[row * columns..][..columns];
                    for (((y, place), top), bottom) in
                        y.iter_mut().zip(place).zip(top.chunks_exact(2)).zip(bottom.chunks_exact(2))
                    {
                        (*y, *place) = first_max([top[0], top[1], bottom[0], bottom[1]]);
                    }
                }
                return;
            }
            blocks.each(|small, large| {
                let (mut best, mut at) = (x[large], 0);
                for index in 1..(blocks.side * blocks.side) as u8 {
                    let value = x[large + blocks.offset(index)];
                    // A number differs from itself only when it is NaN.
                    #[allow(clippy::eq_op)]
                    if value > best || (value != value && best == best) {
                        (best, at) = (value, index);
                    }
                }
                y[small] = best;
                place[small] = at;
            });
        });
}

/// The largest of four and its index; the first of equals; a NaN wins.
#[inline(always)]
pub(crate) fn first_max<T: Element>(values: [T; 4]) -> (T, u8) {
    let (mut best, mut at) = (values[0], 0);
    for (index, &value) in values.iter().enumerate().skip(1) {
        #[allow(clippy::eq_op)]
        let larger = value > best || (value != value && best == best);
        best = if larger { value } else { best };
        at = if larger { index as u8 } else { at };
    }
    (best, at)
}

/// `y[block] = x[block at place]`.
pub fn block_gather<T: Element>(blocks: &Blocks, x: &[T], place: &[u8], y: &mut [T]) {
    if blocks.small_len() == 0 {
        return;
    }
    y.par_chunks_mut(blocks.small_len())
        .zip(place.par_chunks(blocks.small_len()))
        .zip(x.par_chunks(blocks.large_len()))
        .for_each(|((y, place), x)| {
            blocks.each(|small, large| y[small] = x[large + blocks.offset(place[small])]);
        });
}

/// `x[block at place] = y[block]`, zero elsewhere: the transpose of [`block_gather`].
pub fn block_scatter<T: Element>(blocks: &Blocks, y: &[T], place: &[u8], x: &mut [T]) {
    if blocks.small_len() == 0 {
        x.fill(T::ZERO);
        return;
    }
    x.par_chunks_mut(blocks.large_len())
        .zip(place.par_chunks(blocks.small_len()))
        .zip(y.par_chunks(blocks.small_len()))
        .for_each(|((x, place), y)| {
            x.fill(T::ZERO);
            blocks.each(|small, large| x[large + blocks.offset(place[small])] = y[small]);
        });
}

/// `y[block] = sum of the block`.
pub fn block_sum<T: Element>(blocks: &Blocks, x: &[T], y: &mut [T]) {
    if blocks.small_len() == 0 {
        return;
    }
    let (side, width) = (blocks.side, blocks.large[1]);
    y.par_chunks_mut(blocks.small_len()).zip(x.par_chunks(blocks.large_len())).for_each(
        |(y, x)| {
            if side == 2 && width % 2 == 0 {
                sum_pairs(width, x, y);
                return;
            }
            blocks.each(|small, large| {
                let mut total = T::ZERO;
                for row in 0..side {
                    for &value in &x[large + row * width..][..side] {
                        total += value;
                    }
                }
                y[small] = total;
            });
        },
    );
}

/// `x[every element of block] = y[block]`, zero outside the blocks: the transpose of [`block_sum`],
/// nearest up-sampling by an integer factor.
pub fn block_repeat<T: Element>(blocks: &Blocks, y: &[T], x: &mut [T]) {
    if blocks.small_len() == 0 {
        x.fill(T::ZERO);
        return;
    }
    let [_, columns] = blocks.small();
    let (side, width) = (blocks.side, blocks.large[1]);
    let whole = columns * side;
    x.par_chunks_mut(blocks.large_len()).zip(y.par_chunks(blocks.small_len())).for_each(
        |(x, y)| {
            for (block_row, y) in x.chunks_mut(side * width).zip(y.chunks_exact(columns)) {
                let (first, others) = block_row.split_at_mut(width);
                if side == 2 {
                    repeat_pairs(y, &mut first[..whole]);
                } else {
                    for (cells, &value) in first[..whole].chunks_exact_mut(side).zip(y) {
                        cells.fill(value);
                    }
                }
                first[whole..].fill(T::ZERO);
                for row in others.chunks_exact_mut(width) {
                    row.copy_from_slice(first);
                }
            }
            x[y.len() / columns * side * width..].fill(T::ZERO);
        },
    );
}

at_each_level! {
    /// `y = sum over 2x2` of a plane of even width.
    sum_pairs = sum_pairs_body(width: usize, x: &[T], y: &mut [T])
}

at_each_level! {
    /// `x` is each of `y` twice.
    repeat_pairs = repeat_pairs_body(y: &[T], x: &mut [T])
}

#[inline(always)]
fn sum_pairs_body<T: Element>(width: usize, x: &[T], y: &mut [T]) {
    for (x, y) in x.chunks_exact(2 * width).zip(y.chunks_exact_mut(width / 2)) {
        let (top, bottom) = x.split_at(width);
        let pairs = top.chunks_exact(2).zip(bottom.chunks_exact(2));
        for (y, (t, u)) in y.iter_mut().zip(pairs) {
            *y = t[0] + t[1] + u[0] + u[1];
        }
    }
}

#[inline(always)]
fn repeat_pairs_body<T: Element>(y: &[T], x: &mut [T]) {
    for (x, &y) in x.chunks_exact_mut(2).zip(y) {
        x[0] = y;
        x[1] = y;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(n: usize) -> Vec<f64> {
        (0..n).map(|i| ((i * 37 + 11) % 101) as f64 / 10.0 - 5.0).collect()
    }

    #[test]
    fn maximum_takes_the_first_of_equals_and_leaves_odd_edges_out() {
        for (side, large) in [(2, [5, 7]), (3, [7, 9]), (2, [4, 4])] {
            let blocks = Blocks { planes: 3, large, side };
            let [rows, columns] = blocks.small();
            let mut x = sample(3 * large[0] * large[1]);
            let n = 3 * rows * columns;
            x[0] = 9.0;
            x[1] = 9.0;
            let (mut y, mut place) = (vec![0.0; n], vec![0; n]);
            block_max(&blocks, &x, &mut y, &mut place);
            assert_eq!((y[0], place[0]), (9.0, 0));
            for plane in 0..3 {
                for row in 0..rows {
                    for column in 0..columns {
                        let mut best = f64::NEG_INFINITY;
                        for i in 0..side {
                            for j in 0..side {
                                let at = (row * side + i) * large[1] + column * side + j;
                                best = best.max(x[plane * large[0] * large[1] + at]);
                            }
                        }
                        assert_eq!(y[(plane * rows + row) * columns + column], best);
                    }
                }
            }
            let mut gathered = vec![0.0; n];
            block_gather(&blocks, &x, &place, &mut gathered);
            assert_eq!(gathered, y);
        }
    }

    #[test]
    fn gather_and_scatter_and_sum_and_repeat_are_transposes() {
        for (side, large) in [(2, [5, 7]), (3, [7, 9]), (2, [4, 6]), (2, [5, 34])] {
            let blocks = Blocks { planes: 2, large, side };
            let n_large = 2 * large[0] * large[1];
            let n_small = 2 * blocks.small()[0] * blocks.small()[1];
            let (x, g) = (sample(n_large), sample(n_small));
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let (mut y, mut place) = (vec![0.0; n_small], vec![0; n_small]);
            block_max(&blocks, &x, &mut y, &mut place);
            let mut back = vec![f64::NAN; n_large];
            block_scatter(&blocks, &g, &place, &mut back);
            assert!((dot(&y, &g) - dot(&x, &back)).abs() < 1e-9);
            block_sum(&blocks, &x, &mut y);
            back.fill(f64::NAN);
            block_repeat(&blocks, &g, &mut back);
            assert!((dot(&y, &g) - dot(&x, &back)).abs() < 1e-9);
        }
    }
}
