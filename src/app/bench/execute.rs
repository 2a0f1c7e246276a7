//! One cell, from where it stands to its last evaluation: the ordinary `train` and `eval` of one run folder.

use std::path::Path;
use std::time::Instant;

use super::cells::{Cell, Wanted};
use super::clock::{busy_seconds, today};
use super::record::{Answers, CellRecord, Evaluated, Trained};
use crate::access::library::RuntimeOptions;
use crate::app::baselines::Rivals;
use crate::app::embedder::ModelEmbedder;
use crate::app::eval::{
    Baselines, Calibration, EpisodeRow, EvalOptions, EvalResult, ICFIL, evaluate_run,
};
use crate::app::ingest::ProbeOptions;
use crate::app::report::write_report;
use crate::app::train::{Start, TrainOptions, train};
use crate::app::{Context, RunFolder};
use crate::data::{EpisodeShape, ImageFolder};
use crate::error::{Error, ErrorKind, Result};

/// The upper bound's name among baselines.
const REAL_DATA: &str = "real-data";

/// What every cell is given.
#[derive(Debug, Clone)]
pub(super) struct Tools<'a> {
    /// Where the suite's results are.
    pub(super) out: &'a Path,
    /// Where ONNX Runtime is looked for.
    pub(super) runtime: RuntimeOptions,
    /// How models are tried out at ingest.
    pub(super) probe: Option<ProbeOptions>,
    /// The command line, for the record of runs.
    pub(super) command: Vec<String>,
}

/// Brings `cell` to its end. What fails is kept in its record; the record is written after each step.
///
/// # Errors
/// When the user interrupts, or the record cannot be written.
pub(super) fn execute(
    cell: &Cell,
    record: &mut CellRecord,
    tools: &Tools<'_>,
    context: &Context,
) -> Result<()> {
    let file = cell.record(tools.out);
    (record.error, record.hint) = (None, None);
    (record.version, record.date) = (super::cells::version(), today());
    let mut done = Ok(());
    if record.trained.is_none() {
        done = train_cell(cell, record, tools, context);
        record.save(&file)?;
    }
    let done = done.and_then(|()| {
        evaluate_cell(cell, record, tools.out, context, &mut |record| record.save(&file))
    });
    match done {
        Err(error) if error.kind() == ErrorKind::Interrupted => Err(error),
        Err(error) => {
            record.error = Some(error.to_string());
            record.hint = error.hint_text().map(str::to_owned);
            record.save(&file)
        }
        Ok(()) => record.save(&file),
    }
}

fn train_cell(
    cell: &Cell,
    record: &mut CellRecord,
    tools: &Tools<'_>,
    context: &Context,
) -> Result<()> {
    let out = cell.run(tools.out);
    let options = TrainOptions {
        config: cell.config.clone(),
        start: if out.exists() { Start::Resume } else { Start::New },
        out,
        command: tools.command.clone(),
        runtime: tools.runtime.clone(),
        probe: tools.probe.clone(),
    };
    let (begin, busy) = (Instant::now(), busy_seconds());
    let result = train(context, &options);
    record.attempts += 1;
    record.seconds += begin.elapsed().as_secs_f64();
    let spent = busy_seconds().zip(busy).map(|(after, before)| after - before);
    record.busy_seconds = record.busy_seconds.zip(spent).map(|(before, spent)| before + spent);
    let result = result?;
    let seconds = RunFolder::open(&result.run)?.record()?.seconds;
    let stage = |name: &str| seconds.get(name).copied().unwrap_or_default();
    record.trained = Some(Trained {
        stop_reason: result.stop_reason,
        steps: result.steps,
        models_used: result.models_used,
        models_rejected: result.models_rejected,
        images: result.images,
        queries: result.queries,
        recover_seconds: stage("recover"),
        meta_seconds: stage("meta"),
    });
    Ok(())
}

/// Makes the evaluations that are missing; `save` is called after each.
fn evaluate_cell(
    cell: &Cell,
    record: &mut CellRecord,
    out: &Path,
    context: &Context,
    save: &mut dyn FnMut(&CellRecord) -> Result<()>,
) -> Result<()> {
    let missing: Vec<&Wanted> =
        cell.wanted.iter().filter(|wanted| record.evaluation(wanted).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let run = RunFolder::open(&cell.run(out))?;
    let model = ModelEmbedder::trained(&run)?;
    let asked = missing.iter().any(|wanted| wanted.baselines);
    let asked = if asked { Baselines::All } else { Baselines::Skip };
    let mut rivals = Rivals::asked_for(&run, asked, context)?;
    let mut bound = None;
    for wanted in missing {
        let images = ImageFolder::open(&wanted.data, wanted.split.as_deref())?;
        if bound != wanted.real_data {
            rivals.remove(REAL_DATA);
            if let Some(folder) = &wanted.real_data {
                rivals.add_real_data(&run, folder, &images, context)?;
            }
            bound.clone_from(&wanted.real_data);
        }
        let options = EvalOptions {
            data: wanted.data.clone(),
            split: wanted.split.clone(),
            shape: EpisodeShape { way: wanted.way, shot: wanted.shot, query: wanted.query },
            episodes: wanted.episodes,
            batch_norm: wanted.bn,
            baselines: if wanted.baselines { Baselines::All } else { Baselines::Skip },
            real_data: wanted.real_data.clone(),
            calibration: if wanted.icfil { Calibration::Icfil } else { Calibration::Skip },
            against: None,
        };
        let seeded = Context { seed: wanted.episode_seed, ..context.clone() };
        let (result, rows) = evaluate_run((&run, &model), &rivals, None, &options, &seeded)?;
        record.evaluated.push(evaluated(wanted, &result, &rows)?);
        save(record)?;
    }
    write_report(&run)?;
    Ok(())
}

/// The evaluation as the record keeps it: right answers by episode, which is what differences need.
fn evaluated(wanted: &Wanted, result: &EvalResult, rows: &[EpisodeRow]) -> Result<Evaluated> {
    let asked = rows.first().map_or(0, |row| row.queries);
    if rows.iter().any(|row| row.queries != asked) {
        return Err(Error::internal("episodes differ in their number of queries"));
    }
    let own =
        Answers { name: None, right: rows.iter().map(|row| row.correct).collect(), note: None };
    let calibrated = result.icfil.as_ref().map(|icfil| {
        let note = format!("{:.2} s an episode", icfil.seconds / result.episodes.max(1) as f64);
        (ICFIL.to_owned(), Some(note))
    });
    let baselines =
        result.baselines.iter().map(|(name, baseline)| (name.clone(), baseline.note.clone()));
    let others = calibrated.into_iter().chain(baselines).map(|(name, note)| Answers {
        right: rows.iter().map(|row| row.baselines.get(&name).copied().unwrap_or(0)).collect(),
        name: Some(name),
        note,
    });
    Ok(Evaluated {
        wanted: wanted.clone(),
        seconds: result.seconds,
        asked,
        answers: std::iter::once(own).chain(others).collect(),
        left_out: result.baselines_left_out.clone(),
    })
}
