//! The meta-model: backbone, ProtoNet, episodes, training that can be stopped and resumed.

use std::ops::ControlFlow;

use candle_core::{Device, Tensor};
use metazoa::Result;
use metazoa::access::session::Tensor as Values;
use metazoa::graph::plan::{CompileOptions, Plan};
use metazoa::meta::{
    Augmentation, Backbone, BnMode, ClassSource, ColourMap, EpisodeSampler, Limits, Schedule,
    ShiftEdge, StopReason, TrainConfig, Trainer, classify,
};
use metazoa::onnx::{ExportInfo, write};
use metazoa::tensor::tape::Tape;
use metazoa::tensor::{Images, RngStream, TensorStore};

/// Classes are patterns of bars: class `c` has its own period and angle; images differ by phase,
/// colour and noise. Classes `3 m .. 3 m + 3` come from model `m`.
pub(crate) struct Bars {
    classes: usize,
    images: usize,
    size: usize,
    seed: u64,
}

impl ClassSource for Bars {
    fn n_classes(&self) -> usize {
        self.classes
    }

    fn images_in(&self, _class: usize) -> usize {
        self.images
    }

    fn source_model(&self, class: usize) -> usize {
        class / 3
    }

    fn image_size(&self) -> [usize; 2] {
        [self.size; 2]
    }

    fn read(&self, class: usize, index: usize, pixels: &mut [f32]) -> Result<()> {
        let at = (class * self.images + index) as u64;
        let mut rng = RngStream::new(self.seed, "bars", "", at);
        let mut own = RngStream::new(0, "bars class", "", class as u64);
        let (angle, period) = (own.uniform_in(0.0, std::f32::consts::PI), own.uniform_in(3.0, 9.0));
        let phase = rng.uniform_in(0.0, std::f32::consts::TAU);
        let colour: Vec<f32> = (0..3).map(|_| rng.uniform_in(0.2, 0.5)).collect();
        let plane = self.size * self.size;
        for (at, pixel) in pixels.iter_mut().enumerate() {
            let (row, column) = (at % plane / self.size, at % self.size);
            let along = row as f32 * angle.sin() + column as f32 * angle.cos();
            let wave = (along * std::f32::consts::TAU / period + phase).sin();
            *pixel = 0.5 + colour[at / plane] * wave + 0.05 * rng.normal();
        }
        Ok(())
    }
}

pub(crate) fn bars() -> Bars {
    Bars { classes: 12, images: 12, size: 16, seed: 5 }
}

pub(crate) fn config() -> TrainConfig {
    TrainConfig {
        seed: 3,
        way: 3,
        shot: 2,
        query: 3,
        steps: 6,
        episodes_per_step: 1,
        learning_rate: 2e-3,
        schedule: Schedule::Cosine,
        cross_model_share: 0.5,
        augmentation: Augmentation {
            shift: 2,
            edge: ShiftEdge::Nearest,
            affine: None,
            colour: Some(ColourMap { identity: 0.5, matrix: 0.5, offset: 0.2 }),
        },
        early_stop: None,
    }
}

fn images(source: &Bars, class: usize, indices: std::ops::Range<usize>) -> Images {
    let n = indices.len();
    let mut all = Images::zeros([n, 3, source.size, source.size]);
    let stride = all.stride();
    for (slot, index) in indices.enumerate() {
        source.read(class, index, &mut all.data_mut()[slot * stride..][..stride]).unwrap();
    }
    all
}

pub(crate) fn keep_going(_: &Trainer, _: &metazoa::meta::Iteration) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

pub(crate) fn bytes(trainer: &Trainer) -> Vec<u8> {
    trainer.to_store().unwrap().to_bytes().unwrap()
}

