//! The meta-model to ONNX, checked against ONNX Runtime before it counts as written.
//!
//! The file is made beside its final name, run by ONNX Runtime on random images, compared with the
//! network in memory, and only then renamed: a file that answers differently never appears.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::config::ExportForm;
use super::files::temporary_beside;
use super::run_folder::RunFolder;
use crate::access::library::RuntimeOptions;
use crate::access::runtime::Runtime;
use crate::access::session::Tensor;
use crate::error::{Error, Result, ResultExt};
use crate::graph::Graph;
use crate::meta::{BnMode, Learner, MetaModel, export};
use crate::onnx;
use crate::tensor::{Images, RngStream};

/// Largest difference to ONNX Runtime accepted, relative to the largest value: single precision
/// sums in another order stay far below it, a wrong graph far above.
const TOLERANCE: f32 = 1e-4;
/// Classes, support images a class and queries of the check.
const CHECK: [usize; 3] = [5, 2, 8];

/// What was written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ExportResult {
    /// The file.
    pub path: PathBuf,
    /// Its form.
    pub form: ExportForm,
    /// Version of the standard operator set.
    pub opset: i64,
    /// Its length.
    pub bytes: u64,
    /// Largest absolute difference to ONNX Runtime over the check's outputs.
    pub max_abs_diff_ort: f32,
}

/// Writes the network of a run's newest checkpoint to `out`.
///
/// # Errors
/// When the run has no checkpoint, ONNX Runtime is missing or gives other values than the network,
/// or the file cannot be written; `out` is then as it was.
pub fn export_run(
    run: &RunFolder,
    form: ExportForm,
    out: &Path,
    runtime: &RuntimeOptions,
) -> Result<ExportResult> {
    let config = run.config()?;
    let model = MetaModel::load(&run.latest_checkpoint()?)?;
    let graph = graph_of(&model, form, config.image_size)?;
    let metadata = metadata(form.name(), config.seed);
    let (bytes, max_abs_diff_ort) = write_checked(out, &graph, metadata, |file| {
        compare(&model, config.image_size, form, file, runtime)
    })?;
    Ok(ExportResult { path: out.into(), form, opset: graph.opset, bytes, max_abs_diff_ort })
}

/// What every file written by metazoa says of itself.
pub(super) fn metadata(form: &str, seed: u64) -> BTreeMap<String, String> {
    BTreeMap::from([
        ("metazoa.form".to_owned(), form.to_owned()),
        ("metazoa.image_range".to_owned(), "[0, 1], RGB".to_owned()),
        ("metazoa.seed".to_owned(), seed.to_string()),
    ])
}

/// Writes `graph` beside `out`, has `check` look at the file, and only then renames it. Returns its length
/// and what `check` found: the largest difference to ONNX Runtime.
///
/// # Errors
/// That of `check`, and when the file cannot be written; `out` is then as it was.
pub(super) fn write_checked(
    out: &Path,
    graph: &Graph,
    metadata: BTreeMap<String, String>,
    check: impl FnOnce(&Path) -> Result<f32>,
) -> Result<(u64, f32)> {
    let temporary = temporary_beside(out);
    let written = (|| {
        onnx::write(&temporary, graph, &onnx::ExportInfo::new(metadata))?;
        let difference = check(&temporary)?;
        let bytes = std::fs::metadata(&temporary).map_err(|e| Error::io(&temporary, &e))?.len();
        std::fs::rename(&temporary, out).map_err(|error| Error::io(out, &error))?;
        Ok::<_, Error>((bytes, difference))
    })();
    if written.is_err() {
        // The first failure is the one to tell; the file may not even be there.
        let _ = std::fs::remove_file(&temporary);
    }
    written.context(|| format!("cannot export `{}`", out.display()))
}

/// Why a learner has no such form, if it has none.
pub fn missing_form(learner: Learner, form: ExportForm) -> Option<&'static str> {
    match (form, learner) {
        (ExportForm::Episode, Learner::Maml(_)) => {
            Some("MAML's gradient steps on all weights have no form in ONNX")
        }
        _ => None,
    }
}

