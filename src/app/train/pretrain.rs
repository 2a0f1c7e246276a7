//! Multi-teacher distillation within a run: asked, trained, logged, saved, resumed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rayon::prelude::*;

use super::Work;
use crate::access::Teacher;
use crate::app::config::{MetaStart, Method};
use crate::app::ingest::Ingest;
use crate::app::queries::{self, Queries};
use crate::app::settings;
use crate::error::{Error, ErrorKind, Result};
use crate::meta::{Answers, Backbone, DrawnClasses, Pretrainer, Trainer};
use crate::methods::parts::OpenTeachers;
use crate::report::Event;
use crate::tensor::TensorStore;
use crate::tensor::scenes::Drawings;
use crate::zoo::ModelSpec;

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
        let drawings = self.drawings();
        let answers = self.ask_all(found, specs, &drawings)?;
        // What cannot be drawn from is said before anything is trained or recovered.
        let mut model = settings::undistilled_model(self.run, self.config)?;
        let config = settings::train_config(self.config);
        self.draw_from(&mut Trainer::new(config, model.clone()), Some(&answers))?;
        let answers: Vec<Answers> = answers.into_iter().filter(|all| !all.is_empty()).collect();
        let pretrainer = self.distil(model.backbone().clone(), &drawings, &answers)?;
        *model.backbone_mut() = pretrainer.backbone().clone();
        model.save(&self.run.start())?;
        Ok(begin.elapsed().as_secs_f64())
    }

    /// Lets a trainer draw some of its episodes from the drawings, where the settings say so, by what the models
    /// answered (`None`: as it was kept).
    pub(super) fn draw_from(
        &self,
        trainer: &mut Trainer,
        answers: Option<&[Answers]>,
    ) -> Result<()> {
        let share = self.config.pretrain.episode_share;
        let idle = self.config.method == Method::BidfMkd && self.config.bidf.replay.is_none();
        if self.config.meta.start != MetaStart::Distilled || share <= 0.0 || idle {
            return Ok(());
        }
        let classes = match answers {
            Some(answers) => DrawnClasses::new(self.drawings(), answers),
            None => DrawnClasses::new(self.drawings(), &self.kept_answers()?),
        };
        trainer.also_from(classes, share).map_err(|error| {
            Error::input(format!("too few drawings that models are sure of: {error}"))
                .hint("raise `pretrain.images`, or set `pretrain.episode_share: 0`")
        })
    }

    fn drawings(&self) -> Drawings {
        Drawings { seed: self.config.seed, size: self.config.image_size }
    }

    fn answers_file(&self) -> PathBuf {
        self.run.pretrain().join("answers.safetensors")
    }

    fn kept_answers(&self) -> Result<Vec<Answers>> {
        let store = TensorStore::load(&self.answers_file())?;
        let own = store.tensors.into_values().map(|own| Answers {
            classes: own.shape.last().copied().unwrap_or_default(),
            logits: own.data,
        });
        Ok(own.collect())
    }

    /// What each model answers, as far as its budget goes; what an earlier call was told is not asked again. A model that
    /// fails is left out from there on, and said.
    fn ask_all(
        &self,
        found: &Ingest,
        specs: &[ModelSpec],
        drawings: &Drawings,
    ) -> Result<Vec<Answers>> {
        let mut asked = Asked::read(&self.answers_file(), specs)?;
        if asked.done {
            return Ok(asked.answers);
        }
        let all: Vec<&ModelSpec> = specs.iter().collect();
        let mut opening = self.opening(found, &all)?;
        // Each has its part of the run's budget, also where the method has it whole.
        let black = &self.config.recover.black_box;
        let limits = queries::limits(specs, black.query_budget, black.run_budget);
        let queries = Queries::new(self.run.queries(), limits);
        opening.teachers.queries = Some(queries.clone());
        let open = |index: usize| opening.open(index);
        let teachers = OpenTeachers::new(&open);
        let mut failed: Vec<(usize, Error)> = Vec::new();
        let mut wanted = vec![0; specs.len()];
        for (index, wanted) in wanted.iter_mut().enumerate() {
            match teachers.get(index) {
                Ok(teacher) => *wanted = self.wanted(teacher.as_ref(), &queries),
                Err(error) => failed.push((index, error)),
            }
        }
        asked.lost.extend(failed.iter().map(|(index, _)| *index));
        let most = wanted.iter().copied().max().unwrap_or_default();
        let begin = asked.answers.iter().map(Answers::len).max().unwrap_or_default();
        let stage = self.context.progress.stage("ask", Some(most as u64));
        stage.advance(begin as u64);
        for (round, first) in (begin..most).step_by(CHUNK).enumerate() {
            if let Err(error) = self.context.check_interrupt() {
                asked.save(&self.answers_file(), specs)?;
                return Err(error);
            }
            let images = drawings.images(first as u64..(first + CHUNK).min(most) as u64);
            let one = |index: usize| {
                let n = wanted[index].saturating_sub(first).min(images.len());
                if asked.lost.contains(&index) || n == 0 {
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
                    Ok(logits) => asked.answers[index].logits.extend(logits),
                    Err(error) => {
                        asked.lost.insert(index);
                        // A normal end: something was sent twice.
                        if error.kind() != ErrorKind::Budget {
                            failed.push((index, error));
                        }
                    }
                }
            }
            stage.advance(images.len() as u64);
            if (round + 1).is_multiple_of(SAVE_EVERY) {
                asked.save(&self.answers_file(), specs)?;
            }
        }
        for (index, error) in &failed {
            let text = format!("`{}` is asked about no more drawings: {error}", specs[*index].id);
            self.context.progress.note(&text);
        }
        if asked.answers.iter().all(Answers::is_empty) {
            return Err(match failed.pop() {
                Some((_, error)) => error,
                None => Error::budget("the query budget covers no drawing for any model")
                    .hint("raise `--budget`, `query_budget` or `pretrain.query_share`"),
            });
        }
        asked.done = true;
        asked.save(&self.answers_file(), specs)?;
        Ok(asked.answers)
    }

    /// How many drawings a model answers.
    fn wanted(&self, teacher: &dyn Teacher, queries: &Queries) -> usize {
        let config = &self.config.pretrain;
        let limit = queries.limit(teacher.spec());
        let share = limit.map(|limit| (limit as f64 * config.query_share) as u64);
        affordable(config.images, share, |n| {
            (n / CHUNK) as u64 * teacher.logits_cost(CHUNK) + teacher.logits_cost(n % CHUNK)
        })
    }

    /// Trains to the last step, from where an earlier call left it.
    fn distil(
        &self,
        fresh: Backbone,
        drawings: &Drawings,
        answers: &[Answers],
    ) -> Result<Pretrainer> {
        let config = settings::pretrain_config(self.config);
        let (steps, size) = (config.steps, self.config.image_size);
        let classes = answers.iter().map(|teacher| teacher.classes).sum();
        let file = self.run.pretrain().join("state.safetensors");
        let mut pretrainer = match TensorStore::load_if_there(&file)? {
            Some(store) => Pretrainer::from_store(config, size, classes, &store)
                .map_err(|error| error.context(format!("`{}`", file.display())))?,
            None => Pretrainer::new(config, fresh, size, classes)?,
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

/// What was asked and told so far.
struct Asked {
    answers: Vec<Answers>,
    /// Models that are asked no more before they have answered all they should.
    lost: BTreeSet<usize>,
    /// Whether nothing is left to ask.
    done: bool,
}

impl Asked {
    /// What [`Asked::save`] wrote; nothing where there is no such file.
    fn read(file: &Path, specs: &[ModelSpec]) -> Result<Self> {
        let none = |spec: &ModelSpec| Answers { classes: spec.classes, logits: Vec::new() };
        let Some(store) = TensorStore::load_if_there(file)? else {
            let answers = specs.iter().map(none).collect();
            return Ok(Self { answers, lost: BTreeSet::new(), done: false });
        };
        let other = |id: &str| {
            Error::input(format!("no answers of model `{id}` in `{}`", file.display()))
                .hint("the run folder was changed; start a new run")
        };
        let one = |spec: &ModelSpec| match store.tensors.get(&spec.id) {
            Some(own) if own.shape.last() == Some(&spec.classes) => {
                Ok(Answers { classes: spec.classes, logits: own.data.clone() })
            }
            _ => Err(other(&spec.id)),
        };
        let answers = specs.iter().map(one).collect::<Result<_>>()?;
        let lost = (store.word("lost")?.lines())
            .map(|id| specs.iter().position(|spec| spec.id == id).ok_or_else(|| other(id)))
            .collect::<Result<_>>()?;
        Ok(Self { answers, lost, done: store.word("asked")? == "all" })
    }

    fn save(&self, file: &Path, specs: &[ModelSpec]) -> Result<()> {
        let mut store = TensorStore::default();
        for (spec, own) in specs.iter().zip(&self.answers) {
            store.insert(&spec.id, &[own.len(), own.classes], own.logits.clone());
        }
        let lost: Vec<&str> = self.lost.iter().map(|&index| specs[index].id.as_str()).collect();
        store.words.insert("lost".into(), lost.join("\n"));
        store.words.insert("asked".into(), if self.done { "all" } else { "some" }.into());
        store.save(file)
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
