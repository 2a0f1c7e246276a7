use super::super::learner::{InnerLoop, InnerOrder, linear};
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

/// The inversion as the formula says it, every operation on the tape.
fn invert_on_tape(classifier: &Classifier, config: &IcfilConfig, rng: &mut RngStream) -> Vec<f64> {
    let labels: Vec<usize> = (0..9).map(|i| i / 3).collect();
    let mut z = rng.normals(9 * 768);
    let mut adam = Adam::new(AdamOptions::STANDARD, [z.len()]);
    let head = classifier.head().unwrap();
    let norm = |v: &Var| v.square().unwrap().sum_all().unwrap().sqrt().unwrap();
    for _ in 0..config.inversion_steps {
        z.iter_mut().for_each(|v| *v = v.clamp(-2.0, 2.0));
        let tape = Tape::new();
        let free = tape.leaf(Tensor::from_slice(&z, (9, 3, 16, 16), &Device::Cpu).unwrap());
        let body = classifier.backbone().constants(&tape);
        let images = free.affine(0.25, 0.5).unwrap();
        let seen = classifier.backbone().forward(&body, &images, BnMode::Running).unwrap();
        let head: Vec<Var> = head.iter().map(|value| tape.constant(value.clone())).collect();
        let part = |y: usize, x: usize, h: usize, w: usize| {
            free.narrow(2, y, h).unwrap().narrow(3, x, w).unwrap()
        };
        let gap = |a: Var, b: Var| norm(&a.sub(&b).unwrap());
        let variation = [
            gap(part(1, 0, 15, 16), part(0, 0, 15, 16)),
            gap(part(0, 1, 16, 15), part(0, 0, 16, 15)),
            gap(part(1, 1, 15, 15), part(0, 0, 15, 15)),
            gap(part(1, 0, 15, 15), part(0, 1, 15, 15)),
        ];
        let mut value = linear(&seen.embedding, &head).unwrap().cross_entropy(&labels).unwrap();
        for term in variation {
            value = value.add(&term.scale(config.total_variation).unwrap()).unwrap();
        }
        value = value.add(&norm(&free).scale(config.size).unwrap()).unwrap();
        let gradient = grad(&value, &[&free], Order::First).unwrap().remove(0);
        let gradient = gradient.value().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        adam.step(config.inversion_rate, &mut [&mut z], &[&gradient]).unwrap();
    }
    z.iter().map(|v| 0.5 + 0.25 * f64::from(v.clamp(-2.0, 2.0))).collect()
}

#[test]
fn the_compiled_inversion_is_that_of_the_formula() {
    let (support, labels) = support();
    let read = |range: std::ops::Range<usize>| Ok(support.select(&range.collect::<Vec<_>>()));
    for model in models() {
        let adapted = model.adapt(&SupportImages { labels: &labels, way: 3, read: &read }).unwrap();
        // Strong priors, so that a wrong one would show.
        let config =
            IcfilConfig { inversion_steps: 6, total_variation: 0.02, size: 0.01, ..config() };
        let stream = || RngStream::new(0, "icfil", "", 0);
        let (own, _) = super::invert(&adapted, [16, 16], &config, &mut stream()).unwrap();
        let expected = invert_on_tape(&adapted, &config, &mut stream());
        let start = invert_on_tape(
            &adapted,
            &IcfilConfig { inversion_steps: 0, ..config.clone() },
            &mut stream(),
        );
        let mean = |other: &[f64]| {
            let gaps = own.data().iter().zip(other).map(|(a, b)| (f64::from(*a) - b).abs());
            gaps.sum::<f64>() / other.len() as f64
        };
        // Adam turns a rounding of a gradient near 0 into a step: a few pixels may differ.
        assert!(mean(&start) > 0.02, "{}", mean(&start));
        let name = model.learner().name();
        assert!(mean(&expected) < 2e-3 * mean(&start), "{name}: {}", mean(&expected));
    }
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
