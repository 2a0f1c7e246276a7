//! What the documents promise exists, and no file names the machine that it was written on.

use std::path::{Path, PathBuf};

use crate::support::{run_in, temp_dir};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Lines of the README's shell blocks, without comments.
fn readme_commands() -> Vec<String> {
    let readme = read("README.md");
    let mut commands = Vec::new();
    let mut in_shell = false;
    for line in readme.lines() {
        if line.starts_with("```") {
            in_shell = line == "```sh";
        } else if in_shell && !line.trim_start().starts_with('#') && !line.is_empty() {
            let command = line.split(" #").next().unwrap_or_default();
            commands.push(command.trim().to_owned());
        }
    }
    commands
}

/// Files of the repository that people wrote: no build output, no run folders.
fn written_files() -> Vec<PathBuf> {
    let skipped = ["target", ".git", "runs", "node_modules"];
    let text = ["rs", "md", "toml", "yaml", "yml", "json", "py", "sh", "snap", "lock", ""];
    walkdir::WalkDir::new(root())
        .sort_by_file_name()
        .into_iter()
        .filter_entry(|entry| !skipped.contains(&entry.file_name().to_string_lossy().as_ref()))
        .map(Result::unwrap)
        .filter(|entry| entry.file_type().is_file())
        .map(walkdir::DirEntry::into_path)
        .filter(|path| {
            let extension = path.extension().unwrap_or_default().to_string_lossy().into_owned();
            text.contains(&extension.as_str())
        })
        .collect()
}

#[test]
fn the_readme_holds_the_two_commands_that_ci_runs() {
    let commands = readme_commands();
    for task in ["run", "test"] {
        let command = format!("cargo xtask {task}");
        let count = commands.iter().filter(|line| **line == command).count();
        assert_eq!(count, 1, "`{command}` must stand once in README.md");
    }
    let ci = read(".ci/run");
    assert!(ci.contains("readme_command test") && ci.contains("readme_command run"));
}

#[test]
fn the_readme_names_only_tasks_and_examples_that_exist() {
    let tasks = read("xtask/src/main.rs");
    for command in readme_commands() {
        let words: Vec<&str> = command.split_whitespace().collect();
        if let ["cargo", "xtask", task, ..] = words[..] {
            assert!(tasks.contains(&format!("\"{task}\" =>")), "no task for `{command}`");
        }
        if let Some(place) = words.iter().position(|word| *word == "--example") {
            let example = root().join("examples").join(format!("{}.rs", words[place + 1]));
            assert!(example.is_file(), "no example for `{command}`");
        }
    }
}

#[test]
fn the_readme_names_only_verbs_and_flags_that_exist() {
    let here = temp_dir();
    for command in readme_commands() {
        let words: Vec<&str> = command.split_whitespace().collect();
        let ["metazoa", verb, arguments @ ..] = words.as_slice() else { continue };
        let help = run_in(here.path(), &[verb, "--help"]);
        assert_eq!(help.code, 0, "no verb for `{command}`: {}", help.stderr);
        for flag in arguments.iter().filter(|word| word.starts_with("--")) {
            assert!(help.stdout.contains(*flag), "no flag `{flag}` for `{command}`");
        }
    }
}

#[test]
fn the_settings_among_the_examples_are_accepted() {
    let mut read = 0;
    for entry in std::fs::read_dir(root().join("examples")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with("bench_") && name.ends_with(".yaml") {
            metazoa::app::bench::Suite::read(&path).unwrap_or_else(|error| panic!("{error}"));
        } else if name.ends_with(".yaml") {
            metazoa::app::config::RunConfig::read(&path).unwrap_or_else(|error| panic!("{error}"));
            read += 1;
        }
    }
    assert!(read >= 2, "{read} settings");
}

#[test]
fn links_between_documents_lead_somewhere() {
    let documents =
        ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "zoo/README.md"];
    for document in documents {
        let text = read(document);
        let folder = root().join(document).parent().unwrap().to_owned();
        for (position, _) in text.match_indices("](") {
            let target = text[position + 2..].split([')', '#']).next().unwrap_or_default();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            assert!(folder.join(target).exists(), "{document} links to `{target}`");
        }
    }
}

#[test]
fn every_dependency_has_its_reason() {
    let table = read("CONTRIBUTING.md");
    let reasons: Vec<&str> =
        table.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next()).collect();
    let mut dependencies = 0;
    for manifest in ["Cargo.toml", "xtask/Cargo.toml"] {
        let text = read(manifest);
        let sections = text.split("\n[").filter(|section| {
            section.starts_with("dependencies]") || section.starts_with("dev-dependencies]")
        });
        for line in sections.flat_map(|section| section.lines().skip(1)) {
            let Some((name, _)) = line.split_once(" = ") else { continue };
            dependencies += 1;
            let named = reasons.iter().any(|cell| cell.split(", ").any(|one| one == name));
            assert!(named, "`{name}` of {manifest} has no reason in CONTRIBUTING.md");
        }
    }
    assert!(dependencies > 20, "the dependencies were not found");
}

#[test]
fn no_file_names_a_path_of_one_machine() {
    // Put together here so that this file does not find itself.
    let paths = ["root", "home", "work", "Users"].map(|folder| format!("/{folder}/"));
    let mut findings = Vec::new();
    let files = written_files();
    assert!(files.len() > 30, "the repository was not found");
    for file in files {
        let Ok(text) = std::fs::read_to_string(&file) else { continue };
        for (index, line) in text.lines().enumerate() {
            if paths.iter().any(|path| starts_a_path(line, path)) {
                findings.push(format!("{}:{}: {}", file.display(), index + 1, line.trim()));
            }
        }
    }
    assert!(findings.is_empty(), "paths of one machine:\n{}", findings.join("\n"));
}

/// `path` at the start of an absolute path, not inside a longer one or a URL.
fn starts_a_path(line: &str, path: &str) -> bool {
    line.match_indices(path).any(|(position, _)| {
        let before = line[..position].chars().next_back();
        before.is_none_or(|c| !c.is_alphanumeric() && !"._-/~}>".contains(c))
    })
}

#[test]
fn every_bundled_model_has_its_sidecar_and_its_row() {
    let readme = read("zoo/README.md");
    let mut models = 0;
    let mut bytes = 0;
    for entry in walkdir::WalkDir::new(root().join("zoo")) {
        let entry = entry.unwrap();
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().is_file() && name != "catalog.json" {
            bytes += entry.metadata().unwrap().len();
        }
        let Some(model) = name.strip_suffix(".onnx") else { continue };
        models += 1;
        assert!(entry.path().with_extension("yaml").is_file(), "`{name}` has no sidecar");
        assert!(readme.contains(&format!("| `{model}` |")), "`{name}` has no row in zoo/README.md");
    }
    assert!(models >= 12, "{models} models");
    assert!(bytes < 8 << 20, "zoo/ holds {bytes} bytes");
}
