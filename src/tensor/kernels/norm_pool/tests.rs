use super::*;
use crate::tensor::RngStream;

/// All results of a block on one batch.
#[derive(Debug, PartialEq)]
struct Results {
    y: Vec<f64>,
    sums: Vec<f64>,
    dx: Vec<f64>,
    factor: Vec<f64>,
    second_dx: Vec<f64>,
    second_dg: Vec<f64>,
}

struct Case {
    maps: Maps,
    channels: Vec<Channel<f64>>,
    x: Vec<f64>,
    g: Vec<f64>,
    h: Vec<f64>,
    cotangents: Vec<FirstCotangents>,
}

impl Case {
    /// Values that `f32` holds; with `ties`, few different ones whose normalisation is exact.
    fn new(size: [usize; 2], ties: bool) -> Self {
        let mut rng = RngStream::new(1, "norm-pool", "", (size[0] * 100 + size[1]) as u64);
        let maps = Maps { images: 3, channels: 2, size };
        let mut normals = |n: usize| -> Vec<f64> {
            rng.normals(n)
                .into_iter()
                .map(|v| f64::from(if ties { (v * 2.0).round() } else { v }))
                .collect()
        };
        let (large, small) = (6 * maps.plane(), 6 * maps.pooled_plane());
        let (x, g, h) = (normals(large), normals(small), normals(large));
        let channel = |mean, inverse_std, scale, shift| Channel { mean, inverse_std, scale, shift };
        Self {
            maps,
            channels: vec![channel(0.25, 0.5, 0.75, 0.5), channel(-0.5, 2.0, -1.5, -0.25)],
            x,
            g,
            h,
            cotangents: vec![
                FirstCotangents { direct: 0.5, along: -1.25 },
                FirstCotangents { direct: -2.0, along: 0.75 },
            ],
        }
    }

    fn run<T: Element>(&self) -> Results {
        let cast = |v: &[f64]| v.iter().map(|&v| T::of(v)).collect::<Vec<T>>();
        let wide = |v: &[T]| v.iter().map(|v| v.f64()).collect::<Vec<f64>>();
        let channels: Vec<Channel<T>> = self
            .channels
            .iter()
            .map(|c| Channel {
                mean: T::of(c.mean),
                inverse_std: T::of(c.inverse_std),
                scale: T::of(c.scale),
                shift: T::of(c.shift),
            })
            .collect();
        let (x, g, h) = (cast(&self.x), cast(&self.g), cast(&self.h));
        let block = Block { maps: self.maps, channels: &channels, x: &x };
        let nan = T::of(f64::NAN);
        let (mut y, mut dx) = (vec![nan; g.len()], vec![nan; x.len()]);
        block.forward(&mut y);
        let sums = block.first_sums(&g);
        block.backward(&g, &sums, &mut dx);
        let (mut second_dx, mut second_dg) = (vec![nan; x.len()], vec![nan; g.len()]);
        let factor = block.second(&g, &h, &sums, &self.cotangents, &mut second_dx, &mut second_dg);
        Results {
            y: wide(&y),
            sums: sums.iter().flat_map(|s| [s.direct, s.along]).collect(),
            dx: wide(&dx),
            factor,
            second_dx: wide(&second_dx),
            second_dg: wide(&second_dg),
        }
    }
}

const SIZES: [[usize; 2]; 10] =
    [[2, 2], [3, 3], [4, 4], [5, 7], [8, 8], [6, 10], [7, 16], [4, 21], [16, 32], [10, 42]];

#[test]
fn vectors_agree_with_plain_numbers_within_rounding() {
    for size in SIZES {
        for ties in [false, true] {
            let case = Case::new(size, ties);
            let (single, double) = (case.run::<f32>(), case.run::<f64>());
            let close = |what: &str, a: &[f64], b: &[f64]| {
                // Sums over 3 images of at most 512 values of order 1; each sum's rounding reaches every value.
                let largest = b.iter().fold(1.0f64, |a, b| a.max(b.abs()));
                for (a, b) in a.iter().zip(b) {
                    assert!((a - b).abs() < 2e-6 * largest, "{what} {size:?} {ties}: {a} {b}");
                }
            };
            close("y", &single.y, &double.y);
            close("sums", &single.sums, &double.sums);
            close("dx", &single.dx, &double.dx);
            close("factor", &single.factor, &double.factor);
            close("second dx", &single.second_dx, &double.second_dx);
            close("second dg", &single.second_dg, &double.second_dg);
        }
    }
}

#[test]
fn the_plain_way_is_the_definition() {
    for size in SIZES {
        let case = Case::new(size, true);
        let [height, width] = size;
        let found = case.run::<f64>();
        let (rows, columns) = (height / 2, width / 2);
        let mut at = 0;
        for plane in 0..6 {
            let channel = case.channels[plane % 2];
            for row in 0..rows {
                for column in 0..columns {
                    let mut best = 0.0f64;
                    for (i, j) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                        let from = (plane * height + 2 * row + i) * width + 2 * column + j;
                        best = best.max(case.x[from] * channel.scale + channel.shift);
                    }
                    assert_eq!(found.y[at], best, "{size:?}");
                    at += 1;
                }
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let mut case = Case::new([32, 32], false);
    case.maps.images = 40;
    let repeat = |v: &[f64]| v.iter().copied().cycle().take(v.len() / 3 * 40).collect::<Vec<f64>>();
    (case.x, case.g, case.h) = (repeat(&case.x), repeat(&case.g), repeat(&case.h));
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| case.run::<f32>())
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn a_channel_that_is_not_a_number_stays_so() {
    let mut case = Case::new([4, 16], false);
    case.channels[1].scale = f64::NAN;
    let found = case.run::<f32>();
    assert!(
        found.y[..16].iter().all(|v| v.is_finite()) && found.y[16..32].iter().all(|v| v.is_nan())
    );
}
