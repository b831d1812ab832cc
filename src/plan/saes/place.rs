//! Where SAEs are: a pattern of paths, a folder with many of them, a repository on the hub.

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};

use super::super::fetch::Fetcher;
use super::super::show::ranges;
use super::super::sites;
use crate::cli::SaeArgs;
use crate::error::{Error, Result};
use crate::hub::{Kind as RepoKind, Repo, is_id};
use crate::model::Config;
use crate::model::op::Site;
use crate::weights::sae::{self, Found, Sae, SaeOptions};

/// Stands for a layer's number in `--sae`.
const LAYER: &str = "{layer}";
/// The SAEs of the Python script, in the working directory or the one above.
const DEFAULT: &str = "dictionary_learning_demo/._qwen2.5_0.5B_Qwen_Qwen2.5-0.5B_batch_top_k_tokens500M/mlp_out_layer_{layer}/trainer_0";
/// Names SAEs where the command line does not.
const VARIABLE: &str = "GRADLENS_SAE";
/// Files of an SAE: weights and what describes them.
pub(in crate::plan) const ENDINGS: [&str; 6] = ["safetensors", "pt", "npz", "json", "yaml", "yml"];
/// Things that a message lists.
const NAMED: usize = 20;

/// An SAE that may be meant.
struct Candidate {
    /// Of its folder; on the hub, in the repository.
    path: String,
    /// The same for `--sae`, with `{layer}` for the number of its layer.
    pattern: String,
    /// As its path says.
    layer: Option<usize>,
}

/// What is asked of the place.
pub(super) struct Asked<'a> {
    /// Layers of `--layers`.
    pub wanted: Option<&'a [usize]>,
    /// `--site`.
    pub site: Option<Site>,
    pub options: &'a SaeOptions,
    pub model: &'a Config,
    /// Nothing large is to be brought.
    pub dry_run: bool,
}

/// Where SAEs are looked for.
pub(super) enum Place {
    /// A pattern with `{layer}`.
    Pattern(String),
    /// A folder, or a file, without one.
    Folder(PathBuf),
    /// On the hub: the repository, and what of it is meant.
    Hub(Box<Repo>, String),
}

impl Place {
    pub fn find(args: &SaeArgs, fetcher: &Fetcher) -> Result<(String, Self)> {
        let name = match args.sae.clone().or_else(|| env::var(VARIABLE).ok().filter(|name| !name.is_empty()))
        {
            Some(name) => name,
            None => default()?,
        };
        // The part without a placeholder says whether it is a path.
        let stem = name.split(LAYER).next().unwrap_or_default();
        let stem =
            if stem.len() == name.len() { stem } else { stem.rsplit_once('/').map_or("", |(stem, _)| stem) };
        let here = stem.is_empty() || Path::new(stem).exists();
        if here && name.contains(LAYER) {
            return Ok((name.clone(), Self::Pattern(name)));
        }
        if here {
            return Ok((name.clone(), Self::Folder(name.into())));
        }
        let Some((id, folder)) = hub_parts(&name) else {
            return Err(Error::new(
                "the SAEs are neither on this machine nor the id of a repository on the hub",
            )
            .at(format!("--sae {name}"))
            .expected("a folder, or owner/name[/folder]; {layer} stands for a layer's number")
            .found(format!("nothing at {stem}"))
            .hint("check the path"));
        };
        let repo = fetcher.open(RepoKind::Saes, &id, &args.sae_revision)?;
        let folder = folder_of(&repo, folder);
        Ok((name.clone(), Self::Hub(Box::new(repo), folder)))
    }

