//! Batch normalisation + ReLU + 2x2 max pooling as one operation: the block that Conv4 repeats.
//!
//! Its gradient is one operation too, of three results, and the gradient of that a closed formula
//! ([`kernels::norm_pool`](crate::tensor::kernels::norm_pool)): two passes each. Orders beyond the second are composed.

use std::rc::Rc;

use candle_core::Tensor;

use super::grad::by_composition;
use super::memory::{Value, empty};
use super::norm::{BatchStatistics, composed, statistics_of};
use super::pool::{Places, Shape, scatter};
use super::value::{Float, Slice, by_dtype, from_vec};
use super::{Activation, Order, Rule, Step, Var};
use crate::error::{Error, Result};
use crate::tensor::kernels::blocks::block_max;
use crate::tensor::kernels::norm_pool::{Block, Channel, FirstCotangents, Maps};

enum Kept {
    F32(Vec<Channel<f32>>),
    F64(Vec<Channel<f64>>),
}

fn maps([images, channels, h, w]: [usize; 4]) -> Maps {
    Maps { images, channels, size: [h, w] }
}

/// What both directions know of the forward pass.
struct Made {
    shape: Shape,
    epsilon: f64,
    kept: Kept,
}

type Forward<T> = (Value, Vec<Channel<T>>, BatchStatistics);

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
    let channels: Vec<Channel<T>> = (0..maps.channels)
        .map(|c| Channel {
            mean: saved.mean[c],
            inverse_std: saved.inverse_std[c],
            scale: saved.scale[c],
            shift: saved.shift[c],
        })
        .collect();
    let small = shape.small();
    let mut y = empty(small.iter().product());
    Block { maps, channels: &channels, x: &x }.forward(&mut y);
    Ok((from_vec(y, &small)?, channels, statistics))
}

/// The gradients to input, factor and offset.
fn first<T: Float>(
    shape: Shape,
    channels: &[Channel<T>],
    x: &Tensor,
    g: &Tensor,
) -> Result<[Value; 3]> {
    let maps = maps(shape.large);
    let (x, g) = (Slice::<T>::new(x)?, Slice::<T>::new(g)?);
    let block = Block { maps, channels, x: &x };
    let sums = block.first_sums(&g);
    let mut dx = empty(x.len());
    block.backward(&g, &sums, &mut dx);
    let small =
        |values: Vec<f64>| from_vec::<T>(values.into_iter().map(T::of).collect(), &[maps.channels]);
    Ok([
        from_vec(dx, &shape.large)?,
        small(sums.iter().map(|sums| sums.along).collect())?,
        small(sums.iter().map(|sums| sums.direct).collect())?,
    ])
}

/// The gradients of [`first`] to input, factor and cotangent. `step.inputs` are those three, `step.cotangent` belongs to
/// the gradient to the input, `step.further` to those to factor and offset.
fn second<T: Float>(
    shape: Shape,
    channels: &[Channel<T>],
    step: &Step<'_>,
) -> Result<Vec<Option<Var>>> {
    let maps = maps(shape.large);
    let [x, g] = [&step.inputs[0], &step.inputs[2]].map(|var| var.value.contiguous());
    let (x, g, h) = (x?, g?, step.cotangent.value.contiguous()?);
    let (x, g, h) = (Slice::<T>::new(&x)?, Slice::<T>::new(&g)?, Slice::<T>::new(&h)?);
    let mut cotangents = vec![FirstCotangents::default(); maps.channels];
    for (at, further) in step.further.iter().enumerate() {
        let Some(further) = further else { continue };
        let values = further.value.contiguous()?;
        for (own, value) in cotangents.iter_mut().zip(Slice::<T>::new(&values)?.iter()) {
            let to = if at == 0 { &mut own.along } else { &mut own.direct };
            *to = value.f64();
        }
    }
    let block = Block { maps, channels, x: &x };
    let sums = block.first_sums(&g);
    let (mut dx, mut dg) = (empty(x.len()), empty(g.len()));
    let factor = block.second(&g, &h, &sums, &cotangents, &mut dx, &mut dg);
    let factor = factor.into_iter().map(T::of).collect();
    let constant = |values, dims: &[usize]| -> Result<Option<Var>> {
        Ok(Some(step.cotangent.constant_like(from_vec::<T>(values, dims)?)))
    };
    Ok(vec![
        constant(dx, &shape.large)?,
        constant(factor, &[maps.channels])?,
        constant(dg, &shape.small())?,
    ])
}

