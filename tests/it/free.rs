//! FREE: the meta-generator on real models of the bundled zoo, the boundary term, and the method as a user runs it.

use std::sync::atomic::AtomicBool;

use metazoa::ErrorKind;
use metazoa::access::{
    Guide, ImageGradient, LogitsLoss, Objective, Surrogate, Teacher, WhiteTeacher,
};
use metazoa::meta::{Backbone, BnMode, InnerLoop, InnerOrder, Learner, MetaModel};
use metazoa::methods::parts::{CrossEntropy, OpenTeachers, Student};
use metazoa::methods::{
    FiveConfig, MetaGenerator, MetaGradient, Opener, RoundConfig, Visit, Watch, draw,
};
use metazoa::onnx;
use metazoa::tensor::{Images, RngStream, TensorStore};
use metazoa::zoo::read;
use serde_json::Value;

use crate::main_job::{CONV4, kill_and_resume, small_zoo, train};
use crate::remote::model;
use crate::support::{run_in, temp_dir};

const THREE: [&str; 3] =
    ["ss_001_glyphs_conv4_32", "ss_011_glyphs_conv4_32", "ss_028_glyphs_conv4_32"];
static GOING: AtomicBool = AtomicBool::new(false);

fn teacher(name: &str) -> WhiteTeacher {
    let spec = read::read_file(&model(name)).unwrap().spec;
    let folder = model(name).parent().unwrap().to_path_buf();
    let graph = onnx::load(&spec.path, &folder).unwrap().graph;
    WhiteTeacher::new(spec, graph, Surrogate::Auto).unwrap()
}

fn config() -> FiveConfig {
    FiveConfig {
        seed: 3,
        image_size: [32, 32],
        latent: 32,
        features: 4,
        steps: 5,
        rate: 5e-3,
        latent_rate: 0.1,
        class_spread: None,
        statistics: 1.0,
        boundary: 0.0,
        jitter: 2,
        meta: MetaGradient::LastStep,
        meta_rate: 2e-3,
        forgetful: false,
        redraw: None,
    }
}

const ROUND: RoundConfig = RoundConfig { seed: 3, models: 2, images_per_class: 3, classes: 4 };

/// After `rounds` rounds with the three models.
fn trained(config: FiveConfig, from: Option<&TensorStore>, rounds: u64) -> MetaGenerator {
    let open =
        |index: usize| -> metazoa::Result<Box<dyn Teacher>> { Ok(Box::new(teacher(THREE[index]))) };
    let open: &Opener<'_> = &open;
    let teachers = OpenTeachers::new(open);
    let watch = Watch { observe: &|_| {}, interrupt: &GOING };
    let mut generator = match from {
        Some(store) => MetaGenerator::read_from(config, store).unwrap(),
        None => MetaGenerator::new(config).unwrap(),
    };
    while generator.rounds() < rounds {
        let number = generator.rounds();
        let chosen = draw(&ROUND, number, &[0, 1, 2]);
        assert_eq!(chosen.len(), [2, 1][number as usize % 2]);
        let round = generator
            .round(&chosen, |generator, model| {
                let alone = |_: usize, _: &[usize]| Ok(None);
                generator.visit_of_round((&ROUND, number), model, &teachers, &alone, &watch)
            })
            .unwrap();
        assert!(round.failed.is_empty());
        assert!(round.visits.iter().all(|v| v.labels.len() == 12 && v.visit.images.len() == 12));
    }
    generator
}

fn visit(generator: &MetaGenerator, name: &str) -> Visit {
    let watch = Watch { observe: &|_| {}, interrupt: &GOING };
    let labels: Vec<usize> = (0..15).map(|i| i / 3).collect();
    let mut rng = RngStream::new(9, "test", name, 0);
    generator.visit(&teacher(name), &labels, None, &mut rng, &watch).unwrap()
}

fn statistics(generator: &MetaGenerator) -> f64 {
    THREE.iter().map(|name| visit(generator, name).last.statistics).sum::<f64>() / 3.0
}

/// What the rounds are for: five steps get further than they did at the start, by each kind of meta-gradient.
#[test]
fn the_meta_generator_learns_to_be_adapted() {
    for (meta, class_spread) in [
        (MetaGradient::LastStep, None),
        (MetaGradient::AllSteps, Some(1.0)),
        (MetaGradient::Reptile, None),
    ] {
        let config = FiveConfig { meta, class_spread, ..config() };
        let before = statistics(&MetaGenerator::new(config.clone()).unwrap());
        let after = statistics(&trained(config, None, 25));
        assert!(after < 0.9 * before, "{meta:?}: {before} {after}");
    }
}

