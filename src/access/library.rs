//! Finding a libonnxruntime that fits, without loading it for good.
//!
//! Order: the path the caller gives (`--ort-lib`, `ORT_DYLIB_PATH`), the cache that `metazoa setup`
//! fills, an installed Python package (asked where it lies, never imported). Each candidate is probed for
//! its version first, because ONNX Runtime's own loader panics on a missing or old library. The floor is
//! 1.24 (the API we bind); below 1.30 untrusted files are known to crash or mislead it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Error, Result};

/// The version `metazoa setup` fetches.
pub const PINNED_VERSION: &str = "1.31.1";

/// Oldest usable minor version of ONNX Runtime 1.x.
pub const FLOOR: u32 = 24;

/// Oldest minor version that no file of our hostile collection crashed.
pub const SAFE: u32 = 30;

/// File name of [`PINNED_VERSION`] on this platform.
pub const LIBRARY_NAME: &str = if cfg!(target_os = "macos") {
    "libonnxruntime.1.31.1.dylib"
} else {
    "libonnxruntime.so.1.31.1"
};

/// What to do when no library fits.
const HINT: &str =
    "run `metazoa setup` once, or name a libonnxruntime (1.24 or newer) with `--ort-lib`";

/// Where to look for ONNX Runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeOptions {
    /// The library the user named; then nothing else is tried.
    pub library: Option<PathBuf>,
    /// metazoa's cache, filled by `metazoa setup`.
    pub cache_dir: PathBuf,
    /// The Python interpreter asked for an installed `onnxruntime`; `None` asks none.
    pub python: Option<PathBuf>,
}

impl RuntimeOptions {
    /// The usual order with nothing named: the cache, then `python3`.
    pub fn new(cache_dir: impl Into<PathBuf>) -> Self {
        Self { library: None, cache_dir: cache_dir.into(), python: Some("python3".into()) }
    }
}

/// How a library was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Named by the user.
    Named,
    /// In metazoa's cache.
    Cache,
    /// In an installed Python package.
    Python,
}

/// A libonnxruntime of a usable version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Library {
    /// The file.
    pub path: PathBuf,
    /// `1.31.1` where the file name tells, else `1.31`.
    pub version: String,
    /// The minor version, 31 of 1.31.1.
    pub minor: u32,
    /// How it was found.
    pub origin: Origin,
}

impl Library {
    /// What the user should know of this version, if anything.
    pub fn warning(&self) -> Option<String> {
        (self.minor < SAFE).then(|| {
            format!(
                "ONNX Runtime {} can be crashed by a malicious model; `metazoa setup` fetches {PINNED_VERSION}",
                self.version
            )
        })
    }
}

/// Where `metazoa setup` puts the library.
pub fn cached_library(cache_dir: &Path) -> PathBuf {
    cache_dir.join(format!("onnxruntime-{PINNED_VERSION}")).join(LIBRARY_NAME)
}

/// The `site-packages` folder that `metazoa setup --cuda MAJOR` fills.
pub fn cached_cuda_site(cache_dir: &Path, major: u32) -> PathBuf {
    cache_dir.join(format!("onnxruntime-cuda{major}"))
}

/// The first library that fits.
///
/// # Errors
/// When the named library does not fit, or none is found; the hint names `metazoa setup`.
pub fn find(options: &RuntimeOptions) -> Result<Library> {
    super::runtime::disable_telemetry();
    if let Some(path) = &options.library {
        return probe(path, Origin::Named).map_err(|error| error.hint(HINT));
    }
    let mut tried = Vec::new();
    let cached =
        cached_candidates(&options.cache_dir).into_iter().map(|path| (path, Origin::Cache));
    let python = || options.python.iter().filter_map(|python| in_python_package(python));
    for (path, origin) in
        cached.chain(std::iter::once_with(python).flatten().map(|path| (path, Origin::Python)))
    {
        match probe(&path, origin) {
            Ok(library) => return Ok(library),
            Err(error) => tried.push(error.to_string()),
        }
    }
    if tried.is_empty() {
        tried.push(format!("nothing in `{}`", options.cache_dir.display()));
        if let Some(python) = &options.python {
            tried.push(format!("no package `onnxruntime` in `{}`", python.display()));
        }
    }
    Err(Error::internal(format!("ONNX Runtime was not found: {}", tried.join("; "))).hint(HINT))
}

