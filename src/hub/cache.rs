//! The cache on disk, laid out as `huggingface_hub` does, so that Python and this program share one:
//!
//! ```text
//! {cache}/models--{owner}--{name}/refs/{revision}         the commit it stands for
//!                                 snapshots/{commit}/…    links to blobs, under the files' names
//!                                 blobs/{etag}            content; {etag}.incomplete while it comes
//!                                 .no_exist/{commit}/…    files known to be absent
//! {cache}/.locks/models--{owner}--{name}/{etag}.lock      held while a blob comes
//! ```
//!
//! A name appears under `snapshots` only when its blob is complete.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use super::RepoSpec;
use crate::error::{Context, Error, Result};

/// How often a taken lock is tried again.
const LOCK_LOOK: Duration = Duration::from_millis(200);

/// The folder of one repository in the cache.
#[derive(Clone, Debug)]
pub(super) struct Folder {
    root: PathBuf,
    locks: PathBuf,
}

impl Folder {
    pub fn new(cache: &Path, repo: &RepoSpec) -> Self {
        let name = format!("{}--{}", repo.kind.folder(), repo.id.replace('/', "--"));
        Self { root: cache.join(&name), locks: cache.join(".locks").join(&name) }
    }

    /// Where a commit's files are.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// A file of a commit, if it is there and its blob too.
    pub fn file(&self, commit: &str, path: &str) -> Option<PathBuf> {
        let file = self.snapshot(commit).join(path);
        file.is_file().then_some(file)
    }

    /// Whether somebody asked the hub for the file and there was none.
    pub fn known_absent(&self, commit: &str, path: &str) -> bool {
        self.root.join(".no_exist").join(commit).join(path).exists()
    }

    /// Remembers that the commit has no such file. A cache that cannot be written to forgets it: no harm.
    pub fn note_absent(&self, commit: &str, path: &str) {
        let marker = self.root.join(".no_exist").join(commit).join(path);
        if let Some(parent) = marker.parent()
            && fs::create_dir_all(parent).is_ok()
        {
            let _ = File::options().create(true).append(true).open(marker);
        }
    }

    /// The commit that a revision stands for, as far as the cache knows.
    pub fn commit_of(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let commit = fs::read_to_string(self.root.join("refs").join(revision)).ok()?;
        let commit = commit.trim();
        is_commit(commit).then(|| commit.to_owned())
    }

    /// Makes a revision stand for a commit.
    pub fn point(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) || self.commit_of(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let reference = self.root.join("refs").join(revision);
        let folder = parent(&reference);
        create(folder)?;
        let what = "cannot write to the cache of the hub";
        let mut builder = tempfile::Builder::new();
        // Temporary files are private by default; a cache may be shared with others.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut file = builder.tempfile_in(folder).context_path(what, folder)?;
        file.write_all(commit.as_bytes()).context_path(what, &reference)?;
        file.persist(&reference).map_err(|error| error.error).context_path(what, &reference)?;
        Ok(())
    }

