//! Multi-teacher distillation before meta-training: one network, with a linear head for each teacher, learns to answer as
//! all of them do on images that they were asked about once.
//!
//! The images need not be of anybody's classes: what a classifier says of a drawing tells how it sees, and a network
//! that agrees with many of them on many drawings has features that serve all their classes (distillation of what can only
//! be asked: Orekondy et al. 2019, "Knockoff Nets"; from images that show nothing: Asano and Saeed 2023, "Extrapolating
//! from a single image to a thousand classes using distillation"; drawn ones: Baradad et al. 2021, "Learning to see by
//! looking at noise").

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::augment::{Augmentation, Draw};
use super::backbone::{Backbone, BnMode, Parameter};
use super::learner::linear;
use super::train::{half_cosine, read_moments, write_moments};
use crate::error::{Error, Result};
use crate::tensor::lists::all_finite;
use crate::tensor::losses::softmax;
use crate::tensor::scenes::Drawings;
use crate::tensor::tape::{Order, Tape, Var, vjp};
use crate::tensor::{Adam, AdamOptions, Images, RngStream, TensorStore};

/// How answers are distilled.
#[derive(Debug, Clone, PartialEq)]
pub struct PretrainConfig {
    /// Seed of every draw.
    pub seed: u64,
    /// Steps of Adam.
    pub steps: u64,
    /// Images a step.
    pub batch: usize,
    /// Learning rate, along half a cosine down to 0.
    pub learning_rate: f64,
    /// Of both sides' answers (Hinton et al. 2015).
    pub temperature: f64,
    /// What is done to the images before the learner sees them; the answers stay.
    pub augmentation: Augmentation,
}

/// What a teacher answers to the first images of a sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Answers {
    /// Its classes.
    pub classes: usize,
    /// Logits, a row of `classes` an image.
    pub logits: Vec<f32>,
}

impl Answers {
    /// Images that were answered.
    pub fn len(&self) -> usize {
        self.logits.len() / self.classes.max(1)
    }

    /// Whether none was.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A network that learns to answer as many teachers do.
#[derive(Debug, Clone)]
pub struct Pretrainer {
    config: PretrainConfig,
    backbone: Backbone,
    /// `[all classes, d]` and `[all classes]`: the teachers' heads, one after the other.
    heads: [Parameter; 2],
    adam: Adam,
    step: u64,
}

impl Pretrainer {
    /// `backbone` with a head for each of `classes`, which are those of all teachers together; images are of `[height, width]`.
    ///
    /// # Errors
    /// When the images are too small for the backbone.
    pub fn new(
        config: PretrainConfig,
        backbone: Backbone,
        [height, width]: [usize; 2],
        classes: usize,
    ) -> Result<Self> {
        let dim = backbone.embedding_dim(height, width)?;
        let mut rng = RngStream::new(config.seed, "pretrain", "heads", 0);
        let bound = 1.0 / (dim as f32).sqrt();
        let weights = (0..classes * dim).map(|_| rng.uniform_in(-bound, bound)).collect();
        let parameter = |name: &str, values: Vec<f32>, dims: &[usize]| -> Result<Parameter> {
            Ok(Parameter {
                name: name.into(),
                value: Tensor::from_vec(values, dims, &Device::Cpu)?,
            })
        };
        let heads = [
            parameter("pretrain.heads.weight", weights, &[classes, dim])?,
            parameter("pretrain.heads.bias", vec![0.0; classes], &[classes])?,
        ];
        let all = backbone.parameters().iter().chain(&heads);
        let adam = Adam::new(AdamOptions::STANDARD, all.map(|p| p.value.elem_count()));
        Ok(Self { config, backbone, heads, adam, step: 0 })
    }

    /// All that is trained: the backbone's parameters, then the heads'.
    fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        self.backbone.parameters().iter().chain(&self.heads)
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The network as it stands.
    pub fn backbone(&self) -> &Backbone {
        &self.backbone
    }

