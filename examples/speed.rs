//! What the engine is timed at: our side of `benches/reference/speed.py`, which holds it against PyTorch.
//!
//! ```text
//! speed [--steps N] inversion FILE BATCH        one step to the pixels of a frozen model
//! speed [--steps N] generator FILE BATCH        the same behind the image generator, with its Adam step
//! speed [--steps N] maml WAY SHOT SIZE          one task of second-order MAML, forward and backward
//! speed [--steps N] protonet WAY SHOT SIZE      one episode of ProtoNet, forward and backward
//! speed [--steps N] black-box FILE BATCH RUNS   BATCH x RUNS queries of a model behind ONNX Runtime
//! speed [--steps N] models FILE BATCH COUNT     an inversion step of each of COUNT models, in parallel
//! speed memory FILE BATCH                       MiB before the first inversion step and at the peak
//! speed check                                   the gradient of `maml` in f64 against differences
//! ```
//!
//! Each of the N steps (10) prints its milliseconds on a line, after one that is not counted. With
//! `--values OUT.safetensors` nothing is timed: one step's inputs, parameters and results are written instead, for
//! `maml` and `protonet` also the gradient in `f64`.
#![allow(clippy::print_stdout)]

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use metazoa::access::library::RuntimeOptions;
use metazoa::access::runtime::Runtime;
use metazoa::access::zero_order::{Estimator, ZeroOrder};
use metazoa::access::{
    BlackOptions, BlackTeacher, ImageGradient, Objective, Surrogate, Teacher, WhiteTeacher,
};
use metazoa::meta::protonet::{logit_factor, prototype_logits, prototypes};
use metazoa::meta::{Backbone, BnMode};
use metazoa::methods::parts::{CrossEntropy, Generator};
use metazoa::tensor::tape::{Order, Tape, Var, grad};
use metazoa::tensor::{Images, RngStream, TensorStore};
use metazoa::{Error, Result, onnx, zoo};
use rayon::prelude::*;

/// Query images of a class.
const QUERIES: usize = 15;
/// Channels of the meta-trained Conv4 (methods.md 1.3).
const WIDTH: usize = 32;
/// Inner steps of MAML and their size (methods.md 1.5).
const INNER_STEPS: usize = 5;
const INNER_RATE: f64 = 0.01;
/// Latent values and features of the generator (methods.md 1.3).
const LATENT: usize = 256;
const FEATURES: usize = 64;

/// Work that is timed.
trait Case {
    /// The work, once.
    fn step(&mut self) -> Result<()>;

    /// Inputs, parameters and results of one step.
    fn values(&mut self) -> Result<TensorStore> {
        Err(Error::unsupported("this case has no values to compare"))
    }
}

fn stream(key: &str) -> RngStream {
    RngStream::new(0, "speed", key, 0)
}

fn uniform_images(n: usize, [height, width]: [usize; 2]) -> Result<Images> {
    let mut rng = stream("images");
    let pixels = (0..n * 3 * height * width).map(|_| rng.uniform()).collect();
    Images::new(pixels, [n, 3, height, width])
}

/// A model's inversion step.
struct Inversion {
    teacher: WhiteTeacher,
    images: Images,
    loss: CrossEntropy,
    rng: RngStream,
}

impl Inversion {
    fn new(path: &Path, batch: usize) -> Result<Self> {
        let folder = path.parent().ok_or_else(|| Error::usage("name a file"))?;
        let spec = zoo::read::read_file(path)?.spec;
        let [_, height, width] = spec.preprocess.input_size;
        let labels = (0..batch).map(|i| i % spec.classes).collect();
        let teacher = WhiteTeacher::new(spec, onnx::load(path, folder)?.graph, Surrogate::Off)?;
        let images = uniform_images(batch, [height, width])?;
        Ok(Self { teacher, images, loss: CrossEntropy::new(labels), rng: stream("directions") })
    }

    fn gradient(&mut self) -> Result<ImageGradient> {
        let objective = Objective { logits: &self.loss, statistics_weight: 1.0 };
        self.teacher.image_gradient(&self.images, &objective, &mut self.rng)
    }
}

impl Case for Inversion {
    fn step(&mut self) -> Result<()> {
        self.gradient().map(drop)
    }

    fn values(&mut self) -> Result<TensorStore> {
        let found = self.gradient()?;
        let shape = self.images.shape();
        let classes = self.teacher.spec().classes;
        let mut store = TensorStore::default();
        store.insert("images", &shape, self.images.data().to_vec());
        store.insert("gradient", &shape, found.gradient.data().to_vec());
        store.insert("logits", &[shape[0], classes], found.logits);
        let losses = vec![found.logits_loss as f32, found.statistics_loss as f32];
        store.insert("losses", &[2], losses);
        Ok(store)
    }
}

