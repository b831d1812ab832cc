//! Where results go, checked before the first token and delivered in one step at the end.
//!
//! Files are written into a hidden folder beside the final one (so on the same file system) and renamed when all are
//! there: whoever finds the folder under its name finds it complete. A run that fails leaves nothing behind.

use super::log::Log;
use crate::error::{Error, Result};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use tempfile::{Builder, NamedTempFile, TempDir};

/// Hidden names of what is not delivered yet.
const PARTIAL_PREFIX: &str = ".gradlens_partial_";
/// The file systems in use allow 255 bytes a name; `_2` and its successors need a few.
const NAME_BYTES: usize = 250;

/// What the command line says about outputs.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputSpec {
    /// The folder in which the run's own folder is made; created if it is missing. Empty means the working directory.
    pub output_dir: PathBuf,
    /// Whether a folder is made at all.
    pub save_outputs: bool,
    /// Where the consolidated `.npz` goes; `.npz` is added if missing, as `np.savez` does. Without it, the folder
    /// gets `consolidated_results.npz`.
    pub save_consolidated: Option<PathBuf>,
    /// Name of the folder, from [`super::folder::FolderName`].
    pub folder_name: String,
}

impl OutputSpec {
    /// The same for one of several sites, which share a consolidated file's name: `run.npz`, `run_site_attn_out.npz`;
    /// `None`: the site that needs no name.
    pub fn of_site(mut self, site: Option<&str>) -> Self {
        if let (Some(path), Some(site)) = (&mut self.save_consolidated, site)
            && !names_a_folder(path)
        {
            let whole = with_npz(path);
            let stem = whole.file_stem().unwrap_or_default().to_string_lossy();
            *path = whole.with_file_name(format!("{stem}_site_{site}.npz"));
        }
        self
    }
}

/// What [`Target::finish`] put in place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delivered {
    /// The run's folder.
    pub folder: Option<PathBuf>,
    /// The consolidated `.npz`, in the folder or where the user wants it.
    pub consolidated: Option<PathBuf>,
}

/// An opened destination. Dropped without [`Target::finish`], it removes all that it made.
#[derive(Debug)]
pub struct Target {
    // Dropped in this order: the temporary things first, then the folders made for them, if those are empty again.
    folder: Option<Partial>,
    consolidated: Option<(NamedTempFile, PathBuf)>,
    _created: CreatedFolders,
}

/// A file that is written in parts.
#[derive(Debug)]
pub struct Parts {
    file: File,
    /// Where it will be.
    path: PathBuf,
}

impl Parts {
    /// Adds to the file.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|cause| not_written(&self.path, &cause))
    }
}

#[derive(Debug)]
struct Partial {
    temporary: TempDir,
    parent: PathBuf,
    name: String,
}

impl Target {
    /// Opens the destinations, so that a wrong path fails now and not after hours.
    pub fn prepare(spec: &OutputSpec) -> Result<Self> {
        let mut created = CreatedFolders(Vec::new());
        let folder = match spec.save_outputs {
            true => Some(Partial::open(spec, &mut created)?),
            false => None,
        };
        let consolidated = match &spec.save_consolidated {
            Some(path) => Some(open_consolidated(path)?),
            None => None,
        };
        Ok(Self { folder, consolidated, _created: created })
    }

    /// Whether the run's folder is written.
    pub fn has_folder(&self) -> bool {
        self.folder.is_some()
    }

    /// Whether anything is written at all.
    pub fn is_empty(&self) -> bool {
        self.folder.is_none() && self.consolidated.is_none()
    }

