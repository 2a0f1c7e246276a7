//! Merges a sidecar with the facts of its file into one [`ModelSpec`].
//!
//! The sidecar wins where the file is silent; where both speak they must agree, since a wrong class
//! count or input size found here costs a sentence and found later costs a run. Every value keeps
//! its source, so that a guess is never mistaken for knowledge.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use super::candidates::FoundSidecar;
use super::catalog::Provenance;
use super::facts::{InputFacts, OutputFacts, input::Normalised, output::Certainty};
use super::sidecar::{CropMode, Interpolation, Sidecar, SidecarPreprocess};
use super::spec::{
    Access, BatchDimension, Color, ElementType, Layout, ModelSpec, OutputKind, Preprocess,
};
use crate::error::{Error, Result};

/// Side assumed for files that accept any image size and have no sidecar, in pixels.
const DEFAULT_SIDE: usize = 224;

/// Key of the image size in [`Resolved::provenance`].
pub const SIZE_KEY: &str = "preprocess.input_size";

/// How the note on a file without an image size begins.
pub const OPEN_SIZE_NOTE: &str = "the file leaves the image size open";

/// A spec with the source of its values and what the user should know.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    /// The merged spec; its access is provisional until fitness is known.
    pub spec: ModelSpec,
    /// Source of each value by key.
    pub provenance: BTreeMap<String, Provenance>,
    /// Sentences for the user.
    pub notes: Vec<String>,
}

/// Who the model is, apart from its graph.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Path below the zoo without extension.
    pub id: String,
    /// Path to open.
    pub path: PathBuf,
    /// SHA-256 of the model file alone.
    pub file_sha: String,
    /// SHA-256 of the file and its external data.
    pub sha: String,
    /// Real paths of the external data.
    pub external_files: Vec<PathBuf>,
}

/// Merges. Access is set to white-box and `unsupported_ops`, `norm_taps`, `batch_dependent`,
/// `quantised` are left empty: [`super::read`] fills them once the graph has been compiled.
///
/// # Errors
/// When the sidecar contradicts the file.
pub fn resolve(
    identity: Identity,
    input: &InputFacts,
    output: &OutputFacts,
    sidecar: Option<&FoundSidecar>,
) -> Result<Resolved> {
    let mut merge = Merge {
        sidecar: sidecar.map(|found| found.relative.as_str()),
        provenance: BTreeMap::new(),
        notes: Vec::new(),
    };
    let said = sidecar.map(|found| &found.content);
    merge.check_sha(said, &identity)?;
    let block = said.map(Sidecar::preprocess).unwrap_or_default();
    let preprocess = merge.preprocess(&block, input)?;
    merge.found("input_name", Provenance::File);
    merge.found("batch", Provenance::File);

    let labels = said.and_then(|said| said.id2label.clone());
    if let Some(labels) = &labels
        && labels.len() != output.classes
    {
        let expected = format!("{} labels (output `{}`)", output.classes, output.name);
        return Err(merge.contradiction("id2label", &expected, &labels.len()));
    }
    merge.found("classes", Provenance::File);
    if labels.is_some() {
        merge.found("labels", Provenance::Sidecar);
    }
    let named = said.and_then(|said| said.logits_output.as_ref());
    merge.found(
        "logits_output",
        if named.is_some() { Provenance::Sidecar } else { Provenance::Inferred },
    );
    if !output.alternatives.is_empty() && named.is_none() {
        merge.notes.push(format!(
            "class scores are taken from output `{}`; `{}` would do as well: set `logits_output` to choose",
            output.name,
            output.alternatives.join("`, `")
        ));
    }
    let output_kind = merge.output_kind(said.and_then(|said| said.output_kind), output)?;

    let max_batch_size = said.and_then(|said| said.max_batch_size);
    if let (BatchDimension::Fixed(fixed), Some(most)) = (input.batch, max_batch_size)
        && most < fixed
    {
        return Err(merge.contradiction("max_batch_size", &format!("at least {fixed}"), &most));
    }
    let query_budget = said.and_then(|said| said.query_budget);
    for (key, given) in
        [("max_batch_size", max_batch_size.is_some()), ("query_budget", query_budget.is_some())]
    {
        if given {
            merge.found(key, Provenance::Sidecar);
        }
    }
    let spec = ModelSpec {
        id: identity.id,
        path: identity.path,
        sha: identity.sha,
        access: Access::WhiteBox,
        classes: output.classes,
        labels: labels.map(|labels| labels.into_values().collect()).unwrap_or_default(),
        preprocess,
        input_name: input.name.clone(),
        logits_output: output.name.clone(),
        output_kind,
        batch: input.batch,
        max_batch_size,
        query_budget,
        norm_taps: 0,
        unsupported_ops: Vec::new(),
        batch_dependent: false,
        quantised: false,
        external_files: identity.external_files,
        endpoint: None,
    };
    Ok(Resolved { spec, provenance: merge.provenance, notes: merge.notes })
}

