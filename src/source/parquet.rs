//! Parquet files: the texts of one column, a page at a time.
//!
//! The parquet crate unpacks pages and reads their values. It trusts the lengths in a file's headers and indexes by what
//! it decodes; so the lengths are checked first (`pages`, `thrift`), and what still panics is caught.

use std::sync::Arc;

use parquet::basic::{Compression, ConvertedType, LogicalType, Type as Physical};
use parquet::column::reader::ColumnReaderImpl;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::metadata::{
    ParquetMetaData, ParquetMetaDataOptions, ParquetMetaDataReader, ParquetStatisticsPolicy, RowGroupMetaData,
};
use parquet::schema::types::Type;

use super::column::{COLUMNS_SHOWN, missing, not_a_text};
use super::pages::{Chunk, Input, Pages};
use super::panics::caught;
use super::thrift::check_schema;
use crate::error::{Error, Result};

/// The first and the last bytes of a file.
const MAGIC: &[u8; 4] = b"PAR1";
/// The last bytes of a file whose footer is encrypted.
const ENCRYPTED: &[u8; 4] = b"PARE";
const AGAIN: &str = "copy or download the file again; pyarrow.parquet.read_table(FILE) in Python tests it";

/// The texts of one file.
pub(super) struct Rows {
    /// What errors call the file.
    name: String,
    column: String,
    input: Arc<Input>,
    about: ParquetMetaData,
    /// The column's number among the columns that are stored.
    leaf: usize,
    /// The row group that is being read, or is next.
    group: usize,
    open: Option<Group>,
    /// The row of the file (from 0) that is next.
    row: u64,
}

/// A row group that is being read.
struct Group {
    values: ColumnReaderImpl<ByteArrayType>,
    /// Rows still to come, and all of them.
    left: u64,
    rows: u64,
}

impl Rows {
    /// Reads the footer of the file `name` and finds `column`.
    pub fn open(name: &str, input: Input, column: &str) -> Result<Self> {
        let about = footer(name, &input)?;
        let schema = about.file_metadata().schema_descr();
        let top = schema.root_schema().get_fields();
        let Some(field) = top.iter().find(|field| field.name() == column) else {
            let columns: Vec<String> =
                top.iter().take(COLUMNS_SHOWN).map(|field| field.name().to_owned()).collect();
            return Err(missing(column, &columns, "a table").at(name));
        };
        if let Some(kind) = other_than_text(field) {
            return Err(not_a_text(column, &kind).at(name));
        }
        let leaf = schema.columns().iter().position(|leaf| leaf.path().parts() == [column]);
        let leaf = leaf.ok_or_else(|| damaged("its schema names a column that is not stored").at(name))?;
        Ok(Self {
            name: name.to_owned(),
            column: column.to_owned(),
            input: Arc::new(input),
            about,
            leaf,
            group: 0,
            open: None,
            row: 0,
        })
    }

    fn next_text(&mut self) -> Result<Option<String>> {
        while self.group < self.about.num_row_groups() {
            if self.open.is_none() {
                self.open = Some(self.open_group()?);
            }
            if let Some(group) = self.open.as_mut().filter(|group| group.left > 0) {
                let value =
                    caught(|| group.next()).unwrap_or_else(Err).map_err(|cause| self.broken(cause))?;
                let text = String::from_utf8(value)
                    .map_err(|cause| self.not_utf8(cause.utf8_error(), cause.as_bytes()))?;
                self.row += 1;
                return Ok(Some(text));
            }
            self.open = None;
            self.group += 1;
        }
        Ok(None)
    }

    fn open_group(&self) -> Result<Group> {
        let about = self.about.row_group(self.group);
        let column = about.column(self.leaf);
        if let Some(codec) = unread(column.compression()) {
            return Err(Error::new(format!("the parquet file is compressed with {codec}"))
                .at(self.place())
                .expected("snappy, zstd, gzip, lz4_raw or no compression")
                .found(codec)
                .hint(
                    "pyarrow.parquet.write_table(pyarrow.parquet.read_table(FILE), NEW_FILE, compression=\"zstd\") \
                     in Python writes it anew",
                ));
        }
        caught(|| Group::open(&self.input, about, self.leaf))
            .unwrap_or_else(Err)
            .map_err(|cause| self.broken(cause))
    }

    fn place(&self) -> String {
        let groups = self.about.num_row_groups();
        format!(
            "{}, row group {} (from 0, of {groups}), row {} of the file (from 0)",
            self.name, self.group, self.row
        )
    }

    fn broken(&self, cause: String) -> Error {
        damaged(&cause)
            .at(self.place())
            .expected(format!("pages of column {:?} that can be read", self.column))
    }

    fn not_utf8(&self, cause: std::str::Utf8Error, value: &[u8]) -> Error {
        let byte = value.get(cause.valid_up_to()).copied().unwrap_or_default();
        Error::new("the dataset is not UTF-8")
            .at(self.place())
            .expected("text in UTF-8")
            .found(format!("byte 0x{byte:02X}"))
            .hint("--text_column names another column, if this one holds no text")
    }
}

impl Iterator for Rows {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Result<String>> {
        self.next_text().transpose()
    }
}

