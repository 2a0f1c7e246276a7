//! The use-case `adapt`: a run and a user's own images, one folder a class, to a ready classifier.
//!
//! The file takes canonical images and gives one logit a class. It is run by ONNX Runtime on the
//! user's images, all logits are compared with the model in memory, and only then is it renamed: a file
//! that answers differently never appears. Beside it lies a sidecar, so that it can stand in a zoo.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::context::Context;
use super::embedder::BatchNorm;
use super::export::{Agreement, metadata, write_checked};
use super::files::{temporary_beside, write_atomically};
use super::run_folder::RunFolder;
use crate::access::runtime::Runtime;
use crate::access::session::Tensor;
use crate::data::{ClassImages, ImageFolder, ImageSet};
use crate::error::{Error, Result, ResultExt};
use crate::meta::{Classifier, MetaModel, SupportImages};
use crate::tensor::{Images, RngStream};
use crate::zoo::hash::file_sha;
use crate::zoo::sidecar::{Interpolation, SCHEMA_VERSION, SidecarPreprocess};
use crate::zoo::{Color, ElementType, Layout, OutputKind, Rejection, Sidecar};

/// Images that are classified at once.
const BATCH: usize = 64;
/// What the form is called in the file's metadata and in results.
const FORM: &str = "classifier";

/// What to adapt to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdaptOptions {
    /// An ImageFolder: its folders are the classes.
    pub images: PathBuf,
    /// Its split, where it has several.
    pub split: Option<String>,
    /// Images a class to learn from, drawn by the seed; the others are held out. All when absent.
    pub shot: Option<usize>,
    /// The file to write, `NAME.onnx`.
    pub out: PathBuf,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AdaptResult {
    /// The file.
    pub path: PathBuf,
    /// `classifier`.
    pub form: String,
    /// Version of the standard operator set.
    pub opset: i64,
    /// Its length.
    pub bytes: u64,
    /// Largest absolute difference to ONNX Runtime over the logits of all images.
    pub max_abs_diff_ort: f32,
    /// The file with labels and preprocessing.
    pub sidecar: PathBuf,
    /// The run's few-shot rule.
    pub learner: String,
    /// Normalisation statistics in the file: always those of training.
    pub bn: BatchNorm,
    /// Seed of the draws.
    pub seed: u64,
    /// Number of classes.
    pub way: usize,
    /// The classes, in the order of the logits.
    pub classes: Vec<AdaptedClass>,
    /// Images compared: learned from and held out.
    pub images: usize,
    /// Share of the images learned from that the classifier recognises, in 0..1.
    pub support_accuracy: f64,
    /// Share of the held-out images that it recognises.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out_accuracy: Option<f64>,
    /// Images that could not be read.
    pub rejected: Vec<Rejection>,
}

/// One class of the user's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AdaptedClass {
    /// The folder's name.
    pub name: String,
    /// Images learned from.
    pub support: usize,
    /// Images held out.
    pub held_out: usize,
}

/// The user's images, and which of them are learned from.
struct Task {
    set: ImageSet,
    rejected: Vec<Rejection>,
    /// Places in the set, class after class.
    support: Vec<usize>,
    held_out: Vec<usize>,
    classes: Vec<AdaptedClass>,
}

/// Adapts the newest checkpoint of `run` and writes the classifier with its sidecar.
///
/// # Errors
/// When there are fewer than two classes, one has no usable image or fewer than asked for, ONNX Runtime
/// is missing or gives other logits, or a file cannot be written; neither file is there then.
pub fn adapt(run: &RunFolder, options: &AdaptOptions, context: &Context) -> Result<AdaptResult> {
    let sidecar = check_out(&options.out)?;
    let runtime = context.runtime()?;
    let image_size = run.config()?.image_size;
    let checkpoint = run.latest_checkpoint()?;
    let model = MetaModel::load(&checkpoint)?;
    let task = Task::read(options, image_size, context)
        .context(|| format!("cannot adapt to `{}`", options.images.display()))?;
    let labels = task.labels(&task.support);
    let read = |range: Range<usize>| {
        context.check_interrupt()?;
        Ok(task.set.select(&task.support[range]))
    };
    let stage = context.progress.stage("adapt", None);
    let way = task.classes.len();
    let classifier = model.adapt(&SupportImages { labels: &labels, way, read: &read })?;
    drop(stage);
    let graph = classifier.to_graph(image_size)?;
    let info = task.metadata(run, &checkpoint, &model, context.seed)?;

    let temporary = temporary_beside(&sidecar);
    let mut right = [0, 0];
    let written = write_checked(&options.out, &graph, info, |file| {
        let judge = Judge { classifier: &classifier, task: &task, context };
        let (difference, counts) = judge.compare(runtime, file)?;
        right = counts;
        let text = task.sidecar(&options.out, file, &model, image_size, right)?;
        write_atomically(&temporary, text.as_bytes())?;
        Ok(difference)
    });
    let placed = written.and_then(|written| {
        std::fs::rename(&temporary, &sidecar).map_err(|error| {
            // Without its labels the file is not what was asked for; the first failure is told.
            let _ = std::fs::remove_file(&options.out);
            Error::io(&sidecar, &error)
        })?;
        Ok(written)
    });
    if placed.is_err() {
        // It may not even be there.
        let _ = std::fs::remove_file(&temporary);
    }
    let (bytes, max_abs_diff_ort) = placed?;
    let share = |right: usize, of: usize| right as f64 / of as f64;
    Ok(AdaptResult {
        path: options.out.clone(),
        form: FORM.into(),
        opset: graph.opset,
        bytes,
        max_abs_diff_ort,
        sidecar,
        learner: model.learner().name().into(),
        bn: BatchNorm::Inductive,
        seed: context.seed,
        way,
        images: task.support.len() + task.held_out.len(),
        support_accuracy: share(right[0], task.support.len()),
        held_out_accuracy: (!task.held_out.is_empty())
            .then(|| share(right[1], task.held_out.len())),
        classes: task.classes,
        rejected: task.rejected,
    })
}

