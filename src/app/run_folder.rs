//! The folder of one run: everything needed to use, repeat or resume it.
//!
//! ```text
//! RUN/config.yaml      the settings, resolved; `--config` takes it back
//! RUN/run.json         versions, seed, zoo hashes, how it ended
//! RUN/events.jsonl     one line a step
//! RUN/start.safetensors  the network before training, where it is not drawn by the seed (`meta.backbone: FILE.onnx`,
//!                      `meta.start: mean-of-teachers` or `distilled`; with both RUN/backbone.safetensors is the file's)
//! RUN/pretrain/        what models answer to drawings, and the distillation of it
//! RUN/ckpt/            step-N.safetensors, and `latest` naming the newest
//! RUN/bank/            recovered images
//! RUN/queries/         queries spent on each model, written before they are sent
//! RUN/eval/            one result and its episodes per evaluation
//! RUN/report.html
//! ```
//! Invariant: the folder appears with its first two files or not at all, and a folder that is not a
//! run is never written into.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::config::RunConfig;
use super::files::{temporary_beside, write_atomically};
use super::queries::ModelOutcome;
use crate::error::{Error, Result, ResultExt};
use crate::report::{Event, EventLog, read_events};
use crate::zoo::{Access, Rejection};

/// Checkpoints kept; older ones are removed once a newer is safe.
const CHECKPOINTS_KEPT: usize = 3;

/// What a run was made from and how it ended: `run.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RunRecord {
    /// Versions of the program and of the libraries that decide numbers.
    pub versions: BTreeMap<String, String>,
    /// The seed of all randomness.
    pub seed: u64,
    /// The command line that made the run.
    pub command: Vec<String>,
    /// The models used.
    pub models: Vec<UsedModel>,
    /// The models of the zoo that could not be used.
    #[serde(default)]
    pub rejected: Vec<Rejection>,
    /// How the recovery of each model ended, in the order of their ids.
    #[serde(default)]
    pub outcomes: Vec<ModelOutcome>,
    /// Queries allowed by model id, where they are limited.
    #[serde(default)]
    pub query_limits: BTreeMap<String, u64>,
    /// Why training ended (`done`, `early-stop`, `interrupted`, ...); absent while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<String>,
    /// Seconds spent, by stage; `meta-inner`, `meta-outer`, `meta-inversion`, `meta-hardening` and `meta-validation` are
    /// parts of `meta`.
    #[serde(default)]
    pub seconds: BTreeMap<String, f64>,
    /// Meta-updates in those seconds.
    #[serde(default)]
    pub meta_updates: u64,
}

/// A model of the zoo as a run used it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct UsedModel {
    /// Its path below the zoo, without extension.
    pub id: String,
    /// SHA-256 of its file.
    pub sha: String,
    /// How it was reached.
    pub access: Access,
    /// Number of classes.
    pub classes: usize,
    /// Normalisation nodes with statistics.
    pub norm_taps: usize,
    /// Images recovered from it.
    #[serde(default)]
    pub images: usize,
    /// Queries spent on it.
    #[serde(default)]
    pub queries: u64,
    /// Share of its recovered images it classifies as intended, in 0..1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agreement: Option<f64>,
}

