//! What a finished run leaves: the record that the files hold, and the tables.

use serde_json::{Map, Value, json};

use super::closing::Table;
use super::results::{Results, Summed};
use super::{closing, counting, features};
use crate::backend::Moments;
use crate::engine::Totals;
use crate::model::op::Site;
use crate::output::npy::Array;
use crate::output::report::LayerSummary;
use crate::output::{Log, RunRecord, Timing};
use crate::plan::Plan;
use crate::source::SourceCounts;
use crate::stats::{Quantity, TokenPolicy, position_0_share};
use crate::transform;

/// Everything the files of `site` hold, and the tables for the screen.
pub(super) fn record<'a>(
    plan: &Plan,
    site: Site,
    policy: &TokenPolicy,
    counts: &SourceCounts,
    totals: &Totals,
    results: &'a Results,
    timing: &Timing,
    log: &Log,
) -> (RunRecord<'a>, Vec<Table>) {
    let mut timing = timing.clone();
    let mut rendered = Vec::new();
    let mut statistics = Vec::new();
    let mut tables: Vec<Table> = Vec::new();
    let mut shares = Map::new();
    for summed in results.summed(site) {
        let Summed { layer, quantity, moments, .. } = summed;
        let (mean, mean_abs) = (over(&moments.sum, moments), over(&moments.sum_abs, moments));
        let rendering = transform::render(&plan.transform, layer, &mean, &mean_abs);
        let ranked = rendering.arrays.last().map_or(&[][..], |array| &array.values);
        let share = summed.at_0.and_then(|at_0| position_0_share(at_0, moments));
        let (count, max_abs) = (moments.count, &moments.max_abs);
        let row = LayerSummary::new(layer, count, &mean, &mean_abs, max_abs, share, ranked, 5);
        match tables.iter_mut().find(|table| table.quantity == quantity) {
            Some(table) => table.rows.push(row),
            None => tables.push(Table { quantity, title: title(plan, site, quantity), rows: vec![row] }),
        }
        if quantity == plan.quantity {
            shares.extend(share.map(|share| (format!("layer_{layer}"), share.into())));
            let warn = |warning: &String| log.warn(&closing::at_site(plan, site, warning));
            rendering.warnings.iter().for_each(warn);
            rendered.extend(rendering.arrays);
        }
        statistics.extend(named(site.name(), summed));
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
        aggregate_by: plan.quantity.to_string(),
        power: plan.transform.power,
        device: plan.devices.name(),
        timestamp: plan.timestamp,
        extra: facts(plan, site, policy, counts, totals, shares, results),
        rendered,
        statistics,
        timing,
    };
    (record, tables)
}

/// What the numbers of a table are.
fn title(plan: &Plan, site: Site, quantity: Quantity) -> String {
    let loss = format!("of the {} loss", plan.engine.loss_reduction.name());
    let place = plan.sae.as_ref().map_or(site.name().into(), |sae| sae.place(quantity));
    match (&plan.sae, quantity) {
        (None, Quantity::Gradients) => format!("gradients at {place} {loss}, nats per unit"),
        (None, _) => format!("{quantity} at {place}"),
        (Some(_), Quantity::Values) => format!("activations of SAE features at {place}"),
        (Some(sae), Quantity::Gradients) => {
            format!("{} {loss} at {place}; nats per unit", sae.what(quantity))
        }
        (Some(_), Quantity::Attribution) => {
            format!("activation times gradient {loss}, of features at {place}; nats")
        }
    }
}

/// Means of sums over tokens.
fn over(sums: &[f64], moments: &Moments) -> Vec<f64> {
    sums.iter().map(|sum| sum / moments.count as f64).collect()
}

/// The arrays of `statistics.npz`.
fn named<'a>(site: &str, summed: Summed<'a>) -> Vec<(String, Array<'a>)> {
    let Summed { layer, quantity, moments, at_0, features } = summed;
    let key = |what: &str| format!("layer_{layer}.{site}.{quantity}.{what}");
    let sums = [
        ("sum", &moments.sum),
        ("sum_abs", &moments.sum_abs),
        ("sum_sq", &moments.sum_sq),
        ("max_abs", &moments.max_abs),
    ];
    let there = sums.into_iter().filter(|(_, sums)| !sums.is_empty());
    let mut arrays: Vec<_> = there.map(|(what, sums)| (key(what), Array::F64(sums))).collect();
    arrays.push((key("count"), Array::I64(moments.count as i64)));
    arrays.extend(at_0.map(|at_0| (key("sum_abs_position_0"), Array::F64(&at_0.sum_abs))));
    arrays.extend(features.map(|features| (key("fired"), Array::Counts(&features.fired))));
    arrays
}

/// What metadata holds beyond the contract.
fn facts(
    plan: &Plan,
    site: Site,
    policy: &TokenPolicy,
    counts: &SourceCounts,
    totals: &Totals,
    position_0_share: Map<String, Value>,
    results: &Results,
) -> Map<String, Value> {
    let loss = totals.loss_nats.map(|nats| nats / totals.targets as f64);
    let (config, split, dataset_commit) = plan
        .dataset_origin()
        .map_or((None, None, None), |(config, split, commit)| (config, Some(split), Some(commit)));
    let facts = json!({
        "gradlens_version": env!("CARGO_PKG_VERSION"),
        "architecture": plan.config.model_type,
        "site": site.name(),
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
        "token_policy": counting::facts(plan, site, policy, results),
    });
    let mut facts = match facts {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    if let (Some(sae), Some(layers)) = (&plan.sae, results.features()) {
        facts.insert("mean_equals_mean_abs".into(), (plan.quantity == Quantity::Values).into());
        facts.insert("sae".into(), features::facts(plan, sae, layers, totals));
    }
    facts
}
