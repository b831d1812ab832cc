//! `--layers`: `0-23`, `0,5,10`, or mixtures.

use crate::error::{Error, Result};

/// Layers named by `flag` of a model with `count` layers, ascending, each once; all of them without a flag.
///
/// # Errors
/// Not a list of numbers and ranges; a range that runs backwards; a layer the model does not have.
pub fn parse(flag: Option<&str>, count: usize) -> Result<Vec<usize>> {
    let Some(flag) = flag else { return Ok((0..count).collect()) };
    let last = count - 1;
    let malformed = |part: &str| {
        Error::usage("the layers cannot be read")
            .at("--layers")
            .expected("numbers and ranges separated by commas, as in 0-3,8,20-23")
            .found(format!("{part:?} in {flag:?}"))
    };
    let mut layers = Vec::new();
    for part in flag.split(',').map(str::trim) {
        let number = |text: &str| text.trim().parse::<usize>().map_err(|_| malformed(part));
        let (first, end) = match part.split_once('-') {
            Some((first, end)) => (number(first)?, number(end)?),
            None => (number(part)?, number(part)?),
        };
        if first > end {
            return Err(malformed(part).hint(format!("did you mean {end}-{first}?")));
        }
        if end > last {
            return Err(Error::usage("a layer is out of range")
                .at("--layers")
                .expected(format!("layers from 0 to {last}: the model has {count}"))
                .found(part)
                .hint("leave --layers out for every layer"));
        }
        layers.extend(first..=end);
    }
    layers.sort_unstable();
    layers.dedup();
    Ok(layers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_ranges_and_mixtures() {
        assert_eq!(parse(None, 3).unwrap(), [0, 1, 2]);
        assert_eq!(parse(Some("0-2"), 24).unwrap(), [0, 1, 2]);
        assert_eq!(parse(Some("10, 0,5"), 24).unwrap(), [0, 5, 10]);
        assert_eq!(parse(Some("0-2,1,8,20-23"), 24).unwrap(), [0, 1, 2, 8, 20, 21, 22, 23]);
    }

    #[test]
    fn faults_are_usage_errors() {
        for flag in ["", "a", "1-", "-1", "1--2", "1,,2", "5-3", "0-24", "99999999999999999999999"] {
            let error = parse(Some(flag), 24).unwrap_err();
            assert_eq!(error.kind(), crate::error::Kind::Usage, "{flag}");
        }
        assert!(parse(Some("24"), 24).unwrap_err().to_string().contains("0 to 23"));
        assert!(parse(Some("5-3"), 24).unwrap_err().to_string().contains("3-5"));
    }
}
