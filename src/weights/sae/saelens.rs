//! SAELens: `sae_weights.safetensors` and `cfg.json`, in the form of version 6 and in that before.

use std::path::Path;

use super::config::Config;
use super::dictionary_learning::check_k;
use super::format::{CFG, SAE_WEIGHTS};
use super::tensors::{Tensors, narrow, norms};
use super::{About, Sae, SaeOptions, UNUSED_SCALE, layers, named_in, refused, transcoder};
use crate::error::{Error, Result};
use crate::model::sae::{InputNorm, SaeActivation, SaeWeights};

/// Smallest decoder norm that is divided by, as in SAELens.
const SMALLEST_NORM: f64 = 1e-8;
/// How far a factor may be from 1 that does nothing, as `torch.allclose` has it.
const CLOSE: f64 = 1e-5 + 1e-8;

/// Architectures that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Architecture {
    Standard,
    TopK,
    JumpRelu,
    Gated,
}

/// Reads the SAE in `folder`.
pub(super) fn open(folder: &Path, options: &SaeOptions) -> Result<Sae> {
    let config = Config::read(&folder.join(CFG))?;
    let (architecture, name) = architecture(folder, &config)?;
    let tensors = Tensors::safetensors(&folder.join(SAE_WEIGHTS))?;
    if tensors.has("W_skip") {
        return Err(transcoder(folder, "this SAELens folder holds a skip transcoder"));
    }
    // Version 6 says `metadata.hook_name`, those before `hook_name` or `hook_point`.
    let told = |keys: [&str; 3]| keys.iter().find_map(|key| config.told(key));
    let hook = told(["metadata.hook_name", "hook_name", "hook_point"]);
    let mut about = About {
        family: format!("SAELens {name}"),
        path: tensors.path.clone(),
        layer: hook.as_deref().and_then(layers::number),
        model_name: told(["metadata.model_name", "model_name", "model_name"]),
        ..About::default()
    };
    let reshape = config.str("reshape_activations")?.unwrap_or("none");
    if reshape == "hook_z" || hook.as_deref().is_some_and(|hook| hook.ends_with("_z")) {
        about.notes.push(
            "It reads the attention heads' outputs, concatenated, before the output projection.".into(),
        );
    } else if reshape != "none" {
        return Err(config.wrong("reshape_activations", "none or hook_z"));
    }
    about.hook = hook;
    about.layer = about.layer.or_else(|| named_in(folder).map(|(_, layer)| layer));
    let weights = read(architecture, &config, &tensors, options, &mut about)?;
    let said = [("d_in", weights.width()), ("d_sae", weights.num_features())];
    for (key, there) in said {
        if let Some(said) = config.count(key)?.filter(|said| *said != there) {
            about
                .notes
                .push(format!("cfg.json says {key} = {said}, the weights have {there}: this is used."));
        }
    }
    Ok(Sae { weights, about })
}

fn architecture(folder: &Path, config: &Config) -> Result<(Architecture, String)> {
    let name = config.str("architecture")?.unwrap_or("standard");
    // Before version 6 the activation was a key of its own.
    let activation = config.str("activation_fn")?.or(config.str("activation_fn_str")?).unwrap_or("relu");
    let architecture = match (name, activation) {
        ("standard", "topk") | ("topk", _) => Architecture::TopK,
        ("standard", "relu") => Architecture::Standard,
        ("standard", other) => {
            return Err(refused(folder, format_args!("its activation is {other}")).expected("relu or topk"));
        }
        ("jumprelu", _) => Architecture::JumpRelu,
        ("gated", _) => Architecture::Gated,
        (other, _) if other.contains("transcoder") => {
            return Err(transcoder(folder, format_args!("SAELens calls it {other}")));
        }
        ("abstopk", _) => {
            return Err(refused(folder, "its architecture is abstopk, which keeps negative features")
                .hint("features are taken to be positive here"));
        }
        (other, _) => {
            return Err(refused(folder, format_args!("its architecture is {other}"))
                .expected("standard, topk, jumprelu or gated"));
        }
    };
    let name = if architecture == Architecture::TopK { "topk" } else { name };
    Ok((architecture, name.to_owned()))
}

/// What is done to the input, and the factor s of x that is to be folded into the weights, where there is one.
fn normalisation(
    config: &Config,
    options: &SaeOptions,
    about: &mut About,
) -> Result<(InputNorm, Option<f64>)> {
    let key = "normalize_activations";
    let name = match config.is_bool(key) {
        // Versions before 6 had a switch.
        true if config.bool(key)? == Some(true) => "expected_average_only_in",
        true => "none",
        false => config.str(key)?.unwrap_or("none"),
    };
    match name {
        "none" => Ok((InputNorm::None, None)),
        "covariance_whitening" => {
            about.notes.push(
                "cfg.json says covariance_whitening, which SAELens folds into the weights that it saves: this is taken to \
                 have happened."
                    .to_owned(),
            );
            Ok((InputNorm::None, None))
        }
        "constant_norm_rescale" => Ok((InputNorm::RescaleToSqrtD, None)),
        "layer_norm" => Ok((InputNorm::LayerNorm, None)),
        "expected_average_only_in" => match options.norm_scale {
            Some(scale) if scale > 0.0 && scale.is_finite() => Ok((InputNorm::None, Some(scale))),
            Some(scale) => Err(Error::usage("--sae_norm_scale is impossible")
                .expected("a number above 0")
                .found(scale)),
            None => Err(Error::new("an SAE was trained on scaled activations, and its files do not say the scale")
                .at_path(&config.path)
                .expected("normalize_activations: none, or the scale with --sae_norm_scale")
                .found("normalize_activations: expected_average_only_in")
                .hint(
                    "--sae_norm_scale is √D / mean‖x‖₂ over the training data; SAELens keeps it for the releases that it \
                     knows as norm_scaling_factor in pretrained_saes.yaml",
                )),
        },
        _ => Err(config.wrong(
            key,
            "none, expected_average_only_in, constant_norm_rescale, layer_norm or covariance_whitening",
        )),
    }
}

