//! An SAE's JSON configuration, read with errors that name the key.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Context, Error, Result};
use crate::weights::mapped::refuse_pointer;

/// Largest configuration that is read, in bytes; real ones have a few thousand.
const MAX_BYTES: u64 = 16 << 20;

/// A JSON object from a file.
#[derive(Clone, Debug)]
pub(super) struct Config {
    pub path: PathBuf,
    map: Map<String, Value>,
}

impl Config {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// There is none, or it is no JSON object.
    pub fn read(path: &Path) -> Result<Self> {
        let what = "cannot read an SAE's configuration";
        let about = std::fs::metadata(path)
            .context_path(what, path)
            .map_err(|error| error.hint("an SAE's weights mean nothing without it: fetch the file, too"))?;
        if !about.is_file() || about.len() > MAX_BYTES {
            return Err(Error::new(what)
                .at_path(path)
                .expected(format_args!("a file of at most {MAX_BYTES} bytes"))
                .found(if about.is_file() {
                    format!("{} bytes", about.len())
                } else {
                    "no file".to_owned()
                }));
        }
        let mut text = Vec::new();
        File::open(path)
            .and_then(|file| file.take(MAX_BYTES).read_to_end(&mut text))
            .context_path(what, path)?;
        refuse_pointer(&text, "JSON").map_err(|error| error.at_path(path))?;
        Self::from_bytes(path, &text)
    }

    /// Reads a file that is in memory; `path` is its name in errors.
    pub fn from_bytes(path: &Path, text: &[u8]) -> Result<Self> {
        let map = serde_json::from_slice(text)
            .context_path("an SAE's configuration is not what it should be", path)
            .map_err(|error| {
                error.expected("a JSON object").hint("the download may be incomplete: fetch it again")
            })?;
        Ok(Self { path: path.to_owned(), map })
    }

    /// The file at `path`, if it exists.
    pub fn read_if_there(path: &Path) -> Result<Option<Self>> {
        if path.exists() { Self::read(path).map(Some) } else { Ok(None) }
    }

    /// Nothing: an SAE without a configuration.
    pub fn none(path: &Path) -> Self {
        Self { path: path.to_owned(), map: Map::new() }
    }

    /// The value of `key` unless it is null; keys of objects inside are joined by dots.
    fn get(&self, key: &str) -> Option<&Value> {
        let mut parts = key.split('.');
        let first = self.map.get(parts.next()?)?;
        let value = parts.try_fold(first, |value, part| value.get(part))?;
        (!value.is_null()).then_some(value)
    }

    /// Whether there is a `key`, be it null.
    pub fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The error for a `key` that has another value than `expected`.
    pub fn wrong(&self, key: &str, expected: impl std::fmt::Display) -> Error {
        let found = self.get(key).map_or_else(|| "nothing".to_owned(), ToString::to_string);
        Error::new(format!("{key} of an SAE's configuration is not what it should be"))
            .at_path(&self.path)
            .expected(expected)
            .found(found.chars().take(200).collect::<String>())
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        kind: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        self.get(key).map(|value| read(value).ok_or_else(|| self.wrong(key, kind))).transpose()
    }

    /// A string.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// A string, wherever it is not one nothing: what is only told, not used.
    pub fn told(&self, key: &str) -> Option<String> {
        self.get(key).and_then(Value::as_str).map(str::to_owned)
    }

    /// A count.
    pub fn count(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number", |value| {
            value.as_u64().and_then(|number| usize::try_from(number).ok())
        })
    }

    /// `true` or `false`.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A finite number.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", |value| value.as_f64().filter(|number| number.is_finite()))
    }

    /// Whether the value of `key` is `true` or `false`.
    pub fn is_bool(&self, key: &str) -> bool {
        self.get(key).is_some_and(Value::is_boolean)
    }
}
