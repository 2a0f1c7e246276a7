//! The use-case `train`: ingest a zoo, recover images from every model, meta-train on them.
//!
//! Everything lands in the run folder as it is made: one file a model in `bank/`, checkpoints while
//! training. A run that was killed or interrupted goes on from there and ends with the same bytes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Instant;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::config::{AccessName, BackboneName, MetaStart, Method, RecoverBy, RunConfig};
use super::ingest::{CatalogWriting, Ingest, IngestOptions, ProbeOptions, Strictness, ingest};
use super::mean::mean_of_teachers;
use super::queries::{ModelOutcome, Queries};
use super::run_folder::{RunFolder, RunRecord, UsedModel, versions};
use super::teachers::{Lenders, Opening, TeacherOptions};
use super::{Context, queries, settings};
use crate::access::library::RuntimeOptions;
use crate::error::{Error, ErrorKind, Result};
use crate::methods::parts::ImageBank;
use crate::methods::{RecoverItem, RecoverStop, Recovered, Via, recover};
use crate::report::{Event, EventLog, contact_sheet};
use crate::tensor::Images;
use crate::zoo::read::Reach;
use crate::zoo::{ModelSpec, Rejection};

mod bidf;
mod five;
mod free;
mod meta;
mod pretrain;
mod seconds;

pub use meta::PseudoValidation;
use meta::Trained;
pub use seconds::MetaSeconds;

/// Rows of the picture of recovered images.
const SHEET_ROWS: usize = 24;
/// Images a row.
const SHEET_COLUMNS: usize = 12;

/// What to train.
#[derive(Debug, Clone)]
pub struct TrainOptions {
    /// The settings.
    pub config: RunConfig,
    /// The run folder.
    pub out: PathBuf,
    /// Whether `out` must be new.
    pub start: Start,
    /// The command line, for the record.
    pub command: Vec<String>,
    /// Where ONNX Runtime is looked for.
    pub runtime: RuntimeOptions,
    /// How black-box models are tried out at ingest.
    pub probe: Option<ProbeOptions>,
}

/// Whether a run begins or goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// In a new folder.
    New,
    /// In the folder of an unfinished run, with that run's settings.
    Resume,
}

/// Seconds by stage.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TrainSeconds {
    /// Asking about drawings and distilling the answers, where the meta-model starts from them.
    #[serde(default)]
    pub pretrain: f64,
    /// Recovering images.
    pub recover: f64,
    /// Meta-training.
    pub meta: f64,
    /// Its parts.
    pub parts: MetaSeconds,
    /// All, ingest included.
    pub total: f64,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TrainResult {
    /// The run folder.
    pub run: PathBuf,
    /// The method.
    pub method: String,
    /// `done`, `early-stop`, `diverged`.
    pub stop_reason: String,
    /// Meta-training steps.
    pub steps: u64,
    /// The best check on pseudo-validation, whose weights were kept; absent without `meta.early_stop`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pseudo_validation: Option<PseudoValidation>,
    /// Models that gave images.
    pub models_used: usize,
    /// Models of the zoo that could not be used.
    pub models_rejected: usize,
    /// Images recovered.
    pub images: usize,
    /// Queries spent on black-box models, those that failed included.
    pub queries: u64,
    /// How the recovery of each model ended, by id.
    pub models: Vec<ModelOutcome>,
    /// Wall time of this call.
    pub seconds: TrainSeconds,
}

