//! PTX to code that can be called: translate, compile, load. Everything compiled is kept on disk, under a
//! hash of all that went into it.

use std::collections::HashMap;
use std::ffi::{CStr, OsString, c_char, c_void};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::error::{Code, Error, Result};
use super::options::{Options, Sanitizer, Schedule};
use super::runtime::{Entry, Place, SOURCES};
pub use super::runtime::{Runtime, Stats};
use crate::ptx;

const COMMON_FLAGS: &[&str] =
    &["-std=c++17", "-fPIC", "-shared", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-g1"];

fn kernel_flags(options: &Options) -> Vec<&'static str> {
    let mut flags = vec!["-w", ["-O0", "-O1", "-O2"][options.optimize as usize]];
    match options.sanitizer {
        Sanitizer::None => {}
        // Inlined checks, and a watch on every register that is a variable, would cost the compiler minutes.
        Sanitizer::Address => flags.extend([
            "-fsanitize=address,alignment",
            "-fno-sanitize-recover=undefined",
            "--param=asan-instrumentation-with-call-threshold=0",
            "--param=asan-stack=0",
        ]),
        Sanitizer::Thread => flags.push("-fsanitize=thread"),
    }
    flags
}

fn runtime_flags(sanitizer: Sanitizer) -> &'static [&'static str] {
    match sanitizer {
        Sanitizer::None => &["-O2"],
        Sanitizer::Address => &["-O2", "-fsanitize=address"],
        // The runtime tells ThreadSanitizer what it does; its own accesses are none of the kernel's.
        Sanitizer::Thread => &["-O2", "-DCUEMU_TSAN", "-fno-tree-loop-distribute-patterns"],
    }
}

/// One kernel of a loaded module.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// As in the PTX.
    pub name: String,
    /// Bytes of each parameter.
    pub parameter_sizes: Vec<u32>,
    /// The launch bound, 0 if there is none.
    pub max_threads: u32,
    /// Bytes of `__shared__` variables, the dynamic ones excluded.
    pub static_shared_bytes: u32,
    entry: Entry,
}

impl Kernel {
    /// Runs one grid to its end, without streams or any check of the launch. `Err`: what the kernel did wrong.
    ///
    /// # Safety
    ///
    /// `parameters` points to one value for each parameter, each of the size and alignment of its type.
    pub unsafe fn launch(
        &self,
        grid: [u32; 3],
        block: [u32; 3],
        dynamic_shared_bytes: u64,
        parameters: &mut [*mut c_void],
        schedule: Schedule,
    ) -> Result<(), String> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_at(Place::default(), grid, block, dynamic_shared_bytes, parameters, schedule) }
    }

    /// The same on a device.
    ///
    /// # Safety
    ///
    /// As of [`launch`](Self::launch).
    pub(super) unsafe fn launch_at(
        &self,
        place: Place,
        grid: [u32; 3],
        block: [u32; 3],
        dynamic_shared_bytes: u64,
        parameters: &mut [*mut c_void],
        schedule: Schedule,
    ) -> Result<(), String> {
        let runtime = Runtime::load().map_err(|error| error.to_string())?;
        if parameters.len() != self.parameter_sizes.len() {
            return Err(format!("{} has {} parameters", self.name, self.parameter_sizes.len()));
        }
        // SAFETY: the caller's promise.
        unsafe { runtime.launch(self.entry, parameters, grid, block, dynamic_shared_bytes, schedule, place) }
    }
}

/// What one file of the translator's holds.
type Kernels = Arc<[Arc<Kernel>]>;

/// A module whose PTX is known to be sound. Each kernel is compiled when it is first asked for: a module may
/// hold dozens, of which a program uses two.
#[derive(Debug)]
pub struct Module {
    ptx: String,
    contents: ptx::Contents,
}

impl Module {
    /// Names of the kernels, in the order of the PTX.
    pub fn names(&self) -> &[String] {
        &self.contents.kernels
    }

    /// The kernel called `name`, if there is one.
    pub fn kernel(&self, name: &str) -> Result<Option<Arc<Kernel>>> {
        if !self.contents.kernels.iter().any(|known| known == name) {
            return Ok(None);
        }
        let cpp = match self.contents.shares_variables {
            true => ptx::translate(&self.ptx),
            false => ptx::translate_kernel(&self.ptx, name),
        };
        let kernels = compile_cpp(&cpp.map_err(invalid)?)?;
        Ok(kernels.iter().find(|kernel| kernel.name == name).cloned())
    }
}

fn invalid(error: ptx::Error) -> Error {
    Error::new(Code::INVALID_PTX, error.to_string())
}

/// Checks PTX, and that it can be run here.
pub fn compile(ptx: &str) -> Result<Module> {
    Runtime::load()?; // before any kernel, which needs it
    Ok(Module { ptx: ptx.to_owned(), contents: ptx::contents(ptx).map_err(invalid)? })
}

