//! `--sae`: which SAE belongs to which layer, and whether it fits the model.

mod place;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::time::Instant;

use super::fetch::Fetcher;
use super::show::ranges;
use super::{Devices, Embedded, layers, sites};
use crate::backend::cpu::Cpu;
use crate::backend::{SaeBackend, SaeGradient};
use crate::cli::{MachineArgs, SaeArgs, SaeSplice};
use crate::error::{Error, Result};
use crate::model::op::Site;
use crate::model::sae::SaeWeights;
use crate::model::{Config, Spec};
use crate::stats::{Quantity, SaeSpec};
use crate::transform::AggregationMode;
use crate::units::{size, thousands};
use crate::weights::sae::{self, Sae, SaeOptions};
use place::{Asked, Brought, Place};
pub(super) use place::{ENDINGS, folder_of, hub_parts, is_below};

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
    /// The site that all of them belong to.
    pub site: Site,
    /// What is odd about them.
    warnings: Vec<String>,
    /// `--sae_gradient`.
    pub gradient: SaeGradient,
    /// `--sae_splice`.
    pub splice: SaeSplice,
}

/// Which SAEs are meant: known before anything large is brought.
pub(super) struct SaeChoice {
    name: String,
    place: Place,
    options: SaeOptions,
    /// `--site`.
    site: Option<Site>,
    /// Paths, by layer.
    chosen: BTreeMap<usize, String>,
    /// Those that lie on this machine are opened before anything is brought.
    opened: Opened,
    found_s: f64,
}

/// Opened SAEs, and what is to be said of them.
#[derive(Default)]
struct Opened {
    saes: BTreeMap<usize, Sae>,
    site: Option<Site>,
    warnings: Vec<String>,
}

impl SaeChoice {
    /// Finds the SAEs of the wanted layers, and opens those that lie on this machine.
    ///
    /// # Errors
    /// Flags that make no sense; SAEs that are not there, cannot be read, are of another width, or belong to a place that
    /// cannot be looked at.
    pub fn find(args: &SaeArgs, model: &Config, spec: &Spec, fetcher: &Fetcher) -> Result<Self> {
        let started = Instant::now();
        if let Some(scale) = args.sae_norm_scale.filter(|scale| !(scale.is_finite() && *scale > 0.0)) {
            return Err(Error::usage("the scale cannot be used")
                .at("--sae_norm_scale")
                .expected("a finite number above 0")
                .found(scale));
        }
        let flag = args.layer.layers.as_deref();
        let wanted = flag.map(|flag| layers::parse(Some(flag), model.num_layers)).transpose()?;
        let options =
            SaeOptions { norm_scale: args.sae_norm_scale, llamascope_convention: args.llamascope_convention };
        let site = one_site(args, spec)?;
        let (name, place) = Place::find(args, fetcher)?;
        let asked =
            Asked { wanted: wanted.as_deref(), site, options: &options, model, dry_run: args.layer.dry_run };
        let chosen = place.choose(&name, &asked, fetcher)?;
        let mut choice = Self { name, place, options, site, chosen, opened: Opened::default(), found_s: 0.0 };
        if choice.place.is_here() {
            choice.open_all(Path::new(""), model)?;
        }
        choice.found_s = started.elapsed().as_secs_f64();
        Ok(choice)
    }

    /// Layers that have one, ascending.
    pub fn layers(&self) -> Vec<usize> {
        self.chosen.keys().copied().collect()
    }

    /// Fails where their files could not be brought: without a network, or without room on the disk.
    pub fn check(&self) -> Result<()> {
        self.place.check(&self.chosen)
    }

    /// Brings the SAEs, unless in a dry run, and opens them.
    ///
    /// # Errors
    /// SAEs that cannot be read, are of another width, or belong to a place that cannot be looked at.
    pub fn open(mut self, args: &SaeArgs, model: &Config, fetcher: &Fetcher) -> Result<SaePlan> {
        let started = Instant::now();
        let Brought { root, commit, to_come } =
            self.place.bring(&self.chosen, args.layer.dry_run, fetcher)?;
        if to_come.0 == 0 && !self.place.is_here() {
            self.open_all(&root, model)?;
        }
        let layers = self.layers();
        let Self { name, opened: Opened { saes, site, warnings }, found_s, .. } = self;
        let loading_s = found_s + started.elapsed().as_secs_f64();
        let plan = SaePlan::of(args, name, site.or(self.site).unwrap_or(Site::Mlp));
        Ok(SaePlan { commit, loading_s, layers, saes, to_come, warnings, ..plan })
    }

