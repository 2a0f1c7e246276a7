use super::*;

fn parse(text: &str) -> Result<Sidecar> {
    Sidecar::parse(text, Path::new("zoo/a.yaml"))
}

fn message(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

#[test]
fn only_the_version_is_needed() {
    let sidecar = parse("schema_version: 1\n").unwrap();
    assert_eq!(sidecar.preprocess(), SidecarPreprocess::default());
    assert_eq!(sidecar.id2label, None);
    assert!(message("model: a\n").contains("missing field `schema_version`"));
}

#[test]
fn a_misspelt_key_is_refused_with_the_nearest_name() {
    let error = parse("schema_version: 1\npreproces: {}\n").unwrap_err();
    assert_eq!(error.to_string(), "`zoo/a.yaml` line 2: unknown key `preproces`");
    assert!(error.hint_text().unwrap().starts_with("did you mean `preprocess`?"));
    let error = parse("schema_version: 1\npreprocess:\n  value_rang: [0, 1]\n").unwrap_err();
    assert_eq!(error.to_string(), "`zoo/a.yaml` line 3: unknown key in `preprocess` `value_rang`");
}

#[test]
fn another_version_is_refused() {
    assert_eq!(
        message("schema_version: 2\n"),
        "`zoo/a.yaml`: `schema_version` is not known, expected `1`, found `2`"
    );
}

#[test]
fn labels_may_be_numbers_and_indices_texts() {
    let sidecar = parse("schema_version: 1\nid2label: {\"0\": 7, 1: yes, 2: true}\n").unwrap();
    let labels: Vec<String> = sidecar.id2label.unwrap().into_values().collect();
    assert_eq!(labels, ["7", "yes", "true"]);
}

#[test]
fn gaps_and_doubles_in_the_labels_are_refused() {
    assert!(
        message("schema_version: 1\nid2label: {0: a, 2: b}\n").contains("2 labels from 0 to 2")
    );
    assert!(
        message("schema_version: 1\nid2label: {0: a, 0: b}\n").contains("class given twice: `0`")
    );
    assert!(message("schema_version: 1\nid2label: {-1: a}\n").contains("`-1`"));
    assert!(message("schema_version: 1\nid2label: {}\n").contains("`id2label`"));
    assert!(message("schema_version: 1\nid2label: [a, b]\n").contains("mapping from class index"));
}

#[test]
fn values_no_model_can_satisfy_are_refused() {
    let cases = [
        ("model_sha: abc", "`model_sha`"),
        ("max_batch_size: 0", "`max_batch_size`"),
        ("preprocess: {input_size: [2, 32, 32]}", "`input_size`"),
        ("preprocess: {input_size: [3, 0, 32]}", "`input_size`"),
        ("preprocess: {value_range: [1, 0]}", "`value_range`"),
        ("preprocess: {value_range: [0, .nan]}", "`value_range`"),
        ("preprocess: {std: [0.2, 0, 0.2]}", "`std`"),
        ("preprocess: {mean: [0.2, 0.2]}", "`mean`"),
        ("preprocess: {crop_pct: 0}", "`crop_pct`"),
        ("query_budget: -5", "query_budget"),
        ("preprocess: {layout: nhcw}", "unknown value"),
        ("access: whitebox", "unknown value"),
    ];
    for (line, expected) in cases {
        let text = format!("schema_version: 1\n{line}\n");
        let found = message(&text);
        assert!(found.contains(expected), "{line}: {found}");
    }
}

#[test]
fn a_yaml_bomb_is_refused_without_growing() {
    let mut text = String::from("schema_version: 1\na0: &a0 [x, x, x, x, x, x, x, x, x]\n");
    for level in 1..30 {
        let previous = format!("*a{}, ", level - 1).repeat(9);
        text += &format!("a{level}: &a{level} [{previous}]\n");
    }
    assert!(message(&text).contains("unknown key"));
    for nested in ["[", "{a: ", "- ", "? ", "!x ", "&x "] {
        let text = format!("schema_version: 1\ntags: {}", nested.repeat(100_000));
        let start = std::time::Instant::now();
        assert!(parse(&text).is_err(), "{nested}");
        assert!(start.elapsed().as_secs() < 10, "{nested}: {:?}", start.elapsed());
    }
}

#[test]
fn a_remote_model_needs_only_its_address() {
    let text = "schema_version: 1\nendpoint: {url: 'http://127.0.0.1:8000', protocol: oip-v2}\n";
    let endpoint = parse(text).unwrap().endpoint.unwrap();
    assert_eq!(endpoint.url, "http://127.0.0.1:8000");
    assert_eq!(endpoint.protocol, Some(Protocol::OipV2));
    assert!(message("schema_version: 1\nendpoint: {}\n").contains("missing field `url`"));
}
