//! The command line: clap structs only. What the flags mean together is `plan`'s business.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum, value_parser};

use crate::backend::SaeGradient;
use crate::engine::LossReduction;
use crate::stats::{Quantity, SkipSpecial};
use crate::transform::{AggregationMode, NormaliseMode};
use crate::weights::sae::LlamaScopeConvention;

/// Which dimensions of each layer's MLP output, or which SAE features there, are active, and which does the loss depend
/// on?
///
/// Statistics of every layer of a frozen decoder language model over a corpus, from one forward and one
/// backward pass.
#[derive(Debug, Parser)]
#[command(name = "gradlens", version, max_term_width = 110)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The jobs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Per-dimension statistics of every layer's MLP output or other places (--site), or of the loss gradient there
    Layer(Box<LayerArgs>),
    /// The same for the features of sparse autoencoders (SAEs)
    Sae(Box<SaeArgs>),
    /// Download what `layer` with the same flags reads, and SAEs, for machines without a network
    Fetch(Box<FetchArgs>),
    /// Devices, libraries, folders, the hub: what is there, and whether `layer` with the same flags could run
    Doctor(Box<LayerArgs>),
    /// The whole job in seconds, on a small trained model that ships with the program
    Demo(DemoArgs),
}

impl Command {
    /// `--quiet`.
    pub fn quiet(&self) -> bool {
        match self {
            Self::Layer(args) => args.quiet,
            Self::Sae(args) => args.layer.quiet,
            Self::Fetch(args) => args.layer.quiet,
            Self::Doctor(args) => args.quiet,
            Self::Demo(args) => args.quiet,
        }
    }
}

/// `gradlens layer`.
#[derive(Args, Clone, Debug)]
#[command(rename_all = "snake_case")]
pub struct LayerArgs {
    /// Which model.
    #[command(flatten)]
    pub model: ModelArgs,

    /// Layers to analyse: `0-23`, `0,5,10`, `0-3,8,20-23`; every layer if left out
    #[arg(long, allow_hyphen_values = true, help_heading = "Model")]
    pub layers: Option<String>,

    /// Places in each block: `mlp` (the MLP's output), `mlp_out` (what it adds to the residual stream), `mlp_hidden` (the
    /// down-projection's input), `attn_out`, `resid_pre`, `resid_mid`, `resid_post`; several as a comma list
    /// [default: mlp]
    #[arg(long, value_name = "SITES", help_heading = "Model")]
    pub site: Option<String>,

    /// Which texts.
    #[command(flatten)]
    pub texts: TextArgs,

    /// Longest sample in tokens, special tokens included; the rest is cut off
    #[arg(long, default_value_t = 128, value_name = "TOKENS", help_heading = "Texts")]
    pub max_length: usize,

    /// Which tokens count.
    #[command(flatten)]
    pub policy: PolicyArgs,

    /// What to aggregate: the values, or the gradients of the loss with respect to them
    #[arg(long, default_value = "values", value_parser = of_dimensions(), help_heading = "Analysis")]
    pub aggregate_by: AggregateBy,

    /// Mean of v, of |v|, or both, over tokens
    #[arg(long, default_value = "mean_abs", help_heading = "Analysis")]
    pub aggregation_mode: AggregationMode,

    /// Exponent p of sign(v)·|v|^p, applied after aggregation; of a comma list the first is used
    #[arg(long, value_name = "P", allow_hyphen_values = true, help_heading = "Analysis")]
    pub power: Option<String>,

    /// Scale to Σ|v| = D (sum_abs) or Σv = D (sum), after the power; `both` gives both, `all` also neither
    /// [default: sum_abs]
    #[arg(long, value_name = "MODE", help_heading = "Analysis")]
    pub normalize_gradients: Option<NormaliseMode>,

    /// Another spelling of --normalize_gradients
    #[arg(long, value_name = "MODE", help_heading = "Analysis")]
    pub normalize_mode: Option<NormaliseMode>,

