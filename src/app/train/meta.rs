//! Meta-training within a run: watched, logged, saved, resumed.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Work;
use super::seconds::MetaSeconds;
use crate::app::config::MergeClasses;
use crate::app::ingest::Ingest;
use crate::app::progress::Stage;
use crate::app::settings;
use crate::error::{Error, Result};
use crate::meta::{ClassSource, Iteration, Limits, StopReason, Trainer};
use crate::methods::parts::{DynamicSet, ImageBank};
use crate::methods::{Eci, EciStep};
use crate::report::Event;
use crate::tensor::TensorStore;
use crate::zoo::{Access, ModelSpec};

/// Steps between lines of the log.
const LOG_EVERY: u64 = 10;

/// How meta-training ended.
pub(super) struct Trained {
    /// `done`, `early-stop` or `diverged`.
    pub(super) reason: &'static str,
    /// Steps of the run.
    pub(super) steps: u64,
    /// The check on pseudo-validation whose weights were kept.
    pub(super) best: Option<PseudoValidation>,
    /// Where the time of this call went.
    pub(super) seconds: MetaSeconds,
}

/// The best check on pseudo-validation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PseudoValidation {
    /// Accuracy on its episodes, in 0..1.
    pub accuracy: f64,
    /// The step after which it was made.
    pub step: u64,
}

/// What happens around the steps: progress, log, checkpoints, interrupts.
pub(super) struct Watching<'a> {
    work: &'a Work<'a>,
    stage: Box<dyn Stage>,
    failed: Option<Error>,
    /// All, and at the last line of the log.
    seconds: [MetaSeconds; 2],
}

impl<'a> Watching<'a> {
    pub(super) fn new(work: &'a Work<'a>, trainer: &Trainer) -> Self {
        let stage = work.context.progress.stage("meta-train", Some(work.config.meta.steps));
        stage.advance(trainer.step());
        Self { work, stage, failed: None, seconds: Default::default() }
    }

    fn try_after(
        &mut self,
        trainer: &Trainer,
        iteration: &Iteration,
        save: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.stage.advance(1);
        self.seconds[0].add_update(&iteration.seconds);
        if let (Some(accuracy), Some((best, _))) = (iteration.validation, trainer.best_check()) {
            self.stage.message(&format!(
                "pseudo-validation {:.1} %, best {:.1} %",
                100.0 * accuracy,
                100.0 * best
            ));
            let event = Event::new(self.work.time(), "validate", iteration.step)
                .value("accuracy", accuracy)
                .value("best", best);
            self.work.log.write(&event)?;
        }
        if iteration.step.is_multiple_of(LOG_EVERY) {
            self.stage.message(&format!(
                "loss {:.3}, accuracy {:.0} %",
                iteration.loss,
                100.0 * iteration.accuracy
            ));
            let event = Event::new(self.work.time(), "meta", iteration.step)
                .value("loss", iteration.loss)
                .value("accuracy", iteration.accuracy);
            self.work.log.write(&event)?;
            self.log_seconds(iteration.step)?;
        }
        if iteration.step.is_multiple_of(self.work.config.meta.checkpoint_every) {
            save()
        } else {
            Ok(())
        }
    }

    /// Mean seconds of an update since the last such line.
    fn log_seconds(&mut self, step: u64) -> Result<()> {
        let [all, before] = self.seconds;
        self.seconds[1] = all;
        let updates = (all.updates - before.updates).max(1) as f64;
        let mut event = Event::new(self.work.time(), "seconds", step);
        let earlier: BTreeMap<&str, f64> = before.named().collect();
        for (name, seconds) in all.named() {
            let spent = seconds - earlier.get(name).copied().unwrap_or_default();
            event = event.value(name, spent / updates);
        }
        self.work.log.write(&event)
    }

    /// After a step: whether to go on.
    pub(super) fn after(
        &mut self,
        trainer: &Trainer,
        iteration: &Iteration,
        save: impl FnOnce() -> Result<()>,
    ) -> ControlFlow<()> {
        let done = self.try_after(trainer, iteration, save);
        self.go_on(done)
    }

    /// Whether to go on after something that may have failed.
    pub(super) fn go_on(&mut self, done: Result<()>) -> ControlFlow<()> {
        self.failed = done.err();
        if self.failed.is_some() || self.work.context.is_interrupted() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }

    /// After the last step.
    pub(super) fn end(
        self,
        trainer: &Trainer,
        reason: StopReason,
        save: impl FnOnce() -> Result<()>,
    ) -> Result<Trained> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        save()?;
        let reason = match reason {
            StopReason::Interrupted => return Err(Error::interrupted()),
            StopReason::Diverged => "diverged",
            StopReason::EarlyStop => "early-stop",
            StopReason::BudgetSpent => "budget-spent",
            StopReason::Done | StopReason::StepLimit | StopReason::TimeLimit => "done",
        };
        let best = trainer.best_check();
        let best = best.map(|(accuracy, step)| PseudoValidation { accuracy, step });
        Ok(Trained { reason, steps: trainer.step(), best, seconds: self.seconds[0] })
    }
}

