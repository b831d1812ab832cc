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
use crate::weights::sae::{self, Found, SaeOptions};

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

/// The path of an SAE, and the same with `{layer}` for the number of its layer.
type Candidate = (String, String);

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
        let repo = fetcher.open(RepoKind::Model, &id, &args.sae_revision)?;
        let folder = folder.to_owned();
        Ok((name.clone(), Self::Hub(Box::new(repo), folder)))
    }

    /// The path of each wanted layer's SAE.
    pub fn choose(
        &self,
        name: &str,
        wanted: Option<&[usize]>,
        options: &SaeOptions,
        model: &Config,
    ) -> Result<BTreeMap<usize, String>> {
        let layers = 0..model.num_layers;
        let there: BTreeMap<usize, Vec<Candidate>> = match self {
            Self::Pattern(pattern) => {
                let at = |layer: usize| pattern.replace(LAYER, &layer.to_string());
                let there = layers.filter(|&layer| Path::new(&at(layer)).exists());
                there.map(|layer| (layer, vec![(at(layer), pattern.clone())])).collect()
            }
            Self::Folder(path) if path.is_file() || sae::recognise(path)?.is_some() => {
                return one(path, wanted, options, model).map(|layer| [(layer, name.to_owned())].into());
            }
            Self::Folder(path) => by_layer(sae::enumerate(path)?),
            Self::Hub(repo, folder) => {
                let listing: Vec<&str> = repo.files().collect();
                let found = sae::enumerate_listing(&listing).into_iter();
                by_layer(found.filter(|found| is_below(folder, &found.path.to_string_lossy())).collect())
            }
        };
        let mut chosen = BTreeMap::new();
        let all: Vec<usize> = there.keys().copied().collect();
        let missing: Vec<usize> =
            wanted.unwrap_or(&[]).iter().copied().filter(|layer| !all.contains(layer)).collect();
        if all.is_empty() || !missing.is_empty() {
            return Err(self.none(name, &all, &missing));
        }
        for (layer, found) in there {
            if layer >= model.num_layers || wanted.is_some_and(|wanted| !wanted.contains(&layer)) {
                continue;
            }
            match &found[..] {
                [(path, _)] => _ = chosen.insert(layer, path.clone()),
                several => return Err(self.ambiguous(name, layer, several)),
            }
        }
        if chosen.is_empty() {
            return Err(self
                .none(name, &all, &[])
                .hint("the model has fewer layers: is it the SAEs' model?"));
        }
        Ok(chosen)
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

    fn ambiguous(&self, name: &str, layer: usize, several: &[Candidate]) -> Error {
        // Labels are relative to the folder, or to the repository.
        let root = match self {
            Self::Hub(repo, _) => repo.id(),
            Self::Pattern(_) | Self::Folder(_) => name.trim_end_matches('/'),
        };
        let kinds: Vec<String> =
            several.iter().take(NAMED).map(|(_, label)| format!("{root}/{label}")).collect();
        let more = match several.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!("\nand {more} more"),
        };
        Error::usage(format!("there are {} SAEs of layer {layer}", several.len()))
            .at(format!("--sae {name}"))
            .expected("one SAE for each layer")
            .found(format!("{}{more}", kinds.join("\n")))
            .hint(format!("choose one kind, as in --sae '{}'", kinds[0]))
    }

    /// Brings the files of `chosen` here, unless they are to `stay`.
    pub fn bring(&self, chosen: &BTreeMap<usize, String>, stay: bool, fetcher: &Fetcher) -> Result<Brought> {
        let Self::Hub(repo, _) = self else { return Ok(Brought::default()) };
        let listing: Vec<&str> = repo.files().collect();
        let files: Vec<String> = chosen.values().flat_map(|folder| sae::files_of(&listing, folder)).collect();
        let (root, commit) = (repo.snapshot(), Some(repo.commit().to_owned()));
        let to_come = repo.missing(&files);
        if to_come.0 > 0 && stay {
            return Ok(Brought { root, commit, to_come });
        }
        repo.check(&files)?;
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

/// The layer of the one SAE at `path`.
fn one(path: &Path, wanted: Option<&[usize]>, options: &SaeOptions, model: &Config) -> Result<usize> {
    let sae = sae::open(path, options)?;
    let own = sae.about.hook.as_deref().and_then(sites::named).map(|(_, layer)| layer).or(sae.about.layer);
    match (own, wanted) {
        (Some(own), None) => Ok(own),
        (None, Some([layer])) => Ok(*layer),
        (Some(own), Some([layer])) if own == *layer => Ok(own),
        _ => Err(Error::usage("this is the SAE of one layer")
            .at(format!("--sae {}", path.display()))
            .expected(match wanted {
                Some(layers) => format!("SAEs of layers {}", ranges(layers)),
                None => format!("SAEs of layers 0 to {}", model.num_layers - 1),
            })
            .found(own.map_or("a layer that its files do not tell".into(), |own| format!("layer {own}")))
            .hint("put {layer} where the path has the layer's number, or give --layers with one number")),
    }
}

fn by_layer(found: Vec<Found>) -> BTreeMap<usize, Vec<Candidate>> {
    let mut layers: BTreeMap<usize, Vec<Candidate>> = BTreeMap::new();
    for found in found {
        if let Some(layer) = found.layer {
            let path = found.path.to_string_lossy().into_owned();
            layers.entry(layer).or_default().push((path, found.label));
        }
    }
    layers
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

/// Whether `path` is `pattern` or in a folder of that name. Every `{layer}` of the pattern stands for digits.
pub(in crate::plan) fn is_below(pattern: &str, path: &str) -> bool {
    let mut rest = path;
    for (number, literal) in pattern.split(LAYER).enumerate() {
        if number > 0 {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            if digits == 0 {
                return false;
            }
            rest = &rest[digits..];
        }
        match rest.strip_prefix(literal) {
            Some(after) => rest = after,
            None => return false,
        }
    }
    pattern.is_empty() || rest.is_empty() || rest.starts_with('/')
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
