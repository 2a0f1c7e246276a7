//! Figures of a suite's sweeps: accuracy over the swept value, over seconds, queries and number of models.

use super::cells::{Cell, Part, Point};
use super::record::CellRecord;
use super::summary::{Place, accuracies, mean_of, places, summarize};
use crate::error::Result;
use crate::report::{Axis, MeasuredSeries, Measurement, measured_plot};

/// What an axis must span to be drawn: less is chance.
const LEAST_SPAN: f64 = 1.2;
/// From this span on an axis is divided by powers of ten.
const LOGARITHMIC_SPAN: f64 = 20.0;

/// One drawing.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Drawing {
    /// Its file below `figures`.
    pub(super) file: String,
    /// What it shows.
    pub(super) caption: String,
    /// The drawing.
    pub(super) svg: String,
}

/// A quantity that accuracy is drawn over.
struct Quantity {
    /// For the file's name.
    name: String,
    /// Shown at the axis.
    label: String,
    /// Of a cell.
    of: Box<Quantify>,
}

/// What a cell has of a quantity.
type Quantify = dyn Fn(&Cell, &CellRecord) -> Option<f64>;

/// Every drawing that the sweeps among `known` give. Images for choosing are drawn only where there are none for reporting.
///
/// # Errors
/// When one cannot be drawn.
pub(super) fn draw(known: &[(&Cell, &CellRecord)]) -> Result<Vec<Drawing>> {
    let mut sweeps: Vec<&Point> = Vec::new();
    for point in known.iter().filter_map(|(cell, _)| cell.variant.point.as_ref()) {
        if sweeps.iter().all(|other| other.sweep != point.sweep) {
            sweeps.push(point);
        }
    }
    let mut drawings = Vec::new();
    let all = places(known);
    let reported = |place: &Place<'_>| {
        place.part == Part::MetaTest || !all.contains(&Place { part: Part::MetaTest, ..*place })
    };
    for place in all.iter().copied().filter(reported) {
        for sweep in &sweeps {
            for shot in shots(known, place) {
                for quantity in quantities(sweep) {
                    drawings.extend(drawing(known, place, sweep, shot, &quantity)?);
                }
            }
        }
    }
    Ok(drawings)
}

fn shots(known: &[(&Cell, &CellRecord)], place: Place<'_>) -> Vec<usize> {
    let mut shots: Vec<usize> = known
        .iter()
        .filter(|(cell, _)| cell.scenario == place.scenario)
        .flat_map(|(cell, _)| &cell.wanted)
        .filter(|wanted| wanted.domain == place.domain && wanted.part == place.part)
        .map(|wanted| wanted.shot)
        .collect();
    shots.sort_unstable();
    shots.dedup();
    shots
}

fn quantities(sweep: &Point) -> Vec<Quantity> {
    let trained = |name: &str, label: &str, of: fn(&CellRecord) -> Option<f64>| Quantity {
        name: name.into(),
        label: label.into(),
        of: Box::new(move |_, record| of(record)),
    };
    vec![
        Quantity {
            name: sweep.setting.replace('.', "-"),
            label: sweep.setting.clone(),
            of: Box::new(|cell, _| cell.variant.point.as_ref()?.value.parse().ok()),
        },
        trained("seconds", "seconds of training", |record| Some(record.seconds)),
        trained("queries", "queries", |record| Some(record.trained.as_ref()?.queries as f64)),
        trained("models", "models used", |record| {
            Some(record.trained.as_ref()?.models_used as f64)
        }),
    ]
}

fn drawing(
    known: &[(&Cell, &CellRecord)],
    place: Place<'_>,
    sweep: &Point,
    shot: usize,
    quantity: &Quantity,
) -> Result<Option<Drawing>> {
    let mut series: Vec<MeasuredSeries> = Vec::new();
    let mut drawn: Vec<&str> = Vec::new();
    for (cell, _) in known.iter().filter(|(cell, _)| cell.scenario == place.scenario) {
        let variant = &cell.variant;
        let own = variant.point.as_ref().is_some_and(|point| point.sweep == sweep.sweep);
        if !own || drawn.contains(&variant.name.as_str()) {
            continue;
        }
        drawn.push(&variant.name);
        let x = mean_of(known, place.scenario, &variant.name, |record| (quantity.of)(cell, record));
        let found = summarize(&accuracies(known, place, &variant.name, None, shot));
        let Some((x, summary)) = x.zip(found) else { continue };
        let point = Measurement {
            x,
            y: 100.0 * summary.mean,
            ci95: 100.0 * summary.over_seeds.unwrap_or(summary.over_episodes),
        };
        match series.iter_mut().find(|line| line.name == variant.method) {
            Some(line) => line.points.push(point),
            None => {
                series.push(MeasuredSeries { name: variant.method.clone(), points: vec![point] });
            }
        }
    }
    for line in &mut series {
        line.points.sort_by(|a, b| a.x.total_cmp(&b.x));
    }
    let values = || series.iter().flat_map(|line| line.points.iter().map(|point| point.x));
    let (low, high) = values()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
    if low < 0.0 || high <= 0.0 || high < LEAST_SPAN * low {
        return Ok(None);
    }
    let axis =
        if low > 0.0 && high >= LOGARITHMIC_SPAN * low { Axis::Logarithmic } else { Axis::Linear };
    let caption = format!(
        "{}: {shot}-shot accuracy on {} ({}) over {}",
        place.scenario,
        place.domain,
        place.part.name(),
        quantity.label
    );
    let svg = measured_plot(&quantity.label, &format!("{shot}-shot accuracy, %"), axis, &series)?;
    let file = format!(
        "{}-{}-{}-{shot}shot-{}-over-{}.svg",
        place.scenario,
        place.domain,
        place.part.name(),
        sweep.sweep,
        quantity.name
    );
    Ok(svg.map(|svg| Drawing { file, caption, svg }))
}
