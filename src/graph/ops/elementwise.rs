//! Operators of one input, element by element: the activations and the plain functions. The gradient
//! follows PyTorch where a function has a corner: ReLU has 0 at 0, LeakyReLU its slope, Clip 1 on both
//! bounds, Abs 0.

use rayon::prelude::*;

use super::Rule;
use crate::error::{Error, Result};
use crate::graph::ir::Node;
use crate::graph::plan::{Differentiable, Lower, Mode, Needs, Step, StepState, Target, Value};
use crate::tensor::kernels::Element;
use crate::tensor::kernels::special::{erf, normal_density};

/// Elements a parallel task takes.
pub(super) const CHUNK: usize = 1 << 14;

/// An element-wise function with up to two parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Function {
    Relu,
    LeakyRelu,
    ThresholdedRelu,
    Elu,
    Celu,
    Selu,
    Sigmoid,
    HardSigmoid,
    HardSwish,
    Swish,
    Mish,
    Gelu,
    GeluTanh,
    Softplus,
    Softsign,
    Tanh,
    Erf,
    Exp,
    Log,
    Sqrt,
    Reciprocal,
    Neg,
    Abs,
    Clip,
    Sin,
    Cos,
    Square,
    Scale,
    Floor,
    Ceil,
    Round,
    Sign,
}

/// One element-wise step.
#[derive(Debug)]
pub(super) struct Elementwise<T> {
    pub(super) function: Function,
    pub(super) a: T,
    pub(super) b: T,
}

fn sigmoid<T: Element>(x: T) -> T {
    T::ONE / (T::ONE + (-x).exp())
}

fn softplus<T: Element>(x: T) -> T {
    x.max(T::ZERO) + (T::ONE + (-x.abs()).exp()).ln()
}

const GELU_C: f64 = 0.797_884_560_802_865_4; // sqrt(2 / pi)
const GELU_K: f64 = 0.044_715;

impl<T: Element> Elementwise<T> {
    fn value(&self, x: T) -> T {
        let (a, b, zero, one) = (self.a, self.b, T::ZERO, T::ONE);
        match self.function {
            Function::Relu => x.max(zero),
            Function::LeakyRelu => {
                if x > zero {
                    x
                } else {
                    a * x
                }
            }
            Function::ThresholdedRelu => {
                if x > a {
                    x
                } else {
                    zero
                }
            }
            Function::Elu => {
                if x > zero {
                    x
                } else {
                    a * (x.exp() - one)
                }
            }
            Function::Celu => x.max(zero) + (a * ((x / a).exp() - one)).min(zero),
            Function::Selu => {
                if x > zero {
                    b * x
                } else {
                    b * a * (x.exp() - one)
                }
            }
            Function::Sigmoid => sigmoid(x),
            Function::HardSigmoid => (a * x + b).max(zero).min(one),
            Function::HardSwish => x * (a * x + b).max(zero).min(one),
            Function::Swish => x * sigmoid(a * x),
            Function::Mish => x * softplus(x).tanh(),
            Function::Gelu => {
                T::of(0.5) * x * (one + erf(x * T::of(std::f64::consts::FRAC_1_SQRT_2)))
            }
            Function::GeluTanh => {
                let inner = T::of(GELU_C) * (x + T::of(GELU_K) * x * x * x);
                T::of(0.5) * x * (one + inner.tanh())
            }
            Function::Softplus => softplus(x),
            Function::Softsign => x / (one + x.abs()),
            Function::Tanh => x.tanh(),
            Function::Erf => erf(x),
            Function::Exp => x.exp(),
            Function::Log => x.ln(),
            Function::Sqrt => x.sqrt(),
            Function::Reciprocal => one / x,
            Function::Neg => -x,
            Function::Abs => x.abs(),
            Function::Clip => x.max(a).min(b),
            Function::Sin => T::of(x.f64().sin()),
            Function::Cos => T::of(x.f64().cos()),
            Function::Square => x * x,
            Function::Scale => a * x + b,
            Function::Floor => x.floor(),
            Function::Ceil => -(-x).floor(),
            Function::Round => T::of(x.f64().round_ties_even()),
            Function::Sign => {
                if x > zero {
                    one
                } else if x < zero {
                    -one
                } else {
                    zero
                }
            }
        }
    }

