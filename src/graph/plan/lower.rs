//! Lowering: from ONNX nodes to steps, for one concrete input shape.
//!
//! Every value is either a constant (shape chains, weights, anything computed from them: evaluated
//! here, on the host, once) or live (computed from the images at run time). Operators are written
//! once against [`Lower`]: what they emit on constants alone is run at once instead of recorded.

use std::collections::HashMap;
use std::sync::Arc;

use super::step::{Operand, Step, StepState};
use crate::error::{Error, Result, ResultExt};
use crate::graph::ir::{ConstantData, ConstantTensor, DataType, Graph, Node};
use crate::tensor::kernels::Element;

/// A value while lowering.
#[derive(Debug, Clone)]
pub enum Value {
    /// Known now.
    Constant(Arc<ConstantTensor>),
    /// Computed at run time; several shapes may view one buffer.
    Live {
        /// Number of the run-time value.
        id: usize,
        /// Dimensions of this view.
        shape: Vec<usize>,
        /// Element type the file gives it.
        dtype: DataType,
    },
}

impl Value {
    /// Dimensions.
    pub fn shape(&self) -> &[usize] {
        match self {
            Self::Constant(tensor) => &tensor.shape,
            Self::Live { shape, .. } => shape,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape().iter().product()
    }

    /// No element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.shape().len()
    }

    /// Element type.
    pub fn dtype(&self) -> DataType {
        match self {
            Self::Constant(tensor) => tensor.dtype,
            Self::Live { dtype, .. } => *dtype,
        }
    }

    /// A live value under another type (its numbers stay); a constant is unchanged.
    #[must_use]
    pub fn of_type(self, dtype: DataType) -> Self {
        match self {
            Self::Live { id, shape, .. } => Self::Live { id, shape, dtype },
            constant => constant,
        }
    }

    /// The constant, if it is one.
    pub fn constant(&self) -> Option<&Arc<ConstantTensor>> {
        if let Self::Constant(tensor) = self { Some(tensor) } else { None }
    }
}

/// Statistics of a layer: where they are seen and what they should be.
#[derive(Debug, Clone)]
pub struct TapReference {
    /// Name of the node.
    pub name: String,
    /// Running mean, one a channel.
    pub mean: Vec<f32>,
    /// Running variance, one a channel.
    pub var: Vec<f32>,
    /// Unit in which deviations of a channel's mean count (of its variance: the square).
    pub unit: Vec<f32>,
}

/// A recorded operation.
#[derive(Debug)]
pub(crate) struct StepRecord<T> {
    /// Node it came from, for messages and profiles.
    pub name: String,
    /// ONNX operator it came from.
    pub op_type: String,
    /// The operation.
    pub step: Box<dyn Step<T>>,
    /// Its operands.
    pub inputs: Vec<Operand<T>>,
    /// The run-time value it makes.
    pub output: usize,
    /// Statistics seen at its input.
    pub tap: Option<TapReference>,
}

/// Where a plan sees statistics of what passes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taps {
    /// At the inputs of BatchNormalization, whose running statistics the file holds.
    Norms,
    /// At the outputs of convolutions and the inputs of layer normalisation, for networks whose
    /// BatchNormalization is folded or that have none. The reference of such a tap is mean 0 and
    /// variance 1: what a folded BatchNormalization of the usual initial scale and shift makes.
    Activations,
}

/// What quantising operators do to a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// Round it to the nearest integer.
    Nearest,
    /// Only scale it and cut it to the range: the function of which the straight-through gradient is
    /// the exact gradient. For checks.
    Smooth,
}

/// The state of lowering one graph.
#[derive(Debug)]
pub struct Lower<'g, T> {
    /// The graph's version of the standard operator set.
    pub opset: i64,
    /// What quantising operators do.
    pub rounding: Rounding,
    /// Where statistics are seen.
    pub taps: Taps,
    values: HashMap<&'g str, Value>,
    /// Steps so far, in execution order.
    pub(super) steps: Vec<StepRecord<T>>,
    /// Length of each run-time value.
    pub(super) lengths: Vec<usize>,
    node: Option<&'g Node>,
    /// Nodes of sub-graphs lowered so far.
    inlined: usize,
}

/// Nodes that loops may be unrolled to: nested, a file of some bytes could ask for any number.
const INLINED: usize = 1 << 18;

impl<'g, T: Element> Lower<'g, T> {
    pub(in crate::graph) fn new(graph: &'g Graph) -> Self {
        let values = graph
            .constants
            .iter()
            .map(|(name, tensor)| (name.as_str(), Value::Constant(Arc::clone(tensor))))
            .collect();
        Self {
            opset: graph.opset,
            rounding: Rounding::Nearest,
            taps: Taps::Norms,
            values,
            steps: Vec::new(),
            lengths: Vec::new(),
            node: None,
            inlined: 0,
        }
    }

