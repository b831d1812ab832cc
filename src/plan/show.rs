//! The plan as `--dry_run` prints it.

use std::fmt;

use super::{Devices, Plan, fits};
use crate::model::{Config, Rope, RopeScaling};
use crate::stats::Quantity;
use crate::units::{size, thousands};

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let c = &self.config;
        let mut row = |name: &str, text: String| writeln!(f, "{name:<13}{text}");
        row("model", self.model())?;
        row("parameters", self.parameters())?;
        row("a layer", fits::layers(&self.spec))?;
        row("weights", self.weights())?;
        row(
            "shape",
            format!(
                "{} layers, hidden size {}, MLP {}{}, {} heads ({} key/value) of {}, vocabulary {}",
                c.num_layers,
                c.hidden_size,
                c.intermediate_size,
                c.experts.map_or(String::new(), |experts| format!(
                    " in each of {} experts, {} for each token",
                    experts.count, experts.per_token
                )),
                c.num_heads,
                c.num_kv_heads,
                c.head_dim,
                thousands(c.vocab_size as u64)
            ),
        )?;
        row("attention", attention(c))?;
        row(
            "layers",
            format!("{} of {}: {}", self.engine.layers.len(), c.num_layers, ranges(&self.engine.layers)),
        )?;
        row("statistics", self.statistics())?;
        if let Some(sae) = &self.sae {
            row("SAEs", sae.to_string())?;
        }
        row(
            "texts",
            format!(
                "{}{}, up to {} with more than {} characters, cut to {} tokens",
                self.texts.dataset.display(),
                self.part_of_dataset(),
                thousands(self.texts.num_samples as u64),
                self.texts.min_chars,
                thousands(self.max_length as u64)
            ),
        )?;
        if !self.counting.is_all() {
            row("counted", self.counting.to_string())?;
        }
        row("device", self.device())?;
        row("pass", self.pass())?;
        let m = &self.memory;
        row(
            "memory",
            format!(
                "{}activations {}, workspace {}{} (budget {})",
                self.weights_there(),
                size(m.activation_bytes),
                size(m.workspace_bytes),
                self.sums(),
                size(m.budget_bytes)
            ),
        )?;
        row("work", self.work())?;
        for (index, line) in fits::shown(&self.fits, self.visited_layers()).into_iter().enumerate() {
            row(if index == 0 { "would fit" } else { "" }, line)?;
        }
        row("output", self.destination())
    }
}

impl Plan {
    /// Whether there is config.json and no weights: enough for a dry run.
    pub(super) fn is_bare(&self) -> bool {
        self.files.is_bare()
    }

    /// Its name, architecture, and commit on the hub.
    pub(super) fn model(&self) -> String {
        let commit =
            self.files.commit().map_or(String::new(), |commit| format!(", commit {}", &commit[..12]));
        format!("{} ({}{commit})", self.model_name, self.config.model_type)
    }

    /// How many, and how many without the experts that a token does not go to.
    fn parameters(&self) -> String {
        let (all, active) = (self.spec.num_parameters(), self.spec.num_active_parameters());
        match active < all {
            true => format!("{}, of which {} are active for a token", thousands(all), thousands(active)),
            false => thousands(all),
        }
    }

    /// Of the workspace, what the sums over SAE features take.
    fn sums(&self) -> String {
        match &self.sae {
            Some(sae) if sae.to_come.0 > 0 => " and what SAEs take, known when they are here".into(),
            Some(sae) => {
                let needs = sae.needs(self.quantity, self.transform.mode);
                format!(", {} of it sums over SAE features", size(needs.sums_bytes))
            }
            None => String::new(),
        }
    }

    /// What the numbers are of: `values`, `gradients of active features`.
    pub fn what(&self) -> String {
        match &self.sae {
            None => self.quantity.to_string(),
            Some(sae) => sae.what(self.quantity),
        }
    }

    /// The place in each block that is looked at, and what stands there.
    pub fn place(&self, quantity: Quantity) -> String {
        match &self.sae {
            Some(sae) => sae.place(quantity),
            None => self.engine.sites.iter().map(|site| site.name()).collect::<Vec<_>>().join(", "),
        }
    }

    /// Size and type of the weights, or what of them is still to come.
    pub(super) fn weights(&self) -> String {
        let bytes = size(self.weight_bytes);
        if self.is_bare() {
            return format!("{bytes} in bfloat16, none of them here");
        }
        match self.files.missing_weights() {
            (0, _) => format!("{bytes} as {}, mapped", self.weight_types()),
            (1, _) => format!("{bytes} in 1 file, to be downloaded"),
            (files, missing) => format!("{bytes} in {files} files, {} to be downloaded", size(missing)),
        }
    }

    /// ` (wikitext-2-raw-v1, train)` of a dataset on the hub.
    fn part_of_dataset(&self) -> String {
        match self.corpus.origin() {
            None => String::new(),
            Some((config, split, _)) => {
                format!(" ({})", config.into_iter().chain([split]).collect::<Vec<_>>().join(", "))
            }
        }
    }

    /// What the dataset's files take, where they are not here yet: for a dry run.
    pub fn texts_to_download(&self) -> Option<String> {
        match self.corpus.missing() {
            (0, _) => None,
            (1, bytes) => Some(format!("1 file, {}, to be downloaded", size(bytes))),
            (files, bytes) => {
                Some(format!("{files} files, {}, to be downloaded as far as needed", size(bytes)))
            }
        }
    }

