//! What a method may know of a black box: the same interface as a white box, but no gradient of the graph; a bounded
//! number of sessions; a clear word where the GPU is missing; labels alone.

use std::collections::BTreeMap;
use std::sync::Arc;

use metazoa::access::zero_order::{Estimator, ZeroOrder};
use metazoa::access::{
    BlackOptions, BlackTeacher, LogitsLoss, Objective, SessionPool, Surrogate, Teacher,
    WhiteTeacher,
};
use metazoa::app::ingest::{CatalogWriting, IngestOptions, ProbeOptions, ingest};
use metazoa::app::inspect::{GradientChecking, InspectOptions, inspect};
use metazoa::app::invert::{InvertOptions, invert};
use metazoa::app::teachers::{Lenders, TeacherOptions, open};
use metazoa::app::{Context, RunConfig};
use metazoa::graph::{Attribute, DataType, Dimension, Node, Port};
use metazoa::methods::parts::CrossEntropy;
use metazoa::onnx::{self, ExportInfo};
use metazoa::tensor::{Device, Images, RngStream};
use metazoa::zoo::hash::file_sha;
use metazoa::zoo::read::Reach;
use metazoa::zoo::{Access, ModelSpec, OutputKind, read};

use crate::black::Glyphs;
use crate::remote::{OPTIONS, model, said};
use crate::support::{repository, run_in, runtime, runtime_options, shared, temp_dir};

const CONV4: &str = "ss_001_glyphs_conv4_32";

