//! Rotary embeddings: `rope_theta` and `rope_scaling` of yesterday's files, `rope_parameters` of today's.
//!
//! Precedence is that of `convert_rope_params_to_dict` and `standardize_rope_params` in transformers'
//! `modeling_rope_utils.py`: the base inside the object wins over the one outside it, `rope_type` over
//! `type`, and for `llama3` an `original_max_position_embeddings` *outside* the object over the one inside.

use super::keys::{Keys, shown};
use super::{Rope, RopeScaling};
use crate::error::Result;
use crate::model::arch::Architecture;

/// Keys of a rope object that any kind may have (the last one without effect on most).
const COMMON: &[&str] =
    &["rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"];

/// The kinds that are computed, and the further keys each one reads.
const KINDS: &[(&str, &[&str])] = &[
    ("default", &[]),
    ("linear", &["factor"]),
    ("llama3", &["factor", "low_freq_factor", "high_freq_factor"]),
];

/// Keys of today's object that hold the rotary embeddings of one kind of layer: those without a window, those with one.
const OF_LAYERS: [&str; 2] = ["full_attention", "sliding_attention"];

/// Reads the rotary embedding of a file, and that of layers with a window where the architecture has another for those;
/// `max_position`: the original context of a `llama3` scaling that names none.
pub(super) fn read(file: Keys<'_>, row: &Architecture, max_position: usize) -> Result<(Rope, Option<Rope>)> {
    let base = |key: &str, default: f64| Ok(file.positive(key)?.unwrap_or(default));
    let theta = base("rope_theta", row.defaults.rope_theta)?;
    let local = row.local_rope.map(|(key, default)| base(key, default)).transpose()?;
    let plain = |theta| Rope { theta, scaling: RopeScaling::None };
    let mut ropes = Vec::new();
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(object) = file.object(key)? else { continue };
        ropes.push(match local {
            // One object for each kind of layer.
            Some(local) if OF_LAYERS.iter().any(|kind| object.has(kind)) => {
                if let Some((other, value)) =
                    object.entries().find(|(key, _)| !OF_LAYERS.contains(&key.as_str()))
                {
                    return Err(object
                        .error("config.json mixes rotary embeddings of all layers and of some", other)
                        .expected("full_attention and sliding_attention, and nothing else")
                        .found(shown(value)));
                }
                let of = |kind, theta| match object.object(kind)? {
                    Some(rope) => read_object(file, rope, theta, max_position),
                    None => Ok(plain(theta)),
                };
                (of(OF_LAYERS[0], theta)?, Some(of(OF_LAYERS[1], local)?))
            }
            // transformers takes yesterday's object for layers without a window, and does not look at today's.
            Some(_) if key == "rope_parameters" => {
                return Err(file
                    .error("config.json does not say which layers its rotary embedding is for", key)
                    .expected("an object for full_attention and one for sliding_attention")
                    .found("one object for all layers")
                    .hint(
                        "transformers ignores it for this architecture; name the layers, or delete the key",
                    ));
            }
            _ => (read_object(file, object, theta, max_position)?, local.map(plain)),
        });
    }
    if let [old, new] = &ropes[..]
        && old != new
    {
        return Err(file
            .error("config.json describes two different rotary embeddings", "rope_scaling")
            .expected("the same as rope_parameters")
            .found(format_args!("{old:?} against {new:?}"))
            .hint("delete the wrong one of rope_scaling and rope_parameters"));
    }
    Ok(ropes.pop().unwrap_or_else(|| (plain(theta), local.map(plain))))
}

fn read_object(file: Keys<'_>, rope: Keys<'_>, theta: f64, max_position: usize) -> Result<Rope> {
    if let Some((key, _)) = rope.entries().find(|(_, value)| value.is_object()) {
        return Err(rope
            .error("config.json gives layers different rotary embeddings, which is not supported", key)
            .expected("one rope_theta for all layers")
            .found("an object per layer type"));
    }
    let kind = match rope.text("rope_type")? {
        Some(kind) => kind,
        None => rope.text("type")?.unwrap_or("default"),
    };
    let Some((kind, reads)) = KINDS.iter().find(|(name, _)| *name == kind) else {
        return Err(rope
            .error("config.json names a rotary scaling that is not supported", "rope_type")
            .expected(format_args!(
                "one of {}",
                KINDS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
            ))
            .found(format_args!("{kind:?}"))
            .hint("scalings that depend on the sample's length need code that gradlens does not have yet"));
    };
    let unread = |key: &str| !COMMON.contains(&key) && !reads.contains(&key);
    if let Some((key, value)) = rope.entries().find(|(key, value)| unread(key) && !value.is_null()) {
        return Err(rope
            .error(
                format!("config.json has a parameter that rotary scaling of type {kind} does not know"),
                key,
            )
            .expected("no such key")
            .found(shown(value))
            .hint("say in rope_type which scaling is meant, or delete the key if it has no effect"));
    }
    if rope.has("partial_rotary_factor") && rope.positive("partial_rotary_factor")? != Some(1.0) {
        return Err(rope
            .error("rotary embeddings on a part of each head are not supported", "partial_rotary_factor")
            .expected("no such key or 1"));
    }

    let scaling = match *kind {
        "linear" => RopeScaling::Linear { factor: rope.positive_required("factor")? },
        "llama3" => {
            let low_freq_factor = rope.positive_required("low_freq_factor")?;
            let high_freq_factor = rope.positive_required("high_freq_factor")?;
            // Between the two the frequencies are interpolated by a division by their difference.
            if high_freq_factor <= low_freq_factor {
                return Err(rope
                    .error("the llama3 rotary scaling has its limits in the wrong order", "high_freq_factor")
                    .expected(format_args!("more than low_freq_factor, {low_freq_factor}"))
                    .found(high_freq_factor));
            }
            let original_max_position = match file.positive("original_max_position_embeddings")? {
                Some(outside) => outside,
                None => rope.positive("original_max_position_embeddings")?.unwrap_or(max_position as f64),
            };
            RopeScaling::Llama3 {
                factor: rope.positive_required("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_max_position,
            }
        }
        _ => RopeScaling::None,
    };
    Ok(Rope { theta: rope.positive("rope_theta")?.unwrap_or(theta), scaling })
}
