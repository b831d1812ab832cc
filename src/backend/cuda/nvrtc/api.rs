//! NVRTC's functions, loaded from a file of the caller's choice.
//!
//! cudarc has them too, but from whatever library the loader finds under NVRTC's name first, which need not be
//! the one that was chosen.

use std::ffi::{CStr, CString, c_char, c_int};
use std::marker::PhantomData;
use std::path::Path;
use std::ptr;

use libloading::Library;

/// `nvrtcResult`; 0 is success.
type Status = c_int;
/// `nvrtcProgram`
type Handle = *mut std::ffi::c_void;
type Strings = *const *const c_char;

/// Declares the table of functions and how it is filled, each function under NVRTC's name for it.
macro_rules! functions {
    ($($field:ident = $name:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// NVRTC's functions, valid for the rest of the process.
        #[derive(Clone, Debug)]
        pub(super) struct Api {
            $($field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Api {
            /// `library` must be NVRTC of CUDA 12 or newer, which have all these functions.
            fn from(library: &Library) -> Result<Self, libloading::Error> {
                // SAFETY: the functions have these signatures in nvrtc.h, the same from CUDA 12 on.
                unsafe { Ok(Self { $($field: *library.get($name)?,)* }) }
            }
        }
    };
}

functions! {
    error_string = b"nvrtcGetErrorString\0": fn(Status) -> *const c_char;
    num_supported_archs = b"nvrtcGetNumSupportedArchs\0": fn(*mut c_int) -> Status;
    supported_archs = b"nvrtcGetSupportedArchs\0": fn(*mut c_int) -> Status;
    create_program = b"nvrtcCreateProgram\0":
        fn(*mut Handle, *const c_char, *const c_char, c_int, Strings, Strings) -> Status;
    destroy_program = b"nvrtcDestroyProgram\0": fn(*mut Handle) -> Status;
    compile_program = b"nvrtcCompileProgram\0": fn(Handle, c_int, Strings) -> Status;
    log_size = b"nvrtcGetProgramLogSize\0": fn(Handle, *mut usize) -> Status;
    log = b"nvrtcGetProgramLog\0": fn(Handle, *mut c_char) -> Status;
    ptx_size = b"nvrtcGetPTXSize\0": fn(Handle, *mut usize) -> Status;
    ptx = b"nvrtcGetPTX\0": fn(Handle, *mut c_char) -> Status;
    cubin_size = b"nvrtcGetCUBINSize\0": fn(Handle, *mut usize) -> Status;
    cubin = b"nvrtcGetCUBIN\0": fn(Handle, *mut c_char) -> Status;
}

/// A library that calls itself NVRTC.
pub(super) struct Candidate {
    library: Library,
    /// (major, minor)
    pub version: (i32, i32),
}

impl Candidate {
    /// Loads `file`: a path, or a bare name for the loader to find.
    ///
    /// # Errors
    ///
    /// It cannot be loaded, or is not NVRTC.
    pub fn open(file: &Path) -> Result<Self, String> {
        // SAFETY: NVIDIA's libraries have no preconditions on being loaded. Their symbols stay local, so two
        // versions in a process do not meet.
        let library = unsafe { Library::new(file) }.map_err(|error| error.to_string())?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the function has this signature in every version; both pointers are valid for writes.
        let status = unsafe {
            let version = library
                .get::<unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status>(b"nvrtcVersion\0")
                .map_err(|error| error.to_string())?;
            version(&mut major, &mut minor)
        };
        match status {
            0 => Ok(Self { library, version: (major, minor) }),
            _ => Err(format!("nvrtcVersion fails with {status}")),
        }
    }

    /// Its functions; the library stays for the rest of the process.
    ///
    /// # Errors
    ///
    /// It lacks one.
    pub fn keep(self) -> Result<Api, String> {
        let api = Api::from(&self.library).map_err(|error| error.to_string())?;
        std::mem::forget(self.library);
        Ok(api)
    }
}

/// A source, and what was made of it; destroyed with this.
pub(super) struct Program<'a> {
    api: &'a Api,
    handle: Handle,
    source: PhantomData<&'a CStr>,
}

impl Api {
    /// Ok for status 0, else NVRTC's words.
    fn checked(&self, status: Status) -> Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: takes any number; the answer is a string that is never freed.
        let text = unsafe { CStr::from_ptr((self.error_string)(status)) };
        Err(text.to_string_lossy().into_owned())
    }

    /// The architectures it compiles for, as 10·major + minor: 90 for compute capability 9.0.
    pub fn archs(&self) -> Result<Vec<i32>, String> {
        let mut count = 0;
        // SAFETY: writes one integer.
        self.checked(unsafe { (self.num_supported_archs)(&mut count) })?;
        let mut archs = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: `archs` has room for the number just asked for.
        self.checked(unsafe { (self.supported_archs)(archs.as_mut_ptr()) })?;
        Ok(archs)
    }

    /// A program of the source `text`, reported as `name`. `headers`: what it may include, (name, text).
    pub fn program<'a>(
        &'a self,
        text: &'a CStr,
        name: &'a CStr,
        headers: &'a [(CString, CString)],
    ) -> Result<Program<'a>, String> {
        let names = pointers(headers.iter().map(|header| header.0.as_c_str()));
        let texts = pointers(headers.iter().map(|header| header.1.as_c_str()));
        let mut handle = ptr::null_mut();
        let count = headers.len() as c_int;
        // SAFETY: the lists have `count` entries; the strings outlive the program, though it copies them.
        let status = unsafe {
            (self.create_program)(
                &mut handle,
                text.as_ptr(),
                name.as_ptr(),
                count,
                texts.as_ptr(),
                names.as_ptr(),
            )
        };
        self.checked(status)?;
        Ok(Program { api: self, handle, source: PhantomData })
    }
}

