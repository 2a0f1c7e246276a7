//! Real architectures, exported in four ways, with random weights: against ONNX Runtime and against
//! central differences. The small ones always; all of them with `METAZOA_ARCHITECTURES=all`, which
//! writes the table `docs/architectures.md` (twenty minutes on two cores); those of one architecture
//! with its name.

use std::collections::BTreeMap;
use std::path::Path;

use candle_onnx::onnx::{ModelProto, TensorProto};
use metazoa::app::Context;
use metazoa::app::inspect::{GradientChecking, InspectOptions, InspectResult, inspect};
use metazoa::tensor::RngStream;
use metazoa::zoo::Access;
use prost::Message;

use crate::support::{repository, runtime_options, shared, temp_dir};

/// What a tensor without weights says it should hold.
#[derive(serde::Deserialize)]
struct Rule {
    hydrate: String,
    mean: f32,
    std: f32,
}

/// Fills the tensors of the file whose weights were taken out, each from its own stream.
fn hydrated(path: &Path, seed: u64) -> ModelProto {
    let bytes = std::fs::read(path).unwrap();
    let mut model = ModelProto::decode(bytes.as_slice()).unwrap();
    for tensor in &mut model.graph.as_mut().unwrap().initializer {
        let Ok(rule) = serde_json::from_str::<Rule>(&tensor.doc_string) else { continue };
        let count = tensor.dims.iter().product::<i64>() as usize;
        let mut rng = RngStream::new(seed, "hydrate", &tensor.name, 0);
        let value = |n: f32| {
            let value = n * rule.std + rule.mean;
            if rule.hydrate == "positive" { value.abs().max(0.1 * rule.mean) } else { value }
        };
        let values = rng.normals(count).into_iter().map(value);
        let raw_data = values.flat_map(f32::to_le_bytes).collect();
        *tensor = TensorProto { raw_data, float_data: Vec::new(), ..tensor.clone() };
    }
    model
}

fn row(name: &str, found: &InspectResult) -> String {
    let (architecture, export) = name.split_once('.').unwrap_or((name, ""));
    let figure = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.1e}"));
    let whole = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.0}"));
    let size = found.model.spec.preprocess.input_size[1];
    format!(
        "| {architecture} | {export} | {size} | {} | {} | {} | {} | {} | {} | {} | {} |\n",
        figure(found.output_rel_err),
        figure(found.output_noise),
        figure(found.gradient_rel_err),
        figure(found.gradient_noise),
        found.norm_taps,
        whole(found.compile_ms),
        whole(found.runtime_open_ms),
        whole(found.peak_mib),
    )
}

/// Weights of the network behind a file.
fn weights(path: &Path) -> i64 {
    let model = ModelProto::decode(std::fs::read(path).unwrap().as_slice()).unwrap();
    let tensors = model.graph.iter().flat_map(|graph| &graph.initializer);
    tensors.map(|tensor| tensor.dims.iter().product::<i64>()).sum()
}

const HEAD: &str = "\
# Architectures

Real graphs of ../shared/fixtures/architectures with random weights, white-box. Errors are relative norms:
the output (log-softmax) against ONNX Runtime; the gradient in f64 against central differences; beside
each the network's own distance between f32 and f64 (rounding; for the gradient the kinks of ReLU: two right
programs differ as much). Times and memory are for reading the file and compiling it for one image (two below 65 pixels), on
two busy cores: read them as ratios.

`METAZOA_ARCHITECTURES=all cargo xtask test --test it architectures` writes this table.

Random weights may amplify rounding. With those of hydrate.py, ONNX Runtime's own output of efficientnet_b0.dyn moves by 1.5e-6 to
8.3e-3, depending on the seed, when every pixel moves by a relative 1e-7
(`tests/python/conditioning.py ../shared/fixtures/architectures/efficientnet_b0.dyn.onnx`); f32 output noise shows the same of
the weights used here. The heads of tv_vit are zero at the start of training, so their output has no rounding.

Families that are not in that folder: `tests/python/families.py target/debug/metazoa OUT --export ts` (and `dyn`) exports the smallest
member of each family of timm and torchvision and inspects it. 2026-11-22: 51 TorchScript and 45 dynamo exports up to 70 MB, all white-box, outputs within
1.3e-6 of ONNX Runtime, gradients within 6.7e-5 of f64 central differences; PyTorch itself could not export one (halonet).

| architecture | export | size | output error | f32 output noise | gradient error | f32 gradient noise | BN taps | compile ms | ONNX Runtime opens ms | peak MiB |
|---|---|---|---|---|---|---|---|---|---|---|
";

#[test]
fn architectures_run_and_differentiate_as_onnx_runtime_says() {
    let Some(folder) = shared("fixtures/architectures") else { return };
    let wanted = std::env::var("METAZOA_ARCHITECTURES").unwrap_or_default();
    let mut names: Vec<String> = std::fs::read_dir(folder.as_path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter_map(|name| name.strip_suffix(".onnx").map(str::to_owned))
        .filter(|name| match wanted.as_str() {
            "" => name.starts_with("conv4.") || name.starts_with("tv_vit."),
            "all" => true,
            part => name.contains(part),
        })
        .collect();
    assert!(!names.is_empty(), "{names:?}");
    // The small ones first: a long run may be cut short.
    names.sort_by_cached_key(|name| weights(&folder.join(format!("{name}.onnx"))));
    let scratch = temp_dir();
    let mut rows = BTreeMap::new();
    let mut wrong = Vec::new();
    for name in &names {
        let model = scratch.path().join(format!("{name}.onnx"));
        std::fs::write(&model, hydrated(&folder.join(format!("{name}.onnx")), 0).encode_to_vec())
            .unwrap();
        let options = InspectOptions {
            model: model.clone(),
            gradient: GradientChecking::Check,
            runtime: runtime_options(),
            probe: None, // Files of our own making.
        };
        match inspect(&Context::silent(3), &options) {
            Ok(found) => {
                eprint!("{}", row(name, &found));
                rows.insert(name.clone(), row(name, &found));
                let output = found.output_rel_err.unwrap_or(f64::NAN);
                let gradient = found.gradient_rel_err.unwrap_or(f64::NAN);
                // Random weights amplify rounding: two right programs differ as f32 and f64 do.
                let rounding = found.output_noise.unwrap_or(0.0);
                let right = found.access == Access::WhiteBox
                    && output < 1e-4_f64.max(10.0 * rounding)
                    && gradient < 1e-4;
                if !right {
                    wrong.push(format!("{name}: output {output:.1e}, gradient {gradient:.1e}"));
                }
            }
            Err(error) => wrong.push(format!("{name}: {error}")),
        }
        std::fs::remove_file(&model).unwrap();
        if wanted == "all" {
            let table: String = rows.values().map(String::as_str).collect();
            let path = repository().join("docs/architectures.md");
            std::fs::write(path, format!("{HEAD}{table}")).unwrap();
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
