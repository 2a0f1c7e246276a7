//! The use-case `inspect`: everything known of one model, and how well our engine agrees with ONNX
//! Runtime and with itself on it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Context;
use super::ingest::ProbeOptions;
use super::ingest_probe::first_contact;
use super::teachers::open_white;
use crate::access::library::RuntimeOptions;
use crate::access::runtime::Runtime;
use crate::access::zero_order::{Estimator, ZeroOrder};
use crate::access::{BlackOptions, BlackTeacher, Surrogate, Teacher, WhiteTeacher};
use crate::error::{Error, Result, ResultExt};
use crate::graph::check::{check_gradient, relative_error};
use crate::tensor::{Images, RngStream};
use crate::zoo::catalog::CatalogModel;
use crate::zoo::{Access, BatchDimension, read};

/// Images in the check, where the file leaves the batch free: two small ones or a large one.
const IMAGES: usize = 2;
/// Side from which an image is large.
const LARGE: usize = 64;

/// What to inspect.
#[derive(Debug, Clone)]
pub struct InspectOptions {
    /// The file.
    pub model: PathBuf,
    /// Whether the engine is checked on it.
    pub gradient: GradientChecking,
    /// Where ONNX Runtime is looked for.
    pub runtime: RuntimeOptions,
    /// How the file meets ONNX Runtime for the first time; `None` where that is not installed.
    pub probe: Option<ProbeOptions>,
}

/// Whether the engine is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GradientChecking {
    /// Only facts.
    Skip,
    /// Output against ONNX Runtime, gradient against central differences.
    Check,
}

/// What is known; errors are `norm(a - b) / norm(b)`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct InspectResult {
    /// The file.
    pub path: PathBuf,
    /// How metazoa would reach it.
    pub access: Access,
    /// How often each operator occurs.
    pub ops: BTreeMap<String, usize>,
    /// Normalisation nodes with running statistics.
    pub norm_taps: usize,
    /// Operators our engine lacks.
    pub unsupported_ops: Vec<String>,
    /// Log-softmax of our logits against ONNX Runtime's; null when not checked.
    pub output_rel_err: Option<f64>,
    /// The network's own distance between its `f32` and its `f64` output.
    pub output_noise: Option<f64>,
    /// Exact `f64` gradient along random directions against central differences.
    pub gradient_rel_err: Option<f64>,
    /// The network's own distance between its `f32` and its `f64` gradient.
    pub gradient_noise: Option<f64>,
    /// Milliseconds to read the file and compile it for one batch.
    pub compile_ms: Option<f64>,
    /// Milliseconds ONNX Runtime takes to open the file.
    pub runtime_open_ms: Option<f64>,
    /// Mebibytes of activations and gradients of one forward and backward pass.
    pub peak_mib: Option<f64>,
    /// The catalog's entry: spec, provenance, notes.
    pub model: CatalogModel,
}

/// Inspects one file.
///
/// # Errors
/// When the file cannot be used at all; when a check is asked for and cannot be made.
pub fn inspect(context: &Context, options: &InspectOptions) -> Result<InspectResult> {
    let model = read::read_file(&options.model)?;
    let mut result = InspectResult {
        path: options.model.clone(),
        access: model.spec.access,
        ops: model.ops.clone(),
        norm_taps: model.spec.norm_taps,
        unsupported_ops: model.spec.unsupported_ops.clone(),
        output_rel_err: None,
        output_noise: None,
        gradient_rel_err: None,
        gradient_noise: None,
        compile_ms: None,
        runtime_open_ms: None,
        peak_mib: None,
        model,
    };
    if options.gradient == GradientChecking::Check {
        check(context, options, &mut result)
            .context(|| format!("cannot check model `{}`", options.model.display()))?;
    }
    Ok(result)
}

fn check(context: &Context, options: &InspectOptions, result: &mut InspectResult) -> Result<()> {
    let spec = result.model.spec.clone();
    if !spec.unsupported_ops.is_empty() {
        return Err(Error::unsupported(format!(
            "no gradient without operators `{}`",
            spec.unsupported_ops.join("`, `")
        )));
    }
    // What the sidecar forbids, it forbids here too.
    if spec.access != Access::WhiteBox {
        return Err(Error::unsupported("a black box gives no gradient to check").hint(
            "remove `access: black-box` from the sidecar, if it stands there; else `metazoa inspect` says what is missing",
        ));
    }
    let begin = Instant::now();
    let folder = options.model.parent().filter(|p| !p.as_os_str().is_empty());
    let white = open_white(&spec, folder.unwrap_or(Path::new(".")), Surrogate::Unit)?;
    result.compile_ms = Some(begin.elapsed().as_secs_f64() * 1e3);
    let n = match spec.batch {
        BatchDimension::Fixed(n) => n,
        BatchDimension::Free if spec.preprocess.input_size[1] > LARGE => 1,
        BatchDimension::Free => IMAGES,
    };
    let images = random_images(context.seed, n, &white)?;
    let input = white.adapter().forward(&images)?;
    result.peak_mib = Some(white.compile(n)?.workspace_bytes() as f64 / f64::from(1 << 20));
    let found = check_gradient(white.graph(), &white.options(n), &input, context.seed)?;
    result.gradient_rel_err = Some(found.gradient_rel_err);
    result.gradient_noise = Some(found.gradient_noise);
    result.output_noise = Some(found.output_noise);
    let ours = white.logits(&images)?;
    let asked = BlackOptions {
        zero_order: ZeroOrder {
            estimator: Estimator::Forward,
            directions: 1,
            radius: 1e-2,
            frequencies: 1,
            pack: 1,
        },
        batch: n,
    };
    let classes = spec.classes;
    if let Some(options) = &options.probe {
        first_contact(&result.model, &options.prober())?;
    }
    let runtime = Runtime::load(&options.runtime)?;
    let begin = Instant::now();
    let black = BlackTeacher::open(spec, runtime, asked)?;
    result.runtime_open_ms = Some(begin.elapsed().as_secs_f64() * 1e3);
    let reference = black.logits(&images)?;
    result.output_rel_err =
        Some(relative_error(&log_softmax(&ours, classes), &log_softmax(&reference, classes)));
    Ok(())
}

/// Random images on the 8-bit grid, at the model's own size.
fn random_images(seed: u64, n: usize, white: &WhiteTeacher) -> Result<Images> {
    let spec = white.spec();
    let [_, h, w] = spec.preprocess.input_size;
    let mut rng = RngStream::new(seed, "inspect", &spec.sha, 0);
    let data = (0..n * 3 * h * w).map(|_| rng.below(256) as f32 / 255.0).collect();
    Images::new(data, [n, 3, h, w])
}

fn log_softmax(logits: &[f32], classes: usize) -> Vec<f64> {
    let row = |row: &[f32]| {
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|&v| f64::from(v - top).exp()).sum();
        let log = f64::from(top) + sum.ln();
        row.iter().map(move |&v| f64::from(v) - log).collect::<Vec<_>>()
    };
    logits.chunks_exact(classes).flat_map(row).collect()
}