/// A run folder on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// Makes the folder with its settings and record. An empty folder may already be there.
    ///
    /// # Errors
    /// When `path` holds anything, or cannot be made.
    pub fn create(path: &Path, config: &RunConfig, record: &RunRecord) -> Result<Self> {
        refuse_occupied(path)?;
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let failed =
            |error: std::io::Error| Error::io(path, &error).context("cannot make the run folder");
        std::fs::create_dir_all(parent).map_err(failed)?;
        let temporary = temporary_beside(path);
        std::fs::create_dir(&temporary).map_err(failed)?;
        let made = (|| {
            for folder in ["ckpt", "bank", "eval"] {
                std::fs::create_dir(temporary.join(folder)).map_err(failed)?;
            }
            write_atomically(&temporary.join("config.yaml"), config.to_yaml()?.as_bytes())?;
            write_atomically(&temporary.join("run.json"), &to_json(record)?)?;
            std::fs::rename(&temporary, path).map_err(failed)
        })();
        if let Err(error) = made {
            // The first failure is the one to tell.
            let _ = std::fs::remove_dir_all(&temporary);
            return Err(error);
        }
        Ok(Self { path: path.into() })
    }

    /// Opens an existing run.
    ///
    /// # Errors
    /// When `path` is not a run folder.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Err(Error::input(format!("no run folder `{}`", path.display()))
                .hint("`metazoa train` or `metazoa run` makes one"));
        }
        if !is_run(path) {
            return Err(Error::input(format!("not a run folder: `{}`", path.display()))
                .hint("a run folder holds `run.json` and `config.yaml`, made by `metazoa train`"));
        }
        Ok(Self { path: path.into() })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where recovered images go.
    pub fn bank(&self) -> PathBuf {
        self.path.join("bank")
    }

    /// Where the counts of queries are.
    pub fn queries(&self) -> PathBuf {
        self.path.join("queries")
    }

    /// The meta-model that training starts from, where it is not drawn by the seed.
    pub fn start(&self) -> PathBuf {
        self.path.join("start.safetensors")
    }

    /// What becomes that start by distillation, where it comes from a file of the user's.
    pub fn undistilled(&self) -> PathBuf {
        self.path.join("backbone.safetensors")
    }

    /// The settings it was made with.
    ///
    /// # Errors
    /// When `config.yaml` was damaged.
    pub fn config(&self) -> Result<RunConfig> {
        RunConfig::read(&self.path.join("config.yaml"))
    }

    /// Its record.
    ///
    /// # Errors
    /// When `run.json` was damaged.
    pub fn record(&self) -> Result<RunRecord> {
        let path = self.path.join("run.json");
        let bytes = std::fs::read(&path).map_err(|error| Error::io(&path, &error))?;
        serde_json::from_slice(&bytes)
            .map_err(|error| Error::input(format!("not a run record: `{error}`")))
            .context(|| format!("`{}`", path.display()))
    }

    /// Replaces its record.
    ///
    /// # Errors
    /// When the disk refuses it.
    pub fn save_record(&self, record: &RunRecord) -> Result<()> {
        self.write("run.json", &to_json(record)?)
    }

    /// Writes a file of the run, whole or not at all; `name` may have `/`-separated folders.
    ///
    /// # Errors
    /// When the disk refuses it.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path.join(name);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|error| Error::io(parent, &error))?;
        }
        write_atomically(&path, bytes)
    }

    /// The event log, opened for appending.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn event_log(&self) -> Result<EventLog> {
        EventLog::append(&self.path.join("events.jsonl"))
    }

    /// The events so far; none when nothing was logged yet.
    ///
    /// # Errors
    /// When the log is damaged.
    pub fn events(&self) -> Result<Vec<Event>> {
        let path = self.path.join("events.jsonl");
        if path.exists() { read_events(&path) } else { Ok(Vec::new()) }
    }

    /// Saves a checkpoint by `save` (given the file's path; the file must appear whole or not at
    /// all), points `ckpt/latest` to it and drops the oldest ones.
    ///
    /// # Errors
    /// When the disk refuses it; the previous checkpoint is then still the latest.
    pub fn save_checkpoint(
        &self,
        step: u64,
        save: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let name = format!("step-{step}.safetensors");
        save(&self.path.join("ckpt").join(&name))?;
        self.write("ckpt/latest", name.as_bytes())?;
        let mut steps = self.checkpoint_steps();
        steps.retain(|&other| other != step);
        while steps.len() >= CHECKPOINTS_KEPT {
            let oldest = steps.remove(0);
            // A leftover only costs space.
            let _ = std::fs::remove_file(self.checkpoint_path(oldest));
        }
        Ok(self.path.join("ckpt").join(name))
    }

    /// Images of method `free`, as the newest checkpoint has them.
    pub fn memory(&self) -> PathBuf {
        self.path.join("memory")
    }

    /// What distillation before meta-training needs, where there is one.
    pub fn pretrain(&self) -> PathBuf {
        self.path.join("pretrain")
    }

    /// The meta-generator, where the run has one.
    pub fn generator(&self) -> PathBuf {
        self.path.join("generator.safetensors")
    }

    /// Moving images of method `purer`, as the newest checkpoint has them.
    pub fn pixels(&self) -> PathBuf {
        self.path.join("pixels")
    }

    /// The newest checkpoint.
    ///
    /// # Errors
    /// When there is none, or the file `ckpt/latest` names is gone.
    pub fn latest_checkpoint(&self) -> Result<PathBuf> {
        let none = || {
            Error::input(format!("no checkpoint in run `{}`", self.path.display()))
                .hint("training was stopped before its first checkpoint: train again")
        };
        let name = std::fs::read_to_string(self.path.join("ckpt/latest")).map_err(|_| none())?;
        let file = self.path.join("ckpt").join(name.trim());
        if file.is_file() { Ok(file) } else { Err(none()) }
    }

    fn checkpoint_path(&self, step: u64) -> PathBuf {
        self.path.join(format!("ckpt/step-{step}.safetensors"))
    }

    fn checkpoint_steps(&self) -> Vec<u64> {
        let Ok(entries) = std::fs::read_dir(self.path.join("ckpt")) else { return Vec::new() };
        let mut steps: Vec<u64> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                name.strip_prefix("step-")?.strip_suffix(".safetensors")?.parse().ok()
            })
            .collect();
        steps.sort_unstable();
        steps
    }
}

/// The program's version and the kind of machine it was built for: same versions, same bytes.
pub fn versions() -> BTreeMap<String, String> {
    let target = format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS);
    BTreeMap::from([
        ("metazoa".into(), env!("CARGO_PKG_VERSION").into()),
        ("target".into(), target),
    ])
}

fn is_run(path: &Path) -> bool {
    path.join("run.json").is_file() && path.join("config.yaml").is_file()
}

fn refuse_occupied(path: &Path) -> Result<()> {
    if is_run(path) {
        return Err(Error::input(format!("there is a run already in `{}`", path.display()))
            .hint("choose another `--out`, or remove that folder"));
    }
    match std::fs::read_dir(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io(path, &error).context("cannot use as run folder")),
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(Error::input(format!(
                "the folder is not empty and not a run: `{}`",
                path.display()
            ))
            .hint("choose another `--out`")),
        },
    }
}

fn to_json(record: &RunRecord) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(record)
        .map_err(|error| Error::internal(format!("cannot write the run record: `{error}`")))
}
