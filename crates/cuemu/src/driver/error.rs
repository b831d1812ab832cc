//! What the driver answers: a `CUresult`, and the sentence behind it.
//!
//! A program only gets the code; the sentence it gets by asking `cuGetErrorString` for that code, as every
//! program does that wants to print an error. So the last sentence of every code is remembered, for each
//! thread, and for threads that saw none.

use std::any::Any;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::ffi::{CStr, CString, c_char};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{LazyLock, Mutex, PoisonError};

use super::abi::Out;

/// A `CUresult`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Code(pub i32);

macro_rules! codes {
    ($($name:ident = $value:literal, $text:literal;)*) => {
        #[allow(missing_docs, reason = "the names of cuda.h, each with its text")]
        impl Code {
            $(pub const $name: Self = Self($value);)*

            /// The name in cuda.h, and what `cuGetErrorString` says when it knows nothing better.
            fn describe(self) -> Option<(&'static str, &'static str)> {
                match self.0 {
                    0 => Some(("CUDA_SUCCESS", "no error")),
                    $($value => Some((concat!("CUDA_ERROR_", stringify!($name)), $text)),)*
                    _ => None,
                }
            }
        }
    };
}

codes! {
    INVALID_VALUE = 1, "invalid argument";
    OUT_OF_MEMORY = 2, "out of memory";
    NOT_INITIALIZED = 3, "initialization error";
    NO_DEVICE = 100, "no CUDA-capable device is detected";
    INVALID_DEVICE = 101, "invalid device ordinal";
    INVALID_IMAGE = 200, "device kernel image is invalid";
    INVALID_CONTEXT = 201, "invalid device context";
    NO_BINARY_FOR_GPU = 209, "no kernel image is available for execution on the device";
    UNSUPPORTED_LIMIT = 215, "limit is not supported on this architecture";
    INVALID_PTX = 218, "a PTX JIT compilation failed";
    JIT_COMPILER_NOT_FOUND = 221, "PTX JIT compiler library not found";
    UNSUPPORTED_PTX_VERSION = 222, "the provided PTX was compiled with an unsupported toolchain";
    FILE_NOT_FOUND = 301, "file not found";
    SHARED_OBJECT_INIT_FAILED = 303, "shared object initialization failed";
    OPERATING_SYSTEM = 304, "OS call failed or operation not supported on this OS";
    INVALID_HANDLE = 400, "invalid resource handle";
    NOT_FOUND = 500, "named symbol not found";
    NOT_READY = 600, "device not ready";
    ILLEGAL_ADDRESS = 700, "an illegal memory access was encountered";
    LAUNCH_OUT_OF_RESOURCES = 701, "too many resources requested for launch";
    PEER_ACCESS_ALREADY_ENABLED = 704, "peer access is already enabled";
    PEER_ACCESS_NOT_ENABLED = 705, "peer access has not been enabled";
    PRIMARY_CONTEXT_ACTIVE = 708, "cannot set while device is active in this process";
    CONTEXT_IS_DESTROYED = 709, "context is destroyed";
    HOST_MEMORY_ALREADY_REGISTERED = 712, "part or all of the requested memory range is already mapped";
    HOST_MEMORY_NOT_REGISTERED = 713, "pointer does not correspond to a registered memory region";
    MISALIGNED_ADDRESS = 716, "misaligned address";
    LAUNCH_FAILED = 719, "unspecified launch failure";
    COOPERATIVE_LAUNCH_TOO_LARGE = 720, "too many blocks in cooperative launch";
    NOT_SUPPORTED = 801, "operation not supported";
    UNKNOWN = 999, "unknown error";
}

/// A failed call: the code that the program gets, and the sentence that `cuGetErrorString` tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    code: Code,
    text: String,
}