/// Compiles and loads what the translator wrote. Once loaded it stays until the process ends.
fn compile_cpp(cpp: &str) -> Result<Kernels> {
    static LOADED: LazyLock<Mutex<HashMap<String, Kernels>>> = LazyLock::new(Mutex::default);
    let loaded = || LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let options = Options::get()?;
    let headers = runtime_sources(options)?;
    let flags = kernel_flags(options);
    let mut job = Job::new("kernels", options, &flags)?;
    job.include = Some(headers);
    job.add("cpp", cpp);
    let key = job.key();
    if let Some(kernels) = loaded().get(&key) {
        return Ok(Arc::clone(kernels));
    }
    let path = job.build()?;
    // Another thread may have loaded the same file: the same library then, and an equal table.
    let kernels = load(&path)?;
    Ok(Arc::clone(loaded().entry(key).or_insert(kernels)))
}

/// `CuemuKernel`
#[repr(C)]
struct Row {
    name: *const c_char,
    entry: Entry,
    parameter_count: u32,
    parameter_sizes: *const u32,
    max_threads: u32,
    static_shared_bytes: u32,
}

fn load(path: &Path) -> Result<Kernels> {
    let failed = |error: libloading::Error| {
        Error::new(Code::SHARED_OBJECT_INIT_FAILED, format!("{}: {error}", path.display()))
    };
    // SAFETY: the translator wrote this library; it has no constructors, and the table that cuemu.h describes.
    unsafe {
        let library = Library::open(Some(path), RTLD_NOW | RTLD_LOCAL).map_err(failed)?;
        let count = **library.get::<*const u32>(b"cuemu_kernel_count\0").map_err(failed)?;
        let rows = *library.get::<*const Row>(b"cuemu_kernels\0").map_err(failed)?;
        let kernels = (0..count as usize).map(|index| {
            let row = &*rows.add(index);
            let sizes = match row.parameter_count {
                0 => &[],
                count => std::slice::from_raw_parts(row.parameter_sizes, count as usize),
            };
            Arc::new(Kernel {
                name: CStr::from_ptr(row.name).to_string_lossy().into_owned(),
                parameter_sizes: sizes.to_vec(),
                max_threads: row.max_threads,
                static_shared_bytes: row.static_shared_bytes,
                entry: row.entry,
            })
        });
        let kernels = kernels.collect();
        std::mem::forget(library);
        Ok(kernels)
    }
}

/// The folder with the sources of the runtime, written if it was not there.
fn runtime_sources(options: &Options) -> Result<PathBuf> {
    let mut hash = Hash::new();
    for (name, text) in SOURCES {
        hash.add(name).add(text);
    }
    let folder = options.cache.join(format!("runtime-{}", hash.hex()));
    if folder.is_dir() {
        return Ok(folder);
    }
    let fresh = temporary(&folder);
    let write = || -> io::Result<()> {
        fs::create_dir_all(&fresh)?;
        for (name, text) in SOURCES {
            fs::write(fresh.join(name), text)?;
        }
        Ok(())
    };
    write().map_err(|error| file_error(&fresh, &error))?;
    if let Err(error) = fs::rename(&fresh, &folder) {
        // Somebody else was faster, or it does not work at all.
        let _ = fs::remove_dir_all(&fresh);
        if !folder.is_dir() {
            return Err(file_error(&folder, &error));
        }
    }
    Ok(folder)
}

/// The compiled runtime.
pub(super) fn runtime_library(options: &Options) -> Result<PathBuf> {
    let folder = runtime_sources(options)?;
    let mut job = Job::new("runtime", options, runtime_flags(options.sanitizer))?;
    for (name, text) in SOURCES {
        job.hash.add(name).add(text);
        if name.ends_with(".cpp") {
            job.files.push(folder.join(name));
        }
    }
    job.include = Some(folder);
    job.build()
}

/// One run of the compiler.
struct Job<'a> {
    name: &'a str,
    options: &'a Options,
    flags: &'a [&'a str],
    include: Option<PathBuf>,
    /// What is there to compile, and what has to be written first.
    files: Vec<PathBuf>,
    texts: Vec<(String, String)>,
    hash: Hash,
}

