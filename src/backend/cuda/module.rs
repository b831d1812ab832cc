//! Kernel files: embedded sources, compiled when first needed for the device at hand, kept on disk.
//!
//! A cubin (machine code for exactly this architecture) is preferred: it loads in a millisecond and does not
//! depend on the driver being as new as the compiler. PTX, which the driver translates, is taken when
//! `GRADLENS_CUDA_CODE=ptx` says so, and for architectures newer than the compiler.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{env, fs};

use cudarc::driver::sys::CUfunction_attribute_enum as FunctionAttribute;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule};
use cudarc::nvrtc::Ptx;
use sha2::{Digest, Sha256};

use super::device::{DeviceInfo, driver_failed};
use super::launch::Checked;
use super::nvrtc::{Code, Nvrtc, options};
use super::sources::Sources;
use crate::error::{Context, Error, Result};

/// `ptx`: hand PTX to the driver; `cubin` or not set: machine code.
pub const CODE_VARIABLE: &str = "GRADLENS_CUDA_CODE";
/// Another folder for compiled kernels; empty: keep none.
pub const CACHE_VARIABLE: &str = "GRADLENS_CACHE";

/// Which kernels, and how they reach the driver.
#[derive(Clone)]
pub struct ModuleSpec {
    /// What is compiled.
    pub sources: Sources,
    /// What the driver is handed.
    pub code: Code,
    /// Folder in which compiled kernels are kept; `None`: they are not.
    pub cache: Option<PathBuf>,
}

impl ModuleSpec {
    /// The embedded kernels, as the environment says ([`CODE_VARIABLE`], [`CACHE_VARIABLE`]).
    ///
    /// # Errors
    ///
    /// [`CODE_VARIABLE`] holds neither `cubin` nor `ptx`.
    pub fn from_environment() -> Result<Self> {
        let code = match env::var(CODE_VARIABLE).as_deref() {
            Err(_) | Ok("cubin") => Code::Cubin,
            Ok("ptx") => Code::Ptx,
            Ok(other) => {
                return Err(Error::usage(format!("{CODE_VARIABLE} is not understood"))
                    .expected("cubin or ptx")
                    .found(format!("{other:?}")));
            }
        };
        let cache = match env::var_os(CACHE_VARIABLE) {
            Some(folder) => (!folder.is_empty()).then(|| PathBuf::from(folder)),
            None => dirs::cache_dir().map(|folder| folder.join("gradlens")),
        };
        let cache = cache.map(|folder| folder.join("kernels"));
        Ok(Self { sources: Sources::embedded(), code, cache })
    }
}

/// The kernels of one device.
pub struct Modules {
    context: Arc<CudaContext>,
    sources: Sources,
    target: Target,
    cache: Option<PathBuf>,
    /// A file is locked by itself, so that one can be compiled while kernels of another are launched.
    files: Mutex<HashMap<&'static str, Arc<Mutex<Option<Module>>>>>,
}

/// What to compile for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Target {
    /// `90a`.
    arch: String,
    code: Code,
}

struct Module {
    module: Arc<CudaModule>,
    /// Parameters by name.
    entry_points: HashMap<String, Vec<String>>,
    /// Those that were asked for so far.
    kernels: HashMap<&'static str, Arc<Kernel>>,
}

/// An entry point, ready to be launched.
pub struct Kernel {
    /// As the driver knows it.
    pub function: CudaFunction,
    /// Name of the entry point.
    pub name: &'static str,
    /// The file it stands in.
    pub file: &'static str,
    /// Its parameters as declared.
    pub parameters: Vec<String>,
    /// Lists of arguments that match them.
    pub(super) checked: Mutex<Vec<Arc<Checked>>>,
    /// Dynamic shared memory that it may be launched with, as far as it was asked for.
    allowed_bytes: AtomicU32,
}

