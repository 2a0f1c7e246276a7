//! The sidecar: `NAME.yaml` beside `NAME.onnx`, what a user knows of a model and the file cannot say.
//!
//! Key names come from ONNX Hub (`model`, `model_sha`), timm (`input_size`, `mean`, `crop_pct`),
//! Hugging Face (`id2label`, `datasets`) and Triton (`max_batch_size`). Every key but
//! `schema_version` is optional; what is missing is inferred from the file and shown as inferred.
//! Unknown keys are refused: a misspelt `value_rang` that is silently ignored costs a training run.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use super::spec::{Color, ElementType, Layout, OutputKind};
use super::yaml;
use crate::error::{Error, Result, ResultExt};

/// The one version of the format.
pub const SCHEMA_VERSION: u32 = 1;

/// Largest sidecar read, in bytes: ImageNet-21k labels fit, a disk image does not.
pub const MAX_SIDECAR_BYTES: u64 = 2 << 20;

/// What a user says of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "metazoa sidecar")]
pub struct Sidecar {
    /// Version of this format; 1.
    #[schemars(range(min = 1, max = 1))]
    pub schema_version: u32,
    /// Name of the model for people; the file's stem when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The ONNX file, relative to the sidecar; the same stem with `.onnx` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_path: Option<String>,
    /// SHA-256 of the ONNX file, 64 hex digits; checked when given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[0-9a-fA-F]{64}$"))]
    pub model_sha: Option<String>,
    /// How the model may be reached; inferred when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access: Option<SidecarAccess>,
    /// From an image to the model's input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preprocess: Option<SidecarPreprocess>,
    /// What the class output holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_kind: Option<OutputKind>,
    /// Name of the output with the class scores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logits_output: Option<String>,
    /// Class labels by index, 0 to classes-1.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "labels")]
    #[schemars(schema_with = "labels_schema")]
    pub id2label: Option<BTreeMap<usize, String>>,
    /// Free words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// SPDX identifier of the weights' licence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub license: Option<String>,
    /// What the model was trained on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub datasets: Vec<String>,
    /// Measured figures by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
    /// A sentence for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Where a remote model is served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<Endpoint>,
    /// Largest batch a query may carry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_batch_size: Option<usize>,
    /// Queries (images asked) that may be spent on the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub query_budget: Option<u64>,
}

/// The two ways a user can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SidecarAccess {
    /// Exact gradients; refused when the graph cannot be compiled.
    WhiteBox,
    /// Queries only, even when the graph could be compiled.
    BlackBox,
}

/// Preprocessing as a user states it; names from timm.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SidecarPreprocess {
    /// `[channels, height, width]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_size: Option<[usize; 3]>,
    /// Axis order at the input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<Layout>,
    /// Element type at the input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<ElementType>,
    /// What black and white become before `mean` and `std`: `[0, 1]` or `[0, 255]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value_range: Option<[f32; 2]>,
    /// Channel order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub color: Option<Color>,
    /// Subtracted per channel, in units of `value_range`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean: Option<Vec<f32>>,
    /// Divided by per channel, in units of `value_range`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub std: Option<Vec<f32>>,
    /// How the model's images were resized.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interpolation: Option<Interpolation>,
    /// Share of the image kept by the crop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1))]
    pub crop_pct: Option<f32>,
    /// How the crop is taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crop_mode: Option<CropMode>,
}

/// Resampling filters, timm's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Interpolation {
    Nearest,
    Bilinear,
    Bicubic,
    Lanczos,
    Box,
    Hamming,
}

/// Crop modes, timm's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CropMode {
    /// Keep the aspect ratio, cut the middle.
    Center,
    /// Ignore the aspect ratio.
    Squash,
    /// Keep the aspect ratio, fill the border.
    Border,
}

/// Where a remote model is served.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// Wire protocol; `oip-v2` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// Base address (`http://127.0.0.1:8000`).
    pub url: String,
    /// Name at the server; `model` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_name: Option<String>,
    /// Version at the server; its default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_version: Option<String>,
    /// Seconds a request may take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<f64>,
    /// Environment variable that holds the token (`Bearer TOKEN`, or the token alone); never the secret
    /// itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header_env: Option<String>,
}

/// Protocols of remote models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Protocol {
    /// Open Inference Protocol v2 over HTTP (Triton, KServe, OpenVINO Model Server).
    #[serde(rename = "oip-v2")]
    OipV2,
}

impl Sidecar {
    /// Reads a sidecar from YAML text and checks its values; `file` is for messages.
    ///
    /// # Errors
    /// YAML errors with their line, unknown keys with the nearest name, values that cannot be.
    pub fn parse(text: &str, file: &Path) -> Result<Self> {
        let sidecar: Self = yaml::parse(text, file)?;
        sidecar.check().context(|| format!("`{}`", file.display()))?;
        Ok(sidecar)
    }

    /// The preprocessing block, empty when absent.
    pub fn preprocess(&self) -> SidecarPreprocess {
        self.preprocess.clone().unwrap_or_default()
    }

    /// What no model can satisfy, whatever its file says.
    fn check(&self) -> Result<()> {
        if self.schema_version != SCHEMA_VERSION {
            let error = format!(
                "`schema_version` is not known, expected `{SCHEMA_VERSION}`, found `{}`",
                self.schema_version
            );
            return Err(Error::input(error).hint(format!(
                "write `schema_version: {SCHEMA_VERSION}`, or use the metazoa that wrote the file"
            )));
        }
        if let Some(sha) = &self.model_sha
            && (sha.len() != 64 || !sha.bytes().all(|b| b.is_ascii_hexdigit()))
        {
            return Err(field("model_sha", "64 hex digits", sha));
        }
        if self.max_batch_size == Some(0) {
            return Err(field("max_batch_size", "at least 1", &0));
        }
        if let Some(labels) = &self.id2label {
            let contiguous = labels.keys().copied().eq(0..labels.len());
            if !contiguous || labels.is_empty() {
                let found = match (labels.keys().next(), labels.keys().next_back()) {
                    (Some(a), Some(b)) => format!("{} labels from {a} to {b}", labels.len()),
                    _ => "none".into(),
                };
                return Err(field("id2label", "a label for every class from 0", &found));
            }
        }
        if let Some(endpoint) = &self.endpoint {
            endpoint.check()?;
        }
        match &self.preprocess {
            Some(preprocess) => preprocess.check(),
            None => Ok(()),
        }
    }
}

