//! `--sae`: which SAE belongs to which layer, and whether it fits the model.

mod place;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::time::Instant;

use super::fetch::Fetcher;
use super::{Devices, Embedded, layers, sites};
use crate::backend::cpu::Cpu;
use crate::backend::{SaeBackend, SaeGradient};
use crate::cli::{MachineArgs, SaeArgs, SaeSplice};
use crate::error::{Error, Result};
use crate::model::Config;
use crate::stats::{Quantity, SaeSpec};
use crate::transform::AggregationMode;
use crate::units::{size, thousands};
use crate::weights::sae::{self, Sae, SaeOptions};
use place::{Brought, Place};
pub(super) use place::{ENDINGS, hub_parts, is_below};

/// The SAEs of a run, and what is asked of them.
pub struct SaePlan {
    /// As typed, or where the default was found.
    pub name: String,
    /// The commit, of SAEs on the hub.
    pub commit: Option<String>,
    /// Seconds it took to find and open them, downloads included.
    pub loading_s: f64,
    /// Layers that have one, ascending.
    pub layers: Vec<usize>,
    /// By layer; none where a dry run leaves them on the hub.
    pub saes: BTreeMap<usize, Sae>,
    /// Files and bytes that a dry run leaves on the hub.
    pub to_come: (usize, u64),
    /// The site that all of them belong to, as users call it.
    pub site: &'static str,
    /// `--sae_gradient`.
    pub gradient: SaeGradient,
    /// `--sae_splice`.
    pub splice: SaeSplice,
    /// `--position_stride`.
    pub position_stride: usize,
}

impl SaePlan {
    /// Finds and opens the SAEs of the wanted layers; brings those on the hub, unless `dry_run`.
    ///
    /// # Errors
    /// SAEs that are not there, cannot be read, are of another width, or belong to a place that cannot be looked at.
    pub(super) fn resolve(args: &SaeArgs, model: &Config, fetcher: &Fetcher) -> Result<Self> {
        let started = Instant::now();
        if args.position_stride == 0 {
            return Err(Error::usage("a number is too small")
                .at("--position_stride")
                .expected("1 or more: every position, every second one, and so forth")
                .found(0));
        }
        if let Some(scale) = args.sae_norm_scale.filter(|scale| !(scale.is_finite() && *scale > 0.0)) {
            return Err(Error::usage("the scale cannot be used")
                .at("--sae_norm_scale")
                .expected("a finite number above 0")
                .found(scale));
        }
        let wanted = args
            .layer
            .layers
            .as_deref()
            .map(|flag| layers::parse(Some(flag), model.num_layers))
            .transpose()?;
        let (name, place) = Place::find(args, fetcher)?;
        let options =
            SaeOptions { norm_scale: args.sae_norm_scale, llamascope_convention: args.llamascope_convention };
        let chosen = place.choose(&name, wanted.as_deref(), &options, model)?;
        let Brought { root, commit, to_come } = place.bring(&chosen, args.layer.dry_run, fetcher)?;
        let layers = chosen.keys().copied().collect();
        let mut saes = BTreeMap::new();
        let mut site = None;
        for (layer, path) in chosen.into_iter().filter(|_| to_come.0 == 0) {
            let sae = sae::open(&root.join(path), &options)?;
            let own = check(&sae, layer, args.site.as_deref(), model)?;
            match site {
                Some(site) if site != own => {
                    return Err(Error::new("the SAEs belong to different places in the model")
                        .at(&name)
                        .expected(format!("{site}, as for the layers before layer {layer}"))
                        .found(own)
                        .hint("analyse them in separate runs, or say which place is meant with --site"));
                }
                _ => site = Some(own),
            }
            saes.insert(layer, sae);
        }
        let loading_s = started.elapsed().as_secs_f64();
        Ok(Self { commit, loading_s, layers, saes, to_come, ..Self::of(args, name, site.unwrap_or("mlp")) })
    }