impl Modules {
    /// Kernels for the device behind `context`.
    pub(super) fn new(context: &Arc<CudaContext>, info: &DeviceInfo, spec: ModuleSpec) -> Self {
        let ModuleSpec { sources, code, cache } = spec;
        let target = Target { arch: info.arch(), code };
        Self { context: Arc::clone(context), sources, target, cache, files: Mutex::default() }
    }

    /// The entry point `name` of `file`; compiles and loads the file on first use.
    ///
    /// # Errors
    ///
    /// NVRTC is missing, the file does not compile or load, or has no such entry point.
    pub fn kernel(&self, file: &'static str, name: &'static str) -> Result<Arc<Kernel>> {
        let place = Arc::clone(lock(&self.files).entry(file).or_default());
        let mut place = lock(&place);
        let module = match &mut *place {
            Some(module) => module,
            none => none.insert(self.load(file)?),
        };
        if let Some(kernel) = module.kernels.get(name) {
            return Ok(Arc::clone(kernel));
        }
        let missing = || Error::new(format!("no entry point {name}")).at(format!("kernels/{file}"));
        let parameters = module.entry_points.get(name).ok_or_else(missing)?.clone();
        let function = module
            .module
            .load_function(name)
            .map_err(|error| driver_failed(&format!("has no kernel {name}"), error))?;
        let (checked, allowed_bytes) = (Mutex::default(), AtomicU32::new(0));
        let kernel = Arc::new(Kernel { function, name, file, parameters, checked, allowed_bytes });
        module.kernels.insert(name, Arc::clone(&kernel));
        Ok(kernel)
    }

    fn load(&self, file: &str) -> Result<Module> {
        let missing = || Error::new("no such kernel file").found(file);
        let text = self.sources.text(file).ok_or_else(missing)?;
        let nvrtc = Nvrtc::load()?;
        let target = self.target.clone().known_to(&nvrtc.archs);
        let entry =
            self.cache.as_ref().map(|folder| folder.join(self.entry_name(file, text, nvrtc, &target)));
        let image = match entry.as_deref().and_then(read_entry) {
            Some(image) => image,
            None => {
                let compiled =
                    nvrtc.compile(file, text, &self.sources.headers(), &target.option(), target.code, &[])?;
                if let Some(entry) = &entry {
                    // A cache that cannot be written costs the next run some seconds, nothing else.
                    let _ = write_entry(entry, &compiled.image);
                }
                compiled.image
            }
        };
        let image = match target.code {
            Code::Cubin => Ptx::from_binary(image),
            Code::Ptx => Ptx::from_src(String::from_utf8(image).context("NVRTC gave PTX that is not text")?),
        };
        let module = self.context.load_module(image).map_err(|error| {
            let (major, minor) = nvrtc.version;
            driver_failed(&format!("could not load kernels/{file}"), error)
                .expected(format!("a driver for code of NVRTC {major}.{minor} ({target})"))
                .hint("a driver older than NVRTC may refuse its code: update it, or install an older nvidia-cuda-nvrtc")
        })?;
        Ok(Module { module, entry_points: Sources::entry_points(text), kernels: HashMap::new() })
    }

    /// The cache's name for what `file` compiles to: everything that decides it.
    fn entry_name(&self, file: &str, text: &str, nvrtc: &Nvrtc, target: &Target) -> String {
        let mut hash = Sha256::new();
        let mut field = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        let (major, minor) = nvrtc.version;
        field(format!("2 {major}.{minor}").as_bytes());
        for option in options(&target.option()) {
            field(option.as_bytes());
        }
        field(text.as_bytes());
        for (name, text) in self.sources.headers() {
            field(name.as_bytes());
            field(text.as_bytes());
        }
        let digest: String = hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        format!("{}-{}-{digest}.bin", file.trim_end_matches(".cu"), target.arch)
    }
}

