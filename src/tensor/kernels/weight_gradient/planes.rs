//! The way of an image from planes to pixels whose channels lie together.

use super::super::vector::Vector;

/// Planes [channels, pixels] of rows of `width` pixels, which go to pixels `row` apart from `start` on.
pub(super) struct Planes<'a> {
    pub(super) values: &'a [f32],
    pub(super) channels: usize,
    pub(super) width: usize,
    pub(super) row: usize,
    pub(super) start: usize,
}

impl Planes<'_> {
    /// Lays the channels of each pixel together, `depth` floats a pixel.
    ///
    /// # Safety
    /// The instructions of `V` must be switched on.
    #[inline(always)]
    pub(super) unsafe fn turn<V: Vector>(&self, depth: usize, to: &mut [f32]) {
        let plane = self.values.len() / self.channels;
        let mut square = [0.0; 256];
        for c in (0..self.channels).step_by(V::LANES) {
            let whole = c + V::LANES <= self.channels;
            // Where the next pixel goes; no division on the way.
            let (mut column, mut place) = (0, self.start * depth + c);
            let mut first = 0;
            while first < plane {
                let from = &self.values[c * plane + first..];
                if whole && column + V::LANES <= self.width {
                    assert!((V::LANES - 1) * plane + V::LANES <= from.len());
                    assert!(place + (V::LANES - 1) * depth + V::LANES <= to.len());
                    // SAFETY: both squares lie in their slices (asserted above); the caller's duty.
                    unsafe { V::transpose(from.as_ptr(), plane, to[place..].as_mut_ptr(), depth) };
                    first += V::LANES;
                    // The last pixel of the square, then one on.
                    column += V::LANES - 1;
                    place += (V::LANES - 1) * depth;
                    (column, place) = self.after(column, place, depth);
                } else if whole && first + V::LANES <= plane {
                    assert!((V::LANES - 1) * plane + V::LANES <= from.len());
                    // SAFETY: the square of rows `plane` apart lies in `from` (asserted above), and `square` holds the
                    // largest one; the caller's duty.
                    unsafe {
                        V::transpose(from.as_ptr(), plane, square.as_mut_ptr(), V::LANES);
                        for lanes in square.chunks_exact(V::LANES).take(V::LANES) {
                            let to = &mut to[place..place + V::LANES];
                            V::load(lanes.as_ptr()).store(to.as_mut_ptr());
                            (column, place) = self.after(column, place, depth);
                        }
                    }
                    first += V::LANES;
                } else {
                    for (lane, to) in to[place..place + V::LANES].iter_mut().enumerate() {
                        let inside = c + lane < self.channels;
                        *to = if inside { from[lane * plane] } else { 0.0 };
                    }
                    (column, place) = self.after(column, place, depth);
                    first += 1;
                }
            }
        }
    }

    /// Column and place after a pixel.
    #[inline(always)]
    fn after(&self, column: usize, place: usize, depth: usize) -> (usize, usize) {
        if column + 1 == self.width {
            (0, place + (1 + self.row - self.width) * depth)
        } else {
            (column + 1, place + depth)
        }
    }
}
