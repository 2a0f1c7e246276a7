//! Checks of a compiled network against itself: its exact gradient against central differences in
//! `f64`, and `f32` against `f64`.
//!
//! In `f32` the input gradient of a deep ReLU network moves by up to 2e-2 between two correct programs
//! (kinks), so a fixed tolerance on it means nothing; the two figures here separate a wrong rule
//! (first) from rounding (second) (design.md 3, "Gradient checks need a yardstick").

use super::ir::Graph;
use super::plan::{CompileOptions, Gradient, Plan, Workspace};
use crate::error::Result;
use crate::tensor::RngStream;
use crate::tensor::kernels::Element;

/// Steps of the central differences, in units of the input's root mean square.
const STEPS: [f64; 8] = [3e-6, 1e-6, 3e-7, 1e-7, 3e-8, 1e-8, 3e-9, 1e-9];
/// Two sides that agree this well (relative to the larger) have no kink between them.
const AGREEMENT: f64 = 1e-5;
/// Directions in which the gradient is compared, for small and for large inputs; each one tests all
/// of it.
const DIRECTIONS: [u64; 2] = [8, 3];
/// Elements from which an input is large.
const LARGE: usize = 3 * 64 * 64 * 2;

/// What [`check_gradient`] found; errors are `norm(a - b) / norm(b)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GradientCheck {
    /// The exact `f64` gradient along random directions against central differences of the `f64`
    /// network.
    pub gradient_rel_err: f64,
    /// The `f32` gradient against the `f64` gradient, over all inputs.
    pub gradient_noise: f64,
    /// The `f32` output against the `f64` output.
    pub output_noise: f64,
}

/// `norm(a - b) / norm(b)`; 0 when both vanish.
pub fn relative_error(a: &[f64], b: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
    let size = norm(&mut b.iter().copied());
    if difference == 0.0 { 0.0 } else { difference / size }
}

/// As [`relative_error`], for slopes that differences can only resolve down to `floor`.
fn slope_error(exact: &[f64], measured: &[f64], floor: f64) -> f64 {
    let resolved = measured.iter().any(|slope| slope.abs() > floor);
    let vanishes = exact.iter().all(|slope| slope.abs() <= floor);
    if !resolved && vanishes { 0.0 } else { relative_error(exact, measured) }
}

/// Slopes measured with one step: to the left and to the right.
#[derive(Debug, Clone, Copy)]
struct Sides {
    left: f64,
    right: f64,
}

/// A measured slope and how far, of its size, the two differences it rests on lie apart.
#[derive(Debug, Clone, Copy)]
struct Slope {
    value: f64,
    gap: f64,
}

impl Slope {
    const UNKNOWN: Self = Self { value: f64::NAN, gap: f64::INFINITY };

    /// `value`, which `a` and `b` should both be, each off by up to `rounding`.
    fn of(value: f64, a: f64, b: f64, rounding: f64) -> Self {
        let size = a.abs().max(b.abs()).max(f64::MIN_POSITIVE);
        Self { value, gap: ((a - b).abs() + rounding) / size }
    }

    fn better(self, other: Self) -> Self {
        if other.gap < self.gap { other } else { self }
    }
}

/// The limit of a difference as its step shrinks, which `exact` should be. A step that jumps kinks (ReLUs
/// changing side) gives slopes that differ to the left and to the right, one too small drowns in rounding: the
/// central difference of the step whose two sides agree best is taken, where `rounding`, that of the objective,
/// over the step counts as disagreement, since two slopes of noise may agree by chance. A kink nearer than any
/// step leaves the sides apart, but each of them alike from step to step; the slope is then that of one side,
/// the one nearer to `exact`.
fn slope(sides: &mut impl FnMut(f64) -> Sides, exact: f64, rounding: f64) -> f64 {
    let [mut central, mut left, mut right] = [Slope::UNKNOWN; 3];
    let mut last: Option<Sides> = None;
    for step in STEPS {
        let (next, rounding) = (sides(step), rounding / step);
        let middle = 0.5 * (next.left + next.right);
        if last.is_none() && middle.abs() <= rounding {
            return middle;
        }
        central = central.better(Slope::of(middle, next.left, next.right, rounding));
        if central.gap <= AGREEMENT {
            break;
        }
        if let Some(last) = last {
            left = left.better(Slope::of(next.left, next.left, last.left, rounding));
            right = right.better(Slope::of(next.right, next.right, last.right, rounding));
        }
        last = Some(next);
    }
    if central.gap <= KINK * left.gap.max(right.gap) {
        return central.value;
    }
    let nearer = |a: &f64, b: &f64| (a - exact).abs().total_cmp(&(b - exact).abs());
    [left.value, right.value].into_iter().min_by(nearer).unwrap_or(central.value)
}

/// The sides must agree with themselves this many times better than with each other to belong to a kink.
const KINK: f64 = 10.0;

/// A random linear objective on the outputs and the tapped statistics: every path is exercised.
struct Objective {
    output: Vec<f64>,
    taps: Vec<[Vec<f64>; 2]>,
}

impl Objective {
    fn new<T: Element>(plan: &Plan<T>, rng: &mut RngStream) -> Self {
        let mut draw = |n: usize| rng.normals(n).into_iter().map(f64::from).collect::<Vec<_>>();
        let output = draw(plan.output_shape().iter().product());
        let taps = plan
            .taps(&plan.workspace())
            .map(|tap| [draw(tap.reference.mean.len()), draw(tap.reference.var.len())])
            .collect();
        Self { output, taps }
    }

