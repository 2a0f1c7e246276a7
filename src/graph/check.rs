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
/// Two successive steps that agree this well (relative to the larger) saw no kink between them.
const AGREEMENT: f64 = 1e-6;
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

/// The limit of a central difference as its step shrinks. A step that jumps a kink (a ReLU changing
/// side) gives a slope that is of neither side, a step too small drowns in rounding: of all successive
/// pairs, the one that agrees best is taken, where `rounding`, that of the objective, over the step counts as
/// disagreement: two slopes of noise may agree by chance.
fn slope(difference: &mut impl FnMut(f64) -> f64, rounding: f64) -> f64 {
    let mut last = difference(STEPS[0]);
    if last.abs() <= rounding / STEPS[0] {
        return last;
    }
    let mut best = (f64::INFINITY, last);
    for &step in &STEPS[1..] {
        let next = difference(step);
        let gap = ((next - last).abs() + rounding / step)
            / next.abs().max(last.abs()).max(f64::MIN_POSITIVE);
        if gap < best.0 {
            best = (gap, next);
        }
        if gap <= AGREEMENT {
            break;
        }
        last = next;
    }
    best.1
}

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
    let rounding = 4.0 * f64::EPSILON * objective.value(&double, &mut workspace, &x).abs();
    let floor = rounding / STEPS[0];
    for _ in 0..DIRECTIONS[usize::from(x.len() > LARGE)] {
        let direction: Vec<f64> =
            rng.normals(x.len()).into_iter().map(|v| unit * f64::from(v)).collect();
        let mut difference = |step: f64| {
            let mut at = |step: f64| {
                let moved: Vec<f64> = x.iter().zip(&direction).map(|(x, d)| x + step * d).collect();
                objective.value(&double, &mut workspace, &moved)
            };
            (at(step) - at(-step)) / (2.0 * step)
        };
        measured.push(slope(&mut difference, rounding));
        exact.push(gradient64.iter().zip(&direction).map(|(g, d)| g * d).sum());
    }
    Ok(GradientCheck {
        gradient_rel_err: slope_error(&exact, &measured, floor),
        gradient_noise: relative_error(&gradient32, &gradient64),
        output_noise: relative_error(&output32, &output64),
    })
}
