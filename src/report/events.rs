//! `events.jsonl`: one JSON object a step, appended as the run goes.
//!
//! The file is the source of truth for curves and reports. A killed run loses at most one line; a
//! cut last line is dropped on reading and repaired before anything is appended.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// One step of a stage, with the figures seen there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Event {
    /// Seconds since the run began (of the current process, after a resume).
    pub t: f64,
    /// The stage: `recover`, `meta`, `eval`, ...
    pub stage: String,
    /// Step within the stage, from 0.
    pub step: u64,
    /// The model worked on, where the stage has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Figures by name (`loss`, `accuracy`, ...); null where a figure was not finite.
    #[serde(flatten)]
    pub values: BTreeMap<String, Option<f64>>,
}

impl Event {
    /// An event without figures.
    pub fn new(t: f64, stage: &str, step: u64) -> Self {
        Self { t, stage: stage.into(), step, model: None, values: BTreeMap::new() }
    }

    /// Names the model worked on.
    #[must_use]
    pub fn model(mut self, id: &str) -> Self {
        self.model = Some(id.into());
        self
    }

    /// Adds a figure; what is not finite becomes null.
    #[must_use]
    pub fn value(mut self, name: &str, value: f64) -> Self {
        self.values.insert(name.into(), value.is_finite().then_some(value));
        self
    }
}

/// Appends events to a file; may be shared between threads.
#[derive(Debug)]
pub struct EventLog {
    path: PathBuf,
    file: Mutex<File>,
}

impl EventLog {
    /// Opens `path` for appending, making it when absent. A last line cut by a kill is removed.
    ///
    /// # Errors
    /// When the file cannot be opened or repaired.
    pub fn append(path: &Path) -> Result<Self> {
        let io = |error| Error::io(path, &error);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(io)?;
        let whole = length_of_whole_lines(&mut file).map_err(io)?;
        file.set_len(whole).map_err(io)?;
        file.seek(SeekFrom::End(0)).map_err(io)?;
        Ok(Self { path: path.into(), file: Mutex::new(file) })
    }

    /// Writes one line.
    ///
    /// # Errors
    /// When the disk refuses it.
    pub fn write(&self, event: &Event) -> Result<()> {
        let mut line = serde_json::to_vec(event)
            .map_err(|error| Error::internal(format!("cannot write an event: `{error}`")))?;
        line.push(b'\n');
        let mut file = self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        file.write_all(&line).map_err(|error| Error::io(&self.path, &error))
    }
}

fn length_of_whole_lines(file: &mut File) -> std::io::Result<u64> {
    let mut content = Vec::new();
    file.read_to_end(&mut content)?;
    Ok(content.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at as u64 + 1))
}

/// All events of a file, in order. A cut last line is left out.
///
/// # Errors
/// When the file cannot be read, or a line that is not the cut last one is no event.
pub fn read_events(path: &Path) -> Result<Vec<Event>> {
    let content = std::fs::read(path).map_err(|error| Error::io(path, &error))?;
    let mut events = Vec::new();
    for (index, line) in content.split_inclusive(|&byte| byte == b'\n').enumerate() {
        if !line.ends_with(b"\n") {
            break;
        }
        let event = serde_json::from_slice(line).map_err(|error| {
            Error::input(format!("not an event: `{error}`")).context(format!(
                "`{}` line {}",
                path.display(),
                index + 1
            ))
        })?;
        events.push(event);
    }
    Ok(events)
}