    /// Makes a run-time value of `shape`.
    pub(in crate::graph) fn live(&mut self, shape: Vec<usize>, dtype: DataType) -> Value {
        let id = self.lengths.len();
        self.lengths.push(shape.iter().product());
        Value::Live { id, shape, dtype }
    }

    pub(in crate::graph) fn define(&mut self, name: &'g str, value: Value) {
        self.values.insert(name, value);
    }

    pub(in crate::graph) fn lookup(&self, name: &str) -> Option<&Value> {
        self.values.get(name)
    }

    /// The steps recorded since this was last called.
    pub(in crate::graph) fn take_steps(&mut self) -> Vec<StepRecord<T>> {
        std::mem::take(&mut self.steps)
    }

    /// Number of run-time values so far.
    pub(in crate::graph) fn count(&self) -> usize {
        self.lengths.len()
    }

    /// Elements of run-time value `id`.
    pub(in crate::graph) fn length(&self, id: usize) -> usize {
        self.lengths[id]
    }

    /// Sets the node whose operator is being lowered.
    pub(in crate::graph) fn enter(&mut self, node: &'g Node) {
        self.node = Some(node);
    }

    /// Lowers the nodes of a sub-graph (`If`, `Loop`, `Scan`) in place, its inputs bound to `inputs`;
    /// returns the values of its outputs. Names of the outer graph are visible inside; names bound
    /// inside are forgotten afterwards.
    ///
    /// # Errors
    /// When a node cannot be lowered, or an output is made by none.
    pub fn inline(&mut self, graph: &'g Graph, inputs: Vec<Value>) -> Result<Vec<Value>> {
        if graph.inputs.len() != inputs.len() {
            let (wanted, given) = (graph.inputs.len(), inputs.len());
            let text = format!("sub-graph `{}` takes {wanted} inputs, got {given}", graph.name);
            return Err(Error::input(text));
        }
        self.inlined += graph.nodes.len() + 1;
        if self.inlined > INLINED {
            return Err(Error::unsupported(format!("unrolls to more than `{INLINED}` nodes")));
        }
        let outside = self.values.clone();
        let node = self.node;
        for (name, tensor) in &graph.constants {
            self.values.insert(name, Value::Constant(Arc::clone(tensor)));
        }
        for (port, value) in graph.inputs.iter().zip(inputs) {
            self.values.insert(&port.name, value);
        }
        for inner in &graph.nodes {
            self.node = Some(inner);
            super::compile::lower_node(self, inner).context(|| inner.describe())?;
        }
        let result = graph
            .outputs
            .iter()
            .map(|port| {
                self.values.get(port.name.as_str()).cloned().ok_or_else(|| {
                    Error::input(format!("the sub-graph makes no value `{}`", port.name))
                })
            })
            .collect();
        self.values = outside;
        self.node = node;
        result
    }

    /// Binds output `index` of the current node.
    pub fn set_output(&mut self, node: &'g Node, index: usize, value: Value) {
        if let Some(name) = node.outputs.get(index).filter(|name| !name.is_empty()) {
            self.values.insert(name, value);
        }
    }

    /// Input `index`, which must be there.
    ///
    /// # Errors
    /// When it is absent, or made by a node that was not lowered.
    pub fn input(&self, node: &Node, index: usize) -> Result<Value> {
        self.optional(node, index)?
            .ok_or_else(|| Error::input(format!("needs input `{index}`, which is absent")))
    }

    /// Input `index` if given.
    ///
    /// # Errors
    /// When it is named but nothing makes it.
    pub fn optional(&self, node: &Node, index: usize) -> Result<Option<Value>> {
        match node.inputs.get(index).filter(|name| !name.is_empty()) {
            None => Ok(None),
            Some(name) => match self.values.get(name.as_str()) {
                Some(value) => Ok(Some(value.clone())),
                None => Err(Error::input(format!("input `{name}` is made by no node"))),
            },
        }
    }

    /// Input `index` as constant integers, `None` when absent.
    ///
    /// # Errors
    /// When it depends on the images, or holds no integers.
    pub fn integers(&self, node: &Node, index: usize) -> Result<Option<Vec<i64>>> {
        let Some(value) = self.optional(node, index)? else { return Ok(None) };
        let tensor = value.constant().ok_or_else(|| data_dependent(node, index))?;
        match tensor.as_i64() {
            Some(values) => Ok(Some(values.to_vec())),
            None if tensor.data.is_empty() => Ok(Some(Vec::new())),
            None => Err(Error::input(format!("input `{index}` must hold integers"))),
        }
    }

    /// Input `index` as a constant, `None` when absent.
    ///
    /// # Errors
    /// When it depends on the images.
    pub fn constant_input(&self, node: &Node, index: usize) -> Result<Option<Arc<ConstantTensor>>> {
        match self.optional(node, index)? {
            None => Ok(None),
            Some(Value::Constant(tensor)) => Ok(Some(tensor)),
            Some(Value::Live { .. }) => Err(data_dependent(node, index)),
        }
    }

