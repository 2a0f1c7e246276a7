//! `RESULTS.md`: accuracies by scenario and domain, what they cost, what each changed setting is worth.

use std::fmt::Write;

use super::cells::{Cell, Kind};
use super::figures::Drawing;
use super::record::{CellRecord, Status};
use super::suite::Suite;
use super::summary::{BySeed, Place, Summary, accuracies, differences, mean_of, places, summarize};
use super::{BenchOptions, BenchResult};

/// Baselines that depend on the images alone, not on the run.
const PIXELS: &str = "pixel-";

/// What is known of cells, in the order of the suite.
type Known<'k, 'a> = &'k [(&'a Cell, &'a CellRecord)];

/// The whole page.
pub(super) fn page(
    options: &BenchOptions,
    result: &BenchResult,
    known: Known<'_, '_>,
    figures: &[Drawing],
) -> String {
    let suite = &options.suite;
    let mut text = head(options, result, known);
    for place in places(known) {
        // Writing to a `String` cannot fail.
        let _ =
            writeln!(text, "\n## {}: {}, {}\n", place.scenario, place.domain, place.part.name());
        text += &accuracy_table(suite, known, place);
        text += &difference_table(suite, known, place);
    }
    text += &left_out(known);
    if !figures.is_empty() {
        text += "\n## Figures\n";
    }
    for figure in figures {
        let _ = writeln!(text, "\n{}\n\n![{0}](figures/{})", figure.caption, figure.file);
    }
    let failed: Vec<_> = result.cells.iter().filter(|cell| cell.status == Status::Failed).collect();
    if !failed.is_empty() {
        text += "\n## Failed\n\n| cell | error |\n|---|---|\n";
    }
    for cell in failed {
        let error = cell.error.as_deref().unwrap_or_default();
        let _ = writeln!(text, "| {} | {} |", cell.id, escaped(error));
    }
    text
}

fn head(options: &BenchOptions, result: &BenchResult, known: Known<'_, '_>) -> String {
    let suite = &options.suite;
    let seeds: Vec<String> = suite.seeds.iter().map(u64::to_string).collect();
    let mut versions: Vec<&str> = known.iter().map(|(_, record)| record.version.as_str()).collect();
    let mut dates: Vec<&str> = known.iter().map(|(_, record)| record.date.as_str()).collect();
    for list in [&mut versions, &mut dates] {
        list.sort_unstable();
        list.dedup();
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let description = suite.description.as_ref().map(|text| format!("{}\n\n", text.trim()));
    format!(
        "# {}\n\n{}\
         {} of {} cells finished, {} failed. metazoa {}, {}, {} {} with {cores} cores ({} threads), {}.\n\n\
         {}-way, {} queries a class, {} episodes (seed {}), {}; runs with seeds {}. Accuracies in %: the mean over seeds; \
         after ± the 95 % interval over seeds (Student's t, where there are two or more), in brackets that over episodes \
         (1.96 s/√n, each episode averaged over the seeds first). Everybody answers the same episodes. Seconds are wall \
         time of training, busy seconds processor time over all threads, both means over seeds.\n",
        options.name,
        description.unwrap_or_default(),
        result.finished,
        result.cells.len(),
        result.failed,
        versions.join(", "),
        dates.join(", "),
        std::env::consts::ARCH,
        std::env::consts::OS,
        rayon::current_num_threads(),
        options.command.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" "),
        suite.way,
        suite.query,
        suite.episodes,
        suite.episode_seed,
        suite.bn.name(),
        seeds.join(", "),
    )
}

/// The command in code style; a word with anything unusual in quotes.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.into()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// A text within a cell of a table.
fn escaped(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

/// Variants with a cell in `place`, in the suite's order.
fn variants<'a>(known: Known<'_, 'a>, place: Place<'_>) -> Vec<&'a Cell> {
    let mut found: Vec<&Cell> = Vec::new();
    for (cell, _) in known.iter().filter(|(cell, _)| cell.scenario == place.scenario) {
        if found.iter().all(|other| other.variant.name != cell.variant.name) {
            found.push(cell);
        }
    }
    found
}

