//! Parquet files as datasets: every way to store a text, what is read of a file, and files that are damaged.
//!
//! The files are made by `tests/parquet/make.py`; all hold the texts of `texts.json`.
#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gradlens::error::Result;
use gradlens::source::{TextCounts, TextSpec, Texts};
use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::reader::FileReader;
use parquet::file::serialized_reader::SerializedFileReader;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use proptest::prelude::*;

thread_local! {
    /// What this thread, which is the one of a single test, has of memory, and had most of.
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
    /// The most bytes that it asked for at once.
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator, which notes how much is asked for.
struct Noting;

impl Noting {
    fn note(freed: usize, asked: usize) {
        let live = LIVE.get().saturating_sub(freed) + asked;
        LIVE.set(live);
        PEAK.set(PEAK.get().max(live));
        LARGEST.set(LARGEST.get().max(asked));
    }
}

// SAFETY: every call goes to the system's allocator as it is; noting asks for no memory.
unsafe impl GlobalAlloc for Noting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::note(0, layout.size());
        // SAFETY: the caller's promises are those of `System`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        Self::note(layout.size(), 0);
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::note(0, layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::note(layout.size(), size);
        // SAFETY: as above.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Noting = Noting;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parquet")
}

/// The name and bytes of every file that can be read, and whether its column is without nulls.
fn files() -> Vec<(String, Vec<u8>, bool)> {
    let mut files = Vec::new();
    for path in fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()) {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if name.ends_with(".parquet") && !["brotli.parquet", "latin.parquet"].contains(&name.as_str()) {
            let required = name.starts_with("required_");
            files.push((name, fs::read(&path).unwrap(), required));
        }
    }
    files.sort();
    files
}

fn stored(name: &str) -> Vec<u8> {
    fs::read(folder().join(name)).unwrap()
}

/// The texts that the files hold: all, or those that are not null.
fn expected(required: bool) -> Vec<String> {
    let about: serde_json::Value = serde_json::from_slice(&stored("texts.json")).unwrap();
    let texts = about["texts"].as_array().unwrap().iter().map(serde_json::Value::as_str);
    texts.filter(|text| !required || text.is_some()).map(|text| text.unwrap_or_default().to_owned()).collect()
}

fn spec(column: &str) -> TextSpec {
    TextSpec { dataset: "x".into(), text_column: column.into(), min_chars: 0, num_samples: usize::MAX }
}

fn read(bytes: Vec<u8>) -> Result<Vec<String>> {
    Texts::from_bytes("d/a.parquet", bytes, &spec("text"))?.collect()
}

#[track_caller]
fn refuses(bytes: &[u8], column: &str, parts: &[&str]) {
    let texts = Texts::from_bytes("d/a.parquet", bytes.to_vec(), &spec(column)).unwrap();
    let error = texts.collect::<Result<Vec<_>>>().unwrap_err().to_string();
    for part in parts.iter().chain(&["\n  where:    d/a.parquet", "\n  found:    "]) {
        assert!(error.contains(part), "{part:?} is not in:\n{error}");
    }
}

/// Where the columns whose names `wanted` accepts lie in each row group.
fn places(bytes: &[u8], wanted: impl Fn(&str) -> bool) -> Vec<Vec<Range<usize>>> {
    let file = SerializedFileReader::new(bytes::Bytes::copy_from_slice(bytes)).unwrap();
    let groups = file.metadata().row_groups().iter();
    groups
        .map(|group| {
            let columns = group.columns().iter().filter(|column| wanted(&column.column_path().string()));
            let ranges = columns.map(|column| column.byte_range());
            ranges.map(|(start, length)| start as usize..(start + length) as usize).collect()
        })
        .collect()
}