    /// The operand of a value, converting constants to `T`.
    pub fn operand(value: &Value) -> Operand<T> {
        match value {
            Value::Live { id, .. } => Operand::Live(*id),
            Value::Constant(tensor) => Operand::Constant(Arc::new(elements(tensor))),
        }
    }

    /// Records `step` on `inputs`, or runs it at once when all are constants.
    pub fn emit(&mut self, step: Box<dyn Step<T>>, inputs: &[Value], shape: Vec<usize>) -> Value {
        self.emit_tapped(step, inputs, shape, None)
    }

    /// As [`Lower::emit`], with statistics seen at input 0.
    pub fn emit_tapped(
        &mut self,
        step: Box<dyn Step<T>>,
        inputs: &[Value],
        shape: Vec<usize>,
        tap: Option<TapReference>,
    ) -> Value {
        let dtype = inputs.first().map_or(DataType::Float32, Value::dtype);
        self.record(step, inputs, shape, dtype, tap)
    }

    /// As [`Lower::emit`], for a result of another type than input 0.
    pub fn emit_as(
        &mut self,
        dtype: DataType,
        step: Box<dyn Step<T>>,
        inputs: &[Value],
        shape: Vec<usize>,
    ) -> Value {
        self.record(step, inputs, shape, dtype, None)
    }

    fn record(
        &mut self,
        step: Box<dyn Step<T>>,
        inputs: &[Value],
        shape: Vec<usize>,
        dtype: DataType,
        tap: Option<TapReference>,
    ) -> Value {
        if inputs.iter().all(|value| value.constant().is_some()) {
            let data: Vec<Vec<T>> =
                inputs.iter().filter_map(Value::constant).map(|t| elements(t)).collect();
            let views: Vec<&[T]> = data.iter().map(Vec::as_slice).collect();
            let mut output = vec![T::ZERO; shape.iter().product()];
            step.forward(&views, &mut output, &mut StepState::default());
            return Value::Constant(Arc::new(from_elements(shape, dtype, &output)));
        }
        let operands = inputs.iter().map(Self::operand).collect();
        let value = self.live(shape, dtype);
        if let Value::Live { id, .. } = &value {
            let (name, op_type) =
                self.node.map_or_else(Default::default, |n| (n.name.clone(), n.op_type.clone()));
            self.steps.push(StepRecord { name, op_type, step, inputs: operands, output: *id, tap });
        }
        value
    }

    /// The same values under another shape of the same length.
    ///
    /// # Errors
    /// When the lengths differ.
    pub fn reshape(&mut self, value: &Value, shape: Vec<usize>) -> Result<Value> {
        if shape.iter().product::<usize>() != value.len() {
            return Err(Error::input(format!("cannot reshape {:?} to `{shape:?}`", value.shape())));
        }
        Ok(match value {
            Value::Live { id, dtype, .. } => Value::Live { id: *id, shape, dtype: *dtype },
            Value::Constant(tensor) => Value::Constant(Arc::new(ConstantTensor {
                shape,
                dtype: tensor.dtype,
                data: tensor.data.clone(),
            })),
        })
    }
}

/// An error for an operand that must be known before the images are.
pub fn data_dependent(node: &Node, index: usize) -> Error {
    let name = node.inputs.get(index).map_or("", String::as_str);
    Error::unsupported(format!("input `{name}` depends on the image, but must be a constant"))
}

/// The values of a constant as `T`.
pub fn elements<T: Element>(tensor: &ConstantTensor) -> Vec<T> {
    // Weights are nearly always of the plan's own type: a copy, not a conversion.
    let own: Option<&Vec<T>> = match &tensor.data {
        ConstantData::F32(v) => (v as &dyn std::any::Any).downcast_ref(),
        ConstantData::F64(v) => (v as &dyn std::any::Any).downcast_ref(),
        ConstantData::I64(_) => None,
    };
    if let Some(values) = own {
        return values.clone();
    }
    match &tensor.data {
        ConstantData::F32(v) => v.iter().map(|&x| T::of(f64::from(x))).collect(),
        ConstantData::F64(v) => v.iter().map(|&x| T::of(x)).collect(),
        ConstantData::I64(v) => v.iter().map(|&x| T::of(x as f64)).collect(),
    }
}

/// A constant of `dtype` from computed values.
pub fn from_elements<T: Element>(
    shape: Vec<usize>,
    dtype: DataType,
    values: &[T],
) -> ConstantTensor {
    let data = if dtype == DataType::Float64 || (dtype.is_float() && size_of::<T>() == 8) {
        ConstantData::F64(values.iter().map(|v| v.f64()).collect())
    } else if dtype.is_float() {
        ConstantData::F32(values.iter().map(|v| v.f64() as f32).collect())
    } else {
        ConstantData::I64(values.iter().map(|v| v.f64() as i64).collect())
    };
    ConstantTensor { shape, dtype, data }
}
