//! Log-softmax and cross-entropy.

use candle_core::Tensor;

use super::memory::Value;
use super::reduce::KeepDims;
use super::value::{Float, Slice, build, by_dtype};
use super::{Rule, Step, Var};
use crate::error::{Error, Result};

struct LogSoftmax;

impl Rule for LogSoftmax {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        let g = step.cotangent;
        let last = g.dims().len() - 1;
        let total = g.sum(&[last], KeepDims::Keep)?;
        Ok(vec![Some(g.sub(&step.output.exp()?.mul(&total)?)?)])
    }
}

fn log_softmax<T: Float>(x: &Tensor) -> Result<Value> {
    let columns = x.dims().last().copied().unwrap_or(1).max(1);
    let slice = Slice::<T>::new(x)?;
    build::<T>(x.dims(), |y| {
        for (y, x) in y.chunks_exact_mut(columns).zip(slice.chunks_exact(columns)) {
            let largest = x.iter().copied().fold(x[0], |a, b| if b > a { b } else { a });
            let total: T = x.iter().map(|&x| (x - largest).exp()).sum();
            let shift = largest + total.ln();
            for (y, &x) in y.iter_mut().zip(x) {
                *y = x - shift;
            }
        }
    })
}

impl Var {
    /// Logarithm of the softmax along the last axis.
    ///
    /// # Errors
    /// When there is no axis.
    pub fn log_softmax(&self) -> Result<Self> {
        if self.dims().is_empty() {
            return Err(Error::internal("log-softmax of a scalar"));
        }
        let last = self.dims().len() - 1;
        let value = if self.device().is_cpu() {
            let x = self.value.contiguous()?;
            by_dtype(x.dtype(), || log_softmax::<f32>(&x), || log_softmax::<f64>(&x))?
        } else {
            let shifted = self.value.broadcast_sub(&self.value.max_keepdim(last)?)?;
            shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(last)?.log()?)?.into()
        };
        self.tape.record(&[self], value, LogSoftmax)
    }

    /// Mean cross-entropy of logits `[n, classes]` with class indices, a scalar.
    ///
    /// # Errors
    /// When the number of labels is not the number of rows, or a label is not a class.
    pub fn cross_entropy(&self, labels: &[usize]) -> Result<Self> {
        let &[n, classes] = self.dims() else {
            return Err(Error::internal(format!(
                "cross-entropy of logits of shape `{:?}`",
                self.dims()
            )));
        };
        if labels.len() != n || labels.iter().any(|&label| label >= classes) {
            return Err(Error::internal(format!(
                "cross-entropy of {n} rows and {classes} classes with labels `{labels:?}`"
            )));
        }
        let mut hot = vec![0.0; n * classes];
        for (row, &label) in hot.chunks_exact_mut(classes).zip(labels) {
            row[label] = -1.0 / n as f64;
        }
        let weights = super::value::small(&hot, &[n, classes], &self.value)?;
        self.log_softmax()?.mul(&self.constant_like(weights))?.sum_all()
    }
}
