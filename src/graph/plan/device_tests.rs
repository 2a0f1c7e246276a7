//! Whole plans on the emulated device against the processor's: outputs, statistics and gradients. The yardstick is the
//! processor's own distance between `f32` and `f64`: two right programs differ by as much.

use std::path::{Path, PathBuf};

use candle_onnx::onnx::{ModelProto, TensorProto};
use prost::Message;

use super::*;
use crate::graph::ir::{Dimension, Graph};
use crate::graph::plan::Gradient;
use crate::graph::{CompileOptions, Taps};
use crate::onnx;
use crate::tensor::RngStream;
use crate::tensor::cuda::emulation;
use crate::tensor::kernels::Element;

fn options(graph: &Graph, batch: usize, taps: Taps) -> CompileOptions {
    let port = &graph.inputs[0];
    let dims = port.shape.as_ref().unwrap().iter().enumerate();
    let input_shape = dims
        .map(|(axis, dim)| match dim {
            Dimension::Fixed(size) if axis > 0 => *size,
            Dimension::Fixed(size) if *size > 1 => *size,
            Dimension::Symbol(_) if axis > 1 => 32,
            _ => batch,
        })
        .collect();
    CompileOptions {
        input: port.name.clone(),
        input_shape,
        output: graph.outputs[0].name.clone(),
        gradient: Gradient::Wanted,
        taps,
    }
}

/// A linear objective on output and statistics.
struct Weights {
    output: Vec<f32>,
    taps: Vec<[Vec<f32>; 2]>,
}

/// What came of a plan: output, statistics, gradient.
type Found = [Vec<f64>; 3];

fn on_processor<T: Element>(plan: &Plan<T>, x: &[f32], weights: &Weights) -> Found {
    let cast = |values: &[f32]| values.iter().map(|&v| T::of(f64::from(v))).collect::<Vec<T>>();
    let wide = |values: &[T]| values.iter().map(|v| v.f64()).collect::<Vec<f64>>();
    let mut workspace = plan.workspace();
    let output = wide(plan.forward(&mut workspace, &cast(x)));
    let seen = plan.taps(&workspace).flat_map(|tap| [wide(tap.mean), wide(tap.var)].concat());
    let seen = seen.collect();
    for (tap, [mean, var]) in weights.taps.iter().enumerate() {
        plan.set_tap_gradient(&mut workspace, tap, &cast(mean), &cast(var));
    }
    let gradient = wide(plan.backward(&mut workspace, &cast(&weights.output)));
    [output, seen, gradient]
}

fn on_device(plan: &DevicePlan, x: &[f32], weights: &Weights) -> Found {
    let wide = |view: View| -> Vec<f64> {
        view.read(plan.device()).unwrap().into_iter().map(f64::from).collect()
    };
    plan.input().write(plan.device(), x).unwrap();
    plan.forward().unwrap();
    let output = wide(plan.output());
    let taps = 0..weights.taps.len();
    let seen = taps.flat_map(|tap| plan.seen(tap)).flat_map(wide).collect();
    plan.output_gradient().write(plan.device(), &weights.output).unwrap();
    for (tap, pair) in weights.taps.iter().enumerate() {
        for (view, values) in plan.objective.gradient(tap).iter().zip(pair) {
            view.write(plan.device(), values).unwrap();
        }
    }
    plan.backward(true).unwrap();
    [output, seen, wide(plan.input_gradient())]
}

/// `||a - b|| / ||b||`.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let gap = square(&mut a.iter().zip(b).map(|(a, b)| a - b));
    if gap == 0.0 { 0.0 } else { gap / square(&mut b.iter().copied()).max(1e-30) }
}

/// Compares one graph; the names of the nodes that are not on the device come back as the error.
pub(super) fn compare(name: &str, graph: &Graph, batch: usize, taps: Taps) -> Result<()> {
    match emulation::open() {
        Some(device) => compare_on(&(device as Arc<dyn Device>), name, graph, batch, taps),
        None => Ok(()),
    }
}