/// The generator's step through a frozen model.
struct Generating {
    generator: Generator,
    model: Inversion,
}

impl Generating {
    fn new(path: &Path, batch: usize) -> Result<Self> {
        let model = Inversion::new(path, batch)?;
        let [_, _, height, width] = model.images.shape();
        let mut rng = stream("generator");
        let generator = Generator::new(batch, LATENT, FEATURES, [height, width], &mut rng)?;
        Ok(Self { generator, model })
    }
}

impl Case for Generating {
    fn step(&mut self) -> Result<()> {
        let Inversion { teacher, loss, rng, .. } = &mut self.model;
        let objective = Objective { logits: &*loss, statistics_weight: 1.0 };
        self.generator.step([1e-3; 2], |images| {
            Ok(teacher.image_gradient(images, &objective, rng)?.gradient)
        })?;
        Ok(())
    }
}

/// An inversion step of each of several models, as a run works on them.
struct Models(Vec<Inversion>);

impl Case for Models {
    fn step(&mut self) -> Result<()> {
        self.0.par_iter_mut().with_max_len(1).try_for_each(|model| model.gradient().map(drop))
    }
}

/// A model that is only asked.
struct Asking {
    teacher: BlackTeacher,
    images: Images,
}

impl Asking {
    fn new(path: &Path, batch: usize, runs: usize) -> Result<Self> {
        let spec = zoo::read::read_file(path)?.spec;
        let [_, height, width] = spec.preprocess.input_size;
        let zero_order = ZeroOrder {
            estimator: Estimator::Forward,
            directions: 1,
            radius: 0.05,
            frequencies: 8,
            pack: batch,
        };
        let options = BlackOptions { zero_order, batch };
        let teacher = BlackTeacher::open(spec, runtime()?, options)?;
        Ok(Self { teacher, images: uniform_images(batch * runs, [height, width])? })
    }
}

impl Case for Asking {
    fn step(&mut self) -> Result<()> {
        self.teacher.logits(&self.images).map(drop)
    }

    fn values(&mut self) -> Result<TensorStore> {
        let logits = self.teacher.logits(&self.images)?;
        let mut store = TensorStore::default();
        store.insert("images", &self.images.shape(), self.images.data().to_vec());
        store.insert("logits", &[self.images.len(), self.teacher.spec().classes], logits);
        Ok(store)
    }
}

/// ONNX Runtime where the command looks for it: `ORT_DYLIB_PATH`, the cache, a Python package.
fn runtime() -> Result<&'static Runtime> {
    let from =
        |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = from("METAZOA_ORT_DIR")
        .or_else(|| from("XDG_CACHE_HOME").map(|folder| folder.join("metazoa")))
        .or_else(|| from("HOME").map(|folder| folder.join(".cache").join("metazoa")))
        .unwrap_or_default();
    Runtime::load(&RuntimeOptions { library: from("ORT_DYLIB_PATH"), ..RuntimeOptions::new(cache) })
}

/// Images of one episode with their labels, class after class.
#[derive(Clone)]
struct Episode {
    way: usize,
    support: Tensor,
    support_labels: Vec<usize>,
    query: Tensor,
    query_labels: Vec<usize>,
}

impl Episode {
    fn new(way: usize, shot: usize, queries: usize, size: usize, dtype: DType) -> Result<Self> {
        let images = uniform_images(way * (shot + queries), [size; 2])?;
        let part = |start: usize, end: usize| -> Result<Tensor> {
            let part = images.range(start, end);
            let shape = part.shape();
            Ok(Tensor::from_vec(part.into_data(), &shape[..], &Device::Cpu)?.to_dtype(dtype)?)
        };
        let labels = |each: usize| -> Vec<usize> { (0..way * each).map(|i| i / each).collect() };
        Ok(Self {
            way,
            support: part(0, way * shot)?,
            support_labels: labels(shot),
            query: part(way * shot, way * (shot + queries))?,
            query_labels: labels(queries),
        })
    }
}

/// A loss of parameters on an episode, and its gradient to them.
trait EpisodeLoss: Clone + Sync {
    fn episode(&self) -> &Episode;

    fn parameters(&self) -> &[Tensor];

    /// The images and the parameters, to be replaced.
    fn tensors(&mut self) -> Vec<&mut Tensor>;

