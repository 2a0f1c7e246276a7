//! Batch normalisation, with the statistics of the batch or with given ones, fused with ReLU.
//!
//! First-order gradients run fused kernels; higher orders recompute the normalised value from the
//! recorded input and compose the same formulas (Ioffe and Szegedy 2015, section 3) from recorded
//! operations, so they can be differentiated again.

use candle_core::Tensor;

use super::memory::{Value, empty};
use super::reduce::KeepDims;
use super::unary::slopes;
use super::value::{Float, Slice, by_dtype, from_vec};
use super::{Order, Rule, Step, Var};
use crate::error::{Error, Result};
pub use crate::tensor::kernels::batch_norm::Activation;
use crate::tensor::kernels::batch_norm::{
    Normalisation, Planes, batch_norm_backward, batch_statistics, channel_affine,
};

/// Statistics of one batch, per channel, as plain numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchStatistics {
    /// Mean of each channel.
    pub mean: Vec<f64>,
    /// Biased variance of each channel (divided by `count`).
    pub variance: Vec<f64>,
    /// Values a channel: images times height times width.
    pub count: usize,
}

/// What the forward pass leaves on the CPU, one value a channel each.
pub(super) struct Saved<T> {
    pub(super) mean: Vec<T>,
    pub(super) inverse_std: Vec<T>,
    pub(super) scale: Vec<T>,
    pub(super) shift: Vec<T>,
}

impl<T> Saved<T> {
    pub(super) fn normalisation(&self, activation: Activation) -> Normalisation<'_, T> {
        Normalisation {
            mean: &self.mean,
            inverse_std: &self.inverse_std,
            scale: &self.scale,
            shift: &self.shift,
            activation,
        }
    }
}

/// The saved values in the tensor's type; `Composed` off the CPU, where every rule is composed.
enum Kept {
    F32(Saved<f32>),
    F64(Saved<f64>),
    Composed,
}

struct BatchNorm {
    activation: Activation,
    epsilon: f64,
    kept: Kept,
}

fn planes([n, c, h, w]: [usize; 4]) -> Planes {
    Planes { images: n, channels: c, plane: h * w }
}

fn forward<T: Float>(
    x: &Tensor,
    factor: &Tensor,
    offset: &Tensor,
    epsilon: f64,
    activation: Activation,
    dims: [usize; 4],
) -> Result<(Value, Saved<T>, BatchStatistics)> {
    let p = planes(dims);
    let x = Slice::<T>::new(x)?;
    let (saved, statistics) = statistics_of::<T>(&p, &x, factor, offset, epsilon)?;
    let mut y = empty(x.len());
    channel_affine(&p, &x, &saved.scale, &saved.shift, activation, &mut y);
    Ok((from_vec(y, &dims)?, saved, statistics))
}

/// Batch statistics and what follows from them, per channel.
pub(super) fn statistics_of<T: Float>(
    p: &Planes,
    x: &[T],
    factor: &Tensor,
    offset: &Tensor,
    epsilon: f64,
) -> Result<(Saved<T>, BatchStatistics)> {
    let (factor, offset) = (Slice::<T>::new(factor)?, Slice::<T>::new(offset)?);
    let (mut mean, mut variance) = (vec![T::ZERO; p.channels], vec![T::ZERO; p.channels]);
    batch_statistics(p, x, &mut mean, &mut variance);
    let inverse_std: Vec<T> =
        variance.iter().map(|&v| T::ONE / (v + T::of(epsilon)).sqrt()).collect();
    let scale: Vec<T> = inverse_std.iter().zip(factor.iter()).map(|(&i, &f)| i * f).collect();
    let shift: Vec<T> = (0..p.channels).map(|c| offset[c] - mean[c] * scale[c]).collect();
    let statistics = BatchStatistics {
        mean: mean.iter().map(|v| v.f64()).collect(),
        variance: variance.iter().map(|v| v.f64()).collect(),
        count: p.per_channel(),
    };
    Ok((Saved { mean, inverse_std, scale, shift }, statistics))
}

