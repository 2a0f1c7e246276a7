//! Drawings: a few strokes, polygons, ellipses and arcs on a ground that is flat, shaded or striped, some with noise. What
//! a classifier of small pictures of anything answers differently to; not one of them is of anything.

use super::{Images, RngStream};

/// Shapes of a drawing, least and most.
const SHAPES: [i64; 2] = [1, 6];
/// Half the width of a stroke, least and most; lengths are in units of the image's side.
const STROKE: [f32; 2] = [0.015, 0.09];
/// Radii, least and most.
const RADIUS: [f32; 2] = [0.06, 0.44];
/// Share of drawings with noise, and its largest standard deviation.
const NOISE: (f32, f32) = (0.3, 0.1);

/// An endless sequence of drawings, each by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drawings {
    /// Seed of every draw.
    pub seed: u64,
    /// `[height, width]`.
    pub size: [usize; 2],
}

impl Drawings {
    /// The drawings `numbers` of the sequence, canonical images.
    pub fn images(&self, numbers: std::ops::Range<u64>) -> Images {
        let [h, w] = self.size;
        let mut images = Images::zeros([(numbers.end - numbers.start) as usize, 3, h, w]);
        for (number, image) in numbers.zip(images.data_mut().chunks_exact_mut((3 * h * w).max(1))) {
            self.draw(number, image);
        }
        images
    }

    /// Drawing `number` into `image`, `[3, height, width]`.
    pub fn draw(&self, number: u64, image: &mut [f32]) {
        let [h, w] = self.size;
        let mut rng = RngStream::new(self.seed, "drawing", "", number);
        let rng = &mut rng;
        let pixel = 1.0 / h.max(w) as f32;
        let place = |at: usize| {
            let [y, x] = [at / w, at % w].map(|v| v as f32 + 0.5);
            [(x / w as f32) - 0.5, (y / h as f32) - 0.5]
        };
        let ground = Ground::new(rng);
        for at in 0..h * w {
            for (channel, value) in ground.colour(place(at)).into_iter().enumerate() {
                image[channel * h * w + at] = value;
            }
        }
        for _ in 0..rng.integer_in(SHAPES[0], SHAPES[1]) {
            let (shape, paint) = (Shape::new(rng), colour(rng));
            let [columns, rows] = shape.bounds().map(|(least, most)| (least - pixel, most + pixel));
            let cells = |(least, most): (f32, f32), n: usize| {
                let cell = |v: f32| ((v + 0.5) * n as f32).clamp(0.0, n as f32);
                cell(least).floor() as usize..cell(most).ceil() as usize
            };
            let columns = cells(columns, w);
            for at in cells(rows, h).flat_map(|y| columns.clone().map(move |x| y * w + x)) {
                // Half a pixel on either side of the edge.
                let cover = (0.5 - shape.distance(place(at)) / pixel).clamp(0.0, 1.0);
                if cover > 0.0 {
                    for (channel, value) in paint.into_iter().enumerate() {
                        let old = &mut image[channel * h * w + at];
                        *old += cover * (value - *old);
                    }
                }
            }
        }
        if rng.uniform() < NOISE.0 {
            let sigma = rng.uniform_in(0.0, NOISE.1);
            for value in image {
                *value = (*value + sigma * rng.normal()).clamp(0.0, 1.0);
            }
        }
    }
}

fn colour(rng: &mut RngStream) -> [f32; 3] {
    [0; 3].map(|_| rng.uniform())
}

/// A point within the image and a little beyond.
fn point(rng: &mut RngStream) -> [f32; 2] {
    [0; 2].map(|_| rng.uniform_in(-0.62, 0.62))
}

fn within(rng: &mut RngStream, [least, most]: [f32; 2]) -> f32 {
    rng.uniform_in(least, most)
}

/// What shapes lie on: one colour, or two that change along a direction.
struct Ground {
    colours: [[f32; 3]; 2],
    along: [f32; 2],
    kind: GroundKind,
}

enum GroundKind {
    Flat,
    Shaded,
    /// Waves across the image, and where the first begins.
    Striped(f32, f32),
}

impl Ground {
    fn new(rng: &mut RngStream) -> Self {
        let turn = rng.uniform_in(0.0, std::f32::consts::TAU);
        let kind = match rng.below(8) {
            0 => GroundKind::Shaded,
            1 => GroundKind::Striped(rng.uniform_in(1.0, 10.0), rng.uniform()),
            _ => GroundKind::Flat,
        };
        Self { colours: [colour(rng), colour(rng)], along: [turn.cos(), turn.sin()], kind }
    }

