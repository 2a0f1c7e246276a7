//! Finds the model files and sidecars of a zoo, in an order that depends on nothing but names.
//!
//! Only regular files whose real path lies inside the zoo are opened: a folder handed over by
//! somebody else may hold pipes, devices, links to `/etc` and links in circles. Folders behind
//! links are not entered (so no loop can occur); hidden folders are not looked into.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use walkdir::WalkDir;

use super::spec::Rejection;
use crate::error::{Error, Result};

/// Deepest folder looked into.
const MAX_DEPTH: usize = 64;

/// A file of a zoo.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ZooFile {
    /// Path below the zoo, `/`-separated.
    pub relative: String,
    /// Path to open.
    pub path: PathBuf,
}

/// What a zoo holds.
#[derive(Debug, Default)]
pub struct Found {
    /// Real path of the zoo.
    pub root: PathBuf,
    /// `.onnx` files, by name.
    pub models: Vec<ZooFile>,
    /// `.yaml` and `.yml` files, by name.
    pub sidecars: Vec<ZooFile>,
    /// What cannot be opened, by name.
    pub rejected: Vec<Rejection>,
}

/// What a file's name promises.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Model,
    Sidecar,
}

fn kind(path: &Path) -> Option<Kind> {
    let extension = path.extension()?.to_str()?.to_ascii_lowercase();
    match extension.as_str() {
        "onnx" => Some(Kind::Model),
        "yaml" | "yml" => Some(Kind::Sidecar),
        _ => None,
    }
}

/// Walks `zoo`. One bad entry never stops the rest.
///
/// # Errors
/// When `zoo` is no folder or cannot be read.
pub fn walk(zoo: &Path) -> Result<Found> {
    let hint = "name a folder with `.onnx` files";
    let root = zoo.canonicalize().map_err(|error| Error::io(zoo, &error).hint(hint))?;
    if !root.is_dir() {
        return Err(Error::input(format!("zoo is not a folder `{}`", zoo.display())).hint(hint));
    }
    let mut found = Found { root: root.clone(), ..Found::default() };
    let mut links = Vec::new();
    let visible = |entry: &walkdir::DirEntry| {
        entry.depth() == 0 || !entry.file_name().to_string_lossy().starts_with('.')
    };
    let entries = WalkDir::new(&root).max_depth(MAX_DEPTH).sort_by_file_name();
    for entry in entries.into_iter().filter_entry(visible) {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) if error.depth() == 0 => return Err(unreadable(zoo, &error)),
            Err(error) => {
                let path = error.path().unwrap_or(&root);
                let reason = unreadable(path, &error).message().to_owned();
                found.reject(relative(&root, path), reason, "make it readable, or remove it");
                continue;
            }
        };
        if entry.file_type().is_dir() {
            continue;
        }
        if entry.file_type().is_symlink() {
            links.push(entry.into_path());
            continue;
        }
        let Some(kind) = kind(entry.path()) else { continue };
        if entry.file_type().is_file() {
            found.add(kind, entry.into_path());
        } else {
            let reason = "not a regular file".to_owned();
            found.reject(relative(&root, entry.path()), reason, "put the model itself there");
        }
    }
    found.follow(links);
    found.models.sort();
    found.sidecars.sort();
    found.rejected.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

impl Found {
    fn add(&mut self, kind: Kind, path: PathBuf) {
        let name = relative(&self.root, &path);
        if path.strip_prefix(&self.root).ok().and_then(Path::to_str).is_none() {
            self.reject(name, "file name is not UTF-8".into(), "rename the file");
            return;
        }
        let file = ZooFile { relative: name, path };
        match kind {
            Kind::Model => self.models.push(file),
            Kind::Sidecar => self.sidecars.push(file),
        }
    }

    fn reject(&mut self, path: String, reason: String, hint: &str) {
        self.rejected.push(Rejection { path, reason, hint: Some(hint.into()) });
    }

