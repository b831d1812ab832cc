//! Texts → token ids, equal to those of transformers' `AutoTokenizer(text, truncation=True, max_length=…)`.

use std::fmt::Display;
use std::path::Path;

use rayon::prelude::*;
use serde_json::{Map, Value};
use tokenizers::{Tokenizer, TruncationParams, TruncationStrategy};

use super::panics::caught;
use super::rebuild::{Built, Files, build};
use super::special::Specials;
use crate::error::{Error, Result};

/// The token ids of one text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Token ids `[T]`, special tokens included, all below V.
    pub ids: Vec<u32>,
    /// Whether the text had more tokens than `max_length`.
    pub truncated: bool,
}

/// A loaded tokenizer.
pub struct Tokens {
    tokenizer: Tokenizer,
    /// V of the model: an id at or above it has no embedding.
    vocab_size: usize,
    /// Where errors say the tokenizer is from.
    name: String,
    note: Option<String>,
    specials: Specials,
}

impl Tokens {
    /// The file that holds a tokenizer.
    pub const FILE: &'static str = "tokenizer.json";
    /// Files that have a say in it where they exist, besides the model's config.json.
    pub const OPTIONAL_FILES: [&'static str; 3] =
        ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"];

    /// Loads the tokenizer of a model folder: [`FILE`](Self::FILE), config.json and, where they exist, the
    /// [`OPTIONAL_FILES`](Self::OPTIONAL_FILES). Samples are cut to `max_length` tokens,
    /// special tokens included; `vocab_size` is V of the model.
    pub fn open(folder: &Path, max_length: usize, vocab_size: usize) -> Result<Self> {
        let path = folder.join(Self::FILE);
        let tokenizer = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => {
                return Err(Self::missing(folder.display(), |file| folder.join(file).is_file()));
            }
            Err(cause) => {
                return Err(Error::new("cannot read the tokenizer").at_path(path).found(cause));
            }
        };
        let optional = |file: &str| -> Result<Map<String, Value>> {
            let path = folder.join(file);
            match std::fs::read(&path) {
                Ok(bytes) => object(&bytes, &path.display().to_string()),
                Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(Map::new()),
                Err(cause) => Err(Error::new(format!("cannot read {file}")).at_path(path).found(cause)),
            }
        };
        let name = path.display().to_string();
        let files = Files {
            tokenizer: object(&tokenizer, &name)?,
            config: optional(Self::OPTIONAL_FILES[0])?,
            special_tokens: optional(Self::OPTIONAL_FILES[1])?,
            added_tokens: optional(Self::OPTIONAL_FILES[2])?,
            model: optional("config.json")?,
        };
        Self::of(files, name, max_length, vocab_size)
    }

    /// The same from the bytes of tokenizer.json, tokenizer_config.json and the model's config.json.
    pub fn from_bytes(
        tokenizer: &[u8],
        tokenizer_config: Option<&[u8]>,
        model_config: Option<&[u8]>,
        max_length: usize,
        vocab_size: usize,
    ) -> Result<Self> {
        let optional = |bytes: Option<&[u8]>, name| bytes.map_or(Ok(Map::new()), |bytes| object(bytes, name));
        let files = Files {
            tokenizer: object(tokenizer, "tokenizer.json")?,
            config: optional(tokenizer_config, "tokenizer_config.json")?,
            model: optional(model_config, "config.json")?,
            ..Files::default()
        };
        Self::of(files, "tokenizer.json".into(), max_length, vocab_size)
    }

    fn of(files: Files, name: String, max_length: usize, vocab_size: usize) -> Result<Self> {
        let config = files.config.clone();
        let damaged = |cause: String| {
            Error::new("the tokenizer cannot be loaded")
                .at(&name)
                .expected("a tokenizer.json of the tokenizers library")
                .found(cause)
                .hint("AutoTokenizer.from_pretrained(…).save_pretrained(FOLDER) in Python writes it anew")
        };
        // The library asserts some properties of the file instead of checking them.
        let Built { mut tokenizer, direction, named } = caught(|| build(files)).flatten().map_err(damaged)?;
        let special = tokenizer.get_post_processor().map_or(0, |post| {
            use tokenizers::PostProcessor;
            post.added_tokens(false)
        });
        if max_length == 0 || max_length < special {
            let least = special.max(1);
            return Err(Error::usage("max_length leaves no room for a token")
                .at("--max_length")
                .expected(match special {
                    0 => "at least 1".to_owned(),
                    _ => format!(
                        "at least {least}, as the tokenizer adds {special} special tokens to every text"
                    ),
                })
                .found(max_length));
        }
        tokenizer.with_padding(None);
        let note = note(&tokenizer, &config);
        let specials = Specials::of(&tokenizer, &named);
        tokenizer
            .with_truncation(Some(TruncationParams {
                direction,
                max_length,
                strategy: TruncationStrategy::LongestFirst,
                stride: 0,
            }))
            .map_err(|cause| damaged(cause.to_string()))?;
        Ok(Self { tokenizer, vocab_size, name, note, specials })
    }

