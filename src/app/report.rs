//! `report.html` of a run, gathered from what the run folder holds.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::eval::EvalResult;
use super::run_folder::{RunFolder, RunRecord};
use crate::error::{Error, Result, ResultExt};
use crate::report::html::{AccuracyRow, Figure, FigureContent, ModelRow, ReportData, render};
use crate::report::{Event, Series, line_plot};
use crate::zoo::Access;

/// The stages of a run in order.
const STAGES: [&str; 17] = [
    "ingest",
    "pretrain",
    "generator",
    "five",
    "recover",
    "align",
    "meta",
    "meta-inner",
    "meta-outer",
    "meta-inversion",
    "meta-hardening",
    "meta-validation",
    "validate",
    "move",
    "harden",
    "eval",
    "export",
];
/// The events of times, which are told as totals.
const SECONDS: &str = "seconds";

/// What `report` wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ReportResult {
    /// The page.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
}

/// Writes `RUN/report.html`; may be called at any time, also while a run is going.
///
/// # Errors
/// When a file of the run is damaged, or the page cannot be written.
pub fn write_report(run: &RunFolder) -> Result<ReportResult> {
    let page = render(&gather(run)?);
    run.write("report.html", page.as_bytes())?;
    Ok(ReportResult { path: run.path().join("report.html"), bytes: page.len() as u64 })
}

fn gather(run: &RunFolder) -> Result<ReportData> {
    let record = run.record()?;
    let evaluations = evaluations(run)?;
    let name = run.path().file_name().map(|n| n.to_string_lossy().into_owned());
    Ok(ReportData {
        title: format!("metazoa run {}", name.unwrap_or_default()),
        summary: summary(&record),
        evaluations: evaluations.iter().map(evaluation_name).collect(),
        accuracies: accuracy_rows(&evaluations),
        remarks: remarks(&evaluations),
        figures: figures(run)?,
        models: model_rows(&record),
        config: run.config()?.to_yaml()?,
        versions: record.versions.clone(),
        commands: commands(&record, &evaluations),
    })
}

/// All results below `RUN/eval`, by file name.
fn evaluations(run: &RunFolder) -> Result<Vec<EvalResult>> {
    let folder = run.path().join("eval");
    let mut files: Vec<PathBuf> = match std::fs::read_dir(&folder) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(_) => Vec::new(),
    };
    files.retain(|file| file.extension().is_some_and(|extension| extension == "json"));
    files.sort();
    let read = |file: &PathBuf| {
        let bytes = std::fs::read(file).map_err(|error| Error::io(file, &error))?;
        serde_json::from_slice(&bytes)
            .map_err(|error| Error::input(format!("not an evaluation: `{error}`")))
            .context(|| format!("`{}`", file.display()))
    };
    files.iter().map(read).collect()
}

fn evaluation_name(result: &EvalResult) -> String {
    let bn = match result.bn {
        super::BatchNorm::Inductive => "",
        super::BatchNorm::Transductive => ", transductive",
    };
    let split = if result.split.is_empty() { String::new() } else { format!(", {}", result.split) };
    format!("{}-way {}-shot{split}{bn}", result.way, result.shot)
}

fn accuracy_rows(evaluations: &[EvalResult]) -> Vec<AccuracyRow> {
    let cells = |pick: &dyn Fn(&EvalResult) -> Option<(f64, f64)>| {
        evaluations.iter().map(pick).collect::<Vec<_>>()
    };
    let mut rows = vec![AccuracyRow {
        name: "meta-model".into(),
        cells: cells(&|result| Some((result.accuracy, result.ci95))),
    }];
    let mut names: Vec<&String> =
        evaluations.iter().flat_map(|result| result.baselines.keys()).collect();
    names.sort_by_key(|name| (*name != "untrained", (*name).clone()));
    names.dedup();
    for name in names {
        rows.push(AccuracyRow {
            name: name.clone(),
            cells: cells(&|result| result.baselines.get(name).map(|b| (b.accuracy, b.ci95))),
        });
    }
    let mut others: Vec<_> =
        evaluations.iter().flat_map(|result| &result.against).map(|other| &other.run).collect();
    others.sort();
    others.dedup();
    for run in others {
        let of = |result: &EvalResult| {
            let other = result.against.as_ref().filter(|other| other.run == *run)?;
            Some((other.accuracy, other.ci95))
        };
        rows.push(AccuracyRow { name: format!("run {}", run.display()), cells: cells(&of) });
    }
    rows.push(AccuracyRow {
        name: "chance".into(),
        cells: cells(&|result| Some((1.0 / result.way as f64, 0.0))),
    });
    rows
}

