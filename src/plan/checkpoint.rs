//! Where a model's files are: in a folder, on the hub, or inside the program.

use std::fs;
use std::path::{Path, PathBuf};

use super::demo::Embedded;
use super::fetch::Fetcher;
use crate::cli::ModelArgs;
use crate::error::{Error, Result};
use crate::hub::{Kind, Repo, is_id};
use crate::model::Config;
use crate::source::Tokens;
use crate::weights::{self, Checkpoint};

/// What config.json is called everywhere.
const CONFIG: &str = "config.json";

/// The files of a model. All but the weights are here; those come with [`ModelFiles::fetch_weights`].
pub(super) enum ModelFiles {
    /// A folder of the user's.
    Folder(PathBuf),
    /// A snapshot in the hub's cache.
    Hub {
        /// Its repository.
        repo: Box<Repo>,
        /// The files that hold its weights.
        weights: Vec<String>,
    },
    /// The demo's.
    Embedded(Embedded),
}

impl ModelFiles {
    /// Finds the model; of one on the hub, brings what is small.
    ///
    /// # Errors
    /// Neither a folder nor a model of the hub; one without weights or a tokenizer that can be read.
    pub fn find(args: &ModelArgs, fetcher: &Fetcher) -> Result<Self> {
        let name = &args.model_name;
        let folder = PathBuf::from(name);
        if folder.is_dir() {
            return match args.revision.as_str() {
                "main" => Ok(Self::Folder(folder)),
                revision => Err(Error::usage("a folder has no revisions")
                    .at("--revision")
                    .expected("the id of a model on the hub as --model_name")
                    .found(format!("the folder {name}, revision {revision}"))
                    .hint("leave --revision out, or move the folder of that name away")),
            };
        }
        if folder.exists() || !is_id(name) {
            let error = Error::new(
                "the model is neither a folder on this machine nor the id of one on the hub",
            )
            .at(format!("--model_name {name}"))
            .expected(
                "a folder with config.json, tokenizer.json and *.safetensors, or an id like owner/name",
            );
            return Err(match folder.exists() {
                true => error.found("a file").hint("give the folder that holds it"),
                false => error.found("no such folder").hint("check the path"),
            });
        }
        let repo = fetcher.open(Kind::Model, name, &args.revision)?;
        let place = format!("{} at commit {}", repo.page(), repo.commit());
        if !repo.is_listed() {
            // What is not in the cache may well exist: that is another error than a model without it.
            fetcher.get(&repo, &[CONFIG, Tokens::FILE])?;
            if weights::entry(|file| repo.has(file)).is_none() {
                fetcher.get(&repo, &[weights::SINGLE])?;
            }
        }
        let Some(entry) = weights::entry(|file| repo.has(file)) else {
            return Err(weights::no_weights(place, repo.files().map(str::to_owned)));
        };
        if !repo.has(Tokens::FILE) {
            return Err(Tokens::missing(place, |file| repo.has(file)));
        }
        let mut small = vec![CONFIG, Tokens::FILE];
        // An index says which files the weights are in.
        small.extend(Some(entry).filter(|&entry| entry != weights::SINGLE));
        small.extend(Tokens::OPTIONAL_FILES.into_iter().filter(|file| repo.has(file)));
        fetcher.get(&repo, &small)?;
        repo.note_absent(&Tokens::OPTIONAL_FILES);
        let uncertain: Vec<_> =
            Tokens::OPTIONAL_FILES.into_iter().filter(|file| repo.is_uncertain(file)).collect();
        if !uncertain.is_empty() {
            fetcher.log().warn(&format!(
                "the cache does not tell whether {name} has {}: without them, token ids could differ",
                uncertain.join(", ")
            ));
        }
        let weights = weights::shards(&repo.snapshot(), entry)?;
        Ok(Self::Hub { repo: Box::new(repo), weights })
    }

