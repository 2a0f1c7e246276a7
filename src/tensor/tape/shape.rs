//! Reshape, transpose, concatenate, cut and pick: operations that only move values.

use candle_core::Tensor;

use super::{Rule, Step, Var};
use crate::error::{Error, Result};

struct Reshape;

impl Rule for Reshape {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        Ok(vec![Some(step.cotangent.reshape(step.inputs[0].dims())?)])
    }
}

struct Transpose(usize, usize);

impl Rule for Transpose {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        Ok(vec![Some(step.cotangent.transpose(self.0, self.1)?)])
    }
}

struct Concat {
    axis: usize,
}

impl Rule for Concat {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        let mut start = 0;
        let mut gradients = Vec::with_capacity(step.inputs.len());
        for (input, &need) in step.inputs.iter().zip(step.needs) {
            let len = input.dims()[self.axis];
            gradients.push(if need {
                Some(step.cotangent.narrow(self.axis, start, len)?)
            } else {
                None
            });
            start += len;
        }
        Ok(gradients)
    }
}

/// Elements `start..start + len` along an axis.
struct Narrow {
    axis: usize,
    start: usize,
}

impl Rule for Narrow {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        let total = step.inputs[0].dims()[self.axis];
        let len = step.output.dims()[self.axis];
        let end = total - self.start - len;
        Ok(vec![Some(step.cotangent.pad(self.axis, self.start, end)?)])
    }
}

/// Zeros before and after along an axis: the transpose of [`Narrow`].
struct Pad {
    axis: usize,
    before: usize,
}

impl Rule for Pad {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        let len = step.inputs[0].dims()[self.axis];
        Ok(vec![Some(step.cotangent.narrow(self.axis, self.before, len)?)])
    }
}

/// Rows by index.
struct SelectRows {
    rows: Tensor,
}

impl Rule for SelectRows {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        Ok(vec![Some(step.cotangent.add_rows(&self.rows, step.inputs[0].dims()[0])?)])
    }
}

/// Rows added up at their index: the transpose of [`SelectRows`].
struct AddRows {
    rows: Tensor,
}

impl Rule for AddRows {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        Ok(vec![Some(step.cotangent.pick_rows(&self.rows)?)])
    }
}

impl Var {
    /// The same values in another shape of as many elements.
    ///
    /// # Errors
    /// When the number of elements differs.
    pub fn reshape(&self, dims: &[usize]) -> Result<Self> {
        if self.dims() == dims {
            return Ok(self.clone());
        }
        let value = self.value.view(self.value.reshape(dims)?);
        self.tape.record(&[self], value, Reshape)
    }

    /// `[N, ...]` to `[N, product of the rest]`.
    ///
    /// # Errors
    /// When there is no first axis.
    pub fn flatten_rows(&self) -> Result<Self> {
        let rows = *self.dims().first().ok_or_else(|| Error::internal("a scalar has no rows"))?;
        self.reshape(&[rows, self.elements() / rows.max(1)])
    }

    /// Swaps two axes (no copy).
    ///
    /// # Errors
    /// When an axis is out of range.
    pub fn transpose(&self, first: usize, second: usize) -> Result<Self> {
        let value = self.value.view(self.value.transpose(first, second)?);
        self.tape.record(&[self], value, Transpose(first, second))
    }

    /// Joins tensors along an axis; all on one tape.
    ///
    /// # Errors
    /// When there is none, or the other axes differ.
    pub fn concat(parts: &[&Self], axis: usize) -> Result<Self> {
        let Some(first) = parts.first() else {
            return Err(Error::internal("nothing to concatenate"));
        };
        let values: Vec<&Tensor> = parts.iter().map(|part| &*part.value).collect();
        // One part is not copied.
        let value = first.value.view(Tensor::cat(&values, axis)?);
        first.tape.record(parts, value, Concat { axis })
    }

    /// Elements `start..start + len` along `axis`.
    ///
    /// # Errors
    /// When out of range.
    pub fn narrow(&self, axis: usize, start: usize, len: usize) -> Result<Self> {
        let value = self.value.view(self.value.narrow(axis, start, len)?);
        self.tape.record(&[self], value, Narrow { axis, start })
    }

    /// Zeros before and after along `axis`.
    ///
    /// # Errors
    /// When the axis is out of range.
    pub fn pad(&self, axis: usize, before: usize, after: usize) -> Result<Self> {
        let value = self.value.view(self.value.pad_with_zeros(axis, before, after)?);
        self.tape.record(&[self], value, Pad { axis, before })
    }

    /// Rows of the first axis by index; an index may repeat.
    ///
    /// # Errors
    /// When an index is out of range.
    pub fn index_select_rows(&self, rows: &[usize]) -> Result<Self> {
        let count = self.dims().first().copied().unwrap_or(0);
        if let Some(row) = rows.iter().find(|&&row| row >= count) {
            return Err(Error::internal(format!("row {row} of a tensor with rows `{count}`")));
        }
        let rows: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        self.pick_rows(&Tensor::new(rows, self.device())?)
    }

    fn pick_rows(&self, rows: &Tensor) -> Result<Self> {
        let value = self.value.contiguous()?.index_select(rows, 0)?;
        self.tape.record(&[self], value, SelectRows { rows: rows.clone() })
    }

    fn add_rows(&self, rows: &Tensor, count: usize) -> Result<Self> {
        let mut dims = self.dims().to_vec();
        dims[0] = count;
        let zeros = Tensor::zeros(dims, self.dtype(), self.device())?;
        let value = zeros.index_add(rows, &self.value.contiguous()?, 0)?;
        self.tape.record(&[self], value, AddRows { rows: rows.clone() })
    }
}
