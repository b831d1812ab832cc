//! saprmarks/dictionary_learning: `ae.pt`, a state dict, and `config.json` with the class in `trainer.dict_class`.
//!
//! What is computed is each class's `encode` and `decode` as `load_dictionary` prepares them.

use std::path::Path;

use super::config::Config;
use super::format::CONFIG;
use super::tensors::{Tensors, list, narrow, norms};
use super::{About, Sae, layers, named_in, transcoder};
use crate::error::{Error, Result};
use crate::model::sae::{InputNorm, SaeActivation, SaeWeights};
use crate::weights::mapped::Bytes;

/// The classes that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    AutoEncoder,
    AutoEncoderNew,
    TopK,
    BatchTopK,
    Matryoshka,
    Gated,
    JumpRelu,
}

const CLASSES: [(&str, Class); 7] = [
    ("AutoEncoder", Class::AutoEncoder),
    ("AutoEncoderNew", Class::AutoEncoderNew),
    ("AutoEncoderTopK", Class::TopK),
    ("BatchTopKSAE", Class::BatchTopK),
    ("MatryoshkaBatchTopKSAE", Class::Matryoshka),
    ("GatedAutoEncoder", Class::Gated),
    ("JumpReluAutoEncoder", Class::JumpRelu),
];

/// Where a training backup has the state dict.
const BACKUP: &str = "ae.";
/// Decoder norms so close to 1 are left alone, as `torch.allclose` has it.
const CLOSE: f64 = 1e-5 + 1e-8;

/// Reads the SAE in `file`; its `config.json` lies beside it, or one folder up for a checkpoint.
pub(super) fn open(file: &Path) -> Result<Sae> {
    let folder = file.parent().unwrap_or(Path::new(""));
    let config = match Config::read_if_there(&folder.join(CONFIG))? {
        Some(config) => config,
        None if folder.ends_with("checkpoints") => {
            let above = folder.parent().unwrap_or(Path::new("")).join(CONFIG);
            Config::read_if_there(&above)?.unwrap_or_else(|| Config::none(&above))
        }
        None => Config::none(&folder.join(CONFIG)),
    };
    // A training backup keeps the state dict beside those of the optimiser.
    sae(file, &config, || Tensors::torch(file, &[BACKUP]))
}

/// The same of files that are in memory; `file` is the name of the one with the weights.
pub(super) fn from_bytes(file: &Path, weights: Bytes, config: &[u8]) -> Result<Sae> {
    let config = Config::from_bytes(&file.with_file_name(CONFIG), config)?;
    sae(file, &config, || Tensors::torch_bytes(file, weights, &[BACKUP]))
}

fn sae(file: &Path, config: &Config, tensors: impl FnOnce() -> Result<Tensors>) -> Result<Sae> {
    let folder = file.parent().unwrap_or(Path::new(""));
    let io = config.told("buffer.io").unwrap_or_else(|| "out".to_owned());
    if io == "in_and_out" {
        return Err(transcoder(
            file,
            "it was trained from a module's input to its output (buffer.io: in_and_out)",
        ));
    }
    let tensors = tensors()?;
    let class = class(config, &tensors)?;
    let name = CLASSES.iter().find(|(_, other)| *other == class).map_or("", |(name, _)| name);
    let mut about = About {
        family: format!("dictionary_learning {name}"),
        path: file.to_owned(),
        hook: config.told("trainer.submodule_name"),
        model_name: config.told("trainer.lm_name"),
        layer: config.count("trainer.layer")?,
        ..About::default()
    };
    if let Some((folder, layer)) = named_in(folder) {
        about.layer = about.layer.or(about.hook.as_deref().and_then(layers::number)).or(Some(layer));
        about.hook = about.hook.or(Some(folder));
    }
    if io == "in" {
        // Another place than the module's output, which the name alone would be taken for.
        about.hook = about.hook.map(|hook| format!("input of {hook}"));
    }
    let weights = read(class, config, &tensors, &mut about)?;
    Ok(Sae { weights, about })
}

