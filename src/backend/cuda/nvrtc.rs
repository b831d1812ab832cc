//! NVIDIA's run-time compiler: where it is found, and one call that compiles a kernel file.
//!
//! NVRTC is loaded when it is first needed, so the program neither links nor requires it. Its functions are
//! taken from the very file that was chosen (`api`): the loader's own path first, then pip and conda layouts
//! and toolkit folders (`places`).

mod api;
mod places;

use std::env;
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use api::{Api, Candidate};
use libloading::Library;
use places::{Files, LOADER_NAMES};

use crate::error::{Error, Result};

/// Names a folder that holds NVRTC, or the library file itself; empty: not set.
pub const NVRTC_VARIABLE: &str = "GRADLENS_NVRTC";

/// The first major version that knows compute capability 9.0's own instructions (12.0: `sm_90a`).
const MIN_MAJOR: i32 = 12;

/// What can be had from the compiler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// Machine code for exactly one architecture.
    Cubin,
    /// Portable assembly, which the driver compiles.
    Ptx,
}

/// What NVRTC made of a source.
pub struct Compiled {
    /// The cubin, or PTX without a terminating zero.
    pub image: Vec<u8>,
    /// Warnings, and the assembler's report when it was asked for (`--ptxas-options=-v`).
    pub log: String,
}

/// The loaded compiler.
#[derive(Clone, Debug)]
pub struct Nvrtc {
    /// (major, minor), e.g. (13, 0).
    pub version: (i32, i32),
    /// Where it was loaded from; `None`: the loader's own path.
    pub path: Option<PathBuf>,
    /// The architectures it compiles for, as 10·major + minor: 90 for compute capability 9.0.
    pub archs: Vec<i32>,
    api: Api,
}

impl Nvrtc {
    /// The compiler of this process; loads it on the first call.
    ///
    /// # Errors
    ///
    /// No NVRTC of CUDA 12 or newer in any of the places, or it cannot be loaded; the error says what was found,
    /// the hint how to get it.
    pub fn load() -> Result<&'static Self> {
        static LOADED: OnceLock<std::result::Result<Nvrtc, Vec<String>>> = OnceLock::new();
        LOADED.get_or_init(Self::search).as_ref().map_err(|tried| {
            Error::new("NVRTC, which compiles the CUDA kernels, was not found")
                .expected(format!("libnvrtc of CUDA {MIN_MAJOR} or 13"))
                .found(format!("nothing usable in {}", tried.join(", ")))
                .hint(format!(
                    "pip install nvidia-cuda-nvrtc-cu12 (driver 525 or newer) or nvidia-cuda-nvrtc (driver 580 or \
                     newer), in the active environment; or set CUDA_HOME, or {NVRTC_VARIABLE} to the folder with libnvrtc"
                ))
        })
    }

    /// Looks in the places in turn. Err: the places, and what is wrong with what was found there.
    fn search() -> std::result::Result<Self, Vec<String>> {
        let named = env::var_os(NVRTC_VARIABLE).filter(|named| !named.is_empty());
        if let Some(named) = named.map(PathBuf::from) {
            // What the user names is taken or refused; nothing else is tried behind their back.
            let name = format!("{NVRTC_VARIABLE}={}", named.display());
            return Self::of_place(&name, &[named]).map_err(|tried| vec![tried]);
        }
        let mut tried = Vec::new();
        let mut refused = Vec::new();
        for name in LOADER_NAMES {
            // A name that the loader does not know is no news; a version that is too old is.
            let Ok(candidate) = Candidate::open(Path::new(name)) else { continue };
            match Self::of(candidate) {
                Ok(found) => return Ok(found),
                Err(reason) => refused.push(format!("{reason} as {name}")),
            }
        }
        tried.push(with_reasons("the loader's path", &refused));
        let home = env::home_dir();
        for (name, folders) in places::places(|name| env::var_os(name), home.as_deref()) {
            match Self::of_place(&name, &folders) {
                Ok(found) => return Ok(found),
                Err(place) => tried.push(place),
            }
        }
        Err(tried)
    }

    /// The first usable NVRTC in `folders` (or files). Err: `name`, and why each file found there is not.
    fn of_place(name: &str, folders: &[PathBuf]) -> std::result::Result<Self, String> {
        let mut refused = Vec::new();
        for files in folders.iter().map(|folder| Files::of(folder)) {
            // NVRTC looks for its helper through the loader, which does not know this folder, but does find by
            // its SONAME what is loaded already.
            // SAFETY: NVIDIA's libraries have no preconditions on being loaded.
            let helpers: Vec<Library> =
                files.builtins.iter().filter_map(|file| unsafe { Library::new(file) }.ok()).collect();
            for file in &files.compilers {
                match Candidate::open(file).and_then(Self::of) {
                    Ok(found) => {
                        helpers.into_iter().for_each(std::mem::forget);
                        return Ok(Self { path: Some(file.clone()), ..found });
                    }
                    Err(reason) => refused.push(format!("{reason} at {}", file.display())),
                }
            }
        }
        Err(with_reasons(name, &refused))
    }

    /// Err: why it cannot be used.
    fn of(candidate: Candidate) -> std::result::Result<Self, String> {
        let version = candidate.version;
        if version.0 < MIN_MAJOR {
            return Err(format!("NVRTC {}.{}", version.0, version.1));
        }
        let api = candidate.keep()?;
        Ok(Self { version, path: None, archs: api.archs()?, api })
    }

    /// Compiles the source `file`. `headers`: what it may include, (name, text). `arch`: `sm_90a` for a cubin,
    /// `compute_90a` for PTX. `more`: options of NVRTC besides [`options`].
    ///
    /// # Errors
    ///
    /// The source does not compile: the log is in the error.
    pub fn compile(
        &self,
        file: &str,
        text: &str,
        headers: &[(&str, &str)],
        arch: &str,
        code: Code,
        more: &[&str],
    ) -> Result<Compiled> {
        let failed = |what: &str| Error::new(format!("NVRTC {what}")).at(format!("kernels/{file}"));
        let c_string =
            |text: &str| CString::new(text).map_err(|_| failed("cannot read a source with a zero byte"));
        let (text, name) = (c_string(text)?, c_string(file)?);
        let headers = headers
            .iter()
            .map(|(name, text)| Ok((c_string(name)?, c_string(text)?)))
            .collect::<Result<Vec<_>>>()?;
        let options = options(arch);
        let options = options.iter().map(String::as_str).chain(more.iter().copied());
        let options = options.map(c_string).collect::<Result<Vec<_>>>()?;

        let program = self
            .api
            .program(&text, &name, &headers)
            .map_err(|error| failed("could not start").found(error))?;
        let outcome = program.compile(&options);
        let log = String::from_utf8_lossy(&program.log().unwrap_or_default()).into_owned();
        outcome.map_err(|error| {
            failed(&format!("cannot compile this source for {arch}: {error}")).found(&log)
        })?;
        let image = match code {
            Code::Ptx => program.ptx(),
            Code::Cubin => program.cubin(),
        };
        Ok(Compiled { image: image.map_err(|error| failed("gave no code").found(error))?, log })
    }
}

/// The options with which kernels are compiled; `arch` as for [`Nvrtc::compile`].
pub fn options(arch: &str) -> Vec<String> {
    vec![format!("--gpu-architecture={arch}"), "--std=c++17".to_owned(), "-lineinfo".to_owned()]
}

/// A place, and what is wrong with what was found there.
fn with_reasons(place: &str, reasons: &[String]) -> String {
    if reasons.is_empty() { place.to_owned() } else { format!("{place} ({})", reasons.join("; ")) }
}
