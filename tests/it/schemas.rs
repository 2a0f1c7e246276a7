//! `schemas/` holds what the Rust types say.

use metazoa::app::schemas;

use crate::support::repository;

/// `UPDATE_SCHEMAS=1` rewrites the files instead of comparing.
#[test]
fn schemas_are_current() {
    let folder = repository().join("schemas");
    let update = std::env::var_os("UPDATE_SCHEMAS").is_some_and(|value| value == "1");
    let mut expected = Vec::new();
    for (name, schema) in schemas::all() {
        let path = folder.join(format!("{name}.schema.json"));
        let text = schemas::to_text(&schema).unwrap();
        if update {
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(&path, &text).unwrap();
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            found == text,
            "{} is not current: run the test with UPDATE_SCHEMAS=1",
            path.display()
        );
        jsonschema::validator_for(schema.as_value()).unwrap();
        expected.push(format!("{name}.schema.json"));
    }
    let mut there: Vec<String> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".schema.json"))
        .collect();
    there.sort();
    expected.sort();
    assert_eq!(there, expected);
}
