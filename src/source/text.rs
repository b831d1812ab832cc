//! Texts of a dataset, one after the other.

use std::borrow::Cow;
use std::io::BufRead;
use std::path::PathBuf;

use super::files::{Format, Part, parts, read_line};
use super::json::{Cell, Cut, Cutter, cell};
use crate::error::{Error, Result};

/// Which texts to read.
#[derive(Clone, Debug)]
pub struct TextSpec {
    /// A file or a folder.
    pub dataset: PathBuf,
    /// The column of JSON rows that holds the text.
    pub text_column: String,
    /// A text is kept when it has more characters than this, white space at its ends not counted; 0 keeps every
    /// text, the empty ones too.
    pub min_chars: usize,
    /// Reading stops after this many kept texts.
    pub num_samples: usize,
}

/// How many texts were met so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TextCounts {
    /// Texts read: kept + too_short.
    pub read: u64,
    /// Texts handed out.
    pub kept: u64,
    /// Texts that `min_chars` left out.
    pub too_short: u64,
}

/// The kept texts of a dataset in file order, read as they are asked for; ends after the first error.
pub struct Texts {
    spec: TextSpec,
    counts: TextCounts,
    /// The files still to come, the next one last.
    waiting: Vec<Part>,
    reader: Option<Reader>,
    done: bool,
}

struct Reader {
    part: Part,
    bytes: Box<dyn BufRead + Send>,
    /// The line (from 1) that is being read.
    line: u64,
    /// Cuts `.json` files, where values are not lines.
    cutter: Cutter,
    buffer: Vec<u8>,
}

impl Texts {
    /// Finds the files behind `spec.dataset`. Fails where there are none; reads nothing yet.
    pub fn open(spec: &TextSpec) -> Result<Self> {
        Ok(Self::over(parts(&spec.dataset)?, spec))
    }

    /// Texts of a file that is in memory; the ending of `name` says its format, `spec.dataset` is not looked at.
    pub fn from_bytes(name: &str, bytes: impl Into<Cow<'static, [u8]>>, spec: &TextSpec) -> Result<Self> {
        Ok(Self::over(vec![Part::in_memory(name, bytes.into())?], spec))
    }

    fn over(mut parts: Vec<Part>, spec: &TextSpec) -> Self {
        parts.reverse();
        Self { spec: spec.clone(), counts: TextCounts::default(), waiting: parts, reader: None, done: false }
    }

    /// What was met so far.
    pub fn counts(&self) -> TextCounts {
        self.counts
    }

    fn next_kept(&mut self) -> Result<Option<String>> {
        while self.counts.kept < self.spec.num_samples as u64 {
            let Some(text) = self.next_text()? else {
                if self.counts.read == 0 {
                    return Err(Error::new("the dataset has no texts")
                        .at_path(&self.spec.dataset)
                        .expected("at least one text")
                        .found("nothing but white space"));
                }
                return Ok(None);
            };
            self.counts.read += 1;
            if longer_than(&text, self.spec.min_chars) {
                self.counts.kept += 1;
                return Ok(Some(text));
            }
            self.counts.too_short += 1;
        }
        Ok(None)
    }

    fn next_text(&mut self) -> Result<Option<String>> {
        loop {
            if let Some(reader) = &mut self.reader {
                if let Some(text) = reader.next(&self.spec.text_column)? {
                    return Ok(Some(text));
                }
                self.reader = None;
            }
            let Some(part) = self.waiting.pop() else { return Ok(None) };
            let bytes = part.open()?;
            self.reader =
                Some(Reader { part, bytes, line: 0, cutter: Cutter::default(), buffer: Vec::new() });
        }
    }
}

impl Iterator for Texts {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Result<String>> {
        if self.done {
            return None;
        }
        let next = self.next_kept().transpose();
        if !matches!(next, Some(Ok(_))) {
            self.done = true;
            // The open file goes now, not when the iterator does.
            self.reader = None;
        }
        next
    }
}

