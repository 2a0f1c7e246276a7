//! Procedural images. [`scenes`]: coloured discs, bars and strokes over one another ("dead leaves"). They have
//! the edges, flat areas and colour correlations of photographs and drawings, and cost nothing; layers of a
//! network see ordinary activations on them. [`Drawings`]: strokes, outlines and figures too, one by one.

use super::{Images, RngStream};

mod drawings;

pub use drawings::Drawings;

/// Shapes laid over one another in an image, least and most.
const SHAPES: [i64; 2] = [4, 16];

/// `n` canonical images of `[height, width]`, drawn from `rng`.
pub fn scenes(rng: &mut RngStream, n: usize, [height, width]: [usize; 2]) -> Images {
    let mut images = Images::zeros([n, 3, height, width]);
    let plane = height * width;
    for image in images.data_mut().chunks_exact_mut((3 * plane).max(1)) {
        let ground = colour(rng);
        for (channel, value) in image.chunks_exact_mut(plane).zip(ground) {
            channel.fill(value);
        }
        for _ in 0..rng.integer_in(SHAPES[0], SHAPES[1]) {
            let shape = Shape::new(rng);
            let paint = colour(rng);
            for y in 0..height {
                for x in 0..width {
                    let at = [
                        (x as f32 + 0.5) / width as f32 - 0.5,
                        (y as f32 + 0.5) / height as f32 - 0.5,
                    ];
                    if shape.covers(at) {
                        for (channel, value) in paint.into_iter().enumerate() {
                            image[channel * plane + y * width + x] = value;
                        }
                    }
                }
            }
        }
    }
    images
}

fn colour(rng: &mut RngStream) -> [f32; 3] {
    // A shared brightness: the channels of real images vary together.
    let light = rng.uniform();
    [0; 3].map(|_| (light + 0.25 * rng.normal()).clamp(0.0, 1.0))
}

/// An ellipse or a bar, turned; lengths in units of the image's side.
struct Shape {
    centre: [f32; 2],
    along: [f32; 2],
    half: [f32; 2],
    round: bool,
}

impl Shape {
    fn new(rng: &mut RngStream) -> Self {
        let turn = rng.uniform_in(0.0, std::f32::consts::PI);
        // Sizes of natural objects fall off as a power; strokes are long and thin.
        let size = 0.06 / rng.uniform_in(0.12, 1.0);
        let thin = rng.uniform_in(0.15, 1.0);
        Self {
            centre: [rng.uniform_in(-0.6, 0.6), rng.uniform_in(-0.6, 0.6)],
            along: [turn.cos(), turn.sin()],
            half: [size, size * thin],
            round: rng.below(2) == 0,
        }
    }

    fn covers(&self, at: [f32; 2]) -> bool {
        let [dx, dy] = [at[0] - self.centre[0], at[1] - self.centre[1]];
        let [c, s] = self.along;
        let u = (dx * c + dy * s) / self.half[0];
        let v = (dy * c - dx * s) / self.half[1];
        if self.round { u * u + v * v <= 1.0 } else { u.abs() <= 1.0 && v.abs() <= 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scenes_are_canonical_varied_and_repeatable() {
        let draw = || scenes(&mut RngStream::new(1, "scenes", "", 0), 8, [16, 24]);
        let images = draw();
        assert_eq!(images.shape(), [8, 3, 16, 24]);
        assert_eq!(images, draw());
        assert!(images.data().iter().all(|v| (0.0..=1.0).contains(v)));
        for i in 0..8 {
            let image = images.image(i);
            let mean = image.iter().sum::<f32>() / image.len() as f32;
            let var = image.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>();
            assert!(var / image.len() as f32 > 1e-3, "image {i} is flat");
        }
    }
}
