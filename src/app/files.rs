//! Files that are there whole or not at all.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Writes `bytes` beside `path` and renames: a reader, or a kill, never sees half a file.
///
/// # Errors
/// When the folder cannot be written.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = temporary_beside(path);
    std::fs::write(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, path)).map_err(
        |error| {
            // The leftover is of no use to anyone; the first failure is the one to tell.
            let _ = std::fs::remove_file(&temporary);
            Error::io(path, &error).context("cannot write")
        },
    )
}

/// A name next to `path` that no other process uses.
pub(crate) fn temporary_beside(path: &Path) -> PathBuf {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}
