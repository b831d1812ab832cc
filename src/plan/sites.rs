//! The places in the model that users and SAEs' files name: `--site`, and the one table of names from elsewhere.

use crate::error::{Error, Result};
use crate::model::op::Site;
use crate::model::{Config, Spec};

/// A place that files of SAEs name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// One of our sites.
    Site(Site),
    /// The output of the attention module: what it adds to the residual stream, unless a norm follows.
    Attention,
}

use Site::{AttnOut, Mlp, MlpHidden, MlpOut, ResidMid, ResidPost, ResidPre};

/// A name from elsewhere, where `{}` stands for the layer's number, and our place.
const NAMES: &[(&str, Place)] = &[
    // dictionary_learning: outputs of Hugging Face modules
    ("mlp_out_layer_{}", Place::Site(Mlp)),
    ("mlp_out_layer{}", Place::Site(Mlp)),
    ("mlp_layer_{}", Place::Site(Mlp)),
    ("attention_out_layer_{}", Place::Attention),
    ("attn_out_layer{}", Place::Attention),
    ("attention_layer{}", Place::Attention),
    ("resid_post_layer_{}", Place::Site(ResidPost)),
    ("resid_out_layer{}", Place::Site(ResidPost)),
    ("resid_pre_layer_{}", Place::Site(ResidPre)),
    // sparsify: modules below the base model
    ("layers.{}.mlp", Place::Site(Mlp)),
    ("layers.{}.self_attn", Place::Attention),
    ("layers.{}.attention", Place::Attention),
    ("layers.{}", Place::Site(ResidPost)),
    // Hugging Face modules by their full names
    ("model.layers.{}.mlp", Place::Site(Mlp)),
    ("model.layers.{}.mlp.output", Place::Site(Mlp)),
    ("model.layers.{}.post_feedforward_layernorm.output", Place::Site(MlpOut)),
    ("model.layers.{}.self_attn", Place::Attention),
    ("model.layers.{}", Place::Site(ResidPost)),
    ("model.layers.{}.output", Place::Site(ResidPost)),
    // TransformerLens: SAELens, Gemma Scope, Llama Scope
    ("blocks.{}.hook_mlp_out", Place::Site(MlpOut)),
    ("blocks.{}.hook_attn_out", Place::Site(AttnOut)),
    ("blocks.{}.hook_resid_pre", Place::Site(ResidPre)),
    ("blocks.{}.hook_resid_mid", Place::Site(ResidMid)),
    ("blocks.{}.hook_resid_post", Place::Site(ResidPost)),
    ("blocks.{}.mlp.hook_post", Place::Site(MlpHidden)),
];

/// The place that a file calls `hook`, and the number of its layer. `None`: not in the table.
pub(super) fn named(hook: &str) -> Option<(Place, usize)> {
    NAMES.iter().find_map(|(pattern, place)| {
        let (before, after) = pattern.split_once("{}")?;
        let number = hook.strip_prefix(before)?.strip_suffix(after)?;
        let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        Some((*place, number.parse().ok().filter(|_| digits)?))
    })
}

impl Place {
    /// The site at this place of `model`; `None` where it cannot be looked at.
    pub fn site(self, model: &Config) -> Option<Site> {
        match self {
            Self::Site(site) => Some(site).filter(|site| width(*site, model).is_some()),
            Self::Attention => model.names.attn_post_norm.is_none().then_some(AttnOut),
        }
    }

    /// Whether it is that of `--site`; without the flag, whether it can be looked at.
    pub fn is_meant(self, flag: Option<Site>, model: &Config) -> bool {
        self.site(model).is_some_and(|site| flag.is_none_or(|flag| same(flag, site, model)))
    }
}

/// Width of what `site` shows of `model`; `None` where it has no such place.
pub(super) fn width(site: Site, model: &Config) -> Option<usize> {
    match site {
        MlpHidden => model.experts.is_none().then_some(model.intermediate_size),
        Mlp | MlpOut | AttnOut | ResidPre | ResidMid | ResidPost => Some(model.hidden_size),
    }
}

/// Whether two sites show the same tensor of `model`: so do the MLP's output and what it adds to the residual stream,
/// unless a norm stands between.
pub(super) fn same(a: Site, b: Site, model: &Config) -> bool {
    let plain = |site| if site == MlpOut && model.names.mlp_post_norm.is_none() { Mlp } else { site };
    plain(a) == plain(b)
}

/// The sites of `--site`, each once, in the order of [`Site`]; `mlp` without the flag.
///
/// # Errors
/// Names that are none, and places that the model lacks.
pub(super) fn parse(flag: Option<&str>, spec: &Spec) -> Result<Vec<Site>> {
    let Some(flag) = flag else { return Ok(vec![Mlp]) };
    let site = |name: &str| {
        Site::named(name).ok_or_else(|| {
            Error::usage("there is no such site")
                .at(format!("--site {flag}"))
                .expected(format!("one of {}", names()))
                .found(format!("{name:?}"))
                .hint("several as a comma list: --site mlp,resid_post")
        })
    };
    let mut sites = flag.split(',').map(str::trim).map(site).collect::<Result<Vec<Site>>>()?;
    sites.sort_unstable();
    sites.dedup();
    match sites.iter().find(|site| spec.site_width(0, **site).is_none()) {
        None => Ok(sites),
        Some(site) => Err(Error::usage("the model has no such place")
            .at("--site")
            .expected("a site of a model whose MLP is a mixture of experts: all but mlp_hidden")
            .found(site.name())
            .hint("an expert's hidden dimensions are its own; mlp shows what all of them add up to")),
    }
}

fn names() -> String {
    Site::ALL.map(Site::name).join(", ")
}

/// The error for an SAE of a place that cannot be looked at; `of`: its files.
pub(super) fn unseen(name: &str, of: &str) -> Error {
    Error::new("this place in the model cannot be looked at")
        .at(of)
        .expected(format!("one of {}", names()))
        .found(name)
        .hint("where the name is wrong, say which place is meant with --site")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_elsewhere() {
        let site = |site| Some((Place::Site(site), 3));
        for (hook, expected) in [
            ("mlp_out_layer_3", site(Mlp)),
            ("mlp_out_layer3", site(Mlp)),
            ("layers.3.mlp", site(Mlp)),
            ("layers.3", site(ResidPost)),
            ("layers.3.self_attn", Some((Place::Attention, 3))),
            ("blocks.3.hook_mlp_out", site(MlpOut)),
            ("blocks.3.hook_attn_out", site(AttnOut)),
            ("blocks.3.hook_resid_pre", site(ResidPre)),
            ("blocks.3.mlp.hook_post", site(MlpHidden)),
            ("model.layers.3.post_feedforward_layernorm.output", site(MlpOut)),
            ("model.layers.3.output", site(ResidPost)),
            ("blocks.x.hook_mlp_out", None),
            ("blocks..hook_mlp_out", None),
            ("layers.10.mlp.act", None),
            ("", None),
        ] {
            assert_eq!(named(hook), expected, "{hook}");
        }
        assert!(unseen("x", "--site").to_string().contains("mlp, mlp_out"));
    }
}
