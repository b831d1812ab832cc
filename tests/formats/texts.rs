//! `metadata.json`: which keys, and how they nest.

use crate::record::record;
use gradlens::output::json;
use gradlens::transform::{AggregationMode, NormaliseMode};
use serde_json::Value;

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().expect("an object").keys().map(String::as_str).collect()
}

#[test]
fn metadata_has_the_contracts_keys() {
    let metadata = json::metadata(&record(AggregationMode::MeanAbs, NormaliseMode::SumAbs, None));
    assert_eq!(
        keys(&metadata),
        [
            "experiment_info",
            "analysis_config",
            "timing_stats",
            "per_layer_timing",
            "layer_statistics",
            "dimension_info",
            "loading_instructions",
            "run_info"
        ]
    );
    assert_eq!(
        metadata["experiment_info"].to_string(),
        r#"{"model_name":"org/tiny-é","num_samples":5,"batch_size":4,"max_length":128,"device":"cpu","timestamp":"2025-01-02 03:04:05","num_samples_used":2}"#
    );
    assert_eq!(
        metadata["analysis_config"].to_string(),
        r#"{"layers":[0,7],"aggregation_mode":"mean_abs","normalization_mode":"sum_abs","aggregate_by":"gradients","power":null}"#
    );
    assert_eq!(metadata["dimension_info"].to_string(), r#"{"layer_0":3,"layer_7":3}"#);
    assert_eq!(metadata["timing_stats"]["compute"], 2.0);
    assert_eq!(metadata["per_layer_timing"]["7"]["gradient_computation"], 1.0);
}

#[test]
fn samples_are_mentioned_twice_only_where_they_differ() {
    let mut record = record(AggregationMode::MeanAbs, NormaliseMode::SumAbs, Some(0.5));
    record.num_samples_used = record.num_samples;
    let metadata = json::metadata(&record);
    assert!(metadata["experiment_info"].get("num_samples_used").is_none());
    assert_eq!(metadata["analysis_config"]["power"], 0.5);
}

#[test]
fn statistics_nest_only_where_there_are_several() {
    let of = |mode, normalise| {
        let metadata = json::metadata(&record(mode, normalise, None));
        metadata["layer_statistics"]["layer_0"].clone()
    };
    let leaf = ["mean", "std", "max", "sum_abs"];

    assert_eq!(keys(&of(AggregationMode::Mean, NormaliseMode::None)), leaf);

    let aggregations = of(AggregationMode::Both, NormaliseMode::Sum);
    assert_eq!(keys(&aggregations), ["mean", "mean_abs"]);
    assert_eq!(keys(&aggregations["mean"]), leaf);

    let normalisations = of(AggregationMode::Mean, NormaliseMode::Both);
    assert_eq!(keys(&normalisations), ["norm_sum", "norm_sum_abs"]);
    assert_eq!(keys(&normalisations["norm_sum"]), leaf);

    let both = of(AggregationMode::Both, NormaliseMode::All);
    assert_eq!(keys(&both), ["mean", "mean_abs"]);
    assert_eq!(keys(&both["mean_abs"]), ["norm_none", "norm_sum", "norm_sum_abs"]);
    assert_eq!(keys(&both["mean_abs"]["norm_none"]), leaf);
}

#[test]
fn statistics_are_those_of_the_stored_array() {
    let mut record = record(AggregationMode::Mean, NormaliseMode::None, None);
    record.rendered[0].values = vec![1.0, -3.0, 5.0, 1.0];
    record.rendered[1].values = vec![f32::NAN, 1.0];
    let metadata = json::metadata(&record);
    // mean 1, deviations 0 −4 4 0, variance 32/4.
    let expected = serde_json::json!({"mean": 1.0, "std": 8.0_f64.sqrt(), "max": 5.0, "sum_abs": 10.0});
    assert_eq!(metadata["layer_statistics"]["layer_0"], expected);
    let null = serde_json::json!({"mean": null, "std": null, "max": null, "sum_abs": null});
    assert_eq!(metadata["layer_statistics"]["layer_7"], null);
    let text = String::from_utf8(json::bytes(&metadata).expect("memory does not fail")).expect("UTF-8");
    assert!(text.ends_with("}\n") && !text.contains("NaN"));
}