    /// The error for a model at `place` without a tokenizer, with advice after what it has instead.
    pub fn missing(place: impl Display, has: impl Fn(&str) -> bool) -> Error {
        let error = Error::new("the model has no tokenizer.json").at(&place).expected("tokenizer.json");
        match ["tokenizer.model", "vocab.json", "tekken.json"].into_iter().find(|file| has(file)) {
            Some(file) => error.found(format!("{file}, an older format")).hint(
                "convert it once in Python: AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)",
            ),
            None => error.found("no tokenizer file").hint("copy the tokenizer's files beside the model's"),
        }
    }

    /// What the user should know about the special tokens: a setting of tokenizer_config.json that has no effect.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// The special tokens.
    pub fn specials(&self) -> &Specials {
        &self.specials
    }

    /// The ids of `texts`, in their order, on all threads.
    pub fn encode(&self, texts: &[String]) -> Result<Vec<Sample>> {
        texts.par_iter().map(|text| self.sample(text)).collect()
    }

    /// The texts of neighbouring tokens: those before one, its own, those after it. A character whose bytes are of
    /// several of these parts may show as `�`.
    pub fn around(&self, [before, own, after]: [&[u32]; 3]) -> Result<[String; 3]> {
        // From the start each time: what a token looks like depends on whether others stand before it.
        let all = [before, own, after].concat();
        let until = |end: usize| {
            self.tokenizer
                .decode(&all[..end], false)
                .map_err(|cause| Error::new("the tokenizer cannot show tokens").at(&self.name).found(cause))
        };
        let [first, second, third] =
            [until(before.len())?, until(before.len() + own.len())?, until(all.len())?];
        let rest = |whole: &str, part: &str| {
            let same = whole.bytes().zip(part.bytes()).take_while(|(a, b)| a == b).count();
            let start = (0..=same).rev().find(|&at| whole.is_char_boundary(at)).unwrap_or(0);
            whole[start..].to_owned()
        };
        let (token, after) = (rest(&second, &first), rest(&third, &second));
        Ok([first, token, after])
    }

    fn sample(&self, text: &str) -> Result<Sample> {
        let encoding = self.tokenizer.encode_fast(text, true).map_err(|cause| {
            Error::new("the tokenizer cannot read a text")
                .at(&self.name)
                .found(format!("{cause} in {:?}", text.chars().take(40).collect::<String>()))
        })?;
        let ids = encoding.get_ids().to_vec();
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            let token = self.tokenizer.id_to_token(id).unwrap_or_default();
            return Err(Error::new(format!(
                "the tokenizer's token {token:?} is not in the model's vocabulary"
            ))
            .at(&self.name)
            .expected(format!("ids below the model's vocab_size, {}", self.vocab_size))
            .found(format!("id {id}"))
            .hint("the tokenizer and the model are not of one kind; both must come from the same folder"));
        }
        Ok(Sample { ids, truncated: !encoding.get_overflowing().is_empty() })
    }
}

fn object(bytes: &[u8], name: &str) -> Result<Map<String, Value>> {
    serde_json::from_slice(bytes).map_err(|cause| {
        Error::new("a tokenizer file is not valid JSON").at(name).expected("a JSON object").found(cause)
    })
}

/// Where `add_bos_token` or `add_eos_token` says something else than the post-processor does, as
/// transformers 4 obeyed those settings in some classes and transformers 5 does not.
fn note(tokenizer: &Tokenizer, config: &Map<String, Value>) -> Option<String> {
    let added = tokenizer.encode_fast("", true).ok()?;
    ["bos", "eos"].into_iter().find_map(|end| {
        let wanted = config.get(&format!("add_{end}_token"))?.as_bool()?;
        let token = config.get(&format!("{end}_token"))?;
        let token = token.as_str().or_else(|| token.get("content")?.as_str())?;
        let present = added.get_ids().contains(&tokenizer.token_to_id(token)?);
        let really = if present { "is" } else { "is not" };
        (wanted != present).then(|| {
            format!(
                "tokenizer_config.json says add_{end}_token {wanted}, but the token {token:?} {really} added: \
                 tokenizer.json's post_processor decides, as in transformers 5"
            )
        })
    })
}

#[cfg(test)]
#[path = "tokens_tests.rs"]
mod tests;