    fn colour(&self, [x, y]: [f32; 2]) -> [f32; 3] {
        let along = x * self.along[0] + y * self.along[1];
        let share = match self.kind {
            GroundKind::Flat => 0.0,
            GroundKind::Shaded => (along + 0.5).clamp(0.0, 1.0),
            GroundKind::Striped(waves, begin) => {
                0.5 + 0.5 * (std::f32::consts::TAU * (waves * along + begin)).sin()
            }
        };
        let [a, b] = self.colours;
        std::array::from_fn(|i| a[i] + share * (b[i] - a[i]))
    }
}

enum Shape {
    /// Through points, half a width thick.
    Stroke(Vec<[f32; 2]>, f32),
    /// Filled where a ray crosses its edge an odd number of times.
    Polygon(Vec<[f32; 2]>),
    /// Turned by (cos, sin); filled, or an outline of half a width.
    Ellipse { centre: [f32; 2], radii: [f32; 2], turn: [f32; 2], outline: Option<f32> },
    /// Of a circle, `span` radians from `from` on.
    Arc { centre: [f32; 2], radius: f32, from: f32, span: f32, half: f32 },
}

impl Shape {
    fn new(rng: &mut RngStream) -> Self {
        let points = |rng: &mut RngStream, least: i64| -> Vec<[f32; 2]> {
            (0..rng.integer_in(least, 5)).map(|_| point(rng)).collect()
        };
        match rng.below(4) {
            0 => Self::Stroke(points(rng, 2), within(rng, STROKE)),
            1 => Self::Polygon(points(rng, 3)),
            2 => {
                let turn = rng.uniform_in(0.0, std::f32::consts::PI);
                Self::Ellipse {
                    centre: [0; 2].map(|_| rng.uniform_in(-0.5, 0.5)),
                    radii: [0; 2].map(|_| within(rng, RADIUS)),
                    turn: [turn.cos(), turn.sin()],
                    outline: (rng.below(2) == 0).then(|| within(rng, STROKE)),
                }
            }
            _ => Self::Arc {
                centre: [0; 2].map(|_| rng.uniform_in(-0.5, 0.5)),
                radius: within(rng, RADIUS),
                from: rng.uniform_in(0.0, std::f32::consts::TAU),
                span: rng.uniform_in(1.0, 5.2),
                half: within(rng, STROKE),
            },
        }
    }

    /// Least and most of x and of y that it covers.
    fn bounds(&self) -> [(f32, f32); 2] {
        let around = |centre: &[f32; 2], reach: f32| centre.map(|v| (v - reach, v + reach));
        match self {
            Self::Stroke(points, half) => span(points).map(|(a, b)| (a - half, b + half)),
            Self::Polygon(points) => span(points),
            Self::Ellipse { centre, radii, outline, .. } => {
                // A distance along the longer radius counts for more than its length.
                let [least, most] = [radii[0].min(radii[1]), radii[0].max(radii[1])];
                around(centre, most * (1.0 + outline.unwrap_or_default() / least))
            }
            Self::Arc { centre, radius, half, .. } => around(centre, radius + half),
        }
    }

    /// How far outside its edge a point lies; negative within.
    fn distance(&self, at: [f32; 2]) -> f32 {
        match self {
            Self::Stroke(points, half) => {
                let each = points.windows(2).map(|ends| to_segment(at, ends[0], ends[1]));
                each.fold(f32::MAX, f32::min) - half
            }
            Self::Polygon(points) => {
                let (mut edge, mut inside) = (f32::MAX, false);
                for (i, &a) in points.iter().enumerate() {
                    let b = points[(i + 1) % points.len()];
                    edge = edge.min(to_segment(at, a, b));
                    if (a[1] > at[1]) != (b[1] > at[1]) {
                        let cross = a[0] + (at[1] - a[1]) / (b[1] - a[1]) * (b[0] - a[0]);
                        inside ^= at[0] < cross;
                    }
                }
                if inside { -edge } else { edge }
            }
            Self::Ellipse { centre, radii, turn: [c, s], outline } => {
                let [x, y] = [at[0] - centre[0], at[1] - centre[1]];
                let [u, v] = [(x * c + y * s) / radii[0], (y * c - x * s) / radii[1]];
                // Exact for a circle, and to first order at the edge of any other.
                let edge = ((u * u + v * v).sqrt() - 1.0) * radii[0].min(radii[1]);
                outline.map_or(edge, |half| edge.abs() - half)
            }
            Self::Arc { centre, radius, from, span, half } => {
                let [x, y] = [at[0] - centre[0], at[1] - centre[1]];
                let angle = (y.atan2(x) - from).rem_euclid(std::f32::consts::TAU);
                if angle <= *span {
                    return ((x * x + y * y).sqrt() - radius).abs() - half;
                }
                let end = |angle: f32| {
                    let [ex, ey] = [radius * angle.cos(), radius * angle.sin()];
                    ((x - ex).powi(2) + (y - ey).powi(2)).sqrt()
                };
                end(*from).min(end(from + span)) - half
            }
        }
    }
}