#[test]
fn a_backbone_has_the_published_shape_and_is_seeded() {
    let net = Backbone::conv4(32, 1).unwrap();
    let count: usize = net.parameters().iter().map(|p| p.value.elem_count()).sum();
    // 29,541 in all with a 128 -> 5 head (methods.md 1.3).
    assert_eq!(count + 128 * 5 + 5, 29_541);
    assert_eq!(net.embedding_dim(32, 32).unwrap(), 128);
    assert_eq!(net.embedding_dim(84, 84).unwrap(), 800);
    let error = net.embedding_dim(15, 32).unwrap_err();
    assert!(error.hint_text().is_some(), "{error}");
    let weights = |seed| {
        let net = Backbone::conv4(32, seed).unwrap();
        net.parameters()[4].value.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(weights(1), weights(1));
    assert_ne!(weights(1), weights(2));
    let w = weights(1);
    let variance = w.iter().map(|v| v * v).sum::<f32>() / w.len() as f32;
    assert!((variance / (2.0 / (9.0 * 32.0)) - 1.0).abs() < 0.1, "{variance}");
    assert!(Backbone::conv4(0, 1).is_err());
}

#[test]
fn running_statistics_reproduce_batch_normalisation_of_a_repeated_batch() {
    let source = bars();
    let mut net = Backbone::conv4(8, 1).unwrap();
    let batch = images(&source, 0, 0..12);
    let pass = |net: &Backbone| {
        let tape = Tape::new();
        let x = Tensor::from_vec(batch.data().to_vec(), (12, 3, 16, 16), &Device::Cpu).unwrap();
        net.forward(&net.constants(&tape), &tape.constant(x), BnMode::Batch).unwrap().statistics
    };
    for _ in 0..200 {
        let statistics = pass(&net);
        net.update_running(&statistics);
    }
    let own = pass(&net);
    for (running, own) in net.running().iter().zip(&own) {
        let unbias = own.count as f64 / (own.count as f64 - 1.0);
        for (a, b) in running.mean.iter().zip(&own.mean) {
            assert!((f64::from(*a) - b).abs() < 1e-4 * b.abs().max(1.0));
        }
        for (a, b) in running.variance.iter().zip(&own.variance) {
            assert!((f64::from(*a) - b * unbias).abs() < 1e-4 * b.max(1.0));
        }
    }
    let (inductive, transductive) =
        (net.embed(&batch, BnMode::Running).unwrap(), net.embed(&batch, BnMode::Batch).unwrap());
    let scale = transductive.iter().fold(0.0f32, |a, b| a.max(b.abs()));
    for (a, b) in inductive.iter().zip(&transductive) {
        // The last map is 1 x 1 x 12 images: unbiased against biased is a factor 12 / 11.
        assert!((a - b).abs() < 0.15 * scale, "{a} {b}");
    }
}

#[test]
fn inductive_embeddings_do_not_depend_on_the_batch() {
    let source = bars();
    let net = Backbone::conv4(8, 1).unwrap();
    let mut batch = images(&source, 0, 0..12);
    for class in 1..8 {
        batch.extend(&images(&source, class, 0..12)).unwrap();
    }
    let all = net.embed(&batch, BnMode::Running).unwrap();
    for at in [0, 1, 50, 70, 95] {
        let own = net.embed(&batch.select(&[at]), BnMode::Running).unwrap();
        assert_eq!(own, all[at * 8..(at + 1) * 8]);
    }
}

#[test]
fn a_saved_backbone_comes_back_equal() {
    let folder = crate::support::temp_dir();
    let path = folder.path().join("backbone.safetensors");
    let mut trainer = Trainer::new(config(), Backbone::conv4(8, 1).unwrap());
    trainer.run(&bars(), Limits::default(), &mut keep_going).unwrap();
    let net = trainer.into_backbone();
    net.save(&path).unwrap();
    let back = Backbone::load(&path).unwrap();
    let batch = images(&bars(), 1, 0..4);
    assert_eq!(
        net.embed(&batch, BnMode::Running).unwrap(),
        back.embed(&batch, BnMode::Running).unwrap()
    );
    assert_eq!(net.running(), back.running());

    let mut store = TensorStore::load(&path).unwrap();
    store.tensors.remove("norm3.bias");
    let error = Backbone::read_from(&store).unwrap_err();
    assert!(error.to_string().contains("norm3.bias"), "{error}");
    let mut store = TensorStore::load(&path).unwrap();
    store.tensors.get_mut("conv2.bias").unwrap().data[0] = f32::NAN;
    assert!(Backbone::read_from(&store).is_err());
    store.words.insert("width".into(), "1000000000000".into());
    assert!(Backbone::read_from(&store).is_err());
}

#[test]
fn classify_picks_the_nearest_class_mean() {
    let support = [0.0, 0.0, 2.0, 0.0, 10.0, 0.0, 10.0, 4.0];
    let answer = classify(&support, &[0, 0, 1, 1], &[1.0, 0.0, 10.0, 2.0, 5.5, 1.0], 2, 2).unwrap();
    assert_eq!(answer.predictions, [0, 1, 0]);
    assert_eq!(answer.logits[..4], [0.0, -85.0, -85.0, 0.0]);
    assert!(classify(&support, &[0, 0, 0, 0], &[1.0, 0.0], 2, 2).is_err(), "class 1 is empty");
    assert!(classify(&support, &[0, 0, 1, 2], &[1.0, 0.0], 2, 2).is_err(), "no class 2");
    assert!(classify(&support, &[0, 1], &[1.0, 0.0], 2, 2).is_err(), "labels missing");
}

#[test]
fn episodes_hold_distinct_images_of_the_right_classes() {
    let source = bars();
    let sampler = EpisodeSampler::new(&source, 3, 2, 4, 0.5).unwrap();
    let mut across = 0;
    for index in 0..200 {
        let episode = sampler.draw(&mut RngStream::new(1, "episode", "", index));
        assert_eq!(episode, sampler.draw(&mut RngStream::new(1, "episode", "", index)));
        assert_eq!(episode.support_labels, [0, 0, 1, 1, 2, 2]);
        assert_eq!(episode.query_labels.len(), 12);
        let mut unique = episode.images.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), 18);
        let mut classes = Vec::new();
        let labels = episode.support_labels.iter().chain(&episode.query_labels);
        for (&(class, _), &label) in episode.images.iter().zip(labels) {
            if classes.len() == label {
                classes.push(class);
            }
            assert_eq!(classes[label], class);
        }
        across += usize::from(classes.iter().any(|c| c / 3 != classes[0] / 3));
    }
    // A draw from all 12 classes is of one model in 4 of 220 cases.
    assert!((70..130).contains(&across), "{across}");
}

