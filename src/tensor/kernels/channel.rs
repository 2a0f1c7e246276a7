//! A scale and a shift per channel, a bounded activation and 2x2 max pooling in one pass over a plane, with the
//! sums that batch statistics need; and the way back, statistics included.
//!
//! What a frozen BatchNormalization and its followers cost is reading and writing memory, so each plane is read
//! once and written once each way. Loops are plain and compiled once a level of vector instructions.

#[cfg(target_arch = "x86_64")]
mod halved;

use super::Element;
use super::map::put;
#[cfg(target_arch = "x86_64")]
use super::vector::Level;
use super::vector::at_each_level;

/// What becomes of `v = a x + b (+ residual)`: `v` held between two bounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds<T> {
    /// Least value.
    pub low: T,
    /// Largest value.
    pub high: T,
    /// The gradient passes where `v` is from here to `high`.
    pub open: T,
}

impl<T: Element> Bounds<T> {
    /// None at all.
    pub fn none() -> Self {
        let [low, high] = [f64::NEG_INFINITY, f64::INFINITY].map(T::of);
        Self { low, high, open: low }
    }

    /// ReLU: no gradient at 0.
    pub fn relu() -> Self {
        let least = T::of(f64::from(f32::from_bits(1)));
        Self { low: T::ZERO, open: least, ..Self::none() }
    }

    /// Clip: the gradient passes at the bounds.
    pub fn clip(low: T, high: T) -> Self {
        Self { low, high, open: low }
    }

    /// Whether nothing is bounded: then a NaN passes too.
    #[inline(always)]
    fn is_none(&self) -> bool {
        *self == Self::none()
    }

    /// `v` within the bounds.
    #[inline(always)]
    pub fn value(&self, v: T) -> T {
        let v = larger(v, self.low);
        if v < self.high { v } else { self.high }
    }

    /// Whether the gradient passes at `v`.
    #[inline(always)]
    pub fn passes(&self, v: T) -> bool {
        v >= self.open && v <= self.high
    }
}

/// One instruction, unlike the functions that mind NaN: the second where the first is NaN.
#[inline(always)]
fn larger<T: Element>(a: T, b: T) -> T {
    if a > b { a } else { b }
}

/// The affine map of one channel and what follows it.
#[derive(Debug, Clone, Copy)]
pub struct Channel<T> {
    /// Factor.
    pub a: T,
    /// Offset.
    pub b: T,
    /// Activation.
    pub bounds: Bounds<T>,
}

/// The gradient through a channel's mean and variance: `offset + factor * x` at each `x`.
#[derive(Debug, Clone, Copy)]
pub struct Through<T> {
    /// At `x = 0`.
    pub offset: T,
    /// Slope.
    pub factor: T,
}

/// Partial sums kept apart so that the compiler can use vector registers.
const LANES: usize = 32;

at_each_level! {
    /// `y = bounds(a x + b)`.
    pub forward = forward_body(channel: Channel<T>, x: &[T], y: &mut [T])
}

at_each_level! {
    /// `y = bounds(a x + b + residual)`.
    pub forward_residual = forward_residual_body(channel: Channel<T>, x: &[T], residual: &[T], y: &mut [T])
}

at_each_level! {
    /// `y = max over 2x2 of bounds(a x + b)` of a plane `width` wide; an odd last row or column is left out.
    pub forward_halved = forward_halved_body(channel: Channel<T>, width: usize, x: &[T], y: &mut [T])
}

at_each_level! {
    /// Sums of `x - shift` and of its square, in a fixed order.
    pub moments = moments_body(shift: T, x: &[T]) -> [T; 2]
}

at_each_level! {
    /// `dx = a dy` where the activation passes, plus the gradient through the statistics; added to `dx` when
    /// `add`.
    pub backward = backward_body(
        channel: Channel<T>, through: Through<T>, x: &[T], dy: &[T], dx: &mut [T], add: bool
    )
}

