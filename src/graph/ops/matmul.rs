//! Matrix products: MatMul with batch broadcasting, Gemm. Either side may be live.

use std::sync::Arc;

use rayon::prelude::*;

use super::binary::{Binary, emit};
use super::elementwise::{Function, apply};
use super::{Rule, broadcast_shape};
use crate::error::{Error, Result};
use crate::graph::ir::Node;
#[cfg(any(feature = "cuda", test))]
use crate::graph::plan::singles;
use crate::graph::plan::{Lower, Mode, Needs, Step, StepState, Target, Value};
#[cfg(any(feature = "cuda", test))]
use crate::tensor::cuda;
use crate::tensor::kernels::Element;
use crate::tensor::kernels::product::{
    MatrixRef, Output, Sizes, Start, Threads, product as multiply,
};

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    match op {
        "MatMul" => Some(matmul),
        "Gemm" => Some(gemm_rule),
        _ => None,
    }
}

/// Whether an operand of a product is read transposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    Plain,
    Transposed,
}

/// A batch of products `y[i] = a[batch_a[i]] b[batch_b[i]]`.
#[derive(Debug, Clone)]
pub(super) struct MatMul<T> {
    m: usize,
    k: usize,
    n: usize,
    layouts: [Layout; 2],
    batch_a: Vec<usize>,
    batch_b: Vec<usize>,
    /// One value a column, added to each row.
    bias: Option<Arc<Vec<T>>>,
}

/// Products of a batch from which on each is one task.
const MANY: usize = 8;

/// Who computes one product of a batch.
fn threads(batch: usize) -> Threads {
    if batch < MANY { Threads::All } else { Threads::One }
}

impl<T: Element> MatMul<T> {
    /// With a constant row added to each row of the result, if it has none yet and `bias` is as long as one.
    pub(super) fn with_bias(&self, bias: &Arc<Vec<T>>) -> Option<Self> {
        let fits = self.bias.is_none() && bias.len() == self.n;
        fits.then(|| Self { bias: Some(Arc::clone(bias)), ..self.clone() })
    }

    fn a<'a>(&self, a: &'a [T]) -> MatrixRef<'a, T> {
        match self.layouts[0] {
            Layout::Plain => MatrixRef::rows(a, self.k),
            Layout::Transposed => MatrixRef::transposed(a, self.m),
        }
    }

    fn b<'a>(&self, b: &'a [T]) -> MatrixRef<'a, T> {
        match self.layouts[1] {
            Layout::Plain => MatrixRef::rows(b, self.n),
            Layout::Transposed => MatrixRef::transposed(b, self.k),
        }
    }
}

