//! One small run, as the other tests write it.

use gradlens::output::{Array, FolderName, OutputSpec, RunRecord, Timing};
use gradlens::transform::{AggregationMode, NormaliseMode, TransformSpec, render};
use serde_json::{Value, json};
use std::path::Path;
use time::macros::datetime;

/// Per-dimension mean and mean |v| of two layers, [2][D = 3].
const MEAN: [[f64; 3]; 2] = [[0.5, -0.3, 0.2], [1.0, -1.0, 0.0]];
const MEAN_ABS: [[f64; 3]; 2] = [[0.5, 0.6, 0.9], [1.0, 1.0, 0.5]];

/// Layers 0 and 7 of a made-up model, 2 of 5 samples found.
pub fn record(mode: AggregationMode, normalise: NormaliseMode, power: Option<f64>) -> RunRecord<'static> {
    let spec = TransformSpec { mode, normalise, power };
    let layers = vec![0, 7];
    let rendered = layers
        .iter()
        .zip(MEAN.iter().zip(&MEAN_ABS))
        .flat_map(|(&layer, (mean, mean_abs))| render(&spec, layer, mean, mean_abs).arrays)
        .collect();
    let mut timing = Timing::default();
    timing.set("model_loading", 0.25);
    timing.set("dataset_preparation", 0.5);
    timing.set("compute", 2.0);
    timing.set("total_runtime", 3.0);
    layers.iter().for_each(|&layer| timing.set_layer(layer, "gradient_computation", 1.0));
    RunRecord {
        model_name: "org/tiny-é".to_owned(),
        num_samples: 5,
        num_samples_used: 2,
        batch_size: 4,
        max_length: 128,
        layers,
        aggregation_mode: mode,
        normalise_mode: normalise,
        aggregate_by: "gradients".to_owned(),
        power,
        device: "cpu".to_owned(),
        timestamp: datetime!(2025-01-02 03:04:05),
        extra: extra(),
        rendered,
        statistics: vec![
            ("layer_0.mlp.gradients.sum".to_owned(), Array::F64(&MEAN[0])),
            ("layer_0.mlp.gradients.count".to_owned(), Array::I64(1 << 40)),
        ],
        timing,
    }
}

/// Values of every kind and size that the pickle writer tells apart.
fn extra() -> serde_json::Map<String, Value> {
    let extra = json!({
        "tokens": 1_234_567,
        "loss_nats": 2.5,
        "dtype": "float32",
        "mean_equals_mean_abs": false,
        "nothing": null,
        "ints": [0, 255, 256, 65535, 65536, -1, -129, 2147483647, 2147483648_u64, -2147483649_i64, u64::MAX],
        "floats": [0.1, -1e-300, 1e300, 3.0],
        "texts": ["", "a\nb", "日本", "\"quoted\""],
        "nested": {"a": {"b": [[], {}, [true]]}},
        // The scripts' meaning of this key must win.
        "device": "not this",
    });
    match extra {
        Value::Object(map) => map,
        _ => unreachable!("an object is written above"),
    }
}

/// A spec for `record` under `root`.
pub fn spec(root: &Path, save_consolidated: Option<&Path>) -> OutputSpec {
    let name = FolderName {
        kind: "layer_activations",
        model_name: "org/tiny",
        site: None,
        num_samples: 5,
        batch_size: 4,
        layers: "0_7",
        power: Some(2.0),
        timestamp: datetime!(2025-01-02 03:04:05),
    };
    OutputSpec {
        output_dir: root.to_owned(),
        save_outputs: true,
        save_consolidated: save_consolidated.map(Path::to_owned),
        folder_name: name.render(),
    }
}

/// Names in a folder, sorted; empty if there is none.
pub fn listing(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .map(|entry| entry.expect("a readable folder").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}
