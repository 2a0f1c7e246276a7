//! The use-case `bench`: a grid of runs - scenarios x methods, ablations and sweeps x seeds - and tables of what came of it.
//!
//! A cell of the grid is one ordinary run folder made by `train`, evaluated by what `eval` does. What is known of a cell
//! lies in a file beside its folder, written after each step, so a grid that was stopped goes on where it was, and a cell
//! is never computed twice. Invariants: nothing is begun before every cell was looked at (a cell made with other settings
//! than the suite's stops the grid, or is made anew when asked to); a cell that fails becomes a row with its error and the
//! others go on; results and tables are rewritten from the cells' files after each cell.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Context;
use super::config::Override;
use super::files::write_atomically;
use super::ingest::ProbeOptions;
use crate::access::library::RuntimeOptions;
use crate::data::ImageFolder;
use crate::error::{Error, Result, ResultExt};

mod cells;
mod clock;
mod execute;
mod figures;
mod named;
mod record;
mod row;
mod suite;
mod summary;
mod tables;

pub use cells::{Kind, Part};
pub use named::Named;
pub use record::Status;
pub use row::Row;
pub use suite::{Ablation, Pictures, Scenario, Suite, Sweep};

use cells::{Cell, chosen};
use execute::{Tools, execute};
use record::{CellRecord, look, remove};

/// Differing settings told of a changed cell.
const DIFFERENCES_TOLD: usize = 3;

/// What to compute.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// The suite.
    pub suite: Suite,
    /// Its file's name, for the head of the results.
    pub name: String,
    /// Where runs and results go.
    pub out: PathBuf,
    /// Settings of the command line, over those of every cell.
    pub overrides: Vec<Override>,
    /// Patterns of the cells to compute; all when empty.
    pub only: Vec<String>,
    /// What happens to cells made with other settings.
    pub changed: Changed,
    /// The command line, for the record.
    pub command: Vec<String>,
    /// Where ONNX Runtime is looked for.
    pub runtime: RuntimeOptions,
    /// How models are tried out at ingest.
    pub probe: Option<ProbeOptions>,
}

/// What happens to cells made with other settings than the suite's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Changed {
    /// They stop the grid before anything is computed.
    Refuse,
    /// Their run folders are removed and made anew.
    Redo,
}

/// A cell of the grid.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CellState {
    /// `SCENARIO/VARIANT/seed-N`, its run folder below `OUT/cells`.
    pub id: String,
    /// How far it has come.
    pub status: Status,
    /// SHA-256 of its settings without the seed, 16 digits.
    pub settings_hash: String,
    /// Evaluations made.
    pub evaluated: usize,
    /// Evaluations it owes.
    pub evaluations: usize,
    /// Why its last attempt failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What came of a grid, or how it stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BenchResult {
    /// Where runs and results are.
    pub out: PathBuf,
    /// All cells of the suite, those that were not asked for included.
    pub cells: Vec<CellState>,
    /// Cells that are finished.
    pub finished: usize,
    /// Cells whose last attempt failed.
    pub failed: usize,
    /// The lines of `results.jsonl`.
    pub rows: Vec<Row>,
    /// The results by line; absent when nothing was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub results: Option<PathBuf>,
    /// The tables; absent when nothing was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tables: Option<PathBuf>,
    /// The figures.
    pub figures: Vec<PathBuf>,
    /// Wall time of this call.
    pub seconds: f64,
}

/// The cells of a suite with what is known of each.
struct Grid<'a> {
    options: &'a BenchOptions,
    cells: &'a [Cell],
    /// As found, by the cells' order.
    states: Vec<(Status, CellRecord)>,
}

/// Lists the cells and how far each has come; nothing is computed or written.
///
/// # Errors
/// When settings do not fit, images are missing, or files of a cell are damaged.
pub fn plan(options: &BenchOptions) -> Result<BenchResult> {
    let begin = Instant::now();
    let cells = expand(options)?;
    let picked: BTreeSet<&str> =
        chosen(&cells, &options.only)?.into_iter().map(|cell| cell.id.as_str()).collect();
    let mut states = Vec::new();
    for cell in &cells {
        let found = look(cell, &options.out)?;
        states.push((found.status, found.record));
    }
    let grid = Grid { options, cells: &cells, states };
    let mut result = grid.result(begin)?;
    result.cells.retain(|cell| picked.contains(cell.id.as_str()));
    let count = |status| result.cells.iter().filter(|cell| cell.status == status).count();
    (result.finished, result.failed) = (count(Status::Finished), count(Status::Failed));
    Ok(result)
}

