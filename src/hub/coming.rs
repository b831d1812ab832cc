//! The bytes of one file as they come: what is here already, and the hash that the etag is.

use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;

use sha1::{Digest, Sha1};
use sha2::Sha256;

use super::cache::Folder;
use crate::error::{Context, Result};

const BUFFER_BYTES: usize = 1 << 18;

/// An `.incomplete` file that grows.
pub(super) struct Coming {
    file: File,
    path: PathBuf,
    have: u64,
    hash: Hash,
    /// Bytes it will have.
    expected: u64,
}

/// How the content is compared with its etag.
enum Hash {
    /// The etag of a large file.
    Sha256(Sha256),
    /// The etag of a file in git: the hash of a blob there.
    Git(Sha1),
    /// An etag of another kind.
    None,
}

impl Hash {
    fn new(etag: &str, expected: u64) -> Self {
        let is_hash = etag.bytes().all(|byte| byte.is_ascii_hexdigit());
        match etag.len() {
            64 if is_hash => Self::Sha256(Sha256::new()),
            40 if is_hash => Self::Git(Sha1::new_with_prefix(format!("blob {expected}\0"))),
            _ => Self::None,
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Git(hash) => hash.update(bytes),
            Self::None => {}
        }
    }

    fn restart(&mut self, expected: u64) {
        match self {
            Self::Sha256(hash) => hash.reset(),
            Self::Git(hash) => *hash = Sha1::new_with_prefix(format!("blob {expected}\0")),
            Self::None => {}
        }
    }
}

impl Coming {
    /// Goes on after what came before, unless that cannot be the start of the content. `check` may end the reading
    /// of it.
    pub fn resume(
        folder: &Folder,
        etag: &str,
        expected: u64,
        check: &dyn Fn() -> Result<()>,
    ) -> Result<Self> {
        let what = "cannot read what was downloaded before";
        let path = folder.incomplete(etag);
        let file = folder.open_incomplete(etag)?;
        let have = file.metadata().context_path(what, &path)?.len();
        let mut coming =
            Self { file, path: path.clone(), have: 0, hash: Hash::new(etag, expected), expected };
        if have > expected {
            coming.file.set_len(0).context_path(what, &path)?;
        }
        // Read whatever the hash is: a file system may know a length whose bytes it cannot give.
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            check()?;
            let read = coming.file.read(&mut buffer).context_path(what, &path)?;
            if read == 0 {
                return Ok(coming);
            }
            coming.hash.update(&buffer[..read]);
            coming.have += read as u64;
        }
    }

    /// Bytes that are here.
    pub fn have(&self) -> u64 {
        self.have
    }

    /// Forgets what came.
    pub fn restart(&mut self) -> std::io::Result<()> {
        // Opened anew: where locks do not exclude, another process may have given the old one its name by now.
        self.file = File::create(&self.path)?;
        self.have = 0;
        self.hash.restart(self.expected);
        Ok(())
    }

    /// Adds what came.
    pub fn push(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.file.write_all(bytes)?;
        self.have += bytes.len() as u64;
        self.hash.update(bytes);
        Ok(())
    }

    /// The hash of what is here, in the form of an etag.
    pub fn found(&self) -> Option<String> {
        match &self.hash {
            Hash::Sha256(hash) => Some(format!("{:x}", hash.clone().finalize())),
            Hash::Git(hash) => Some(format!("{:x}", hash.clone().finalize())),
            Hash::None => None,
        }
    }

    /// Makes sure that the bytes are on the disk before the file gets its name.
    pub fn finish(&self, folder: &Folder, etag: &str) -> Result<()> {
        self.file.sync_data().context_path("cannot write to the cache of the hub", folder.blob(etag))
    }

    /// Removes the file.
    pub fn discard(&self, folder: &Folder, etag: &str) {
        let _ = std::fs::remove_file(folder.incomplete(etag));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::{Kind, RepoSpec};

    #[test]
    fn hashes_are_those_of_git_and_of_large_files() {
        let cache = tempfile::tempdir().unwrap();
        let spec = RepoSpec { kind: Kind::Model, id: "o/n".into(), revision: "main".into() };
        let folder = Folder::new(cache.path(), &spec);
        // `printf hello | git hash-object --stdin`, and `printf hello | sha256sum`.
        for etag in [
            "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0",
            "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
        ] {
            let resume = || Coming::resume(&folder, etag, 5, &|| Ok(())).unwrap();
            let mut coming = resume();
            coming.push(b"hel").unwrap();
            let mut coming = resume();
            assert_eq!(coming.have(), 3);
            coming.push(b"lo").unwrap();
            assert_eq!(coming.found().unwrap(), etag);
            coming.restart().unwrap();
            assert_ne!(coming.found().unwrap(), etag);
            coming.push(b"hello!").unwrap();
            assert_ne!(coming.found().unwrap(), etag);
            // Longer than the content can be: nothing to go on with.
            assert_eq!(resume().have(), 0);
        }
        let other = Coming::resume(&folder, "abc", 5, &|| Ok(())).unwrap();
        assert!(other.found().is_none());
    }
}
