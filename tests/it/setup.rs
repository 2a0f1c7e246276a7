//! `setup` with a stand-in for pip that hands out wheels made here, and `doctor`.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use metazoa::access::library::{LIBRARY_NAME, PINNED_VERSION, cached_library};
use metazoa::app::setup::{Cuda, SetupOptions, setup, verify};
use metazoa::error::ErrorKind;
use serde_json::Value;
use zip::write::SimpleFileOptions;

use crate::support::{metazoa, runtime, temp_dir};

/// An executable script called like Python.
fn script(folder: &Path, text: &str) -> PathBuf {
    let path = folder.join("python3");
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// A Python whose `pip download` copies `wheel` and notes that it was called.
fn python_with(folder: &Path, wheel: &Path) -> PathBuf {
    let text = format!(
        "echo called >> '{}'\nwhile [ $# -gt 0 ]; do [ \"$1\" = --dest ] && dest=\"$2\"; shift; done\n\
         cp '{}' \"$dest/onnxruntime-{PINNED_VERSION}-cp312-cp312-any.whl\"",
        folder.join("calls").display(),
        wheel.display()
    );
    script(folder, &text)
}

fn wheel_of(folder: &Path, library: &[u8]) -> PathBuf {
    let path = folder.join("made.whl");
    let mut archive = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
    let stored = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in [("onnxruntime/__init__.py", &b"import this"[..]), ("", library)] {
        let name =
            if name.is_empty() { format!("onnxruntime/capi/{LIBRARY_NAME}") } else { name.into() };
        archive.start_file(name, stored).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap();
    path
}

fn options(cache_dir: &Path, python: PathBuf) -> SetupOptions {
    SetupOptions { cache_dir: cache_dir.to_owned(), cuda: Cuda::None, python }
}

fn everything_in(folder: &Path) -> Vec<PathBuf> {
    let entries = walkdir::WalkDir::new(folder).min_depth(1).into_iter();
    entries.map(|entry| entry.unwrap().into_path()).collect()
}

#[test]
fn setup_takes_the_library_out_of_the_wheel_once() {
    let real = &runtime().library().path;
    if real.file_name().is_none_or(|name| name != LIBRARY_NAME) {
        eprintln!("SKIPPED: the ONNX Runtime in use is not {PINNED_VERSION}");
        return;
    }
    let (folder, cache) = (temp_dir(), temp_dir());
    let wheel = wheel_of(folder.path(), &std::fs::read(real).unwrap());
    let options = options(cache.path(), python_with(folder.path(), &wheel));
    let first = setup(&options).unwrap();
    assert!(!first.already_there);
    assert_eq!(first.library, cached_library(cache.path()));
    verify(&first).unwrap();
    let second = setup(&options).unwrap();
    assert!(second.already_there);
    let calls = std::fs::read_to_string(folder.path().join("calls")).unwrap();
    assert_eq!(calls, "called\n", "pip runs once");
    let files = everything_in(cache.path()).into_iter().filter(|path| path.is_file()).count();
    assert_eq!(files, 1, "only the library stays");
    // A library that was changed afterwards is fetched again.
    std::fs::write(&first.library, "broken").unwrap();
    assert!(!setup(&options).unwrap().already_there);
    verify(&first).unwrap();
}

#[test]
fn setup_refuses_a_library_that_is_not_the_pinned_one_and_leaves_nothing() {
    let (folder, cache) = (temp_dir(), temp_dir());
    let wheel = wheel_of(folder.path(), b"something else");
    let error = setup(&options(cache.path(), python_with(folder.path(), &wheel))).unwrap_err();
    assert!(error.to_string().contains("SHA-256"), "{error}");
    assert_eq!(everything_in(cache.path()), Vec::<PathBuf>::new());
}

#[test]
fn setup_shows_pips_last_words_and_what_to_install() {
    let (folder, cache) = (temp_dir(), temp_dir());
    let failing =
        script(folder.path(), "echo first >&2\necho 'ERROR: No matching index' >&2\nexit 1");
    let error = setup(&options(cache.path(), failing)).unwrap_err();
    assert_eq!(error.to_string(), "pip failed: `ERROR: No matching index`");
    let bare = script(folder.path(), "echo 'python3: No module named pip' >&2\nexit 1");
    let error = setup(&options(cache.path(), bare)).unwrap_err();
    assert!(error.hint_text().unwrap().contains("python3-pip"));
    let error = setup(&options(cache.path(), folder.path().join("none"))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal);
    assert!(error.hint_text().unwrap().contains("python3-pip"));
    assert_eq!(everything_in(cache.path()), Vec::<PathBuf>::new());
}

#[test]
fn doctor_says_what_is_there_and_how_to_get_what_is_missing() {
    let here = temp_dir();
    let library = runtime().library();
    let output = metazoa(here.path())
        .args(["--json", "doctor"])
        .env("ORT_DYLIB_PATH", &library.path)
        .output()
        .unwrap();
    assert!(output.status.success());
    let diagnosis: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(diagnosis["ready"], true);
    let first = &diagnosis["findings"][0];
    assert_eq!(
        (first["name"].as_str(), first["health"].as_str()),
        (Some("ONNX Runtime"), Some("ok"))
    );
    assert!(first["found"].as_str().unwrap().contains(&library.version));

    let output = metazoa(here.path())
        .arg("doctor")
        .env_remove("ORT_DYLIB_PATH")
        .env("METAZOA_ORT_DIR", here.path())
        .env("PATH", here.path())
        .output()
        .unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("MISSING ONNX Runtime") && text.contains("metazoa setup"), "{text}");
    assert!(text.ends_with("not ready\n"), "{text}");
}
