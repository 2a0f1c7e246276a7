//! One instruction of a trainable graph: an operation of the tape, or a step of the frozen plan.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::Tensor;

use super::{RunningStatistics, Statistics};
use crate::error::{Error, Result, ResultExt};
use crate::graph::plan::{Differentiable, Mode, Operand, Reads, Step, StepState, Target};
use crate::tensor::kernels::conv::Conv2dGeometry;
use crate::tensor::tape::{
    Activation, BatchStatistics, Float, KeepDims, Operation, Tape, Var, tensor_of, with_slices,
};

/// Elements of a constant that is shown with its values.
const SMALL: usize = 64;

/// Values of a small constant; none where they cannot be read.
fn numbers(tensor: &Tensor) -> Vec<f64> {
    let wide = tensor.to_dtype(candle_core::DType::F64).and_then(|wide| wide.flatten_all());
    wide.and_then(|flat| flat.to_vec1()).unwrap_or_default()
}

/// Where an instruction reads an operand.
#[derive(Debug, Clone)]
pub(super) enum Source {
    /// A value of the run, under this shape.
    Live(usize, Vec<usize>),
    /// A constant.
    Constant(Tensor),
}

/// An operation with derivatives of any order.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Native {
    Conv(Conv2dGeometry),
    /// Batch normalisation, number `layer`, of a value plus a channel's bias where there is a fourth input;
    /// then ReLU; then maxima of 2 x 2 blocks.
    Norm {
        layer: usize,
        epsilon: f64,
        then: Then,
    },
    Relu,
    LeakyRelu(f64),
    Sigmoid,
    Tanh,
    Exp,
    Log,
    Sqrt,
    Scale(f64),
    Add,
    Sub,
    Mul,
    Div,
    /// Of two matrices.
    MatMul,
    /// A matrix transposed.
    Transpose,
    /// Means over these axes, which are dropped.
    Means(Vec<usize>),
    /// Means of square blocks.
    BlockMeans(usize),
    /// Maxima of square blocks.
    BlockMaxima(usize),
    Concat(usize),
}

/// What a normalisation does with its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    Nothing,
    Relu,
    ReluAndHalve,
}

#[derive(Debug)]
pub(super) enum Instruction<T> {
    Native {
        op: Native,
        name: String,
        inputs: Vec<Source>,
        output: usize,
    },
    Step {
        step: Arc<dyn Step<T>>,
        name: String,
        inputs: Vec<Operand<T>>,
        output: usize,
        length: usize,
    },
}

impl<T: Float> Instruction<T> {
    pub(super) fn output(&self) -> usize {
        match self {
            Self::Native { output, .. } | Self::Step { output, .. } => *output,
        }
    }