fn read(
    architecture: Architecture,
    config: &Config,
    tensors: &Tensors,
    options: &SaeOptions,
    about: &mut About,
) -> Result<SaeWeights> {
    let (norm, given) = normalisation(config, options, about)?;
    let s = given.unwrap_or(1.0);
    let (encoder, decoder) = tensors.matrices(("W_enc", false), ("W_dec", true))?;
    let (features, width) = (encoder.num_features(), encoder.width());
    refuse_factor(tensors, features)?;
    let bias = if architecture == Architecture::Gated { "b_mag" } else { "b_enc" };
    let mut encoder_bias = tensors.vector(bias, features)?;
    // SAELens folds s as W_enc·s, W_dec/s, b_dec/s; b_enc and θ are of scaled activations already.
    let mut decoder_bias = tensors.vector("b_dec", width)?;
    decoder_bias.iter_mut().for_each(|bias| *bias /= s);
    let (mut scale, mut rescale) = (vec![s; features], vec![1.0 / s; features]);
    let activation = match architecture {
        Architecture::Standard => SaeActivation::Relu,
        Architecture::JumpRelu => {
            let threshold = match tensors.either(&["threshold", "log_threshold"]) {
                // A checkpoint of the training.
                "log_threshold" => {
                    tensors.vector("log_threshold", features)?.into_iter().map(f64::exp).collect()
                }
                name => tensors.vector(name, features)?,
            };
            SaeActivation::JumpRelu { threshold: narrow(threshold) }
        }
        Architecture::Gated => {
            let magnitudes = tensors.vector("r_mag", features)?;
            scale.iter_mut().zip(magnitudes).for_each(|(scale, magnitude)| *scale *= magnitude.exp());
            // The gate opens where s·z + b_gate > 0, and z has no factor here.
            let gate = tensors.vector("b_gate", features)?;
            SaeActivation::Gated { gate_bias: narrow(gate.into_iter().map(|bias| bias / s).collect()) }
        }
        Architecture::TopK => {
            let k = config.count("k")?.or(config.count("activation_fn_kwargs.k")?);
            let k = k.ok_or_else(|| config.wrong("k", "a whole number"))?;
            check_k(k, features, &config.path)?;
            about.expected_l0 = Some(k as f64);
            if config.bool("rescale_acts_by_decoder_norm")?.unwrap_or(false) {
                // Norms are those after s was folded into the decoder.
                for (at, norm) in norms(&decoder).into_iter().enumerate() {
                    let norm = (norm / s).max(SMALLEST_NORM);
                    encoder_bias[at] *= norm;
                    scale[at] *= norm;
                    rescale[at] /= norm;
                }
            }
            SaeActivation::TopK { k }
        }
    };
    match (given, options.norm_scale) {
        (Some(s), _) => about.convention = Some(format!("inputs scaled by {s}")),
        (None, Some(_)) => about.notes.push(UNUSED_SCALE.to_owned()),
        (None, None) => {}
    }
    let scales = |values: Vec<f64>| (values.iter().any(|value| *value != 1.0)).then(|| narrow(values));
    let decoder_bias = narrow(decoder_bias);
    let subtracts = config.bool("apply_b_dec_to_input")?.unwrap_or(true);
    Ok(SaeWeights {
        encoder,
        decoder,
        norm,
        input_bias: subtracts.then(|| decoder_bias.clone()),
        encoder_scale: scales(scale),
        encoder_bias: narrow(encoder_bias),
        activation,
        decoder_scale: scales(rescale),
        decoder_bias,
    })
}

/// A factor of features from a fine-tuning that SAELens no longer knows; one that does nothing is left out.
fn refuse_factor(tensors: &Tensors, features: usize) -> Result<()> {
    for name in ["scaling_factor", "finetuning_scaling_factor"] {
        if tensors.has(name)
            && tensors.vector(name, features)?.iter().any(|factor| (factor - 1.0).abs() > CLOSE)
        {
            return Err(refused(
                &tensors.path,
                format_args!("its features have a factor of their own, {name}"),
            )
            .expected("factors of 1")
            .hint("SAELens dropped these factors in version 6: multiply W_dec by them and leave them out"));
        }
    }
    Ok(())
}
