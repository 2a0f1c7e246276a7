//! The official ONNX backend tests of single operators: forward on constants, forward and gradient
//! with each float input in turn computed from the image.
//!
//! The cases come from the PyPI package `onnx` (its wheel is fetched by `cargo xtask test` and read as
//! it is). What passes and what is refused is `nodes.txt`; `UPDATE_NODES=1` writes it anew.

mod cases;
mod families;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use metazoa::graph::check::check_gradient;
use metazoa::graph::{
    CompileOptions, ConstantTensor, Dimension, Gradient, Graph, Plan, Port, Taps, evaluate,
};
use metazoa::tensor::RngStream;
use metazoa::tensor::kernels::Element;
use rayon::prelude::*;

use crate::support::repository;
use cases::Case;

/// What came of a case.
#[derive(Debug)]
enum Verdict {
    /// Right, with so many inputs differentiated.
    Passed(usize),
    Refused(String),
    Failed(String),
}

/// The largest difference in units of the tolerance of the official runner (1e-3 relative, 1e-7
/// absolute); half precision has its own.
fn furthest(found: &[f64], expected: &ConstantTensor) -> f64 {
    use metazoa::graph::DataType;
    let (relative, absolute) = match expected.dtype {
        DataType::Float16 => (2e-3, 2e-3),
        DataType::BFloat16 => (2e-2, 2e-2),
        dtype if dtype.is_float() => (1e-3, 1e-6),
        _ => (0.0, 0.5),
    };
    let off = |(&a, &b): (&f64, &f64)| {
        if a == b || (a.is_nan() && b.is_nan()) {
            return 0.0;
        }
        // What overflows half precision there is a large number here.
        if b.is_infinite() && a.abs() > 6e4 && a.signum() == b.signum() {
            return 0.0;
        }
        (a - b).abs() / (absolute + relative * b.abs())
    };
    // `f64::max` would drop a NaN.
    let off = |pair| Some(off(pair)).filter(|off: &f64| !off.is_nan()).unwrap_or(f64::INFINITY);
    found.iter().zip(&expected.to_f64()).map(off).fold(0.0, f64::max)
}

fn compare(
    what: &str,
    shape: &[usize],
    found: &[f64],
    expected: &ConstantTensor,
) -> Result<(), String> {
    if shape != expected.shape {
        return Err(format!("{what}: shape {shape:?}, expected {:?}", expected.shape));
    }
    let off = furthest(found, expected);
    if off > 1.0 {
        let shown = |v: &[f64]| format!("{:.4?}", &v[..v.len().min(6)]);
        let (found, wanted) = (shown(found), shown(&expected.to_f64()));
        return Err(format!("{what}: off by {off:.1} tolerances: {found}, expected {wanted}"));
    }
    Ok(())
}

/// `graph` with constant `name` turned into an input, and its values.
fn fed(graph: &Graph, name: &str) -> (Graph, Arc<ConstantTensor>) {
    let mut graph = graph.clone();
    let tensor = graph.constants.remove(name).unwrap();
    let shape = tensor.shape.iter().map(|&d| Dimension::Fixed(d)).collect();
    graph.inputs = vec![Port { name: name.into(), dtype: tensor.dtype, shape: Some(shape) }];
    (graph, tensor)
}

fn forward<T: Element>(
    graph: &Graph,
    options: &CompileOptions,
    x: &[f64],
) -> metazoa::Result<(Vec<usize>, Vec<f64>)> {
    let plan = Plan::<T>::compile(graph, options)?;
    let x: Vec<T> = x.iter().map(|&v| T::of(v)).collect();
    let found = plan.forward(&mut plan.workspace(), &x).iter().map(|v| v.f64()).collect();
    Ok((plan.output_shape().to_vec(), found))
}

/// Runs `output` with the image at input `name`, and differentiates it where it has a gradient.
fn with_live_input(
    case: &Case,
    name: &str,
    output: &str,
    expected: &ConstantTensor,
) -> Result<bool, Verdict> {
    let (graph, tensor) = fed(&case.graph, name);
    let mut options = CompileOptions {
        input: name.into(),
        input_shape: tensor.shape.clone(),
        output: output.into(),
        gradient: Gradient::Unused,
        taps: Taps::Norms,
    };
    let x = tensor.to_f64();
    let run = if case.rounds { forward::<f32> } else { forward::<f64> };
    let (shape, found) = run(&graph, &options, &x)
        .map_err(|error| Verdict::Refused(format!("live `{name}`: {error}")))?;
    compare(&format!("live `{name}`"), &shape, &found, expected).map_err(Verdict::Failed)?;
    options.gradient = Gradient::Wanted;
    let finite = |values: &[f64]| values.iter().all(|v| v.abs() < 1e30);
    if case.measures_range
        || x.is_empty()
        || found.is_empty()
        || !finite(&x)
        || !finite(&found)
        || Plan::<f64>::compile(&graph, &options).is_err()
    {
        return Ok(false);
    }
    // Off the corners (the official inputs like whole numbers and equal values), away from zero: many
    // domains end there.
    let mut rng = RngStream::new(11, "node-tests", name, 0);
    let away = |(&x, n): (&f64, f32)| {
        let step = 1e-3 * f64::from(n.abs()) * (1.0 + x.abs());
        (if x < 0.0 { x - step } else { x + step }) as f32
    };
    let moved: Vec<f32> = x.iter().zip(rng.normals(x.len())).map(away).collect();
    if moved.iter().any(|v| !v.is_finite()) {
        return Ok(false);
    }
    let check = check_gradient(&graph, &options, &moved, 3)
        .map_err(|error| Verdict::Failed(format!("gradient to `{name}`: {error}")))?;
    if check.gradient_rel_err.is_nan() || check.gradient_rel_err > 1e-4 {
        return Err(Verdict::Failed(format!("gradient to `{name}`: {check:?}, at {moved:.4?}")));
    }
    Ok(true)
}

