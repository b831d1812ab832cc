//! What a hub holds: repositories with commits, branches and files.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use crate::hash;

/// A file of a repository.
#[derive(Clone)]
pub struct Content {
    pub bytes: Arc<Vec<u8>>,
    /// Whether it is in large-file storage: then the hub redirects to another host.
    pub lfs: bool,
    /// What listings say of its size, where that is a lie.
    pub claimed: Option<u64>,
}

impl Content {
    /// Large-file storage has what the hub's default .gitattributes send there.
    pub fn new(path: &str, bytes: impl Into<Vec<u8>>) -> Self {
        const LARGE: [&str; 7] = [".safetensors", ".bin", ".parquet", ".gz", ".gguf", ".pth", ".msgpack"];
        let lfs = LARGE.iter().any(|ending| path.ends_with(ending));
        Self { bytes: Arc::new(bytes.into()), lfs, claimed: None }
    }

    pub fn etag(&self) -> String {
        hash::etag(&self.bytes, self.lfs)
    }

    /// As listings give it.
    pub fn size(&self) -> u64 {
        self.claimed.unwrap_or(self.bytes.len() as u64)
    }
}

/// Path → content.
pub type Files = BTreeMap<String, Content>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Model,
    Dataset,
}

impl Kind {
    /// As in addresses and folders: `models`.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }
}

#[derive(Clone)]
pub struct Repository {
    pub kind: Kind,
    /// `owner/name`.
    pub id: String,
    /// Listed for everyone, its files for those who accepted its terms.
    pub gated: bool,
    /// Not to be seen at all by others.
    pub private: bool,
    /// Branch → commit.
    refs: BTreeMap<String, String>,
    commits: BTreeMap<String, Files>,
}

impl Repository {
    /// With `files` on its branch `main`.
    pub fn new(kind: Kind, id: &str, files: Files) -> Self {
        let (refs, commits) = (BTreeMap::new(), BTreeMap::new());
        Self { kind, id: id.into(), gated: false, private: false, refs, commits }.commit("main", files)
    }

    /// Puts a commit on a branch.
    pub fn commit(mut self, branch: &str, files: Files) -> Self {
        let mut text = format!("{} {} {branch}", self.kind.plural(), self.id);
        for (path, content) in &files {
            write!(text, "\n{path} {}", content.etag()).unwrap();
        }
        let sha = hash::sha1(text.as_bytes());
        self.refs.insert(branch.into(), sha.clone());
        self.commits.insert(sha, files);
        self
    }

    pub fn gated(self) -> Self {
        Self { gated: true, ..self }
    }

    pub fn private(self) -> Self {
        Self { private: true, ..self }
    }

    /// The commit that a branch or a commit's hash means.
    pub fn resolve(&self, revision: &str) -> Option<(&str, &Files)> {
        let sha = self.refs.get(revision).map_or(revision, String::as_str);
        self.commits.get_key_value(sha).map(|(sha, files)| (sha.as_str(), files))
    }

    #[track_caller]
    pub fn sha(&self, revision: &str) -> String {
        self.resolve(revision).unwrap().0.to_owned()
    }

    #[track_caller]
    pub fn files(&self, revision: &str) -> &Files {
        self.resolve(revision).unwrap().1
    }

    /// The name of its folder in the cache.
    pub fn folder(&self) -> String {
        format!("{}--{}", self.kind.plural(), self.id.replace('/', "--"))
    }
}
