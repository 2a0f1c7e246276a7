//! One plane, for any element: the columns from `from` on, so that vectors may do those before.

#[cfg(target_arch = "x86_64")]
use super::super::vector::Level;
#[cfg(target_arch = "x86_64")]
use super::vectors;
use super::{Channel, Element, Plane, Second};

impl<T: Element> Plane<'_, T> {
    /// The same plane in `f32` and the vector instructions, where both are at hand.
    #[cfg(target_arch = "x86_64")]
    fn single(&self) -> Option<(Level, Plane<'_, f32>)> {
        let x = T::as_f32(self.x)?;
        let [mean, inverse_std, scale, shift] =
            [self.channel.mean, self.channel.inverse_std, self.channel.scale, self.channel.shift]
                .map(|v| v.f64() as f32);
        let channel = Channel { mean, inverse_std, scale, shift };
        Some((Level::detected()?, Plane { channel, width: self.width, x }))
    }

    /// Indices of the elements beyond the whole blocks.
    fn edges(&self) -> impl Iterator<Item = usize> {
        let (width, rows) = (self.width, self.x.len() / self.width);
        let even = rows / 2 * 2;
        let right = (0..even * (width % 2)).map(move |row| row * width + width - 1);
        right.chain(even * width..rows * width)
    }

    /// Calls `visit` for each block from column `from` on: its index among the blocks, those of its four elements, and
    /// which of them is the largest, the first of equals, where ReLU lets it through.
    #[inline(always)]
    fn blocks(&self, from: usize, mut visit: impl FnMut(usize, [usize; 4], Option<usize>)) {
        let (width, columns) = (self.width, self.width / 2);
        let value = |at: usize| self.x[at] * self.channel.scale + self.channel.shift;
        for row in 0..self.x.len() / width / 2 {
            for column in from / 2..columns {
                let first = 2 * row * width + 2 * column;
                let four = [first, first + 1, first + width, first + width + 1];
                let (mut best, mut at) = (value(four[0]), four[0]);
                for &other in &four[1..] {
                    if value(other) > best {
                        (best, at) = (value(other), other);
                    }
                }
                visit(row * columns + column, four, (best > T::ZERO).then_some(at));
            }
        }
    }

    pub(super) fn forward(&self, y: &mut [T]) {
        let mut from = 0;
        #[cfg(target_arch = "x86_64")]
        if let (Some((level, plane)), Some(y)) = (self.single(), T::as_f32_mut(y)) {
            from = vectors::forward(level, &plane, y);
        }
        let Channel { scale, shift, .. } = self.channel;
        self.blocks(from, |block, _, at| {
            y[block] = at.map_or(T::ZERO, |at| self.x[at] * scale + shift);
        });
    }

    /// `sum(G)` and `sum(G (x - mean))`.
    pub(super) fn first_sums(&self, g: &[T]) -> [T; 2] {
        let (mut from, mut sums) = (0, [T::ZERO; 2]);
        #[cfg(target_arch = "x86_64")]
        if let (Some((level, plane)), Some(g)) = (self.single(), T::as_f32(g)) {
            let (done, found) = vectors::first_sums(level, &plane, g);
            (from, sums) = (done, found.map(|v| T::of(f64::from(v))));
        }
        self.blocks(from, |block, _, at| {
            if let Some(at) = at {
                sums[0] += g[block];
                sums[1] += g[block] * (self.x[at] - self.channel.mean);
            }
        });
        sums
    }

    /// `dx = offset + slope x + scale G`.
    pub(super) fn backward(&self, offset: T, slope: T, g: &[T], dx: &mut [T]) {
        let mut from = 0;
        #[cfg(target_arch = "x86_64")]
        if let (Some((level, plane)), Some(g)) = (self.single(), T::as_f32(g))
            && let Some(dx) = T::as_f32_mut(dx)
        {
            from = vectors::backward(level, &plane, [offset, slope].map(|v| v.f64() as f32), g, dx);
        }
        let base = |at: usize| offset + slope * self.x[at];
        self.blocks(from, |block, four, open| {
            for at in four {
                let own = if open == Some(at) { self.channel.scale * g[block] } else { T::ZERO };
                dx[at] = base(at) + own;
            }
        });
        self.edges().for_each(|at| dx[at] = base(at));
    }

    /// `sum(h)`, `sum(h (x - mean))` and `sum(G h)`.
    pub(super) fn second_sums(&self, g: &[T], h: &[T]) -> [T; 3] {
        let (mut from, mut sums) = (0, [T::ZERO; 3]);
        #[cfg(target_arch = "x86_64")]
        if let (Some((level, plane)), Some(g), Some(h)) =
            (self.single(), T::as_f32(g), T::as_f32(h))
        {
            let (done, found) = vectors::second_sums(level, &plane, g, h);
            (from, sums) = (done, found.map(|v| T::of(f64::from(v))));
        }
        let mean = self.channel.mean;
        self.blocks(from, |block, four, open| {
            for at in four {
                sums[0] += h[at];
                sums[1] += h[at] * (self.x[at] - mean);
            }
            if let Some(at) = open {
                sums[2] += g[block] * h[at];
            }
        });
        for at in self.edges() {
            sums[0] += h[at];
            sums[1] += h[at] * (self.x[at] - mean);
        }
        sums
    }

    /// Both results as `second` says.
    pub(super) fn second(&self, second: &Second<T>, g: &[T], h: &[T], dx: &mut [T], dg: &mut [T]) {
        let mut from = 0;
        #[cfg(target_arch = "x86_64")]
        if let (Some((level, plane)), Some(g), Some(h)) =
            (self.single(), T::as_f32(g), T::as_f32(h))
            && let (Some(dx), Some(dg)) = (T::as_f32_mut(dx), T::as_f32_mut(dg))
        {
            let second = Second {
                dense: second.dense.map(|v| v.f64() as f32),
                picked: second.picked.map(|v| v.f64() as f32),
            };
            from = vectors::second(level, &plane, &second, [g, h], [dx, dg]);
        }
        let ([a, b, c, d], [p, q, r]) = (second.dense, second.picked);
        let base = |at: usize| a + b * self.x[at] + c * h[at];
        self.blocks(from, |block, four, open| {
            for at in four {
                dx[at] = base(at) + if open == Some(at) { d * g[block] } else { T::ZERO };
            }
            dg[block] = open.map_or(T::ZERO, |at| p + q * self.x[at] + r * h[at]);
        });
        self.edges().for_each(|at| dx[at] = base(at));
    }
}
