//! Where the texts are: in a file or a folder, on the hub, or inside the program.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::demo::Embedded;
use super::fetch::Fetcher;
use crate::cli::{DATASET, TextArgs};
use crate::error::{Context, Error, Result};
use crate::hub::{Kind, Repo, is_id};
use crate::source::{TextSpec, Texts, files_of, is_readable};

/// The config of the default dataset that the scripts read.
const DATASET_CONFIG: &str = "wikitext-2-raw-v1";
/// What describes a dataset on the hub.
const README: &str = "README.md";

/// The texts of a dataset, not yet read.
pub(super) enum Corpus {
    /// A file or folder of the user's.
    Local(PathBuf),
    /// Files on the hub, each brought when its turn comes.
    Hub {
        /// Their repository.
        repo: Box<Repo>,
        /// The config they belong to, where it has a name.
        config: Option<String>,
        /// The split they belong to.
        split: String,
        /// Their paths, in order.
        files: Vec<String>,
    },
    /// The demo's.
    Embedded(Embedded),
    /// Not to be had: enough for a dry run that is about the model alone.
    Unknown(PathBuf),
}

impl Corpus {
    /// Finds the dataset; of one on the hub, which files are wanted.
    ///
    /// # Errors
    /// Neither a path nor a dataset of the hub; no such config or split.
    pub fn find(args: &TextArgs, fetcher: &Fetcher) -> Result<Self> {
        let path = PathBuf::from(&args.dataset);
        // A misspelt file name has the form of an id too.
        let is_hub = !path.exists() && is_id(&args.dataset) && !is_readable(&args.dataset);
        if !is_hub {
            let flags = [
                ("--dataset_config", &args.dataset_config),
                ("--dataset_split", &args.dataset_split),
                ("--dataset_revision", &args.dataset_revision),
            ];
            return match flags.into_iter().find_map(|(flag, value)| Some((flag, value.as_ref()?))) {
                None => Ok(Self::Local(path)),
                Some((flag, value)) => {
                    Err(Error::usage("files on this machine have no configs, splits or revisions")
                        .at(flag)
                        .expected("the id of a dataset on the hub as --dataset")
                        .found(format!("{value:?} and the path {}", args.dataset))
                        .hint("give the path of the split's files themselves"))
                }
            };
        }
        let revision = args.dataset_revision.as_deref().unwrap_or("main");
        let repo = fetcher.open(Kind::Dataset, &args.dataset, revision)?;
        let mut readme = None;
        if repo.has(README) {
            fetcher.get(&repo, &[README])?;
            let path = repo.snapshot().join(README);
            let bytes =
                std::fs::read(&path).context_path("cannot read the description of the dataset", path)?;
            readme = Some(String::from_utf8_lossy(&bytes).into_owned());
        } else if repo.is_uncertain(README) {
            fetcher.log().warn(&format!(
                "the cache does not tell whether {} has a {README}: its files are chosen by their names",
                args.dataset
            ));
        }
        repo.note_absent(&[README]);
        let default = (args.dataset == DATASET).then_some(DATASET_CONFIG);
        let split = args.dataset_split.as_deref().unwrap_or("train");
        let mut paths: Vec<String> = repo.files().map(str::to_owned).collect();
        if !repo.is_listed() {
            add_missing_parts(&mut paths);
        }
        let config = args.dataset_config.as_deref().or(default);
        let chosen = files_of(&paths, readme.as_deref(), config, split).map_err(|error| {
            let error = error.at(format!("{} at commit {}", repo.page(), repo.commit()));
            match repo.is_listed() {
                true => error,
                // It may well exist on the hub.
                false => error.hint(format!(
                    "only a part of {} is in the cache: run `gradlens fetch` with the same flags where there is a \
                     network",
                    repo.id()
                )),
            }
        })?;
        Ok(Self::Hub {
            repo: Box::new(repo),
            config: chosen.config,
            split: split.to_owned(),
            files: chosen.files,
        })
    }

    /// What messages and metadata call it.
    pub fn name(&self) -> &Path {
        match self {
            Self::Local(path) => path,
            Self::Hub { repo, .. } => Path::new(repo.id()),
            Self::Embedded(demo) => Path::new(demo.corpus_name),
            Self::Unknown(path) => path,
        }
    }

    /// Opens it. What is on the hub comes file by file, as far as texts are wanted.
    pub fn open(&self, spec: &TextSpec, fetcher: &Fetcher) -> Result<Texts> {
        match self {
            Self::Local(_) | Self::Unknown(_) => Texts::open(spec),
            Self::Embedded(demo) => Texts::from_bytes(demo.corpus_name, demo.corpus, spec),
            Self::Hub { repo, files, .. } => {
                let (repo, fetcher) = (repo.clone(), fetcher.clone());
                let fetch = move |file: &str| {
                    fetcher.get(&repo, &[file])?;
                    // Better than nothing for later runs without a network.
                    if !repo.is_settled() {
                        repo.settle()?;
                    }
                    Ok(repo.snapshot().join(file))
                };
                Texts::fetched(&self.name().to_string_lossy(), files.clone(), fetch, spec)
            }
        }
    }