    /// The path of each wanted layer's SAE.
    pub fn choose(
        &self,
        name: &str,
        asked: &Asked<'_>,
        fetcher: &Fetcher,
    ) -> Result<BTreeMap<usize, String>> {
        if let Self::Folder(path) = self
            && (path.is_file() || sae::recognise(path)?.is_some())
        {
            return one(path, asked).map(|layer| [(layer, name.to_owned())].into());
        }
        let candidates = self.candidates(name, asked)?;
        if let (Self::Hub(repo, _), [Candidate { path, layer: None, .. }]) = (self, &candidates[..]) {
            return only(repo, path, asked, fetcher).map(|layer| [(layer, path.clone())].into());
        }
        let mut there: BTreeMap<usize, Vec<Candidate>> = BTreeMap::new();
        let mut unknown = Vec::new();
        for candidate in candidates {
            let own = match (candidate.layer, self) {
                (None, Self::Folder(_)) => told(&candidate, asked)?,
                (layer, _) => layer,
            };
            match own {
                Some(layer) => there.entry(layer).or_default().push(candidate),
                None => unknown.push(candidate.path),
            }
        }
        let all: Vec<usize> = there.keys().copied().collect();
        let mut missing = asked.wanted.unwrap_or(&[]).to_vec();
        missing.retain(|layer| !all.contains(layer));
        if all.is_empty() && !unknown.is_empty() {
            return Err(untold(name, &unknown));
        }
        if all.is_empty() || !missing.is_empty() {
            return Err(self.none(name, &all, &missing));
        }
        let mut chosen = BTreeMap::new();
        for (layer, candidates) in there {
            let wanted = asked.wanted.is_none_or(|wanted| wanted.contains(&layer));
            if layer >= asked.model.num_layers || !wanted {
                continue;
            }
            match &candidates[..] {
                [one] => _ = chosen.insert(layer, one.path.clone()),
                several => return Err(ambiguous(name, layer, several)),
            }
        }
        if chosen.is_empty() {
            let error = self.none(name, &all, &[]);
            return Err(error.hint("the model has fewer layers: is it the SAEs' model?"));
        }
        Ok(chosen)
    }

    /// What may be meant; of the places that paths name, only those that can be looked at, if there are such.
    fn candidates(&self, name: &str, asked: &Asked<'_>) -> Result<Vec<Candidate>> {
        let (found, root) = match self {
            Self::Pattern(pattern) => {
                let at = |layer: usize| pattern.replace(LAYER, &layer.to_string());
                let there = (0..asked.model.num_layers).filter(|&layer| Path::new(&at(layer)).exists());
                let candidate =
                    |layer| Candidate { path: at(layer), pattern: pattern.clone(), layer: Some(layer) };
                return Ok(there.map(candidate).collect());
            }
            Self::Folder(path) => (sae::enumerate(path)?, None),
            Self::Hub(repo, folder) => {
                let listing: Vec<&str> = repo.files().collect();
                let mut found = sae::enumerate_listing(&listing);
                found.retain(|found| is_below(folder, &found.path.to_string_lossy()));
                (found, Some(repo.id()))
            }
        };
        let refusal = found.iter().find_map(|found| sae::refusal(found.format, &found.path));
        let usable = |found: &Found| sae::refusal(found.format, &found.path).is_none();
        let all: Vec<Candidate> =
            found.iter().filter(|found| usable(found)).map(|found| candidate(found, root)).collect();
        if let Some(refusal) = refusal.filter(|_| all.is_empty()) {
            return Err(refusal.at(format!("--sae {name}")));
        }
        let shown = |candidate: &Candidate| {
            let place = candidate.path.rsplit('/').find_map(sites::named).map(|(place, _)| place);
            place.is_none_or(|place| place.is_meant(asked.site, asked.model))
        };
        let (shown, others): (Vec<Candidate>, Vec<Candidate>) = all.into_iter().partition(shown);
        Ok(if shown.is_empty() { others } else { shown })
    }

    fn none(&self, name: &str, all: &[usize], missing: &[usize]) -> Error {
        let list = |layers: &[usize]| ranges(layers);
        let error = Error::new(match missing {
            [] => "there are no SAEs of the model's layers".to_owned(),
            [layer] => format!("there is no SAE of layer {layer}"),
            layers => format!("there are no SAEs of layers {}", list(layers)),
        })
        .at(format!("--sae {name}"))
        .found(match all {
            [] => "none".to_owned(),
            layers => format!("SAEs of layers {}", list(layers)),
        });
        match (self, all) {
            (Self::Hub(..) | Self::Folder(_), []) => {
                error.expected(format!("folders below it with {}", sae::KNOWN))
            }
            (Self::Pattern(pattern), []) => {
                error.expected(format!("for example {}", pattern.replace(LAYER, "0")))
            }
            (_, layers) => error.expected("one SAE for each layer of --layers").hint(format!(
                "leave --layers out for all that there are, or give --layers {}",
                list(layers)
            )),
        }
    }

    /// Whether it is a path of this machine.
    pub fn is_here(&self) -> bool {
        !matches!(self, Self::Hub(..))
    }

    /// Fails where the files of `chosen` could not be brought: without a network, or without room on the disk.
    pub fn check(&self, chosen: &BTreeMap<usize, String>) -> Result<()> {
        match self {
            Self::Hub(repo, _) => repo.check(&files(repo, chosen.values())),
            Self::Pattern(_) | Self::Folder(_) => Ok(()),
        }
    }

