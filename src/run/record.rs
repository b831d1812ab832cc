//! What a finished run leaves: the record that the files hold, and the tables.

use serde_json::{Map, Value, json};

use super::closing::Table;
use super::work::Layers;
use crate::backend::Moments;
use crate::engine::Totals;
use crate::model::op::Site;
use crate::output::npy::Array;
use crate::output::report::LayerSummary;
use crate::output::{Log, RunRecord, Timing};
use crate::plan::Plan;
use crate::source::SourceCounts;
use crate::stats::Direction;
use crate::transform;

/// Everything the files hold, and the tables for the screen.
pub(super) fn record<'a>(
    plan: &Plan,
    counts: &SourceCounts,
    totals: &Totals,
    layers: &'a Layers,
    mut timing: Timing,
    log: &Log,
) -> (RunRecord<'a>, Vec<Table>) {
    let mut rendered = Vec::new();
    let mut statistics = Vec::new();
    let mut tables = Vec::new();
    let mut shares = Map::new();
    for direction in [Direction::Values, Direction::Gradients] {
        let mut rows = Vec::new();
        for (&layer, moments) in layers {
            let share = moments.position_0_share(direction).unwrap_or_default();
            let at_0 = moments.at_0(direction);
            let Some(moments) = moments.get(direction) else { continue };
            let (mean, mean_abs) = (over(&moments.sum, moments), over(&moments.sum_abs, moments));
            let rendering = transform::render(&plan.transform, layer, &mean, &mean_abs);
            let ranked = rendering.arrays.last().map_or(&[][..], |array| &array.values);
            let (count, max_abs) = (moments.count, &moments.max_abs);
            rows.push(LayerSummary::new(layer, count, &mean, &mean_abs, max_abs, share, ranked, 5));
            statistics.extend(named(layer, direction, moments, at_0));
            if direction == plan.direction {
                shares.insert(format!("layer_{layer}"), share.into());
                rendering.warnings.iter().for_each(|warning| log.warn(warning));
                rendered.extend(rendering.arrays);
            }
        }
        if !rows.is_empty() {
            let quantity = match direction {
                Direction::Values => "values at mlp".to_owned(),
                Direction::Gradients => {
                    format!(
                        "gradients at mlp of the {} loss, nats per unit",
                        plan.engine.loss_reduction.name()
                    )
                }
            };
            tables.push(Table { direction, quantity, rows });
        }
    }
    for &layer in &plan.engine.layers {
        timing.set_layer(layer, "gradient_computation", totals.layer_s[layer]);
    }
    let record = RunRecord {
        model_name: plan.model_name.clone(),
        num_samples: plan.texts.num_samples,
        num_samples_used: counts.texts.kept as usize,
        batch_size: plan.batch_size,
        max_length: plan.max_length,
        layers: plan.engine.layers.clone(),
        aggregation_mode: plan.transform.mode,
        normalise_mode: plan.transform.normalise,
        aggregate_by: plan.direction.to_string(),
        power: plan.transform.power,
        device: plan.devices.name(),
        timestamp: plan.timestamp,
        extra: facts(plan, counts, totals, shares),
        rendered,
        statistics,
        timing,
    };
    (record, tables)
}

fn over(sums: &[f64], moments: &Moments) -> Vec<f64> {
    sums.iter().map(|sum| sum / moments.count as f64).collect()
}

fn named<'a>(
    layer: usize,
    direction: Direction,
    moments: &'a Moments,
    at_0: Option<&'a Moments>,
) -> impl Iterator<Item = (String, Array<'a>)> {
    let key = move |what: &str| format!("layer_{layer}.{}.{direction}.{what}", Site::Mlp.name());
    let arrays = [
        (key("sum"), Array::F64(&moments.sum)),
        (key("sum_abs"), Array::F64(&moments.sum_abs)),
        (key("sum_sq"), Array::F64(&moments.sum_sq)),
        (key("max_abs"), Array::F64(&moments.max_abs)),
        (key("count"), Array::I64(moments.count as i64)),
    ];
    arrays.into_iter().chain(at_0.map(|at_0| (key("sum_abs_position_0"), Array::F64(&at_0.sum_abs))))
}

/// What metadata holds beyond the contract.
fn facts(
    plan: &Plan,
    counts: &SourceCounts,
    totals: &Totals,
    position_0_share: Map<String, Value>,
) -> Map<String, Value> {
    let loss = totals.loss_nats.map(|nats| nats / totals.targets as f64);
    let (config, split, dataset_commit) = plan
        .dataset_origin()
        .map_or((None, None, None), |(config, split, commit)| (config, Some(split), Some(commit)));
    let facts = json!({
        "gradlens_version": env!("CARGO_PKG_VERSION"),
        "architecture": plan.config.model_type,
        "site": Site::Mlp.name(),
        "device_names": plan.devices.names(),
        "dtype": plan.devices.dtype(),
        "loss_reduction": plan.engine.loss_reduction.name(),
        "loss_nats_per_token": loss,
        "model_revision": plan.model_commit(),
        "dataset": plan.texts.dataset.display().to_string(),
        "dataset_config": config,
        "dataset_split": split,
        "dataset_revision": dataset_commit,
        "min_chars": plan.texts.min_chars,
        "texts_read": counts.texts.read,
        "texts_kept": counts.texts.kept,
        "texts_too_short": counts.texts.too_short,
        "texts_truncated": counts.truncated,
        "texts_of_one_token": counts.one_token,
        "texts_without_tokens": counts.no_token,
        "tokens": totals.tokens,
        "targets": plan.engine.gradients.then_some(totals.targets),
        "tokens_per_pass": plan.passes.tokens_per_pass,
        "threads": plan.threads,
        "position_0_share": position_0_share,
    });
    match facts {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}
