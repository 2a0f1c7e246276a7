//! Line plots as SVG text, drawn without system fonts.
//!
//! Colours of text and grid are fixed values that the report's style sheet overrides, so that one
//! SVG serves light and dark pages.

use plotters::prelude::*;

use crate::error::{Error, Result};

/// Points drawn per line at most; longer series are thinned by averaging neighbours.
const MOST_POINTS: usize = 400;
/// Colours of the lines, readable on white and on near-black.
const COLORS: [RGBColor; 6] = [
    RGBColor(0x2f, 0x7e, 0xd8),
    RGBColor(0xe0, 0x7b, 0x39),
    RGBColor(0x3b, 0xa2, 0x72),
    RGBColor(0xc0, 0x50, 0x9a),
    RGBColor(0x8c, 0x7a, 0xd6),
    RGBColor(0xb0, 0x8d, 0x2f),
];
/// Grid and axes; the style sheet matches this value.
const GRID: RGBColor = RGBColor(0xcc, 0xcc, 0xcc);

/// One line.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// Shown in the legend.
    pub name: String,
    /// (x, y), by x.
    pub points: Vec<(f64, f64)>,
}

/// How an axis is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// Evenly.
    Linear,
    /// By powers of ten; all its values must be positive.
    Logarithmic,
}

/// One measured point.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measurement {
    /// Where it stands.
    pub x: f64,
    /// What was measured.
    pub y: f64,
    /// Half width of its interval, drawn as a bar.
    pub ci95: f64,
}

/// Measured points, joined by a line.
#[derive(Debug, Clone, PartialEq)]
pub struct MeasuredSeries {
    /// Shown in the legend.
    pub name: String,
    /// The points by x.
    pub points: Vec<Measurement>,
}

/// An SVG of few points, each drawn with its interval. `None` when no point is finite.
///
/// # Errors
/// When the plot cannot be drawn.
pub fn measured_plot(
    x_label: &str,
    y_label: &str,
    axis: Axis,
    series: &[MeasuredSeries],
) -> Result<Option<String>> {
    let place = |x: f64| if axis == Axis::Logarithmic { x.log10() } else { x };
    let mut drawn: Vec<(&str, Vec<Measurement>)> = Vec::new();
    for line in series {
        let points = line.points.iter().map(|point| Measurement { x: place(point.x), ..*point });
        let finite = |p: &Measurement| [p.x, p.y, p.ci95].iter().all(|value| value.is_finite());
        drawn.push((&line.name, points.filter(finite).collect()));
    }
    let all = || drawn.iter().flat_map(|(_, points)| points);
    let ends = all().flat_map(|point| [point.y - point.ci95, point.y + point.ci95]);
    let Some((x_range, y_range)) = range(all().map(|p| p.x)).zip(range(ends)) else {
        return Ok(None);
    };
    let mut svg = String::new();
    draw_measured(&mut svg, [x_label, y_label], axis, &drawn, pad(x_range), pad(y_range))
        .map_err(|error| Error::internal(format!("cannot draw `{y_label}`: `{error}`")))?;
    Ok(Some(svg))
}