/// Trains; the run folder holds everything that came of it.
///
/// # Errors
/// When no model can be used, the run folder cannot be made, or the user interrupts (the folder can
/// then be resumed).
pub fn train(context: &Context, options: &TrainOptions) -> Result<TrainResult> {
    let begin = Instant::now();
    let resumed = match options.start {
        Start::New => None,
        Start::Resume => Some(RunFolder::open(&options.out)?),
    };
    let config = match &resumed {
        Some(run) => run.config()?,
        None => options.config.clone(),
    };
    // A backbone that cannot be trained is refused before anything is recovered.
    let start = match &resumed {
        Some(_) => None,
        None => Some(settings::untrained_model(&config)?),
    };
    let found = ingest(
        context,
        &IngestOptions {
            zoo: config.zoo.clone(),
            catalog: CatalogWriting::Skip,
            reach: match config.access {
                AccessName::Auto => Reach::AsFound,
                AccessName::BlackBox => Reach::Asked,
            },
            probe: options.probe.clone(),
        },
    )?;
    found.verdict(Strictness::Lenient)?;
    let mut specs = found.specs();
    specs.truncate(config.max_models.unwrap_or(usize::MAX));
    let start = match (start, config.meta.start) {
        (Some(_), MetaStart::MeanOfTeachers) => {
            Some(mean_of_teachers(context, &config, &specs, &found.zoo)?)
        }
        (start, _) => start,
    };
    let run = match resumed {
        Some(run) => {
            same_models(&run.record()?, &specs)?;
            run
        }
        None => {
            let record = new_record(&config, &specs, &found, &options.command);
            let run = RunFolder::create(&options.out, &config, &record)?;
            let from_files = matches!(config.meta.backbone, BackboneName::File(_))
                || config.meta.start == MetaStart::MeanOfTeachers;
            if let (Some(start), true) = (&start, from_files) {
                let distilled = config.meta.start == MetaStart::Distilled;
                start.save(&if distilled { run.undistilled() } else { run.start() })?;
            }
            run
        }
    };
    let log = run.event_log()?;
    let work = Work { context, options, config: &config, run: &run, log: &log, begin };
    let mut pretrain = 0.0;
    let result = work.pretrain(&found, &specs).and_then(|seconds| {
        pretrain = seconds;
        match config.method {
            Method::Inversion => work.recover_first(&found, &specs, |bank| work.meta_train(bank)),
            Method::Purer => work
                .recover_first(&found, &specs, |bank| work.meta_train_moving(&found, &specs, bank)),
            Method::Free => work.free(&found, &specs),
            Method::BidfMkd => work.bidf(&found, &specs),
        }
    });
    let mut record = run.record()?;
    let (bank, recover, trained, meta) = match result {
        Ok(done) => done,
        Err(error) => {
            let reason = match error.kind() {
                ErrorKind::Interrupted => "interrupted",
                _ => "failed",
            };
            record.stop_reason = Some(reason.into());
            run.save_record(&record)?;
            return Err(error);
        }
    };
    let total = begin.elapsed().as_secs_f64();
    let Trained { reason, steps, best, seconds: parts } = trained;
    record.stop_reason = Some(reason.into());
    record.meta_updates += parts.updates;
    let stages = [("recover", recover), ("meta", meta), ("total", total)];
    let before = (pretrain > 0.0).then_some(("pretrain", pretrain));
    for (name, value) in before.into_iter().chain(stages).chain(parts.named()) {
        *record.seconds.entry(name.into()).or_default() += value;
    }
    run.save_record(&record)?;
    Ok(TrainResult {
        run: run.path().into(),
        method: config.method.name().into(),
        stop_reason: reason.into(),
        steps,
        pseudo_validation: best,
        models_used: bank.models().len(),
        models_rejected: record.rejected.len(),
        images: bank.len(),
        queries: record.outcomes.iter().map(|model| model.queries).sum(),
        models: record.outcomes.clone(),
        seconds: TrainSeconds { pretrain, recover, meta, parts, total },
    })
}

fn new_record(
    config: &RunConfig,
    specs: &[ModelSpec],
    found: &Ingest,
    command: &[String],
) -> RunRecord {
    let used = |spec: &ModelSpec| UsedModel {
        id: spec.id.clone(),
        sha: spec.sha.clone(),
        access: spec.access,
        classes: spec.classes,
        norm_taps: spec.norm_taps,
        images: 0,
        queries: 0,
        agreement: None,
    };
    RunRecord {
        versions: versions(),
        seed: config.seed,
        command: command.to_vec(),
        models: specs.iter().map(used).collect(),
        rejected: found.rejected.clone(),
        outcomes: Vec::new(),
        query_limits: queries::limits(
            specs,
            config.recover.black_box.query_budget,
            // One that chooses whom to ask has the run's budget whole.
            config.recover.black_box.run_budget.filter(|_| config.method != Method::BidfMkd),
        ),
        stop_reason: None,
        seconds: BTreeMap::new(),
        meta_updates: 0,
    }
}

