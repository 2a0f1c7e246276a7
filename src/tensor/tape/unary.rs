//! Element-wise functions of one variable.
//!
//! First-order gradients take one fused pass (`cotangent * slope`); higher orders compose the slope
//! from recorded operations. The derivative of ReLU at 0 is 0, as in PyTorch.

use candle_core::Tensor;

use super::memory::Value;
use super::value::{Float, Slice, build, by_dtype};
use super::{Order, Rule, Step, Var};
use crate::error::Result;
use crate::tensor::kernels::special::exp;
use crate::tensor::kernels::{Element, map};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Unary {
    Exp,
    Log,
    Sqrt,
    Square,
    Relu,
    LeakyRelu(f64),
    Sigmoid,
    Tanh,
}

/// Logistic function without overflow on either side.
#[inline(always)]
fn sigmoid<T: Element>(x: T) -> T {
    let e = exp(-x.abs());
    let positive = T::ONE / (T::ONE + e);
    if x < T::ZERO { e * positive } else { positive }
}

impl Unary {
    fn value<T: Float>(self, x: &Tensor) -> Result<Value> {
        let s = Slice::<T>::new(x)?;
        build::<T>(x.dims(), |y| match self {
            Self::Exp => map::map(&s, y, Element::exp),
            Self::Log => map::map(&s, y, Element::ln),
            Self::Sqrt => map::map(&s, y, Element::sqrt),
            Self::Square => map::map(&s, y, |x| x * x),
            Self::Relu => map::map(&s, y, |x| if x <= T::ZERO { T::ZERO } else { x }),
            Self::LeakyRelu(slope) => {
                let slope = T::of(slope);
                map::map(&s, y, |x| if x > T::ZERO { x } else { slope * x });
            }
            Self::Sigmoid => map::map(&s, y, sigmoid),
            Self::Tanh => map::map(&s, y, Element::tanh),
        })
    }

    /// The cotangent of the input given that of the output, in one pass over `x` or `y`.
    fn fused<T: Float>(self, x: &Tensor, y: &Tensor, g: &Tensor) -> Result<Value> {
        let (xs, ys, gs) = (Slice::<T>::new(x)?, Slice::<T>::new(y)?, Slice::<T>::new(g)?);
        let half = T::of(0.5);
        build::<T>(x.dims(), |out| match self {
            Self::Exp => map::zip(&ys, &gs, out, |y, g| g * y),
            Self::Log => map::zip(&xs, &gs, out, |x, g| g / x),
            Self::Sqrt => map::zip(&ys, &gs, out, |y, g| g * half / y),
            Self::Square => map::zip(&xs, &gs, out, |x, g| g * (x + x)),
            Self::Relu => map::zip(&xs, &gs, out, |x, g| if x > T::ZERO { g } else { T::ZERO }),
            Self::LeakyRelu(slope) => {
                let slope = T::of(slope);
                map::zip(&xs, &gs, out, |x, g| if x > T::ZERO { g } else { slope * g });
            }
            Self::Sigmoid => map::zip(&ys, &gs, out, |y, g| g * y * (T::ONE - y)),
            Self::Tanh => map::zip(&ys, &gs, out, |y, g| g * (T::ONE - y * y)),
        })
    }

    fn by_candle(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Exp => x.exp()?,
            Self::Log => x.log()?,
            Self::Sqrt => x.sqrt()?,
            Self::Square => x.sqr()?,
            Self::Relu => x.relu()?,
            Self::LeakyRelu(slope) => x.mul(&slopes(x, slope)?)?,
            Self::Sigmoid => ((x * 0.5)?.tanh()? * 0.5)?.affine(1.0, 0.5)?,
            Self::Tanh => x.tanh()?,
        })
    }
}

/// 1 where `x > 0`, else `below`.
pub(super) fn slopes(x: &Tensor, below: f64) -> Result<Tensor> {
    Ok(x.gt(&x.zeros_like()?)?.to_dtype(x.dtype())?.affine(1.0 - below, below)?)
}

