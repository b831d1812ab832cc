//! Typed access to the keys of a JSON object, with errors that name file, key, expected and found.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// An object of `config.json`.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    map: &'a Map<String, Value>,
    place: &'a Path,
    /// Key under which this object lies, empty for the whole file.
    inside: &'a str,
}

impl<'a> Keys<'a> {
    /// The whole file at `place`.
    pub fn new(map: &'a Map<String, Value>, place: &'a Path) -> Self {
        Self { map, place, inside: "" }
    }

    /// The object under `key`; `None` when the key is absent, null or an empty object.
    pub fn object(self, key: &'a str) -> Result<Option<Self>> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(map)) if map.is_empty() => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { map, place: self.place, inside: key })),
            Some(other) => Err(self.wrong(key, "an object or null", other)),
        }
    }

    /// All entries.
    pub fn entries(self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.map.iter()
    }

    /// The raw value of `key`.
    pub fn get(self, key: &str) -> Option<&'a Value> {
        self.map.get(key)
    }

    /// Whether `key` is there and not null.
    pub fn has(self, key: &str) -> bool {
        self.map.get(key).is_some_and(|value| !value.is_null())
    }

    /// An error about `key`.
    pub fn error(self, what: impl Into<String>, key: &str) -> Error {
        let dot = if self.inside.is_empty() { "" } else { "." };
        Error::new(what).at(format_args!("{}, key {}{dot}{key}", self.place.display(), self.inside))
    }

    /// The error that `key` has the wrong type or range.
    pub fn wrong(self, key: &str, expected: &str, found: &Value) -> Error {
        self.error("config.json holds a value that makes no sense", key)
            .expected(expected)
            .found(shown(found))
    }

    /// The error that `key` is absent.
    pub fn missing(self, key: &str, expected: &str) -> Error {
        self.error("config.json lacks a key", key)
            .expected(expected)
            .found("nothing")
            .hint("take config.json from the model's own repository")
    }

    /// An integer in `1..=limit`; `None` when the key is absent.
    pub fn count(self, key: &str, limit: usize) -> Result<Option<usize>> {
        let Some(value) = self.map.get(key) else { return Ok(None) };
        value
            .as_u64()
            .and_then(|n| usize::try_from(n).ok())
            .filter(|&n| n >= 1 && n <= limit)
            .map(Some)
            .ok_or_else(|| self.wrong(key, &format!("an integer from 1 to {limit}"), value))
    }

    /// As [`Keys::count`], but null counts as absent.
    pub fn count_or_null(self, key: &str, limit: usize) -> Result<Option<usize>> {
        if self.has(key) { self.count(key, limit) } else { Ok(None) }
    }

    /// An integer in `1..=limit` that has to be there.
    pub fn size(self, key: &str, limit: usize) -> Result<usize> {
        self.count(key, limit)?.ok_or_else(|| self.missing(key, &format!("an integer from 1 to {limit}")))
    }

    /// A finite number above zero; `None` when the key is absent.
    pub fn positive(self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.map.get(key) else { return Ok(None) };
        value
            .as_f64()
            .filter(|x| x.is_finite() && *x > 0.0)
            .map(Some)
            .ok_or_else(|| self.wrong(key, "a finite number above zero", value))
    }

    /// A finite number above zero that has to be there.
    pub fn positive_required(self, key: &str) -> Result<f64> {
        self.positive(key)?.ok_or_else(|| self.missing(key, "a finite number above zero"))
    }

    /// A boolean; `None` when the key is absent.
    pub fn flag(self, key: &str) -> Result<Option<bool>> {
        match self.map.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.wrong(key, "true or false", other)),
        }
    }

    /// A string; `None` when the key is absent.
    pub fn text(self, key: &str) -> Result<Option<&'a str>> {
        match self.map.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(key, "a string", other)),
        }
    }

    /// As [`Keys::text`], but null counts as absent.
    pub fn text_or_null(self, key: &str) -> Result<Option<&'a str>> {
        if self.has(key) { self.text(key) } else { Ok(None) }
    }

    /// A list of strings; `None` when the key is absent or null.
    pub fn texts(self, key: &str) -> Result<Option<Vec<&'a str>>> {
        let value = match self.map.get(key) {
            None | Some(Value::Null) => return Ok(None),
            Some(value) => value,
        };
        value
            .as_array()
            .and_then(|list| list.iter().map(Value::as_str).collect())
            .map(Some)
            .ok_or_else(|| self.wrong(key, "a list of strings", value))
    }
}

/// A value as a message shows it: cut when long, because it may be a whole file.
pub(super) fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
