//! One plane of `f32` in vectors of neighbouring pixels of two rows. Each function does the columns that fill whole
//! vectors and returns how many those are.

#![allow(unsafe_code)]

use super::super::vector::x86::{Avx2, Avx512};
use super::super::vector::{Level, Vector};
use super::{Plane, Second};

/// Work of one plane, written once for all levels.
trait Pass {
    type Output;

    /// # Safety
    /// The instructions of `V` must be switched on.
    unsafe fn run<V: Vector>(self, shape: Shape<'_>) -> Self::Output;
}

/// The plane and the part of it that fills whole vectors.
struct Shape<'a> {
    plane: &'a Plane<'a, f32>,
    /// Pairs of rows.
    pairs: usize,
    /// Columns in whole vectors.
    columns: usize,
}

/// Runs `pass` with the widest vectors that fit a row; how many columns that were, and what it gave.
fn dispatch<P: Pass>(level: Level, plane: &Plane<'_, f32>, pass: P) -> (usize, P::Output) {
    let lanes = if plane.width < level.lanes() { 8 } else { level.lanes() };
    let columns = plane.width / lanes * lanes;
    let shape = Shape { plane, pairs: plane.x.len() / plane.width / 2, columns };
    // SAFETY: the processor has the level's instructions (`Level::detected`), and AVX2 where it has AVX-512.
    let output = unsafe {
        match (level, lanes) {
            (Level::Avx512, 16) => avx512(pass, shape),
            _ => avx2(pass, shape),
        }
    };
    (columns, output)
}

/// # Safety
/// The processor must have the instructions.
#[target_feature(enable = "avx512f")]
unsafe fn avx512<P: Pass>(pass: P, shape: Shape<'_>) -> P::Output {
    // SAFETY: the instructions are switched on.
    unsafe { pass.run::<Avx512>(shape) }
}

/// # Safety
/// The processor must have the instructions.
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<P: Pass>(pass: P, shape: Shape<'_>) -> P::Output {
    // SAFETY: the instructions are switched on.
    unsafe { pass.run::<Avx2>(shape) }
}

/// Two vectors one above the other: blocks of 2x2 in neighbouring lanes.
#[derive(Clone, Copy)]
struct Pair<V> {
    top: V,
    bottom: V,
}

impl<V: Vector> Pair<V> {
    /// # Safety
    /// The instructions of `V` must be switched on; both rows must have `LANES` floats from `from` on.
    #[inline(always)]
    unsafe fn load(from: *const f32, width: usize) -> Self {
        // SAFETY: the caller's duty.
        unsafe { Self { top: V::load(from), bottom: V::load(from.add(width)) } }
    }

    /// # Safety
    /// As [`Pair::load`], writable.
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, width: usize) {
        // SAFETY: the caller's duty.
        unsafe {
            self.top.store(to);
            self.bottom.store(to.add(width));
        }
    }

    /// `self * factor + term`.
    ///
    /// # Safety
    /// The instructions of `V` must be switched on.
    #[inline(always)]
    unsafe fn fma(self, factor: V, term: Self) -> Self {
        // SAFETY: the caller's duty.
        unsafe {
            Self {
                top: self.top.fma(factor, term.top),
                bottom: self.bottom.fma(factor, term.bottom),
            }
        }
    }

    /// Both vectors `value`.
    #[inline(always)]
    fn both(value: V) -> Self {
        Self { top: value, bottom: value }
    }
}

/// The normalised values of a pair of vectors and the maximum of each block, in both its lanes.
struct Maxima<V> {
    value: Pair<V>,
    swapped: Pair<V>,
    best: V,
}

impl<V: Vector> Maxima<V> {
    /// # Safety
    /// The instructions of `V` must be switched on.
    #[inline(always)]
    unsafe fn of(x: Pair<V>, scale: V, shift: V) -> Self {
        // SAFETY: the caller's duty.
        unsafe {
            // Not fused, so that every pass rounds alike.
            let value =
                Pair { top: x.top.mul(scale).add(shift), bottom: x.bottom.mul(scale).add(shift) };
            let swapped = Pair { top: value.top.swap_pairs(), bottom: value.bottom.swap_pairs() };
            let best = value.top.max(swapped.top).max(value.bottom.max(swapped.bottom));
            Self { value, swapped, best }
        }
    }

    /// `from` at the largest of each block, the first of equals, where ReLU lets it through; 0 elsewhere.
    ///
    /// # Safety
    /// The instructions of `V` must be switched on.
    #[inline(always)]
    unsafe fn pick(&self, from: Pair<V>) -> Pair<V> {
        // SAFETY: the caller's duty.
        unsafe {
            let Self { value, swapped, best } = self;
            let (least, most) = (V::splat(f32::from_bits(1)), V::splat(f32::INFINITY));
            // An odd element yields to its left neighbour, the lower row to the upper.
            let top = from.top.where_between(least, *best, most);
            let top = top.where_equal(value.top, *best);
            let bottom = from.bottom.where_between(least, *best, most);
            let bottom = bottom.unless_equal(value.top, *best).unless_equal(swapped.top, *best);
            let bottom = bottom.where_equal(value.bottom, *best);
            Pair {
                top: top.unless_equal(swapped.top.odd_or_nan(), *best),
                bottom: bottom.unless_equal(swapped.bottom.odd_or_nan(), *best),
            }
        }
    }
}

