//! Ids of the Hugging Face hub → files on this machine, in the cache that Python's `huggingface_hub` uses too.
//!
//! [`Hub::open`] asks for the listing of a repository (one request) or, where there is no network, looks into the
//! cache; [`Repo::get`] brings the files that are not here yet. Files that are here are never asked for again, and
//! nothing partial is ever visible under `snapshots/`.
//!
//! Why this and not the `hf-hub` crate, of which the variables, the layout and the requests are known to work: 0.5
//! checks neither size nor hash, locks where Python does not look and appends to a file what a store that ignores
//! ranges sends; 1.0 starts again where a download broke off, takes the page of an error for the file, and brings
//! 297 crates; 0.5 never works offline, 1.0 only where each call says so. The HTTP client is `ureq`, as in 0.5.

mod address;
mod cache;
mod client;
mod coming;
mod download;
mod failure;
mod listing;
mod proxy;
mod settings;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use proxy::Proxy;
pub use settings::{Settings, Token};

use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use cache::{Folder, is_inside};
use client::Client;
use download::{Wanted, bring, enough_space};
use failure::Failure;
use listing::{About, Listing};

/// Files named in an error at most.
const NAMED: usize = 10;

/// What a repository holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A checkpoint.
    Model,
    /// Texts.
    Dataset,
    /// Sparse autoencoders: a repository of models too.
    Saes,
}

impl Kind {
    /// As messages and cache folders call it.
    pub fn noun(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Dataset => "dataset",
            Self::Saes => "repository of SAEs",
        }
    }

    /// Its part of addresses of the interface, and what names of folders in the cache begin with.
    fn folder(self) -> &'static str {
        match self {
            Self::Model | Self::Saes => "models",
            Self::Dataset => "datasets",
        }
    }

    /// What addresses have before the id.
    fn prefix(self) -> &'static str {
        match self {
            Self::Model | Self::Saes => "",
            Self::Dataset => "datasets/",
        }
    }
}

/// A repository at a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepoSpec {
    /// What it holds.
    pub kind: Kind,
    /// `owner/name`, or `name` alone for a few old ones.
    pub id: String,
    /// Branch, tag or commit hash.
    pub revision: String,
}

impl RepoSpec {
    /// Its page in a browser.
    fn page(&self, endpoint: &str) -> String {
        format!("{endpoint}/{}{}", self.kind.prefix(), self.id)
    }

    /// Refuses what would leave the cache or an address.
    fn check(&self) -> Result<()> {
        if !is_id(&self.id) {
            return Err(Error::usage(format!("this is no id of a {}", self.kind.noun()))
                .at(&self.id)
                .expected("owner/name")
                .found(format!("{:?}", self.id)));
        }
        if !is_inside(&self.revision) {
            return Err(Error::usage("this is no revision")
                .at(&self.id)
                .expected("a branch, a tag or a full commit hash")
                .found(format!("{:?}", self.revision)));
        }
        Ok(())
    }
}

/// Whether a text has the form of a hub id: one or two names of letters, digits, `.`, `_` and `-`.
pub fn is_id(text: &str) -> bool {
    let is_name = |name: &str| {
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        !name.is_empty()
            && name.chars().all(good)
            && !name.starts_with(['.', '-'])
            && !name.ends_with(['.', '-'])
    };
    let odd = text.contains("--") || text.contains("..");
    text.len() <= 96 && !odd && text.split('/').count() <= 2 && text.split('/').all(is_name)
}

/// Shows a download. Called by several threads at once.
pub trait Progress: Sync {
    /// `files` files of the repository `id` are to come, of `bytes` bytes together.
    fn start(&self, id: &str, files: usize, bytes: u64);
    /// This many of the bytes are here. Falls back where a file has to come again.
    fn done(&self, bytes: u64);
    /// This many of them no connection had to bring.
    fn had(&self, bytes: u64);
}

/// Says what the user may wonder about, such as a long wait.
pub type Note = Arc<dyn Fn(&str) + Send + Sync>;

/// A hub, and the cache of what came from it. Clones share the connections.
#[derive(Clone)]
pub struct Hub(Arc<Inner>);

struct Inner {
    settings: Settings,
    client: Client,
    interrupt: Interrupt,
    note: Note,
}

/// A repository at one commit.
#[derive(Clone)]
pub struct Repo {
    hub: Hub,
    spec: RepoSpec,
    commit: String,
    folder: Folder,
    /// What the hub said of each path; of what is in the cache where there was no listing.
    files: BTreeMap<String, About>,
    listed: bool,
    note: Option<String>,
}

impl Hub {
    /// A hub; asks nothing yet.
    ///
    /// # Errors
    /// Certificates that cannot be read, a proxy that cannot be used.
    pub fn new(settings: Settings, interrupt: &Interrupt, note: Note) -> Result<Self> {
        let client = Client::new(&settings, interrupt, Arc::clone(&note))?;
        Ok(Self(Arc::new(Inner { settings, client, interrupt: interrupt.clone(), note })))
    }