/// Longest time a request may be given, seconds.
const MAX_TIMEOUT_S: f64 = 3600.0;

impl Endpoint {
    /// No message repeats a value that may be a secret in the wrong place.
    fn check(&self) -> Result<()> {
        let host = ["http://", "https://"].iter().find_map(|scheme| self.url.strip_prefix(scheme));
        let authority = host.and_then(|rest| rest.split('/').next()).unwrap_or_default();
        if authority.contains('@') {
            return Err(Error::input("`url` must not carry a name or password")
                .hint("put the token into an environment variable and name that in `header_env`"));
        }
        let odd = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '?' | '#');
        if authority.is_empty() || self.url.contains(odd) {
            return Err(field("url", "an address as `http://HOST:PORT`", &self.url));
        }
        if let Some(name) = &self.header_env {
            let start = name.chars().next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
            if !start || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
                return Err(Error::input(
                    "`header_env` must be the name of an environment variable",
                )
                .hint("export the token in a variable and give that variable's name"));
            }
            if name.starts_with("METAZOA_") {
                let expected = "a variable that is no setting (those begin with `METAZOA_`)";
                return Err(field("header_env", expected, name));
            }
        }
        if let Some(seconds) = self.timeout_s
            && !(seconds > 0.0 && seconds <= MAX_TIMEOUT_S)
        {
            let expected = format!("above 0, at most {MAX_TIMEOUT_S}");
            return Err(field("timeout_s", &expected, &seconds));
        }
        Ok(())
    }
}

impl SidecarPreprocess {
    fn check(&self) -> Result<()> {
        if let Some(size) = self.input_size {
            if !matches!(size[0], 1 | 3) {
                return Err(field("input_size", "1 or 3 channels first", &format!("{size:?}")));
            }
            if size[1..].iter().any(|&s| s == 0 || s > MAX_SIDE) {
                let expected = format!("height and width from 1 to {MAX_SIDE}");
                return Err(field("input_size", &expected, &format!("{size:?}")));
            }
        }
        if let Some([low, high]) = self.value_range
            && !(low.is_finite() && high.is_finite() && low < high)
        {
            return Err(field(
                "value_range",
                "[low, high], low < high",
                &format!("[{low}, {high}]"),
            ));
        }
        for (name, values) in [("mean", &self.mean), ("std", &self.std)] {
            let Some(values) = values else { continue };
            let finite = values.iter().all(|v| v.is_finite() && (name == "mean" || *v > 0.0));
            if !finite || !matches!(values.len(), 1 | 3) {
                let expected = if name == "mean" {
                    "one number a channel"
                } else {
                    "one number a channel, each above 0"
                };
                return Err(field(name, expected, &format!("{values:?}")));
            }
        }
        if let Some(share) = self.crop_pct
            && !(share > 0.0 && share <= 1.0)
        {
            return Err(field("crop_pct", "above 0, at most 1", &share));
        }
        Ok(())
    }
}

/// Largest image side accepted, in pixels.
pub const MAX_SIDE: usize = 4096;

fn field(name: &str, expected: &str, found: &dyn fmt::Display) -> Error {
    Error::input(format!("`{name}` must be {expected}, found `{found}`"))
}

/// A label may be written as a number (`0: 7` for MNIST) and an index as a text (`"0": cat`, as in
/// JSON); a class named twice is refused, since YAML readers would silently keep the last.
fn labels<'de, D>(deserializer: D) -> Result<Option<BTreeMap<usize, String>>, D::Error>
where
    D: Deserializer<'de>,
{
    struct Labels;

    impl<'de> serde::de::Visitor<'de> for Labels {
        type Value = Option<BTreeMap<usize, String>>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a mapping from class index to label (`0: cat`)")
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_map<A>(self, mut map: A) -> Result<Self::Value, A::Error>
        where
            A: serde::de::MapAccess<'de>,
        {
            use serde::de::Error as _;
            let mut labels = BTreeMap::new();
            while let Some((Scalar(key), Scalar(label))) = map.next_entry()? {
                let index: usize = key.parse().map_err(|_| {
                    A::Error::custom(format!("class index must be 0 or more: `{key}`"))
                })?;
                if labels.insert(index, label).is_some() {
                    return Err(A::Error::custom(format!("class given twice: `{index}`")));
                }
            }
            Ok(Some(labels))
        }
    }

    deserializer.deserialize_any(Labels)
}

/// A YAML scalar as text.
struct Scalar(String);

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Any {
            Integer(i64),
            Float(f64),
            Boolean(bool),
            Text(String),
        }
        Ok(Self(match Any::deserialize(deserializer)? {
            Any::Integer(v) => v.to_string(),
            Any::Float(v) => v.to_string(),
            Any::Boolean(v) => v.to_string(),
            Any::Text(v) => v,
        }))
    }
}

fn labels_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({
        "type": ["object", "null"],
        "propertyNames": { "pattern": "^[0-9]+$" },
        "additionalProperties": { "type": ["string", "number", "boolean"] }
    })
}

#[cfg(test)]
#[path = "sidecar_tests.rs"]
mod tests;
