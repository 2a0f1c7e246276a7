//! Augmentation of episode images: random shifts, affine maps and colour maps, one draw an image.
//!
//! Colour matters here for a reason of its own: images recovered from one model share a colour
//! style, and a learner trained on episodes that mix models would tell the models apart instead of
//! the classes (27 / 37 % instead of 54 / 76 %, ../shared/data/README.md 3). A random colour map per
//! image takes that shortcut away; it is prior knowledge that colour does not define the classes.

use crate::tensor::RngStream;

mod affine;

pub use affine::AffineMap;

/// What comes in at the edge that a shift leaves empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShiftEdge {
    /// Mid grey (0.5), which the network's normalisation maps to 0.
    Grey,
    /// The nearest pixel of the image.
    Nearest,
}

impl ShiftEdge {
    /// Which pixel of a side of `length` stands at `at`; `None` where it is grey.
    fn place(self, at: i64, length: usize) -> Option<usize> {
        let inside = (0..length as i64).contains(&at);
        (inside || self == Self::Nearest).then(|| at.clamp(0, length as i64 - 1) as usize)
    }
}

/// A random colour map: `x' = M x + b` on centred values (`x - 0.5`), with
/// `M = identity * I + matrix * N(0, 1)` and `b = offset * N(0, 1)`; not clamped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ColourMap {
    /// Weight of the image's own colours.
    pub identity: f32,
    /// Standard deviation of the nine entries.
    pub matrix: f32,
    /// Standard deviation of the three offsets, in units of the pixel range.
    pub offset: f32,
}

/// What is done to each image of an episode.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Augmentation {
    /// Largest shift in pixels, each way.
    pub shift: usize,
    /// What a shift brings in.
    pub edge: ShiftEdge,
    /// Random affine map; `None` neither turns nor stretches.
    pub affine: Option<AffineMap>,
    /// Random colour map; `None` keeps colours.
    pub colour: Option<ColourMap>,
}

/// The draw for one image.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Draw {
    shift: [i64; 2],
    edge: ShiftEdge,
    /// The inverse of the affine map.
    inverse: Option<[[f32; 2]; 2]>,
    colour: Option<([[f32; 3]; 3], [f32; 3])>,
}

impl Augmentation {
    /// Draws what will be done to one image.
    pub(super) fn draw(&self, rng: &mut RngStream) -> Draw {
        let reach = self.shift as i64;
        let shift = [rng.integer_in(-reach, reach), rng.integer_in(-reach, reach)];
        let inverse = self.affine.map(|map| map.draw(rng));
        let colour = self.colour.map(|map| {
            let mut matrix = [[0.0; 3]; 3];
            for (i, row) in matrix.iter_mut().enumerate() {
                for (j, entry) in row.iter_mut().enumerate() {
                    let own = if i == j { map.identity } else { 0.0 };
                    *entry = own + map.matrix * rng.normal();
                }
            }
            (matrix, std::array::from_fn(|_| map.offset * rng.normal()))
        });
        Draw { shift, edge: self.edge, inverse, colour }
    }
}

impl Draw {
    /// The gradient to the image, where `gradient` is that to the changed one (the transposed map).
    pub(super) fn pull_back(&self, gradient: &[f32], height: usize, width: usize, to: &mut [f32]) {
        let plane = height * width;
        let mut mixed = gradient.to_vec();
        if let (Some((matrix, _)), 3) = (self.colour, gradient.len() / plane.max(1)) {
            for at in 0..plane {
                for i in 0..3 {
                    let part = |j: usize| matrix[j][i] * gradient[j * plane + at];
                    mixed[i * plane + at] = part(0) + part(1) + part(2);
                }
            }
        }
        to.fill(0.0);
        if let Some(inverse) = self.inverse {
            let size = [height, width];
            for at in 0..plane {
                let from = [at / width, at % width];
                for (place, weight) in affine::taps(inverse, self.shift, self.edge, size, from) {
                    let Some(place) = place else { continue };
                    for channel in (0..mixed.len()).step_by(plane) {
                        to[channel + place] += weight * mixed[channel + at];
                    }
                }
            }
            return;
        }
        let source =
            |at: usize, shift: i64, length: usize| self.edge.place(at as i64 - shift, length);
        for (from, to) in mixed.chunks_exact(plane).zip(to.chunks_exact_mut(plane)) {
            for (row, from) in from.chunks_exact(width).enumerate() {
                let Some(y) = source(row, self.shift[0], height) else { continue };
                for (column, g) in from.iter().enumerate() {
                    if let Some(x) = source(column, self.shift[1], width) {
                        to[y * width + x] += g;
                    }
                }
            }
        }
    }

