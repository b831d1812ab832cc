//! Datasets that cannot be read, or hold nothing to do.

use crate::dir::Dir;

fn with(dataset: &str) -> String {
    format!("layer --model_name model --save_outputs --output_dir new/results --dataset {dataset}")
}

#[test]
fn missing_file() {
    Dir::with("yi").refuse(1, &with("none.jsonl"), &["cannot read the dataset", "none.jsonl"]);
}

#[test]
fn empty_files() {
    let dir = Dir::with("yi");
    for (name, text) in [("e.jsonl", ""), ("e.json", "[]"), ("blank.jsonl", "\n \n"), ("e.txt", "")] {
        dir.write(name, text);
        dir.refuse(1, &with(name), &["the dataset has no texts", name]);
    }
}

#[test]
fn folder_without_texts() {
    let dir = Dir::with("yi");
    std::fs::create_dir(dir.path("texts")).unwrap();
    dir.refuse(1, &with("texts"), &["no file that can be read", "an empty folder", ".jsonl"]);
    dir.write("texts/train.arrow", "ARROW1");
    dir.refuse(1, &with("texts"), &["no file that can be read", "train.arrow", "to_parquet"]);
}

#[test]
fn unknown_kind_of_file() {
    let dir = Dir::with("yi");
    dir.write("train.arrow", "ARROW1");
    dir.refuse(1, &with("train.arrow"), &["of an unknown kind", "train.arrow", "to_parquet"]);
}

#[test]
fn not_utf8() {
    let dir = Dir::with("yi");
    dir.write("latin.txt", b"one line\ncaf\xe9\n");
    dir.refuse(1, &with("latin.txt"), &["not UTF-8", "latin.txt:2", "0xE9", "iconv"]);
    dir.write("latin.jsonl", b"{\"text\": \"caf\xe9\"}\n");
    dir.refuse(1, &with("latin.jsonl"), &["not UTF-8", "latin.jsonl:1"]);
}

#[test]
fn not_json() {
    let dir = Dir::with("yi");
    dir.write("cut.jsonl", "{\"text\": \"a\"}\n{\"text\": \"b");
    dir.refuse(1, &with("cut.jsonl"), &["not valid JSON", "cut.jsonl:2", "one JSON object per line"]);
    dir.write("cut.json", "[{\"text\": \"a\"},\n{\"text\": ");
    dir.refuse(1, &with("cut.json"), &["not valid JSON", "cut.json:2"]);
}

#[test]
fn damaged_gzip() {
    let dir = Dir::with("yi");
    dir.write("a.jsonl.gz", b"\x1f\x8b\x08\x00 and no more");
    dir.refuse(1, &with("a.jsonl.gz"), &["gzip data", "damaged", "a.jsonl.gz", "gzip -t"]);
}

#[test]
fn missing_column() {
    let dir = Dir::with("yi");
    dir.write("rows.jsonl", "{\"id\": 1, \"body\": \"x\"}\n");
    let says = ["no column \"text\"", "rows.jsonl:1", "columns id, body", "--text_column id"];
    dir.refuse(1, &with("rows.jsonl"), &says);
    dir.refuse(1, &with("rows.jsonl --text_column content"), &["no column \"content\""]);
    dir.refuse(1, &with("rows.jsonl --text_column id"), &["not a text", "found:    a number"]);
}

#[test]
fn damaged_parquet() {
    let dir = Dir::with("yi");
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/parquet/plain_v1.parquet");
    let whole = std::fs::read(file).unwrap();
    dir.write("cut.parquet", &whole[..whole.len() - 9]);
    dir.refuse(
        1,
        &with("cut.parquet"),
        &["the parquet file is cut off", "cut.parquet", "download the file again"],
    );
    dir.write("whole.parquet", &whole);
    let says = ["no column \"body\"", "whole.parquet", "columns id, meta, text, tags, hash"];
    dir.refuse(1, &with("whole.parquet --text_column body"), &says);
    dir.refuse(1, &with("whole.parquet --text_column tags"), &["not a text", "found:    lists"]);
}

/// What the library takes for granted is told as an error of ours, without its panic.
#[test]
fn parquet_pages_that_make_the_library_panic() {
    let dir = Dir::with("yi");
    let mut bytes =
        std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/parquet/binary.parquet")).unwrap();
    // The length of a text, so that the next one begins behind the page.
    bytes[558] = 0;
    dir.write("bad.parquet", bytes);
    let says =
        ["the parquet file is damaged", "bad.parquet, row group 0 (from 0, of 3)", "range end out of bounds"];
    dir.refuse(1, &with("bad.parquet --min_chars 0"), &says);
}

/// Kept texts before the fault change nothing: a run that misses texts gives no results.
#[test]
fn a_fault_far_into_the_dataset() {
    let dir = Dir::with("yi");
    let good = dir.read("model/corpus.jsonl").repeat(60);
    dir.write("late.jsonl", format!("{good}{{\"body\": 1}}\n"));
    let place = format!("late.jsonl:{}", good.lines().count() + 1);
    let args = with("late.jsonl --num_samples 100000 --tokens_per_pass 200 --aggregate_by gradients");
    dir.refuse(1, &args, &["no column \"text\"", &place]);
}

#[test]
fn nothing_long_enough() {
    let dir = Dir::with("yi");
    let says = ["no text of the dataset is long enough", "more than 5000 characters", "--min_chars 0"];
    dir.refuse(1, &with("model/corpus.jsonl --min_chars 5000"), &says);
}

/// One token has no next one, so it has values but no gradient.
#[test]
fn nothing_to_predict() {
    let dir = Dir::with("yi");
    let says = ["too few tokens", "at least two tokens"];
    dir.refuse(1, &with("model/corpus.jsonl --max_length 1 --aggregate_by gradients"), &says);
    dir.ok(&with("model/corpus.jsonl --max_length 1 --num_samples 10"));
}
