//! Gradient estimators on real models: what a query buys. docs/black-box.md holds the tables.
//!
//! `cargo run --example estimator_bench -- cosine ZOO MODELS [STEPS]`: along the exact path of a generator, the cosine
//! of each estimate to the exact image gradient against queries an image and step.
//!
//! `cargo run --example estimator_bench -- agreement ZOO MODELS [STEPS] [ARM...]`: recovers images with each estimator and
//! prints the share that the model itself puts into the wanted class, and the share that the zoo's other models which
//! know the class by name put there (they never saw the images), against the queries spent. An arm is
//! `ESTIMATOR:DIRECTIONS[:RADIUS[:FREQUENCIES[:STEPS]]]`. `models=a,b` takes the models with these words in their names
//! instead of the first MODELS; `judges=ZOO` lets another zoo's models judge, except those of the very same classes;
//! `images=N` recovers N images a class instead of six.
//!
//! `RAYON_NUM_THREADS=1 cargo run --example estimator_bench -- throughput ZOO MODELS`: images asked a second.
#![allow(clippy::print_stdout)]

use std::path::Path;
use std::sync::atomic::AtomicBool;

use metazoa::access::library::RuntimeOptions;
use metazoa::access::runtime::Runtime;
use metazoa::access::zero_order::{Estimator, ZeroOrder};
use metazoa::access::{
    BlackOptions, BlackTeacher, Guide, Objective, Surrogate, Teacher, WhiteTeacher,
};
use metazoa::methods::generate::Best;
use metazoa::methods::parts::{CrossEntropy, Generator};
use metazoa::methods::{GenerateConfig, InvertConfig, RecoverConfig, Via, Watch, recover_one};
use metazoa::tensor::{Images, RngStream};
use metazoa::zoo::{Access, ModelSpec, read};
use metazoa::{Error, Result, onnx};

/// An estimator with its directions an image and step, and the length of a step.
#[derive(Clone)]
struct Arm {
    name: String,
    config: ZeroOrder,
    /// Generator steps; 0 for those of the call.
    steps: usize,
}

const ESTIMATORS: [(&str, Estimator); 8] = [
    ("forward", Estimator::Forward),
    ("antithetic", Estimator::Antithetic),
    ("orthogonal", Estimator::Orthogonal),
    ("low-frequency", Estimator::LowFrequency),
    ("guided", Estimator::Guided),
    ("prior", Estimator::Prior),
    ("prior-low-frequency", Estimator::PriorLowFrequency),
    ("hard-label", Estimator::HardLabel),
];

/// `ESTIMATOR:DIRECTIONS[:RADIUS[:FREQUENCIES[:STEPS]]]`.
fn arm(text: &str) -> Result<Arm> {
    let bad = || Error::usage(format!("an arm is ESTIMATOR:DIRECTIONS[:RADIUS], got `{text}`"));
    let mut parts = text.split(':');
    let word = parts.next().ok_or_else(bad)?;
    let (_, estimator) = ESTIMATORS.into_iter().find(|(name, _)| *name == word).ok_or_else(bad)?;
    let mut number = |usual: f64| parts.next().map_or(Ok(usual), |v| v.parse().map_err(|_| bad()));
    let (directions, radius, frequencies) = (number(20.0)?, number(0.005)?, number(8.0)?);
    let steps = number(0.0)? as usize;
    let config = ZeroOrder {
        estimator,
        directions: directions as usize,
        radius,
        frequencies: frequencies as usize,
        pack: 1024,
    };
    Ok(Arm { name: text.to_owned(), config, steps })
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [mode, zoo, rest @ ..] = arguments.as_slice() else {
        return Err(Error::usage("`cosine|agreement ZOO MODELS [STEPS] [ARM...]`"));
    };
    let number = |at: usize, usual| rest.get(at).and_then(|v| v.parse().ok()).unwrap_or(usual);
    let (count, steps): (usize, usize) = (number(0, 3), number(1, 0));
    let option =
        |name: &str| rest.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let arms = rest.iter().skip(2).filter(|word| !word.contains('='));
    let arms: Vec<Arm> = arms.map(|text| arm(text)).collect::<Result<_>>()?;
    let everyone = models(Path::new(zoo))?;
    let specs: Vec<ModelSpec> = match option("models") {
        Some(words) => {
            let wanted = |spec: &&ModelSpec| words.split(',').any(|word| spec.id.contains(word));
            everyone.iter().filter(wanted).cloned().collect()
        }
        None => everyone.iter().take(count).cloned().collect(),
    };
    let specs = specs.as_slice();
    let cache = std::env::var("HOME").unwrap_or_default() + "/.cache/metazoa";
    let runtime = Runtime::load(&RuntimeOptions::new(cache))?;
    match mode.as_str() {
        "cosine" => cosines(specs, runtime, if steps == 0 { 30 } else { steps }, &arms),
        "agreement" => {
            let judges = match option("judges") {
                Some(zoo) => models(Path::new(zoo))?,
                None => everyone,
            };
            let judges = Judges::open(&judges, runtime)?;
            let images = option("images").and_then(|text| text.parse().ok()).unwrap_or(6);
            let steps = if steps == 0 { 60 } else { steps };
            agreements(specs, &judges, runtime, [images, steps], &arms)
        }
        "throughput" => throughput(specs, runtime),
        other => Err(Error::usage(format!("unknown mode `{other}`"))),
    }
}

