//! One model file to what is known of it, or the error that rejects it.
//!
//! Cheap checks come first: the graph is compiled only when the file has an image input and a class
//! output and agrees with its sidecar, so that most hostile files are refused before any memory is
//! taken for them. Nothing of the weights is kept.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use super::candidates::{self, Candidate, FoundSidecar};
use super::catalog::{CatalogModel, Provenance};
use super::facts::{self, GraphIndex, Quantisation};
use super::hash::{file_sha, files_sha};
use super::resolve::{Identity, OPEN_SIZE_NOTE, Resolved, SIZE_KEY, resolve};
use super::sidecar::SidecarAccess;
use super::spec::{Access, BatchDimension, Layout, ModelSpec, OutputKind, Rejection};
use crate::error::{Error, ErrorKind, Result, ResultExt as _};
use crate::graph::plan::{CompileOptions, Gradient, Plan, Taps};
use crate::graph::{Graph, unsupported_ops};
use crate::onnx;

/// How models may be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// As the sidecar says, white-box where the graph compiles and nobody forbids it.
    AsFound,
    /// By questions only, whatever the sidecar says.
    Asked,
}

/// Reads a candidate of the zoo whose real path is `root`.
///
/// # Errors
/// The rejection: path, reason, hint.
pub fn read_candidate(
    candidate: &Candidate,
    root: &Path,
    reach: Reach,
) -> Result<CatalogModel, Rejection> {
    // A defect in reading one file must not take the other models down with it.
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let sidecar = candidate.sidecar.clone()?;
        read(&candidate.file.path, &candidate.id, sidecar.as_ref(), root, reach)
    }));
    let error = match outcome {
        Ok(Ok(model)) => return Ok(model),
        Ok(Err(error)) => error,
        Err(_) => Error::internal("reading this file failed in an unforeseen way")
            .hint("please report it with the file; remove the file to go on without it"),
    };
    Err(rejection(&candidate.file.relative, &error))
}

/// Reads one model outside any zoo, with the sidecar beside it.
///
/// # Errors
/// What would reject it in a zoo.
pub fn read_file(path: &Path) -> Result<CatalogModel> {
    let real = path.canonicalize().map_err(|error| Error::io(path, &error))?;
    let root = real.parent().unwrap_or(Path::new("/")).to_path_buf();
    let sidecar = candidates::beside(path)?.map(|content| FoundSidecar {
        relative: path.with_extension("yaml").display().to_string(),
        content,
    });
    let id = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    read(&real, &id, sidecar.as_ref(), &root, Reach::AsFound)
}

/// An error as a rejection of the file at `relative`.
pub fn rejection(relative: &str, error: &Error) -> Rejection {
    // The rejection names its file already; the outer context would repeat it with its full path.
    let contexts = error.contexts().iter().filter(|context| !context.starts_with("model"));
    let mut reason: String = contexts.map(|context| format!("{context}: ")).collect();
    reason.push_str(error.message());
    Rejection { path: relative.to_owned(), reason, hint: error.hint_text().map(ToOwned::to_owned) }
}

fn read(
    path: &Path,
    id: &str,
    sidecar: Option<&FoundSidecar>,
    root: &Path,
    reach: Reach,
) -> Result<CatalogModel> {
    let model = onnx::load(path, root)?;
    let index = GraphIndex::new(&model.graph);
    let said = sidecar.map(|found| &found.content);
    let layout = said.and_then(|said| said.preprocess.as_ref()).and_then(|block| block.layout);
    let input = facts::input::input_facts(&index, layout)?;
    let output = facts::output::output_facts(
        &index,
        said.and_then(|said| said.logits_output.as_deref()),
        said.and_then(|said| said.id2label.as_ref()).map(std::collections::BTreeMap::len),
    )?;
    let norm = facts::norm::norm_facts(&index);
    let identity = identity(path, id, &model.external_files)?;
    let mut resolved = resolve(identity, &input, &output, sidecar)?;
    let ops = model.graph.op_counts();
    let quantisation = facts::quantisation(&ops);
    resolved.spec.norm_taps = norm.taps;
    resolved.spec.quantised = facts::rounds_activations(&ops);
    if quantisation == Quantisation::Dynamic {
        resolved.spec.batch_dependent = true;
        resolved.notes.push(
            "quantised dynamically: images of one batch influence each other, they are asked one by one"
                .into(),
        );
    }
    if reach == Reach::Asked {
        resolved.provenance.insert("access".into(), Provenance::Sidecar);
        resolved.spec.access = Access::BlackBox;
    } else {
        choose_access(&mut resolved, &model.graph, quantisation, sidecar, output.scores_behind)?;
    }
    resolved.notes.extend(norm.note().filter(|_| quantisation == Quantisation::None));

    let bytes = std::iter::once(path)
        .chain(model.external_files.iter().map(PathBuf::as_path))
        .map(|file| std::fs::metadata(file).map_or(0, |metadata| metadata.len()))
        .sum();
    let external_files = model
        .external_files
        .iter()
        .map(|file| file.strip_prefix(root).unwrap_or(file).to_string_lossy().into_owned())
        .collect();
    let said = said.cloned();
    Ok(CatalogModel {
        spec: resolved.spec,
        name: said.as_ref().and_then(|said| said.model.clone()),
        provenance: resolved.provenance,
        notes: resolved.notes,
        ops,
        opset: model.opset,
        ir_version: model.ir_version,
        producer: model.producer,
        bytes,
        external_files,
        license: said.as_ref().and_then(|said| said.license.clone()),
        tags: said.as_ref().map(|said| said.tags.clone()).unwrap_or_default(),
        datasets: said.map(|said| said.datasets).unwrap_or_default(),
    })
}

