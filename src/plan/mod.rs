//! Arguments and file headers → [`Plan`]: resolved, checked, printable; nothing has been computed yet.

mod demo;
mod layers;
mod memory;
mod show;

use std::fs;
use std::path::{Path, PathBuf};

use time::PrimitiveDateTime;

pub use demo::Embedded;
pub use memory::Memory;

use crate::backend::cpu::Cpu;
use crate::cli::{AggregateBy, DemoArgs, DtypeArg, LayerArgs};
use crate::engine::{EngineSpec, LossReduction};
use crate::error::{Context, Error, Result};
use crate::model::{Config, Spec, Tensor, describe};
use crate::output::OutputSpec;
use crate::output::folder::{FolderName, layers_label};
use crate::source::{PassSpec, TextSpec, Texts, Tokens};
use crate::stats::Direction;
use crate::transform::{AggregationMode, NormaliseMode, TransformSpec, power};
use crate::weights::Checkpoint;

/// Where the model's files come from.
#[derive(Clone, Debug)]
enum Files {
    Folder(PathBuf),
    Embedded(Embedded),
}

/// A layer analysis, ready to run: every stage's input, and what the user should know before it starts.
pub struct Plan {
    /// As typed, for messages and metadata.
    pub model_name: String,
    /// What config.json says.
    pub config: Config,
    /// What to compute.
    pub spec: Spec,
    /// The weights, where they lie, in the order of `spec.weights`.
    pub tensors: Vec<Tensor>,
    /// Which texts.
    pub texts: TextSpec,
    /// Longest sample, in tokens.
    pub max_length: usize,
    /// `--batch_size`.
    pub batch_size: usize,
    /// How samples are packed.
    pub passes: PassSpec,
    /// What the engine does.
    pub engine: EngineSpec,
    /// What is rendered into the result files.
    pub direction: Direction,
    /// How.
    pub transform: TransformSpec,
    /// Where results go.
    pub output: OutputSpec,
    /// Threads of the CPU.
    pub threads: usize,
    /// Memory, and what follows from it.
    pub memory: Memory,
    /// Print the plan and stop.
    pub dry_run: bool,
    /// The start of the run, local time.
    pub timestamp: PrimitiveDateTime,
    /// Said before the run starts.
    pub warnings: Vec<String>,
    /// Said before the run starts, for what is not a fault.
    pub notes: Vec<String>,
    files: Files,
}

impl Plan {
    /// The plan of `gradlens layer`. `timestamp` is the start of the run.
    ///
    /// # Errors
    /// Whatever can be wrong before a text is read: arguments, the configuration, weights that are missing or
    /// have another shape, layers the model does not have.
    pub fn layer(args: &LayerArgs, timestamp: PrimitiveDateTime) -> Result<Self> {
        let Some(dataset) = &args.dataset else {
            return Err(Error::usage("no dataset given")
                .at("--dataset")
                .expected("a .jsonl, .json or .txt file, or a folder of these")
                .hint("gradlens reads local files: --dataset texts.jsonl, one {\"text\": …} per line"));
        };
        let files = Files::Folder(model_folder(&args.model_name)?);
        Self::resolve(args, files, args.model_name.clone(), dataset.clone(), timestamp)
    }

    /// The plan of `gradlens demo`: gradients, and with them values, of the embedded model on its corpus.
    pub fn demo(args: &DemoArgs, timestamp: PrimitiveDateTime) -> Result<Self> {
        let layer = LayerArgs {
            model_name: demo::DEMO.name.into(),
            layers: None,
            dataset: None,
            text_column: "text".into(),
            min_chars: 50,
            num_samples: args.num_samples,
            max_length: 128,
            aggregate_by: AggregateBy::Gradients,
            aggregation_mode: AggregationMode::Both,
            power: None,
            normalize_gradients: Some(NormaliseMode::None),
            normalize_mode: None,
            loss_reduction: LossReduction::Sample,
            batch_size: 4,
            save_outputs: true,
            output_dir: args.output_dir.clone(),
            save_consolidated: None,
            dry_run: false,
            quiet: args.quiet,
            device: "cpu".into(),
            dtype: DtypeArg::Float32,
            threads: args.threads,
            tokens_per_pass: None,
            memory: None,
        };
        let corpus = demo::DEMO.corpus_name.into();
        Self::resolve(&layer, Files::Embedded(demo::DEMO), layer.model_name.clone(), corpus, timestamp)
    }

