//! The gradient of 2x2 max pooling after an affine map, on vectors of neighbouring pixels.

#![allow(unsafe_code)]

use super::super::vector::x86::{Avx2, Avx512};
use super::super::vector::{Level, Vector};
use super::{Channel, Through};

/// As [`super::backward_halved`], for planes whose width is a multiple of 8.
#[allow(clippy::too_many_arguments)]
pub(super) fn backward(
    level: Level,
    channel: Channel<f32>,
    through: Through<f32>,
    width: usize,
    x: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    add: bool,
) {
    let work = Work { channel, through, width, x, dy };
    // SAFETY: the processor has the level's instructions (`Level::detected`).
    unsafe {
        match (level, add) {
            (Level::Avx512, false) if width.is_multiple_of(16) => work.avx512::<false>(dx),
            (Level::Avx512, true) if width.is_multiple_of(16) => work.avx512::<true>(dx),
            (_, false) => work.avx2::<false>(dx),
            (_, true) => work.avx2::<true>(dx),
        }
    }
}

struct Work<'a> {
    channel: Channel<f32>,
    through: Through<f32>,
    width: usize,
    x: &'a [f32],
    dy: &'a [f32],
}

impl Work<'_> {
    /// # Safety
    /// The processor must have the instructions.
    #[target_feature(enable = "avx512f")]
    unsafe fn avx512<const ADD: bool>(&self, dx: &mut [f32]) {
        // SAFETY: the instructions are switched on, the width is a multiple of 16.
        unsafe { self.run::<Avx512, ADD>(dx) }
    }

    /// # Safety
    /// The processor must have the instructions.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2<const ADD: bool>(&self, dx: &mut [f32]) {
        // SAFETY: the instructions are switched on, the width is a multiple of 8.
        unsafe { self.run::<Avx2, ADD>(dx) }
    }

    /// # Safety
    /// The instructions of `V` must be switched on; the width must be a multiple of `LANES`.
    #[inline(always)]
    unsafe fn run<V: Vector, const ADD: bool>(&self, dx: &mut [f32]) {
        let (width, rows) = (self.width, self.x.len() / self.width);
        assert!(dx.len() == self.x.len() && dx.len() == rows * width);
        assert!(self.dy.len() >= rows / 2 * (width / 2));
        let (x, dy, dx) = (self.x.as_ptr(), self.dy.as_ptr(), dx.as_mut_ptr());
        // SAFETY: the caller's duty; every place lies in the slices (asserted above).
        unsafe {
            let (a, b) = (V::splat(self.channel.a), V::splat(self.channel.b));
            let (open, high) =
                (V::splat(self.channel.bounds.open), V::splat(self.channel.bounds.high));
            let (offset, factor) = (V::splat(self.through.offset), V::splat(self.through.factor));
            for row in 0..rows / 2 {
                for column in (0..width).step_by(V::LANES) {
                    let at = 2 * row * width + column;
                    let (t, u) = (V::load(x.add(at)), V::load(x.add(at + width)));
                    // Not fused, as the way forward: equal values must stay equal.
                    let (vt, vu) = (t.mul(a).add(b), u.mul(a).add(b));
                    let (st, su) = (vt.swap_pairs(), vu.swap_pairs());
                    let best = vt.max(st).max(vu.max(su));
                    let g = V::load_twice(dy.add((row * width + column) / 2)).mul(a);
                    let g = g.where_between(open, best, high);
                    // An odd element yields to its left neighbour, the lower row to the upper.
                    let top = g.where_equal(vt, best).unless_equal(st.odd_or_nan(), best);
                    let left = g.unless_equal(vt, best).unless_equal(st, best);
                    let bottom = left.where_equal(vu, best).unless_equal(su.odd_or_nan(), best);
                    let top = top.add(t.mul(factor).add(offset));
                    let bottom = bottom.add(u.mul(factor).add(offset));
                    put::<V, ADD>(top, dx.add(at));
                    put::<V, ADD>(bottom, dx.add(at + width));
                }
            }
            for at in (rows / 2 * 2 * width..rows * width).step_by(V::LANES) {
                let base = V::load(x.add(at)).mul(factor).add(offset);
                put::<V, ADD>(base, dx.add(at));
            }
        }
    }
}

/// # Safety
/// The instructions of `V` must be switched on; `LANES` floats from `to` on must be there.
#[inline(always)]
unsafe fn put<V: Vector, const ADD: bool>(value: V, to: *mut f32) {
    // SAFETY: the caller's duty.
    unsafe {
        let value = if ADD { value.add(V::load(to)) } else { value };
        value.store(to);
    }
}