fn identity(path: &Path, id: &str, external: &[PathBuf]) -> Result<Identity> {
    let file_sha = file_sha(path)?;
    let sha = if external.is_empty() {
        file_sha.clone()
    } else {
        files_sha(std::iter::once(path).chain(external.iter().map(PathBuf::as_path)))?
    };
    let external_files = external.to_vec();
    Ok(Identity { id: id.to_owned(), path: path.to_path_buf(), file_sha, sha, external_files })
}

/// White-box when the graph compiles and nobody forbids it; black-box otherwise, saying why.
fn choose_access(
    resolved: &mut Resolved,
    graph: &Graph,
    quantisation: Quantisation,
    sidecar: Option<&FoundSidecar>,
    scores_behind: Option<(String, OutputKind)>,
) -> Result<()> {
    let asked = sidecar.and_then(|found| found.content.access);
    let provenance = if asked.is_some() { Provenance::Sidecar } else { Provenance::Inferred };
    resolved.provenance.insert("access".into(), provenance);
    if asked == Some(SidecarAccess::BlackBox) {
        resolved.spec.access = Access::BlackBox;
        return Ok(());
    }
    let scores = match &scores_behind {
        Some((scores, _)) => scores.clone(),
        None => resolved.spec.logits_output.clone(),
    };
    let obstacle = if quantisation == Quantisation::Dynamic {
        Some(Error::unsupported(
            "the model quantises over its whole batch, so one image's gradient is mixed with the others'",
        ))
    } else {
        fit_open_size(resolved, graph, &scores);
        compile(graph, &resolved.spec, &scores).err()
    };
    let Some(obstacle) = obstacle else {
        if let Some((scores, kind)) = scores_behind {
            resolved.notes.push(format!(
                "output `{}` holds labels; white-box reads the scores behind them, `{scores}`",
                resolved.spec.logits_output
            ));
            resolved.spec.logits_output = scores;
            resolved.spec.output_kind = kind;
        }
        return Ok(());
    };
    resolved.spec.unsupported_ops = unsupported_ops(graph);
    let missing = resolved.spec.unsupported_ops.join(", ");
    let why = if missing.is_empty() {
        format!("{obstacle}")
    } else {
        format!("operators without a gradient here: {missing}")
    };
    if asked == Some(SidecarAccess::WhiteBox) {
        let place = sidecar.map_or("the sidecar", |found| found.relative.as_str());
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("white-box is not possible: {why}"),
        )
        .hint(format!("remove `access: white-box` from `{place}` to query the model instead")));
    }
    resolved.spec.access = Access::BlackBox;
    resolved.notes.push(format!("black-box: {why}"));
    Ok(())
}

/// Usual image sides, tried in this order when neither file nor sidecar gives one.
const USUAL_SIDES: [usize; 9] = [224, 32, 84, 64, 28, 96, 128, 256, 299];

/// For a file that leaves the image size open: the first usual size that the network accepts. A
/// network with global pooling accepts all of them, and keeps the default.
fn fit_open_size(resolved: &mut Resolved, graph: &Graph, scores: &str) {
    let open = resolved.provenance.get(SIZE_KEY) == Some(&Provenance::Default);
    if !open || compile(graph, &resolved.spec, scores).is_ok() {
        return;
    }
    for side in USUAL_SIDES {
        let mut spec = resolved.spec.clone();
        spec.preprocess.input_size = [spec.preprocess.input_size[0], side, side];
        if compile(graph, &spec, scores).is_ok() {
            resolved.spec = spec;
            resolved.provenance.insert(SIZE_KEY.into(), Provenance::Inferred);
            resolved.notes.retain(|note| !note.starts_with(OPEN_SIZE_NOTE));
            resolved.notes.push(format!(
                "{OPEN_SIZE_NOTE}; {side} is the first usual one that fits the network: give `preprocess.input_size` in a sidecar if it was another"
            ));
            return;
        }
    }
}

/// Compiles the graph for one batch at the model's own size, and throws the result away.
fn compile(graph: &Graph, spec: &ModelSpec, scores: &str) -> Result<()> {
    let batch = match spec.batch {
        BatchDimension::Free => 1,
        BatchDimension::Fixed(batch) => batch,
    };
    let [channels, height, width] = spec.preprocess.input_size;
    let input_shape = match spec.preprocess.layout {
        Layout::Nchw => vec![batch, channels, height, width],
        Layout::Nhwc => vec![batch, height, width, channels],
    };
    let options = CompileOptions {
        input: spec.input_name.clone(),
        input_shape,
        output: scores.to_owned(),
        gradient: Gradient::Wanted,
        taps: Taps::Norms,
    };
    let plan = Plan::<f32>::compile(graph, &options)?;
    let classes: usize = plan.output_shape().iter().skip(1).product();
    if classes != spec.classes {
        return Err(Error::input(format!(
            "the model makes {classes} scores an image, its output declares `{}`",
            spec.classes
        )))
        .context(|| format!("output `{scores}`"));
    }
    Ok(())
}
