//! What `ingest` shows: the `--json` object, the table of all models, the sheet of one model.

use std::fmt::Write as _;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ingest::Ingest;
use crate::zoo::catalog::{CatalogModel, Provenance};
use crate::zoo::{Access, BatchDimension};

/// The object `metazoa ingest --json` prints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "metazoa ingest --json")]
pub struct IngestOutput {
    /// Every file, by path.
    pub models: Vec<IngestRow>,
    /// Number of accepted models.
    pub accepted: usize,
    /// Number of rejected files.
    pub rejected: usize,
    /// Wall time.
    pub seconds: f64,
}

/// One file of the zoo.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct IngestRow {
    /// The file, relative to the zoo.
    pub path: String,
    /// Path without extension; null when rejected.
    pub id: Option<String>,
    /// Whether it can be used.
    pub status: Status,
    /// How it is reached; null when rejected.
    pub access: Option<Access>,
    /// Number of classes; null when rejected.
    pub classes: Option<usize>,
    /// `[channels, height, width]`; null when rejected.
    pub input: Option<[usize; 3]>,
    /// Normalisation layers with running statistics; null when rejected.
    pub norm_taps: Option<usize>,
    /// Operators without a gradient; null when rejected.
    pub unsupported_ops: Option<Vec<String>>,
    /// Why it is rejected; null when accepted.
    pub reason: Option<String>,
    /// What to do about it; null when accepted.
    pub hint: Option<String>,
    /// Values that the sidecar does not give, by key, and where they come from; empty when rejected.
    pub inferred: std::collections::BTreeMap<String, Provenance>,
    /// What the user should know; empty when rejected.
    pub notes: Vec<String>,
}

/// Whether a file can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It can.
    Accepted,
    /// It cannot.
    Rejected,
}

/// The `--json` object.
pub fn output(ingest: &Ingest) -> IngestOutput {
    let accepted = ingest.models.iter().map(|model| IngestRow {
        path: relative(ingest, model),
        id: Some(model.spec.id.clone()),
        status: Status::Accepted,
        access: Some(model.spec.access),
        classes: Some(model.spec.classes),
        input: Some(model.spec.preprocess.input_size),
        norm_taps: Some(model.spec.norm_taps),
        unsupported_ops: Some(model.spec.unsupported_ops.clone()),
        reason: None,
        hint: None,
        inferred: model
            .provenance
            .iter()
            .filter(|(_, provenance)| **provenance != Provenance::Sidecar)
            .map(|(key, provenance)| (key.clone(), *provenance))
            .collect(),
        notes: model.notes.clone(),
    });
    let rejected = ingest.rejected.iter().map(|rejection| IngestRow {
        path: rejection.path.clone(),
        id: None,
        status: Status::Rejected,
        access: None,
        classes: None,
        input: None,
        norm_taps: None,
        unsupported_ops: None,
        reason: Some(rejection.reason.clone()),
        hint: rejection.hint.clone(),
        inferred: std::collections::BTreeMap::new(),
        notes: Vec::new(),
    });
    let mut models: Vec<IngestRow> = accepted.chain(rejected).collect();
    models.sort_by(|a, b| a.path.cmp(&b.path));
    IngestOutput {
        models,
        accepted: ingest.models.len(),
        rejected: ingest.rejected.len(),
        seconds: ingest.seconds,
    }
}

fn relative(ingest: &Ingest, model: &CatalogModel) -> String {
    let path = model.spec.path.strip_prefix(&ingest.zoo).unwrap_or(&model.spec.path);
    path.to_string_lossy().replace('\\', "/")
}

/// The table of a zoo: a row a model, then the rejected files with reason and hint, then the notes
/// (alike ones once).
pub fn table(ingest: &Ingest) -> String {
    let mut rows = vec![
        ["model", "access", "input", "classes", "output", "norm layers", "unsupported"]
            .map(ToOwned::to_owned),
    ];
    rows.extend(ingest.models.iter().map(row));
    let mut text = String::new();
    if !ingest.models.is_empty() {
        text.push_str(&columns(&rows));
        if ingest.models.iter().any(|model| !unsaid(model).is_empty()) {
            text.push_str("~ not in a sidecar, read or inferred from the file; ? nobody said it, the usual value\n");
        }
    }
    for rejection in &ingest.rejected {
        let _ = writeln!(text, "rejected {}: {}", rejection.path, rejection.reason);
        if let Some(hint) = &rejection.hint {
            let _ = writeln!(text, "  hint: {hint}");
        }
    }
    let mut notes: std::collections::BTreeMap<&str, Vec<&str>> = std::collections::BTreeMap::new();
    for model in &ingest.models {
        for note in &model.notes {
            notes.entry(note).or_default().push(&model.spec.id);
        }
    }
    for (note, ids) in notes {
        let who = match ids.as_slice() {
            [one] => (*one).to_owned(),
            [first, .., last] => format!("{} models ({first} .. {last})", ids.len()),
            [] => continue,
        };
        let _ = writeln!(text, "note {who}: {note}");
    }
    let _ = writeln!(text, "{} accepted, {} rejected", ingest.models.len(), ingest.rejected.len());
    text
}

