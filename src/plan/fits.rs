//! Where a model would fit, said by `--dry_run` wherever it runs.

use super::device::usable_bytes;
use super::machine::GIB;
use super::memory::{self, Demand, Memory};
use super::show::ranges;
use crate::backend::cuda::{CudaLower, Format};
use crate::model::Spec;
use crate::units::{size, thousands};

/// Sizes of common devices, in GB as they are sold: near enough GiB.
const DEVICES: [u64; 3] = [24, 80, 141];

/// How the model would run on a CUDA device of each size, in bfloat16, were nothing else on it.
pub(super) fn fits(demand: &Demand<'_>) -> Vec<(u64, Memory)> {
    let lower = CudaLower { format: Format::Bf16, fuse: true };
    let on = |gb: u64| {
        let budget_bytes = usable_bytes((gb as f64 * GIB) as u64);
        (gb, memory::plan(&lower, &Demand { budget_bytes, slow_weights: false, ..demand.clone() }))
    };
    DEVICES.into_iter().map(on).collect()
}

/// `24 GB, bfloat16: 10 of 32 layers stay, the others come for each pass of 32,768 tokens`.
/// `layers`: those that the run visits.
pub(super) fn shown(fits: &[(u64, Memory)], layers: usize) -> Vec<String> {
    let one = |(gb, memory): &(u64, Memory)| {
        let tokens = thousands(memory.tokens_per_pass as u64);
        let how = match memory.resident_layers {
            _ if memory.total_bytes() > memory.budget_bytes => "too small".into(),
            resident if resident >= layers => format!("all weights stay, passes of {tokens} tokens"),
            0 => format!("weights come layer by layer for each pass of {tokens} tokens"),
            resident => {
                format!(
                    "{resident} of {layers} layers stay, the others come for each pass of {tokens} tokens"
                )
            }
        };
        format!("{gb} GB, bfloat16: {how}")
    };
    fits.iter().map(one).collect()
}

/// Parameters of the layers, where they differ from one another by ranges of layers.
pub(super) fn layers(spec: &Spec) -> String {
    let mut kinds: Vec<(u64, Vec<usize>)> = Vec::new();
    for layer in 0..spec.blocks.len() {
        let parameters = spec.layer_parameters(layer);
        match kinds.iter_mut().find(|(known, _)| *known == parameters) {
            Some((_, layers)) => layers.push(layer),
            None => kinds.push((parameters, vec![layer])),
        }
    }
    let one = |(parameters, layers): &(u64, Vec<usize>)| {
        let of = if kinds.len() == 1 { String::new() } else { format!(" (layers {})", ranges(layers)) };
        format!("{} parameters, {} in bfloat16{of}", thousands(*parameters), size(2 * parameters))
    };
    kinds.iter().map(one).collect::<Vec<_>>().join("; ")
}