/// The same bytes for any number of threads, and after a stop in between; others for another seed.
#[test]
fn rounds_and_visits_follow_from_the_seed() {
    let in_pool = |threads: usize, make: &(dyn Fn() -> MetaGenerator + Sync)| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| visit(&make(), THREE[0]).images)
    };
    let whole = in_pool(1, &|| trained(config(), None, 4));
    let half = || {
        let mut store = TensorStore::default();
        trained(config(), None, 2).write_to(&mut store).unwrap();
        trained(config(), Some(&store), 4)
    };
    assert_eq!(whole, in_pool(3, &half));
    let other = in_pool(2, &|| trained(FiveConfig { seed: 4, ..config() }, None, 4));
    assert_ne!(whole, other);
}

/// A generator that is drawn anew is neither the one that learned nor the first, its optimiser starts again, and a stop
/// in between changes nothing.
#[test]
fn the_generator_is_drawn_anew_when_it_is_time() {
    let redrawn = || FiveConfig { redraw: Some(2), ..config() };
    let images = |generator: &MetaGenerator| visit(generator, THREE[0]).images;
    let stored = |generator: &MetaGenerator| {
        let mut store = TensorStore::default();
        generator.write_to(&mut store).unwrap();
        store
    };
    assert_eq!(images(&trained(redrawn(), None, 1)), images(&trained(config(), None, 1)));
    let second = trained(redrawn(), None, 2);
    assert_ne!(images(&second), images(&trained(config(), None, 2)));
    assert_ne!(images(&second), images(&trained(config(), None, 0)));
    assert_eq!(stored(&second).number::<u64>("five.steps").unwrap(), 0);
    let third = trained(redrawn(), Some(&stored(&second)), 3);
    assert_eq!(stored(&third).number::<u64>("five.steps").unwrap(), 1);
    assert_eq!(images(&third), images(&trained(redrawn(), None, 3)));
}