    /// Writes one file of the folder. Does nothing when no folder is asked for. A name can be used once.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let Some(partial) = &self.folder else { return Ok(()) };
        File::create_new(partial.temporary.path().join(name))
            .and_then(|mut file| file.write_all(bytes))
            .map_err(|cause| not_written(&partial.parent.join(&partial.name).join(name), &cause))
    }

    /// A file of the folder that is written in parts. A name can be used once.
    ///
    /// # Errors
    /// No folder is asked for; the file cannot be made.
    pub fn create(&self, name: &str) -> Result<Parts> {
        let Some(partial) = &self.folder else { return Err(Error::new("no folder is written")) };
        let path = partial.parent.join(&partial.name).join(name);
        let file = File::create_new(partial.temporary.path().join(name));
        Ok(Parts { file: file.map_err(|cause| not_written(&path, &cause))?, path })
    }

    /// Writes the consolidated `.npz`: to the path the user gave, else into the folder.
    pub fn write_consolidated(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.consolidated {
            Some((file, path)) => file.write_all(bytes).map_err(|cause| not_written(path, &cause)),
            None => self.write(super::CONSOLIDATED, bytes),
        }
    }

    /// Puts several destinations in place. Where one cannot be, those before it are taken back.
    ///
    /// # Errors
    /// As [`Target::finish`].
    pub fn finish_all(targets: Vec<Self>, log: &Log) -> Result<Vec<Delivered>> {
        let mut delivered: Vec<Delivered> = Vec::new();
        for target in targets {
            match target.finish(log) {
                Ok(own) => delivered.push(own),
                Err(error) => {
                    for Delivered { folder, consolidated } in &delivered {
                        // The error says what failed; that something may stay is less than that.
                        let _ = folder.as_ref().map(fs::remove_dir_all);
                        let _ = consolidated.as_ref().map(fs::remove_file);
                    }
                    return Err(error);
                }
            }
        }
        Ok(delivered)
    }

    /// Puts everything under its final name and says where. `runtime_output.txt` is written here, because it holds
    /// these last lines too.
    ///
    /// A folder of the planned name that is there already keeps it; ours then ends in `_2`, `_3`, …
    pub fn finish(mut self, log: &Log) -> Result<Delivered> {
        let claim = self.folder.as_ref().map(Claim::take).transpose()?;
        let folder = claim.as_ref().map(|claim| claim.path.clone());
        let consolidated = match (&self.consolidated, &folder) {
            (Some((_, path)), _) => Some(path.clone()),
            (None, Some(folder)) => Some(folder.join(super::CONSOLIDATED)),
            (None, None) => None,
        };
        let mut lines = Vec::new();
        lines.extend(folder.as_ref().map(|path| format!("Results saved to: {}", path.display())));
        lines.extend(consolidated.as_ref().map(|path| format!("Consolidated results: {}", path.display())));

        let mut said = log.text();
        lines.iter().for_each(|line| said.extend([line, "\n"]));
        self.write("runtime_output.txt", said.as_bytes())?;

        if let Some((file, path)) = self.consolidated.take() {
            file.persist(&path).map_err(|error| not_written(&path, &error.error))?;
        }
        if let (Some(partial), Some(claim)) = (self.folder.take(), claim) {
            claim.fill(partial.temporary)?;
        }
        lines.iter().for_each(|line| log.out(line));
        Ok(Delivered { folder, consolidated })
    }
}

impl Partial {
    fn open(spec: &OutputSpec, created: &mut CreatedFolders) -> Result<Self> {
        if spec.folder_name.len() > NAME_BYTES {
            return Err(Error::new("the name of the results folder is too long")
                .at(&spec.folder_name)
                .expected(format!("at most {NAME_BYTES} bytes"))
                .found(format!("{} bytes", spec.folder_name.len()))
                .hint(
                    "the model's path is part of the name: give a shorter one, as through a symbolic link",
                ));
        }
        let parent = or_here(&spec.output_dir);
        created.create(&parent)?;
        let temporary = with_usual_permissions(Builder::new().prefix(PARTIAL_PREFIX), 0o777)
            .tempdir_in(&parent)
            .map_err(|cause| not_writable(&parent, &cause, "--output_dir"))?;
        Ok(Self { temporary, parent, name: spec.folder_name.clone() })
    }
}

/// Opens a temporary file beside the final path, which proves that the path can be written.
fn open_consolidated(path: &Path) -> Result<(NamedTempFile, PathBuf)> {
    let path = with_npz(path);
    if names_a_folder(&path) {
        return Err(Error::new("the consolidated results cannot be written over a folder")
            .at_path(&path)
            .expected("the path of a file")
            .found("the path of a folder")
            .hint("add a file name: --save_consolidated results/run.npz"));
    }
    let parent = or_here(path.parent().unwrap_or(Path::new("")));
    if !parent.is_dir() {
        return Err(Error::new("the consolidated results have no folder to go to")
            .at_path(&path)
            .expected(format!("the folder {}", parent.display()))
            .found(if parent.exists() { "a file of that name" } else { "nothing of that name" })
            .hint("make the folder first, or give another --save_consolidated"));
    }
    let file = with_usual_permissions(Builder::new().prefix(PARTIAL_PREFIX), 0o666)
        .tempfile_in(&parent)
        .map_err(|cause| not_writable(&parent, &cause, "--save_consolidated"))?;
    Ok((file, path))
}