at_each_level! {
    /// As [`backward`], the activation judged by the output `y` of [`forward_residual`].
    pub backward_by_output = backward_by_output_body(
        channel: Channel<T>, through: Through<T>, x: &[T], y: &[T], dy: &[T], dx: &mut [T], add: bool
    )
}

at_each_level! {
    /// The gradient of [`forward_residual`] to the residual.
    pub backward_residual = backward_residual_body(
        channel: Channel<T>, y: &[T], dy: &[T], dx: &mut [T], add: bool
    )
}

at_each_level! {
    /// [`backward_halved`] for any element and width.
    backward_halved_plain = backward_halved_body(
        channel: Channel<T>, through: Through<T>, width: usize, x: &[T], dy: &[T], dx: &mut [T], add: bool
    )
}

/// The gradient of [`forward_halved`]: to the first of equal maxima.
pub fn backward_halved<T: Element>(
    channel: Channel<T>,
    through: Through<T>,
    width: usize,
    x: &[T],
    dy: &[T],
    dx: &mut [T],
    add: bool,
) {
    #[cfg(target_arch = "x86_64")]
    if let (Some(level), Some(x), Some(dy)) = (Level::detected(), T::as_f32(x), T::as_f32(dy))
        && width.is_multiple_of(level.lanes().min(8))
        && let Some(dx) = T::as_f32_mut(dx)
    {
        let single = |v: T| v.f64() as f32;
        let Bounds { low, high, open } = channel.bounds;
        let bounds = Bounds { low: single(low), high: single(high), open: single(open) };
        let channel = Channel { a: single(channel.a), b: single(channel.b), bounds };
        let through = Through { offset: single(through.offset), factor: single(through.factor) };
        halved::backward(level, channel, through, width, x, dy, dx, add);
        return;
    }
    backward_halved_plain(channel, through, width, x, dy, dx, add);
}

#[inline(always)]
fn forward_body<T: Element>(channel: Channel<T>, x: &[T], y: &mut [T]) {
    if channel.bounds.is_none() {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = channel.a * x + channel.b;
        }
        return;
    }
    for (y, &x) in y.iter_mut().zip(x) {
        *y = channel.bounds.value(channel.a * x + channel.b);
    }
}

#[inline(always)]
fn forward_residual_body<T: Element>(channel: Channel<T>, x: &[T], residual: &[T], y: &mut [T]) {
    if channel.bounds.is_none() {
        for ((y, &x), &residual) in y.iter_mut().zip(x).zip(residual) {
            *y = channel.a * x + channel.b + residual;
        }
        return;
    }
    for ((y, &x), &residual) in y.iter_mut().zip(x).zip(residual) {
        *y = channel.bounds.value(channel.a * x + channel.b + residual);
    }
}

#[inline(always)]
fn forward_halved_body<T: Element>(channel: Channel<T>, width: usize, x: &[T], y: &mut [T]) {
    let columns = width / 2;
    if columns == 0 {
        return;
    }
    // Bounds keep the order, so they may come after the maximum.
    let value = |x: T| channel.a * x + channel.b;
    for (pair, y) in x.chunks_exact(2 * width).zip(y.chunks_exact_mut(columns)) {
        let (top, bottom) = pair.split_at(width);
        let blocks = top.chunks_exact(2).zip(bottom.chunks_exact(2));
        for (y, (t, u)) in y.iter_mut().zip(blocks) {
            let upper = larger(value(t[0]), value(t[1]));
            let lower = larger(value(u[0]), value(u[1]));
            *y = channel.bounds.value(larger(upper, lower));
        }
    }
}

#[inline(always)]
fn moments_body<T: Element>(shift: T, x: &[T]) -> [T; 2] {
    let (mut sums, mut squares) = ([T::ZERO; LANES], [T::ZERO; LANES]);
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            let d = chunk[i] - shift;
            sums[i] += d;
            squares[i] += d * d;
        }
    }
    for (i, &x) in rest.iter().enumerate() {
        let d = x - shift;
        sums[i] += d;
        squares[i] += d * d;
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            let (sum, square) = (sums[i + half], squares[i + half]);
            sums[i] += sum;
            squares[i] += square;
        }
        half /= 2;
    }
    [sums[0], squares[0]]
}

