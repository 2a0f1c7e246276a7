//! The child's side of a probe: load the model, run it on made-up images, say what was seen.
//!
//! Runs under the limits of [`super::probe`]. The images differ strongly in contrast, so that a model
//! whose samples share a quantisation range betrays itself.

use std::io::BufRead;

use super::super::library::RuntimeOptions;
use super::super::runtime::Runtime;
use super::super::session::{Port, Session, Tensor, Values};
use super::fork::{Ended, in_fork};
use super::{Answer, Job, ProbeInput, ProbeReport, ProbeRequest, ProbedPort, died, late};
use crate::error::{Error, Result};
use crate::tensor::RngStream;
use crate::zoo::{BatchDimension, OutputKind};

/// Side of an image whose size the model leaves free.
const FREE_SIDE: usize = 32;

/// Most values in a test batch of three images.
const VALUE_LIMIT: usize = 1 << 26;

/// Change of an answer with its company, relative to the largest answer, above which a model counts as
/// batch-dependent. Float and statically quantised models stay below 1e-5 (38 of `zoo_edge`: 2e-7 at most),
/// dynamically quantised ones are at 1e-2.
const BATCH_TOLERANCE: f64 = 1e-3;

/// The answer to one request, both as JSON, worked out in this process and without limits; the caller prints it.
///
/// # Errors
/// When `request` is not one of ours. A refused model is an answer, not an error.
pub fn answer(request: &str) -> Result<String> {
    let request: ProbeRequest = serde_json::from_str(request)
        .map_err(|error| Error::usage(format!("not a probe request: `{error}`")))?;
    Answer::of(examine(&request)).to_json()
}

/// Answers the jobs of a [`Prober`](super::Prober), a line each, until there are no more: each in a fork of its own, under
/// its limits. `answer` prints a line. The process must have one thread.
///
/// # Errors
/// When a line is no job, or cannot be read or answered.
pub fn serve(jobs: impl BufRead, mut answer: impl FnMut(&str) -> Result<()>) -> Result<()> {
    for line in jobs.lines() {
        let line = line.map_err(|error| Error::internal(format!("no job to read: {error}")))?;
        let job: Job = serde_json::from_str(&line)
            .map_err(|error| Error::usage(format!("not a probe's job: `{error}`")))?;
        answer(&try_in_fork(&job)?)?;
    }
    Ok(())
}

/// The answer to `job`, on one line.
fn try_in_fork(job: &Job) -> Result<String> {
    // Here and not in the fork: the next one has it too.
    if let Err(error) = load(&job.request) {
        return Answer::of(Err(error)).to_json();
    }
    let work = || answer_or_nothing(&job.request);
    let error = match in_fork(&job.limits, work) {
        Ok(Ended::Exited(status, bytes)) if status.success() && !bytes.is_empty() => {
            return String::from_utf8(bytes)
                .map_err(|_| Error::internal("an answer that is no text"));
        }
        Ok(Ended::Exited(status, _)) => died(status, &job.limits),
        Ok(Ended::Late) => late(&job.limits),
        Err(error) => error,
    };
    Answer::of(Err(error)).to_json()
}

fn answer_or_nothing(request: &ProbeRequest) -> String {
    Answer::of(examine(request)).to_json().unwrap_or_default()
}

fn load(request: &ProbeRequest) -> Result<&'static Runtime> {
    let library = Some(request.library.clone());
    Runtime::load(&RuntimeOptions { library, python: None, ..RuntimeOptions::new("") })
}

/// Loads and runs the model in this process.
fn examine(request: &ProbeRequest) -> Result<ProbeReport> {
    let mut session = load(request)?.open(&request.model)?;
    let input = Input::choose(&session, request.input.as_ref())?;
    let runs = test_runs(&mut session, &input)?;
    let outputs = session.outputs().iter().enumerate();
    let outputs: Vec<ProbedPort> =
        outputs.map(|(index, port)| runs.describe(port, index)).collect();
    if outputs.iter().all(|port| port.values_per_image.is_none()) {
        return Err(Error::input("no output has one row an image"));
    }
    let inputs = session.inputs().iter().map(|port| plain(port.clone())).collect();
    Ok(ProbeReport {
        opset: session.opset(),
        inputs,
        outputs,
        batch: runs.batch,
        batch_dependent: runs.difference > BATCH_TOLERANCE,
        batch_difference: runs.difference,
        repeatable: runs.repeatable,
    })
}

