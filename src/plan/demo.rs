//! The demo's model, tokenizer and corpus, embedded so that `gradlens demo` works wherever the program does.

use super::Plan;
use super::checkpoint::ModelFiles;
use crate::backend::SaeGradient;
use crate::cli::{
    AggregateBy, DemoArgs, DtypeArg, LayerArgs, MachineArgs, ModelArgs, PolicyArgs, SaeArgs, SaeSplice,
    TextArgs,
};
use crate::engine::LossReduction;
use crate::stats::SkipSpecial;
use crate::transform::{AggregationMode, NormaliseMode};
use crate::weights::sae::LlamaScopeConvention;

impl DemoArgs {
    /// What `gradlens layer` would be told.
    pub(super) fn layer(&self) -> LayerArgs {
        LayerArgs {
            model: ModelArgs { model_name: DEMO.name.into(), revision: "main".into() },
            layers: None,
            site: None,
            texts: TextArgs {
                dataset: DEMO.corpus_name.into(),
                dataset_config: None,
                dataset_split: None,
                dataset_revision: None,
                text_column: "text".into(),
                min_chars: 50,
                num_samples: self.num_samples,
            },
            max_length: 128,
            policy: PolicyArgs {
                position_stride: 1,
                skip_first: 0,
                skip_special: SkipSpecial::None,
                max_norm_ratio: None,
            },
            aggregate_by: AggregateBy::Gradients,
            aggregation_mode: AggregationMode::Both,
            power: None,
            normalize_gradients: Some(NormaliseMode::None),
            normalize_mode: None,
            loss_reduction: LossReduction::Sample,
            batch_size: 4,
            save_outputs: true,
            output_dir: self.output_dir.clone(),
            save_consolidated: None,
            dry_run: false,
            quiet: self.quiet,
            machine: self.machine.clone(),
            tokens_per_pass: None,
            memory: None,
        }
    }

    /// What `gradlens sae` would be told. SAEs run on the CPU wherever the rest does.
    pub(super) fn sae(&self) -> SaeArgs {
        let mut layer = LayerArgs { aggregate_by: AggregateBy::Attribution, ..self.layer() };
        layer.machine = MachineArgs {
            device: "cpu".into(),
            dtype: DtypeArg::Auto,
            device_memory: None,
            threads: self.machine.threads,
        };
        SaeArgs {
            layer,
            sae: None,
            sae_revision: "main".into(),
            sae_gradient: SaeGradient::All,
            sae_splice: SaeSplice::Error,
            sae_norm_scale: None,
            llamascope_convention: LlamaScopeConvention::Native,
        }
    }
}

impl Plan {
    /// Whether this is the plan of `gradlens demo`, which explains more than other runs do.
    pub fn is_demo(&self) -> bool {
        matches!(self.files, ModelFiles::Embedded(_))
    }
}

/// A checkpoint and a corpus inside the program.
#[derive(Clone, Copy, Debug)]
pub struct Embedded {
    /// What stands for a folder in messages and metadata.
    pub name: &'static str,
    /// config.json.
    pub config: &'static str,
    /// tokenizer.json.
    pub tokenizer: &'static [u8],
    /// tokenizer_config.json.
    pub tokenizer_config: &'static [u8],
    /// model.safetensors.
    pub weights: &'static [u8],
    /// Name of the corpus file; its ending tells the format.
    pub corpus_name: &'static str,
    /// The corpus.
    pub corpus: &'static [u8],
    /// Of each layer, an SAE of its MLP output: `ae.pt` and `config.json` of dictionary_learning.
    pub saes: &'static [(&'static [u8], &'static str)],
}

/// The SAE of a layer of the demo.
macro_rules! sae {
    ($layer:literal) => {
        (
            include_bytes!(concat!("../../assets/demo/saes/mlp_out_layer_", $layer, "/trainer_0/ae.pt")),
            include_str!(concat!("../../assets/demo/saes/mlp_out_layer_", $layer, "/trainer_0/config.json")),
        )
    };
}

/// See `assets/demo/README.md`.
pub const DEMO: Embedded = Embedded {
    name: "demo",
    config: include_str!("../../assets/demo/config.json"),
    tokenizer: include_bytes!("../../assets/demo/tokenizer.json"),
    tokenizer_config: include_bytes!("../../assets/demo/tokenizer_config.json"),
    weights: include_bytes!("../../assets/demo/model.safetensors"),
    corpus_name: "corpus.jsonl",
    corpus: include_bytes!("../../assets/demo/corpus.jsonl"),
    saes: &[sae!(0), sae!(1), sae!(2), sae!(3), sae!(4), sae!(5)],
};