fn remarks(evaluations: &[EvalResult]) -> Vec<String> {
    let Some(first) = evaluations.first() else { return Vec::new() };
    let mut remarks = vec![format!(
        "Accuracy in % over {} episodes of {} query images a class, ± 95 % confidence interval \
         (1.96 s/√n, s with ddof 1); every row answers the same episodes (seed {}).",
        first.episodes, first.query, first.seed
    )];
    let transductive = |r: &EvalResult| r.bn == super::BatchNorm::Transductive;
    if evaluations.iter().any(transductive) {
        remarks.push(
            "Transductive: batch normalisation saw all queries of an episode at once; such figures \
             are not comparable with inductive ones."
                .into(),
        );
    }
    for result in evaluations.iter().filter(|result| !result.rejected.is_empty()) {
        remarks.push(format!(
            "{}: {} images could not be read and were left out.",
            evaluation_name(result),
            result.rejected.len()
        ));
    }
    remarks
}

fn summary(record: &RunRecord) -> Vec<(String, String)> {
    let images: usize = record.models.iter().map(|model| model.images).sum();
    let queries: u64 = record.outcomes.iter().map(|model| model.queries).sum();
    let mut items = vec![
        ("models used".to_owned(), record.models.len().to_string()),
        ("models rejected".to_owned(), record.rejected.len().to_string()),
        ("images recovered".to_owned(), images.to_string()),
        ("queries".to_owned(), queries.to_string()),
        ("seed".to_owned(), record.seed.to_string()),
    ];
    if let Some(reason) = &record.stop_reason {
        items.push(("ended".to_owned(), reason.clone()));
    }
    let mut seconds: Vec<(&String, &f64)> = record.seconds.iter().collect();
    seconds.sort_by_key(|(stage, _)| place(stage));
    for (stage, s) in seconds {
        let mut spent = format!("{s:.1}");
        if stage.starts_with("meta-") && record.meta_updates > 0 {
            spent += &format!(" ({:.1} ms an update)", 1e3 * s / record.meta_updates as f64);
        }
        items.push((format!("{stage}, s"), spent));
    }
    items
}

fn model_rows(record: &RunRecord) -> Vec<ModelRow> {
    let used = record.models.iter().map(|model| {
        let mut detail = format!("{} images", model.images);
        match model.access {
            Access::WhiteBox => {
                detail.push_str(&format!(", {} norm layers with statistics", model.norm_taps));
            }
            Access::BlackBox | Access::Remote => {
                detail.push_str(&format!(", {} queries", model.queries));
            }
        }
        if let Some(agreement) = model.agreement {
            detail.push_str(&format!(", {:.0} % as intended", 100.0 * agreement));
        }
        if let Some(outcome) = record.outcomes.iter().find(|outcome| outcome.id == model.id)
            && model.access != Access::WhiteBox
        {
            let limit = outcome.query_budget.map(|limit| format!(" of {limit} allowed"));
            detail.push_str(&format!("{}, {}", limit.unwrap_or_default(), outcome.stop_reason));
        }
        ModelRow {
            id: model.id.clone(),
            status: match model.access {
                Access::WhiteBox => "white-box".into(),
                Access::BlackBox => "black-box".into(),
                Access::Remote => "remote".into(),
            },
            classes: Some(model.classes),
            detail,
            sha: model.sha.clone(),
        }
    });
    let rejected = record.rejected.iter().map(|rejection| ModelRow {
        id: rejection.path.clone(),
        status: "rejected".into(),
        classes: None,
        detail: match &rejection.hint {
            Some(hint) => format!("{} ({hint})", rejection.reason),
            None => rejection.reason.clone(),
        },
        sha: String::new(),
    });
    used.chain(rejected).collect()
}