impl Work<'_> {
    /// The bank with the classes merged that the settings say, and says how many.
    pub(super) fn merged(&self, mut bank: ImageBank) -> ImageBank {
        if self.config.meta.merge_classes == MergeClasses::ByName {
            let (all, merged) = (bank.n_classes(), bank.merge_by_name());
            self.context
                .progress
                .note(&format!("classes merged by name: {all} classes count as {}", all - merged));
        }
        bank
    }

    /// The trainer of the newest checkpoint, with all that is in it, or an untrained one.
    pub(super) fn trainer(&self) -> Result<(Trainer, Option<TensorStore>)> {
        let (mut trainer, store) = self.bare_trainer()?;
        self.draw_from(&mut trainer, None)?;
        Ok((trainer, store))
    }

    fn bare_trainer(&self) -> Result<(Trainer, Option<TensorStore>)> {
        let config = settings::train_config(self.config);
        let Ok(checkpoint) = self.run.latest_checkpoint() else {
            return Ok((
                Trainer::new(config, settings::starting_model(self.run, self.config)?),
                None,
            ));
        };
        let store = TensorStore::load(&checkpoint)?;
        let named = |error: Error| error.context(format!("`{}`", checkpoint.display()));
        Ok((Trainer::from_store(config, &store).map_err(named)?, Some(store)))
    }

    fn checkpoint(&self, trainer: &Trainer) -> Result<()> {
        self.checkpoint_with(trainer, |_| Ok(()))
    }

    /// A checkpoint of the trainer and of what `write` adds.
    pub(super) fn checkpoint_with(
        &self,
        trainer: &Trainer,
        write: impl FnOnce(&mut TensorStore) -> Result<()>,
    ) -> Result<()> {
        let mut store = trainer.to_store()?;
        write(&mut store)?;
        self.run.save_checkpoint(trainer.step(), |path| store.save(path)).map(|_| ())
    }

    /// Meta-trains on images that stay, from the newest checkpoint or from the start.
    pub(super) fn meta_train(&self, bank: &ImageBank) -> Result<Trained> {
        let (mut trainer, _) = self.trainer()?;
        let mut watching = Watching::new(self, &trainer);
        let reason = trainer.run(bank, Limits::default(), &mut |trainer, iteration| {
            watching.after(trainer, iteration, || self.checkpoint(trainer))
        })?;
        watching.end(&trainer, reason, || self.checkpoint(&trainer))
    }

    /// The same while the images of white-box models move (PURER).
    pub(super) fn meta_train_moving(
        &self,
        found: &Ingest,
        specs: &[ModelSpec],
        bank: &ImageBank,
    ) -> Result<Trained> {
        // In the order of the bank, which lacks the models that failed.
        let specs: Vec<&ModelSpec> = (bank.models().iter())
            .filter_map(|model| specs.iter().find(|spec| spec.id == model.id))
            .collect();
        let opening = self.opening(found, &specs)?;
        let open = |index: usize| opening.open(index);
        let moving: Vec<usize> =
            (0..specs.len()).filter(|&i| specs[i].access == Access::WhiteBox).collect();
        let memory = self.config.curriculum.memory_mib << 20;
        let set = DynamicSet::new(bank, &self.run.pixels(), memory);
        let mut eci = Eci::new(settings::eci_config(self.config), set, moving, &open);
        let (mut trainer, checkpoint) = self.trainer()?;
        if let Some(store) = checkpoint {
            eci.restore(&store)?;
        }
        let save = |eci: &Eci<'_>, trainer: &Trainer| -> Result<()> {
            self.checkpoint_with(trainer, |store| eci.write_to(store))?;
            eci.set().commit();
            Ok(())
        };
        let mut watching = Watching::new(self, &trainer);
        let reason = eci.train(&mut trainer, &mut |eci, trainer, iteration, happened| {
            if let Err(error) = self.tell(&specs, iteration.step, &happened) {
                watching.failed = Some(error);
                return ControlFlow::Break(());
            }
            watching.seconds[0].add_move(&happened);
            watching.after(trainer, iteration, || save(eci, trainer))
        })?;
        watching.end(&trainer, reason, || save(&eci, &trainer))
    }

    /// Logs what happened to the images.
    fn tell(&self, specs: &[&ModelSpec], step: u64, happened: &EciStep) -> Result<()> {
        for (model, error) in &happened.failed {
            let id = &specs[*model].id;
            self.context.progress.note(&format!("images of `{id}` stay as they are: {error}"));
            self.log.write(&Event::new(self.time(), "stay", step).model(id))?;
        }
        if step.is_multiple_of(LOG_EVERY) {
            self.log.write(&Event::new(self.time(), "move", step).value("loss", happened.loss))?;
        }
        let Some(hardening) = happened.hardening else { return Ok(()) };
        let event = Event::new(self.time(), "harden", step)
            .value("before", hardening.before)
            .value("after", hardening.after)
            .value("models", hardening.models as f64);
        self.log.write(&event)
    }
}
