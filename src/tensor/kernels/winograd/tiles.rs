//! The three transforms of F(4x4, 3x3) and the way of a strip of an image to tiles and back.
//!
//! With the points 0, +-a, +-b and infinity the transforms of a row are Lagrange's interpolation (Lavin and Gray
//! 2016 sec. 4; Winograd 1980): the filter's polynomial is evaluated at the points, divided by the products of their
//! distances, the input's is reduced by all points but one, and the output is the sum of powers.

use super::super::vector::Vector;
use super::{A, B, BlockWork, POINTS, SIDE, Strip, TILE};

/// Values of a three-tap filter at the six points, over the products of the points' distances.
///
/// # Safety
/// The instructions of `V` must be switched on.
#[inline(always)]
pub(super) unsafe fn filter<V: Vector>(g: [V; 3]) -> [V; SIDE] {
    // SAFETY: the caller's duty.
    unsafe {
        let [a, minus_a] = filter_pair(g, A, B);
        let [b, minus_b] = filter_pair(g, B, A);
        [g[0].mul(V::splat(1.0 / (A * A * B * B))), a, minus_a, b, minus_b, g[2]]
    }
}

/// The filter at `p` and `-p`; the other pair of points is `q`, `-q`.
///
/// # Safety
/// The instructions of `V` must be switched on.
#[inline(always)]
unsafe fn filter_pair<V: Vector>(g: [V; 3], p: f32, q: f32) -> [V; 2] {
    // SAFETY: the caller's duty.
    unsafe {
        let scale = V::splat(1.0 / (2.0 * p * p * (p * p - q * q)));
        let even = g[2].fma(V::splat(p * p), g[0]).mul(scale);
        let odd = g[1].mul(V::splat(p)).mul(scale);
        [even.add(odd), even.sub(odd)]
    }
}

/// Six input pixels at the six points.
///
/// # Safety
/// The instructions of `V` must be switched on.
#[inline(always)]
unsafe fn input<V: Vector>(d: [V; SIDE]) -> [V; SIDE] {
    // SAFETY: the caller's duty.
    unsafe {
        let (product, sum) = (V::splat(A * A * B * B), V::splat(-(A * A + B * B)));
        let [a, minus_a] = input_pair(d, A, B);
        let [b, minus_b] = input_pair(d, B, A);
        let first = d[0].fma(product, d[2].fma(sum, d[4]));
        let last = d[1].fma(product, d[3].fma(sum, d[5]));
        [first, a, minus_a, b, minus_b, last]
    }
}

/// The input at `p` and `-p`; the other pair of points is `q`, `-q`.
///
/// # Safety
/// The instructions of `V` must be switched on.
#[inline(always)]
unsafe fn input_pair<V: Vector>(d: [V; SIDE], p: f32, q: f32) -> [V; 2] {
    // SAFETY: the caller's duty.
    unsafe {
        let without = V::splat(-q * q);
        let even = d[2].fma(without, d[4]);
        let odd = d[1].fma(without, d[3]).mul(V::splat(p));
        [even.add(odd), even.sub(odd)]
    }
}

/// Four output pixels from sums at the six points.
///
/// # Safety
/// The instructions of `V` must be switched on.
#[inline(always)]
unsafe fn output<V: Vector>(m: [V; SIDE]) -> [V; TILE] {
    // SAFETY: the caller's duty.
    unsafe {
        let (sum_a, difference_a) = (m[1].add(m[2]), m[1].sub(m[2]));
        let (sum_b, difference_b) = (m[3].add(m[4]), m[3].sub(m[4]));
        let first = difference_a.fma(V::splat(A), difference_b.mul(V::splat(B)));
        let second = sum_a.fma(V::splat(A * A), sum_b.mul(V::splat(B * B)));
        let third = difference_a.fma(V::splat(A * A * A), difference_b.mul(V::splat(B * B * B)));
        [m[0].add(sum_a.add(sum_b)), first, second, third.add(m[5])]
    }
}

/// Sums at the points: of a tile and point, `LANES` channels lie together.
pub(super) struct Sums<'a> {
    pub(super) data: &'a [f32],
    /// Distance between points.
    pub(super) point: usize,
    /// Distance between tiles.
    pub(super) tile: usize,
}

