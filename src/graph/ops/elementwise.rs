//! Operators of one input, element by element: the activations, the plain functions, and the questions
//! (Not, IsNaN, IsInf).

use rayon::prelude::*;

use super::Rule;
use super::binary::{Binary, emit};
pub(super) use super::function::Function;
use crate::error::{Error, Result};
use crate::graph::ir::{DataType, Node};
use crate::graph::plan::{
    Differentiable, Follower, Lower, Mode, Needs, Step, StepState, Target, Value,
};
#[cfg(any(feature = "cuda", test))]
use crate::tensor::cuda;
use crate::tensor::kernels::{Element, map};

/// Elements a parallel task takes.
pub(super) const CHUNK: usize = 1 << 14;

/// Evaluates `$use` with `$f` bound to the function: for the hot ones as a constant, so that the loop inside is
/// made for that function alone and becomes vectors.
macro_rules! constant {
    ($function:expr, |$f:ident| $use:expr) => {
        constant!($function, |$f| $use, |$f| $use)
    };
    ($function:expr, |$f:ident| $use:expr, |$g:ident| $cold:expr) => {
        constant!(@ $function, $f, $use, $g, $cold; Relu LeakyRelu Clip Sigmoid HardSigmoid HardSwish Swish Gelu GeluTanh
            Erf Neg Abs Square Scale Sqrt Reciprocal)
    };
    (@ $function:expr, $f:ident, $use:expr, $g:ident, $cold:expr; $($hot:ident)*) => {
        match $function {
            // Not a variable: a closure would carry that along, no longer constant.
            $(Function::$hot => {
                const $f: Function = Function::$hot;
                $use
            })*
            #[allow(non_snake_case)]
            other => {
                let $g = other;
                $cold
            }
        }
    };
}

/// One element-wise step.
#[derive(Debug)]
pub(super) struct Elementwise<T> {
    pub(super) function: Function,
    pub(super) a: T,
    pub(super) b: T,
}

impl<T: Element> Step<T> for Elementwise<T> {
    fn forward(&self, inputs: &[&[T]], output: &mut [T], _state: &mut StepState<T>) {
        let (a, b) = (self.a, self.b);
        output.par_chunks_mut(CHUNK).zip(inputs[0].par_chunks(CHUNK)).for_each(|(y, x)| {
            constant!(self.function, |F| map::block(x, y, move |x| F.value(x, a, b)));
        });
    }

