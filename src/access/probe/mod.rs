//! First contact with a model file, in a child process that may die.
//!
//! ONNX Runtime hangs for ever on a file of 1.8 kB, aborts on others, and takes gigabytes for a third
//! kind; nothing but a process border holds that (findings-ort.md, section 6). This program again (hidden verb
//! `probe-model`) loads the library once and tries each file in a [`fork`] of itself, under limits of memory,
//! processor time, wall time, file size and core. Whatever happens there becomes a report or one [`Error`] that
//! says why the model is rejected, and the next file finds a process that has seen none. [`child`] is that
//! program's side, [`Prober`] ours.

pub mod child;
mod fork;
mod prober;

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::zoo::{BatchDimension, OutputKind};

pub use prober::Prober;

/// Name of the hidden verb that answers a probe.
pub const VERB: &str = "probe-model";

/// Most bytes of an answer.
const ANSWER_LIMIT: usize = 4 << 20;

/// What a fork may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeLimits {
    /// Address space.
    pub memory_bytes: u64,
    /// Processor time.
    pub cpu_s: u64,
    /// Time on the clock.
    pub wall_s: u64,
}

impl ProbeLimits {
    /// Limits that a well-behaved model of `bytes` (with its external data) stays far below: loading
    /// takes up to four times its size (weights, a parsed and a packed copy).
    pub fn for_size(bytes: u64) -> Self {
        let hundreds_of_mib = bytes.div_ceil(100 << 20);
        Self {
            memory_bytes: (2 << 30) + bytes.saturating_mul(6),
            cpu_s: 20 + 5 * hundreds_of_mib,
            wall_s: 20 + 10 * hundreds_of_mib,
        }
    }
}

/// What is probed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeRequest {
    /// The model file.
    pub model: PathBuf,
    /// The ONNX Runtime library to load.
    pub library: PathBuf,
    /// What is known of the image input; guessed from the file otherwise.
    pub input: Option<ProbeInput>,
}

/// The image input of a probe's test runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeInput {
    /// Its name.
    pub name: String,
    /// Shape of one image in the model's own axis order, without the batch axis.
    pub image_shape: Vec<usize>,
    /// Smallest and largest value fed (after normalisation).
    pub range: [f32; 2],
}

/// What a model showed of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeReport {
    /// Version of the standard operator set.
    pub opset: Option<u32>,
    /// Inputs that must be given.
    pub inputs: Vec<ProbedPort>,
    /// Outputs, with what the test runs showed.
    pub outputs: Vec<ProbedPort>,
    /// The batch axis as it really behaves: declared free but failing at 3 images counts as fixed to 1.
    pub batch: BatchDimension,
    /// An image's answer depends on the others in its batch (dynamic quantisation).
    pub batch_dependent: bool,
    /// Largest change of an image's answer with its company, relative to its largest answer.
    pub batch_difference: f64,
    /// The same input gives the same bits twice.
    pub repeatable: bool,
}

/// An input or output of a probed model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbedPort {
    /// Its name.
    pub name: String,
    /// Element type in ONNX Runtime's words.
    pub element: String,
    /// Declared sizes, `None` where free.
    pub dims: Vec<Option<usize>>,
    /// Outputs: values for one image in the test run; `None` when it does not divide by image.
    pub values_per_image: Option<usize>,
    /// Outputs: every value of the test runs was finite.
    pub finite: bool,
    /// Outputs: what the values look like; a guess from numbers, the sidecar or the graph know better.
    pub looks_like: Option<OutputKind>,
}

/// What the child is asked, a line of JSON on its stdin.
#[derive(Debug, Serialize, Deserialize)]
struct Job {
    request: ProbeRequest,
    limits: ProbeLimits,
}

/// The child's answer, a line of JSON on its stdout.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Report(ProbeReport),
    /// The model's fault.
    Refused {
        message: String,
        hint: Option<String>,
    },
    /// Not the model's fault: ONNX Runtime cannot be loaded.
    Failed {
        message: String,
        hint: Option<String>,
    },
}

/// Checks from the outside, before anything reads the file: a regular, non-empty file whose real path
/// lies inside `root`. The real path.
///
/// # Errors
/// When one of these does not hold; the message says which.
pub fn prefilter(model: &Path, root: &Path) -> Result<PathBuf> {
    let real = model.canonicalize().map_err(|error| Error::io(model, &error))?;
    let root = root.canonicalize().map_err(|error| Error::io(root, &error))?;
    if !real.starts_with(&root) {
        return Err(Error::input(format!("the file lies outside the zoo `{}`", real.display()))
            .hint("copy the file into the zoo instead of linking it"));
    }
    let facts = real.metadata().map_err(|error| Error::io(model, &error))?;
    if !facts.is_file() {
        return Err(Error::input(format!("not a regular file `{}`", model.display())));
    }
    if facts.len() == 0 {
        return Err(Error::input(format!("the file is empty `{}`", model.display())));
    }
    Ok(real)
}

/// Loads and runs `request.model` in a child of `executable` (this program) under `limits`; for one model. For
/// more, a [`Prober`] costs less.
///
/// # Errors
/// As [`Prober::probe`].
pub fn probe(
    executable: &Path,
    request: &ProbeRequest,
    limits: &ProbeLimits,
) -> Result<ProbeReport> {
    Prober::new(executable, &request.library).probe(&request.model, request.input.clone(), limits)
}

impl Answer {
    fn of(result: Result<ProbeReport>) -> Self {
        let error = match result {
            Ok(report) => return Self::Report(report),
            Err(error) => error,
        };
        let message = error.to_string();
        let hint = error.hint_text().map(ToOwned::to_owned);
        match error.kind() {
            ErrorKind::Internal => Self::Failed { message, hint },
            _ => Self::Refused { message, hint },
        }
    }

    fn into_result(self) -> Result<ProbeReport> {
        let (error, hint) = match self {
            Self::Report(report) => return Ok(report),
            Self::Refused { message, hint } => (Error::input(message), hint),
            Self::Failed { message, hint } => (Error::internal(message), hint),
        };
        Err(hint.into_iter().fold(error, Error::hint))
    }

    fn to_json(&self) -> Result<String> {
        serde_json::to_string(self)
            .map_err(|error| Error::internal(format!("cannot write the answer: `{error}`")))
    }
}

/// Why a child ended without an answer.
fn died(status: ExitStatus, limits: &ProbeLimits) -> Error {
    match status.signal() {
        Some(libc::SIGXCPU | libc::SIGKILL) => Error::input(format!(
            "loading and running the model took more than `{} s` of processor time",
            limits.cpu_s
        )),
        Some(signal) => {
            Error::input(format!("ONNX Runtime crashed on the model with signal `{signal}`"))
        }
        None => Error::internal(format!(
            "the probe's child ended without an answer, exit code `{}`",
            status.code().unwrap_or(-1)
        )),
    }
}

/// Why there is no answer within the time on the clock.
fn late(limits: &ProbeLimits) -> Error {
    Error::input(format!("loading and running the model did not end within `{} s`", limits.wall_s))
}
