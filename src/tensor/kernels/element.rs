//! The number type of a kernel: `f32` in production, `f64` for gradient checks.

use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, DivAssign, Mul, MulAssign, Neg, Sub, SubAssign};

use super::special;

/// A floating-point element. Implemented for `f32` and `f64` only.
pub trait Element:
    Copy
    + Default
    + Send
    + Sync
    + PartialOrd
    + std::fmt::Debug
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
    + DivAssign
    + Sum
    + 'static
{
    /// Zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;
    /// From `f64`, rounding.
    fn of(value: f64) -> Self;
    /// To `f64`.
    fn f64(self) -> f64;
    /// e to the power of self.
    fn exp(self) -> Self;
    /// As [`Element::exp`], in `f32` made for vectors: see [`super::special::exp`].
    fn fast_exp(self) -> Self;
    /// The error function: see [`super::special::erf`].
    fn erf(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// Absolute value.
    fn abs(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh(self) -> Self;
    /// Power.
    fn powf(self, exponent: Self) -> Self;
    /// The larger of two (the other when one is NaN).
    fn max(self, other: Self) -> Self;
    /// The smaller of two (the other when one is NaN).
    fn min(self, other: Self) -> Self;
    /// Largest integer not above self.
    fn floor(self) -> Self;
    /// The slice, where this is `f32`: for kernels that only that type has.
    fn as_f32(values: &[Self]) -> Option<&[f32]>;
    /// As [`Element::as_f32`], to change.
    fn as_f32_mut(values: &mut [Self]) -> Option<&mut [f32]>;
    /// Fused or plain `self * a + b`, whichever the target does fast.
    fn mul_add(self, a: Self, b: Self) -> Self;
}

macro_rules! implement_element {
    ($t:ty, $single:expr, $single_mut:expr, $exp:path, $erf:path) => {
        impl Element for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            #[inline(always)]
            fn of(value: f64) -> Self {
                value as $t
            }
            #[inline(always)]
            fn f64(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn exp(self) -> Self {
                <$t>::exp(self)
            }
            #[inline(always)]
            fn fast_exp(self) -> Self {
                $exp(self)
            }
            #[inline(always)]
            fn erf(self) -> Self {
                $erf(self)
            }
            #[inline(always)]
            fn ln(self) -> Self {
                <$t>::ln(self)
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                <$t>::sqrt(self)
            }
            #[inline(always)]
            fn abs(self) -> Self {
                <$t>::abs(self)
            }
            #[inline(always)]
            fn tanh(self) -> Self {
                <$t>::tanh(self)
            }
            #[inline(always)]
            fn powf(self, exponent: Self) -> Self {
                <$t>::powf(self, exponent)
            }
            #[inline(always)]
            fn max(self, other: Self) -> Self {
                <$t>::max(self, other)
            }
            #[inline(always)]
            fn min(self, other: Self) -> Self {
                <$t>::min(self, other)
            }
            #[inline(always)]
            fn floor(self) -> Self {
                <$t>::floor(self)
            }
            fn as_f32(values: &[Self]) -> Option<&[f32]> {
                $single(values)
            }
            fn as_f32_mut(values: &mut [Self]) -> Option<&mut [f32]> {
                $single_mut(values)
            }
            #[inline(always)]
            fn mul_add(self, a: Self, b: Self) -> Self {
                self * a + b
            }
        }
    };
}

implement_element!(f32, Some, Some, special::exp_single, special::erf_single);
implement_element!(f64, |_| None, |_| None, f64::exp, special::erf_precise);
