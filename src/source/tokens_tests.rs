//! Tests of `Tokens`: which rules hold for which files, cutting, and what each error says.
//!
//! That ids equal those of transformers is tested on whole tokenizers by the goldens; here are the rules one by one.

use serde_json::json;

use super::*;

/// A tokenizer of a few words with `<s>` in front, of the older kind that puts `▁` in front by a normaliser.
fn words() -> Value {
    let vocab =
        json!({"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5, "▁a": 6, "▁▁": 7, "<0x0A>": 8});
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 1},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<unk>"},
        "added_tokens": [
            {"id": 0, "content": "<unk>", "special": true, "lstrip": false, "rstrip": false, "single_word": false,
                "normalized": false},
            {"id": 1, "content": "<s>", "special": true, "lstrip": false, "rstrip": false, "single_word": false,
                "normalized": false},
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": ["▁ ▁", "▁ a"]},
    })
}

fn load(tokenizer: &Value, config: Value, model: Value, max_length: usize) -> Result<Tokens> {
    let bytes = |value: &Value| serde_json::to_vec(value).unwrap();
    Tokens::from_bytes(&bytes(tokenizer), Some(&bytes(&config)), Some(&bytes(&model)), max_length, 1000)
}

fn ids(tokens: &Tokens, text: &str) -> Vec<u32> {
    tokens.encode(&[text.to_owned()]).unwrap().remove(0).ids
}

/// The configuration of a class that takes no more than vocabulary and post-processor from the file.
fn rebuilding() -> Value {
    json!({"tokenizer_class": crate::model::arch::A_REBUILDING_CLASS})
}

#[track_caller]
fn says(result: Result<Tokens>, parts: &[&str]) {
    let error = result.err().unwrap().to_string();
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in:\n{error}");
    }
}

#[test]
fn a_file_stands_as_it_is() {
    let tokens = load(&words(), json!({}), json!({}), 128).unwrap();
    // The normaliser puts ▁ before the space's own. Neither padding nor the length in the file has a say.
    assert_eq!(ids(&tokens, " ab a"), [1, 7, 4, 5, 6]);
    assert_eq!(ids(&tokens, ""), [1]);
    assert_eq!(ids(&tokens, "a<s>a"), [1, 6, 1, 6]);
}

#[test]
fn a_class_that_rebuilds_itself_puts_one_space_in_front() {
    let tokens = load(&words(), rebuilding(), json!({}), 128).unwrap();
    assert_eq!(ids(&tokens, " ab a"), [1, 6, 5, 6]);
    assert_eq!(ids(&tokens, "a<s>a"), [1, 6, 1, 4]);

    let mut legacy = rebuilding();
    legacy["legacy"] = json!(true);
    assert_eq!(ids(&load(&words(), legacy, json!({}), 128).unwrap(), "a<s>a"), [1, 6, 1, 6]);

    let mut bare = rebuilding();
    bare["add_prefix_space"] = json!(false);
    assert_eq!(ids(&load(&words(), bare, json!({}), 128).unwrap(), "a<s>a"), [1, 4, 1, 4]);
}

#[test]
fn the_post_processor_says_what_is_added() {
    for flag in [true, false] {
        let mut config = rebuilding();
        config["add_bos_token"] = json!(flag);
        config["add_eos_token"] = json!(flag);
        let mut none = words();
        none["post_processor"] = Value::Null;
        assert_eq!(ids(&load(&words(), config.clone(), json!({}), 128).unwrap(), "a"), [1, 6]);
        assert_eq!(ids(&load(&none, config, json!({}), 128).unwrap(), "a"), [6]);
    }
}

#[test]
fn a_flag_that_has_no_effect_is_noted() {
    let note = |config| load(&words(), config, json!({}), 128).unwrap().note().map(str::to_owned);
    assert_eq!(note(json!({"bos_token": "<s>", "add_bos_token": true})), None);
    assert_eq!(note(json!({"bos_token": "<s>"})), None);
    let off = note(json!({"bos_token": {"content": "<s>"}, "add_bos_token": false})).unwrap();
    assert!(off.contains("add_bos_token false") && off.contains("\"<s>\" is added"), "{off}");
    let eos = note(json!({"eos_token": "</s>", "add_eos_token": true})).unwrap();
    assert!(eos.contains("add_eos_token true") && eos.contains("\"</s>\" is not added"), "{eos}");
}

