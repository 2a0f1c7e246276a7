//! Rust files as the rules see them: code without tests, comments and strings; the layers it names.

use std::path::Path;

/// One file of `src/`.
pub(crate) struct SourceFile {
    /// Relative to the repository, `/`-separated.
    pub(crate) path: String,
    /// The file as it is.
    pub(crate) text: String,
    /// Line for line the same without the tests; comments and strings are blanks.
    pub(crate) code: String,
}

/// All files of `src/` but those that hold only tests, in order of their paths.
pub(crate) fn sources() -> Vec<SourceFile> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for entry in walkdir::WalkDir::new(root.join("src")).sort_by_file_name() {
        let entry = entry.unwrap();
        let path = entry.path().strip_prefix(root).unwrap().to_string_lossy().replace('\\', "/");
        let is_test = path.ends_with("tests.rs") || path.contains("/tests/");
        if !path.ends_with(".rs") || is_test {
            continue;
        }
        let text = std::fs::read_to_string(entry.path()).unwrap();
        let code = without_tests(&blank(&text));
        files.push(SourceFile { path, text, code });
    }
    assert!(files.len() > 20, "src/ was not found");
    files
}

impl SourceFile {
    /// `graph` for `src/graph/plan.rs` and `src/graph.rs`; none for `lib.rs` and `main.rs`.
    pub(crate) fn layer(&self) -> Option<&str> {
        let rest = self.path.strip_prefix("src/")?;
        let first = rest.split(['/', '.']).next()?;
        (first != "lib" && first != "main").then_some(first)
    }

    /// How many modules stand above a name of this file: `crate::a::b` is two deep.
    fn depth(&self) -> usize {
        let rest = self.path.trim_start_matches("src/").trim_end_matches(".rs");
        rest.trim_end_matches("/mod").split('/').count()
    }

    /// Line number and name of every module below the crate's root that the code names, through
    /// `crate::x`, `crate::{x, y}` or enough `super::`s.
    pub(crate) fn used_layers(&self) -> Vec<(usize, String)> {
        let mut used = Vec::new();
        let from_super = "super::".repeat(self.depth());
        for start in [String::from("crate::"), from_super] {
            for (position, _) in self.code.match_indices(&start) {
                let before = self.code[..position].chars().next_back();
                // `$crate::`, `my_crate::`, or a longer chain of `super::`s that was seen already.
                if before.is_some_and(|c| c.is_alphanumeric() || "_$:".contains(c)) {
                    continue;
                }
                let line = self.code[..position].matches('\n').count() + 1;
                for name in first_names(&self.code[position + start.len()..]) {
                    used.push((line, name));
                }
            }
        }
        used
    }
}

/// The first name of a path, or of each path of a group `{a::x, b, c::{d, e}}`.
fn first_names(path: &str) -> Vec<String> {
    let name = |text: &str| {
        text.trim_start()
            .split(|c: char| !c.is_alphanumeric() && c != '_')
            .next()
            .map(str::to_owned)
    };
    let Some(group) = path.strip_prefix('{') else { return name(path).into_iter().collect() };
    let mut names = Vec::new();
    let mut depth = 0_usize;
    let mut item = String::new();
    for c in group.chars() {
        match c {
            '}' if depth == 0 => break,
            ',' if depth == 0 => names.extend(name(&std::mem::take(&mut item))),
            _ => {
                depth =
                    if c == '{' { depth + 1 } else { depth.saturating_sub(usize::from(c == '}')) };
                item.push(c);
            }
        }
    }
    names.extend(name(&item));
    names
}

/// Cuts inline test modules: everything from `#[cfg(test)]` on a module to the end of the file.
fn without_tests(code: &str) -> String {
    let lines: Vec<&str> = code.lines().collect();
    let start = (0..lines.len()).find(|&index| {
        let next = lines.get(index + 1).map_or("", |line| line.trim());
        lines[index].trim() == "#[cfg(test)]" && next.contains("mod ") && next.ends_with('{')
    });
    lines[..start.unwrap_or(lines.len())].join("\n")
}

