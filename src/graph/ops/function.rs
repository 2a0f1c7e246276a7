//! The functions of one number: value and derivative. The derivative follows PyTorch where a function
//! has a corner: ReLU has 0 at 0, LeakyReLU its slope, Clip 1 on both bounds, Abs 0.

use crate::tensor::kernels::Element;
use crate::tensor::kernels::special::{erf, exp, normal_density};

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
    /// `x^a` with the gradient 0 at 0, as PyTorch's norms have it.
    Root,
    Tan,
    Asin,
    Acos,
    Atan,
    Sinh,
    Cosh,
    Asinh,
    Acosh,
    Atanh,
    /// Towards zero by `b` outside `-a..a`, else 0.
    Shrink,
    Floor,
    Ceil,
    Round,
    Sign,
    /// Towards zero: a cast to an integer type.
    Truncate,
    /// Whether the value is 0.
    Not,
    /// Whether the value is not 0: a cast to bool.
    Truth,
    IsNan,
    /// Whether the value is +inf (where `a` is set) or -inf (`b`).
    IsInf,
}

#[inline(always)]
fn sigmoid<T: Element>(x: T) -> T {
    T::ONE / (T::ONE + exp(-x))
}

/// `1 + tanh(x)`.
#[inline(always)]
fn one_plus_tanh<T: Element>(x: T) -> T {
    T::of(2.0) * sigmoid(T::of(2.0) * x)
}

#[inline(always)]
fn softplus<T: Element>(x: T) -> T {
    x.max(T::ZERO) + (T::ONE + (-x.abs()).exp()).ln()
}

/// The functions that no hot network uses go through `f64`.
fn by_f64<T: Element>(x: T, f: fn(f64) -> f64) -> T {
    T::of(f(x.f64()))
}

/// 1 for true.
fn truth<T: Element>(holds: bool) -> T {
    if holds { T::ONE } else { T::ZERO }
}

const GELU_C: f64 = 0.797_884_560_802_865_4; // sqrt(2 / pi)
const GELU_K: f64 = 0.044_715;

impl Function {
    /// The value at `x` with parameters `a` and `b`.
    #[inline(always)]
    pub(super) fn value<T: Element>(self, x: T, a: T, b: T) -> T {
        let (zero, one) = (T::ZERO, T::ONE);
        match self {
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
                T::of(0.5) * x * one_plus_tanh(inner)
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
            Function::Sin => by_f64(x, f64::sin),
            Function::Cos => by_f64(x, f64::cos),
            Function::Square => x * x,
            Function::Scale => a * x + b,
            Function::Root if x == zero => zero,
            Function::Root => x.powf(a),
            Function::Tan => by_f64(x, f64::tan),
            Function::Asin => by_f64(x, f64::asin),
            Function::Acos => by_f64(x, f64::acos),
            Function::Atan => by_f64(x, f64::atan),
            Function::Sinh => by_f64(x, f64::sinh),
            Function::Cosh => by_f64(x, f64::cosh),
            Function::Asinh => by_f64(x, f64::asinh),
            Function::Acosh => by_f64(x, f64::acosh),
            Function::Atanh => by_f64(x, f64::atanh),
            Function::Shrink if x < -a => x + b,
            Function::Shrink if x > a => x - b,
            Function::Shrink => zero,
            Function::Truncate => by_f64(x, f64::trunc),
            Function::Not => truth(x == zero),
            Function::Truth => truth(x != zero),
            Function::IsNan => truth(x.f64().is_nan()),
            Function::IsInf => {
                let size = x.f64();
                let wanted = if size > 0.0 { a } else { b };
                truth(size.is_infinite() && wanted != zero)
            }
            Function::Floor => x.floor(),
            Function::Ceil => -(-x).floor(),
            Function::Round => by_f64(x, f64::round_ties_even),
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
    #[inline(always)]
    pub(super) fn slope<T: Element>(self, x: T, y: T, a: T, b: T) -> T {
        let (zero, one, half) = (T::ZERO, T::ONE, T::of(0.5));
        match self {
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
                let t = one_plus_tanh(T::of(GELU_C) * (x + cube)) - one;
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
            Function::Root if x == zero => zero,
            Function::Root => a * y / x,
            Function::Tan => one + y * y,
            Function::Asin => one / (one - x * x).sqrt(),
            Function::Acos => -(one / (one - x * x).sqrt()),
            Function::Atan => one / (one + x * x),
            Function::Sinh => by_f64(x, f64::cosh),
            Function::Cosh => by_f64(x, f64::sinh),
            Function::Asinh => one / (x * x + one).sqrt(),
            Function::Acosh => one / (x * x - one).sqrt(),
            Function::Atanh => one / (one - x * x),
            Function::Shrink => truth(x < -a || x > a),
            Function::Floor
            | Function::Ceil
            | Function::Round
            | Function::Sign
            | Function::Truncate
            | Function::Not
            | Function::Truth
            | Function::IsNan
            | Function::IsInf => zero,
        }
    }
}