    /// What config.json says.
    pub fn config(&self) -> Result<Config> {
        let folder = match self {
            Self::Folder(folder) => folder.clone(),
            Self::Hub { repo, .. } => repo.snapshot(),
            Self::Embedded(demo) => {
                return Config::from_json(demo.config, Path::new("config.json of the demo"));
            }
        };
        let path = folder.join(CONFIG);
        let text = fs::read_to_string(&path).map_err(|cause| {
            Error::new("the model's configuration cannot be read")
                .at_path(&path)
                .expected("config.json of a Hugging Face checkpoint")
                .found(cause)
                .hint("--model_name wants the folder that holds config.json and *.safetensors")
        })?;
        Config::from_json(&text, &path)
    }

    /// Whether there is config.json and no weights.
    pub fn is_bare(&self) -> bool {
        match self {
            Self::Folder(folder) => weights::is_bare(folder),
            Self::Hub { .. } | Self::Embedded(_) => false,
        }
    }

    /// Whether there is a tokenizer.
    pub fn has_tokenizer(&self) -> bool {
        match self {
            Self::Folder(folder) => folder.join(Tokens::FILE).is_file(),
            Self::Hub { .. } | Self::Embedded(_) => true,
        }
    }

    /// How many files of the weights still have to come, and their bytes.
    pub fn missing_weights(&self) -> (usize, u64) {
        match self {
            Self::Folder(_) | Self::Embedded(_) => (0, 0),
            Self::Hub { repo, weights } => repo.missing(weights),
        }
    }

    /// Fails where the weights could not be brought: without a network, or without room on the disk.
    pub fn check_weights(&self) -> Result<()> {
        match self {
            Self::Folder(_) | Self::Embedded(_) => Ok(()),
            Self::Hub { repo, weights } => repo.check(weights),
        }
    }

    /// Bytes of the files that hold the weights, as the hub lists them; 0 where it does not.
    pub fn listed_weight_bytes(&self) -> u64 {
        match self {
            Self::Folder(_) | Self::Embedded(_) => 0,
            Self::Hub { repo, weights } => weights.iter().filter_map(|file| repo.bytes(file)).sum(),
        }
    }

    /// Brings the weights, and lets later runs without a network use this commit. Asks nothing where all are here.
    pub fn fetch_weights(&self, fetcher: &Fetcher) -> Result<()> {
        match self {
            Self::Folder(_) | Self::Embedded(_) => Ok(()),
            Self::Hub { repo, weights } => {
                fetcher.get(repo, weights)?;
                repo.settle()
            }
        }
    }

    /// Opens the weights, which are all here.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        match self {
            Self::Folder(folder) => Checkpoint::open(folder),
            Self::Hub { repo, .. } => Checkpoint::open(&repo.snapshot()),
            Self::Embedded(demo) => Checkpoint::from_bytes(demo.name, demo.weights),
        }
    }

    /// Loads the tokenizer.
    pub fn tokens(&self, max_length: usize, vocab_size: usize) -> Result<Tokens> {
        match self {
            Self::Folder(folder) => Tokens::open(folder, max_length, vocab_size),
            Self::Hub { repo, .. } => Tokens::open(&repo.snapshot(), max_length, vocab_size),
            Self::Embedded(demo) => Tokens::from_bytes(
                demo.tokenizer,
                Some(demo.tokenizer_config),
                Some(demo.config.as_bytes()),
                max_length,
                vocab_size,
            ),
        }
    }

    /// Where its files are, of a model on the hub.
    pub fn place(&self) -> Option<PathBuf> {
        match self {
            Self::Folder(_) | Self::Embedded(_) => None,
            Self::Hub { repo, .. } => Some(repo.snapshot()),
        }
    }

    /// The commit on the hub.
    pub fn commit(&self) -> Option<&str> {
        match self {
            Self::Folder(_) | Self::Embedded(_) => None,
            Self::Hub { repo, .. } => Some(repo.commit()),
        }
    }
}
