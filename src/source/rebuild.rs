//! A model's tokenizer files → the tokenizer that transformers' `AutoTokenizer` (5.x) makes of them.
//!
//! Most classes take tokenizer.json as it stands. Some take only its vocabulary, merges and post-processor and
//! build the rest anew (the table in `model::arch` says which, and how); there a tokenizer.json that was written by
//! an older version can give other ids than its own rules would. Both kinds then add the special tokens that the
//! configuration names. `add_bos_token` and `add_eos_token` of tokenizer_config.json are not read where there is a
//! tokenizer.json: its post-processor says which tokens are added. (transformers 4 did the reverse on both counts:
//! it ran tokenizer.json as it stands and, for some classes, built the post-processor from the two settings.)

use serde_json::{Map, Value, json};
use tokenizers::{AddedToken, Tokenizer, TruncationDirection};

use crate::model::arch::{Normalizer, Splitter, TokenizerClass, tokenizer_class};

/// The tokenizer's files, parsed; absent ones are empty.
#[derive(Debug, Default)]
pub(super) struct Files {
    /// tokenizer.json.
    pub tokenizer: Map<String, Value>,
    /// tokenizer_config.json.
    pub config: Map<String, Value>,
    /// special_tokens_map.json.
    pub special_tokens: Map<String, Value>,
    /// added_tokens.json.
    pub added_tokens: Map<String, Value>,
    /// The model's config.json.
    pub model: Map<String, Value>,
}

/// A tokenizer, and what it does that its files do not say at one place.
pub(super) struct Built {
    pub tokenizer: Tokenizer,
    pub direction: TruncationDirection,
    /// The special tokens that the configuration names: name, token. One without a name has an empty one.
    pub named: Vec<(String, String)>,
}

const NAMED: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Builds the tokenizer; the error says what is wrong with tokenizer.json.
pub(super) fn build(mut files: Files) -> Result<Built, String> {
    let text = |map: &Map<String, Value>, key: &str| map.get(key).and_then(Value::as_str).map(str::to_owned);
    let direction = match files.config.get("truncation_side").and_then(Value::as_str) {
        Some("left") => TruncationDirection::Left,
        Some(_) => TruncationDirection::Right,
        // Of the truncation block the direction alone survives a call that says max_length itself.
        None => match files.tokenizer.get("truncation").and_then(|block| block["direction"].as_str()) {
            Some("Left") => TruncationDirection::Left,
            _ => TruncationDirection::Right,
        },
    };
    files.tokenizer.insert("truncation".into(), Value::Null);
    files.tokenizer.insert("padding".into(), Value::Null);

    let class = text(&files.config, "tokenizer_class").or_else(|| text(&files.model, "tokenizer_class"));
    let own_code = files.config.get("auto_map").is_some_and(|map| {
        map.is_array() || map.get("AutoTokenizer").is_some_and(|tokenizer| !tokenizer.is_null())
    });
    let byte_level = mentions(&files.tokenizer, "ByteLevel");
    let model_type = text(&files.model, "model_type");
    let class = tokenizer_class(class.as_deref(), model_type.as_deref(), byte_level, own_code)
        // The classes that rebuild themselves are all byte-pair merges with a vocabulary by name.
        .filter(|_| files.tokenizer.get("model").is_some_and(|model| model["vocab"].is_object()));

    let wanted = Wanted::read(&files, class);
    if let Some(class) = class {
        rebuild(&mut files, class, &wanted);
    }
    let split_special = files.config.get("split_special_tokens").and_then(Value::as_bool) == Some(true);
    let json = serde_json::to_vec(&files.tokenizer).map_err(|cause| cause.to_string())?;
    drop(files);
    let mut tokenizer = Tokenizer::from_bytes(json).map_err(|cause| cause.to_string())?;
    let missing = wanted.missing(&tokenizer);
    tokenizer.add_tokens(missing).map_err(|cause| cause.to_string())?;
    if class.is_some_and(|class| class.plain_specials) {
        let specials = wanted.named.iter().map(|(_, token)| token).chain(&wanted.extra);
        let plain = specials.map(|token| AddedToken::from(token.content.clone(), true));
        tokenizer.add_tokens(plain).map_err(|cause| cause.to_string())?;
    }
    if class.is_some_and(|class| class.forces_bos) {
        force_bos(&mut tokenizer, wanted.content("bos_token"))?;
    }
    tokenizer.set_encode_special_tokens(split_special);
    let extra = wanted.extra.into_iter().map(|token| (String::new(), token.content));
    let named = wanted.named.into_iter().map(|(name, token)| (name, token.content)).chain(extra).collect();
    Ok(Built { tokenizer, direction, named })
}

