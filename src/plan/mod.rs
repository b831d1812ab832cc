//! Arguments and file headers → [`Plan`]: resolved, checked, printable; nothing has been computed yet.

mod checkpoint;
mod corpus;
mod demo;
mod device;
mod doctor;
mod fetch;
mod fits;
mod layers;
mod machine;
pub mod memory;
mod policy;
mod preload;
mod saes;
mod show;
mod sites;

use std::collections::BTreeMap;
use std::time::Instant;

use time::PrimitiveDateTime;

pub use demo::Embedded;
pub use device::Devices;
pub use doctor::doctor;
pub use fetch::Fetcher;
pub use memory::Memory;
pub use policy::Counting;
pub use preload::preload;
pub use saes::{SaeNeeds, SaePlan};

use crate::cli::{DemoArgs, LayerArgs, SaeArgs};
use crate::engine::{EngineSpec, LossReduction};
use crate::error::{Error, Result};
use crate::model::op::Site;
use crate::model::{Config, Dtype, Spec, Tensor, describe};
use crate::output::folder::{FolderName, layers_label};
use crate::output::{OutputSpec, Target};
use crate::source::{PassSpec, TextSpec, Texts, Tokens};
use crate::stats::Quantity;
use crate::transform::{NormaliseMode, TransformSpec, power};
use checkpoint::ModelFiles;
use corpus::Corpus;
use machine::{GIB, free_memory, num_cores, use_threads};
use saes::SaeChoice;
use show::ranges;

/// A layer analysis, ready to run: every stage's input, and what the user should know before it starts.
pub struct Plan {
    /// As typed, for messages and metadata.
    pub model_name: String,
    /// What config.json says.
    pub config: Config,
    /// What to compute.
    pub spec: Spec,
    /// The weights, where they lie, in the order of `spec.weights`; none where a dry run leaves them on the hub.
    pub tensors: Vec<Tensor>,
    /// Bytes of the weights, here or on the hub.
    pub weight_bytes: u64,
    /// Seconds it took to bring them here, if they were not.
    pub download_s: Option<f64>,
    /// Which texts.
    pub texts: TextSpec,
    /// Longest sample, in tokens.
    pub max_length: usize,
    /// Which tokens count.
    pub counting: Counting,
    /// `--batch_size`.
    pub batch_size: usize,
    /// How samples are packed.
    pub passes: PassSpec,
    /// What the engine does.
    pub engine: EngineSpec,
    /// What is rendered into the result files.
    pub quantity: Quantity,
    /// The SAEs, where features are asked for and not dimensions.
    pub sae: Option<SaePlan>,
    /// How.
    pub transform: TransformSpec,
    /// Where results go, site by site.
    pub outputs: Vec<(Site, OutputSpec)>,
    /// Where passes are computed.
    pub devices: Devices,
    /// Threads of the CPU.
    pub threads: usize,
    /// Memory, and what follows from it.
    pub memory: Memory,
    /// How the model would run on CUDA devices of some sizes.
    fits: Vec<(u64, Memory)>,
    /// Print the plan and stop.
    pub dry_run: bool,
    /// The start of the run, local time.
    pub timestamp: PrimitiveDateTime,
    /// Said before the run starts.
    pub warnings: Vec<String>,
    /// Said before the run starts, for what is not a fault.
    pub notes: Vec<String>,
    files: ModelFiles,
    corpus: Corpus,
    fetcher: Fetcher,
}

impl Plan {
    /// The plan of `gradlens layer`. `timestamp` is the start of the run. What is on the hub is brought here, but for
    /// the texts, which come when they are read; for a dry run only what is small is brought.
    ///
    /// # Errors
    /// Whatever can be wrong before a text is read: arguments, the configuration, weights that are missing or
    /// have another shape, layers the model does not have, a model or a dataset that the hub does not give out.
    pub fn layer(args: &LayerArgs, timestamp: PrimitiveDateTime, fetcher: &Fetcher) -> Result<Self> {
        Self::resolve(args, None, None, timestamp, fetcher)
    }

    /// The plan of `gradlens sae`.
    ///
    /// # Errors
    /// As [`Plan::layer`], and SAEs that are not there, cannot be read or do not fit the model.
    pub fn sae(args: &SaeArgs, timestamp: PrimitiveDateTime, fetcher: &Fetcher) -> Result<Self> {
        Self::resolve(&args.layer, Some(args), None, timestamp, fetcher)
    }

    /// The first plan of `gradlens demo`: gradients, and with them values, of the embedded model on its corpus.
    pub fn demo(args: &DemoArgs, timestamp: PrimitiveDateTime, fetcher: &Fetcher) -> Result<Self> {
        Self::resolve(&args.layer(), None, Some(demo::DEMO), timestamp, fetcher)
    }

    /// The second plan of `gradlens demo`: attribution, and with it activations and gradients, of the features of its
    /// SAEs.
    pub fn demo_sae(args: &DemoArgs, timestamp: PrimitiveDateTime, fetcher: &Fetcher) -> Result<Self> {
        let sae = args.sae();
        Self::resolve(&sae.layer, Some(&sae), Some(demo::DEMO), timestamp, fetcher)
    }

