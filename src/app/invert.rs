//! The use-case `invert`: images of one model's classes, as an ImageFolder with a contact sheet and
//! the loss curve.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::config::{RecoverBy, RunConfig};
use super::files::write_atomically;
use super::ingest::ProbeOptions;
use super::teachers::{TeacherOptions, open};
use super::{Context, ingest_probe, ingest_remote, settings};
use crate::access::library::RuntimeOptions;
use crate::error::{Error, Result};
use crate::methods::{Via, Watch, recover_one};
use crate::report::{Series, contact_sheet, image_png, line_plot};
use crate::zoo::{candidates, read};

/// Images a row of the contact sheet.
const SHEET_COLUMNS: usize = 12;

/// What to invert.
#[derive(Debug, Clone)]
pub struct InvertOptions {
    /// The file, or the sidecar of a served model.
    pub model: PathBuf,
    /// Where the images go; must not exist or be empty.
    pub out: PathBuf,
    /// The settings; `recover` and `image_size` count.
    pub config: RunConfig,
    /// Where ONNX Runtime is looked for, for models that can only be queried.
    pub runtime: RuntimeOptions,
    /// How the file meets ONNX Runtime for the first time; `None` where that is not installed.
    pub probe: Option<ProbeOptions>,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct InvertResult {
    /// The folder: `CLASS/NNN.png`, `sheet.png`, `loss.svg`.
    pub path: PathBuf,
    /// Images written.
    pub images: usize,
    /// Share of them the model itself puts into the wanted class.
    pub agreement: Option<f64>,
    /// Last cross-entropy seen.
    pub loss: f64,
    /// Why it ended: `done`, `budget-spent`.
    pub stop_reason: String,
    /// Queries spent.
    pub queries: u64,
    /// Wall time.
    pub seconds: f64,
}

/// Inverts one model.
///
/// # Errors
/// When the model cannot be used, the folder holds something, or the user interrupts.
pub fn invert(context: &Context, options: &InvertOptions) -> Result<InvertResult> {
    let begin = Instant::now();
    refuse_occupied(&options.out)?;
    let is_sidecar = options.model.extension().is_some_and(|e| e == "yaml" || e == "yml");
    let spec = if is_sidecar {
        ingest_remote::look(&candidates::remote_at(&options.model)?, &context.secrets)?.spec
    } else {
        let prober = options.probe.as_ref().map(ProbeOptions::prober);
        ingest_probe::try_out(read::read_file(&options.model)?, prober.as_ref())?.spec
    };
    let folder = options.model.parent().filter(|p| !p.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new(".")).to_path_buf();
    let teachers = TeacherOptions::new(context, &options.config, folder, options.runtime.clone());
    let teacher = open(&spec, &teachers)?;
    let config = settings::recover_config(&options.config);
    let via = match options.config.recover.by {
        RecoverBy::Pixels => Via::Pixels,
        RecoverBy::Generator => Via::Generator,
        RecoverBy::Five => {
            return Err(Error::usage("`recover.by: five` learns from a whole zoo, not one model")
                .hint(
                    "use `metazoa train ZOO -s recover.by=five`, or `pixels` or `generator` here",
                ));
        }
    };
    let stage = context.progress.stage("invert", Some(config.steps(&spec, via) as u64));
    let losses: Mutex<Vec<f64>> = Mutex::default();
    let lock = || losses.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let watch = Watch {
        observe: &|iteration| {
            stage.advance(1);
            stage.message(&format!("loss {:.3}", iteration.loss));
            lock().push(iteration.loss);
        },
        interrupt: &context.interrupt,
    };
    let recovered = recover_one(teacher.as_ref(), &config, via, &watch)?;
    drop(stage);
    let model = &recovered.images;
    let images = model.images();
    let [_, _, height, width] = images.shape();
    for (class, label) in model.labels.iter().enumerate() {
        let own: Vec<usize> = (0..model.len()).filter(|&i| model.classes[i] == class).collect();
        let name = format!("{class:04}_{}", file_name(label));
        for (number, &index) in own.iter().enumerate() {
            let path = options.out.join(&name).join(format!("{number:03}.png"));
            let parent = path.parent().unwrap_or(&options.out);
            std::fs::create_dir_all(parent).map_err(|error| Error::io(parent, &error))?;
            write_atomically(&path, &image_png(images.image(index), height, width)?)?;
        }
    }
    write_atomically(
        &options.out.join("sheet.png"),
        &contact_sheet(&images, &model.classes, SHEET_COLUMNS)?,
    )?;
    let losses = losses.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let points = losses.iter().enumerate().map(|(step, &loss)| (step as f64, loss)).collect();
    let series = Series { name: "cross-entropy".into(), points };
    if let Some(plot) = line_plot("step", "loss", &[series])? {
        write_atomically(&options.out.join("loss.svg"), plot.as_bytes())?;
    }
    Ok(InvertResult {
        path: options.out.clone(),
        images: model.len(),
        agreement: Some(recovered.agreement).filter(|share| share.is_finite()),
        loss: losses.last().copied().unwrap_or(f64::NAN),
        stop_reason: recovered.stop.name().into(),
        queries: teacher.queries(),
        seconds: begin.elapsed().as_secs_f64(),
    })
}

fn refuse_occupied(out: &Path) -> Result<()> {
    let occupied = std::fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some());
    if occupied {
        return Err(Error::input(format!("the folder is not empty: `{}`", out.display()))
            .hint("choose another `--out`"));
    }
    Ok(())
}

/// A label as a folder's name.
fn file_name(label: &str) -> String {
    label.chars().map(|c| if c.is_alphanumeric() || "-_ ".contains(c) { c } else { '_' }).collect()
}