fn accuracy_table(suite: &Suite, known: Known<'_, '_>, place: Place<'_>) -> String {
    let shots: String = suite.shots.iter().map(|shot| format!(" {shot}-shot |")).collect();
    let mut text = format!(
        "| |{shots} seconds | busy seconds | images | queries | models | seeds |\n|---|{}\n",
        "---|".repeat(suite.shots.len() + 6)
    );
    let mut pixels: Vec<String> = Vec::new();
    for cell in variants(known, place) {
        let variant = &cell.variant;
        let by_shot = |name: Option<&str>| -> Vec<Option<Summary>> {
            let of = |shot| summarize(&accuracies(known, place, &variant.name, name, shot));
            suite.shots.iter().map(|&shot| of(shot)).collect()
        };
        let own = by_shot(None);
        let cost = |of: &dyn Fn(&CellRecord) -> Option<f64>, digits: usize| {
            let mean = mean_of(known, place.scenario, &variant.name, of);
            mean.map_or_else(|| "-".into(), |mean| format!("{mean:.digits$}"))
        };
        let trained = |of: fn(&super::record::Trained) -> f64| {
            cost(&move |record| record.trained.as_ref().map(of), 0)
        };
        let label = match variant.kind {
            Kind::Method => format!("**{}**", variant.name),
            Kind::Ablation => format!("{} (of {})", variant.name, variant.method),
            Kind::Sweep => variant.name.clone(),
        };
        let seeds = own.iter().flatten().map(|summary| summary.seeds).max().unwrap_or(0);
        let _ = writeln!(
            text,
            "| {label} |{} {} | {} | {} | {} | {} | {seeds} |",
            cells(&own),
            cost(&|record| Some(record.seconds), 1),
            cost(&|record| record.busy_seconds, 1),
            trained(|trained| trained.images as f64),
            trained(|trained| trained.queries as f64),
            trained(|trained| trained.models_used as f64),
        );
        for name in others(known, place, &variant.name) {
            let label = if name.starts_with(PIXELS) {
                // The same for every run: told once.
                if pixels.contains(&name) {
                    continue;
                }
                pixels.push(name.clone());
                name.clone()
            } else {
                format!("{name}, beside {}", variant.name)
            };
            let found = by_shot(Some(&name));
            let seeds = found.iter().flatten().map(|summary| summary.seeds).max().unwrap_or(0);
            let _ = writeln!(text, "| {label} |{} | | | | | {seeds} |", cells(&found));
        }
    }
    text
}

/// Who answered beside `variant` in `place`.
fn others(known: Known<'_, '_>, place: Place<'_>, variant: &str) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for (cell, record) in known {
        if cell.scenario != place.scenario || cell.variant.name != variant {
            continue;
        }
        // Those of the suite as it is now: a record may hold more.
        let here =
            cell.wanted.iter().filter(|own| own.domain == place.domain && own.part == place.part);
        for made in here.filter_map(|wanted| record.evaluation(wanted)) {
            for name in made.answers.iter().filter_map(|answers| answers.name.as_ref()) {
                if !names.contains(name) {
                    names.push(name.clone());
                }
            }
        }
    }
    names
}

fn cells(summaries: &[Option<Summary>]) -> String {
    summaries
        .iter()
        .map(|summary| format!(" {} |", shown(summary.as_ref(), without_sign)))
        .collect()
}

/// Accuracies carry no sign, differences do.
fn without_sign(value: f64) -> String {
    format!("{value:.1}")
}

fn with_sign(value: f64) -> String {
    format!("{value:+.1}")
}

fn shown(summary: Option<&Summary>, number: fn(f64) -> String) -> String {
    let Some(summary) = summary else { return "-".into() };
    let percent = |value: f64| 100.0 * value;
    let seeds = summary.over_seeds.map(|ci| format!(" ± {:.1}", percent(ci)));
    format!(
        "{}{} (± {:.1})",
        number(percent(summary.mean)),
        seeds.unwrap_or_default(),
        percent(summary.over_episodes)
    )
}

/// What each ablation, and calibration, changes: paired differences on the same episodes.
fn difference_table(suite: &Suite, known: Known<'_, '_>, place: Place<'_>) -> String {
    let mut rows = String::new();
    let mut row = |name: String, of: &dyn Fn(usize) -> BySeed| {
        let found: Vec<Option<Summary>> =
            suite.shots.iter().map(|&shot| summarize(&of(shot))).collect();
        if found.iter().any(Option::is_some) {
            let told: String = found
                .iter()
                .map(|summary| format!(" {} |", shown(summary.as_ref(), with_sign)))
                .collect();
            let _ = writeln!(rows, "| {name} |{told}");
        }
    };
    for cell in variants(known, place) {
        let (name, method) = (&cell.variant.name, &cell.variant.method);
        let own = |shot| accuracies(known, place, name, None, shot);
        if cell.variant.kind == Kind::Ablation {
            row(format!("{name} - {method}"), &|shot| {
                differences(&own(shot), &accuracies(known, place, method, None, shot))
            });
        }
        if others(known, place, name).iter().any(|other| other == crate::app::eval::ICFIL) {
            row(format!("{name} with icfil - {name}"), &|shot| {
                let icfil = Some(crate::app::eval::ICFIL);
                differences(&accuracies(known, place, name, icfil, shot), &own(shot))
            });
        }
    }
    if rows.is_empty() {
        return rows;
    }
    let shots: String = suite.shots.iter().map(|shot| format!(" {shot}-shot |")).collect();
    format!(
        "\nDifferences on the same episodes, in points (an interval that holds 0 tells nothing):\n\n\
         | |{shots}\n|---|{}\n{rows}",
        "---|".repeat(suite.shots.len())
    )
}

/// Baselines that do not apply, each once.
fn left_out(known: Known<'_, '_>) -> String {
    let mut lines: Vec<String> = Vec::new();
    for (cell, record) in known {
        let made = cell.wanted.iter().filter_map(|wanted| record.evaluation(wanted));
        for (name, why) in made.flat_map(|made| &made.left_out) {
            let line = format!("* {} {}: {name}: {why}", cell.scenario, cell.variant.name);
            if !lines.contains(&line) {
                lines.push(line);
            }
        }
    }
    if lines.is_empty() {
        String::new()
    } else {
        format!("\n## Left out\n\n{}\n", lines.join("\n"))
    }
}
