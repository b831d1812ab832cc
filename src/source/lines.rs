//! Texts from lines of text, from lines of JSON, and from `.json` files.

use std::io::BufRead;

use super::column::{missing, not_a_text};
use super::files::{Part, Shape, read_line};
use super::json::{Cell, Cut, Cutter, cell};
use crate::error::{Error, Result};

/// The texts of one file.
pub(super) struct Lines {
    part: Part,
    shape: Shape,
    column: String,
    bytes: Box<dyn BufRead + Send>,
    /// The line (from 1) that is being read.
    line: u64,
    /// Cuts `.json` files, where values are not lines.
    cutter: Cutter,
    buffer: Vec<u8>,
}

impl Lines {
    /// Opens a file whose bytes divide into texts as `shape` says.
    pub fn open(part: Part, shape: Shape, column: &str) -> Result<Self> {
        let bytes = part.open()?;
        let column = column.to_owned();
        Ok(Self { part, shape, column, bytes, line: 0, cutter: Cutter::default(), buffer: Vec::new() })
    }

    fn next_text(&mut self) -> Result<Option<String>> {
        match self.shape {
            Shape::Plain => {
                if !self.next_line()? {
                    return Ok(None);
                }
                let text = std::str::from_utf8(&self.buffer).map_err(|cause| self.not_utf8(cause))?;
                Ok(Some(text.to_owned()))
            }
            Shape::JsonLines => {
                while self.next_line()? {
                    if !self.buffer.trim_ascii().is_empty() {
                        return self.text().map(Some);
                    }
                }
                Ok(None)
            }
            Shape::Json => {
                let cut = self.cutter.next(self.bytes.as_mut(), &mut self.buffer);
                match cut.map_err(|cause| self.part.unreadable(cause, self.cutter.line()))? {
                    Cut::End => Ok(None),
                    Cut::Value(line) => {
                        self.line = line;
                        self.text().map(Some)
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
    fn text(&mut self) -> Result<String> {
        let row = std::str::from_utf8(&self.buffer).map_err(|cause| self.not_utf8(cause))?;
        let column = &self.column;
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
            Cell::Other(kind) => Err(not_a_text(column, kind).at(self.place())),
            Cell::NoRow(kind) => Err(Error::new("a row of the dataset is no object")
                .at(self.place())
                .expected(format!("an object with a column {column:?}, or a string"))
                .found(kind)),
            Cell::Missing(columns) => Err(missing(column, &columns, "an object").at(self.place())),
        }
    }

    fn place(&self) -> String {
        format!("{}:{}", self.part.name, self.line)
    }

    fn not_json(&self, cause: impl std::fmt::Display) -> Error {
        let expected = match self.shape {
            Shape::Json => "an array of objects or of strings, or one JSON object per line",
            _ => "one JSON object per line",
        };
        Error::new("the dataset is not valid JSON").at(self.place()).expected(expected).found(cause)
    }

    fn not_utf8(&self, cause: std::str::Utf8Error) -> Error {
        let before = &self.buffer[..cause.valid_up_to()];
        let line = match self.shape {
            Shape::Json => self.line + before.iter().filter(|&&byte| byte == b'\n').count() as u64,
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

impl Iterator for Lines {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Result<String>> {
        self.next_text().transpose()
    }
}