/// Keys of a model that no sidecar gives.
fn unsaid(model: &CatalogModel) -> Vec<&str> {
    let unsaid = model.provenance.iter().filter(|(key, provenance)| {
        **provenance != Provenance::Sidecar && key.starts_with("preprocess.")
    });
    unsaid.map(|(key, _)| key.as_str()).filter(|key| *key != "preprocess.crop_pct").collect()
}

fn row(model: &CatalogModel) -> [String; 7] {
    let spec = &model.spec;
    let mark = |key: &str| match model.provenance.get(key) {
        Some(Provenance::Default) => "?",
        Some(Provenance::File | Provenance::Inferred) => "~",
        _ => "",
    };
    let [channels, height, width] = spec.preprocess.input_size;
    let preprocess = &spec.preprocess;
    let [low, high] = preprocess.value_range;
    let input = format!(
        "{channels}x{height}x{width}{} {}{} {}{} {low}..{high}{} {}{} batch {}",
        mark("preprocess.input_size"),
        word(&preprocess.layout),
        mark("preprocess.layout"),
        word(&preprocess.dtype),
        mark("preprocess.dtype"),
        mark("preprocess.value_range"),
        word(&preprocess.color),
        mark("preprocess.color"),
        batch(spec.batch),
    );
    let output = format!(
        "{}{} {}{}",
        spec.logits_output,
        mark("logits_output"),
        word(&spec.output_kind),
        mark("output_kind")
    );
    let unsupported = if spec.unsupported_ops.is_empty() {
        "-".to_owned()
    } else {
        spec.unsupported_ops.join(",")
    };
    [
        spec.id.clone(),
        format!("{}{}", word(&spec.access), mark("access")),
        input,
        spec.classes.to_string(),
        output,
        spec.norm_taps.to_string(),
        unsupported,
    ]
}

fn batch(batch: BatchDimension) -> String {
    match batch {
        BatchDimension::Free => "free".into(),
        BatchDimension::Fixed(n) => n.to_string(),
    }
}

/// An enum value as the sidecar writes it.
fn word<T: Serialize>(value: &T) -> String {
    serde_json::to_value(value)
        .ok()
        .and_then(|v| v.as_str().map(ToOwned::to_owned))
        .unwrap_or_default()
}

/// Left-aligned columns, two spaces apart.
fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let width =
        |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in rows {
        let line: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Everything known of one model, a line a value with its source.
pub fn sheet(model: &CatalogModel) -> String {
    let spec = &model.spec;
    let preprocess = &spec.preprocess;
    let [channels, height, width] = preprocess.input_size;
    let values = [
        ("access", word(&spec.access)),
        ("input_name", spec.input_name.clone()),
        ("preprocess.input_size", format!("[{channels}, {height}, {width}]")),
        ("preprocess.layout", word(&preprocess.layout)),
        ("preprocess.dtype", word(&preprocess.dtype)),
        ("preprocess.value_range", format!("{:?}", preprocess.value_range)),
        ("preprocess.color", word(&preprocess.color)),
        ("preprocess.mean", format!("{:?}", preprocess.mean)),
        ("preprocess.std", format!("{:?}", preprocess.std)),
        ("preprocess.crop_pct", preprocess.crop_pct.to_string()),
        ("batch", batch(spec.batch)),
        ("logits_output", spec.logits_output.clone()),
        ("output_kind", word(&spec.output_kind)),
        ("classes", spec.classes.to_string()),
        ("labels", spec.labels.join(", ")),
    ];
    let mut rows = Vec::new();
    for (key, value) in values {
        let source = model.provenance.get(key).map(word).unwrap_or_default();
        if !value.is_empty() {
            rows.push([key.to_owned(), value, source]);
        }
    }
    let ops: Vec<String> = model.ops.iter().map(|(op, count)| format!("{op} {count}")).collect();
    rows.push(["norm layers".into(), spec.norm_taps.to_string(), String::new()]);
    rows.push(["operators".into(), ops.join(", "), String::new()]);
    rows.push(["unsupported".into(), spec.unsupported_ops.join(", "), String::new()]);
    rows.push([
        "opset".into(),
        format!("{} (IR {})", model.opset, model.ir_version),
        String::new(),
    ]);
    rows.push(["producer".into(), model.producer.clone(), String::new()]);
    rows.push(["bytes".into(), model.bytes.to_string(), String::new()]);
    rows.push(["sha-256".into(), spec.sha.clone(), String::new()]);
    rows.retain(|[_, value, _]| !value.is_empty());
    // Long values must not push the sources off the screen: they carry none and wrap by themselves.
    let (short, long): (Vec<_>, Vec<_>) =
        rows.into_iter().partition(|[_, value, _]| value.chars().count() <= 48);
    let mut text = format!("{}\n", spec.id);
    text.push_str(&columns(&short));
    for [key, value, source] in long {
        let source = if source.is_empty() { source } else { format!(" ({source})") };
        let _ = writeln!(text, "{key}{source}: {value}");
    }
    for note in &model.notes {
        let _ = writeln!(text, "note: {note}");
    }
    text
}
