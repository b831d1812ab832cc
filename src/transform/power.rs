//! The power transform: `sign(v)·|v|^p`, applied after aggregation and before normalisation.

use crate::error::{Error, Result};

/// Raises the magnitude of every value to `power` and keeps its sign: `v ← sign(v)·|v|^p`, in float64. `values`: `[D]`.
///
/// Non-negative values (a mean of absolute values) become plain `v^p`. `power` is what [`check`] accepts.
pub fn apply(values: &mut [f64], power: f64) {
    for value in values {
        *value = value.abs().powf(power).copysign(*value);
    }
}

/// A power must be finite and > 0: zero would make every dimension equal, a negative one would divide by zero at
/// dimensions that never fire.
pub fn check(power: f64) -> Result<f64> {
    if power.is_finite() && power > 0.0 {
        return Ok(power);
    }
    Err(Error::usage("the power cannot be used")
        .at("--power")
        .expected("a finite number greater than 0")
        .found(power)
        .hint("0.5 flattens the differences between dimensions, 2.0 sharpens them; leave the flag out for neither"))
}

/// Reads `--power`: one number or a comma list (`0.5,1.0,2.0`), each checked. Of a list the first is used.
pub fn parse_list(text: &str) -> Result<Vec<f64>> {
    text.split(',')
        .map(|part| {
            let power = part.trim().parse::<f64>().map_err(|_| {
                Error::usage("the power is not a number")
                    .at("--power")
                    .expected("a number greater than 0, or several separated by commas")
                    .found(format!("{part:?} in {text:?}"))
                    .hint("write it as in --power 2.0")
            })?;
            check(power)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn powered(values: &[f64], power: f64) -> Vec<f64> {
        let mut values = values.to_vec();
        apply(&mut values, power);
        values
    }

    #[test]
    fn worked_numbers_of_the_contract() {
        assert_eq!(powered(&[10.0, 5.0, 1.0, -8.0], 2.0), [100.0, 25.0, 1.0, -64.0]);
        assert_eq!(powered(&[10.0, 5.0, 1.0, 8.0], 2.0), [100.0, 25.0, 1.0, 64.0]);
    }

    #[test]
    fn keeps_signs_and_zeros() {
        assert_eq!(powered(&[0.0, -4.0, 9.0], 0.5), [0.0, -2.0, 3.0]);
        assert_eq!(powered(&[-2.0], 1.0), [-2.0]);
    }

    #[test]
    fn lists_are_read_and_checked() {
        assert_eq!(parse_list("0.5, 1.0,2").expect("three powers"), [0.5, 1.0, 2.0]);
        for wrong in ["", "two", "0.5,,2", "0", "-1", "nan", "inf"] {
            let error = parse_list(wrong).expect_err(wrong);
            assert_eq!(error.kind(), crate::error::Kind::Usage, "{wrong}");
            let text = error.to_string();
            assert!(
                text.contains("--power") && text.contains("expected:") && text.contains("hint:"),
                "{text}"
            );
        }
    }
}