    fn value<T: Element>(&self, plan: &Plan<T>, workspace: &mut Workspace<T>, x: &[T]) -> f64 {
        let dot = |a: &[f64], b: &[T]| a.iter().zip(b).map(|(a, b)| a * b.f64()).sum::<f64>();
        let mut total = dot(&self.output, plan.forward(workspace, x));
        for (tap, [mean, var]) in plan.taps(workspace).zip(&self.taps) {
            total += dot(mean, tap.mean) + dot(var, tap.var);
        }
        total
    }

    fn gradient<T: Element>(
        &self,
        plan: &Plan<T>,
        workspace: &mut Workspace<T>,
        x: &[T],
    ) -> (Vec<f64>, Vec<f64>) {
        let cast = |values: &[f64]| values.iter().map(|&v| T::of(v)).collect::<Vec<T>>();
        let output = plan.forward(workspace, x).iter().map(|v| v.f64()).collect();
        for (index, [mean, var]) in self.taps.iter().enumerate() {
            plan.set_tap_gradient(workspace, index, &cast(mean), &cast(var));
        }
        let gradient = plan.backward(workspace, &cast(&self.output));
        (output, gradient.iter().map(|v| v.f64()).collect())
    }
}

/// Compares the gradient of `graph` at `input` with central differences, and `f32` with `f64`. Quantising
/// operators do not round here: the gradient that goes straight through them is that of this function.
///
/// # Errors
/// When the graph does not compile.
pub fn check_gradient(
    graph: &Graph,
    options: &CompileOptions,
    input: &[f32],
    seed: u64,
) -> Result<GradientCheck> {
    let mut rng = RngStream::new(seed, "check-gradient", &graph.name, 0);
    let options = CompileOptions { gradient: Gradient::Smooth, ..options.clone() };
    let single = Plan::<f32>::compile(graph, &options)?;
    let double = Plan::<f64>::compile(graph, &options)?;
    let objective = Objective::new(&double, &mut rng);
    let (output32, gradient32) = objective.gradient(&single, &mut single.workspace(), input);
    let mut workspace = double.workspace();
    let x: Vec<f64> = input.iter().map(|&v| f64::from(v)).collect();
    let (output64, gradient64) = objective.gradient(&double, &mut workspace, &x);
    let (mut exact, mut measured) = (Vec::new(), Vec::new());
    // An input of 0..255 needs longer steps than one of 0..1; one of zeros needs some.
    let unit = (x.iter().map(|v| v * v).sum::<f64>() / x.len().max(1) as f64).sqrt().max(0.1);
    // A few roundings of the objective.
    let here = objective.value(&double, &mut workspace, &x);
    let rounding = 4.0 * f64::EPSILON * here.abs();
    let floor = rounding / STEPS[0];
    for _ in 0..DIRECTIONS[usize::from(x.len() > LARGE)] {
        let direction: Vec<f64> =
            rng.normals(x.len()).into_iter().map(|v| unit * f64::from(v)).collect();
        let mut sides = |step: f64| {
            let mut at = |step: f64| {
                let moved: Vec<f64> = x.iter().zip(&direction).map(|(x, d)| x + step * d).collect();
                objective.value(&double, &mut workspace, &moved)
            };
            Sides { left: (here - at(-step)) / step, right: (at(step) - here) / step }
        };
        let own = gradient64.iter().zip(&direction).map(|(g, d)| g * d).sum();
        measured.push(slope(&mut sides, own, rounding));
        exact.push(own);
    }
    Ok(GradientCheck {
        gradient_rel_err: slope_error(&exact, &measured, floor),
        gradient_noise: relative_error(&gradient32, &gradient64),
        output_noise: relative_error(&output32, &output64),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(f: impl Fn(f64) -> f64, exact: f64) -> f64 {
        let mut sides = |h: f64| Sides { left: (f(0.0) - f(-h)) / h, right: (f(h) - f(0.0)) / h };
        slope(&mut sides, exact, 4.0 * f64::EPSILON * f(0.0).abs())
    }

    #[test]
    fn a_kink_at_the_point_counts_as_the_nearer_side_and_hides_no_wrong_slope() {
        let bend = |x: f64| 3.0 * x + 2.0 * (x - 1e-13).max(0.0);
        assert!((measured(bend, 3.0) - 3.0).abs() < 1e-6);
        assert!((measured(bend, 5.0) - 5.0).abs() < 1e-3);
        // Half-way is the slope of neither side, and neither is anything else.
        assert!((measured(bend, 4.0) - 4.0).abs() > 0.9);
        assert!((measured(bend, 7.0) - 5.0).abs() < 1e-3);
        // A kink between the steps is stepped over, a smooth bend is none.
        let far = |x: f64| 3.0 * x + 2.0 * (x - 1e-7).max(0.0);
        assert!((measured(far, 3.0) - 3.0).abs() < 1e-6);
        let smooth = |x: f64| 1.0 + 3.0 * x + 1e4 * x * x;
        assert!((measured(smooth, 2.0) - 3.0).abs() < 1e-5);
    }
}
