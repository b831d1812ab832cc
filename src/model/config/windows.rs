//! Which layers have a sliding window, and how wide: `sliding_window`, `use_sliding_window`,
//! `max_window_layers` and `layer_types`, read as the architecture's row says.

use serde_json::Value;

use super::keys::{Keys, shown};
use super::{MAX_LAYERS, MAX_TOKENS};
use crate::error::Result;
use crate::model::arch::{Architecture, Windowed};

/// The window of every layer. `[L]`
pub(super) fn read(keys: Keys<'_>, row: &Architecture, num_layers: usize) -> Result<Vec<Option<usize>>> {
    let Some(rule) = &row.window else {
        return no_windows(keys, num_layers);
    };
    let mut width = match keys.get("sliding_window") {
        None => rule.width,
        Some(_) => keys.count_or_null("sliding_window", MAX_TOKENS)?,
    };
    if let Some(switch) = rule.switch
        && keys.flag(switch)? != Some(true)
    {
        width = None;
    }
    let listed = keys.texts("layer_types")?;
    let has_list = listed.is_some();
    let listed = listed.map(|types| layer_types(keys, &types, num_layers, width)).transpose()?;
    let windows: Vec<Option<usize>> = match &listed {
        Some(windows) if rule.by_layer_types => windows.clone(),
        _ => {
            let has = |layer: usize| -> Result<bool> {
                Ok(match rule.layers {
                    Windowed::All => true,
                    Windowed::From(key, default) => layer >= read_layer(keys, key)?.unwrap_or(default),
                    Windowed::AllButEvery { key, period } => {
                        let read = key.map(|key| keys.count(key, MAX_LAYERS)).transpose()?.flatten();
                        !(layer + 1).is_multiple_of(read.unwrap_or(period))
                    }
                })
            };
            let window = |layer| Ok(if has(layer)? { width } else { None });
            (0..num_layers).map(window).collect::<Result<_>>()?
        }
    };
    if listed.is_some_and(|listed| listed != windows) {
        return Err(keys
            .error("config.json contradicts itself about sliding windows", "layer_types")
            .expected("what sliding_window means for all layers of this architecture")
            .found("other layers with a window")
            .hint("transformers does not read the key here; delete it"));
    }
    if matches!(rule.layers, Windowed::AllButEvery { .. }) && width.is_none() && !has_list {
        return Err(keys
            .error("config.json has layers with a sliding window, but there is no window", "sliding_window")
            .expected("a number of tokens, or layer_types of full_attention alone")
            .found("null"));
    }
    if rule.switch.is_none() {
        check_unread_switch(keys, windows.iter().any(Option::is_some))?;
    }
    Ok(windows)
}

/// A layer's number: zero is one.
fn read_layer(keys: Keys<'_>, key: &str) -> Result<Option<usize>> {
    let number = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
    keys.get(key)
        .map(|value| number(value).ok_or_else(|| keys.wrong(key, "a layer number from 0", value)))
        .transpose()
}

/// No layer of the architecture has a window; the file must not ask for one.
fn no_windows(keys: Keys<'_>, num_layers: usize) -> Result<Vec<Option<usize>>> {
    // A width that is switched off asks for nothing.
    let switched_off = keys.flag("use_sliding_window")? == Some(false);
    if let Some(value) = keys.get("sliding_window").filter(|value| !value.is_null() && !switched_off) {
        return Err(keys
            .error(
                "config.json asks for a sliding window, which this architecture does not have",
                "sliding_window",
            )
            .expected("no such key or null")
            .found(shown(value))
            .hint("transformers ignores the key here; delete it to compute attention without a window"));
    }
    check_unread_switch(keys, false)?;
    match keys.texts("layer_types")? {
        Some(types) => layer_types(keys, &types, num_layers, None),
        None => Ok(vec![None; num_layers]),
    }
}

/// The windows that an explicit list asks for.
fn layer_types(
    keys: Keys<'_>,
    types: &[&str],
    num_layers: usize,
    width: Option<usize>,
) -> Result<Vec<Option<usize>>> {
    let key = "layer_types";
    if types.len() != num_layers {
        return Err(keys
            .error("config.json lists the wrong number of layer types", key)
            .expected(format_args!("{num_layers} entries, as num_hidden_layers says"))
            .found(types.len()));
    }
    let window = |(layer, name): (usize, &&str)| match (*name, width) {
        ("full_attention", _) => Ok(None),
        ("sliding_attention", Some(width)) => Ok(Some(width)),
        ("sliding_attention", None) => Err(keys
            .error("config.json lists a layer with a sliding window, but there is no window", key)
            .expected("a sliding_window that is in force, or only full_attention")
            .found(format_args!("sliding_attention for layer {layer}"))),
        _ => Err(keys
            .error("config.json lists a layer type that is not supported", key)
            .expected("full_attention or sliding_attention")
            .found(format_args!("{name:?} for layer {layer}"))),
    };
    types.iter().enumerate().map(window).collect()
}

/// `use_sliding_window` where nobody reads it: it must agree with what is computed anyway.
fn check_unread_switch(keys: Keys<'_>, windows: bool) -> Result<()> {
    match keys.flag("use_sliding_window")? {
        Some(flag) if flag != windows => Err(keys
            .error("config.json contradicts itself about sliding windows", "use_sliding_window")
            .expected(format_args!("{windows}, which is what the other keys mean for this architecture"))
            .found(flag)
            .hint(
                "transformers ignores the key here; set sliding_window to null for no window, or delete \
                 this key",
            )),
        _ => Ok(()),
    }
}