/// The merge under way.
struct Merge<'a> {
    sidecar: Option<&'a str>,
    provenance: BTreeMap<String, Provenance>,
    notes: Vec<String>,
}

impl Merge<'_> {
    fn found(&mut self, key: &str, provenance: Provenance) {
        self.provenance.insert(key.into(), provenance);
    }

    /// The sidecar's value if it does not contradict the file's, else the file's.
    fn both<T: PartialEq + Serialize>(
        &mut self,
        key: &str,
        said: Option<T>,
        fact: Option<(T, Provenance)>,
    ) -> Result<Option<T>> {
        match (said, fact) {
            (Some(said), Some((fact, _))) if said != fact => {
                Err(self.contradiction(key, &shown(&fact), &shown(&said)))
            }
            (Some(said), _) => {
                self.found(key, Provenance::Sidecar);
                Ok(Some(said))
            }
            (None, Some((fact, provenance))) => {
                self.found(key, provenance);
                Ok(Some(fact))
            }
            (None, None) => {
                self.found(key, Provenance::Default);
                Ok(None)
            }
        }
    }

    fn contradiction(&self, key: &str, expected: &str, found: &dyn std::fmt::Display) -> Error {
        let name = self.sidecar.unwrap_or("the sidecar");
        Error::input(format!(
            "`{key}` of `{name}` contradicts the model, expected {expected}, found `{found}`"
        ))
        .hint(format!("correct `{key}` in `{name}`, or remove it: it is read from the model"))
    }

    fn check_sha(&self, said: Option<&Sidecar>, identity: &Identity) -> Result<()> {
        let Some(sha) = said.and_then(|said| said.model_sha.as_ref()) else { return Ok(()) };
        let same = |other: &String| other.eq_ignore_ascii_case(sha);
        if same(&identity.file_sha) || same(&identity.sha) {
            return Ok(());
        }
        Err(self.contradiction("model_sha", &identity.file_sha, sha).hint(
            "the file is not the one the sidecar was written for: fetch it again, or correct `model_sha`",
        ))
    }

    fn preprocess(&mut self, said: &SidecarPreprocess, input: &InputFacts) -> Result<Preprocess> {
        let layout = self.both(
            "preprocess.layout",
            said.layout,
            input.layout.map(|layout| (layout, Provenance::Inferred)),
        )?;
        let dtype =
            self.both("preprocess.dtype", said.dtype, Some((input.dtype, Provenance::File)))?;
        let input_size = self.input_size(said, input)?;
        let channels = input_size[0];
        let color = self.color(said.color, input, channels)?;
        let value_range = self.value_range(said, input)?;
        let dtype = dtype.unwrap_or(input.dtype);
        let mean = self.per_channel("mean", said.mean.as_deref(), channels, 0.0, input)?;
        let std = self.per_channel("std", said.std.as_deref(), channels, 1.0, input)?;
        if dtype == ElementType::Uint8
            && (mean.iter().any(|&v| v != 0.0) || std.iter().any(|&v| v != 1.0))
        {
            return Err(Error::input(
                "a uint8 input cannot be normalised outside the model, expected no `mean` and `std`, found `preprocess.mean` or `preprocess.std`",
            )
            .hint("remove `mean` and `std`, or correct `dtype`"));
        }
        let guessed = |this: &Self, key: &str| {
            this.provenance.get(&format!("preprocess.{key}")) == Some(&Provenance::Default)
        };
        if guessed(self, "mean") && guessed(self, "std") {
            self.notes.push(
                "normalisation unknown: values go in as they are; give `preprocess.mean` and `preprocess.std` in a sidecar if the model was trained with them".into(),
            );
        }
        if let Some(filter) = said.interpolation
            && filter != Interpolation::Bilinear
        {
            self.notes.push(format!(
                "images are resized bilinearly; the sidecar says `{}`",
                shown(&filter).trim_matches('"')
            ));
        }
        if let Some(mode) = said.crop_mode
            && mode != CropMode::Center
        {
            self.notes.push(format!(
                "images are cropped at the centre; the sidecar says `{}`",
                shown(&mode).trim_matches('"')
            ));
        }
        let crop = if said.crop_pct.is_some() { Provenance::Sidecar } else { Provenance::Default };
        self.found("preprocess.crop_pct", crop);
        Ok(Preprocess {
            input_size,
            layout: layout.unwrap_or(Layout::Nchw),
            dtype,
            value_range,
            color,
            mean,
            std,
            crop_pct: said.crop_pct.unwrap_or(1.0),
        })
    }

    fn input_size(&mut self, said: &SidecarPreprocess, input: &InputFacts) -> Result<[usize; 3]> {
        const KEY: &str = SIZE_KEY;
        let facts = [input.channels, input.height, input.width];
        if let Some(said) = said.input_size {
            let agrees = said.iter().zip(facts).all(|(&s, fact)| fact.is_none_or(|f| f == s));
            if !agrees {
                let sides: Vec<String> =
                    facts.iter().map(|f| f.map_or("any".into(), |f| f.to_string())).collect();
                let expected = format!("[{}]", sides.join(", "));
                return Err(self.contradiction(KEY, &expected, &format!("{said:?}")));
            }
            self.found(KEY, Provenance::Sidecar);
            return Ok(said);
        }
        let channels = input.channels.unwrap_or(match (said.color, &said.mean) {
            (Some(Color::Grey), _) => 1,
            (None, Some(mean)) => mean.len(),
            _ => 3,
        });
        if let (Some(height), Some(width)) = (input.height, input.width) {
            self.found(KEY, Provenance::File);
            return Ok([channels, height, width]);
        }
        self.found(KEY, Provenance::Default);
        let side = input.height.or(input.width).unwrap_or(DEFAULT_SIDE);
        self.notes.push(format!(
            "{OPEN_SIZE_NOTE}, {side} is assumed: give `preprocess.input_size` in a sidecar"
        ));
        Ok([channels, input.height.unwrap_or(side), input.width.unwrap_or(side)])
    }

    fn color(&mut self, said: Option<Color>, input: &InputFacts, channels: usize) -> Result<Color> {
        const KEY: &str = "preprocess.color";
        let grey = channels == 1;
        match said {
            Some(color) if (color == Color::Grey) != grey => {
                let expected =
                    if grey { "\"grey\" (1 channel)" } else { "rgb or bgr (3 channels)" };
                Err(self.contradiction(KEY, expected, &shown(&color).trim_matches('"')))
            }
            Some(color) => {
                self.found(KEY, Provenance::Sidecar);
                Ok(color)
            }
            None if grey => {
                self.found(KEY, Provenance::Inferred);
                Ok(Color::Grey)
            }
            None if input.color == Some(Color::Bgr) => {
                self.found(KEY, Provenance::Inferred);
                Ok(Color::Bgr)
            }
            None => {
                self.found(KEY, Provenance::Default);
                Ok(Color::Rgb)
            }
        }
    }

    /// uint8 settles the range; for floats the sidecar's word counts more than the arithmetic.
    fn value_range(&mut self, said: &SidecarPreprocess, input: &InputFacts) -> Result<[f32; 2]> {
        const KEY: &str = "preprocess.value_range";
        if input.dtype == ElementType::Uint8 {
            let range =
                self.both(KEY, said.value_range, Some(([0.0, 255.0], Provenance::Inferred)))?;
            return Ok(range.unwrap_or([0.0, 255.0]));
        }
        // A mean above 2 is one of bytes (ImageNet's 123.675), whatever the range key forgot.
        let by_mean = said.mean.as_ref().and_then(|mean| {
            let bytes = mean.iter().any(|&value| value > 2.0);
            bytes.then_some([0.0, 255.0])
        });
        let fact = input.value_range.or(by_mean).map(|range| (range, Provenance::Inferred));
        match said.value_range {
            Some(range) => self.both(KEY, Some(range), None),
            None => self.both(KEY, None, fact),
        }
        .map(|range| range.unwrap_or([0.0, 1.0]))
    }

    fn per_channel(
        &mut self,
        name: &str,
        said: Option<&[f32]>,
        channels: usize,
        neutral: f32,
        input: &InputFacts,
    ) -> Result<Vec<f32>> {
        let key = format!("preprocess.{name}");
        match said {
            None => {
                let inside = input.normalised_inside == Normalised::Inside
                    || input.dtype == ElementType::Uint8;
                self.found(&key, if inside { Provenance::Inferred } else { Provenance::Default });
                Ok(vec![neutral; channels])
            }
            Some([value]) => {
                self.found(&key, Provenance::Sidecar);
                Ok(vec![*value; channels])
            }
            Some(values) if values.len() == channels => {
                self.found(&key, Provenance::Sidecar);
                Ok(values.to_vec())
            }
            Some(values) => {
                Err(self.contradiction(&key, &format!("{channels} numbers"), &values.len()))
            }
        }
    }

    fn output_kind(
        &mut self,
        said: Option<OutputKind>,
        output: &OutputFacts,
    ) -> Result<OutputKind> {
        let fact = match output.certainty {
            Certainty::Proven => Some((output.kind, Provenance::Inferred)),
            Certainty::Assumed => None,
        };
        Ok(self.both("output_kind", said, fact)?.unwrap_or(output.kind))
    }
}

/// A value as the sidecar would write it.
fn shown<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

#[cfg(test)]
#[path = "resolve_tests.rs"]
mod tests;