/// Refuses an output that could not be used, before any work; returns the sidecar's name.
fn check_out(out: &Path) -> Result<PathBuf> {
    if out.extension().is_none_or(|extension| extension != "onnx") {
        return Err(Error::usage(format!(
            "the classifier's file must end in .onnx: `{}`",
            out.display()
        ))
        .hint("write `--out CLASSIFIER.onnx`; its labels go into `CLASSIFIER.yaml`"));
    }
    let folder = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.is_dir() {
        return Err(Error::input(format!("no folder `{}`", folder.display()))
            .context(format!("cannot write `{}`", out.display()))
            .hint("make the folder, or choose another `--out`"));
    }
    if out.is_dir() {
        return Err(Error::input(format!("there is a folder in its place: `{}`", out.display()))
            .hint("choose another `--out`"));
    }
    let sidecar = out.with_extension("yaml");
    match std::fs::read_to_string(&sidecar) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(sidecar),
        Ok(text) if Sidecar::parse(&text, &sidecar).is_ok() => Ok(sidecar),
        _ => Err(Error::input(format!(
            "the labels would replace a file that is no sidecar: `{}`",
            sidecar.display()
        ))
        .hint("choose another `--out`, or move that file away")),
    }
}

impl Task {
    fn read(options: &AdaptOptions, size: [usize; 2], context: &Context) -> Result<Self> {
        let folder = ImageFolder::open(&options.images, options.split.as_deref())?;
        let hint = "add PNG or JPEG images to it, or remove the folder";
        if let Some(name) = folder.without_pictures.first() {
            return Err(Error::input(format!("class has no images: `{name}`")).hint(hint));
        }
        if let [only] = folder.classes.as_slice() {
            return Err(Error::input(format!(
                "a classifier needs two classes or more, found one: `{}`",
                only.name
            ))
            .hint("expected IMAGES/CLASS/*.png, one folder a class"));
        }
        let (set, rejected) = folder.load(size)?;
        for Rejection { path, reason, .. } in &rejected {
            context.progress.note(&format!("image `{path}` left out: {reason}"));
        }
        let mut task =
            Self { rejected, support: Vec::new(), held_out: Vec::new(), classes: Vec::new(), set };
        for (index, ClassImages { name, range }) in task.set.classes().iter().enumerate() {
            let shot = options.shot.unwrap_or(range.len());
            if range.is_empty() {
                let error = format!("class has no image that can be read: `{name}`");
                return Err(Error::input(error).hint(hint));
            }
            if range.len() < shot {
                return Err(Error::input(format!(
                    "class `{name}` has {} usable images, fewer than asked for: `{shot}`",
                    range.len()
                ))
                .hint("lower `--shot`, leave it out to use all, or add images"));
            }
            let mut drawn: Vec<usize> = match options.shot {
                None => range.clone().collect(),
                Some(_) => RngStream::new(context.seed, "adapt", name, index as u64)
                    .sample(range.len(), shot)
                    .into_iter()
                    .map(|at| range.start + at)
                    .collect(),
            };
            drawn.sort_unstable();
            let others = range.clone().filter(|at| drawn.binary_search(at).is_err());
            let before = task.held_out.len();
            task.held_out.extend(others);
            task.classes.push(AdaptedClass {
                name: name.clone(),
                support: drawn.len(),
                held_out: task.held_out.len() - before,
            });
            task.support.extend(drawn);
        }
        Ok(task)
    }

    /// The classes of images of the set.
    fn labels(&self, images: &[usize]) -> Vec<usize> {
        let classes = self.set.classes();
        images
            .iter()
            .map(|image| classes.partition_point(|class| class.range.end <= *image))
            .collect()
    }