    /// Where it is and where its files are kept.
    pub fn settings(&self) -> &Settings {
        &self.0.settings
    }

    fn client(&self) -> &Client {
        &self.0.client
    }

    fn interrupt(&self) -> &Interrupt {
        &self.0.interrupt
    }

    fn note(&self, text: &str) {
        (self.0.note)(text);
    }

    /// Whether the hub answers: the reason if it does not.
    pub fn ping(&self) -> std::result::Result<(), String> {
        let answer = self.client().get(&self.settings().endpoint, 0);
        match answer {
            // Whatever it says, it is there.
            Ok(_) | Err(Failure::Refused(_)) => Ok(()),
            Err(Failure::Unreachable(cause)) => Err(cause),
            Err(Failure::Final(error)) => Err(error.to_string()),
        }
    }

    /// The repository at the commit that its revision stands for now; without a network, at the commit it stood for
    /// when it was fetched last.
    ///
    /// # Errors
    /// No such repository or revision; one that is gated or private; no network and nothing in the cache.
    pub fn open(&self, spec: &RepoSpec) -> Result<Repo> {
        spec.check()?;
        if let Some(variable) = self.settings().offline {
            return self.cached(spec).ok_or_else(|| {
                Error::new(format!(
                    "the {} {} is not in the cache, and downloads are off",
                    spec.kind.noun(),
                    spec.id
                ))
                .at_path(&self.settings().cache)
                .expected(format!("revision {}", spec.revision))
                .found(format!("nothing of it; {variable} is set"))
                .hint(match spec.kind {
                    Kind::Model => {
                        format!("where there is a network: gradlens fetch --model_name {}", spec.id)
                    }
                    Kind::Dataset => {
                        format!("where there is a network: gradlens fetch --dataset {}", spec.id)
                    }
                    Kind::Saes => {
                        format!(
                            "where there is a network: gradlens fetch --sae {}; there is no such path here",
                            spec.id
                        )
                    }
                })
            });
        }
        match Listing::of(self.client(), &self.settings().endpoint, spec) {
            Ok(listing) => Ok(self.listed(spec, listing)),
            Err(failure) => {
                let cached = if failure.may_pass() { self.cached(spec) } else { None };
                let error = self.client().explain(failure, spec, None);
                let Some(mut repo) = cached else { return Err(error) };
                repo.note = Some(format!(
                    "{} at {}: {} is taken from the cache as it was fetched last (commit {})",
                    error.what(),
                    self.settings().endpoint,
                    spec.id,
                    &repo.commit[..12]
                ));
                Ok(repo)
            }
        }
    }

    fn listed(&self, spec: &RepoSpec, listing: Listing) -> Repo {
        Repo {
            hub: self.clone(),
            folder: Folder::new(&self.settings().cache, spec),
            spec: spec.clone(),
            commit: listing.commit,
            files: listing.files,
            listed: true,
            note: None,
        }
    }

    fn cached(&self, spec: &RepoSpec) -> Option<Repo> {
        let folder = Folder::new(&self.settings().cache, spec);
        let commit = folder.commit_of(&spec.revision)?;
        let files: BTreeMap<_, _> =
            folder.listing(&commit).into_iter().map(|path| (path, About::default())).collect();
        if files.is_empty() {
            return None;
        }
        Some(Repo { hub: self.clone(), spec: spec.clone(), commit, folder, files, listed: false, note: None })
    }
}