    /// Takes links to files inside the zoo that were not found at their real place (the layout of
    /// Hugging Face's cache); tells of links that lead out.
    fn follow(&mut self, links: Vec<PathBuf>) {
        let mut seen: BTreeSet<PathBuf> = BTreeSet::new();
        seen.extend(self.models.iter().chain(&self.sidecars).map(|file| file.path.clone()));
        for link in links {
            let name = relative(&self.root, &link);
            let kind = kind(&link);
            let Ok(target) = link.canonicalize() else {
                if kind.is_some() {
                    let hint = "repair the link, or remove it";
                    self.reject(name, "symbolic link leads nowhere or in a circle".into(), hint);
                }
                continue;
            };
            let is_directory = target.is_dir();
            if !target.starts_with(&self.root) {
                if kind.is_some() || is_directory {
                    let reason =
                        format!("symbolic link leads out of the zoo `{}`", target.display());
                    let hint = "copy the files into the zoo, or ingest the other folder itself";
                    self.reject(name, reason, hint);
                }
                continue;
            }
            let Some(kind) = kind else { continue };
            if is_directory {
                continue;
            }
            if !target.is_file() {
                let hint = "put the model itself there";
                self.reject(name, "not a regular file".into(), hint);
            } else if seen.insert(target) {
                self.add(kind, link);
            }
        }
    }
}

/// `path` below `root`, `/`-separated.
fn relative(root: &Path, path: &Path) -> String {
    let below = path.strip_prefix(root).unwrap_or(path);
    let parts: Vec<_> = below.iter().map(|part| part.to_string_lossy()).collect();
    parts.join("/")
}

fn unreadable(path: &Path, error: &walkdir::Error) -> Error {
    match error.io_error() {
        Some(io) => Error::io(path, io),
        None => Error::input(format!("cannot be walked: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn zoo() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    fn names(files: &[ZooFile]) -> Vec<&str> {
        files.iter().map(|file| file.relative.as_str()).collect()
    }

    #[test]
    fn finds_models_and_sidecars_in_name_order_and_skips_hidden_folders() {
        let zoo = zoo();
        for folder in ["b", "a/deep", ".git", "images/cat"] {
            fs::create_dir_all(zoo.path().join(folder)).unwrap();
        }
        for file in [
            "b/x.onnx",
            "a/deep/y.ONNX",
            "z.onnx",
            "z.yaml",
            ".git/h.onnx",
            ".k.onnx",
            "catalog.json",
        ] {
            fs::write(zoo.path().join(file), "x").unwrap();
        }
        fs::write(zoo.path().join("images/cat/0.png"), "x").unwrap();
        let found = walk(zoo.path()).unwrap();
        assert_eq!(names(&found.models), ["a/deep/y.ONNX", "b/x.onnx", "z.onnx"]);
        assert_eq!(names(&found.sidecars), ["z.yaml"]);
        assert_eq!(found.rejected, []);
    }

    #[cfg(unix)]
    #[test]
    fn links_and_special_files_cannot_lead_out_or_hang() {
        use std::os::unix::fs::symlink;
        let zoo = zoo();
        let outside = tempfile::tempdir().unwrap();
        let inside = zoo.path().join("inside");
        fs::create_dir_all(&inside).unwrap();
        fs::write(outside.path().join("o.onnx"), "x").unwrap();
        fs::write(inside.join("blob"), "x").unwrap();
        fs::write(inside.join("real.onnx"), "x").unwrap();
        symlink(outside.path().join("o.onnx"), zoo.path().join("out.onnx")).unwrap();
        symlink(outside.path(), zoo.path().join("vendor")).unwrap();
        symlink("/dev/zero", zoo.path().join("zero.onnx")).unwrap();
        symlink(zoo.path(), inside.join("loop")).unwrap();
        symlink("self.onnx", zoo.path().join("self.onnx")).unwrap();
        symlink(inside.join("blob"), zoo.path().join("linked.onnx")).unwrap();
        symlink(inside.join("real.onnx"), zoo.path().join("again.onnx")).unwrap();
        let status = std::process::Command::new("mkfifo")
            .arg(zoo.path().join("pipe.onnx"))
            .status()
            .unwrap();
        assert!(status.success());

        let found = walk(zoo.path()).unwrap();
        assert_eq!(names(&found.models), ["inside/real.onnx", "linked.onnx"]);
        let rejected: Vec<_> =
            found.rejected.iter().map(|r| (r.path.as_str(), r.reason.as_str())).collect();
        let paths: Vec<_> = rejected.iter().map(|r| r.0).collect();
        assert_eq!(paths, ["out.onnx", "pipe.onnx", "self.onnx", "vendor", "zero.onnx"]);
        assert!(rejected[0].1.starts_with("symbolic link leads out of the zoo"));
        assert_eq!(rejected[1].1, "not a regular file");
        assert!(rejected[2].1.contains("circle"));
    }

    #[test]
    fn a_zoo_that_is_not_there_is_one_clear_error() {
        let error = walk(Path::new("/nowhere/zoo")).unwrap_err();
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains("/nowhere/zoo"));
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(walk(file.path()).unwrap_err().to_string().contains("not a folder"));
    }
}