/// The contact sheets under `RUN/bank` (`*.png`) and the curves of the event log.
fn figures(run: &RunFolder) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    let mut sheets: Vec<PathBuf> = match std::fs::read_dir(run.bank()) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(_) => Vec::new(),
    };
    sheets.retain(|file| file.extension().is_some_and(|extension| extension == "png"));
    sheets.sort();
    for sheet in sheets {
        let bytes = std::fs::read(&sheet).map_err(|error| Error::io(&sheet, &error))?;
        figures.push(Figure {
            caption: "Images recovered from the models, one row a class".into(),
            content: FigureContent::Png(bytes),
        });
    }
    for (stage, value, series) in curves(&run.events()?) {
        if let Some(svg) = line_plot("step", &value, &series)? {
            let caption = format!("{stage}: {value}");
            figures.push(Figure { caption, content: FigureContent::Svg(svg) });
        }
    }
    Ok(figures)
}

/// One plot a stage and figure. A stage that works on several models is shown as the mean over the
/// models at each step.
fn curves(events: &[Event]) -> Vec<(String, String, Vec<Series>)> {
    type Sums = BTreeMap<u64, (f64, usize)>;
    let mut by_figure: BTreeMap<(String, String), Sums> = BTreeMap::new();
    for event in events.iter().filter(|event| event.stage != SECONDS) {
        for (name, value) in &event.values {
            let Some(value) = value else { continue };
            let key = (event.stage.clone(), name.clone());
            let sum = by_figure.entry(key).or_default().entry(event.step).or_default();
            sum.0 += value;
            sum.1 += 1;
        }
    }
    let mut by_figure: Vec<((String, String), Sums)> = by_figure.into_iter().collect();
    by_figure.sort_by_key(|((stage, _), _)| place(stage));
    by_figure
        .into_iter()
        .filter(|(_, sums)| sums.len() > 1)
        .map(|((stage, name), sums)| {
            let mean = |(step, (sum, n)): (u64, (f64, usize))| (step as f64, sum / n as f64);
            let points = sums.into_iter().map(mean).collect();
            let series = vec![Series { name: name.clone(), points }];
            (stage, name, series)
        })
        .collect()
}

/// The place of a stage in a run; what is not one of them comes last.
fn place(stage: &str) -> usize {
    STAGES.iter().position(|known| *known == stage).unwrap_or(STAGES.len())
}

fn commands(record: &RunRecord, evaluations: &[EvalResult]) -> Vec<String> {
    let quote = |word: &String| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
        if !word.is_empty() && word.chars().all(plain) {
            word.clone()
        } else {
            format!("'{}'", word.replace('\'', "'\\''"))
        }
    };
    let mut lines = Vec::new();
    if !record.command.is_empty() {
        lines.push(record.command.iter().map(quote).collect::<Vec<_>>().join(" "));
    }
    for result in evaluations {
        let split = if result.split.is_empty() {
            String::new()
        } else {
            format!(" --split {}", quote(&result.split))
        };
        let against = result.against.as_ref();
        let against =
            against.map(|other| format!(" --against {}", quote(&other.run.display().to_string())));
        lines.push(format!(
            "metazoa eval RUN --data {}{split} --way {} --shot {} --query {} --episodes {} --bn {} \
             --seed {}{}{}",
            quote(&result.data.display().to_string()),
            result.way,
            result.shot,
            result.query,
            result.episodes,
            result.bn.name(),
            result.seed,
            if result.baselines.is_empty() { "" } else { " --baselines" },
            against.unwrap_or_default(),
        ));
    }
    lines
}