impl BatchNorm {
    fn fused<T: Float>(&self, saved: &Saved<T>, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        let dims = step.inputs[0].dims4()?;
        let p = planes(dims);
        let (x, g) = (step.inputs[0].value.contiguous()?, step.cotangent.value.contiguous()?);
        let (x, g) = (Slice::<T>::new(&x)?, Slice::<T>::new(&g)?);
        let norm = saved.normalisation(self.activation);
        let mut dx = empty(x.len());
        let (mut d_factor, mut d_offset) = (vec![T::ZERO; p.channels], vec![T::ZERO; p.channels]);
        batch_norm_backward(&p, &norm, &x, &g, &mut dx, &mut d_factor, &mut d_offset);
        let constant = |values, dims: &[usize]| -> Result<Option<Var>> {
            Ok(Some(step.cotangent.constant_like(from_vec::<T>(values, dims)?)))
        };
        Ok(vec![
            constant(dx, &dims)?,
            constant(d_factor, &[p.channels])?,
            constant(d_offset, &[p.channels])?,
        ])
    }
}

/// The cotangents of input, factor and offset from recorded operations; `g` is the cotangent of the
/// normalised value before any activation.
pub(super) fn composed(x: &Var, factor: &Var, g: &Var, epsilon: f64) -> Result<Vec<Var>> {
    let [n, channels, h, w] = x.dims4()?;
    let count = (n * h * w) as f64;
    let (normal, inverse_std) = normalised(x, epsilon)?;
    let d_offset = g.sum(&[0, 2, 3], KeepDims::Keep)?;
    let d_factor = g.mul(&normal)?.sum(&[0, 2, 3], KeepDims::Keep)?;
    let along = normal.mul(&d_factor)?.add(&d_offset)?.scale(1.0 / count)?;
    let scale = factor.reshape(&[1, channels, 1, 1])?.mul(&inverse_std)?;
    let dx = g.sub(&along)?.mul(&scale)?;
    Ok(vec![dx, d_factor.reshape(&[channels])?, d_offset.reshape(&[channels])?])
}

/// The cotangent before the activation. Every activation keeps the sign, so the output tells the slope.
fn before(activation: Activation, step: &Step<'_>) -> Result<Var> {
    if activation == Activation::None {
        return Ok(step.cotangent.clone());
    }
    let slopes = slopes(&step.output.value, activation.below())?;
    step.cotangent.mul(&step.cotangent.constant_like(slopes))
}

/// `(x - mean) / sqrt(var + epsilon)` per channel and the reciprocal of the root `[1, C, 1, 1]`.
fn normalised(x: &Var, epsilon: f64) -> Result<(Var, Var)> {
    let centred = x.sub(&x.mean(&[0, 2, 3], KeepDims::Keep)?)?;
    let variance = centred.square()?.mean(&[0, 2, 3], KeepDims::Keep)?;
    let std = variance.affine(1.0, epsilon)?.sqrt()?;
    let one = x.constant_like(Tensor::ones((1, 1, 1, 1), x.dtype(), x.device())?);
    let inverse_std = one.div(&std)?;
    Ok((centred.mul(&inverse_std)?, inverse_std))
}

/// The activation by candle's operations.
fn activated(value: &Tensor, activation: Activation) -> Result<Tensor> {
    Ok(match activation {
        Activation::None => value.clone(),
        Activation::Relu => value.relu()?,
        Activation::LeakyRelu(slope) => value.mul(&slopes(value, slope)?)?,
    })
}

impl Rule for BatchNorm {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        match (step.order, &self.kept) {
            (Order::First, Kept::F32(saved)) => self.fused(saved, step),
            (Order::First, Kept::F64(saved)) => self.fused(saved, step),
            _ => {
                let (x, factor) = (&step.inputs[0], &step.inputs[1]);
                let gradients = composed(x, factor, &before(self.activation, step)?, self.epsilon)?;
                Ok(gradients.into_iter().map(Some).collect())
            }
        }
    }
}

/// `x * scale + shift` per channel, then the activation.
struct ChannelAffine(Activation);

impl Rule for ChannelAffine {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        let (x, scale) = (&step.inputs[0], &step.inputs[1]);
        let channels = scale.elements();
        let g = before(self.0, step)?;
        let to_x = || g.mul(&scale.reshape(&[1, channels, 1, 1])?);
        let to_scale = || g.mul(x)?.sum(&[0, 2, 3], KeepDims::Drop);
        let to_shift = || g.sum(&[0, 2, 3], KeepDims::Drop);
        Ok(vec![
            if step.needs[0] { Some(to_x()?) } else { None },
            if step.needs[1] { Some(to_scale()?) } else { None },
            if step.needs[2] { Some(to_shift()?) } else { None },
        ])
    }
}

