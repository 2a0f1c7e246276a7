//! What the suites share: folders made for one test, the command, the founders' shared files.

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use metazoa::access::library::RuntimeOptions;
use metazoa::access::runtime::Runtime;
use tempfile::TempDir;

/// A folder that is removed after the test.
pub(crate) fn temp_dir() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// The command, in `directory`, with nothing of the caller's environment that changes it.
pub(crate) fn metazoa(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_metazoa"));
    command.current_dir(directory).env("NO_COLOR", "1").env_remove("RUST_LOG");
    let setting = |name: &str| name.starts_with("METAZOA_") && name != "METAZOA_ORT_DIR";
    for (name, _) in std::env::vars().filter(|(name, _)| setting(name)) {
        command.env_remove(name);
    }
    command.env("METAZOA_ORT_DIR", cache_dir());
    command
}

/// What a call left behind.
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs the command with `args` in `directory`.
pub(crate) fn run_in(directory: &Path, args: &[&str]) -> Ran {
    let output = metazoa(directory).args(args).output().unwrap();
    Ran {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// The repository's root.
pub(crate) fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// A path below `../shared`, or `None` (and a loud line) where the founders' files are not here.
pub(crate) fn shared(path: &str) -> Option<PathBuf> {
    let full = repository().join("../shared").join(path);
    if full.exists() {
        return Some(full);
    }
    eprintln!("SKIPPED: ../shared not here (wanted `{path}`)");
    None
}

/// metazoa's cache for the tests: `METAZOA_ORT_DIR`, else where `metazoa setup` puts things.
pub(crate) fn cache_dir() -> PathBuf {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(folder) = from("METAZOA_ORT_DIR") {
        return folder.into();
    }
    let base = from("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| from("HOME").map(|home| Path::new(&home).join(".cache")));
    base.expect("HOME is set").join("metazoa")
}

/// Where ONNX Runtime is looked for: as the command does.
pub(crate) fn runtime_options() -> RuntimeOptions {
    let named = std::env::var_os("ORT_DYLIB_PATH").filter(|value| !value.is_empty());
    RuntimeOptions { library: named.map(PathBuf::from), ..RuntimeOptions::new(cache_dir()) }
}

/// ONNX Runtime, loaded. Fails (never skips) where it is not installed.
pub(crate) fn runtime() -> &'static Runtime {
    match Runtime::load(&runtime_options()) {
        Ok(runtime) => runtime,
        Err(error) => panic!("{error} (hint: {})", error.hint_text().unwrap_or("none")),
    }
}
