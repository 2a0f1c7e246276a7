//! What is known of a cell, beside its run folder, and how far it has come.

use std::collections::BTreeMap;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::cells::{Cell, Wanted};
use crate::app::config::RunConfig;
use crate::app::files::write_atomically;
use crate::app::run_folder::RunFolder;
use crate::error::{Error, Result, ResultExt};

/// How the training of a cell ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Trained {
    /// `done`, `early-stop` or `diverged`.
    pub(super) stop_reason: String,
    /// Meta-training steps.
    pub(super) steps: u64,
    /// Models that gave images.
    pub(super) models_used: usize,
    /// Models that could not be used.
    pub(super) models_rejected: usize,
    /// Images recovered.
    pub(super) images: usize,
    /// Queries spent.
    pub(super) queries: u64,
    /// Seconds of recovery, over all attempts that ended.
    pub(super) recover_seconds: f64,
    /// Seconds of meta-training, likewise.
    pub(super) meta_seconds: f64,
}

/// One who answered the episodes of an evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Answers {
    /// A baseline, or `icfil`; none is the run's own model.
    pub(super) name: Option<String>,
    /// Right answers in each episode.
    pub(super) right: Vec<usize>,
    /// What is to be known of it.
    pub(super) note: Option<String>,
}

/// One evaluation that was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Evaluated {
    /// Whatever decides its numbers.
    pub(super) wanted: Wanted,
    /// Wall time.
    pub(super) seconds: f64,
    /// Queries of an episode.
    pub(super) asked: usize,
    /// Who answered: the run's own model first.
    pub(super) answers: Vec<Answers>,
    /// Baselines that do not apply, and why.
    pub(super) left_out: BTreeMap<String, String>,
}

impl Evaluated {
    /// The accuracies of the episodes of the one called `name`.
    pub(super) fn accuracies(&self, name: Option<&str>) -> Option<Vec<f64>> {
        let found = self.answers.iter().find(|answers| answers.name.as_deref() == name)?;
        let share = |right: &usize| *right as f64 / self.asked.max(1) as f64;
        Some(found.right.iter().map(share).collect())
    }
}

/// All that is known of a cell: `cells/ID.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct CellRecord {
    /// Version of this format: 1.
    pub(super) schema_version: u32,
    /// Its settings.
    pub(super) config: RunConfig,
    /// The program's version at the last attempt.
    pub(super) version: String,
    /// The day of the last attempt, UTC.
    pub(super) date: String,
    /// Attempts to train it: more than one when it was interrupted.
    pub(super) attempts: u64,
    /// Wall time of all attempts to train it.
    pub(super) seconds: f64,
    /// Processor time of all attempts, where the system tells.
    pub(super) busy_seconds: Option<f64>,
    /// How training ended; absent before.
    pub(super) trained: Option<Trained>,
    /// The evaluations made so far.
    pub(super) evaluated: Vec<Evaluated>,
    /// Why the last attempt failed.
    pub(super) error: Option<String>,
    /// What to do about it.
    pub(super) hint: Option<String>,
}

impl CellRecord {
    /// Of a cell that nobody has begun.
    pub(super) fn new(cell: &Cell) -> Self {
        Self {
            schema_version: 1,
            config: cell.config.clone(),
            version: super::cells::version(),
            date: super::clock::today(),
            attempts: 0,
            seconds: 0.0,
            busy_seconds: Some(0.0),
            trained: None,
            evaluated: Vec::new(),
            error: None,
            hint: None,
        }
    }

    fn read(path: &Path) -> Result<Option<Self>> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(path, &error)),
        };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| Error::input(format!("not what is known of a cell: `{error}`")))
            .context(|| format!("`{}`", path.display()))
            .hint(|| "remove the file, and the folder of the same name beside it".into())
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// When the disk refuses it.
    pub(super) fn save(&self, path: &Path) -> Result<()> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|error| Error::io(parent, &error))?;
        }
        let bytes = serde_json::to_vec(self)
            .map_err(|error| Error::internal(format!("cannot write a cell: `{error}`")))?;
        write_atomically(path, &bytes)
    }

    /// The evaluation of `wanted`, if it was made.
    pub(super) fn evaluation(&self, wanted: &Wanted) -> Option<&Evaluated> {
        self.evaluated.iter().find(|made| made.wanted == *wanted)
    }

    /// Whether training has ended and every evaluation of `cell` is there.
    pub(super) fn is_finished(&self, cell: &Cell) -> bool {
        self.trained.is_some() && cell.wanted.iter().all(|one| self.evaluation(one).is_some())
    }
}

/// How far a cell has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// Not begun.
    New,
    /// Begun: training goes on from its last checkpoint, or evaluations are missing.
    Unfinished,
    /// All there.
    Finished,
    /// The last attempt failed.
    Failed,
    /// Made with other settings than the suite's now.
    Changed,
}

impl Status {
    /// The name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Unfinished => "unfinished",
            Self::Finished => "finished",
            Self::Failed => "failed",
            Self::Changed => "changed",
        }
    }
}

/// A cell as it was found on disk.
#[derive(Debug)]
pub(super) struct Found {
    /// How far it has come.
    pub(super) status: Status,
    /// What is known of it.
    pub(super) record: CellRecord,
    /// The settings that have changed since.
    pub(super) differences: Vec<String>,
}

/// Looks at what there is of `cell` below `out`.
///
/// # Errors
/// When its files are damaged, or something else lies where they belong.
pub(super) fn look(cell: &Cell, out: &Path) -> Result<Found> {
    let known = CellRecord::read(&cell.record(out))?;
    let folder = cell.run(out);
    let run = if folder.exists() {
        let run = RunFolder::open(&folder).hint(|| {
            "a suite keeps its runs there: choose another `--out`, or remove that folder".into()
        })?;
        Some(run.config()?)
    } else {
        None
    };
    // A failure that left no run binds nobody to its settings; and what was trained is gone with its run, unless nothing more
    // is to be evaluated.
    let known = known.filter(|record| {
        let same = record.config == cell.config;
        run.is_some() || record.is_finished(cell) || same != record.trained.is_some()
    });
    // The run folder is what was computed; without it (a user needed the space) its results still stand.
    let made_with = run.as_ref().or(known.as_ref().map(|record| &record.config));
    let differences = match made_with {
        Some(config) => config.differences(&cell.config)?,
        None => Vec::new(),
    };
    let begun = made_with.is_some();
    let record = known.unwrap_or_else(|| CellRecord::new(cell));
    let status = if !differences.is_empty() {
        Status::Changed
    } else if record.is_finished(cell) {
        Status::Finished
    } else if record.error.is_some() {
        Status::Failed
    } else if begun {
        Status::Unfinished
    } else {
        Status::New
    };
    Ok(Found { status, record, differences })
}

/// Removes what there is of `cell`, so that it begins anew. Only a run folder is ever removed.
///
/// # Errors
/// When something else lies there, or the disk refuses it.
pub(super) fn remove(cell: &Cell, out: &Path) -> Result<()> {
    let folder = cell.run(out);
    if folder.exists() {
        let run = RunFolder::open(&folder)?;
        std::fs::remove_dir_all(run.path()).map_err(|error| Error::io(run.path(), &error))?;
    }
    let record = cell.record(out);
    match std::fs::remove_file(&record) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(&record, &error))
        }
        _ => Ok(()),
    }
}