    /// The node it came from, for messages.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Native { name, .. } | Self::Step { name, .. } => name,
        }
    }

    /// What it does to which values, by their `number`.
    pub(super) fn describe(&self, number: &BTreeMap<usize, usize>) -> String {
        match self {
            Self::Native { op, inputs, .. } => {
                let read: Vec<String> = inputs
                    .iter()
                    .map(|source| match source {
                        Source::Live(id, shape) => format!("{:?} {shape:?}", number.get(id)),
                        Source::Constant(tensor) if tensor.elem_count() <= SMALL => {
                            format!("{:?} {:?}", tensor.dims(), numbers(tensor))
                        }
                        Source::Constant(tensor) => format!("{:?}", tensor.dims()),
                    })
                    .collect();
                format!("{op:?} {read:?}")
            }
            Self::Step { name, inputs, length, .. } => {
                let op = name.rsplit_once('(').map_or(name.as_str(), |(_, op)| op);
                let read: Vec<_> = inputs
                    .iter()
                    .map(|operand| match operand {
                        Operand::Live(id) => number.get(id),
                        Operand::Constant(_) => None,
                    })
                    .collect();
                format!("{op} {read:?} {length}")
            }
        }
    }

    /// Values it reads, each with whether a gradient flows there.
    pub(super) fn reads(&self) -> Vec<(usize, Differentiable)> {
        match self {
            Self::Native { inputs, .. } => inputs
                .iter()
                .filter_map(|source| match source {
                    Source::Live(id, _) => Some((*id, Differentiable::Yes)),
                    Source::Constant(_) => None,
                })
                .collect(),
            Self::Step { step, inputs, .. } => inputs
                .iter()
                .enumerate()
                .filter_map(|(which, operand)| match operand {
                    Operand::Live(id) => Some((*id, step.differentiable(which))),
                    Operand::Constant(_) => None,
                })
                .collect(),
        }
    }

    pub(super) fn run(
        &self,
        tape: &Tape,
        values: &[Option<Var>],
        statistics: Statistics<'_>,
        own: &mut Vec<BatchStatistics>,
    ) -> Result<Var> {
        let value = |id: usize| {
            values[id].clone().ok_or_else(|| Error::internal("a value was dropped too early"))
        };
        match self {
            Self::Native { op, name, inputs, .. } => {
                let inputs: Vec<Var> = inputs
                    .iter()
                    .map(|source| match source {
                        Source::Live(id, shape) => value(*id)?.reshape(shape),
                        Source::Constant(tensor) => Ok(tape.constant(tensor.clone())),
                    })
                    .collect::<Result<_>>()?;
                op.run(&inputs, statistics, own).context(|| name.clone())
            }
            Self::Step { step, name, inputs, length, .. } => {
                let vars: Vec<Var> = inputs
                    .iter()
                    .filter_map(|operand| match operand {
                        Operand::Live(id) => Some(value(*id)),
                        Operand::Constant(_) => None,
                    })
                    .collect::<Result<_>>()?;
                let call =
                    Call { step: Arc::clone(step), name: name.clone(), inputs: inputs.clone() };
                call.run(tape, &vars, *length).context(|| name.clone())
            }
        }
    }
}

impl Native {
    fn run(
        &self,
        inputs: &[Var],
        statistics: Statistics<'_>,
        own: &mut Vec<BatchStatistics>,
    ) -> Result<Var> {
        let x = &inputs[0];
        match self {
            Self::Conv(geometry) => x.convolve(&inputs[1], inputs.get(2), *geometry),
            Self::Norm { layer, epsilon, then } => {
                let (factor, offset) = (&inputs[1], &inputs[2]);
                match statistics {
                    Statistics::Batch => {
                        let (y, mut seen) = match then {
                            Then::Nothing => {
                                x.batch_norm(factor, offset, *epsilon, Activation::None)?
                            }
                            Then::Relu => {
                                x.batch_norm(factor, offset, *epsilon, Activation::Relu)?
                            }
                            Then::ReluAndHalve => {
                                x.batch_norm_relu_pool(factor, offset, *epsilon)?
                            }
                        };
                        // The mean takes a bias away again, so its gradient is 0: it moves the mean alone.
                        if let Some(bias) = inputs.get(3) {
                            for (mean, bias) in seen.mean.iter_mut().zip(bias.numbers()?) {
                                *mean += bias;
                            }
                        }
                        own.push(seen);
                        Ok(y)
                    }
                    Statistics::Given(given) => {
                        let (scale, mut shift) =
                            given[*layer].scale_and_shift(factor, offset, *epsilon)?;
                        if let Some(bias) = inputs.get(3) {
                            shift = shift.add(&scale.mul(bias)?)?;
                        }
                        match then {
                            Then::Nothing => x.channel_affine(&scale, &shift, Activation::None),
                            Then::Relu => x.channel_affine(&scale, &shift, Activation::Relu),
                            Then::ReluAndHalve => {
                                x.channel_affine(&scale, &shift, Activation::Relu)?.max_pool2d(2)
                            }
                        }
                    }
                }
            }
            Self::Relu => x.relu(),
            Self::LeakyRelu(slope) => x.leaky_relu(*slope),
            Self::Sigmoid => x.sigmoid(),
            Self::Tanh => x.tanh(),
            Self::Exp => x.exp(),
            Self::Log => x.log(),
            Self::Sqrt => x.sqrt(),
            Self::Scale(factor) => x.scale(*factor),
            Self::Add => x.add(&inputs[1]),
            Self::Sub => x.sub(&inputs[1]),
            Self::Mul => x.mul(&inputs[1]),
            Self::Div => x.div(&inputs[1]),
            Self::MatMul => x.matmul(&inputs[1]),
            Self::Transpose => x.transpose(0, 1),
            Self::Means(axes) => x.mean(axes, KeepDims::Drop),
            Self::BlockMeans(side) => x.avg_pool2d(*side),
            Self::BlockMaxima(side) => x.max_pool2d(*side),
            Self::Concat(axis) => Var::concat(&inputs.iter().collect::<Vec<_>>(), *axis),
        }
    }
}

