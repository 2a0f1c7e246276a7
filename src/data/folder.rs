//! Real pictures of a split, class by class: listed by [`DataSource`], checked, and read.
//!
//! Classes and files are taken in byte order of their names. What cannot be decoded is rejected
//! with its reason; the rest is read in parallel.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use walkdir::WalkDir;

use super::decode::read_picture;
use super::episode::EpisodeShape;
use super::lists::extension;
use super::resize::resize_bilinear;
use super::set::ImageSet;
use super::source::{ClassFiles, DataSource, Opened};
use crate::error::{Error, Result};
use crate::zoo::Rejection;

/// Extensions that are read, lower case.
const READ: [&str; 3] = ["png", "jpg", "jpeg"];
/// Extensions of pictures that are not read: named as rejected rather than passed over.
const NOT_READ: [&str; 7] = ["gif", "bmp", "webp", "tif", "tiff", "avif", "ppm"];
/// How deep below a class folder pictures are looked for.
const DEPTH: usize = 4;

/// The classes of a data set or of one of its splits, listed but not yet read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFolder {
    /// The folder that holds the class folders, or the list that names the pictures.
    pub root: PathBuf,
    /// The split's name, that of its folder or list; empty when there are no splits.
    pub split: String,
    /// The classes in byte order of their names.
    pub classes: Vec<ClassFiles>,
    /// Folders beside them that hold no picture, in byte order of their names.
    pub without_pictures: Vec<String>,
}

impl ImageFolder {
    /// Lists `path` - a folder in any layout of [`DataSource`], or a list - or its `split`. `meta-test` and `test` also find
    /// `meta_test` and the like.
    ///
    /// # Errors
    /// When it cannot be read, holds no pictures, has splits and none (or an unknown one) is asked for, or a list names a
    /// class that is not here.
    pub fn open(path: &Path, split: Option<&str>) -> Result<Self> {
        let Opened { path: root, split, classes, without_pictures } =
            DataSource::find(path)?.open(split)?;
        if classes.is_empty() {
            return Err(Error::input(format!(
                "no class folders with pictures in `{}`",
                root.display()
            ))
            .hint("expected FOLDER/CLASS/*.png (or .jpg), one folder a class"));
        }
        Ok(Self { root, split, classes, without_pictures })
    }

    /// Refuses a folder that cannot carry episodes of `shape`, by the number of its files: a look that takes no time.
    ///
    /// # Errors
    /// As [`EpisodeSampler::new`](super::EpisodeSampler::new), which also counts what cannot be read.
    pub fn check(&self, shape: EpisodeShape) -> Result<()> {
        shape.fits(self.classes.iter().map(|class| (class.name.as_str(), class.files.len())))
    }

    /// Reads every picture at `[height, width]`, in parallel. Classes stay even when all their
    /// pictures are rejected, so that whoever needs them can name them.
    ///
    /// # Errors
    /// Never for a bad picture: those are returned as rejections, in order.
    pub fn load(&self, size: [usize; 2]) -> Result<(ImageSet, Vec<Rejection>)> {
        let files: Vec<(usize, &PathBuf)> = self
            .classes
            .iter()
            .enumerate()
            .flat_map(|(class, files)| files.files.iter().map(move |file| (class, file)))
            .collect();
        let decoded: Vec<Result<Vec<u8>>> =
            files.par_iter().map(|(_, file)| read_planes(file, size)).collect();
        let mut bytes = Vec::with_capacity(decoded.len() * 3 * size[0] * size[1]);
        let mut counts: Vec<(String, usize)> =
            self.classes.iter().map(|class| (class.name.clone(), 0)).collect();
        let mut rejected = Vec::new();
        for ((class, file), planes) in files.into_iter().zip(decoded) {
            match planes {
                Ok(planes) => {
                    bytes.extend_from_slice(&planes);
                    counts[class].1 += 1;
                }
                Err(error) => rejected.push(Rejection {
                    path: file.strip_prefix(&self.root).unwrap_or(file).display().to_string(),
                    reason: error.to_string(),
                    hint: error.hint_text().map(str::to_owned),
                }),
            }
        }
        Ok((ImageSet::new(size, bytes, &counts)?, rejected))
    }
}

/// One file at `size`, channel-major.
fn read_planes(file: &Path, size: [usize; 2]) -> Result<Vec<u8>> {
    if !READ.contains(&extension(file).as_str()) {
        return Err(Error::input(format!("not a PNG or JPEG: `.{}`", extension(file)))
            .hint("convert it to PNG"));
    }
    let picture = resize_bilinear(read_picture(file)?, size[0], size[1]);
    let mut planes = Vec::with_capacity(picture.rgb.len());
    for channel in 0..3 {
        planes.extend(picture.rgb.chunks_exact(3).map(|pixel| pixel[channel]));
    }
    Ok(planes)
}

/// The folders in `path` that are not hidden, in byte order.
pub(super) fn folders(path: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(path).map_err(|error| Error::io(path, &error))?;
    let mut folders = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| Error::io(path, &error))?;
        // What the listing itself tells spares a look at each of a hundred thousand pictures.
        let is_folder = match entry.file_type() {
            Ok(kind) if !kind.is_symlink() => kind.is_dir(),
            _ => entry.path().is_dir(),
        };
        let path = entry.path();
        if is_folder && !name(&path).starts_with('.') {
            folders.push(path);
        }
    }
    folders.sort();
    Ok(folders)
}

/// A split holds class folders, which hold pictures; a class folder has pictures of its own.
pub(super) fn holds_classes(path: &Path) -> bool {
    !has_pictures(path) && folders(path).is_ok_and(|inner| inner.iter().any(|f| has_pictures(f)))
}

pub(super) fn has_pictures(folder: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else { return false };
    entries.flatten().any(|entry| is_picture(&entry.path()))
}

/// The classes of `folder`, and the names of its folders without pictures.
pub(super) fn list_classes(folder: &Path) -> Result<(Vec<ClassFiles>, Vec<String>)> {
    let (mut classes, mut without) = (Vec::new(), Vec::new());
    for path in folders(folder)? {
        let files = pictures_below(&path);
        if files.is_empty() {
            without.push(name(&path));
        } else {
            classes.push(ClassFiles { name: name(&path), files });
        }
    }
    Ok((classes, without))
}

/// The pictures in a class's folder, in byte order of their paths.
pub(super) fn pictures_below(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = WalkDir::new(folder)
        .min_depth(1)
        .max_depth(DEPTH)
        .follow_links(true)
        .into_iter()
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_file() && is_picture(entry.path()))
        .map(walkdir::DirEntry::into_path)
        .collect();
    files.sort();
    files
}

fn is_picture(path: &Path) -> bool {
    let extension = extension(path);
    let known = READ.contains(&extension.as_str()) || NOT_READ.contains(&extension.as_str());
    known && !name(path).starts_with('.')
}

pub(super) fn name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}
