//! Which nodes are operations of the tape, with derivatives of any order.

use candle_core::{DType, Device, Tensor};

use super::instruction::{Instruction, Native, Source, Then};
use super::{NormLayer, RunningStatistics};
use crate::error::{Error, Result};
use crate::graph::ir::{DataType, Node};
use crate::graph::ops::{axis_index, block_side, broadcast_shape, conv_geometry};
use crate::graph::plan::{Lower, Value};
use crate::tensor::tape::Float;

/// The state of compiling a trainable graph.
pub(super) struct Compiler<'g, T> {
    pub(super) lower: Lower<'g, T>,
    pub(super) program: Vec<Instruction<T>>,
    pub(super) norms: Vec<NormLayer>,
}

fn is_live(value: &Value) -> bool {
    value.constant().is_none()
}

impl<'g, T: Float> Compiler<'g, T> {
    /// Compiles `node` as operations of the tape, if it is made of them; returns whether it was.
    pub(super) fn native(&mut self, node: &'g Node) -> Result<bool> {
        if !matches!(node.domain.as_str(), "" | "ai.onnx") {
            return Ok(false);
        }
        let result = match node.op_type.as_str() {
            "Conv" => self.conv(node)?,
            "BatchNormalization" => self.norm(node)?,
            "Relu" => self.unary(node, Native::Relu)?,
            "LeakyRelu" => {
                let slope = f64::from(node.float("alpha", 0.01)?);
                self.unary(node, Native::LeakyRelu(slope))?
            }
            "Sigmoid" => self.unary(node, Native::Sigmoid)?,
            "Tanh" => self.unary(node, Native::Tanh)?,
            "Exp" => self.unary(node, Native::Exp)?,
            "Log" => self.unary(node, Native::Log)?,
            "Sqrt" => self.unary(node, Native::Sqrt)?,
            "Neg" => self.unary(node, Native::Scale(-1.0))?,
            "Add" => self.binary(node, Native::Add)?,
            "Sub" => self.binary(node, Native::Sub)?,
            "Mul" => self.binary(node, Native::Mul)?,
            "Div" => self.binary(node, Native::Div)?,
            "MatMul" => self.matmul(node)?,
            "Gemm" => self.gemm(node)?,
            "GlobalAveragePool" => self.plane_means(node)?,
            "ReduceMean" => self.reduce_mean(node)?,
            "AveragePool" | "MaxPool" => self.pool(node)?,
            "Concat" => self.concat(node)?,
            _ => None,
        };
        let Some(value) = result else { return Ok(false) };
        self.lower.set_output(node, 0, value);
        Ok(true)
    }

    /// Records one operation.
    fn emit(
        &mut self,
        node: &Node,
        op: Native,
        inputs: &[&Value],
        shape: Vec<usize>,
    ) -> Result<Value> {
        let inputs = inputs.iter().map(|value| source::<T>(value)).collect::<Result<_>>()?;
        let value = self.lower.live(shape, DataType::Float32);
        if let Value::Live { id, .. } = &value {
            self.program.push(Instruction::Native {
                op,
                name: node.describe(),
                inputs,
                output: *id,
            });
        }
        Ok(value)
    }

    fn conv(&mut self, node: &Node) -> Result<Option<Value>> {
        let (x, w) = (self.lower.input(node, 0)?, self.lower.input(node, 1)?);
        let bias = self.lower.optional(node, 2)?;
        let live = [Some(&x), Some(&w), bias.as_ref()].into_iter().flatten().any(is_live);
        if !live || x.rank() != 4 || w.rank() != 4 {
            return Ok(None);
        }
        let geometry = conv_geometry(node, x.shape(), w.shape())?;
        let [height, width] = geometry.output();
        let shape = vec![geometry.batch, geometry.out_channels, height, width];
        let mut inputs = vec![&x, &w];
        inputs.extend(bias.as_ref());
        self.emit(node, Native::Conv(geometry), &inputs, shape).map(Some)
    }