    #[cfg(any(feature = "cuda", test))]
    fn on_device(&self, site: &cuda::Site<'_>) -> Result<Option<Box<dyn cuda::Operation>>> {
        let _ = site;
        let parameters = [self.a, self.b].map(|v| v.f64() as f32);
        Ok(Some(Box::new(cuda::Elementwise { function: self.function as i32, parameters })))
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
            Function::Elu | Function::Selu | Function::Root | Function::Tan => {
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
        let (x, mode, a, b) = (inputs[0], target.mode, self.a, self.b);
        let work = |(chunk, d): (usize, &mut [T])| {
            let start = chunk * CHUNK;
            let end = start + d.len();
            let dy = &d_output[start..end];
            // A value that is not read is not there: any other stands in.
            let x = if x.is_empty() { dy } else { &x[start..end] };
            let y = if output.is_empty() { dy } else { &output[start..end] };
            let add = mode == Mode::Add;
            constant!(
                self.function,
                |F| {
                    #[derive(Clone, Copy)]
                    struct Slope<T>([T; 2]);
                    impl<T: Element> map::Three<T> for Slope<T> {
                        #[inline(always)]
                        fn at(self, x: T, y: T, dy: T) -> T {
                            dy * F.slope(x, y, self.0[0], self.0[1])
                        }
                    }
                    map::block_three(x, y, dy, d, add, Slope([a, b]));
                },
                |f| map::block_three(x, y, dy, d, add, move |x, y, dy| dy * f.slope(x, y, a, b))
            );
        };
        target.data.par_chunks_mut(CHUNK).enumerate().for_each(work);
    }

    fn as_any(&self) -> Option<&dyn std::any::Any> {
        Some(self)
    }

    fn follower(&self) -> Option<Follower> {
        let [low, high] = [self.a.f64(), self.b.f64()];
        match self.function {
            Function::Relu => Some(Follower::Bounded { low: 0.0, high: f64::INFINITY, relu: true }),
            Function::Clip => Some(Follower::Bounded { low, high, relu: false }),
            _ => None,
        }
    }

    fn differentiable(&self, _which: usize) -> Differentiable {
        match self.function {
            Function::Floor
            | Function::Ceil
            | Function::Round
            | Function::Sign
            | Function::Truncate => Differentiable::No,
            Function::Not | Function::Truth | Function::IsNan | Function::IsInf => {
                Differentiable::Choice
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
    apply_as(lower, x.dtype(), function, (a, b), x)
}

/// Emits a copy of `x`.
pub(crate) fn copy<T: Element>(lower: &mut Lower<'_, T>, x: &Value) -> Value {
    apply(lower, Function::Scale, (1.0, 0.0), x)
}

/// As [`apply`], for a result of type `dtype`.
pub(super) fn apply_as<T: Element>(
    lower: &mut Lower<'_, T>,
    dtype: DataType,
    function: Function,
    (a, b): (f64, f64),
    x: &Value,
) -> Value {
    let step = Elementwise { function, a: T::of(a), b: T::of(b) };
    lower.emit_as(dtype, Box::new(step), std::slice::from_ref(x), x.shape().to_vec())
}

/// The function and parameters of a node.
pub(super) fn function(node: &Node) -> Result<(Function, f64, f64)> {
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
        "Tan" => (Function::Tan, 0.0, 0.0),
        "Asin" => (Function::Asin, 0.0, 0.0),
        "Acos" => (Function::Acos, 0.0, 0.0),
        "Atan" => (Function::Atan, 0.0, 0.0),
        "Sinh" => (Function::Sinh, 0.0, 0.0),
        "Cosh" => (Function::Cosh, 0.0, 0.0),
        "Asinh" => (Function::Asinh, 0.0, 0.0),
        "Acosh" => (Function::Acosh, 0.0, 0.0),
        "Atanh" => (Function::Atanh, 0.0, 0.0),
        "Shrink" => (Function::Shrink, float("lambd", 0.5)?, float("bias", 0.0)?),
        other => return Err(Error::internal(format!("no element-wise function `{other}`"))),
    })
}

pub(super) fn rule<T: Element>(op: &str) -> Option<Rule<T>> {
    match op {
        "Clip" => Some(clip),
        "PRelu" => Some(super::binary::prelu),
        "Not" | "IsNaN" | "IsInf" => Some(question),
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

/// Operators that answer yes or no.
fn question<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let (function, a, b) = match node.op_type.as_str() {
        "Not" => (Function::Not, 0, 0),
        "IsNaN" => (Function::IsNan, 0, 0),
        _ => (Function::IsInf, node.int("detect_positive", 1)?, node.int("detect_negative", 1)?),
    };
    let y = apply_as(lower, DataType::Bool, function, (a as f64, b as f64), &x);
    lower.set_output(node, 0, y);
    Ok(())
}

fn clip<'g, T: Element>(lower: &mut Lower<'g, T>, node: &'g Node) -> Result<()> {
    let x = lower.input(node, 0)?;
    let bounds = [lower.optional(node, 1)?, lower.optional(node, 2)?];
    if bounds.iter().flatten().any(|bound| bound.constant().is_none()) {
        let mut y = x;
        for (bound, function) in bounds.iter().zip([Binary::Max, Binary::Min]) {
            if let Some(bound) = bound {
                y = emit(lower, function, &y, bound)?;
            }
        }
        lower.set_output(node, 0, y);
        return Ok(());
    }
    let bound = |value: &Option<Value>, name, default: f64| -> Result<f64> {
        Ok(match value.as_ref().and_then(Value::constant) {
            Some(value) => value.to_f64().first().copied().unwrap_or(default),
            None => node.float(name, default as f32).map(f64::from)?,
        })
    };
    // Without a bound nothing is cut, infinities included.
    let low = bound(&bounds[0], "min", f64::NEG_INFINITY)?;
    let high = bound(&bounds[1], "max", f64::INFINITY)?;
    let y = apply(lower, Function::Clip, (low, high), &x);
    lower.set_output(node, 0, y);
    Ok(())
}
