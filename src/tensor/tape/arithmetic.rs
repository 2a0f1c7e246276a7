//! Addition, subtraction, multiplication and division with broadcasting, and `a x + b`.

use candle_core::Tensor;

use super::memory::Value;
use super::value::{Float, Slice, build, by_dtype};
use super::{Rule, Step, Var};
use crate::error::Result;
use crate::tensor::kernels::map;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Binary {
    Add,
    Sub,
    Mul,
    Div,
}

impl Binary {
    fn value(self, a: &Tensor, b: &Tensor) -> Result<Value> {
        if a.dims() == b.dims() && a.device().is_cpu() && a.dtype() == b.dtype() {
            let (a, b) = (a.contiguous()?, b.contiguous()?);
            return by_dtype(
                a.dtype(),
                || self.on_slices::<f32>(&a, &b),
                || self.on_slices::<f64>(&a, &b),
            );
        }
        Ok(Value::own(match self {
            Self::Add => a.broadcast_add(b)?,
            Self::Sub => a.broadcast_sub(b)?,
            Self::Mul => a.broadcast_mul(b)?,
            Self::Div => a.broadcast_div(b)?,
        }))
    }

    fn on_slices<T: Float>(self, a: &Tensor, b: &Tensor) -> Result<Value> {
        let dims = a.dims();
        let (a, b) = (Slice::<T>::new(a)?, Slice::<T>::new(b)?);
        build::<T>(dims, |y| match self {
            Self::Add => map::zip(&a, &b, y, |a, b| a + b),
            Self::Sub => map::zip(&a, &b, y, |a, b| a - b),
            Self::Mul => map::zip(&a, &b, y, |a, b| a * b),
            Self::Div => map::zip(&a, &b, y, |a, b| a / b),
        })
    }
}

impl Rule for Binary {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        let (a, b, g) = (&step.inputs[0], &step.inputs[1], step.cotangent);
        let to_a = || match self {
            Self::Add | Self::Sub => Ok(g.clone()),
            Self::Mul => g.mul(b),
            Self::Div => g.div(b),
        };
        let to_b = || match self {
            Self::Add => Ok(g.clone()),
            Self::Sub => g.neg(),
            Self::Mul => g.mul(a),
            Self::Div => g.mul(step.output)?.div(b)?.neg(),
        };
        Ok(vec![
            if step.needs[0] { Some(to_a()?.sum_to(a.dims())?) } else { None },
            if step.needs[1] { Some(to_b()?.sum_to(b.dims())?) } else { None },
        ])
    }
}

/// `factor * x + offset`.
#[derive(Debug, Clone, Copy)]
struct Affine {
    factor: f64,
}

impl Rule for Affine {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        Ok(vec![Some(step.cotangent.scale(self.factor)?)])
    }
}

impl Var {
    fn binary(&self, other: &Self, kind: Binary) -> Result<Self> {
        let value = kind.value(&self.value, &other.value)?;
        self.tape.record(&[self, other], value, kind)
    }

    /// `self + other`, broadcasting.
    ///
    /// # Errors
    /// When the shapes cannot be broadcast together.
    pub fn add(&self, other: &Self) -> Result<Self> {
        self.binary(other, Binary::Add)
    }

    /// `self - other`, broadcasting.
    ///
    /// # Errors
    /// As [`Var::add`].
    pub fn sub(&self, other: &Self) -> Result<Self> {
        self.binary(other, Binary::Sub)
    }

    /// `self * other`, element by element, broadcasting.
    ///
    /// # Errors
    /// As [`Var::add`].
    pub fn mul(&self, other: &Self) -> Result<Self> {
        self.binary(other, Binary::Mul)
    }

    /// `self / other`, element by element, broadcasting.
    ///
    /// # Errors
    /// As [`Var::add`].
    pub fn div(&self, other: &Self) -> Result<Self> {
        self.binary(other, Binary::Div)
    }

    /// `factor * self + offset` for two numbers.
    ///
    /// # Errors
    /// When the tensor library fails.
    pub fn affine(&self, factor: f64, offset: f64) -> Result<Self> {
        let value = if self.device().is_cpu() {
            let x = self.value.contiguous()?;
            by_dtype(
                x.dtype(),
                || affine::<f32>(&x, factor, offset),
                || affine::<f64>(&x, factor, offset),
            )?
        } else {
            self.value.affine(factor, offset)?.into()
        };
        self.tape.record(&[self], value, Affine { factor })
    }

    /// `factor * self`.
    ///
    /// # Errors
    /// When the tensor library fails.
    pub fn scale(&self, factor: f64) -> Result<Self> {
        self.affine(factor, 0.0)
    }

    /// `-self`.
    ///
    /// # Errors
    /// When the tensor library fails.
    pub fn neg(&self) -> Result<Self> {
        self.affine(-1.0, 0.0)
    }
}

fn affine<T: Float>(x: &Tensor, factor: f64, offset: f64) -> Result<Value> {
    let slice = Slice::<T>::new(x)?;
    let (factor, offset) = (T::of(factor), T::of(offset));
    build::<T>(x.dims(), |y| map::map(&slice, y, |x| x * factor + offset))
}