/// The models of `zoo` by name.
fn models(zoo: &Path) -> Result<Vec<ModelSpec>> {
    let entries = std::fs::read_dir(zoo).map_err(|error| Error::io(zoo, &error))?;
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "onnx"));
    files.sort();
    files.iter().map(|path| read::read_file(path).map(|model| model.spec)).collect()
}

fn black(spec: &ModelSpec, runtime: &'static Runtime, config: ZeroOrder) -> Result<BlackTeacher> {
    let spec = ModelSpec { access: Access::BlackBox, query_budget: None, ..spec.clone() };
    BlackTeacher::open(spec, runtime, BlackOptions { zero_order: config, batch: 128 })
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f64::MIN_POSITIVE)
}

/// Two images a class follow exact gradients; every estimator looks at each of their steps.
fn cosines(
    specs: &[ModelSpec],
    runtime: &'static Runtime,
    steps: usize,
    arms: &[Arm],
) -> Result<()> {
    let usual = ["forward", "antithetic", "orthogonal", "low-frequency", "guided", "prior"];
    let all: Vec<Arm> = if arms.is_empty() {
        let names = usual.into_iter().chain(["prior-low-frequency"]);
        let arms = names.flat_map(|name| [4, 10, 100].map(|q| arm(&format!("{name}:{q}"))));
        arms.collect::<Result<_>>()?
    } else {
        arms.to_vec()
    };
    println!(
        "| estimator | directions | queries an image and step | cosine to the exact gradient |"
    );
    println!("|---|---|---|---|");
    for Arm { name, config, .. } in all {
        let (mut sum, mut seen, mut queries) = (0.0, 0usize, 0);
        for spec in specs {
            let folder = spec.path.parent().unwrap_or(Path::new("."));
            let graph = onnx::load(&spec.path, folder)?.graph;
            let white = WhiteTeacher::new(spec.clone(), graph, Surrogate::Off)?;
            let teacher = black(spec, runtime, config)?;
            let labels: Vec<usize> = (0..2 * spec.classes).map(|i| i / 2).collect();
            let mut rng = RngStream::new(0, "estimator-bench", &spec.sha, 0);
            let mut generator = Generator::new(labels.len(), 256, 32, [32, 32], &mut rng)?;
            let loss = CrossEntropy::new(labels);
            let objective = Objective { logits: &loss, statistics_weight: 0.0 };
            let mut prior: Option<Images> = None;
            for _ in 0..steps {
                let basis = (config.estimator == Estimator::Guided)
                    .then(|| generator.tangents(config.directions, &mut rng))
                    .transpose()?;
                generator.step([1e-3; 2], |images| {
                    let exact = white.image_gradient(images, &objective, &mut rng)?.gradient;
                    let guide = Guide { basis: basis.as_ref(), prior: prior.as_ref() };
                    let found =
                        teacher.guided_gradient(images, &objective, &guide, &mut rng)?.gradient;
                    for i in 0..images.len() {
                        sum += cosine(found.image(i), exact.image(i));
                        seen += 1;
                    }
                    prior = Some(found);
                    Ok(exact)
                })?;
            }
            queries += teacher.queries();
        }
        let each = queries as f64 / seen as f64;
        println!("| {name} | {} | {each:.0} | {:.3} |", config.directions, sum / seen as f64);
    }
    Ok(())
}

