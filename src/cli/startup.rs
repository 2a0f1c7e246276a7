//! What must happen to the process before any verb runs: allocator, telemetry, threads, signals,
//! logging.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::MultiProgress;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use super::printer::Printer;
use super::progress::Bars;
use super::settings::{Decoration, Settings, Talk};
use crate::access::library;
#[cfg(not(feature = "cuda"))]
use crate::access::runtime::Runtime;
use crate::app::context::Secrets;
use crate::app::ingest::ProbeOptions;
use crate::app::train::{Start, TrainOptions};
use crate::app::{Context, RunConfig};
use crate::error::{Error, Result};
use crate::tensor::Device;

/// First thing in `main`, while there is one thread.
pub(crate) fn prepare_process() {
    // ONNX Runtime >= 1.29 records events and tries to send them; it reads this when it is loaded,
    // and children inherit it (findings-ort.md).
    #[allow(unsafe_code)]
    // SAFETY: no other thread exists yet, so nothing reads the environment meanwhile.
    unsafe {
        std::env::set_var("ORT_DISABLE_TELEMETRY", "1");
    }
    keep_freed_memory();
}

/// Tells glibc to keep freed memory: training frees and takes the same large buffers at every
/// step, and giving them back to the kernel made page faults a third of the time
/// (findings-candle.md 5).
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn keep_freed_memory() {
    const GIB: libc::c_int = 1 << 30;
    const TOP_PAD: libc::c_int = 64 << 20;
    #[allow(unsafe_code)]
    // SAFETY: mallopt only stores numbers; a value it refuses leaves the default.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, GIB);
        libc::mallopt(libc::M_TRIM_THRESHOLD, GIB);
        libc::mallopt(libc::M_TOP_PAD, TOP_PAD);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn keep_freed_memory() {}

/// Sizes rayon's global pool.
///
/// # Errors
/// When threads cannot be started.
pub(crate) fn start_threads(settings: &Settings) -> Result<()> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(settings.jobs)
        .build_global()
        .map_err(|error| Error::internal(format!("cannot start worker threads: `{error}`")))
}

/// The flag that SIGINT and SIGTERM set. A second signal ends the process at once.
///
/// # Errors
/// When the handler cannot be installed.
fn watch_signals() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&flag);
    ctrlc::set_handler(move || {
        if seen.swap(true, Ordering::Relaxed) {
            #[allow(unsafe_code)]
            // SAFETY: never returns. Not `exit`: destructors of loaded libraries must not run
            // while worker threads still use them.
            unsafe {
                libc::_exit(130);
            }
        }
        let text = "interrupted: finishing the step (again to stop at once)";
        let _ = writeln!(std::io::stderr().lock(), "{text}");
    })
    .map_err(|error| Error::internal(format!("cannot watch for signals: `{error}`")))?;
    Ok(flag)
}

/// The surroundings of a use-case: bars, signals, seed, device. For verbs that work long; the
/// others leave signals as they are.
///
/// # Errors
/// When a GPU is asked for, or the signal handler cannot be installed.
pub(crate) fn context(settings: &Settings, printer: &Printer) -> Result<Context> {
    if let Some(device @ Device::Cuda(..)) = settings.device {
        return Err(Error::unsupported(format!(
            "this version computes on the processor only, not on `{device}`"
        ))
        .hint("leave out `--device`"));
    }
    any_context(settings, printer)
}

/// As [`context`], for verbs that ask black-box models: ONNX Runtime can ask them on a GPU.
///
/// # Errors
/// When a GPU is asked for and there is none (without the feature `cuda`: when ONNX Runtime has none), or the signal
/// handler cannot be installed.
pub(crate) fn asking_context(settings: &Settings, printer: &Printer) -> Result<Context> {
    #[cfg(feature = "cuda")]
    if let Some(Device::Cuda(index, products)) = settings.device {
        // White-box models are computed there; black-box ones too where ONNX Runtime can.
        crate::tensor::cuda::driver::Card::open(index, products)?;
    }
    #[cfg(not(feature = "cuda"))]
    if let Some(device @ Device::Cuda(..)) = settings.device {
        Runtime::load(&settings.runtime_options())?.check_device(device)?;
    }
    any_context(settings, printer)
}

fn any_context(settings: &Settings, printer: &Printer) -> Result<Context> {
    Ok(Context {
        progress: Arc::new(Bars::new(printer, settings.talk)),
        interrupt: watch_signals()?,
        seed: settings.seed.unwrap_or(0),
        device: settings.device.unwrap_or_default(),
        ort_library: settings.ort_library.clone(),
        cache_dir: settings.cache_dir.clone(),
        secrets: Secrets::new(|name| std::env::var(name).ok()),
    })
}

/// How `ingest` tries models out in a child of this program; `None` without ONNX Runtime.
pub(crate) fn probe_options(context: &Context) -> Option<ProbeOptions> {
    let library = library::find(&context.runtime_options()).ok()?;
    Some(ProbeOptions { executable: std::env::current_exe().ok()?, library: library.path })
}

/// What `train` and `run` hand to the training use-case.
pub(crate) fn train_options(
    context: &Context,
    config: RunConfig,
    out: &Path,
    start: Start,
) -> TrainOptions {
    TrainOptions {
        config,
        out: out.to_path_buf(),
        start,
        command: std::env::args().collect(),
        runtime: context.runtime_options(),
        probe: probe_options(context),
    }
}

/// Sends log lines to stderr with -v; `RUST_LOG` refines.
pub(crate) fn start_logging(settings: &Settings, printer: &Printer) {
    let level = match settings.talk {
        Talk::Quiet => "off",
        Talk::Normal => "metazoa=warn",
        Talk::Verbose => "metazoa=info",
        Talk::Debug => "debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let writer = AboveBars { bars: printer.bars().clone() };
    // Only fails when a subscriber is set already, as an embedding program may have done.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(settings.color == Decoration::On)
        .with_target(false)
        .without_time()
        .with_writer(writer)
        .try_init();
}

/// Writes log lines above the progress bars.
#[derive(Clone)]
struct AboveBars {
    bars: MultiProgress,
}

impl Write for AboveBars {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.bars.suspend(|| std::io::stderr().lock().write_all(bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for AboveBars {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}