#[test]
fn cutting_keeps_room_for_special_tokens() {
    for (max_length, expected, truncated) in
        [(1, &[1][..], true), (2, &[1, 6], true), (3, &[1, 6, 5], false), (4, &[1, 6, 5], false)]
    {
        let sample =
            load(&words(), json!({}), json!({}), max_length).unwrap().encode(&["ab".into()]).unwrap();
        assert_eq!(sample, [Sample { ids: expected.to_vec(), truncated }], "{max_length}");
    }
    let left = load(&words(), json!({"truncation_side": "left"}), json!({}), 2).unwrap();
    assert_eq!(ids(&left, "ab"), [1, 5]);
    let mut stored = words();
    stored["truncation"]["direction"] = json!("Left");
    assert_eq!(ids(&load(&stored, json!({}), json!({}), 2).unwrap(), "ab"), [1, 5]);
    assert_eq!(ids(&load(&stored, json!({"truncation_side": "right"}), json!({}), 2).unwrap(), "ab"), [1, 6]);
}

#[test]
fn special_tokens_of_the_configuration_are_added() {
    let object = json!({"__type": "AddedToken", "content": "</s>", "normalized": false});
    for config in [
        json!({"eos_token": "</s>"}),
        json!({"eos_token": object}),
        json!({"additional_special_tokens": ["</s>"]}),
        json!({"extra_special_tokens": {"end": "</s>"}}),
        json!({"added_tokens_decoder": {"2": object}}),
    ] {
        let tokens = load(&words(), config.clone(), json!({}), 128).unwrap();
        assert_eq!(ids(&tokens, "a</s>"), [1, 6, 2], "{config}");
    }
    // A token that the vocabulary lacks gets the next id.
    let tokens = load(&words(), json!({"pad_token": "<pad>"}), json!({}), 128).unwrap();
    assert_eq!(ids(&tokens, "<pad>"), [1, 9]);
}

#[test]
fn order_is_kept() {
    let tokens = load(&words(), json!({}), json!({}), 128).unwrap();
    let texts: Vec<String> = (0..300).map(|n| "a".repeat(n)).collect();
    for (n, sample) in tokens.encode(&texts).unwrap().iter().enumerate() {
        assert_eq!((sample.ids.len(), sample.truncated), ((n + 1).min(128), n > 127));
    }
}

#[test]
fn an_id_outside_the_model_is_an_error() {
    let bytes = serde_json::to_vec(&words()).unwrap();
    let tokens = Tokens::from_bytes(&bytes, None, None, 128, 6).unwrap();
    assert_eq!(ids(&tokens, ""), [1]);
    let error = tokens.encode(&["b".into(), "a".into()]).unwrap_err().to_string();
    for part in ["\"▁a\"", "vocab_size, 6", "id 6", "tokenizer.json", "hint:"] {
        assert!(error.contains(part), "{part:?} is not in:\n{error}");
    }
}

#[test]
fn lengths_without_room_are_refused() {
    let length = |tokenizer: &Value, max_length| load(tokenizer, json!({}), json!({}), max_length);
    says(length(&words(), 0), &["max_length leaves no room", "--max_length", "at least 1", "found:    0"]);
    let mut two = words();
    two["post_processor"]["single"]
        .as_array_mut()
        .unwrap()
        .push(json!({"SpecialToken": {"id": "<s>", "type_id": 0}}));
    says(length(&two, 1), &["at least 2", "adds 2 special tokens", "found:    1"]);
    assert_eq!(ids(&length(&two, 2).unwrap(), "a"), [1, 1]);
    assert_eq!(length(&two, 1).err().unwrap().kind(), crate::error::Kind::Usage);
}

