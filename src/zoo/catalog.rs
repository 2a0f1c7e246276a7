//! `catalog.json`: what ingest learnt of a zoo, for people, scripts and the next run.
//!
//! The bytes depend on the models alone: no times, no absolute paths, models by id. The file is
//! written beside its final name and renamed, so a reader sees the old catalog or the new one.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::spec::{ModelSpec, Rejection};
use crate::error::{Error, Result};

/// Name of the file in the zoo's folder.
pub const FILE_NAME: &str = "catalog.json";

/// The one version of the format.
pub const SCHEMA_VERSION: u32 = 1;

/// Where a value of a [`ModelSpec`] comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Provenance {
    /// The user said so.
    Sidecar,
    /// The file declares it.
    File,
    /// Concluded from the file's operators and constants.
    Inferred,
    /// Nobody said it; the usual value.
    Default,
}

/// An accepted model: its spec, where each part of it comes from, and what else is worth knowing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CatalogModel {
    /// What the rest of the crate needs.
    #[serde(flatten)]
    pub spec: ModelSpec,
    /// Name for people, from the sidecar.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Source of each value, by key (`preprocess.mean`).
    pub provenance: BTreeMap<String, Provenance>,
    /// What the user should know, a sentence each.
    pub notes: Vec<String>,
    /// How often each operator occurs.
    pub ops: BTreeMap<String, usize>,
    /// Version of the standard operator set.
    pub opset: i64,
    /// Version of the file format.
    pub ir_version: i64,
    /// Who wrote the file.
    pub producer: String,
    /// Bytes of the file and its external data.
    pub bytes: u64,
    /// Files with weights beside the model, relative to the zoo.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub external_files: Vec<String>,
    /// Tags, from the sidecar.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// What it was trained on, from the sidecar.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub datasets: Vec<String>,
    /// Licence, from the sidecar.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub license: Option<String>,
}

/// The catalog of a zoo.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "metazoa catalog")]
pub struct Catalog {
    /// Version of this format; 1.
    pub schema_version: u32,
    /// Accepted models by id; paths are relative to the zoo.
    pub models: Vec<CatalogModel>,
    /// Rejected files by path.
    pub rejected: Vec<Rejection>,
}

impl Catalog {
    /// A catalog of what ingest found in the zoo at `root`.
    pub fn new(root: &Path, models: &[CatalogModel], rejected: &[Rejection]) -> Self {
        let mut models = models.to_vec();
        for model in &mut models {
            if let Ok(relative) = model.spec.path.strip_prefix(root) {
                model.spec.path = relative.to_path_buf();
            }
        }
        models.sort_by(|a, b| a.spec.id.cmp(&b.spec.id));
        Self { schema_version: SCHEMA_VERSION, models, rejected: rejected.to_vec() }
    }

    /// The file's bytes.
    ///
    /// # Errors
    /// When a value has no JSON form (a defect).
    pub fn to_json(&self) -> Result<String> {
        let mut text = serde_json::to_string_pretty(self)
            .map_err(|error| Error::internal(format!("catalog cannot be written: {error}")))?;
        text.push('\n');
        Ok(text)
    }

    /// Writes `zoo/catalog.json` in one step.
    ///
    /// # Errors
    /// When the zoo's folder cannot be written.
    pub fn write(&self, zoo: &Path) -> Result<()> {
        let path = zoo.join(FILE_NAME);
        let text = self.to_json()?;
        if std::fs::read(&path).is_ok_and(|old| old == text.as_bytes()) {
            return Ok(());
        }
        let failed = |error: std::io::Error| {
            Error::io(&path, &error).hint("make the zoo's folder writable; the catalog lives in it")
        };
        let mut file =
            tempfile::Builder::new().prefix(".catalog-").tempfile_in(zoo).map_err(failed)?;
        file.write_all(text.as_bytes()).map_err(failed)?;
        set_default_mode(file.as_file()).map_err(failed)?;
        file.persist(&path).map_err(|error| failed(error.error))?;
        Ok(())
    }

    /// Reads `zoo/catalog.json`; the models' paths lead below `zoo`.
    ///
    /// # Errors
    /// When it is not there or not a catalog.
    pub fn read(zoo: &Path) -> Result<Self> {
        let path = zoo.join(FILE_NAME);
        let text = std::fs::read_to_string(&path).map_err(|error| {
            Error::io(&path, &error).hint(format!("run `metazoa ingest {}`", zoo.display()))
        })?;
        let mut catalog: Self = serde_json::from_str(&text).map_err(|error| {
            Error::input(format!("not a catalog: {error}"))
                .context(format!("`{}`", path.display()))
                .hint(format!("run `metazoa ingest {}` again", zoo.display()))
        })?;
        for model in &mut catalog.models {
            model.spec.path = zoo.join(&model.spec.path);
        }
        Ok(catalog)
    }
}

/// Temporary files are private; a catalog is as public as the zoo.
#[cfg(unix)]
fn set_default_mode(file: &std::fs::File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    file.set_permissions(std::fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn set_default_mode(_: &std::fs::File) -> std::io::Result<()> {
    Ok(())
}