    /// One step on images of `drawings` that somebody answered: the mean over the teachers of `KL(teacher || own)` at the
    /// temperature, times its square. `None` when it is not finite, and then nothing has changed.
    ///
    /// # Errors
    /// When `answers` are not of the classes that it was made for, or there are none.
    pub fn update(&mut self, drawings: &Drawings, answers: &[Answers]) -> Result<Option<f64>> {
        let most = answers.iter().map(Answers::len).max().unwrap_or_default();
        let classes: usize = answers.iter().map(|a| a.classes).sum();
        if most == 0 || classes != self.heads[0].value.dims()[0] {
            return Err(Error::internal("answers of other teachers than the heads are for"));
        }
        let config = &self.config;
        let mut rng = RngStream::new(config.seed, "pretrain", "batch", self.step);
        let chosen: Vec<usize> = (0..config.batch).map(|_| rng.below(most)).collect();
        let draws: Vec<Draw> = chosen.iter().map(|_| config.augmentation.draw(&mut rng)).collect();
        let images = seen(drawings, &chosen, &draws);
        let shape = images.shape();
        let tape = Tape::new();
        let parameters = self.backbone.leaves(&tape);
        let heads = [0, 1].map(|at| tape.leaf(self.heads[at].value.clone()));
        let x = tape.constant(Tensor::from_vec(images.into_data(), &shape, &Device::Cpu)?);
        let embedded = self.backbone.forward(&parameters, &x, BnMode::Batch)?;
        let logits = linear(&embedded.embedding, &heads)?;
        let own = logits.value().to_vec2::<f32>()?;
        let (loss, cotangent) = distance(&own, &chosen, answers, config.temperature);
        let cotangent = Tensor::from_vec(cotangent, (chosen.len(), classes), &Device::Cpu)?;
        let wrt: Vec<&Var> = parameters.iter().chain(&heads).collect();
        let gradients: Vec<Tensor> = vjp(&logits, &tape.constant(cotangent), &wrt, Order::First)?
            .iter()
            .map(|gradient| gradient.value().clone())
            .collect();
        if !loss.is_finite() || !all_finite(&gradients)? {
            return Ok(None);
        }
        let rate = half_cosine(config.learning_rate, self.step, config.steps);
        let mut values: Vec<Tensor> = self.parameters().map(|p| p.value.clone()).collect();
        self.adam.step_tensors(rate, &mut values, &gradients)?;
        let heads = values.split_off(self.backbone.parameters().len());
        self.heads.iter_mut().zip(heads).for_each(|(head, value)| head.value = value);
        self.backbone.set_parameters(values)?;
        self.backbone.update_running(&embedded.statistics);
        self.step += 1;
        Ok(Some(loss))
    }

    /// The whole state.
    ///
    /// # Errors
    /// When a parameter cannot be read from its device.
    pub fn to_store(&self) -> Result<TensorStore> {
        let mut store = TensorStore::default();
        self.backbone.write_to(&mut store)?;
        for head in &self.heads {
            let values = head.value.flatten_all()?.to_vec1::<f32>()?;
            store.insert(&head.name, head.value.dims(), values);
        }
        write_moments(&self.adam, self.parameters(), &mut store);
        store.words.insert("pretrain.step".into(), self.step.to_string());
        store.words.insert("pretrain.config".into(), format!("{:?}", self.config));
        Ok(store)
    }

