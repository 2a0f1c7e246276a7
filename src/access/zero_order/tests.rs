//! Estimates against exact gradients and against theory.

use super::*;

const NONE: Guide<'static> = Guide { basis: None, prior: None };

const CONFIG: ZeroOrder = ZeroOrder {
    estimator: Estimator::Forward,
    directions: 100,
    radius: 0.005,
    frequencies: 4,
    pack: 64,
};

fn stream(index: u64) -> RngStream {
    RngStream::new(11, "test", "zero-order", index)
}

fn random_images(n: usize) -> Images {
    let mut rng = stream(1_000_000);
    let shape = [n, 3, 8, 8];
    Images::new((0..n * 192).map(|_| rng.uniform()).collect(), shape).unwrap()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Image `i` has the loss `sum_j a_ij sin(3 x_j)`, gradient `3 a_ij cos(3 x_j)`.
struct Waves(Vec<Vec<f32>>);

impl Waves {
    fn new(n: usize) -> Self {
        Self((0..n).map(|i| stream(2_000_000 + i as u64).normals(192)).collect())
    }

    fn values(&self, images: &Images, owners: &[usize]) -> Vec<f64> {
        let value = |(index, &owner): (usize, &usize)| {
            let terms = images.image(index).iter().zip(&self.0[owner]);
            terms.map(|(&x, &a)| f64::from(a) * (3.0 * f64::from(x)).sin()).sum()
        };
        owners.iter().enumerate().map(value).collect()
    }

    fn gradient(&self, images: &Images, index: usize) -> Vec<f32> {
        let terms = images.image(index).iter().zip(&self.0[index]);
        terms.map(|(x, a)| 3.0 * a * (3.0 * x).cos()).collect()
    }

    fn estimate(&self, images: &Images, config: &ZeroOrder, index: u64) -> Images {
        let owners: Vec<usize> = (0..images.len()).collect();
        let values = self.values(images, &owners);
        let loss = |moved: &Images, owners: &[usize]| Ok(self.values(moved, owners));
        estimate_gradient(images, &values, config, &NONE, &mut stream(index), &loss).unwrap()
    }
}

/// `cos = sqrt(q / (q + d - 1))`: mean over 24 images within 3 standard errors or 2 %.
#[test]
fn the_cosine_to_the_true_gradient_follows_the_theory() {
    let (images, n) = (random_images(24), 24);
    let waves = Waves::new(n);
    for estimator in [Estimator::Forward, Estimator::Antithetic] {
        for q in [10, 50, 200, 1000] {
            let config = ZeroOrder { directions: q, estimator, ..CONFIG };
            let estimate = waves.estimate(&images, &config, q as u64);
            let cosines: Vec<f64> =
                (0..n).map(|i| cosine(estimate.image(i), &waves.gradient(&images, i))).collect();
            let mean = cosines.iter().sum::<f64>() / n as f64;
            let spread = cosines.iter().map(|c| (c - mean).powi(2)).sum::<f64>() / n as f64;
            let error = (spread / n as f64).sqrt();
            let theory = (q as f64 / (q as f64 + 191.0)).sqrt();
            let allowed = (3.0 * error).max(0.02 * theory);
            assert!((mean - theory).abs() < allowed, "{estimator:?} q={q}: {mean} {theory}");
        }
    }
}

/// The estimate is unbiased: its component along the true gradient averages to the true length.
#[test]
fn the_length_along_the_true_gradient_is_right() {
    let images = random_images(24);
    let waves = Waves::new(24);
    let config = ZeroOrder { directions: 1000, ..CONFIG };
    let estimate = waves.estimate(&images, &config, 3);
    let ratios: Vec<f64> = (0..24)
        .map(|i| {
            let truth = waves.gradient(&images, i);
            let dot = |a: &[f32]| -> f64 {
                a.iter().zip(&truth).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
            };
            dot(estimate.image(i)) / dot(&truth)
        })
        .collect();
    let mean = ratios.iter().sum::<f64>() / 24.0;
    // Standard deviation of one ratio is sqrt(2/q) = 0.045, of the mean 0.009.
    assert!((mean - 1.0).abs() < 0.03, "{mean}");
}

/// On `l = k/2 |x - c|^2` around its minimum a forward estimator sees `k mu / 2` on every direction,
/// an antithetic one sees 0.
#[test]
fn antithetic_estimators_cancel_the_curvature() {
    let center = random_images(1);
    let loss = |moved: &Images, owners: &[usize]| {
        let value = |i: usize| {
            let terms = moved.image(i).iter().zip(center.data());
            terms.map(|(x, c)| 1e4 * f64::from(x - c).powi(2)).sum()
        };
        Ok((0..owners.len()).map(value).collect())
    };
    let norm = |estimator| {
        let config = ZeroOrder { estimator, ..CONFIG };
        let estimate =
            estimate_gradient(&center, &[0.0], &config, &NONE, &mut stream(4), &loss).unwrap();
        estimate.data().iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
    };
    let (forward, antithetic) = (norm(Estimator::Forward), norm(Estimator::Antithetic));
    assert!(forward > 100.0, "{forward}");
    assert!(antithetic < forward * 1e-3, "{antithetic} {forward}");
}

#[test]
fn the_pack_size_and_the_threads_change_no_more_than_the_last_bits() {
    let images = random_images(5);
    let waves = Waves::new(5);
    let base = waves.estimate(&images, &CONFIG, 7);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    assert_eq!(pool.install(|| waves.estimate(&images, &CONFIG, 7)), base, "threads");
    for pack in [1, 33, 10_000] {
        let other = waves.estimate(&images, &ZeroOrder { pack, ..CONFIG }, 7);
        let far = other.data().iter().zip(base.data()).any(|(a, b)| (a - b).abs() > 1e-4);
        assert!(!far, "pack {pack}");
    }
    assert_ne!(waves.estimate(&images, &CONFIG, 8), base, "another stream");
}

#[test]
fn directions_of_different_images_are_independent() {
    let one = random_images(1);
    let mut twice = one.clone();
    twice.extend(&one).unwrap();
    let loss = |moved: &Images, owners: &[usize]| -> Result<Vec<f64>> {
        let value = |i: usize| moved.image(i).iter().map(|&x| f64::from(x)).sum();
        Ok((0..owners.len()).map(value).collect())
    };
    let values = loss(&twice, &[0, 1]).unwrap();
    let estimate =
        estimate_gradient(&twice, &values, &CONFIG, &NONE, &mut stream(5), &loss).unwrap();
    assert!(cosine(estimate.image(0), estimate.image(1)) < 0.6);
}

#[test]
fn errors_of_the_teacher_and_losses_that_are_not_finite_come_through() {
    let images = random_images(2);
    let run = |config: &ZeroOrder, loss: &BatchLoss<'_>| {
        estimate_gradient(&images, &[0.0, 0.0], config, &NONE, &mut stream(6), loss).unwrap_err()
    };
    let spent = run(&CONFIG, &|_, _| Err(Error::budget("0 left")));
    assert_eq!(spent.kind(), crate::ErrorKind::Budget);
    let nan = run(&CONFIG, &|_, owners| Ok(vec![f64::NAN; owners.len()]));
    assert!(nan.to_string().contains("not finite"), "{nan}");
    let none = run(&ZeroOrder { directions: 0, ..CONFIG }, &|_, _| Ok(vec![]));
    assert_eq!(none.kind(), crate::ErrorKind::Usage);
}

