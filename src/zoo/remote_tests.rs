//! Served models: what the server's description and the sidecar add up to.

use super::super::{candidates, walk};
use super::*;

fn candidate(yaml: &str) -> RemoteCandidate {
    let zoo = tempfile::tempdir().unwrap();
    std::fs::write(zoo.path().join("m.yaml"), yaml).unwrap();
    let mut found = candidates::pair(walk::walk(zoo.path()).unwrap());
    assert_eq!(found.rejected, []);
    found.remotes.remove(0)
}

fn tensor(name: &str, datatype: &str, shape: &[i64]) -> ServedTensor {
    ServedTensor { name: name.into(), datatype: datatype.into(), shape: shape.to_vec() }
}

fn served(inputs: &[ServedTensor], outputs: &[ServedTensor]) -> ServedModel {
    ServedModel {
        name: "m".into(),
        platform: "onnxruntime_onnx".into(),
        inputs: inputs.to_vec(),
        outputs: outputs.to_vec(),
    }
}

const PLAIN: &str = "schema_version: 1\nendpoint: {url: 'http://localhost:1'}\n";

#[test]
fn the_server_says_what_a_file_would() {
    let image = tensor("image", "FP32", &[-1, 3, 32, 40]);
    let scores = tensor("scores", "FP32", &[-1, 7]);
    let model =
        describe(&candidate(PLAIN), &served(&[image], &[scores, tensor("label", "INT64", &[-1])]));
    let spec = model.unwrap().spec;
    assert_eq!((spec.access, spec.classes, spec.batch), (Access::Remote, 7, BatchDimension::Free));
    assert_eq!(spec.preprocess.input_size, [3, 32, 40]);
    assert_eq!((spec.input_name.as_str(), spec.logits_output.as_str()), ("image", "scores"));
    assert_eq!(spec.endpoint.unwrap().model_name.as_deref(), Some("m"));
}

#[test]
fn channels_last_bytes_and_fixed_batches_are_read_off_the_shape() {
    let image = tensor("image", "UINT8", &[8, 28, 28, 1]);
    let spec = describe(&candidate(PLAIN), &served(&[image], &[tensor("y", "FP32", &[8, 10])]));
    let spec = spec.unwrap().spec;
    assert_eq!(spec.preprocess.layout, Layout::Nhwc);
    assert_eq!(spec.preprocess.dtype, ElementType::Uint8);
    assert_eq!((spec.batch, spec.preprocess.input_size), (BatchDimension::Fixed(8), [1, 28, 28]));
}

#[test]
fn labels_need_the_names_of_the_classes() {
    let image = tensor("image", "FP32", &[-1, 3, 32, 32]);
    let label = tensor("label", "INT64", &[-1]);
    let model = served(&[image], &[label]);
    let error = describe(&candidate(PLAIN), &model).unwrap_err();
    assert!(error.hint_text().unwrap().contains("id2label"), "{error}");
    let named = format!("{PLAIN}id2label: {{0: a, 1: b, 2: c}}\n");
    let spec = describe(&candidate(&named), &model).unwrap().spec;
    assert_eq!((spec.output_kind, spec.classes), (OutputKind::Labels, 3));
}

#[test]
fn what_server_and_sidecar_cannot_agree_on_is_refused_by_name() {
    let image = || tensor("image", "FP32", &[-1, 3, 32, 32]);
    let scores = || tensor("y", "FP32", &[-1, 5]);
    let refuse = |yaml: &str, model: &ServedModel, word: &str| {
        let error = describe(&candidate(yaml), model).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    };
    let good = served(&[image()], &[scores()]);
    refuse(&format!("{PLAIN}access: white-box\n"), &good, "white-box");
    refuse(&format!("{PLAIN}id2label: {{0: a, 1: b}}\n"), &good, "contradicts");
    refuse(&format!("{PLAIN}logits_output: z\n"), &good, "`logits_output`");
    refuse(&format!("{PLAIN}preprocess: {{input_size: [3, 84, 84]}}\n"), &good, "input_size");
    refuse(PLAIN, &served(&[], &[scores()]), "does not say what");
    refuse(PLAIN, &served(&[image(), image()], &[scores()]), "more inputs");
    refuse(PLAIN, &served(&[tensor("t", "BYTES", &[-1])], &[scores()]), "BYTES");
    refuse(PLAIN, &served(&[image()], &[scores(), tensor("z", "FP32", &[-1, 9])]), "which output");
}

#[test]
fn the_identity_follows_the_model_and_not_the_address() {
    let model =
        served(&[tensor("image", "FP32", &[-1, 3, 32, 32])], &[tensor("y", "FP32", &[-1, 5])]);
    let sha = |yaml: &str| describe(&candidate(yaml), &model).unwrap().spec.sha;
    let moved = PLAIN.replace("localhost:1", "localhost:2");
    assert_eq!(sha(PLAIN), sha(&moved));
    let newer = PLAIN.replace("'}", "', model_version: '2'}");
    assert_ne!(sha(PLAIN), sha(&newer));
}
