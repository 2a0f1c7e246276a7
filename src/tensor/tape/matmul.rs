//! Matrix products, plain and batched.

use candle_core::Tensor;
use rayon::prelude::*;

use super::memory::Value;
use super::value::{Float, by_dtype, from_vec};
use super::{Rule, Step, Var};
use crate::error::{Error, Result};
use crate::tensor::kernels::product::{self, MatrixRef, Output, Sizes, Start, Threads};

/// Products of a batch from which on each is one task.
const MANY: usize = 8;

struct MatMul;

impl Rule for MatMul {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        let (a, b, g) = (&step.inputs[0], &step.inputs[1], step.cotangent);
        let last = a.dims().len() - 1;
        Ok(vec![
            if step.needs[0] { Some(g.matmul(&b.transpose(last - 1, last)?)?) } else { None },
            if step.needs[1] { Some(a.transpose(last - 1, last)?.matmul(g)?) } else { None },
        ])
    }
}

impl Var {
    /// `[m, k] x [k, n] -> [m, n]`, or the same for each item of a leading batch axis.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn matmul(&self, other: &Self) -> Result<Self> {
        let (a, b) = (self.dims(), other.dims());
        let fits = match (a, b) {
            ([_, k], [l, _]) => k == l,
            ([p, _, k], [q, l, _]) => p == q && k == l,
            _ => false,
        };
        if !fits || self.dtype() != other.dtype() {
            return Err(Error::internal(format!("matrix product of {a:?} and `{b:?}`")));
        }
        let value = if self.device().is_cpu() {
            by_dtype(
                self.dtype(),
                || product::<f32>(&self.value, &other.value),
                || product::<f64>(&self.value, &other.value),
            )?
        } else {
            self.value.contiguous()?.matmul(&other.value.contiguous()?)?.into()
        };
        self.tape.record(&[self, other], value, MatMul)
    }
}

fn product<T: Float>(a: &Tensor, b: &Tensor) -> Result<Value> {
    let rank = a.rank();
    let batch = if rank == 3 { a.dims()[0] } else { 1 };
    let (m, k, n) = (a.dims()[rank - 2], a.dims()[rank - 1], b.dims()[rank - 1]);
    let mut dims = a.dims().to_vec();
    dims[rank - 1] = n;
    let mut c = vec![T::ZERO; batch * m * n];
    if !c.is_empty() && k > 0 {
        let (a_storage, a_layout) = a.storage_and_layout();
        let (b_storage, b_layout) = b.storage_and_layout();
        let (a_all, b_all) = (cpu::<T>(&a_storage)?, cpu::<T>(&b_storage)?);
        let (a_stride, b_stride) = (a_layout.stride(), b_layout.stride());
        let at = |item: usize| {
            let lead = if rank == 3 { item * a_stride[0] } else { 0 };
            MatrixRef {
                data: &a_all[a_layout.start_offset() + lead..],
                row_stride: a_stride[rank - 2],
                column_stride: a_stride[rank - 1],
            }
        };
        let bt = |item: usize| {
            let lead = if rank == 3 { item * b_stride[0] } else { 0 };
            MatrixRef {
                data: &b_all[b_layout.start_offset() + lead..],
                row_stride: b_stride[rank - 2],
                column_stride: b_stride[rank - 1],
            }
        };
        let threads = if batch < MANY { Threads::All } else { Threads::One };
        c.par_chunks_mut(m * n).enumerate().for_each(|(item, c)| {
            let c = Output { data: c, row_stride: n, start: Start::Nothing };
            product::product(Sizes { m, n, k }, at(item), bt(item), c, threads);
        });
    }
    from_vec(c, &dims)
}

/// All elements of a CPU storage, whatever the layout over it.
fn cpu<T: Float>(storage: &candle_core::Storage) -> Result<&[T]> {
    match storage {
        candle_core::Storage::Cpu(cpu) => Ok(cpu.as_slice::<T>()?),
        _ => Err(Error::internal("CPU kernel called on a tensor of another device")),
    }
}
