//! Bringing files here: several at a time, each resumed where it broke off and checked when it is complete.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Mutex, PoisonError};

use super::address::{escape, escape_all};
use super::cache::blob_name;
use super::client::{LOOK, header, read_ahead};
use super::coming::Coming;
use super::failure::Failure;
use super::{Progress, Repo};
use crate::error::{Context, Error, Kind, Result};
use crate::units::{size, thousands};

/// Files that come at a time: one connection seldom fills a line.
const AT_A_TIME: usize = 4;
/// Attempts at a file that brought nothing new.
const TRIES: u32 = 5;

/// A file to bring.
pub(super) struct Wanted {
    pub path: String,
    /// Its size in bytes, if the hub listed one.
    pub bytes: Option<u64>,
    /// Name of its blob, if the hub listed one.
    pub etag: Option<String>,
    /// Bytes of it that are in the cache already.
    pub here: u64,
}

impl Wanted {
    /// Bytes that still have to come, as far as the hub said.
    pub fn to_come(&self) -> u64 {
        self.bytes.map_or(0, |bytes| bytes.saturating_sub(self.here))
    }
}

/// Brings all of them, or says why not. What came before a failure is kept.
pub(super) fn bring(repo: &Repo, wanted: &[Wanted], progress: &dyn Progress) -> Result<()> {
    enough_space(repo, wanted)?;
    let all = wanted.iter().filter_map(|file| file.bytes).fold(0, u64::saturating_add);
    let to_come = wanted.iter().map(Wanted::to_come).fold(0, u64::saturating_add);
    if to_come > 0 {
        progress.start(&repo.spec.id, wanted.len(), all);
    }
    let transfer = Transfer {
        repo,
        progress,
        done: AtomicU64::new(0),
        had: AtomicU64::new(0),
        failed: AtomicBool::new(false),
    };
    // Two files of the same content are one download, and the other takes its blob.
    let mut seen = BTreeSet::new();
    let (first, again): (Vec<&Wanted>, Vec<&Wanted>) =
        wanted.iter().partition(|file| file.etag.as_ref().is_none_or(|etag| seen.insert(etag)));
    let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME.min(first.len()) {
            scope.spawn(|| {
                while let Some(file) = first.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = transfer.check().and_then(|()| transfer.file(file)) {
                        // The first failure ends the others, and theirs would only be its echo: so it is put down
                        // before they are told.
                        failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                        transfer.failed.store(true, Ordering::SeqCst);
                        return;
                    }
                }
            });
        }
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) if matches!(error.kind(), Kind::Interrupted { .. }) => {
            let [done, all] = [transfer.done.into_inner(), all].map(size);
            Err(error.found(format!("{done} of {all} downloaded; the next run goes on from there")))
        }
        Some(error) => Err(error),
        None => again.into_iter().try_for_each(|file| transfer.file(file)),
    }
}

/// Refuses a download that the disk has no room for.
pub(super) fn enough_space(repo: &Repo, wanted: &[Wanted]) -> Result<()> {
    let needed = wanted.iter().map(Wanted::to_come).fold(0, u64::saturating_add);
    let cache = &repo.hub.settings().cache;
    let Some(free) = super::free_bytes(cache) else { return Ok(()) };
    if needed <= free {
        return Ok(());
    }
    let files = match wanted.len() {
        1 => "1 file".to_owned(),
        n => format!("{} files", thousands(n as u64)),
    };
    Err(Error::new(format!("not enough disk space to download {}", repo.spec.id))
        .at_path(cache)
        .expected(format!("{} for {files}", size(needed)))
        .found(format!("{} free", size(free)))
        .hint("make room, or set HF_HOME to a folder on a larger disk"))
}

/// What the files of one call share.
struct Transfer<'a> {
    repo: &'a Repo,
    progress: &'a dyn Progress,
    /// Bytes here, of all files.
    done: AtomicU64,
    /// Of these, what was here before.
    had: AtomicU64,
    failed: AtomicBool,
}

