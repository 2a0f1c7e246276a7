//! The one error type of the crate.
//!
//! Every failure a user can meet says what was wrong, where (a chain of contexts, outermost first)
//! and what to do about it (the hint). Its [`ErrorKind`] decides the exit code and is what a caller
//! matches on. One type rather than one enum a module: contexts are added at each border a failure
//! crosses, so the chain, not the variant, carries the place (ARCHITECTURE.md, "Errors").

use std::fmt;
use std::path::Path;

/// What a failure means to the caller; decides the exit code of the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The user's input was refused (a file, a folder, a field). Exit code 1.
    Input,
    /// An operator or feature that this build cannot do for this input. Exit code 1.
    Unsupported,
    /// The command line or configuration is wrong. Exit code 2.
    Usage,
    /// A query budget is spent; a normal end for the loops that meet it. Exit code 1.
    Budget,
    /// SIGINT or SIGTERM, after a checkpoint. Exit code 130.
    Interrupted,
    /// A defect or an environment failure (no disk, a library that misbehaves). Exit code 2.
    Internal,
}

/// An error with its context chain and a hint.
#[derive(Debug, Clone)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    context: Vec<String>,
    hint: Option<String>,
}

/// `Result` with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind` saying `message` (lower case, no full stop, the value last in backticks).
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), context: Vec::new(), hint: None }
    }

    /// The user's input was refused.
    pub fn input(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Input, message)
    }

    /// This build cannot do that for this input.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    /// The command line or configuration is wrong.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Usage, message)
    }

    /// A query budget is spent.
    pub fn budget(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Budget, message)
    }

    /// A defect or an environment failure.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }

    /// The run was interrupted by a signal.
    pub fn interrupted() -> Self {
        Self::new(ErrorKind::Interrupted, "interrupted")
    }

    /// An I/O failure on `path`: the user's input when it cannot be read, else internal.
    pub fn io(path: &Path, error: &std::io::Error) -> Self {
        let kind = match error.kind() {
            std::io::ErrorKind::NotFound
            | std::io::ErrorKind::PermissionDenied
            | std::io::ErrorKind::NotADirectory
            | std::io::ErrorKind::IsADirectory
            | std::io::ErrorKind::InvalidData => ErrorKind::Input,
            _ => ErrorKind::Internal,
        };
        Self::new(kind, format!("{error}")).context(format!("`{}`", path.display()))
    }

    /// Adds an outer context ("model `a.onnx`", "node `/conv1` (Conv)").
    #[must_use]
    pub fn context(mut self, context: impl Into<String>) -> Self {
        self.context.insert(0, context.into());
        self
    }

    /// Sets what the user can do about it; an inner hint wins over an outer one.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        if self.hint.is_none() {
            self.hint = Some(hint.into());
        }
        self
    }

    /// The kind, for matching.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The innermost message, without contexts.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The contexts, outermost first.
    pub fn contexts(&self) -> &[String] {
        &self.context
    }

    /// What to do about it.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The exit code of the command for this error.
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            ErrorKind::Input | ErrorKind::Unsupported | ErrorKind::Budget => 1,
            ErrorKind::Usage | ErrorKind::Internal => 2,
            ErrorKind::Interrupted => 130,
        }
    }
}

impl fmt::Display for Error {
    /// One line: contexts and message joined by `: `, without the hint.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for context in &self.context {
            write!(f, "{context}: ")?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        let text = error.to_string();
        Self::internal(format!("tensor library: {}", text.lines().next().unwrap_or_default()))
    }
}

/// Adds contexts to a failing [`Result`].
pub trait ResultExt<T> {
    /// Wraps the error with an outer context, made only on failure.
    fn context(self, context: impl FnOnce() -> String) -> Result<T>;
    /// Adds a hint, made only on failure.
    fn hint(self, hint: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Error>> ResultExt<T> for Result<T, E> {
    fn context(self, context: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| error.into().context(context()))
    }

    fn hint(self, hint: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| error.into().hint(hint()))
    }
}
