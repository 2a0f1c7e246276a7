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
