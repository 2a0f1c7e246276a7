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
/// Spread of weights and scales before training.
const SPREAD: f32 = 0.02;
/// Adam's constants in all programs of this family.
pub const ADAM: AdamOptions = AdamOptions { beta1: 0.5, ..AdamOptions::STANDARD };

fn normals(shape: &[usize], mean: f32, spread: f32, rng: &mut RngStream) -> Result<Tensor> {
    let drawn = rng.normals(shape.iter().product());
    let values: Vec<f32> = drawn.iter().map(|v| mean + spread * v).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// What a generator computes, but for its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GeneratorNet {
    latent: usize,
    features: usize,
    size: [usize; 2],
}

impl GeneratorNet {
    /// A network of `features` (`f`) for latents of `latent` values and images of `[height, width]`.
    ///
    /// # Errors
    /// When the size is no multiple of 4, or a number is 0.
    pub fn new(latent: usize, features: usize, size: [usize; 2]) -> Result<Self> {
        let [h, w] = size;
        if h % 4 != 0 || w % 4 != 0 || h * w == 0 {
            return Err(Error::usage(format!(
                "a generator makes images whose sides are multiples of 4, not `{h}x{w}`"
            ))
            .hint("choose another `image_size`"));
        }
        if latent == 0 || features == 0 {
            return Err(Error::usage(format!(
                "a generator of {features} feature maps for latents of `{latent}` values"
            ))
            .hint("use 1 or more of each"));
        }
        Ok(Self { latent, features, size })
    }

    /// Values of a latent.
    pub fn latent(&self) -> usize {
        self.latent
    }

    /// Shapes of the weights, in the order of [`GeneratorNet::forward`].
    pub fn shapes(&self) -> Vec<Vec<usize>> {
        let [h, w] = self.size;
        let (narrow, wide) = (self.features, 2 * self.features);
        let base = wide * (h / 4) * (w / 4);
        vec![
            vec![self.latent, base],
            vec![1, base],
            vec![wide],
            vec![wide],
            vec![wide, wide, 3, 3],
            vec![wide],
            vec![wide],
            vec![narrow, wide, 3, 3],
            vec![narrow],
            vec![narrow],
            vec![3, narrow, 3, 3],
            vec![3],
        ]
    }

    /// Fresh weights: N(0, 0.02), scales N(1, 0.02), offsets 0.
    ///
    /// # Errors
    /// Never but for memory.
    pub fn weights(&self, rng: &mut RngStream) -> Result<Vec<Tensor>> {
        /// Mean and spread of each weight, in order.
        const DRAWN: [[f32; 2]; 12] = {
            let (weight, scale, zero) = ([0.0, SPREAD], [1.0, SPREAD], [0.0, 0.0]);
            [weight, zero, scale, zero, weight, scale, zero, weight, scale, zero, weight, zero]
        };
        let shapes = self.shapes();
        shapes.iter().zip(DRAWN).map(|(shape, [m, s])| normals(shape, m, s, rng)).collect()
    }

    /// Images `[n, 3, H, W]` in (0, 1) of latents `[n, latent]`.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(&self, p: &[Var], latents: &Var) -> Result<Var> {
        let (n, wide) = (latents.dims()[0], 2 * self.features);
        let [h, w] = self.size;
        let base = latents.matmul(&p[0])?.add(&p[1])?.reshape(&[n, wide, h / 4, w / 4])?;
        let mut x = base.batch_norm(&p[2], &p[3], EPSILON, Activation::None)?.0;
        for layer in 0..2 {
            let at = 4 + 3 * layer;
            x = x.upsampled_conv2d(&p[at])?;
            x = x.batch_norm(&p[at + 1], &p[at + 2], EPSILON, Activation::LeakyRelu(SLOPE))?.0;
        }
        x.conv2d(&p[10], Some(&p[11]), ConvOptions::same(3))?.sigmoid()
    }

    fn read(&self, images: &Var) -> Result<Images> {
        let [h, w] = self.size;
        let n = images.dims()[0];
        Images::new(images.value().flatten_all()?.to_vec1()?, [n, 3, h, w])
    }
}

/// What images are made of: a vector an image and, where images of a class should share something, one a class.
#[derive(Debug, Clone)]
pub struct Latents {
    /// `[n, latent]`.
    own: Tensor,
    /// `[classes, latent]`, and `[n, classes]` with a 1 where an image is of a class.
    shared: Option<[Tensor; 2]>,
}

impl Latents {
    /// `n` vectors of N(0, 1).
    ///
    /// # Errors
    /// Never but for memory.
    pub fn free(n: usize, latent: usize, rng: &mut RngStream) -> Result<Self> {
        Ok(Self { own: normals(&[n, latent], 0.0, 1.0, rng)?, shared: None })
    }

    /// Label-conditional: image `i` is made of a vector of class `labels[i]`, one of `classes` (a row each,
    /// `[classes, latent]`), plus `spread` times N(0, 1) of its own.
    ///
    /// # Errors
    /// Never but for memory.
    pub fn conditional(
        classes: Tensor,
        labels: &[usize],
        spread: f32,
        rng: &mut RngStream,
    ) -> Result<Self> {
        let (count, latent) = classes.dims2()?;
        let own = normals(&[labels.len(), latent], 0.0, spread, rng)?;
        let mut one_hot = vec![0.0f32; labels.len() * count];
        for (row, &label) in one_hot.chunks_exact_mut(count).zip(labels) {
            row[label] = 1.0;
        }
        let one_hot = Tensor::from_vec(one_hot, (labels.len(), count), &Device::Cpu)?;
        Ok(Self { own, shared: Some([classes, one_hot]) })
    }

