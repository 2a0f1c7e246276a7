//! Where the pictures are that a list names.
//!
//! Lists were written on other machines: `data/CUB/images/001.Albatross` or `/datasets/mini/images/n01.jpg`. So the end of a
//! path counts, tried from the whole of it to its last part, below the data's folder and its own folders. Invariant:
//! nothing outside of these is ever read for a list's sake.

use std::path::{Path, PathBuf};

use super::folder::{folders, pictures_below};
use super::lists::{Classes, Listed};
use super::source::ClassFiles;
use crate::error::{Error, Result};

/// How many folders above a list the pictures may lie beside: `splits/bertinetto/test.txt` has two.
const ABOVE: usize = 3;

/// The folders that pictures may lie in.
#[derive(Debug)]
pub(super) struct Places {
    bases: Vec<PathBuf>,
}

impl Places {
    /// Around a list: below `root` where that is known, else below the list's folder and those above it.
    pub(super) fn around(list: &Path, root: Option<&Path>) -> Self {
        let own = list.parent().filter(|parent| !parent.as_os_str().is_empty());
        let own = own.unwrap_or(Path::new("."));
        let tops: Vec<&Path> = match root {
            Some(root) => vec![root],
            None => {
                own.ancestors().take(ABOVE).filter(|path| !path.as_os_str().is_empty()).collect()
            }
        };
        let mut bases = Vec::new();
        for top in tops {
            bases.push(top.to_path_buf());
            bases.extend(folders(top).unwrap_or_default());
        }
        Self { bases }
    }

    /// The pictures of all classes. A picture that is not there is kept by its likeliest name: reading it fails, and it is
    /// told as any other that cannot be read.
    ///
    /// # Errors
    /// When a class has not one picture here: without it these would not be the listed classes.
    pub(super) fn find(&self, classes: Classes) -> Result<Vec<ClassFiles>> {
        let mut found = Vec::with_capacity(classes.len());
        let mut missing: Vec<String> = Vec::new();
        // Where the last picture was: the others are there too, as a rule.
        let mut habit = Habit { base: 0, skip: 0, in_class: false };
        for (name, listed) in classes {
            let mut files = match listed {
                Listed::Folder(path) => match self.folder(&path)? {
                    Some(folder) => pictures_below(&folder),
                    None => Vec::new(),
                },
                Listed::Files(paths) => {
                    let mut any = false;
                    let mut files = Vec::with_capacity(paths.len());
                    for path in paths {
                        let parts = parts(&path)?;
                        any |= self.look(&name, &parts, &mut habit);
                        files.push(self.place(&name, &parts, habit));
                    }
                    if any { files } else { Vec::new() }
                }
            };
            // Two listed paths may end in one file, which must not be support and query of an episode.
            files.sort();
            files.dedup();
            if files.is_empty() {
                missing.push(name);
            } else {
                found.push(ClassFiles { name, files });
            }
        }
        let Some(first) = missing.first() else { return Ok(found) };
        let bases: Vec<String> =
            self.bases.iter().take(6).map(|base| format!("`{}`", base.display())).collect();
        let more = match missing.len() - 1 {
            0 => String::new(),
            n => format!(", as {n} more of {}", n + 1 + found.len()),
        };
        Err(Error::input(format!("a listed class has no picture here{more}: `{first}`"))
            .hint(format!("pictures or class folders are looked for in {}", bases.join(", "))))
    }

    /// The folder whose path ends as `path` does, as far as possible.
    fn folder(&self, path: &str) -> Result<Option<PathBuf>> {
        let parts = parts(path)?;
        for skip in 0..parts.len() {
            let end: PathBuf = parts[skip..].iter().collect();
            let here = self.bases.iter().map(|base| base.join(&end)).find(|path| path.is_dir());
            if here.is_some() {
                return Ok(here);
            }
        }
        Ok(None)
    }

    /// Whether the picture is there; `habit` then says how.
    fn look(&self, class: &str, parts: &[&str], habit: &mut Habit) -> bool {
        // Whatever the last one's class was called, this one's may lead out of its folder.
        let folder = !class.contains(['/', '\\']) && !["", ".", ".."].contains(&class);
        habit.in_class &= folder;
        if self.place(class, parts, *habit).is_file() {
            return true;
        }
        for skip in 0..parts.len() {
            for base in 0..self.bases.len() {
                for in_class in [false, true].into_iter().filter(|in_class| folder || !in_class) {
                    let tried = Habit { base, skip, in_class };
                    if self.place(class, parts, tried).is_file() {
                        *habit = tried;
                        return true;
                    }
                }
            }
        }
        false
    }

    fn place(&self, class: &str, parts: &[&str], habit: Habit) -> PathBuf {
        let base = self.bases.get(habit.base).cloned().unwrap_or_default();
        let base = if habit.in_class { base.join(class) } else { base };
        base.join(parts[habit.skip.min(parts.len() - 1)..].iter().collect::<PathBuf>())
    }
}

/// How a listed path becomes one here.
#[derive(Debug, Clone, Copy)]
struct Habit {
    /// Below which folder.
    base: usize,
    /// Parts of the listed path that are left out.
    skip: usize,
    /// Whether it lies in a folder called as its class.
    in_class: bool,
}

/// The parts of a listed path, whatever system it was written on.
fn parts(path: &str) -> Result<Vec<&str>> {
    let parts: Vec<&str> =
        path.split(['/', '\\']).filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.contains(&"..") || parts.is_empty() {
        return Err(Error::input(format!("not the path of a class or picture: `{path}`"))
            .hint("paths in a list are relative to the data's folder and never lead out of it"));
    }
    Ok(parts)
}
