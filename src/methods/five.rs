//! Fast inversion by a meta-generator (FIVE; FREE sec. 3.2, methods.md 4.1): one generator for all teachers, from which
//! a teacher's own is had in a few steps.
//!
//! A visit to a teacher clones the meta-generator, adapts clone and latents for `steps` steps to cross-entropy,
//! normalisation statistics and, given a student, the boundary of what it knows. The meta-generator follows what the
//! visits of a round say together, by one persistent Adam. Visits of a round run side by side; teachers may differ in
//! architecture, classes and input size, and all their images are kept (the published program keeps the last one's).

use candle_core::{Device, Tensor};

use super::invert::{roll, shared_weight};
use super::parts::generator::{ADAM, GeneratorNet, Latents};
use super::parts::{CrossEntropy, Generator, Student};
use super::recover::{RecoverIteration, Watch};
use crate::access::{Guide, Objective, Teacher};
use crate::error::{Error, Result};
use crate::tensor::lists::{add_all, all_finite};
use crate::tensor::{Adam, Images, RngStream, TensorStore};

/// What a visit tells the meta-generator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetaGradient {
    /// The gradient of the clone's last step, as if it were the meta-generator's (FOMAML; FREE).
    LastStep,
    /// The sum of those of all steps (Fast-Datafree).
    AllSteps,
    /// The way from the clone's end back to its start (Reptile).
    Reptile,
}

/// How the meta-generator is made, adapted and trained.
#[derive(Debug, Clone, PartialEq)]
pub struct FiveConfig {
    /// Seed of every draw.
    pub seed: u64,
    /// `[height, width]` of the images.
    pub image_size: [usize; 2],
    /// Values of a latent.
    pub latent: usize,
    /// Feature maps of the last layers (`f`; 64 in the paper).
    pub features: usize,
    /// Steps of a visit (5 in the paper).
    pub steps: usize,
    /// Adam's learning rate of the clone's weights.
    pub rate: f64,
    /// And of the latents.
    pub latent_rate: f64,
    /// Spread of an image's own latent about its class's; `None` leaves latents without classes (the paper).
    pub class_spread: Option<f32>,
    /// Weight of the statistics term, divided by the number of tapped layers (0 in the published program).
    pub statistics: f32,
    /// Weight of the boundary term, where there is a student (1 in the published program).
    pub boundary: f64,
    /// Largest cyclic shift in pixels, each way.
    pub jitter: usize,
    /// What a visit tells.
    pub meta: MetaGradient,
    /// Adam's learning rate of the meta-generator.
    pub meta_rate: f64,
    /// Whether Adam's moments are lost from round to round (a defect of the published program).
    pub forgetful: bool,
    /// Rounds after which the meta-generator is drawn anew; `None` never (the paper).
    pub redraw: Option<u64>,
}

/// The classes among `labels`, in order.
pub(super) fn distinct(labels: &[usize]) -> Vec<usize> {
    let mut classes = labels.to_vec();
    classes.sort_unstable();
    classes.dedup();
    classes
}

fn fresh_adam(weights: &[Tensor]) -> Adam {
    Adam::new(ADAM, weights.iter().map(Tensor::elem_count))
}

/// The generator that all teachers share.
#[derive(Debug, Clone)]
pub struct MetaGenerator {
    config: FiveConfig,
    net: GeneratorNet,
    weights: Vec<Tensor>,
    adam: Adam,
    rounds: u64,
}

/// What came of a visit.
#[derive(Debug)]
pub struct Visit {
    /// One image a label, floats in (0, 1).
    pub images: Images,
    /// What the meta-generator is told, one tensor a weight.
    pub told: Vec<Tensor>,
    /// The last step.
    pub last: RecoverIteration,
}

impl MetaGenerator {
    /// A fresh one.
    ///
    /// # Errors
    /// When the image size is no multiple of 4.
    pub fn new(config: FiveConfig) -> Result<Self> {
        let net = GeneratorNet::new(config.latent, config.features, config.image_size)?;
        let weights = net.weights(&mut RngStream::new(config.seed, "five", "weights", 0))?;
        let adam = fresh_adam(&weights);
        Ok(Self { config, net, weights, adam, rounds: 0 })
    }

    /// A round is over, whether anybody could be visited or not.
    ///
    /// # Errors
    /// When the generator cannot be drawn anew.
    pub fn end_round(&mut self) -> Result<()> {
        self.rounds += 1;
        if self.config.redraw.is_some_and(|rounds| self.rounds.is_multiple_of(rounds)) {
            let mut rng = RngStream::new(self.config.seed, "five", "weights", self.rounds);
            self.weights = self.net.weights(&mut rng)?;
            self.adam = fresh_adam(&self.weights);
        }
        Ok(())
    }

    /// How it is made and trained.
    pub fn config(&self) -> &FiveConfig {
        &self.config
    }

    /// Rounds it has learned from.
    pub fn rounds(&self) -> u64 {
        self.rounds
    }

    fn latents(&self, labels: &[usize], rng: &mut RngStream) -> Result<Latents> {
        let latent = self.net.latent();
        let Some(spread) = self.config.class_spread else {
            return Latents::free(labels.len(), latent, rng);
        };
        let classes = distinct(labels);
        let rows: Vec<usize> =
            labels.iter().map(|label| classes.binary_search(label).unwrap_or_default()).collect();
        let drawn = rng.normals(classes.len() * latent);
        let vectors = Tensor::from_vec(drawn, (classes.len(), latent), &Device::Cpu)?;
        Latents::conditional(vectors, &rows, spread, rng)
    }

