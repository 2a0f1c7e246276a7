//! `metazoa doctor`: what was found on this machine, and how to get what is missing.
//!
//! Looks without changing anything: ONNX Runtime is found and probed, not started.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use schemars::JsonSchema;
use serde::Serialize;

use crate::access::library::{self, Origin, RuntimeOptions, cached_cuda_site};

/// Memory below which a run on a usual zoo gets tight.
const TIGHT_MIB: u64 = 2048;

/// How well a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// There, and fit.
    Ok,
    /// There, but the user should know something; or an optional thing is missing.
    Note,
    /// Missing, and something will not work.
    Missing,
}

/// One thing looked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Finding {
    /// What was looked for.
    pub name: String,
    /// How it is.
    pub health: Health,
    /// What was found.
    pub found: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// All findings, in a fixed order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Diagnosis {
    /// What was looked for.
    pub findings: Vec<Finding>,
    /// Everything that is needed to run is there.
    pub ready: bool,
}

/// Where to look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DoctorOptions {
    /// Where ONNX Runtime is looked for.
    pub runtime: RuntimeOptions,
    /// The `protoc` that a build would use.
    pub protoc: PathBuf,
}

/// Looks at the machine.
pub fn diagnose(options: &DoctorOptions) -> Diagnosis {
    let findings = vec![
        onnx_runtime(&options.runtime),
        cuda(&options.runtime.cache_dir),
        cores(),
        memory(),
        protoc(&options.protoc),
    ];
    let ready = findings.iter().all(|finding| finding.health != Health::Missing);
    Diagnosis { findings, ready }
}

fn finding(name: &str, health: Health, found: impl Into<String>, hint: Option<&str>) -> Finding {
    Finding {
        name: name.to_owned(),
        health,
        found: found.into(),
        hint: hint.map(ToOwned::to_owned),
    }
}

fn onnx_runtime(options: &RuntimeOptions) -> Finding {
    const NAME: &str = "ONNX Runtime";
    match library::find(options) {
        Ok(library) => {
            let origin = match library.origin {
                Origin::Named => "named by you",
                Origin::Cache => "metazoa's cache",
                Origin::Python => "installed Python package",
            };
            let found = format!("{} ({origin}) `{}`", library.version, library.path.display());
            let warning = library.warning();
            let health = if warning.is_some() { Health::Note } else { Health::Ok };
            finding(NAME, health, found, warning.as_deref())
        }
        Err(error) => finding(NAME, Health::Missing, error.to_string(), error.hint_text()),
    }
}

fn cuda(cache_dir: &Path) -> Finding {
    const NAME: &str = "CUDA";
    let built = cfg!(feature = "cuda");
    let site = [13, 12].into_iter().find(|&major| cached_cuda_site(cache_dir, major).is_dir());
    let runtime = site.map_or_else(String::new, |major| {
        format!(", ONNX Runtime for CUDA {major} in metazoa's cache")
    });
    let driver = Command::new("nvidia-smi")
        .args(["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()
        .filter(|output| output.status.success())
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().replace('\n', "; "))
        .filter(|text| !text.is_empty());
    match (driver, built) {
        (Some(gpu), true) => finding(NAME, Health::Ok, gpu + &runtime, None),
        (Some(gpu), false) => finding(
            NAME,
            Health::Note,
            format!("{gpu}{runtime}; this metazoa was built without CUDA"),
            Some("build with `--features cuda` to compute on it"),
        ),
        (None, _) => finding(NAME, Health::Note, format!("no GPU driver{runtime}"), None),
    }
}

fn cores() -> Finding {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    finding("Processor", Health::Ok, format!("{cores} cores"), None)
}

fn memory() -> Finding {
    const NAME: &str = "Memory";
    let Some([total, free]) = memory_mib() else {
        return finding(NAME, Health::Note, "unknown on this system", None);
    };
    let found = format!("{free} of {total} MiB available");
    if free < TIGHT_MIB {
        finding(NAME, Health::Note, found, Some("close other programs, or lower `--jobs`"))
    } else {
        finding(NAME, Health::Ok, found, None)
    }
}

/// Total and available memory in MiB (Linux).
fn memory_mib() -> Option<[u64; 2]> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim_start_matches(':').split_whitespace().next()?.parse::<u64>().ok()? / 1024)
    };
    Some([field("MemTotal")?, field("MemAvailable")?])
}

/// Needed to build metazoa only; `cargo xtask` brings its own.
fn protoc(program: &Path) -> Finding {
    const NAME: &str = "protoc (to build metazoa)";
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output().ok();
    match output.filter(|output| output.status.success()) {
        Some(output) => {
            let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            finding(NAME, Health::Ok, version, None)
        }
        None => finding(
            NAME,
            Health::Note,
            format!("`{}` does not run", program.display()),
            Some(
                "only a build needs it: `apt-get install protobuf-compiler`, or build with `cargo xtask`",
            ),
        ),
    }
}
