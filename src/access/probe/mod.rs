//! First contact with a model file, in a child process that may die.
//!
//! ONNX Runtime hangs for ever on a file of 1.8 kB, aborts on others, and takes gigabytes for a third
//! kind; nothing but a process border holds that (findings-ort.md, section 6). The child is this program
//! again (hidden verb `probe-model`) under limits of memory, processor time, file size and core; the
//! parent waits by the wall clock. Whatever happens to the child becomes a report or one [`Error`] that
//! says why the model is rejected. [`child`] is the child's side.

pub mod child;

use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::zoo::{BatchDimension, OutputKind};

/// Name of the hidden verb that answers a probe.
pub const VERB: &str = "probe-model";

/// Most bytes read of the child's answer.
const ANSWER_LIMIT: u64 = 4 << 20;

/// What the child may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

/// The child's answer on its stdout, as JSON.
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

/// Loads and runs `request.model` in a child of `executable` (this program) under `limits`.
///
/// # Errors
/// [`crate::ErrorKind::Input`] with the reason when the model is refused, crashes the child, hangs it or
/// exhausts it; [`crate::ErrorKind::Internal`] when the child cannot be started.
pub fn probe(
    executable: &Path,
    request: &ProbeRequest,
    limits: &ProbeLimits,
) -> Result<ProbeReport> {
    let text = serde_json::to_string(request)
        .map_err(|error| Error::internal(format!("cannot write the probe request: `{error}`")))?;
    let mut command = Command::new(executable);
    command
        .args(["--jobs", "1", VERB, &text])
        .env("ORT_DISABLE_TELEMETRY", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    limit_child(&mut command, *limits);
    let started = Instant::now();
    let wall = Duration::from_secs(limits.wall_s);
    let mut child = command.spawn().map_err(|error| {
        Error::internal(format!("cannot start `{}`: {error}", executable.display()))
    })?;
    let Some(stdout) = child.stdout.take() else {
        return Err(Error::internal("the probe's child has no `stdout`"));
    };
    // A thread reads, so that neither side waits on a full pipe; it ends when the child does.
    let (sender, answer) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stdout.take(ANSWER_LIMIT).read_to_end(&mut bytes);
        let _ = sender.send(bytes);
    });
    let bytes = answer.recv_timeout(wall).ok();
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) if bytes.is_some() => break Some(status),
            Ok(None) if bytes.is_some() && started.elapsed() < wall => {
                std::thread::sleep(Duration::from_millis(1));
            }
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                break None;
            }
        }
    };
    let Some((status, bytes)) = status.zip(bytes) else {
        return Err(Error::input(format!(
            "loading and running the model did not end within `{} s`",
            limits.wall_s
        )));
    };
    match serde_json::from_slice(&bytes) {
        Ok(Answer::Report(report)) if status.success() => Ok(report),
        Ok(Answer::Refused { message, hint }) if status.success() => {
            Err(hint.into_iter().fold(Error::input(message), Error::hint))
        }
        Ok(Answer::Failed { message, hint }) if status.success() => {
            Err(hint.into_iter().fold(Error::internal(message), Error::hint))
        }
        _ => Err(died(status, limits)),
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

/// Applies `limits` to the child before it becomes the program.
fn limit_child(command: &mut Command, limits: ProbeLimits) {
    let values = [
        (libc::RLIMIT_AS, limits.memory_bytes, limits.memory_bytes),
        // The soft limit sends SIGXCPU, the hard one kills a second later.
        (libc::RLIMIT_CPU, limits.cpu_s, limits.cpu_s + 1),
        (libc::RLIMIT_CORE, 0, 0),
        (libc::RLIMIT_FSIZE, 0, 0),
    ];
    let apply = move || {
        for (resource, soft, hard) in values {
            let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
            // SAFETY: `limit` is a valid rlimit for the duration of the call.
            #[allow(unsafe_code)]
            if unsafe { libc::setrlimit(resource, &raw const limit) } != 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; `apply` calls setrlimit on
    // values copied beforehand and allocates nothing.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(apply);
    }
}