/// With one step the last is all; Reptile's way is that of the weights, Adam's first step: the rate in size.
#[test]
fn what_a_visit_tells_is_what_its_name_says() {
    let told = |meta: MetaGradient, steps: usize| {
        let config = FiveConfig { meta, steps, jitter: 0, ..config() };
        let told = visit(&MetaGenerator::new(config).unwrap(), THREE[1]).told;
        told[4].flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let last = told(MetaGradient::LastStep, 1);
    assert_eq!(last, told(MetaGradient::AllSteps, 1));
    for (way, gradient) in told(MetaGradient::Reptile, 1).into_iter().zip(&last) {
        if gradient.abs() > 1e-4 {
            let expected = 5e-3 * gradient.signum();
            assert!((way - expected).abs() < 1e-4, "{way} {gradient}");
        }
    }
    // Of several steps all is more than the last.
    assert_ne!(told(MetaGradient::LastStep, 2), told(MetaGradient::AllSteps, 2));
}

/// Images drawn towards their class, and the classes of a label-conditional generator towards each other.
#[test]
fn images_of_a_class_share_what_the_class_has() {
    let spread = |class_spread: Option<f32>| {
        let config = FiveConfig { class_spread, ..config() };
        let images = visit(&trained(config, None, 2), THREE[2]).images;
        let distance = |a: usize, b: usize| -> f64 {
            let pairs = images.image(a).iter().zip(images.image(b));
            pairs.map(|(a, b)| f64::from((a - b).powi(2))).sum::<f64>()
        };
        let (mut within, mut across) = ((0.0, 0), (0.0, 0));
        for a in 0..15 {
            for b in 0..a {
                let sum = if a / 3 == b / 3 { &mut within } else { &mut across };
                *sum = (sum.0 + distance(a, b), sum.1 + 1);
            }
        }
        (within.0 / f64::from(within.1)) / (across.0 / f64::from(across.1))
    };
    let (shared, free) = (spread(Some(0.2)), spread(None));
    assert!(shared < 0.5 && free > 0.5, "{shared} {free}");
}

fn pictures(n: usize, key: &str) -> Images {
    let mut rng = RngStream::new(5, "test", key, 0);
    Images::new((0..n * 3072).map(|_| rng.uniform()).collect(), [n, 3, 32, 32]).unwrap()
}

/// The boundary term's gradient goes through teacher and student: against central differences of its value, which is
/// computed here from the answers of both.
#[test]
fn the_boundary_term_is_differentiated_through_teacher_and_student() {
    let teacher = teacher(THREE[0]);
    let inner =
        InnerLoop { train_steps: 2, test_steps: 3, learning_rate: 0.05, order: InnerOrder::Second };
    for learner in [Learner::ProtoNet, Learner::Anil(inner), Learner::Maml(inner)] {
        let backbone = Backbone::conv4(4, 11).unwrap();
        let model = MetaModel::new(backbone, learner, [32, 32], 1).unwrap();
        let (support, slots) = (pictures(6, "support"), vec![0, 0, 1, 1, 2, 2]);
        let images = pictures(12, "queries");
        let wanted = CrossEntropy::new((0..12).map(|i| [0, 1, 2, 4][i % 4]).collect());
        let objective = Objective { logits: &wanted, statistics_weight: 0.0 };
        let mut rng = RngStream::new(0, "test", "boundary", 0);
        let weight = 0.8;
        let alone = teacher.image_gradient(&images, &objective, &mut rng).unwrap().gradient;
        // Untrained learners like one slot: it must stand for a class that the teacher likes too.
        let meet = |classes: [usize; 3]| -> Option<([usize; 3], ImageGradient)> {
            let (support, slots) = (support.clone(), slots.clone());
            let student = Student::new(&model, support, slots, classes.to_vec()).unwrap();
            let mut rng = RngStream::new(0, "test", "boundary", 1);
            let found = student
                .image_gradient(
                    &teacher,
                    &images,
                    (&objective, weight),
                    &Guide::default(),
                    &mut rng,
                )
                .unwrap();
            (found.gradient != alone).then_some((classes, found))
        };
        let (classes, found) = [[4, 0, 2], [0, 2, 4], [2, 4, 0]]
            .into_iter()
            .find_map(meet)
            .unwrap_or_else(|| panic!("{learner:?}: no image where both agree"));
        let value = |images: &Images| -> f64 {
            let of_teacher = teacher.logits(images).unwrap();
            // The episode's batch normalises the student, as in its gradient.
            let of_student = model.classify(&support, &slots, images, 3, BnMode::Batch).unwrap();
            let softmax = |row: Vec<f64>| -> Vec<f64> {
                let sum: f64 = row.iter().map(|v| v.exp()).sum();
                row.iter().map(|v| v.exp() / sum).collect()
            };
            let top = |row: &[f64]| (0..3).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
            // ProtoNet's answer leaves out the factor of training.
            let factor = if learner == Learner::ProtoNet { scale(&model) } else { 1.0 };
            let mut total = 0.0;
            for i in 0..12 {
                let row = &of_teacher[5 * i..5 * i + 5];
                let t = softmax(classes.iter().map(|&c| f64::from(row[c])).collect());
                let own = &of_student.logits[3 * i..3 * i + 3];
                let s = softmax(own.iter().map(|v| f64::from(*v) * factor).collect());
                total += wanted.value(i, row) / 12.0;
                if top(&t) == top(&s) {
                    let kl: f64 = t.iter().zip(&s).map(|(t, s)| t * (t / s).ln()).sum();
                    total -= weight * kl / 12.0;
                }
            }
            total
        };
        assert!((found.logits_loss - value(&images)).abs() < 1e-3, "{learner:?}");
        let length: f64 = found.gradient.data().iter().map(|g| f64::from(g * g)).sum::<f64>();
        let step = 1e-3 / length.sqrt();
        let moved = |sign: f64| {
            let mut images = images.clone();
            for (pixel, g) in images.data_mut().iter_mut().zip(found.gradient.data()) {
                *pixel += (sign * step * f64::from(*g)) as f32;
            }
            value(&images)
        };
        let slope = (moved(1.0) - moved(-1.0)) / (2.0 * step);
        assert!((slope - length).abs() < 0.05 * length, "{learner:?}: {slope} {length}");
    }
}

/// ProtoNet's factor of training: 1 / dimension of the embedding would be a guess, so it is measured.
fn scale(model: &MetaModel) -> f64 {
    let dim = model.backbone().embedding_dim(32, 32).unwrap();
    metazoa::meta::protonet::logit_factor(dim)
}

/// The settings of a short run on two models.
const SHORT: [&str; 14] = [
    "--method=free",
    "-s",
    "free.warm_up=2",
    "-s",
    "free.patience=3",
    "-s",
    "five.images_per_class=6",
    "-s",
    "five.features=4",
    "-s",
    "five.models=2",
    "-s",
    "free.visits_kept=2",
    "--no-progress",
];

pub(crate) fn events(run: &std::path::Path, stage: &str) -> Vec<Value> {
    let log = std::fs::read_to_string(run.join("events.jsonl")).unwrap();
    let events = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    events.filter(|event| event["stage"] == stage).collect()
}

#[test]
fn a_killed_run_of_free_resumes_to_the_bytes_of_an_uninterrupted_one() {
    let dir = kill_and_resume(&SHORT);
    let run = dir.path().join("whole");
    let rounds = events(&run, "five");
    assert!(rounds.len() > 4, "{}", rounds.len());
    assert!(events(&run, "align").iter().all(|e| e["cosine"].is_number()));
    // Two models, two visits each: older images are gone from the disk.
    assert_eq!(std::fs::read_dir(run.join("memory")).unwrap().count(), 4);
    let record: Value =
        serde_json::from_str(&std::fs::read_to_string(run.join("run.json")).unwrap()).unwrap();
    for model in record["models"].as_array().unwrap() {
        assert!(model["images"].as_u64().unwrap() > 0 && model["agreement"].is_number(), "{model}");
    }
}

#[test]
fn free_does_without_each_of_its_parts() {
    let dir = temp_dir();
    small_zoo(dir.path(), &CONV4);
    for (name, own) in [
        ("joint", ["-s", "free.align.by=joint"]),
        ("off", ["-s", "free.align.by=off"]),
        ("cross", ["-s", "free.cross_task={temperature: 2}"]),
        ("boundary", ["-s", "five.boundary_weight=1"]),
        ("last", ["-s", "free.keep=last"]),
        ("linear", ["-s", "free.distillation.kd_loss=linear"]),
        ("adam", ["-s", "free.align={by: sequential, optimizer: adam, scale: 67}"]),
        ("maml", ["-s", "meta.learner=maml"]),
        ("black", ["-s", "recover.black_box.directions=2"]),
    ] {
        if name == "black" {
            let sidecar = dir.path().join("zoo").join(format!("{}.yaml", CONV4[0]));
            let text = std::fs::read_to_string(&sidecar).unwrap();
            std::fs::write(&sidecar, format!("{text}access: black-box\n")).unwrap();
        }
        let more = ["-s", "meta.steps=8"];
        let ran = train(dir.path(), name, &[&SHORT[..], &more, &own].concat());
        let result: Value = serde_json::from_str(&ran.stdout).expect(&ran.stderr);
        assert_eq!((ran.code, &result["steps"]), (0, &8.into()), "{name}: {}", ran.stderr);
        assert_eq!(result["method"], "free");
        assert_eq!(events(&dir.path().join(name), "align").is_empty(), name == "off", "{name}");
        assert_eq!(result["queries"].as_u64().unwrap() > 0, name == "black", "{name}");
    }
}

#[test]
fn what_free_cannot_do_is_said_before_anything_is_recovered() {
    let dir = temp_dir();
    small_zoo(dir.path(), &CONV4);
    for (value, said) in [
        ("five.steps=0", "`five.steps`"),
        ("five.learning_rate=-1", "`five.learning_rate`"),
        ("free.distillation.temperature=0", "`free.distillation.temperature`"),
        ("free.cross_task={weight: 2}", "`free.cross_task.weight`"),
        ("meta.early_stop={share: 0.5}", "`meta.early_stop`"),
        ("image_size=[30, 32]", "multiples of 4"),
    ] {
        let refused = train(dir.path(), "refused", &[&SHORT[..], &["-s", value]].concat());
        assert!(refused.code != 0 && refused.stderr.contains(said), "{value}: {}", refused.stderr);
        assert!(!dir.path().join("refused/bank").join("m.safetensors").exists());
    }
    let alone = run_in(
        dir.path(),
        &["invert", &format!("zoo/{}.onnx", CONV4[0]), "--out", "o", "-s", "recover.by=five"],
    );
    assert!(alone.stderr.contains("learns from a whole zoo"), "{}", alone.stderr);
}

/// Images by the meta-generator in place of pixels, for a method that only needs images; stopped and gone on with.
#[test]
fn recovery_by_five_serves_other_methods_too() {
    let five = ["-s", "recover.by=five", "-s", "five.rounds=12", "-s", "five.features=4"];
    let dir = kill_and_resume(&five);
    assert_eq!(events(&dir.path().join("whole"), "five").len(), 12);
    let generator = TensorStore::load(&dir.path().join("whole/generator.safetensors")).unwrap();
    assert_eq!(generator.number::<u64>("five.rounds").unwrap(), 12);
    let interrupted = AtomicBool::new(true);
    let watch = Watch { observe: &|_| {}, interrupt: &interrupted };
    let stopped = MetaGenerator::new(config())
        .unwrap()
        .visit(&teacher(THREE[0]), &[0, 1], None, &mut RngStream::new(0, "t", "", 0), &watch)
        .unwrap_err();
    assert_eq!(stopped.kind(), ErrorKind::Interrupted);
}