#[test]
fn counts_its_queries() {
    assert_eq!(CONFIG.queries([3, 3, 8, 8]), 300);
    assert_eq!(ZeroOrder { estimator: Estimator::Antithetic, ..CONFIG }.queries([3, 3, 8, 8]), 600);
}

fn estimate(images: &Images, waves: &Waves, config: &ZeroOrder, guide: &Guide<'_>) -> Images {
    let owners: Vec<usize> = (0..images.len()).collect();
    let values = waves.values(images, &owners);
    let loss = |moved: &Images, owners: &[usize]| Ok(waves.values(moved, owners));
    estimate_gradient(images, &values, config, guide, &mut stream(12), &loss).unwrap()
}

fn mean_cosine(estimate: &Images, truth: &Images) -> f64 {
    let each = (0..truth.len()).map(|i| cosine(estimate.image(i), truth.image(i)));
    each.sum::<f64>() / truth.len() as f64
}

fn true_gradients(images: &Images, waves: &Waves) -> Images {
    let data = (0..images.len()).flat_map(|i| waves.gradient(images, i)).collect();
    Images::new(data, images.shape()).unwrap()
}

/// Orthonormal directions: `sqrt(q / d)`, and the whole gradient once all dimensions are asked.
#[test]
fn orthonormal_directions_project_the_gradient() {
    let (images, waves) = (random_images(16), Waves::new(16));
    let truth = true_gradients(&images, &waves);
    for (q, expected) in [(48, 0.5), (192, 1.0), (500, 1.0)] {
        let config =
            ZeroOrder { estimator: Estimator::Orthogonal, directions: q, radius: 1e-3, ..CONFIG };
        let found = estimate(&images, &waves, &config, &NONE);
        let got = mean_cosine(&found, &truth);
        assert!((got - expected).abs() < 0.04, "{q}: {got}");
    }
    let all = ZeroOrder { estimator: Estimator::Orthogonal, directions: 500, ..CONFIG };
    assert_eq!(all.queries([2, 3, 8, 8]), 2 * 192, "no more directions than dimensions");
}

