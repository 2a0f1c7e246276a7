//! The one owner of stdout and stderr.

use std::io::{ErrorKind as IoErrorKind, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{MultiProgress, ProgressDrawTarget};
use serde::Serialize;

use super::settings::{Decoration, Format, Settings, Talk};
use crate::error::{Error, Result};

/// Prints data on stdout and talk on stderr, above the progress bars when there are any.
#[derive(Debug)]
pub(crate) struct Printer {
    format: Format,
    talk: Talk,
    color: Decoration,
    bars: MultiProgress,
    stdout_closed: AtomicBool,
}

impl Printer {
    /// A printer for these settings.
    pub(crate) fn new(settings: &Settings) -> Self {
        let target = match settings.bars {
            Decoration::On => ProgressDrawTarget::stderr(),
            Decoration::Off => ProgressDrawTarget::hidden(),
        };
        Self {
            format: settings.format,
            talk: settings.talk,
            color: settings.color,
            bars: MultiProgress::with_draw_target(target),
            stdout_closed: AtomicBool::new(false),
        }
    }

    /// The bars all stages are drawn in.
    pub(crate) fn bars(&self) -> &MultiProgress {
        &self.bars
    }

    /// Prints `value` as JSON, or `table` for people, as the user chose.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub(crate) fn result<T: Serialize>(
        &self,
        value: &T,
        table: impl FnOnce(&T) -> String,
    ) -> Result<()> {
        match self.format {
            Format::Human => self.data(&table(value)),
            Format::Json => {
                let json = serde_json::to_string_pretty(value)
                    .map_err(|error| Error::internal(format!("cannot print JSON: `{error}`")))?;
                self.data(&json)
            }
        }
    }

    /// Prints data on stdout, ending with a newline. A reader that went away (`| head`) is no
    /// failure: the rest is dropped.
    ///
    /// # Errors
    /// When stdout cannot be written for another reason.
    pub(crate) fn data(&self, text: &str) -> Result<()> {
        if self.stdout_closed.load(Ordering::Relaxed) {
            return Ok(());
        }
        let end = if text.ends_with('\n') { "" } else { "\n" };
        let written = self.bars.suspend(|| {
            let mut out = std::io::stdout().lock();
            out.write_all(text.as_bytes())?;
            out.write_all(end.as_bytes())?;
            out.flush()
        });
        match written {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == IoErrorKind::BrokenPipe => {
                self.stdout_closed.store(true, Ordering::Relaxed);
                Ok(())
            }
            Err(error) => Err(Error::io(Path::new("stdout"), &error)),
        }
    }

    /// Says `text` on stderr, unless quiet.
    pub(crate) fn note(&self, text: &str) {
        if self.talk > Talk::Quiet {
            self.say(text);
        }
    }

    /// Reports a failure: what was wrong, why, what to do.
    pub(crate) fn error(&self, error: &Error) {
        self.say(render_error(error, self.color).trim_end());
    }

    /// Nothing can be done about a closed stderr, so its failures are dropped.
    fn say(&self, text: &str) {
        self.bars.suspend(|| {
            let mut err = std::io::stderr().lock();
            let _ = writeln!(err, "{text}");
        });
    }
}

/// The error as text: the outermost context leads, each inner one is a cause, the hint ends.
fn render_error(error: &Error, color: Decoration) -> String {
    let paint = |style: &str, text: &str| match color {
        Decoration::On => format!("\u{1b}[{style}m{text}\u{1b}[0m"),
        Decoration::Off => text.into(),
    };
    let mut lines = error.contexts().iter().map(String::as_str).chain([error.message()]);
    let mut text = format!("{} {}\n", paint("1;31", "error:"), lines.next().unwrap_or_default());
    for cause in lines {
        text.push_str(&format!("  {} {cause}\n", paint("1", "caused by:")));
    }
    if let Some(hint) = error.hint_text() {
        text.push_str(&format!("{} {hint}\n", paint("1;36", "hint:")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_shows_its_contexts_as_causes_and_ends_with_the_hint() {
        let error = Error::input("graph has no BatchNormalization node")
            .context("cannot use model `zoo/r18.onnx` as white-box")
            .hint("set `access: black-box` in `zoo/r18.yaml`");
        insta::assert_snapshot!(render_error(&error, Decoration::Off), @r"
        error: cannot use model `zoo/r18.onnx` as white-box
          caused by: graph has no BatchNormalization node
        hint: set `access: black-box` in `zoo/r18.yaml`
        ");
    }
}