    /// The SAEs of the demo.
    pub(super) fn embedded(args: &SaeArgs, demo: Embedded, model: &Config) -> Result<Self> {
        let mut saes = BTreeMap::new();
        for (layer, (weights, config)) in demo.saes.iter().enumerate() {
            let file = format!("saes/mlp_out_layer_{layer}/trainer_0/ae.pt");
            let sae = sae::from_bytes(Path::new(&file), weights, config.as_bytes())?;
            check(&sae, layer, None, model)?;
            saes.insert(layer, sae);
        }
        let layers = saes.keys().copied().collect();
        Ok(Self { layers, saes, ..Self::of(args, "saes".into(), "mlp") })
    }

    /// What is asked of SAEs, without any.
    fn of(args: &SaeArgs, name: String, site: &'static str) -> Self {
        Self {
            name,
            commit: None,
            loading_s: 0.0,
            layers: Vec::new(),
            saes: BTreeMap::new(),
            to_come: (0, 0),
            site,
            gradient: args.sae_gradient,
            splice: args.sae_splice,
            position_stride: args.position_stride,
        }
    }
}

impl SaePlan {
    /// What the sums of all layers take, in bytes, and what waits for its gradient in a pass.
    pub(super) fn bytes(&self, quantity: Quantity, mode: AggregationMode) -> u64 {
        let spec = self.spec(quantity, mode);
        self.saes.values().map(|sae| spec.bytes(sae.weights.num_features())).sum()
    }

    /// What the statistics are asked for.
    pub fn spec(&self, quantity: Quantity, mode: AggregationMode) -> SaeSpec {
        SaeSpec {
            saes: self.saes.iter().map(|(&layer, sae)| (layer, sae.weights.clone())).collect(),
            quantity,
            gradient: self.gradient,
            signed_sums_alone: quantity == Quantity::Gradients
                && self.gradient == SaeGradient::All
                && mode == AggregationMode::Mean,
            position_stride: self.position_stride,
        }
    }

    /// What the files of the SAEs leave to say.
    pub(super) fn notes(&self) -> Vec<String> {
        let of = |(layer, sae): (&usize, &Sae)| -> Vec<String> {
            sae.about.notes.iter().map(|note| format!("SAE of layer {layer}: {note}")).collect()
        };
        self.saes.iter().flat_map(of).collect()
    }

    /// Whether the model is run anew for each layer.
    pub fn is_spliced(&self, quantity: Quantity) -> bool {
        self.splice == SaeSplice::Replace && quantity != Quantity::Values
    }

    /// As in `gradients of active features`.
    pub fn what(&self, quantity: Quantity) -> String {
        let which = match self.gradient {
            SaeGradient::Active if quantity == Quantity::Gradients => "active features",
            _ => "features",
        };
        format!("{quantity} of {which}")
    }

    /// As in `mlp, each layer's reconstruction in its place`.
    pub fn place(&self, quantity: Quantity) -> String {
        let splice = match self.is_spliced(quantity) {
            true => ", one layer's reconstruction in its place at a time",
            false => "",
        };
        format!("{}{splice}", self.site)
    }

    /// Bytes that the backend and the walks need besides the model's own, for chunks and passes of so many tokens.
    pub(super) fn work_bytes(
        &self,
        quantity: Quantity,
        mode: AggregationMode,
        chunk: usize,
        pass: usize,
    ) -> u64 {
        let (cpu, spec) = (Cpu::<f32>::new(), self.spec(quantity, mode));
        let of = |sae: &Sae| cpu.sae_workspace_bytes(&sae.weights, chunk);
        let workspace = self.saes.values().map(of).max().unwrap_or(0);
        let row = |sae: &Sae| (sae.weights.width() * size_of::<f32>()) as u64;
        let widest = self.saes.values().map(row).max().unwrap_or(0);
        // Values that wait for their gradients; of a branch, what the site's layer and the walk below it hold.
        let waiting = self.saes.values().filter(|sae| spec.waits(&sae.weights)).map(row);
        let rows: u64 = match self.is_spliced(quantity) {
            true => 4 * widest + if waiting.count() > 0 { widest } else { 0 },
            false => waiting.sum(),
        };
        workspace + pass as u64 * rows
    }
}