    /// Derivative at input `x` with output `y`.
    fn slope(&self, x: T, y: T) -> T {
        let (a, b, zero, one) = (self.a, self.b, T::ZERO, T::ONE);
        let half = T::of(0.5);
        match self.function {
            Function::Relu => {
                if y > zero {
                    one
                } else {
                    zero
                }
            }
            Function::LeakyRelu => {
                if x > zero {
                    one
                } else {
                    a
                }
            }
            Function::ThresholdedRelu => {
                if x > a {
                    one
                } else {
                    zero
                }
            }
            Function::Elu => {
                if x > zero {
                    one
                } else {
                    y + a
                }
            }
            Function::Celu => {
                if x > zero {
                    one
                } else {
                    (x / a).exp()
                }
            }
            Function::Selu => {
                if x > zero {
                    b
                } else {
                    y + a * b
                }
            }
            Function::Sigmoid => y * (one - y),
            Function::HardSigmoid => {
                if y > zero && y < one {
                    a
                } else {
                    zero
                }
            }
            Function::HardSwish => {
                let gate = a * x + b;
                if gate <= zero {
                    zero
                } else if gate >= one {
                    one
                } else {
                    gate + a * x
                }
            }
            Function::Swish => {
                let s = sigmoid(a * x);
                s + a * x * s * (one - s)
            }
            Function::Mish => {
                let t = softplus(x).tanh();
                t + x * (one - t * t) * sigmoid(x)
            }
            Function::Gelu => {
                let r = x * T::of(std::f64::consts::FRAC_1_SQRT_2);
                half * (one + erf(r)) + x * normal_density(x)
            }
            Function::GeluTanh => {
                let cube = T::of(GELU_K) * x * x * x;
                let t = (T::of(GELU_C) * (x + cube)).tanh();
                let inner = T::of(GELU_C) * (one + T::of(3.0 * GELU_K) * x * x);
                half * (one + t) + half * x * (one - t * t) * inner
            }
            Function::Softplus => sigmoid(x),
            Function::Softsign => {
                let d = one + x.abs();
                one / (d * d)
            }
            Function::Tanh => one - y * y,
            Function::Erf => T::of(std::f64::consts::FRAC_2_SQRT_PI) * (-(x * x)).exp(),
            Function::Exp => y,
            Function::Log => one / x,
            Function::Sqrt => half / y,
            Function::Reciprocal => -(y * y),
            Function::Neg => -one,
            Function::Abs => {
                if x > zero {
                    one
                } else if x < zero {
                    -one
                } else {
                    zero
                }
            }
            Function::Clip => {
                if x >= a && x <= b {
                    one
                } else {
                    zero
                }
            }
            Function::Sin => T::of(x.f64().cos()),
            Function::Cos => -T::of(x.f64().sin()),
            Function::Square => x + x,
            Function::Scale => a,
            Function::Floor | Function::Ceil | Function::Round | Function::Sign => zero,
        }
    }
}

impl<T: Element> Step<T> for Elementwise<T> {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], _state: &mut StepState<T>) {
        output.par_chunks_mut(CHUNK).zip(inputs[0].par_chunks(CHUNK)).for_each(|(y, x)| {
            match self.function {
                // The hot ones get a loop of their own that the compiler vectorises.
                Function::Relu => {
                    for (y, &x) in y.iter_mut().zip(x) {
                        *y = x.max(T::ZERO);
                    }
                }
                Function::Clip => {
                    for (y, &x) in y.iter_mut().zip(x) {
                        *y = x.max(self.a).min(self.b);
                    }
                }
                _ => {
                    for (y, &x) in y.iter_mut().zip(x) {
                        *y = self.value(x);
                    }
                }
            }
        });
    }

    fn needs(&self) -> Needs {
        match self.function {
            Function::Relu
            | Function::Sigmoid
            | Function::HardSigmoid
            | Function::Tanh
            | Function::Exp
            | Function::Sqrt
            | Function::Reciprocal => Needs::OUTPUT,
            Function::Neg | Function::Scale => Needs::NOTHING,
            Function::Elu | Function::Selu => {
                Needs { inputs: crate::graph::plan::Reads::Yes, ..Needs::OUTPUT }
            }
            _ => Needs::INPUTS,
        }
    }

    fn backward(
        &self,
        _which: usize,
        inputs: &[&[T]],
        output: &[T],
        d_output: &[T],
        target: Target<'_, T>,
        _state: &StepState<T>,
    ) {
        let (x, mode) = (inputs[0], target.mode);
        let work = |(chunk, d): (usize, &mut [T])| {
            let start = chunk * CHUNK;
            let end = start + d.len();
            let dy = &d_output[start..end];
            if self.function == Function::Relu {
                let y = &output[start..end];
                match mode {
                    Mode::Write => d.iter_mut().zip(dy).zip(y).for_each(|((d, &g), &y)| {
                        *d = if y > T::ZERO { g } else { T::ZERO };
                    }),
                    Mode::Add => d.iter_mut().zip(dy).zip(y).for_each(|((d, &g), &y)| {
                        *d += if y > T::ZERO { g } else { T::ZERO };
                    }),
                }
                return;
            }
            for i in 0..d.len() {
                let x = x.get(start + i).copied().unwrap_or_default();
                let y = output.get(start + i).copied().unwrap_or_default();
                let slope = dy[i] * self.slope(x, y);
                d[i] = if mode == Mode::Add { d[i] + slope } else { slope };
            }
        };
        target.data.par_chunks_mut(CHUNK).enumerate().for_each(work);
    }

    fn is_relu(&self) -> bool {
        self.function == Function::Relu
    }

    fn differentiable(&self, _which: usize) -> Differentiable {
        match self.function {
            Function::Floor | Function::Ceil | Function::Round | Function::Sign => {
                Differentiable::No
            }
            _ => Differentiable::Yes,
        }
    }
}