    /// What is trained of them.
    fn parameters(&self) -> Vec<Tensor> {
        let classes = self.shared.iter().map(|[classes, _]| classes.clone());
        std::iter::once(self.own.clone()).chain(classes).collect()
    }

    fn set_parameters(&mut self, values: Vec<Tensor>) {
        let mut values = values.into_iter();
        self.own = values.next().unwrap_or_else(|| self.own.clone());
        if let (Some([classes, _]), Some(value)) = (&mut self.shared, values.next()) {
            *classes = value;
        }
    }

    /// `[n, latent]` of the parameters on their tape.
    fn join(&self, parameters: &[Var]) -> Result<Var> {
        match (&self.shared, parameters) {
            (Some([_, one_hot]), [own, classes]) => {
                own.tape().constant(one_hot.clone()).matmul(classes)?.add(own)
            }
            _ => Ok(parameters[0].clone()),
        }
    }
}

/// What a step made.
#[derive(Debug)]
pub struct Made {
    /// The images before the step.
    pub images: Images,
    /// Gradients of the loss to the network's weights, in their order.
    pub gradients: Vec<Tensor>,
}

/// A generator and its latents, trained together.
#[derive(Debug)]
pub struct Generator {
    net: GeneratorNet,
    weights: Vec<Tensor>,
    latents: Latents,
    adam: Adam,
    latents_adam: Adam,
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
        let net = GeneratorNet::new(latent, features, size)?;
        let latents = Latents::free(n, latent, rng)?;
        Ok(Self::of(net, net.weights(rng)?, latents))
    }

    /// A generator that starts from `weights`, with fresh optimisers.
    pub fn of(net: GeneratorNet, weights: Vec<Tensor>, latents: Latents) -> Self {
        let fresh = |list: &[Tensor]| Adam::new(ADAM, list.iter().map(Tensor::elem_count));
        let (adam, latents_adam) = (fresh(&weights), fresh(&latents.parameters()));
        Self { net, weights, latents, adam, latents_adam }
    }

    /// Its weights, in the order of [`GeneratorNet::forward`].
    pub fn weights(&self) -> &[Tensor] {
        &self.weights
    }

    /// Images of latents with these parameters; no gradients.
    fn render(&self, latents: &[Tensor]) -> Result<Images> {
        let tape = Tape::new();
        let constants = |list: &[Tensor]| -> Vec<Var> {
            list.iter().map(|p| tape.constant(p.clone())).collect()
        };
        let latents = self.latents.join(&constants(latents))?;
        self.net.read(&self.net.forward(&constants(&self.weights), &latents)?)
    }

    /// The images of all latents, `[n, 3, height, width]` in (0, 1).
    ///
    /// # Errors
    /// Those of the tape.
    pub fn images(&self) -> Result<Images> {
        self.render(&self.latents.parameters())
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
        let [h, w] = self.net.size;
        let mut all = Images::zeros([n * count, 3, h, w]);
        for k in 0..count {
            let mut latents = self.latents.parameters();
            latents[0] = (&latents[0] + normals(latents[0].dims(), 0.0, STEP, rng)?)?;
            let there = self.render(&latents)?;
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

    /// One Adam step on weights and latents, of these sizes: makes the images, asks `image_gradient` for the
    /// gradient of the loss to them, and sends it back.
    ///
    /// # Errors
    /// Those of `image_gradient` and of the tape.
    pub fn step(
        &mut self,
        [rate, latents_rate]: [f64; 2],
        image_gradient: impl FnOnce(&Images) -> Result<Images>,
    ) -> Result<Made> {
        let tape = Tape::new();
        let leaves =
            |list: &[Tensor]| -> Vec<Var> { list.iter().map(|p| tape.leaf(p.clone())).collect() };
        let mut parameters = self.latents.parameters();
        let (weights, latents) = (leaves(&self.weights), leaves(&parameters));
        let output = self.net.forward(&weights, &self.latents.join(&latents)?)?;
        let images = self.net.read(&output)?;
        let gradient = image_gradient(&images)?;
        let shape = output.dims().to_vec();
        let cotangent = tape.constant(Tensor::from_vec(gradient.into_data(), shape, &Device::Cpu)?);
        let wrt: Vec<&Var> = weights.iter().chain(&latents).collect();
        let mut gradients: Vec<Tensor> = vjp(&output, &cotangent, &wrt, Order::First)?
            .into_iter()
            .map(|gradient| gradient.value().clone())
            .collect();
        let of_latents = gradients.split_off(weights.len());
        self.adam.step_tensors(rate, &mut self.weights, &gradients)?;
        self.latents_adam.step_tensors(latents_rate, &mut parameters, &of_latents)?;
        self.latents.set_parameters(parameters);
        Ok(Made { images, gradients })
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
                    .step([1e-2; 2], |images| {
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
        moved.latents.own = (&moved.latents.own + step.unwrap()).unwrap();
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
