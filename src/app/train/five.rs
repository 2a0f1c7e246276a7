//! The meta-generator within a run: trained, logged, saved, resumed.

use std::time::Instant;

use super::Work;
use crate::app::ingest::Ingest;
use crate::app::settings;
use crate::error::{Error, ErrorKind, Result};
use crate::methods::parts::OpenTeachers;
use crate::methods::{MetaGenerator, Round, Watch, draw};
use crate::report::Event;
use crate::tensor::TensorStore;
use crate::zoo::ModelSpec;

/// Rounds between saves.
pub(super) const SAVE_EVERY: u64 = 10;

impl Work<'_> {
    /// The meta-generator after all rounds, from where an earlier call left it.
    pub(super) fn meta_generator(
        &self,
        found: &Ingest,
        specs: &[&ModelSpec],
    ) -> Result<MetaGenerator> {
        let begin = Instant::now();
        let config = settings::five_config(self.config);
        let file = self.run.generator();
        let mut generator = match TensorStore::load_if_there(&file)? {
            Some(store) => MetaGenerator::read_from(config, &store)
                .map_err(|error| error.context(format!("`{}`", file.display())))?,
            None => MetaGenerator::new(config)?,
        };
        let rounds = self.config.five.rounds;
        let stage = self.context.progress.stage("meta-generator", Some(rounds));
        stage.advance(generator.rounds());
        let opening = self.opening(found, specs)?;
        let open = |index: usize| opening.open(index);
        let teachers = OpenTeachers::new(&open);
        let watch = Watch { observe: &|_| {}, interrupt: &self.context.interrupt };
        let plan = settings::round_config(self.config);
        let mut models: Vec<usize> = (0..specs.len()).collect();
        let save = |generator: &MetaGenerator| -> Result<()> {
            let mut store = TensorStore::default();
            generator.write_to(&mut store)?;
            store.save(&file)
        };
        while generator.rounds() < rounds {
            let number = generator.rounds();
            let chosen = draw(&plan, number, &models);
            let pay = |generator: &MetaGenerator, model: usize| {
                generator.visit_of_round(
                    (&plan, number),
                    model,
                    &teachers,
                    &|_, _| Ok(None),
                    &watch,
                )
            };
            let round = match generator.round(&chosen, pay) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {
                    save(&generator)?;
                    return Err(error);
                }
                round => round?,
            };
            self.tell_round(specs, number, &round)?;
            round.leave_out_failed(&mut models);
            if models.is_empty() {
                return Err(Error::input("no model is left that the generator could learn from"));
            }
            stage.advance(1);
            stage.message(&format!("loss {:.3}", round.losses()[0]));
            if generator.rounds().is_multiple_of(SAVE_EVERY) {
                save(&generator)?;
            }
        }
        save(&generator)?;
        // Part of the stage `recover`.
        let mut record = self.run.record()?;
        *record.seconds.entry("generator".into()).or_default() += begin.elapsed().as_secs_f64();
        self.run.save_record(&record)?;
        Ok(generator)
    }

    /// Says who is visited no more.
    pub(super) fn tell_lost(&self, specs: &[&ModelSpec], lost: &[(usize, Error)]) {
        for (model, error) in lost {
            let text = format!("`{}` is visited no more: {error}", specs[*model].id);
            self.context.progress.note(&text);
        }
    }

    /// Logs a round and says whom it lost.
    pub(super) fn tell_round(
        &self,
        specs: &[&ModelSpec],
        number: u64,
        round: &Round,
    ) -> Result<()> {
        self.tell_lost(specs, &round.failed);
        let [loss, statistics] = round.losses();
        let event = Event::new(self.time(), "five", number + 1)
            .value("loss", loss)
            .value("statistics", statistics);
        self.log.write(&event)
    }
}
