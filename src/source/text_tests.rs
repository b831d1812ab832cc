//! Tests of `Texts`: formats, keeping, order, and what each error says.

use std::io::Write;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use proptest::prelude::*;

use super::*;

fn spec(dataset: impl Into<PathBuf>) -> TextSpec {
    TextSpec { dataset: dataset.into(), text_column: "text".into(), min_chars: 0, num_samples: usize::MAX }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packer = GzEncoder::new(Vec::new(), Compression::fast());
    packer.write_all(bytes).unwrap();
    packer.finish().unwrap()
}

fn memory(name: &str, bytes: &[u8], spec: &TextSpec) -> Result<Vec<String>> {
    Texts::from_bytes(name, bytes.to_vec(), spec)?.collect()
}

fn read(name: &str, bytes: &[u8]) -> Vec<String> {
    memory(name, bytes, &spec("x")).unwrap()
}

fn failure(name: &str, bytes: &[u8]) -> String {
    memory(name, bytes, &spec("x")).unwrap_err().to_string()
}

#[track_caller]
fn says(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in:\n{error}");
    }
}

#[test]
fn every_format_gives_the_same_texts() {
    let texts = ["one", "  two é \u{3000}", "", "\"three\""];
    let rows: Vec<String> =
        texts.iter().map(|text| serde_json::json!({"id": 1, "text": text}).to_string()).collect();
    let lines = rows.join("\n");
    let spaced = format!("\u{FEFF}\n{}\r\n \n", rows.join("\r\n\n"));
    let array = format!("[\n{}\n]\n", rows.join(",\n"));
    let strings = serde_json::to_string_pretty(&texts).unwrap();
    for (name, file) in [
        ("a.jsonl", &lines),
        ("a.ndjson", &spaced),
        ("a.json", &lines),
        ("a.json", &array),
        ("a.json", &strings),
        ("a.txt", &texts.join("\n")),
        ("a.txt", &(texts.join("\r\n") + "\r\n")),
    ] {
        assert_eq!(read(name, file.as_bytes()), texts, "{name} {file}");
        assert_eq!(read(&format!("{name}.gz"), &gzip(file.as_bytes())), texts, "{name}.gz {file}");
    }
    // gzip files may be joined end to end.
    let joined = [gzip(b"one\n"), gzip(b"two\n")].concat();
    assert_eq!(read("a.txt.gz", &joined), ["one", "two"]);
}

#[test]
fn short_texts_are_left_out_by_characters() {
    let mut spec = spec("x");
    spec.min_chars = 2;
    // Three characters, of which Python's strip takes none, some, all; é and 日 are one character each.
    let file = "abc\n a b\n\u{1f}ab\u{1c}\néé日\n\u{a0}ab\u{2003}\n   \n\n";
    let mut texts = Texts::from_bytes("a.txt", file.as_bytes().to_vec(), &spec).unwrap();
    let kept: Vec<String> = texts.by_ref().map(Result::unwrap).collect();
    assert_eq!(kept, ["abc", " a b", "éé日"]);
    assert_eq!(texts.counts(), TextCounts { read: 7, kept: 3, too_short: 4 });

    spec.min_chars = 0;
    assert_eq!(memory("a.txt", file.as_bytes(), &spec).unwrap().len(), 7);
}

#[test]
fn reading_stops_at_num_samples() {
    let mut spec = spec("x");
    spec.num_samples = 2;
    spec.min_chars = 1;
    // The damage behind the last wanted text is never met.
    let file = b"\"ab\"\n\"\"\n\"cd\"\n{broken\n";
    let mut texts = Texts::from_bytes("a.jsonl", file.to_vec(), &spec).unwrap();
    assert_eq!(texts.by_ref().map(Result::unwrap).collect::<Vec<_>>(), ["ab", "cd"]);
    assert_eq!(texts.counts(), TextCounts { read: 3, kept: 2, too_short: 1 });
}

