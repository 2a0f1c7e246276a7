//! A data set as it lies on disk, whatever its layout, and the splits that it has.
//!
//! | layout | splits |
//! |---|---|
//! | `ROOT/CLASS/*.png` | none |
//! | `ROOT/SPLIT/CLASS/*.png` (miniImageNet, tieredImageNet, CIFAR-FS, FC100) | its folders: `train`, `meta_test`, ... |
//! | `ROOT/images_background/ALPHABET/CHARACTER/*.png` (Omniglot) | `images_background`, `images_evaluation` |
//! | `ROOT/images/...` and lists `ROOT/**/test.csv`, `.json`, `.txt` (CUB, miniImageNet, easyfsl, torchmeta) | the lists |
//!
//! A list can also be named itself. Classes and files are taken in byte order of their names, so episodes are the same
//! whatever the disk says; in two layouts of one benchmark they are the same where names and order of the files are.
//! Pictures packed into pickles and archives are not read: the error says how to unpack them.

use std::path::{Path, PathBuf};

use super::folder::{folders, has_pictures, holds_classes, list_classes, name};
use super::lists::{LISTS, extension, read_list};
use super::places::Places;
use crate::error::{Error, Result, ResultExt};

/// Folders in which lists lie, below the data's own, and one level below these.
const LIST_FOLDERS: [&str; 4] = ["split", "splits", "filelists", "specs"];
/// What a list is called after a split.
const MEANINGS: [&str; 4] = ["train", "val", "test", "trainval"];
/// Files that hold whole data sets, and what makes folders of them.
const PACKED: [(&str, &str); 14] = [
    ("pkl", UNPICKLE),
    ("pickle", UNPICKLE),
    ("npz", UNPICKLE),
    ("npy", UNPICKLE),
    ("hdf5", CONVERT),
    ("h5", CONVERT),
    ("mat", CONVERT),
    ("lmdb", CONVERT),
    ("tfrecord", CONVERT),
    ("tar", UNPACK),
    ("tgz", UNPACK),
    ("gz", UNPACK),
    ("zip", UNPACK),
    ("rar", UNPACK),
];
const UNPICKLE: &str = "`python examples/unpack_pickles.py FILE... --out FOLDER` writes FOLDER/SPLIT/CLASS/*.png (docs/benchmarks.md)";
const CONVERT: &str = "write its pictures to FOLDER/SPLIT/CLASS/*.png (docs/benchmarks.md)";
const UNPACK: &str = "unpack it and give the folder";

/// The files of one class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassFiles {
    /// The folder's name, or the one that a list gives it.
    pub name: String,
    /// Its pictures in byte order of their paths.
    pub files: Vec<PathBuf>,
}

/// A data set on disk: its splits, found but not yet listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataSource {
    root: PathBuf,
    splits: Vec<Split>,
}

/// One split of it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Split {
    /// Its name; empty for the whole of a data set without splits.
    name: String,
    /// Its folder, or its list.
    path: PathBuf,
    layout: Layout,
}

/// How a split lies on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// A folder a class.
    Classes,
    /// A folder an alphabet, in it one a character.
    Alphabets,
    /// A list of classes or pictures.
    List,
}

/// A split with its classes.
#[derive(Debug)]
pub(super) struct Opened {
    /// The folder that holds the class folders, or the list.
    pub(super) path: PathBuf,
    pub(super) split: String,
    pub(super) classes: Vec<ClassFiles>,
    pub(super) without_pictures: Vec<String>,
}