/// Checks that `path` is an ONNX Runtime of a usable version.
fn probe(path: &Path, origin: Origin) -> Result<Library> {
    let at = |message: String| Error::internal(message);
    let real = path.canonicalize().map_err(|error| {
        at(format!("no ONNX Runtime library ({error}) at `{}`", path.display()))
    })?;
    let Some(minor) = ort::util::probe(&real) else {
        return Err(at(format!(
            "not an ONNX Runtime library{} `{}`",
            reason(&real),
            real.display()
        )));
    };
    let version = version_in_name(&real)
        .filter(|version| version.starts_with(&format!("1.{minor}.")))
        .unwrap_or_else(|| format!("1.{minor}"));
    if minor < FLOOR {
        return Err(at(format!(
            "ONNX Runtime {version} is too old (1.{FLOOR} or newer is needed) `{}`",
            real.display()
        )));
    }
    Ok(Library { path: real, version, minor, origin })
}

/// Why the dynamic loader refuses the file. Only called on a file that does not load.
fn reason(path: &Path) -> String {
    match ort::init_from(path) {
        Err(ort::LoadDynamicError::Dlopen { error, .. }) => {
            let text = format!("{error:?}");
            let text = text.split('"').nth(1).unwrap_or(&text).to_owned();
            format!(" ({})", text.lines().next().unwrap_or_default())
        }
        Err(ort::LoadDynamicError::MissingApi { .. }) => " (no `OrtGetApiBase`)".into(),
        Err(error) => format!(" ({error})"),
        Ok(_) => String::new(),
    }
}

/// `1.31.1` of `libonnxruntime.so.1.31.1` or `libonnxruntime.1.31.1.dylib`.
fn version_in_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let version: String = name
        .strip_prefix("libonnxruntime")?
        .chars()
        .skip_while(|c| !c.is_ascii_digit())
        .take_while(|c| c.is_ascii_digit() || *c == '.')
        .collect();
    let version = version.trim_end_matches('.');
    (version.split('.').count() == 3).then(|| version.to_owned())
}

/// Libraries that `metazoa setup` may have left, the pinned one first.
fn cached_candidates(cache_dir: &Path) -> Vec<PathBuf> {
    let mut candidates = vec![cached_library(cache_dir)];
    for major in [13, 12] {
        candidates
            .extend(libraries_in(&cached_cuda_site(cache_dir, major).join("onnxruntime/capi")));
    }
    candidates.retain(|path| path.is_file());
    candidates
}

/// Files in `folder` that look like the C library, newest name first.
fn libraries_in(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.starts_with("libonnxruntime.")
                && (name.contains(".so") || name.ends_with(".dylib"))
        })
        .collect();
    found.sort();
    found.reverse();
    found
}

/// The C library of the `onnxruntime` package that `python` would import, if it has one.
///
/// The current folder is taken off the search path: a folder named `onnxruntime` there is not a package
/// the user installed.
fn in_python_package(python: &Path) -> Option<PathBuf> {
    const ASK: &str = "import importlib.util, sys; \
        sys.path = [p for p in sys.path if p not in ('', '.')]; \
        s = importlib.util.find_spec('onnxruntime'); \
        print('\\n'.join(s.submodule_search_locations) if s and s.submodule_search_locations else '')";
    let output = Command::new(python)
        .args(["-c", ASK])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.lines()
        .filter(|line| !line.is_empty())
        .find_map(|folder| libraries_in(&Path::new(folder).join("capi")).into_iter().next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_version_from_the_file_name() {
        let version = |name| version_in_name(Path::new(name));
        assert_eq!(version("/a/libonnxruntime.so.1.31.1").as_deref(), Some("1.31.1"));
        assert_eq!(version("libonnxruntime.1.26.0.dylib").as_deref(), Some("1.26.0"));
        assert_eq!(version("libonnxruntime.so.1"), None);
        assert_eq!(version("other.so.1.2.3"), None);
    }

    #[test]
    fn an_empty_cache_is_one_error_that_names_setup() {
        let folder = tempfile::tempdir().unwrap();
        let options = RuntimeOptions { python: None, ..RuntimeOptions::new(folder.path()) };
        let error = find(&options).unwrap_err();
        assert!(error.to_string().contains("was not found"), "{error}");
        assert!(error.hint_text().unwrap().contains("metazoa setup"));
    }

    #[test]
    fn a_named_file_that_is_no_library_is_refused_with_the_loaders_reason() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libonnxruntime.so.1.31.1");
        let options =
            RuntimeOptions { library: Some(path.clone()), ..RuntimeOptions::new(folder.path()) };
        let error = find(&options).unwrap_err();
        assert!(error.to_string().contains("no ONNX Runtime library"), "{error}");
        std::fs::write(&path, "not a library").unwrap();
        let error = find(&options).unwrap_err();
        assert!(error.to_string().contains("not an ONNX Runtime library ("), "{error}");
        assert!(error.hint_text().unwrap().contains("metazoa setup"));
    }
}