impl Reader {
    fn next(&mut self, column: &str) -> Result<Option<String>> {
        match self.part.format {
            Format::Plain => {
                if !self.next_line()? {
                    return Ok(None);
                }
                let text = std::str::from_utf8(&self.buffer).map_err(|cause| self.not_utf8(cause))?;
                Ok(Some(text.to_owned()))
            }
            Format::JsonLines => {
                while self.next_line()? {
                    if !self.buffer.trim_ascii().is_empty() {
                        return self.text(column).map(Some);
                    }
                }
                Ok(None)
            }
            Format::Json => {
                let cut = self.cutter.next(self.bytes.as_mut(), &mut self.buffer);
                match cut.map_err(|cause| self.part.unreadable(cause, self.cutter.line()))? {
                    Cut::End => Ok(None),
                    Cut::Value(line) => {
                        self.line = line;
                        self.text(column).map(Some)
                    }
                    Cut::Wrong(line, what) => {
                        self.line = line;
                        Err(self.not_json(what))
                    }
                }
            }
        }
    }

    fn next_line(&mut self) -> Result<bool> {
        self.line += 1;
        read_line(self.bytes.as_mut(), &mut self.buffer)
            .map_err(|cause| self.part.unreadable(cause, self.line))
    }

    /// The text of the JSON row in the buffer.
    fn text(&mut self, column: &str) -> Result<String> {
        let row = std::str::from_utf8(&self.buffer).map_err(|cause| self.not_utf8(cause))?;
        let cell = match cell(row.as_bytes(), column) {
            Ok(cell) => cell,
            Err(cause) => {
                // The parser counts from the start of the row.
                self.line += (cause.line() as u64).saturating_sub(1);
                return Err(self.not_json(cause.to_string()));
            }
        };
        match cell {
            Cell::Text(text) => Ok(text),
            Cell::Other(kind) => Err(Error::new(format!("column {column:?} of the dataset is not a text"))
                .at(self.place())
                .expected("a string")
                .found(kind)
                .hint("--text_column names another column")),
            Cell::NoRow(kind) => Err(Error::new("a row of the dataset is no object")
                .at(self.place())
                .expected(format!("an object with a column {column:?}, or a string"))
                .found(kind)),
            Cell::Missing(columns) => {
                let found = match columns.is_empty() {
                    true => "an object without columns".to_owned(),
                    false => format!("columns {}", columns.join(", ")),
                };
                let example = columns.first().map_or("NAME", String::as_str).to_owned();
                Err(Error::new(format!("the dataset has no column {column:?}"))
                    .at(self.place())
                    .expected(format!("a column {column:?}"))
                    .found(found)
                    .hint(format!("name the column that holds the text, such as --text_column {example}")))
            }
        }
    }

    fn place(&self) -> String {
        format!("{}:{}", self.part.name, self.line)
    }

    fn not_json(&self, cause: impl std::fmt::Display) -> Error {
        let expected = match self.part.format {
            Format::Json => "an array of objects or of strings, or one JSON object per line",
            _ => "one JSON object per line",
        };
        Error::new("the dataset is not valid JSON").at(self.place()).expected(expected).found(cause)
    }

    fn not_utf8(&self, cause: std::str::Utf8Error) -> Error {
        let before = &self.buffer[..cause.valid_up_to()];
        let line = match self.part.format {
            Format::Json => self.line + before.iter().filter(|&&byte| byte == b'\n').count() as u64,
            _ => self.line,
        };
        let byte = self.buffer.get(cause.valid_up_to()).copied().unwrap_or_default();
        Error::new("the dataset is not UTF-8")
            .at(format!("{}:{line}", self.part.name))
            .expected("text in UTF-8")
            .found(format!("byte 0x{byte:02X}"))
            .hint("convert it, for example with `iconv -f latin1 -t utf-8`")
    }
}

/// The error for a dataset of which `min_chars` kept nothing; `counts` are the final ones.
pub fn nothing_kept(counts: &TextCounts, spec: &TextSpec) -> Error {
    Error::new("no text of the dataset is long enough")
        .at_path(&spec.dataset)
        .expected(format!("texts of more than {} characters", spec.min_chars))
        .found(match counts.read {
            1 => "1 text, which is shorter".to_owned(),
            read => format!("{read} texts, all shorter"),
        })
        .hint("--min_chars 0 keeps every text")
}

/// Python's `len(text.strip()) > min_chars`, except that 0 lets everything through.
fn longer_than(text: &str, min_chars: usize) -> bool {
    // Python also strips the four separators U+001C to U+001F, which Unicode does not call white space.
    let stripped = text.trim_matches(|c: char| c.is_whitespace() || ('\u{1C}'..='\u{1F}').contains(&c));
    min_chars == 0 || stripped.chars().nth(min_chars).is_some()
}

#[cfg(test)]
#[path = "text_tests.rs"]
mod tests;