/// Whether `word` is a string or a key anywhere outside the vocabulary's numbers.
fn mentions(map: &Map<String, Value>, word: &str) -> bool {
    fn inside(value: &Value, word: &str) -> bool {
        match value {
            Value::String(text) => text == word,
            Value::Array(items) => items.iter().any(|item| inside(item, word)),
            Value::Object(map) => mentions(map, word),
            _ => false,
        }
    }
    map.iter().any(|(key, value)| key == word || inside(value, word))
}

/// Replaces all of tokenizer.json that `class` builds itself.
fn rebuild(files: &mut Files, class: &TokenizerClass, wanted: &Wanted) {
    let prefix = files.config.get("add_prefix_space").and_then(Value::as_bool).unwrap_or(class.prefix_space);
    let legacy = files.config.get("legacy").and_then(Value::as_bool).unwrap_or(false);
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": use_regex});
    let underline = |from: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": "▁"});
    let splitter = match class.splitter {
        Splitter::Metaspace { knows_legacy } => {
            let scheme = match prefix {
                true if legacy && knows_legacy => "always",
                true => "first",
                false => "never",
            };
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false})
        }
        Splitter::PatternThenBytes(pattern) => json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
            bytes(false),
        ]}),
        Splitter::Bytes => bytes(true),
        Splitter::Spaces => {
            json!({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false})
        }
    };
    let normalizer = match class.normalizer {
        Normalizer::Keep => Value::Null,
        Normalizer::Compose => json!({"type": "NFC"}),
        Normalizer::Underline => underline(" "),
    };
    let json = &mut files.tokenizer;
    json.insert("normalizer".into(), normalizer);
    json.insert("pre_tokenizer".into(), splitter);
    json.insert("added_tokens".into(), json!([]));
    if let Some(Value::Object(model)) = json.get_mut("model") {
        let unk = class.names_unk.then(|| wanted.content("unk_token")).flatten();
        for (key, value) in [
            ("type", json!("BPE")),
            ("dropout", Value::Null),
            ("unk_token", json!(unk)),
            ("continuing_subword_prefix", Value::Null),
            ("end_of_word_suffix", Value::Null),
            ("fuse_unk", json!(class.fuse_unk)),
            ("byte_fallback", json!(class.byte_fallback)),
            ("ignore_merges", json!(false)),
        ] {
            model.insert(key.into(), value);
        }
        model.entry("merges").or_insert_with(|| json!([]));
    }
}

