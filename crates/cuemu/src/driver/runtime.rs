//! The runtime (`runtime/`, C++) as the driver sees it: the `extern "C"` part of cuemu.h.
//!
//! Its sources are embedded in this library, compiled when they are first needed, and loaded so that the
//! kernels, which are compiled on their own, find them.

use std::ffi::{c_char, c_int, c_void};
use std::ptr::NonNull;
use std::sync::{OnceLock, PoisonError, RwLock};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::error::{Code, Error, Result};
use super::jit;
use super::options::{Options, Sanitizer, Schedule};

/// The files of `runtime/` and their contents.
pub(super) const SOURCES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/runtime.rs"));

/// A translated kernel: takes a pointer to each parameter.
pub(super) type Entry = unsafe extern "C" fn(*mut *mut c_void);

/// `CuemuLaunch`
#[repr(C)]
struct Launch {
    entry: Entry,
    parameters: *mut *mut c_void,
    grid: [u32; 3],
    block: [u32; 3],
    dynamic_shared_bytes: u64,
    schedule: Schedule,
    place: Place,
}

/// Where a grid runs: the end of `CuemuLaunch`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Place {
    pub(super) device: u32,
    /// Bit i: kernels there reach the memory of device i, too.
    pub(super) peers: u64,
}

/// The device of memory that all devices reach.
pub(super) const ANY_DEVICE: u32 = u32::MAX;

/// `CuemuStats`: counters over all grids so far.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "named after what they count")]
pub struct Stats {
    pub switches: u64,
    pub blocks: u64,
    pub mma: u64,
    pub wgmma: u64,
    pub ldmatrix: u64,
    pub ldmatrix_conflicts: u64,
    pub cp_async: u64,
    pub tma: u64,
    pub shared_conflicts: u64,
}

/// Held for reading while something uses device memory, for writing while memory is freed.
static IN_USE: RwLock<()> = RwLock::new(());

/// Runs `body` while no device memory is freed. The tables of the driver may be locked within, not around.
pub(super) fn using_memory<T>(body: impl FnOnce() -> T) -> T {
    let _guard = IN_USE.read().unwrap_or_else(PoisonError::into_inner);
    body()
}

/// The loaded runtime.
#[derive(Debug)]
pub struct Runtime {
    launch: unsafe extern "C" fn(*const Launch, *mut c_char, usize) -> c_int,
    allocate: unsafe extern "C" fn(usize, u32, u32, u32) -> *mut c_void,
    begin: unsafe extern "C" fn(*mut c_void),
    free: unsafe extern "C" fn(*mut c_void),
    register: unsafe extern "C" fn(*mut c_void, usize),
    unregister: unsafe extern "C" fn(*mut c_void),
    stats: unsafe extern "C" fn(*mut Stats),
}

