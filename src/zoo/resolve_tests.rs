use super::*;
use crate::zoo::facts::output::Certainty;

fn input() -> InputFacts {
    InputFacts {
        name: "input".into(),
        layout: Some(Layout::Nchw),
        dtype: ElementType::Float32,
        channels: Some(3),
        height: Some(32),
        width: Some(32),
        batch: BatchDimension::Free,
        value_range: None,
        normalised_inside: Normalised::Outside,
        color: None,
    }
}

fn output() -> OutputFacts {
    OutputFacts {
        name: "logits".into(),
        classes: 5,
        kind: OutputKind::Logits,
        certainty: Certainty::Proven,
        alternatives: Vec::new(),
        scores_behind: None,
    }
}

fn identity() -> Identity {
    Identity {
        external_files: vec![],
        id: "a".into(),
        path: "zoo/a.onnx".into(),
        file_sha: "ab".repeat(32),
        sha: "cd".repeat(32),
    }
}

fn merge(input: &InputFacts, output: &OutputFacts, sidecar: &str) -> Result<Resolved> {
    let text = format!("schema_version: 1\n{sidecar}\n");
    let content = Sidecar::parse(&text, std::path::Path::new("a.yaml")).unwrap();
    let found = FoundSidecar { relative: "a.yaml".into(), content };
    resolve(identity(), input, output, Some(&found))
}

#[test]
fn without_a_sidecar_every_value_says_where_it_comes_from() {
    let resolved = resolve(identity(), &input(), &output(), None).unwrap();
    let expected = [
        ("batch", Provenance::File),
        ("classes", Provenance::File),
        ("input_name", Provenance::File),
        ("logits_output", Provenance::Inferred),
        ("output_kind", Provenance::Inferred),
        ("preprocess.color", Provenance::Default),
        ("preprocess.crop_pct", Provenance::Default),
        ("preprocess.dtype", Provenance::File),
        ("preprocess.input_size", Provenance::File),
        ("preprocess.layout", Provenance::Inferred),
        ("preprocess.mean", Provenance::Default),
        ("preprocess.std", Provenance::Default),
        ("preprocess.value_range", Provenance::Default),
    ];
    let found: Vec<_> = resolved.provenance.iter().map(|(k, v)| (k.as_str(), *v)).collect();
    assert_eq!(found, expected);
    assert!(resolved.notes[0].contains("normalisation unknown"));
    assert_eq!(resolved.spec.preprocess.mean, [0.0; 3]);
    assert_eq!(resolved.spec.preprocess.std, [1.0; 3]);
}

#[test]
fn contradictions_name_key_file_expected_and_found() {
    let cases = [
        ("preprocess: {input_size: [3, 64, 64]}", "expected [3, 32, 32], found `[3, 64, 64]`"),
        ("preprocess: {layout: nhwc}", "expected \"nchw\", found `\"nhwc\"`"),
        ("preprocess: {dtype: uint8}", "expected \"float32\", found `\"uint8\"`"),
        ("preprocess: {color: grey}", "expected rgb or bgr (3 channels), found `grey`"),
        ("id2label: {0: a, 1: b}", "expected 5 labels (output `logits`), found `2`"),
        ("output_kind: probabilities", "expected \"logits\", found `\"probabilities\"`"),
        (
            "model_sha: 0000000000000000000000000000000000000000000000000000000000000000",
            "expected abab",
        ),
    ];
    for (sidecar, expected) in cases {
        let error = merge(&input(), &output(), sidecar).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("of `a.yaml` contradicts the model"), "{sidecar}: {message}");
        assert!(message.contains(expected), "{sidecar}: {message}");
        assert!(error.hint_text().is_some(), "{sidecar}");
        assert_eq!(error.exit_code(), 1);
    }
}

#[test]
fn the_sidecar_fills_what_the_file_leaves_open() {
    let open = InputFacts { layout: None, channels: None, height: None, width: None, ..input() };
    let sidecar =
        "preprocess: {input_size: [1, 28, 28], layout: nhwc, color: grey, mean: [0.5], std: [0.5]}";
    let preprocess = merge(&open, &output(), sidecar).unwrap().spec.preprocess;
    assert_eq!(preprocess.input_size, [1, 28, 28]);
    assert_eq!(preprocess.layout, Layout::Nhwc);
    assert_eq!(preprocess.mean, [0.5]);

    let resolved = resolve(identity(), &open, &output(), None).unwrap();
    assert_eq!(resolved.spec.preprocess.input_size, [3, 224, 224]);
    assert_eq!(resolved.provenance["preprocess.input_size"], Provenance::Default);
    assert!(resolved.notes.iter().any(|note| note.contains("leaves the image size open")));
}

#[test]
fn one_number_stands_for_all_channels_and_a_mean_of_bytes_sets_the_range() {
    let resolved =
        merge(&input(), &output(), "preprocess: {mean: [127.5], std: [58.0, 57.0, 56.0]}").unwrap();
    let preprocess = resolved.spec.preprocess;
    assert_eq!(preprocess.mean, [127.5; 3]);
    assert_eq!(preprocess.std, [58.0, 57.0, 56.0]);
    assert_eq!(preprocess.value_range, [0.0, 255.0]);
    assert_eq!(resolved.provenance["preprocess.value_range"], Provenance::Inferred);
    let error = merge(
        &InputFacts { channels: Some(1), ..input() },
        &output(),
        "preprocess: {mean: [1, 2, 3]}",
    );
    assert!(error.unwrap_err().to_string().contains("expected 1 numbers, found `3`"));
}

#[test]
fn bytes_cannot_be_normalised_outside() {
    let bytes =
        InputFacts { dtype: ElementType::Uint8, value_range: Some([0.0, 255.0]), ..input() };
    let resolved = resolve(identity(), &bytes, &output(), None).unwrap();
    assert_eq!(resolved.spec.preprocess.value_range, [0.0, 255.0]);
    assert_eq!(resolved.notes, Vec::<String>::new());
    assert!(merge(&bytes, &output(), "preprocess: {mean: [0.5]}").is_err());
    let error = merge(&bytes, &output(), "preprocess: {value_range: [0, 1]}").unwrap_err();
    assert!(error.to_string().contains("`preprocess.value_range`"), "{error}");
}

#[test]
fn an_assumed_kind_yields_to_the_sidecar_and_is_shown_as_default() {
    let unsure = OutputFacts { certainty: Certainty::Assumed, ..output() };
    let resolved = resolve(identity(), &input(), &unsure, None).unwrap();
    assert_eq!(resolved.provenance["output_kind"], Provenance::Default);
    let resolved = merge(&input(), &unsure, "output_kind: probabilities").unwrap();
    assert_eq!(resolved.spec.output_kind, OutputKind::Probabilities);
}

#[test]
fn the_hash_may_be_the_files_own_or_the_one_with_its_data() {
    for sha in ["ab", "CD"] {
        let sidecar = format!("model_sha: '{}'", sha.repeat(32));
        assert!(merge(&input(), &output(), &sidecar).is_ok());
    }
}

#[test]
fn what_the_sidecar_says_and_we_do_differently_is_noted() {
    let notes = merge(
        &input(),
        &output(),
        "preprocess: {mean: [0.5], std: [0.5], interpolation: bicubic, crop_mode: border}",
    )
    .unwrap()
    .notes;
    assert_eq!(
        notes,
        [
            "images are resized bilinearly; the sidecar says `bicubic`",
            "images are cropped at the centre; the sidecar says `border`",
        ]
    );
}