    /// Brings the files of `chosen` here, unless they are to `stay`.
    pub fn bring(&self, chosen: &BTreeMap<usize, String>, stay: bool, fetcher: &Fetcher) -> Result<Brought> {
        let Self::Hub(repo, _) = self else { return Ok(Brought::default()) };
        let files = files(repo, chosen.values());
        let (root, commit) = (repo.snapshot(), Some(repo.commit().to_owned()));
        let to_come = repo.missing(&files);
        if to_come.0 > 0 && stay {
            return Ok(Brought { root, commit, to_come });
        }
        fetcher.get(repo, &files)?;
        repo.settle()?;
        Ok(Brought { root, commit, to_come: (0, 0) })
    }
}

/// Where chosen SAEs are.
#[derive(Default)]
pub(super) struct Brought {
    /// Their paths are relative to this.
    pub root: PathBuf,
    /// The commit, on the hub.
    pub commit: Option<String>,
    /// Files and bytes that are not here yet.
    pub to_come: (usize, u64),
}

/// The files of SAEs in a repository.
fn files<'a>(repo: &Repo, folders: impl Iterator<Item = &'a String>) -> Vec<String> {
    let listing: Vec<&str> = repo.files().collect();
    folders.flat_map(|folder| sae::files_of(&listing, folder)).collect()
}

/// The layer that an SAE's files name.
fn own_layer(sae: &Sae) -> Option<usize> {
    sae.about.hook.as_deref().and_then(sites::named).map(|(_, layer)| layer).or(sae.about.layer)
}

/// The layer of a candidate whose path does not tell it, if its files do and name a place that is meant.
fn told(candidate: &Candidate, asked: &Asked<'_>) -> Result<Option<usize>> {
    let sae = sae::open(Path::new(&candidate.path), asked.options)?;
    let place = sae.about.hook.as_deref().and_then(sites::named).map(|(place, _)| place);
    let meant = place.is_none_or(|place| place.is_meant(asked.site, asked.model));
    Ok(own_layer(&sae).filter(|_| meant))
}

/// The layer of the one SAE at `path`.
fn one(path: &Path, asked: &Asked<'_>) -> Result<usize> {
    let own = own_layer(&sae::open(path, asked.options)?);
    let last = asked.model.num_layers - 1;
    match (own, asked.wanted) {
        (Some(own), _) if own > last => Err(Error::new("the model lacks the SAE's layer")
            .at(format!("--sae {}", path.display()))
            .expected(format!("a layer from 0 to {last}"))
            .found(format!("layer {own}"))
            .hint("the model has fewer layers: is it the SAEs' model?")),
        (Some(own), None) => Ok(own),
        (None, Some([layer])) => Ok(*layer),
        (Some(own), Some([layer])) if own == *layer => Ok(own),
        (own, wanted) => Err(Error::usage("this is the SAE of one layer")
            .at(format!("--sae {}", path.display()))
            .expected(match wanted {
                Some(layers) => format!("SAEs of layers {}", ranges(layers)),
                None => format!("SAEs of layers 0 to {last}"),
            })
            .found(own.map_or("a layer that its files do not tell".into(), |own| format!("layer {own}")))
            .hint("put {layer} where the path has the layer's number, or give --layers with one number")),
    }
}

/// The layer of the only SAE of a repository, whose path does not tell it: its files do. Where one layer is wanted, it
/// is that one, or will be found not to be.
fn only(repo: &Repo, folder: &str, asked: &Asked<'_>, fetcher: &Fetcher) -> Result<usize> {
    if let Some([layer]) = asked.wanted {
        return Ok(*layer);
    }
    let files = files(repo, [folder.to_owned()].iter());
    if repo.missing(&files).0 > 0 && asked.dry_run {
        return Err(untold(repo.id(), &[folder.to_owned()]));
    }
    repo.check(&files)?;
    fetcher.get(repo, &files)?;
    one(&repo.snapshot().join(folder), asked)
}

/// A path as it is shown, and as `--sae` would take it.
fn candidate(found: &Found, repository: Option<&str>) -> Candidate {
    let path = found.path.to_string_lossy().into_owned();
    let root = repository.map(|id| format!("{id}/")).unwrap_or_default();
    // As the number is written, zeros before it among it.
    let start = match found.label.split_once(LAYER) {
        Some((before, after)) => {
            let number =
                path.strip_suffix(after).map(|path| path.trim_end_matches(|c: char| c.is_ascii_digit()));
            number.and_then(|path| path.strip_suffix(before))
        }
        None => path.strip_suffix(found.label.as_str()),
    };
    let start = start.unwrap_or_default();
    Candidate { pattern: format!("{root}{start}{}", found.label), path, layer: found.layer }
}

