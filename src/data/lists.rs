//! Lists that say which classes or pictures a split has: CSV, JSON and text, as few-shot benchmarks come with them.
//!
//! * CSV with a header: `filename,label` (Ravi and Larochelle, LibFewShot, PURER) or `class_name,image_name` (easyfsl);
//! * JSON: `{"class_names", "class_roots"}` (easyfsl), `{"label_names", "image_names", "image_labels"}` (Chen et al.), a
//!   list of class names or of `[superclass, class]`, or a mapping from folders to such lists (torchmeta);
//! * text: a class name a line (CIFAR-FS).
//!
//! A list only names things; `places` finds them below the data's folder. A picture that is listed twice counts once.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result, ResultExt};

/// Extensions of lists, lower case.
pub(super) const LISTS: [&str; 3] = ["csv", "json", "txt"];
/// Largest list read: a line for each image of ImageNet is a third of it.
const MOST_BYTES: u64 = 256 << 20;
/// What the columns of a CSV are called that hold file names and class names.
const FILE_COLUMNS: [&str; 6] = ["filename", "image_name", "file_name", "file", "image", "path"];
const CLASS_COLUMNS: [&str; 4] = ["label", "class_name", "class", "label_name"];

/// What a list says of a class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Listed {
    /// The path of its folder, or the end of it.
    Folder(String),
    /// The paths of its pictures, or their ends.
    Files(BTreeSet<String>),
}

/// The classes of a list, by name.
pub(super) type Classes = BTreeMap<String, Listed>;

/// Reads a list.
///
/// # Errors
/// When it cannot be read or is none of the known forms; names the file and what was found.
pub(super) fn read_list(path: &Path) -> Result<Classes> {
    let read = || {
        let size = std::fs::metadata(path).map_err(|error| Error::io(path, &error))?.len();
        if size > MOST_BYTES {
            return Err(Error::input(format!("the list has more than 256 MiB: `{size}` bytes")));
        }
        let bytes = std::fs::read(path).map_err(|error| Error::io(path, &error))?;
        let text = String::from_utf8(bytes)
            .map_err(|error| Error::input(format!("the list is not UTF-8: `{error}`")))?;
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        let classes = match extension(path).as_str() {
            "csv" => read_csv(text)?,
            "json" => read_json(text)?,
            _ => names(text.lines().map(str::trim).filter(|line| !line.is_empty()))?,
        };
        if classes.is_empty() {
            return Err(Error::input("the list names no class"));
        }
        Ok(classes)
    };
    read().context(|| format!("list `{}`", path.display()))
}

pub(super) fn extension(path: &Path) -> String {
    path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default()
}

/// Classes that are named by the ends of their folders' paths.
fn names<'a>(paths: impl Iterator<Item = &'a str>) -> Result<Classes> {
    let mut classes = Classes::new();
    for path in paths {
        if path.contains(',') {
            return Err(Error::input(format!("a line is more than a class name: `{}`", cut(path)))
                .hint("a text list holds one class name a line; call a table `.csv`"));
        }
        let name = path.trim_end_matches(['/', '\\']);
        classes.insert(name.into(), Listed::Folder(name.into()));
    }
    Ok(classes)
}

fn read_csv(text: &str) -> Result<Classes> {
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    let header = fields(lines.next().unwrap_or_default());
    let column = |known: &[&str]| {
        known.iter().find_map(|name| header.iter().position(|own| own.to_lowercase() == *name))
    };
    let (Some(file), Some(class)) = (column(&FILE_COLUMNS), column(&CLASS_COLUMNS)) else {
        return Err(Error::input(format!(
            "no columns of file names and of classes in the header `{}`",
            cut(&header.join(","))
        ))
        .hint("the first line is `filename,label` or `class_name,image_name`"));
    };
    let mut classes = Classes::new();
    for (number, line) in lines.enumerate() {
        let fields = fields(line);
        let (Some(file), Some(class)) = (fields.get(file), fields.get(class)) else {
            return Err(Error::input(format!(
                "row {} has too few columns: `{}`",
                number + 2,
                cut(line)
            )));
        };
        add_file(&mut classes, class, file);
    }
    Ok(classes)
}

