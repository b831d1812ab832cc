//! Tokenizer files on which versions of transformers differ: our ids are those of 5.x.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use gradlens::source::Tokens;
use serde_json::Value;

#[test]
fn ids_of_every_kind_of_tokenizer_file() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/tokenizers");
    let mut cases: Vec<_> = fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    assert!(cases.len() >= 12);
    for case in cases {
        let expected: Value = serde_json::from_slice(&fs::read(case.join("ids.json")).unwrap()).unwrap();
        let max_length = expected["max_length"].as_u64().unwrap() as usize;
        let tokens = Tokens::open(&case, max_length, 1 << 20).unwrap();
        let texts = expected["texts"].as_array().unwrap().iter();
        for (text, ids) in texts.zip(expected["transformers_5"].as_array().unwrap()) {
            let text = text.as_str().unwrap();
            let found = tokens.encode(&[text.to_owned()]).unwrap().remove(0).ids;
            let ids: Vec<u32> = serde_json::from_value(ids.clone()).unwrap();
            assert_eq!(found, ids, "{} {text:?}", case.display());
        }
    }
}