impl Made {
    /// [`first`] in the type of `x`.
    fn backward(&self, x: &Var, g: &Var) -> Result<[Value; 3]> {
        let (x, g) = (x.value.contiguous()?, g.value.contiguous()?);
        match &self.kept {
            Kept::F32(channels) => first(self.shape, channels, &x, &g),
            Kept::F64(channels) => first(self.shape, channels, &x, &g),
        }
    }

    /// Where the maxima lie, and 1 where ReLU lets them through.
    fn selection(&self, x: &Tensor) -> Result<(Places, Value)> {
        let x = x.contiguous()?;
        match &self.kept {
            Kept::F32(channels) => selection(self.shape, channels, &x),
            Kept::F64(channels) => selection(self.shape, channels, &x),
        }
    }
}

fn selection<T: Float>(
    shape: Shape,
    channels: &[Channel<T>],
    x: &Tensor,
) -> Result<(Places, Value)> {
    let x = Slice::<T>::new(x)?;
    let plane = shape.large[2] * shape.large[3];
    let mut values = Vec::with_capacity(x.len());
    for (at, x) in x.chunks_exact(plane).enumerate() {
        let channel = channels[at % channels.len()];
        values.extend(x.iter().map(|&x| x * channel.scale + channel.shift));
    }
    let small = shape.small();
    let n = small.iter().product();
    let (mut y, mut places) = (vec![T::ZERO; n], vec![0; n]);
    block_max(&shape.blocks(), &values, &mut y, &mut places);
    y.iter_mut().for_each(|y| *y = if *y > T::ZERO { T::ONE } else { T::ZERO });
    Ok((Places::Bytes(Rc::new(places)), from_vec(y, &small)?))
}

struct NormReluPool(Rc<Made>);

impl Rule for NormReluPool {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        let (x, factor, g) = (&step.inputs[0], &step.inputs[1], step.cotangent);
        let values = self.0.backward(x, g)?;
        let gradients = match step.order {
            Order::First => values.map(|value| g.constant_like(value)),
            Order::Higher => {
                let rule = NormReluPoolGradient(Rc::clone(&self.0));
                x.tape.record_all(&[x, factor, g], values, rule)?
            }
        };
        Ok(gradients.into_iter().map(Some).collect())
    }
}

/// (x, factor, gradient of the output) -> gradients to x, factor and offset.
struct NormReluPoolGradient(Rc<Made>);

impl Rule for NormReluPoolGradient {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        let made = &self.0;
        match (step.order, &made.kept) {
            (Order::First, Kept::F32(channels)) => second(made.shape, channels, step),
            (Order::First, Kept::F64(channels)) => second(made.shape, channels, step),
            (Order::Higher, _) => by_composition(step, |own| {
                let (places, open) = made.selection(&own[0].value)?;
                let open = own[2].mul(&own[2].constant_like(open))?;
                let g = scatter(&open, made.shape, &places)?;
                composed(&own[0], &own[1], &g, made.epsilon)
            }),
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
        let (value, kept, statistics) = by_dtype(
            x.dtype(),
            || {
                forward::<f32>(&x, &f, &o, epsilon, shape)
                    .map(|(y, channels, s)| (y, Kept::F32(channels), s))
            },
            || {
                forward::<f64>(&x, &f, &o, epsilon, shape)
                    .map(|(y, channels, s)| (y, Kept::F64(channels), s))
            },
        )?;
        let rule = NormReluPool(Rc::new(Made { shape, epsilon, kept }));
        Ok((self.tape.record(&[self, factor, offset], value, rule)?, statistics))
    }
}
