//! Llama Scope: `checkpoints/final.safetensors` and `hyperparams.json`.
//!
//! Its weights are of scaled activations, s·x with s = √D / mean‖x‖₂. What they mean depends on who reads them, see
//! [`LlamaScopeConvention`].

use std::path::Path;

use super::config::Config;
use super::dictionary_learning::inverse;
use super::format::{CONFIG, HYPERPARAMS, LLAMA_FINAL};
use super::tensors::{Tensors, narrow, norms};
use super::{About, LlamaScopeConvention, Sae, layers, named_in, refused, transcoder};
use crate::error::{Error, Result};
use crate::model::sae::{InputNorm, SaeActivation, SaeWeights};

/// Reads the SAE in `folder`.
pub(super) fn open(folder: &Path, convention: LlamaScopeConvention) -> Result<Sae> {
    let config = Config::read(&folder.join(HYPERPARAMS))?;
    let (input, output) = (config.told("hook_point_in"), config.told("hook_point_out"));
    if output.is_some() && output != input {
        return Err(transcoder(folder, "its input and its output are different hook points"));
    }
    let native = convention == LlamaScopeConvention::Native;
    let yes = |key: &str, default: bool| Ok::<_, Error>(config.bool(key)?.unwrap_or(default));
    if yes("use_glu_encoder", false)? {
        return Err(refused(folder, "its encoder has a second, gating half (use_glu_encoder)"));
    }
    let jump = match config.str("act_fn")?.unwrap_or("relu") {
        "jumprelu" => true,
        // SAELens takes every one of these for a JumpReLU.
        "relu" if native => false,
        _ => return Err(config.wrong("act_fn", if native { "jumprelu or relu" } else { "jumprelu" })),
    };
    let tensors = Tensors::safetensors(&folder.join(LLAMA_FINAL))?;
    let (encoder, decoder) = tensors.matrices(("encoder.weight", true), ("decoder.weight", false))?;
    let (features, width) = (encoder.num_features(), encoder.width());
    let (scale_in, scale_out) = scales(&config, width)?;
    let mut encoder_bias = tensors.vector("encoder.bias", features)?;
    let mut decoder_bias = match yes("use_decoder_bias", true)? {
        true => tensors.vector("decoder.bias", width)?,
        false => vec![0.0; width],
    };
    let threshold = match jump {
        true => positive(&config, "jump_relu_threshold", true)?,
        false => 0.0,
    };
    let decoder_norms = norms(&decoder);
    let mut about = About {
        family: "Llama Scope".to_owned(),
        path: tensors.path.clone(),
        layer: input.as_deref().and_then(layers::number).or_else(|| named_in(folder).map(|(_, layer)| layer)),
        hook: input,
        model_name: config.told("model_name"),
        without_bos: true,
        convention: Some(convention.name().to_owned()),
        ..About::default()
    };
    let mut sorted = decoder_norms.clone();
    sorted.sort_by(f64::total_cmp);
    let (least, middle, most) = (sorted[0], sorted[features / 2], sorted[features - 1]);
    about.notes.push(format!(
        "Llama Scope, convention {}: norms of decoder rows are {least:.3} at least, {middle:.3} in the middle, {most:.3} \
         at most.",
        convention.name()
    ));
    let (encoder_scale, decoder_scale, threshold) = if native {
        // f of raw x: encoder bias/s_in, decoder ·s_in/s_out, then every decoder row is made to have norm 1.
        let ratio = scale_in / scale_out;
        encoder_bias.iter_mut().for_each(|bias| *bias /= scale_in);
        decoder_bias.iter_mut().for_each(|bias| *bias /= scale_out);
        if yes("sparsity_include_decoder_norm", true)? {
            let norms: Vec<f64> = decoder_norms.iter().map(|norm| norm * ratio).collect();
            encoder_bias.iter_mut().zip(&norms).for_each(|(bias, norm)| *bias *= norm);
            let back = norms.iter().map(|norm| ratio * inverse(*norm)).collect();
            (Some(norms), Some(back), threshold)
        } else {
            (None, Some(vec![ratio; features]), threshold)
        }
    } else {
        decoder_bias.iter_mut().for_each(|bias| *bias /= scale_in);
        (Some(vec![scale_in; features]), Some(vec![1.0 / scale_in; features]), threshold * scale_in)
    };
    let decoder_bias = narrow(decoder_bias);
    let subtracts = native && yes("apply_decoder_bias_to_pre_encoder", false)?;
    let weights = SaeWeights {
        encoder,
        decoder,
        norm: InputNorm::None,
        input_bias: subtracts.then(|| decoder_bias.clone()),
        encoder_scale: encoder_scale.map(narrow),
        encoder_bias: narrow(encoder_bias),
        activation: match jump {
            true => SaeActivation::JumpRelu { threshold: vec![threshold as f32; features] },
            false => SaeActivation::Relu,
        },
        decoder_scale: decoder_scale.map(narrow),
        decoder_bias,
    };
    Ok(Sae { weights, about })
}

/// √D over the mean norm of the activations that go in, and of those that should come out.
fn scales(config: &Config, width: usize) -> Result<(f64, f64)> {
    match config.str("norm_activation")?.unwrap_or("dataset-wise") {
        "dataset-wise" => {
            let root = (width as f64).sqrt();
            let input = positive(config, "dataset_average_activation_norm.in", false)?;
            let output = positive(config, "dataset_average_activation_norm.out", false)?;
            Ok((root / input, root / output))
        }
        // The scales are in the weights already.
        "inference" => Ok((1.0, 1.0)),
        _ => Err(config.wrong("norm_activation", "dataset-wise or inference")),
    }
}

fn positive(config: &Config, key: &str, or_zero: bool) -> Result<f64> {
    let number = config.float(key)?.filter(|number| *number > 0.0 || (or_zero && *number == 0.0));
    number.ok_or_else(|| config.wrong(key, "a number above 0"))
}

/// The error for the later formats of Llama Scope's makers, as exactly as their configuration allows.
pub(super) fn refuse_later(folder: &Path) -> Error {
    let config = Config::read(&folder.join(CONFIG));
    let kind = config.as_ref().ok().and_then(|config| config.told("sae_type"));
    match kind.as_deref() {
        Some("clt") => transcoder(folder, "llamascopium calls it a clt"),
        Some(kind @ ("crosscoder" | "lorsa" | "molt")) => {
            refused(folder, format_args!("llamascopium calls it a {kind}")).expected("an SAE of one layer")
        }
        _ => {
            let activation = config.ok().and_then(|config| config.told("act_fn"));
            let activation = activation.map_or(String::new(), |name| format!(", here with {name}"));
            refused(
                folder,
                format_args!("it is of Llama Scope R1 or llamascopium, whose files are not read{activation}"),
            )
            .expected("Llama Scope's hyperparams.json and checkpoints/final.safetensors, or another format")
            .hint("convert it with SAELens, or use the release of 2024")
        }
    }
}