fn class(config: &Config, tensors: &Tensors) -> Result<Class> {
    if let Some(name) = config.str("trainer.dict_class")? {
        let class = CLASSES.iter().find(|(other, _)| *other == name).map(|(_, class)| *class);
        return class.ok_or_else(|| {
            let known: Vec<&str> = CLASSES.iter().map(|(name, _)| *name).collect();
            config.wrong("trainer.dict_class", known.join(", "))
        });
    }
    let has = |name: &str| tensors.has(name);
    Ok(match () {
        () if has("gate_bias") => Class::Gated,
        () if has("W_enc") && has("group_sizes") => Class::Matryoshka,
        () if has("W_enc") => Class::JumpRelu,
        () if has("bias") => Class::AutoEncoder,
        () if has("decoder.bias") => Class::AutoEncoderNew,
        () if has("encoder.weight") && has("b_dec") => {
            return Err(Error::new("the file of an SAE does not say its class")
                .at_path(&config.path)
                .expected(
                    "trainer.dict_class in config.json: AutoEncoderTopK and BatchTopKSAE have the same tensors",
                )
                .found("no such key, or no such file")
                .hint(
                    "fetch config.json, too, or write one: \
                     {\"trainer\": {\"dict_class\": \"BatchTopKSAE\"}}",
                ));
        }
        () => {
            return Err(Error::new("a file of PyTorch holds no SAE of a known class")
                .at_path(&tensors.path)
                .expected("the tensors of one of dictionary_learning's classes, or trainer.dict_class in config.json")
                .found(list(&tensors.names())));
        }
    })
}

fn read(class: Class, config: &Config, tensors: &Tensors, about: &mut About) -> Result<SaeWeights> {
    let linear = !matches!(class, Class::Matryoshka | Class::JumpRelu);
    let (encoder, decoder) = match linear {
        true => tensors.matrices(("encoder.weight", true), ("decoder.weight", false))?,
        false => tensors.matrices(("W_enc", false), ("W_dec", true))?,
    };
    let (features, width) = (encoder.num_features(), encoder.width());
    let bias = match class {
        Class::Gated => "mag_bias",
        _ if linear => "encoder.bias",
        _ => "b_enc",
    };
    let output_bias = match class {
        Class::AutoEncoder => "bias",
        Class::AutoEncoderNew => "decoder.bias",
        Class::Gated => "decoder_bias",
        _ => "b_dec",
    };
    let s = backup_scale(tensors)?;
    let scaled = |name: &str, len: usize| -> Result<Vec<f64>> {
        Ok(tensors.vector(name, len)?.into_iter().map(|value| s * value).collect())
    };
    let mut encoder_bias = scaled(bias, features)?;
    let decoder_bias = narrow(scaled(output_bias, width)?);
    let (mut encoder_scale, mut decoder_scale) = (None, None);
    let activation = match class {
        Class::AutoEncoder => {
            // `from_pretrained` rescales features so that decoder rows have norm 1.
            let norms = norms(&decoder);
            if norms.iter().any(|norm| (norm - 1.0).abs() > CLOSE) {
                encoder_bias.iter_mut().zip(&norms).for_each(|(bias, norm)| *bias *= norm);
                decoder_scale = Some(narrow(norms.iter().map(|norm| inverse(*norm)).collect()));
                encoder_scale = Some(narrow(norms));
            }
            SaeActivation::Relu
        }
        Class::AutoEncoderNew => SaeActivation::Relu,
        Class::Gated => {
            let magnitudes = tensors.vector("r_mag", features)?;
            encoder_scale = Some(narrow(magnitudes.into_iter().map(f64::exp).collect()));
            SaeActivation::Gated { gate_bias: narrow(scaled("gate_bias", features)?) }
        }
        Class::JumpRelu => SaeActivation::JumpRelu { threshold: narrow(scaled("threshold", features)?) },
        Class::TopK => SaeActivation::TopK { k: top_k(config, tensors, features, about)? },
        Class::BatchTopK | Class::Matryoshka => {
            about.expected_l0 = k(config, tensors, about)?.map(|k| k as f64);
            if class == Class::Matryoshka {
                check_groups(tensors, features)?;
            }
            SaeActivation::JumpRelu { threshold: vec![(s * threshold(tensors)?) as f32; features] }
        }
    };
    // Neither of these subtracts the decoder's bias from its input.
    let subtracts = !matches!(class, Class::AutoEncoderNew | Class::JumpRelu);
    Ok(SaeWeights {
        encoder,
        decoder,
        norm: InputNorm::None,
        input_bias: subtracts.then(|| decoder_bias.clone()),
        encoder_scale,
        encoder_bias: narrow(encoder_bias),
        activation,
        decoder_scale,
        decoder_bias,
    })
}

