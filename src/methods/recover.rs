//! Recovery of a whole zoo: every teacher's images, side by side, each model a file of its own.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rayon::prelude::*;

use crate::access::Teacher;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::meta::protonet::first_largest;
use crate::tensor::{Images, RngStream, TensorStore};
use crate::zoo::{Access, ModelSpec};

use super::five::MetaGenerator;
use super::generate::{GenerateConfig, generate};
use super::invert::{InvertConfig, invert};
use super::parts::{ModelImages, Naming};

/// What to recover.
#[derive(Debug, Clone, PartialEq)]
pub struct RecoverConfig {
    /// Seed of every draw.
    pub seed: u64,
    /// `[height, width]` of the recovered images.
    pub image_size: [usize; 2],
    /// Images of each class of each model.
    pub images_per_class: usize,
    /// Most images inverted in one batch; a model of more classes is done in blocks of whole classes.
    pub batch: usize,
    /// For teachers with exact gradients.
    pub white_box: InvertConfig,
    /// For teachers that can only be asked.
    pub black_box: GenerateConfig,
}

/// One step of one teacher's recovery.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RecoverIteration {
    /// Number of the step, from 1.
    pub step: usize,
    /// Mean cross-entropy to the wanted labels.
    pub loss: f64,
    /// Unweighted statistics term.
    pub statistics: f64,
    /// Weighted priors on the pixels.
    pub prior: f64,
}

/// How a running recovery is watched and stopped.
pub struct Watch<'a> {
    /// Told of every step.
    pub observe: &'a (dyn Fn(&RecoverIteration) + Sync),
    /// Set to stop.
    pub interrupt: &'a AtomicBool,
}

impl Watch<'_> {
    pub(super) fn check(&self) -> Result<()> {
        if self.interrupt.load(Ordering::Relaxed) { Err(Error::interrupted()) } else { Ok(()) }
    }

    pub(super) fn tell(&self, iteration: &RecoverIteration) {
        (self.observe)(iteration);
    }
}

/// Why the recovery of one teacher ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecoverStop {
    /// All steps are done.
    Done,
    /// The query budget did not cover the next step, or the judging of the images.
    BudgetSpent,
    /// No round of visits came to this model.
    NotVisited,
    /// The model failed after it had given images.
    Failed,
}

impl RecoverStop {
    /// The name in results and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::BudgetSpent => "budget-spent",
            Self::NotVisited => "not-visited",
            Self::Failed => "failed",
        }
    }
}

/// What came of one teacher.
#[derive(Debug, Clone)]
pub struct Recovered {
    /// Its images.
    pub images: ModelImages,
    /// Share of them that the teacher itself puts into the wanted class.
    pub agreement: f64,
    /// Why it ended.
    pub stop: RecoverStop,
    /// Wall-clock time; 0 for images read from an earlier run.
    pub seconds: f64,
}

impl Recovered {
    /// `images` of a teacher, of its classes `classes`, judged by it.
    ///
    /// # Errors
    /// Those of the teacher but a spent budget.
    pub fn of(
        teacher: &dyn Teacher,
        images: &Images,
        classes: Vec<usize>,
        stop: RecoverStop,
    ) -> Result<Self> {
        let judged = Self::judged(teacher.spec(), images, classes, f64::NAN, stop);
        let agreement = match judged.images.is_empty() {
            true => f64::NAN,
            false => agreement(teacher, &judged.images)?,
        };
        let stop = match stop {
            RecoverStop::Done if agreement.is_nan() => RecoverStop::BudgetSpent,
            stop => stop,
        };
        Ok(Self { agreement, stop, ..judged })
    }