/// Sum of all lanes, in a fixed order.
///
/// # Safety
/// The instructions of `V` must be switched on.
#[inline(always)]
unsafe fn total<V: Vector>(sums: V) -> f32 {
    let mut lanes = [0.0; 16];
    // SAFETY: the caller's duty; no vector has more than 16 lanes.
    unsafe { sums.store(lanes.as_mut_ptr()) };
    let mut width = 8;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

impl Shape<'_> {
    fn assert_fits(&self, large: &[f32], small: &[f32]) {
        assert!(large.len() == self.plane.x.len() && self.columns <= self.plane.width);
        assert!(small.len() >= self.pairs * (self.plane.width / 2));
    }
}

struct Forward<'a> {
    y: &'a mut [f32],
}

impl Pass for Forward<'_> {
    type Output = ();

    // SAFETY: the trait's contract.
    #[inline(always)]
    unsafe fn run<V: Vector>(self, shape: Shape<'_>) {
        let plane = shape.plane;
        shape.assert_fits(plane.x, self.y);
        let (width, x, y) = (plane.width, plane.x.as_ptr(), self.y.as_mut_ptr());
        // SAFETY: the caller's duty; every place lies in the slices (asserted above).
        unsafe {
            let (scale, shift) = (V::splat(plane.channel.scale), V::splat(plane.channel.shift));
            for pair in 0..shape.pairs {
                for column in (0..shape.columns).step_by(V::LANES) {
                    let x = Pair::<V>::load(x.add(2 * pair * width + column), width);
                    let best = Maxima::of(x, scale, shift).best.max(V::splat(0.0));
                    best.store_even(y.add(pair * (width / 2) + column / 2));
                }
            }
        }
    }
}

struct FirstSums<'a> {
    g: &'a [f32],
}

impl Pass for FirstSums<'_> {
    type Output = [f32; 2];

    // SAFETY: the trait's contract.
    #[inline(always)]
    unsafe fn run<V: Vector>(self, shape: Shape<'_>) -> [f32; 2] {
        let plane = shape.plane;
        shape.assert_fits(plane.x, self.g);
        let (width, x, g) = (plane.width, plane.x.as_ptr(), self.g.as_ptr());
        // SAFETY: the caller's duty; every place lies in the slices (asserted above).
        unsafe {
            let (scale, shift) = (V::splat(plane.channel.scale), V::splat(plane.channel.shift));
            let mean = V::splat(plane.channel.mean);
            let (mut direct, mut along) = (V::splat(0.0), V::splat(0.0));
            for pair in 0..shape.pairs {
                for column in (0..shape.columns).step_by(V::LANES) {
                    let x = Pair::<V>::load(x.add(2 * pair * width + column), width);
                    let g = V::load_twice(g.add(pair * (width / 2) + column / 2));
                    let g = Maxima::of(x, scale, shift).pick(Pair::both(g));
                    direct = direct.add(g.top.add(g.bottom));
                    along = g.top.fma(x.top.sub(mean), along);
                    along = g.bottom.fma(x.bottom.sub(mean), along);
                }
            }
            [total(direct), total(along)]
        }
    }
}

struct Backward<'a> {
    offset: f32,
    slope: f32,
    g: &'a [f32],
    dx: &'a mut [f32],
}

impl Pass for Backward<'_> {
    type Output = ();

    // SAFETY: the trait's contract.
    #[inline(always)]
    unsafe fn run<V: Vector>(self, shape: Shape<'_>) {
        let plane = shape.plane;
        shape.assert_fits(self.dx, self.g);
        let (width, x, g, dx) =
            (plane.width, plane.x.as_ptr(), self.g.as_ptr(), self.dx.as_mut_ptr());
        // SAFETY: the caller's duty; every place lies in the slices (asserted above).
        unsafe {
            let (scale, shift) = (V::splat(plane.channel.scale), V::splat(plane.channel.shift));
            let (offset, slope) = (Pair::both(V::splat(self.offset)), V::splat(self.slope));
            for pair in 0..shape.pairs {
                for column in (0..shape.columns).step_by(V::LANES) {
                    let at = 2 * pair * width + column;
                    let x = Pair::<V>::load(x.add(at), width);
                    let g = V::load_twice(g.add(pair * (width / 2) + column / 2));
                    let g = Maxima::of(x, scale, shift).pick(Pair::both(g));
                    g.fma(scale, x.fma(slope, offset)).store(dx.add(at), width);
                }
            }
        }
    }
}

struct SecondSums<'a> {
    g: &'a [f32],
    h: &'a [f32],
}