    fn weight_types(&self) -> String {
        let mut types: Vec<String> = self.tensors.iter().map(|tensor| tensor.dtype.to_string()).collect();
        types.sort_unstable();
        types.dedup();
        types.join(" and ")
    }

    /// Products per token, in units of 10⁹ multiplications and additions.
    fn work(&self) -> String {
        let flops = self.spec.flops_per_token() as f64 / 1e9;
        let head = self.spec.head_flops_per_token() as f64 / 1e9;
        let model = match self.engine.gradients {
            false => format!(
                "up to {flops:.3} GFLOP per token forward; of gradients {:.3} forward and up to as much backward",
                flops + head
            ),
            true => format!("{0:.3} GFLOP per token forward, up to {0:.3} backward", flops + head),
        };
        let Some(sae) = &self.sae else { return model };
        let features = sae.flops_per_position(self.quantity, self.transform.mode) as f64 / 1e9;
        let features = format!("{model}; {features:.3} for SAE features");
        if !sae.is_spliced(self.quantity) {
            return features;
        }
        // From each layer on, forward and backward.
        let above = |layer: usize| (self.spec.blocks.len() - layer) as f64 / self.spec.blocks.len() as f64;
        let again: f64 = sae.layers.iter().map(|&layer| 2.0 * (above(layer) * flops + head)).sum();
        format!(
            "{:.3} GFLOP per token forward; up to {again:.3} for the rest of the model from each layer on, forward and \
             backward{}",
            flops + head,
            features.strip_prefix(&model).unwrap_or_default()
        )
    }

    fn statistics(&self) -> String {
        let power = self.transform.power.map_or(String::new(), |p| format!(", power {p}"));
        let loss = match self.engine.gradients {
            false => String::new(),
            true => format!(" of the {} loss", self.engine.loss_reduction.name()),
        };
        format!(
            "{}{loss} at {}, {}{power}, normalised by {}",
            self.what(),
            self.place(self.quantity),
            self.transform.mode.name(),
            self.transform.normalise.name()
        )
    }

    pub(super) fn device(&self) -> String {
        let (name, dtype) = (self.devices.name(), self.devices.dtype());
        match self.devices {
            Devices::Cpu => format!("{name}, {} threads, {dtype}", self.threads),
            Devices::Cuda { ref names, .. } => format!("{name} ({}), {dtype}", names.join(", ")),
        }
    }

    /// Layers whose weights are used at all.
    fn visited_layers(&self) -> usize {
        self.engine.visited_layers(self.spec.blocks.len())
    }

    /// Weights on a device that has memory of its own.
    fn weights_there(&self) -> String {
        let (resident, all) = (self.memory.resident_layers, self.visited_layers());
        match self.memory.weight_bytes {
            0 => String::new(),
            bytes if resident >= all => format!("weights {}, ", size(bytes)),
            bytes => format!(
                "weights {} ({resident} of {all} layers stay, the others come for each pass), ",
                size(bytes)
            ),
        }
    }

    fn pass(&self) -> String {
        let layers = self.spec.blocks.len();
        let kept = match self.engine.keep_from {
            _ if !self.engine.gradients => String::new(),
            from if from >= layers => "; activations computed again".into(),
            from if from <= self.engine.layers[0] + 1 => "; activations kept".into(),
            from => format!("; activations kept from layer {from}, computed again below"),
        };
        format!(
            "{} tokens, in chunks of {}{kept}",
            thousands(self.passes.tokens_per_pass as u64),
            thousands(self.engine.chunk_tokens as u64)
        )
    }

    fn destination(&self) -> String {
        let mut places = Vec::new();
        for (_, output) in &self.outputs {
            if output.save_outputs {
                places.push(output.output_dir.join(&output.folder_name).display().to_string());
            }
            places.extend(output.save_consolidated.as_ref().map(|path| path.display().to_string()));
        }
        if places.is_empty() { "nothing is saved".into() } else { places.join(" and ") }
    }
}

fn attention(c: &Config) -> String {
    let windowed = c.windows.iter().flatten().count();
    let window = match c.windows.iter().flatten().next() {
        None => "full causal".into(),
        Some(w) if windowed == c.num_layers => format!("causal in a window of {w}"),
        Some(w) => format!("causal, in a window of {w} in {windowed} layers"),
    };
    let base = |rope: &Rope| {
        let scaling = match rope.scaling {
            RopeScaling::None => String::new(),
            RopeScaling::Linear { factor } => format!(", scaled linearly by {factor}"),
            RopeScaling::Llama3 { factor, .. } => format!(", low frequencies scaled by {factor}"),
        };
        format!("{}{scaling}", rope.theta)
    };
    let local = c.local_rope.as_ref().map(|rope| format!("; {} in layers with a window", base(rope)));
    let caps = [("scores", c.attention_softcap), ("logits", c.logit_softcap)];
    let caps = caps.into_iter().filter_map(|(what, cap)| Some(format!("; {what} capped at {}", cap?)));
    let norms = c.names.q_norm.map(|_| "; heads of queries and keys are normed".to_owned());
    let rest: String = local.into_iter().chain(norms).chain(caps).collect();
    format!("{window}; rotary base {}{rest}", base(&c.rope))
}

/// `0-3,8`.
pub(super) fn ranges(layers: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for &layer in layers {
        match parts.last_mut() {
            Some((_, end)) if *end + 1 == layer => *end = layer,
            _ => parts.push((layer, layer)),
        }
    }
    let text = |&(start, end): &(usize, usize)| match start == end {
        true => start.to_string(),
        false => format!("{start}-{end}"),
    };
    parts.iter().map(text).collect::<Vec<_>>().join(",")
}