/// As many as a message takes.
fn listed<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> String {
    let more = names.len().saturating_sub(NAMED);
    let mut lines: Vec<String> = names.take(NAMED).map(str::to_owned).collect();
    lines.extend((more > 0).then(|| format!("and {more} more")));
    lines.join("\n")
}

fn ambiguous(name: &str, layer: usize, several: &[Candidate]) -> Error {
    Error::usage(format!("there are {} SAEs of layer {layer}", several.len()))
        .at(format!("--sae {name}"))
        .expected("one SAE for each layer")
        .found(listed(several.iter().map(|candidate| candidate.pattern.as_str())))
        .hint(format!(
            "choose one kind, as in --sae '{}', or one place in the model with --site",
            several[0].pattern
        ))
}

fn untold(name: &str, paths: &[String]) -> Error {
    Error::usage("the paths of the SAEs do not tell their layers")
        .at(format!("--sae {name}"))
        .expected("a layer's number in the path, as in layers.3 or layer_3")
        .found(listed(
            paths.iter().map(|path| if path.is_empty() { "its top folder" } else { path.as_str() }),
        ))
        .hint("name the folder of one SAE with --sae, and its layer with --layers")
}

/// The default: the scripts' folder, where it is.
fn default() -> Result<String> {
    let candidates = [DEFAULT.to_owned(), format!("../{DEFAULT}")];
    let root = |pattern: &str| PathBuf::from(pattern.split("/mlp_out").next().unwrap_or_default());
    let found = candidates.iter().find(|pattern| root(pattern).is_dir());
    found.cloned().ok_or_else(|| {
        Error::usage("no SAEs are named")
            .at("--sae")
            .expected("a folder, or owner/name[/folder] on the hub; {layer} stands for a layer's number")
            .found(format!("no --sae, no {VARIABLE}, and neither {} nor {}", candidates[0], candidates[1]))
            .hint("for example --sae 'saes/mlp_out_layer_{layer}/trainer_0'")
    })
}

/// `owner/name` and the rest.
pub(in crate::plan) fn hub_parts(sae: &str) -> Option<(String, &str)> {
    let mut parts = sae.splitn(3, '/');
    let id = [parts.next().unwrap_or_default(), parts.next().unwrap_or_default()].join("/");
    is_id(&id).then(|| (id, parts.next().unwrap_or_default().trim_matches('/')))
}

/// The folder that `name` means in a repository: a file stands for the folder of its SAE. Every `{layer}` of the name
/// stands for digits.
pub(in crate::plan) fn folder_of(repo: &Repo, name: &str) -> String {
    if !repo.files().any(|path| rest_of(name, path) == Some("")) {
        return name.to_owned();
    }
    let folder = name.rsplit_once('/').map_or("", |(folder, _)| folder);
    // Some files lie one folder below their SAE's.
    folder.strip_suffix("checkpoints").map_or(folder, |above| above.trim_end_matches('/')).to_owned()
}

/// Whether `path` is `pattern` or in a folder of that name. Every `{layer}` of the pattern stands for digits.
pub(in crate::plan) fn is_below(pattern: &str, path: &str) -> bool {
    pattern.is_empty() || rest_of(pattern, path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// What follows `pattern` in `path`.
fn rest_of<'a>(pattern: &str, path: &'a str) -> Option<&'a str> {
    let mut rest = path;
    for (number, literal) in pattern.split(LAYER).enumerate() {
        if number > 0 {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            if digits == 0 {
                return None;
            }
            rest = &rest[digits..];
        }
        rest = rest.strip_prefix(literal)?;
    }
    Some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_hold_their_files() {
        for (pattern, path) in [
            ("", "a/b.pt"),
            ("a", "a/b.pt"),
            ("a/b.pt", "a/b.pt"),
            ("mlp_{layer}", "mlp_17/trainer_0/ae.pt"),
            ("l{layer}/t_{layer}", "l1/t_20/ae.pt"),
        ] {
            assert!(is_below(pattern, path), "{pattern} {path}");
        }
        for (pattern, path) in
            [("a", "ab/c.pt"), ("mlp_{layer}", "mlp_x/a"), ("mlp_{layer}", "mlp_1x/a"), ("a/b", "a/c")]
        {
            assert!(!is_below(pattern, path), "{pattern} {path}");
        }
    }
}