impl DataSource {
    /// Looks at `path`: a folder, or a list.
    ///
    /// # Errors
    /// When it cannot be read, or is a packed data set.
    pub fn find(path: &Path) -> Result<Self> {
        if path.is_file() {
            if let Some(error) = packed(path) {
                return Err(error);
            }
            if !LISTS.contains(&extension(path).as_str()) {
                return Err(Error::input(format!(
                    "not a folder and not a list: `{}`",
                    path.display()
                ))
                .hint(format!("lists end in .{}", LISTS.join(", ."))));
            }
            let split = Split { name: stem(path), path: path.into(), layout: Layout::List };
            return Ok(Self { root: path.into(), splits: vec![split] });
        }
        let children = folders(path).map_err(|error| {
            error
                .context("cannot read the images")
                .hint("give a folder with one folder a class: FOLDER/CLASS/*.png")
        })?;
        let mut splits = Vec::new();
        for child in &children {
            let layout = if holds_alphabets(child) {
                Layout::Alphabets
            } else if holds_classes(child) {
                Layout::Classes
            } else {
                continue;
            };
            splits.push(Split { name: name(child), path: child.clone(), layout });
        }
        for list in lists(path) {
            splits.push(Split { name: stem(&list), path: list, layout: Layout::List });
        }
        let whole = |layout| Split { name: String::new(), path: path.into(), layout };
        if holds_alphabets(path) {
            // Each of its folders looks like a split of classes, and is an alphabet.
            splits.retain(|split| split.layout == Layout::List);
            splits.push(whole(Layout::Alphabets));
        } else {
            // One folder with all pictures, and lists that tell their classes: no class itself.
            let classes = children.iter().filter(|child| has_pictures(child)).count();
            if classes > 1 || (classes == 1 && splits.is_empty()) {
                splits.push(whole(Layout::Classes));
            }
        }
        Ok(Self { root: path.into(), splits })
    }

    /// The names of its splits, folders first.
    pub fn splits(&self) -> Vec<&str> {
        let named = self.splits.iter().filter(|split| !split.name.is_empty());
        let mut names: Vec<&str> = named.map(|split| split.name.as_str()).collect();
        names.dedup();
        names
    }

    /// The classes and files of `wanted`. `meta-test` and `test` also find `meta_test` and the like.
    ///
    /// # Errors
    /// When there are splits and none (or an unknown one) is asked for, or a list names what is not here.
    pub(super) fn open(&self, wanted: Option<&str>) -> Result<Opened> {
        let split = self.pick(wanted)?;
        let (classes, without_pictures) = match split.layout {
            Layout::Classes => list_classes(&split.path)?,
            Layout::Alphabets => (characters(&split.path)?, Vec::new()),
            Layout::List => {
                let root = Some(self.root.as_path()).filter(|root| root.is_dir());
                let found = read_list(&split.path).and_then(|classes| {
                    let places = Places::around(&split.path, root);
                    places.find(classes).context(|| format!("list `{}`", split.path.display()))
                });
                (found?, Vec::new())
            }
        };
        Ok(Opened {
            path: split.path.clone(),
            split: split.name.clone(),
            classes,
            without_pictures,
        })
    }

    fn pick(&self, wanted: Option<&str>) -> Result<&Split> {
        let here = || format!("in `{}`", self.root.display());
        let found = || {
            let names: Vec<String> =
                self.splits().into_iter().map(|name| format!("`{name}`")).collect();
            names.join(", ")
        };
        let whole = self.splits.iter().find(|split| split.name.is_empty());
        let named: Vec<&Split> =
            self.splits.iter().filter(|split| !split.name.is_empty()).collect();
        match (wanted, whole, named.as_slice()) {
            (None, Some(whole), _) => Ok(whole),
            (None, None, [only]) => Ok(only),
            (None, None, []) => Err(packed_in(&self.root).unwrap_or_else(|| {
                Error::input(format!("no class folders with pictures {}", here()))
                    .hint("expected FOLDER/CLASS/*.png (or .jpg), one folder a class")
            })),
            (None, None, _) => Err(Error::input(format!("there are several splits: {}", found()))
                .context(format!("cannot choose the images {}", here()))
                .hint("choose one with `--split`")),
            // A list that was named itself may be called by its name.
            (Some(_), _, []) => {
                let wanted = wanted.unwrap_or_default();
                let error = Error::input(format!("no split {} is called `{wanted}`", here()));
                Err(match (whole, packed_in(&self.root)) {
                    (Some(_), _) => error.hint("its folders are classes: leave out `--split`"),
                    (None, Some(packed)) => packed,
                    (None, None) => error.hint("expected FOLDER/SPLIT/CLASS/*.png"),
                })
            }
            (Some(wanted), _, _) => self
                .pick_named(&named, wanted)
                .map_err(|error| error.context(format!("cannot choose the images {}", here())))?
                .ok_or_else(|| {
                    Error::input(format!("no split {} is called `{wanted}`", here()))
                        .hint(format!("there are {}", found()))
                }),
        }
    }