#[allow(clippy::needless_range_loop)]
impl BlockWork<'_> {
    /// Transforms the tiles of `strip`: point `p`, tile `t`, channel `c` to `to[p * point + t * depth + c]`.
    ///
    /// # Safety
    /// The instructions of `V` must be switched on.
    #[inline(always)]
    pub(super) unsafe fn transform_input<V: Vector>(
        &self,
        strip: &Strip,
        room: &mut [f32],
        to: &mut [f32],
        point: usize,
    ) {
        let sizes = self.sizes;
        let (g, depth, [_, right]) = (&sizes.g, sizes.depth, sizes.tiles);
        let (height, width) = (g.input[0], g.input[1]);
        let (rows, across) = (TILE * strip.count + 2, TILE * right + 2);
        // Rows of the strip above the image, and those inside it.
        let top = strip.first * TILE;
        let above = g.pads[0].saturating_sub(top).min(rows);
        let start = (top + above).saturating_sub(g.pads[0]).min(height);
        let inside = (rows - above).min(height - start);
        let image = &self.x[strip.image * g.input_stride()..][..g.input_stride()];
        assert!((POINTS - 1) * point + strip.count * right * depth <= to.len());
        let padded = &mut room[..rows * across * V::LANES];
        padded.fill(0.0);
        for c in (0..depth).step_by(V::LANES) {
            let channels = &image[c * height * width..];
            let source = Pixels {
                data: &channels[start * width..],
                plane: height * width,
                channels: V::LANES.min(g.in_channels - c),
                count: inside * width,
                width,
            };
            // SAFETY: the caller's duty; all pixels lie inside the padded strip.
            unsafe { source.spread::<V>(padded, above * across + g.pads[1], across) };
            for tile in 0..strip.count * right {
                let (down, over) = (tile / right, tile % right);
                let at = TILE * (down * across + over) * V::LANES;
                // SAFETY: the caller's duty; a tile lies inside the padded strip, its points inside `to`
                // (asserted above).
                unsafe {
                    let from = padded.as_ptr().add(at);
                    let mut half = [[V::splat(0.0); SIDE]; SIDE];
                    for column in 0..SIDE {
                        let mut d = [V::splat(0.0); SIDE];
                        for row in 0..SIDE {
                            d[row] = V::load(from.add((row * across + column) * V::LANES));
                        }
                        let points = input(d);
                        for row in 0..SIDE {
                            half[row][column] = points[row];
                        }
                    }
                    let to = to.as_mut_ptr().add(tile * depth + c);
                    for row in 0..SIDE {
                        let points = input(half[row]);
                        for column in 0..SIDE {
                            points[column].store(to.add((SIDE * row + column) * point));
                        }
                    }
                }
            }
        }
    }

    /// Transforms the sums of `strip` for output channels `o ..` back to pixels of `y`.
    ///
    /// # Safety
    /// The instructions of `V` must be switched on.
    #[inline(always)]
    pub(super) unsafe fn transform_output<V: Vector>(
        &self,
        strip: &Strip,
        sums: &Sums<'_>,
        room: &mut [f32],
        o: usize,
        y: &mut [f32],
    ) {
        let sizes = self.sizes;
        let (g, [_, right]) = (&sizes.g, sizes.tiles);
        let [height, width] = g.output();
        let across = TILE * right;
        let used = V::LANES.min(g.out_channels - o);
        let mut bias = [0.0f32; 16];
        if let Some(all) = self.bias {
            bias[..used].copy_from_slice(&all[o..o + used]);
        }
        let tiles = strip.count * right;
        assert!((POINTS - 1) * sums.point + (tiles - 1) * sums.tile + V::LANES <= sums.data.len());
        let pixels = &mut room[..TILE * strip.count * across * V::LANES];
        for tile in 0..tiles {
            let (down, over) = (tile / right, tile % right);
            // SAFETY: the caller's duty; the tile's sums were asserted above, its pixels lie in the strip.
            unsafe {
                let from = sums.data.as_ptr().add(tile * sums.tile);
                let bias = V::load(bias.as_ptr());
                let mut half = [[V::splat(0.0); SIDE]; TILE];
                for column in 0..SIDE {
                    let mut m = [V::splat(0.0); SIDE];
                    for row in 0..SIDE {
                        m[row] = V::load(from.add((SIDE * row + column) * sums.point));
                    }
                    let rows = output(m);
                    for row in 0..TILE {
                        half[row][column] = rows[row];
                    }
                }
                for row in 0..TILE {
                    let found = output(half[row]);
                    for column in 0..TILE {
                        let at = (TILE * down + row) * across + TILE * over + column;
                        found[column].add(bias).store(pixels.as_mut_ptr().add(at * V::LANES));
                    }
                }
            }
        }
        let top = strip.first * TILE;
        let rows = (TILE * strip.count).min(height - top);
        let start = strip.image * g.output_stride() + o * height * width + top * width;
        let target = Gathered { count: rows * width, width, plane: height * width, used };
        // SAFETY: the caller's duty.
        unsafe { target.gather::<V>(pixels, across, &mut y[start..], self.accumulate) };
    }
}

/// Number of a pixel where rows of `width` are `across` apart.
#[inline(always)]
fn placed(pixel: usize, width: usize, across: usize) -> usize {
    pixel / width * across + pixel % width
}

/// Consecutive pixels of planes of up to `LANES` channels.
struct Pixels<'a> {
    data: &'a [f32],
    /// Distance between channels.
    plane: usize,
    channels: usize,
    count: usize,
    /// Pixels of a row.
    width: usize,
}