#[inline(always)]
fn backward_body<T: Element>(
    channel: Channel<T>,
    through: Through<T>,
    x: &[T],
    dy: &[T],
    dx: &mut [T],
    add: bool,
) {
    let (x, dy) = (&x[..dx.len()], &dy[..dx.len()]);
    put(dx, add, |i| {
        let passed =
            if channel.bounds.passes(channel.a * x[i] + channel.b) { dy[i] } else { T::ZERO };
        channel.a * passed + (through.offset + through.factor * x[i])
    });
}

#[inline(always)]
fn backward_by_output_body<T: Element>(
    channel: Channel<T>,
    through: Through<T>,
    x: &[T],
    y: &[T],
    dy: &[T],
    dx: &mut [T],
    add: bool,
) {
    let (x, y, dy) = (&x[..dx.len()], &y[..dx.len()], &dy[..dx.len()]);
    put(dx, add, |i| {
        let passed = if channel.bounds.passes(y[i]) { dy[i] } else { T::ZERO };
        channel.a * passed + (through.offset + through.factor * x[i])
    });
}

#[inline(always)]
fn backward_residual_body<T: Element>(
    channel: Channel<T>,
    y: &[T],
    dy: &[T],
    dx: &mut [T],
    add: bool,
) {
    let (y, dy) = (&y[..dx.len()], &dy[..dx.len()]);
    put(dx, add, |i| if channel.bounds.passes(y[i]) { dy[i] } else { T::ZERO });
}

#[inline(always)]
fn backward_halved_body<T: Element>(
    channel: Channel<T>,
    through: Through<T>,
    width: usize,
    x: &[T],
    dy: &[T],
    dx: &mut [T],
    add: bool,
) {
    if add {
        backward_blocks::<T, true>(channel, through, width, x, dy, dx);
    } else {
        backward_blocks::<T, false>(channel, through, width, x, dy, dx);
    }
}

