//! What every use-case is given beside its own options.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::progress::{Progress, Silent};
use crate::access::library::RuntimeOptions;
use crate::access::remote::Authorization;
use crate::access::runtime::Runtime;
use crate::error::{Error, Result, ResultExt as _};
use crate::tensor::Device;
use crate::zoo::sidecar::Endpoint;

/// Values of environment variables that sidecars name (tokens), looked up when they are needed and kept nowhere.
#[derive(Clone)]
pub struct Secrets(Arc<Lookup>);

type Lookup = dyn Fn(&str) -> Option<String> + Send + Sync;

impl Secrets {
    /// Looked up by `find`.
    pub fn new(find: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(find))
    }

    /// The header that `endpoint` asks for, if it does.
    ///
    /// # Errors
    /// When the variable it names is not set, or holds no token.
    pub fn authorization(&self, endpoint: &Endpoint) -> Result<Option<Authorization>> {
        let Some(name) = &endpoint.header_env else { return Ok(None) };
        let value = (self.0)(name).ok_or_else(|| {
            Error::input(format!("the environment variable of the token is not set: `{name}`"))
                .hint(format!("export {name}=\"Bearer TOKEN\", or remove `endpoint.header_env`"))
        })?;
        Authorization::new(&value)
            .map(Some)
            .context(|| format!("environment variable `{name}` of `endpoint.header_env`"))
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secrets(..)")
    }
}

/// The surroundings of a use-case. Work is spread over rayon's current pool, whose size never
/// changes a result.
#[derive(Clone)]
pub struct Context {
    /// Where progress goes.
    pub progress: Arc<dyn Progress>,
    /// Set by SIGINT or SIGTERM: finish the step, write a checkpoint, stop.
    pub interrupt: Arc<AtomicBool>,
    /// The seed of all randomness.
    pub seed: u64,
    /// Where to compute.
    pub device: Device,
    /// The ONNX Runtime library the user named, if any.
    pub ort_library: Option<PathBuf>,
    /// metazoa's cache, where `setup` puts ONNX Runtime.
    pub cache_dir: PathBuf,
    /// Tokens that sidecars name.
    pub secrets: Secrets,
}

impl Context {
    /// A context without progress display, on the processor.
    pub fn silent(seed: u64) -> Self {
        Self {
            progress: Arc::new(Silent),
            interrupt: Arc::new(AtomicBool::new(false)),
            seed,
            device: Device::Cpu,
            ort_library: None,
            cache_dir: PathBuf::new(),
            secrets: Secrets::new(|_| None),
        }
    }

    /// Where ONNX Runtime is looked for.
    pub fn runtime_options(&self) -> RuntimeOptions {
        RuntimeOptions { library: self.ort_library.clone(), ..RuntimeOptions::new(&self.cache_dir) }
    }

    /// ONNX Runtime, loaded at the first call.
    ///
    /// # Errors
    /// When no fit library is found; the hint names `metazoa setup`.
    pub fn runtime(&self) -> Result<&'static Runtime> {
        Runtime::load(&self.runtime_options())
    }

    /// Whether the user asked to stop.
    pub fn is_interrupted(&self) -> bool {
        self.interrupt.load(Ordering::Relaxed)
    }

    /// Stops work that has nothing to save.
    ///
    /// # Errors
    /// [`Error::interrupted`] once the user asked to stop.
    pub fn check_interrupt(&self) -> Result<()> {
        if self.is_interrupted() { Err(Error::interrupted()) } else { Ok(()) }
    }
}