/// `np.savez` adds the ending to a path that lacks it. Compared as text: `run.v2` has an extension and lacks it too.
fn with_npz(path: &Path) -> PathBuf {
    if path.as_os_str().as_encoded_bytes().ends_with(b".npz") || names_a_folder(path) {
        return path.to_owned();
    }
    let mut path: OsString = path.as_os_str().to_owned();
    path.push(".npz");
    path.into()
}

/// A folder that is there, or a path that can only be one (`x/`, `x/..`).
fn names_a_folder(path: &Path) -> bool {
    path.is_dir() || path.file_name().is_none() || path.as_os_str().as_encoded_bytes().ends_with(b"/")
}

fn or_here(path: &Path) -> PathBuf {
    if path.as_os_str().is_empty() { PathBuf::from(".") } else { path.to_owned() }
}

fn not_writable(folder: &Path, cause: &io::Error, flag: &str) -> Error {
    Error::new("results cannot be written to this folder")
        .at_path(folder)
        .expected("a folder in which files can be made")
        .found(cause)
        .hint(format!("name another place with {flag}"))
}

/// `path` is the final one: the user knows no other.
fn not_written(path: &Path, cause: &io::Error) -> Error {
    Error::new("results could not be written")
        .at_path(path)
        .expected("a file system that takes them")
        .found(cause)
        .hint("look at the free space and the quota there, and whether the folder was moved during the run")
}

/// Temporary things are private by default; delivered ones get what the user's umask allows.
fn with_usual_permissions<'a>(
    builder: &'a mut Builder<'static, 'static>,
    mode: u32,
) -> &'a mut Builder<'static, 'static> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(mode))
    }
    #[cfg(not(unix))]
    {
        let _ = mode;
        builder
    }
}

/// The final name, taken by making an empty folder: of two runs that finish at once, only one can.
struct Claim {
    path: PathBuf,
    filled: bool,
}

impl Claim {
    fn take(partial: &Partial) -> Result<Self> {
        let first = partial.parent.join(&partial.name);
        let mut path = first.clone();
        for number in 2_u32.. {
            match fs::create_dir(&path) {
                Ok(()) => break,
                Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => {
                    path = partial.parent.join(format!("{}_{number}", partial.name));
                }
                Err(cause) => return Err(not_writable(&first, &cause, "--output_dir")),
            }
        }
        Ok(Self { path, filled: false })
    }

    /// Renames the temporary folder over the empty one.
    fn fill(mut self, temporary: TempDir) -> Result<()> {
        if cfg!(not(unix)) {
            // Only POSIX lets a folder replace an empty folder.
            let _ = fs::remove_dir(&self.path);
        }
        fs::rename(temporary.path(), &self.path).map_err(|cause| not_written(&self.path, &cause))?;
        self.filled = true;
        let _ = temporary.keep(); // it has moved: nothing is left to remove
        Ok(())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.filled {
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// Folders that were made for this run, outermost first; removed again where nothing is in them.
#[derive(Debug)]
struct CreatedFolders(Vec<PathBuf>);

impl CreatedFolders {
    fn create(&mut self, folder: &Path) -> Result<()> {
        let missing: Vec<PathBuf> = folder
            .ancestors()
            .take_while(|ancestor| {
                !ancestor.as_os_str().is_empty() && fs::symlink_metadata(ancestor).is_err()
            })
            .map(Path::to_owned)
            .collect();
        for folder in missing.into_iter().rev() {
            match fs::create_dir(&folder) {
                Ok(()) => self.0.push(folder),
                Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => {} // made by someone else meanwhile
                Err(cause) => return Err(not_writable(&folder, &cause, "--output_dir")),
            }
        }
        if folder.is_dir() {
            return Ok(());
        }
        Err(Error::new("the output folder is not a folder")
            .at_path(folder)
            .expected("a folder, or a path that is free")
            .found("something else of that name")
            .hint("name another place with --output_dir"))
    }
}

impl Drop for CreatedFolders {
    fn drop(&mut self) {
        // `remove_dir` refuses a folder that holds anything, which is what we want.
        self.0.iter().rev().for_each(|folder| drop(fs::remove_dir(folder)));
    }
}