/// Why input 0 may have to be a constant.
const FINE: [&str; 3] = ["does not depend on", "(Range): input", "trip count depends"];

fn run(case: &Case) -> Verdict {
    // The official results are those of single precision: where they are rounded, so are ours.
    let rounds = case.rounds;
    let evaluated =
        if rounds { evaluate::<f32>(&case.graph) } else { evaluate::<f64>(&case.graph) };
    let found = match evaluated {
        Ok(found) => found,
        Err(error) => return Verdict::Refused(error.to_string()),
    };
    for ((port, found), expected) in case.graph.outputs.iter().zip(&found).zip(&case.outputs) {
        let what = format!("output `{}`", port.name);
        if let Err(text) = compare(&what, &found.shape, &found.to_f64(), expected) {
            return Verdict::Failed(text);
        }
    }
    let mut differentiated = 0;
    for (index, name) in case.inputs.iter().enumerate() {
        let is_float = case.graph.constants.get(name).is_some_and(|t| t.dtype.is_float());
        if !is_float {
            continue;
        }
        let mut smooth = false;
        for (port, expected) in case.graph.outputs.iter().zip(&case.outputs) {
            match with_live_input(case, name, &port.name, expected) {
                Ok(has_gradient) => smooth |= has_gradient,
                // Weights and the like may have to be constants; the image never.
                Err(Verdict::Refused(text))
                    if index == 0 && !FINE.iter().any(|part| text.contains(part)) =>
                {
                    return Verdict::Refused(text);
                }
                Err(Verdict::Refused(_)) => {}
                Err(other) => return other,
            }
        }
        differentiated += usize::from(smooth);
    }
    Verdict::Passed(differentiated)
}

#[test]
fn the_official_operator_tests_pass_or_are_refused_for_a_reason() {
    let Some(cases) = cases::read() else { return };
    let verdicts: BTreeMap<String, (String, bool)> = cases
        .par_iter()
        .map(|(name, read)| {
            let reason = families::by_design(name, &read.operators);
            let verdict = match &read.case {
                Ok(case) => run(case),
                Err(text) => Verdict::Refused(text.clone()),
            };
            let (line, fine) = match (verdict, reason) {
                (Verdict::Passed(gradients), _) => (format!("passed, {gradients} gradients"), true),
                (_, Some(reason)) => (format!("by design: {reason}"), true),
                (Verdict::Refused(text), None) => (format!("refused: {text}"), true),
                (Verdict::Failed(text), None) => (format!("FAILED: {text}"), false),
            };
            (name.clone(), (line, fine))
        })
        .collect();
    let count = |start: &str| verdicts.values().filter(|(v, _)| v.starts_with(start)).count();
    let (passed, by_design) = (count("passed"), count("by design"));
    let applicable = verdicts.len() - by_design;
    let mut list = format!(
        "# {passed} passed of {applicable} applicable; {by_design} of {} refused by design\n",
        verdicts.len()
    );
    for (name, (line, _)) in &verdicts {
        writeln!(list, "{name}: {line}").unwrap();
    }
    eprint!("{}", list.lines().next().unwrap_or_default());
    let path = repository().join("tests/it/nodes.txt");
    if std::env::var_os("UPDATE_NODES").is_some() {
        std::fs::write(&path, &list).unwrap();
    }
    let failed: Vec<String> = verdicts
        .iter()
        .filter(|(_, (_, fine))| !fine)
        .map(|(name, (line, _))| format!("{name}: {line}"))
        .collect();
    assert!(failed.is_empty(), "{} wrong:\n{}", failed.len(), failed.join("\n"));
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(list == committed, "tests/it/nodes.txt is not current; UPDATE_NODES=1 writes it");
}

#[test]
fn a_wrong_value_or_shape_is_seen() {
    let expected = ConstantTensor::f32([2], vec![1.0, 2.0]);
    assert!(compare("y", &[2], &[1.0, 2.0], &expected).is_ok());
    assert!(compare("y", &[2], &[1.0, 2.01], &expected).is_err());
    assert!(compare("y", &[2], &[1.0, f64::NAN], &expected).is_err());
    assert!(compare("y", &[1, 2], &[1.0, 2.0], &expected).is_err());
}