    /// Goes on where [`Pretrainer::to_store`] was called under the same configuration, for as many classes.
    ///
    /// # Errors
    /// When the state is incomplete or another one.
    pub fn from_store(
        config: PretrainConfig,
        image_size: [usize; 2],
        classes: usize,
        store: &TensorStore,
    ) -> Result<Self> {
        if store.word("pretrain.config")? != format!("{config:?}") {
            return Err(Error::input("the saved state was made under another configuration")
                .hint("resume with the configuration of that run, or start a new run"));
        }
        let mut own = Self::new(config, Backbone::read_from(store)?, image_size, classes)?;
        own.step = store.number("pretrain.step")?;
        own.adam = read_moments(own.step, own.parameters(), store)?;
        for head in &mut own.heads {
            let dims = head.value.dims();
            let values = store.tensor(&head.name, dims)?.to_vec();
            head.value = Tensor::from_vec(values, dims, &Device::Cpu)?;
        }
        Ok(own)
    }
}

/// The images `chosen`, changed as drawn.
fn seen(drawings: &Drawings, chosen: &[usize], draws: &[Draw]) -> Images {
    let [height, width] = drawings.size;
    let mut images = Images::zeros([chosen.len(), 3, height, width]);
    let each = images.data_mut().par_chunks_mut((3 * height * width).max(1));
    each.zip(chosen).zip(draws).for_each(|((target, &number), draw)| {
        let mut own = vec![0.0; target.len()];
        drawings.draw(number as u64, &mut own);
        draw.apply(&own, height, width, target);
    });
    images
}

/// The mean over teachers of their distance to `own` answers, each over the images that it answered, and its gradient to
/// these answers.
fn distance(
    own: &[Vec<f32>],
    chosen: &[usize],
    answers: &[Answers],
    temperature: f64,
) -> (f64, Vec<f32>) {
    let classes = own.first().map_or(0, Vec::len);
    let mut gradient = vec![0.0f32; own.len() * classes];
    let (mut total, mut first) = (0.0, 0);
    let asked = |teacher: &Answers| chosen.iter().filter(|&&i| i < teacher.len()).count();
    let present = answers.iter().filter(|teacher| asked(teacher) > 0).count();
    let probabilities = |row: &[f32]| -> Vec<f32> {
        softmax(&row.iter().map(|v| (f64::from(*v) / temperature) as f32).collect::<Vec<_>>())
    };
    for teacher in answers {
        let columns = first..first + teacher.classes;
        first = columns.end;
        let rows = asked(teacher);
        if rows == 0 {
            continue;
        }
        let share = 1.0 / (rows * present) as f64;
        for (at, &image) in chosen.iter().enumerate().filter(|&(_, &image)| image < teacher.len()) {
            let wanted = &teacher.logits[image * teacher.classes..][..teacher.classes];
            let (wanted, found) = (probabilities(wanted), probabilities(&own[at][columns.clone()]));
            let to = &mut gradient[at * classes..][columns.clone()];
            for ((to, &p), &q) in to.iter_mut().zip(&wanted).zip(&found) {
                let (p, q) = (f64::from(p), f64::from(q));
                *to = (temperature * share * (q - p)) as f32;
                if p > 0.0 {
                    let ratio = (p / q.max(f64::from(f32::MIN_POSITIVE))).ln();
                    total += temperature * temperature * share * p * ratio;
                }
            }
        }
    }
    (total, gradient)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers() -> Vec<Answers> {
        let logits =
            |n: usize, scale: f32| (0..n).map(|i| scale * (i as f32 * 1.7).sin()).collect();
        vec![
            Answers { classes: 3, logits: logits(12, 2.0) },
            // Asked about two images only.
            Answers { classes: 2, logits: logits(4, 1.0) },
        ]
    }

    /// The gradient is that of the distance, by central differences; a teacher counts on what it was asked about.
    #[test]
    fn the_gradient_is_that_of_the_distance() {
        let own: Vec<Vec<f32>> =
            (0..3).map(|i| (0..5).map(|j| ((3 * i + j) as f32).cos()).collect()).collect();
        let chosen = [3, 1, 0];
        for temperature in [1.0, 3.0] {
            let (_, gradient) = distance(&own, &chosen, &answers(), temperature);
            for at in 0..15 {
                let moved = |step: f32| {
                    let mut own = own.clone();
                    own[at / 5][at % 5] += step;
                    distance(&own, &chosen, &answers(), temperature).0
                };
                let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                assert!((slope - f64::from(gradient[at])).abs() < 1e-4, "{at}");
            }
            // Image 3 was never shown to the second teacher.
            assert_eq!(gradient[3..5], [0.0, 0.0]);
        }
        // Nothing is left of it where answers agree.
        let same: Vec<Vec<f32>> = chosen
            .iter()
            .map(|&image| {
                let [a, b] = [&answers()[0], &answers()[1]];
                let row = |a: &Answers| match image < a.len() {
                    true => a.logits[image * a.classes..][..a.classes].to_vec(),
                    false => vec![0.5; a.classes],
                };
                [row(a), row(b)].concat()
            })
            .collect();
        assert!(distance(&same, &chosen, &answers(), 1.0).0.abs() < 1e-6);
    }

    fn config() -> PretrainConfig {
        let augmentation = Augmentation {
            shift: 2,
            edge: crate::meta::ShiftEdge::Grey,
            affine: None,
            colour: None,
        };
        PretrainConfig {
            seed: 3,
            steps: 40,
            batch: 16,
            learning_rate: 0.01,
            temperature: 1.0,
            augmentation,
        }
    }

    /// It learns what it is told, and a state that was saved goes on to the same numbers.
    #[test]
    fn it_learns_and_goes_on() {
        let drawings = Drawings { seed: 1, size: [16, 16] };
        // A teacher that sees brightness and colour.
        let logits = (0..64)
            .flat_map(|i| {
                let image = drawings.images(i..i + 1);
                let mean = |c: usize| image.data()[c * 256..][..256].iter().sum::<f32>() / 256.0;
                [8.0 * (mean(0) - 0.5), 8.0 * (mean(2) - 0.5)]
            })
            .collect();
        let answers = [Answers { classes: 2, logits }];
        let fresh =
            || Pretrainer::new(config(), Backbone::conv4(8, 1).unwrap(), [16, 16], 2).unwrap();
        let mut whole = fresh();
        let losses: Vec<f64> =
            (0..40).map(|_| whole.update(&drawings, &answers).unwrap().unwrap()).collect();
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        assert!(mean(&losses[30..]) < 0.5 * mean(&losses[..5]), "{losses:?}");
        let mut part = fresh();
        for _ in 0..7 {
            part.update(&drawings, &answers).unwrap();
        }
        let store = part.to_store().unwrap();
        let mut part = Pretrainer::from_store(config(), [16, 16], 2, &store).unwrap();
        for _ in 7..40 {
            part.update(&drawings, &answers).unwrap();
        }
        assert_eq!(part.to_store().unwrap(), whole.to_store().unwrap());
        let other = PretrainConfig { batch: 8, ..config() };
        assert!(Pretrainer::from_store(other, [16, 16], 2, &store).is_err());
        assert!(fresh().update(&drawings, &[]).is_err());
    }
}