/// Replaces comments, strings and characters by blanks; line breaks stay.
fn blank(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let end = match chars[at] {
            '/' if chars.get(at + 1) == Some(&'/') => find(&chars, at, |i| chars[i] == '\n'),
            '/' if chars.get(at + 1) == Some(&'*') => end_of_block_comment(&chars, at),
            '"' => end_of_string(&chars, at),
            'r' if is_raw_string(&chars, at) => end_of_raw_string(&chars, at),
            '\'' => end_of_character(&chars, at),
            _ => at,
        };
        if end == at {
            out.push(chars[at]);
            at += 1;
        } else {
            out.extend(chars[at..end].iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
            at = end;
        }
    }
    out
}

fn find(chars: &[char], from: usize, is_end: impl Fn(usize) -> bool) -> usize {
    (from..chars.len()).find(|&i| is_end(i)).unwrap_or(chars.len())
}

fn end_of_block_comment(chars: &[char], start: usize) -> usize {
    let mut depth = 0_usize;
    let mut at = start;
    while at < chars.len() {
        match (chars[at], chars.get(at + 1)) {
            ('/', Some('*')) => (depth, at) = (depth + 1, at + 2),
            ('*', Some('/')) if depth == 1 => return at + 2,
            ('*', Some('/')) => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
    }
    at
}

fn end_of_string(chars: &[char], start: usize) -> usize {
    let mut at = start + 1;
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(chars.len())
}

fn is_raw_string(chars: &[char], at: usize) -> bool {
    let starts_word = at == 0 || !(chars[at - 1].is_alphanumeric() && chars[at - 1] != 'b');
    let hashes = chars[at + 1..].iter().take_while(|&&c| c == '#').count();
    starts_word && chars.get(at + 1 + hashes) == Some(&'"')
}

fn end_of_raw_string(chars: &[char], start: usize) -> usize {
    let hashes = chars[start + 1..].iter().take_while(|&&c| c == '#').count();
    let closed = |i: usize| {
        chars[i] == '"'
            && chars[i + 1..].iter().take(hashes).filter(|&&c| c == '#').count() == hashes
    };
    (find(chars, start + 2 + hashes, closed) + 1 + hashes).min(chars.len())
}

/// `'x'`, `'\n'`, `'\u{1F600}'`; a lifetime has no closing quote and is no character.
fn end_of_character(chars: &[char], start: usize) -> usize {
    match (chars.get(start + 1), chars.get(start + 2)) {
        (Some('\\'), _) => find(chars, start + 3, |i| chars[i] == '\'') + 1,
        (Some(_), Some('\'')) => start + 3,
        _ => start,
    }
}

#[test]
fn blanks_comments_strings_and_characters_but_no_lifetimes() {
    let text = "a('\"', '\\'', b\"x\\\"y\") /* /* z */ */ <'q> // w\nr#\"crate::\"#; e";
    let blanked = blank(text);
    assert_eq!(blanked.chars().count(), text.chars().count());
    let words: Vec<&str> = blanked.split_whitespace().collect();
    assert_eq!(words, ["a(", ",", ",", "b", ")", "<'q>", ";", "e"]);
}

#[test]
fn finds_the_layers_that_a_file_names() {
    let file = |path: &str, text: &str| SourceFile {
        path: path.to_owned(),
        text: text.to_owned(),
        code: without_tests(&blank(text)),
    };
    let text = "use crate::{tensor::{a, b}, zoo, Error};\n// crate::app\nfn f() { super::super::cli::x() }\n\
                #[cfg(test)]\nmod tests {\n use crate::report;\n}\n";
    let names = |path: &str| file(path, text).used_layers();
    let crate_names = [(1, "tensor"), (1, "zoo"), (1, "Error")];
    let expected = |more: &[(usize, &str)]| -> Vec<(usize, String)> {
        crate_names.iter().chain(more).map(|(line, name)| (*line, (*name).to_owned())).collect()
    };
    assert_eq!(names("src/graph/plan.rs"), expected(&[(3, "cli")]));
    assert_eq!(names("src/graph/ops/conv.rs"), expected(&[]), "two levels up is still `graph`");
    assert_eq!(file("src/graph/ops/conv.rs", text).layer(), Some("graph"));
    assert_eq!(file("src/main.rs", text).layer(), None);
}
