//! `metadata.json`, and the dict `metadata` of the consolidated `.npz`: the same facts in two spellings.

use super::pickle::Value as Python;
use super::{RunRecord, folder, timing};
use crate::error::{Context, Result};
use crate::transform::{AggregationMode, Rendered};
use serde_json::{Map, Value, json};

/// A JSON file: indented, with a newline at its end. NaN and infinities have become null in `value` already, because
/// `serde_json::Value` cannot hold them.
pub fn bytes(value: &Value) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(value).context("JSON could not be written")?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// `metadata.json`.
///
/// The keys of the scripts, then `run_info` with what this program adds ([`RunRecord::extra`]).
pub fn metadata(record: &RunRecord) -> Value {
    let mut experiment = json!({
        "model_name": record.model_name,
        "num_samples": record.num_samples,
        "batch_size": record.batch_size,
        "max_length": record.max_length,
        "device": record.device,
        "timestamp": folder::readable(record.timestamp),
    });
    if record.num_samples_used != record.num_samples {
        experiment["num_samples_used"] = record.num_samples_used.into();
    }
    let times = timing::stats(&record.timing);
    json!({
        "experiment_info": experiment,
        "analysis_config": {
            "layers": record.layers,
            "aggregation_mode": record.aggregation_mode.name(),
            "normalization_mode": record.normalise_mode.name(),
            "aggregate_by": record.aggregate_by,
            "power": record.power,
        },
        "timing_stats": times["overall"],
        "per_layer_timing": times["per_layer"],
        "layer_statistics": layer_statistics(record.aggregation_mode, &record.rendered),
        "dimension_info": record
            .dimensions()
            .into_iter()
            .map(|(layer, dimensions)| (format!("layer_{layer}"), dimensions.into()))
            .collect::<Map<_, _>>(),
        "loading_instructions": loading_instructions(&record.rendered),
        "run_info": record.extra,
    })
}

/// `{layer_0: {[mean|mean_abs:] {[norm_sum|…:] {mean, std, max, sum_abs}}}}`: the level of the aggregation is there only
/// for `both`, the level of the normalisation only where several are written.
fn layer_statistics(mode: AggregationMode, rendered: &[Rendered]) -> Value {
    let mut layers = Map::new();
    for array in rendered {
        let mut levels = vec![format!("layer_{}", array.layer)];
        if mode == AggregationMode::Both {
            levels.push(array.aggregation.name().to_owned());
        }
        levels.extend(array.normalisation.map(|normalisation| normalisation.label().to_owned()));
        let mut inner = &mut layers;
        let mut levels = levels.into_iter().peekable();
        while let Some(level) = levels.next() {
            let slot = inner.entry(level).or_insert_with(|| json!({}));
            if levels.peek().is_none() {
                *slot = statistics(&array.values);
                break;
            }
            match slot {
                Value::Object(map) => inner = map,
                _ => break, // not reached: only objects are put in above
            }
        }
    }
    layers.into()
}

/// Of one array (`[D]`, as stored): its mean, population standard deviation, max |v| and Σ|v|, summed in float64.
fn statistics(values: &[f32]) -> Value {
    let count = values.len() as f64;
    let wide = || values.iter().map(|&value| f64::from(value));
    let mean = wide().sum::<f64>() / count;
    let variance = wide().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
    // NaN must show as null and not be passed over, as `f64::max` would.
    let max =
        wide().map(f64::abs).fold(0.0, |max, value| if value > max || value.is_nan() { value } else { max });
    let sum_abs: f64 = wide().map(f64::abs).sum();
    json!({ "mean": mean, "std": variance.sqrt(), "max": max, "sum_abs": sum_abs })
}

/// How to read the files, with a key and a file that are really there.
fn loading_instructions(rendered: &[Rendered]) -> Value {
    let key = rendered.first().map_or_else(|| "layer_0_mean_abs".to_owned(), Rendered::key);
    json!({
        "npz_file": "np.load('consolidated_results.npz', allow_pickle=True): one array per key, and 'metadata'",
        "individual_npy": format!("np.load('{key}_gradients.npy'): one array per file, float32, shape (dimensions,)"),
        "example_code": [
            "import numpy as np",
            "results = np.load('consolidated_results.npz', allow_pickle=True)",
            "metadata = results['metadata'].item()",
            format!("values = results['{key}']"),
        ],
    })
}

/// The dict `metadata` of the consolidated `.npz`: the keys of the scripts, then those of [`RunRecord::extra`]. A key
/// of the scripts always has their meaning: an added one of the same name is left out.
pub fn npz_metadata(record: &RunRecord) -> Python {
    let sizes =
        record.dimensions().into_iter().map(|(layer, size)| (Python::from(layer), Python::from(size)));
    let text = |text: &str| Python::from(text);
    let mut entries: Vec<(&str, Python)> = vec![
        ("model_name", text(&record.model_name)),
        ("num_samples", record.num_samples.into()),
        ("batch_size", record.batch_size.into()),
        ("max_length", record.max_length.into()),
        ("layers", Python::List(record.layers.iter().map(|&layer| layer.into()).collect())),
        ("aggregation_mode", text(record.aggregation_mode.name())),
        ("normalization_mode", text(record.normalise_mode.name())),
        ("aggregate_by", text(&record.aggregate_by)),
        ("power", record.power.into()),
        ("device", text(&record.device)),
        ("timestamp", text(&folder::compact(record.timestamp))),
        ("dimension_sizes", Python::Dict(sizes.collect())),
    ];
    if record.num_samples_used != record.num_samples {
        entries.push(("num_samples_used", record.num_samples_used.into()));
    }
    for (key, value) in &record.extra {
        if entries.iter().all(|(known, _)| known != key) {
            entries.push((key, value.into()));
        }
    }
    Python::Dict(entries.into_iter().map(|(key, value)| (key.into(), value)).collect())
}
