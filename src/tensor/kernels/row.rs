//! Normalisations along a row: standardisation (layer, RMS, instance and group normalisation) and softmax, forward
//! and backward, each a few passes over a row that lies in the first-level cache.

use super::Element;
use super::map::put;
use super::special::exp;
use super::vector::at_each_level;

/// Partial sums kept apart so that the compiler can use vector registers.
const LANES: usize = 32;

/// A standardised row's scale and shift: one of each an element, or none.
pub type Affine<'a, T> = Option<(&'a [T], &'a [T])>;

at_each_level! {
    /// `y = (x - mean) / sqrt(var + epsilon)`, times scale plus shift; returns the mean and the inverse deviation.
    /// Without `centre` the mean is taken for 0.
    pub standardize = standardize_body(
        x: &[T], y: &mut [T], epsilon: T, centre: bool, affine: Affine<'_, T>
    ) -> [T; 2]
}

at_each_level! {
    /// The gradient of [`standardize`] to `x`, given what it returned; added to `dx` when `add`.
    pub standardize_backward = standardize_backward_body(
        x: &[T], dy: &[T], dx: &mut [T], moments: [T; 2], centre: bool, affine: Affine<'_, T>, add: bool
    )
}

at_each_level! {
    /// `y = exp(x - top)`; returns the sum.
    pub exponentials = exponentials_body(x: &[T], y: &mut [T], top: T) -> T
}

at_each_level! {
    /// The largest element (minus infinity of none).
    pub largest = largest_body(x: &[T]) -> T
}

at_each_level! {
    /// `y = y * factor`.
    pub scale = scale_body(y: &mut [T], factor: T)
}

at_each_level! {
    /// The gradient of softmax, given its output; added to `dx` when `add`.
    pub softmax_backward = softmax_backward_body(y: &[T], dy: &[T], dx: &mut [T], add: bool)
}

/// `combine` over lanes kept apart, then over the lanes, in a fixed order.
#[inline(always)]
fn reduce<T: Element>(
    n: usize,
    start: T,
    value: impl Fn(usize) -> T,
    combine: impl Fn(T, T) -> T,
) -> T {
    let mut lanes = [start; LANES];
    let whole = n - n % LANES;
    let mut at = 0;
    while at < whole {
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane = combine(*lane, value(at.wrapping_add(i)));
        }
        at = at.wrapping_add(LANES);
    }
    for (lane, i) in lanes.iter_mut().zip(whole..n) {
        *lane = combine(*lane, value(i));
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = combine(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn sum<T: Element>(n: usize, value: impl Fn(usize) -> T) -> T {
    reduce(n, T::ZERO, value, |a, b| a + b)
}

#[inline(always)]
fn standardize_body<T: Element>(
    x: &[T],
    y: &mut [T],
    epsilon: T,
    centre: bool,
    affine: Affine<'_, T>,
) -> [T; 2] {
    let x = &x[..y.len()];
    let count = T::of(x.len().max(1) as f64);
    let mean = if centre { sum(x.len(), |i| x[i]) / count } else { T::ZERO };
    let var = sum(x.len(), |i| (x[i] - mean) * (x[i] - mean)) / count;
    let inverse = T::ONE / (var + epsilon).sqrt();
    match affine {
        Some((scale, shift)) => {
            for (((y, &x), &scale), &shift) in y.iter_mut().zip(x).zip(scale).zip(shift) {
                *y = (x - mean) * inverse * scale + shift;
            }
        }
        None => {
            for (y, &x) in y.iter_mut().zip(x) {
                *y = (x - mean) * inverse;
            }
        }
    }
    [mean, inverse]
}

#[inline(always)]
fn standardize_backward_body<T: Element>(
    x: &[T],
    dy: &[T],
    dx: &mut [T],
    [mean, inverse]: [T; 2],
    centre: bool,
    affine: Affine<'_, T>,
    add: bool,
) {
    let n = dx.len();
    let (x, dy) = (&x[..n], &dy[..n]);
    match affine {
        Some((scale, _)) => {
            let scale = &scale[..n];
            through(x, dx, [mean, inverse], centre, add, |i| dy[i] * scale[i]);
        }
        None => through(x, dx, [mean, inverse], centre, add, |i| dy[i]),
    }
}

#[inline(always)]
fn through<T: Element>(
    x: &[T],
    dx: &mut [T],
    [mean, inverse]: [T; 2],
    centre: bool,
    add: bool,
    g: impl Fn(usize) -> T + Copy,
) {
    let n = dx.len();
    let count = T::of(n.max(1) as f64);
    let standard = |i: usize| (x[i] - mean) * inverse;
    let along = sum(n, |i| g(i) * standard(i)) / count;
    let middle = if centre { sum(n, g) / count } else { T::ZERO };
    put(dx, add, |i| inverse * (g(i) - middle - standard(i) * along));
}

#[inline(always)]
fn exponentials_body<T: Element>(x: &[T], y: &mut [T], top: T) -> T {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = exp(x - top);
    }
    let y = &*y;
    sum(y.len(), |i| y[i])
}

#[inline(always)]
fn largest_body<T: Element>(x: &[T]) -> T {
    let least = T::of(f64::NEG_INFINITY);
    reduce(x.len(), least, |i| x[i], |a, b| if a > b { a } else { b })
}

#[inline(always)]
fn scale_body<T: Element>(y: &mut [T], factor: T) {
    for y in y {
        *y *= factor;
    }
}

#[inline(always)]
fn softmax_backward_body<T: Element>(y: &[T], dy: &[T], dx: &mut [T], add: bool) {
    let n = dx.len();
    let (y, dy) = (&y[..n], &dy[..n]);
    let dot = sum(n, |i| dy[i] * y[i]);
    put(dx, add, |i| y[i] * (dy[i] - dot));
}
