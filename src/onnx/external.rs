//! Weights kept in files beside the model ("external data").
//!
//! A model names its data files itself, so a hostile one can name any file of the machine. A
//! location is accepted only if it is a plain relative path whose real path (links resolved) is a
//! regular file inside the real path of the zoo's root; ranges are checked against the file's length
//! before memory is taken, and all ranges together may not exceed the files they come from.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Component, Path, PathBuf};

use candle_onnx::onnx::StringStringEntryProto;

use crate::error::{Error, Result, ResultExt as _};

/// Where weights outside the model file may come from.
#[derive(Debug, Clone, Copy)]
pub enum ExternalData<'a> {
    /// Nowhere: a model that needs them is refused.
    Refused,
    /// From files below `root`, named relative to `folder` (the model's own folder).
    Within {
        /// The folder of the model file.
        folder: &'a Path,
        /// The folder that no path may leave; its real path counts.
        root: &'a Path,
    },
}

/// Opens a regular file without following a last link and without blocking on a pipe.
///
/// # Errors
/// When it is missing, unreadable or not a regular file.
pub(super) fn open_regular(path: &Path) -> Result<(File, u64)> {
    let meta = std::fs::metadata(path).map_err(|error| Error::io(path, &error))?;
    let refuse = || {
        Error::input(format!("not a regular file: `{}`", path.display()))
            .hint("only regular files are read")
    };
    if !meta.is_file() {
        return Err(refuse());
    }
    let mut options = File::options();
    options.read(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt as _;
        options.custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    }
    let file = options.open(path).map_err(|error| Error::io(path, &error))?;
    // Once more on what was opened: the name may have been given to something else in between.
    let meta = file.metadata().map_err(|error| Error::io(path, &error))?;
    if !meta.is_file() {
        return Err(refuse());
    }
    Ok((file, meta.len()))
}

/// The data files of one model, opened once each.
pub(super) struct External<'a> {
    source: ExternalData<'a>,
    files: BTreeMap<PathBuf, (File, u64)>,
    bytes_read: u64,
}

impl<'a> External<'a> {
    pub(super) fn new(source: ExternalData<'a>) -> Self {
        Self { source, files: BTreeMap::new(), bytes_read: 0 }
    }

    /// Real paths of the files that were read.
    pub(super) fn into_files(self) -> Vec<PathBuf> {
        self.files.into_keys().collect()
    }

    /// The `length` bytes that `entries` (a tensor's `external_data`) point at.
    ///
    /// # Errors
    /// When the location is refused or missing, or the range does not lie in the file.
    pub(super) fn read(
        &mut self,
        entries: &[StringStringEntryProto],
        length: u64,
    ) -> Result<Vec<u8>> {
        let field = |key: &str| {
            entries.iter().find(|entry| entry.key == key).map(|entry| entry.value.as_str())
        };
        let location = field("location").filter(|l| !l.is_empty()).ok_or_else(|| {
            Error::input("external data without a `location`").hint("export the model again")
        })?;
        let context = || format!("external data `{}`", location.escape_debug());
        let offset = number(field("offset"), "offset").context(context)?.unwrap_or(0);
        let declared = number(field("length"), "length").context(context)?;
        if let Some(declared) = declared.filter(|&declared| declared != length) {
            return Err(Error::input(format!(
                "field `length` must be {length} for the tensor's shape and type, found `{declared}`"
            ))
            .context(context())
            .hint("the model and its data file do not belong together; export both again"));
        }
        let path = self.resolve(location).context(context)?;
        self.range(&path, offset, length).context(context)
    }

    fn range(&mut self, path: &Path, offset: u64, length: u64) -> Result<Vec<u8>> {
        if !self.files.contains_key(path) {
            self.files.insert(path.into(), open_regular(path)?);
        }
        let total: u64 = self.files.values().map(|(_, size)| *size).sum();
        let Some((file, size)) = self.files.get_mut(path) else {
            return Err(Error::internal("a data file was lost after opening"));
        };
        if offset.checked_add(length).is_none_or(|end| end > *size) {
            return Err(Error::input(format!(
                "{length} bytes from offset {offset} lie outside the file of `{size}` bytes"
            ))
            .hint("the data file is cut short or belongs to another model; fetch both again"));
        }
        self.bytes_read = self.bytes_read.saturating_add(length);
        if self.bytes_read > total.saturating_mul(2) {
            return Err(Error::input(
                "tensors use the same bytes of the data file again and again",
            )
            .hint("save the model again with `onnx.save(.., save_as_external_data=True)`"));
        }
        let wanted = usize::try_from(length)
            .map_err(|_| Error::unsupported(format!("too large for this machine: `{length}`")))?;
        let mut bytes = vec![0; wanted];
        file.seek(SeekFrom::Start(offset))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|error| Error::io(path, &error))?;
        Ok(bytes)
    }

    /// The real path of `location`, proven to lie inside the root.
    fn resolve(&self, location: &str) -> Result<PathBuf> {
        let ExternalData::Within { folder, root } = self.source else {
            return Err(Error::input("weights outside the model file are not read here")
                .hint("load the model from its folder, or save it as one file"));
        };
        let outside = "external data must be a file below the model's folder, named relative to it";
        if location.contains("_ORT_MEM_ADDR_") {
            return Err(Error::input("location names a memory address, not a file").hint(outside));
        }
        if location.contains("://") {
            return Err(Error::input("location is a URL, not a file").hint(outside));
        }
        if location.contains('\0') {
            return Err(Error::input("location holds a NUL byte").hint(outside));
        }
        let relative = Path::new(location);
        for component in relative.components() {
            match component {
                Component::Normal(_) | Component::CurDir => {}
                Component::ParentDir => {
                    return Err(Error::input("location leaves the folder by `..`").hint(outside));
                }
                Component::RootDir | Component::Prefix(_) => {
                    return Err(Error::input("location is an absolute path").hint(outside));
                }
            }
        }
        let root = root.canonicalize().map_err(|error| Error::io(root, &error))?;
        let path = folder.join(relative);
        let real = path.canonicalize().map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                Error::input(format!("data file is missing: `{}`", path.display()))
                    .hint("copy the data file beside the model, under the name it was saved with")
            }
            _ => Error::io(&path, &error),
        })?;
        if !real.starts_with(&root) {
            return Err(
                Error::input(format!("a link leads outside `{}`", root.display())).hint(outside)
            );
        }
        Ok(real)
    }
}

fn number(text: Option<&str>, field: &str) -> Result<Option<u64>> {
    text.map(|text| {
        text.parse().map_err(|_| {
            Error::input(format!(
                "field `{field}` must be a number of bytes, found `{}`",
                text.escape_debug()
            ))
            .hint("the model is damaged or hostile; export it again")
        })
    })
    .transpose()
}
