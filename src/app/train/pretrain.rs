//! Multi-teacher distillation within a run: asked, trained, logged, saved, resumed.

use std::path::PathBuf;
use std::time::Instant;

use rayon::prelude::*;

use super::Work;
use crate::app::config::{MetaStart, Method};
use crate::app::ingest::Ingest;
use crate::app::settings;
use crate::error::{Error, ErrorKind, Result};
use crate::meta::{Answers, DrawnClasses, Pretrainer};
use crate::methods::parts::OpenTeachers;
use crate::report::Event;
use crate::tensor::TensorStore;
use crate::tensor::scenes::Drawings;
use crate::zoo::{Access, ModelSpec};

/// Drawings that models are asked about side by side.
const CHUNK: usize = 512;
/// Such rounds between saves of the answers.
const SAVE_EVERY: usize = 4;
/// Steps between lines of the log.
const LOG_EVERY: u64 = 10;

impl Work<'_> {
    /// Makes `RUN/start.safetensors` where the meta-model starts from what all models answer to drawings.
    /// Returns the time it took.
    pub(super) fn pretrain(&self, found: &Ingest, specs: &[ModelSpec]) -> Result<f64> {
        if self.config.meta.start != MetaStart::Distilled || self.run.start().is_file() {
            return Ok(0.0);
        }
        let begin = Instant::now();
        let folder = self.run.pretrain();
        std::fs::create_dir_all(&folder).map_err(|error| Error::io(&folder, &error))?;
        let specs: Vec<&ModelSpec> = specs.iter().collect();
        let drawings = self.drawings();
        let answers = self.ask_all(found, &specs, &drawings)?;
        let answers: Vec<Answers> = answers.into_iter().filter(|all| !all.is_empty()).collect();
        let pretrainer = self.distil(&drawings, &answers)?;
        let mut model = settings::untrained_model(self.config)?;
        *model.backbone_mut() = pretrainer.backbone().clone();
        model.save(&self.run.start())?;
        Ok(begin.elapsed().as_secs_f64())
    }

    fn drawings(&self) -> Drawings {
        Drawings { seed: self.config.seed, size: self.config.image_size }
    }

    fn answers_file(&self) -> PathBuf {
        self.run.pretrain().join("answers.safetensors")
    }

    /// The drawings as classes, by what the models answered.
    pub(super) fn drawn_classes(&self) -> Result<DrawnClasses> {
        let store = TensorStore::load(&self.answers_file())?;
        let answers = (store.tensors.values())
            .map(|own| Answers {
                classes: own.shape.last().copied().unwrap_or_default(),
                logits: own.data.clone(),
            })
            .collect::<Vec<_>>();
        Ok(DrawnClasses::new(self.drawings(), &answers))
    }

    /// What each model answers, as far as its budget goes; what an earlier call was told is not asked again. A model that
    /// fails is left out from there on, and said.
    fn ask_all(
        &self,
        found: &Ingest,
        specs: &[&ModelSpec],
        drawings: &Drawings,
    ) -> Result<Vec<Answers>> {
        let asked = specs.iter().filter(|spec| spec.access != Access::WhiteBox).count() as u64;
        let mut opening = self.opening(found, specs)?;
        let mut each = None;
        if let (Method::BidfMkd, Some(total)) =
            (self.config.method, self.config.recover.black_box.run_budget)
        {
            each = Some(total / asked.max(1));
            opening.teachers.queries = Some(self.queries()?.pooled(Some(total), specs)?.0);
        }
        let open = |index: usize| opening.open(index);
        let teachers = OpenTeachers::new(&open);
        let file = self.answers_file();
        let mut answers: Vec<Answers> = match TensorStore::load(&file) {
            Ok(store) => (specs.iter())
                .map(|spec| read_answers(&store, &spec.id, spec.classes))
                .collect::<Result<_>>()?,
            Err(_) if !file.exists() => specs
                .iter()
                .map(|spec| Answers { classes: spec.classes, logits: Vec::new() })
                .collect(),
            Err(error) => return Err(error),
        };
        let mut failed: Vec<(usize, Error)> = Vec::new();
        let mut wanted = vec![0; specs.len()];
        for index in 0..specs.len() {
            match self.wanted(&teachers, index, each) {
                Ok(n) => wanted[index] = n,
                Err(error) => failed.push((index, error)),
            }
        }
        let most = wanted.iter().copied().max().unwrap_or_default();
        let begin = answers.iter().map(Answers::len).max().unwrap_or_default();
        let stage = self.context.progress.stage("ask", Some(most as u64));
        stage.advance(begin as u64);
        for (round, first) in (begin..most).step_by(CHUNK).enumerate() {
            if let Err(error) = self.context.check_interrupt() {
                save_answers(&answers, specs, &file)?;
                return Err(error);
            }
            let images = drawings.images(first as u64..(first + CHUNK).min(most) as u64);
            let one = |index: usize| {
                let n = wanted[index].saturating_sub(first).min(images.len());
                let lost = answers[index].len() != first;
                if lost || n == 0 {
                    return Ok(Vec::new());
                }
                let logits = teachers.get(index)?.logits(&images.range(0, n))?;
                match logits.iter().find(|value| !value.is_finite()) {
                    Some(value) => {
                        Err(Error::input(format!("a score that is not finite `{value}`")))
                    }
                    None => Ok(logits),
                }
            };
            let told: Vec<Result<Vec<f32>>> =
                rayon::scope(|_| (0..specs.len()).into_par_iter().map(one).collect());
            for (index, logits) in told.into_iter().enumerate() {
                match logits {
                    Ok(logits) => answers[index].logits.extend(logits),
                    Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
                    // A normal end: it was sent something twice, or asked before.
                    Err(error) if error.kind() == ErrorKind::Budget => {}
                    Err(error) => failed.push((index, error)),
                }
            }
            stage.advance(images.len() as u64);
            if (round + 1).is_multiple_of(SAVE_EVERY) {
                save_answers(&answers, specs, &file)?;
            }
        }
        for (index, error) in &failed {
            let text = format!("`{}` is asked about no more drawings: {error}", specs[*index].id);
            self.context.progress.note(&text);
        }
        if answers.iter().all(Answers::is_empty) {
            return Err(match failed.pop() {
                Some((_, error)) => error,
                None => Error::budget("the query budget covers no drawing for any model")
                    .hint("raise `--budget`, `query_budget` or `pretrain.query_share`"),
            });
        }
        save_answers(&answers, specs, &file)?;
        Ok(answers)
    }

    /// How many drawings a model answers; `each` is its part of the run's budget, where that is no limit of its own.
    fn wanted(
        &self,
        teachers: &OpenTeachers<'_>,
        index: usize,
        each: Option<u64>,
    ) -> Result<usize> {
        let teacher = teachers.get(index)?;
        let own = self.queries()?.limit(teacher.spec());
        let limit = [own, each].into_iter().flatten().min();
        let config = &self.config.pretrain;
        let share = limit.map(|limit| (limit as f64 * config.query_share) as u64);
        Ok(affordable(config.images, share, |n| teacher.logits_cost(n)))
    }

    /// Trains to the last step, from where an earlier call left it.
    fn distil(&self, drawings: &Drawings, answers: &[Answers]) -> Result<Pretrainer> {
        let config = settings::pretrain_config(self.config);
        let (steps, size) = (config.steps, self.config.image_size);
        let classes = answers.iter().map(|teacher| teacher.classes).sum();
        let file = self.run.pretrain().join("state.safetensors");
        let mut pretrainer = match TensorStore::load(&file) {
            Ok(store) => Pretrainer::from_store(config, size, classes, &store)
                .map_err(|error| error.context(format!("`{}`", file.display())))?,
            Err(_) if !file.exists() => {
                let fresh = settings::untrained_model(self.config)?.into_backbone();
                Pretrainer::new(config, fresh, size, classes)?
            }
            Err(error) => return Err(error),
        };
        let stage = self.context.progress.stage("pretrain", Some(steps));
        stage.advance(pretrainer.step());
        let every = self.config.meta.checkpoint_every;
        while pretrainer.step() < steps {
            if let Err(error) = self.context.check_interrupt() {
                pretrainer.to_store()?.save(&file)?;
                return Err(error);
            }
            let Some(loss) = rayon::scope(|_| pretrainer.update(drawings, answers))? else {
                return Err(Error::input("distillation diverged: its loss is not finite")
                    .hint("lower `pretrain.learning_rate`"));
            };
            stage.advance(1);
            if pretrainer.step().is_multiple_of(LOG_EVERY) {
                stage.message(&format!("loss {loss:.3}"));
                let event = Event::new(self.time(), "pretrain", pretrainer.step());
                self.log.write(&event.value("loss", loss))?;
            }
            if pretrainer.step().is_multiple_of(every) {
                pretrainer.to_store()?.save(&file)?;
            }
        }
        pretrainer.to_store()?.save(&file)?;
        Ok(pretrainer)
    }
}

