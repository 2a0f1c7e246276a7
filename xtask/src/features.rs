//! One build of the dependencies for `cargo build` and `cargo test`.
//!
//! A dev-dependency that switches on a feature of a shared dependency makes `cargo test` compile
//! that dependency, and all that rest on it (candle: eight minutes), a second time. `cargo tree`
//! resolves both without building; the features of every crate of the build must be those of the
//! test. Where they differ, name the feature in `[dependencies]` (Cargo.toml says how).

use std::collections::BTreeMap;

use crate::tools;

/// Compares the features of the build with those of `cargo test --workspace`.
pub(crate) fn check() -> Result<(), String> {
    // What the program links; build scripts are resolved apart and are cheap.
    let build = resolve(&["--package", "metazoa", "--edges", "no-dev,no-build,no-proc-macro"])?;
    let test = resolve(&["--workspace", "--edges", "no-build,no-proc-macro"])?;
    let differing: Vec<String> = build
        .iter()
        .filter(|(name, features)| test.get(*name) != Some(*features))
        .map(|(name, features)| {
            format!(
                "  {name}: build {features:?}, test {:?}",
                test.get(name).unwrap_or(&Vec::new())
            )
        })
        .collect();
    if differing.is_empty() {
        println!("features: {} crates of the build are the same in the test", build.len());
        return Ok(());
    }
    Err(format!(
        "`cargo test` would build these crates again, with other features\n{}\n\
         hint: name the missing features in [dependencies] of Cargo.toml",
        differing.join("\n")
    ))
}

/// Crate and version to its feature sets (sorted), as `cargo tree` resolves them.
fn resolve(selection: &[&str]) -> Result<BTreeMap<String, Vec<String>>, String> {
    let output = tools::cargo()?
        .args(["tree", "--locked", "--prefix", "none", "--format", "{p}|{f}"])
        .args(selection)
        .output()
        .map_err(|error| format!("cannot run cargo tree: {error}"))?;
    if !output.status.success() {
        return Err(format!("cargo tree failed: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(parse(&String::from_utf8_lossy(&output.stdout)))
}

/// Lines `name vVERSION (path)|feature,feature (*)`; the path and the mark of a repetition are dropped.
fn parse(tree: &str) -> BTreeMap<String, Vec<String>> {
    let mut crates: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in tree.lines() {
        let Some((package, features)) = line.split_once('|') else { continue };
        let name = package.split(" (").next().unwrap_or(package).trim().to_owned();
        let features = features.trim_end_matches(" (*)").to_owned();
        let sets = crates.entry(name).or_default();
        if !sets.contains(&features) {
            sets.push(features);
        }
    }
    crates
}

#[cfg(test)]
mod tests {
    use super::{check, parse};

    #[test]
    fn the_build_and_the_test_resolve_the_same_features() {
        check().unwrap();
    }

    #[test]
    fn a_feature_that_only_the_test_has_is_seen() {
        let build = parse("metazoa v0.1.0 (/x)|default\nnum-complex v0.4.6|bytemuck\n");
        let test = parse("num-complex v0.4.6|bytemuck,std\nmetazoa v0.1.0 (/x)|default (*)\n");
        assert_eq!(test["metazoa v0.1.0"], build["metazoa v0.1.0"]);
        assert_ne!(test["num-complex v0.4.6"], build["num-complex v0.4.6"]);
    }
}
