//! Pixel inversion: images of given classes from one teacher, by gradient descent on free pixels.
//!
//! Minimises `CE + statistics + TV + size` of PURER sec. 2.2 over standardised pixels
//! `z = (x - 0.5) / 0.25` with Adam, a random cyclic shift each step and a cosine step size; pixels stay
//! in the canonical range.

use crate::access::{Objective, PixelTask, Teacher};
use crate::error::Result;
use crate::tensor::priors::{size, total_variation};
use crate::tensor::{Adam, AdamOptions, Images, RngStream, TensorStore};

use super::parts::CrossEntropy;
use super::recover::{RecoverIteration, Watch};

/// Middle of the standardised pixel space, in canonical values.
const MIDDLE: f32 = 0.5;
/// Unit of the standardised pixel space, in canonical values.
pub const UNIT: f32 = 0.25;
/// Standardised pixels of canonical 0 and 1.
const RANGE: f32 = 2.0;

/// How pixels are freed.
#[derive(Debug, Clone, PartialEq)]
pub struct InvertConfig {
    /// Adam steps.
    pub steps: usize,
    /// First step size, in standardised pixels.
    pub learning_rate: f64,
    /// Share of the step size left at the last step (half a cosine between).
    pub final_rate: f64,
    /// Weight of the statistics term, divided by the number of tapped layers.
    pub statistics: f32,
    /// Weight of total variation.
    pub total_variation: f32,
    /// Weight of the pixel norm.
    pub size: f32,
    /// Largest cyclic shift in pixels, each way.
    pub jitter: usize,
}

const ADAM: AdamOptions = AdamOptions { beta1: 0.5, beta2: 0.99, ..AdamOptions::STANDARD };

/// The weight of the statistics of one layer, of `statistics` for all.
pub(super) fn shared_weight(statistics: f32, teacher: &dyn Teacher) -> f32 {
    statistics / teacher.statistics_layers().max(1) as f32
}

/// Images whose pixels are free, with the state of their optimiser.
#[derive(Debug, Clone, PartialEq)]
pub struct FreePixels {
    /// Standardised pixels, `[n, 3, H, W]`.
    z: Vec<f32>,
    shape: [usize; 4],
    adam: Adam,
}

impl FreePixels {
    /// Frees the pixels of canonical `images`.
    pub fn of(images: &Images) -> Self {
        let z: Vec<f32> = images.data().iter().map(|v| (v - MIDDLE) / UNIT).collect();
        Self { adam: Adam::new(ADAM, [z.len()]), shape: images.shape(), z }
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.adam.steps()
    }

    /// `[n, 3, H, W]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The images, canonical.
    ///
    /// # Errors
    /// Never for pixels made by this type.
    pub fn images(&self) -> Result<Images> {
        let z: Vec<f32> = self.z.iter().map(|v| v.clamp(-RANGE, RANGE)).collect();
        canonical(&z, self.shape)
    }

    /// Writes image `index`, canonical, `[3, H, W]`.
    pub fn read(&self, index: usize, pixels: &mut [f32]) {
        let stride = self.shape[1..].iter().product::<usize>();
        for (to, z) in pixels.iter_mut().zip(&self.z[index * stride..(index + 1) * stride]) {
            *to = MIDDLE + UNIT * z.clamp(-RANGE, RANGE);
        }
    }

    /// One Adam step of size `rate` (in standardised pixels) down the objective of `teacher`, `loss` on its logits
    /// with the priors of `config`, and down `pull`, a gradient to the canonical pixels, where there is one.
    ///
    /// # Errors
    /// Those of the teacher.
    pub fn step(
        &mut self,
        teacher: &dyn Teacher,
        loss: &CrossEntropy,
        config: &InvertConfig,
        rate: f64,
        pull: Option<&[f32]>,
        rng: &mut RngStream,
    ) -> Result<RecoverIteration> {
        let [_, _, h, w] = self.shape;
        let reach = config.jitter as i64;
        let z = &mut self.z;
        z.iter_mut().for_each(|v| *v = v.clamp(-RANGE, RANGE));
        let (dy, dx) = (rng.integer_in(-reach, reach), rng.integer_in(-reach, reach));
        let images = roll(&canonical(z, self.shape)?, dy, dx);
        let statistics_weight = shared_weight(config.statistics, teacher);
        let objective = Objective { logits: loss, statistics_weight };
        let found = teacher.image_gradient(&images, &objective, rng)?;
        let mut gradient = roll(&found.gradient, -dy, -dx).into_data();
        if let Some(pull) = pull {
            gradient.iter_mut().zip(pull).for_each(|(g, p)| *g += p);
        }
        gradient.iter_mut().for_each(|g| *g *= UNIT);
        let tv = total_variation(z, h, w, config.total_variation, &mut gradient);
        let norm = size(z, config.size, &mut gradient);
        self.adam.step(rate, &mut [z], &[&gradient])?;
        Ok(RecoverIteration {
            step: self.adam.steps() as usize,
            loss: found.logits_loss,
            statistics: found.statistics_loss,
            prior: f64::from(config.total_variation) * tv + f64::from(config.size) * norm,
        })
    }

