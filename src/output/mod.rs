//! Results on disk: one format per file, everything written under temporary names and renamed at the end.
//!
//! A run goes [`Target::prepare`] (before the first token) → [`write()`] → [`Target::finish`]. File names, keys and
//! definitions are those of the Python scripts this program replaces; the README lists them.

pub mod folder;
pub mod json;
pub mod log;
pub mod npy;
pub mod npz;
pub mod pickle;
pub mod progress;
pub mod python;
pub mod report;
pub mod target;
pub mod timing;

pub use folder::FolderName;
pub use log::Log;
pub use npy::Array;
pub use progress::{Bar, Unit};
pub use target::{Delivered, OutputSpec, Target};
pub use timing::Timing;

use crate::error::Result;
use crate::transform::{AggregationMode, NormaliseMode, Rendered};
use std::time::Instant;
use time::PrimitiveDateTime;

/// The consolidated archive in the run's folder.
pub const CONSOLIDATED: &str = "consolidated_results.npz";

/// Everything there is to know about a finished run.
#[derive(Clone, Debug)]
pub struct RunRecord<'a> {
    /// Hub id or local folder, as typed.
    pub model_name: String,
    /// Samples asked for.
    pub num_samples: usize,
    /// Samples there were. Where it differs from `num_samples`, metadata gains `num_samples_used`.
    pub num_samples_used: usize,
    /// `--batch_size`.
    pub batch_size: usize,
    /// Longest sample, in tokens.
    pub max_length: usize,
    /// The layers, in the order of the arrays.
    pub layers: Vec<usize>,
    /// `--aggregation_mode`.
    pub aggregation_mode: AggregationMode,
    /// `--normalize_gradients`; metadata calls it `normalization_mode`.
    pub normalise_mode: NormaliseMode,
    /// `values` or `gradients`.
    pub aggregate_by: String,
    /// `--power`.
    pub power: Option<f64>,
    /// What computed: `cpu`, `cuda:0`.
    pub device: String,
    /// Wall clock at the start, local time; the folder's name has the same.
    pub timestamp: PrimitiveDateTime,
    /// Further facts: `run_info` in `metadata.json`, further keys of the dict in the `.npz`.
    pub extra: serde_json::Map<String, serde_json::Value>,
    /// The arrays users asked for, from [`crate::transform::render`], layer after layer.
    pub rendered: Vec<Rendered>,
    /// What goes into `statistics.npz`: `layer_{i}.{site}.{values|gradients}.{sum|sum_abs|sum_sq|max_abs}` and
    /// `….sum_abs_position_0`, float64, `[D]`, and `….count`, an int64 scalar.
    pub statistics: Vec<(String, Array<'a>)>,
    /// Where the time went.
    pub timing: Timing,
}

impl RunRecord<'_> {
    /// (layer, D), each layer once, in the order of the arrays.
    fn dimensions(&self) -> Vec<(usize, usize)> {
        let mut dimensions: Vec<(usize, usize)> = Vec::new();
        for array in &self.rendered {
            if dimensions.iter().all(|(layer, _)| *layer != array.layer) {
                dimensions.push((array.layer, array.values.len()));
            }
        }
        dimensions
    }
}

/// Writes every file of the run but `runtime_output.txt`, which [`Target::finish`] adds.
///
/// The time spent on a layer's `.npy` files becomes its `save_data`, and every layer's `total` is
/// set to the sum of its times. Without a folder only the consolidated archive is written, and without any
/// destination nothing is.
pub fn write(target: &mut Target, record: &mut RunRecord) -> Result<()> {
    write_arrays(target, record)?;
    record.timing.total_layers();
    write_records(target, record)
}

/// The arrays: `.npy` files, `statistics.npz`, the consolidated archive. Adds `save_data` to the layers' times.
pub fn write_arrays(target: &mut Target, record: &mut RunRecord) -> Result<()> {
    if target.is_empty() {
        return Ok(());
    }
    if target.has_folder() {
        for &(layer, _) in &record.dimensions() {
            let start = Instant::now();
            for array in record.rendered.iter().filter(|array| array.layer == layer) {
                target
                    .write(&format!("{}.npy", array.npy_stem()), &npy::bytes(Array::F32(&array.values))?)?;
            }
            record.timing.set_layer(layer, "save_data", start.elapsed().as_secs_f64());
        }
        let entries = record.statistics.iter().map(|(key, array)| (key.clone(), *array));
        target.write("statistics.npz", &npz::bytes(entries, None)?)?;
    }
    let entries = record.rendered.iter().map(|array| (array.key(), Array::F32(&array.values)));
    target.write_consolidated(&npz::bytes(entries, Some(&json::npz_metadata(record)))?)
}

/// The texts: `metadata.json`, `timing_stats.json`, `timing_summary.txt`.
pub fn write_records(target: &Target, record: &RunRecord) -> Result<()> {
    if !target.has_folder() {
        return Ok(());
    }
    target.write("metadata.json", &json::bytes(&json::metadata(record))?)?;
    target.write("timing_stats.json", &json::bytes(&timing::stats(&record.timing))?)?;
    target.write("timing_summary.txt", timing::summary_file(&record.timing).as_bytes())
}
