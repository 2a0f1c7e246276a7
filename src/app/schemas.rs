//! The JSON schemas of everything serialized, made from the Rust types.
//!
//! The files under `schemas/` are these; a test holds them current (`UPDATE_SCHEMAS=1` rewrites).

use schemars::{JsonSchema, Schema, generate::SchemaSettings};

use super::adapt::AdaptResult;
use super::bench::{BenchResult, Row, Suite};
use super::config::RunConfig;
use super::doctor::Diagnosis;
use super::eval::EvalResult;
use super::export::ExportResult;
use super::ingest_output::IngestOutput;
use super::inspect::InspectResult;
use super::invert::InvertResult;
use super::run::RunResult;
use super::run_folder::RunRecord;
use super::setup::SetupResult;
use super::train::TrainResult;
use crate::error::{Error, Result};
use crate::report::Event;
use crate::zoo::Sidecar;
use crate::zoo::catalog::Catalog;

/// Every schema with its name; the file is `schemas/NAME.schema.json`.
pub fn all() -> Vec<(&'static str, Schema)> {
    vec![
        ("adapt", schema_of_written::<AdaptResult>()),
        ("bench", schema_of_written::<BenchResult>()),
        ("bench-row", schema_of_written::<Row>()),
        ("catalog", schema_of_written::<Catalog>()),
        ("config", schema_of::<RunConfig>()),
        ("doctor", schema_of_written::<Diagnosis>()),
        ("eval", schema_of_written::<EvalResult>()),
        ("event", schema_of::<Event>()),
        ("export", schema_of_written::<ExportResult>()),
        ("ingest", schema_of_written::<IngestOutput>()),
        ("inspect", schema_of_written::<InspectResult>()),
        ("invert", schema_of_written::<InvertResult>()),
        ("main-job", schema_of_written::<RunResult>()),
        ("run", schema_of_written::<RunRecord>()),
        ("setup", schema_of_written::<SetupResult>()),
        ("sidecar", schema_of::<Sidecar>()),
        ("suite", schema_of::<Suite>()),
        ("train", schema_of_written::<TrainResult>()),
    ]
}

/// What a user may write: keys with a default may be missing.
fn schema_of<T: JsonSchema>() -> Schema {
    SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<T>()
}

/// What metazoa writes: every key that is always there is required.
fn schema_of_written<T: JsonSchema>() -> Schema {
    SchemaSettings::draft2020_12().for_serialize().into_generator().into_root_schema_for::<T>()
}

/// The schema as the text of its file.
///
/// # Errors
/// Never for a schema made by [`all`].
pub fn to_text(schema: &Schema) -> Result<String> {
    serde_json::to_string_pretty(schema)
        .map(|text| text + "\n")
        .map_err(|error| Error::internal(format!("cannot print a schema: `{error}`")))
}