    /// The split called `wanted`, else the one that means the same (`test` = `meta_test`); folders come before lists.
    fn pick_named<'s>(&self, named: &[&'s Split], wanted: &str) -> Result<Option<&'s Split>> {
        let exact: Vec<&Split> = named.iter().filter(|s| s.name == wanted).copied().collect();
        let same = || named.iter().filter(|s| meaning(&s.name) == meaning(wanted)).copied();
        let fitting: Vec<&Split> = if exact.is_empty() { same().collect() } else { exact };
        let folders = fitting.iter().filter(|split| split.layout != Layout::List);
        match (folders.copied().collect::<Vec<_>>().as_slice(), fitting.as_slice()) {
            (&[only], _) | (&[], &[only]) => Ok(Some(only)),
            (_, []) => Ok(None),
            _ => {
                let paths: Vec<String> =
                    fitting.iter().map(|split| format!("`{}`", split.path.display())).collect();
                Err(Error::input(format!("several are called `{wanted}`: {}", paths.join(", ")))
                    .hint("give one of them as the data's path"))
            }
        }
    }
}

/// What a split's name stands for in the benchmarks.
fn meaning(text: &str) -> String {
    let text = text.to_lowercase().replace('-', "_");
    let text = text.strip_prefix("meta_").unwrap_or(&text);
    match text {
        "valid" | "validation" => "val",
        "base" | "images_background" | "background" | "training" => "train",
        "novel" | "images_evaluation" | "evaluation" | "testing" => "test",
        other => other,
    }
    .to_owned()
}

fn stem(path: &Path) -> String {
    path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The lists in `root` and its folders for them that are called after a split, in byte order.
fn lists(root: &Path) -> Vec<PathBuf> {
    let mut places = vec![root.to_path_buf()];
    for folder in LIST_FOLDERS.map(|name| root.join(name)) {
        places.extend(folders(&folder).unwrap_or_default());
        places.push(folder);
    }
    let mut found = Vec::new();
    for place in places {
        let Ok(entries) = std::fs::read_dir(&place) else { continue };
        found.extend(entries.flatten().map(|entry| entry.path()).filter(|path| {
            LISTS.contains(&extension(path).as_str())
                && MEANINGS.contains(&meaning(&stem(path)).as_str())
                && path.is_file()
        }));
    }
    found.sort();
    found
}

/// An alphabet's folder holds characters, which are called so; a folder of alphabets holds these.
fn holds_alphabets(path: &Path) -> bool {
    let is_alphabet = |path: &PathBuf| {
        let inner = folders(path).unwrap_or_default();
        inner.iter().all(|one| name(one).starts_with("character"))
            && inner.iter().any(|one| has_pictures(one))
    };
    !has_pictures(path) && folders(path).is_ok_and(|inner| inner.iter().any(is_alphabet))
}

/// The characters of all alphabets in `path`.
fn characters(path: &Path) -> Result<Vec<ClassFiles>> {
    let mut all = Vec::new();
    for alphabet in folders(path)? {
        let (classes, _) = list_classes(&alphabet)?;
        all.extend(classes.into_iter().map(|class| ClassFiles {
            name: format!("{}/{}", name(&alphabet), class.name),
            files: class.files,
        }));
    }
    Ok(all)
}

/// That `path` is a packed data set, if it is.
fn packed(path: &Path) -> Option<Error> {
    let (_, hint) = PACKED.iter().find(|(known, _)| *known == extension(path))?;
    Some(
        Error::unsupported(format!("packed pictures are not read: `{}`", path.display()))
            .hint(*hint),
    )
}

/// A packed data set in `folder`, where there is nothing to read.
fn packed_in(folder: &Path) -> Option<Error> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).collect();
    files.sort();
    files.iter().filter(|path| path.is_file()).find_map(|path| packed(path))
}
