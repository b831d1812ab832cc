//! Where the SAEs of a folder or a repository are.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::format::{CONFIG, Format, names};
use super::{layers, named_in};
use crate::error::{Error, Result};
use crate::units::natural;

/// Folders inside folders that are looked into.
const MAX_DEPTH: usize = 12;
/// Folders that are looked into before this cannot be a folder of SAEs.
const MAX_FOLDERS: usize = 100_000;
/// Folders that never hold SAEs. Others that begin with a dot may: one library's demo makes them.
const SKIPPED: [&str; 4] = [".git", ".cache", "blobs", "refs"];

/// A folder with an SAE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where it is.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// The layer that its path below the root names, or the root's, where it is the root itself.
    pub layer: Option<usize>,
    /// Its path below the root with `{layer}` for the layer's number: SAEs of one kind for all layers have one label.
    pub label: String,
}

impl Found {
    fn new(path: PathBuf, below: &str, format: Format) -> Self {
        Self { path, format, layer: layers::number(below), label: layers::pattern(below) }
    }
}

/// The folders at and below `root` that hold SAEs, in natural order of their paths. Links are followed. In the hub's
/// cache the snapshot that `main` stands for is meant.
///
/// # Errors
/// `root` is no folder or cannot be read; there are too many folders below it.
pub fn enumerate(root: &Path) -> Result<Vec<Found>> {
    let start = snapshot(root).unwrap_or_else(|| root.to_owned());
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    let mut waiting = vec![(start, String::new(), 0)];
    while let Some((folder, below, depth)) = waiting.pop() {
        // A link may lead back up.
        if !folder.canonicalize().is_ok_and(|real| seen.insert(real)) {
            if below.is_empty() {
                names(&folder)?;
            }
            continue;
        }
        if seen.len() > MAX_FOLDERS {
            return Err(Error::new("there are too many folders to look for SAEs in")
                .at_path(root)
                .expected(format_args!("at most {MAX_FOLDERS}"))
                .hint("name a folder nearer to the SAEs"));
        }
        let names = match names(&folder) {
            Ok(names) => names,
            Err(error) if below.is_empty() => return Err(error),
            Err(_) => continue,
        };
        if let Some(format) = Format::of(&names.iter().map(String::as_str).collect()) {
            let mut one = Found::new(folder, &below, format);
            // The root itself: only folders above can name the layer.
            one.layer =
                one.layer.or_else(|| named_in(root).filter(|_| below.is_empty()).map(|(_, layer)| layer));
            found.push(one);
            continue;
        }
        if depth == MAX_DEPTH {
            continue;
        }
        for name in names.into_iter().filter(|name| !SKIPPED.contains(&name.as_str())) {
            let path = folder.join(&name);
            if path.is_dir() {
                let below = if below.is_empty() { name } else { format!("{below}/{name}") };
                waiting.push((path, below, depth + 1));
            }
        }
    }
    found.sort_by(|a, b| natural(&a.path.to_string_lossy(), &b.path.to_string_lossy()));
    Ok(found)
}

/// The snapshot of `main` in a repository's folder of the hub's cache.
fn snapshot(root: &Path) -> Option<PathBuf> {
    let commit = std::fs::read_to_string(root.join("refs/main")).ok()?;
    Some(root.join("snapshots").join(commit.trim())).filter(|folder| folder.is_dir())
}

/// The same among the paths of a repository's files, with `/` between folders. Paths are as in the listing.
pub fn enumerate_listing(listing: &[&str]) -> Vec<Found> {
    let mut folders: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for path in listing {
        let mut at = path.rsplit_once('/').map_or("", |(folder, _)| folder);
        let name = |folder: &str| path.get(folder.len()..).unwrap_or_default().trim_start_matches('/');
        folders.entry(at).or_default().insert(name(at));
        // Some files lie one folder below their SAE's.
        if at == "checkpoints" || at.ends_with("/checkpoints") {
            at = at.rsplit_once('/').map_or("", |(folder, _)| folder);
            folders.entry(at).or_default().insert(name(at));
        }
    }
    let found = folders.iter().filter_map(|(folder, names)| Some((*folder, Format::of(names)?)));
    let mut found: Vec<Found> =
        found.map(|(folder, format)| Found::new(PathBuf::from(folder), folder, format)).collect();
    found.sort_by(|a, b| natural(&a.path.to_string_lossy(), &b.path.to_string_lossy()));
    found
}

/// Which of a repository's files the SAE in `folder` (a path in it, or empty) needs: weights and configuration, and the
/// configuration of the run where its folder has one. Nothing where there is no SAE.
pub fn files_of(listing: &[&str], folder: &str) -> Vec<String> {
    let folder = folder.trim_matches('/');
    let start = if folder.is_empty() { String::new() } else { format!("{folder}/") };
    let names: BTreeSet<&str> = listing.iter().filter_map(|path| path.strip_prefix(&start)).collect();
    let Some(format) = Format::of(&names) else { return Vec::new() };
    let mut files: Vec<String> = format
        .files()
        .iter()
        .filter(|name| names.contains(*name))
        .map(|name| format!("{start}{name}"))
        .collect();
    if format == Format::Sparsify && !folder.is_empty() {
        let parent = folder.rsplit_once('/').map_or(String::new(), |(parent, _)| format!("{parent}/"));
        let run = format!("{parent}{CONFIG}");
        files.extend(Some(run).filter(|run| listing.contains(&run.as_str())));
    }
    files
}
