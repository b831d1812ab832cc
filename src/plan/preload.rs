//! `gradlens fetch`: brings what `gradlens layer` with the same flags reads, for machines without a network.

use std::path::{Path, PathBuf};

use super::checkpoint::ModelFiles;
use super::corpus::Corpus;
use super::fetch::Fetcher;
use super::saes::{ENDINGS, folder_of, hub_parts, is_below};
use crate::cli::FetchArgs;
use crate::error::{Error, Kind, Result};
use crate::hub::{Kind as RepoKind, Repo};
use crate::source::{TextSpec, count, nothing_kept};
use crate::units::{size, thousands};

/// Brings everything and says on the log where it is.
///
/// # Errors
/// What [`Plan::layer`](super::Plan::layer) refuses of a model and a dataset; texts that cannot be read; SAEs that
/// are not there.
pub fn preload(args: &FetchArgs, fetcher: &Fetcher) -> Result<()> {
    let (log, layer) = (fetcher.log(), &args.layer);
    // From what is small to what is large. A model that cannot be read is not worth its download.
    let model = ModelFiles::find(&layer.model, fetcher)?;
    model.config()?;
    let corpus = Corpus::find(&layer.texts, fetcher)?;
    let saes = args.sae.as_deref().map(|sae| Saes::find(sae, &args.sae_revision, fetcher)).transpose()?;
    model.check_weights()?;

    let texts = TextSpec {
        dataset: corpus.name().to_owned(),
        text_column: layer.texts.text_column.clone(),
        min_chars: layer.texts.min_chars,
        num_samples: layer.texts.num_samples,
    };
    if layer.dry_run {
        let [texts, weights] = [corpus.missing(), model.missing_weights()].map(to_come);
        log.out(&format!("dataset  {}, {texts} as far as needed", corpus.name().display()));
        log.out(&format!("model    {}, {weights}", layer.model.model_name));
        if let Some(saes) = saes {
            log.out(&format!("SAEs     {}, {}", saes.repo.id(), to_come(saes.repo.missing(&saes.files))));
        }
        return Ok(());
    }
    // Read, because only that shows how many files hold enough texts.
    let counts = count(corpus.open(&texts, fetcher)?, fetcher.interrupt(), |_| ()).map_err(kept)?;
    if counts.kept == 0 {
        return Err(nothing_kept(&counts, &texts));
    }
    corpus.settle()?;
    log.out(&format!(
        "dataset  {} texts of {}, {}",
        thousands(counts.kept),
        corpus.name().display(),
        place(corpus.place())
    ));

    model.fetch_weights(fetcher)?;
    model.checkpoint()?;
    log.out(&format!("model    {}, {}", layer.model.model_name, place(model.place())));
    if let Some(saes) = saes {
        fetcher.get(&saes.repo, &saes.files)?;
        saes.repo.settle()?;
        let bytes = saes.files.iter().filter_map(|file| saes.repo.bytes(file)).sum();
        let files = thousands(saes.files.len() as u64);
        let place = place(Some(saes.repo.snapshot()));
        log.out(&format!("SAEs     {files} files of {}, {}, {place}", saes.repo.id(), size(bytes)));
    }
    let command = if args.sae.is_some() { "`gradlens layer` and `gradlens sae`" } else { "`gradlens layer`" };
    log.out(&format!(
        "with HF_HUB_OFFLINE=1 and the same cache, {command} with these flags asks the hub for nothing"
    ));
    Ok(())
}

/// An interruption says what becomes of what came.
fn kept(error: Error) -> Error {
    match error.kind() {
        Kind::Interrupted { .. } => {
            error.found("the texts were still being downloaded; the next run goes on from there")
        }
        Kind::Failed | Kind::Usage => error,
    }
}

/// What a download would bring.
fn to_come((files, bytes): (usize, u64)) -> String {
    match files {
        0 => "nothing to download".into(),
        1 => format!("1 file of {} to download", size(bytes)),
        _ => format!("{} files of {} to download", thousands(files as u64), size(bytes)),
    }
}

/// Where files are.
fn place(snapshot: Option<PathBuf>) -> String {
    match snapshot {
        Some(folder) => format!("in {}", folder.display()),
        None => "on this machine as it is".into(),
    }
}

/// SAEs on the hub.
struct Saes {
    repo: Repo,
    files: Vec<String>,
}

impl Saes {
    /// `owner/name`, or `owner/name/folder`, where `{layer}` stands for any number.
    fn find(sae: &str, revision: &str, fetcher: &Fetcher) -> Result<Self> {
        let Some((id, folder)) = hub_parts(sae).filter(|_| !Path::new(sae).exists()) else {
            return Err(Error::usage("the SAEs are not on the hub")
                .at(format!("--sae {sae}"))
                .expected("owner/name, or owner/name/folder with {layer} in place of a layer's number")
                .found(if Path::new(sae).exists() { "a path on this machine" } else { "no id" })
                .hint("files on this machine need no fetching: leave --sae out"));
        };
        let repo = fetcher.open(RepoKind::Saes, &id, revision)?;
        // Weights mean nothing without what lies beside them.
        let folder = &folder_of(&repo, folder)[..];
        let has_ending =
            |path: &str| path.rsplit_once('.').is_some_and(|(_, ending)| ENDINGS.contains(&ending));
        let files = repo.files().filter(|path| has_ending(path) && is_below(folder, path));
        let files: Vec<String> = files.map(str::to_owned).collect();
        if files.is_empty() {
            let mut folders: Vec<&str> =
                repo.files().filter_map(|path| Some(path.split_once('/')?.0)).collect();
            folders.dedup();
            folders.truncate(10);
            return Err(Error::new("there are no SAE files of that name")
                .at(repo.page())
                .expected(format!("files in {}", if folder.is_empty() { "the repository" } else { folder }))
                .found(match folders.is_empty() {
                    true => "no folders".to_owned(),
                    false => format!("folders {}", folders.join(", ")),
                }));
        }
        Ok(Self { repo, files })
    }
}
