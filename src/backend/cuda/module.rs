//! Kernel files: embedded sources, compiled when first needed for the device at hand, kept on disk.
//!
//! A cubin (machine code for exactly this architecture) is preferred: it loads in a millisecond and does not
//! depend on the driver being as new as the compiler. PTX, which the driver translates, is taken when
//! `GRADLENS_CUDA_CODE=ptx` says so, and for architectures newer than the compiler.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::{env, fs};

use cudarc::driver::sys::CUfunction_attribute_enum as FunctionAttribute;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule};
use cudarc::nvrtc::Ptx;
use sha2::{Digest, Sha256};

use super::device::{DeviceInfo, driver_failed};
use super::nvrtc::{Code, Nvrtc};
use crate::error::{Context, Error, Result};

/// `ptx`: hand PTX to the driver; `cubin` or not set: machine code.
pub const CODE_VARIABLE: &str = "GRADLENS_CUDA_CODE";
/// Another folder for compiled kernels; empty: keep none.
pub const CACHE_VARIABLE: &str = "GRADLENS_CACHE";

/// One file below `kernels/`.
macro_rules! kernel_file {
    ($name:literal) => {
        ($name, Cow::Borrowed(include_str!(concat!("../../../kernels/", $name))))
    };
}

/// The texts of all kernel files.
#[derive(Clone)]
pub struct Sources {
    files: Vec<(&'static str, Cow<'static, str>)>,
}

impl Sources {
    /// As they were when the program was built.
    pub fn embedded() -> Self {
        Self {
            files: vec![
                kernel_file!("common.cuh"),
                kernel_file!("hopper.cuh"),
                kernel_file!("linear.cu"),
                kernel_file!("linear_sm90.cu"),
                kernel_file!("norm.cu"),
                kernel_file!("stats.cu"),
            ],
        }
    }

    /// The same with one place of one file changed: how tests plant faults.
    ///
    /// # Errors
    ///
    /// No such file, or `from` does not occur in it exactly once.
    pub fn with(mut self, file: &str, from: &str, to: &str) -> Result<Self> {
        let missing = || Error::new("no such kernel file").found(file);
        let (_, text) = self.files.iter_mut().find(|(name, _)| *name == file).ok_or_else(missing)?;
        match text.matches(from).count() {
            1 => *text = Cow::Owned(text.replacen(from, to, 1)),
            count => {
                return Err(Error::new("a change needs exactly one place")
                    .at(file)
                    .expected(from)
                    .found(format!("{count} places")));
            }
        }
        Ok(self)
    }

    /// The same and one file more.
    pub fn and(mut self, file: &'static str, text: impl Into<Cow<'static, str>>) -> Self {
        self.files.push((file, text.into()));
        self
    }

    /// Names of the files that hold kernels.
    pub fn kernel_files(&self) -> impl Iterator<Item = &'static str> {
        self.files.iter().map(|(name, _)| *name).filter(|name| name.ends_with(".cu"))
    }

    /// The text of a file.
    pub fn text(&self, file: &str) -> Option<&str> {
        self.files.iter().find(|(name, _)| *name == file).map(|(_, text)| text.as_ref())
    }

    /// What kernel files may include: (name, text).
    pub fn headers(&self) -> Vec<(&str, &str)> {
        self.files
            .iter()
            .filter(|(name, _)| name.ends_with(".cuh"))
            .map(|(name, text)| (*name, text.as_ref()))
            .collect()
    }

    /// Name and parameters of each entry point of a file, as its text declares them. Entry points are written
    /// out (`extern "C" __global__ void …`), never by a macro, so that this finds them.
    pub fn entry_points(text: &str) -> HashMap<String, Vec<String>> {
        let text = without_comments(text);
        let declarations = text.split("extern \"C\" __global__").skip(1).filter_map(|rest| {
            // … __launch_bounds__(256, 2) name(parameters) {
            let head = &rest[..rest.find('{')?];
            let close = head.rfind(')')?;
            let open = matching_open(head, close)?;
            let name = head[..open].trim_end().rsplit(|c: char| !c.is_alphanumeric() && c != '_').next()?;
            Some((name.to_owned(), parameters(&head[open + 1..close])))
        });
        declarations.collect()
    }
}

/// The text with comments blanked out.
fn without_comments(text: &str) -> String {
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    let mut text = lines.flat_map(|line| [line, "\n"]).collect::<String>();
    while let Some(start) = text.find("/*") {
        let end = text[start..].find("*/").map_or(text.len(), |end| start + end + 2);
        text.replace_range(start..end, " ");
    }
    text
}

/// The parenthesis that `close` ends.
fn matching_open(text: &str, close: usize) -> Option<usize> {
    let mut level = 0;
    for (at, c) in text[..=close].char_indices().rev() {
        match c {
            ')' => level += 1,
            '(' => level -= 1,
            _ => {}
        }
        if level == 0 {
            return Some(at);
        }
    }
    None
}

/// The declarations of a parameter list, spaces normalised.
fn parameters(list: &str) -> Vec<String> {
    let each = list.split(',').map(normalised);
    each.filter(|parameter| !parameter.is_empty()).collect()
}