    fn resolve(
        args: &LayerArgs,
        files: Files,
        model_name: String,
        dataset: PathBuf,
        timestamp: PrimitiveDateTime,
    ) -> Result<Self> {
        let mut warnings = Vec::new();
        let mut notes = Vec::new();
        check_device(args)?;
        at_least_one("--num_samples", args.num_samples)?;
        at_least_one("--batch_size", args.batch_size)?;
        at_least_one("--max_length", args.max_length)?;
        for (flag, tokens) in
            [("--max_length", Some(args.max_length)), ("--tokens_per_pass", args.tokens_per_pass)]
        {
            at_most_int(flag, tokens.unwrap_or(1))?;
        }
        at_least_one("--tokens_per_pass", args.tokens_per_pass.unwrap_or(1))?;
        at_least_one("--threads", args.threads.unwrap_or(1))?;
        let free_bytes = free_memory()?;
        let budget_bytes = budget(args.memory, free_bytes)?;
        let normalise = match (args.normalize_gradients, args.normalize_mode) {
            (Some(_), Some(_)) => {
                return Err(Error::usage("the normalisation is given twice")
                    .at("--normalize_gradients and --normalize_mode")
                    .expected("one of the two: they are spellings of the same flag")
                    .found("both")
                    .hint("keep --normalize_gradients"));
            }
            (gradients, mode) => gradients.or(mode).unwrap_or(NormaliseMode::SumAbs),
        };
        let powers = args.power.as_deref().map(power::parse_list).transpose()?.unwrap_or_default();
        if let [first, _, ..] = powers[..] {
            let list = crate::output::python::list_repr(&powers);
            notes.push(format!("Multiple power values provided: {list}"));
            notes.push(format!("Using first power value: {}", crate::output::python::float_repr(first)));
        }

        let config = files.config()?;
        let spec = describe(&config);
        let layers = layers::parse(args.layers.as_deref(), config.num_layers)?;
        let checkpoint = files.checkpoint()?;
        let tensors = checkpoint.load(&spec.weights)?;
        let unused = checkpoint.unused(&spec.weights);
        if let Some(first) = unused.first() {
            warnings.push(format!(
                "the checkpoint holds {} tensors the model does not use, {first} among them",
                unused.len()
            ));
        }
        if args.max_length > config.max_position_embeddings {
            warnings.push(format!(
                "--max_length {} is beyond the {} positions the model was made for",
                args.max_length, config.max_position_embeddings
            ));
        }
        if !args.save_outputs && args.save_consolidated.is_none() && !args.dry_run {
            warnings.push("nothing will be saved: add --save_outputs or --save_consolidated FILE".into());
        }

        let direction = Direction::from(args.aggregate_by);
        let gradients = direction == Direction::Gradients;
        let memory = memory::plan(
            &Cpu::<f32>::new(),
            &memory::Demand {
                spec: &spec,
                layers: &layers,
                gradients,
                tokens_per_pass: args.tokens_per_pass,
                max_length: args.max_length,
                max_positions: config.max_position_embeddings,
                num_samples: args.num_samples,
                weight_bytes: tensors.iter().map(|tensor| tensor.bytes().len() as u64).sum(),
                free_bytes,
                budget_bytes,
            },
        );
        let label = layers_label(args.layers.as_deref(), config.num_layers);
        let folder = FolderName {
            model_name: &model_name,
            num_samples: args.num_samples,
            batch_size: args.batch_size,
            layers: &label,
            power: powers.first().copied(),
            timestamp,
        };
        Ok(Self {
            texts: TextSpec {
                dataset,
                text_column: args.text_column.clone(),
                min_chars: args.min_chars,
                num_samples: args.num_samples,
            },
            max_length: args.max_length,
            batch_size: args.batch_size,
            passes: PassSpec {
                tokens_per_pass: memory.tokens_per_pass,
                // Packing holds back a whole batch to know its targets; only this reduction needs them.
                batch_size: if args.loss_reduction == LossReduction::Batch { args.batch_size } else { 1 },
            },
            engine: EngineSpec {
                layers,
                gradients,
                loss_reduction: args.loss_reduction,
                chunk_tokens: memory.chunk_tokens,
                keep_from: memory.keep_from,
            },
            direction,
            transform: TransformSpec {
                mode: args.aggregation_mode,
                normalise,
                power: powers.first().copied(),
            },
            output: OutputSpec {
                output_dir: args.output_dir.clone(),
                save_outputs: args.save_outputs,
                save_consolidated: args.save_consolidated.clone(),
                folder_name: folder.render(),
            },
            threads: args.threads.unwrap_or_else(num_cores),
            memory,
            dry_run: args.dry_run,
            timestamp,
            warnings,
            notes,
            model_name,
            config,
            spec,
            tensors,
            files,
        })
    }

    /// Opens the dataset.
    pub fn open_texts(&self) -> Result<Texts> {
        match &self.files {
            Files::Folder(_) => Texts::open(&self.texts),
            Files::Embedded(demo) => Texts::from_bytes(demo.corpus_name, demo.corpus, &self.texts),
        }
    }

    /// Loads the tokenizer.
    pub fn open_tokens(&self) -> Result<Tokens> {
        let vocab = self.config.vocab_size;
        match &self.files {
            Files::Folder(folder) => Tokens::open(folder, self.max_length, vocab),
            Files::Embedded(demo) => Tokens::from_bytes(
                demo.tokenizer,
                Some(demo.tokenizer_config),
                Some(demo.config.as_bytes()),
                self.max_length,
                vocab,
            ),
        }
    }