    /// Opens those of its first files that are here; `None` where not even the first one is.
    pub fn open_here(&self, spec: &TextSpec, fetcher: &Fetcher) -> Result<Option<Texts>> {
        let Self::Hub { repo, config, split, files } = self else {
            if let Self::Unknown(_) = self {
                return Ok(None);
            }
            return self.open(spec, fetcher).map(Some);
        };
        let here = files.iter().take_while(|file| repo.missing(&[file]).0 == 0).cloned().collect::<Vec<_>>();
        if here.is_empty() {
            return Ok(None);
        }
        let (repo, config, split) = (repo.clone(), config.clone(), split.clone());
        Self::Hub { repo, config, split, files: here }.open(spec, fetcher).map(Some)
    }

    /// Lets later runs without a network use this commit, now that all texts that were wanted have been read.
    pub fn settle(&self) -> Result<()> {
        match self {
            Self::Local(_) | Self::Embedded(_) | Self::Unknown(_) => Ok(()),
            Self::Hub { repo, .. } => repo.settle(),
        }
    }

    /// Fails where not even its first text can be had. Files on the hub are asked about, and not brought.
    pub fn check(&self, spec: &TextSpec, fetcher: &Fetcher) -> Result<()> {
        match self {
            Self::Hub { repo, files, .. } => repo.check(&files[..1])?,
            // What a pipe gave would be gone.
            Self::Local(path) if !path.is_file() && !path.is_dir() => return Texts::open(spec).map(drop),
            Self::Local(_) | Self::Embedded(_) => {}
            Self::Unknown(_) => return Ok(()),
        }
        let texts = self.open_here(spec, fetcher)?;
        texts.and_then(|mut texts| texts.next()).transpose().map(drop)
    }

    /// Brings the first text from the hub: its file is small beside a model's weights, and needed anyway.
    pub fn fetch_first(&self, spec: &TextSpec, fetcher: &Fetcher) -> Result<()> {
        match self {
            // Looked at by `check`; what a pipe gave would be gone.
            Self::Local(_) | Self::Embedded(_) | Self::Unknown(_) => Ok(()),
            Self::Hub { .. } => self.open(spec, fetcher)?.next().transpose().map(drop),
        }
    }

    /// How many files still have to come if all are wanted, and their bytes.
    pub fn missing(&self) -> (usize, u64) {
        match self {
            Self::Local(_) | Self::Embedded(_) | Self::Unknown(_) => (0, 0),
            Self::Hub { repo, files, .. } => repo.missing(files),
        }
    }

    /// Where its files are, of a dataset on the hub.
    pub fn place(&self) -> Option<PathBuf> {
        match self {
            Self::Local(_) | Self::Embedded(_) | Self::Unknown(_) => None,
            Self::Hub { repo, .. } => Some(repo.snapshot()),
        }
    }

    /// What it is exactly, where that is on the hub: config, split, commit.
    pub fn origin(&self) -> Option<(Option<&str>, &str, &str)> {
        match self {
            Self::Local(_) | Self::Embedded(_) | Self::Unknown(_) => None,
            Self::Hub { repo, config, split, .. } => Some((config.as_deref(), split, repo.commit())),
        }
    }
}

/// Adds the parts that the names of others promise (`train-00000-of-00002.parquet` that of a second one): of what is
/// in the cache, texts must not end where a part is missing, but say that it is.
fn add_missing_parts(paths: &mut Vec<String>) {
    let promised: Vec<String> = paths.iter().filter_map(|path| parts_like(path)).flatten().collect();
    let known: BTreeSet<&String> = paths.iter().collect();
    let missing: BTreeSet<String> = promised.into_iter().filter(|path| !known.contains(path)).collect();
    paths.extend(missing);
}

/// The paths of all parts of the file of which `path` is one.
fn parts_like(path: &str) -> Option<impl Iterator<Item = String>> {
    let (start, end) = path.rsplit_once("-of-")?;
    let number = start.rsplit_once('-')?.1;
    let digits = number.len();
    let count = end.get(..digits)?;
    let all_digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !all_digits(number) || !all_digits(count) || end[digits..].starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    // No dataset has more, and a name must not make us list billions.
    let count: u32 = count.parse().ok().filter(|&count| count <= 100_000)?;
    let (start, end) = (start[..start.len() - digits].to_owned(), end.to_owned());
    Some((0..count).map(move |part| format!("{start}{part:0digits$}-of-{end}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_promise_others() {
        let mut paths = vec!["a/train-00001-of-00003.parquet".into(), "README.md".into(), "x-1-of-2x".into()];
        add_missing_parts(&mut paths);
        assert_eq!(
            paths[3..],
            ["a/train-00000-of-00003.parquet", "a/train-00002-of-00003.parquet", "x-0-of-2x"]
        );
        for path in
            ["train.parquet", "a-of-b", "a-0x-of-02", "a-00000-of-000003", "a-9999999999-of-9999999999"]
        {
            assert!(parts_like(path).is_none(), "{path}");
        }
    }
}
