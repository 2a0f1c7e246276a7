//! Models that are served elsewhere: a sidecar with an `endpoint` and no file.
//!
//! What a file would say comes from the server's own description (Open Inference Protocol v2, "model metadata"):
//! names, shapes and element types of the tensors. The sidecar is merged with it as with a file's facts, and
//! what neither says is refused rather than guessed where a guess would cost queries.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use super::candidates::FoundSidecar;
use super::catalog::{CatalogModel, Provenance};
use super::facts::input::Normalised;
use super::facts::output::Certainty;
use super::facts::{InputFacts, OutputFacts};
use super::resolve::{Identity, resolve};
use super::sidecar::{Endpoint, MAX_SIDE, Sidecar, SidecarAccess};
use super::spec::{Access, BatchDimension, ElementType, Layout, OutputKind};
use super::walk::ZooFile;
use crate::error::{Error, Result};

/// A sidecar whose model is served elsewhere.
#[derive(Debug, Clone)]
pub struct RemoteCandidate {
    /// The sidecar.
    pub file: ZooFile,
    /// Path below the zoo without extension; unique.
    pub id: String,
    /// Its content.
    pub sidecar: FoundSidecar,
}

/// A model as its server describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedModel {
    /// Name at the server.
    pub name: String,
    /// What runs it (`onnxruntime_onnx`), if the server says.
    pub platform: String,
    /// Tensors it takes.
    pub inputs: Vec<ServedTensor>,
    /// Tensors it gives.
    pub outputs: Vec<ServedTensor>,
}

/// A tensor as the server describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedTensor {
    /// Its name.
    pub name: String,
    /// Element type in the protocol's words (`FP32`, `UINT8`).
    pub datatype: String,
    /// One size an axis, -1 where it is free.
    pub shape: Vec<i64>,
}

impl ServedTensor {
    fn axis(&self, position: usize) -> Option<usize> {
        self.shape.get(position).and_then(|&size| usize::try_from(size).ok()).filter(|&s| s > 0)
    }

    fn is_integer(&self) -> bool {
        self.datatype.starts_with("INT") || self.datatype.starts_with("UINT")
    }
}

impl RemoteCandidate {
    /// Where it is served.
    ///
    /// # Errors
    /// When the sidecar has no endpoint (a defect of the caller).
    pub fn endpoint(&self) -> Result<&Endpoint> {
        let endpoint = self.sidecar.content.endpoint.as_ref();
        endpoint.ok_or_else(|| Error::internal(format!("no endpoint in `{}`", self.file.relative)))
    }
}

impl Endpoint {
    /// The name at the server: `model_name`, else what the sidecar calls the model, else its stem.
    pub fn served_name(&self, sidecar: &Sidecar, id: &str) -> String {
        let stem = id.rsplit('/').next().unwrap_or(id);
        let name = self.model_name.clone().or_else(|| sidecar.model.clone());
        name.unwrap_or_else(|| stem.to_owned())
    }
}

/// Merges the sidecar with the server's description.
///
/// # Errors
/// When they contradict each other, or together do not say what a query must look like.
pub fn describe(candidate: &RemoteCandidate, served: &ServedModel) -> Result<CatalogModel> {
    let said = &candidate.sidecar.content;
    if said.access == Some(SidecarAccess::WhiteBox) {
        return Err(Error::unsupported("a served model cannot be white-box").hint(
            "remove `access: white-box`, or put the model's `.onnx` file beside the sidecar",
        ));
    }
    let input = input_facts(served, said)?;
    let output = output_facts(served, said)?;
    let sha = identity(candidate, served)?;
    let identity = Identity {
        external_files: Vec::new(),
        id: candidate.id.clone(),
        path: candidate.file.path.clone(),
        file_sha: sha.clone(),
        sha,
    };
    let mut resolved = resolve(identity, &input, &output, Some(&candidate.sidecar))?;
    let mut endpoint = candidate.endpoint()?.clone();
    endpoint.model_name = Some(endpoint.served_name(said, &candidate.id));
    if endpoint.header_env.is_some() && !is_private(&endpoint.url) {
        resolved.notes.push("the token of `header_env` goes over plain http: use https".into());
    }
    resolved.spec.endpoint = Some(endpoint);
    resolved.spec.access = Access::Remote;
    resolved.provenance.insert("access".into(), Provenance::Sidecar);
    Ok(CatalogModel {
        spec: resolved.spec,
        name: said.model.clone(),
        provenance: resolved.provenance,
        notes: resolved.notes,
        ops: BTreeMap::new(),
        opset: 0,
        ir_version: 0,
        producer: served.platform.clone(),
        bytes: 0,
        external_files: Vec::new(),
        tags: said.tags.clone(),
        datasets: said.datasets.clone(),
        license: said.license.clone(),
    })
}

/// Whether what is sent there cannot be read on the way.
fn is_private(url: &str) -> bool {
    let local = ["http://127.0.0.1", "http://localhost", "http://[::1]"];
    url.starts_with("https://") || local.iter().any(|start| url.starts_with(start))
}