impl Group {
    fn open(input: &Arc<Input>, about: &RowGroupMetaData, leaf: usize) -> Result<Self, String> {
        let rows = u64::try_from(about.num_rows()).map_err(|_| "a negative number of rows".to_owned())?;
        let column = about.column(leaf);
        let pages = Chunk::new(Arc::clone(input), column)
            .and_then(|chunk| Pages::new(chunk, column, usize::try_from(rows)?))
            .map_err(said)?;
        let values = ColumnReaderImpl::new(column.column_descr_ptr(), Box::new(pages));
        Ok(Self { values, left: rows, rows })
    }

    /// The bytes of the next row. One at a time: values stored by what they share with the one before can be as long
    /// as their page, each of them.
    fn next(&mut self) -> Result<Vec<u8>, String> {
        let (mut levels, mut values) = (Vec::new(), Vec::<ByteArray>::new());
        let read = self.values.read_records(1, Some(&mut levels), None, &mut values);
        match read.map_err(said)? {
            (0, ..) => Err(format!("the column ends after {} of {} rows", self.rows - self.left, self.rows)),
            _ => {
                self.left -= 1;
                // Without a value the row is null: an empty text.
                Ok(values.first().map(|value| value.data().to_vec()).unwrap_or_default())
            }
        }
    }
}

/// The crate's error without its own first word.
fn said(cause: ParquetError) -> String {
    match cause {
        ParquetError::General(what) | ParquetError::EOF(what) | ParquetError::NYI(what) => what,
        ParquetError::External(cause) => cause.to_string(),
        other => other.to_string(),
    }
}

fn damaged(cause: &str) -> Error {
    Error::new("the parquet file is damaged").found(cause).hint(AGAIN)
}

fn footer(name: &str, input: &Input) -> Result<ParquetMetaData> {
    let unreadable = |cause: std::io::Error| Error::new("cannot read the dataset").at(name).found(cause);
    let size = input.len().map_err(unreadable)?;
    let begins = input.bytes(0, size.min(4) as usize).map_err(unreadable)?;
    let ends = input.bytes(size.saturating_sub(8), size.min(8) as usize).map_err(unreadable)?;
    let (length, magic) = match ends.split_first_chunk::<4>() {
        Some((length, magic)) => (u64::from(u32::from_le_bytes(*length)), magic),
        None => (0, &ends[..]),
    };
    if magic == ENCRYPTED {
        return Err(Error::new("the parquet file is encrypted")
            .at(name)
            .expected("a parquet file without encryption")
            .found("an encrypted footer")
            .hint("pyarrow.parquet in Python reads it with its keys, and writes it anew without them"));
    }
    if magic != MAGIC {
        let (what, found) = match begins.starts_with(MAGIC) {
            true => ("the parquet file is cut off", "the first bytes of one, but not the last"),
            false => ("the dataset is no parquet file", "neither the first nor the last bytes of one"),
        };
        let error = Error::new(what).at(name).expected("a parquet file, from PAR1 to PAR1");
        return Err(error.found(format!("{size} bytes: {found}")).hint(AGAIN));
    }
    let wrong = |cause: &str| damaged(cause).at(name).expected("a footer that can be read");
    let start = size.checked_sub(length + 8).ok_or_else(|| wrong("a footer longer than the file"))?;
    let bytes = input.bytes(start, length as usize).map_err(unreadable)?;
    check_schema(&bytes).ok_or_else(|| wrong("a footer without a sound schema"))?;
    // Statistics are of no use here, and as long as the texts.
    let options = ParquetMetaDataOptions::new()
        .with_column_stats_policy(ParquetStatisticsPolicy::SkipAll)
        .with_size_stats_policy(ParquetStatisticsPolicy::SkipAll)
        .with_encoding_stats_policy(ParquetStatisticsPolicy::SkipAll);
    caught(|| ParquetMetaDataReader::decode_metadata_with_options(&bytes, Some(&options)).map_err(said))
        .unwrap_or_else(Err)
        .map_err(|cause| wrong(&cause))
}

/// What `field` holds, unless it is texts.
fn other_than_text(field: &Type) -> Option<String> {
    let about = field.get_basic_info();
    if field.is_group() {
        return Some(match (about.logical_type_ref(), about.converted_type()) {
            (Some(LogicalType::List), _) | (_, ConvertedType::LIST) => "lists".to_owned(),
            (Some(LogicalType::Map), _) | (_, ConvertedType::MAP) => "maps".to_owned(),
            _ => format!("groups of columns: {}", first_names(field)),
        });
    }
    if about.has_repetition() && about.repetition() == parquet::basic::Repetition::REPEATED {
        return Some("repeated values".to_owned());
    }
    match (field.get_physical_type(), about.logical_type_ref(), about.converted_type()) {
        (Physical::BYTE_ARRAY, Some(LogicalType::String | LogicalType::Json | LogicalType::Enum), _) => None,
        (Physical::BYTE_ARRAY, Some(other), _) => Some(format!("{other:?}")),
        (
            Physical::BYTE_ARRAY,
            None,
            ConvertedType::NONE | ConvertedType::UTF8 | ConvertedType::JSON | ConvertedType::ENUM,
        ) => None,
        (Physical::BYTE_ARRAY, None, other) => Some(other.to_string()),
        (physical, ..) => Some(format!("{physical} values")),
    }
}

fn first_names(group: &Type) -> String {
    let names: Vec<&str> = group.get_fields().iter().take(8).map(|field| field.name()).collect();
    names.join(", ")
}

/// The name of a compression that is not read.
fn unread(codec: Compression) -> Option<&'static str> {
    match codec {
        Compression::BROTLI(_) => Some("brotli"),
        Compression::LZO => Some("lzo"),
        _ => None,
    }
}
