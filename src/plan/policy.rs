//! Which tokens count: the flags, and what they come to with a tokenizer.

use std::fmt;
use std::ops::Range;

use super::Plan;
use crate::cli::PolicyArgs;
use crate::error::{Error, Result};
use crate::output::report::every;
use crate::source::Specials;
use crate::stats::{NormRule, SkipSpecial, TokenPolicy};
use crate::units::thousands;

/// What the flags say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Counting {
    /// `--position_stride`.
    pub position_stride: usize,
    /// `--skip_first`.
    pub skip_first: usize,
    /// `--skip_special`.
    pub skip_special: SkipSpecial,
    /// `--max_norm_ratio`.
    pub max_norm_ratio: Option<f64>,
}

impl Counting {
    /// Checks the flags; no sample is longer than `max_length`.
    ///
    /// # Errors
    /// Numbers that make no sense, or that leave no position to count.
    pub(super) fn new(args: &PolicyArgs, max_length: usize) -> Result<Self> {
        let counting = Self::from(args);
        let Self { position_stride, skip_first, max_norm_ratio, .. } = counting;
        if position_stride == 0 {
            return Err(Error::usage("a number is too small")
                .at("--position_stride")
                .expected("1 or more: every position, every second one, and so forth")
                .found(0));
        }
        if let Some(ratio) = max_norm_ratio.filter(|ratio| !(ratio.is_finite() && *ratio > 0.0)) {
            return Err(Error::usage("the ratio of norms cannot be used")
                .at("--max_norm_ratio")
                .expected("a finite number above 0")
                .found(ratio)
                .hint(
                    "10 leaves out attention sinks of most models; leave the flag out to count every norm",
                ));
        }
        // The first multiple of the stride that is not skipped.
        let counted = skip_first.div_ceil(position_stride).checked_mul(position_stride);
        if counted.is_none_or(|position| position >= max_length) {
            return Err(Error::usage("no position is left to count")
                .at(match position_stride {
                    1 => "--skip_first",
                    _ => "--skip_first and --position_stride",
                })
                .expected(format!("a position below --max_length {max_length} that is counted"))
                .found(Self { max_norm_ratio: None, skip_special: SkipSpecial::None, ..counting })
                .hint("skip fewer positions, or give a larger --max_length"));
        }
        Ok(counting)
    }

    /// The rules, with the tokens of a tokenizer. The medians of norms are not known yet.
    pub fn policy(&self, specials: &Specials) -> TokenPolicy {
        TokenPolicy {
            stride: self.position_stride,
            first: self.skip_first,
            special: self.skip_special.ids(specials),
            norms: self.max_norm_ratio.map(|ratio| NormRule { ratio, ..NormRule::default() }),
        }
    }

    /// What a chunk takes for each token besides: the run that a row may be by itself, and its norm.
    pub(super) fn bytes_per_token(&self) -> u64 {
        if self.is_all() { 0 } else { (size_of::<Range<usize>>() + size_of::<f64>()) as u64 }
    }

    /// Whether every token counts.
    pub fn is_all(&self) -> bool {
        let Self { position_stride, skip_first, skip_special, max_norm_ratio } = *self;
        position_stride == 1
            && skip_first == 0
            && skip_special == SkipSpecial::None
            && max_norm_ratio.is_none()
    }
}

impl From<&PolicyArgs> for Counting {
    fn from(args: &PolicyArgs) -> Self {
        let PolicyArgs { position_stride, skip_first, skip_special, max_norm_ratio } = *args;
        Self { position_stride, skip_first, skip_special, max_norm_ratio }
    }
}

impl fmt::Display for Counting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&match self.position_stride {
            1 => "every position".to_owned(),
            stride => format!("{} position", every(stride)),
        })?;
        let mut left_out = Vec::new();
        match self.skip_first {
            0 => {}
            1 => left_out.push("position 0".to_owned()),
            first => left_out.push(format!("the first {} positions", thousands(first as u64))),
        }
        match self.skip_special {
            SkipSpecial::None => {}
            SkipSpecial::Bos => left_out.push("BOS".to_owned()),
            SkipSpecial::All => left_out.push("special tokens".to_owned()),
        }
        if let Some(ratio) = self.max_norm_ratio {
            left_out.push(format!("norms above {ratio} medians of the layer"));
        }
        if left_out.is_empty() { Ok(()) } else { write!(f, ", but not {}", left_out.join(", ")) }
    }
}

impl Plan {
    /// What is odd about the rules and this tokenizer, and the SAEs.
    pub fn counting_warnings(&self, specials: &Specials) -> Vec<String> {
        let skip = self.counting.skip_special;
        let skipped = skip.ids(specials);
        let idle = (skip != SkipSpecial::None && skipped.is_empty()).then(|| {
            let lacks = match skip {
                SkipSpecial::Bos => "no token that starts texts (BOS)",
                SkipSpecial::None | SkipSpecial::All => "no special tokens",
            };
            format!("--skip_special {} leaves nothing out: the tokenizer has {lacks}", skip.name())
        });
        let front_is_skipped = specials.in_front.is_some_and(|front| skipped.contains(&front));
        let counted = self.counting.skip_first == 0 && !front_is_skipped;
        let saes = self.sae.as_ref().filter(|_| counted);
        idle.into_iter().chain(saes.and_then(|sae| sae.first_token_warning())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(position_stride: usize, skip_first: usize) -> PolicyArgs {
        PolicyArgs { position_stride, skip_first, skip_special: SkipSpecial::None, max_norm_ratio: None }
    }

    #[test]
    fn a_position_is_left() {
        for (stride, first, max_length, fine) in [
            (1, 0, 1, true),
            (1, 1, 1, false),
            (1, 127, 128, true),
            (1, 128, 128, false),
            (4, 5, 8, false),
            (4, 5, 9, true),
            (usize::MAX, 0, 1, true),
            (usize::MAX, 1, 9, false),
            (2, usize::MAX, 9, false),
        ] {
            let found = Counting::new(&args(stride, first), max_length);
            assert_eq!(found.is_ok(), fine, "{stride} {first} {max_length}");
        }
        assert!(Counting::new(&args(0, 0), 9).is_err());
    }

    #[test]
    fn ratios_are_finite_and_above_0() {
        for (ratio, fine) in
            [(0.5, true), (0.0, false), (-1.0, false), (f64::NAN, false), (f64::INFINITY, false)]
        {
            let args = PolicyArgs { max_norm_ratio: Some(ratio), ..args(1, 0) };
            assert_eq!(Counting::new(&args, 9).is_ok(), fine, "{ratio}");
        }
    }

    #[test]
    fn rules_in_words() {
        let all = Counting::from(&args(1, 0));
        assert!(all.is_all());
        assert_eq!(all.to_string(), "every position");
        let some = Counting {
            position_stride: 4,
            skip_first: 1,
            skip_special: SkipSpecial::All,
            max_norm_ratio: Some(2.5),
        };
        assert!(!some.is_all());
        assert_eq!(
            some.to_string(),
            "every 4th position, but not position 0, special tokens, norms above 2.5 medians of the layer"
        );
    }
}