/// What biases and thresholds must be multiplied by. Trainers divide activations by their mean norm and multiply the
/// biases by it when they save, but not in a backup, which has the factor beside the state dict.
fn backup_scale(tensors: &Tensors) -> Result<f64> {
    match tensors.beside("norm_factor") {
        None => Ok(1.0),
        Some(factor) if factor > 0.0 && factor.is_finite() => Ok(factor),
        Some(factor) => Err(Error::new("norm_factor of a training backup is impossible")
            .at_path(&tensors.path)
            .expected("a number above 0")
            .found(factor)),
    }
}

/// 1/norm; a feature whose decoder row is zero never fires, and any factor serves.
pub(super) fn inverse(norm: f64) -> f64 {
    if norm > 0.0 { 1.0 / norm } else { 1.0 }
}

/// k of the file, else of the configuration.
fn k(config: &Config, tensors: &Tensors, about: &mut About) -> Result<Option<usize>> {
    let said = config.count("trainer.k")?;
    let Some(stored) = tensors.number("k")? else { return Ok(said) };
    // Counts are exact in float64.
    let k = stored as usize;
    if let Some(said) = said.filter(|said| *said != k) {
        about
            .notes
            .push(format!("config.json says k = {said}, the weights say k = {k}: the weights' is used."));
    }
    Ok(Some(k))
}

fn top_k(config: &Config, tensors: &Tensors, features: usize, about: &mut About) -> Result<usize> {
    let k = k(config, tensors, about)?.ok_or_else(|| config.wrong("trainer.k", "a whole number"))?;
    about.expected_l0 = Some(k as f64);
    check_k(k, features, &tensors.path)?;
    Ok(k)
}

/// k must be a count of features.
pub(super) fn check_k(k: usize, features: usize, place: &Path) -> Result<()> {
    if (1..=features).contains(&k) {
        return Ok(());
    }
    Err(Error::new("an SAE's k is impossible")
        .at_path(place)
        .expected(format_args!("1 to {features}, the number of features"))
        .found(k))
}

/// The learned threshold of a batch top-k SAE.
fn threshold(tensors: &Tensors) -> Result<f64> {
    let untrained = |found: String| {
        Error::new("an SAE's threshold has not been trained")
            .at_path(&tensors.path)
            .expected("a threshold of at least 0, which the trainer learns after its first 1,000 steps")
            .found(found)
            .hint("without it every positive feature would fire: use a later checkpoint, or train for longer")
    };
    match tensors.number("threshold")? {
        Some(threshold) if threshold >= 0.0 && threshold.is_finite() => Ok(threshold),
        Some(threshold) => Err(untrained(threshold.to_string())),
        None => Err(untrained("none".to_owned())),
    }
}

fn check_groups(tensors: &Tensors, features: usize) -> Result<()> {
    let Some(&[groups]) = tensors.shape("group_sizes")?.as_deref() else { return Ok(()) };
    let sum: f64 = tensors.vector("group_sizes", groups)?.iter().sum();
    if sum == features as f64 {
        return Ok(());
    }
    Err(Error::new("an SAE's groups are not its features")
        .at_path(&tensors.path)
        .expected(format_args!("group_sizes that add up to {features}"))
        .found(sum))
}