// Selections instead of branches: the compiler makes vectors of them.
#[inline(always)]
fn backward_blocks<T: Element, const ADD: bool>(
    channel: Channel<T>,
    through: Through<T>,
    width: usize,
    x: &[T],
    dy: &[T],
    dx: &mut [T],
) {
    let base = |x: T| through.offset + through.factor * x;
    let value = |x: T| channel.a * x + channel.b;
    let columns = width / 2;
    let rows = dy.len().checked_div(columns).unwrap_or(0);
    let pairs = x.chunks_exact(2 * width).zip(dx.chunks_exact_mut(2 * width));
    for ((x, dx), dy) in pairs.zip(dy.chunks_exact(columns.max(1))) {
        let (top, bottom) = x.split_at(width);
        let (d_top, d_bottom) = dx.split_at_mut(width);
        let from = top.chunks_exact(2).zip(bottom.chunks_exact(2));
        let to = d_top.chunks_exact_mut(2).zip(d_bottom.chunks_exact_mut(2));
        for (((t, u), (dt, du)), &dy) in from.zip(to).zip(dy) {
            let [p, q, r, s] = [value(t[0]), value(t[1]), value(u[0]), value(u[1])];
            let best = larger(larger(p, q), larger(r, s));
            let open = if best <= channel.bounds.high { channel.a * dy } else { T::ZERO };
            let open = if best >= channel.bounds.open { open } else { T::ZERO };
            // What the elements before have left over.
            let own = |v: T, left: T| if v == best { left } else { T::ZERO };
            let after = |v: T, left: T| if v == best { T::ZERO } else { left };
            let (at_p, left) = (own(p, open), after(p, open));
            let (at_q, left) = (own(q, left), after(q, left));
            let (at_r, at_s) = (own(r, left), after(r, left));
            let found =
                [at_p + base(t[0]), at_q + base(t[1]), at_r + base(u[0]), at_s + base(u[1])];
            if ADD {
                dt[0] += found[0];
                dt[1] += found[1];
                du[0] += found[2];
                du[1] += found[3];
            } else {
                dt[0] = found[0];
                dt[1] = found[1];
                du[0] = found[2];
                du[1] = found[3];
            }
        }
        put(&mut d_top[2 * columns..], ADD, |i| base(top[2 * columns + i]));
        put(&mut d_bottom[2 * columns..], ADD, |i| base(bottom[2 * columns + i]));
    }
    let done = 2 * rows * width;
    put(&mut dx[done..], ADD, |i| base(x[done + i]));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::RngStream;

    #[test]
    fn moments_are_those_of_the_definition() {
        let x = RngStream::new(1, "channel", "", 0).normals(1000);
        for n in [0, 1, 31, 32, 33, 1000] {
            let [sum, square] = moments(0.5f32, &x[..n]);
            let d = x[..n].iter().map(|&v| f64::from(v) - 0.5);
            assert!((f64::from(sum) - d.clone().sum::<f64>()).abs() < 1e-3);
            assert!((f64::from(square) - d.map(|d| d * d).sum::<f64>()).abs() < 1e-3);
        }
    }

    #[test]
    fn halving_is_the_maximum_of_blocks_and_its_gradient_goes_to_the_first_of_equals() {
        for (height, width) in [(4, 6), (5, 7), (2, 2), (3, 1), (1, 4), (4, 8), (5, 16), (6, 48)] {
            let mut x: Vec<f64> = RngStream::new(2, "channel", "", (height * width) as u64)
                .normals(height * width)
                .into_iter()
                .map(|v| f64::from((v * 2.0).round()))
                .collect();
            x[0] = 1.0;
            let channel = Channel { a: -0.5, b: 0.25, bounds: Bounds::clip(-0.5, 1.0) };
            let through = Through { offset: 0.125, factor: 0.5 };
            let (rows, columns) = (height / 2, width / 2);
            let mut y = vec![f64::NAN; rows * columns];
            forward_halved(channel, width, &x, &mut y);
            let dy: Vec<f64> = (0..y.len()).map(|i| 1.0 + i as f64).collect();
            let mut dx = vec![1.0; x.len()];
            backward_halved(channel, through, width, &x, &dy, &mut dx, true);
            let mut expected: Vec<f64> = x.iter().map(|x| 1.0 + 0.125 + 0.5 * x).collect();
            for row in 0..rows {
                for column in 0..columns {
                    let cells = [(0, 0), (0, 1), (1, 0), (1, 1)]
                        .map(|(i, j)| (2 * row + i) * width + 2 * column + j);
                    let values = cells.map(|at| -0.5 * x[at] + 0.25);
                    let best = values.into_iter().fold(f64::NEG_INFINITY, f64::max);
                    let cell = row * columns + column;
                    assert_eq!(y[cell], best.clamp(-0.5, 1.0));
                    if (-0.5..=1.0).contains(&best) {
                        let first = values.iter().position(|&v| v == best).unwrap();
                        expected[cells[first]] += -0.5 * dy[cell];
                    }
                }
            }
            assert_eq!(dx, expected, "{height} x {width}");
            // All values here are exact in `f32`, which has a way of its own.
            let single = |v: &[f64]| v.iter().map(|&v| v as f32).collect::<Vec<f32>>();
            let channel = Channel { a: -0.5, b: 0.25, bounds: Bounds::clip(-0.5, 1.0) };
            let through = Through { offset: 0.125, factor: 0.5 };
            let (x, dy) = (single(&x), single(&dy));
            let mut dx = vec![1.0; x.len()];
            backward_halved(channel, through, width, &x, &dy, &mut dx, true);
            assert_eq!(dx, single(&expected), "{height} x {width}, f32");
            backward_halved(channel, through, width, &x, &dy, &mut dx, false);
            dx.iter_mut().for_each(|d| *d += 1.0);
            assert_eq!(dx, single(&expected), "{height} x {width}, f32, written");
        }
    }
}
