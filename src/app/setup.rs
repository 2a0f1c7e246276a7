//! `metazoa setup`: ONNX Runtime into metazoa's cache, through the user's own pip index.
//!
//! The PyPI wheel of `onnxruntime` holds the plain C library; `pip download` fetches it with the user's
//! pip configuration (mirrors, proxies, certificates), the one library file is taken out, checked against
//! a pinned SHA-256 and put in place by rename, so an interrupted setup leaves nothing half-written. For
//! CUDA, `pip install --target` brings the GPU build with the CUDA libraries it needs (2.5 GB), all but
//! the driver.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use schemars::JsonSchema;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::access::library::{
    self, LIBRARY_NAME, PINNED_VERSION, RuntimeOptions, cached_cuda_site, cached_library,
};
use crate::error::{Error, Result, ResultExt};

/// Which ONNX Runtime is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cuda {
    /// The CPU build.
    None,
    /// The build for CUDA 13.
    V13,
    /// The build for CUDA 12 (ONNX Runtime 1.26, the last on PyPI).
    V12,
}

/// Where things are put and who fetches them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetupOptions {
    /// metazoa's cache.
    pub cache_dir: PathBuf,
    /// Which build.
    pub cuda: Cuda,
    /// The Python interpreter that has pip.
    pub python: PathBuf,
}

/// What setup did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct SetupResult {
    /// The library.
    pub library: PathBuf,
    /// Its version.
    pub version: String,
    /// It was there already; nothing was fetched.
    pub already_there: bool,
}

/// The CPU wheel's platform tag for pip and the SHA-256 of the library inside, for this machine.
fn pinned() -> Result<(&'static str, &'static str)> {
    match (std::env::consts::OS, std::env::consts::ARCH) {
        ("linux", "x86_64") => Ok((
            "manylinux_2_28_x86_64",
            "fc44112fbe06d7d689c57e11d3862031f64711007e4ee020f8eed5185fd2c1d3",
        )),
        ("linux", "aarch64") => Ok((
            "manylinux_2_28_aarch64",
            "8aa3b76b28c778a2b1dd660d34161adb1d508c9ccd04ff9dc80e26eca5df8467",
        )),
        ("macos", "aarch64") => Ok((
            "macosx_14_0_arm64",
            "d586cbe89effc085a09d3341b3cfbd5c322517f9d397aeb20814af21433f2b36",
        )),
        (os, arch) => Err(Error::unsupported(format!(
            "no ONNX Runtime {PINNED_VERSION} wheel is known for `{os} {arch}`"
        ))
        .hint("install ONNX Runtime 1.24 or newer yourself and name its library with `--ort-lib`")),
    }
}

/// Fetches ONNX Runtime unless it is there already.
///
/// # Errors
/// When pip is missing or fails, the wheel does not hold the expected library, or the cache cannot be
/// written.
pub fn setup(options: &SetupOptions) -> Result<SetupResult> {
    std::fs::create_dir_all(&options.cache_dir)
        .map_err(|error| Error::io(&options.cache_dir, &error))?;
    match options.cuda {
        Cuda::None => setup_cpu(options),
        Cuda::V13 => setup_cuda(options, 13, PINNED_VERSION),
        Cuda::V12 => setup_cuda(options, 12, "1.26.0"),
    }
}

fn setup_cpu(options: &SetupOptions) -> Result<SetupResult> {
    let (platform, sha) = pinned()?;
    let target = cached_library(&options.cache_dir);
    let done = |already_there| SetupResult {
        library: target.clone(),
        version: PINNED_VERSION.to_owned(),
        already_there,
    };
    if target.is_file() && sha_of(&target)? == sha {
        return Ok(done(true));
    }
    let scratch = scratch(&options.cache_dir)?;
    let requirement = format!("onnxruntime=={PINNED_VERSION}");
    // Naming the platform makes the answer independent of the local Python's version.
    pip(
        &options.python,
        &[
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--implementation=cp",
            "--python-version=3.12",
            &format!("--platform={platform}"),
            "--dest",
            &scratch.path().display().to_string(),
            &requirement,
        ],
    )?;
    let wheel = first_wheel(scratch.path())?;
    let bytes = library_in_wheel(&wheel)?;
    let found = hex(&Sha256::digest(&bytes));
    if found != sha {
        return Err(Error::internal(format!(
            "the library in the wheel is not the known one: SHA-256 should be {sha}, is `{found}`"
        ))
        .hint("check the pip index that you use; metazoa pins this file"));
    }
    put(&target, &bytes)?;
    Ok(done(false))
}

