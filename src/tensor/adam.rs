//! Adam (Kingma and Ba 2015, algorithm 1) on lists of parameters.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::error::{Error, Result};

/// Values of a task.
const TASK: usize = 1 << 14;

/// Constants of the optimiser; the learning rate is given with each step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamOptions {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
}

impl AdamOptions {
    /// PyTorch's defaults: 0.9, 0.999, 1e-8.
    pub const STANDARD: Self = Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
}

/// The optimiser's state: two moments a parameter and the number of steps.
#[derive(Debug, Clone, PartialEq)]
pub struct Adam {
    options: AdamOptions,
    steps: u64,
    first: Vec<Vec<f32>>,
    second: Vec<Vec<f32>>,
}

impl Adam {
    /// A fresh state for parameters of these lengths.
    pub fn new(options: AdamOptions, lengths: impl IntoIterator<Item = usize>) -> Self {
        let first: Vec<Vec<f32>> = lengths.into_iter().map(|n| vec![0.0; n]).collect();
        Self { options, steps: 0, second: first.clone(), first }
    }

    /// A state as [`Adam::moments`] and [`Adam::steps`] gave it.
    ///
    /// # Errors
    /// When the lengths of the moments differ.
    pub fn restore(
        options: AdamOptions,
        steps: u64,
        first: Vec<Vec<f32>>,
        second: Vec<Vec<f32>>,
    ) -> Result<Self> {
        if !first.iter().map(Vec::len).eq(second.iter().map(Vec::len)) {
            return Err(Error::internal("moments of Adam differ in length"));
        }
        Ok(Self { options, steps, first, second })
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// First and second moments, one list a parameter.
    pub fn moments(&self) -> (&[Vec<f32>], &[Vec<f32>]) {
        (&self.first, &self.second)
    }

    /// One step on slices: `parameters[i]` moves against `gradients[i]`.
    ///
    /// # Errors
    /// When the lengths are not those given at the start.
    pub fn step(
        &mut self,
        learning_rate: f64,
        parameters: &mut [&mut [f32]],
        gradients: &[&[f32]],
    ) -> Result<()> {
        let lengths = || self.first.iter().map(Vec::len);
        if !lengths().eq(parameters.iter().map(|p| p.len()))
            || !lengths().eq(gradients.iter().map(|g| g.len()))
        {
            return Err(Error::internal("parameters do not fit this state of Adam"));
        }
        self.steps += 1;
        let AdamOptions { beta1, beta2, epsilon } = self.options;
        let t = self.steps.min(i32::MAX as u64) as i32;
        let size = (learning_rate / (1.0 - beta1.powi(t))) as f32;
        let root = (1.0 - beta2.powi(t)).sqrt() as f32;
        let (keep1, add1) = (beta1 as f32, (1.0 - beta1) as f32);
        let (keep2, add2, epsilon) = (beta2 as f32, (1.0 - beta2) as f32, epsilon as f32);
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((parameter, gradient), (m, v)) in parameters.iter_mut().zip(gradients).zip(moments) {
            let moments = m.par_chunks_mut(TASK).zip(v.par_chunks_mut(TASK));
            let tasks = parameter.par_chunks_mut(TASK).zip(gradient.par_chunks(TASK)).zip(moments);
            tasks.for_each(|((parameter, gradient), (m, v))| {
                let moments = m.iter_mut().zip(v.iter_mut());
                for ((p, &g), (m, v)) in parameter.iter_mut().zip(gradient).zip(moments) {
                    *m = keep1 * *m + add1 * g;
                    *v = keep2 * *v + add2 * g * g;
                    *p -= size * *m / (v.sqrt() / root + epsilon);
                }
            });
        }
        Ok(())
    }

    /// One step on tensors of any device, which are replaced.
    ///
    /// # Errors
    /// As [`Adam::step`].
    pub fn step_tensors(
        &mut self,
        learning_rate: f64,
        parameters: &mut [Tensor],
        gradients: &[Tensor],
    ) -> Result<()> {
        let mut values = parameters.iter().map(numbers).collect::<Result<Vec<_>>>()?;
        let gradients = gradients.iter().map(numbers).collect::<Result<Vec<_>>>()?;
        let mut views: Vec<&mut [f32]> = values.iter_mut().map(Vec::as_mut_slice).collect();
        let gradients: Vec<&[f32]> = gradients.iter().map(Vec::as_slice).collect();
        self.step(learning_rate, &mut views, &gradients)?;
        for (parameter, values) in parameters.iter_mut().zip(values) {
            *parameter = Tensor::from_vec(values, parameter.dims(), &Device::Cpu)?
                .to_dtype(parameter.dtype())?
                .to_device(parameter.device())?;
        }
        Ok(())
    }
}

fn numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The algorithm of the paper in f64 with its own names.
    fn reference(gradients: &[f64], rate: f64) -> f64 {
        let (mut theta, mut m, mut v) = (1.0f64, 0.0, 0.0);
        for (t, g) in gradients.iter().enumerate() {
            let t = t as i32 + 1;
            m = 0.9 * m + 0.1 * g;
            v = 0.999 * v + 0.001 * g * g;
            let (m_hat, v_hat) = (m / (1.0 - 0.9f64.powi(t)), v / (1.0 - 0.999f64.powi(t)));
            theta -= rate * m_hat / (v_hat.sqrt() + 1e-8);
        }
        theta
    }

    #[test]
    fn follows_the_paper_on_slices_and_tensors() {
        let gradients = [0.3, -1.2, 0.0, 5.0, 1e-4];
        let mut adam = Adam::new(AdamOptions::STANDARD, [1]);
        let mut on_tensors = adam.clone();
        let mut p = vec![1.0f32];
        let mut tensors = vec![Tensor::from_vec(vec![1.0f32], 1, &Device::Cpu).unwrap()];
        for g in gradients {
            adam.step(0.01, &mut [&mut p], &[&[g as f32]]).unwrap();
            let g = Tensor::from_vec(vec![g as f32], 1, &Device::Cpu).unwrap();
            on_tensors.step_tensors(0.01, &mut tensors, &[g]).unwrap();
        }
        assert!((f64::from(p[0]) - reference(&gradients, 0.01)).abs() < 1e-6);
        assert_eq!(tensors[0].to_vec1::<f32>().unwrap(), p);
        assert_eq!(adam, on_tensors);
        assert!(adam.step(0.01, &mut [&mut p, &mut []], &[&[0.0]]).is_err());
    }
}
