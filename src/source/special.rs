//! Which tokens are special: those that stand for no text.

use tokenizers::Tokenizer;

/// The special tokens of a tokenizer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Specials {
    /// The one that starts texts: `bos_token` of the configuration or of the tokenizer's class; where these name none, what
    /// stands in front.
    pub bos: Option<u32>,
    /// What the post-processor puts in front of a text, if it does.
    pub in_front: Option<u32>,
    /// All, ascending: added tokens that are marked as special, and those that the configuration names.
    pub all: Vec<u32>,
}

impl Specials {
    /// `named`: (name in the configuration, token).
    pub(super) fn of(tokenizer: &Tokenizer, named: &[(String, String)]) -> Self {
        let added = tokenizer.get_added_tokens_decoder();
        let marked = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id);
        let id = |token: &String| tokenizer.token_to_id(token);
        let mut all: Vec<u32> = marked.chain(named.iter().filter_map(|(_, token)| id(token))).collect();
        let bos = named.iter().find(|(name, _)| name == "bos_token").and_then(|(_, token)| id(token));
        let in_front = in_front(tokenizer);
        let bos = bos.or(in_front);
        all.extend(bos);
        all.sort_unstable();
        all.dedup();
        Self { bos, in_front, all }
    }
}

/// What the post-processor puts in front of a text, if it does.
fn in_front(tokenizer: &Tokenizer) -> Option<u32> {
    let first = |special| tokenizer.encode_fast("a", special).ok()?.get_ids().first().copied();
    first(true).filter(|id| first(false) != Some(*id))
}
