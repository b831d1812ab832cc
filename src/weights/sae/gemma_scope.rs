//! Gemma Scope: `params.npz` without a configuration; Gemma Scope 2: `params.safetensors` and `config.json`. Both are
//! JumpReLU SAEs that do not subtract the decoder's bias from their input.

use std::path::Path;

use super::config::Config;
use super::format::{CONFIG, GEMMA_2};
use super::tensors::{Tensors, narrow};
use super::{About, Sae, layers, named_in, refused, transcoder};
use crate::error::Result;
use crate::model::sae::{InputNorm, SaeActivation, SaeWeights};

/// Kinds of repositories, by the end of their names, and their site as SAELens calls it.
const KINDS: [(&str, &str); 4] =
    [("res", "hook_resid_post"), ("mlp", "hook_mlp_out"), ("att", "attn.hook_z"), ("transcoders", "")];

/// Reads the SAE in `file`, an `.npz`.
pub(super) fn open_first(file: &Path) -> Result<Sae> {
    let parts: Vec<&str> = file.components().filter_map(|part| part.as_os_str().to_str()).collect();
    if parts.contains(&"embedding") {
        return Err(refused(file, "it is of Gemma Scope's embeddings, which are no layer's"));
    }
    // `gemma-scope-2b-pt-mlp`, also as `models--google--gemma-scope-2b-pt-mlp`.
    let repository = parts.iter().rev().find(|part| part.contains("gemma-scope-"));
    let kind = repository.and_then(|name| KINDS.iter().find(|(kind, _)| name.ends_with(&format!("-{kind}"))));
    if kind.is_some_and(|(kind, _)| *kind == "transcoders") {
        return Err(transcoder(file, "it is one of Gemma Scope's transcoders"));
    }
    let tensors = Tensors::npz(file)?;
    let weights = jump_relu(&tensors)?;
    let layer = named_in(file).map(|(_, layer)| layer);
    let hook = kind.zip(layer).map(|((_, hook), layer)| format!("blocks.{layer}.{hook}"));
    let notes = match hook {
        Some(_) => Vec::new(),
        None => vec!["An .npz of Gemma Scope does not say its site, and no folder above it does.".to_owned()],
    };
    let l0 = parts.iter().rev().find_map(|part| part.strip_prefix("average_l0_")?.parse().ok());
    let about = About {
        family: "Gemma Scope JumpReLU".to_owned(),
        path: file.to_owned(),
        hook,
        layer,
        expected_l0: l0,
        without_bos: true,
        notes,
        ..About::default()
    };
    Ok(Sae { weights, about })
}

/// Reads the SAE in `folder` of Gemma Scope 2.
pub(super) fn open_second(folder: &Path) -> Result<Sae> {
    // Some folders of the release have none.
    let config = Config::read_if_there(&folder.join(CONFIG))?.unwrap_or_else(|| Config::none(folder));
    let tensors = Tensors::safetensors(&folder.join(GEMMA_2))?;
    let name = folder.to_string_lossy();
    let kind = config.str("type")?.unwrap_or(match () {
        () if name.contains("transcoder") || tensors.has("affine_skip_connection") => "transcoder",
        () if name.contains("crosscoder") => "crosscoder",
        () if name.contains("clt") => "clt",
        () => "sae",
    });
    match kind {
        "sae" => {}
        "transcoder" | "clt" => {
            return Err(transcoder(folder, format_args!("Gemma Scope 2 calls it a {kind}")));
        }
        other => {
            return Err(refused(folder, format_args!("Gemma Scope 2 calls it a {other}"))
                .expected("an SAE of one layer"));
        }
    }
    if config.str("architecture")?.is_some_and(|name| name != "jump_relu") {
        return Err(config.wrong("architecture", "jump_relu"));
    }
    let (input, output) = (config.told("hf_hook_point_in"), config.told("hf_hook_point_out"));
    if output.is_some() && input.is_some() && input != output {
        return Err(transcoder(folder, "its input and its output are different hook points"));
    }
    let weights = jump_relu(&tensors)?;
    let layer =
        input.as_deref().and_then(layers::number).or_else(|| named_in(folder).map(|(_, layer)| layer));
    let hook = input.or_else(|| {
        let kinds =
            [("resid_post", "hook_resid_post"), ("mlp_out", "hook_mlp_out"), ("attn_out", "attn.hook_z")];
        let hook = kinds.iter().find(|(kind, _)| name.contains(kind)).map(|(_, hook)| hook)?;
        Some(format!("blocks.{}.{hook}", layer?))
    });
    let about = About {
        family: "Gemma Scope 2 JumpReLU".to_owned(),
        path: tensors.path.clone(),
        hook,
        layer,
        model_name: config.told("model_name"),
        expected_l0: config.float("l0").ok().flatten(),
        without_bos: true,
        ..About::default()
    };
    Ok(Sae { weights, about })
}

fn jump_relu(tensors: &Tensors) -> Result<SaeWeights> {
    let (encoder, decoder) = (tensors.either(&["W_enc", "w_enc"]), tensors.either(&["W_dec", "w_dec"]));
    let (encoder, decoder) = tensors.matrices((encoder, false), (decoder, true))?;
    let (features, width) = (encoder.num_features(), encoder.width());
    Ok(SaeWeights {
        encoder,
        decoder,
        norm: InputNorm::None,
        input_bias: None,
        encoder_scale: None,
        encoder_bias: narrow(tensors.vector("b_enc", features)?),
        activation: SaeActivation::JumpRelu { threshold: narrow(tensors.vector("threshold", features)?) },
        decoder_scale: None,
        decoder_bias: narrow(tensors.vector("b_dec", width)?),
    })
}