    /// Pixels and optimiser as the content of a file.
    pub fn to_store(&self) -> TensorStore {
        let mut store = TensorStore::default();
        let (first, second) = self.adam.moments();
        for (name, values) in
            [("z", &self.z), ("adam.first", &first[0]), ("adam.second", &second[0])]
        {
            store.insert(name, &self.shape, values.clone());
        }
        store.words.insert("steps".into(), self.adam.steps().to_string());
        store
    }

    /// What [`FreePixels::to_store`] made, of images of `shape`.
    ///
    /// # Errors
    /// When the store is another one.
    pub fn from_store(store: &TensorStore, shape: [usize; 4]) -> Result<Self> {
        let read = |name: &str| store.tensor(name, &shape).map(<[f32]>::to_vec);
        let (first, second) = (vec![read("adam.first")?], vec![read("adam.second")?]);
        let adam = Adam::restore(ADAM, store.number("steps")?, first, second)?;
        Ok(Self { z: read("z")?, shape, adam })
    }
}

/// Shifts each image cyclically by (`dy`, `dx`).
pub(super) fn roll(images: &Images, dy: i64, dx: i64) -> Images {
    let [_, _, h, w] = images.shape();
    let mut rolled = images.clone();
    let planes = images.data().chunks_exact(h * w).zip(rolled.data_mut().chunks_exact_mut(h * w));
    let column = dx.rem_euclid(w as i64) as usize;
    for (from, to) in planes {
        for y in 0..h {
            let target = (y as i64 + dy).rem_euclid(h as i64) as usize;
            let (row, to) = (&from[y * w..(y + 1) * w], &mut to[target * w..(target + 1) * w]);
            to[column..].copy_from_slice(&row[..w - column]);
            to[..column].copy_from_slice(&row[w - column..]);
        }
    }
    rolled
}

fn canonical(z: &[f32], shape: [usize; 4]) -> Result<Images> {
    Images::new(z.iter().map(|v| MIDDLE + UNIT * v).collect(), shape)
}

/// Recovers one image per entry of `labels` from `teacher`, `[height, width]` = `image_size`. All
/// draws come from (`seed`, model, `block`).
///
/// # Errors
/// Those of the teacher; [`crate::ErrorKind::Interrupted`] when `watch` asks to stop.
pub fn invert(
    teacher: &dyn Teacher,
    labels: &[usize],
    image_size: [usize; 2],
    config: &InvertConfig,
    seed: u64,
    block: u64,
    watch: &Watch<'_>,
) -> Result<Images> {
    let [h, w] = image_size;
    let shape = [labels.len(), 3, h, w];
    let mut rng = RngStream::new(seed, "invert", &teacher.spec().sha, block);
    let z = rng.normals(shape.iter().product());
    let adam = Adam::new(ADAM, [z.len()]);
    let loss = CrossEntropy::new(labels.to_vec());
    let reach = config.jitter as i64;
    let rate = |step: usize| {
        let done = step as f64 / config.steps as f64;
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
        config.learning_rate * (config.final_rate + (1.0 - config.final_rate) * cosine)
    };
    let task = PixelTask {
        start: &z,
        size: image_size,
        labels,
        standard: [MIDDLE, UNIT, RANGE],
        statistics: shared_weight(config.statistics, teacher),
        total_variation: config.total_variation,
        norm: config.size,
        adam: ADAM,
    };
    if let Some(mut pixels) = teacher.resident(&task)? {
        for step in 0..config.steps {
            watch.check()?;
            let shift = [(); 2].map(|()| rng.integer_in(-reach, reach));
            let found = pixels.step(shift, rate(step))?;
            watch.tell(&RecoverIteration {
                step: step + 1,
                loss: found.logits,
                statistics: found.statistics,
                prior: f64::from(config.total_variation) * found.total_variation
                    + f64::from(config.size) * found.norm,
            });
        }
        return canonical(&pixels.read()?, shape);
    }
    let mut pixels = FreePixels { z, shape, adam };
    for step in 0..config.steps {
        watch.check()?;
        let found = pixels.step(teacher, &loss, config, rate(step), None, &mut rng)?;
        watch.tell(&RecoverIteration { step: step + 1, ..found });
    }
    pixels.images()
}

#[cfg(test)]
#[path = "invert_device_tests.rs"]
mod device_tests;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_roll_and_its_reverse_give_the_image_back() {
        let data = (0..2 * 3 * 4 * 5).map(|v| v as f32).collect();
        let images = Images::new(data, [2, 3, 4, 5]).unwrap();
        let there = roll(&images, 1, -2);
        assert_ne!(there, images);
        assert_eq!(roll(&there, -1, 2), images);
        // Pixel (0, 2) moves down by one and left by two.
        assert_eq!(there.image(0)[5], images.image(0)[2]);
    }
}