#[test]
fn a_folder_is_read_in_natural_order() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
    put("part-10.txt", b"ten");
    put("part-9.jsonl", b"{\"text\":\"nine\"}");
    put("part-2.json.gz", &gzip(b"[\"two\"]"));
    put("notes.md", b"no");
    put(".part-1.txt", b"no");
    std::fs::create_dir(folder.path().join("deeper.txt")).unwrap();
    let texts: Vec<String> = Texts::open(&spec(folder.path())).unwrap().map(Result::unwrap).collect();
    assert_eq!(texts, ["two", "nine", "ten"]);
}

#[test]
fn an_error_ends_the_texts() {
    let mut texts = Texts::from_bytes("a.jsonl", b"\"a\"\n!\n\"b\"\n".to_vec(), &spec("x")).unwrap();
    assert_eq!(texts.next().unwrap().unwrap(), "a");
    assert!(texts.next().unwrap().is_err());
    assert!(texts.next().is_none());
}

#[test]
fn files_that_cannot_be_found_or_read() {
    let open = |path: &Path| Texts::open(&spec(path)).err().unwrap().to_string();
    let folder = tempfile::tempdir().unwrap();
    says(
        &open(&folder.path().join("none.jsonl")),
        &["cannot read the dataset", "none.jsonl", "--dataset", ".txt"],
    );
    says(&open(folder.path()), &["no file that can be read", ".jsonl", "an empty folder"]);
    let arrow = folder.path().join("train.arrow");
    std::fs::write(&arrow, b"ARROW1").unwrap();
    says(&open(folder.path()), &["no file that can be read", "found:    train.arrow", "hint:"]);
    says(&open(&arrow), &["unknown kind", "\"train.arrow\"", "to_parquet"]);
}

#[test]
fn an_empty_dataset_is_an_error() {
    for (name, bytes) in
        [("a.jsonl", &b""[..]), ("a.jsonl", b"\n \n"), ("a.json", b"[]"), ("a.json", b""), ("a.txt", b"")]
    {
        says(&failure(name, bytes), &["the dataset has no texts", "where:    x"]);
    }
    says(&failure("a.txt.gz", &gzip(b"")), &["the dataset has no texts"]);
}

#[test]
fn a_missing_column_is_named() {
    says(
        &failure("d/a.jsonl", b"{\"text\":\"\"}\n\n{\"body\":1,\"id\":2}\n"),
        &["no column \"text\"", "d/a.jsonl:3", "columns body, id", "--text_column body"],
    );
    says(&failure("a.json", b"[{\"text\":\"\"},\n{}]"), &["a.json:2", "an object without columns"]);
    let mut other = spec("x");
    other.text_column = "body".into();
    assert_eq!(memory("a.json", b"[{\"text\":1,\"body\":\"b\"}]", &other).unwrap(), ["b"]);
}

#[test]
fn values_that_are_no_texts() {
    says(
        &failure("a.jsonl", b"{\"text\":true}"),
        &["not a text", "a.jsonl:1", "found:    a boolean", "--text_column"],
    );
    says(&failure("a.json", b"[{\"text\":[\"a\"]}]"), &["not a text", "found:    an array"]);
    says(&failure("a.jsonl", b"[1]"), &["a row of the dataset is no object", "a.jsonl:1", "an array"]);
}

#[test]
fn null_is_an_empty_text() {
    let file = b"{\"text\":null}\n{\"text\":\"a\"}\n{\"text\":null}";
    assert_eq!(read("a.jsonl", file), ["", "a", ""]);
    let mut texts =
        Texts::from_bytes("a.jsonl", file.to_vec(), &TextSpec { min_chars: 1, ..spec("x") }).unwrap();
    assert_eq!(texts.by_ref().count(), 0);
    assert_eq!(texts.counts(), TextCounts { read: 3, kept: 0, too_short: 3 });
    says(&failure("a.json", b"[null]"), &["not valid JSON"]);
}