    fn open_all(&mut self, root: &Path, model: &Config) -> Result<()> {
        for (&layer, path) in &self.chosen {
            let sae = sae::open(&root.join(path), &self.options)?;
            let own = check(&sae, layer, self.site, model)?;
            match self.opened.site {
                Some(site) if site != own => {
                    return Err(Error::new("the SAEs belong to different places in the model")
                        .at(&self.name)
                        .expected(format!("{}, as for the layers before layer {layer}", site.name()))
                        .found(own.name())
                        .hint("analyse them in separate runs, or say which place is meant with --site"));
                }
                _ => self.opened.site = Some(own),
            }
            if let Some(hook) = &sae.about.hook
                && sites::named(hook).is_none_or(|(place, _)| !place.is_meant(Some(own), model))
            {
                self.opened.warnings.push(format!(
                    "the SAE of layer {layer} is taken for one of {}, as --site says; its files say {hook}",
                    own.name()
                ));
            }
            self.opened.saes.insert(layer, sae);
        }
        Ok(())
    }
}

impl SaePlan {
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
        Ok(Self { layers, saes, ..Self::of(args, "saes".into(), Site::Mlp) })
    }

    /// What is asked of SAEs, without any.
    fn of(args: &SaeArgs, name: String, site: Site) -> Self {
        Self {
            name,
            commit: None,
            loading_s: 0.0,
            layers: Vec::new(),
            saes: BTreeMap::new(),
            to_come: (0, 0),
            warnings: Vec::new(),
            site,
            gradient: args.sae_gradient,
            splice: args.sae_splice,
        }
    }
}

impl SaePlan {
    /// What the statistics are asked for.
    pub fn spec(&self, quantity: Quantity, mode: AggregationMode) -> SaeSpec {
        SaeSpec {
            saes: self.saes.iter().map(|(&layer, sae)| (layer, sae.weights.clone())).collect(),
            quantity,
            gradient: self.gradient,
            signed_sums_alone: quantity == Quantity::Gradients
                && self.gradient == SaeGradient::All
                && mode == AggregationMode::Mean,
        }
    }

    /// What the files of the SAEs leave to say.
    pub(super) fn notes(&self) -> Vec<String> {
        let of = |(layer, sae): (&usize, &Sae)| -> Vec<String> {
            sae.about.notes.iter().map(|note| format!("SAE of layer {layer}: {note}")).collect()
        };
        self.saes.iter().flat_map(of).collect()
    }

    /// What to say where the first token of texts is counted.
    pub(super) fn first_token_warning(&self) -> Option<String> {
        let without = self.saes.iter().filter(|(_, sae)| sae.about.without_bos);
        let without: Vec<usize> = without.map(|(layer, _)| *layer).collect();
        (!without.is_empty()).then(|| {
            format!(
                "the SAEs of layers {} were trained without the first token of texts (BOS), where their features mean \
                 nothing; position 0 of each sample is counted all the same: --skip_first 1 leaves it out",
                ranges(&without)
            )
        })
    }

    /// What is odd about the SAEs, and flags that change nothing.
    pub(super) fn warnings(&self, quantity: Quantity) -> Vec<String> {
        let values = quantity == Quantity::Values;
        let idle = [
            ("--sae_splice replace", values && self.splice == SaeSplice::Replace),
            (
                "--sae_gradient active",
                quantity != Quantity::Gradients && self.gradient == SaeGradient::Active,
            ),
        ];
        let idle = idle.into_iter().filter(|(_, idle)| *idle);
        let idle = idle.map(|(flag, _)| format!("{flag} changes nothing of {quantity}"));
        self.warnings.iter().cloned().chain(idle).collect()
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
        format!("{}{splice}", self.site.name())
    }