    /// The same in `f64`.
    fn precise(&self) -> Result<Self> {
        let mut twin = self.clone();
        for tensor in twin.tensors() {
            *tensor = tensor.to_dtype(DType::F64)?;
        }
        Ok(twin)
    }

    /// The loss on the queries; `parameters` are leaves of `tape`.
    fn loss(&self, tape: &Tape, parameters: &[Var]) -> Result<Var>;

    /// The loss and its gradient, one tensor a parameter; in the pool, as `meta::train` has it.
    fn gradient(&self) -> Result<(f64, Vec<Tensor>)> {
        rayon::scope(|_| self.gradient_here())
    }

    fn gradient_here(&self) -> Result<(f64, Vec<Tensor>)> {
        let tape = Tape::new();
        let leaves: Vec<Var> = self.parameters().iter().map(|p| tape.leaf(p.clone())).collect();
        let loss = self.loss(&tape, &leaves)?;
        let wrt: Vec<&Var> = leaves.iter().collect();
        let gradients = grad(&loss, &wrt, Order::First)?;
        Ok((loss.scalar()?, gradients.iter().map(|g| g.value().clone()).collect()))
    }
}

impl<T: EpisodeLoss> Case for T {
    fn step(&mut self) -> Result<()> {
        self.gradient().map(drop)
    }

    fn values(&mut self) -> Result<TensorStore> {
        let (loss, gradients) = self.gradient()?;
        let (_, precise) = self.precise()?.gradient()?;
        let mut store = TensorStore::default();
        let mut insert = |name: String, tensor: &Tensor| -> Result<()> {
            let values = tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
            store.insert(name, tensor.dims(), values);
            Ok(())
        };
        insert("support".into(), &self.episode().support)?;
        insert("query".into(), &self.episode().query)?;
        for (index, (parameter, gradient)) in self.parameters().iter().zip(&gradients).enumerate() {
            insert(format!("parameter.{index:02}"), parameter)?;
            insert(format!("gradient.{index:02}"), gradient)?;
            insert(format!("precise.{index:02}"), &precise[index])?;
        }
        store.insert("loss", &[1], vec![loss as f32]);
        Ok(store)
    }
}

/// One episode of ProtoNet: all images normalised together, as `meta::train` has them.
#[derive(Clone)]
struct ProtoNet {
    network: Backbone,
    parameters: Vec<Tensor>,
    episode: Episode,
}

impl ProtoNet {
    fn new(way: usize, shot: usize, size: usize) -> Result<Self> {
        let network = Backbone::conv4(WIDTH, 0)?;
        let parameters = network.parameters().iter().map(|p| p.value.clone()).collect();
        Ok(Self {
            network,
            parameters,
            episode: Episode::new(way, shot, QUERIES, size, DType::F32)?,
        })
    }
}

impl EpisodeLoss for ProtoNet {
    fn episode(&self) -> &Episode {
        &self.episode
    }

    fn parameters(&self) -> &[Tensor] {
        &self.parameters
    }

    fn tensors(&mut self) -> Vec<&mut Tensor> {
        let Episode { support, query, .. } = &mut self.episode;
        [support, query].into_iter().chain(&mut self.parameters).collect()
    }

    fn loss(&self, tape: &Tape, parameters: &[Var]) -> Result<Var> {
        let e = &self.episode;
        let images = tape.constant(Tensor::cat(&[&e.support, &e.query], 0)?);
        let embedding = self.network.forward(parameters, &images, BnMode::Batch)?.embedding;
        let support = embedding.narrow(0, 0, e.support_labels.len())?;
        let query = embedding.narrow(0, e.support_labels.len(), e.query_labels.len())?;
        let means = prototypes(&support, &e.support_labels, e.way)?;
        let logits = prototype_logits(&query, &means)?.scale(logit_factor(embedding.dims()[1]))?;
        logits.cross_entropy(&e.query_labels)
    }
}

/// One task of MAML (Finn et al. 2017): Conv4 with a linear head, normalised by the batch at hand
/// (transductive, methods.md 1.3), all parameters adapted.
#[derive(Clone)]
struct Maml {
    network: Backbone,
    /// Those of the network, then the head's weight `[d, way]` and bias `[1, way]`.
    parameters: Vec<Tensor>,
    episode: Episode,
    rate: f64,
    /// `First` takes the inner gradients for constants: first-order MAML.
    inner: Order,
}