fn add_file(classes: &mut Classes, class: &str, file: &str) {
    let listed = classes.entry(class.into()).or_insert_with(|| Listed::Files(BTreeSet::new()));
    if let Listed::Files(files) = listed {
        files.insert(file.into());
    }
}

/// The fields of a line; one in quotes may hold commas, and doubled quotes for quotes.
fn fields(line: &str) -> Vec<String> {
    let (mut fields, mut field, mut quoted) = (Vec::new(), String::new(), false);
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                field.push('"');
                chars.next();
            }
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(std::mem::take(&mut field).trim().to_owned()),
            _ => field.push(c),
        }
    }
    fields.push(field.trim().to_owned());
    fields
}

fn read_json(text: &str) -> Result<Classes> {
    let value: Value = serde_json::from_str(text)
        .map_err(|error| Error::input(format!("the list is not JSON: `{error}`")))?;
    let texts = |key: &str| value.get(key).map(|list| texts(list, key)).transpose();
    if let (Some(names), Some(roots)) = (texts("class_names")?, texts("class_roots")?) {
        same_length("class_names", names.len(), "class_roots", roots.len())?;
        let folders = roots.into_iter().map(|root| Listed::Folder(root.to_owned()));
        return Ok(names.into_iter().map(str::to_owned).zip(folders).collect());
    }
    if let (Some(names), Some(files)) = (texts("label_names")?, texts("image_names")?) {
        let labels = value.get("image_labels").and_then(Value::as_array);
        let labels = labels.map(Vec::as_slice).unwrap_or_default();
        same_length("image_names", files.len(), "image_labels", labels.len())?;
        let mut classes = Classes::new();
        for (file, label) in files.iter().zip(labels) {
            let number = label.as_u64().and_then(|label| usize::try_from(label).ok());
            let name = number.and_then(|label| names.get(label)).ok_or_else(|| {
                Error::input(format!(
                    "`image_labels` must be numbers below {}, the length of `label_names`: `{label}`",
                    names.len()
                ))
            })?;
            add_file(&mut classes, name, file);
        }
        return Ok(classes);
    }
    let mut paths = Vec::new();
    folders(&value, "", &mut paths)?;
    Ok(paths.into_iter().map(|path| (path.clone(), Listed::Folder(path))).collect())
}

/// The class folders that a list of names, or a mapping from folders to lists, stands for.
fn folders(value: &Value, above: &str, paths: &mut Vec<String>) -> Result<()> {
    let below = |name: &str| if above.is_empty() { name.into() } else { format!("{above}/{name}") };
    match value {
        Value::String(name) => paths.push(below(name)),
        Value::Array(items) => {
            for item in items {
                // `[superclass, class]` is one class.
                let parts: Option<Vec<&str>> =
                    item.as_array().map(|pair| pair.iter().filter_map(Value::as_str).collect());
                match parts {
                    Some(pair) if pair.len() == 2 => paths.push(below(&pair.join("/"))),
                    _ => folders(item, above, paths)?,
                }
            }
        }
        Value::Object(map) => {
            for (name, item) in map {
                folders(item, &below(name), paths)?;
            }
        }
        other => {
            return Err(Error::input(format!("not a class name: `{}`", cut(&other.to_string())))
                .hint(
                    "a list is an array of class names, {\"class_names\", \"class_roots\"}, or \
                     {\"label_names\", \"image_names\", \"image_labels\"}",
                ));
        }
    }
    Ok(())
}

fn texts<'v>(list: &'v Value, key: &str) -> Result<Vec<&'v str>> {
    let items = list.as_array().map(|items| items.iter().map(Value::as_str).collect());
    items.unwrap_or(None).ok_or_else(|| Error::input(format!("must be a list of texts: `{key}`")))
}

fn same_length(a: &str, n: usize, b: &str, m: usize) -> Result<()> {
    if n == m {
        return Ok(());
    }
    Err(Error::input(format!("`{a}` and `{b}` differ in length: `{n}` and `{m}`")))
}

/// The beginning of a text, for messages.
fn cut(text: &str) -> String {
    let end = text.char_indices().nth(60).map_or(text.len(), |(at, _)| at);
    if end < text.len() { format!("{}...", &text[..end]) } else { text.into() }
}
