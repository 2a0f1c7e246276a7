//! BiDf-MKD within a run: watched, logged, saved, resumed.

use std::collections::BTreeMap;
use std::time::Instant;

use super::Work;
use super::meta::{Trained, Watching};
use crate::app::ingest::Ingest;
use crate::app::settings;
use crate::error::{Error, ErrorKind, Result};
use crate::meta::protonet::first_largest;
use crate::meta::{StopReason, Trainer};
use crate::methods::parts::{ImageBank, Memory, OpenTeachers};
use crate::methods::{Bidf, BidfEvent, BidfRound, RecoverStop, Recovered, Watch};
use crate::report::Event;
use crate::zoo::ModelSpec;

impl Work<'_> {
    /// Buys images and meta-trains by turns, from the newest checkpoint or from the start: the newest images of each
    /// model, how training ended, and the seconds of rounds of visits and of the rest.
    pub(super) fn bidf(
        &self,
        found: &Ingest,
        specs: &[ModelSpec],
    ) -> Result<(ImageBank, f64, Trained, f64)> {
        let all: Vec<&ModelSpec> = specs.iter().collect();
        let specs = all.as_slice();
        let start = Instant::now();
        let (queries, pool) =
            self.queries()?.pooled(self.config.recover.black_box.run_budget, specs)?;
        let mut opening = self.opening(found, specs)?;
        opening.teachers.queries = Some(queries);
        let open = |index: usize| opening.open(index);
        let own = &self.config.bidf;
        let memory = Memory::new(
            &self.run.memory(),
            self.config.image_size,
            own.sets_kept,
            own.memory_mib << 20,
        );
        let mut bidf = Bidf::new(
            settings::bidf_config(self.config),
            settings::bidf_recovery(self.config)?,
            OpenTeachers::new(&open),
            memory,
            (0..specs.len()).collect(),
            &pool,
        );
        let (mut trainer, checkpoint) = self.trainer()?;
        if let Some(store) = checkpoint {
            bidf.restore(&store)?;
        }
        let save = |bidf: &Bidf<'_>, trainer: &Trainer| -> Result<()> {
            self.checkpoint_with(trainer, |store| bidf.write_to(store))?;
            bidf.memory().commit();
            Ok(())
        };
        let watch = Watch { observe: &|_| {}, interrupt: &self.context.interrupt };
        let mut watching = Watching::new(self, &trainer);
        let mut failed: BTreeMap<usize, Error> = BTreeMap::new();
        let (mut begin, mut recover) = (Instant::now(), 0.0);
        let reason = bidf.train(&mut trainer, &watch, &mut |bidf, trainer, event| {
            let next = match event {
                BidfEvent::Round(round) => {
                    recover += begin.elapsed().as_secs_f64();
                    // What was bought is not bought again.
                    let told = self
                        .tell_visits(specs, round, pool.spent())
                        .and_then(|()| save(bidf, trainer));
                    failed.extend(round.failed.drain(..));
                    watching.go_on(told)
                }
                BidfEvent::Distilled { iteration, plain } => {
                    let mut event = Event::new(self.time(), "distil", iteration.step)
                        .value("loss", iteration.loss)
                        .value("accuracy", iteration.accuracy);
                    if let Some(plain) = plain {
                        event = event.value("plain", plain);
                    }
                    match self.log.write(&event) {
                        Ok(()) => watching.after(trainer, &iteration, || save(bidf, trainer)),
                        error => watching.go_on(error),
                    }
                }
                BidfEvent::Replayed(iteration) => {
                    watching.after(trainer, &iteration, || save(bidf, trainer))
                }
            };
            begin = Instant::now();
            next
        });
        let reason = match reason {
            Err(error) if error.kind() == ErrorKind::Interrupted => StopReason::Interrupted,
            reason => reason?,
        };
        let trained = watching.end(&trainer, reason, || save(&bidf, &trainer))?;
        let results = specs
            .iter()
            .enumerate()
            .map(|(index, spec)| {
                let bought = self.bought(&bidf, index, spec, failed.remove(&index))?;
                bought.save(&self.bank_file(spec))?;
                Ok(bought)
            })
            .collect();
        let bank = self.gather(found, specs, results)?;
        Ok((bank, recover, trained, start.elapsed().as_secs_f64() - recover))
    }

    /// The newest images of a model, judged by the answers that were bought with them.
    fn bought(
        &self,
        bidf: &Bidf<'_>,
        index: usize,
        spec: &ModelSpec,
        failed: Option<Error>,
    ) -> Result<Recovered> {
        let memory = bidf.memory();
        let each = self.config.recover.images_per_class;
        let (images, labels) = memory.newest(index, each)?;
        let ended = match failed {
            Some(error) if images.is_empty() => return Err(error),
            Some(_) => RecoverStop::Failed,
            None => bidf.ended(index),
        };
        let (mut right, mut asked) = (0, 0);
        for class in 0..spec.classes {
            let Some((at, count)) = memory.find(index, class) else { continue };
            for image in (0..count).rev().take(each) {
                asked += 1;
                right += usize::from(first_largest(&memory.answer(at, image)?) == class);
            }
        }
        let agreement = f64::from(right as u32) / f64::from(asked as u32);
        Ok(Recovered::judged(spec, &images, labels, agreement, ended))
    }

    /// Logs a round and says whom it lost.
    fn tell_visits(&self, specs: &[&ModelSpec], round: &BidfRound, spent: u64) -> Result<()> {
        self.tell_lost(specs, &round.failed);
        let number = round.number + 1;
        for &model in &round.models {
            self.log.write(&Event::new(self.time(), "visit", number).model(&specs[model].id))?;
        }
        let [support, query] = round.losses;
        let event = Event::new(self.time(), "round", number)
            .value("loss", support)
            .value("boundary", query)
            .value("queries", spent as f64);
        self.log.write(&event)
    }
}