#[test]
fn a_bank_that_is_too_small_is_refused_with_figures() {
    let source = bars();
    for (way, shot, query) in [(13, 2, 3), (3, 10, 3), (1, 1, 1), (3, 0, 1), (3, 1, 0)] {
        let error = EpisodeSampler::new(&source, way, shot, query, 0.5).unwrap_err();
        assert!(error.hint_text().is_some(), "{error}");
    }
    assert!(EpisodeSampler::new(&source, 3, 1, 1, 1.5).is_err());
    // No model has four classes: every episode draws from all.
    let sampler = EpisodeSampler::new(&source, 4, 1, 1, 0.0).unwrap();
    assert_eq!(sampler.draw(&mut RngStream::new(1, "e", "", 0)).images.len(), 8);
}

#[test]
fn a_resumed_run_ends_with_the_same_bytes_as_an_uninterrupted_one() {
    let folder = crate::support::temp_dir();
    let path = folder.path().join("state.safetensors");
    let source = bars();
    let mut whole = Trainer::new(config(), Backbone::conv4(8, 1).unwrap());
    assert_eq!(whole.run(&source, Limits::default(), &mut keep_going).unwrap(), StopReason::Done);

    let mut part = Trainer::new(config(), Backbone::conv4(8, 1).unwrap());
    let limits = Limits { steps: Some(2), time: None };
    assert_eq!(part.run(&source, limits, &mut keep_going).unwrap(), StopReason::StepLimit);
    part.save(&path).unwrap();
    let mut part = Trainer::restore(config(), &path).unwrap();
    let mut last = 0;
    let reason = part
        .run(&source, Limits::default(), &mut |_, iteration| {
            last = iteration.step;
            if iteration.step == 4 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
    assert_eq!((reason, last, part.step()), (StopReason::Interrupted, 4, 4));
    part.save(&path).unwrap();
    let mut part = Trainer::restore(config(), &path).unwrap();
    part.run(&source, Limits::default(), &mut keep_going).unwrap();
    assert_eq!(bytes(&part), bytes(&whole));

    let other = TrainConfig { seed: 4, ..config() };
    let error = Trainer::restore(other, &path).unwrap_err();
    assert!(error.hint_text().is_some() && error.to_string().contains("state.safetensors"));
}

#[test]
fn training_is_the_same_for_any_number_of_threads() {
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut trainer = Trainer::new(config(), Backbone::conv4(8, 1).unwrap());
            trainer.run(&bars(), Limits::default(), &mut keep_going).unwrap();
            bytes(&trainer)
        })
    };
    assert_eq!(run(1), run(4));
}

#[test]
fn a_time_limit_and_a_broken_image_end_the_run() {
    let mut trainer = Trainer::new(config(), Backbone::conv4(8, 1).unwrap());
    let limits = Limits { steps: None, time: Some(std::time::Duration::ZERO) };
    assert_eq!(trainer.run(&bars(), limits, &mut keep_going).unwrap(), StopReason::TimeLimit);

    struct Broken(Bars, f32);
    impl ClassSource for Broken {
        fn n_classes(&self) -> usize {
            self.0.n_classes()
        }
        fn images_in(&self, class: usize) -> usize {
            self.0.images_in(class)
        }
        fn source_model(&self, class: usize) -> usize {
            self.0.source_model(class)
        }
        fn image_size(&self) -> [usize; 2] {
            self.0.image_size()
        }
        fn read(&self, class: usize, index: usize, pixels: &mut [f32]) -> Result<()> {
            if self.1.is_finite() {
                return Err(metazoa::Error::input("gone"));
            }
            self.0.read(class, index, pixels)?;
            pixels[0] = self.1;
            Ok(())
        }
    }
    let before = bytes(&trainer);
    let nan = Broken(bars(), f32::NAN);
    assert_eq!(
        trainer.run(&nan, Limits::default(), &mut keep_going).unwrap(),
        StopReason::Diverged
    );
    assert_eq!(bytes(&trainer), before, "the last good state stays");
    let gone = Broken(bars(), 0.0);
    assert!(trainer.run(&gone, Limits::default(), &mut keep_going).is_err());
}