    fn norm(&mut self, node: &Node) -> Result<Option<Value>> {
        let x = self.lower.input(node, 0)?;
        let (factor, offset) = (self.lower.input(node, 1)?, self.lower.input(node, 2)?);
        if !is_live(&x) || node.int("training_mode", 0)? != 0 {
            return Ok(None);
        }
        let read = |at: usize| -> Result<(String, Vec<f32>)> {
            let tensor = self
                .lower
                .constant_input(node, at)?
                .ok_or_else(|| Error::input(format!("needs input `{at}`")))?;
            Ok((node.inputs[at].clone(), tensor.to_f32()))
        };
        let ((mean_name, mean), (var_name, variance)) = (read(3)?, read(4)?);
        let &[batch, channels, ref rest @ ..] = x.shape() else {
            return Err(Error::input(format!("input of shape `{:?}`", x.shape())));
        };
        if [factor.len(), offset.len(), mean.len(), variance.len()] != [channels; 4] {
            return Err(Error::input(format!("parameters do not fit `{channels}` channels")));
        }
        let shape = x.shape().to_vec();
        let plane = match rest {
            [height, width] => vec![batch, channels, *height, *width],
            _ => vec![batch, channels, 1, rest.iter().product::<usize>().max(1)],
        };
        let x = self.lower.reshape(&x, plane.clone())?;
        let layer = self.norms.len();
        self.norms.push(NormLayer {
            name: node.name.clone(),
            constants: [mean_name, var_name],
            running: RunningStatistics { mean, variance },
        });
        let epsilon = f64::from(node.float("epsilon", 1e-5)?);
        let op = Native::Norm { layer, epsilon, then: Then::Nothing };
        let y = self.emit(node, op, &[&x, &factor, &offset], plane)?;
        self.lower.reshape(&y, shape).map(Some)
    }

    fn unary(&mut self, node: &Node, op: Native) -> Result<Option<Value>> {
        let x = self.lower.input(node, 0)?;
        if !is_live(&x) || !x.dtype().is_float() {
            return Ok(None);
        }
        self.emit(node, op, &[&x], x.shape().to_vec()).map(Some)
    }

    fn binary(&mut self, node: &Node, op: Native) -> Result<Option<Value>> {
        let (a, b) = (self.lower.input(node, 0)?, self.lower.input(node, 1)?);
        if !(is_live(&a) || is_live(&b)) || !a.dtype().is_float() || !b.dtype().is_float() {
            return Ok(None);
        }
        let shape = broadcast_shape(a.shape(), b.shape())?;
        self.emit(node, op, &[&a, &b], shape).map(Some)
    }

    /// A product with one matrix on the right: rows of all batches together.
    fn matmul(&mut self, node: &Node) -> Result<Option<Value>> {
        let (a, b) = (self.lower.input(node, 0)?, self.lower.input(node, 1)?);
        let (&[k, n], true) = (b.shape(), a.rank() >= 2 && (is_live(&a) || is_live(&b))) else {
            return Ok(None);
        };
        if a.shape()[a.rank() - 1] != k {
            return Ok(None);
        }
        let rows = a.len() / k.max(1);
        let mut shape = a.shape().to_vec();
        shape[a.rank() - 1] = n;
        let a = self.lower.reshape(&a, vec![rows, k])?;
        let y = self.emit(node, Native::MatMul, &[&a, &b], vec![rows, n])?;
        self.lower.reshape(&y, shape).map(Some)
    }

    fn gemm(&mut self, node: &Node) -> Result<Option<Value>> {
        let (mut a, mut b) = (self.lower.input(node, 0)?, self.lower.input(node, 1)?);
        let c = self.lower.optional(node, 2)?;
        let live = [Some(&a), Some(&b), c.as_ref()].into_iter().flatten().any(is_live);
        if !live || a.rank() != 2 || b.rank() != 2 {
            return Ok(None);
        }
        for (operand, flag) in [(&mut a, "transA"), (&mut b, "transB")] {
            if node.int(flag, 0)? != 0 {
                let shape = vec![operand.shape()[1], operand.shape()[0]];
                *operand = self.emit(node, Native::Transpose, &[operand], shape)?;
            }
        }
        let (&[m, k], &[l, n]) = (a.shape(), b.shape()) else { return Ok(None) };
        if k != l {
            return Err(Error::input(format!(
                "matrices [{m}, {k}] and `[{l}, {n}]` do not multiply"
            )));
        }
        let mut y = self.emit(node, Native::MatMul, &[&a, &b], vec![m, n])?;
        let (alpha, beta) = (node.float("alpha", 1.0)?, node.float("beta", 1.0)?);
        if alpha != 1.0 {
            y = self.emit(node, Native::Scale(f64::from(alpha)), &[&y], vec![m, n])?;
        }
        let Some(mut c) = c else { return Ok(Some(y)) };
        if beta != 1.0 {
            let shape = c.shape().to_vec();
            c = self.emit(node, Native::Scale(f64::from(beta)), &[&c], shape)?;
        }
        let shape = broadcast_shape(y.shape(), c.shape())?;
        self.emit(node, Native::Add, &[&y, &c], shape).map(Some)
    }