    /// The device, as metadata names it.
    pub fn device(&self) -> &'static str {
        "cpu"
    }

    /// The type of activations, as metadata names it.
    pub fn dtype(&self) -> &'static str {
        "float32"
    }
}

impl Files {
    fn config(&self) -> Result<Config> {
        match self {
            Self::Folder(folder) => {
                let path = folder.join("config.json");
                let text = fs::read_to_string(&path).map_err(|cause| {
                    Error::new("the model's configuration cannot be read")
                        .at_path(&path)
                        .expected("config.json of a Hugging Face checkpoint")
                        .found(cause)
                        .hint("--model_name wants the folder that holds config.json and *.safetensors")
                })?;
                Config::from_json(&text, &path)
            }
            Self::Embedded(demo) => Config::from_json(demo.config, Path::new("config.json of the demo")),
        }
    }

    fn checkpoint(&self) -> Result<Checkpoint> {
        match self {
            Self::Folder(folder) => Checkpoint::open(folder),
            Self::Embedded(demo) => Checkpoint::from_bytes(demo.name, demo.weights),
        }
    }
}

fn model_folder(model_name: &str) -> Result<PathBuf> {
    let folder = PathBuf::from(model_name);
    if folder.is_dir() {
        return Ok(folder);
    }
    let error = Error::new("the model is not a folder on this machine")
        .at(format!("--model_name {model_name}"))
        .expected("a folder with config.json, tokenizer.json and *.safetensors");
    if folder.exists() {
        return Err(error.found("a file").hint("give the folder that holds it"));
    }
    let error = error.found("no such folder");
    // owner/name is the form of a hub id; paths that start at the root or with a dot are none.
    let is_part = |part: &str| !part.is_empty() && !part.starts_with('.');
    Err(match model_name.split_once('/') {
        Some((owner, name)) if is_part(owner) && is_part(name) && !name.contains('/') => error.hint(format!(
            "if it is a hub id, `hf download {model_name} --local-dir FOLDER` first, and give --model_name FOLDER"
        )),
        _ => error.hint("check the path"),
    })
}

fn check_device(args: &LayerArgs) -> Result<()> {
    match args.device.as_str() {
        "auto" | "cpu" => {}
        device => {
            let what = if device == "cuda" || device.starts_with("cuda:") {
                "this version does not run layers on CUDA devices yet"
            } else {
                "the device is unknown"
            };
            return Err(Error::usage(what)
                .at("--device")
                .expected("auto or cpu")
                .found(device)
                .hint("run with --device cpu"));
        }
    }
    if args.dtype == DtypeArg::Bfloat16 {
        return Err(Error::usage("the CPU does not compute in bfloat16")
            .at("--dtype")
            .expected("auto or float32")
            .found("bfloat16")
            .hint("a bfloat16 checkpoint is read as it is: its weights are exact in float32"));
    }
    Ok(())
}

fn at_least_one(flag: &str, value: usize) -> Result<()> {
    if value >= 1 {
        return Ok(());
    }
    Err(Error::usage("a number is too small").at(flag).expected("1 or more").found(value))
}

/// Token counts beyond 2³¹ are slips of the hand, and their products with widths would overflow.
fn at_most_int(flag: &str, value: usize) -> Result<()> {
    if value <= i32::MAX as usize {
        return Ok(());
    }
    Err(Error::usage("a number is too large").at(flag).expected(format!("at most {}", i32::MAX)).found(value))
}

/// Bytes for activations: as given, or half of what is free.
fn budget(gib: Option<f64>, free_bytes: u64) -> Result<u64> {
    const GIB: f64 = (1u64 << 30) as f64;
    match gib {
        None => Ok(free_bytes / 2),
        Some(gib) if gib.is_finite() && gib > 0.0 => Ok((gib * GIB) as u64),
        Some(gib) => Err(Error::usage("the memory budget cannot be used")
            .at("--memory")
            .expected("GiB, more than 0")
            .found(gib)),
    }
}

/// Bytes of memory that are free now, inside the limits of the control group a cluster job runs in.
fn free_memory() -> Result<u64> {
    let mut system = sysinfo::System::new().context("cannot tell how much memory is free")?;
    system.refresh_memory();
    let own = sysinfo::get_current_pid().ok();
    if let Some(pid) = own {
        system.refresh_processes(sysinfo::ProcessesToUpdate::Some(&[pid]), true);
    }
    // Of the limit, what this process and its siblings hold; pages of mapped files can be dropped and do not count.
    let limit = own
        .and_then(|pid| system.process(pid)?.cgroup_limits())
        .map_or(u64::MAX, |limits| limits.total_memory.saturating_sub(limits.rss));
    Ok(system.available_memory().min(limit))
}

fn num_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
