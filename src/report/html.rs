//! `report.html`: one file that shows what a run did, readable offline for ever.
//!
//! No script, no link outside: pictures are base64, curves inline SVG. Everything that came from
//! files or the user is escaped.

use std::collections::BTreeMap;
use std::fmt::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

const STYLE: &str = include_str!("report.css");

/// A row of the accuracy table.
#[derive(Debug, Clone, PartialEq)]
pub struct AccuracyRow {
    /// "metazoa", "pixel-nearest", ...
    pub name: String,
    /// One cell an evaluation, in order of [`ReportData::evaluations`]: accuracy and interval, 0..1.
    pub cells: Vec<Option<(f64, f64)>>,
}

/// A model in the table of models.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelRow {
    /// Its id.
    pub id: String,
    /// `white-box`, `black-box`, ... or `rejected`.
    pub status: String,
    /// Number of classes, where known.
    pub classes: Option<usize>,
    /// Further figures, or the reason and hint of a rejection.
    pub detail: String,
    /// SHA-256, where known.
    pub sha: String,
}

/// A picture with its caption.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// Shown below.
    pub caption: String,
    /// The picture.
    pub content: FigureContent,
}

/// What a figure shows.
#[derive(Debug, Clone, PartialEq)]
pub enum FigureContent {
    /// PNG bytes.
    Png(Vec<u8>),
    /// SVG text made by [`super::line_plot`].
    Svg(String),
}

/// Everything the report shows.
#[derive(Debug, Clone, PartialEq)]
pub struct ReportData {
    /// Heading.
    pub title: String,
    /// A line of key figures below it: name and value.
    pub summary: Vec<(String, String)>,
    /// Heads of the accuracy table's columns ("5-way 1-shot, meta_test").
    pub evaluations: Vec<String>,
    /// Its rows, the trained model first.
    pub accuracies: Vec<AccuracyRow>,
    /// Remarks below it, one a paragraph.
    pub remarks: Vec<String>,
    /// Sheets and curves.
    pub figures: Vec<Figure>,
    /// Models, the rejected ones last.
    pub models: Vec<ModelRow>,
    /// The settings as YAML.
    pub config: String,
    /// Library and version.
    pub versions: BTreeMap<String, String>,
    /// Commands that make the same run again.
    pub commands: Vec<String>,
}

/// The page.
pub fn render(data: &ReportData) -> String {
    let mut page = String::new();
    // Writing to a `String` cannot fail.
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta name=\"color-scheme\" content=\"light dark\">\
         <title>{title}</title>\n<style>\n{STYLE}</style></head>\n<body><main>\n<h1>{title}</h1>\n",
        title = escape(&data.title)
    );
    summary(&mut page, &data.summary);
    accuracy_table(&mut page, data);
    figures(&mut page, &data.figures);
    model_table(&mut page, &data.models);
    page.push_str("<h2>Make it again</h2>\n");
    preformatted(&mut page, &data.commands.join("\n"));
    let _ = writeln!(page, "<details><summary>Settings</summary>");
    preformatted(&mut page, &data.config);
    page.push_str("</details>\n<p class=\"quiet\">");
    let versions: Vec<String> =
        data.versions.iter().map(|(name, version)| escape(&format!("{name} {version}"))).collect();
    page.push_str(&versions.join(" &middot; "));
    page.push_str("</p>\n</main></body></html>\n");
    page
}

fn summary(page: &mut String, items: &[(String, String)]) {
    page.push_str("<dl class=\"summary\">");
    for (name, value) in items {
        let _ = write!(page, "<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(value));
    }
    page.push_str("</dl>\n");
}

fn accuracy_table(page: &mut String, data: &ReportData) {
    page.push_str("<h2>Few-shot accuracy</h2>\n");
    if data.evaluations.is_empty() {
        page.push_str("<p>Not evaluated yet: <code>metazoa eval RUN --data DIR</code></p>\n");
        return;
    }
    page.push_str("<div class=\"scroll\"><table class=\"accuracy\"><thead><tr><th></th>");
    for evaluation in &data.evaluations {
        let _ = write!(page, "<th class=\"number\">{}</th>", escape(evaluation));
    }
    page.push_str("</tr></thead><tbody>\n");
    for (index, row) in data.accuracies.iter().enumerate() {
        let class = if index == 0 { " class=\"ours\"" } else { "" };
        let _ = write!(page, "<tr{class}><th>{}</th>", escape(&row.name));
        for cell in &row.cells {
            match cell {
                Some((accuracy, ci)) => {
                    let interval = if *ci > 0.0 {
                        format!(" <small>&plusmn; {:.1}</small>", 100.0 * ci)
                    } else {
                        String::new()
                    };
                    let _ = write!(
                        page,
                        "<td class=\"number\">{:.1}{interval}\
                         <span class=\"bar\" style=\"--share:{:.1}%\"></span></td>",
                        100.0 * accuracy,
                        100.0 * accuracy.clamp(0.0, 1.0)
                    );
                }
                None => page.push_str("<td class=\"number\">&ndash;</td>"),
            }
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody></table></div>\n");
    for remark in &data.remarks {
        let _ = writeln!(page, "<p class=\"quiet\">{}</p>", escape(remark));
    }
}

fn figures(page: &mut String, figures: &[Figure]) {
    page.push_str("<div class=\"figures\">\n");
    for figure in figures {
        let class = match figure.content {
            FigureContent::Png(_) => " class=\"wide\"",
            FigureContent::Svg(_) => "",
        };
        let _ = write!(page, "<figure{class}>");
        match &figure.content {
            FigureContent::Png(bytes) => {
                let caption = escape(&figure.caption);
                let data = STANDARD.encode(bytes);
                let _ = write!(
                    page,
                    "<div class=\"scroll\"><img class=\"sheet\" alt=\"{caption}\" \
                     src=\"data:image/png;base64,{data}\"></div>"
                );
            }
            FigureContent::Svg(svg) => page.push_str(svg),
        }
        let _ = writeln!(page, "<figcaption>{}</figcaption></figure>", escape(&figure.caption));
    }
    page.push_str("</div>\n");
}

fn model_table(page: &mut String, models: &[ModelRow]) {
    let _ = writeln!(page, "<h2>Models ({})</h2>", models.len());
    page.push_str(
        "<div class=\"scroll\"><table><thead><tr><th>model</th><th>access</th>\
         <th class=\"number\">classes</th><th></th><th>SHA-256</th></tr></thead><tbody>\n",
    );
    for model in models {
        let class = if model.status == "rejected" { " class=\"rejected\"" } else { "" };
        let classes = model.classes.map_or_else(String::new, |n| n.to_string());
        let _ = writeln!(
            page,
            "<tr{class}><td>{}</td><td class=\"tight\">{}</td><td class=\"number\">{classes}</td><td>{}</td>\
             <td><code title=\"{}\">{}</code></td></tr>",
            escape(&model.id),
            escape(&model.status),
            escape(&model.detail),
            escape(&model.sha),
            escape(&model.sha.chars().take(12).collect::<String>()),
        );
    }
    page.push_str("</tbody></table></div>\n");
}

fn preformatted(page: &mut String, text: &str) {
    let _ = writeln!(page, "<pre>{}</pre>", escape(text));
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}