    /// Loss that gradients differentiate: each sample's mean, the mean of a batch of --batch_size, or the
    /// sum over tokens
    #[arg(long, default_value = "sample", value_name = "LOSS", help_heading = "Analysis")]
    pub loss_reduction: LossReduction,

    /// Samples of a batch, for --loss_reduction batch; changes nothing else
    #[arg(long, default_value_t = 4, value_name = "N", help_heading = "Analysis")]
    pub batch_size: usize,

    /// Save results in a folder named after the run
    #[arg(long, help_heading = "Output")]
    pub save_outputs: bool,

    /// Where that folder is made
    #[arg(long, default_value = ".", value_name = "FOLDER", help_heading = "Output")]
    pub output_dir: PathBuf,

    /// Save all arrays in this one .npz
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub save_consolidated: Option<PathBuf>,

    /// Print what would be done, and what it takes, and stop
    #[arg(long, help_heading = "Output")]
    pub dry_run: bool,

    /// No progress on stderr; warnings, errors and results stay
    #[arg(long, help_heading = "Output")]
    pub quiet: bool,

    /// What to compute with.
    #[command(flatten)]
    pub machine: MachineArgs,

    /// Tokens that go through the model together; changes speed and memory, never results
    #[arg(long, value_name = "N", help_heading = "Machine")]
    pub tokens_per_pass: Option<usize>,

    /// Memory for activations on the CPU, in GiB; half of what is free if left out
    #[arg(long, value_name = "GIB", allow_hyphen_values = true, help_heading = "Machine")]
    pub memory: Option<f64>,
}

/// `gradlens sae`: the flags of `layer`, and the SAEs.
#[derive(Args, Clone, Debug)]
#[command(
    rename_all = "snake_case",
    mut_arg("aggregate_by", |arg| arg
        .value_parser(value_parser!(AggregateBy))
        .help("What to aggregate: f, dL/df, or f·dL/df (attribution), f being a feature's activation")),
    mut_arg("layers", |arg| arg
        .help("Layers to analyse: `0-23`, `0,5,10`, `0-3,8,20-23`; every layer that has an SAE if left out")),
    mut_arg("site", |arg| arg
        .value_name("SITE")
        .help("Where in a block the SAEs read and write, if it is not what their own configuration says: `mlp`, \
            `mlp_out`, `mlp_hidden`, `attn_out`, `resid_pre`, `resid_mid`, `resid_post`")),
    mut_arg("device", |arg| arg
        .default_value("cpu")
        .help("Where to compute: `cpu`; `auto` is the CPU too, because SAEs do not run on CUDA devices yet")),
)]
pub struct SaeArgs {
    /// What of, and how.
    #[command(flatten)]
    pub layer: LayerArgs,

    /// SAEs: a folder, or owner/name[/folder] on the hub, where `{layer}` stands for a layer's number; or what holds
    /// one SAE per layer somewhere below [default: $GRADLENS_SAE, else the folder of the Python script]
    #[arg(long, value_name = "PATH|ID", help_heading = "SAEs")]
    pub sae: Option<String>,

    /// Branch, tag or commit hash of the SAEs on the hub
    #[arg(long, default_value = "main", value_name = "REVISION", help_heading = "SAEs")]
    pub sae_revision: String,

    /// Features that gradients count for: all of them, or at each token those that are active (f > 0)
    #[arg(long, default_value = "all", value_name = "WHICH", help_heading = "SAEs")]
    pub sae_gradient: SaeGradient,

    /// Where gradients are taken: at the model's own activations, whose part that the SAE misses is kept as an error
    /// term, for all layers in one backward; or with one layer's activations replaced by their reconstruction at a time,
    /// as the Python script does
    #[arg(long, default_value = "error", value_name = "HOW", help_heading = "SAEs")]
    pub sae_splice: SaeSplice,

