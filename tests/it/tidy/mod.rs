//! The rules of ARCHITECTURE.md and CONTRIBUTING.md that a compiler does not hold.
//!
//! Each test lists every offending line at once, as `file:line: what is wrong`. Unit tests inside
//! `src/` are exempt from the arrow and from the ban on `unwrap`: they are not part of the program.

mod documents;
mod source;

use source::{SourceFile, sources};

/// The arrow of layers, left to right; those in one row never see each other. A module uses only
/// what stands in a row to its left (and itself).
const ARROW: [&[&str]; 10] = [
    &["error"],
    &["tensor"],
    &["graph"],
    &["onnx"],
    &["zoo"],
    &["data", "access", "meta"],
    &["methods"],
    &["report"],
    &["app"],
    &["cli"],
];

/// Longest file without its tests (CONTRIBUTING.md, "Files"; 300 is what is wanted).
const MAX_LINES: usize = 500;

/// Files outside `cli` that may look at the process environment, and why.
const ENVIRONMENT: [(&str, &str); 1] =
    [("src/access/runtime.rs", "switches ONNX Runtime's telemetry off before it is loaded")];

fn row(layer: &str) -> Option<usize> {
    ARROW.iter().position(|row| row.contains(&layer))
}

/// Fails with all findings, one a line.
fn assert_none(rule: &str, findings: &[String]) {
    assert!(findings.is_empty(), "{rule}:\n{}", findings.join("\n"));
}

/// Findings of `check` on each line of code outside tests, comments and strings blanked out.
fn scan(files: &[SourceFile], check: impl Fn(&SourceFile, &str) -> Option<String>) -> Vec<String> {
    let mut findings = Vec::new();
    for file in files {
        for (index, line) in file.code.lines().enumerate() {
            if let Some(finding) = check(file, line) {
                findings.push(format!("{}:{}: {finding}", file.path, index + 1));
            }
        }
    }
    findings
}

#[test]
fn a_module_uses_only_what_stands_to_its_left() {
    let mut findings = Vec::new();
    for file in &sources() {
        let Some(layer) = file.layer() else { continue };
        let Some(own) = row(layer) else {
            findings.push(format!("{}:1: layer `{layer}` has no place in the arrow", file.path));
            continue;
        };
        for (line, used) in file.used_layers() {
            if used != layer && row(&used).is_some_and(|place| place >= own) {
                let text = format!("{}:{line}: `{layer}` uses `{used}`", file.path);
                findings.push(text);
            }
        }
    }
    assert_none("the arrow of layers", &findings);
}

#[test]
fn every_layer_of_the_arrow_exists() {
    let files = sources();
    for layer in ARROW.iter().flat_map(|row| row.iter()) {
        assert!(files.iter().any(|file| file.layer() == Some(layer)), "no layer `{layer}` in src/");
    }
}

#[test]
fn files_are_short() {
    let findings: Vec<String> = sources()
        .iter()
        .filter(|file| file.code.lines().count() > MAX_LINES)
        .map(|file| format!("{}: {} lines without tests", file.path, file.code.lines().count()))
        .collect();
    assert_none("at most 500 lines a file without its tests", &findings);
}

#[test]
fn every_module_says_what_it_is() {
    let findings: Vec<String> = sources()
        .iter()
        .filter(|file| !file.text.starts_with("//! "))
        .map(|file| format!("{}:1: no module comment", file.path))
        .collect();
    assert_none("a file starts with `//!`", &findings);
}

#[test]
fn nothing_unfinished_outside_tests() {
    let banned = [".unwrap()", "todo!(", "unimplemented!(", "dbg!("];
    let findings = scan(&sources(), |_, line| {
        banned.iter().find(|word| line.contains(**word)).map(|word| format!("`{word}`"))
    });
    assert_none("no unwrap, no gaps", &findings);
    let notes = ["TODO", "FIXME", "XXX"];
    let mut findings = Vec::new();
    for file in &sources() {
        for (index, line) in file.text.lines().enumerate() {
            if notes.iter().any(|note| line.contains(note)) && !line.contains("issue ") {
                findings.push(format!("{}:{}: {}", file.path, index + 1, line.trim()));
            }
        }
    }
    assert_none("no note to come back without its issue", &findings);
}

#[test]
fn only_the_command_line_prints_exits_and_reads_the_environment() {
    let printing = ["println!(", "print!(", "process::exit", "eprint!("];
    let findings = scan(&sources(), |file, line| {
        if file.layer().is_none_or(|layer| layer == "cli") {
            return None;
        }
        if let Some(word) = printing.iter().find(|word| line.contains(**word)) {
            return Some(format!("`{word}` outside `cli`"));
        }
        let allowed = ENVIRONMENT.iter().any(|(path, _)| *path == file.path);
        (line.contains("env::var") && !allowed).then(|| "the environment outside `cli`".to_owned())
    });
    assert_none("only `cli` prints, exits and reads the environment", &findings);
}

#[test]
fn unsafe_code_says_why_it_is_sound() {
    let mut findings = Vec::new();
    for file in &sources() {
        let text: Vec<&str> = file.text.lines().collect();
        for (index, line) in file.code.lines().enumerate() {
            if !["unsafe {", "unsafe impl", "unsafe fn"].iter().any(|word| line.contains(word)) {
                continue;
            }
            let above = &text[index.saturating_sub(5)..=index];
            if !above.iter().any(|line| line.contains("// ") || line.contains("/// ")) {
                findings.push(format!("{}:{}: unsafe without a comment", file.path, index + 1));
            }
        }
    }
    assert_none("a comment above `unsafe` says why it is sound", &findings);
}