fn flipped<T: Copy>(m: MatrixRef<'_, T>) -> MatrixRef<'_, T> {
    MatrixRef { data: m.data, row_stride: m.column_stride, column_stride: m.row_stride }
}

impl<T: Element> Step<T> for MatMul<T> {
    fn as_any(&self) -> Option<&dyn std::any::Any> {
        Some(self)
    }

    fn forward(&self, inputs: &[&[T]], output: &mut [T], _state: &mut StepState<T>) {
        let (m, k, n) = (self.m, self.k, self.n);
        let (a, b) = (inputs[0], inputs[1]);
        let product = m * n;
        if product == 0 {
            return;
        }
        output.par_chunks_mut(product).enumerate().for_each(|(i, y)| {
            let a = self.a(&a[self.batch_a[i] * m * k..][..m * k]);
            let b = self.b(&b[self.batch_b[i] * k * n..][..k * n]);
            let start = self.bias.as_ref().map_or(Start::Nothing, |bias| Start::Row(bias));
            let y = Output { data: y, row_stride: n, start };
            multiply(Sizes { m, n, k }, a, b, y, threads(self.batch_a.len()));
        });
    }

    #[cfg(any(feature = "cuda", test))]
    fn on_device(&self, site: &cuda::Site<'_>) -> Result<Option<Box<dyn cuda::Operation>>> {
        let transposed = self.layouts.map(|layout| layout == Layout::Transposed);
        let batches = [self.batch_a.clone(), self.batch_b.clone()];
        let bias = self.bias.as_ref().map(|bias| cuda::Memory::of(site.device, &singles(bias)));
        let (sizes, bias) = ([self.m, self.n, self.k], bias.transpose()?);
        Ok(Some(Box::new(cuda::MatMul { sizes, transposed, batches, bias })))
    }

    fn needs(&self) -> Needs {
        Needs::INPUTS
    }

    fn backward(
        &self,
        which: usize,
        inputs: &[&[T]],
        _output: &[T],
        d_output: &[T],
        mut target: Target<'_, T>,
        _state: &StepState<T>,
    ) {
        let (m, k, n) = (self.m, self.k, self.n);
        let (own, batches) =
            if which == 0 { (m * k, &self.batch_a) } else { (k * n, &self.batch_b) };
        if own == 0 || m * n == 0 {
            target.clear_if_fresh();
            return;
        }
        let fresh = target.mode == Mode::Write;
        let items = target.data.len() / own;
        target.data.par_chunks_mut(own).enumerate().for_each(|(index, d)| {
            let mut accumulate = !fresh;
            for (i, _) in batches.iter().enumerate().filter(|(_, at)| **at == index) {
                let dy = MatrixRef::rows(&d_output[i * m * n..][..m * n], n);
                let transposed = self.layouts[which] == Layout::Transposed;
                let (sizes, left, right) = if which == 0 {
                    let b = flipped(self.b(&inputs[1][self.batch_b[i] * k * n..][..k * n]));
                    if transposed {
                        (Sizes { m: k, n: m, k: n }, flipped(b), flipped(dy))
                    } else {
                        (Sizes { m, n: k, k: n }, dy, b)
                    }
                } else {
                    let a = flipped(self.a(&inputs[0][self.batch_a[i] * m * k..][..m * k]));
                    if transposed {
                        (Sizes { m: n, n: k, k: m }, flipped(dy), flipped(a))
                    } else {
                        (Sizes { m: k, n, k: m }, a, dy)
                    }
                };
                let start = if accumulate { Start::Result } else { Start::Nothing };
                let d = Output { data: &mut *d, row_stride: sizes.n, start };
                multiply(sizes, left, right, d, threads(items));
                accumulate = true;
            }
            if !accumulate {
                d.fill(T::ZERO);
            }
        });
    }
}

/// For each batch of `to`, which batch of `from` it reads.
fn batches(from: &[usize], to: &[usize]) -> Vec<usize> {
    let strides = super::arrange::broadcast_strides(from, to);
    super::rearrange::indices(to)
        .map(|index| index.iter().zip(&strides).map(|(i, s)| i * s).sum())
        .collect()
}

/// Emits `a b` over the last two axes, batch axes broadcast; rank-1 operands as in NumPy.
pub(super) fn product<T: Element>(lower: &mut Lower<'_, T>, a: &Value, b: &Value) -> Result<Value> {
    let (a_vector, b_vector) = (a.rank() == 1, b.rank() == 1);
    if a.rank() == 0 || b.rank() == 0 {
        return Err(Error::input("matrix product of a scalar"));
    }
    let a = if a_vector { lower.reshape(a, vec![1, a.len()])? } else { a.clone() };
    let b = if b_vector { lower.reshape(b, vec![b.len(), 1])? } else { b.clone() };
    let (a_outer, a_matrix) = a.shape().split_at(a.rank() - 2);
    let (b_outer, b_matrix) = b.shape().split_at(b.rank() - 2);
    if a_matrix[1] != b_matrix[0] {
        return Err(Error::input(format!(
            "matrices {:?} and `{:?}` do not multiply",
            a.shape(),
            b.shape()
        )));
    }
    let mut outer = broadcast_shape(a_outer, b_outer)?;
    let (mut m, k, n) = (a_matrix[0], a_matrix[1], b_matrix[1]);
    let (mut batch_a, mut batch_b) = (batches(a_outer, &outer), batches(b_outer, &outer));
    let mut shape = std::mem::take(&mut outer);
    let count = shape.iter().product::<usize>();
    // One weight matrix for all: a single tall product.
    if b_outer.iter().product::<usize>() == 1 && a_outer.iter().product::<usize>() == count {
        shape.extend([m, n]);
        m *= count;
        (batch_a, batch_b) = (vec![0], vec![0]);
    } else {
        shape.extend([m, n]);
    }
    let step = MatMul { m, k, n, layouts: [Layout::Plain; 2], batch_a, batch_b, bias: None };
    if a_vector {
        shape.remove(shape.len() - 2);
    }
    if b_vector {
        shape.pop();
    }
    Ok(lower.emit(Box::new(step), &[a, b], shape))
}

fn matmul<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let (a, b) = (lower.input(node, 0)?, lower.input(node, 1)?);
    let y = product(lower, &a, &b)?;
    lower.set_output(node, 0, y);
    Ok(())
}

/// Emits `alpha a b + beta c` of `node`'s inputs, transposed as its flags say.
///
/// # Errors
/// When the matrices do not fit.
pub(super) fn emit_gemm<T: Element>(lower: &mut Lower<'_, T>, node: &Node) -> Result<Value> {
    let (a, b) = (lower.input(node, 0)?, lower.input(node, 1)?);
    let layout = |name| -> Result<Layout> {
        Ok(if node.int(name, 0)? != 0 { Layout::Transposed } else { Layout::Plain })
    };
    let layouts = [layout("transA")?, layout("transB")?];
    let (&[a0, a1], &[b0, b1]) = (a.shape(), b.shape()) else {
        return Err(Error::input(format!(
            "needs two matrices, got {:?} and `{:?}`",
            a.shape(),
            b.shape()
        )));
    };
    let (m, k) = if layouts[0] == Layout::Plain { (a0, a1) } else { (a1, a0) };
    let (k2, n) = if layouts[1] == Layout::Plain { (b0, b1) } else { (b1, b0) };
    if k != k2 {
        return Err(Error::input(format!(
            "matrices {:?} and `{:?}` do not multiply",
            a.shape(),
            b.shape()
        )));
    }
    let step = MatMul { m, k, n, layouts, batch_a: vec![0], batch_b: vec![0], bias: None };
    let mut y = lower.emit(Box::new(step), &[a, b], vec![m, n]);
    let (alpha, beta) = (f64::from(node.float("alpha", 1.0)?), f64::from(node.float("beta", 1.0)?));
    if alpha != 1.0 {
        y = apply(lower, Function::Scale, (alpha, 0.0), &y);
    }
    if let Some(c) = lower.optional(node, 2)? {
        let c = if beta == 1.0 { c } else { apply(lower, Function::Scale, (beta, 0.0), &c) };
        y = emit(lower, Binary::Add, &y, &c)?;
    }
    Ok(y)
}

fn gemm_rule<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let y = emit_gemm(lower, node)?;
    lower.set_output(node, 0, y);
    Ok(())
}