    /// Factor s of the input of SAELens SAEs that were trained on scaled activations (`expected_average_only_in`), where
    /// the factor is not in their files
    #[arg(long, value_name = "S", allow_hyphen_values = true, help_heading = "SAEs")]
    pub sae_norm_scale: Option<f64>,

    /// How features of Llama Scope are scaled: as its authors define them, or as SAELens and Neuronpedia read the files
    #[arg(long, default_value = "native", value_name = "WHOSE", help_heading = "SAEs")]
    pub llamascope_convention: LlamaScopeConvention,
}

/// `--sae_splice`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum SaeSplice {
    /// x̂ + (x − x̂): the model's own loss
    Error,
    /// x̂ in the place of x
    Replace,
}

/// What to compute with.
#[derive(Args, Clone, Debug)]
#[command(rename_all = "snake_case")]
pub struct MachineArgs {
    /// Where to compute: `cpu`, `cuda`, `cuda:1`, several as `cuda:0,cuda:1`; `auto` is the first CUDA device that can
    /// be used, else the CPU
    #[arg(long, default_value = "auto", help_heading = "Machine")]
    pub device: String,

    /// What weights and activations are multiplied in; `auto` is bfloat16 on CUDA devices, float32 on the CPU. Sums are
    /// float32 at least
    #[arg(long, default_value = "auto", help_heading = "Machine")]
    pub dtype: DtypeArg,

    /// Memory of each CUDA device to use, in GiB; all that is free if left out. Weights that do not fit are brought
    /// layer by layer in each pass
    #[arg(long, value_name = "GIB", allow_hyphen_values = true, help_heading = "Machine")]
    pub device_memory: Option<f64>,

    /// CPU threads; all cores if left out
    #[arg(long, value_name = "N", help_heading = "Machine")]
    pub threads: Option<usize>,
}

/// Which model, of all commands that need one.
#[derive(Args, Clone, Debug)]
#[command(rename_all = "snake_case")]
pub struct ModelArgs {
    /// Id of a model on the Hugging Face hub, or a folder: config.json, tokenizer.json, *.safetensors
    #[arg(long, default_value = "Qwen/Qwen2.5-0.5B", value_name = "ID|FOLDER", help_heading = "Model")]
    pub model_name: String,

    /// Branch, tag or commit hash of the model on the hub
    #[arg(long, default_value = "main", help_heading = "Model")]
    pub revision: String,
}

/// Which texts, of all commands that need some.
#[derive(Args, Clone, Debug)]
#[command(rename_all = "snake_case")]
pub struct TextArgs {
    /// Id of a dataset on the hub, or a path: .parquet, .jsonl, .ndjson, .json, .txt (one text per line), the last
    /// four also as .gz, or a folder of these
    #[arg(long, default_value = DATASET, value_name = "ID|PATH", help_heading = "Texts")]
    pub dataset: String,

    /// Config of the dataset on the hub [default: wikitext-2-raw-v1 of the default dataset, else the dataset's own]
    #[arg(long, value_name = "NAME", help_heading = "Texts")]
    pub dataset_config: Option<String>,

    /// Split of the dataset on the hub [default: train]
    #[arg(long, value_name = "NAME", help_heading = "Texts")]
    pub dataset_split: Option<String>,

    /// Branch, tag or commit hash of the dataset on the hub [default: main]
    #[arg(long, value_name = "REVISION", help_heading = "Texts")]
    pub dataset_revision: Option<String>,

    /// Column of JSON or parquet rows that holds the text
    #[arg(long, default_value = "text", value_name = "NAME", help_heading = "Texts")]
    pub text_column: String,

    /// Keep texts with more characters than this (white space at the ends not counted); 0 keeps all
    #[arg(long, default_value_t = 50, value_name = "N", help_heading = "Texts")]
    pub min_chars: usize,

    /// Samples to use, counted after --min_chars
    #[arg(long, default_value_t = 500, value_name = "N", help_heading = "Texts")]
    pub num_samples: usize,
}

