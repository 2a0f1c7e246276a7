//! What the global flags and the environment add up to.

use std::io::IsTerminal;
use std::path::PathBuf;

use super::args::GlobalArgs;
use crate::access::library::RuntimeOptions;
use crate::tensor::Device;

/// How much is said on stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Talk {
    /// Only errors.
    Quiet,
    /// Notes and progress.
    Normal,
    /// What happens inside.
    Verbose,
    /// Everything.
    Debug,
}

/// How results are printed on stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// Tables for people.
    Human,
    /// One JSON object.
    Json,
}

/// Whether a decoration (bars, colour) may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decoration {
    /// Yes: stderr is a terminal and nothing forbids it.
    On,
    /// No.
    Off,
}

/// The global settings of one call.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) format: Format,
    pub(crate) talk: Talk,
    pub(crate) bars: Decoration,
    pub(crate) color: Decoration,
    pub(crate) seed: Option<u64>,
    pub(crate) jobs: usize,
    pub(crate) device: Option<Device>,
    pub(crate) ort_library: Option<PathBuf>,
    pub(crate) cache_dir: PathBuf,
}

impl Settings {
    /// Flags (clap has already put the environment below them) to settings. Destructured whole, so
    /// that a new flag does not compile until it is handled.
    pub(crate) fn resolve(args: GlobalArgs) -> Self {
        let GlobalArgs { json, seed, jobs, device, ort_lib, quiet, verbose, no_progress } = args;
        let talk = match (quiet, verbose) {
            (true, _) => Talk::Quiet,
            (false, 0) => Talk::Normal,
            (false, 1) => Talk::Verbose,
            (false, _) => Talk::Debug,
        };
        let terminal = std::io::stderr().is_terminal();
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let decoration = |on| if on { Decoration::On } else { Decoration::Off };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            format: if json { Format::Json } else { Format::Human },
            talk,
            bars: decoration(terminal && !no_progress && talk != Talk::Quiet),
            color: decoration(terminal && !no_color),
            seed,
            jobs: jobs.map_or(cores, usize::from),
            device,
            ort_library: ort_lib.filter(|path| !path.as_os_str().is_empty()),
            cache_dir: cache_dir(),
        }
    }

    /// Where ONNX Runtime is looked for.
    pub(crate) fn runtime_options(&self) -> RuntimeOptions {
        RuntimeOptions { library: self.ort_library.clone(), ..RuntimeOptions::new(&self.cache_dir) }
    }
}

/// metazoa's cache: `METAZOA_ORT_DIR`, else `$XDG_CACHE_HOME/metazoa`, else `~/.cache/metazoa`.
fn cache_dir() -> PathBuf {
    let folder = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    folder("METAZOA_ORT_DIR").unwrap_or_else(|| {
        folder("XDG_CACHE_HOME")
            .or_else(|| folder("HOME").map(|home| home.join(".cache")))
            .unwrap_or_else(std::env::temp_dir)
            .join("metazoa")
    })
}
