//! First contact with black-box models during ingest: do they run, and how do they behave?
//!
//! White-box models are compiled by our own engine and never meet ONNX Runtime here. A black-box
//! model is loaded and run once in a child process under limits; a failure there rejects it, and
//! what it shows (batch axis, influence of the batch) corrects what the graph seemed to say.

use crate::access::probe::{ProbeInput, ProbeLimits, ProbeReport, Prober};
use crate::error::{Error, ErrorKind, Result, ResultExt as _};
use crate::zoo::catalog::{CatalogModel, Provenance};
use crate::zoo::{Access, BatchDimension, Layout, Preprocess};

/// Tries a black-box model out; other models are returned as they are.
///
/// # Errors
/// When the model cannot be run, or does not do what its file declares.
pub fn try_out(mut model: CatalogModel, prober: Option<&Prober>) -> Result<CatalogModel> {
    if model.spec.access != Access::BlackBox {
        return Ok(model);
    }
    let Some(prober) = prober else {
        model
            .notes
            .push("not tried in ONNX Runtime: it was not found; `metazoa setup` fetches it".into());
        return Ok(model);
    };
    match first_contact(&model, prober) {
        Ok(report) => apply(&mut model, &report).context(|| "tried in ONNX Runtime".into())?,
        Err(error) if error.kind() == ErrorKind::Internal => {
            model.notes.push(format!("not tried in ONNX Runtime: {error}"));
        }
        Err(error) => return Err(error),
    }
    Ok(model)
}

/// Runs the model in a child process, before ONNX Runtime opens its file in this one.
///
/// # Errors
/// When the model cannot be run, or the child cannot be started.
pub fn first_contact(model: &CatalogModel, prober: &Prober) -> Result<ProbeReport> {
    let limits = ProbeLimits::for_size(model.bytes);
    prober
        .probe(&model.spec.path, Some(probe_input(model)), &limits)
        .context(|| "tried in ONNX Runtime".into())
}

fn probe_input(model: &CatalogModel) -> ProbeInput {
    let preprocess = &model.spec.preprocess;
    let [channels, height, width] = preprocess.input_size;
    ProbeInput {
        name: model.spec.input_name.clone(),
        image_shape: match preprocess.layout {
            Layout::Nchw => vec![channels, height, width],
            Layout::Nhwc => vec![height, width, channels],
        },
        range: normalised_range(preprocess),
    }
}

/// Smallest and largest value a pixel can become.
fn normalised_range(preprocess: &Preprocess) -> [f32; 2] {
    let [low, high] = preprocess.value_range;
    let channels = preprocess.mean.iter().zip(&preprocess.std);
    channels.fold([f32::INFINITY, f32::NEG_INFINITY], |[least, most], (mean, std)| {
        [least.min((low - mean) / std), most.max((high - mean) / std)]
    })
}

/// Corrects the model by what it showed.
fn apply(model: &mut CatalogModel, report: &ProbeReport) -> Result<()> {
    let spec = &mut model.spec;
    let Some(output) = report.outputs.iter().find(|output| output.name == spec.logits_output)
    else {
        return Err(Error::input(format!("it has no output `{}`", spec.logits_output)));
    };
    let labels = spec.output_kind == crate::zoo::OutputKind::Labels;
    let expected = if labels { 1 } else { spec.classes };
    if output.values_per_image != Some(expected) {
        let found = output.values_per_image.map_or("none".into(), |count| count.to_string());
        return Err(Error::input(format!(
            "output `{}` gives a wrong number of values an image, expected {expected}, found `{found}`",
            output.name
        ))
        .hint("set `logits_output` and `id2label` in the sidecar to what the model really does"));
    }
    if !output.finite {
        model.notes.push("some scores were infinite or not a number in the test run".into());
    }
    if let Some(kind) = output.looks_like
        && model.provenance.get("output_kind") == Some(&Provenance::Default)
    {
        spec.output_kind = kind;
        model.provenance.insert("output_kind".into(), Provenance::Inferred);
    }
    if report.batch != spec.batch {
        if let BatchDimension::Fixed(batch) = report.batch {
            model
                .notes
                .push(format!("the batch axis is declared free, but only batches of {batch} run"));
        }
        spec.batch = report.batch;
        model.provenance.insert("batch".into(), Provenance::Inferred);
    }
    if report.batch_dependent && !spec.batch_dependent {
        spec.batch_dependent = true;
        model.notes.push(format!(
            "images of one batch influence each other (by {:.0e}): they are asked one by one",
            report.batch_difference
        ));
    }
    if !report.repeatable {
        model.notes.push("the same images gave different scores twice".into());
    }
    Ok(())
}