#[test]
fn every_way_to_store_a_text() {
    let files = files();
    assert_eq!(files.len(), 29);
    for (name, bytes, required) in files {
        let texts = Texts::open(&TextSpec { dataset: folder().join(&name), ..spec("text") }).unwrap();
        assert_eq!(texts.collect::<Result<Vec<_>>>().unwrap(), expected(required), "{name}");
        assert_eq!(read(bytes).unwrap(), expected(required), "{name} in memory");
    }
}

#[test]
fn a_null_counts_as_a_short_text() {
    let texts = expected(false);
    let empty = texts.iter().filter(|text| text.is_empty()).count() as u64;
    assert!(empty > (texts.len() - expected(true).len()) as u64, "empty texts beside the nulls");
    let mut read = Texts::from_bytes(
        "a.parquet",
        stored("snappy_v1.parquet"),
        &TextSpec { min_chars: 0, ..spec("text") },
    )
    .unwrap();
    assert_eq!(read.by_ref().count(), texts.len());
    let spec = TextSpec { min_chars: 1, ..spec("text") };
    let mut read = Texts::from_bytes("a.parquet", stored("snappy_v1.parquet"), &spec).unwrap();
    let kept: Vec<String> = read.by_ref().map(Result::unwrap).collect();
    // `x` is the one other text of no more than one character.
    assert_eq!(
        read.counts(),
        TextCounts { read: texts.len() as u64, kept: texts.len() as u64 - empty - 1, too_short: empty + 1 }
    );
    assert!(kept.iter().all(|text| text.len() > 1));
}

#[test]
fn parquet_files_stand_among_others() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("part-10.txt"), "last").unwrap();
    fs::write(dir.path().join("part-9.parquet"), stored("required_delta_v2.parquet")).unwrap();
    fs::write(dir.path().join("part-1.jsonl"), "\"first\"").unwrap();
    let texts = Texts::open(&TextSpec { dataset: dir.path().into(), ..spec("text") }).unwrap();
    let texts: Vec<String> = texts.map(Result::unwrap).collect();
    assert_eq!(texts[0], "first");
    assert_eq!(texts[1..texts.len() - 1], expected(true));
    assert_eq!(texts[texts.len() - 1], "last");
}

#[test]
fn other_columns_are_not_read() {
    for (name, mut bytes, required) in files() {
        for place in places(&bytes, |column| column != "text").concat() {
            bytes[place].fill(0xFF);
        }
        assert_eq!(read(bytes).unwrap(), expected(required), "{name}");
    }
}

#[test]
fn row_groups_are_read_when_their_turn_comes() {
    for (name, mut bytes, required) in files() {
        let texts = expected(required);
        let second = places(&bytes, |column| column == "text")[1][0].clone();
        bytes[second].fill(0xFF);
        let enough = TextSpec { num_samples: 12, ..spec("text") };
        let first: Result<Vec<String>> =
            Texts::from_bytes("a.parquet", bytes.clone(), &enough).unwrap().collect();
        assert_eq!(first.unwrap(), texts[..12], "{name}");

        let mut all = Texts::from_bytes("a.parquet", bytes, &spec("text")).unwrap();
        assert_eq!(all.by_ref().take(12).map(Result::unwrap).collect::<Vec<_>>(), texts[..12], "{name}");
        let error = all.next().unwrap().unwrap_err().to_string();
        let groups = if required { 2 } else { 3 };
        let place =
            format!("where:    a.parquet, row group 1 (from 0, of {groups}), row 12 of the file (from 0)");
        for part in ["the parquet file is damaged", &place, "column \"text\"", "\n  found:    ", "\n\nhint: "]
        {
            assert!(error.contains(part), "{name}: {part:?} is not in:\n{error}");
        }
        assert!(all.next().is_none());
    }
}