/// How many of `images` cost no more than `share` by `cost`, about: fewer where batches are filled up.
fn affordable(images: usize, share: Option<u64>, cost: impl Fn(usize) -> u64) -> usize {
    let Some(share) = share else { return images };
    let mut n = images;
    while n > 0 && cost(n) > share {
        let fits = (n as f64 * share as f64 / cost(n) as f64) as usize;
        n = fits.min(n - 1);
    }
    n
}

fn save_answers(answers: &[Answers], specs: &[&ModelSpec], file: &std::path::Path) -> Result<()> {
    let mut store = TensorStore::default();
    for (spec, own) in specs.iter().zip(answers) {
        store.insert(&spec.id, &[own.len(), own.classes], own.logits.clone());
    }
    store.save(file)
}

fn read_answers(store: &TensorStore, id: &str, classes: usize) -> Result<Answers> {
    match store.tensors.get(id) {
        Some(tensor) if tensor.shape.last() == Some(&classes) => {
            let logits = store.tensor(id, &tensor.shape)?.to_vec();
            Ok(Answers { classes, logits })
        }
        _ => Err(Error::input(format!("no answers of model `{id}`"))
            .hint("the run folder was changed; start a new run")),
    }
}

#[cfg(test)]
mod tests {
    use super::affordable;

    #[test]
    fn what_is_asked_fits_the_share() {
        assert_eq!(affordable(100, None, |n| n as u64), 100);
        assert_eq!(affordable(100, Some(40), |n| n as u64), 40);
        // Batches of eight, filled up.
        let filled = |n: usize| (n.div_ceil(8) * 8) as u64;
        for share in [0, 7, 8, 39, 40, 104, 200] {
            let n = affordable(100, Some(share), filled);
            assert!(filled(n) <= share, "{share}: {n}");
            assert!(share < 8 || n > 0, "{share}");
        }
    }
}
