//! YAML text to typed values, with errors a person can act on.
//!
//! The only place that touches the YAML crate's reader. serde's messages name the unknown key and
//! every known one; here they become the file, the line and the nearest known name, the same for
//! sidecars and for experiment settings.

use std::path::Path;

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// Deepest nesting of `[` and `{` read. The scanner's time grows with text times depth: 100 kB of
/// `[` took it a minute.
const MAX_NESTING: usize = 100;

/// Reads one YAML document.
///
/// # Errors
/// Names `file` and the line; for an unknown key or value also the nearest known one.
pub fn parse<T: DeserializeOwned>(text: &str, file: &Path) -> Result<T> {
    check_nesting(text).map_err(|error| error.context(format!("`{}`", file.display())))?;
    serde_yaml::from_str(text).map_err(|error| {
        let location = error.location();
        let message = error.to_string();
        let place = match location {
            Some(location) => format!("`{}` line {}", file.display(), location.line()),
            None => format!("`{}`", file.display()),
        };
        explain(strip_location(&message)).context(place)
    })
}

/// Counts brackets wherever they stand, in texts too: what is a text is only known after parsing.
fn check_nesting(text: &str) -> Result<()> {
    let mut depth = 0_usize;
    for byte in text.bytes() {
        match byte {
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_NESTING {
            return Err(Error::input(format!(
                "brackets are nested deeper than `{MAX_NESTING}` levels"
            ))
            .hint("close every `[` and `{`"));
        }
    }
    Ok(())
}

/// The name in `known` nearest to `name`, if one is near enough to be a slip of the hand.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = name.to_lowercase();
    known
        .into_iter()
        .map(|candidate| {
            let distance = strsim::damerau_levenshtein(&lower, &candidate.to_lowercase());
            let similarity = strsim::jaro_winkler(&lower, &candidate.to_lowercase());
            (candidate, distance, similarity)
        })
        .filter(|(candidate, distance, similarity)| {
            *distance <= 1 + candidate.len() / 4 || *similarity > 0.88
        })
        .min_by(|a, b| a.1.cmp(&b.1).then(b.2.total_cmp(&a.2)))
        .map(|(candidate, _, _)| candidate)
}

/// "preprocess: unknown field `x`, expected ... at line 3 column 5" without the place.
fn strip_location(message: &str) -> &str {
    match message.rfind(" at line ") {
        Some(at) => &message[..at],
        None => message,
    }
}

/// serde's message as an [`Error`] with a hint.
fn explain(message: &str) -> Error {
    if message.starts_with("EOF while parsing") {
        return Error::input("the file holds no YAML mapping")
            .hint("a sidecar starts with `schema_version: 1`");
    }
    for (marker, word) in [("unknown field `", "key"), ("unknown variant `", "value")] {
        let Some(at) = message.find(marker) else { continue };
        let prefix = message[..at].trim_end_matches([' ', ':']);
        let names: Vec<&str> = message[at..].split('`').skip(1).step_by(2).collect();
        let [name, known @ ..] = names.as_slice() else { continue };
        let place = if prefix.is_empty() { String::new() } else { format!(" in `{prefix}`") };
        let error = Error::input(format!("unknown {word}{place} `{name}`"));
        let list = known.join(", ");
        return match nearest(name, known.iter().copied()) {
            Some(near) => error.hint(format!("did you mean `{near}`? known: {list}")),
            None => error.hint(format!("known: {list}")),
        };
    }
    Error::input(message.to_owned())
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        inner: Option<Inner>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Inner {
        layout: Option<Layout>,
        value_range: Option<[f32; 2]>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Layout {
        Nchw,
        Nhwc,
    }

    fn failure(text: &str) -> Error {
        parse::<Outer>(text, Path::new("a.yaml")).unwrap_err()
    }

    #[test]
    fn names_file_line_and_nearest_key() {
        let error = failure("inner:\n  value_rang: [0, 1]\n");
        assert_eq!(error.to_string(), "`a.yaml` line 2: unknown key in `inner` `value_rang`");
        assert!(error.hint_text().unwrap().starts_with("did you mean `value_range`?"));
        assert_eq!(error.exit_code(), 1);
    }

    #[test]
    fn names_the_nearest_value_of_a_choice() {
        let error = failure("inner:\n  layout: nhcw\n");
        assert!(error.to_string().contains("unknown value in `inner.layout` `nhcw`"), "{error}");
        assert!(error.hint_text().unwrap().contains("did you mean `nhwc`"));
    }

    #[test]
    fn a_far_name_gets_the_list_only() {
        let error = failure("zebra: 1\n");
        assert_eq!(error.hint_text(), Some("known: inner"));
    }

    #[test]
    fn broken_yaml_keeps_its_line() {
        let error = failure("inner:\n  layout: [nchw\n");
        assert!(error.to_string().starts_with("`a.yaml` line "), "{error}");
    }

    #[test]
    fn accepts_what_is_right() {
        let outer: Outer = parse("inner: {layout: nhwc}", Path::new("a.yaml")).unwrap();
        assert!(matches!(outer.inner.unwrap().layout, Some(Layout::Nhwc)));
        let outer: Outer = parse("inner: {layout: nchw}", Path::new("a.yaml")).unwrap();
        assert!(matches!(outer.inner.unwrap().layout, Some(Layout::Nchw)));
    }
}