/// Best of five times 1024 random images.
fn throughput(specs: &[ModelSpec], runtime: &'static Runtime) -> Result<()> {
    for spec in specs {
        let teacher = black(spec, runtime, arm("forward:1")?.config)?;
        let [_, h, w] = spec.preprocess.input_size;
        let mut rng = RngStream::new(0, "throughput", "", 0);
        let data = (0..1024 * 3 * h * w).map(|_| rng.uniform()).collect();
        let images = Images::new(data, [1024, 3, h, w])?;
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            let begin = std::time::Instant::now();
            teacher.logits(&images)?;
            best = best.min(begin.elapsed().as_secs_f64());
        }
        println!("{}: {:.0} images a second", spec.id, 1024.0 / best);
    }
    Ok(())
}

/// Models that say what they see in images recovered from another one.
struct Judges(Vec<BlackTeacher>);

impl Judges {
    fn open(specs: &[ModelSpec], runtime: &'static Runtime) -> Result<Self> {
        let config = arm("forward:1")?.config;
        specs.iter().map(|spec| black(spec, runtime, config)).collect::<Result<_>>().map(Self)
    }

    /// Share of the verdicts for the image's class, by all models but `own` that know it by name.
    fn share(
        &self,
        own: &ModelSpec,
        labels: &[String],
        classes: &[usize],
        images: &Images,
    ) -> Result<f64> {
        let (mut right, mut all) = (0usize, 0usize);
        // One that knows the very same classes may be the same model in another file.
        let other = |judge: &&BlackTeacher| judge.spec().labels != own.labels;
        for judge in self.0.iter().filter(other) {
            let known = &judge.spec().labels;
            let wanted: Vec<Option<usize>> =
                labels.iter().map(|label| known.iter().position(|other| other == label)).collect();
            let shown: Vec<usize> =
                (0..images.len()).filter(|&i| wanted[classes[i]].is_some()).collect();
            if shown.is_empty() {
                continue;
            }
            let scores = judge.logits(&images.select(&shown))?;
            for (row, &i) in scores.chunks_exact(known.len()).zip(&shown) {
                let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
                right += usize::from(best == wanted[classes[i]]);
                all += 1;
            }
        }
        Ok(right as f64 / all as f64)
    }
}

/// Images recovered with each estimator, judged by the model and by others.
fn agreements(
    specs: &[ModelSpec],
    judges: &Judges,
    runtime: &'static Runtime,
    [images_per_class, steps]: [usize; 2],
    arms: &[Arm],
) -> Result<()> {
    let usual =
        ["forward:100", "forward:10", "prior:4", "low-frequency:4", "prior-low-frequency:4"];
    let all: Vec<Arm> = if arms.is_empty() {
        usual.into_iter().map(arm).collect::<Result<_>>()?
    } else {
        arms.to_vec()
    };
    println!(
        "| estimator:directions | queries a model | own agreement, % | others' agreement, % | loss |"
    );
    println!("|---|---|---|---|---|");
    for Arm { name, config, steps: own_steps } in all {
        let steps = if own_steps == 0 { steps } else { own_steps };
        let (mut queries, mut agreement, mut others, mut losses) = (0, 0.0, 0.0, 0.0);
        for spec in specs {
            let teacher = black(spec, runtime, config)?;
            let recover = RecoverConfig {
                seed: 0,
                image_size: [32, 32],
                images_per_class,
                batch: 120,
                white_box: InvertConfig {
                    steps: 0,
                    learning_rate: 0.0,
                    final_rate: 0.0,
                    statistics: 0.0,
                    total_variation: 0.0,
                    size: 0.0,
                    jitter: 0,
                },
                black_box: GenerateConfig {
                    statistics: 0.0,
                    best: Best::Loss,
                    steps,
                    learning_rate: 1e-3,
                    latent: 256,
                    features: 32,
                    tangents: if config.estimator == Estimator::Guided {
                        config.directions
                    } else {
                        0
                    },
                },
            };
            let last = std::sync::Mutex::new(f64::INFINITY);
            let watch = Watch {
                observe: &|iteration| {
                    if let Ok(mut last) = last.lock() {
                        *last = last.min(iteration.loss);
                    }
                },
                interrupt: &AtomicBool::new(false),
            };
            let found = recover_one(&teacher, &recover, Via::Pixels, &watch)?;
            queries += teacher.queries();
            agreement += found.agreement;
            let images = &found.images;
            let (labels, classes) = (&images.labels, &images.classes);
            others += judges.share(spec, labels, classes, &images.images())?;
            losses += last.into_inner().unwrap_or(f64::NAN);
        }
        let n = specs.len() as f64;
        println!(
            "| {name} | {} | {:.1} | {:.1} | {:.3} |",
            queries / specs.len() as u64,
            100.0 * agreement / n,
            100.0 * others / n,
            losses / n
        );
    }
    Ok(())
}
