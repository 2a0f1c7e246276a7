//! FREE within a run: watched, logged, saved, resumed.

use std::collections::BTreeMap;
use std::time::Instant;

use super::Work;
use super::five::SAVE_EVERY;
use super::meta::{Trained, Watching};
use crate::app::ingest::Ingest;
use crate::app::settings;
use crate::error::{Error, ErrorKind, Result};
use crate::meta::{StopReason, Trainer};
use crate::methods::parts::{ImageBank, Memory, OpenTeachers};
use crate::methods::{Free, FreeEvent, MetaGenerator, Opener, RecoverStop, Recovered, Watch};
use crate::report::Event;
use crate::zoo::ModelSpec;

impl Work<'_> {
    /// Recovers and meta-trains by turns, from the newest checkpoint or from the start: the newest images of each model,
    /// how training ended, and the seconds of rounds of visits and of the rest.
    pub(super) fn free(
        &self,
        found: &Ingest,
        specs: &[ModelSpec],
    ) -> Result<(ImageBank, f64, Trained, f64)> {
        let all: Vec<&ModelSpec> = specs.iter().collect();
        let specs = all.as_slice();
        let start = Instant::now();
        let opening = self.opening(found, specs)?;
        let open = |index: usize| opening.open(index);
        let own = &self.config.free;
        let memory = Memory::new(
            &self.run.memory(),
            self.config.image_size,
            own.visits_kept,
            own.memory_mib << 20,
        );
        let mut free = Free::new(
            settings::free_config(self.config),
            MetaGenerator::new(settings::five_config(self.config))?,
            OpenTeachers::new(&open),
            memory,
            (0..specs.len()).collect(),
        );
        let (mut trainer, checkpoint) = self.trainer()?;
        if let Some(store) = checkpoint {
            free.restore(&store)?;
        }
        let save = |free: &Free<'_>, trainer: &Trainer| -> Result<()> {
            self.checkpoint_with(trainer, |store| free.write_to(store))?;
            free.memory().commit();
            Ok(())
        };
        let watch = Watch { observe: &|_| {}, interrupt: &self.context.interrupt };
        let mut watching = Watching::new(self, &trainer);
        let mut failed: BTreeMap<usize, Error> = BTreeMap::new();
        let (mut begin, mut recover) = (Instant::now(), 0.0);
        let warm_up = own.warm_up;
        let reason = free.train(&mut trainer, &watch, &mut |free, trainer, event| match event {
            FreeEvent::Round(number, round) => {
                recover += begin.elapsed().as_secs_f64();
                let told = self.tell_round(specs, number, round).and_then(|()| {
                    // Until the meta-model learns, nothing else is saved.
                    let due = number < warm_up && (number + 1).is_multiple_of(SAVE_EVERY);
                    if due { save(free, trainer) } else { Ok(()) }
                });
                for (model, error) in round.failed.drain(..) {
                    failed.insert(model, error);
                }
                begin = Instant::now();
                watching.go_on(told)
            }
            FreeEvent::Aligned { iteration, cosine } => {
                let mut event = Event::new(self.time(), "align", iteration.step)
                    .value("loss", iteration.loss)
                    .value("accuracy", iteration.accuracy);
                if let Some(cosine) = cosine {
                    event = event.value("cosine", cosine);
                }
                let next = match self.log.write(&event) {
                    Ok(()) => watching.after(trainer, &iteration, || save(free, trainer)),
                    error => watching.go_on(error),
                };
                begin = Instant::now();
                next
            }
            FreeEvent::Replayed(iteration) => {
                let next = watching.after(trainer, &iteration, || save(free, trainer));
                begin = Instant::now();
                next
            }
        });
        let reason = match reason {
            Err(error) if error.kind() == ErrorKind::Interrupted => StopReason::Interrupted,
            reason => reason?,
        };
        let trained = watching.end(&trainer, reason, || save(&free, &trainer))?;
        let results = specs
            .iter()
            .enumerate()
            .map(|(index, spec)| {
                let judged = self.newest(&free, index, &open, failed.remove(&index))?;
                judged.save(&self.bank_file(spec))?;
                Ok(judged)
            })
            .collect();
        let bank = self.gather(found, specs, results)?;
        Ok((bank, recover, trained, start.elapsed().as_secs_f64() - recover))
    }

    /// The newest images of a model, judged by it.
    fn newest(
        &self,
        free: &Free<'_>,
        index: usize,
        open: &Opener<'_>,
        failed: Option<Error>,
    ) -> Result<Recovered> {
        let (images, labels) = free.memory().newest(index, self.config.recover.images_per_class)?;
        let ended = match failed {
            Some(error) if images.is_empty() => return Err(error),
            Some(error) if error.kind() == ErrorKind::Budget => RecoverStop::BudgetSpent,
            Some(_) => RecoverStop::Failed,
            None if images.is_empty() => RecoverStop::NotVisited,
            _ => RecoverStop::Done,
        };
        Recovered::of(open(index)?.as_ref(), &images, labels, ended)
    }
}
