//! Normalisation: every variant scales a layer's values by one factor, so that layers of different width compare.

use super::Normalisation;

/// How a normalisation went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The values were scaled (or, for `none`, rightly left alone).
    Scaled,
    /// The sum to divide by is zero; the values are unchanged.
    ZeroSum,
    /// The sum to divide by is NaN or infinite, or so small that the factor D/Σ overflows; the values are unchanged.
    NoFactor,
}

/// Scales `values` (`[D]`) in place, in float64:
///
/// - `none`: unchanged
/// - `sum_abs`: `v ← v·D/Σ|v|`, so that the magnitudes average to 1 and signs stay
/// - `sum`: `v ← v·D/Σv`, so that the values average to 1 (a negative sum flips every sign)
///
/// Sums run in index order, so the same values give the same bits.
pub fn apply(values: &mut [f64], normalisation: Normalisation) -> Outcome {
    let sum: f64 = match normalisation {
        Normalisation::None => return Outcome::Scaled,
        Normalisation::SumAbs => values.iter().map(|value| value.abs()).sum(),
        Normalisation::Sum => values.iter().sum(),
    };
    if sum == 0.0 {
        return Outcome::ZeroSum;
    }
    let factor = values.len() as f64 / sum;
    if !factor.is_finite() || !sum.is_finite() {
        return Outcome::NoFactor;
    }
    for value in values {
        *value *= factor;
    }
    Outcome::Scaled
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!(
                (found - expected).abs() <= 4.0 * f64::EPSILON * expected.abs(),
                "{found} is not {expected}"
            );
        }
    }

    #[test]
    fn worked_numbers_of_the_contract() {
        let mut values = [0.5, -0.3, 0.2];
        assert_eq!(apply(&mut values, Normalisation::SumAbs), Outcome::Scaled);
        assert_close(&values, &[1.5, -0.9, 0.6]);

        let mut values = [0.5, -0.3, 0.2];
        assert_eq!(apply(&mut values, Normalisation::Sum), Outcome::Scaled);
        assert_close(&values, &[3.75, -2.25, 1.5]);

        let mut values = [0.5, -0.3, 0.2];
        assert_eq!(apply(&mut values, Normalisation::None), Outcome::Scaled);
        assert_eq!(values, [0.5, -0.3, 0.2]);
    }

    #[test]
    fn without_a_usable_sum_values_stay() {
        for (mut values, normalisation, outcome) in [
            ([1.0, -1.0], Normalisation::Sum, Outcome::ZeroSum),
            ([0.0, 0.0], Normalisation::SumAbs, Outcome::ZeroSum),
            ([5e-324, 0.0], Normalisation::Sum, Outcome::NoFactor),
            ([f64::MAX, f64::MAX], Normalisation::SumAbs, Outcome::NoFactor),
            ([f64::INFINITY, 1.0], Normalisation::Sum, Outcome::NoFactor),
        ] {
            let before = values;
            assert_eq!(apply(&mut values, normalisation), outcome, "{before:?}");
            assert_eq!(values, before);
        }
    }

    #[test]
    fn nothing_to_scale() {
        assert_eq!(apply(&mut [], Normalisation::SumAbs), Outcome::ZeroSum);
    }
}