/// A C declaration with spaces only where words meet: `const float* __restrict__ x` and `const float *x` are
/// the same parameter.
pub(super) fn normalised(declaration: &str) -> String {
    let spaced =
        declaration.replace("__restrict__", " ").replace("__grid_constant__", " ").replace('*', " * ");
    spaced.split_whitespace().collect::<Vec<_>>().join(" ").replace(" *", "*")
}

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
    loaded: Mutex<HashMap<String, Arc<Module>>>,
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
    entry_points: HashMap<String, Vec<String>>,
}

/// An entry point, ready to be launched.
#[derive(Clone)]
pub struct Kernel {
    /// As the driver knows it.
    pub function: CudaFunction,
    /// Name of the entry point.
    pub name: &'static str,
    /// The file it stands in.
    pub file: &'static str,
    /// Its parameters as declared.
    pub parameters: Arc<Vec<String>>,
}

impl Modules {
    /// Kernels for the device behind `context`.
    pub(super) fn new(context: &Arc<CudaContext>, info: &DeviceInfo, spec: ModuleSpec) -> Self {
        let ModuleSpec { sources, code, cache } = spec;
        let target = Target { arch: info.arch(), code };
        Self { context: Arc::clone(context), sources, target, cache, loaded: Mutex::default() }
    }

    /// The entry point `name` of `file`; compiles and loads the file on first use.
    ///
    /// # Errors
    ///
    /// NVRTC is missing, the file does not compile or load, or has no such entry point.
    pub fn kernel(&self, file: &'static str, name: &'static str) -> Result<Kernel> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let module = match loaded.get(file) {
            Some(module) => Arc::clone(module),
            None => {
                let module = Arc::new(self.load(file)?);
                loaded.insert(file.to_owned(), Arc::clone(&module));
                module
            }
        };
        drop(loaded);
        let missing = || Error::new(format!("no entry point {name}")).at(format!("kernels/{file}"));
        let parameters = module.entry_points.get(name).ok_or_else(missing)?;
        let function = module
            .module
            .load_function(name)
            .map_err(|error| driver_failed(&format!("has no kernel {name}"), error))?;
        Ok(Kernel { function, name, file, parameters: Arc::new(parameters.clone()) })
    }

    fn load(&self, file: &str) -> Result<Module> {
        let missing = || Error::new("no such kernel file").found(file);
        let text = self.sources.text(file).ok_or_else(missing)?;
        let nvrtc = Nvrtc::load()?;
        let target = self.target.clone().known_to(nvrtc);
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
        Ok(Module { module, entry_points: Sources::entry_points(text) })
    }

    /// The cache's name for what `file` compiles to: everything that decides it.
    fn entry_name(&self, file: &str, text: &str, nvrtc: &Nvrtc, target: &Target) -> String {
        let mut hash = Sha256::new();
        let mut field = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        let (major, minor) = nvrtc.version;
        field(format!("1 {major}.{minor} {target}").as_bytes());
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
    /// Machine code where the compiler knows the architecture, else PTX for the newest it knows.
    fn known_to(self, nvrtc: &Nvrtc) -> Self {
        let number = self.arch.trim_end_matches('a').parse::<i32>().unwrap_or(0);
        match nvrtc.newest_arch() {
            Some(newest) if newest < number => Self { arch: newest.to_string(), code: Code::Ptx },
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
        let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        self.function.set_attribute(attribute, bytes as i32).map_err(|error| {
            driver_failed(
                &format!("does not give kernel {} {bytes} bytes of shared memory", self.name),
                error,
            )
            .at(format!("kernels/{}", self.file))
        })
    }
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
    fn entry_points_are_read_from_the_text() {
        let text = r#"
            // extern "C" __global__ void not_this(int x) {}
            extern "C" __global__ void __launch_bounds__(256, 2)
            first(const bf16* __restrict__ x, /* [N, D] */ float *y,
                  int rows) {
            }
            extern "C" __global__ void second() { if (x) {} }
        "#;
        let found = Sources::entry_points(text);
        assert_eq!(found.len(), 2);
        assert_eq!(found["first"], ["const bf16* x", "float* y", "int rows"]);
        assert!(found["second"].is_empty());
    }

    #[test]
    fn declarations_compare_without_spaces_and_qualifiers() {
        for same in ["const float* x", "const float *x", "const  float * __restrict__ x"] {
            assert_eq!(normalised(same), "const float* x");
        }
        assert_ne!(normalised("const float* x"), normalised("const float* y"));
    }

    #[test]
    fn a_change_needs_its_place() {
        let sources = Sources::embedded();
        assert!(sources.clone().with("nope.cu", "a", "b").is_err());
        assert!(sources.clone().with("common.cuh", "no such words", "").is_err());
        assert!(sources.clone().with("common.cuh", "__device__", "").is_err(), "occurs often");
        let changed = sources.with("common.cuh", "#pragma once", "#pragma twice").unwrap();
        assert!(changed.text("common.cuh").unwrap().contains("#pragma twice"));
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