    /// `images` of a model, of its classes `classes`, of which it puts a share `agreement` into them.
    pub fn judged(
        spec: &ModelSpec,
        images: &Images,
        classes: Vec<usize>,
        agreement: f64,
        stop: RecoverStop,
    ) -> Self {
        let done = classes.iter().max().map_or(0, |&class| class + 1);
        // The file keeps one name a line.
        let whole = spec.labels.iter().all(|label| !label.contains('\n'));
        let (labels, naming) = if spec.labels.len() == spec.classes && whole {
            (spec.labels[..done].to_vec(), Naming::Named)
        } else {
            ((0..done).map(|class| class.to_string()).collect(), Naming::Numbered)
        };
        let mut images = ModelImages::new(&spec.id, labels, classes, images);
        images.naming = naming;
        Self { images, agreement, stop, seconds: 0.0 }
    }

    /// Writes the images and what is known of them to `path`, whole or not at all. The queries spent are not among it:
    /// after a kill in the middle of a model they are more, while its images are the same.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut store = self.images.to_store();
        store.words.insert("agreement".into(), self.agreement.to_string());
        store.words.insert("stop".into(), self.stop.name().into());
        store.save(path)
    }

    /// Reads what [`Recovered::save`] wrote.
    ///
    /// # Errors
    /// When the file is missing or not such a file.
    pub fn load(path: &Path) -> Result<Self> {
        let at = || format!("image bank `{}`", path.display());
        let store = TensorStore::load(path).context(at)?;
        Ok(Self {
            images: ModelImages::from_store(&store).context(at)?,
            agreement: store.number("agreement").context(at)?,
            stop: match store.words.get("stop").map(String::as_str) {
                Some("budget-spent") => RecoverStop::BudgetSpent,
                Some("not-visited") => RecoverStop::NotVisited,
                Some("failed") => RecoverStop::Failed,
                _ => RecoverStop::Done,
            },
            seconds: 0.0,
        })
    }
}

/// What images are recovered with.
#[derive(Debug, Clone, Copy)]
pub enum Via<'a> {
    /// Free pixels where gradients are exact, a generator of each block's own where they are estimated.
    Pixels,
    /// A generator of each block's own.
    Generator,
    /// One generator for all, adapted to each model in a few steps.
    Five(&'a MetaGenerator),
}

impl Via<'_> {
    /// Steps of one block.
    pub fn steps(&self, access: Access, config: &RecoverConfig) -> usize {
        match (self, access) {
            (Self::Pixels, Access::WhiteBox) => config.white_box.steps,
            (Self::Pixels | Self::Generator, _) => config.black_box.steps,
            (Self::Five(generator), _) => generator.config().steps,
        }
    }

    /// One image a label.
    fn block(
        &self,
        teacher: &dyn Teacher,
        labels: &[usize],
        config: &RecoverConfig,
        block: u64,
        watch: &Watch<'_>,
    ) -> Result<(Images, RecoverStop)> {
        let (seed, size, spec) = (config.seed, config.image_size, teacher.spec());
        match (self, spec.access) {
            (Self::Pixels, Access::WhiteBox) => {
                let own = &config.white_box;
                let made = invert(teacher, labels, size, own, seed, block, watch)?;
                Ok((made, RecoverStop::Done))
            }
            (Self::Pixels | Self::Generator, _) => {
                let rng = RngStream::new(seed, "generate", &spec.sha, block);
                let made = generate(teacher, labels, size, &config.black_box, None, rng, watch)?;
                Ok((made.images, made.stop))
            }
            (Self::Five(generator), _) => {
                let mut rng = RngStream::new(seed, "five", &spec.sha, block);
                let visit = generator.visit(teacher, labels, None, &mut rng, watch)?;
                Ok((visit.images, RecoverStop::Done))
            }
        }
    }
}

