//! Bringing files here: several at a time, each resumed where it broke off and checked when it is complete.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Mutex, PoisonError};

use sha2::{Digest, Sha256};

use super::address::{escape, escape_all};
use super::cache::blob_name;
use super::client::{LOOK, header};
use super::failure::Failure;
use super::{Progress, Repo};
use crate::error::{Context, Error, Kind, Result};
use crate::units::{size, thousands};

/// Files that come at a time: one connection seldom fills a line.
const AT_A_TIME: usize = 4;
/// Attempts at a file that brought nothing new.
const TRIES: u32 = 5;
const BUFFER_BYTES: usize = 1 << 18;
/// Buffers that wait to be written.
const BUFFERS_AHEAD: usize = 4;

/// A file to bring.
pub(super) struct Wanted {
    pub path: String,
    /// Its size in bytes, if the hub listed one.
    pub bytes: Option<u64>,
}

/// Brings all of them, or says why not. What came before a failure is kept.
pub(super) fn bring(repo: &Repo, wanted: &[Wanted], progress: &dyn Progress) -> Result<()> {
    enough_space(repo, wanted)?;
    let all = wanted.iter().filter_map(|file| file.bytes).sum();
    progress.start(&repo.spec.id, wanted.len(), all);
    let transfer = Transfer { repo, progress, done: AtomicU64::new(0), failed: AtomicBool::new(false) };
    let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME.min(wanted.len()) {
            scope.spawn(|| {
                while let Some(file) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if transfer.failed.load(Ordering::Relaxed) {
                        return;
                    }
                    if let Err(error) = transfer.file(file) {
                        // The first failure ends the others, and theirs would only be its echo.
                        transfer.failed.store(true, Ordering::Relaxed);
                        failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
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
        None => Ok(()),
    }
}

/// Refuses a download that the disk has no room for.
fn enough_space(repo: &Repo, wanted: &[Wanted]) -> Result<()> {
    let needed: u64 = wanted.iter().filter_map(|file| file.bytes).fold(0, u64::saturating_add);
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
    failed: AtomicBool,
}

/// The bytes of one file as they come.
struct Coming {
    file: File,
    have: u64,
    /// Of what is in `file`, where the etag is one to compare with.
    hash: Option<Sha256>,
}

impl Transfer<'_> {
    fn file(&self, wanted: &Wanted) -> Result<()> {
        let Repo { hub, spec, commit, folder, .. } = self.repo;
        let path = &wanted.path;
        let kind = spec.kind.prefix();
        let (endpoint, revision) = (&hub.settings().endpoint, escape_all(commit));
        let url = format!("{endpoint}/{kind}{}/resolve/{revision}/{}", spec.id, escape(path));
        let explain = |failure| hub.client().explain(failure, spec, Some(path));

        let about = hub.client().describe(&url).map_err(explain)?;
        let etag = blob_name(&about.etag).map_err(|error| error.at(&url))?;
        let Some(expected) = wanted.bytes.or(about.bytes) else {
            return Err(Error::new("the hub does not say how large a file is").at(&url));
        };
        if !folder.blob(&etag).is_file() {
            let waiting = || self.progress.note(&format!("waiting for another download of {path}"));
            let _lock = folder.lock(&etag, hub.interrupt(), waiting)?;
            // Whoever held the lock may have brought it.
            if !folder.blob(&etag).is_file() {
                self.content(&url, path, &etag, expected).inspect_err(|_| folder.drop_empty(&etag))?;
                folder.complete(&etag)?;
                return folder.link(commit, path, &etag);
            }
        }
        self.advance(expected as i64);
        folder.link(commit, path, &etag)
    }

    /// Brings the content to its `.incomplete` file, whole and checked.
    fn content(&self, url: &str, path: &str, etag: &str, expected: u64) -> Result<()> {
        let folder = &self.repo.folder;
        let mut coming = Coming::resume(folder.open_incomplete(etag)?, etag, expected)
            .context_path("cannot read what was downloaded before", folder.incomplete(etag))?;
        self.advance(coming.have as i64);
        let client = self.repo.hub.client();
        let mut tried = 0;
        while coming.have < expected {
            let before = coming.have;
            let Err(failure) = self.stream(url, &mut coming, expected) else { continue };
            if !failure.may_pass() {
                return Err(client.explain(failure, &self.repo.spec, Some(path)));
            }
            tried = if coming.have > before { 1 } else { tried + 1 };
            if tried >= TRIES {
                let error = client.explain(failure, &self.repo.spec, Some(path));
                return Err(match coming.have {
                    0 => error,
                    have => error
                        .expected(format!("{} bytes", thousands(expected)))
                        .hint(format!("{} bytes are kept: the next run goes on from there", thousands(have))),
                });
            }
            client.wait(tried, &failure)?;
        }
        let found = coming.hash.map(|hash| format!("{:x}", hash.finalize()));
        if coming.have == expected && found.as_ref().is_none_or(|found| found == etag) {
            return coming
                .file
                .sync_data()
                .context_path("cannot write to the cache of the hub", folder.blob(etag));
        }
        // It would be damaged again after a resume.
        let _ = std::fs::remove_file(folder.incomplete(etag));
        let error = Error::new("a downloaded file is not what the hub says it is").at(url);
        Err(match found {
            Some(found) if coming.have == expected => error.expected(format!("SHA-256 {etag}")).found(found),
            _ => error
                .expected(format!("{} bytes", thousands(expected)))
                .found(format!("{} bytes or more", thousands(coming.have))),
        }
        .hint("try again; if it stays so, a proxy on the way may change downloads"))
    }

    /// One request for the rest of the file. `Ok` where the connection ended in order, whatever came.
    fn stream(&self, url: &str, coming: &mut Coming, expected: u64) -> Result<(), Failure> {
        let interrupt = self.repo.hub.interrupt();
        let answer = self.repo.hub.client().get(url, coming.have)?;
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
        if coming.have > 0 && first_byte(&answer) != Some(coming.have) {
            self.advance(-(coming.have as i64));
            coming.restart().context("cannot write to the cache of the hub")?;
        }
        let before = coming.have;
        let arriving = read_ahead(answer.into_body().into_reader());
        loop {
            interrupt.check()?;
            if self.failed.load(Ordering::Relaxed) {
                return Err(Error::new("another file failed").into());
            }
            let bytes = match arriving.recv_timeout(LOOK) {
                Ok(Ok(bytes)) => bytes,
                Ok(Err(cause)) => return Err(Failure::Unreachable(cause.to_string())),
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            coming.push(&bytes).map_err(|cause| {
                Error::new("a download cannot be written to the cache of the hub")
                    .at_path(&self.repo.hub.settings().cache)
                    .found(cause)
                    .hint("make room, or set HF_HOME to another folder; what came so far is kept")
            })?;
            self.advance(bytes.len() as i64);
            if coming.have > expected {
                return Ok(());
            }
        }
        if coming.have == before {
            return Err(Failure::Unreachable(format!(
                "the file ended after {} of {} bytes",
                thousands(coming.have),
                thousands(expected)
            )));
        }
        Ok(())
    }

    fn advance(&self, bytes: i64) {
        let before = self.done.fetch_add(bytes as u64, Ordering::Relaxed);
        self.progress.done(before.wrapping_add(bytes as u64));
    }
}

impl Coming {
    /// Goes on after what is in `file`, unless that cannot be the start of the content.
    fn resume(file: File, etag: &str, expected: u64) -> std::io::Result<Self> {
        let is_sha256 = etag.len() == 64 && etag.bytes().all(|byte| byte.is_ascii_hexdigit());
        let hash = is_sha256.then(Sha256::new);
        let mut coming = Self { have: file.metadata()?.len(), file, hash };
        if coming.have > expected {
            coming.restart()?;
        }
        if let Some(hash) = &mut coming.hash {
            coming.file.seek(SeekFrom::Start(0))?;
            std::io::copy(&mut coming.file, hash)?;
        }
        coming.file.seek(SeekFrom::End(0))?;
        Ok(coming)
    }

    fn restart(&mut self) -> std::io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.have = 0;
        self.hash = self.hash.is_some().then(Sha256::new);
        Ok(())
    }

    fn push(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.file.write_all(bytes)?;
        self.have += bytes.len() as u64;
        if let Some(hash) = &mut self.hash {
            hash.update(bytes);
        }
        Ok(())
    }
}

/// The bytes of `body`, read on a thread of their own: a connection that falls silent must not keep a wish to stop
/// waiting. The thread ends with the body or, once nobody listens, with the next bytes or the timeout.
fn read_ahead(mut body: impl Read + Send + 'static) -> Receiver<std::io::Result<Vec<u8>>> {
    let (sender, arriving) = sync_channel(BUFFERS_AHEAD);
    let read = move || {
        loop {
            let mut buffer = vec![0; BUFFER_BYTES];
            let read = body.read(&mut buffer).map(|read| {
                buffer.truncate(read);
                buffer
            });
            let last = read.as_ref().map_or(true, Vec::is_empty);
            // An empty buffer is the end, which the hung-up channel tells.
            if read.as_ref().is_ok_and(Vec::is_empty) || sender.send(read).is_err() || last {
                return;
            }
        }
    };
    // Without a thread the channel hangs up at once: the attempt brought nothing, and is made again.
    let _ = std::thread::Builder::new().name("download".into()).spawn(read);
    arriving
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
