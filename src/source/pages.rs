//! The pages of one column chunk, with every length checked before the parquet crate reserves memory by it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::sync::Arc;

use bytes::{Buf, Bytes};
use parquet::basic::{Compression, Encoding};
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::ColumnChunkMetaData;
use parquet::file::reader::{ChunkReader, Length};
use parquet::file::serialized_reader::SerializedPageReader;

use super::thrift::{after_deltas, page_sizes};

/// A page of up to this size is believed whatever its stored size.
const FREE_BYTES: u64 = 1 << 20;

/// A file that is read here and there.
#[derive(Debug)]
pub(super) enum Input {
    Disk(File),
    Memory(Bytes),
}

impl Input {
    /// Its size in bytes.
    pub fn len(&self) -> std::io::Result<u64> {
        match self {
            Self::Disk(file) => Ok(file.metadata()?.len()),
            Self::Memory(bytes) => Ok(bytes.len() as u64),
        }
    }

    /// A stream from `start` on; two streams of one file cannot be read by turns.
    fn stream(&self, start: u64) -> std::io::Result<Box<dyn BufRead>> {
        match self {
            Self::Disk(file) => {
                let mut file = file.try_clone()?;
                file.seek(SeekFrom::Start(start))?;
                Ok(Box::new(BufReader::new(file)))
            }
            Self::Memory(bytes) => {
                let start = usize::try_from(start).unwrap_or(usize::MAX).min(bytes.len());
                Ok(Box::new(bytes.slice(start..).reader()))
            }
        }
    }

    /// The bytes `start .. start + length`, which the caller knows to lie in the file.
    pub fn bytes(&self, start: u64, length: usize) -> std::io::Result<Bytes> {
        if let Self::Memory(bytes) = self {
            let start = usize::try_from(start).ok().filter(|&start| start <= bytes.len());
            let end = start.and_then(|start| start.checked_add(length)).filter(|&end| end <= bytes.len());
            return match (start, end) {
                (Some(start), Some(end)) => Ok(bytes.slice(start..end)),
                _ => Err(std::io::ErrorKind::UnexpectedEof.into()),
            };
        }
        let mut bytes = vec![0; length];
        self.stream(start)?.read_exact(&mut bytes)?;
        Ok(bytes.into())
    }
}

/// Where one column of one row group lies in the file. Nothing outside is read.
pub(super) struct Chunk {
    input: Arc<Input>,
    start: u64,
    end: u64,
    /// How many bytes one stored byte can become.
    growth: u64,
}

impl Chunk {
    /// The place that `about` states, or what is wrong with it.
    pub fn new(input: Arc<Input>, about: &ColumnChunkMetaData) -> Result<Self> {
        // What `ColumnChunkMetaData::byte_range` gives, which asserts that it makes sense.
        let start = about.dictionary_page_offset().unwrap_or(about.data_page_offset());
        let length = u64::try_from(about.compressed_size()).ok();
        let end = u64::try_from(start).ok().and_then(|start| start.checked_add(length?));
        let size = input.len()?;
        match end {
            Some(end) if end <= size => {
                Ok(Self { input, start: start as u64, end, growth: growth(about.compression()) })
            }
            _ => Err(ParquetError::EOF(format!(
                "the column should lie at {start} and have {} bytes, the file has {size}",
                about.compressed_size()
            ))),
        }
    }

    fn check(&self, start: u64, length: u64) -> Result<()> {
        match start.checked_add(length) {
            Some(end) if self.start <= start && end <= self.end => Ok(()),
            _ => Err(ParquetError::EOF(format!("a page leaves its column: {length} bytes at {start}"))),
        }
    }
}

/// The most that each compression can gain; what no file reaches makes its header a damaged one.
fn growth(compression: Compression) -> u64 {
    match compression {
        Compression::UNCOMPRESSED => 1,
        // A copy of 64 bytes takes 3.
        Compression::SNAPPY => 32,
        Compression::LZ4 | Compression::LZ4_RAW => 256,
        // 258 bytes from 2 bits.
        Compression::GZIP(_) => 1040,
        // A block of 128 KiB of one byte takes 4.
        _ => 1 << 15,
    }
}

impl Length for Chunk {
    fn len(&self) -> u64 {
        self.end
    }
}

