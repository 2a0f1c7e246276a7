//! Pairs model files with their sidecars.
//!
//! A sidecar belongs to the `.onnx` file of the same stem, or to the file its `model_path` names.
//! A broken sidecar rejects its own model only: using the model without what its owner wrote about
//! it would be a guess. Sidecars are small, so all are read before the first model is opened.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rayon::prelude::*;

use super::remote::RemoteCandidate;
use super::sidecar::{MAX_SIDECAR_BYTES, Sidecar};
use super::spec::Rejection;
use super::walk::{Found, ZooFile};
use crate::error::{Error, Result};

/// A model file and what its owner says of it.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// The file.
    pub file: ZooFile,
    /// Path below the zoo without extension; unique.
    pub id: String,
    /// Its sidecar, if there is one; the error that a broken one gave.
    pub sidecar: Result<Option<FoundSidecar>>,
}

/// A sidecar and where it stands.
#[derive(Debug, Clone)]
pub struct FoundSidecar {
    /// Path below the zoo.
    pub relative: String,
    /// Its content.
    pub content: Sidecar,
}

/// What a walk found, paired.
#[derive(Debug, Default)]
pub struct Paired {
    /// Model files by id.
    pub candidates: Vec<Candidate>,
    /// Sidecars of models that are served elsewhere, by id.
    pub remotes: Vec<RemoteCandidate>,
    /// The rest by path.
    pub rejected: Vec<Rejection>,
}

/// Pairs what a walk found.
pub fn pair(found: Found) -> Paired {
    let mut rejected = found.rejected;
    let mut remotes: BTreeMap<String, RemoteCandidate> = BTreeMap::new();
    let mut candidates: BTreeMap<String, Candidate> = BTreeMap::new();
    let mut id_of: BTreeMap<String, String> = BTreeMap::new();
    for file in found.models {
        let id = stem(&file.relative).to_owned();
        if let Some(other) = candidates.get(&id) {
            let reason = format!("same name but for its extension as `{}`", other.file.relative);
            rejected.push(reject(&file.relative, reason, "rename one of the two"));
            continue;
        }
        id_of.insert(file.relative.clone(), id.clone());
        candidates.insert(id.clone(), Candidate { file, id, sidecar: Ok(None) });
    }
    let read: Vec<(ZooFile, Result<Sidecar>)> = found
        .sidecars
        .into_par_iter()
        .map(|file| {
            let sidecar = read(&file);
            (file, sidecar)
        })
        .collect();
    for (file, sidecar) in read {
        match target(&file, &sidecar) {
            Some(name) => match id_of.get(&name).and_then(|id| candidates.get_mut(id)) {
                Some(candidate) => attach(candidate, &file, sidecar),
                None => match remote(&file, &sidecar) {
                    Some(model) if !remotes.contains_key(&model.id) => {
                        remotes.insert(model.id.clone(), model);
                    }
                    Some(model) => {
                        let reason = format!("same name but for its extension as `{}`", model.id);
                        rejected.push(reject(&file.relative, reason, "rename one of the two"));
                    }
                    None => rejected.extend(orphan(&file, &name, sidecar)),
                },
            },
            None => {
                let reason = "`model_path` leads out of the zoo".to_owned();
                rejected.push(reject(&file.relative, reason, "name a file inside the zoo"));
            }
        }
    }
    rejected.sort_by(|a, b| a.path.cmp(&b.path));
    Paired {
        candidates: candidates.into_values().collect(),
        remotes: remotes.into_values().collect(),
        rejected,
    }
}

/// Reads the sidecar that belongs to `model` by name, for a model outside any zoo walk.
///
/// # Errors
/// As [`Sidecar::parse`].
pub fn beside(model: &Path) -> Result<Option<Sidecar>> {
    for extension in ["yaml", "yml"] {
        let path = model.with_extension(extension);
        if path.is_file() {
            let relative = path.display().to_string();
            return read(&ZooFile { relative, path }).map(Some);
        }
    }
    Ok(None)
}