/// Replaces the post-processor by one that puts `bos` in front, or by none where there is no such token.
fn force_bos(tokenizer: &mut Tokenizer, bos: Option<&str>) -> Result<(), String> {
    let Some((bos, id)) = bos.and_then(|bos| Some((bos, tokenizer.token_to_id(bos)?))) else {
        tokenizer.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
        return Ok(());
    };
    let piece = |name: &str, id: &str| json!({name: {"id": id, "type_id": 0}});
    let template = json!({
        "type": "TemplateProcessing",
        "single": [piece("SpecialToken", bos), piece("Sequence", "A")],
        "pair": [piece("SpecialToken", bos), piece("Sequence", "A"), piece("Sequence", "B")],
        "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    });
    let template: tokenizers::PostProcessorWrapper =
        serde_json::from_value(template).map_err(|cause| cause.to_string())?;
    tokenizer.with_post_processor(Some(template));
    Ok(())
}

/// The tokens that must be in the tokenizer besides its vocabulary.
struct Wanted {
    /// By recorded id: `added_tokens_decoder`, or what older files say in its place.
    recorded: Vec<(u64, AddedToken)>,
    /// The special tokens by their name in the configuration.
    named: Vec<(String, AddedToken)>,
    /// Further special tokens.
    extra: Vec<AddedToken>,
}

impl Wanted {
    fn read(files: &Files, class: Option<&TokenizerClass>) -> Self {
        let mut settings = files.config.clone();
        let mut recorded: Vec<(u64, AddedToken)> = Vec::new();
        if let Some(Value::Object(decoder)) = settings.get("added_tokens_decoder") {
            recorded.extend(decoder.iter().filter_map(|(id, entry)| Some((id.parse().ok()?, token(entry)?))));
        } else {
            for (key, value) in &files.special_tokens {
                settings.insert(key.clone(), value.clone());
            }
            for (content, id) in &files.added_tokens {
                recorded.extend(id.as_u64().map(|id| (id, AddedToken::from(content.clone(), false))));
            }
            for entry in files.tokenizer.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
                if let (Some(id), Some(token)) = (entry["id"].as_u64(), token(entry)) {
                    recorded.retain(|known| known.0 != id);
                    recorded.push((id, token));
                }
            }
        }
        recorded.sort_by_key(|entry| entry.0);

        // The class's own special tokens, unless the configuration names others (or, with null, none).
        let own = class.map_or(&[][..], |class| class.specials);
        for &(key, content) in own {
            settings.entry(key).or_insert_with(|| json!(content));
        }
        // New tokens get ids in this order: the usual names, the class's further ones, the configuration's.
        let rest = settings.keys().map(String::as_str).filter(|key| key.ends_with("_token"));
        let mut keys: Vec<&str> = Vec::new();
        for key in NAMED.into_iter().chain(own.iter().map(|entry| entry.0)).chain(rest) {
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        let mut named: Vec<(String, AddedToken)> = Vec::new();
        for key in keys {
            if let Some(token) = settings.get(key).and_then(token) {
                let same = recorded.iter().find(|known| known.1.content == token.content);
                let token = same.filter(|_| NAMED.contains(&key)).map_or(token, |known| known.1.clone());
                named.push((key.to_owned(), token));
            }
        }
        let listed = ["extra_special_tokens", "additional_special_tokens"]
            .into_iter()
            .filter_map(|key| settings.get(key))
            .find(|list| match list {
                Value::Array(list) => !list.is_empty(),
                Value::Object(map) => !map.is_empty(),
                _ => false,
            });
        let extra = match listed {
            Some(Value::Array(list)) => list.iter().filter_map(token).collect(),
            Some(Value::Object(map)) => {
                named.extend(map.iter().filter_map(|(key, entry)| Some((key.clone(), token(entry)?))));
                Vec::new()
            }
            _ => Vec::new(),
        };
        Self { recorded, named, extra }
    }

    fn content(&self, name: &str) -> Option<&str> {
        self.named.iter().find(|(known, _)| known == name).map(|(_, token)| token.content.as_str())
    }

    /// What `tokenizer` lacks, in the order in which it must be added: new tokens get ids in that order.
    fn missing(&self, tokenizer: &Tokenizer) -> Vec<AddedToken> {
        let present = tokenizer.get_added_tokens_decoder();
        let same = |a: &AddedToken, b: &AddedToken| {
            a.content == b.content
                && (a.lstrip, a.rstrip, a.single_word, a.normalized, a.special)
                    == (b.lstrip, b.rstrip, b.single_word, b.normalized, b.special)
        };
        let mut missing: Vec<AddedToken> = Vec::new();
        for (_, token) in &self.recorded {
            if !present.values().any(|known| same(known, token)) {
                missing.push(token.clone());
            }
        }
        for token in self.named.iter().map(|(_, token)| token).chain(&self.extra) {
            let known = |other: &AddedToken| other.content == token.content;
            if !present.values().any(known) && !missing.iter().any(known) {
                missing.push(token.clone());
            }
        }
        for token in &mut missing {
            token.special |= self.named.iter().any(|(_, named)| named.content == token.content);
        }
        missing
    }
}

/// A token as the files write it: a string, or an object with its `content` and how it is matched.
fn token(entry: &Value) -> Option<AddedToken> {
    match entry {
        Value::String(content) => Some(AddedToken::from(content.clone(), true)),
        Value::Object(map) => {
            let flag = |key: &str| map.get(key).and_then(Value::as_bool);
            let special = flag("special").unwrap_or(false);
            let mut token = AddedToken::from(map.get("content")?.as_str()?.to_owned(), special)
                .lstrip(flag("lstrip").unwrap_or(false))
                .rstrip(flag("rstrip").unwrap_or(false))
                .single_word(flag("single_word").unwrap_or(false));
            if let Some(normalized) = flag("normalized") {
                token = token.normalized(normalized);
            }
            Some(token)
        }
        _ => None,
    }
}