fn draw_measured(
    svg: &mut String,
    [x_label, y_label]: [&str; 2],
    axis: Axis,
    series: &[(&str, Vec<Measurement>)],
    x_range: (f64, f64),
    y_range: (f64, f64),
) -> Result<(), DrawError> {
    let area = SVGBackend::with_string(svg, (640, 360)).into_drawing_area();
    // A file of its own, not a part of a page that sets colours.
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(x_range.0..x_range.1, y_range.0..y_range.1)?;
    let named = |x: &f64| match axis {
        Axis::Linear => short(*x),
        Axis::Logarithmic => rounded(10f64.powf(*x)),
    };
    chart
        .configure_mesh()
        .x_desc(x_label)
        .y_desc(y_label)
        .x_labels(7)
        .y_labels(6)
        .x_label_formatter(&named)
        .y_label_formatter(&|y| short(*y))
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(GRID)
        .label_style(("sans-serif", 13))
        .draw()?;
    for ((name, points), color) in series.iter().zip(COLORS.iter().cycle()) {
        let color = *color;
        let places = points.iter().map(|point| (point.x, point.y));
        chart
            .draw_series(LineSeries::new(places.clone(), color.stroke_width(2)))?
            .label(*name)
            .legend(move |(x, y)| {
                PathElement::new(vec![(x, y), (x + 16, y)], color.stroke_width(2))
            });
        chart.draw_series(places.map(|place| Circle::new(place, 3, color.filled())))?;
        chart.draw_series(points.iter().map(|point| {
            let bar = vec![(point.x, point.y - point.ci95), (point.x, point.y + point.ci95)];
            PathElement::new(bar, color.stroke_width(1))
        }))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .label_font(("sans-serif", 13))
        .draw()?;
    area.present()?;
    Ok(())
}

/// Two digits of a large or small number: 31623 as "3.2e4".
fn rounded(value: f64) -> String {
    if (0.1..10_000.0).contains(&value) {
        short((value * 10.0).round() / 10.0)
    } else {
        format!("{value:.1e}")
    }
}

/// An SVG with every series; points that are not finite are left out. `None` when nothing is left.
///
/// # Errors
/// When the plot cannot be drawn.
pub fn line_plot(x_label: &str, y_label: &str, series: &[Series]) -> Result<Option<String>> {
    let thinned: Vec<(&str, Vec<(f64, f64)>)> =
        series.iter().map(|line| (line.name.as_str(), thin(&line.points))).collect();
    let all = || thinned.iter().flat_map(|(_, points)| points.iter().copied());
    let Some((x_range, y_range)) = range(all().map(|p| p.0)).zip(range(all().map(|p| p.1))) else {
        return Ok(None);
    };
    let mut svg = String::new();
    draw(&mut svg, [x_label, y_label], &thinned, x_range, pad(y_range))
        .map_err(|error| Error::internal(format!("cannot draw `{y_label}`: `{error}`")))?;
    Ok(Some(svg))
}

type DrawError = Box<dyn std::error::Error>;

fn draw(
    svg: &mut String,
    [x_label, y_label]: [&str; 2],
    series: &[(&str, Vec<(f64, f64)>)],
    x_range: (f64, f64),
    y_range: (f64, f64),
) -> Result<(), DrawError> {
    let area = SVGBackend::with_string(svg, (640, 300)).into_drawing_area();
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(x_range.0..x_range.1, y_range.0..y_range.1)?;
    chart
        .configure_mesh()
        .x_desc(x_label)
        .y_desc(y_label)
        .x_labels(7)
        .y_labels(6)
        .x_label_formatter(&|x| short(*x))
        .y_label_formatter(&|y| short(*y))
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(GRID)
        .label_style(("sans-serif", 13))
        .draw()?;
    for ((name, points), color) in series.iter().zip(COLORS.iter().cycle()) {
        let line = LineSeries::new(points.iter().copied(), color.stroke_width(2));
        let color = *color;
        chart.draw_series(line)?.label(*name).legend(move |(x, y)| {
            PathElement::new(vec![(x, y), (x + 16, y)], color.stroke_width(2))
        });
    }
    if series.len() > 1 {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .label_font(("sans-serif", 13))
            .draw()?;
    }
    area.present()?;
    Ok(())
}

/// Finite points, neighbours averaged until at most [`MOST_POINTS`] are left.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> =
        points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
    let group = finite.len().div_ceil(MOST_POINTS).max(1);
    let mean = |chunk: &[(f64, f64)]| {
        let n = chunk.len() as f64;
        let sum = chunk.iter().fold((0.0, 0.0), |sum, p| (sum.0 + p.0, sum.1 + p.1));
        (sum.0 / n, sum.1 / n)
    };
    finite.chunks(group).map(mean).collect()
}

fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let (low, high) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    (low <= high).then_some(if low == high { (low - 0.5, high + 0.5) } else { (low, high) })
}

fn pad((low, high): (f64, f64)) -> (f64, f64) {
    let margin = 0.05 * (high - low);
    (low - margin, high + margin)
}

/// A short label: 1500 as "1500", 0.25 as "0.25", 0.00001 as "1e-5".
fn short(value: f64) -> String {
    if value != 0.0 && !(1e-3..1e6).contains(&value.abs()) {
        return format!("{value:.1e}");
    }
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