/// The result of every fallible function of the driver.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// `code`, because of `text`.
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }

    /// `CUDA_ERROR_INVALID_VALUE`, because of `text`.
    pub fn invalid(text: impl Into<String>) -> Self {
        Self::new(Code::INVALID_VALUE, text)
    }

    /// `code`, with nothing to add.
    pub(super) fn plain(code: Code) -> Self {
        Self::new(code, code.describe().map_or("unknown error code", |(_, text)| text))
    }

    /// What the program gets.
    pub fn code(&self) -> Code {
        self.code
    }

    /// What happened.
    pub fn text(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.code.describe().map_or("CUDA error", |(name, _)| name);
        write!(f, "{name}: {}", self.text)
    }
}

impl std::error::Error for Error {}

/// The body of every driver function: nothing unwinds into the program, and what went wrong is remembered.
pub(super) fn guard(body: impl FnOnce() -> Result<()>) -> i32 {
    match no_panic(body) {
        Ok(()) => 0,
        Err(error) => {
            remember(&error);
            error.code.0
        }
    }
}

/// Runs `body`; a panic becomes `CUDA_ERROR_UNKNOWN`.
pub(super) fn no_panic(body: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        Err(Error::new(Code::UNKNOWN, format!("the stand-in driver panicked: {}", panic_text(&*panic))))
    })
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "no message",
    }
}

/// The last sentence of each code; `last` is that of the last error of all.
struct Texts {
    of_code: BTreeMap<Code, &'static CStr>,
    last: Option<&'static CStr>,
}

impl Texts {
    const EMPTY: Self = Self { of_code: BTreeMap::new(), last: None };

    fn set(&mut self, code: Code, text: &'static CStr) {
        self.of_code.insert(code, text);
        self.last = Some(text);
    }
}

static ANY_THREAD: Mutex<Texts> = Mutex::new(Texts::EMPTY);
thread_local! {
    static THIS_THREAD: RefCell<Texts> = const { RefCell::new(Texts::EMPTY) };
}

/// A string that lives as long as the process, as pointers handed to a program must. Equal ones are one.
pub(super) fn forever(text: &str) -> &'static CStr {
    static KEPT: LazyLock<Mutex<HashSet<&'static CStr>>> = LazyLock::new(Mutex::default);
    let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(same) = kept.get(text.as_c_str()) {
        return same;
    }
    let text: &'static CStr = Box::leak(text.into_boxed_c_str());
    kept.insert(text);
    text
}

fn remember(error: &Error) {
    if error.code == Code::NOT_READY {
        return; // the answer to a question, nothing that went wrong
    }
    let text = forever(&error.text);
    ANY_THREAD.lock().unwrap_or_else(PoisonError::into_inner).set(error.code, text);
    // A thread that is ending has no variables any more.
    let _ = THIS_THREAD.try_with(|texts| texts.borrow_mut().set(error.code, text));
}

fn recall(pick: impl Fn(&Texts) -> Option<&'static CStr>) -> Option<&'static CStr> {
    let here = THIS_THREAD.try_with(|texts| pick(&texts.borrow())).ok().flatten();
    here.or_else(|| pick(&ANY_THREAD.lock().unwrap_or_else(PoisonError::into_inner)))
}

/// Forgets every sentence.
pub(super) fn forget() {
    *ANY_THREAD.lock().unwrap_or_else(PoisonError::into_inner) = Texts::EMPTY;
    let _ = THIS_THREAD.try_with(|texts| *texts.borrow_mut() = Texts::EMPTY);
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorName(error: i32, name: Out<*const c_char>) -> i32 {
    guard(|| match Code(error).describe() {
        Some((text, _)) => name.put(forever(text).as_ptr()),
        None => Err(Error::invalid(format!("{error} is no error code"))),
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorString(error: i32, text: Out<*const c_char>) -> i32 {
    let code = Code(error);
    guard(|| match (recall(|texts| texts.of_code.get(&code).copied()), code.describe()) {
        (Some(told), _) => text.put(told.as_ptr()),
        (None, Some((_, usual))) => text.put(forever(usual).as_ptr()),
        (None, None) => Err(Error::invalid(format!("{error} is no error code"))),
    })
}

/// For tests: the sentence of the last error, of this thread if it had one. Empty if there was none.
#[unsafe(no_mangle)]
extern "C" fn cuemu_last_error() -> *const c_char {
    recall(|texts| texts.last).unwrap_or_default().as_ptr()
}