impl Pass for SecondSums<'_> {
    type Output = [f32; 3];

    // SAFETY: the trait's contract.
    #[inline(always)]
    unsafe fn run<V: Vector>(self, shape: Shape<'_>) -> [f32; 3] {
        let plane = shape.plane;
        shape.assert_fits(self.h, self.g);
        let (width, x, g, h) = (plane.width, plane.x.as_ptr(), self.g.as_ptr(), self.h.as_ptr());
        // SAFETY: the caller's duty; every place lies in the slices (asserted above).
        unsafe {
            let (scale, shift) = (V::splat(plane.channel.scale), V::splat(plane.channel.shift));
            let mean = V::splat(plane.channel.mean);
            let [mut all, mut tilted, mut product] = [V::splat(0.0); 3];
            for pair in 0..shape.pairs {
                for column in (0..shape.columns).step_by(V::LANES) {
                    let at = 2 * pair * width + column;
                    let x = Pair::<V>::load(x.add(at), width);
                    let h = Pair::<V>::load(h.add(at), width);
                    let g = V::load_twice(g.add(pair * (width / 2) + column / 2));
                    let g = Maxima::of(x, scale, shift).pick(Pair::both(g));
                    all = all.add(h.top.add(h.bottom));
                    tilted = h.top.fma(x.top.sub(mean), tilted);
                    tilted = h.bottom.fma(x.bottom.sub(mean), tilted);
                    product = g.top.fma(h.top, product);
                    product = g.bottom.fma(h.bottom, product);
                }
            }
            [total(all), total(tilted), total(product)]
        }
    }
}

struct Both<'a> {
    second: &'a Second<f32>,
    g: &'a [f32],
    h: &'a [f32],
    dx: &'a mut [f32],
    dg: &'a mut [f32],
}

impl Pass for Both<'_> {
    type Output = ();

    // SAFETY: the trait's contract.
    #[inline(always)]
    unsafe fn run<V: Vector>(self, shape: Shape<'_>) {
        let plane = shape.plane;
        shape.assert_fits(self.h, self.g);
        shape.assert_fits(self.dx, self.dg);
        let (width, x, g, h) = (plane.width, plane.x.as_ptr(), self.g.as_ptr(), self.h.as_ptr());
        let (dx, dg) = (self.dx.as_mut_ptr(), self.dg.as_mut_ptr());
        // SAFETY: the caller's duty; every place lies in the slices (asserted above).
        unsafe {
            let (scale, shift) = (V::splat(plane.channel.scale), V::splat(plane.channel.shift));
            let [a, b, c, d] = self.second.dense;
            let [a, b, c, d] = [V::splat(a), V::splat(b), V::splat(c), V::splat(d)];
            let [p, q, r] = self.second.picked;
            let [p, q, r] = [V::splat(p), V::splat(q), V::splat(r)];
            for pair in 0..shape.pairs {
                for column in (0..shape.columns).step_by(V::LANES) {
                    let at = 2 * pair * width + column;
                    let cell = pair * (width / 2) + column / 2;
                    let x = Pair::<V>::load(x.add(at), width);
                    let h = Pair::<V>::load(h.add(at), width);
                    let maxima = Maxima::of(x, scale, shift);
                    let g = maxima.pick(Pair::both(V::load_twice(g.add(cell))));
                    let base = h.fma(c, x.fma(b, Pair::both(a)));
                    g.fma(d, base).store(dx.add(at), width);
                    // One of four is not 0.
                    let picked = maxima.pick(h.fma(r, x.fma(q, Pair::both(p))));
                    let sum = picked.top.add(picked.bottom);
                    sum.add(sum.swap_pairs()).store_even(dg.add(cell));
                }
            }
        }
    }
}

pub(super) fn forward(level: Level, plane: &Plane<'_, f32>, y: &mut [f32]) -> usize {
    dispatch(level, plane, Forward { y }).0
}

pub(super) fn first_sums(level: Level, plane: &Plane<'_, f32>, g: &[f32]) -> (usize, [f32; 2]) {
    dispatch(level, plane, FirstSums { g })
}

pub(super) fn backward(
    level: Level,
    plane: &Plane<'_, f32>,
    [offset, slope]: [f32; 2],
    g: &[f32],
    dx: &mut [f32],
) -> usize {
    dispatch(level, plane, Backward { offset, slope, g, dx }).0
}

pub(super) fn second_sums(
    level: Level,
    plane: &Plane<'_, f32>,
    g: &[f32],
    h: &[f32],
) -> (usize, [f32; 3]) {
    dispatch(level, plane, SecondSums { g, h })
}

pub(super) fn second(
    level: Level,
    plane: &Plane<'_, f32>,
    second: &Second<f32>,
    [g, h]: [&[f32]; 2],
    [dx, dg]: [&mut [f32]; 2],
) -> usize {
    dispatch(level, plane, Both { second, g, h, dx, dg }).0
}