impl Program<'_> {
    /// Compiles. Err: NVRTC's word for the outcome; what is wrong stands in the log.
    pub fn compile(&self, options: &[CString]) -> Result<(), String> {
        let options = pointers(options.iter().map(CString::as_c_str));
        // SAFETY: the program is live, the list has that many strings, and is read during the call alone.
        let status =
            unsafe { (self.api.compile_program)(self.handle, options.len() as c_int, options.as_ptr()) };
        self.api.checked(status)
    }

    /// Warnings, errors, and reports that were asked for.
    pub fn log(&self) -> Result<Vec<u8>, String> {
        self.output(self.api.log_size, self.api.log).map(until_zero)
    }

    /// Portable assembly.
    pub fn ptx(&self) -> Result<Vec<u8>, String> {
        self.output(self.api.ptx_size, self.api.ptx).map(until_zero)
    }

    /// Machine code.
    pub fn cubin(&self) -> Result<Vec<u8>, String> {
        self.output(self.api.cubin_size, self.api.cubin)
    }

    /// What a pair of functions gives: the size, and so many bytes.
    fn output(
        &self,
        size: unsafe extern "C" fn(Handle, *mut usize) -> Status,
        bytes: unsafe extern "C" fn(Handle, *mut c_char) -> Status,
    ) -> Result<Vec<u8>, String> {
        let mut len = 0;
        // SAFETY: the program is live; writes one size.
        self.api.checked(unsafe { size(self.handle, &mut len) })?;
        let mut output = vec![0_u8; len];
        // SAFETY: the program is live; `output` has the size just asked for.
        self.api.checked(unsafe { bytes(self.handle, output.as_mut_ptr().cast()) })?;
        Ok(output)
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: created by nvrtcCreateProgram and destroyed once.
        unsafe { (self.api.destroy_program)(&mut self.handle) };
    }
}

fn pointers<'a>(strings: impl Iterator<Item = &'a CStr>) -> Vec<*const c_char> {
    strings.map(CStr::as_ptr).collect()
}

/// Without the terminating zero.
fn until_zero(mut bytes: Vec<u8>) -> Vec<u8> {
    let len = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    bytes.truncate(len);
    bytes
}
