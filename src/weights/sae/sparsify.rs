//! EleutherAI/sparsify: a folder per hook point with `sae.safetensors` and `cfg.json`.

use std::path::Path;

use super::config::Config;
use super::dictionary_learning::check_k;
use super::format::{CFG, CONFIG, SPARSIFY};
use super::tensors::{Tensors, narrow};
use super::{About, Sae, named_in, refused, transcoder};
use crate::error::{Error, Result};
use crate::model::sae::{InputNorm, SaeActivation, SaeWeights};

/// k where `cfg.json` does not say it.
const DEFAULT_K: usize = 32;
/// Features for each dimension where `cfg.json` says neither this nor their number.
const DEFAULT_EXPANSION: usize = 32;

/// Reads the SAE in `folder`.
pub(super) fn open(folder: &Path) -> Result<Sae> {
    let config = Config::read(&folder.join(CFG))?;
    let tensors = Tensors::safetensors(&folder.join(SPARSIFY))?;
    let yes = |key: &str| Ok::<_, Error>(config.bool(key)?.unwrap_or(false));
    // Early transcoders do not say so, but they skip.
    if yes("transcode")? || yes("skip_connection")? || tensors.has("W_skip") {
        return Err(transcoder(folder, "this sparsify folder holds a transcoder"));
    }
    if yes("signed")? {
        return Err(refused(folder, "it keeps negative features (cfg.json says signed)").hint(
            "features are taken to be positive here; sparsify's own loader no longer knows the key either",
        ));
    }
    let (encoder, decoder) = tensors.matrices(("encoder.weight", true), ("W_dec", true))?;
    let (features, width) = (encoder.num_features(), encoder.width());
    let decoder_bias = narrow(tensors.vector("b_dec", width)?);
    let k = config.count("k")?.unwrap_or(DEFAULT_K);
    check_k(k, features, &config.path)?;
    let activation = match config.str("activation")?.unwrap_or("topk") {
        "topk" => SaeActivation::TopK { k },
        "groupmax" if features.is_multiple_of(k) => SaeActivation::GroupMax { k },
        "groupmax" => {
            return Err(config.wrong("k", format_args!("a divisor of the {features} features, for groupmax")));
        }
        _ => return Err(config.wrong("activation", "topk or groupmax")),
    };
    let mut about = About {
        family: format!("sparsify {}", config.str("activation")?.unwrap_or("topk")),
        path: tensors.path.clone(),
        expected_l0: Some(k as f64),
        model_name: run(folder).and_then(|run| run.told("model")),
        ..About::default()
    };
    (about.hook, about.layer) = match named_in(folder) {
        Some((hook, layer)) => (Some(hook), Some(layer)),
        None => (folder.file_name().and_then(|name| name.to_str()).map(str::to_owned), None),
    };
    let said = match config.count("num_latents")?.filter(|said| *said > 0) {
        Some(said) => Some(said),
        None => config.count("expansion_factor")?.unwrap_or(DEFAULT_EXPANSION).checked_mul(width),
    };
    let differ = [("D", config.count("d_in")?, width), ("F", said, features)];
    for (letter, said, there) in differ {
        if let Some(said) = said.filter(|said| *said != there) {
            about
                .notes
                .push(format!("cfg.json implies {letter} = {said}, the weights have {there}: this is used."));
        }
    }
    let weights = SaeWeights {
        encoder,
        decoder,
        norm: InputNorm::None,
        input_bias: Some(decoder_bias.clone()),
        encoder_scale: None,
        encoder_bias: narrow(tensors.vector("encoder.bias", features)?),
        activation,
        decoder_scale: None,
        decoder_bias,
    };
    Ok(Sae { weights, about })
}

/// The configuration of the training run, one or two folders up. It only names the model: a broken one is none.
fn run(folder: &Path) -> Option<Config> {
    let above = folder.ancestors().skip(1).take(2).map(|above| above.join(CONFIG));
    above.filter_map(|path| Config::read_if_there(&path).ok().flatten()).find(|run| run.has("sae"))
}