    /// Writes the changed image; `input` and `output` are RGB `[3, height, width]`.
    pub(super) fn apply(&self, input: &[f32], height: usize, width: usize, output: &mut [f32]) {
        let plane = height * width;
        match self.inverse {
            Some(inverse) => self.resample(inverse, input, [height, width], output),
            None => self.shift_rows(input, [height, width], output),
        }
        if let (Some((matrix, offset)), 3) = (self.colour, input.len() / plane.max(1)) {
            let (red, rest) = output.split_at_mut(plane);
            let (green, blue) = rest.split_at_mut(plane);
            for ((r, g), b) in red.iter_mut().zip(green).zip(blue) {
                let x = [*r - 0.5, *g - 0.5, *b - 0.5];
                let mix = |i: usize| {
                    let m = matrix[i];
                    m[0] * x[0] + m[1] * x[1] + m[2] * x[2] + offset[i] + 0.5
                };
                (*r, *g, *b) = (mix(0), mix(1), mix(2));
            }
        }
    }

    fn resample(
        &self,
        inverse: [[f32; 2]; 2],
        input: &[f32],
        [height, width]: [usize; 2],
        output: &mut [f32],
    ) {
        let plane = height * width;
        for at in 0..plane {
            let target = [at / width, at % width];
            let taps = affine::taps(inverse, self.shift, self.edge, [height, width], target);
            for channel in (0..input.len()).step_by(plane) {
                let value =
                    |place: Option<usize>| place.map_or(0.5, |place| input[channel + place]);
                output[channel + at] =
                    taps.iter().map(|&(place, weight)| weight * value(place)).sum();
            }
        }
    }

    fn shift_rows(&self, input: &[f32], [height, width]: [usize; 2], output: &mut [f32]) {
        let plane = height * width;
        for (source, target) in input.chunks_exact(plane).zip(output.chunks_exact_mut(plane)) {
            for (row, target) in target.chunks_exact_mut(width).enumerate() {
                let Some(from) = self.edge.place(row as i64 - self.shift[0], height) else {
                    target.fill(0.5);
                    continue;
                };
                self.shift_row(&source[from * width..][..width], target);
            }
        }
    }

    fn shift_row(&self, source: &[f32], target: &mut [f32]) {
        let width = source.len();
        let by = self.shift[1].unsigned_abs() as usize;
        let by = by.min(width);
        let (left, right) = match self.edge {
            ShiftEdge::Grey => (0.5, 0.5),
            ShiftEdge::Nearest => (source[0], source[width - 1]),
        };
        if self.shift[1] >= 0 {
            target[..by].fill(left);
            target[by..].copy_from_slice(&source[..width - by]);
        } else {
            target[..width - by].copy_from_slice(&source[by..]);
            target[width - by..].fill(right);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Vec<f32> {
        (0..3 * 4 * 5).map(|v| v as f32 / 60.0).collect()
    }

    fn draw(shift: [i64; 2], edge: ShiftEdge) -> Draw {
        Draw { shift, edge, inverse: None, colour: None }
    }

    #[test]
    fn a_shift_moves_pixels_and_fills_the_edge() {
        let x = image();
        for dy in -5i64..=5 {
            for dx in -6i64..=6 {
                for edge in [ShiftEdge::Grey, ShiftEdge::Nearest] {
                    let mut y = vec![f32::NAN; x.len()];
                    draw([dy, dx], edge).apply(&x, 4, 5, &mut y);
                    for (at, &value) in y.iter().enumerate() {
                        let (c, row, column) = (at / 20, at / 5 % 4, at % 5);
                        let (sr, sc) = (row as i64 - dy, column as i64 - dx);
                        let inside = (0..4).contains(&sr) && (0..5).contains(&sc);
                        let near = x[c * 20 + (sr.clamp(0, 3) * 5 + sc.clamp(0, 4)) as usize];
                        let expected =
                            if inside || edge == ShiftEdge::Nearest { near } else { 0.5 };
                        assert_eq!(value, expected, "{dy} {dx} {edge:?} {at}");
                    }
                }
            }
        }
    }

    /// `<apply(x + d) - apply(x), g> = <d, pull_back(g)>` for every shift, edge, affine and colour map.
    #[test]
    fn a_gradient_goes_back_the_way_the_image_came() {
        let mut rng = RngStream::new(4, "x", "", 0);
        let colour = Some(ColourMap { identity: 0.5, matrix: 0.5, offset: 0.2 });
        let affine = Some(AffineMap { rotation: 60.0, scale: 1.7, shear: 0.5 });
        let colours = [None, colour];
        let edges = [ShiftEdge::Grey, ShiftEdge::Nearest].into_iter();
        let all = edges.flat_map(|edge| {
            let maps = [None, affine].into_iter();
            maps.flat_map(move |affine| colours.map(|colour| (edge, affine, colour)))
        });
        for (edge, affine, colour) in all {
            let augmentation = Augmentation { shift: 6, edge, affine, colour };
            for _ in 0..40 {
                let draw = augmentation.draw(&mut rng);
                let x = image();
                let [d, g] = [(); 2].map(|()| rng.normals(x.len()));
                let moved: Vec<f32> = x.iter().zip(&d).map(|(x, d)| x + d).collect();
                let [mut before, mut after, mut back] = [(); 3].map(|()| vec![0.0; x.len()]);
                draw.apply(&x, 4, 5, &mut before);
                draw.apply(&moved, 4, 5, &mut after);
                draw.pull_back(&g, 4, 5, &mut back);
                let change: Vec<f32> = after.iter().zip(&before).map(|(a, b)| a - b).collect();
                let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
                let (there, here) = (dot(&change, &g), dot(&d, &back));
                assert!((there - here).abs() < 1e-4 * (1.0 + there.abs()), "{draw:?}");
            }
        }
    }

    /// A quarter turn, a doubling and a shear have images that are known.
    #[test]
    fn an_affine_map_turns_stretches_and_shears_about_the_centre() {
        let x: Vec<f32> = (0..9).map(|v| v as f32 / 10.0).collect();
        let map = |inverse, edge| {
            let mut y = vec![f32::NAN; 9];
            let draw = Draw { inverse: Some(inverse), ..draw([0, 0], edge) };
            draw.apply(&x, 3, 3, &mut y);
            y
        };
        let near = |a: &[f32], b: &[f32]| {
            assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6), "{a:?} {b:?}");
        };
        near(&map([[1.0, 0.0], [0.0, 1.0]], ShiftEdge::Grey), &x);
        let turned = [0.2, 0.5, 0.8, 0.1, 0.4, 0.7, 0.0, 0.3, 0.6];
        near(&map([[0.0, 1.0], [-1.0, 0.0]], ShiftEdge::Grey), &turned);
        let doubled = [0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6];
        near(&map([[0.5, 0.0], [0.0, 0.5]], ShiftEdge::Grey), &doubled);
        let sheared = [0.5, 0.0, 0.1, 0.3, 0.4, 0.5, 0.7, 0.8, 0.5];
        near(&map([[1.0, 0.0], [1.0, 1.0]], ShiftEdge::Grey), &sheared);
        let sheared = [0.0, 0.0, 0.1, 0.3, 0.4, 0.5, 0.7, 0.8, 0.8];
        near(&map([[1.0, 0.0], [1.0, 1.0]], ShiftEdge::Nearest), &sheared);
    }