    /// Every file of a commit that is here, by its path in the repository.
    pub fn listing(&self, commit: &str) -> BTreeSet<String> {
        let root = self.snapshot(commit);
        let mut found = BTreeSet::new();
        let mut waiting = vec![root.clone()];
        while let Some(folder) = waiting.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                // Through links: a dangling one is no file.
                match fs::metadata(&path) {
                    Ok(about) if about.is_dir() => waiting.push(path),
                    Ok(about) if about.is_file() => {
                        let name = path.strip_prefix(&root).unwrap_or(&path).to_string_lossy();
                        found.insert(name.replace('\\', "/"));
                    }
                    _ => {}
                }
            }
        }
        found
    }

    /// The content with this etag.
    pub fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    /// Bytes of a blob that are here, in part or whole.
    pub fn bytes_here(&self, etag: &str) -> u64 {
        let bytes = |path: PathBuf| fs::metadata(path).ok().map(|about| about.len());
        bytes(self.blob(etag)).or_else(|| bytes(self.incomplete(etag))).unwrap_or(0)
    }

    /// What has come of it so far.
    pub fn incomplete(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// Opens what has come so far, to go on.
    pub fn open_incomplete(&self, etag: &str) -> Result<File> {
        let path = self.incomplete(etag);
        create(parent(&path))?;
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .context_path("cannot write to the cache of the hub", &path)
            .map_err(|error| error.hint("HF_HOME names another place for it"))
    }

    /// Removes what has come so far if that is nothing.
    pub fn drop_empty(&self, etag: &str) {
        let path = self.incomplete(etag);
        if fs::metadata(&path).is_ok_and(|about| about.len() == 0) {
            let _ = fs::remove_file(path);
        }
    }

    /// Gives a complete download its name.
    pub fn complete(&self, etag: &str) -> Result<()> {
        let blob = self.blob(etag);
        match fs::rename(self.incomplete(etag), &blob) {
            // Where locks do not exclude, another process may have been quicker.
            Err(cause) if cause.kind() == ErrorKind::NotFound && blob.is_file() => Ok(()),
            renamed => renamed.context_path("cannot write to the cache of the hub", &blob),
        }
    }

    /// Shows a blob as a file of a commit.
    pub fn link(&self, commit: &str, path: &str, etag: &str) -> Result<()> {
        let link = self.snapshot(commit).join(path);
        create(parent(&link))?;
        let blob = self.blob(etag);
        // One step up for each folder between the link and the repository's; joined, as Windows resolves no slashes.
        let steps = 2 + path.split('/').count() - 1;
        let target: PathBuf = std::iter::repeat_n("..", steps).chain(["blobs", etag]).collect();
        let made = match symlink(&target, &link) {
            Err(cause) if cause.kind() == ErrorKind::AlreadyExists => {
                if link.is_file() {
                    return Ok(());
                }
                // It dangles: its blob was deleted.
                fs::remove_file(&link).and_then(|()| symlink(&target, &link))
            }
            // No links here (Windows without the right to make them, some file systems): Python moves the blob then.
            Err(_) => fs::rename(&blob, &link),
            Ok(()) => Ok(()),
        };
        match made {
            Err(cause) if cause.kind() != ErrorKind::AlreadyExists => {
                Err(cause).context_path("cannot write to the cache of the hub", &link)
            }
            // Another process was quicker.
            _ => Ok(()),
        }
    }

    /// Waits until nobody else downloads this blob. `waiting` is called once if somebody does, and `check` now and then.
    ///
    /// # Errors
    /// What `check` says; a cache that cannot be written to.
    pub fn lock(&self, etag: &str, check: &dyn Fn() -> Result<()>, waiting: impl FnOnce()) -> Result<Lock> {
        let path = self.locks.join(format!("{etag}.lock"));
        create(parent(&path))?;
        let what = "cannot lock the cache of the hub";
        let file = open_lock(&path).context_path(what, &path)?;
        let mut waiting = Some(waiting);
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Lock(Some(file))),
                Err(TryLockError::WouldBlock) => {
                    waiting.take().into_iter().for_each(|waiting| waiting());
                    check()?;
                    std::thread::sleep(LOCK_LOOK);
                }
                // Some network file systems have no locks. Two downloads at once write the same bytes to the same
                // places, and each compares what came with its hash.
                Err(TryLockError::Error(cause)) if no_locks(&cause) => return Ok(Lock(None)),
                Err(TryLockError::Error(cause)) => return Err(cause).context_path(what, &path),
            }
        }
    }
}

/// Released when dropped.
pub(super) struct Lock(Option<File>);

impl Drop for Lock {
    fn drop(&mut self) {
        if let Some(file) = &self.0 {
            let _ = file.unlock();
        }
    }
}

/// Opens a lock file. Who may not write to one of another user's may still lock it.
fn open_lock(path: &Path) -> io::Result<File> {
    match File::options().create(true).append(true).open(path) {
        Err(cause) if cause.kind() == ErrorKind::PermissionDenied => File::open(path),
        opened => opened,
    }
}

fn no_locks(cause: &io::Error) -> bool {
    // ENOLCK, ENOSYS and EOPNOTSUPP (and macOS's ENOTSUP) have no kind of their own everywhere.
    let codes: &[i32] = if cfg!(target_os = "macos") { &[45, 77, 78, 102] } else { &[37, 38, 95] };
    cause.kind() == ErrorKind::Unsupported || cause.raw_os_error().is_some_and(|code| codes.contains(&code))
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, link)
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("."))
}

fn create(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|cause| {
        Error::new("cannot write to the cache of the hub")
            .at_path(folder)
            .expected("a folder in which files can be made")
            .found(cause)
            .hint("HF_HOME names another place for it")
    })
}

/// A full commit hash.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether a path of a repository stays inside it, on every system.
pub(super) fn is_inside(path: &str) -> bool {
    let plain = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    let exact = path.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
    // What is a name here can be a path elsewhere.
    let odd: &[char] = if cfg!(windows) { &['\\', '\0', ':'] } else { &['\\', '\0'] };
    plain && exact && !path.contains(odd)
}

