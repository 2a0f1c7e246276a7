//! What the suites share: folders made for one test, the command, the founders' shared files.

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use tempfile::TempDir;

/// A folder that is removed after the test.
pub(crate) fn temp_dir() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// The command, in `directory`, with nothing of the caller's environment that changes it.
pub(crate) fn metazoa(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_metazoa"));
    command.current_dir(directory).env("NO_COLOR", "1").env_remove("RUST_LOG");
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("METAZOA_")) {
        command.env_remove(name);
    }
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
