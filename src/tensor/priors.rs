//! Priors on free pixels: total variation and size, with their gradients (PURER sec. 2.2).
//!
//! Both are Frobenius norms of a whole block of images, not sums of squares: their gradients have a
//! fixed length, whatever the number of images.

/// `||v||` of differences or values, as a prior's value, and its gradient added to `gradient`.
///
/// Total variation `||d_h|| + ||d_v|| + ||d_diag1|| + ||d_diag2||` over the images of `z`
/// (`[n * channels]` planes of `height * width`), times `weight`.
pub fn total_variation(
    z: &[f32],
    height: usize,
    width: usize,
    weight: f32,
    gradient: &mut [f32],
) -> f64 {
    let mut total = 0.0;
    for (dy, dx) in [(0, 1), (1, 0), (1, 1), (1, -1)] {
        let norm = differences(z, height, width, dy, dx).sqrt();
        total += norm;
        if norm > 0.0 {
            let scale = weight / norm as f32;
            add_differences(z, height, width, dy, dx, scale, gradient);
        }
    }
    total
}

/// The two stretches of a plane whose elements are `dy` rows and `dx` columns apart, row by row:
/// (start of the first, start of the second, length).
fn stretches(
    height: usize,
    width: usize,
    dy: usize,
    dx: isize,
) -> impl Iterator<Item = (usize, usize, usize)> {
    let (first, second) = if dx < 0 { (1, 0) } else { (0, dx.unsigned_abs()) };
    let length = width - width.min(dx.unsigned_abs());
    (0..height.saturating_sub(dy))
        .map(move |y| (y * width + first, (y + dy) * width + second, length))
}

/// Sum of squared differences, in a fixed order.
fn differences(z: &[f32], height: usize, width: usize, dy: usize, dx: isize) -> f64 {
    let mut total = 0.0;
    for plane in z.chunks_exact(height * width) {
        for (a, b, n) in stretches(height, width, dy, dx) {
            let pairs = plane[a..a + n].iter().zip(&plane[b..b + n]);
            total += f64::from(pairs.map(|(a, b)| (a - b) * (a - b)).sum::<f32>());
        }
    }
    total
}

fn add_differences(
    z: &[f32],
    height: usize,
    width: usize,
    dy: usize,
    dx: isize,
    scale: f32,
    gradient: &mut [f32],
) {
    let planes = z.chunks_exact(height * width).zip(gradient.chunks_exact_mut(height * width));
    for (plane, gradient) in planes {
        for (a, b, n) in stretches(height, width, dy, dx) {
            for i in 0..n {
                let d = scale * (plane[a + i] - plane[b + i]);
                gradient[a + i] += d;
                gradient[b + i] -= d;
            }
        }
    }
}

/// `||z||` times `weight`: keeps pixels near the middle of their range.
pub fn size(z: &[f32], weight: f32, gradient: &mut [f32]) -> f64 {
    let norm = z.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt();
    if norm > 0.0 {
        let scale = weight / norm as f32;
        gradient.iter_mut().zip(z).for_each(|(g, &v)| *g += scale * v);
    }
    norm
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::RngStream;

    #[test]
    fn gradients_are_those_of_the_values() {
        let (height, width) = (5, 4);
        let z = RngStream::new(3, "priors", "", 0).normals(2 * height * width);
        let mut gradient = vec![0.0; z.len()];
        total_variation(&z, height, width, 0.7, &mut gradient);
        size(&z, 0.3, &mut gradient);
        for i in 0..z.len() {
            let value = |step: f32| {
                let mut z = z.clone();
                z[i] += step;
                let mut unused = vec![0.0; z.len()];
                0.7 * total_variation(&z, height, width, 1.0, &mut unused)
                    + 0.3 * size(&z, 1.0, &mut unused)
            };
            let slope = (value(1e-3) - value(-1e-3)) / 2e-3;
            assert!((slope - f64::from(gradient[i])).abs() < 1e-3, "pixel {i}");
        }
    }

    #[test]
    fn total_variation_is_that_of_four_differences() {
        let z = RngStream::new(1, "tv", "", 0).normals(2 * 3 * 5 * 4);
        let mut expected = 0.0;
        for (dy, dx) in [(1_i64, 0_i64), (0, 1), (1, 1), (1, -1)] {
            let mut square = 0.0;
            for plane in z.chunks_exact(20) {
                for y in 0..5 - dy {
                    for x in (0..4_i64).filter(|x| (0..4).contains(&(x + dx))) {
                        let at = |y: i64, x: i64| f64::from(plane[(y * 4 + x) as usize]);
                        square += (at(y + dy, x + dx) - at(y, x)).powi(2);
                    }
                }
            }
            expected += square.sqrt();
        }
        let found = total_variation(&z, 5, 4, 1.0, &mut vec![0.0; z.len()]);
        assert!((found - expected).abs() < 1e-5 * expected, "{found} and {expected}");
    }
}