/// An etag as it names a blob: without quotes and the mark of weakness.
///
/// # Errors
/// One that cannot be the name of a file.
pub(super) fn blob_name(etag: &str) -> Result<String> {
    let name = etag.trim().trim_start_matches("W/").trim_matches('"');
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 200 || name.starts_with('.') || !name.chars().all(good) {
        return Err(Error::new("the hub names a file's content by something that cannot be a name")
            .expected("letters and digits, as in a hash")
            .found(format!("{:?}", name.chars().take(80).collect::<String>())));
    }
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::Kind;
    use crate::interrupt::Interrupt;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn folder(cache: &Path) -> Folder {
        Folder::new(cache, &RepoSpec { kind: Kind::Dataset, id: "o/n".into(), revision: "main".into() })
    }

    #[test]
    fn a_blob_is_seen_when_it_is_complete() {
        let cache = tempfile::tempdir().unwrap();
        let folder = folder(cache.path());
        assert_eq!(folder.root, cache.path().join("datasets--o--n"));
        folder.open_incomplete("ab").unwrap().write_all(b"content").unwrap();
        assert!(folder.listing(COMMIT).is_empty());
        folder.complete("ab").unwrap();
        for path in ["x.json", "data/deep/y.json"] {
            folder.link(COMMIT, path, "ab").unwrap();
            folder.link(COMMIT, path, "ab").unwrap();
            assert_eq!(fs::read(folder.file(COMMIT, path).unwrap()).unwrap(), b"content");
        }
        assert_eq!(folder.listing(COMMIT).into_iter().collect::<Vec<_>>(), ["data/deep/y.json", "x.json"]);
        let link = fs::read_link(folder.snapshot(COMMIT).join("data/deep/y.json")).unwrap();
        assert_eq!(link, Path::new("../../../../blobs/ab"));
        // A link to a deleted blob is no file, and can be mended.
        fs::remove_file(folder.blob("ab")).unwrap();
        assert!(folder.file(COMMIT, "x.json").is_none() && folder.listing(COMMIT).is_empty());
        fs::write(folder.blob("cd"), "new").unwrap();
        folder.link(COMMIT, "x.json", "cd").unwrap();
        assert_eq!(fs::read(folder.file(COMMIT, "x.json").unwrap()).unwrap(), b"new");
    }

    #[test]
    fn revisions_and_absent_files() {
        let cache = tempfile::tempdir().unwrap();
        let folder = folder(cache.path());
        assert_eq!(folder.commit_of("main"), None);
        assert_eq!(folder.commit_of(COMMIT).unwrap(), COMMIT);
        folder.point("refs/pr/1", COMMIT).unwrap();
        assert_eq!(folder.commit_of("refs/pr/1").unwrap(), COMMIT);
        // Readable for those who share the cache, as far as the umask says.
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
            let plain = cache.path().join("plain");
            fs::write(&plain, "").unwrap();
            assert_eq!(mode(&folder.root.join("refs/refs/pr/1")), mode(&plain));
        }
        folder.point(COMMIT, COMMIT).unwrap();
        assert!(!folder.root.join("refs").join(COMMIT).exists());
        fs::write(folder.root.join("refs/broken"), "../../etc").unwrap();
        assert_eq!(folder.commit_of("broken"), None);
        assert!(!folder.known_absent(COMMIT, "a/b.json"));
        folder.note_absent(COMMIT, "a/b.json");
        assert!(folder.known_absent(COMMIT, "a/b.json"));
    }

    #[test]
    fn a_lock_excludes_and_a_wish_to_stop_ends_the_wait() {
        let cache = tempfile::tempdir().unwrap();
        let folder = folder(cache.path());
        let interrupt = Interrupt::new();
        let held = folder.lock("ab", &|| interrupt.check(), || panic!("nobody holds it")).unwrap();
        folder.lock("cd", &|| interrupt.check(), || panic!("another blob is free")).unwrap();
        let mut waited = false;
        let second = folder.lock("ab", &|| interrupt.check(), || {
            waited = true;
            interrupt.request();
        });
        assert!(second.is_err() && waited);
        drop(held);
        folder.lock("ab", &|| Ok(()), || panic!("it was released")).unwrap();
    }

    #[test]
    fn names_from_outside_are_checked() {
        for good in ["a", "a/b.json", "a b", "..a"] {
            assert!(is_inside(good), "{good}");
        }
        for bad in ["", "/a", "../a", "a/../b", "a//b", "./a", "a/", "a\\b", "a\0"] {
            assert!(!is_inside(bad), "{bad:?}");
        }
        assert_eq!(blob_name("W/\"ab-1\"").unwrap(), "ab-1");
        for bad in ["", "\"\"", "../x", "a/b", ".hidden", "a b"] {
            assert!(blob_name(bad).is_err(), "{bad:?}");
        }
    }
}
