//! The programs that are run, the environment they get, and what to do when one is missing.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// `cargo` in the repository root with what every task needs in its environment.
pub(crate) fn cargo() -> Result<Command, String> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()?);
    // `cargo run` describes xtask in these; build scripts of other crates must not see them.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    if let Some(protoc) = protoc()? {
        command.env("PROTOC", protoc);
    }
    // ONNX Runtime >= 1.29 tries to send events unless told not to (ARCHITECTURE.md).
    command.env("ORT_DISABLE_TELEMETRY", "1");
    Ok(command)
}

/// The built command, with the same environment; arguments are those of `metazoa`.
pub(crate) fn metazoa() -> Result<Command, String> {
    let mut command = cargo()?;
    command.args(["run", "--quiet", "--package", "metazoa", "--bin", "metazoa", "--"]);
    Ok(command)
}

/// The repository: the folder above this crate.
pub(crate) fn root() -> Result<PathBuf, String> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = manifest.parent().unwrap_or(manifest);
    if root.join("Cargo.toml").is_file() {
        Ok(root.to_owned())
    } else {
        Err(format!(
            "the repository is no longer at `{}`: run `cargo clean -p xtask`",
            root.display()
        ))
    }
}

/// What PROTOC must be set to: nothing when it is set already or `protoc` is in PATH.
fn protoc() -> Result<Option<PathBuf>, String> {
    if let Some(own) = std::env::var_os("PROTOC") {
        let own = PathBuf::from(own);
        return if own.is_file() || find_in_path(&own.to_string_lossy()).is_some() {
            Ok(None)
        } else {
            Err(format!("PROTOC names no file: `{}`\nhint: unset PROTOC", own.display()))
        };
    }
    if find_in_path("protoc").is_some() {
        return Ok(None);
    }
    protoc_bin_vendored::protoc_bin_path().map(Some).map_err(|error| {
        format!("{error}\nhint: install protobuf-compiler and set PROTOC to its `protoc`")
    })
}

/// The linker that rustc calls; without one a build stops only after minutes.
pub(crate) fn require_linker() -> Result<(), String> {
    if !cfg!(target_os = "linux") || find_in_path("cc").is_some() {
        return Ok(());
    }
    Err("there is no C linker `cc`\nhint: `apt-get install gcc libc6-dev`".to_owned())
}

/// Whether the user names an ONNX Runtime; then none is fetched.
pub(crate) fn has_own_library() -> bool {
    std::env::var_os("ORT_DYLIB_PATH").is_some_and(|path| Path::new(&path).is_file())
}

/// pip, where it will be needed; asked before the long build, not after it.
pub(crate) fn require_pip() -> Result<(), String> {
    let works = Command::new("python3")
        .args(["-m", "pip", "--version"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if works || has_own_library() {
        return Ok(());
    }
    Err("ONNX Runtime is fetched with pip, and `python3 -m pip` does not work\n\
         hint: `apt-get install python3-pip`, or set ORT_DYLIB_PATH to a libonnxruntime.so (1.24 or newer)"
        .to_owned())
}

/// The release of the package `onnx` whose wheel carries the official operator tests (as files; later
/// ones generate them), under the name `tests/it/nodes` looks for.
const NODE_TESTS: &str = "1.22.0";

/// Fetches the operator tests into metazoa's cache, unless they are there.
pub(crate) fn fetch_node_tests() -> Result<(), String> {
    let cache = cache()?;
    let target = cache.join(format!("onnx-{NODE_TESTS}.whl"));
    if target.is_file() {
        return Ok(());
    }
    // Beside the target, so that the last step is a rename.
    let scratch = cache.join("onnx-tests.part");
    let problem = |error: std::io::Error| format!("cannot write `{}`: {error}", scratch.display());
    std::fs::create_dir_all(&scratch).map_err(problem)?;
    let fetched = Command::new("python3")
        .args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"])
        // Naming the platform makes the answer independent of the machine: only data is read.
        .args(["--only-binary=:all:", "--implementation=cp", "--python-version=3.12"])
        .args(["--abi=abi3", "--platform=manylinux_2_28_x86_64", "--dest"])
        .arg(&scratch)
        .arg(format!("onnx=={NODE_TESTS}"))
        .stdin(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    let mut files = std::fs::read_dir(&scratch).map_err(problem)?.filter_map(Result::ok);
    match files.find(|file| file.path().extension().is_some_and(|end| end == "whl")) {
        Some(wheel) if fetched => std::fs::rename(wheel.path(), &target).map_err(problem)?,
        _ => {
            return Err(format!(
                "pip could not download onnx {NODE_TESTS}, which holds the operator tests\n\
                 hint: check the network and `pip config list`, or run `cargo test --workspace`, which skips them"
            ));
        }
    }
    // Nothing but the empty folder is left; that it stays would do no harm.
    let _ = std::fs::remove_dir_all(&scratch);
    Ok(())
}

/// Where metazoa keeps what it fetches.
fn cache() -> Result<PathBuf, String> {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let base = from("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| from("HOME").map(|home| Path::new(&home).join(".cache")));
    match (from("METAZOA_ORT_DIR"), base) {
        (Some(folder), _) => Ok(folder.into()),
        (None, Some(base)) => Ok(base.join("metazoa")),
        (None, None) => Err("HOME is not set\nhint: set METAZOA_ORT_DIR".to_owned()),
    }
}

/// The first file called `name` in PATH.
fn find_in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let name = format!("{name}{}", std::env::consts::EXE_SUFFIX);
    std::env::split_paths(&path).map(|folder| folder.join(&name)).find(|file| file.is_file())
}