impl Rule for Unary {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        let (x, y, g) = (&step.inputs[0], step.output, step.cotangent);
        if step.order == Order::First && g.device().is_cpu() {
            let (xv, yv, gv) =
                (x.value.contiguous()?, y.value.contiguous()?, g.value.contiguous()?);
            let value = by_dtype(
                gv.dtype(),
                || self.fused::<f32>(&xv, &yv, &gv),
                || self.fused::<f64>(&xv, &yv, &gv),
            )?;
            return Ok(vec![Some(g.constant_like(value))]);
        }
        let slope = match self {
            Self::Exp => y.clone(),
            Self::Log => return Ok(vec![Some(g.div(x)?)]),
            Self::Sqrt => return Ok(vec![Some(g.scale(0.5)?.div(y)?)]),
            Self::Square => x.scale(2.0)?,
            // Piecewise linear: the slope is a constant, its own derivative is 0 (almost everywhere).
            Self::Relu => g.constant_like(slopes(&x.value, 0.0)?),
            Self::LeakyRelu(slope) => g.constant_like(slopes(&x.value, *slope)?),
            Self::Sigmoid => y.mul(&y.affine(-1.0, 1.0)?)?,
            Self::Tanh => y.square()?.affine(-1.0, 1.0)?,
        };
        Ok(vec![Some(g.mul(&slope)?)])
    }
}

impl Var {
    fn unary(&self, kind: Unary) -> Result<Self> {
        let value = if self.device().is_cpu() {
            let x = self.value.contiguous()?;
            by_dtype(x.dtype(), || kind.value::<f32>(&x), || kind.value::<f64>(&x))?
        } else {
            kind.by_candle(&self.value)?.into()
        };
        self.tape.record(&[self], value, kind)
    }

    /// e to the power of each element.
    ///
    /// # Errors
    /// When the tensor library fails.
    pub fn exp(&self) -> Result<Self> {
        self.unary(Unary::Exp)
    }

    /// Natural logarithm of each element.
    ///
    /// # Errors
    /// When the tensor library fails.
    pub fn log(&self) -> Result<Self> {
        self.unary(Unary::Log)
    }

    /// Square root of each element; the derivative at 0 is infinite.
    ///
    /// # Errors
    /// When the tensor library fails.
    pub fn sqrt(&self) -> Result<Self> {
        self.unary(Unary::Sqrt)
    }

    /// Square of each element.
    ///
    /// # Errors
    /// When the tensor library fails.
    pub fn square(&self) -> Result<Self> {
        self.unary(Unary::Square)
    }

    /// max(x, 0).
    ///
    /// # Errors
    /// When the tensor library fails.
    pub fn relu(&self) -> Result<Self> {
        self.unary(Unary::Relu)
    }

    /// x where positive, else `slope * x`.
    ///
    /// # Errors
    /// When the tensor library fails.
    pub fn leaky_relu(&self, slope: f64) -> Result<Self> {
        self.unary(Unary::LeakyRelu(slope))
    }

    /// 1 / (1 + e^-x).
    ///
    /// # Errors
    /// When the tensor library fails.
    pub fn sigmoid(&self) -> Result<Self> {
        self.unary(Unary::Sigmoid)
    }

    /// Hyperbolic tangent.
    ///
    /// # Errors
    /// When the tensor library fails.
    pub fn tanh(&self) -> Result<Self> {
        self.unary(Unary::Tanh)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sigmoid_is_right_within_rounding_and_nan_stays() {
        for i in -2000..2000 {
            let x = i as f32 / 16.0;
            let expected = 1.0 / (1.0 + (-f64::from(x)).exp());
            let gap = (f64::from(sigmoid(x)) - expected).abs();
            // Below e^-87 the exponential is 0.
            assert!(gap <= 3e-7 * expected + 1e-37, "sigmoid({x}) off by {gap:e}");
        }
        assert!(sigmoid(f32::NAN).is_nan() && sigmoid(f64::NAN).is_nan());
    }
}