fn setup_cuda(options: &SetupOptions, major: u32, version: &str) -> Result<SetupResult> {
    let site = cached_cuda_site(&options.cache_dir, major);
    let library = site.join("onnxruntime/capi").join(format!("libonnxruntime.so.{version}"));
    let done = |already_there| SetupResult {
        library: library.clone(),
        version: version.to_owned(),
        already_there,
    };
    if library.is_file() {
        return Ok(done(true));
    }
    if std::env::consts::OS != "linux" {
        return Err(Error::unsupported(format!(
            "CUDA builds of ONNX Runtime are fetched on Linux only, not on `{}`",
            std::env::consts::OS
        )));
    }
    let scratch = scratch(&options.cache_dir)?;
    let folder = scratch.path().join("site");
    let requirement = format!("onnxruntime-gpu[cuda,cudnn]=={version}");
    pip(
        &options.python,
        &[
            "install",
            "--only-binary=:all:",
            "--target",
            &folder.display().to_string(),
            &requirement,
        ],
    )?;
    if !folder.join("onnxruntime/capi").join(format!("libonnxruntime.so.{version}")).is_file() {
        return Err(Error::internal(format!("pip installed no `libonnxruntime.so.{version}`")));
    }
    std::fs::rename(&folder, &site).map_err(|error| Error::io(&site, &error))?;
    Ok(done(false))
}

/// A folder in the cache that vanishes when setup ends, however it ends.
fn scratch(cache_dir: &Path) -> Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix("setup-")
        .tempdir_in(cache_dir)
        .map_err(|error| Error::io(cache_dir, &error))
}

/// Runs pip, silently; its last words are the error.
fn pip(python: &Path, arguments: &[&str]) -> Result<()> {
    let output = Command::new(python)
        .args(["-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| {
            Error::internal(format!("cannot run `{}`: {error}", python.display()))
                .hint("install Python 3 with pip (Debian: `apt-get install python3-pip`)")
        })?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    let last = words.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("no message").trim();
    let hint = if words.contains("No module named pip") {
        "install pip (Debian: `apt-get install python3-pip`)"
    } else {
        "check the network and pip's index (`pip config list`), or name a library with `--ort-lib`"
    };
    Err(Error::internal(format!("pip failed: `{last}`")).hint(hint))
}

fn first_wheel(folder: &Path) -> Result<PathBuf> {
    let entries = std::fs::read_dir(folder).map_err(|error| Error::io(folder, &error))?;
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .ok_or_else(|| Error::internal(format!("pip left no wheel in `{}`", folder.display())))
}

/// The bytes of the C library in a wheel (a zip archive).
fn library_in_wheel(wheel: &Path) -> Result<Vec<u8>> {
    /// Ten times the library's size: more is not what we expect.
    const LIMIT: u64 = 300 << 20;
    let broken = |error: String| {
        Error::internal(format!("cannot read the wheel: {error}"))
            .context(format!("`{}`", wheel.display()))
    };
    let file = File::open(wheel).map_err(|error| Error::io(wheel, &error))?;
    let mut archive = zip::ZipArchive::new(file).map_err(|error| broken(error.to_string()))?;
    let entry = archive
        .by_name(&format!("onnxruntime/capi/{LIBRARY_NAME}"))
        .map_err(|error| broken(error.to_string()))?;
    let mut bytes = Vec::new();
    entry.take(LIMIT).read_to_end(&mut bytes).map_err(|error| broken(error.to_string()))?;
    Ok(bytes)
}

/// Writes `bytes` to `target` by way of a temporary file beside it.
fn put(target: &Path, bytes: &[u8]) -> Result<()> {
    let folder = target.parent().unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(target).map_err(|error| error.error)?;
        Ok(())
    };
    write().map_err(|error| Error::io(target, &error))
}

fn sha_of(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|error| Error::io(path, &error))?;
    Ok(hex(&Sha256::digest(&bytes)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Checks that what setup left can be loaded.
///
/// # Errors
/// When it is not an ONNX Runtime of a usable version.
pub fn verify(result: &SetupResult) -> Result<()> {
    let options = RuntimeOptions {
        library: Some(result.library.clone()),
        python: None,
        ..RuntimeOptions::new("")
    };
    library::find(&options).map(|_| ()).context(|| "after setup".to_owned())
}