impl Transfer<'_> {
    /// Fails once somebody asked to stop, or another file failed.
    fn check(&self) -> Result<()> {
        self.repo.hub.interrupt().check()?;
        match self.failed.load(Ordering::SeqCst) {
            true => Err(Error::new("another file failed")),
            false => Ok(()),
        }
    }

    fn file(&self, wanted: &Wanted) -> Result<()> {
        let Repo { hub, spec, commit, folder, .. } = self.repo;
        let path = &wanted.path;
        let kind = spec.kind.prefix();
        let (endpoint, revision) = (&hub.settings().endpoint, escape_all(commit));
        let url = format!("{endpoint}/{kind}{}/resolve/{revision}/{}", spec.id, escape(path));
        // A listing may leave out what it says of files: then the file is asked about by itself.
        let (etag, expected) = match (&wanted.etag, wanted.bytes) {
            (Some(etag), Some(bytes)) => (etag.clone(), bytes),
            _ => {
                let about = hub
                    .client()
                    .describe(&url)
                    .map_err(|failure| hub.client().explain(failure, spec, Some(path)))?;
                let etag = blob_name(&about.etag).map_err(|error| error.at(&url))?;
                let bytes = wanted.bytes.or(about.bytes);
                (etag, bytes.ok_or_else(|| Error::new("the hub does not say how large a file is").at(&url))?)
            }
        };
        if !folder.blob(&etag).is_file() {
            let waiting = || hub.note(&format!("waiting for another download of {path}"));
            let _lock = folder.lock(&etag, &|| self.check(), waiting)?;
            // Whoever held the lock may have brought it.
            if !folder.blob(&etag).is_file() {
                self.content(&url, path, &etag, expected).inspect_err(|_| folder.drop_empty(&etag))?;
                folder.complete(&etag)?;
                return folder.link(commit, path, &etag);
            }
        }
        self.was_here(expected);
        folder.link(commit, path, &etag)
    }

    /// Brings the content to its `.incomplete` file, whole and checked.
    fn content(&self, url: &str, path: &str, etag: &str, expected: u64) -> Result<()> {
        let (folder, client) = (&self.repo.folder, self.repo.hub.client());
        let mut coming = Coming::resume(folder, etag, expected, &|| self.check())?;
        self.was_here(coming.have());
        let (mut tried, mut resumed) = (0, coming.have() > 0);
        loop {
            while coming.have() < expected {
                let before = coming.have();
                let result = self.stream(url, &mut coming, expected);
                tried = if coming.have() > before { 1 } else { tried + 1 };
                let failure = match result {
                    Ok(()) if coming.have() > before => continue,
                    // It ended in order, and brought nothing.
                    Ok(()) => Failure::Unreachable(format!(
                        "the file ended after {} of {} bytes",
                        thousands(coming.have()),
                        thousands(expected)
                    )),
                    Err(failure) => failure,
                };
                if !failure.may_pass() || tried >= TRIES {
                    let error = client.explain(failure, &self.repo.spec, Some(path));
                    return Err(match coming.have() {
                        have if tried < TRIES || have == 0 => error,
                        have => error.expected(format!("{} bytes", thousands(expected))).hint(format!(
                            "{} bytes are kept: the next run goes on from there",
                            thousands(have)
                        )),
                    });
                }
                client.wait(tried, &failure, &|| self.check())?;
            }
            let found = coming.found();
            if coming.have() == expected && found.as_ref().is_none_or(|found| found == etag) {
                return coming.finish(folder, etag);
            }
            if resumed {
                // What was here before may have been the damage: once more from the start.
                resumed = false;
                self.restart(&mut coming)?;
                continue;
            }
            // It would be damaged again after a resume.
            coming.discard(folder, etag);
            let error = Error::new("a downloaded file is not what the hub says it is").at(url);
            return Err(match found {
                Some(found) if coming.have() == expected => {
                    error.expected(format!("content of hash {etag}")).found(found)
                }
                _ => error
                    .expected(format!("{} bytes", thousands(expected)))
                    .found(format!("{} bytes or more", thousands(coming.have()))),
            }
            .hint("try again; if it stays so, a proxy on the way may change downloads"));
        }
    }

    /// One request for the rest of the file. `Ok` where the connection ended in order, whatever came.
    fn stream(&self, url: &str, coming: &mut Coming, expected: u64) -> Result<(), Failure> {
        let answer = self.repo.hub.client().get(url, coming.have())?;
        if let Some(all) = all_bytes(&answer).filter(|&all| all != expected) {
            return Err(Failure::Final(
                Error::new("a file on the hub is not as large as the hub says")
                    .at(url)
                    .expected(format!("{} bytes", thousands(expected)))
                    .found(format!("{} bytes", thousands(all)))
                    .hint("try again; if it stays so, a proxy on the way may change downloads"),
            ));
        }
        // A store that ignores the range sends everything.
        if coming.have() > 0 && first_byte(&answer) != Some(coming.have()) {
            self.restart(coming)?;
        }
        let arriving = read_ahead(answer.into_body().into_reader());
        loop {
            self.check()?;
            let bytes = match arriving.recv_timeout(LOOK) {
                Ok(Ok(bytes)) => bytes,
                Ok(Err(cause)) => return Err(Failure::Unreachable(cause.to_string())),
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            };
            coming.push(&bytes).map_err(|cause| {
                Error::new("a download cannot be written to the cache of the hub")
                    .at_path(&self.repo.hub.settings().cache)
                    .found(cause)
                    .hint("make room, or set HF_HOME to another folder; what came so far is kept")
            })?;
            self.advance(bytes.len() as i64);
            if coming.have() > expected {
                return Ok(());
            }
        }
    }

    fn restart(&self, coming: &mut Coming) -> Result<()> {
        self.advance(-(coming.have() as i64));
        coming.restart().context("cannot write to the cache of the hub")
    }

    /// Counts what no connection had to bring.
    fn was_here(&self, bytes: u64) {
        self.progress.had(self.had.fetch_add(bytes, Ordering::Relaxed) + bytes);
        self.advance(bytes as i64);
    }

    fn advance(&self, bytes: i64) {
        let before = self.done.fetch_add(bytes as u64, Ordering::Relaxed);
        self.progress.done(before.wrapping_add(bytes as u64));
    }
}

/// Bytes of the whole file, of which an answer may be a part.
fn all_bytes(answer: &ureq::http::Response<ureq::Body>) -> Option<u64> {
    match answer.status().as_u16() {
        206 => header(answer.headers(), "content-range")?.rsplit_once('/')?.1.trim().parse().ok(),
        _ => header(answer.headers(), "content-length")?.trim().parse().ok(),
    }
}

/// Where a partial answer starts; `None` for a whole one.
fn first_byte(answer: &ureq::http::Response<ureq::Body>) -> Option<u64> {
    if answer.status().as_u16() != 206 {
        return None;
    }
    let range = header(answer.headers(), "content-range")?;
    range.trim().strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}