    /// Multiply-adds ×2 for the features of a position, all layers together: the products that no one is spared.
    pub(super) fn flops_per_position(&self, quantity: Quantity, mode: AggregationMode) -> u64 {
        let spec = self.spec(quantity, mode);
        let products = match quantity {
            _ if spec.signed_sums_alone => 0,
            // Where it fires only: next to nothing.
            Quantity::Values => 1,
            Quantity::Gradients | Quantity::Attribution => 1 + u64::from(spec.gradient == SaeGradient::All),
        };
        let product = |sae: &Sae| 2 * (sae.weights.num_features() * sae.weights.width()) as u64;
        self.saes.values().map(|sae| products * product(sae)).sum()
    }

    /// What all of this takes.
    pub(super) fn needs(&self, quantity: Quantity, mode: AggregationMode) -> SaeNeeds {
        let spec = self.spec(quantity, mode);
        let row = |sae: &Sae| (sae.weights.width() * size_of::<f32>()) as u64;
        let widest = self.saes.values().map(row).max().unwrap_or(0);
        let waiting = self.saes.values().filter(|sae| spec.waits(&sae.weights)).map(row);
        let bytes_per_token = match self.is_spliced(quantity) {
            // Of a branch, what the site's layer and the walk below it hold, and perhaps the site's value.
            true => 4 * widest + waiting.max().unwrap_or(0),
            false => waiting.sum(),
        };
        SaeNeeds {
            sums_bytes: self.saes.values().map(|sae| spec.bytes(sae.weights.num_features())).sum(),
            bytes_per_token,
            saes: self.saes.values().map(|sae| sae.weights.clone()).collect(),
        }
    }
}

/// What SAEs take besides the model's own memory, in bytes.
#[derive(Clone, Debug)]
pub struct SaeNeeds {
    /// The sums of all layers.
    pub sums_bytes: u64,
    /// For each token of a pass: values that wait for their gradients, branches.
    pub bytes_per_token: u64,
    saes: Vec<SaeWeights>,
}

impl SaeNeeds {
    /// For the work on a chunk of so many tokens.
    pub fn workspace_bytes(&self, chunk_tokens: usize) -> u64 {
        let cpu = Cpu::<f32>::new();
        self.saes.iter().map(|sae| cpu.sae_workspace_bytes(sae, chunk_tokens)).max().unwrap_or(0)
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
        write!(f, "up to {}", size(most))
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

/// The one site of `--site`.
fn one_site(args: &SaeArgs, spec: &Spec) -> Result<Option<Site>> {
    let Some(flag) = args.layer.site.as_deref() else { return Ok(None) };
    match sites::parse(Some(flag), spec)?[..] {
        [site] => Ok(Some(site)),
        _ => Err(Error::usage("SAEs stand at one place in the model")
            .at("--site")
            .expected("one site")
            .found(flag)
            .hint("analyse SAEs of several places in separate runs")),
    }
}

/// Whether `sae` can stand at `layer` of the model; its site.
fn check(sae: &Sae, layer: usize, flag: Option<Site>, model: &Config) -> Result<Site> {
    let place = sae.about.path.display().to_string();
    let hook = sae.about.hook.as_deref();
    let named = hook.and_then(sites::named);
    let site = flag.or_else(|| named.and_then(|(place, _)| place.site(model)));
    if let (None, Some(hook)) = (site, hook) {
        return Err(sites::unseen(hook, &place));
    }
    let width = site.and_then(|site| sites::width(site, model)).unwrap_or(model.hidden_size);
    if sae.weights.width() != width {
        return Err(Error::new("the SAE is not of this model: its width differs")
            .at(place)
            .expected(match width == model.hidden_size {
                true => format!("width {width}, the model's hidden size"),
                false => format!("width {width}, the inner size of the model's MLP"),
            })
            .found(match &sae.about.model_name {
                Some(name) => format!("width {}, trained on {name}", sae.weights.width()),
                None => format!("width {}", sae.weights.width()),
            })
            .hint(match flag {
                Some(site) => format!("is it an SAE of {}, as --site says, and of this model?", site.name()),
                None => {
                    "--model_name must be the model that the SAEs were trained on, or a finetune of it".into()
                }
            }));
    }
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
    match site {
        Some(site) => Ok(site),
        None => Err(Error::new("the SAE's files do not say which place in the model it belongs to")
            .at(place)
            .expected("a hook point such as mlp_out_layer_3, layers.3.mlp or blocks.3.hook_mlp_out")
            .found("none")
            .hint("say it with --site, for example --site mlp_out")),
    }
}
