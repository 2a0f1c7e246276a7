//! The functions of two numbers: value, partial derivatives, and the result on integers.

use crate::tensor::kernels::Element;

/// A function of two numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Binary {
    Add,
    Sub,
    Mul,
    Div,
    Pow,
    Min,
    Max,
    PRelu,
    /// Division of integers, towards zero.
    Quotient,
    /// Remainder with the sign of the divisor.
    Modulo,
    /// Remainder with the sign of the dividend.
    Remainder,
    Equal,
    Greater,
    GreaterOrEqual,
    Less,
    LessOrEqual,
    And,
    Or,
    Xor,
}

impl Binary {
    /// The value.
    #[inline(always)]
    pub(super) fn value<T: Element>(self, a: T, b: T) -> T {
        match self {
            Self::Add => a + b,
            Self::Sub => a - b,
            Self::Mul => a * b,
            Self::Div => a / b,
            Self::Pow => power(a, b),
            Self::Min => a.min(b),
            Self::Max => a.max(b),
            Self::PRelu => {
                if a > T::ZERO {
                    a
                } else {
                    a * b
                }
            }
            Self::Quotient => T::of((a.f64() / b.f64()).trunc()),
            Self::Modulo => a - (a / b).floor() * b,
            Self::Remainder => T::of(a.f64() % b.f64()),
            question => {
                if question.holds(a, b) {
                    T::ONE
                } else {
                    T::ZERO
                }
            }
        }
    }

    /// Whether this answers yes or no.
    pub(super) fn is_question(self) -> bool {
        matches!(
            self,
            Self::Equal
                | Self::Greater
                | Self::GreaterOrEqual
                | Self::Less
                | Self::LessOrEqual
                | Self::And
                | Self::Or
                | Self::Xor
        )
    }

    /// The answer; false for what is no question.
    fn holds<V: PartialOrd + Default>(self, a: V, b: V) -> bool {
        let zero = V::default();
        match self {
            Self::Equal => a == b,
            Self::Greater => a > b,
            Self::GreaterOrEqual => a >= b,
            Self::Less => a < b,
            Self::LessOrEqual => a <= b,
            Self::And => a != zero && b != zero,
            Self::Or => a != zero || b != zero,
            Self::Xor => (a != zero) != (b != zero),
            _ => false,
        }
    }

    /// The result on integers; `None` where there is none (a division by zero).
    pub(super) fn integer(self, a: i64, b: i64) -> Option<i64> {
        Some(match self {
            Self::Add => a.wrapping_add(b),
            Self::Sub => a.wrapping_sub(b),
            Self::Mul => a.wrapping_mul(b),
            Self::Div | Self::Quotient => a.checked_div(b)?,
            Self::Pow => a.wrapping_pow(u32::try_from(b).ok()?),
            Self::Min => a.min(b),
            Self::Max => a.max(b),
            Self::PRelu => {
                if a > 0 {
                    a
                } else {
                    a.wrapping_mul(b)
                }
            }
            Self::Modulo => {
                let r = a.checked_rem(b)?;
                if r != 0 && (r < 0) != (b < 0) { r + b } else { r }
            }
            Self::Remainder => a.checked_rem(b)?,
            question => i64::from(question.holds(a, b)),
        })
    }

    /// Partial derivatives at (a, b); ties of Min and Max are shared in halves, as in PyTorch.
    #[inline(always)]
    pub(super) fn slopes<T: Element>(self, a: T, b: T) -> [T; 2] {
        let (zero, one, half) = (T::ZERO, T::ONE, T::of(0.5));
        match self {
            Self::Add => [one, one],
            Self::Sub => [one, -one],
            Self::Mul => [b, a],
            Self::Div => [one / b, -(a / (b * b))],
            Self::Pow => {
                let db = if a > zero { power(a, b) * a.ln() } else { zero };
                [if b == zero { zero } else { b * power(a, b - one) }, db]
            }
            Self::Min if a == b => [half, half],
            Self::Min => {
                if a < b {
                    [one, zero]
                } else {
                    [zero, one]
                }
            }
            Self::Max if a == b => [half, half],
            Self::Max => {
                if a > b {
                    [one, zero]
                } else {
                    [zero, one]
                }
            }
            Self::PRelu => {
                if a > zero {
                    [one, zero]
                } else {
                    [b, a]
                }
            }
            Self::Modulo => [one, -(a / b).floor()],
            Self::Remainder => [one, -T::of((a.f64() / b.f64()).trunc())],
            _ => [zero, zero],
        }
    }
}

/// Power, exact for the exponents that networks use.
fn power<T: Element>(a: T, b: T) -> T {
    if b == T::of(2.0) {
        a * a
    } else if b == T::ONE {
        a
    } else if b == T::of(0.5) {
        a.sqrt()
    } else if b == T::of(3.0) {
        a * a * a
    } else {
        a.powf(b)
    }
}
