//! SHA-256 of files, the identity of a model: users can compare it with ONNX Hub and Hugging Face.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::spec::ModelSpec;
use crate::error::{Error, Result};

/// Bytes read at a time; a model of any size is hashed in this much memory.
const CHUNK: usize = 1 << 16;

/// Hex digest of one file.
///
/// # Errors
/// When it cannot be read.
pub fn file_sha(path: &Path) -> Result<String> {
    files_sha([path])
}

/// Hex digest of several files, one after the other.
///
/// # Errors
/// When one cannot be read.
pub fn files_sha<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Result<String> {
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; CHUNK];
    for path in paths {
        let mut file = File::open(path).map_err(|error| Error::io(path, &error))?;
        loop {
            let read = file.read(&mut chunk).map_err(|error| Error::io(path, &error))?;
            if read == 0 {
                break;
            }
            hasher.update(&chunk[..read]);
        }
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Refuses a model whose files are not those its spec was made from: labels, sizes and images would be another
/// model's, and nobody has looked at the new file yet.
///
/// # Errors
/// When a file has changed or cannot be read.
pub fn unchanged(spec: &ModelSpec) -> Result<()> {
    let external = spec.external_files.iter().map(PathBuf::as_path);
    if files_sha(std::iter::once(spec.path.as_path()).chain(external))? == spec.sha {
        return Ok(());
    }
    Err(Error::input(format!("the file has changed since it was read: `{}`", spec.path.display()))
        .hint("put the file back, or start a new run"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_published_test_vector() {
        let folder = tempfile::tempdir().unwrap();
        let (a, bc) = (folder.path().join("a"), folder.path().join("bc"));
        std::fs::write(&a, "a").unwrap();
        std::fs::write(&bc, "bc").unwrap();
        // FIPS 180-2, appendix B.1: SHA-256 of "abc".
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(files_sha([a.as_path(), bc.as_path()]).unwrap(), abc);
        assert!(file_sha(&folder.path().join("none")).is_err());
    }
}
