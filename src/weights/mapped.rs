//! Files as bytes in memory that the kernel may drop and read again: weights never are memory of our own.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use crate::error::{Context, Error, Result};

/// Bytes that several tensors share: a mapped file or embedded data.
pub(super) type Bytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// How a file begins that git-lfs left in the place of the real one.
const LFS: &[u8] = b"version https://git-lfs";

/// Maps the file at `path`. Nothing of it is read yet.
///
/// # Errors
/// No such file, or it is none, or only a pointer of git-lfs.
pub(super) fn map(path: &Path) -> Result<Bytes> {
    let what = "cannot read a file of weights";
    let about = std::fs::metadata(path)
        .context_path(what, path)
        .map_err(|error| error.hint("the download may be incomplete: fetch the file again"))?;
    // A pipe would block at open and a folder cannot be mapped.
    if !about.is_file() {
        return Err(Error::new(what).at_path(path).expected("a file").found("something else"));
    }
    let bytes = map_file(&File::open(path).context_path(what, path)?).context_path(what, path)?;
    refuse_pointer((*bytes).as_ref(), "weights").map_err(|error| error.at_path(path))?;
    Ok(bytes)
}

/// Refuses a pointer of git-lfs where `kind` was expected.
pub(super) fn refuse_pointer(bytes: &[u8], kind: &str) -> Result<()> {
    if !bytes.starts_with(LFS) {
        return Ok(());
    }
    Err(Error::new("a file is only a pointer to the real one")
        .expected(kind)
        .found("a Git LFS pointer")
        .hint("run `git lfs pull` in the folder's repository"))
}

fn map_file(file: &File) -> io::Result<Bytes> {
    // SAFETY: the map is read-only and private to this process, but its bytes change (or the process gets
    // SIGBUS) if someone writes to or truncates the file meanwhile. Weights are not written to while in use: the
    // hub's cache renames finished files into place, our own temporary files have no name, and the documentation
    // of what is public passes the condition on. Every reader goes through `&[u8]` and treats values as data, so
    // a changed byte gives a wrong number, never an unchecked index.
    let map = unsafe { memmap2::Mmap::map(file) }?;
    Ok(Arc::new(map))
}

/// Where large temporary files belong (file-hierarchy(7)): the usual folder may be memory.
const LARGE_TEMPORARY: &str = "/var/tmp";
const CANNOT_KEEP: &str = "cannot keep weights in a temporary file";

/// What `write` writes, as the mapped pages of a temporary file without a name. It goes when its last user does. The
/// file is in TMPDIR where that is set.
///
/// # Errors
/// Those of `write`, or there is no space for the file.
pub(super) fn temporary(write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<Bytes> {
    let chosen = std::env::var_os("TMPDIR").is_some();
    let large = (!chosen).then(|| tempfile::tempfile_in(LARGE_TEMPORARY).ok()).flatten();
    let file = large.map_or_else(tempfile::tempfile, Ok);
    let mut writer = BufWriter::with_capacity(1 << 20, or_full(file)?);
    write(&mut writer)?;
    or_full(writer.flush())?;
    or_full(map_file(writer.get_ref()))
}

/// What an operation on such a file gave, with its error as the user reads it.
pub(super) fn or_full<T>(done: io::Result<T>) -> Result<T> {
    done.context(CANNOT_KEEP).map_err(|error| error.hint("set TMPDIR to a folder on a disk with more space"))
}