/// Emits `function` of `x` with parameters `a` and `b`.
pub(super) fn apply<T: Element>(
    lower: &mut Lower<'_, T>,
    function: Function,
    (a, b): (f64, f64),
    x: &Value,
) -> Value {
    let step = Elementwise { function, a: T::of(a), b: T::of(b) };
    lower.emit(Box::new(step), std::slice::from_ref(x), x.shape().to_vec())
}

/// The function and parameters of a node.
fn function(node: &Node) -> Result<(Function, f64, f64)> {
    let float = |name, default| node.float(name, default).map(f64::from);
    Ok(match node.op_type.as_str() {
        "Relu" => (Function::Relu, 0.0, 0.0),
        "LeakyRelu" => (Function::LeakyRelu, float("alpha", 0.01)?, 0.0),
        "ThresholdedRelu" => (Function::ThresholdedRelu, float("alpha", 1.0)?, 0.0),
        "Elu" => (Function::Elu, float("alpha", 1.0)?, 0.0),
        "Celu" => (Function::Celu, float("alpha", 1.0)?, 0.0),
        "Selu" => (Function::Selu, float("alpha", 1.673_263_2)?, float("gamma", 1.050_701)?),
        "Sigmoid" => (Function::Sigmoid, 0.0, 0.0),
        "HardSigmoid" => (Function::HardSigmoid, float("alpha", 0.2)?, float("beta", 0.5)?),
        "HardSwish" => (Function::HardSwish, 1.0 / 6.0, 0.5),
        "Swish" => (Function::Swish, float("alpha", 1.0)?, 0.0),
        "Mish" => (Function::Mish, 0.0, 0.0),
        "Gelu" if node.text("approximate", "none")? == "tanh" => (Function::GeluTanh, 0.0, 0.0),
        "Gelu" => (Function::Gelu, 0.0, 0.0),
        "Softplus" => (Function::Softplus, 0.0, 0.0),
        "Softsign" => (Function::Softsign, 0.0, 0.0),
        "Tanh" => (Function::Tanh, 0.0, 0.0),
        "Erf" => (Function::Erf, 0.0, 0.0),
        "Exp" => (Function::Exp, 0.0, 0.0),
        "Log" => (Function::Log, 0.0, 0.0),
        "Sqrt" => (Function::Sqrt, 0.0, 0.0),
        "Reciprocal" => (Function::Reciprocal, 0.0, 0.0),
        "Neg" => (Function::Neg, 0.0, 0.0),
        "Abs" => (Function::Abs, 0.0, 0.0),
        "Sin" => (Function::Sin, 0.0, 0.0),
        "Cos" => (Function::Cos, 0.0, 0.0),
        "Floor" => (Function::Floor, 0.0, 0.0),
        "Ceil" => (Function::Ceil, 0.0, 0.0),
        "Round" => (Function::Round, 0.0, 0.0),
        "Sign" => (Function::Sign, 0.0, 0.0),
        other => return Err(Error::internal(format!("no element-wise function `{other}`"))),
    })
}

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    match op {
        "Clip" => Some(clip),
        "PRelu" => Some(super::binary::prelu),
        _ if function(&Node::new(op, "", &[], &[])).is_ok() => Some(unary),
        _ => None,
    }
}

fn unary<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let (function, a, b) = function(node)?;
    let y = apply(lower, function, (a, b), &x);
    lower.set_output(node, 0, y);
    Ok(())
}

fn clip<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let bound = |lower: &Lower<'_, T>, index, name, default| -> Result<f64> {
        Ok(match lower.constant_input(node, index)? {
            Some(value) => value.to_f64().first().copied().unwrap_or(default),
            None => f64::from(node.float(name, default as f32)?),
        })
    };
    let low = bound(lower, 1, "min", f64::from(f32::MIN))?;
    let high = bound(lower, 2, "max", f64::from(f32::MAX))?;
    let y = apply(lower, Function::Clip, (low, high), &x);
    lower.set_output(node, 0, y);
    Ok(())
}