    /// What the file says of itself: labels and where they come from.
    fn metadata(
        &self,
        run: &RunFolder,
        checkpoint: &Path,
        model: &MetaModel,
        seed: u64,
    ) -> Result<BTreeMap<String, String>> {
        let json = |value: serde_json::Result<String>| {
            value.map_err(|error| Error::internal(format!("cannot write metadata: `{error}`")))
        };
        let names: Vec<&str> = self.classes.iter().map(|class| class.name.as_str()).collect();
        let shots: Vec<usize> = self.classes.iter().map(|class| class.support).collect();
        // `.` has no name.
        let real = run.path().canonicalize().map_err(|error| Error::io(run.path(), &error))?;
        let mut info = metadata(FORM, seed);
        for (key, value) in [
            ("labels", json(serde_json::to_string(&names))?),
            ("shots", json(serde_json::to_string(&shots))?),
            ("learner", model.learner().name().to_owned()),
            ("backbone", model.backbone().architecture().to_string()),
            ("bn", BatchNorm::Inductive.name().to_owned()),
            ("run", file_name(&real)),
            ("checkpoint", file_name(checkpoint)),
            ("checkpoint_sha256", file_sha(checkpoint)?),
        ] {
            info.insert(format!("metazoa.{key}"), value);
        }
        Ok(info)
    }

    /// The sidecar of the model at `file`, which will be called `out`.
    fn sidecar(
        &self,
        out: &Path,
        file: &Path,
        model: &MetaModel,
        [height, width]: [usize; 2],
        right: [usize; 2],
    ) -> Result<String> {
        let share = |right: usize, of: usize| right as f64 / of as f64;
        let learner = model.learner().name();
        let mut metrics =
            vec![("support_accuracy".to_owned(), share(right[0], self.support.len()))];
        if !self.held_out.is_empty() {
            metrics.push(("held_out_accuracy".into(), share(right[1], self.held_out.len())));
        }
        let labels = self.classes.iter().map(|class| class.name.clone()).enumerate().collect();
        let sidecar = Sidecar {
            schema_version: SCHEMA_VERSION,
            model: out.file_stem().map(|stem| stem.to_string_lossy().into_owned()),
            model_path: Some(file_name(out)),
            model_sha: Some(file_sha(file)?),
            access: None,
            preprocess: Some(SidecarPreprocess {
                input_size: Some([3, height, width]),
                layout: Some(Layout::Nchw),
                dtype: Some(ElementType::Float32),
                value_range: Some([0.0, 1.0]),
                color: Some(Color::Rgb),
                interpolation: Some(Interpolation::Bilinear),
                ..SidecarPreprocess::default()
            }),
            output_kind: Some(OutputKind::Logits),
            logits_output: Some("logits".into()),
            id2label: Some(labels),
            tags: vec!["few-shot".into(), learner.into()],
            license: None,
            datasets: Vec::new(),
            metrics: metrics.into_iter().collect(),
            description: Some(format!(
                "{learner} adapted to {} images by metazoa {}",
                self.support.len(),
                env!("CARGO_PKG_VERSION")
            )),
            endpoint: None,
            max_batch_size: None,
            query_budget: None,
        };
        serde_yaml::to_string(&sidecar)
            .map_err(|error| Error::internal(format!("cannot write the sidecar: `{error}`")))
    }
}

/// Holds the written file against the classifier in memory.
struct Judge<'a> {
    classifier: &'a Classifier,
    task: &'a Task,
    context: &'a Context,
}

impl Judge<'_> {
    /// Largest difference over the logits of all images, and how many of the support and of the held-out
    /// images are recognised.
    fn compare(&self, runtime: &'static Runtime, file: &Path) -> Result<(f32, [usize; 2])> {
        let mut session = runtime.open(file)?;
        let mut agreement = Agreement::default();
        let mut right = [0, 0];
        let task = self.task;
        let total = task.support.len() + task.held_out.len();
        let stage = self.context.progress.stage("check", Some(total as u64));
        for (part, images) in [&task.support, &task.held_out].into_iter().enumerate() {
            for images in images.chunks(BATCH) {
                self.context.check_interrupt()?;
                let batch: Images = task.set.select(images);
                let own = self.classifier.logits(&batch)?;
                let predictions = self.classifier.predictions(&own);
                let labels = task.labels(images);
                right[part] += predictions.iter().zip(&labels).filter(|(a, b)| a == b).count();
                let input = Tensor::f32(batch.shape(), batch.into_data());
                let theirs = session.run(vec![("images", input)], &["logits"])?;
                agreement.add(&own, theirs.first())?;
                stage.advance(images.len() as u64);
            }
        }
        Ok((agreement.verdict()?, right))
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