impl Repo {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.spec.id
    }

    /// The full hash of the commit.
    pub fn commit(&self) -> &str {
        &self.commit
    }

    /// Its page in a browser.
    pub fn page(&self) -> String {
        self.spec.page(&self.hub.settings().endpoint)
    }

    /// What the user should know: that this is not the hub's present state.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// The paths of its files, sorted; of those in the cache where there was no listing.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// Whether it has this file.
    pub fn has(&self, path: &str) -> bool {
        self.files.contains_key(path)
    }

    /// Whether [`files`](Self::files) are all that it has, and not only those in the cache.
    pub fn is_listed(&self) -> bool {
        self.listed
    }

    /// Size of a file in bytes, where the hub listed it.
    pub fn bytes(&self, path: &str) -> Option<u64> {
        self.files.get(path)?.bytes
    }

    /// Whether nobody can tell if it has this file: there was no listing, it is not in the cache, and nobody asked
    /// for it before.
    pub fn is_uncertain(&self, path: &str) -> bool {
        !self.listed && !self.has(path) && !self.folder.known_absent(&self.commit, path)
    }

    /// The folder of its files on this machine: those that [`get`](Self::get) brought or that were there.
    pub fn snapshot(&self) -> PathBuf {
        self.folder.snapshot(&self.commit)
    }

    /// Of these files, how many have to be brought, and the bytes that still have to come for it.
    pub fn missing(&self, paths: &[impl AsRef<str>]) -> (usize, u64) {
        let wanted = self.wanted(paths);
        let to_come = wanted.iter().filter(|file| file.bytes.is_none() || file.to_come() > 0);
        (to_come.count(), wanted.iter().map(Wanted::to_come).fold(0, u64::saturating_add))
    }

    /// Fails where these files could not be brought: without a network, or without room on the disk.
    ///
    /// # Errors
    /// The reason.
    pub fn check(&self, paths: &[impl AsRef<str>]) -> Result<()> {
        let wanted = self.wanted(paths);
        match wanted.is_empty() || self.listed {
            true => enough_space(self, &wanted),
            false => Err(self.not_cached(&wanted)),
        }
    }

    fn wanted(&self, paths: &[impl AsRef<str>]) -> Vec<Wanted> {
        let paths: BTreeSet<&str> = paths.iter().map(AsRef::as_ref).collect();
        let missing = paths.into_iter().filter(|path| self.folder.file(&self.commit, path).is_none());
        let wanted = |path: &str| {
            let About { bytes, etag } = self.files.get(path).cloned().unwrap_or_default();
            let here = etag.as_ref().map_or(0, |etag| self.folder.bytes_here(etag));
            Wanted { path: path.to_owned(), bytes, etag, here }
        };
        missing.map(wanted).collect()
    }

    /// Makes sure that these files are in [`snapshot`](Self::snapshot).
    ///
    /// # Errors
    /// A file the repository does not have; no network; no room; a file that is not what the hub says it is. What
    /// came before is kept, and the next call goes on from there.
    pub fn get(&self, paths: &[impl AsRef<str>], progress: &dyn Progress) -> Result<()> {
        let wanted = self.wanted(paths);
        if wanted.is_empty() {
            return Ok(());
        }
        if !self.listed {
            return Err(self.not_cached(&wanted));
        }
        if let Some(file) = wanted.iter().find(|file| !self.has(&file.path)) {
            return Err(Error::new(format!("the {} {} lacks a file", self.spec.kind.noun(), self.spec.id))
                .at(format!("{} at commit {}", self.page(), self.commit))
                .expected(&file.path)
                .found("no such file"));
        }
        bring(self, &wanted, progress)
    }

    fn not_cached(&self, wanted: &[Wanted]) -> Error {
        let mut names: Vec<&str> = wanted.iter().map(|file| file.path.as_str()).take(NAMED).collect();
        if wanted.len() > NAMED {
            names.push("…");
        }
        let why = match self.hub.settings().offline {
            Some(variable) => format!("{variable} is set"),
            None => "the hub cannot be reached".to_owned(),
        };
        Error::new(format!("the {} {} is only partly in the cache", self.spec.kind.noun(), self.spec.id))
            .at_path(self.snapshot())
            .expected(names.join(", "))
            .found(format!("not there; {why}"))
            .hint("run `gradlens fetch` with the same flags where there is a network")
    }

    /// Remembers in the cache which of these files the repository does not have, so that a run without a network
    /// can tell.
    pub fn note_absent(&self, paths: &[&str]) {
        if self.listed {
            paths
                .iter()
                .filter(|path| !self.has(path))
                .for_each(|path| self.folder.note_absent(&self.commit, path));
        }
    }

    /// Whether a run without a network would find any commit for the revision.
    pub fn is_settled(&self) -> bool {
        self.folder.commit_of(&self.spec.revision).is_some()
    }

    /// Makes this commit the one that runs without a network take for the revision. To be called when everything
    /// that was wanted of it is here: until then they are better off with the commit before.
    ///
    /// # Errors
    /// A cache that cannot be written to.
    pub fn settle(&self) -> Result<()> {
        match self.listed {
            true => self.folder.point(&self.spec.revision, &self.commit),
            false => Ok(()),
        }
    }
}

/// Free bytes of the disk that a folder is on, or will be.
pub fn free_bytes(folder: &Path) -> Option<u64> {
    // The last ancestor of a relative path is empty, which means here.
    let here =
        |folder: &Path| if folder.as_os_str().is_empty() { PathBuf::from(".") } else { folder.to_owned() };
    let existing = folder.ancestors().map(here).find(|ancestor| ancestor.is_dir())?;
    fs4::available_space(existing).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_a_form() {
        for good in ["gpt2", "Qwen/Qwen2.5-0.5B", "a_b/c.d", "Salesforce/wikitext"] {
            assert!(is_id(good), "{good}");
        }
        for bad in ["", "a/b/c", "/a", "a/", "./a", "../a", "a b", "a--b", "a/.b", "-a", "~/a", "a\\b"] {
            assert!(!is_id(bad), "{bad}");
        }
    }
}
