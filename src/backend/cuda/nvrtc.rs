//! NVIDIA's run-time compiler: where it is found, and one call that compiles a kernel file.
//!
//! NVRTC is loaded when it is first needed, so the program neither links nor requires it. cudarc looks for it
//! in the loader's path alone and panics where it is missing; [`Nvrtc::load`] looks further (pip and conda
//! layouts, toolkit folders) and loads what it finds by absolute path, after which cudarc's own search
//! succeeds by the library's SONAME.

use std::ffi::{CStr, CString, c_char};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::{env, fs, ptr};

use cudarc::nvrtc::{result, sys};

use crate::error::{Error, Result};

/// Names a folder that holds NVRTC, or the library file itself.
pub const NVRTC_VARIABLE: &str = "GRADLENS_NVRTC";

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
}

impl Nvrtc {
    /// The compiler of this process; loads it on the first call.
    ///
    /// # Errors
    ///
    /// No NVRTC in any of the places, or it cannot be loaded; the hint says how to get it.
    pub fn load() -> Result<&'static Self> {
        static LOADED: OnceLock<std::result::Result<Nvrtc, Vec<String>>> = OnceLock::new();
        LOADED.get_or_init(Self::search).as_ref().map_err(|tried| {
            Error::new("NVRTC, which compiles the CUDA kernels, was not found")
                .expected("libnvrtc of CUDA 12 or 13")
                .found(format!("nothing in {}", tried.join(", ")))
                .hint(format!(
                    "pip install nvidia-cuda-nvrtc-cu12 (driver 525 or newer) or nvidia-cuda-nvrtc (driver 580 or \
                     newer), in the active environment; or set CUDA_HOME, or {NVRTC_VARIABLE} to the folder with libnvrtc"
                ))
        })
    }

    /// Looks in the places in turn. Err: the places.
    fn search() -> std::result::Result<Self, Vec<String>> {
        let mut tried = Vec::new();
        if let Some(named) = env::var_os(NVRTC_VARIABLE).map(PathBuf::from) {
            // What the user names is taken or refused; nothing else is tried behind their back.
            tried.push(format!("{NVRTC_VARIABLE}={}", named.display()));
            let folder = if named.is_file() { named.parent().map(Path::to_owned) } else { Some(named) };
            return folder.and_then(|folder| preload(&folder)).and_then(Self::loaded).ok_or(tried);
        }
        // SAFETY: dlopen of NVRTC by its usual names; its initialisers have no preconditions.
        if unsafe { sys::is_culib_present() }
            && let Some(found) = Self::loaded(PathBuf::new())
        {
            return Ok(found);
        }
        tried.push("the loader's path".to_owned());
        for (name, folders) in places() {
            if let Some(found) = folders.iter().find_map(|folder| preload(folder)).and_then(Self::loaded) {
                return Ok(found);
            }
            tried.push(name);
        }
        Err(tried)
    }

    /// After the library is in the process. `path` is empty for the loader's own.
    fn loaded(path: PathBuf) -> Option<Self> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the library was loaded, so cudarc finds it; both pointers are valid for writes.
        let present =
            unsafe { sys::is_culib_present() && sys::nvrtcVersion(&mut major, &mut minor).result().is_ok() };
        let path = (!path.as_os_str().is_empty()).then_some(path);
        present.then_some(Self { version: (major, minor), path })
    }

    /// The newest architecture the compiler knows, as 10·major + minor: 90 for compute capability 9.0.
    pub fn newest_arch(&self) -> Option<i32> {
        let mut count = 0;
        // SAFETY: writes one integer.
        unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) }.result().ok()?;
        let mut archs = vec![0; usize::try_from(count).ok()?];
        // SAFETY: `archs` has room for the number just asked for.
        unsafe { sys::nvrtcGetSupportedArchs(archs.as_mut_ptr()) }.result().ok()?;
        archs.into_iter().max()
    }

    /// Compiles the source `file`. `headers`: what it may include, (name, text). `arch`: `sm_90a` for a cubin,
    /// `compute_90a` for PTX. `options`: further options of NVRTC.
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
        options: &[&str],
    ) -> Result<Compiled> {
        let failed = |what: &str| Error::new(format!("NVRTC {what}")).at(format!("kernels/{file}"));
        let c_string =
            |text: &str| CString::new(text).map_err(|_| failed("cannot read a source with a zero byte"));
        let (text, name) = (c_string(text)?, c_string(file)?);
        let header_names = headers.iter().map(|header| c_string(header.0)).collect::<Result<Vec<_>>>()?;
        let header_texts = headers.iter().map(|header| c_string(header.1)).collect::<Result<Vec<_>>>()?;
        let pointers =
            |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<*const c_char>>();
        let (names, texts) = (pointers(&header_names), pointers(&header_texts));

        let mut program = ptr::null_mut();
        // SAFETY: all strings live until after the call, which copies them; counts match.
        unsafe {
            sys::nvrtcCreateProgram(
                &mut program,
                text.as_ptr(),
                name.as_ptr(),
                headers.len() as i32,
                texts.as_ptr(),
                names.as_ptr(),
            )
        }
        .result()
        .map_err(|error| failed("could not start").found(error))?;
        let program = Program(program);

        let mut all =
            vec![format!("--gpu-architecture={arch}"), "--std=c++17".to_owned(), "-lineinfo".to_owned()];
        all.extend(options.iter().map(|option| (*option).to_owned()));
        // SAFETY: `program` is live.
        let outcome = unsafe { result::compile_program(program.0, &all) };
        // SAFETY: as above.
        let log = unsafe { result::get_program_log(program.0) }.unwrap_or_default();
        let log = text_of(&log);
        outcome.map_err(|error| {
            failed(&format!("cannot compile this source for {arch}: {error}")).found(&log)
        })?;

        let image = match code {
            // SAFETY: `program` is live and was compiled.
            Code::Ptx => unsafe { result::get_ptx(program.0) }.map(|ptx| text_of(&ptx).into_bytes()),
            Code::Cubin => program.cubin(),
        };
        Ok(Compiled { image: image.map_err(|error| failed("gave no code").found(error))?, log })
    }
}

