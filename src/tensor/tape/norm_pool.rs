//! Batch normalisation + ReLU + 2x2 max pooling as one operation: the block that Conv4 repeats.

use std::rc::Rc;

use candle_core::Tensor;

use super::norm::{BatchStatistics, Saved, composed, statistics_of, where_positive};
use super::pool::{Places, Shape, scatter};
use super::value::{Float, Slice, by_dtype, from_vec};
use super::{Activation, Order, Rule, Step, Var};
use crate::error::{Error, Result};
use crate::tensor::kernels::norm_pool::{Maps, affine_relu_pool, norm_relu_pool_backward};

enum Kept {
    F32(Saved<f32>),
    F64(Saved<f64>),
}

struct NormReluPool {
    shape: Shape,
    epsilon: f64,
    kept: Kept,
    places: Rc<Vec<u8>>,
}

fn maps([images, channels, h, w]: [usize; 4]) -> Maps {
    Maps { images, channels, size: [h, w] }
}

type Forward<T> = (Tensor, Saved<T>, Vec<u8>, BatchStatistics);

fn forward<T: Float>(
    x: &Tensor,
    factor: &Tensor,
    offset: &Tensor,
    epsilon: f64,
    shape: Shape,
) -> Result<Forward<T>> {
    let maps = maps(shape.large);
    let x = Slice::<T>::new(x)?;
    let (saved, statistics) = statistics_of::<T>(&maps.planes(), &x, factor, offset, epsilon)?;
    let small = shape.small();
    let n = small.iter().product();
    let (mut y, mut places) = (vec![T::ZERO; n], vec![0; n]);
    affine_relu_pool(&maps, &x, &saved.scale, &saved.shift, &mut y, &mut places);
    Ok((from_vec(y, &small)?, saved, places, statistics))
}

impl NormReluPool {
    fn fused<T: Float>(&self, saved: &Saved<T>, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        let maps = maps(self.shape.large);
        let (x, y) = (step.inputs[0].value.contiguous()?, step.output.value.contiguous()?);
        let g = step.cotangent.value.contiguous()?;
        let (x, y, g) = (Slice::<T>::new(&x)?, Slice::<T>::new(&y)?, Slice::<T>::new(&g)?);
        let norm = saved.normalisation(Activation::Relu);
        let c = maps.channels;
        let mut dx = vec![T::ZERO; x.len()];
        let (mut factor, mut offset) = (vec![T::ZERO; c], vec![T::ZERO; c]);
        norm_relu_pool_backward(
            &maps,
            &norm,
            &x,
            &y,
            &self.places,
            &g,
            &mut dx,
            &mut factor,
            &mut offset,
        );
        let constant = |values, dims: &[usize]| -> Result<Option<Var>> {
            Ok(Some(step.cotangent.constant_like(from_vec::<T>(values, dims)?)))
        };
        Ok(vec![constant(dx, &self.shape.large)?, constant(factor, &[c])?, constant(offset, &[c])?])
    }
}

impl Rule for NormReluPool {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        match (step.order, &self.kept) {
            (Order::First, Kept::F32(saved)) => self.fused(saved, step),
            (Order::First, Kept::F64(saved)) => self.fused(saved, step),
            (Order::Higher, _) => {
                let pooled = where_positive(step.output, step.cotangent)?;
                let places = Places::Bytes(Rc::clone(&self.places));
                composed(step, &scatter(&pooled, self.shape, &places)?, self.epsilon)
            }
        }
    }
}

impl Var {
    /// [`Var::batch_norm`] with ReLU, then [`Var::max_pool2d`] of side 2, in one pass.
    ///
    /// # Errors
    /// As those two.
    pub fn batch_norm_relu_pool(
        &self,
        factor: &Self,
        offset: &Self,
        epsilon: f64,
    ) -> Result<(Self, BatchStatistics)> {
        if !self.device().is_cpu() {
            let (y, statistics) = self.batch_norm(factor, offset, epsilon, Activation::Relu)?;
            return Ok((y.max_pool2d(2)?, statistics));
        }
        let large = self.check_channels(&[factor, offset])?;
        if self.elements() == 0 || large[2] < 2 || large[3] < 2 {
            return Err(Error::internal(format!("2 x 2 pooling of a batch of shape `{large:?}`")));
        }
        let shape = Shape { large, side: 2 };
        let x = self.value.contiguous()?;
        let (f, o) = (factor.value.contiguous()?, offset.value.contiguous()?);
        let (value, kept, places, statistics) = by_dtype(
            x.dtype(),
            || {
                forward::<f32>(&x, &f, &o, epsilon, shape)
                    .map(|(y, saved, places, s)| (y, Kept::F32(saved), places, s))
            },
            || {
                forward::<f64>(&x, &f, &o, epsilon, shape)
                    .map(|(y, saved, places, s)| (y, Kept::F64(saved), places, s))
            },
        )?;
        let rule = NormReluPool { shape, epsilon, kept, places: Rc::new(places) };
        Ok((self.tape.record(&[self, factor, offset], value, rule)?, statistics))
    }
}