/// Least and most of each coordinate.
fn span(points: &[[f32; 2]]) -> [(f32, f32); 2] {
    std::array::from_fn(|axis| {
        let each = points.iter().map(|point| point[axis]);
        (each.clone().fold(f32::MAX, f32::min), each.fold(f32::MIN, f32::max))
    })
}

fn to_segment(at: [f32; 2], a: [f32; 2], b: [f32; 2]) -> f32 {
    let (way, to) = ([b[0] - a[0], b[1] - a[1]], [at[0] - a[0], at[1] - a[1]]);
    let length = way[0] * way[0] + way[1] * way[1];
    let share = if length > 0.0 { (way[0] * to[0] + way[1] * to[1]) / length } else { 0.0 };
    let share = share.clamp(0.0, 1.0);
    ((to[0] - share * way[0]).powi(2) + (to[1] - share * way[1]).powi(2)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drawings_are_canonical_varied_and_each_its_own() {
        let drawings = Drawings { seed: 1, size: [16, 24] };
        let images = drawings.images(0..64);
        assert_eq!(images.shape(), [64, 3, 16, 24]);
        assert!(images.data().iter().all(|v| (0.0..=1.0).contains(v)));
        assert_eq!(drawings.images(7..9).data(), images.range(7, 9).data());
        let flat = (0..64).filter(|&i| {
            let image = images.image(i);
            let mean = image.iter().sum::<f32>() / image.len() as f32;
            let var = image.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>();
            var / image.len() as f32 <= 1e-3
        });
        assert!(flat.count() < 6);
    }

    /// Where a shape covers something is within its bounds.
    #[test]
    fn bounds_hold_what_is_covered() {
        let mut rng = RngStream::new(3, "bounds", "", 0);
        for _ in 0..400 {
            let shape = Shape::new(&mut rng);
            let [xs, ys] = shape.bounds();
            for _ in 0..200 {
                let [x, y] = point(&mut rng);
                let inside = xs.0 <= x && x <= xs.1 && ys.0 <= y && y <= ys.1;
                assert!(inside || shape.distance([x, y]) >= 0.0, "{xs:?} {ys:?} {x} {y}");
            }
        }
    }

    #[test]
    fn distances_are_those_of_the_figures() {
        let stroke = Shape::Stroke(vec![[-0.2, 0.0], [0.2, 0.0]], 0.05);
        assert!((stroke.distance([0.0, 0.15]) - 0.1).abs() < 1e-6);
        assert!((stroke.distance([0.3, 0.0]) - 0.05).abs() < 1e-6);
        let square = vec![[-0.2, -0.2], [0.2, -0.2], [0.2, 0.2], [-0.2, 0.2]];
        let square = Shape::Polygon(square);
        assert!((square.distance([0.1, 0.0]) + 0.1).abs() < 1e-6);
        assert!((square.distance([0.5, 0.0]) - 0.3).abs() < 1e-6);
        let ring = Shape::Ellipse {
            centre: [0.0; 2],
            radii: [0.3; 2],
            turn: [1.0, 0.0],
            outline: Some(0.1),
        };
        assert!((ring.distance([0.0, 0.0]) - 0.2).abs() < 1e-6);
        assert!((ring.distance([0.0, 0.3]) + 0.1).abs() < 1e-6);
        let arc = Shape::Arc { centre: [0.0; 2], radius: 0.3, from: 0.0, span: 3.0, half: 0.05 };
        assert!((arc.distance([0.0, 0.3]) + 0.05).abs() < 1e-6);
        assert!(arc.distance([0.0, -0.3]) > 0.2);
    }
}