/// Accuracy of 3-way 1-shot episodes of classes that training has not seen.
fn accuracy_on_new_classes(net: &Backbone) -> f64 {
    let source = Bars { classes: 150, images: 8, size: 32, seed: 77 };
    let mut right = 0;
    for index in 0..60 {
        let mut rng = RngStream::new(9, "test", "", index);
        let classes: Vec<usize> = rng.sample(60, 3).into_iter().map(|c| c + 90).collect();
        let (mut support, mut query) = (Vec::new(), Vec::new());
        for &class in &classes {
            let own = net.embed(&images(&source, class, 0..6), BnMode::Running).unwrap();
            let dim = own.len() / 6;
            support.extend_from_slice(&own[..dim]);
            query.extend_from_slice(&own[dim..]);
        }
        let dim = support.len() / 3;
        let answer = classify(&support, &[0, 1, 2], &query, dim, 3).unwrap();
        right += answer.predictions.iter().enumerate().filter(|(i, p)| i / 5 == **p).count();
    }
    right as f64 / (60.0 * 15.0)
}

#[test]
fn training_teaches_to_tell_new_classes_apart() {
    let augmentation = Augmentation { colour: None, ..config().augmentation };
    let config = TrainConfig { steps: 60, cross_model_share: 1.0, augmentation, ..config() };
    let fresh = Backbone::conv4(8, 1).unwrap();
    let before = accuracy_on_new_classes(&fresh);
    let mut trainer = Trainer::new(config, fresh);
    let mut losses = Vec::new();
    let source = Bars { classes: 90, size: 32, ..bars() };
    let reason = trainer
        .run(&source, Limits::default(), &mut |_, iteration| {
            losses.push(iteration.loss);
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(reason, StopReason::Done);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    assert!(mean(&losses[50..]) < 0.7 * mean(&losses[..5]), "{losses:?}");
    let after = accuracy_on_new_classes(trainer.backbone());
    assert!(after > before + 0.1, "before {before}, after {after}");
}

/// A network whose running statistics are not those of the start.
fn trained() -> Backbone {
    let mut trainer = Trainer::new(config(), Backbone::conv4(8, 1).unwrap());
    trainer.run(&bars(), Limits::default(), &mut keep_going).unwrap();
    trainer.into_backbone()
}

fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let scale = b.iter().fold(1.0f32, |m, v| m.max(v.abs()));
    a.iter().zip(b).fold(0.0f32, |m, (a, b)| m.max((a - b).abs())) / scale
}

#[test]
fn the_graph_of_a_backbone_computes_its_embedding() {
    let (net, source) = (trained(), Bars { size: 36, ..bars() });
    let graph = net.to_graph(36, 36).unwrap();
    let batch = images(&source, 2, 0..5);
    let expected = net.embed(&batch, BnMode::Running).unwrap();

    let options = CompileOptions {
        input: "images".into(),
        input_shape: vec![5, 3, 36, 36],
        output: "embedding".into(),
        gradient: metazoa::graph::Gradient::Unused,
        taps: metazoa::graph::Taps::Norms,
    };
    let plan = Plan::<f32>::compile(&graph, &options).unwrap();
    let gap = furthest(plan.forward(&mut plan.workspace(), batch.data()), &expected);
    assert!(gap < 1e-5, "frozen plan: {gap:e}");

    let folder = crate::support::temp_dir();
    let path = folder.path().join("embedding.onnx");
    write(&path, &graph, &ExportInfo::new(std::collections::BTreeMap::new())).unwrap();
    let mut session = crate::support::runtime().open(&path).unwrap();
    let input = Values::f32([5, 3, 36, 36], batch.data().to_vec());
    let output = session.run(vec![("images", input)], &["embedding"]).unwrap().remove(0);
    assert_eq!(output.shape, [5, 32]);
    let gap = furthest(&output.values.to_f32(), &expected);
    assert!(gap < 1e-5, "ONNX Runtime: {gap:e}");
}