/// Computes every cell that is asked for and not finished, and writes results, tables and figures.
///
/// # Errors
/// As [`plan`]; when a cell was made with other settings and these are not to be made anew; when the user interrupts
/// (the same call goes on from there). A cell that fails is no error.
pub fn bench(context: &Context, options: &BenchOptions) -> Result<BenchResult> {
    let begin = Instant::now();
    let cells = expand(options)?;
    let picked = chosen(&cells, &options.only)?;
    let mut states = Vec::new();
    for cell in &cells {
        let mut found = look(cell, &options.out)?;
        let asked = picked.iter().any(|other| other.id == cell.id);
        if found.status == Status::Changed && asked {
            if options.changed == Changed::Refuse {
                return Err(changed(cell, &found.differences, &options.out));
            }
            (found.status, found.record) = (Status::New, CellRecord::new(cell));
        }
        states.push((found.status, found.record));
    }
    let mut grid = Grid { options, cells: &cells, states };
    let out = &options.out;
    std::fs::create_dir_all(out).map_err(|error| Error::io(out, &error))?;
    write_atomically(&out.join("suite.yaml"), suite_text(&options.suite)?.as_bytes())?;
    let tools = Tools {
        out,
        runtime: options.runtime.clone(),
        probe: options.probe.clone(),
        command: options.command.clone(),
    };
    let stage = context.progress.stage("cells", Some(picked.len() as u64));
    for (at, cell) in cells.iter().enumerate() {
        let asked = picked.iter().any(|other| other.id == cell.id);
        if !asked {
            continue;
        }
        if grid.states[at].0 != Status::Finished {
            stage.message(&cell.id);
            if options.changed == Changed::Redo && look(cell, out)?.status == Status::Changed {
                remove(cell, out)?;
            }
            let done = execute(cell, &mut grid.states[at].1, &tools, context);
            grid.refresh(at);
            if done.is_err() {
                // What there is, is told; the first failure is the one to report.
                let _ = grid.write(begin);
            }
            done?;
            context.progress.note(&grid.line(at));
            grid.write(begin)?;
        }
        stage.advance(1);
    }
    drop(stage);
    grid.write(begin)
}

/// The names of all cells of `suite`, their settings checked; no file is looked at.
///
/// # Errors
/// When the suite makes no grid or settings do not fit.
pub fn cell_names(suite: &Suite) -> Result<Vec<String>> {
    suite.check()?;
    Ok(cells::cells(suite, &[])?.into_iter().map(|cell| cell.id).collect())
}

/// The cells, their images looked at: what is refused is refused before hours are spent.
fn expand(options: &BenchOptions) -> Result<Vec<Cell>> {
    if let Some(decided) = options.overrides.iter().find(|own| {
        ["zoo", "seed", "eval", "export"].contains(&own.key.split('.').next().unwrap_or_default())
    }) {
        return Err(Error::usage(format!("a suite decides it: `{}`", decided.key))
            .context(decided.origin.clone())
            .hint("change the suite's file"));
    }
    // Once more: the command line may have changed it since it was read.
    let checked = options.suite.check();
    let cells = checked
        .and_then(|()| cells::cells(&options.suite, &options.overrides))
        .context(|| format!("suite `{}`", options.name))?;
    let mut seen: Vec<&cells::Wanted> = Vec::new();
    for cell in chosen(&cells, &options.only)? {
        for wanted in &cell.wanted {
            let same = |other: &&cells::Wanted| {
                other.data == wanted.data
                    && other.split == wanted.split
                    && other.shot == wanted.shot
            };
            if seen.iter().any(same) {
                continue;
            }
            seen.push(wanted);
            ImageFolder::open(&wanted.data, wanted.split.as_deref())
                .and_then(|folder| folder.check(options.suite.shape(wanted.shot)))
                .context(|| {
                    format!(
                        "scenarios: `{}`, {} images of `{}`",
                        cell.scenario,
                        wanted.part.name(),
                        wanted.domain
                    )
                })?;
        }
    }
    Ok(cells)
}