impl Maml {
    fn new(width: usize, seed: u64, episode: Episode, rate: f64) -> Result<Self> {
        let network = Backbone::conv4(width, seed)?;
        let dtype = episode.support.dtype();
        let size = episode.support.dims()[2];
        let (d, way) = (network.embedding_dim(size, size)?, episode.way);
        let mut parameters = Vec::new();
        for parameter in network.parameters() {
            parameters.push(parameter.value.to_dtype(dtype)?);
        }
        let bound = 1.0 / (d as f32).sqrt();
        let mut rng = RngStream::new(seed, "speed", "head", 0);
        for (rows, columns) in [(d, way), (1, way)] {
            let values: Vec<f32> =
                (0..rows * columns).map(|_| rng.uniform_in(-bound, bound)).collect();
            let head = Tensor::from_vec(values, (rows, columns), &Device::Cpu)?;
            parameters.push(head.to_dtype(dtype)?);
        }
        Ok(Self { network, parameters, episode, rate, inner: Order::Higher })
    }

    fn logits(&self, parameters: &[Var], images: &Var) -> Result<Var> {
        let (body, head) = parameters.split_at(parameters.len() - 2);
        let embedding = self.network.forward(body, images, BnMode::Batch)?.embedding;
        embedding.matmul(&head[0])?.add(&head[1])
    }

    /// The loss at `start + by * direction`.
    fn loss_at(&self, start: &[Tensor], direction: &[Tensor], by: f64) -> Result<f64> {
        let tape = Tape::new();
        let mut leaves = Vec::with_capacity(start.len());
        for (parameter, direction) in start.iter().zip(direction) {
            leaves.push(tape.leaf((parameter + direction.affine(by, 0.0)?)?));
        }
        self.loss(&tape, &leaves)?.scalar()
    }
}

impl EpisodeLoss for Maml {
    fn episode(&self) -> &Episode {
        &self.episode
    }

    fn parameters(&self) -> &[Tensor] {
        &self.parameters
    }

    fn tensors(&mut self) -> Vec<&mut Tensor> {
        let Episode { support, query, .. } = &mut self.episode;
        [support, query].into_iter().chain(&mut self.parameters).collect()
    }

    fn loss(&self, tape: &Tape, parameters: &[Var]) -> Result<Var> {
        let support = tape.constant(self.episode.support.clone());
        let query = tape.constant(self.episode.query.clone());
        let mut fast = parameters.to_vec();
        for _ in 0..INNER_STEPS {
            let loss = self.logits(&fast, &support)?.cross_entropy(&self.episode.support_labels)?;
            let wrt: Vec<&Var> = fast.iter().collect();
            let gradients = grad(&loss, &wrt, self.inner)?;
            let mut moved = Vec::with_capacity(fast.len());
            for (parameter, gradient) in fast.iter().zip(&gradients) {
                moved.push(parameter.sub(&gradient.scale(self.rate)?)?);
            }
            fast = moved;
        }
        self.logits(&fast, &query)?.cross_entropy(&self.episode.query_labels)
    }
}

/// Slopes of the MAML loss along random directions in f64: by the tape, by first-order MAML, and by
/// central differences. Where a step takes a ReLU or a maximum to its other side, the inner gradient
/// jumps and the difference says nothing; hence a small network, small steps and the median.
fn check() -> Result<()> {
    const STARTS: u64 = 6;
    const DIRECTIONS: usize = 4;
    const STEP: f64 = 1e-7;
    // A large inner rate, so that the second order weighs.
    const RATE: f64 = 0.2;
    let (mut second, mut first) = (Vec::new(), Vec::new());
    for seed in 0..STARTS {
        let mut maml = Maml::new(4, seed, Episode::new(3, 2, 2, 16, DType::F64)?, RATE)?;
        let (_, by_tape) = maml.gradient()?;
        maml.inner = Order::First;
        let (_, by_first_order) = maml.gradient()?;
        let start = maml.parameters.clone();
        let mut rng = RngStream::new(0, "speed", "check", seed);
        for _ in 0..DIRECTIONS {
            let direction = random_direction(&start, &mut rng)?;
            let (up, down) =
                (maml.loss_at(&start, &direction, STEP)?, maml.loss_at(&start, &direction, -STEP)?);
            let slope = (up - down) / (2.0 * STEP);
            let gap = |gradient: &[Tensor]| -> Result<f64> {
                Ok((dot(gradient, &direction)? - slope).abs() / slope.abs())
            };
            second.push(gap(&by_tape)?);
            first.push(gap(&by_first_order)?);
        }
    }
    let (second, first) = (median(second), median(first));
    println!("off central differences: second order {second:.1e}, first order {first:.1e}");
    if second < 1e-6 && first > 1e-2 {
        return Ok(());
    }
    Err(Error::internal(format!("the gradient of MAML is wrong, off by `{second:e}`")))
}

