//! What a run over SAE features leaves besides the arrays: how well each SAE fits, and where each feature fires most.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::closing::Table;
use crate::engine::Totals;
use crate::error::{Context, Result};
use crate::output::report::{self, significant};
use crate::output::{Log, Target};
use crate::plan::{Plan, SaePlan};
use crate::source::Tokens;
use crate::stats::{Example, LayerFeatures};
use crate::units::thousands;

/// Features of each layer whose snippet is shown: by the demo, and by other runs.
const SHOWN: [usize; 2] = [2, 1];
/// Characters of a snippet on the screen, before and after the token.
const SNIPPET: [usize; 2] = [40, 20];

/// More or less features per token than an SAE was trained for, by this factor, are odd.
const ODD_L0: f64 = 4.0;

type Layers = BTreeMap<usize, LayerFeatures>;

/// What metadata says of the SAEs.
pub(super) fn facts(plan: &Plan, sae: &SaePlan, layers: &Layers, totals: &Totals) -> Value {
    let each = sae.saes.iter().filter_map(|(layer, sae)| {
        let features = layers.get(layer)?;
        let fit = &features.fit;
        let spliced = totals.spliced_nats.get(layer).map(|nats| nats / totals.targets as f64);
        let about = json!({
            "path": sae.about.path.display().to_string(),
            "family": sae.about.family,
            "hook": sae.about.hook,
            "trained_on": sae.about.model_name,
            "feature_convention": sae.about.convention,
            "features": sae.weights.num_features(),
            "features_that_fired": features.num_fired(),
            "fvu": fit.fvu(),
            "l0": fit.l0(),
            "l0_in_training": sae.about.expected_l0,
            "checked_tokens": fit.tokens,
            "spliced_loss_nats_per_token": spliced,
        });
        Some((format!("layer_{layer}"), about))
    });
    json!({
        "saes": sae.name,
        "revision": sae.commit,
        "gradient": plan.engine.gradients.then(|| sae.gradient.name()),
        "splice": plan.engine.gradients.then(|| if sae.is_spliced(plan.quantity) { "replace" } else { "error" }),
        "position_stride": plan.counting.position_stride,
        "layers": each.collect::<Map<_, _>>(),
    })
}

/// `examples.jsonl`: for each feature that fired, where it was largest.
pub(super) fn write_examples(target: &Target, layers: &Layers, tokens: &Tokens) -> Result<()> {
    if !target.has_folder() {
        return Ok(());
    }
    let mut file = target.create("examples.jsonl")?;
    for (&layer, LayerFeatures { sums, examples, .. }) in layers {
        let Some(values) = &sums.values else { continue };
        let line = |feature: usize| -> Result<Option<String>> {
            if values.fired[feature] == 0 {
                return Ok(None);
            }
            let example = &examples[feature];
            let [before, token, after] = tokens.around(example.tokens())?;
            let mut line = serde_json::to_string(&json!({
                "layer": layer,
                "feature": feature,
                "fired": values.fired[feature],
                "max": values.moments.max_abs[feature],
                "sample": example.place.sample,
                "position": example.place.position,
                "before": before,
                "token": token,
                "after": after,
            }))
            .context("JSON could not be written")?;
            line.push('\n');
            Ok(Some(line))
        };
        let lines: Vec<Option<String>> =
            (0..examples.len()).into_par_iter().map(line).collect::<Result<_>>()?;
        file.write(lines.into_iter().flatten().collect::<String>().as_bytes())?;
    }
    Ok(())
}

/// Prints how well each SAE fits, and warns of those that do not.
pub(super) fn show_fit(sae: &SaePlan, layers: &Layers, totals: &Totals, log: &Log) {
    let checked = layers.values().map(|layer| layer.fit.tokens).max().unwrap_or(0);
    if checked == 0 {
        return;
    }
    let base = totals.loss_nats.map(|nats| nats / totals.targets as f64);
    let mut text = format!(
        "how the SAEs fit, on {} tokens (position 0 of each sample left out)\n\
         layer  features   fired      L0     FVU",
        thousands(checked)
    );
    text += if totals.spliced_nats.is_empty() { "\n" } else { "  loss with x̂ in the place of x\n" };
    for (layer, sums) in layers {
        let (fit, fired) = (&sums.fit, sums.num_fired());
        let features = sae.saes.get(layer).map_or(0, |sae| sae.weights.num_features());
        let fired = fired.map_or("-".into(), |fired| fired.to_string());
        let l0 = fit.l0().map_or("-".into(), |l0| format!("{l0:.1}"));
        let fvu = fit.fvu().map_or("-".into(), |fvu| format!("{fvu:.3}"));
        text += &format!("{layer:>5}  {features:>8}  {fired:>6}  {l0:>6}  {fvu:>6}");
        if let (Some(nats), Some(base)) = (totals.spliced_nats.get(layer), base) {
            text += &format!("  {:.4} against {base:.4}", nats / totals.targets as f64);
        }
        text.push('\n');
    }
    log.out(&text);
    for (layer, LayerFeatures { fit, .. }) in layers {
        if let Some(fvu) = fit.fvu().filter(|fvu| *fvu > 1.0) {
            log.warn(&format!(
                "the SAE of layer {layer} does not fit: FVU {fvu:.2}, worse than the mean of the activations; is it of this \
                 model and site, and is its normalisation right (--site, --sae_norm_scale)?"
            ));
        }
        let trained = sae.saes.get(layer).and_then(|sae| sae.about.expected_l0);
        if let Some((l0, trained)) =
            fit.l0().zip(trained).filter(|(l0, k)| *l0 > ODD_L0 * k || ODD_L0 * l0 < *k)
        {
            log.warn(&format!(
                "the SAE of layer {layer} fires {l0:.1} features per token, and was trained for {trained}"
            ));
        }
    }
}

/// Prints where the features that lead the table of the asked quantity fire most.
pub(super) fn show_examples(
    plan: &Plan,
    tables: &[Table],
    layers: &Layers,
    tokens: &Tokens,
    log: &Log,
) -> Result<()> {
    let Some(table) = tables.iter().find(|table| table.quantity == plan.quantity) else { return Ok(()) };
    let (rows, _) = report::on_one_screen(&table.rows);
    let mut text = String::from("where the first of these features fire most\nlayer  feature       max\n");
    let mut lines = 0;
    for row in rows {
        let Some(LayerFeatures { sums, examples, .. }) = layers.get(&row.layer) else { continue };
        let Some(values) = &sums.values else { continue };
        for &(feature, _) in row.top.iter().take(SHOWN[usize::from(!plan.is_demo())]) {
            let what = match values.fired[feature] {
                0 => "never fires on these texts".to_owned(),
                _ => {
                    let snippet = snippet(&examples[feature], tokens)?;
                    format!("{:>8}  {snippet}", significant(values.moments.max_abs[feature]))
                }
            };
            text += &format!("{:>5}  {feature:>7}  {what}\n", row.layer);
            lines += 1;
        }
    }
    if lines > 0 {
        log.out(&text);
    }
    Ok(())
}

/// `…the text before [token] and after…`, on one line.
fn snippet(example: &Example, tokens: &Tokens) -> Result<String> {
    let [before, token, after] =
        tokens.around(example.tokens())?.map(|text| text.replace(['\n', '\r', '\t'], " "));
    let skipped = before.chars().count().saturating_sub(SNIPPET[0]);
    let before: String = before.chars().skip(skipped).collect();
    let after: String = after.chars().take(SNIPPET[1]).collect();
    Ok(format!("{before}[{token}]{after}"))
}
