//! Rendering: names, order, rounding and warnings.

use super::*;

fn spec(mode: AggregationMode, normalise: NormaliseMode, power: Option<f64>) -> TransformSpec {
    TransformSpec { mode, normalise, power }
}

fn keys(rendering: &Rendering) -> Vec<String> {
    rendering.arrays.iter().map(Rendered::key).collect()
}

#[test]
fn worked_numbers_of_the_contract() {
    let values = [0.5, -0.3, 0.2];
    let rendering = render(&spec(AggregationMode::Mean, NormaliseMode::Both, None), 0, &values, &values);
    assert_eq!(keys(&rendering), ["layer_0_mean_norm_sum", "layer_0_mean_norm_sum_abs"]);
    assert_eq!(rendering.arrays[0].values, [3.75, -2.25, 1.5]);
    assert_eq!(rendering.arrays[1].values, [1.5, -0.9, 0.6]);
    assert!(rendering.warnings.is_empty());
}

#[test]
fn power_comes_before_normalisation() {
    let spec = spec(AggregationMode::Mean, NormaliseMode::SumAbs, Some(2.0));
    let rendering = render(&spec, 3, &[1.0, -3.0], &[1.0, 3.0]);
    // sign(v)·v² = [1, −9]; Σ|v| = 10; D = 2.
    assert_eq!(rendering.arrays[0].values, [0.2, -1.8]);
}

#[test]
fn single_normalisations_are_not_named() {
    for mode in [NormaliseMode::None, NormaliseMode::Sum, NormaliseMode::SumAbs] {
        let rendering = render(&spec(AggregationMode::Both, mode, None), 12, &[1.0], &[2.0]);
        assert_eq!(keys(&rendering), ["layer_12_mean", "layer_12_mean_abs"]);
        assert_eq!(rendering.arrays[1].npy_stem(), "layer_12_mean_abs_gradients");
    }
}

#[test]
fn all_is_none_then_both() {
    let rendering = render(&spec(AggregationMode::MeanAbs, NormaliseMode::All, None), 1, &[0.0], &[4.0]);
    assert_eq!(
        keys(&rendering),
        ["layer_1_mean_abs_norm_none", "layer_1_mean_abs_norm_sum", "layer_1_mean_abs_norm_sum_abs"]
    );
    assert_eq!(rendering.arrays[0].values, [4.0]);
    assert_eq!(rendering.arrays[0].npy_stem(), "layer_1_mean_abs_norm_none_gradients");
}

#[test]
fn what_cannot_be_scaled_is_kept_and_told() {
    let rendering =
        render(&spec(AggregationMode::Mean, NormaliseMode::Both, None), 7, &[1.0, -1.0], &[1.0, 1.0]);
    assert_eq!(rendering.arrays[0].values, [1.0, -1.0]);
    assert_eq!(
        rendering.warnings,
        ["layer 7, mean: the sum is zero, so `sum` normalisation left the values unchanged"]
    );

    let rendering = render(&spec(AggregationMode::Mean, NormaliseMode::Sum, None), 7, &[5e-324], &[0.0]);
    assert!(rendering.warnings[0].contains("too small"), "{:?}", rendering.warnings);
}

#[test]
fn what_float32_cannot_hold_is_told() {
    let spec = spec(AggregationMode::Mean, NormaliseMode::None, Some(10.0));
    let rendering = render(&spec, 2, &[1e5, 1.0], &[0.0; 2]);
    assert_eq!(
        rendering.warnings,
        ["layer 2, mean, normalisation `none`: 1 of 2 values are NaN or beyond the range of float32"]
    );
}

#[test]
fn spellings_are_those_of_the_command_line() {
    for mode in AggregationMode::value_variants() {
        let value = mode.to_possible_value().expect("no variant is hidden");
        assert_eq!(value.get_name(), mode.name());
    }
    for mode in NormaliseMode::value_variants() {
        let value = mode.to_possible_value().expect("no variant is hidden");
        assert_eq!(value.get_name(), mode.name());
    }
}