#[test]
fn files_are_fetched_when_their_turn_comes() {
    let folder = tempfile::tempdir().unwrap();
    // Where a file comes to lie says nothing about its format.
    for (name, bytes) in [("1", &b"\"a\"\n\"b\"\n"[..]), ("2", b"c\nd\n"), ("3", b"\"e\"\n!\n")] {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    let root = folder.path().to_owned();
    let files = || ["data/1.jsonl", "data/2.txt", "more/3.json"].map(str::to_owned).to_vec();
    let open = |num_samples| {
        let calls = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
        let (seen, root) = (calls.clone(), root.clone());
        let fetch = move |file: &str| {
            seen.lock().unwrap().push(file.to_owned());
            match file.split(['/', '.']).nth(1) {
                Some(number) => Ok(root.join(number)),
                None => unreachable!("{file}"),
            }
        };
        let spec = TextSpec { num_samples, ..spec("org/set") };
        (Texts::fetched("org/set", files(), fetch, &spec).unwrap(), calls)
    };

    let (mut texts, calls) = open(2);
    assert_eq!(*calls.lock().unwrap(), [""; 0]);
    assert_eq!(texts.by_ref().map(Result::unwrap).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(*calls.lock().unwrap(), ["data/1.jsonl"]);

    let (mut texts, calls) = open(9);
    assert_eq!(texts.by_ref().take(3).map(Result::unwrap).collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(*calls.lock().unwrap(), ["data/1.jsonl", "data/2.txt"]);
    assert_eq!(texts.by_ref().take(2).map(Result::unwrap).collect::<Vec<_>>(), ["d", "e"]);
    let error = texts.next().unwrap().unwrap_err().to_string();
    says(&error, &["not valid JSON", "where:    org/set: more/3.json:2"]);
    assert!(!error.contains(root.to_str().unwrap()), "{error}");
    assert!(texts.next().is_none());

    let lost = |file: &str| {
        let fetch = |file: &str| match file {
            "gone.txt" => Ok(PathBuf::from("/no/such/file")),
            _ => Err(Error::new("no network").at(file)),
        };
        let texts = Texts::fetched("org/set", vec![file.to_owned()], fetch, &spec("org/set"))?;
        texts.collect::<Result<Vec<_>>>()
    };
    says(&lost("9.txt").unwrap_err().to_string(), &["no network", "9.txt"]);
    says(&lost("gone.txt").unwrap_err().to_string(), &["cannot open", "org/set: gone.txt"]);
    says(&lost("a.csv").unwrap_err().to_string(), &["unknown kind", "org/set: a.csv"]);
}

#[test]
fn bad_json_is_placed() {
    says(
        &failure("a.jsonl", b"\"a\"\n\n{\"text\": 'b'}\n"),
        &["not valid JSON", "a.jsonl:3", "one JSON object per line"],
    );
    // An object that goes over several lines is no JSON line.
    says(&failure("a.jsonl", b"{\n\"text\": \"a\"}"), &["a.jsonl:1", "EOF"]);
    says(&failure("a.json", b"[{\"text\": \"a\"},\n{\"text\":\n1x}]"), &["not valid JSON", "a.json:3"]);
    says(&failure("a.json", b"\n\n[{\"text\": \"a\"}"), &["a.json:3", "the file ends inside the array"]);
    says(&failure("a.json", b"{\"text\": \"a\"},\n"), &["a.json:1", "found ','"]);
}

#[test]
fn bytes_that_are_not_utf8_are_placed() {
    says(&failure("a.txt", b"a\nb\xE9\n"), &["not UTF-8", "a.txt:2", "0xE9", "iconv"]);
    says(&failure("a.jsonl", b"\"a\"\n{\"text\":\"\xFF\"}"), &["not UTF-8", "a.jsonl:2", "0xFF"]);
    says(&failure("a.json", b"[\n{\n\"text\":\n\"\xFF\"}]"), &["not UTF-8", "a.json:4"]);
}

#[test]
fn damaged_gzip_is_said_to_be() {
    let whole = gzip("some words that go on\n".repeat(2000).as_bytes());
    says(&failure("a.txt.gz", &whole[..whole.len() - 9]), &["gzip data", "a.txt.gz", "near line", "gzip -t"]);
    says(&failure("a.txt.gz", b"plain text"), &["gzip data", "a.txt.gz"]);
    let mut flipped = gzip(b"\"a\"\n\"b\"\n");
    let checksum = flipped.len() - 6;
    flipped[checksum] ^= 1;
    says(&failure("a.jsonl.gz", &flipped), &["gzip data"]);
}

#[test]
fn nothing_kept_says_what_to_do() {
    let mut short = spec("d.txt");
    short.min_chars = 50;
    let error = nothing_kept(&TextCounts { read: 3, kept: 0, too_short: 3 }, &short).to_string();
    says(&error, &["d.txt", "more than 50 characters", "3 texts, all shorter", "--min_chars 0"]);
}

const NAMES: [&str; 6] = ["a.jsonl", "a.json", "a.txt", "a.jsonl.gz", "a.json.gz", "a.txt.gz"];

/// Bytes that look enough like JSON to get far into the readers.
fn soup() -> impl Strategy<Value = Vec<u8>> {
    const PIECES: [&[u8]; 14] = [
        b"{\"text\":",
        b"\"a\\\"\"",
        b"}",
        b"[",
        b"]",
        b",",
        b"\n",
        b"\xEF\xBB\xBF",
        b"\\u00",
        b"\xFF",
        b"null",
        b"{}",
        b"1e999",
        b"\r\n",
    ];
    let piece = (0..PIECES.len()).prop_map(|i| PIECES[i]);
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200),
        prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat()),
    ]
}

