//! The image generator of BiDf-MKD and FREE (methods of data-free distillation): latent to image.
//!
//! Linear to `[2 f, H/4, W/4]`, batch normalisation, then twice: nearest upsampling, 3x3 convolution,
//! batch normalisation, leaky ReLU 0.2; last a 3x3 convolution to RGB and a sigmoid (BiDf-MKD sec. 3.3;
//! `f` = 64 there). Batch normalisation uses the batch: a generator serves one set of latents.

use candle_core::{Device, Tensor};

use crate::error::{Error, Result};
use crate::tensor::tape::{Activation, ConvOptions, Order, Tape, Var, vjp};
use crate::tensor::{Adam, AdamOptions, Images, RngStream};

const EPSILON: f64 = 1e-5;
const SLOPE: f64 = 0.2;

/// A generator and its latents, trained together.
#[derive(Debug)]
pub struct Generator {
    /// Latents first, then weights, in the order of [`Generator::forward`].
    parameters: Vec<Tensor>,
    adam: Adam,
    features: usize,
    size: [usize; 2],
}

impl Generator {
    /// A fresh generator of `features` (`f`) for `n` latents of `latent` values and images of
    /// `[height, width]` (multiples of 4). Weights are N(0, 0.02), scales N(1, 0.02), latents N(0, 1).
    ///
    /// # Errors
    /// When the size is no multiple of 4.
    pub fn new(
        n: usize,
        latent: usize,
        features: usize,
        size: [usize; 2],
        rng: &mut RngStream,
    ) -> Result<Self> {
        let [h, w] = size;
        if h % 4 != 0 || w % 4 != 0 || h * w == 0 {
            return Err(Error::usage(format!(
                "a generator makes images whose sides are multiples of 4, not `{h}x{w}`"
            )));
        }
        let wide = 2 * features;
        let base = wide * (h / 4) * (w / 4);
        let mut tensor = |shape: &[usize], mean: f32, spread: f32| -> Result<Tensor> {
            let values: Vec<f32> =
                rng.normals(shape.iter().product()).iter().map(|v| mean + spread * v).collect();
            Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
        };
        let weight = 0.02;
        let parameters = vec![
            tensor(&[n, latent], 0.0, 1.0)?,
            tensor(&[latent, base], 0.0, weight)?,
            tensor(&[1, base], 0.0, 0.0)?,
            tensor(&[wide], 1.0, weight)?,
            tensor(&[wide], 0.0, 0.0)?,
            tensor(&[wide, wide, 3, 3], 0.0, weight)?,
            tensor(&[wide], 1.0, weight)?,
            tensor(&[wide], 0.0, 0.0)?,
            tensor(&[features, wide, 3, 3], 0.0, weight)?,
            tensor(&[features], 1.0, weight)?,
            tensor(&[features], 0.0, 0.0)?,
            tensor(&[3, features, 3, 3], 0.0, weight)?,
            tensor(&[3], 0.0, 0.0)?,
        ];
        let options = AdamOptions { beta1: 0.5, ..AdamOptions::STANDARD };
        let adam = Adam::new(options, parameters.iter().map(Tensor::elem_count));
        Ok(Self { parameters, adam, features, size })
    }

    fn forward(&self, p: &[Var]) -> Result<Var> {
        let (n, wide) = (p[0].dims()[0], 2 * self.features);
        let [h, w] = self.size;
        let same = ConvOptions::same(3);
        let base = p[0].matmul(&p[1])?.add(&p[2])?.reshape(&[n, wide, h / 4, w / 4])?;
        let mut x = base.batch_norm(&p[3], &p[4], EPSILON, Activation::None)?.0;
        for layer in 0..2 {
            let at = 5 + 3 * layer;
            x = x.upsampled_conv2d(&p[at])?;
            x = x.batch_norm(&p[at + 1], &p[at + 2], EPSILON, Activation::LeakyRelu(SLOPE))?.0;
        }
        x.conv2d(&p[11], Some(&p[12]), same)?.sigmoid()
    }

    /// The images of all latents, `[n, 3, height, width]` in (0, 1).
    ///
    /// # Errors
    /// Those of the tape.
    pub fn images(&self) -> Result<Images> {
        let tape = Tape::new();
        let constants: Vec<Var> =
            self.parameters.iter().map(|p| tape.constant(p.clone())).collect();
        self.read(&self.forward(&constants)?)
    }