    fn resolve(
        args: &LayerArgs,
        sae: Option<&SaeArgs>,
        embedded: Option<Embedded>,
        timestamp: PrimitiveDateTime,
        fetcher: &Fetcher,
    ) -> Result<Self> {
        let (model_name, num_samples) = (&args.model.model_name, args.texts.num_samples);
        let mut warnings = Vec::new();
        let mut notes = Vec::new();
        at_least_one("--num_samples", num_samples)?;
        at_least_one("--batch_size", args.batch_size)?;
        at_least_one("--max_length", args.max_length)?;
        for (flag, tokens) in
            [("--max_length", Some(args.max_length)), ("--tokens_per_pass", args.tokens_per_pass)]
        {
            at_most_int(flag, tokens.unwrap_or(1))?;
        }
        at_least_one("--tokens_per_pass", args.tokens_per_pass.unwrap_or(1))?;
        let counting = Counting::new(&args.policy, args.max_length)?;
        at_least_one("--threads", args.machine.threads.unwrap_or(1))?;
        let threads = args.machine.threads.unwrap_or_else(num_cores);
        use_threads(threads)?;
        let devices = match sae {
            Some(_) => saes::device(&args.machine, &mut warnings)?,
            None => Devices::resolve(&args.machine, &mut warnings)?,
        };
        if args.memory.is_some() && !matches!(devices, Devices::Cpu) {
            warnings.push(
                "--memory is for the CPU and changes nothing here; --device_memory is for CUDA devices"
                    .into(),
            );
        }
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

        // From what is small to what is large, so that a slip is found before anything large is downloaded.
        let files = match embedded {
            Some(demo) => ModelFiles::Embedded(demo),
            None => ModelFiles::find(&args.model, fetcher)?,
        };
        let bare = args.dry_run && files.is_bare();
        let config = files.config()?;
        let spec = describe(&config);
        let mut layers = layers::parse(args.layers.as_deref(), config.num_layers)?;
        let mut label = layers_label(args.layers.as_deref(), config.num_layers);
        let choice = match sae.filter(|_| embedded.is_none()) {
            Some(sae) => Some((sae, SaeChoice::find(sae, &config, &spec, fetcher)?)),
            None => None,
        };
        if let Some((_, choice)) = &choice {
            layers = choice.layers();
            if args.layers.is_none() {
                label = layers_label(Some(&ranges(&layers)), config.num_layers);
            }
        }
        let corpus = match embedded {
            Some(demo) => Corpus::Embedded(demo),
            None => match Corpus::find(&args.texts, fetcher) {
                // What a model takes follows from config.json alone.
                Err(error) if bare => {
                    warnings.push(format!("the texts are not known: {error}"));
                    Corpus::Unknown(args.texts.dataset.clone().into())
                }
                found => found?,
            },
        };
        let destination = |site: Site, several: bool| {
            let elsewhere = (site != Site::Mlp).then(|| site.name());
            let folder = FolderName {
                kind: if sae.is_some() { "sae_features" } else { "layer_activations" },
                model_name,
                site: elsewhere,
                num_samples,
                batch_size: args.batch_size,
                layers: &label,
                power: powers.first().copied(),
                timestamp,
            };
            let spec = OutputSpec {
                output_dir: args.output_dir.clone(),
                save_outputs: args.save_outputs,
                save_consolidated: args.save_consolidated.clone(),
                folder_name: folder.render(),
            };
            (site, if several { spec.of_site(elsewhere) } else { spec })
        };
        let mut sites = sites::parse(args.site.as_deref().filter(|_| sae.is_none()), &spec)?;
        // Opened and dropped: what it made is removed again.
        for &site in &sites {
            drop(Target::prepare(&destination(site, sites.len() > 1).1)?);
        }
        let texts = TextSpec {
            dataset: corpus.name().to_owned(),
            text_column: args.texts.text_column.clone(),
            min_chars: args.texts.min_chars,
            num_samples,
        };
        files.check_weights()?;
        corpus.check(&texts, fetcher)?;
        choice.iter().try_for_each(|(_, choice)| choice.check())?;
        let to_come = files.missing_weights() != (0, 0);
        let mut download_s = None;
        if to_come && !args.dry_run {
            corpus.fetch_first(&texts, fetcher)?;
            let started = Instant::now();
            files.fetch_weights(fetcher)?;
            download_s = Some(started.elapsed().as_secs_f64());
        } else if !to_come {
            files.fetch_weights(fetcher)?;
        }
        let sae = match (sae, embedded, choice) {
            (Some(sae), Some(demo), _) => Some(SaePlan::embedded(sae, demo, &config)?),
            (_, _, Some((sae, choice))) => Some(choice.open(sae, &config, fetcher)?),
            _ => None,
        };
        if let Some(sae) = &sae {
            sites = vec![sae.site];
            // The folder has another name than was thought.
            drop(Target::prepare(&destination(sae.site, false).1)?);
        }
        let outputs: Vec<_> = sites.iter().map(|&site| destination(site, sites.len() > 1)).collect();
        let mut tensors = Vec::new();
        let mut weight_bytes = files.listed_weight_bytes();
        if bare {
            weight_bytes = 2 * spec.num_parameters();
        }
        if !(bare || (to_come && args.dry_run)) {
            let checkpoint = files.checkpoint()?;
            tensors = checkpoint.load(&spec.weights)?;
            weight_bytes = tensors.iter().map(|tensor| tensor.bytes().len() as u64).sum();
            let unused = checkpoint.unused(&spec.weights);
            if let Some(first) = unused.first() {
                warnings.push(format!(
                    "the checkpoint holds {} tensors the model does not use, {first} among them",
                    unused.len()
                ));
            }
        }
        let finer = tensors.iter().find(|tensor| tensor.dtype != Dtype::BF16 && tensor.shape.len() > 1);
        notes.extend(finer.and_then(|tensor| devices.rounding(&tensor.dtype.to_string())));
        if args.max_length > config.max_position_embeddings {
            warnings.push(format!(
                "--max_length {} is beyond the {} positions the model was made for",
                args.max_length, config.max_position_embeddings
            ));
        }
        if !args.save_outputs && args.save_consolidated.is_none() && !args.dry_run {
            warnings.push("nothing will be saved: add --save_outputs or --save_consolidated FILE".into());
        }

        let quantity = Quantity::from(args.aggregate_by);
        let mut engine = EngineSpec {
            layers,
            sites,
            gradients: quantity != Quantity::Values,
            loss_reduction: args.loss_reduction,
            chunk_tokens: 0,
            keep_from: 0,
            resident_layers: 0,
        };
        if let Some(sae) = &sae {
            notes.extend(sae.notes());
            warnings.extend(sae.warnings(quantity));
        }
        let demand = memory::Demand {
            spec: &spec,
            engine: &engine,
            head_dim: config.head_dim,
            tokens_per_pass: args.tokens_per_pass,
            max_length: args.max_length,
            max_positions: config.max_position_embeddings,
            num_samples,
            slow_weights: weight_bytes > free_bytes,
            budget_bytes,
            choice_bytes: counting.bytes_per_token(),
            features: None,
        };
        let fits = if sae.is_none() { fits::fits(&demand) } else { Vec::new() };
        let needs = sae.as_ref().map(|sae| sae.needs(quantity, args.aggregation_mode));
        let memory = devices.plan(&memory::Demand { features: needs.as_ref(), ..demand })?;
        memory.set(&mut engine);
        Ok(Self {
            texts,
            max_length: args.max_length,
            counting,
            batch_size: args.batch_size,
            passes: PassSpec {
                tokens_per_pass: memory.tokens_per_pass,
                // Packing holds back a whole batch to know its targets; only this reduction needs them.
                batch_size: if args.loss_reduction == LossReduction::Batch { args.batch_size } else { 1 },
            },
            engine,
            quantity,
            sae,
            transform: TransformSpec {
                mode: args.aggregation_mode,
                normalise,
                power: powers.first().copied(),
            },
            outputs,
            threads,
            devices,
            memory,
            fits,
            dry_run: args.dry_run,
            timestamp,
            warnings,
            notes,
            model_name: model_name.clone(),
            config,
            spec,
            tensors,
            weight_bytes,
            download_s,
            files,
            corpus,
            fetcher: fetcher.clone(),
        })
    }