/// Which tokens are counted. The others still take part in attention and in the loss.
#[derive(Args, Clone, Debug)]
#[command(rename_all = "snake_case")]
pub struct PolicyArgs {
    /// Count every N-th position of each sample, from position 0 on
    #[arg(long, default_value_t = 1, value_name = "N", allow_hyphen_values = true, help_heading = "Tokens")]
    pub position_stride: usize,

    /// Leave out the first N positions of each sample
    #[arg(long, default_value_t = 0, value_name = "N", allow_hyphen_values = true, help_heading = "Tokens")]
    pub skip_first: usize,

    /// Leave out the token that starts texts (BOS) wherever it stands, or all special tokens of the tokenizer
    #[arg(long, default_value = "none", value_name = "WHICH", help_heading = "Tokens")]
    pub skip_special: SkipSpecial,

    /// In each layer, leave out tokens whose value there is longer (L2 norm) than R times the median of the tokens that
    /// the other rules leave of the first 64 samples
    #[arg(long, value_name = "R", allow_hyphen_values = true, help_heading = "Tokens")]
    pub max_norm_ratio: Option<f64>,
}

/// The dataset of the scripts.
pub const DATASET: &str = "Salesforce/wikitext";

/// `gradlens fetch`: the flags of `layer`, of which those of the model and the texts say what to fetch.
#[derive(Args, Clone, Debug)]
#[command(rename_all = "snake_case")]
pub struct FetchArgs {
    /// The later analysis.
    #[command(flatten)]
    pub layer: LayerArgs,

    /// SAEs on the hub: an id, or id/folder for a part of it, where `{layer}` stands for every layer's number
    #[arg(long, value_name = "ID", help_heading = "SAEs")]
    pub sae: Option<String>,

    /// Branch, tag or commit hash of the SAEs
    #[arg(long, default_value = "main", value_name = "REVISION", help_heading = "SAEs")]
    pub sae_revision: String,
}

/// `gradlens demo`. Its model is so small that compiling kernels for a CUDA device takes longer than the CPU does.
#[derive(Args, Clone, Debug)]
#[command(rename_all = "snake_case", mut_arg("device", |arg| arg.default_value("cpu")))]
pub struct DemoArgs {
    /// Where the results' folder is made
    #[arg(long, default_value = "gradlens_demo", value_name = "FOLDER")]
    pub output_dir: PathBuf,

    /// Stories to use, of 320
    #[arg(long, default_value_t = 320, value_name = "N")]
    pub num_samples: usize,

    /// What to compute with.
    #[command(flatten)]
    pub machine: MachineArgs,

    /// No progress on stderr; warnings, errors and results stay
    #[arg(long)]
    pub quiet: bool,
}

/// `--aggregate_by`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum AggregateBy {
    /// The activations
    Values,
    /// The gradients of the loss with respect to them
    Gradients,
    /// Activation times gradient, of SAE features
    Attribution,
}

impl From<AggregateBy> for Quantity {
    fn from(by: AggregateBy) -> Self {
        match by {
            AggregateBy::Values => Self::Values,
            AggregateBy::Gradients => Self::Gradients,
            AggregateBy::Attribution => Self::Attribution,
        }
    }
}

/// What there is of the dimensions of a site.
fn of_dimensions() -> impl TypedValueParser<Value = AggregateBy> {
    let values = [AggregateBy::Values, AggregateBy::Gradients];
    PossibleValuesParser::new(values.iter().filter_map(ValueEnum::to_possible_value)).map(|name| {
        match name.as_str() {
            "gradients" => AggregateBy::Gradients,
            _ => AggregateBy::Values,
        }
    })
}

/// `--dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum DtypeArg {
    /// The best for the device
    Auto,
    /// IEEE single precision
    Float32,
    /// CUDA devices only
    Bfloat16,
}