    fn plane_means(&mut self, node: &Node) -> Result<Option<Value>> {
        let x = self.lower.input(node, 0)?;
        let (true, &[n, c, _, _]) = (is_live(&x), x.shape()) else { return Ok(None) };
        let y = self.emit(node, Native::Means(vec![2, 3]), &[&x], vec![n, c])?;
        self.lower.reshape(&y, vec![n, c, 1, 1]).map(Some)
    }

    fn reduce_mean(&mut self, node: &Node) -> Result<Option<Value>> {
        let x = self.lower.input(node, 0)?;
        // An attribute before operator set 18, an input from then on.
        let given = match node.ints("axes")? {
            Some(axes) => Some(axes.to_vec()),
            None if node.inputs.get(1).is_some_and(|name| !name.is_empty()) => {
                let axes = self.lower.constant_input(node, 1)?;
                axes.and_then(|axes| axes.as_i64().map(<[i64]>::to_vec))
            }
            None => None,
        };
        let Some(given) = given.filter(|axes| !axes.is_empty() && is_live(&x)) else {
            return Ok(None);
        };
        if !x.dtype().is_float() {
            return Ok(None);
        }
        let mut axes: Vec<usize> =
            given.iter().map(|&axis| axis_index(axis, x.rank())).collect::<Result<_>>()?;
        axes.sort_unstable();
        axes.dedup();
        let keep = node.int("keepdims", 1)? != 0;
        let sizes = |dropped: Option<usize>| -> Vec<usize> {
            let sizes = x.shape().iter().enumerate();
            sizes
                .filter_map(|(axis, &size)| if axes.contains(&axis) { dropped } else { Some(size) })
                .collect()
        };
        let (short, long) = (sizes(None), sizes(Some(1)));
        let y = self.emit(node, Native::Means(axes), &[&x], short.clone())?;
        self.lower.reshape(&y, if keep { long } else { short }).map(Some)
    }

    fn pool(&mut self, node: &Node) -> Result<Option<Value>> {
        let x = self.lower.input(node, 0)?;
        let (true, &[n, c, h, w]) = (is_live(&x), x.shape()) else { return Ok(None) };
        let indices = node.outputs.get(1).is_some_and(|name| !name.is_empty());
        let Some(side) = block_side(node, [h, w])?.filter(|_| !indices) else { return Ok(None) };
        let maxima = node.op_type == "MaxPool";
        let op = if maxima { Native::BlockMaxima(side) } else { Native::BlockMeans(side) };
        self.emit(node, op, &[&x], vec![n, c, h / side, w / side]).map(Some)
    }

    fn concat(&mut self, node: &Node) -> Result<Option<Value>> {
        let parts: Vec<Value> =
            (0..node.inputs.len()).map(|at| self.lower.input(node, at)).collect::<Result<_>>()?;
        let Some(first) = parts.first() else { return Ok(None) };
        if !parts.iter().any(is_live) || parts.iter().any(|part| !part.dtype().is_float()) {
            return Ok(None);
        }
        let axis = axis_index(node.int("axis", 1)?, first.rank())?;
        let mut shape = first.shape().to_vec();
        let others = |value: &Value| {
            let mut shape = value.shape().to_vec();
            shape[axis] = 0;
            shape
        };
        if parts.iter().any(|part| part.rank() != first.rank() || others(part) != others(first)) {
            return Ok(None);
        }
        shape[axis] = parts.iter().map(|part| part.shape()[axis]).sum();
        let inputs: Vec<&Value> = parts.iter().collect();
        self.emit(node, Native::Concat(axis), &inputs, shape).map(Some)
    }
}

/// Where a value is read from.
fn source<T: Float>(value: &Value) -> Result<Source> {
    Ok(match value {
        Value::Live { id, shape, .. } => Source::Live(*id, shape.clone()),
        Value::Constant(tensor) => {
            let dtype = if size_of::<T>() == 8 { DType::F64 } else { DType::F32 };
            let values = Tensor::from_vec(tensor.to_f64(), tensor.shape.as_slice(), &Device::Cpu)?;
            Source::Constant(values.to_dtype(dtype)?)
        }
    })
}
