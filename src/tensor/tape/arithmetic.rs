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
        if let Some(inner) = spread_over(a.dims(), b.dims())
            && a.device().is_cpu()
            && a.dtype() == b.dtype()
        {
            let (a, b) = (a.contiguous()?, b.contiguous()?);
            return by_dtype(
                a.dtype(),
                || self.on_slices::<f32>(&a, &b, inner),
                || self.on_slices::<f64>(&a, &b, inner),
            );
        }
        Ok(Value::own(match self {
            Self::Add => a.broadcast_add(b)?,
            Self::Sub => a.broadcast_sub(b)?,
            Self::Mul => a.broadcast_mul(b)?,
            Self::Div => a.broadcast_div(b)?,
        }))
    }

    fn on_slices<T: Float>(self, a: &Tensor, b: &Tensor, inner: usize) -> Result<Value> {
        let dims = a.dims();
        let (a, b) = (Slice::<T>::new(a)?, Slice::<T>::new(b)?);
        build::<T>(dims, |y| match self {
            Self::Add => map::spread(&a, &b, inner, y, |a, b| a + b),
            Self::Sub => map::spread(&a, &b, inner, y, |a, b| a - b),
            Self::Mul => map::spread(&a, &b, inner, y, |a, b| a * b),
            Self::Div => map::spread(&a, &b, inner, y, |a, b| a / b),
        })
    }
}

/// Where `b`, broadcast, gives the values of `a`'s middle axes (one a channel, one a column, one for all, one each): how
/// many values of `a` lie behind each.
fn spread_over(a: &[usize], b: &[usize]) -> Option<usize> {
    let longer = a.len().checked_sub(b.len())?;
    let Some(first) = b.iter().position(|&d| d != 1) else { return Some(a.iter().product()) };
    let last = b.iter().rposition(|&d| d != 1)?;
    let same = b[first..=last] == a[longer + first..=longer + last];
    same.then(|| a[longer + last + 1..].iter().product())
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

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::tensor::RngStream;

    fn random<T: Float>(rng: &mut RngStream, dims: &[usize]) -> Tensor {
        let n = dims.iter().product();
        let values: Vec<T> = (0..n).map(|_| T::of(1.0 + f64::from(rng.uniform()))).collect();
        Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
    }

    #[test]
    fn a_spread_operand_gives_what_broadcasting_gives() {
        check::<f32>();
        check::<f64>();
    }

    fn check<T: Float>() {
        let mut rng = RngStream::new(0, "tape", "spread", 0);
        let shapes: [(&[usize], &[usize]); 10] = [
            (&[4, 3, 5, 7], &[1, 3, 1, 1]),
            (&[4, 3, 5, 7], &[3, 5, 1]),
            (&[2, 9000], &[9000]),
            (&[40, 600], &[40, 1]),
            (&[3, 8, 4096], &[1, 1, 1]),
            (&[6, 5], &[1]),
            (&[2, 0, 3], &[1, 1, 3]),
            (&[3, 7000], &[3, 7000]),
            (&[1, 1], &[1, 1]),
            (&[2, 0], &[2, 0]),
        ];
        for (wide, narrow) in shapes {
            let a = random::<T>(&mut rng, wide);
            let b = random::<T>(&mut rng, narrow);
            assert!(spread_over(wide, narrow).is_some(), "{wide:?} {narrow:?}");
            for kind in [Binary::Add, Binary::Sub, Binary::Mul, Binary::Div] {
                let wanted = match kind {
                    Binary::Add => a.broadcast_add(&b),
                    Binary::Sub => a.broadcast_sub(&b),
                    Binary::Mul => a.broadcast_mul(&b),
                    Binary::Div => a.broadcast_div(&b),
                };
                let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<T>().unwrap();
                let found = kind.value(&a, &b).unwrap();
                assert_eq!(
                    values(&found),
                    values(&wanted.unwrap()),
                    "{kind:?} {wide:?} {narrow:?}"
                );
            }
        }
        for (wide, narrow) in
            [(&[4, 3][..], &[4, 3, 1][..]), (&[4, 3, 5], &[4, 1, 5]), (&[1, 3], &[2, 3])]
        {
            assert_eq!(spread_over(wide, narrow), None, "{wide:?} {narrow:?}");
        }
    }
}