/// How the test images are shaped.
struct Input {
    name: String,
    element: String,
    image_shape: Vec<usize>,
    range: [f32; 2],
    declared_batch: Option<usize>,
}

impl Input {
    fn choose(session: &Session, known: Option<&ProbeInput>) -> Result<Self> {
        let [port] = session.inputs() else {
            let names: Vec<&str> = session.inputs().iter().map(|port| port.name.as_str()).collect();
            return Err(Error::input(format!(
                "an image classifier needs exactly one input, this model has {}: `{}`",
                names.len(),
                names.join("`, `")
            )));
        };
        if known.is_some_and(|known| known.name != port.name) {
            return Err(Error::input(format!("the model's input is named `{}`", port.name)));
        }
        if session.outputs().is_empty() {
            return Err(Error::input("the model has `0` outputs"));
        }
        let image_shape = match known {
            Some(known) => known.image_shape.clone(),
            None => guess_image_shape(&port.dims)?,
        };
        let range = match (known, port.element.as_str()) {
            (Some(known), _) if known.range[0] < known.range[1] => known.range,
            (_, "u8") => [0.0, 255.0],
            _ => [0.0, 1.0],
        };
        let declared_batch = port.dims.first().copied().flatten();
        let batch = declared_batch.unwrap_or(1);
        let values = image_shape.iter().try_fold(batch, |all, &dim| all.checked_mul(dim));
        if values.is_none_or(|values| values > VALUE_LIMIT / 3) {
            return Err(Error::input(format!(
                "an input of {batch} images of shape {image_shape:?} exceeds the limit of `{}` values",
                VALUE_LIMIT / 3
            )));
        }
        Ok(Self {
            name: port.name.clone(),
            element: port.element.clone(),
            image_shape,
            range,
            declared_batch,
        })
    }

    /// `n` images: a faint one, a strong one, an all-bright one, again.
    fn images(&self, order: &[usize]) -> Result<Tensor> {
        let stride: usize = self.image_shape.iter().product();
        let [low, high] = self.range;
        // Where 0 lies between `low` and `high`: a faint image there, a strong one anywhere.
        let zero = (-low / (high - low)).clamp(0.0, 1.0);
        let mut values = Vec::with_capacity(stride * order.len());
        for &which in order {
            let mut rng = RngStream::new(0, "probe", "", which as u64);
            let (level, contrast) = [(zero - 0.01, 0.02), (0.0, 1.0), (0.9, 0.2)][which % 3];
            values.extend(
                (0..stride).map(|_| {
                    low + (high - low) * (level + contrast * rng.uniform()).clamp(0.0, 1.0)
                }),
            );
        }
        let shape = std::iter::once(order.len()).chain(self.image_shape.iter().copied()).collect();
        let values = match self.element.as_str() {
            "f32" => Values::F32(values),
            "f16" => Values::F16(values.into_iter().map(half::f16::from_f32).collect()),
            "f64" => Values::F64(values.into_iter().map(f64::from).collect()),
            "u8" => Values::U8(values.into_iter().map(|value| value.round() as u8).collect()),
            other => return Err(Error::input(format!("the input takes no images but `{other}`"))),
        };
        Ok(Tensor { shape, values })
    }
}

/// Shape of one image from the declared sizes of the input.
fn guess_image_shape(dims: &[Option<usize>]) -> Result<Vec<usize>> {
    let channels = |dim: Option<usize>| matches!(dim, Some(1 | 3));
    match *dims {
        [] => Ok(vec![3, FREE_SIDE, FREE_SIDE]),
        [_, c, h, w] => {
            let last = channels(w) && !channels(c);
            let or = |dim: Option<usize>, free| dim.unwrap_or(free);
            Ok(if last {
                vec![or(c, FREE_SIDE), or(h, FREE_SIDE), or(w, 3)]
            } else {
                vec![or(c, 3), or(h, FREE_SIDE), or(w, FREE_SIDE)]
            })
        }
        [_, flat] => Ok(vec![flat.unwrap_or(3 * FREE_SIDE * FREE_SIDE)]),
        _ => Err(Error::input(format!("an image input has 4 axes, this one `{}`", dims.len()))),
    }
}

/// What the test runs gave.
struct Runs {
    batch: BatchDimension,
    /// Images in `outputs`.
    n: usize,
    outputs: Vec<Tensor>,
    difference: f64,
    repeatable: bool,
}