    /// Directions in which small random moves of the latents take the images: `[n * count, 3, height, width]`,
    /// image by image. Finite differences of the generator itself (Jacobian times a random vector); no teacher is
    /// asked.
    ///
    /// # Errors
    /// Those of the tape.
    pub fn tangents(&self, count: usize, rng: &mut RngStream) -> Result<Images> {
        /// Length of a move; f32 images of order 1 keep four digits of the difference.
        const STEP: f32 = 0.01;
        let here = self.images()?;
        let (n, stride) = (here.len(), here.stride());
        let [h, w] = self.size;
        let mut all = Images::zeros([n * count, 3, h, w]);
        for k in 0..count {
            let latents = &self.parameters[0];
            let moves: Vec<f32> =
                rng.normals(latents.elem_count()).iter().map(|v| STEP * v).collect();
            let moved = (latents + Tensor::from_vec(moves, latents.dims(), &Device::Cpu)?)?;
            let tape = Tape::new();
            let mut constants = vec![tape.constant(moved)];
            constants.extend(self.parameters[1..].iter().map(|p| tape.constant(p.clone())));
            let there = self.read(&self.forward(&constants)?)?;
            for i in 0..n {
                let at = (i * count + k) * stride;
                let pixels = &mut all.data_mut()[at..at + stride];
                for ((out, a), b) in pixels.iter_mut().zip(there.image(i)).zip(here.image(i)) {
                    *out = (a - b) / STEP;
                }
            }
        }
        Ok(all)
    }

    fn read(&self, images: &Var) -> Result<Images> {
        let [h, w] = self.size;
        let n = images.dims()[0];
        Images::new(images.value().flatten_all()?.to_vec1()?, [n, 3, h, w])
    }

    /// One Adam step on weights and latents: makes the images, asks `image_gradient` for the gradient of
    /// the loss to them, and sends it back. Returns the images made.
    ///
    /// # Errors
    /// Those of `image_gradient` and of the tape.
    pub fn step(
        &mut self,
        learning_rate: f64,
        image_gradient: impl FnOnce(&Images) -> Result<Images>,
    ) -> Result<Images> {
        let tape = Tape::new();
        let leaves: Vec<Var> = self.parameters.iter().map(|p| tape.leaf(p.clone())).collect();
        let output = self.forward(&leaves)?;
        let images = self.read(&output)?;
        let gradient = image_gradient(&images)?;
        let shape = output.dims().to_vec();
        let cotangent = tape.constant(Tensor::from_vec(gradient.into_data(), shape, &Device::Cpu)?);
        let wrt: Vec<&Var> = leaves.iter().collect();
        let gradients: Vec<Tensor> = vjp(&output, &cotangent, &wrt, Order::First)?
            .into_iter()
            .map(|gradient| gradient.value().clone())
            .collect();
        self.adam.step_tensors(learning_rate, &mut self.parameters, &gradients)?;
        Ok(images)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pulls images towards a target: the loss must fall, and the same seed gives the same images.
    #[test]
    fn a_generator_learns_what_its_gradient_asks() {
        let run = || {
            let mut rng = RngStream::new(1, "generator-test", "", 0);
            let mut generator = Generator::new(4, 8, 4, [8, 8], &mut rng).unwrap();
            let mut losses = Vec::new();
            for _ in 0..60 {
                generator
                    .step(1e-2, |images| {
                        let target = 0.8;
                        let mut gradient = images.clone();
                        let data = gradient.data_mut();
                        losses.push(data.iter().map(|v| (v - target).powi(2)).sum::<f32>());
                        data.iter_mut().for_each(|v| *v = 2.0 * (*v - target));
                        Ok(gradient)
                    })
                    .unwrap();
            }
            (losses, generator.images().unwrap())
        };
        let (losses, images) = run();
        assert!(losses[59] < 0.05 * losses[0], "{losses:?}");
        assert_eq!(images, run().1);
    }

    /// Along a tangent the images change as the tangent says, to first order.
    #[test]
    fn tangents_are_where_the_latents_move_the_images() {
        let mut rng = RngStream::new(3, "generator-test", "", 0);
        let generator = Generator::new(3, 8, 4, [8, 8], &mut rng).unwrap();
        let mut twin = rng.clone();
        let tangents = generator.tangents(2, &mut rng).unwrap();
        assert_eq!(tangents.shape(), [6, 3, 8, 8]);
        let first = twin.normals(24);
        let mut moved = generator;
        let step =
            Tensor::from_vec(first.iter().map(|v| 0.02 * v).collect(), &[3, 8], &Device::Cpu);
        let here = moved.images().unwrap();
        moved.parameters[0] = (&moved.parameters[0] + step.unwrap()).unwrap();
        let there = moved.images().unwrap();
        for i in 0..3 {
            let pairs = there.image(i).iter().zip(here.image(i)).zip(tangents.image(2 * i));
            let (mut error, mut size) = (0.0, 0.0);
            for ((a, b), t) in pairs {
                error += (a - b - 0.02 * t).powi(2);
                size += (a - b).powi(2);
            }
            assert!(size > 0.0 && error < 0.01 * size, "{error} {size}");
        }
    }
}
