//! Operations from outside the tape, differentiable once: what only a compiled step of a graph knows.

use candle_core::{Device, Tensor};

use super::value::{Float, Slice};
use super::{Order, Rule, Step, Tape, Var};
use crate::error::{Error, Result};

/// An operation whose gradient is computed by a kernel, and so is a constant to further orders.
pub trait Operation {
    /// What a message calls it: "node `/blocks/0/Softmax` (Softmax)".
    fn describe(&self) -> String;

    /// The cotangents of the inputs, each of its input's shape: one an input, `None` where `needs` says
    /// that nobody asks for it or where there is none. All tensors are contiguous and on the CPU.
    ///
    /// # Errors
    /// When the kernel fails.
    fn backward(
        &self,
        inputs: &[Tensor],
        output: &Tensor,
        cotangent: &Tensor,
        needs: &[bool],
    ) -> Result<Vec<Option<Tensor>>>;
}

struct Custom<O>(O);

impl<O: Operation> Rule for Custom<O> {
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>> {
        if step.order == Order::Higher {
            return Err(Error::unsupported("has no second derivative here")
                .hint("train with `learner: protonet` or `anil`, or with `order: first`")
                .context(self.0.describe()));
        }
        let contiguous = |var: &Var| Ok::<_, Error>(var.value.contiguous()?);
        let inputs: Vec<Tensor> = step.inputs.iter().map(contiguous).collect::<Result<_>>()?;
        let (output, cotangent) = (contiguous(step.output)?, contiguous(step.cotangent)?);
        let gradients = self.0.backward(&inputs, &output, &cotangent, step.needs)?;
        let constant = |tensor: Tensor| step.cotangent.constant_like(tensor);
        Ok(gradients.into_iter().map(|gradient| gradient.map(constant)).collect())
    }
}

impl Tape {
    /// Puts `value`, computed by `operation` from `inputs`, on the tape. It has a first derivative;
    /// asking for a higher one is an error that names the operation.
    ///
    /// # Errors
    /// When the inputs lie on different tapes.
    pub fn apply(
        &self,
        inputs: &[&Var],
        value: Tensor,
        operation: impl Operation + 'static,
    ) -> Result<Var> {
        self.record(inputs, value, Custom(operation))
    }
}

/// Calls `read` with the elements of contiguous CPU tensors.
///
/// # Errors
/// When a tensor is not contiguous, not on the CPU or of another type.
pub fn with_slices<T: Float, R>(tensors: &[&Tensor], read: impl FnOnce(&[&[T]]) -> R) -> Result<R> {
    let slices: Vec<Slice<'_, T>> =
        tensors.iter().map(|tensor| Slice::new(tensor)).collect::<Result<_>>()?;
    let views: Vec<&[T]> = slices.iter().map(|slice| &**slice).collect();
    Ok(read(&views))
}

/// A CPU tensor of shape `dims` from its values.
///
/// # Errors
/// When their number does not fit.
pub fn tensor_of<T: Float>(values: Vec<T>, dims: &[usize]) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, dims, &Device::Cpu)?)
}
