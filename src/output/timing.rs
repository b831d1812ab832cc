//! Where the time went: `timing_stats.json`, `timing_summary.txt`. All times in seconds.

use serde_json::{Map, Value, json};
use std::fmt::Write;

/// Seconds by name, in the order in which they are shown.
///
/// Overall names of the contract: `model_loading`, `dataset_preparation`, `total_runtime`; ours beside them:
/// `download` (the weights), `calibration` (the norms of the first samples), `compute` (the engine's passes). Per layer: `gradient_computation`, `plots`, `save_data`, `total`. Other names are
/// welcome: they are shown as they come.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Timing {
    /// (name, seconds) of the whole run.
    pub overall: Vec<(String, f64)>,
    /// (layer, its (name, seconds)).
    pub per_layer: Vec<(usize, Vec<(String, f64)>)>,
}

impl Timing {
    /// Sets a time of the whole run; a name that is there already keeps its place.
    pub fn set(&mut self, name: &str, seconds: f64) {
        put(&mut self.overall, name, seconds);
    }

    /// Sets a time of one layer.
    pub fn set_layer(&mut self, layer: usize, name: &str, seconds: f64) {
        let index = match self.per_layer.iter().position(|(number, _)| *number == layer) {
            Some(index) => index,
            None => {
                self.per_layer.push((layer, Vec::new()));
                self.per_layer.len() - 1
            }
        };
        put(&mut self.per_layer[index].1, name, seconds);
    }

    /// Sets each layer's `total` to the sum of its other times.
    pub fn total_layers(&mut self) {
        for (_, times) in &mut self.per_layer {
            times.retain(|(name, _)| name != "total");
            let total = times.iter().map(|(_, seconds)| seconds).sum();
            times.push(("total".to_owned(), total));
        }
    }

    /// `{name: seconds}` of the whole run.
    pub(super) fn overall_json(&self) -> Value {
        object(&self.overall)
    }

    /// `{"0": {name: seconds}}` of the layers.
    pub(super) fn per_layer_json(&self) -> Value {
        self.per_layer
            .iter()
            .map(|(layer, times)| (layer.to_string(), object(times)))
            .collect::<Map<_, _>>()
            .into()
    }
}

fn put(times: &mut Vec<(String, f64)>, name: &str, seconds: f64) {
    match times.iter_mut().find(|(known, _)| known == name) {
        Some((_, known)) => *known = seconds,
        None => times.push((name.to_owned(), seconds)),
    }
}

/// `json!` turns what JSON cannot hold (NaN, infinity) into null.
fn object(times: &[(String, f64)]) -> Value {
    times.iter().map(|(name, seconds)| (name.clone(), json!(seconds))).collect::<Map<_, _>>().into()
}

/// `timing_stats.json`: `{"overall": {name: seconds}, "per_layer": {"0": {name: seconds}}}`.
pub fn stats(timing: &Timing) -> Value {
    json!({ "overall": timing.overall_json(), "per_layer": timing.per_layer_json() })
}

/// Under each heading, as wide as the lines below it.
const RULE: &str = "------------------------------------------";

/// The FINAL TIMING SUMMARY block: printed at the end of a run, and the head of `timing_summary.txt`.
pub fn summary(timing: &Timing) -> String {
    let mut text = format!("FINAL TIMING SUMMARY\n{RULE}\n");
    push_times(&mut text, "", &timing.overall);
    text
}

/// `timing_summary.txt`: the block, then DETAILED PER-LAYER TIMING.
pub fn summary_file(timing: &Timing) -> String {
    let mut text = summary(timing);
    text.push_str("\nDETAILED PER-LAYER TIMING\n");
    text.push_str(RULE);
    text.push('\n');
    for (layer, times) in &timing.per_layer {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "\nLayer {layer}");
        push_times(&mut text, "  ", times);
    }
    text
}

/// One line a time, `model_loading` shown as `Model loading`, seconds aligned.
fn push_times(text: &mut String, indent: &str, times: &[(String, f64)]) {
    for (name, seconds) in times {
        let label = format!("{indent}{}", title(name));
        let _ = writeln!(text, "{label:<28}{seconds:>12.2} s");
    }
}

fn title(name: &str) -> String {
    let mut letters = name.chars();
    match letters.next() {
        _ if name.starts_with("sae_") => name.replace("sae_", "SAE ").replace('_', " "),
        Some(first) => first.to_uppercase().chain(letters).collect::<String>().replace('_', " "),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timing() -> Timing {
        let mut timing = Timing::default();
        timing.set("model_loading", 1.5);
        timing.set("compute", 1234.567);
        timing.set_layer(0, "gradient_computation", 1.0);
        timing.set_layer(3, "gradient_computation", 2.0);
        timing.set_layer(0, "save_data", 0.25);
        timing.total_layers();
        timing
    }

    #[test]
    fn the_text_is_pinned() {
        assert_eq!(
            summary_file(&timing()),
            "FINAL TIMING SUMMARY\n\
             ------------------------------------------\n\
             Model loading                       1.50 s\n\
             Compute                          1234.57 s\n\
             \n\
             DETAILED PER-LAYER TIMING\n\
             ------------------------------------------\n\
             \n\
             Layer 0\n  Gradient computation              1.00 s\n  \
             Save data                         0.25 s\n  \
             Total                             1.25 s\n\
             \n\
             Layer 3\n  Gradient computation              2.00 s\n  \
             Total                             2.00 s\n"
        );
    }

    #[test]
    fn totals_are_not_summed_twice() {
        let mut twice = timing();
        twice.total_layers();
        assert_eq!(twice, timing());
    }

    #[test]
    fn json_has_the_contracts_shape_and_no_nan() {
        let mut timing = timing();
        timing.set("model_loading", f64::NAN);
        assert_eq!(
            stats(&timing).to_string(),
            r#"{"overall":{"model_loading":null,"compute":1234.567},"per_layer":{"0":{"gradient_computation":1.0,"save_data":0.25,"total":1.25},"3":{"gradient_computation":2.0,"total":2.0}}}"#
        );
    }
}