impl Pixels<'_> {
    /// Puts the channels of each pixel together, rows `across` pixels apart, the first at pixel `at`.
    ///
    /// # Safety
    /// The instructions of `V` must be switched on; all places must lie in `to`.
    #[inline(always)]
    unsafe fn spread<V: Vector>(&self, to: &mut [f32], at: usize, across: usize) {
        if self.count == 0 {
            return;
        }
        if self.channels < V::LANES || self.count < V::LANES {
            for pixel in 0..self.count {
                let to = &mut to[(at + placed(pixel, self.width, across)) * V::LANES..][..V::LANES];
                to.fill(0.0);
                for (channel, to) in to.iter_mut().take(self.channels).enumerate() {
                    *to = self.data[channel * self.plane + pixel];
                }
            }
            return;
        }
        assert!((V::LANES - 1) * self.plane + self.count <= self.data.len());
        assert!(
            ((at + placed(self.count - 1, self.width, across)) * V::LANES) + V::LANES <= to.len()
        );
        let mut square = [0.0f32; 256];
        for pixel in (0..self.count).step_by(V::LANES) {
            // The last square overlaps the one before.
            let pixel = pixel.min(self.count - V::LANES);
            // SAFETY: the caller's duty; asserted above.
            unsafe {
                let from = self.data.as_ptr().add(pixel);
                let column = pixel % self.width;
                if column + V::LANES <= self.width {
                    V::transpose(
                        from,
                        self.plane,
                        to.as_mut_ptr().add((at + placed(pixel, self.width, across)) * V::LANES),
                        V::LANES,
                    );
                    continue;
                }
                V::transpose(from, self.plane, square.as_mut_ptr(), V::LANES);
                let (mut column, mut target) =
                    (column, (at + placed(pixel, self.width, across)) * V::LANES);
                for i in 0..V::LANES {
                    let vector = V::load(square.as_ptr().add(i * V::LANES));
                    vector.store(to.as_mut_ptr().add(target));
                    column += 1;
                    target += V::LANES;
                    if column == self.width {
                        column = 0;
                        target += (across - self.width) * V::LANES;
                    }
                }
            }
        }
    }
}

/// Where pixels with their channels together go: consecutive pixels of planes.
struct Gathered {
    count: usize,
    /// Pixels of a row.
    width: usize,
    /// Distance between channels.
    plane: usize,
    /// Channels that exist.
    used: usize,
}

impl Gathered {
    /// Puts the pixels of `from`, rows `across` apart, into planes of `to`, or adds them.
    ///
    /// # Safety
    /// The instructions of `V` must be switched on.
    #[inline(always)]
    unsafe fn gather<V: Vector>(&self, from: &[f32], across: usize, to: &mut [f32], add: bool) {
        if self.count < V::LANES {
            for pixel in 0..self.count {
                let from = &from[placed(pixel, self.width, across) * V::LANES..][..self.used];
                for (channel, &value) in from.iter().enumerate() {
                    let to = &mut to[channel * self.plane + pixel];
                    *to = if add { *to + value } else { value };
                }
            }
            return;
        }
        assert!((self.used - 1) * self.plane + self.count <= to.len());
        assert!(placed(self.count - 1, self.width, across) * V::LANES + V::LANES <= from.len());
        let (mut square, mut turned) = ([0.0f32; 256], [0.0f32; 256]);
        // Pixels before this one are done; with `add` none may be done twice.
        let mut done = 0;
        while done < self.count {
            let first = done.min(self.count - V::LANES);
            let skip = done - first;
            // SAFETY: the caller's duty; asserted above.
            unsafe {
                let column = first % self.width;
                let whole = column + V::LANES <= self.width || across == self.width;
                let source = if whole {
                    from.as_ptr().add(placed(first, self.width, across) * V::LANES)
                } else {
                    for i in 0..V::LANES {
                        let vector = V::load(
                            from.as_ptr().add(placed(first + i, self.width, across) * V::LANES),
                        );
                        vector.store(square.as_mut_ptr().add(i * V::LANES));
                    }
                    square.as_ptr()
                };
                if self.used == V::LANES && skip == 0 && !add {
                    V::transpose(source, V::LANES, to.as_mut_ptr().add(first), self.plane);
                } else {
                    V::transpose(source, V::LANES, turned.as_mut_ptr(), V::LANES);
                    for channel in 0..self.used {
                        let turned = &turned[channel * V::LANES + skip..(channel + 1) * V::LANES];
                        let to = &mut to[channel * self.plane + done..][..turned.len()];
                        for (to, &value) in to.iter_mut().zip(turned) {
                            *to = if add { *to + value } else { value };
                        }
                    }
                }
            }
            done = first + V::LANES;
        }
    }
}
