use super::super::learner::{InnerLoop, InnerOrder};
use super::*;

fn config() -> IcfilConfig {
    IcfilConfig {
        images_per_class: 3,
        inversion_steps: 100,
        inversion_rate: 0.1,
        total_variation: 1e-4,
        size: 1e-5,
        steps: 4,
        rate: 0.01,
        head_steps: 0,
        head_rate: 0.1,
    }
}

fn rows(tape: &Tape, values: &[f32], width: usize) -> Var {
    let shape = (values.len() / width, width);
    tape.leaf(Tensor::from_slice(values, shape, &Device::Cpu).unwrap())
}

/// Three classes of noise around a colour each, four images a class.
fn support() -> (Images, Vec<usize>) {
    let mut rng = RngStream::new(5, "icfil-tests", "", 0);
    let labels: Vec<usize> = (0..12).map(|i| i / 4).collect();
    let pixels = labels.iter().flat_map(|&label| {
        (0..768).map(|at| if at / 256 == label { 0.8 } else { 0.3 }).collect::<Vec<f32>>()
    });
    let pixels: Vec<f32> = pixels.map(|v| v + 0.1 * rng.normal()).collect();
    (Images::new(pixels, [12, 3, 16, 16]).unwrap(), labels)
}

fn models() -> [MetaModel; 3] {
    let inner =
        InnerLoop { train_steps: 2, test_steps: 5, learning_rate: 0.1, order: InnerOrder::First };
    [Learner::ProtoNet, Learner::Anil(inner), Learner::Maml(inner)].map(|learner| {
        MetaModel::new(Backbone::conv4(8, 2).unwrap(), learner, [16, 16], 1).unwrap()
    })
}

#[test]
fn the_contrast_is_that_of_the_formula() {
    let tape = Tape::new();
    let real = rows(&tape, &[2.0, 0.0, 3.0, 4.0], 2);
    let pseudo = rows(&tape, &[0.5, 0.0, 0.0, 7.0, 0.0, 1.0], 2);
    let value = |temperature: f64| {
        Contrast { temperature }
            .value(
                Labelled { features: &real, labels: &[0, 1] },
                Labelled { features: &pseudo, labels: &[0, 1, 1] },
                2,
            )
            .unwrap()
            .scalar()
            .unwrap()
    };
    for t in [0.2, 1.0] {
        // Cosines 1, 0, 0 of the first real image and 0.6, 0.8, 0.8 of the second.
        let e = |cosine: f64| (cosine / t).exp();
        let first = -(e(1.0) / (e(1.0) + 2.0 * e(0.0))).ln();
        let second = -(2.0 * e(0.8) / (e(0.6) + 2.0 * e(0.8))).ln();
        assert!((value(t) - 0.5 * (first + second)).abs() < 1e-5, "{t}: {}", value(t));
    }
}

/// The prior is the one that recovery has.
#[test]
fn total_variation_is_that_of_four_differences() {
    let tape = Tape::new();
    let z: Vec<f32> = RngStream::new(1, "tv", "", 0).normals(2 * 3 * 5 * 4);
    let var = tape.leaf(Tensor::from_slice(&z, (2, 3, 5, 4), &Device::Cpu).unwrap());
    let mut expected = 0.0;
    for (dy, dx) in [(1_i64, 0_i64), (0, 1), (1, 1), (1, -1)] {
        let mut square = 0.0;
        for plane in z.chunks_exact(20) {
            for y in 0..5 - dy {
                for x in 0..4_i64 {
                    if (0..4).contains(&(x + dx)) {
                        let at = |y: i64, x: i64| f64::from(plane[(y * 4 + x) as usize]);
                        square += (at(y + dy, x + dx) - at(y, x)).powi(2);
                    }
                }
            }
        }
        expected += square.sqrt();
    }
    let found = total_variation(&var).unwrap().scalar().unwrap();
    assert!((found - expected).abs() < 1e-4 * expected, "{found} and {expected}");
}

#[test]
fn pseudo_images_are_of_the_class_they_are_made_for() {
    let (support, labels) = support();
    for model in models() {
        let read = |range: std::ops::Range<usize>| Ok(support.select(&range.collect::<Vec<_>>()));
        let task = SupportImages { labels: &labels, way: 3, read: &read };
        let adapted = model.adapt(&task).unwrap();
        let mut rng = RngStream::new(0, "icfil", "", 0);
        let (pseudo, own) = super::invert(&adapted, [16, 16], &config(), &mut rng).unwrap();
        assert_eq!(own, [0, 0, 0, 1, 1, 1, 2, 2, 2]);
        let answers = adapted.predictions(&adapted.logits(&pseudo).unwrap());
        assert_eq!(answers, own, "{}", model.learner().name());
        assert!(pseudo.data().iter().all(|v| (0.0..=1.0).contains(v)));
    }
}

#[test]
fn calibration_brings_real_features_to_the_pseudo_ones_and_no_steps_change_nothing() {
    let (support, labels) = support();
    let contrast = Contrast { temperature: 0.2 };
    for model in models() {
        let name = model.learner().name();
        let calibrate = |config: &IcfilConfig| {
            let mut rng = RngStream::new(0, "icfil", "", 0);
            model.calibrate(&support, &labels, 3, (config, &contrast), &mut rng).unwrap()
        };
        let read = |range: std::ops::Range<usize>| Ok(support.select(&range.collect::<Vec<_>>()));
        let adapted = model.adapt(&SupportImages { labels: &labels, way: 3, read: &read }).unwrap();
        let (before, same) = (
            adapted.logits(&support).unwrap(),
            calibrate(&IcfilConfig { steps: 0, ..config() }).logits(&support).unwrap(),
        );
        let gap = before.iter().zip(&same).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(gap < 1e-4, "{name}: {gap}");

        let mut rng = RngStream::new(0, "icfil", "", 0);
        let (pseudo, own) = super::invert(&adapted, [16, 16], &config(), &mut rng).unwrap();
        let loss = |classifier: &Classifier| {
            let tape = Tape::new();
            let embed = |images: &Images| {
                let values = classifier.backbone().embed(images, BnMode::Running).unwrap();
                rows(&tape, &values, values.len() / images.len())
            };
            let (real, fake) = (embed(&support), embed(&pseudo));
            let real = Labelled { features: &real, labels: &labels };
            let fake = Labelled { features: &fake, labels: &own };
            contrast.value(real, fake, 3).unwrap().scalar().unwrap()
        };
        let calibrated = calibrate(&config());
        assert!(loss(&calibrated) < loss(&adapted), "{name}");
        assert_ne!(calibrated.logits(&support).unwrap(), before, "{name}");
        // The head's own steps move the head alone.
        let headed = calibrate(&IcfilConfig { steps: 0, head_steps: 3, ..config() });
        assert!((loss(&headed) - loss(&adapted)).abs() < 1e-6, "{name}");
        assert_ne!(headed.logits(&support).unwrap(), before, "{name}");
    }
}
