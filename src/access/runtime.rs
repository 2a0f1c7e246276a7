//! ONNX Runtime, loaded once for the process.
//!
//! ONNX Runtime allows one environment a process, so [`Runtime::load`] keeps it for good. It is loaded by
//! explicit path only (the other ways panic), after [`library::find`](super::library::find) has probed
//! it, and with its telemetry switched off before: since 1.29 it records model file names and error texts
//! and tries to send them unless the process carries `ORT_DISABLE_TELEMETRY=1`.

use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use ort::environment::Environment;
use ort::logging::LogLevel;

use super::library::{self, Library, RuntimeOptions};
use super::session::{self, Session};
use crate::error::{Error, Result};
use crate::tensor::Device;

/// The loaded library and its environment.
#[derive(Debug)]
pub struct Runtime {
    environment: Environment,
    library: Library,
}

static RUNTIME: OnceLock<Runtime> = OnceLock::new();
static LOADING: Mutex<()> = Mutex::new(());

impl Runtime {
    /// Finds and loads ONNX Runtime, or returns the one this process has already loaded.
    ///
    /// # Errors
    /// When no fit library is found, it cannot be loaded, or another one than `options.library` names is
    /// loaded already.
    pub fn load(options: &RuntimeOptions) -> Result<&'static Self> {
        let _guard = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(runtime) = RUNTIME.get() {
            return runtime.fits(options).map(|()| runtime);
        }
        disable_telemetry();
        let library = library::find(options)?;
        let environment = ort::init_from(&library.path)
            .map_err(|error| Error::internal(format!("cannot load ONNX Runtime `{error}`")))?
            .with_name("metazoa")
            .with_telemetry(false)
            .build()
            .map_err(|error| Error::internal(format!("cannot start ONNX Runtime `{error}`")))?;
        // What goes wrong comes back as an error; the library itself shall not write to stderr.
        environment.set_log_level(LogLevel::Fatal);
        Ok(RUNTIME.get_or_init(|| Self { environment, library }))
    }

    /// The library in use.
    pub fn library(&self) -> &Library {
        &self.library
    }

    /// Opens a model for inference on one CPU thread.
    ///
    /// The file must have passed a [`probe`](super::probe) if it is not our own: a malicious one can hang
    /// or kill the process here.
    ///
    /// # Errors
    /// When ONNX Runtime refuses the file.
    pub fn open(&'static self, model: &Path) -> Result<Session> {
        self.open_on(model, Device::Cpu)
    }

    /// As [`Runtime::open`], on `device`.
    ///
    /// # Errors
    /// As [`Runtime::open`]; when `device` is a GPU and the library cannot reach it.
    pub fn open_on(&'static self, model: &Path, device: Device) -> Result<Session> {
        session::open(&self.environment, model, device)
    }

    /// Whether models can be opened on `device`.
    ///
    /// # Errors
    /// One line that says what is missing for a GPU.
    pub fn check_device(&self, device: Device) -> Result<()> {
        let Device::Cuda(..) = device else { return Ok(()) };
        if session::has_cuda() {
            return Ok(());
        }
        Err(Error::unsupported(format!(
            "`--device {device}` is asked for, and this ONNX Runtime has no CUDA: `{}`",
            self.library.path.display()
        ))
        .hint(
            "run `metazoa setup --cuda 13` (or 12), or leave out `--device` to use the processor",
        ))
    }

    fn fits(&self, options: &RuntimeOptions) -> Result<()> {
        match &options.library {
            Some(path)
                if path.canonicalize().ok().as_deref() != Some(self.library.path.as_path()) =>
            {
                Err(Error::internal(format!(
                    "ONNX Runtime is already loaded from `{}`",
                    self.library.path.display()
                )))
            }
            _ => Ok(()),
        }
    }
}

/// Switches ONNX Runtime's telemetry off for this process and its children.
///
/// `cli` calls it first thing in `main`, while there is one thread; later calls then change nothing.
pub fn disable_telemetry() {
    const NAME: &str = "ORT_DISABLE_TELEMETRY";
    if std::env::var_os(NAME).is_some_and(|value| value == "1") {
        return;
    }
    // SAFETY: `set_var` races only with C code that reads the environment without Rust's lock. No foreign
    // library that does so is loaded yet when `main` calls this; other callers (tests, library users)
    // reach it before their first ONNX Runtime call, the only C code of this crate.
    #[allow(unsafe_code)]
    unsafe {
        std::env::set_var(NAME, "1");
    }
}
