//! Names that SAEs' files have for a place in the model: what they are called here. The one table of them.

use crate::error::{Error, Result};
use crate::model::op::Site;

/// A name from elsewhere, where `{}` stands for the layer's number, and our site.
const NAMES: &[(&str, &str)] = &[
    // dictionary_learning: outputs of Hugging Face modules
    ("mlp_out_layer_{}", "mlp"),
    ("mlp_out_layer{}", "mlp"),
    ("mlp_layer_{}", "mlp"),
    ("attention_out_layer_{}", "attn_out"),
    ("attn_out_layer{}", "attn_out"),
    ("attention_layer{}", "attn_out"),
    ("resid_post_layer_{}", "resid_post"),
    ("resid_out_layer{}", "resid_post"),
    ("resid_pre_layer_{}", "resid_pre"),
    // sparsify: modules below the base model
    ("layers.{}.mlp", "mlp"),
    ("layers.{}.self_attn", "attn_out"),
    ("layers.{}.attention", "attn_out"),
    ("layers.{}", "resid_post"),
    // Hugging Face modules by their full names
    ("model.layers.{}.mlp", "mlp"),
    ("model.layers.{}.mlp.output", "mlp"),
    ("model.layers.{}.post_feedforward_layernorm.output", "mlp_out"),
    ("model.layers.{}.self_attn", "attn_out"),
    ("model.layers.{}", "resid_post"),
    ("model.layers.{}.output", "resid_post"),
    // TransformerLens: SAELens, Gemma Scope, Llama Scope
    ("blocks.{}.hook_mlp_out", "mlp_out"),
    ("blocks.{}.hook_attn_out", "attn_out"),
    ("blocks.{}.hook_resid_pre", "resid_pre"),
    ("blocks.{}.hook_resid_mid", "resid_mid"),
    ("blocks.{}.hook_resid_post", "resid_post"),
    ("blocks.{}.mlp.hook_post", "mlp_hidden"),
];

/// Sites that users may name. `mlp_out` is what the block adds to the residual stream: the output of the MLP module,
/// unless a norm follows it, which no architecture of the table has yet.
const SITES: &[(&str, Site)] = &[("mlp", Site::Mlp), ("mlp_out", Site::Mlp)];

/// Our name of the place that a file calls `hook`, and the number of its layer. `None`: not in the table.
pub(super) fn named(hook: &str) -> Option<(&'static str, usize)> {
    NAMES.iter().find_map(|(pattern, site)| {
        let (before, after) = pattern.split_once("{}")?;
        let number = hook.strip_prefix(before)?.strip_suffix(after)?;
        let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        Some((*site, number.parse().ok().filter(|_| digits)?))
    })
}

/// Whether the site `name` is that of `--site`; without the flag, whether it can be shown.
pub(super) fn is_meant(name: &str, flag: Option<&str>) -> bool {
    let shown = |name: &str| SITES.iter().find(|(site, _)| *site == name).map(|(_, site)| *site);
    shown(name).is_some_and(|site| flag.is_none_or(|flag| shown(flag) == Some(site)))
}

/// The site of that name; `of`: who names it.
///
/// # Errors
/// None that this program can show.
pub(super) fn find(name: &str, of: &str) -> Result<(&'static str, Site)> {
    SITES.iter().find(|(site, _)| *site == name).copied().ok_or_else(|| unseen(name, of))
}

/// The error for a place that cannot be shown.
pub(super) fn unseen(name: &str, of: &str) -> Error {
    let sites: Vec<&str> = SITES.iter().map(|(site, _)| *site).collect();
    Error::new("this place in the model cannot be looked at")
        .at(of)
        .expected(format!("one of {}", sites.join(", ")))
        .found(name)
        .hint("the MLP's output is the only site so far; SAEs of other places need theirs")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_elsewhere() {
        for (hook, expected) in [
            ("mlp_out_layer_11", Some(("mlp", 11))),
            ("mlp_out_layer1", Some(("mlp", 1))),
            ("layers.10.mlp", Some(("mlp", 10))),
            ("layers.10", Some(("resid_post", 10))),
            ("blocks.8.hook_mlp_out", Some(("mlp_out", 8))),
            ("blocks.8.hook_resid_pre", Some(("resid_pre", 8))),
            ("model.layers.3.post_feedforward_layernorm.output", Some(("mlp_out", 3))),
            ("model.layers.3.output", Some(("resid_post", 3))),
            ("blocks.x.hook_mlp_out", None),
            ("blocks..hook_mlp_out", None),
            ("layers.10.mlp.act", None),
            ("", None),
        ] {
            assert_eq!(named(hook), expected, "{hook}");
        }
        assert_eq!(find("mlp_out", "--site").unwrap(), ("mlp_out", Site::Mlp));
        assert!(find("resid_post", "--site").unwrap_err().to_string().contains("mlp, mlp_out"));
    }
}