/// A program of NVRTC, destroyed with this.
struct Program(sys::nvrtcProgram);

impl Program {
    fn cubin(&self) -> std::result::Result<Vec<u8>, result::NvrtcError> {
        let mut len = 0;
        // SAFETY: the program is live and was compiled; writes one size.
        unsafe { sys::nvrtcGetCUBINSize(self.0, &mut len) }.result()?;
        let mut image = vec![0_u8; len];
        // SAFETY: `image` has the size just asked for.
        unsafe { sys::nvrtcGetCUBIN(self.0, image.as_mut_ptr().cast()) }.result()?;
        Ok(image)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created by nvrtcCreateProgram and destroyed once.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

/// Up to the terminating zero.
fn text_of(bytes: &[c_char]) -> String {
    let bytes: &[u8] = bytemuck::cast_slice(bytes);
    CStr::from_bytes_until_nul(bytes).map_or_else(
        |_| String::from_utf8_lossy(bytes).into_owned(),
        |text| text.to_string_lossy().into_owned(),
    )
}

/// Loads NVRTC from `folder` for the rest of the process, its helper library first: NVRTC looks for that
/// through the loader alone, which does not know this folder. → the folder.
fn preload(folder: &Path) -> Option<PathBuf> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    let named = |path: &PathBuf, prefix: &str| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with(prefix) && name.contains(".so") && !name.contains(".alt.")
    };
    files.sort();
    let builtins = files.iter().rev().find(|path| named(path, "libnvrtc-builtins.so"));
    let library = files.iter().rev().find(|path| named(path, "libnvrtc.so"))?;
    for path in builtins.into_iter().chain([library]) {
        open_for_good(path)?;
    }
    Some(library.clone())
}

/// Loads a library where later lookups by its SONAME find it.
#[cfg(unix)]
fn open_for_good(path: &Path) -> Option<()> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    // SAFETY: NVIDIA's libraries have no preconditions on being loaded.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.ok()?;
    std::mem::forget(library);
    Some(())
}

/// Loads a library where later lookups by its name find it.
#[cfg(not(unix))]
fn open_for_good(path: &Path) -> Option<()> {
    // SAFETY: NVIDIA's libraries have no preconditions on being loaded.
    let library = unsafe { libloading::Library::new(path) }.ok()?;
    std::mem::forget(library);
    Some(())
}

/// Where else to look: (what the user knows it by, folders), in order.
fn places() -> Vec<(String, Vec<PathBuf>)> {
    let mut places = Vec::new();
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        match env::var_os(variable) {
            Some(root) => places.push((format!("{variable}={}", root.display()), toolkit(Path::new(&root)))),
            None => places.push((format!("{variable} (not set)"), Vec::new())),
        }
    }
    for variable in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        if let Some(prefix) = env::var_os(variable) {
            places.push((format!("{variable}={}", prefix.display()), python_prefix(Path::new(&prefix))));
        }
    }
    // Of an environment that was not activated but whose python comes first, and of the system's.
    let path = env::var_os("PATH").unwrap_or_default();
    let prefixes = env::split_paths(&path).filter(|bin| bin.join("python3").exists()).filter_map(|bin| {
        let python = bin.join("python3");
        let resolved = fs::canonicalize(&python).unwrap_or(python);
        Some([bin.parent()?.to_owned(), resolved.parent()?.parent()?.to_owned()])
    });
    let folders = prefixes.flatten().flat_map(|prefix| python_prefix(&prefix)).collect();
    places.push(("the packages of each python3 in PATH".to_owned(), folders));
    if let Some(home) = env::home_dir() {
        places.push(("~/.local".to_owned(), python_prefix(&home.join(".local"))));
    }
    places.push(("/usr/local/cuda".to_owned(), toolkit(Path::new("/usr/local/cuda"))));
    places
}

/// Library folders of a CUDA toolkit.
fn toolkit(root: &Path) -> Vec<PathBuf> {
    ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "bin"]
        .map(|lib| root.join(lib))
        .to_vec()
}

/// Library folders of pip's and conda's CUDA packages below a Python's prefix.
fn python_prefix(prefix: &Path) -> Vec<PathBuf> {
    let mut folders = vec![prefix.join("lib")];
    let pythons =
        fs::read_dir(prefix.join("lib")).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let mut pythons: Vec<PathBuf> = pythons
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python")))
        .collect();
    pythons.sort();
    for python in pythons {
        for site in ["site-packages", "dist-packages"] {
            for package in ["cu13", "cu12", "cuda_nvrtc"] {
                folders.push(python.join(site).join("nvidia").join(package).join("lib"));
            }
        }
    }
    folders
}
