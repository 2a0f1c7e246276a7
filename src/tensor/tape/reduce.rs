//! Sums, means and their transpose, broadcasting.

use super::memory::Value;
use super::value::{Float, Slice, build, by_dtype};
use super::{Rule, Step, Var};
use crate::error::{Error, Result};
use crate::tensor::kernels::map;

/// Whether reduced dimensions stay with size 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepDims {
    /// They stay with size 1.
    Keep,
    /// They are dropped.
    Drop,
}

/// Sum to a shape with 1 where dimensions were reduced.
struct Sum;

impl Rule for Sum {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        Ok(vec![Some(step.cotangent.broadcast_to(step.inputs[0].dims())?)])
    }
}

/// Repetition along dimensions of size 1.
struct Broadcast;

impl Rule for Broadcast {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        Ok(vec![Some(step.cotangent.sum_to(step.inputs[0].dims())?)])
    }
}

/// Sums a contiguous tensor over `axes` (ascending), one run of adjacent axes at a time.
fn sum_axes<T: Float>(x: &Value, axes: &[usize]) -> Result<Value> {
    let mut dims = x.dims().to_vec();
    let mut value = x.clone();
    let mut end = axes.len();
    while end > 0 {
        let last = axes[end - 1];
        let mut start = end - 1;
        while start > 0 && axes[start - 1] + 1 == axes[start] {
            start -= 1;
        }
        let first = axes[start];
        let reduced: usize = dims[first..=last].iter().product();
        let inner: usize = dims[last + 1..].iter().product();
        dims[first..=last].fill(1);
        let slice = Slice::<T>::new(&value)?;
        let next = build::<T>(&dims, |y| map::sum_axis(&slice, reduced, inner, y))?;
        drop(slice);
        value = next;
        end = start;
    }
    Ok(value)
}

impl Var {
    /// Sum over `axes`.
    ///
    /// # Errors
    /// When an axis is out of range or given twice.
    pub fn sum(&self, axes: &[usize], keep: KeepDims) -> Result<Self> {
        let mut sorted = axes.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        if sorted.len() != axes.len() || sorted.last().is_some_and(|&a| a >= self.dims().len()) {
            return Err(Error::internal(format!(
                "sum over axes {axes:?} of a tensor of shape `{:?}`",
                self.dims()
            )));
        }
        let value = if self.device().is_cpu() {
            let x = self.value.view(self.value.contiguous()?);
            by_dtype(x.dtype(), || sum_axes::<f32>(&x, &sorted), || sum_axes::<f64>(&x, &sorted))?
        } else {
            self.value.sum_keepdim(sorted.as_slice())?.into()
        };
        let sum = self.tape.record(&[self], value, Sum)?;
        if keep == KeepDims::Keep {
            return Ok(sum);
        }
        let rest: Vec<usize> = (0..self.dims().len())
            .filter(|axis| !sorted.contains(axis))
            .map(|axis| self.dims()[axis])
            .collect();
        sum.reshape(&rest)
    }

    /// Sum of all elements, a scalar (shape `[]`).
    ///
    /// # Errors
    /// When the tensor library fails.
    pub fn sum_all(&self) -> Result<Self> {
        let axes: Vec<usize> = (0..self.dims().len()).collect();
        self.sum(&axes, KeepDims::Drop)
    }

    /// Mean over `axes`.
    ///
    /// # Errors
    /// As [`Var::sum`].
    pub fn mean(&self, axes: &[usize], keep: KeepDims) -> Result<Self> {
        let sum = self.sum(axes, keep)?;
        let count = self.elements() as f64 / sum.elements().max(1) as f64;
        sum.scale(1.0 / count.max(1.0))
    }

    /// Mean of all elements, a scalar.
    ///
    /// # Errors
    /// When the tensor library fails.
    pub fn mean_all(&self) -> Result<Self> {
        self.sum_all()?.scale(1.0 / self.elements().max(1) as f64)
    }

    /// Repeats dimensions of size 1 (and missing leading ones) to reach `dims`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn broadcast_to(&self, dims: &[usize]) -> Result<Self> {
        if self.dims() == dims {
            return Ok(self.clone());
        }
        let value = self.value.view(self.value.broadcast_as(dims)?);
        self.tape.record(&[self], value, Broadcast)
    }

    /// Sums over what broadcasting from `dims` to the own shape repeats.
    pub(super) fn sum_to(&self, dims: &[usize]) -> Result<Self> {
        if self.dims() == dims {
            return Ok(self.clone());
        }
        let lead = self.dims().len().saturating_sub(dims.len());
        let axes: Vec<usize> = (0..self.dims().len())
            .filter(|&axis| axis < lead || (dims[axis - lead] == 1 && self.dims()[axis] != 1))
            .collect();
        self.sum(&axes, KeepDims::Keep)?.reshape(dims)
    }
}