#[test]
fn what_is_stored_is_no_text() {
    let bytes = stored("plain_v1.parquet");
    let columns = "columns id, meta, text, tags, hash";
    refuses(&bytes, "body", &["no column \"body\"", columns, "--text_column id"]);
    refuses(&bytes, "meta.text", &["no column \"meta.text\"", columns]);
    refuses(&bytes, "id", &["column \"id\" of the dataset is not a text", "found:    INT64 values"]);
    refuses(&bytes, "hash", &["not a text", "FIXED_LEN_BYTE_ARRAY values"]);
    refuses(&bytes, "tags", &["not a text", "found:    lists", "--text_column"]);
    refuses(&bytes, "meta", &["not a text", "groups of columns: text, n"]);
}

#[test]
fn bytes_that_are_not_utf8() {
    let place = "row group 1 (from 0, of 2), row 2 of the file";
    refuses(&stored("latin.parquet"), "text", &["the dataset is not UTF-8", place, "0xE9"]);
    let texts = Texts::from_bytes("a.parquet", stored("latin.parquet"), &spec("text")).unwrap();
    assert_eq!(texts.filter_map(Result::ok).collect::<Vec<_>>(), ["good", "also good"]);
}

#[test]
fn compressions_that_are_not_read() {
    let says =
        ["compressed with brotli", "row group 0 (from 0, of 3)", "zstd", "pyarrow.parquet.write_table"];
    refuses(&stored("brotli.parquet"), "text", &says);
}

#[test]
fn files_that_are_not_whole() {
    let whole = stored("plain_v1.parquet");
    let again = "download the file again";
    refuses(b"", "text", &["the dataset is no parquet file", "0 bytes", again]);
    refuses(b"PAR1", "text", &["the parquet file is cut off", again]);
    refuses(b"PAR1PAR1", "text", &["damaged", "a footer longer than the file", again]);
    refuses(&whole[..whole.len() / 2], "text", &["the parquet file is cut off", again]);
    refuses(&whole[whole.len() / 2..], "text", &["damaged", again]);
    refuses(b"{\"text\": \"a\"}", "text", &["the dataset is no parquet file", again]);
    let mut encrypted = whole.clone();
    let end = encrypted.len();
    encrypted[end - 4..].copy_from_slice(b"PARE");
    refuses(&encrypted, "text", &["the parquet file is encrypted", "with its keys"]);
    let mut long = whole.clone();
    long[end - 8..end - 4].copy_from_slice(&u32::MAX.to_le_bytes());
    refuses(&long, "text", &["damaged", "a footer longer than the file", again]);
    // A footer without the pages that it speaks of.
    let footer =
        whole.len() - 8 - u32::from_le_bytes(*whole[..whole.len() - 4].last_chunk().unwrap()) as usize;
    let alone = [b"PAR1", &whole[footer..]].concat();
    refuses(&alone, "text", &["damaged", "row group 0 (from 0, of 3)", again]);
    let mut zeros = whole;
    let place = places(&zeros, |column| column == "text")[2][0].clone();
    zeros[place].fill(0);
    refuses(&zeros, "text", &["damaged", "row group 2 (from 0, of 3)", again]);
}

/// A row group of many pages takes no more memory than a few of them.
#[test]
fn memory_is_flat() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    let text = |n: usize| format!("{n} ").repeat(200);
    let schema = Arc::new(parse_message_type("message rows { required binary text (utf8); }").unwrap());
    let about = WriterProperties::builder()
        .set_dictionary_enabled(false)
        .set_compression(Compression::SNAPPY)
        .set_data_page_size_limit(100_000)
        .set_write_batch_size(50)
        .build();
    let mut writer =
        SerializedFileWriter::new(fs::File::create(&path).unwrap(), schema, Arc::new(about)).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let texts: Vec<ByteArray> = (0..20_000).map(|n| text(n).into_bytes().into()).collect();
    column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
    drop(texts);

    let before = LIVE.get();
    PEAK.set(before);
    let mut read = Texts::open(&TextSpec { dataset: path, ..spec("text") }).unwrap();
    let mut chars = 0;
    for (n, found) in read.by_ref().enumerate() {
        let found = found.unwrap();
        chars += found.len();
        assert!(n % 1000 != 0 || found == text(n));
    }
    assert_eq!(read.counts().kept, 20_000);
    assert!(chars > 20_000_000, "{chars}");
    assert!(PEAK.get() - before < 1_000_000, "{} bytes at once", PEAK.get() - before);
}