    /// Adapts a clone to `teacher` and makes one image an entry of `labels`. All draws come from `rng`.
    ///
    /// # Errors
    /// Those of the teacher and the student; [`crate::ErrorKind::Interrupted`] when `watch` asks to stop.
    pub fn visit(
        &self,
        teacher: &dyn Teacher,
        labels: &[usize],
        student: Option<&Student<'_>>,
        rng: &mut RngStream,
        watch: &Watch<'_>,
    ) -> Result<Visit> {
        let config = &self.config;
        let latents = self.latents(labels, rng)?;
        let mut clone = Generator::of(self.net, self.weights.clone(), latents);
        let loss = CrossEntropy::new(labels.to_vec());
        let statistics_weight = shared_weight(config.statistics, teacher);
        let objective = Objective { logits: &loss, statistics_weight };
        let reach = config.jitter as i64;
        let mut told: Vec<Tensor> = Vec::new();
        let mut last = RecoverIteration { step: 0, loss: 0.0, statistics: 0.0, prior: 0.0 };
        for step in 0..config.steps {
            watch.check()?;
            let (dy, dx) = (rng.integer_in(-reach, reach), rng.integer_in(-reach, reach));
            let made = clone.step([config.rate, config.latent_rate], |images| {
                let images = roll(images, dy, dx);
                let found = match student {
                    Some(student) if config.boundary > 0.0 => {
                        let wanted = (&objective, config.boundary);
                        student.image_gradient(teacher, &images, wanted, &Guide::default(), rng)?
                    }
                    _ => teacher.image_gradient(&images, &objective, rng)?,
                };
                last = RecoverIteration {
                    step: step + 1,
                    loss: found.logits_loss,
                    statistics: found.statistics_loss,
                    prior: 0.0,
                };
                Ok(roll(&found.gradient, -dy, -dx))
            })?;
            match config.meta {
                MetaGradient::AllSteps if step > 0 => {
                    add_all(&mut told, &made.gradients)?;
                }
                MetaGradient::AllSteps | MetaGradient::LastStep => told = made.gradients,
                MetaGradient::Reptile => {}
            }
            watch.tell(&last);
        }
        if config.meta == MetaGradient::Reptile {
            let way = self.weights.iter().zip(clone.weights());
            told = way.map(|(start, end)| Ok((start - end)?)).collect::<Result<_>>()?;
        }
        Ok(Visit { images: clone.images()?, told, last })
    }

    /// One step of the meta-generator by what the visits of a round told, each for as much as another.
    ///
    /// # Errors
    /// When there is no visit, or a value is not finite; then nothing has changed.
    pub fn learn(&mut self, told: &[&[Tensor]]) -> Result<()> {
        let Some((first, rest)) = told.split_first() else {
            return Err(Error::internal("a round without visits"));
        };
        let mut sums = first.to_vec();
        for visit in rest {
            add_all(&mut sums, visit)?;
        }
        for sum in &mut sums {
            *sum = (&*sum / told.len() as f64)?;
        }
        if !all_finite(&sums)? {
            return Err(Error::input("the meta-generator's gradient is not finite")
                .hint("lower `five.learning_rate` or `five.meta_learning_rate`"));
        }
        if self.config.forgetful {
            self.adam = fresh_adam(&self.weights);
        }
        self.adam.step_tensors(self.config.meta_rate, &mut self.weights, &sums)?;
        self.end_round()
    }

    /// The whole state.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    pub fn write_to(&self, store: &mut TensorStore) -> Result<()> {
        let (first, second) = self.adam.moments();
        for (at, weight) in self.weights.iter().enumerate() {
            let dims = weight.dims();
            store.insert(format!("five.{at}"), dims, weight.flatten_all()?.to_vec1()?);
            store.insert(format!("five.first.{at}"), dims, first[at].clone());
            store.insert(format!("five.second.{at}"), dims, second[at].clone());
        }
        store.words.insert("five.rounds".into(), self.rounds.to_string());
        store.words.insert("five.steps".into(), self.adam.steps().to_string());
        Ok(())
    }

    /// Continues from what [`MetaGenerator::write_to`] wrote under the same settings.
    ///
    /// # Errors
    /// When the store lacks something, or was written under other settings.
    pub fn read_from(config: FiveConfig, store: &TensorStore) -> Result<Self> {
        let mut own = Self::new(config)?;
        let (mut first, mut second) = (Vec::new(), Vec::new());
        for (at, shape) in own.net.shapes().iter().enumerate() {
            let read = |name: String| store.tensor(&name, shape).map(<[f32]>::to_vec);
            let values = read(format!("five.{at}"))?;
            own.weights[at] = Tensor::from_vec(values, shape.as_slice(), &Device::Cpu)?;
            first.push(read(format!("five.first.{at}"))?);
            second.push(read(format!("five.second.{at}"))?);
        }
        own.adam = Adam::restore(ADAM, store.number("five.steps")?, first, second)?;
        own.rounds = store.number("five.rounds")?;
        Ok(own)
    }
}
