//! Which tokens were counted: what the files and the screen say of it.

use serde_json::{Map, Value, json};

use super::results::Results;
use crate::engine::Totals;
use crate::error::{Error, Result};
use crate::model::op::Site;
use crate::plan::Plan;
use crate::stats::{Skipped, TokenPolicy};
use crate::units::thousands;

/// What metadata says of the rules.
pub(super) fn facts(plan: &Plan, site: Site, policy: &TokenPolicy, results: &Results) -> Value {
    let skipped = results.skipped(site);
    let of_all = skipped.first().map_or(Skipped::default(), |(_, skipped)| *skipped);
    let of_layers = |value: &dyn Fn(usize, &Skipped) -> Value| -> Value {
        let each = skipped.iter().map(|(layer, skipped)| (format!("layer_{layer}"), value(*layer, skipped)));
        each.collect::<Map<_, _>>().into()
    };
    let norms = policy.norms.as_ref();
    let median = |layer: usize| norms.and_then(|rule| rule.medians.get(&(layer, site)).copied());
    let counting = plan.counting;
    json!({
        "position_stride": counting.position_stride,
        "skip_first": counting.skip_first,
        "skip_special": counting.skip_special.name(),
        "special_ids": policy.special,
        "max_norm_ratio": counting.max_norm_ratio,
        "median_norms": norms.map(|_| of_layers(&|layer, _| median(layer).into())),
        "tokens_skipped": {
            "position_stride": of_all.stride,
            "skip_first": of_all.first,
            "skip_special": of_all.special,
            "max_norm_ratio": norms.map(|_| of_layers(&|_, skipped| skipped.norms.into())),
        },
    })
}

/// What each rule left out, a line each, where there are rules.
pub(super) fn summary(plan: &Plan, results: &Results) -> Option<String> {
    let sites = &plan.engine.sites;
    let skipped = results.skipped(*sites.first()?);
    let (_, of_all) = skipped.first().filter(|_| !plan.counting.is_all())?;
    let mut text = String::from("tokens left out of the statistics, each by the first rule that it breaks\n");
    for (rule, count) in rules(plan, of_all) {
        if !rule.starts_with(NORM_RULE) {
            text += &format!("{rule:<22} {}\n", thousands(count));
            continue;
        }
        for &site in sites {
            let of_layers: Vec<u64> =
                results.skipped(site).iter().map(|(_, skipped)| skipped.norms).collect();
            let least = of_layers.iter().min().copied().unwrap_or(0);
            let most = of_layers.iter().max().copied().unwrap_or(0);
            let at = if sites.len() == 1 { String::new() } else { format!(" at {}", site.name()) };
            text += &match least == most {
                true => format!("{rule:<22} {}{at}\n", thousands(least)),
                false => {
                    format!("{rule:<22} {} to {} of each layer{at}\n", thousands(least), thousands(most))
                }
            };
        }
    }
    Some(text)
}

const NORM_RULE: &str = "--max_norm_ratio";

/// The rules that are on, as they are typed, and what each left out.
fn rules(plan: &Plan, skipped: &Skipped) -> Vec<(String, u64)> {
    let counting = plan.counting;
    let is_special = counting.skip_special != Default::default();
    let rules = [
        (
            (counting.position_stride > 1).then(|| format!("--position_stride {}", counting.position_stride)),
            skipped.stride,
        ),
        ((counting.skip_first > 0).then(|| format!("--skip_first {}", counting.skip_first)), skipped.first),
        (is_special.then(|| format!("--skip_special {}", counting.skip_special.name())), skipped.special),
        (counting.max_norm_ratio.map(|ratio| format!("{NORM_RULE} {ratio}")), skipped.norms),
    ];
    rules.into_iter().filter_map(|(rule, count)| Some((rule?, count))).collect()
}

/// Refuses results that hold no token at all.
///
/// # Errors
/// A layer whose values or gradients hold none: every token was left out.
pub(super) fn check(plan: &Plan, results: &Results, totals: &Totals) -> Result<()> {
    for &site in &plan.engine.sites {
        let skipped = results.skipped(site);
        let Some(empty) = results.summed(site).into_iter().find(|summed| summed.moments.count == 0) else {
            continue;
        };
        let of_layer = skipped.iter().find(|(layer, _)| *layer == empty.layer);
        let of_layer = of_layer.map_or(Skipped::default(), |(_, skipped)| *skipped);
        return Err(nothing_left(plan, &of_layer, totals.tokens).at(format!(
            "{} of layer {}, {}",
            empty.quantity,
            empty.layer,
            site.name()
        )));
    }
    Ok(())
}

/// The error of `tokens` tokens of which nothing can be counted.
pub(super) fn nothing_left(plan: &Plan, skipped: &Skipped, tokens: u64) -> Error {
    let mut found: Vec<String> = rules(plan, skipped)
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .map(|(rule, count)| format!("{} left out by {rule}", thousands(count)))
        .collect();
    if let left @ 1.. = tokens.saturating_sub(skipped.total()) {
        found.push(format!("{} without a gradient: samples of one token have no loss", thousands(left)));
    }
    Error::new("the rules leave no token to count")
        .expected("a token that no rule leaves out")
        .found(format!("{} tokens: {}", thousands(tokens), found.join(", ")))
        .hint("--dry_run shows the rules; loosen the one that leaves out most")
}