/// What fuzzing asserts: texts or an error, and no memory reserved by what a damaged header says.
#[track_caller]
fn survives(name: &str, bytes: Vec<u8>) {
    check(name, Texts::from_bytes("a.parquet", bytes, &spec("text")).unwrap());
}

#[track_caller]
fn check(name: &str, texts: Texts) {
    // A page of zstd may become 2¹⁵ times as long, and no more than that is believed.
    const MOST: usize = 48 << 20;
    // A damaged number of rows could make for very many.
    let texts = texts.take(5000).filter(Result::is_ok).count();
    assert!(texts < 5000, "{name}");
    let largest = LARGEST.get();
    assert!(largest < MOST, "{name}: {largest} bytes were asked for at once");
}

/// Every number at the start of a column becomes a huge one, and every number of a footer.
#[test]
fn huge_lengths_are_survived() {
    // In the protocol of the headers: 2³¹−1, and the most that 64 bits hold.
    const HUGE: [&[u8]; 2] = [b"\xFE\xFF\xFF\xFF\x0F", b"\xFE\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01"];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    for (name, bytes, _) in files() {
        let pages = places(&bytes, |column| column == "text")[0].clone();
        let end = bytes.len() - 8;
        let footer = end - u32::from_le_bytes(*bytes[..end + 4].last_chunk().unwrap()) as usize;
        let starts = pages.iter().flat_map(|page| page.start..page.start + 200);
        // All footers are much alike.
        let on_disk = name == "plain_v1.parquet" || name == "zstd_v2.parquet";
        let footers = footer..footer + if on_disk { 600 } else { 0 };
        // A number takes one byte or two.
        for (at, width) in starts.chain(footers).flat_map(|at| [(at, 1), (at, 2)]) {
            for huge in HUGE {
                let mut bytes = bytes.clone();
                bytes.splice(at..at + width, huge.iter().copied());
                if at >= footer {
                    let end = bytes.len() - 8;
                    bytes[end..end + 4].copy_from_slice(&((end - footer) as u32).to_le_bytes());
                }
                if on_disk {
                    fs::write(&path, &bytes).unwrap();
                    let texts = Texts::open(&TextSpec { dataset: path.clone(), ..spec("text") }).unwrap();
                    check(&name, texts);
                }
                survives(&name, bytes);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn damaged_files_are_survived(
        file in 0..29_usize,
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        footer: bool,
    ) {
        let (name, mut bytes, _) = files().swap_remove(file);
        for (at, byte) in flips {
            // Half of the files are hit where it hurts: in the footer, which the pages are found by.
            let start = if footer { bytes.len() * 3 / 4 } else { 0 };
            let at = start + at.index(bytes.len() - start);
            bytes[at] = byte;
        }
        survives(&name, bytes);
    }

    #[test]
    fn damaged_pages_are_survived(
        file in 0..29_usize,
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let (name, mut bytes, _) = files().swap_remove(file);
        let places = places(&bytes, |column| column == "text").concat();
        for (place, at, byte) in flips {
            let place = place.get(&places).clone();
            bytes[place.start + at.index(place.len())] = byte;
        }
        survives(&name, bytes);
    }

    #[test]
    fn files_that_end_early_are_survived(file in 0..29_usize, length: prop::sample::Index, end: bool) {
        let (name, mut bytes, _) = files().swap_remove(file);
        let tail = bytes[bytes.len() - 8..].to_vec();
        bytes.truncate(length.index(bytes.len()));
        if end {
            bytes.extend(tail);
        }
        survives(&name, bytes);
    }
}