fn test_runs(session: &mut Session, input: &Input) -> Result<Runs> {
    let mut run = |order: &[usize]| -> Result<Vec<Tensor>> {
        let names: Vec<String> = session.outputs().iter().map(|port| port.name.clone()).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        session.run(vec![(&input.name, input.images(order)?)], &names)
    };
    match input.declared_batch {
        Some(n) if n > 0 => {
            let company: Vec<usize> = (0..n).collect();
            let first = run(&company)?;
            let alone = run(&vec![0; n])?;
            let repeatable = same_bits(&run(&company)?, &first);
            let difference = largest_change(&first, n, &alone, n);
            Ok(Runs { batch: BatchDimension::Fixed(n), n, outputs: first, difference, repeatable })
        }
        _ => {
            let alone = run(&[0])?;
            let repeatable = same_bits(&run(&[0])?, &alone);
            match run(&[0, 1, 2]) {
                Ok(first) => {
                    let difference = largest_change(&first, 3, &alone, 1);
                    Ok(Runs {
                        batch: BatchDimension::Free,
                        n: 3,
                        outputs: first,
                        difference,
                        repeatable,
                    })
                }
                // Declared free, but a constant inside is made for one image.
                Err(_) => Ok(Runs {
                    batch: BatchDimension::Fixed(1),
                    n: 1,
                    outputs: alone,
                    difference: 0.0,
                    repeatable,
                }),
            }
        }
    }
}

impl Runs {
    fn describe(&self, port: &Port, index: usize) -> ProbedPort {
        let Some(tensor) = self.outputs.get(index) else { return plain(port.clone()) };
        let values = tensor.values.to_f32();
        let divides = tensor.shape.first() == Some(&self.n) && !values.is_empty();
        let values_per_image = divides.then(|| values.len() / self.n);
        let looks_like = values_per_image.and_then(|width| kind_of(tensor, &values, width));
        let finite = values.iter().all(|value| value.is_finite());
        ProbedPort { values_per_image, finite, looks_like, ..plain(port.clone()) }
    }
}

fn plain(port: Port) -> ProbedPort {
    let Port { name, element, dims } = port;
    ProbedPort { name, element, dims, values_per_image: None, finite: true, looks_like: None }
}

/// What rows of `width` values are, by their sums.
fn kind_of(tensor: &Tensor, values: &[f32], width: usize) -> Option<OutputKind> {
    if matches!(tensor.values, Values::I32(_) | Values::I64(_)) {
        return (width == 1).then_some(OutputKind::Labels);
    }
    let sums_to_one = |map: fn(f64) -> f64| {
        values.chunks_exact(width).all(|row| {
            let total: f64 = row.iter().map(|&value| map(f64::from(value))).sum();
            (total - 1.0).abs() < 5e-3
        })
    };
    if width < 2 || values.iter().any(|value| !value.is_finite()) {
        None
    } else if values.iter().all(|value| (0.0..=1.0).contains(value)) && sums_to_one(|value| value) {
        Some(OutputKind::Probabilities)
    } else if values.iter().all(|&value| value <= 0.0) && sums_to_one(f64::exp) {
        Some(OutputKind::LogProbabilities)
    } else {
        Some(OutputKind::Logits)
    }
}

fn same_bits(a: &[Tensor], b: &[Tensor]) -> bool {
    a.iter().zip(b).all(|(a, b)| {
        let (a, b) = (a.values.to_f32(), b.values.to_f32());
        a.len() == b.len() && a.iter().zip(b.iter()).all(|(a, b)| a.to_bits() == b.to_bits())
    })
}

/// Largest change of the first image's answers between runs of `n` and `m` images, relative to its largest
/// answer in the first run.
fn largest_change(first: &[Tensor], n: usize, second: &[Tensor], m: usize) -> f64 {
    let mut worst = 0.0f64;
    for (a, b) in first.iter().zip(second) {
        let (a, b) = (a.values.to_f32(), b.values.to_f32());
        if a.len() % n != 0 || b.len() % m != 0 || a.len() / n != b.len() / m {
            continue;
        }
        let width = a.len() / n;
        let scale = a[..width].iter().fold(0.0f32, |all, value| all.max(value.abs()));
        let change =
            a[..width].iter().zip(&b[..width]).fold(0.0f32, |all, (a, b)| all.max((a - b).abs()));
        if scale > 0.0 {
            worst = worst.max(f64::from(change) / f64::from(scale));
        }
    }
    worst
}
