//! Reverse-mode differentiation of any order over detached candle tensors.
//!
//! A [`Tape`] records what is computed from its leaves. Every rule of differentiation is written in
//! recorded operations, so a gradient taken with [`Order::Higher`] can be differentiated again, with
//! respect to any recorded tensor: parameters, images or fast weights. With [`Order::First`] the same
//! rules run on constants and leave nothing behind, and the large operations use fused kernels.
//! There is no recursion (chains of any length), no environment variable, and candle's own backward
//! is never used: its pooling rule is wrong and its second order is silent about what it loses
//! (design.md 3). On the CPU the work is done by [`crate::tensor::kernels`], elsewhere by candle.

mod arithmetic;
mod conv;
mod custom;
mod grad;
mod loss;
mod matmul;
mod memory;
mod norm;
mod norm_pool;
mod pool;
mod reduce;
mod shape;
mod unary;
mod value;

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};

use memory::Value;

pub use conv::ConvOptions;
pub use custom::{Operation, tensor_of, with_slices};
pub use grad::{Order, grad, vjp};
pub use norm::{Activation, BatchStatistics};
pub use reduce::KeepDims;
pub use value::Float;

/// A rule of differentiation: from the cotangent of an output to those of its inputs.
trait Rule {
    /// One cotangent an input; `None` where `step.needs` says that nobody asks for it.
    fn vjp(&self, step: &Step<'_>) -> Result<Vec<Option<Var>>>;
}

/// What a [`Rule`] sees when an operation is differentiated.
struct Step<'a> {
    inputs: &'a [Var],
    output: &'a Var,
    cotangent: &'a Var,
    /// Cotangents of the outputs after the first; empty where the operation has one.
    further: &'a [Option<Var>],
    needs: &'a [bool],
    order: Order,
}

enum Source {
    Recorded(usize),
    Constant(Value),
}

/// Where a node's value comes from.
enum Made {
    Leaf,
    By(Rc<dyn Rule>),
    /// Output `1 + i` of the operation that is the node's only input; that node's value is output 0.
    Further(usize),
}

struct Node {
    value: Value,
    inputs: Vec<Source>,
    made: Made,
}

/// A recording of operations. Cheap to clone: clones are the same tape. Memory is given back when
/// the last tape or variable of it is dropped.
#[derive(Clone, Default)]
pub struct Tape {
    nodes: Rc<RefCell<Vec<Node>>>,
}

/// A tensor on a tape: recorded (a leaf or computed from one) or constant. Cheap to clone.
#[derive(Clone)]
pub struct Var {
    tape: Tape,
    id: Option<usize>,
    value: Value,
}

impl Tape {
    /// An empty tape.
    pub fn new() -> Self {
        Self::default()
    }

    /// A recorded variable that gradients can be taken with respect to.
    pub fn leaf(&self, value: Tensor) -> Var {
        let value = Value::from(value.detach());
        let id = self.push(Node { value: value.clone(), inputs: Vec::new(), made: Made::Leaf });
        Var { tape: self.clone(), id: Some(id), value }
    }

    /// A value that is not differentiated; what is computed from constants alone is not recorded.
    pub fn constant(&self, value: Tensor) -> Var {
        self.unrecorded(value.detach().into())
    }

    fn unrecorded(&self, value: Value) -> Var {
        Var { tape: self.clone(), id: None, value }
    }

    /// Number of recorded operations and leaves.
    pub fn len(&self) -> usize {
        self.nodes.borrow().len()
    }

    /// Nothing recorded.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn push(&self, node: Node) -> usize {
        let mut nodes = self.nodes.borrow_mut();
        nodes.push(node);
        nodes.len() - 1
    }

    fn is(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.nodes, &other.nodes)
    }

    /// Puts the result of an operation on the tape, or makes it a constant when no input is recorded.
    fn record(
        &self,
        inputs: &[&Var],
        value: impl Into<Value>,
        rule: impl Rule + 'static,
    ) -> Result<Var> {
        let [var] = self.record_all(inputs, [value.into()], rule)?;
        Ok(var)
    }

    /// [`Tape::record`] for an operation of `N` results.
    fn record_all<const N: usize>(
        &self,
        inputs: &[&Var],
        values: [Value; N],
        rule: impl Rule + 'static,
    ) -> Result<[Var; N]> {
        if let Some(stranger) = inputs.iter().find(|var| !var.tape.is(self)) {
            return Err(Error::internal(format!(
                "operands lie on two tapes; the second has shape `{:?}`",
                stranger.dims()
            )));
        }
        if inputs.iter().all(|var| var.id.is_none()) {
            return Ok(values.map(|value| self.unrecorded(value)));
        }
        let inputs: Vec<Source> = inputs
            .iter()
            .map(|var| var.id.map_or_else(|| Source::Constant(var.value.clone()), Source::Recorded))
            .collect();
        let first = self.len();
        let mut operation = Some((inputs, Made::By(Rc::new(rule))));
        let mut index = 0;
        Ok(values.map(|value| {
            let (inputs, made) = operation.take().unwrap_or_else(|| {
                index += 1;
                (vec![Source::Recorded(first)], Made::Further(index - 1))
            });
            let id = self.push(Node { value: value.clone(), inputs, made });
            Var { tape: self.clone(), id: Some(id), value }
        }))
    }
}

impl Var {
    /// The value.
    pub fn value(&self) -> &Tensor {
        self.value.lend()
    }

    /// The tape it belongs to.
    pub fn tape(&self) -> &Tape {
        &self.tape
    }

    /// Dimensions.
    pub fn dims(&self) -> &[usize] {
        self.value.dims()
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.value.elem_count()
    }

    /// Element type, `F32` or `F64`.
    pub fn dtype(&self) -> DType {
        self.value.dtype()
    }

    /// Where the value lives.
    pub fn device(&self) -> &Device {
        self.value.device()
    }

    /// The same value as a constant: gradients stop here.
    #[must_use]
    pub fn detach(&self) -> Self {
        self.tape.unrecorded(self.value.clone())
    }

    /// The only element.
    ///
    /// # Errors
    /// When there is not exactly one element.
    pub fn scalar(&self) -> Result<f64> {
        if self.elements() != 1 {
            return Err(Error::internal(format!(
                "expected one element, got shape `{:?}`",
                self.dims()
            )));
        }
        Ok(self.numbers()?[0])
    }

    /// All elements, row-major.
    ///
    /// # Errors
    /// When the tensor library fails.
    pub fn numbers(&self) -> Result<Vec<f64>> {
        Ok(self.value.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?)
    }

    /// The four dimensions of an image batch `[N, C, H, W]`.
    fn dims4(&self) -> Result<[usize; 4]> {
        self.dims().try_into().map_err(|_| {
            Error::internal(format!("expected [N, C, H, W], got shape `{:?}`", self.dims()))
        })
    }

    fn constant_like(&self, value: impl Into<Value>) -> Self {
        self.tape.unrecorded(value.into())
    }
}

impl fmt::Debug for Var {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.id {
            Some(id) => write!(f, "Var {id} {:?}", self.dims()),
            None => write!(f, "constant {:?}", self.dims()),
        }
    }
}

impl fmt::Debug for Tape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tape of {}", self.len())
    }
}