    /// Width of what is shown of each wanted site.
    pub fn widths(&self) -> BTreeMap<(usize, Site), usize> {
        self.engine.widths(&self.spec)
    }

    /// Opens the dataset. Of one on the hub, files come when they are read.
    pub fn open_texts(&self) -> Result<Texts> {
        self.corpus.open(&self.texts, &self.fetcher)
    }

    /// Opens what can be read without a download; `None` where that is nothing.
    pub fn open_texts_here(&self) -> Result<Option<Texts>> {
        self.corpus.open_here(&self.texts, &self.fetcher)
    }

    /// To be called when all texts have been read: from now on, runs without a network find them.
    pub fn settle_texts(&self) -> Result<()> {
        self.corpus.settle()
    }

    /// Whether there is a tokenizer; a dry run of config.json alone can do without.
    pub fn has_tokenizer(&self) -> bool {
        !(self.dry_run && self.files.is_bare() && !self.files.has_tokenizer())
    }

    /// Loads the tokenizer.
    pub fn open_tokens(&self) -> Result<Tokens> {
        self.files.tokens(self.max_length, self.config.vocab_size)
    }

    /// The commit of the model on the hub.
    pub fn model_commit(&self) -> Option<&str> {
        self.files.commit()
    }

    /// Config, split and commit of the dataset on the hub.
    pub fn dataset_origin(&self) -> Option<(Option<&str>, &str, &str)> {
        self.corpus.origin()
    }
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
    match gib {
        None => Ok(free_bytes / 2),
        Some(gib) if gib.is_finite() && gib > 0.0 => Ok((gib * GIB) as u64),
        Some(gib) => Err(Error::usage("the memory budget cannot be used")
            .at("--memory")
            .expected("GiB, more than 0")
            .found(gib)),
    }
}
