//! Named tensors and a few words about them in one safetensors file.
//!
//! The same content gives the same bytes: tensors are written by name, the words as one JSON object
//! with sorted keys under the metadata key `metazoa`. A file appears whole or not at all.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};

use crate::error::{Error, Result, ResultExt};

const KEY: &str = "metazoa";

/// A float tensor as stored: `f32`, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Values; length = product of `shape`.
    pub data: Vec<f32>,
}

/// The content of a file.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TensorStore {
    /// Tensors of numbers by name.
    pub tensors: BTreeMap<String, Stored>,
    /// Tensors of bytes (8-bit images) by name: dimensions and values. No name is in both maps.
    pub bytes: BTreeMap<String, (Vec<usize>, Vec<u8>)>,
    /// Words by name ("step", "architecture").
    pub words: BTreeMap<String, String>,
}

impl TensorStore {
    /// Adds a tensor.
    pub fn insert(&mut self, name: impl Into<String>, shape: &[usize], data: Vec<f32>) {
        self.tensors.insert(name.into(), Stored { shape: shape.to_vec(), data });
    }

    /// The values of a tensor of exactly this shape.
    ///
    /// # Errors
    /// When it is absent or of another shape.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<&[f32]> {
        let found = self
            .tensors
            .get(name)
            .ok_or_else(|| Error::input(format!("the file has no tensor `{name}`")))?;
        if found.shape != shape {
            return Err(Error::input(format!(
                "tensor {name} must have shape {shape:?}, it has `{:?}`",
                found.shape
            )));
        }
        Ok(&found.data)
    }

    /// A word.
    ///
    /// # Errors
    /// When it is absent.
    pub fn word(&self, name: &str) -> Result<&str> {
        self.words
            .get(name)
            .map(String::as_str)
            .ok_or_else(|| Error::input(format!("the file does not say `{name}`")))
    }

    /// A word that is a number.
    ///
    /// # Errors
    /// When it is absent or no such number.
    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Result<T> {
        let word = self.word(name)?;
        word.parse()
            .map_err(|_| Error::input(format!("{name} in the file is not a number: `{word}`")))
    }

    /// The file's bytes.
    ///
    /// # Errors
    /// When the safetensors library fails.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let words = serde_json::to_string(&self.words)
            .map_err(|error| Error::internal(format!("cannot write metadata: `{error}`")))?;
        let bytes: Vec<Vec<u8>> = self
            .tensors
            .values()
            .map(|t| t.data.iter().flat_map(|v| v.to_le_bytes()).collect())
            .collect();
        let mut views = Vec::with_capacity(bytes.len() + self.bytes.len());
        for ((name, tensor), bytes) in self.tensors.iter().zip(&bytes) {
            let view = TensorView::new(Dtype::F32, tensor.shape.clone(), bytes)
                .map_err(|error| Error::internal(format!("cannot write {name}: `{error}`")))?;
            views.push((name.as_str(), view));
        }
        for (name, (shape, data)) in &self.bytes {
            let view = TensorView::new(Dtype::U8, shape.clone(), data)
                .map_err(|error| Error::internal(format!("cannot write {name}: `{error}`")))?;
            views.push((name.as_str(), view));
        }
        serialize(views, Some(HashMap::from([(KEY.to_string(), words)])))
            .map_err(|error| Error::internal(format!("cannot write tensors: `{error}`")))
    }

    /// Reads the content of a file's bytes. Tensors must be `F32` or `U8`.
    ///
    /// # Errors
    /// When the bytes are no such file.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let refuse = |error: &dyn std::fmt::Display| {
            Error::input(format!("not a safetensors file of metazoa: `{error}`"))
        };
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| refuse(&e))?;
        let words = match metadata.metadata().as_ref().and_then(|map| map.get(KEY)) {
            Some(words) => serde_json::from_str(words).map_err(|e| refuse(&e))?,
            None => BTreeMap::new(),
        };
        let mut store = Self { words, ..Self::default() };
        for (name, view) in SafeTensors::deserialize(bytes).map_err(|e| refuse(&e))?.tensors() {
            if view.dtype() == Dtype::U8 {
                let data = view.data().to_vec();
                store.bytes.insert(name, (view.shape().to_vec(), data));
                continue;
            }
            if view.dtype() != Dtype::F32 {
                return Err(Error::input(format!(
                    "tensor {name} must be F32 or U8, is `{:?}`",
                    view.dtype()
                )));
            }
            let data = view
                .data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect();
            store.insert(name, view.shape(), data);
        }
        Ok(store)
    }

    /// Writes the file: first beside it, then by rename.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let bytes = self.to_bytes()?;
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut file = temporary(folder).map_err(|e| Error::io(folder, &e))?;
        std::io::Write::write_all(&mut file, &bytes).map_err(|e| Error::io(path, &e))?;
        file.persist(path).map_err(|e| Error::io(path, &e.error))?;
        Ok(())
    }

    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read or is no such file.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, &e))?;
        Self::from_bytes(&bytes).context(|| format!("`{}`", path.display()))
    }

    /// The same; nothing where there is no such file.
    ///
    /// # Errors
    /// As [`TensorStore::load`] of a file that is there.
    pub fn load_if_there(path: &Path) -> Result<Option<Self>> {
        path.exists().then(|| Self::load(path)).transpose()
    }
}

/// A temporary file that others may read once it has its name, as far as the umask allows.
fn temporary(folder: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> TensorStore {
        let mut store = TensorStore::default();
        store.insert("b", &[2, 2], vec![1.0, -2.0, f32::MIN_POSITIVE, 1e30]);
        store.insert("a", &[0], vec![]);
        store.words = BTreeMap::from([("step".into(), "7".into()), ("z".into(), "\"é".into())]);
        store
    }

    #[test]
    fn a_file_comes_back_as_written_with_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        sample().save(&path).unwrap();
        let back = TensorStore::load(&path).unwrap();
        assert_eq!(back, sample());
        assert_eq!(back.to_bytes().unwrap(), std::fs::read(&path).unwrap());
        assert_eq!(back.number::<u64>("step").unwrap(), 7);
    }

    #[test]
    fn refuses_what_is_no_such_file_with_its_path() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let whole = sample().to_bytes().unwrap();
        let cut = &whole[..whole.len() - 3];
        for bytes in [&b""[..], b"garbage", &[255; 64], &whole[..20], cut] {
            std::fs::write(&path, bytes).unwrap();
            let error = TensorStore::load(&path).unwrap_err();
            assert!(error.to_string().contains("x.safetensors"), "{error}");
        }
        assert!(TensorStore::load(&folder.path().join("none")).is_err());
        assert!(sample().tensor("b", &[4]).is_err());
        assert!(sample().tensor("c", &[4]).is_err());
        assert!(sample().number::<u64>("z").is_err());
    }
}