impl Runtime {
    /// The runtime; compiles and loads it the first time.
    pub fn load() -> Result<&'static Self> {
        static RUNTIME: OnceLock<Result<Runtime>> = OnceLock::new();
        RUNTIME.get_or_init(|| Self::open(Options::get()?)).as_ref().map_err(Clone::clone)
    }

    fn open(options: &Options) -> Result<Self> {
        require_sanitizer(options.sanitizer)?;
        let path = jit::runtime_library(options)?;
        let failed = |error: libloading::Error| {
            Error::new(Code::SHARED_OBJECT_INIT_FAILED, format!("{}: {error}", path.display()))
        };
        // SAFETY: the library was compiled from the embedded sources; loading it runs their constructors only.
        let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) }.map_err(failed)?;
        // SAFETY: cuemu.h declares the functions with these types. They stay, since the library does.
        let runtime = unsafe {
            Self {
                launch: *library.get(b"cuemu_launch\0").map_err(failed)?,
                allocate: *library.get(b"cuemu_alloc\0").map_err(failed)?,
                begin: *library.get(b"cuemu_begin\0").map_err(failed)?,
                free: *library.get(b"cuemu_free\0").map_err(failed)?,
                register: *library.get(b"cuemu_register\0").map_err(failed)?,
                unregister: *library.get(b"cuemu_unregister\0").map_err(failed)?,
                stats: *library.get(b"cuemu_stats\0").map_err(failed)?,
            }
        };
        std::mem::forget(library);
        Ok(runtime)
    }

    /// Memory that kernels on all devices reach: exactly `bytes` long, aligned to 256 bytes, filled with `poison`.
    /// `None`: there is none.
    pub fn allocate(&self, bytes: usize, poison: u32) -> Option<NonNull<u8>> {
        self.allocate_on(ANY_DEVICE, bytes, poison, false)
    }

    /// The same for memory of a device. `pending`: kernels may use it after [`begin`](Self::begin).
    pub(super) fn allocate_on(
        &self,
        device: u32,
        bytes: usize,
        poison: u32,
        pending: bool,
    ) -> Option<NonNull<u8>> {
        // SAFETY: any size may be asked for.
        NonNull::new(unsafe { (self.allocate)(bytes, poison, device, u32::from(pending)) }.cast())
    }

    /// Lets kernels use a block that was allocated as pending.
    pub(super) fn begin(&self, block: NonNull<u8>) {
        // SAFETY: the runtime looks the address up.
        unsafe { (self.begin)(block.as_ptr().cast()) }
    }

    /// Frees device memory, once nothing uses any.
    ///
    /// # Safety
    ///
    /// `block` comes from [`allocate`](Self::allocate) and has not been freed.
    pub unsafe fn free(&self, block: NonNull<u8>) {
        let _guard = IN_USE.write().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the caller's promise.
        unsafe { (self.free)(block.as_ptr().cast()) }
    }

    /// Lets kernels reach memory of the program.
    pub(super) fn register(&self, block: NonNull<u8>, bytes: usize) {
        // SAFETY: the runtime remembers the numbers; whether kernels may use the memory, the program has to know.
        unsafe { (self.register)(block.as_ptr().cast(), bytes) }
    }

    /// Takes back [`register`](Self::register), once no kernel runs.
    pub(super) fn unregister(&self, block: NonNull<u8>) {
        let _guard = IN_USE.write().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: as above.
        unsafe { (self.unregister)(block.as_ptr().cast()) }
    }

    /// Counters over all grids so far.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats::default();
        // SAFETY: `Stats` has the layout of `CuemuStats`.
        unsafe { (self.stats)(&mut stats) };
        stats
    }

    /// Runs one grid to its end. `Err`: what the kernel did wrong, and where.
    ///
    /// # Safety
    ///
    /// `parameters` points to one valid value for each parameter of `entry`.
    pub(super) unsafe fn launch(
        &self,
        entry: Entry,
        parameters: &mut [*mut c_void],
        grid: [u32; 3],
        block: [u32; 3],
        dynamic_shared_bytes: u64,
        schedule: Schedule,
        place: Place,
    ) -> Result<(), String> {
        let parameters = parameters.as_mut_ptr();
        let launch = Launch { entry, parameters, grid, block, dynamic_shared_bytes, schedule, place };
        let mut text = [0_u8; 8192];
        // SAFETY: `Launch` has the layout of `CuemuLaunch`; the text has the length that is told.
        let failed = using_memory(|| unsafe { (self.launch)(&launch, text.as_mut_ptr().cast(), text.len()) });
        if failed == 0 {
            return Ok(());
        }
        let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
        Err(String::from_utf8_lossy(&text[..end]).into_owned())
    }
}

/// Code that is compiled with a sanitizer ends the process if the sanitizer was not there before everything else.
fn require_sanitizer(sanitizer: Sanitizer) -> Result<()> {
    let (symbol, library): (&[u8], _) = match sanitizer {
        Sanitizer::None => return Ok(()),
        Sanitizer::Address => (b"__asan_init\0", "libasan.so"),
        Sanitizer::Thread => (b"__tsan_init\0", "libtsan.so"),
    };
    // SAFETY: the symbol is looked for, not used.
    if unsafe { Library::this().get::<*const c_void>(symbol) }.is_ok() {
        return Ok(());
    }
    let name = sanitizer.name();
    Err(Error::new(
        Code::SHARED_OBJECT_INIT_FAILED,
        format!(
            "CUEMU_SANITIZER={name} needs LD_PRELOAD=$(g++ -print-file-name={library}); `cuemu --sanitize {name} \
             COMMAND` sets both"
        ),
    ))
}
