//! ProtoNet, ANIL and MAML: exact outer gradients, any number of ways, training that resumes.

use std::ops::ControlFlow;

use candle_core::{DType, Device, Tensor};
use metazoa::Result;
use metazoa::access::session::Tensor as Values;
use metazoa::meta::export::adapting_graph;
use metazoa::meta::{
    Architecture, Augmentation, Backbone, BnMode, ClassSource, Distillation, EpisodeSampler,
    InnerLoop, InnerOrder, KdLoss, Learner, Lesson, Limits, MetaModel, Mix, MixSpace, Partner,
    Schedule, ShiftEdge, SoftSupport, Task, TrainConfig, Trainer,
};
use metazoa::onnx::{ExportInfo, write};
use metazoa::tensor::tape::{Order, Tape, Var, grad};
use metazoa::tensor::{Images, RngStream};

const INNER: InnerLoop =
    InnerLoop { train_steps: 3, test_steps: 5, learning_rate: 0.05, order: InnerOrder::Second };

fn noise(n: usize, index: u64) -> Vec<f64> {
    RngStream::new(6, "learners", "", index).normals(n).into_iter().map(f64::from).collect()
}

fn double(values: Vec<f64>, dims: &[usize]) -> Tensor {
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

fn small(learner: Learner) -> MetaModel {
    MetaModel::new(Backbone::conv4(4, 2).unwrap(), learner, [16, 16], 2).unwrap()
}

/// Images of the task: support and queries, of three classes.
fn task_images() -> [Tensor; 2] {
    [(6, 0), (9, 1)].map(|(n, index)| {
        double(noise(n * 3 * 256, index), &[n, 3, 16, 16]).affine(0.2, 0.5).unwrap()
    })
}

/// What an episode is learned by.
#[derive(Debug, Clone, Copy, PartialEq)]
enum By {
    Labels,
    /// A teacher's answers on both levels, and the labels for a part.
    Distillation,
    /// Labels of embeddings mixed with those of a second task.
    Mixture,
}

/// The outer loss in `f64` at `values`, parameters and then the images, and its gradient.
fn outer(model: &MetaModel, values: &[Tensor], order: Order, by: By) -> (f64, Vec<Tensor>) {
    let tape = Tape::new();
    let leaves: Vec<Var> = values.iter().map(|value| tape.leaf(value.clone())).collect();
    let (parameters, images) = leaves.split_at(leaves.len() - 2);
    let labels = [0, 0, 1, 1, 2, 2];
    let images = Var::concat(&[&images[0], &images[1]], 0).unwrap();
    let mut task = Task::new(&images, &labels, 3);
    let soft: Vec<f32> = noise(45, 7).into_iter().map(|v| v as f32).collect();
    let how = Distillation { loss: KdLoss::Kl, temperature: 2.0, weight: 0.7 };
    let other = tape.constant(double(noise(15 * 768, 8), &[15, 3, 16, 16]));
    match by {
        By::Labels => {}
        By::Distillation => task.soft = Some(SoftSupport { logits: &soft[..18], how }),
        By::Mixture => task.partner = Some(Partner { images: &other, share: 0.6 }),
    }
    let answer = model.answer(parameters, task, 3, order, BnMode::Batch).unwrap();
    let wanted = [0, 0, 0, 1, 1, 1, 2, 2, 2];
    let loss = match by {
        By::Distillation => how.loss(&answer.logits, &wanted, &soft[18..]).unwrap(),
        By::Labels | By::Mixture => answer.logits.cross_entropy(&wanted).unwrap(),
    };
    let gradients = grad(&loss, &leaves.iter().collect::<Vec<_>>(), Order::First).unwrap();
    (loss.scalar().unwrap(), gradients.iter().map(|g| g.value().clone()).collect())
}

fn inner_product(a: &[Tensor], b: &[Tensor]) -> f64 {
    let term =
        |(a, b): (&Tensor, &Tensor)| (a * b).unwrap().sum_all().unwrap().to_vec0::<f64>().unwrap();
    a.iter().zip(b).map(term).sum()
}

#[test]
fn outer_gradients_through_the_inner_loop_are_those_of_central_differences() {
    let learners = [Learner::ProtoNet, Learner::Anil(INNER), Learner::Maml(INNER)];
    let ways = [By::Labels, By::Distillation, By::Mixture];
    for (learner, by) in learners.iter().flat_map(|&l| ways.map(|by| (l, by))) {
        let model = small(learner);
        let values: Vec<Tensor> = model
            .parameters()
            .map(|p| p.value.to_dtype(DType::F64).unwrap())
            .chain(task_images())
            .collect();
        let (_, exact) = outer(&model, &values, Order::Higher, by);
        let mut good = 0;
        for attempt in 0..4 {
            let directions: Vec<Tensor> = values
                .iter()
                .enumerate()
                .map(|(at, v)| {
                    double(noise(v.elem_count(), 50 * (attempt + 1) + at as u64), v.dims())
                })
                .collect();
            let expected = inner_product(&exact, &directions);
            let best = [1e-5, 1e-6, 1e-7]
                .into_iter()
                .map(|h| {
                    let at = |sign: f64| {
                        let moved: Vec<Tensor> = values
                            .iter()
                            .zip(&directions)
                            .map(|(v, d)| (v + (d * (sign * h)).unwrap()).unwrap())
                            .collect();
                        outer(&model, &moved, Order::First, by).0
                    };
                    let slope = (at(1.0) - at(-1.0)) / (2.0 * h);
                    (slope - expected).abs() / slope.abs().max(1e-3)
                })
                .fold(f64::INFINITY, f64::min);
            good += usize::from(best < 1e-5);
        }
        assert!(good >= 3, "{} by {by:?}: {good} of 4 directions agree", learner.name());
        // The first-order gradient is another one, but for ProtoNet.
        let (_, first) = outer(&model, &values, Order::First, by);
        let gap = inner_product(&exact, &exact) - inner_product(&exact, &first);
        let relative = gap.abs() / inner_product(&exact, &exact);
        match learner {
            Learner::ProtoNet => assert!(relative < 1e-12, "{relative}"),
            _ => assert!(relative > 1e-3, "{}: {relative}", learner.name()),
        }
    }
}

#[test]
fn residual_networks_have_the_published_shapes() {
    // 4,900,677 and 11,171,397 with a 512 -> 5 head; 12 and 20 normalisations (methods.md 1.3).
    for (architecture, weights, norms, dim) in [
        (Architecture::ResNet10, 4_900_677 - 512 * 5 - 5, 12, 512),
        (Architecture::ResNet18, 11_171_397 - 512 * 5 - 5, 20, 512),
        (Architecture::ResNet12, 12_424_320, 16, 640),
    ] {
        let net = Backbone::new(architecture, 1).unwrap();
        let count: usize = net.parameters().iter().map(|p| p.value.elem_count()).sum();
        assert_eq!(net.running().len(), norms, "{architecture}");
        assert_eq!(net.embedding_dim(32, 32).unwrap(), dim, "{architecture}");
        assert_eq!(net.embedding_dim(84, 84).unwrap(), dim, "{architecture}");
        assert_eq!(count, weights, "{architecture}");
        assert_eq!(architecture.to_string().parse::<Architecture>().unwrap(), architecture);
    }
    assert!("resnet11".parse::<Architecture>().is_err());
}

/// Classes are stripes of a period of their own; images differ by phase and noise.
struct Stripes;

impl ClassSource for Stripes {
    fn n_classes(&self) -> usize {
        40
    }

    fn images_in(&self, _class: usize) -> usize {
        12
    }

    fn source_model(&self, class: usize) -> usize {
        class / 5
    }

    fn image_size(&self) -> [usize; 2] {
        [16, 16]
    }

    fn read(&self, class: usize, index: usize, pixels: &mut [f32]) -> Result<()> {
        let mut rng = RngStream::new(1, "stripes", "", (class * 12 + index) as u64);
        let mut own = RngStream::new(1, "stripe class", "", class as u64);
        let (angle, period) = (own.uniform_in(0.0, 3.1), own.uniform_in(2.5, 8.0));
        let phase = rng.uniform_in(0.0, 6.3);
        for (at, pixel) in pixels.iter_mut().enumerate() {
            let (row, column) = ((at % 256 / 16) as f32, (at % 16) as f32);
            let along = row * angle.sin() + column * angle.cos();
            *pixel = 0.5
                + 0.4 * (along * std::f32::consts::TAU / period + phase).sin()
                + 0.05 * rng.normal();
        }
        Ok(())
    }
}

fn config(episodes_per_step: usize, steps: u64) -> TrainConfig {
    TrainConfig {
        seed: 3,
        way: 3,
        shot: 2,
        query: 4,
        steps,
        episodes_per_step,
        learning_rate: 3e-3,
        schedule: Schedule::Constant,
        cross_model_share: 1.0,
        augmentation: Augmentation {
            shift: 0,
            edge: ShiftEdge::Nearest,
            affine: None,
            colour: None,
        },
        early_stop: None,
    }
}

fn images(class: usize, indices: std::ops::Range<usize>) -> Images {
    let mut all = Images::zeros([indices.len(), 3, 16, 16]);
    for (slot, index) in indices.enumerate() {
        Stripes.read(class, index, &mut all.data_mut()[slot * 768..][..768]).unwrap();
    }
    all
}

/// Accuracy on tasks of `way` of the classes that episodes were drawn from.
fn accuracy(model: &MetaModel, way: usize, mode: BnMode) -> f64 {
    let mut right = 0;
    for index in 0..20 {
        let mut rng = RngStream::new(8, "task", "", index);
        let classes = rng.sample(40, way);
        let (mut support, mut query) = (images(classes[0], 0..2), images(classes[0], 6..10));
        for &class in &classes[1..] {
            support.extend(&images(class, 0..2)).unwrap();
            query.extend(&images(class, 6..10)).unwrap();
        }
        let labels: Vec<usize> = (0..2 * way).map(|at| at / 2).collect();
        let answer = model.classify(&support, &labels, &query, way, mode).unwrap();
        assert_eq!(answer.logits.len(), 4 * way * way);
        right += answer.predictions.iter().enumerate().filter(|(at, p)| at / 4 == **p).count();
    }
    right as f64 / (20 * 4 * way) as f64
}

#[test]
fn learners_that_adapt_learn_to_learn_and_take_any_number_of_ways() {
    let inner = InnerLoop { learning_rate: 0.1, test_steps: 8, ..INNER };
    for learner in [Learner::Anil(inner), Learner::Maml(inner)] {
        let model = MetaModel::new(Backbone::conv4(8, 1).unwrap(), learner, [16, 16], 1).unwrap();
        let before = accuracy(&model, 3, BnMode::Batch);
        let mut trainer = Trainer::new(config(2, 60), model);
        let mut losses = Vec::new();
        trainer
            .run(&Stripes, Limits::default(), &mut |_, iteration| {
                losses.push(iteration.loss);
                ControlFlow::Continue(())
            })
            .unwrap();
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        let name = learner.name();
        assert!(mean(&losses[50..]) < 0.8 * mean(&losses[..5]), "{name}: {losses:?}");
        let after = accuracy(trainer.model(), 3, BnMode::Batch);
        assert!(after > before + 0.1, "{name}: {before} before, {after} after");
        for way in [2, 5, 7] {
            let more = accuracy(trainer.model(), way, BnMode::Batch);
            assert!(more > 1.3 / way as f64, "{name}: {more} with {way} ways");
        }
    }
}

#[test]
fn a_resumed_run_and_any_number_of_threads_give_the_same_bytes() {
    let bytes = |trainer: &Trainer| trainer.to_store().unwrap().to_bytes().unwrap();
    let run = |trainer: &mut Trainer, steps: Option<u64>| {
        let limits = Limits { steps, time: None };
        trainer.run(&Stripes, limits, &mut |_, _| ControlFlow::Continue(())).unwrap();
    };
    for learner in [Learner::Anil(INNER), Learner::Maml(INNER)] {
        let mut whole = Trainer::new(config(3, 4), small(learner));
        run(&mut whole, None);
        let mut part = Trainer::new(config(3, 4), small(learner));
        run(&mut part, Some(2));
        let mut rest = Trainer::from_store(config(3, 4), &part.to_store().unwrap()).unwrap();
        run(&mut rest, None);
        assert_eq!(bytes(&rest), bytes(&whole), "{}", learner.name());
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let mut alone = Trainer::new(config(3, 4), small(learner));
        one.install(|| run(&mut alone, None));
        assert_eq!(bytes(&alone), bytes(&whole), "{}", learner.name());
    }
}

#[test]
fn an_adapting_head_leaves_as_one_graph_for_any_number_of_ways() {
    let mut trainer = Trainer::new(config(2, 5), small(Learner::Anil(INNER)));
    trainer.run(&Stripes, Limits::default(), &mut |_, _| ControlFlow::Continue(())).unwrap();
    let model = trainer.model();
    let embedding = model.backbone().to_graph(16, 16).unwrap();
    let graph = adapting_graph(&embedding, model.head(INNER).unwrap()).unwrap();
    let folder = crate::support::temp_dir();
    let path = folder.path().join("episode.onnx");
    write(&path, &graph, &ExportInfo::new(std::collections::BTreeMap::new())).unwrap();
    let mut session = crate::support::runtime().open(&path).unwrap();
    for way in [3, 6] {
        let (mut support, mut query) = (images(0, 0..2), images(0, 2..5));
        for class in 1..way {
            support.extend(&images(class, 0..2)).unwrap();
            query.extend(&images(class, 2..5)).unwrap();
        }
        let labels: Vec<usize> = (0..2 * way).map(|at| at / 2).collect();
        let own = model.classify(&support, &labels, &query, way, BnMode::Running).unwrap().logits;
        let batch = |images: &Images| Values::f32(images.shape(), images.data().to_vec());
        let inputs = vec![
            ("support_images", batch(&support)),
            ("support_labels", Values::i64([2 * way], labels.iter().map(|&l| l as i64).collect())),
            ("query_images", batch(&query)),
        ];
        let output = session.run(inputs, &["logits"]).unwrap().remove(0);
        assert_eq!(output.shape, [3 * way, way]);
        for (a, b) in output.values.to_f32().iter().zip(&own) {
            assert!((a - b).abs() < 1e-4 * b.abs().max(1.0), "{a} {b}");
        }
    }
}

/// Inner distillation of a head, by hand: one step from the same row for every class goes along
/// `mean_i (p_i - uniform) f_i^T` of the teacher's answers `p`, whatever the labels say.
#[test]
fn a_step_on_answers_is_the_step_derived_by_hand() {
    let inner =
        InnerLoop { train_steps: 1, test_steps: 1, learning_rate: 0.3, order: InnerOrder::Second };
    let model = small(Learner::Anil(inner));
    let tape = Tape::new();
    let parameters: Vec<Var> =
        (model.parameters()).map(|p| tape.leaf(p.value.to_dtype(DType::F64).unwrap())).collect();
    let images = tape.constant(Tensor::cat(&task_images(), 0).unwrap());
    let answers: Vec<f32> = noise(18, 3).into_iter().map(|v| v as f32).collect();
    let how = Distillation { loss: KdLoss::Kl, temperature: 1.0, weight: 1.0 };
    // Labels that are wrong on purpose.
    let mut task = Task::new(&images, &[2, 1, 0, 2, 1, 0], 3);
    task.soft = Some(SoftSupport { logits: &answers, how });
    let answer = model.answer(&parameters, task, 1, Order::Higher, BnMode::Batch).unwrap();
    let found = answer.logits.value().to_vec2::<f64>().unwrap();
    let body = &parameters[..parameters.len() - 2];
    let features = |from: usize, n: usize| {
        let part = images.narrow(0, from, n).unwrap();
        let seen = model.backbone().forward(body, &part, BnMode::Batch).unwrap();
        seen.embedding.value().to_vec2::<f64>().unwrap()
    };
    let (support, query) = (features(0, 6), features(6, 9));
    let row = parameters[parameters.len() - 2].value().to_vec2::<f64>().unwrap().remove(0);
    let softmax = |row: &[f32]| -> Vec<f64> {
        let sum: f64 = row.iter().map(|v| f64::from(*v).exp()).sum();
        row.iter().map(|v| f64::from(*v).exp() / sum).collect()
    };
    let p: Vec<Vec<f64>> = answers.chunks(3).map(softmax).collect();
    for (q, found) in query.iter().zip(&found) {
        for (class, found) in found.iter().enumerate() {
            // The head was the same for all classes, its answer uniform.
            let pull = |i: usize| (p[i][class] - 1.0 / 3.0) * 0.3 / 6.0;
            let weight =
                |at: usize| row[at] + (0..6).map(|i| pull(i) * support[i][at]).sum::<f64>();
            let offset: f64 = (0..6).map(pull).sum();
            let expected = q.iter().enumerate().map(|(at, q)| q * weight(at)).sum::<f64>() + offset;
            assert!((expected - found).abs() < 1e-6, "{expected} {found}");
        }
    }
}

/// At shares of nearly 0 or 1 a mixture is one of its two tasks.
#[test]
fn tasks_are_mixed_between_one_and_the_other() {
    let trainer = Trainer::new(config(1, 1), small(Learner::ProtoNet));
    let sampler = EpisodeSampler::new(&Stripes, 3, 2, 4, 1.0).unwrap();
    let loss = |index: u64, mix: Option<(MixSpace, f64)>| {
        let mut rng = RngStream::new(1, "test", "mix", index);
        let episode = sampler.draw(&mut rng);
        let mix = mix.map(|(space, alpha)| Mix { sampler: &sampler, space, alpha });
        trainer.task_loss((&Stripes, &episode), &Lesson { soft: None, mix }, &mut rng).unwrap()
    };
    let own = |mix: (MixSpace, f64)| {
        let same = |index: &u64| (loss(*index, Some(mix)) - loss(*index, None)).abs() < 1e-3;
        (0..24).filter(same).count()
    };
    let pixels = own((MixSpace::Pixels, 1e-3));
    assert!((5..=19).contains(&pixels), "{pixels} of 24 are the first task");
    assert_eq!(own((MixSpace::Pixels, 2.0)), 0);
    assert_eq!(own((MixSpace::Features, 2.0)), 0);
}
