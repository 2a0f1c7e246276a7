//! Special functions that the standard library lacks.

use super::Element;

/// e to the power of `x`; in `f32` without a branch, so that loops of it become vectors, within a unit in the last place
/// (range reduction and polynomial of Cephes' `expf`), 0 below -87.3 and 2.4e38 above 88.3.
#[inline(always)]
pub fn exp<T: Element>(x: T) -> T {
    x.fast_exp()
}

/// [`exp`] in `f32`.
#[inline(always)]
pub(super) fn exp_single(x: f32) -> f32 {
    const LOW: f32 = -87.3;
    const HIGH: f32 = 88.3;
    // Adding it rounds to an integer, which then lies in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    const POLYNOMIAL: [f32; 6] =
        [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let within = if x > HIGH { HIGH } else { x };
    let within = if within < LOW { LOW } else { within };
    let shifted = within * std::f32::consts::LOG2_E + ROUND;
    let k = shifted - ROUND;
    let r = within - k * LN_2[0] - k * LN_2[1];
    let [a, b, c, d, e, f] = POLYNOMIAL;
    let sum = ((((a * r + b) * r + c) * r + d) * r + e) * r + f;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    let y = (sum * (r * r) + r + 1.0) * power;
    if x < LOW { 0.0 } else { y }
}

/// The error function: in `f64` to 1e-13 (series near 0, continued fraction beyond: Abramowitz and
/// Stegun 7.1.6 and 7.1.14), in `f32` within a unit in the last place, without a branch
/// (polynomials of N. Juffa, "Efficient implementation of erff", 2012: of the value near 0, of its distance from
/// 1 beyond).
#[inline(always)]
pub fn erf<T: Element>(x: T) -> T {
    x.erf()
}

/// [`erf`] in `f32`.
#[inline(always)]
pub(super) fn erf_single(x: f32) -> f32 {
    const BEYOND: f32 = 0.927_734_4;
    let size = x.abs();
    let square = x * x;
    let even = -1.728_534_7e-5 * size + 3.831_972e-4;
    let odd = -3.883_964_4e-3 * size + 2.425_462_2e-2;
    let mut power = even * square + odd;
    for c in [-1.067_778_8e-1, -6.348_468_7e-1, -1.287_175_1e-1] {
        power = power * size + c;
    }
    let far = (1.0 - exp_single(power * size - size)).copysign(x);
    let mut near = -5.967_617e-4;
    for c in [4.991_194_2e-3, -2.676_813_5e-2, 1.128_199_25e-1, -3.761_253_4e-1, 1.283_791_7e-1] {
        near = near * square + c;
    }
    if size > BEYOND { far } else { near * x + x }
}

/// [`erf`] in `f64`.
pub(super) fn erf_precise(x: f64) -> f64 {
    let z = x.abs();
    let value = if z < 2.5 {
        let (mut term, mut sum, mut n) = (z, z, 0.0);
        while term.abs() > 1e-17 * sum.abs() {
            n += 1.0;
            term *= 2.0 * z * z / (2.0 * n + 1.0);
            sum += term;
        }
        std::f64::consts::FRAC_2_SQRT_PI * (-z * z).exp() * sum
    } else if z < 6.0 {
        let mut fraction = z;
        for k in (1..=60).rev() {
            fraction = z + f64::from(k) / 2.0 / fraction;
        }
        1.0 - (-z * z).exp() / (fraction * std::f64::consts::PI.sqrt())
    } else {
        1.0
    };
    value.copysign(x)
}

/// The standard normal density.
#[inline(always)]
pub fn normal_density<T: Element>(x: T) -> T {
    T::of(0.398_942_280_401_432_7) * exp(T::of(-0.5) * x * x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_matches_reference_values() {
        // Values from Abramowitz and Stegun, table 7.1.
        let cases =
            [(0.0, 0.0), (0.5, 0.520_499_877_8), (1.0, 0.842_700_792_9), (2.0, 0.995_322_265_0)];
        for (x, expected) in cases {
            assert!((erf(x) - expected).abs() < 1e-10, "erf({x}) = {}", erf(x));
            assert!((erf(-x) + expected).abs() < 1e-10);
            assert!((f64::from(erf(x as f32)) - expected).abs() < 2e-7);
        }
        for i in -6000..6000 {
            let x = i as f32 / 1000.0;
            let (single, double) = (f64::from(erf(x)), erf(f64::from(x)));
            assert!((single - double).abs() <= 1.2e-7 * double.abs(), "erf({x}) = {single}");
        }
        // Both branches meet.
        assert!((erf_precise(2.499_999_999_9) - erf_precise(2.500_000_000_1)).abs() < 1e-12);
    }

    #[test]
    fn the_exponential_is_right_to_a_unit_in_the_last_place() {
        for i in -87_000..88_000 {
            let x = i as f32 / 1000.0;
            let expected = f64::from(x).exp();
            assert!((f64::from(exp(x)) - expected).abs() <= 1.2e-7 * expected, "exp({x})");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-100.0f32), 0.0);
        assert!(exp(1000.0f32) > 2e38);
        assert!(exp(f32::NAN).is_nan());
    }
}