    /// Every draw undoes a turn, a stretch and a shear within the limits that were asked for.
    #[test]
    fn draws_stay_within_their_limits() {
        let limits = AffineMap { rotation: 20.0, scale: 1.25, shear: 0.0 };
        let mut rng = RngStream::new(5, "x", "", 0);
        let draws: Vec<_> = (0..500).map(|_| limits.draw(&mut rng)).collect();
        let size = |m: &[[f32; 2]; 2]| 1.0 / (m[0][0] * m[1][1] - m[0][1] * m[1][0]).sqrt();
        let turn = |m: &[[f32; 2]; 2]| m[0][1].atan2(m[0][0]).to_degrees();
        assert!(draws.iter().all(|m| (0.8 - 1e-5..=1.25 + 1e-5).contains(&size(m))));
        assert!(draws.iter().all(|m| turn(m).abs() <= 20.0 + 1e-4));
        assert!(draws.iter().any(|m| size(m) > 1.2) && draws.iter().any(|m| size(m) < 0.85));
        assert!(draws.iter().any(|m| turn(m) > 18.0) && draws.iter().any(|m| turn(m) < -18.0));
    }

    #[test]
    fn a_colour_map_mixes_centred_channels() {
        let x = image();
        let matrix = [[0.0, 1.0, 0.0], [0.0, 0.0, -1.0], [0.5, 0.5, 0.0]];
        let colour = Some((matrix, [0.1, 0.0, 0.0]));
        let draw = Draw { colour, ..draw([0, 0], ShiftEdge::Grey) };
        let mut y = vec![0.0; x.len()];
        draw.apply(&x, 4, 5, &mut y);
        for at in 0..20 {
            let [r, g, b] = [x[at], x[20 + at], x[40 + at]];
            assert!((y[at] - (g + 0.1)).abs() < 1e-6);
            assert!((y[20 + at] - (1.0 - b)).abs() < 1e-6);
            assert!((y[40 + at] - (r + g) / 2.0).abs() < 1e-6);
        }
    }

    #[test]
    fn the_same_stream_gives_the_same_draw() {
        let colour = Some(ColourMap { identity: 0.5, matrix: 0.5, offset: 0.2 });
        let augmentation = Augmentation { shift: 3, edge: ShiftEdge::Grey, affine: None, colour };
        let draws = |index| {
            let mut rng = RngStream::new(1, "x", "", index);
            (0..50).map(|_| augmentation.draw(&mut rng)).collect::<Vec<_>>()
        };
        assert_eq!(draws(0), draws(0));
        assert_ne!(draws(0), draws(1));
        assert!(draws(0).iter().any(|d| d.shift == [3, 3] || d.shift[0] == -3));
        assert!(draws(0).iter().all(|d| d.shift.iter().all(|s| s.abs() <= 3)));
    }
}