fn read(file: &ZooFile) -> Result<Sidecar> {
    let metadata = fs::metadata(&file.path).map_err(|error| Error::io(&file.path, &error))?;
    if metadata.len() > MAX_SIDECAR_BYTES {
        let message = format!(
            "sidecar is larger than {} MiB, found `{}` bytes",
            MAX_SIDECAR_BYTES >> 20,
            metadata.len()
        );
        return Err(Error::input(message).context(format!("`{}`", file.relative)));
    }
    let text = fs::read_to_string(&file.path)
        .map_err(|error| Error::io(Path::new(&file.relative), &error))?;
    Sidecar::parse(&text, Path::new(&file.relative))
}

/// The model a sidecar speaks of, as a path below the zoo; `None` when it leads out.
fn target(file: &ZooFile, sidecar: &Result<Sidecar>) -> Option<String> {
    let named = sidecar.as_ref().ok().and_then(|sidecar| sidecar.model_path.as_deref());
    let Some(named) = named else { return Some(format!("{}.onnx", stem(&file.relative))) };
    if named.starts_with('/') {
        return None;
    }
    let folder = file.relative.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in named.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

fn attach(candidate: &mut Candidate, file: &ZooFile, sidecar: Result<Sidecar>) {
    candidate.sidecar = match &candidate.sidecar {
        Ok(None) => {
            sidecar.map(|content| Some(FoundSidecar { relative: file.relative.clone(), content }))
        }
        Ok(Some(first)) => Err(Error::input(format!(
            "two sidecars speak of this model, `{}` and `{}`",
            first.relative, file.relative
        ))
        .hint("remove one of the two")),
        Err(first) => Err(first.clone()),
    };
}

/// A sidecar of a served model that lies outside any zoo walk.
///
/// # Errors
/// As [`Sidecar::parse`]; when it has no endpoint.
pub fn remote_at(path: &Path) -> Result<RemoteCandidate> {
    let relative = path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    let file = ZooFile { relative, path: path.to_path_buf() };
    let sidecar = read(&file);
    match remote(&file, &sidecar) {
        Some(model) => Ok(model),
        None => Err(sidecar.err().unwrap_or_else(|| {
            Error::input(format!("no `endpoint` in sidecar `{}`", path.display()))
                .hint("name the `.onnx` file, or say in the sidecar where the model is served")
        })),
    }
}

/// The served model of a sidecar with an endpoint.
fn remote(file: &ZooFile, sidecar: &Result<Sidecar>) -> Option<RemoteCandidate> {
    let content = sidecar.as_ref().ok().filter(|sidecar| sidecar.endpoint.is_some())?.clone();
    let sidecar = FoundSidecar { relative: file.relative.clone(), content };
    Some(RemoteCandidate { file: file.clone(), id: stem(&file.relative).to_owned(), sidecar })
}

/// A sidecar without its model: mistaken, or some other YAML file that is none of ours.
fn orphan(file: &ZooFile, model: &str, sidecar: Result<Sidecar>) -> Option<Rejection> {
    match sidecar {
        Ok(_) => Some(reject(
            &file.relative,
            format!("the model of this sidecar is not there, expected `{model}`"),
            "add the model, or correct `model_path`; a served model needs an `endpoint`",
        )),
        Err(error) if speaks_our_language(&file.path) => Some(Rejection {
            path: file.relative.clone(),
            reason: error.to_string(),
            hint: error.hint_text().map(Into::into),
        }),
        Err(_) => None,
    }
}

/// Whether a YAML file without a model means to be a sidecar.
fn speaks_our_language(path: &Path) -> bool {
    let small = fs::metadata(path).is_ok_and(|metadata| metadata.len() <= MAX_SIDECAR_BYTES);
    small
        && fs::read_to_string(path).is_ok_and(|text| {
            text.lines().any(|line| line.trim_start().starts_with("schema_version:"))
        })
}

fn stem(relative: &str) -> &str {
    relative.rsplit_once('.').map_or(relative, |(stem, _)| stem)
}

fn reject(path: &str, reason: String, hint: &str) -> Rejection {
    Rejection { path: path.to_owned(), reason, hint: Some(hint.to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::super::walk::walk;
    use super::*;

    fn zoo(files: &[(&str, &str)]) -> Paired {
        let zoo = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = zoo.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        pair(walk(zoo.path()).unwrap())
    }

    #[test]
    fn sidecars_find_their_models_by_stem_and_by_model_path() {
        let Paired { candidates, rejected, .. } = zoo(&[
            ("a.onnx", "x"),
            ("a.yaml", "schema_version: 1\nmodel: A\n"),
            ("team/b.v2.onnx", "x"),
            ("team/b.v2.yml", "schema_version: 1\n"),
            ("c.onnx", "x"),
            ("cards/about_c.yaml", "schema_version: 1\nmodel_path: ../c.onnx\n"),
            ("d.onnx", "x"),
        ]);
        assert_eq!(rejected, []);
        let seen: Vec<_> = candidates
            .iter()
            .map(|c| {
                let sidecar = c.sidecar.as_ref().unwrap().as_ref();
                (c.id.as_str(), sidecar.map(|s| s.relative.clone()))
            })
            .collect();
        assert_eq!(
            seen,
            [
                ("a", Some("a.yaml".into())),
                ("c", Some("cards/about_c.yaml".into())),
                ("d", None),
                ("team/b.v2", Some("team/b.v2.yml".into())),
            ]
        );
    }

    #[test]
    fn a_broken_sidecar_rejects_its_own_model_only() {
        let Paired { candidates, rejected, .. } =
            zoo(&[("a.onnx", "x"), ("a.yaml", "schema_version: 1\nmodle: A\n"), ("b.onnx", "x")]);
        assert_eq!(rejected, []);
        let error = candidates[0].sidecar.as_ref().unwrap_err();
        assert_eq!(error.to_string(), "`a.yaml` line 2: unknown key `modle`");
        assert!(candidates[1].sidecar.as_ref().unwrap().is_none());
    }

    #[test]
    fn sidecars_without_a_model_are_told_apart() {
        let Paired { candidates, remotes, rejected } = zoo(&[
            ("remote.yaml", "schema_version: 1\nendpoint: {url: 'http://h:1'}\n"),
            ("lost.yaml", "schema_version: 1\n"),
            ("typo.yaml", "schema_version: 1\nmodle: x\n"),
            ("out.yaml", "schema_version: 1\nmodel_path: ../../x.onnx\n"),
            ("compose.yaml", "services: {web: {image: nginx}}\n"),
        ]);
        assert!(candidates.is_empty());
        assert_eq!(remotes.iter().map(|r| r.id.as_str()).collect::<Vec<_>>(), ["remote"]);
        let seen: Vec<_> = rejected.iter().map(|r| (r.path.as_str(), r.reason.as_str())).collect();
        assert_eq!(
            seen,
            [
                ("lost.yaml", "the model of this sidecar is not there, expected `lost.onnx`"),
                ("out.yaml", "`model_path` leads out of the zoo"),
                ("typo.yaml", "`typo.yaml` line 2: unknown key `modle`"),
            ]
        );
        assert!(rejected.iter().all(|r| r.hint.is_some()));
    }

    #[test]
    fn two_sidecars_for_one_model_are_refused() {
        let Paired { candidates, .. } = zoo(&[
            ("a.onnx", "x"),
            ("a.yaml", "schema_version: 1\n"),
            ("b.yaml", "schema_version: 1\nmodel_path: a.onnx\n"),
        ]);
        let error = candidates[0].sidecar.as_ref().unwrap_err();
        assert_eq!(error.message(), "two sidecars speak of this model, `a.yaml` and `b.yaml`");
    }
}
