//! The one error type: what went wrong, where, what was expected, what was found, and a hint.
//!
//! Every message a user can meet is built here, so that all of them read the same way:
//!
//! ```text
//! error: config.json names an unknown architecture
//!   where:    models/foo/config.json
//!   expected: one of the rows of src/model/arch.rs
//!   found:    "mamba"
//!
//! hint: gradlens reads decoder models with a gated MLP
//! ```

use std::fmt;
use std::path::Path;

/// What the process tells the shell about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The job failed: exit status 1.
    Failed,
    /// The command line makes no sense: exit status 2.
    Usage,
    /// Ctrl-C or a signal like it ended the job.
    Interrupted {
        /// Exit status: 130 after Ctrl-C.
        exit_code: u8,
    },
}

impl Kind {
    /// The exit status of the process.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Interrupted { exit_code } => exit_code,
        }
    }
}

/// An error as the user reads it. Built in steps: `Error::new("…").at(path).expected(…).found(…).hint(…)`.
///
/// The contents are boxed: errors are rare, and a `Result` stays one pointer wide.
#[derive(Debug)]
pub struct Error(Box<Parts>);

#[derive(Debug)]
struct Parts {
    kind: Kind,
    what: String,
    place: Option<String>,
    expected: Option<String>,
    found: Option<String>,
    hint: Option<String>,
}

/// The result of every fallible function of the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The job failed because of `what` (a sentence without a full stop, lower case).
    pub fn new(what: impl Into<String>) -> Self {
        Self::of(Kind::Failed, what.into())
    }

    /// The command line is wrong.
    pub fn usage(what: impl Into<String>) -> Self {
        Self::of(Kind::Usage, what.into())
    }

    /// Somebody asked the job to stop; who knows what was done adds it as [`found`](Self::found).
    pub fn interrupted(exit_code: u8) -> Self {
        Self::of(Kind::Interrupted { exit_code }, "interrupted".into())
    }

    fn of(kind: Kind, what: String) -> Self {
        Self(Box::new(Parts { kind, what, place: None, expected: None, found: None, hint: None }))
    }

    /// Where it happened: a file, a tensor, a layer, a flag. The innermost place wins.
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.0.place.get_or_insert_with(|| place.to_string());
        self
    }

    /// Where it happened, as a path.
    pub fn at_path(self, path: impl AsRef<Path>) -> Self {
        self.at(path.as_ref().display())
    }

    /// What would have been right.
    pub fn expected(mut self, expected: impl fmt::Display) -> Self {
        self.0.expected = Some(expected.to_string());
        self
    }

    /// What was there instead.
    pub fn found(mut self, found: impl fmt::Display) -> Self {
        self.0.found = Some(found.to_string());
        self
    }

    /// What the user can do about it.
    pub fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.0.hint = Some(hint.to_string());
        self
    }

    /// What went wrong, in one line.
    pub fn what(&self) -> &str {
        &self.0.what
    }

    /// What the process tells the shell.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Parts { what, place, expected, found, hint, .. } = &*self.0;
        write!(f, "{what}")?;
        for (label, text) in [("where:   ", place), ("expected:", expected), ("found:   ", found)] {
            if let Some(text) = text {
                write!(f, "\n  {label} {}", text.replace('\n', "\n            "))?;
            }
        }
        match hint {
            Some(hint) => write!(f, "\n\nhint: {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

/// Turns the errors of the standard library and of other crates into ours, saying what was being done.
pub trait Context<T> {
    /// `what` failed; the cause becomes the `found:` line.
    fn context(self, what: impl Into<String>) -> Result<T>;
    /// `what` failed on the file at `path`; the cause becomes the `found:` line.
    fn context_path(self, what: impl Into<String>, path: impl AsRef<Path>) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl Into<String>) -> Result<T> {
        self.map_err(|cause| Error::new(what).found(cause))
    }

    fn context_path(self, what: impl Into<String>, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|cause| Error::new(what).at_path(path).found(cause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_as_documented() {
        let error = Error::new("config.json names an unknown architecture")
            .at("config.json")
            .expected("one of a, b")
            .found("c")
            .hint("try a");
        assert_eq!(
            error.to_string(),
            "config.json names an unknown architecture\n  where:    config.json\n  expected: one of a, b\n  \
             found:    c\n\nhint: try a"
        );
    }

    #[test]
    fn innermost_place_wins() {
        assert!(Error::new("x").at("inner").at("outer").to_string().contains("inner"));
    }
}
