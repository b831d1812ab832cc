//! Texts of a dataset, one after the other.

use std::borrow::Cow;
use std::path::PathBuf;

use super::files::{Format, Part, parts};
use super::lines::Lines;
use super::parquet::Rows;
use crate::error::{Error, Result};

/// Which texts to read.
#[derive(Clone, Debug)]
pub struct TextSpec {
    /// A file or a folder; for texts from elsewhere, what errors call the whole of them.
    pub dataset: PathBuf,
    /// The column of JSON rows or parquet files that holds the text; a null there is an empty text.
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
    /// The files still to come.
    waiting: Box<dyn Iterator<Item = Result<Part>> + Send>,
    /// The texts of the open file.
    reader: Option<Reader>,
    done: bool,
}

type Reader = Box<dyn Iterator<Item = Result<String>> + Send>;

impl Texts {
    /// Finds the files behind `spec.dataset`. Fails where there are none; reads nothing yet.
    pub fn open(spec: &TextSpec) -> Result<Self> {
        Ok(Self::over(parts(&spec.dataset)?.into_iter().map(Ok), spec))
    }

    /// Texts of `files`, paths within the dataset `name`, of which each is brought to this machine only when the ones
    /// before it held too few texts: `fetch` turns its path there into one here. The endings of `files` say their
    /// formats, `spec.dataset` is not looked at.
    pub fn fetched(
        name: &str,
        files: Vec<String>,
        mut fetch: impl FnMut(&str) -> Result<PathBuf> + Send + 'static,
        spec: &TextSpec,
    ) -> Result<Self> {
        let parts: Vec<Part> = files.iter().map(|file| Part::elsewhere(name, file)).collect::<Result<_>>()?;
        let arriving = parts.into_iter().zip(files);
        Ok(Self::over(arriving.map(move |(part, file)| Ok(part.arrived(fetch(&file)?))), spec))
    }

    /// Texts of a file that is in memory; the ending of `name` says its format, `spec.dataset` is not looked at.
    pub fn from_bytes(name: &str, bytes: impl Into<Cow<'static, [u8]>>, spec: &TextSpec) -> Result<Self> {
        Ok(Self::over([Ok(Part::in_memory(name, bytes.into())?)].into_iter(), spec))
    }

    fn over(parts: impl Iterator<Item = Result<Part>> + Send + 'static, spec: &TextSpec) -> Self {
        let waiting = Box::new(parts);
        Self { spec: spec.clone(), counts: TextCounts::default(), waiting, reader: None, done: false }
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
                if let Some(text) = reader.next() {
                    return text.map(Some);
                }
                self.reader = None;
            }
            let Some(part) = self.waiting.next() else { return Ok(None) };
            self.reader = Some(open(part?, &self.spec.text_column)?);
        }
    }
}

fn open(part: Part, column: &str) -> Result<Reader> {
    Ok(match part.format {
        Format::Parquet => Box::new(Rows::open(&part.name, part.input()?, column)?),
        Format::Stream(shape) => Box::new(Lines::open(part, shape, column)?),
    })
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