impl ChunkReader for Chunk {
    type T = std::io::Take<Box<dyn BufRead>>;

    /// Asked for the header of each page.
    fn get_read(&self, start: u64) -> Result<Self::T> {
        self.check(start, 0)?;
        let mut stream = self.input.stream(start)?.take(self.end - start);
        let Some((unpacked, stored)) = page_sizes(stream.fill_buf()?) else {
            return Err(ParquetError::General(format!("no page begins at byte {start}")));
        };
        if unpacked > FREE_BYTES.max(stored.saturating_mul(self.growth)) {
            return Err(ParquetError::General(format!(
                "a page of {stored} bytes cannot become one of {unpacked}"
            )));
        }
        Ok(stream)
    }

    /// Asked for what each page holds.
    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        self.check(start, length as u64)?;
        Ok(self.input.bytes(start, length)?)
    }
}

/// The pages, each checked for what the crate's decoders take for granted.
pub(super) struct Pages {
    pages: SerializedPageReader<Chunk>,
    /// Whether levels, which say what is null, stand before the values.
    nullable: bool,
    dictionary: bool,
}

impl Pages {
    /// The pages of `chunk`, of which the row group has `rows`.
    pub fn new(chunk: Chunk, about: &ColumnChunkMetaData, rows: usize) -> Result<Self> {
        let nullable = about.column_descr().max_def_level() > 0;
        let pages = SerializedPageReader::new(Arc::new(chunk), about, rows, None)?;
        Ok(Self { pages, nullable, dictionary: false })
    }

    /// Whether the page is to be handed on.
    fn check(&mut self, page: &Page) -> Result<bool> {
        let wrong = |what: &str| Err(ParquetError::General(what.to_owned()));
        let (encoding, values) = match page {
            Page::DictionaryPage { buf, num_values, .. } => {
                self.dictionary = true;
                // Each text has at least its length, of 4 bytes.
                return match u64::from(*num_values) * 4 <= buf.len() as u64 {
                    true => Ok(true),
                    false => wrong("a dictionary has more texts than bytes for them"),
                };
            }
            // The crate takes a page without values for the last one.
            _ if page.num_values() == 0 => return Ok(false),
            Page::DataPage { buf, num_values, encoding, def_level_encoding, .. } => {
                let levels = match (self.nullable, def_level_encoding) {
                    (false, _) => Some(0),
                    (true, Encoding::RLE) => {
                        buf.first_chunk().map(|length| u64::from(u32::from_le_bytes(*length)) + 4)
                    }
                    // The old way: a bit each.
                    (true, _) => Some(u64::from(num_values.div_ceil(8))),
                };
                (*encoding, after(buf, levels))
            }
            Page::DataPageV2 { buf, encoding, def_levels_byte_len, rep_levels_byte_len, .. } => {
                let levels = u64::from(*def_levels_byte_len) + u64::from(*rep_levels_byte_len);
                (*encoding, after(buf, Some(levels)))
            }
        };
        let Some(values) = values else { return wrong("a page is shorter than its levels") };
        // A decoder keeps 4 bytes a number, which may take no space in the page when all are alike.
        let most = u64::from(page.num_values()).min((1 << 16) + 32 * values.len() as u64);
        let sound = match encoding {
            // Older files have the other name.
            Encoding::RLE_DICTIONARY | Encoding::PLAIN_DICTIONARY => self.dictionary,
            Encoding::DELTA_LENGTH_BYTE_ARRAY => after_deltas(values, most).is_some(),
            Encoding::DELTA_BYTE_ARRAY => {
                after_deltas(values, most).and_then(|suffixes| after_deltas(suffixes, most)).is_some()
            }
            _ => true,
        };
        if !sound {
            return wrong(&format!("a page of {encoding} does not hold what it should"));
        }
        Ok(true)
    }
}

fn after(bytes: &[u8], levels: Option<u64>) -> Option<&[u8]> {
    bytes.get(usize::try_from(levels?).ok()?..)
}

impl PageReader for Pages {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        loop {
            match self.pages.get_next_page()? {
                Some(page) if !self.check(&page)? => {}
                page => return Ok(page),
            }
        }
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Result<()> {
        self.pages.skip_next_page()
    }
}

impl Iterator for Pages {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}