/// Of a gradient that is smooth, `sqrt(q / m)` with `m` = 3 * 4 * 4, and nothing of one that is not.
#[test]
fn low_frequencies_see_smooth_gradients_only() {
    let images = random_images(8);
    let wave = |frequency: f64| -> Vec<f32> {
        let at = |x: usize| (std::f64::consts::PI * (x as f64 + 0.5) * frequency / 8.0).cos();
        (0..192).map(|i| (at(i % 8) * at(i / 8 % 8)) as f32).collect()
    };
    for (frequency, expected) in [(2.0, 0.5), (7.0, 0.0)] {
        let slope = wave(frequency);
        let loss = |moved: &Images, owners: &[usize]| -> Result<Vec<f64>> {
            let value = |i: usize| -> f64 {
                moved.image(i).iter().zip(&slope).map(|(x, g)| f64::from(x * g)).sum()
            };
            Ok((0..owners.len()).map(value).collect())
        };
        let values = loss(&images, &[0; 8]).unwrap();
        let config =
            ZeroOrder { estimator: Estimator::LowFrequency, directions: 12, radius: 0.1, ..CONFIG };
        let found =
            estimate_gradient(&images, &values, &config, &NONE, &mut stream(3), &loss).unwrap();
        let mean = (0..8).map(|i| cosine(found.image(i), &slope)).sum::<f64>() / 8.0;
        assert!((mean - expected).abs() < 0.12, "{frequency}: {mean}");
    }
}