fn compare_on(
    device: &Arc<dyn Device>,
    name: &str,
    graph: &Graph,
    batch: usize,
    taps: Taps,
) -> Result<()> {
    let options = options(graph, batch, taps);
    let single = Plan::<f32>::compile(graph, &options)?;
    let on = DevicePlan::new(&single, device, None)?;
    let double = Plan::<f64>::compile(graph, &options)?;
    let mut rng = RngStream::new(7, "device", name, 0);
    let x: Vec<f32> = rng.normals(options.input_shape.iter().product());
    let mut draw = |n: usize| rng.normals(n);
    let weights = Weights {
        output: draw(single.output_shape().iter().product()),
        taps: single
            .taps(&single.workspace())
            .map(|tap| [draw(tap.reference.mean.len()), draw(tap.reference.var.len())])
            .collect(),
    };
    let exact = on_processor(&double, &x, &weights);
    let ours = on_processor(&single, &x, &weights);
    // Twice: nothing of the first run may stay.
    on_device(&on, &x, &weights);
    let found = on_device(&on, &x, &weights);
    for (what, part) in ["output", "statistics", "gradient"].iter().zip(0..3) {
        let [theirs, rounding] = [&found, &ours].map(|f| distance(&f[part], &exact[part]));
        println!("{name}: {what} {theirs:.1e} from f64, the processor {rounding:.1e}");
        // Kinks that one of the two crosses: both are rare, neither is wrong.
        let allowed =
            if *what == "gradient" { 10.0 * rounding + 1e-4 } else { 4.0 * rounding + 2e-6 };
        assert!(
            theirs <= allowed,
            "{name}: {what} is {theirs:.1e} from f64, allowed {allowed:.1e}"
        );
    }
    Ok(())
}

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn plans_of_the_bundled_zoo_are_those_of_the_processor() {
    if let Some(device) = emulation::open() {
        bundled_zoo(&(device as Arc<dyn Device>));
    }
}

/// On a card, where the feature and one are there.
#[cfg(feature = "cuda")]
#[test]
fn gpu_plans_of_the_bundled_zoo_are_those_of_the_processor() {
    use crate::tensor::cuda::driver::Card;
    match Card::open(0, crate::tensor::device::Products::Single) {
        Ok(card) => {
            println!("on {}", card.describe());
            bundled_zoo(&(card as Arc<dyn Device>));
        }
        Err(error) => eprintln!("SKIPPED: no GPU: {error:#}"),
    }
}

fn bundled_zoo(device: &Arc<dyn Device>) {
    let zoo = repository().join("zoo");
    let mut names: Vec<PathBuf> = std::fs::read_dir(&zoo)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "onnx"))
        .collect();
    names.sort();
    assert!(names.len() > 8);
    for path in names {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let model = onnx::load(&path, &zoo).unwrap();
        match compare_on(device, &name, &model.graph, 3, Taps::Norms) {
            Ok(()) => {
                assert!(!name.contains("int8_qdq"), "quantised networks are on the device now")
            }
            Err(error) => {
                assert!(name.contains("int8_qdq"), "{name}: {error}");
                let text = format!("{error:#}");
                assert!(text.contains("node `") && text.contains("is not on CUDA yet"), "{text}");
            }
        }
    }
}

/// What a tensor without weights says it should hold.
#[derive(serde::Deserialize)]
struct Rule {
    hydrate: String,
    mean: f32,
    std: f32,
}

/// A graph of the shared architectures, its weights random.
fn hydrated(path: &Path) -> Graph {
    let mut model = ModelProto::decode(std::fs::read(path).unwrap().as_slice()).unwrap();
    for tensor in &mut model.graph.as_mut().unwrap().initializer {
        let Ok(rule) = serde_json::from_str::<Rule>(&tensor.doc_string) else { continue };
        let count = tensor.dims.iter().product::<i64>() as usize;
        let mut rng = RngStream::new(1, "hydrate", &tensor.name, 0);
        let value = |n: f32| {
            let value = n * rule.std + rule.mean;
            if rule.hydrate == "positive" { value.abs().max(0.1 * rule.mean) } else { value }
        };
        let raw_data = rng.normals(count).into_iter().map(value).flat_map(f32::to_le_bytes);
        *tensor =
            TensorProto { raw_data: raw_data.collect(), float_data: Vec::new(), ..tensor.clone() };
    }
    let bytes = model.encode_to_vec();
    onnx::load_bytes(&bytes, onnx::ExternalData::Refused).unwrap().graph
}

#[test]
fn plans_of_real_architectures_are_those_of_the_processor() {
    let folder = repository().join("../shared/fixtures/architectures");
    let Ok(entries) = std::fs::read_dir(&folder) else {
        eprintln!("SKIPPED: no {}", folder.display());
        return;
    };
    let wanted = std::env::var("METAZOA_DEVICE_ARCHITECTURES").unwrap_or_default();
    // The others take minutes: by name in the variable.
    let small = ["resnet18c.", "conv4.", "vit_tiny."];
    let mut missing = Vec::new();
    for entry in entries {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let is_taken = match wanted.as_str() {
            "" => small.iter().any(|s| name.starts_with(s)) && name.ends_with("ts_keepbn"),
            "all" => true,
            text => name.contains(text),
        };
        if path.extension().is_none_or(|e| e != "onnx") || !is_taken {
            continue;
        }
        if let Err(error) = compare(&name, &hydrated(&path), 1, Taps::Norms) {
            missing.push(format!("{name}: {error:#}"));
        }
    }
    println!("not on the device:\n{}", missing.join("\n"));
    assert!(wanted == "all" || missing.is_empty(), "{missing:?}");
}
