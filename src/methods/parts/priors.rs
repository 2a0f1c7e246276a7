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
    let plane = height * width;
    let mut total = 0.0;
    for (dy, dx) in [(0, 1), (1, 0), (1, 1), (1, -1isize)] {
        let pairs = |visit: &mut dyn FnMut(usize, usize)| {
            for start in (0..z.len()).step_by(plane) {
                for y in 0..height - dy.min(height) {
                    for x in 0..width {
                        let Some(other) = x.checked_add_signed(dx).filter(|&o| o < width) else {
                            continue;
                        };
                        visit(start + y * width + x, start + (y + dy) * width + other);
                    }
                }
            }
        };
        let mut squares = 0.0;
        pairs(&mut |a, b| squares += f64::from(z[a] - z[b]) * f64::from(z[a] - z[b]));
        let norm = squares.sqrt();
        total += norm;
        if norm > 0.0 {
            let scale = weight / norm as f32;
            pairs(&mut |a, b| {
                let d = scale * (z[a] - z[b]);
                gradient[a] += d;
                gradient[b] -= d;
            });
        }
    }
    total
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
}