fn noise(n: usize) -> Images {
    let mut rng = RngStream::new(2, "test", "access", 0);
    Images::new((0..n * 3072).map(|_| rng.uniform()).collect(), [n, 3, 32, 32]).unwrap()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// A loss that notices when its gradient is asked for, which only a differentiated graph needs.
struct Tripwire(CrossEntropy, std::sync::atomic::AtomicBool);

impl LogitsLoss for Tripwire {
    fn value(&self, index: usize, logits: &[f32]) -> f64 {
        self.0.value(index, logits)
    }

    fn gradient(&self, index: usize, logits: &[f32], gradient: &mut [f32]) {
        self.1.store(true, std::sync::atomic::Ordering::SeqCst);
        self.0.gradient(index, logits, gradient);
    }
}

/// The same file twice, one forced to be a black box: opened and asked through the same interface, the one gives the
/// graph's gradient and statistics and spends nothing, the other spends queries and gives neither.
#[test]
fn access_black_box_never_takes_a_gradient_from_the_graph() {
    let zoo = temp_dir();
    for (name, more) in [("white", ""), ("black", "access: black-box\n")] {
        std::fs::copy(model(CONV4), zoo.path().join(format!("{name}.onnx"))).unwrap();
        let yaml = format!("schema_version: 1\n{}{more}", said(CONV4));
        std::fs::write(zoo.path().join(format!("{name}.yaml")), yaml).unwrap();
    }
    let context = Context::silent(0);
    let options = IngestOptions {
        zoo: zoo.path().into(),
        catalog: CatalogWriting::Skip,
        probe: None,
        reach: Reach::AsFound,
    };
    let found = ingest(&context, &options).unwrap();
    let config = RunConfig::default();
    let options = TeacherOptions::new(&context, &config, found.zoo.clone(), runtime_options());
    let images = noise(3);
    let look = |id: &str| {
        let spec = found.models.iter().find(|model| model.spec.id == id).unwrap().spec.clone();
        let teacher = open(&spec, &options).unwrap();
        let loss = Tripwire(CrossEntropy::new(vec![0, 1, 2]), false.into());
        let objective = Objective { logits: &loss, statistics_weight: 1.0 };
        let mut rng = RngStream::new(0, "test", "tripwire", 0);
        let seen = teacher.image_gradient(&images, &objective, &mut rng).unwrap();
        (seen, loss.1.into_inner(), teacher.statistics_layers(), teacher.queries(), spec.access)
    };
    let (exact, touched, layers, queries, access) = look("white");
    assert_eq!((touched, layers, queries, access), (true, 4, 0, Access::WhiteBox));
    assert!(exact.statistics_loss > 0.0);
    let (guess, touched, layers, queries, access) = look("black");
    assert_eq!((touched, layers, queries, access), (false, 0, 3 * 21, Access::BlackBox));
    assert_eq!(guess.statistics_loss, 0.0);
    // Twenty directions of 3072: an estimate, not the gradient.
    let similar = cosine(guess.gradient.data(), exact.gradient.data());
    assert!(similar.abs() < 0.3, "{similar}");
    let close = guess.logits.iter().zip(&exact.logits).all(|(a, b)| (a - b).abs() < 1e-3);
    assert!(close, "both see the same scores");
}

/// Four models, many threads, two sessions: never more open, and the answers are those of an unbounded pool.
#[test]
fn a_pool_never_holds_more_sessions_than_it_may() {
    let images = noise(40);
    let specs: Vec<ModelSpec> = ["ss_001_glyphs_conv4_32", "ss_011_glyphs_conv4_32"]
        .iter()
        .map(|name| read::read_file(&model(name)).unwrap().spec)
        .collect();
    let options = BlackOptions { batch: 4, ..OPTIONS };
    let free: Vec<Vec<f32>> = specs
        .iter()
        .map(|spec| {
            let teacher = BlackTeacher::open(spec.clone(), runtime(), options).unwrap();
            teacher.logits(&images).unwrap()
        })
        .collect();
    for most in [1, 2] {
        let pool = Arc::new(SessionPool::new(most));
        let open = |index: usize| {
            let spec = specs[index % 2].clone();
            BlackTeacher::open_in(spec, runtime(), Device::Cpu, &pool, options).unwrap()
        };
        let teachers: Vec<BlackTeacher> = (0..4).map(open).collect();
        let threads = rayon_pool(4);
        std::thread::scope(|scope| {
            for (index, teacher) in teachers.iter().enumerate() {
                let (images, free, threads) = (&images, &free, &threads);
                scope.spawn(move || {
                    for _ in 0..3 {
                        let answer = threads.install(|| teacher.logits(images)).unwrap();
                        assert_eq!(answer, free[index % 2]);
                    }
                });
            }
        });
        assert_eq!(pool.usage().0, most, "as many as allowed were used, and no more");
        drop(teachers);
    }
    // One model asked again and again is opened once.
    let pool = Arc::new(SessionPool::new(8));
    let spec = specs[0].clone();
    let teacher = BlackTeacher::open_in(spec, runtime(), Device::Cpu, &pool, options).unwrap();
    rayon_pool(1).install(|| (0..5).for_each(|_| drop(teacher.logits(&images).unwrap())));
    assert_eq!(pool.usage(), (1, 1));
}

/// The pool has closed the model's session for another's when the file becomes another one: the next question is
/// refused, and the other model is answered as before.
#[test]
fn a_file_replaced_between_two_questions_is_not_opened_again() {
    let folder = temp_dir();
    let copy = |name: &str, from: &str| {
        let path = folder.path().join(name);
        std::fs::copy(model(from), &path).unwrap();
        path
    };
    let (own, other) = (copy("own.onnx", CONV4), copy("other.onnx", "ss_011_glyphs_conv4_32"));
    let pool = Arc::new(SessionPool::new(1));
    let open = |path: &std::path::Path| {
        let spec = read::read_file(path).unwrap().spec;
        BlackTeacher::open_in(spec, runtime(), Device::Cpu, &pool, OPTIONS).unwrap()
    };
    let images = noise(4);
    let (own_teacher, other_teacher) = (open(&own), open(&other));
    let answer = own_teacher.logits(&images).unwrap();
    let expected = other_teacher.logits(&images).unwrap();
    assert_eq!(own_teacher.logits(&images).unwrap(), answer);
    assert_eq!(other_teacher.logits(&images).unwrap(), expected);
    copy("own.onnx", "ss_028_glyphs_conv4_32");
    let spent = own_teacher.queries();
    let error = own_teacher.logits(&images).unwrap_err();
    assert!(error.to_string().contains("has changed since it was read"), "{error}");
    assert_eq!(own_teacher.queries(), spent, "what was not asked is not counted");
    assert_eq!(other_teacher.logits(&images).unwrap(), expected);
    drop((own_teacher, other_teacher));
    assert_eq!(pool.open_now(), 0, "the sessions of models that are done are closed");
}

/// What a lender's file holds by now is not what the zoo was read for.
#[test]
fn a_model_replaced_since_ingest_lends_no_statistics() {
    let zoo = temp_dir();
    for (name, from) in [("lender", CONV4), ("taker", "sh_006_glyphs_convnext_ln_gelu")] {
        std::fs::copy(model(from), zoo.path().join(format!("{name}.onnx"))).unwrap();
        let yaml = format!("schema_version: 1\n{}", said(from));
        std::fs::write(zoo.path().join(format!("{name}.yaml")), yaml).unwrap();
    }
    let context = Context::silent(0);
    let options = IngestOptions {
        zoo: zoo.path().into(),
        catalog: CatalogWriting::Skip,
        probe: None,
        reach: Reach::AsFound,
    };
    let found = ingest(&context, &options).unwrap();
    let config = RunConfig::default();
    let options = TeacherOptions::new(&context, &config, found.zoo.clone(), runtime_options());
    let specs = found.specs();
    let specs: Vec<&ModelSpec> = specs.iter().collect();
    let taker = specs.iter().find(|spec| spec.id == "taker").unwrap();
    let layers = || {
        let lenders = Lenders::new(&specs, &found.zoo, &config.recover.white_box);
        lenders.lend(open(taker, &options).unwrap()).statistics_layers()
    };
    assert_eq!(layers(), 1, "borrowed");
    let path = zoo.path().join("lender.onnx");
    std::fs::copy(model("ss_011_glyphs_conv4_32"), &path).unwrap();
    assert_eq!(layers(), 0, "a file that nobody has looked at lends nothing");
    std::fs::copy(model(CONV4), &path).unwrap();
    assert_eq!(layers(), 1);
}

/// A single file goes through the child as a zoo's files do: where that dies, this process does not open it.
#[test]
fn one_file_meets_onnx_runtime_in_a_child_too() {
    use std::os::unix::fs::PermissionsExt;
    let here = temp_dir();
    let executable = here.path().join("child");
    std::fs::write(&executable, "#!/bin/sh\nkill -SEGV $$\n").unwrap();
    std::fs::set_permissions(&executable, std::fs::Permissions::from_mode(0o755)).unwrap();
    let library = runtime().library().path.clone();
    let probe = Some(ProbeOptions { executable, library });
    let context = Context::silent(0);
    let out = here.path().join("out");
    let options = InvertOptions {
        model: model("edge_int8_qdq"),
        out: out.clone(),
        config: RunConfig::default(),
        runtime: runtime_options(),
        probe: probe.clone(),
    };
    let error = invert(&context, &options).unwrap_err();
    assert!(error.to_string().contains("crashed on the model with signal `11`"), "{error}");
    assert!(!out.exists());
    let gradient = GradientChecking::Check;
    let model = model(CONV4);
    let options = InspectOptions { model, gradient, runtime: runtime_options(), probe };
    let error = inspect(&context, &options).unwrap_err();
    assert!(error.to_string().contains("crashed on the model with signal `11`"), "{error}");
}

/// A check that differentiates the graph is a gradient too.
#[test]
fn a_black_box_is_not_inspected_by_its_gradient() {
    let path = model("edge_int8_qdq").display().to_string();
    let here = temp_dir();
    let ran = run_in(here.path(), &["inspect", &path, "--check-gradient"]);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    assert!(ran.stderr.contains("a black box gives no gradient"), "{}", ran.stderr);
    assert!(ran.stderr.contains("remove `access: black-box`"), "{}", ran.stderr);
    assert_eq!(run_in(here.path(), &["inspect", &path]).code, 0);
}

fn rayon_pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

/// The ONNX Runtime of the tests has no CUDA: asking for it is refused in one line, before any work.
#[test]
fn a_gpu_that_is_asked_for_and_missing_is_told_in_one_line() {
    let dir = temp_dir();
    let zoo = repository().join("zoo").display().to_string();
    let ran = run_in(dir.path(), &["train", &zoo, "--out", "run", "--device", "cuda:1"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (1, ""), "{}", ran.stderr);
    let lines: Vec<&str> = ran.stderr.lines().collect();
    assert!(lines[0].starts_with("error: `--device cuda:1` is asked for"), "{}", ran.stderr);
    assert!(lines[1].contains("setup --cuda 13") && lines.len() == 2, "{}", ran.stderr);
    assert!(!dir.path().join("run").exists());
}

/// The Conv4 with an ArgMax behind its scores, which are no output any more.
fn labels_only(folder: &std::path::Path) -> ModelSpec {
    let spec = read::read_file(&model(CONV4)).unwrap().spec;
    let mut graph = onnx::load(&spec.path, spec.path.parent().unwrap()).unwrap().graph;
    let argmax = Node::new("ArgMax", "best", &[spec.logits_output.as_str()], &["label"])
        .with("axis", Attribute::Int(1))
        .with("keepdims", Attribute::Int(0));
    graph.nodes.push(argmax);
    graph.outputs = vec![Port {
        name: "label".into(),
        dtype: DataType::Int64,
        shape: Some(vec![Dimension::Symbol("n".into())]),
    }];
    let path = folder.join("labels.onnx");
    onnx::write(&path, &graph, &ExportInfo::new(BTreeMap::new())).unwrap();
    let output_kind = OutputKind::Labels;
    let spec = ModelSpec { sha: file_sha(&path).unwrap(), ..spec };
    ModelSpec { path, logits_output: "label".into(), output_kind, access: Access::BlackBox, ..spec }
}

/// Between two real images the boundary is found by halving, from labels; there 300 labels an image tell a direction
/// along which the loss falls that only the scores' owner can see.
#[test]
fn labels_alone_lower_the_loss_that_they_do_not_show() {
    let Some(glyphs) = Glyphs::load(6) else { return };
    let folder = temp_dir();
    let spec = labels_only(folder.path());
    let zero_order =
        ZeroOrder { estimator: Estimator::Forward, directions: 300, ..OPTIONS.zero_order };
    let options = BlackOptions { zero_order, batch: 128 };
    let teacher = BlackTeacher::open(spec.clone(), runtime(), options).unwrap();
    assert_eq!(teacher.zero_order(&noise(1)).estimator, Estimator::HardLabel);
    let white = read::read_file(&model(CONV4)).unwrap().spec;
    let graph = onnx::load(&white.path, white.path.parent().unwrap()).unwrap().graph;
    let white = WhiteTeacher::new(white, graph, Surrogate::Off).unwrap();
    let (images, classes) = glyphs.batch(&spec.labels, 1);
    let label = |image: &[f32]| -> usize {
        let one = Images::new(image.to_vec(), [1, 3, 32, 32]).unwrap();
        let scores = teacher.logits(&one).unwrap();
        (0..5).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap()
    };
    let mut found = Vec::new();
    for (i, j) in [(0, 1), (1, 2), (2, 3), (3, 4)] {
        let between = |t: f32| -> Vec<f32> {
            let pairs = images.image(i).iter().zip(images.image(j));
            pairs.map(|(a, b)| a + t * (b - a)).collect()
        };
        let (mut low, mut high) = (0.0f32, 1.0f32);
        let start = label(&between(low));
        for _ in 0..12 {
            let middle = 0.5 * (low + high);
            if label(&between(middle)) == start { low = middle } else { high = middle }
        }
        let image = Images::new(between(high), [1, 3, 32, 32]).unwrap();
        let loss = CrossEntropy::new(vec![start]);
        let objective = Objective { logits: &loss, statistics_weight: 0.0 };
        let mut rng = RngStream::new(4, "test", "labels", i as u64);
        let gradient = teacher.image_gradient(&image, &objective, &mut rng).unwrap().gradient;
        let norm = gradient.data().iter().map(|v| v * v).sum::<f32>().sqrt();
        let value = |step: f32| {
            let pairs = image.data().iter().zip(gradient.data());
            let moved = pairs.map(|(x, g)| x + step * g / norm).collect();
            let moved = Images::new(moved, [1, 3, 32, 32]).unwrap();
            loss.value(0, &white.logits(&moved).unwrap())
        };
        found.push([value(-3.0), value(0.0), value(3.0)]);
    }
    eprintln!("losses down, here, up: {found:?}; classes {classes:?}");
    for [down, here, up] in found {
        assert!(down < here - 0.3 && up > here + 0.3, "{down} {here} {up}");
    }
}

/// What does not fill a batch is filled up with its last image: the others' scores and gradients do not show it.
#[test]
fn a_short_last_batch_gives_what_it_gives_alone() {
    let near = |found: &[f32], wanted: &[f32], what: &str| {
        assert_eq!(found.len(), wanted.len(), "{what}");
        let scale = wanted.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        for (found, wanted) in found.iter().zip(wanted) {
            assert!((found - wanted).abs() <= 1e-4 * scale, "{what}: {found} for {wanted}");
        }
    };
    let open = |path: std::path::PathBuf| {
        let spec = read::read_file(&path).unwrap().spec;
        let graph = onnx::load(&spec.path, spec.path.parent().unwrap()).unwrap().graph;
        WhiteTeacher::new(spec, graph, Surrogate::Off).unwrap()
    };
    let (teacher, images) = (open(model(CONV4)), noise(70));
    let all = teacher.logits(&images).unwrap();
    let classes = teacher.spec().classes;
    near(&all[64 * classes..], &teacher.logits(&images.range(64, 70)).unwrap(), "scores");

    let Some(folder) = shared("data/zoo_edge") else { return };
    let (fixed, images) = (open(folder.join("edge_fixed_batch8.onnx")), noise(11));
    let mut rng = RngStream::new(0, "test", "batch", 0);
    let mut gradient = |from: usize, to: usize| {
        let loss = CrossEntropy::new((from..to).map(|i| i % 5).collect());
        let objective = Objective { logits: &loss, statistics_weight: 0.0 };
        fixed.image_gradient(&images.range(from, to), &objective, &mut rng).unwrap()
    };
    let (all, first, last) = (gradient(0, 11), gradient(0, 8), gradient(8, 11));
    // Each call's loss is a mean over its own images.
    let scaled =
        |part: &Images, n: f32| part.data().iter().map(|v| v * n / 11.0).collect::<Vec<_>>();
    let wanted = [scaled(&first.gradient, 8.0), scaled(&last.gradient, 3.0)].concat();
    near(all.gradient.data(), &wanted, "gradient");
    near(&all.logits, &[first.logits, last.logits].concat(), "scores of a fixed batch");
}
