//! What a repository holds at a commit.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::RepoSpec;
use super::address::{escape, escape_all};
use super::cache::{blob_name, is_commit, is_inside};
use super::client::Client;
use super::failure::Failure;
use crate::error::Error;

/// Files that the facts about a repository list; of larger ones they leave some out.
const FILES_IN_FACTS: usize = 1000;
/// Pages of the full listing, of 1,000 files each, before something must be wrong.
const MAX_PAGES: usize = 10_000;

/// What the hub says of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct About {
    /// Its size.
    pub bytes: Option<u64>,
    /// The name of its blob in the cache: SHA-256 of a large file, else git's hash.
    pub etag: Option<String>,
}

/// The files of a repository at one commit, by path.
pub(super) struct Listing {
    pub commit: String,
    pub files: BTreeMap<String, About>,
}

/// The facts about a repository, as far as they matter here.
#[derive(Deserialize)]
struct Facts {
    sha: Option<String>,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Large>,
}

/// An entry of the full listing.
#[derive(Deserialize)]
struct Entry {
    r#type: String,
    path: String,
    size: Option<u64>,
    oid: Option<String>,
    lfs: Option<Large>,
}

/// A file that git keeps a pointer to.
#[derive(Deserialize)]
struct Large {
    #[serde(alias = "oid")]
    sha256: Option<String>,
    size: Option<u64>,
}

impl Listing {
    /// Asks the hub.
    pub fn of(client: &Client, endpoint: &str, spec: &RepoSpec) -> Result<Self, Failure> {
        let repository = format!("{endpoint}/api/{}/{}", spec.kind.folder(), escape(&spec.id));
        let facts = format!("{repository}/revision/{}?blobs=true", escape_all(&spec.revision));
        let (Facts { sha, siblings }, _) = client.page(&facts)?;
        let commit = sha.filter(|sha| is_commit(sha)).ok_or_else(|| {
            Error::new("the hub's answer is not what it should be")
                .at(&facts)
                .expected("the hash of a commit")
                .found("none")
                .hint("does the repository have files?")
        })?;
        let mut listing = Self { commit, files: BTreeMap::new() };
        if siblings.len() < FILES_IN_FACTS {
            siblings.into_iter().for_each(|s| listing.add(s.rfilename, s.size, s.blob_id, s.lfs));
            return Ok(listing);
        }
        let mut next = Some(format!("{repository}/tree/{}?recursive=true", listing.commit));
        for _ in 0..MAX_PAGES {
            let Some(url) = next else { return Ok(listing) };
            let (entries, after): (Vec<Entry>, _) = client.page(&url)?;
            let files = entries.into_iter().filter(|entry| entry.r#type == "file");
            files.for_each(|file| listing.add(file.path, file.size, file.oid, file.lfs));
            next = after;
        }
        Err(Error::new("the hub's listing of a repository does not end").at(repository).into())
    }

    fn add(&mut self, path: String, size: Option<u64>, blob: Option<String>, large: Option<Large>) {
        // Names that would leave the cache are nobody's files.
        if !is_inside(&path) {
            return;
        }
        let (bytes, hash) = match large {
            Some(large) => (large.size.or(size), large.sha256),
            None => (size, blob),
        };
        self.files.insert(path, About { bytes, etag: hash.and_then(|hash| blob_name(&hash).ok()) });
    }
}