#[test]
fn folders_without_a_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let open = || Tokens::open(folder.path(), 128, 1000);
    says(open(), &["no tokenizer.json", "no tokenizer file"]);
    std::fs::write(folder.path().join("tokenizer.model"), b"x").unwrap();
    says(
        open(),
        &[
            "no tokenizer.json",
            "found:    tokenizer.model",
            "AutoTokenizer.from_pretrained(",
            "save_pretrained(",
        ],
    );
    std::fs::write(folder.path().join("tokenizer.json"), b"{").unwrap();
    says(open(), &["not valid JSON", "tokenizer.json", "a JSON object", "EOF"]);
    std::fs::write(folder.path().join("tokenizer.json"), b"{}").unwrap();
    says(open(), &["cannot be loaded", "tokenizer.json", "hint:"]);
    std::fs::write(folder.path().join("tokenizer.json"), words().to_string()).unwrap();
    assert_eq!(ids(&open().unwrap(), "a"), [1, 6]);
    std::fs::write(folder.path().join("tokenizer_config.json"), b"[]").unwrap();
    says(open(), &["not valid JSON", "tokenizer_config.json"]);
}

#[test]
fn older_files_name_special_tokens_too() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, value: Value| std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    put("tokenizer.json", words());
    put("special_tokens_map.json", json!({"eos_token": {"content": "</s>", "normalized": false}}));
    put("added_tokens.json", json!({"b": 5, "new": 9}));
    let tokens = Tokens::open(folder.path(), 128, 1000).unwrap();
    assert_eq!(ids(&tokens, "a</s>"), [1, 6, 2]);
    assert_eq!(ids(&tokens, "new"), [1, 9]);
    // A configuration that lists its added tokens makes both files obsolete.
    put("tokenizer_config.json", json!({"added_tokens_decoder": {}}));
    let tokens = Tokens::open(folder.path(), 128, 1000).unwrap();
    assert_ne!(ids(&tokens, "a</s>")[2], 2);
}

#[test]
fn damaged_files_never_panic() {
    let whole = words().to_string().into_bytes();
    let mut state = 1_u64;
    for _ in 0..400 {
        let mut bytes = whole.clone();
        for _ in 0..2 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let at = (state >> 33) as usize % bytes.len();
            bytes[at] = b"0123456789\"{}[],:abN-"[(state >> 20) as usize % 21];
        }
        if let Ok(tokens) = Tokens::from_bytes(&bytes, None, None, 4, 1000) {
            let _ = tokens.encode(&[" ab a\n".into(), "é<s>".into()]);
        }
    }
}

#[test]
fn special_tokens_are_those_that_are_marked_or_named() {
    // Marked in the file; what stands in front is BOS where nothing is named.
    let specials = |tokenizer: &Value, config: Value, model: Value| {
        load(tokenizer, config, model, 8).unwrap().specials().clone()
    };
    let found = specials(&words(), json!({}), json!({}));
    assert_eq!(found, Specials { bos: Some(1), in_front: Some(1), all: vec![0, 1] });
    // A token of the vocabulary that the configuration names, and one that it adds.
    let named =
        json!({"bos_token": "</s>", "pad_token": {"content": "b", "special": false}, "eos_token": "<new>"});
    let found = specials(&words(), named, json!({}));
    assert_eq!(found, Specials { bos: Some(2), in_front: Some(1), all: vec![0, 1, 2, 5, 9] });
    // The class's own, and further ones.
    let mut config = rebuilding();
    config["additional_special_tokens"] = json!(["a", "<more>"]);
    let found = specials(&words(), config, json!({}));
    assert_eq!(found, Specials { bos: Some(1), in_front: Some(1), all: vec![0, 1, 2, 4, 9] });
    // None at all.
    let mut bare = words();
    bare["added_tokens"] = json!([]);
    bare["post_processor"] = Value::Null;
    assert_eq!(specials(&bare, json!({"bos_token": null}), json!({})), Specials::default());
}