/// Recovers the images of one teacher.
///
/// # Errors
/// Those of the teacher; [`crate::ErrorKind::Interrupted`] when the watch asks to stop.
pub fn recover_one(
    teacher: &dyn Teacher,
    config: &RecoverConfig,
    via: Via<'_>,
    watch: &Watch<'_>,
) -> Result<Recovered> {
    let start = Instant::now();
    let spec = teacher.spec();
    let [h, w] = config.image_size;
    let mut images = Images::zeros([0, 3, h, w]);
    let mut classes = Vec::new();
    let per_block = (config.batch / config.images_per_class.max(1)).max(1);
    let all: Vec<usize> = (0..spec.classes).collect();
    let mut stop = RecoverStop::Done;
    let mut done = 0;
    for (block, chosen) in all.chunks(per_block).enumerate() {
        let labels: Vec<usize> = chosen
            .iter()
            .flat_map(|&class| std::iter::repeat_n(class, config.images_per_class))
            .collect();
        let made = match via.block(teacher, &labels, config, block as u64, watch) {
            Ok((made, ended)) => {
                if ended != RecoverStop::Done {
                    stop = ended;
                }
                made
            }
            // The classes of earlier blocks are whole, and bought.
            Err(error) if error.kind() == ErrorKind::Budget && done > 0 => {
                stop = RecoverStop::BudgetSpent;
                break;
            }
            Err(error) => return Err(error),
        };
        images.extend(&made)?;
        classes.extend(labels);
        done += chosen.len();
    }
    let recovered = Recovered::of(teacher, &images, classes, stop)?;
    Ok(Recovered { seconds: start.elapsed().as_secs_f64(), ..recovered })
}

/// Share of the images, as stored, that `teacher` puts into their class.
fn agreement(teacher: &dyn Teacher, images: &ModelImages) -> Result<f64> {
    let logits = match teacher.logits(&images.images()) {
        Ok(logits) => logits,
        // Judging must not cost more than the budget allows; unknown is shown as such.
        Err(error) if error.kind() == ErrorKind::Budget => return Ok(f64::NAN),
        Err(error) => return Err(error),
    };
    let rows = logits.chunks_exact(teacher.spec().classes).zip(&images.classes);
    let right = rows.filter(|(row, wanted)| first_largest(row) == **wanted).count();
    Ok(right as f64 / images.len().max(1) as f64)
}

/// Opens a teacher when its turn comes; a zoo of thousands is never open at once.
pub type Opener<'a> = dyn Fn(usize) -> Result<Box<dyn Teacher>> + Sync + 'a;

/// One item of [`recover`]'s work: which file keeps the model's images, and what to call it.
#[derive(Debug, Clone)]
pub struct RecoverItem {
    /// For messages.
    pub id: String,
    /// Where its images go; a file already there is taken as done.
    pub file: PathBuf,
}

/// Recovers all `items` over rayon's current pool. A teacher that fails becomes an `Err` in its place
/// and stops no other; an interrupt stops all, and what is finished stays on disk.
pub fn recover(
    items: &[RecoverItem],
    open: &Opener<'_>,
    (config, via): (&RecoverConfig, Via<'_>),
    interrupt: &AtomicBool,
    observe: &(dyn Fn(usize, &RecoverIteration) + Sync),
    finished: &(dyn Fn(usize, &Result<Recovered>) + Sync),
) -> Vec<Result<Recovered>> {
    let one = |(index, item): (usize, &RecoverItem)| -> Result<Recovered> {
        if interrupt.load(Ordering::Relaxed) {
            return Err(Error::interrupted());
        }
        if item.file.exists() {
            return Recovered::load(&item.file);
        }
        let teacher = open(index)?;
        let told = |iteration: &RecoverIteration| observe(index, iteration);
        let watch = Watch { observe: &told, interrupt };
        let recovered = recover_one(teacher.as_ref(), config, via, &watch)?;
        recovered.save(&item.file)?;
        Ok(recovered)
    };
    items
        .par_iter()
        .enumerate()
        .with_max_len(1)
        .map(|(index, item)| {
            let result = one((index, item)).context(|| format!("model `{}`", item.id));
            finished(index, &result);
            result
        })
        .collect()
}