/// A resumed run must find the models it began with.
fn same_models(record: &RunRecord, specs: &[ModelSpec]) -> Result<()> {
    let now: BTreeMap<&str, &str> =
        specs.iter().map(|spec| (spec.id.as_str(), spec.sha.as_str())).collect();
    for model in &record.models {
        match now.get(model.id.as_str()) {
            Some(sha) if *sha == model.sha => {}
            found => {
                let what = if found.is_some() { "has changed" } else { "is gone" };
                return Err(Error::input(format!(
                    "model {what} since the run began: `{}`",
                    model.id
                ))
                .hint("put the zoo back as it was, or start a new run"));
            }
        }
    }
    Ok(())
}

struct Work<'a> {
    context: &'a Context,
    options: &'a TrainOptions,
    config: &'a RunConfig,
    run: &'a RunFolder,
    log: &'a EventLog,
    begin: Instant,
}

impl Work<'_> {
    fn time(&self) -> f64 {
        self.begin.elapsed().as_secs_f64()
    }

    /// Recovers every model's images and then trains on them: the bank, how training ended, and the seconds of both.
    fn recover_first(
        &self,
        found: &Ingest,
        specs: &[ModelSpec],
        train: impl FnOnce(&ImageBank) -> Result<Trained>,
    ) -> Result<(ImageBank, f64, Trained, f64)> {
        let (bank, recover) = self.recover(found, specs)?;
        let begin = Instant::now();
        let bank = self.merged(bank);
        let trained = train(&bank)?;
        Ok((bank, recover, trained, begin.elapsed().as_secs_f64()))
    }

    /// Recovers every model's images; returns the bank and the time it took.
    fn recover(&self, found: &Ingest, specs: &[ModelSpec]) -> Result<(ImageBank, f64)> {
        let begin = Instant::now();
        // A resumed run leaves out what failed before, so that its bank stays the same.
        let gone: Vec<String> = self.run.record()?.rejected.into_iter().map(|r| r.path).collect();
        let specs: Vec<&ModelSpec> =
            specs.iter().filter(|spec| !gone.contains(&rejected_path(found, spec))).collect();
        let settings = settings::recover_config(self.config);
        let generator;
        let via = match self.config.recover.by {
            RecoverBy::Pixels => Via::Pixels,
            RecoverBy::Generator => Via::Generator,
            RecoverBy::Five => {
                generator = self.meta_generator(found, &specs)?;
                Via::Five(&generator)
            }
        };
        let steps = |spec: &ModelSpec| settings.steps(spec, via) as u64;
        let stage =
            self.context.progress.stage("recover", Some(specs.iter().map(|s| steps(s)).sum()));
        let items: Vec<RecoverItem> = specs
            .iter()
            .map(|spec| RecoverItem { id: spec.id.clone(), file: self.bank_file(spec) })
            .collect();
        let opening = self.opening(found, &specs)?;
        let failed: Mutex<Option<Error>> = Mutex::default();
        let keep = |error: Error| {
            failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(error);
        };
        let results = recover(
            &items,
            &|index| opening.open(index),
            (&settings, via),
            &self.context.interrupt,
            &|index, iteration| {
                stage.advance(1);
                if iteration.step % 10 == 0 {
                    let event = Event::new(self.time(), "recover", iteration.step as u64)
                        .model(&items[index].id)
                        .value("loss", iteration.loss)
                        .value("statistics", iteration.statistics)
                        .value("prior", iteration.prior);
                    if let Err(error) = self.log.write(&event) {
                        keep(error);
                    }
                }
            },
            &|index, result| match result {
                Ok(recovered) => stage.message(&format!(
                    "{}: agreement {:.0} %",
                    items[index].id,
                    100.0 * recovered.agreement
                )),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => self.context.progress.note(&format!("left out: {error}")),
            },
        );
        drop(stage);
        self.context.check_interrupt()?;
        if let Some(error) = failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
        {
            return Err(error);
        }
        let bank = self.gather(found, &specs, results)?;
        Ok((bank, begin.elapsed().as_secs_f64()))
    }

    /// Where the images of a model go.
    fn bank_file(&self, spec: &ModelSpec) -> PathBuf {
        self.run.bank().join(format!("{}.safetensors", queries::file_name(spec)))
    }

    /// How teachers are opened.
    fn teachers(&self, found: &Ingest) -> Result<TeacherOptions> {
        let runtime = self.options.runtime.clone();
        let zoo = found.zoo.clone();
        let mut teachers = TeacherOptions::new(self.context, self.config, zoo, runtime);
        teachers.queries = Some(self.queries()?);
        Ok(teachers)
    }

    /// How the models of `specs` are opened, by their number there, statistics on loan included.
    fn opening<'s>(&self, found: &'s Ingest, specs: &'s [&'s ModelSpec]) -> Result<Opening<'s>> {
        let lenders = Lenders::new(specs, &found.zoo, &self.config.recover.white_box);
        Ok(Opening { specs, teachers: self.teachers(found)?, lenders })
    }

    fn queries(&self) -> Result<Queries> {
        Ok(Queries::new(self.run.queries(), self.run.record()?.query_limits))
    }

    /// Puts the images together in the order of the specs, and writes down what failed.
    fn gather(
        &self,
        found: &Ingest,
        specs: &[&ModelSpec],
        results: Vec<Result<Recovered>>,
    ) -> Result<ImageBank> {
        let mut record = self.run.record()?;
        let mut bank = ImageBank::default();
        let mut first_error = None;
        let queries = self.queries()?;
        // What failed in an earlier call keeps its row.
        record.outcomes.retain(|old| specs.iter().all(|spec| spec.id != old.id));
        for (spec, result) in specs.iter().zip(results) {
            let mut outcome = ModelOutcome {
                id: spec.id.clone(),
                access: spec.access,
                stop_reason: "failed".into(),
                images: 0,
                queries: queries.spent(spec)?,
                query_budget: queries.limit(spec),
                error: None,
            };
            match result {
                Ok(recovered) => {
                    outcome.stop_reason = recovered.stop.name().into();
                    outcome.images = recovered.images.len();
                    if let Some(used) = record.models.iter_mut().find(|m| m.id == spec.id) {
                        used.images = recovered.images.len();
                        used.queries = outcome.queries;
                        used.agreement =
                            Some(recovered.agreement).filter(|share| share.is_finite());
                    }
                    bank.push(recovered.images)?;
                }
                // Nothing failed: the budget does not cover one step.
                Err(error) if error.kind() == ErrorKind::Budget => {
                    outcome.stop_reason = RecoverStop::BudgetSpent.name().into();
                    if let Some(used) = record.models.iter_mut().find(|m| m.id == spec.id) {
                        used.queries = outcome.queries;
                    }
                    first_error.get_or_insert(error);
                }
                Err(error) => {
                    outcome.error = Some(error.to_string());
                    record.models.retain(|model| model.id != spec.id);
                    record.rejected.push(Rejection {
                        path: rejected_path(found, spec),
                        reason: error.to_string(),
                        hint: error.hint_text().map(str::to_owned),
                    });
                    first_error.get_or_insert(error);
                }
            }
            record.outcomes.push(outcome);
        }
        record.outcomes.sort_by(|a, b| a.id.cmp(&b.id));
        self.run.save_record(&record)?;
        match first_error {
            Some(error) if bank.is_empty() => Err(error),
            _ => {
                self.run.write("bank/sheet.png", &self.sheet(&bank)?)?;
                Ok(bank)
            }
        }
    }

    /// A picture of some recovered images: one row a class, spread over the models.
    fn sheet(&self, bank: &ImageBank) -> Result<Vec<u8>> {
        let total: usize = bank.models().iter().map(|model| model.labels.len()).sum();
        let every = total.div_ceil(SHEET_ROWS).max(1);
        let [h, w] = self.config.image_size;
        let mut shown = Images::zeros([0, 3, h, w]);
        let mut labels = Vec::new();
        let mut class_number = 0;
        for model in bank.models() {
            let images = model.images();
            for class in 0..model.labels.len() {
                if class_number % every == 0 {
                    let own: Vec<usize> = (0..model.len())
                        .filter(|&i| model.classes[i] == class)
                        .take(SHEET_COLUMNS)
                        .collect();
                    shown.extend(&images.select(&own))?;
                    labels.extend(std::iter::repeat_n(class_number, own.len()));
                }
                class_number += 1;
            }
        }
        contact_sheet(&shown, &labels, SHEET_COLUMNS)
    }
}

/// The file of a spec, relative to the zoo, as rejections name it.
fn rejected_path(found: &Ingest, spec: &ModelSpec) -> String {
    let path = spec.path.strip_prefix(&found.zoo).unwrap_or(&spec.path);
    path.display().to_string()
}