impl Var {
    pub(super) fn check_channels(&self, vectors: &[&Self]) -> Result<[usize; 4]> {
        let dims = self.dims4()?;
        if vectors.iter().any(|v| v.dims() != [dims[1]]) {
            return Err(Error::internal(format!(
                "normalisation of {dims:?} with vectors of shapes `{:?}`",
                vectors.iter().map(|v| v.dims()).collect::<Vec<_>>()
            )));
        }
        Ok(dims)
    }

    /// Batch normalisation of `[N, C, H, W]` with the mean and (biased) variance of the batch, times
    /// `factor` `[C]` plus `offset` `[C]`, then the activation. Also returns the statistics, for
    /// running averages.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn batch_norm(
        &self,
        factor: &Self,
        offset: &Self,
        epsilon: f64,
        activation: Activation,
    ) -> Result<(Self, BatchStatistics)> {
        let dims = self.check_channels(&[factor, offset])?;
        if self.elements() == 0 {
            return Err(Error::internal(format!("statistics of an empty batch `{dims:?}`")));
        }
        let (value, kept, statistics) = if self.device().is_cpu() {
            let x = self.value.contiguous()?;
            let (f, o) = (factor.value.contiguous()?, offset.value.contiguous()?);
            by_dtype(
                x.dtype(),
                || {
                    forward::<f32>(&x, &f, &o, epsilon, activation, dims)
                        .map(|(y, saved, s)| (y, Kept::F32(saved), s))
                },
                || {
                    forward::<f64>(&x, &f, &o, epsilon, activation, dims)
                        .map(|(y, saved, s)| (y, Kept::F64(saved), s))
                },
            )?
        } else {
            let (value, statistics) = self.batch_norm_by_candle(factor, offset, epsilon)?;
            let value = activated(&value, activation)?;
            (value.into(), Kept::Composed, statistics)
        };
        let rule = BatchNorm { activation, epsilon, kept };
        Ok((self.tape.record(&[self, factor, offset], value, rule)?, statistics))
    }

    fn batch_norm_by_candle(
        &self,
        factor: &Self,
        offset: &Self,
        epsilon: f64,
    ) -> Result<(Tensor, BatchStatistics)> {
        let [n, c, h, w] = self.dims4()?;
        let x = &self.value;
        let mean = x.mean_keepdim((0, 2, 3))?;
        let centred = x.broadcast_sub(&mean)?;
        let variance = centred.sqr()?.mean_keepdim((0, 2, 3))?;
        let scale = (factor.value.reshape((1, c, 1, 1))? / (&variance + epsilon)?.sqrt()?)?;
        let value =
            centred.broadcast_mul(&scale)?.broadcast_add(&offset.value.reshape((1, c, 1, 1))?)?;
        let numbers = |t: &Tensor| -> Result<Vec<f64>> {
            Ok(t.flatten_all()?.to_dtype(candle_core::DType::F64)?.to_vec1()?)
        };
        let statistics = BatchStatistics {
            mean: numbers(&mean)?,
            variance: numbers(&variance)?,
            count: n * h * w,
        };
        Ok((value, statistics))
    }

    /// `self * scale + shift` per channel of `[N, C, H, W]`, then the activation: normalisation with
    /// given statistics. `scale` and `shift` are `[C]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn channel_affine(
        &self,
        scale: &Self,
        shift: &Self,
        activation: Activation,
    ) -> Result<Self> {
        let dims = self.check_channels(&[scale, shift])?;
        let value = if self.device().is_cpu() {
            let x = self.value.contiguous()?;
            let (a, b) = (scale.value.contiguous()?, shift.value.contiguous()?);
            by_dtype(
                x.dtype(),
                || affine_on::<f32>(&x, &a, &b, activation, dims),
                || affine_on::<f64>(&x, &a, &b, activation, dims),
            )?
        } else {
            let vector = |v: &Self| v.value.reshape((1, dims[1], 1, 1));
            let value =
                self.value.broadcast_mul(&vector(scale)?)?.broadcast_add(&vector(shift)?)?;
            activated(&value, activation)?.into()
        };
        self.tape.record(&[self, scale, shift], value, ChannelAffine(activation))
    }
}

fn affine_on<T: Float>(
    x: &Tensor,
    scale: &Tensor,
    shift: &Tensor,
    activation: Activation,
    dims: [usize; 4],
) -> Result<Value> {
    let x = Slice::<T>::new(x)?;
    let (scale, shift) = (Slice::<T>::new(scale)?, Slice::<T>::new(shift)?);
    let mut y = empty(x.len());
    channel_affine(&planes(dims), &x, &scale, &shift, activation, &mut y);
    from_vec(y, &dims)
}