impl fmt::Display for SaePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut kinds: Vec<String> = self
            .saes
            .values()
            .map(|sae| {
                format!("{}, {} features", sae.about.family, thousands(sae.weights.num_features() as u64))
            })
            .collect();
        kinds.sort_unstable();
        kinds.dedup();
        let layer =
            |sae: &Sae| [&sae.weights.encoder, &sae.weights.decoder].map(|m| m.tensor.bytes().len() as u64);
        let bytes: Vec<u64> = self.saes.values().map(|sae| layer(sae).iter().sum()).collect();
        let most = bytes.iter().copied().max().unwrap_or(0);
        let commit =
            self.commit.as_ref().map_or(String::new(), |commit| format!(", commit {}", &commit[..12]));
        if let (files @ 1.., bytes) = self.to_come {
            return write!(f, "{}{commit}: {files} files, {} to be downloaded", self.name, size(bytes));
        }
        write!(
            f,
            "{}{commit}: {}; {} mapped, one layer's at a time: ",
            self.name,
            kinds.join("; "),
            size(bytes.iter().sum())
        )?;
        write!(f, "up to {}", size(most))?;
        match self.position_stride {
            1 => Ok(()),
            stride => write!(f, "; every {stride}th position"),
        }
    }
}

/// The CPU, which is all that knows SAEs.
pub(super) fn device(machine: &MachineArgs, warnings: &mut Vec<String>) -> Result<Devices> {
    if !matches!(machine.device.as_str(), "cpu" | "auto") {
        return Err(Error::usage("SAEs do not run on CUDA devices yet")
            .at("--device")
            .expected("cpu")
            .found(&machine.device)
            .hint("leave --device out"));
    }
    Devices::resolve(&MachineArgs { device: "cpu".into(), ..machine.clone() }, warnings)
}

/// Whether `sae` can stand at `layer` of the model; the name of its site.
fn check(sae: &Sae, layer: usize, site: Option<&str>, model: &Config) -> Result<&'static str> {
    let place = sae.about.path.display().to_string();
    if sae.weights.width() != model.hidden_size {
        return Err(Error::new("the SAE is not of this model: its width differs")
            .at(place)
            .expected(format!("width {}, the model's hidden size", model.hidden_size))
            .found(match &sae.about.model_name {
                Some(name) => format!("width {}, trained on {name}", sae.weights.width()),
                None => format!("width {}", sae.weights.width()),
            })
            .hint("--model_name must be the model that the SAEs were trained on, or a finetune of it"));
    }
    let hook = sae.about.hook.as_deref();
    let named = hook.and_then(sites::named);
    let own = named.map(|(_, layer)| layer).or(sae.about.layer);
    if let Some(own) = own.filter(|own| *own != layer) {
        return Err(Error::new("the SAE is of another layer than the one it was given for")
            .at(place)
            .expected(format!("an SAE of layer {layer}"))
            .found(match hook {
                Some(hook) => format!("layer {own}: its configuration says {hook}"),
                None => format!("layer {own}"),
            })
            .hint("check the path, and where {layer} stands in --sae"));
    }
    let site = match (site, named, hook) {
        (Some(site), _, _) => sites::find(site, "--site")?.0,
        (None, Some((site, _)), Some(hook)) => sites::find(site, &format!("{place} ({hook})"))?.0,
        (None, _, found) => {
            return Err(Error::new("the SAE's files do not say which place in the model it belongs to")
                .at(place)
                .expected("a hook point such as mlp_out_layer_3, layers.3.mlp or blocks.3.hook_mlp_out")
                .found(found.unwrap_or("none"))
                .hint("say it with --site, for example --site mlp_out"));
        }
    };
    Ok(site)
}