fn changed(cell: &Cell, differences: &[String], out: &Path) -> Error {
    let more = differences.len().saturating_sub(DIFFERENCES_TOLD);
    let told: Vec<&str> = differences.iter().take(DIFFERENCES_TOLD).map(String::as_str).collect();
    let more = if more > 0 { format!(", and {more} more") } else { String::new() };
    Error::input(format!("its settings have changed: `{}`{more}", told.join("`, `")))
        .context(format!("cell `{}` was made in `{}`", cell.id, cell.run(out).display()))
        .hint("`--redo-changed` removes such runs and makes them anew; or choose another `--out`")
}

fn suite_text(suite: &Suite) -> Result<String> {
    serde_yaml::to_string(suite)
        .map_err(|error| Error::internal(format!("cannot write the suite: `{error}`")))
}

impl Grid<'_> {
    /// The status of a cell after work on it.
    fn refresh(&mut self, at: usize) {
        let (status, record) = &mut self.states[at];
        *status = if record.is_finished(&self.cells[at]) {
            Status::Finished
        } else if record.error.is_some() {
            Status::Failed
        } else {
            Status::Unfinished
        };
    }

    /// What is said when a cell is done.
    fn line(&self, at: usize) -> String {
        let (status, record) = &self.states[at];
        let id = &self.cells[at].id;
        match &record.error {
            Some(error) => format!("{id}: failed: {error}"),
            None => format!("{id}: {}, trained in {:.0} s", status.name(), record.seconds),
        }
    }

    /// Cells made with the suite's settings, with what is known of them.
    fn known(&self) -> impl Iterator<Item = (&Cell, &CellRecord)> {
        let made = self.cells.iter().zip(&self.states);
        made.filter(|(_, (status, _))| !matches!(status, Status::New | Status::Changed))
            .map(|(cell, (_, record))| (cell, record))
    }

    fn result(&self, begin: Instant) -> Result<BenchResult> {
        let state = |(cell, (status, record)): (&Cell, &(Status, CellRecord))| {
            let made = cell.wanted.iter().filter(|one| record.evaluation(one).is_some());
            CellState {
                id: cell.id.clone(),
                status: *status,
                settings_hash: cell.settings_hash.clone(),
                evaluated: made.count(),
                evaluations: cell.wanted.len(),
                error: record.error.clone(),
            }
        };
        let cells: Vec<CellState> = self.cells.iter().zip(&self.states).map(state).collect();
        let count = |status| cells.iter().filter(|cell| cell.status == status).count();
        Ok(BenchResult {
            out: self.options.out.clone(),
            finished: count(Status::Finished),
            failed: count(Status::Failed),
            cells,
            rows: self.known().flat_map(|(cell, record)| row::rows(cell, record)).collect(),
            results: None,
            tables: None,
            figures: Vec::new(),
            seconds: begin.elapsed().as_secs_f64(),
        })
    }

    /// Writes results, tables and figures from what is known now.
    fn write(&self, begin: Instant) -> Result<BenchResult> {
        let out = &self.options.out;
        let mut result = self.result(begin)?;
        let mut lines = String::new();
        for row in &result.rows {
            let line = serde_json::to_string(row)
                .map_err(|error| Error::internal(format!("cannot write a result: `{error}`")))?;
            lines.push_str(&line);
            lines.push('\n');
        }
        let known: Vec<(&Cell, &CellRecord)> = self.known().collect();
        let figures = figures::draw(&known)?;
        if !figures.is_empty() {
            let folder = out.join("figures");
            std::fs::create_dir_all(&folder).map_err(|error| Error::io(&folder, &error))?;
        }
        for figure in &figures {
            let path = out.join("figures").join(&figure.file);
            write_atomically(&path, figure.svg.as_bytes())?;
            result.figures.push(path);
        }
        let (results, tables) = (out.join("results.jsonl"), out.join("RESULTS.md"));
        write_atomically(&results, lines.as_bytes())?;
        let page = tables::page(self.options, &result, &known, &figures);
        write_atomically(&tables, page.as_bytes())?;
        (result.results, result.tables) = (Some(results), Some(tables));
        result.seconds = begin.elapsed().as_secs_f64();
        Ok(result)
    }
}
