//! The number of a layer in the name of a folder, a file or a hook point.

/// Words that stand before a layer's number, and where several numbers have one, the rank of the word: `layer_5` says
/// more than `h5`.
const WORDS: [(&str, u8); 5] = [("layers", 1), ("layer", 1), ("blocks", 1), ("h", 0), ("L", 0)];

/// The layer that `text` names and where its digits are: the last number after `layer`, `layers`, `blocks`, `h` or `L`,
/// with a dot, an underscore or nothing between. `layers.10.mlp`, `mlp_out_layer_11`, `L8R`.
pub(super) fn find(text: &str) -> Option<(usize, std::ops::Range<usize>)> {
    let mut best: Option<(u8, usize, std::ops::Range<usize>)> = None;
    let digit = |at: usize| text.as_bytes().get(at).is_some_and(u8::is_ascii_digit);
    for start in (0..text.len()).filter(|at| digit(*at) && !(*at > 0 && digit(at - 1))) {
        let end = (start..=text.len()).find(|at| !digit(*at)).unwrap_or(text.len());
        let before = &text[..start];
        let before = before.strip_suffix(['.', '_']).unwrap_or(before);
        let rank = WORDS.iter().find_map(|(word, rank)| {
            let rest = strip_word(before, word, *rank > 0)?;
            // `h` of `width_16k` is no word.
            (!rest.ends_with(|c: char| c.is_alphanumeric())).then_some(*rank)
        });
        let Some((rank, number)) = rank.zip(text[start..end].parse().ok()) else { continue };
        if best.as_ref().is_none_or(|(other, ..)| rank >= *other) {
            best = Some((rank, number, start..end));
        }
    }
    best.map(|(_, number, range)| (number, range))
}

fn strip_word<'a>(text: &'a str, word: &str, any_case: bool) -> Option<&'a str> {
    let at = text.len().checked_sub(word.len())?;
    let (rest, end) = (text.get(..at)?, text.get(at..)?);
    let same = if any_case { end.eq_ignore_ascii_case(word) } else { end == word };
    same.then_some(rest)
}

/// The layer that `text` names.
pub(super) fn number(text: &str) -> Option<usize> {
    find(text).map(|(number, _)| number)
}

/// `text` with `{layer}` in the place of its layer's number.
pub(super) fn pattern(text: &str) -> String {
    match find(text) {
        Some((_, range)) => format!("{}{{layer}}{}", &text[..range.start], &text[range.end..]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_found_in_names() {
        for (text, expected) in [
            ("mlp_out_layer_11/trainer_0", Some(11)),
            ("mlp_out_layer1/10_32768", Some(1)),
            ("layers.10.mlp", Some(10)),
            ("blocks.8.hook_mlp_out", Some(8)),
            ("transformer.h.3.mlp", Some(3)),
            ("layer_5/width_16k/average_l0_72", Some(5)),
            ("mlp_out_all/layer_7_width_65k_l0_medium", Some(7)),
            ("Base-L24R-32x", Some(24)),
            ("layer_3/blocks.4.x", Some(4)),
            ("layer_3/L0_100", Some(3)),
            ("width_16k", None),
            ("trainer_0", None),
            ("layer", None),
            ("ä_layer_2ß", Some(2)),
            ("layer_99999999999999999999999", None),
        ] {
            assert_eq!(number(text), expected, "{text}");
        }
        assert_eq!(pattern("a_layer_12/trainer_0"), "a_layer_{layer}/trainer_0");
        assert_eq!(pattern("trainer_0"), "trainer_0");
    }
}