/// `c' = sqrt(c^2 + (1 - c^2) (q - 1) / (d - 1))` for a prior of cosine c; a useless prior costs one direction.
#[test]
fn a_prior_is_mixed_in_as_theory_says() {
    let (images, waves) = (random_images(24), Waves::new(24));
    let truth = true_gradients(&images, &waves);
    let config = ZeroOrder { estimator: Estimator::Prior, directions: 20, radius: 1e-3, ..CONFIG };
    for share in [0.0f32, 0.5, 0.9] {
        let mut prior = truth.clone();
        let mut rng = stream(77);
        for i in 0..prior.len() {
            let norm = truth.image(i).iter().map(|v| v * v).sum::<f32>().sqrt();
            let noise = rng.normals(192);
            let scale = norm / (192f32).sqrt() * (1.0 - share * share).sqrt();
            let own = &mut prior.data_mut()[i * 192..(i + 1) * 192];
            own.iter_mut().zip(&noise).for_each(|(p, z)| *p = share * *p + scale * z);
        }
        let c = mean_cosine(&prior, &truth);
        let expected = (c * c + (1.0 - c * c) * 19.0 / 191.0).sqrt();
        let guide = Guide { prior: Some(&prior), basis: None };
        let got = mean_cosine(&estimate(&images, &waves, &config, &guide), &truth);
        assert!((got - expected).abs() < 0.05, "{share}: {got} {expected}");
    }
    // An image that never moved has no prior worth the name.
    let zero = Images::zeros(images.shape());
    let guide = Guide { prior: Some(&zero), basis: None };
    let got = mean_cosine(&estimate(&images, &waves, &config, &guide), &truth);
    assert!((got - (20.0f64 / 192.0).sqrt()).abs() < 0.06, "{got}");
}

#[test]
fn a_basis_that_holds_the_gradient_finds_it_whole() {
    let (images, waves) = (random_images(3), Waves::new(3));
    let truth = true_gradients(&images, &waves);
    // Three directions an image, of which the sum is the gradient.
    let mut rng = stream(5);
    let mut data = Vec::new();
    for i in 0..3 {
        let (a, b) = (rng.normals(192), rng.normals(192));
        let c: Vec<f32> = (0..192).map(|j| truth.image(i)[j] - a[j] - b[j]).collect();
        data.extend([a, b, c].concat());
    }
    let basis = Images::new(data, [9, 3, 8, 8]).unwrap();
    let config = ZeroOrder { estimator: Estimator::Guided, directions: 3, radius: 1e-3, ..CONFIG };
    let guide = Guide { basis: Some(&basis), prior: None };
    let found = estimate(&images, &waves, &config, &guide);
    assert!(mean_cosine(&found, &truth) > 0.999);
    let misfit = Guide { basis: Some(&basis.range(0, 8)), prior: None };
    let values = [0.0; 3];
    let outcome =
        estimate_gradient(&images, &values, &config, &misfit, &mut stream(1), &|_, _| Ok(vec![]));
    assert!(outcome.is_err(), "eight directions for three images");
}

/// A classifier that tells only on which side of a plane a point lies: the normal is found from labels.
#[test]
fn labels_alone_point_along_the_normal_of_the_boundary() {
    let images = random_images(6);
    let wave = |x: usize| (std::f32::consts::PI * (x as f32 + 0.5) / 4.0).cos();
    let normal: Vec<f32> = (0..192).map(|i| wave(i % 8) * wave(i / 8 % 8)).collect();
    let level: Vec<f64> = (0..6)
        .map(|i| images.image(i).iter().zip(&normal).map(|(x, n)| f64::from(x * n)).sum())
        .collect();
    // The images lie a little beside the boundary, less than a step away from it.
    let loss = |moved: &Images, owners: &[usize]| {
        let value = |(index, &owner): (usize, &usize)| {
            let dot: f64 =
                moved.image(index).iter().zip(&normal).map(|(x, n)| f64::from(x * n)).sum();
            if dot > level[owner] + 0.1 { 0.001 } else { 7.0 }
        };
        Ok(owners.iter().enumerate().map(value).collect())
    };
    let config =
        ZeroOrder { estimator: Estimator::HardLabel, directions: 400, radius: 1.0, ..CONFIG };
    let found =
        estimate_gradient(&images, &[7.0; 6], &config, &NONE, &mut stream(8), &loss).unwrap();
    for i in 0..6 {
        // The loss falls along the normal.
        assert!(cosine(found.image(i), &normal) < -0.6, "{}", cosine(found.image(i), &normal));
    }
}