impl Target {
    /// The same where the compiler knows the architecture (`archs`: those it knows, 90 for 9.0), else PTX for the
    /// last one before it, which the driver brings up to date. Nothing known, or only newer ones: the same, and
    /// the compiler's own error.
    fn known_to(self, archs: &[i32]) -> Self {
        let number = self.arch.trim_end_matches('a').parse::<i32>().unwrap_or(0);
        match archs.iter().filter(|arch| **arch <= number).max() {
            Some(arch) if *arch != number => Self { arch: arch.to_string(), code: Code::Ptx },
            _ => self,
        }
    }

    /// Value of `--gpu-architecture`.
    fn option(&self) -> String {
        match self.code {
            Code::Cubin => format!("sm_{}", self.arch),
            Code::Ptx => format!("compute_{}", self.arch),
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.option())
    }
}

impl Kernel {
    /// Lets the kernel be launched with up to `bytes` of dynamic shared memory. More than 48 KB must be asked
    /// for.
    ///
    /// # Errors
    ///
    /// The device has less.
    pub fn allow_shared_bytes(&self, bytes: u32) -> Result<()> {
        if bytes <= self.allowed_bytes.load(Ordering::Relaxed) {
            return Ok(());
        }
        let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // What is no i32 is more than there is, too.
        let wanted = i32::try_from(bytes).unwrap_or(i32::MAX);
        self.function.set_attribute(attribute, wanted).map_err(|error| {
            driver_failed(
                &format!("does not give kernel {} {bytes} bytes of shared memory", self.name),
                error,
            )
            .at(format!("kernels/{}", self.file))
        })?;
        self.allowed_bytes.fetch_max(bytes, Ordering::Relaxed);
        Ok(())
    }
}

/// Locks what a panic elsewhere leaves whole.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A cache entry is the SHA-256 of the image, then the image: what was cut off or damaged is compiled again.
fn read_entry(path: &Path) -> Option<Vec<u8>> {
    let mut entry = fs::read(path).ok()?;
    if entry.len() <= 32 {
        return None;
    }
    let image = entry.split_off(32);
    (Sha256::digest(&image).as_slice() == entry).then_some(image)
}

/// Written beside its place and renamed, so that two processes can do it at once.
fn write_entry(path: &Path, image: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&Sha256::digest(image))?;
    file.write_all(image)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_compiler_does_not_know_becomes_ptx_for_what_it_knows() {
        let archs = [75, 80, 86, 89, 90, 100, 101, 120];
        let known = |arch: &str, code| Target { arch: arch.to_owned(), code }.known_to(&archs).option();
        for (arch, cubin, ptx) in [
            ("80", "sm_80", "compute_80"),
            ("90a", "sm_90a", "compute_90a"),
            ("120", "sm_120", "compute_120"),
            // Newer than the compiler, and older than its newest but not in its list.
            ("121", "compute_120", "compute_120"),
            ("103", "compute_101", "compute_101"),
            ("87", "compute_86", "compute_86"),
            // Left to the compiler's own words.
            ("70", "sm_70", "compute_70"),
        ] {
            assert_eq!((known(arch, Code::Cubin).as_str(), known(arch, Code::Ptx).as_str()), (cubin, ptx));
        }
        let target = Target { arch: "90a".to_owned(), code: Code::Cubin };
        assert_eq!(target.clone().known_to(&[]), target);
    }

    #[test]
    fn damaged_entries_are_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deeper").join("a.bin");
        write_entry(&path, b"the image").unwrap();
        assert_eq!(read_entry(&path).unwrap(), b"the image");
        let mut bytes = fs::read(&path).unwrap();
        for (change, name) in [(Some(40), "flipped"), (None, "cut")] {
            match change {
                Some(at) => bytes[at] ^= 1,
                None => bytes.truncate(20),
            }
            fs::write(&path, &bytes).unwrap();
            assert!(read_entry(&path).is_none(), "{name}");
        }
        assert!(read_entry(&folder.path().join("absent")).is_none());
    }
}