impl<'a> Job<'a> {
    fn new(name: &'a str, options: &'a Options, flags: &'a [&'a str]) -> Result<Self> {
        let mut hash = Hash::new();
        hash.add(compiler_version(options)?).add(processor());
        for (_, text) in SOURCES.iter().filter(|(name, _)| name.ends_with(".h")) {
            hash.add(text);
        }
        for flag in COMMON_FLAGS.iter().chain(flags) {
            hash.add(flag);
        }
        Ok(Self { name, options, flags, include: None, files: Vec::new(), texts: Vec::new(), hash })
    }

    /// One more file to compile, which is nowhere yet.
    fn add(&mut self, ending: &str, text: &str) {
        self.hash.add(ending).add(text);
        self.texts.push((ending.to_string(), text.to_string()));
    }

    fn key(&self) -> String {
        format!("{}-{}-{}", self.name, self.options.sanitizer.name(), self.hash.hex())
    }

    /// The compiled library.
    fn build(mut self) -> Result<PathBuf> {
        let base = self.options.cache.join(self.key());
        let library = base.with_extension("so");
        if library.exists() {
            return Ok(library);
        }
        fs::create_dir_all(&self.options.cache).map_err(|error| file_error(&self.options.cache, &error))?;
        // Whoever else wants the same, in this process or another one, waits and then finds it.
        let lock = base.with_extension("lock");
        let file = File::create(&lock).map_err(|error| file_error(&lock, &error))?;
        file.lock().map_err(|error| file_error(&lock, &error))?;
        if library.exists() {
            return Ok(library);
        }
        for (ending, text) in &self.texts {
            let path = base.with_extension(ending);
            fs::write(&path, text).map_err(|error| file_error(&path, &error))?;
            self.files.push(path);
        }
        let fresh = temporary(&library);
        let mut command = compiler(self.options);
        command.args(COMMON_FLAGS).args(self.flags);
        if let Some(folder) = &self.include {
            command.arg("-I").arg(folder);
        }
        command.arg("-o").arg(&fresh).args(&self.files).args(["-lpthread", "-ldl"]);
        let output = command.output().map_err(|error| no_compiler(self.options, &error.to_string()))?;
        if !output.status.success() {
            let log = String::from_utf8_lossy(&output.stderr);
            let log: Vec<&str> = log.lines().take(12).collect();
            let files: Vec<String> = self.files.iter().map(|path| path.display().to_string()).collect();
            return Err(Error::new(
                Code::INVALID_PTX,
                format!("{} could not be compiled ({}):\n{}", files.join(" "), output.status, log.join("\n")),
            ));
        }
        fs::rename(&fresh, &library).map_err(|error| file_error(&library, &error))?;
        let _ = fs::remove_file(&lock);
        Ok(library)
    }
}

/// The compiler, which must not run under the sanitizer that this process runs under.
fn compiler(options: &Options) -> Command {
    let (program, arguments) =
        options.compiler.split_first().map_or(("g++", &[][..]), |(p, a)| (p.as_str(), a));
    let mut command = Command::new(program);
    command.args(arguments).env("LC_ALL", "C");
    for variable in ["LD_PRELOAD", "ASAN_OPTIONS", "TSAN_OPTIONS", "UBSAN_OPTIONS"] {
        command.env_remove(variable);
    }
    command
}

fn compiler_version(options: &Options) -> Result<&'static str> {
    static VERSION: OnceLock<Result<String>> = OnceLock::new();
    let ask = || match compiler(options).arg("--version").output() {
        Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => Err(no_compiler(options, &output.status.to_string())),
        Err(error) => Err(no_compiler(options, &error.to_string())),
    };
    VERSION.get_or_init(ask).as_ref().map(String::as_str).map_err(Clone::clone)
}

fn no_compiler(options: &Options, why: &str) -> Error {
    let command = options.compiler.join(" ");
    Error::new(
        Code::JIT_COMPILER_NOT_FOUND,
        format!(
            "the compiler `{command}` does not run ({why}): install g++, or name another one in CUEMU_CXX"
        ),
    )
}

/// What `-march=native` depends on.
fn processor() -> &'static str {
    static FLAGS: LazyLock<String> = LazyLock::new(|| {
        let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let mut lines: Vec<&str> = Vec::new();
        for name in ["vendor_id", "cpu family", "model\t", "flags", "Features"] {
            lines.extend(text.lines().find(|line| line.starts_with(name)));
        }
        lines.join("\n")
    });
    &FLAGS
}

fn file_error(path: &Path, error: &io::Error) -> Error {
    let advice = "set CUEMU_CACHE to a folder that can be written";
    Error::new(Code::OPERATING_SYSTEM, format!("{}: {error}: {advice}", path.display()))
}

/// A name beside `path` that nobody else uses.
fn temporary(path: &Path) -> PathBuf {
    static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let mut name = OsString::from(path);
    name.push(format!(".{}-{count}", process::id()));
    PathBuf::from(name)
}

/// FNV-1a, 128 bits wide.
struct Hash(u128);

impl Hash {
    fn new() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }

    fn add(&mut self, text: &str) -> &mut Self {
        for byte in text.bytes().chain([0xFF]) {
            self.0 = (self.0 ^ u128::from(byte)).wrapping_mul(0x0100_0000_0000_0000_0000_013B);
        }
        self
    }

    fn hex(&self) -> String {
        format!("{:032x}", self.0)
    }
}
