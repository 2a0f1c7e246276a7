//! The small matrix product of one point: tiles by input channels times input channels by a panel of outputs.

use super::super::vector::Vector;
use super::ROWS;

/// `to[r, o] = sum_c a[r, c] b[c, o]`; all row-major, `b` and `to` as wide as the panel.
pub(super) struct Product<'a> {
    /// Rows: tiles.
    pub(super) rows: usize,
    /// Length of the sums: input channels.
    pub(super) depth: usize,
    pub(super) a: &'a [f32],
    pub(super) b: &'a [f32],
    pub(super) to: &'a mut [f32],
}

// Index loops of constant length keep the sums in registers; iterators do not.
#[allow(clippy::needless_range_loop)]
impl Product<'_> {
    /// # Safety
    /// The instructions of `V` must be switched on; the panel is `N` vectors wide.
    #[inline(always)]
    pub(super) unsafe fn run<V: Vector, const N: usize>(self) {
        assert!(self.rows * self.depth <= self.a.len());
        assert!(self.depth * N * V::LANES <= self.b.len());
        assert!(self.rows * N * V::LANES <= self.to.len());
        let (mut a, mut to) = (self.a.as_ptr(), self.to.as_mut_ptr());
        let mut left = self.rows;
        while left > 0 {
            let now = left.min(ROWS);
            // SAFETY: `now` rows are left of `a` and `to` (asserted above).
            unsafe {
                match now {
                    1 => self.rows::<V, N, 1>(a, to),
                    2 => self.rows::<V, N, 2>(a, to),
                    3 => self.rows::<V, N, 3>(a, to),
                    4 => self.rows::<V, N, 4>(a, to),
                    5 => self.rows::<V, N, 5>(a, to),
                    _ => self.rows::<V, N, ROWS>(a, to),
                }
                a = a.add(now * self.depth);
                to = to.add(now * N * V::LANES);
            }
            left -= now;
        }
    }

    /// # Safety
    /// As [`Product::run`]; `R` rows from `a` and `to` on.
    #[inline(always)]
    unsafe fn rows<V: Vector, const N: usize, const R: usize>(&self, a: *const f32, to: *mut f32) {
        // SAFETY: the caller's duty.
        unsafe {
            let mut sums = [[V::splat(0.0); N]; R];
            let mut b = self.b.as_ptr();
            for c in 0..self.depth {
                let mut row = [V::splat(0.0); N];
                for n in 0..N {
                    row[n] = V::load(b.add(n * V::LANES));
                }
                for r in 0..R {
                    let factor = V::splat(*a.add(r * self.depth + c));
                    for n in 0..N {
                        sums[r][n] = row[n].fma(factor, sums[r][n]);
                    }
                }
                b = b.add(N * V::LANES);
            }
            for r in 0..R {
                for n in 0..N {
                    sums[r][n].store(to.add((r * N + n) * V::LANES));
                }
            }
        }
    }
}