/// Normal values in the shapes of `like`, in f64.
fn random_direction(like: &[Tensor], rng: &mut RngStream) -> Result<Vec<Tensor>> {
    let mut direction = Vec::with_capacity(like.len());
    for tensor in like {
        let values: Vec<f64> =
            rng.normals(tensor.elem_count()).into_iter().map(f64::from).collect();
        direction.push(Tensor::from_vec(values, tensor.dims(), &Device::Cpu)?);
    }
    Ok(direction)
}

/// The middle value, of the lower half where there are two.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

fn dot(a: &[Tensor], b: &[Tensor]) -> Result<f64> {
    let mut sum = 0.0;
    for (a, b) in a.iter().zip(b) {
        sum += (a * b)?.sum_all()?.to_vec0::<f64>()?;
    }
    Ok(sum)
}

/// MiB of this process before the first inversion step and at the height of three.
fn memory(path: &Path, batch: usize) -> Result<()> {
    let mut inversion = Inversion::new(path, batch)?;
    // Loading took more than it keeps: the peak counts from here (proc(5), clear_refs).
    let clear = Path::new("/proc/self/clear_refs");
    std::fs::write(clear, "5").map_err(|error| Error::io(clear, &error))?;
    let base = resident("VmRSS:")?;
    for _ in 0..3 {
        inversion.step()?;
    }
    println!("{base:.1}\n{:.1}", resident("VmHWM:")?);
    Ok(())
}

/// A figure of `/proc/self/status` in MiB.
fn resident(key: &str) -> Result<f64> {
    let path = Path::new("/proc/self/status");
    let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, &error))?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix(key))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|word| word.parse::<f64>().ok())
        .ok_or_else(|| Error::internal(format!("no figure in {} named `{key}`", path.display())))?;
    Ok(kib / 1024.0)
}

fn number(text: &str) -> Result<usize> {
    text.parse().map_err(|_| Error::usage(format!("not a whole number: `{text}`")))
}

/// The value after `name`, taken out of the arguments.
fn option(arguments: &mut Vec<String>, name: &str) -> Result<Option<String>> {
    let Some(at) = arguments.iter().position(|word| word == name) else { return Ok(None) };
    arguments.remove(at);
    if at == arguments.len() {
        return Err(Error::usage(format!("no value after `{name}`")));
    }
    Ok(Some(arguments.remove(at)))
}

fn main() -> Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let steps = option(&mut arguments, "--steps")?.map_or(Ok(10), |text| number(&text))?;
    let values = option(&mut arguments, "--values")?;
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut case: Box<dyn Case> = match words.as_slice() {
        ["inversion", file, batch] => Box::new(Inversion::new(Path::new(file), number(batch)?)?),
        ["generator", file, batch] => Box::new(Generating::new(Path::new(file), number(batch)?)?),
        ["black-box", file, batch, runs] => {
            Box::new(Asking::new(Path::new(file), number(batch)?, number(runs)?)?)
        }
        ["models", file, batch, count] => {
            let (path, batch) = (Path::new(file), number(batch)?);
            let all: Result<Vec<_>> =
                (0..number(count)?).map(|_| Inversion::new(path, batch)).collect();
            Box::new(Models(all?))
        }
        ["maml", way, shot, size] => {
            let (way, shot, size) = (number(way)?, number(shot)?, number(size)?);
            let episode = Episode::new(way, shot, QUERIES, size, DType::F32)?;
            Box::new(Maml::new(WIDTH, 0, episode, INNER_RATE)?)
        }
        ["protonet", way, shot, size] => {
            Box::new(ProtoNet::new(number(way)?, number(shot)?, number(size)?)?)
        }
        ["memory", file, batch] => return memory(Path::new(file), number(batch)?),
        ["check"] => return check(),
        _ => {
            let hint = "the head of examples/speed.rs lists the cases";
            return Err(Error::usage(format!("no such case: `{}`", words.join(" "))).hint(hint));
        }
    };
    if let Some(path) = values {
        return case.values()?.save(Path::new(&path));
    }
    // Compiles and takes memory.
    case.step()?;
    for _ in 0..steps {
        let begin = Instant::now();
        case.step()?;
        println!("{:.3}", begin.elapsed().as_secs_f64() * 1e3);
    }
    Ok(())
}
