//! Meta-training within a run: watched, logged, saved, resumed.

use std::ops::ControlFlow;

use super::Work;
use crate::app::config::MergeClasses;
use crate::app::ingest::Ingest;
use crate::app::progress::Stage;
use crate::app::settings;
use crate::app::teachers::{Lenders, open};
use crate::error::{Error, Result};
use crate::meta::{ClassSource, Iteration, Limits, StopReason, Trainer};
use crate::methods::parts::{DynamicSet, ImageBank};
use crate::methods::{Eci, EciStep};
use crate::report::Event;
use crate::tensor::TensorStore;
use crate::zoo::{Access, ModelSpec};

/// Steps between lines of the log.
const LOG_EVERY: u64 = 10;

/// What happens around the steps: progress, log, checkpoints, interrupts.
struct Watching<'a> {
    work: &'a Work<'a>,
    stage: Box<dyn Stage>,
    failed: Option<Error>,
}

impl<'a> Watching<'a> {
    fn new(work: &'a Work<'a>, trainer: &Trainer) -> Self {
        let stage = work.context.progress.stage("meta-train", Some(work.config.meta.steps));
        stage.advance(trainer.step());
        Self { work, stage, failed: None }
    }

    fn try_after(&self, iteration: &Iteration, save: impl FnOnce() -> Result<()>) -> Result<()> {
        self.stage.advance(1);
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
        }
        if iteration.step.is_multiple_of(self.work.config.meta.checkpoint_every) {
            save()
        } else {
            Ok(())
        }
    }

    /// After a step: whether to go on.
    fn after(
        &mut self,
        iteration: &Iteration,
        save: impl FnOnce() -> Result<()>,
    ) -> ControlFlow<()> {
        self.failed = self.try_after(iteration, save).err();
        if self.failed.is_some() || self.work.context.is_interrupted() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }

    /// After the last step.
    fn end(
        self,
        trainer: &Trainer,
        reason: StopReason,
        save: impl FnOnce() -> Result<()>,
    ) -> Result<(&'static str, u64)> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        save()?;
        match reason {
            StopReason::Interrupted => Err(Error::interrupted()),
            StopReason::Diverged => Ok(("diverged", trainer.step())),
            _ => Ok(("done", trainer.step())),
        }
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
    fn trainer(&self) -> Result<(Trainer, Option<TensorStore>)> {
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
        self.run.save_checkpoint(trainer.step(), |path| trainer.save(path)).map(|_| ())
    }

    /// Meta-trains on images that stay, from the newest checkpoint or from the start.
    pub(super) fn meta_train(&self, bank: &ImageBank) -> Result<(&'static str, u64)> {
        let (mut trainer, _) = self.trainer()?;
        let mut watching = Watching::new(self, &trainer);
        let reason = trainer.run(bank, Limits::default(), &mut |trainer, iteration| {
            watching.after(iteration, || self.checkpoint(trainer))
        })?;
        watching.end(&trainer, reason, || self.checkpoint(&trainer))
    }

    /// The same while the images of white-box models move (PURER).
    pub(super) fn meta_train_moving(
        &self,
        found: &Ingest,
        specs: &[ModelSpec],
        bank: &ImageBank,
    ) -> Result<(&'static str, u64)> {
        // In the order of the bank, which lacks the models that failed.
        let specs: Vec<&ModelSpec> = (bank.models().iter())
            .filter_map(|model| specs.iter().find(|spec| spec.id == model.id))
            .collect();
        let teachers = self.teachers(found)?;
        let lenders = Lenders::new(&specs, &found.zoo, &self.config.recover.white_box);
        let open = |index: usize| open(specs[index], &teachers).map(|t| lenders.lend(t));
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
            let mut store = trainer.to_store()?;
            eci.write_to(&mut store)?;
            self.run.save_checkpoint(trainer.step(), |path| store.save(path))?;
            eci.set().commit();
            Ok(())
        };
        let mut watching = Watching::new(self, &trainer);
        let reason = eci.train(&mut trainer, &mut |eci, trainer, iteration, happened| {
            if let Err(error) = self.tell(&specs, iteration.step, &happened) {
                watching.failed = Some(error);
                return ControlFlow::Break(());
            }
            watching.after(iteration, || save(eci, trainer))
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