impl RunningStatistics {
    /// Normalisation by these statistics, `factor` and `offset` as one scale and shift a channel.
    fn scale_and_shift(&self, factor: &Var, offset: &Var, epsilon: f64) -> Result<(Var, Var)> {
        let constant = |values: Vec<f64>| -> Result<Var> {
            let value = Tensor::from_vec(values, factor.dims(), &candle_core::Device::Cpu)?;
            let value = value.to_dtype(factor.dtype())?.to_device(factor.device())?;
            Ok(factor.tape().constant(value))
        };
        let inverse = |&variance: &f32| 1.0 / (f64::from(variance) + epsilon).sqrt();
        let scale = factor.mul(&constant(self.variance.iter().map(inverse).collect())?)?;
        let mean = self.mean.iter().map(|&mean| f64::from(mean)).collect();
        let shift = offset.sub(&scale.mul(&constant(mean)?)?)?;
        Ok((scale, shift))
    }
}

/// A step of the frozen plan on the tape.
struct Call<T> {
    step: Arc<dyn Step<T>>,
    name: String,
    inputs: Vec<Operand<T>>,
}

/// A call with what its forward kept.
struct Done<T> {
    call: Call<T>,
    state: StepState<T>,
}

impl<T: Float> Call<T> {
    fn run(self, tape: &Tape, vars: &[Var], length: usize) -> Result<Var> {
        let tensors: Vec<Tensor> =
            vars.iter().map(|var| Ok(var.value().contiguous()?)).collect::<Result<_>>()?;
        let mut state = StepState::default();
        let mut output = vec![T::ZERO; length];
        with_slices::<T, ()>(&tensors.iter().collect::<Vec<_>>(), |live| {
            self.step.forward(&self.operands(live), &mut output, &mut state);
        })?;
        let value = tensor_of(output, &[length])?;
        let inputs: Vec<&Var> = vars.iter().collect();
        tape.apply(&inputs, value, Done { call: self, state })
    }

    /// All operands in order, `live` ones from the run.
    fn operands<'a>(&'a self, live: &[&'a [T]]) -> Vec<&'a [T]> {
        let mut live = live.iter();
        self.inputs
            .iter()
            .map(|operand| match operand {
                Operand::Constant(data) => data.as_slice(),
                Operand::Live(_) => live.next().copied().unwrap_or_default(),
            })
            .collect()
    }
}

impl<T: Float> Operation for Done<T> {
    fn describe(&self) -> String {
        self.call.name.clone()
    }

    fn backward(
        &self,
        inputs: &[Tensor],
        output: &Tensor,
        cotangent: &Tensor,
        needs: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let step = &self.call.step;
        let places: Vec<usize> = (0..self.call.inputs.len())
            .filter(|&which| matches!(self.call.inputs[which], Operand::Live(_)))
            .collect();
        let mut tensors: Vec<&Tensor> = inputs.iter().collect();
        tensors.extend([output, cotangent]);
        let gradients = with_slices::<T, Vec<Option<Vec<T>>>>(&tensors, |slices| {
            let (live, rest) = slices.split_at(inputs.len());
            let none = vec![&[] as &[T]; live.len()];
            let read = step.needs().inputs == Reads::Yes;
            let operands = self.call.operands(if read { live } else { &none });
            let own: &[T] = if step.needs().output == Reads::Yes { rest[0] } else { &[] };
            let wanted = places.iter().zip(needs).zip(live);
            wanted
                .map(|((&which, &need), live)| {
                    if !need || step.differentiable(which) != Differentiable::Yes {
                        return None;
                    }
                    let mut data = vec![T::ZERO; live.len()];
                    let target = Target { data: &mut data, mode: Mode::Write };
                    step.backward(which, &operands, own, rest[1], target, &self.state);
                    Some(data)
                })
                .collect()
        })?;
        gradients
            .into_iter()
            .zip(inputs)
            .map(|(gradient, input)| gradient.map(|data| tensor_of(data, input.dims())).transpose())
            .collect()
    }
}