/// The model in `form`, for images of `[height, width]`.
fn graph_of(model: &MetaModel, form: ExportForm, [height, width]: [usize; 2]) -> Result<Graph> {
    if let Some(why) = missing_form(model.learner(), form) {
        return Err(Error::unsupported(why).hint(
            "take the steps here with `metazoa adapt`, export `--form embedding`, or train with `meta.learner: anil` or `protonet`",
        ));
    }
    let embedding = model.backbone().to_graph(height, width)?;
    match (form, model.learner()) {
        (ExportForm::Episode, Learner::ProtoNet) => export::episode_graph(&embedding),
        (ExportForm::Episode, Learner::Anil(inner)) => {
            export::adapting_graph(&embedding, model.head(inner)?)
        }
        _ => Ok(embedding),
    }
}

/// Largest absolute difference between the file in ONNX Runtime and the model in memory.
fn compare(
    model: &MetaModel,
    [height, width]: [usize; 2],
    form: ExportForm,
    file: &Path,
    runtime: &RuntimeOptions,
) -> Result<f32> {
    let [way, shot, queries] = CHECK;
    let n_support = way * shot;
    let mut rng = RngStream::new(0, "export-check", "", 0);
    let shape = [n_support + queries, 3, height, width];
    let pixels = (0..shape.iter().product()).map(|_| rng.uniform()).collect();
    let images = Images::new(pixels, shape)?;
    let mut session = Runtime::load(runtime)?.open(file)?;
    let batch = |images: Images| Tensor::f32(images.shape(), images.into_data());
    let (own, theirs) = match form {
        ExportForm::Embedding => {
            let vectors = model.backbone().embed(&images, BnMode::Running)?;
            let theirs = session.run(vec![("images", batch(images))], &["embedding"])?;
            (vectors, theirs)
        }
        ExportForm::Episode => {
            let labels: Vec<usize> = (0..n_support).map(|image| image % way).collect();
            let support = images.range(0, n_support);
            let query = images.range(n_support, n_support + queries);
            let own = model.classify(&support, &labels, &query, way, BnMode::Running)?.logits;
            let labels = labels.into_iter().map(|label| label as i64).collect();
            let inputs = vec![
                ("support_images", batch(support)),
                ("support_labels", Tensor::i64([n_support], labels)),
                ("query_images", batch(query)),
            ];
            (own, session.run(inputs, &["logits"])?)
        }
    };
    let mut agreement = Agreement::default();
    agreement.add(&own, theirs.first())?;
    agreement.verdict()
}

/// How far ONNX Runtime is from what is expected, over any number of batches.
#[derive(Debug, Default)]
pub(super) struct Agreement {
    /// Largest absolute value expected.
    largest: f32,
    /// Largest absolute difference; not a number where either side is none.
    worst: f32,
}

impl Agreement {
    /// Counts one batch in: `own` values and those of an output of the session.
    ///
    /// # Errors
    /// When their numbers differ.
    pub(super) fn add(&mut self, own: &[f32], theirs: Option<&Tensor>) -> Result<()> {
        let theirs = theirs.map(|output| output.values.to_f32()).unwrap_or_default();
        if own.len() != theirs.len() {
            return Err(Error::internal(format!(
                "ONNX Runtime gives {} values, the network `{}`",
                theirs.len(),
                own.len()
            )));
        }
        self.largest = own.iter().fold(self.largest, |most, value| most.max(value.abs()));
        let differences = own.iter().zip(theirs.iter()).map(|(a, b)| (a - b).abs());
        // `max` would pass over NaN, which must fail, and stay once it is there.
        let worse = |most: f32, d: f32| if most.is_nan() || d <= most { most } else { d };
        self.worst = differences.fold(self.worst, worse);
        Ok(())
    }

    /// The largest absolute difference.
    ///
    /// # Errors
    /// When it is more than rounding explains.
    pub(super) fn verdict(&self) -> Result<f32> {
        let Self { largest, worst } = *self;
        if worst <= TOLERANCE * largest {
            Ok(worst)
        } else {
            Err(Error::internal(format!(
                "ONNX Runtime differs from the network by {worst:e} at values up to `{largest:e}`"
            )))
        }
    }
}