proptest! {
    #[test]
    fn no_bytes_make_the_readers_panic(bytes in soup(), name in 0..NAMES.len(), packed: bool, min_chars in 0..3_usize) {
        let bytes = if packed { gzip(&bytes) } else { bytes };
        let spec = TextSpec { min_chars, ..spec("x") };
        let mut texts = Texts::from_bytes(NAMES[name], bytes, &spec).unwrap();
        let kept = texts.by_ref().filter(Result::is_ok).count() as u64;
        let counts = texts.counts();
        prop_assert_eq!(counts.kept, kept);
        prop_assert_eq!(counts.read, counts.kept + counts.too_short);
    }

    #[test]
    fn texts_come_back_as_they_were(texts in prop::collection::vec(".*", 1..20), pretty: bool) {
        let rows: Vec<_> = texts.iter().map(|text| serde_json::json!({"n": 1, "text": text})).collect();
        let lines = rows.iter().map(|row| format!("{row}\n")).collect::<String>();
        let array = if pretty { serde_json::to_string_pretty(&rows) } else { serde_json::to_string(&rows) };
        prop_assert_eq!(&read("a.jsonl", lines.as_bytes()), &texts);
        prop_assert_eq!(&read("a.json", lines.as_bytes()), &texts);
        prop_assert_eq!(&read("a.json.gz", &gzip(array.unwrap().as_bytes())), &texts);
    }

    #[test]
    fn keeping_is_pythons(text in "[ \\t\u{1c}\u{85}\u{a0}\u{200b}ab日]{0,8}", min_chars in 1..6_usize) {
        // Python's white space among these: all but U+200B and the letters.
        let inner: Vec<char> = text.chars().collect();
        let space = |c: &char| " \t\u{1c}\u{85}\u{a0}".contains(*c);
        let first = inner.iter().position(|c| !space(c));
        let length = first.map_or(0, |first| inner.iter().rposition(|c| !space(c)).unwrap() + 1 - first);
        prop_assert_eq!(longer_than(&text, min_chars), length > min_chars);
    }
}