/// What stands for the SHA-256 of a file: the model's name, version and tensors. Not the address, so that a
/// run can be resumed after the server has moved.
fn identity(candidate: &RemoteCandidate, served: &ServedModel) -> Result<String> {
    let version = candidate.endpoint()?.model_version.as_deref().unwrap_or_default();
    let mut hash = Sha256::new();
    for part in [candidate.id.as_str(), served.name.as_str(), version, served.platform.as_str()] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    for tensor in served.inputs.iter().chain(&served.outputs) {
        hash.update(format!("{}|{}|{:?};", tensor.name, tensor.datatype, tensor.shape));
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn input_facts(served: &ServedModel, said: &Sidecar) -> Result<InputFacts> {
    let place = |tensor: &ServedTensor| format!("served input `{}`", tensor.name);
    let input = match served.inputs.as_slice() {
        [one] => one,
        [] => {
            return Err(Error::input(format!(
                "the server does not say what `{}` takes, expected one image input",
                served.name
            ))
            .hint("declare the model's inputs and outputs in the server's configuration"));
        }
        several => {
            let names: Vec<_> = several.iter().map(|tensor| tensor.name.as_str()).collect();
            return Err(Error::unsupported(format!(
                "the served model needs more inputs than one image: `{}`",
                names.join("`, `")
            )));
        }
    };
    let dtype = match input.datatype.as_str() {
        "FP32" => ElementType::Float32,
        "FP16" => ElementType::Float16,
        "FP64" => ElementType::Float64,
        "UINT8" => ElementType::Uint8,
        other => {
            return Err(Error::input(format!(
                "element type of an image must be FP16, FP32, FP64 or UINT8, found `{other}`"
            ))
            .context(place(input)));
        }
    };
    let wanted = said.preprocess.as_ref();
    let image_axes = |layout: Layout| match layout {
        Layout::Nchw => [input.axis(1), input.axis(2), input.axis(3)],
        Layout::Nhwc => [input.axis(3), input.axis(1), input.axis(2)],
    };
    let (layout, [channels, height, width]) = match input.shape.len() {
        4 => {
            let is_color = |axis: Option<usize>| matches!(axis, Some(1 | 3));
            let layout = match (is_color(input.axis(1)), is_color(input.axis(3))) {
                (true, false) => Some(Layout::Nchw),
                (false, true) => Some(Layout::Nhwc),
                _ => None,
            };
            let order = layout.or(wanted.and_then(|block| block.layout));
            (layout, image_axes(order.unwrap_or(Layout::Nchw)))
        }
        // Flattened images: only the sidecar can tell their size.
        2 if wanted.is_some_and(|block| block.input_size.is_some()) => (None, [None; 3]),
        rank => {
            return Err(Error::unsupported(format!("an image input of `{rank}` axes"))
                .context(place(input))
                .hint("serve the model with an input of shape [batch, channels, height, width]"));
        }
    };
    if [height, width].into_iter().flatten().any(|side| side > MAX_SIDE) {
        let found = format!("{:?}", input.shape);
        return Err(Error::input(format!(
            "image sides go up to {MAX_SIDE} pixels, found `{found}`"
        ))
        .context(place(input)));
    }
    Ok(InputFacts {
        name: input.name.clone(),
        layout,
        dtype,
        channels,
        height,
        width,
        batch: input.axis(0).map_or(BatchDimension::Free, BatchDimension::Fixed),
        value_range: None,
        normalised_inside: Normalised::Outside,
        color: None,
    })
}

fn output_facts(served: &ServedModel, said: &Sidecar) -> Result<OutputFacts> {
    let labels = said.id2label.as_ref().map(BTreeMap::len);
    let names = || served.outputs.iter().map(|o| o.name.as_str()).collect::<Vec<_>>().join("`, `");
    let output = match &said.logits_output {
        Some(name) => served.outputs.iter().find(|output| output.name == *name).ok_or_else(|| {
            Error::input(format!(
                "`logits_output` names no output of the served model, expected one of `{}`, found `{name}`",
                names()
            ))
        })?,
        None => {
            let fits = |output: &&ServedTensor| {
                classes_of(output).is_some_and(|n| labels.map_or(n > 1, |count| n == count))
            };
            let mut fitting = served.outputs.iter().filter(fits);
            match (fitting.next(), fitting.next(), served.outputs.as_slice()) {
                (Some(one), None, _) | (None, _, [one]) => one,
                _ => {
                    return Err(Error::input(format!(
                        "the server does not say which output holds the class scores, found `{}`",
                        names()
                    ))
                    .hint("set `logits_output` in the sidecar"));
                }
            }
        }
    };
    let is_label = output.is_integer() && classes_of(output).is_none_or(|n| n == 1);
    let is_label = is_label || said.output_kind == Some(OutputKind::Labels);
    let declared = if is_label { None } else { classes_of(output) };
    let classes = declared.or(labels).ok_or_else(|| {
        Error::input(format!("output `{}` does not say how many classes there are", output.name))
            .hint("name the classes in the sidecar's `id2label`")
    })?;
    if classes < 2 {
        return Err(Error::input(format!("a classifier has 2 classes or more, found `{classes}`"))
            .context(format!("served output `{}`", output.name))
            .hint("set `logits_output` in the sidecar to the output with one score a class"));
    }
    Ok(OutputFacts {
        name: output.name.clone(),
        classes,
        kind: if is_label { OutputKind::Labels } else { OutputKind::Logits },
        certainty: if is_label && output.is_integer() {
            Certainty::Proven
        } else {
            Certainty::Assumed
        },
        alternatives: Vec::new(),
        scores_behind: None,
    })
}

/// Values an image, when the shape says so.
fn classes_of(output: &ServedTensor) -> Option<usize> {
    let rest = output.shape.get(1..).filter(|rest| !rest.is_empty())?;
    rest.iter()
        .map(|&size| usize::try_from(size).ok().filter(|&size| size > 0))
        .try_fold(1usize, |all, size| all.checked_mul(size?))
}

#[cfg(test)]
#[path = "remote_tests.rs"]
mod tests;
