//! The driver as a program sees it: loaded at run time, functions looked up by name.

use std::env;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::PathBuf;
use std::ptr::null_mut;
use std::sync::LazyLock;

use libloading::Library;

pub const INVALID_VALUE: i32 = 1;
pub const OUT_OF_MEMORY: i32 = 2;
pub const INVALID_DEVICE: i32 = 101;
pub const INVALID_CONTEXT: i32 = 201;
pub const NO_BINARY_FOR_GPU: i32 = 209;
pub const INVALID_PTX: i32 = 218;
pub const INVALID_HANDLE: i32 = 400;
pub const NOT_FOUND: i32 = 500;
pub const NOT_READY: i32 = 600;
pub const ILLEGAL_ADDRESS: i32 = 700;
pub const CONTEXT_IS_DESTROYED: i32 = 709;
pub const LAUNCH_FAILED: i32 = 719;
pub const COOPERATIVE_LAUNCH_TOO_LARGE: i32 = 720;
pub const NOT_SUPPORTED: i32 = 801;

pub const MAX_DYNAMIC_SHARED: i32 = 8;
pub const NON_BLOCKING: u32 = 1;

/// Where the build puts the library.
fn library() -> PathBuf {
    let program = env::current_exe().unwrap();
    program.parent().unwrap().join("libcuemu.so")
}

macro_rules! functions {
    ($($name:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {
        #[allow(non_snake_case)]
        struct Functions { $($name: unsafe extern "C" fn($($type),*) -> $result,)* }

        static FUNCTIONS: LazyLock<Functions> = LazyLock::new(|| {
            // SAFETY: the library of this crate; its functions have these types. It stays loaded.
            unsafe {
                let library = Box::leak(Box::new(Library::new(library()).unwrap()));
                Functions { $($name: *library.get(concat!(stringify!($name), "\0").as_bytes()).unwrap(),)* }
            }
        });

        $(
            #[allow(non_snake_case)]
            pub fn $name($($argument: $type),*) -> $result {
                // SAFETY: every test hands over what the function asks for.
                unsafe { (FUNCTIONS.$name)($($argument),*) }
            }
        )*
    };
}

type Handle = usize;

functions! {
    cuInit(flags: u32) -> i32;
    cuDriverGetVersion(version: *mut i32) -> i32;
    cuDeviceGetCount(count: *mut i32) -> i32;
    cuDeviceGet(device: *mut i32, ordinal: i32) -> i32;
    cuDeviceGetName(name: *mut u8, bytes: i32, device: i32) -> i32;
    cuDeviceGetAttribute(value: *mut i32, attribute: i32, device: i32) -> i32;
    cuDeviceGetDefaultMemPool(pool: *mut Handle, device: i32) -> i32;
    cuMemPoolGetAttribute(pool: Handle, attribute: i32, value: *mut c_void) -> i32;
    cuCtxCreate_v4(context: *mut Handle, parameters: *const c_void, flags: u32, device: i32) -> i32;
    cuCtxDestroy_v2(context: Handle) -> i32;
    cuCtxSetCurrent(context: Handle) -> i32;
    cuCtxGetCurrent(context: *mut Handle) -> i32;
    cuCtxPushCurrent_v2(context: Handle) -> i32;
    cuCtxPopCurrent_v2(context: *mut Handle) -> i32;
    cuCtxSynchronize() -> i32;
    cuCtxEnablePeerAccess(peer: Handle, flags: u32) -> i32;
    cuCtxDisablePeerAccess(peer: Handle) -> i32;
    cuDevicePrimaryCtxRetain(context: *mut Handle, device: i32) -> i32;
    cuDevicePrimaryCtxRelease_v2(device: i32) -> i32;
    cuMemAlloc_v2(pointer: *mut u64, bytes: usize) -> i32;
    cuMemFree_v2(pointer: u64) -> i32;
    cuMemAllocAsync(pointer: *mut u64, bytes: usize, stream: Handle) -> i32;
    cuMemFreeAsync(pointer: u64, stream: Handle) -> i32;
    cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> i32;
    cuMemHostAlloc(pointer: *mut *mut c_void, bytes: usize, flags: u32) -> i32;
    cuMemFreeHost(pointer: *mut c_void) -> i32;
    cuMemHostRegister_v2(pointer: u64, bytes: usize, flags: u32) -> i32;
    cuMemHostUnregister(pointer: u64) -> i32;
    cuMemHostGetDevicePointer_v2(device: *mut u64, host: u64, flags: u32) -> i32;
    cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize) -> i32;
    cuMemcpyDtoH_v2(to: *mut c_void, from: u64, bytes: usize) -> i32;
    cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: Handle) -> i32;
    cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: Handle) -> i32;
    cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) -> i32;
    cuMemcpyPeerAsync(to: u64, to_context: Handle, from: u64, from_context: Handle, bytes: usize, stream: Handle) -> i32;
    cuMemsetD32Async(to: u64, value: u32, count: usize, stream: Handle) -> i32;
    cuStreamCreate(stream: *mut Handle, flags: u32) -> i32;
    cuStreamDestroy_v2(stream: Handle) -> i32;
    cuStreamSynchronize(stream: Handle) -> i32;
    cuStreamQuery(stream: Handle) -> i32;
    cuStreamWaitEvent(stream: Handle, event: Handle, flags: u32) -> i32;
    cuLaunchHostFunc(stream: Handle, function: extern "C" fn(*mut c_void), data: *mut c_void) -> i32;
    cuEventCreate(event: *mut Handle, flags: u32) -> i32;
    cuEventRecord(event: Handle, stream: Handle) -> i32;
    cuEventQuery(event: Handle) -> i32;
    cuEventSynchronize(event: Handle) -> i32;
    cuEventElapsedTime_v2(milliseconds: *mut f32, start: Handle, end: Handle) -> i32;
    cuEventDestroy_v2(event: Handle) -> i32;
    cuModuleLoadData(module: *mut Handle, image: *const c_void) -> i32;
    cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char) -> i32;
    cuModuleUnload(module: Handle) -> i32;
    cuFuncGetAttribute(value: *mut i32, attribute: i32, function: Handle) -> i32;
    cuFuncSetAttribute(function: Handle, attribute: i32, value: i32) -> i32;
    cuLaunchKernel(
        function: Handle, gx: u32, gy: u32, gz: u32, bx: u32, by: u32, bz: u32, shared: u32, stream: Handle,
        parameters: *mut *mut c_void, extra: *mut *mut c_void
    ) -> i32;
    cuLaunchCooperativeKernel(
        function: Handle, gx: u32, gy: u32, gz: u32, bx: u32, by: u32, bz: u32, shared: u32, stream: Handle,
        parameters: *mut *mut c_void
    ) -> i32;
    cuTensorMapEncodeTiled(
        map: *mut TensorMap, data_type: i32, rank: u32, base: u64, dims: *const u64, strides: *const u64,
        boxes: *const u32, element_strides: *const u32, interleave: i32, swizzle: i32, promotion: i32, fill: i32
    ) -> i32;
    cuGetErrorName(error: i32, name: *mut *const c_char) -> i32;
    cuGetErrorString(error: i32, text: *mut *const c_char) -> i32;
    cuemu_last_error() -> *const c_char;
    cuemu_live_allocations() -> u64;
    cuemu_reset() -> ();
    cuemu_counters(counters: *mut cuemu::driver::Stats) -> i32;
    cuemu_schedule_bytes() -> usize;
    cuemu_get_schedule(schedule: *mut cuemu::driver::Schedule) -> i32;
    cuemu_set_schedule(schedule: *const cuemu::driver::Schedule) -> i32;
}

#[repr(C, align(128))]
pub struct TensorMap(pub [u64; 16]);

/// Asserts that a call succeeded.
#[track_caller]
pub fn ok(code: i32) {
    assert_eq!(code, 0, "{}", text(code));
}

/// Asserts that a call failed with `code`, and a sentence that has `words` in it.
#[track_caller]
pub fn fails(answer: i32, code: i32, words: &str) {
    assert_eq!(answer, code, "{}", text(answer));
    let text = text(code);
    assert!(text.contains(words), "{text}");
}

/// The sentence of an error.
pub fn text(code: i32) -> String {
    let mut text = std::ptr::null();
    assert_eq!(cuGetErrorString(code, &mut text), 0);
    // SAFETY: a string that lives as long as the process.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// What a call writes through its first argument.
pub fn made<T: Default>(call: impl FnOnce(*mut T) -> i32) -> T {
    let mut value = T::default();
    ok(call(&mut value));
    value
}

/// A context of the test's own, so that tests do not disturb each other.
pub struct Context(pub Handle);

impl Context {
    pub fn new(device: i32) -> Self {
        ok(cuInit(0));
        Self(made(|context| cuCtxCreate_v4(context, null_mut(), 0, device)))
    }

    pub fn bind(&self) {
        ok(cuCtxSetCurrent(self.0));
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        cuCtxSetCurrent(self.0);
        cuCtxDestroy_v2(self.0);
    }
}

pub fn alloc(words: usize) -> u64 {
    made(|pointer| cuMemAlloc_v2(pointer, words * 4))
}

pub fn stream() -> Handle {
    made(|stream| cuStreamCreate(stream, NON_BLOCKING))
}

/// A copy of device memory, after everything that the default stream waits for.
pub fn read(pointer: u64, words: usize) -> Vec<u32> {
    let mut data = vec![0_u32; words];
    ok(cuMemcpyDtoH_v2(data.as_mut_ptr().cast(), pointer, words * 4));
    data
}

pub fn write(pointer: u64, data: &[u32]) {
    ok(cuMemcpyHtoD_v2(pointer, data.as_ptr().cast(), data.len() * 4));
}

pub fn load(ptx: &str) -> Handle {
    let image = CString::new(ptx).unwrap();
    made(|module| cuModuleLoadData(module, image.as_ptr().cast()))
}

/// A kernel of kernels.ptx.
pub fn kernel(name: &str) -> Handle {
    let module = load(include_str!("kernels.ptx"));
    let name = CString::new(name).unwrap();
    made(|function| cuModuleGetFunction(function, module, name.as_ptr()))
}

/// Launches a kernel of one-dimensional shape.
pub fn launch(
    function: Handle,
    (blocks, threads, shared): (u32, u32, u32),
    stream: Handle,
    parameters: &[&dyn Parameter],
) -> i32 {
    let mut pointers: Vec<*mut c_void> = parameters.iter().map(|parameter| parameter.pointer()).collect();
    cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, shared, stream, pointers.as_mut_ptr(), null_mut())
}

/// Launches `fill`: `value` in all words of `pointer`.
pub fn fill(pointer: u64, words: u32, value: u32, stream: Handle) {
    ok(launch(kernel("fill"), (words.div_ceil(64), 64, 0), stream, &[&pointer, &words, &value]));
}

/// A value as the driver takes it.
pub trait Parameter {
    fn pointer(&self) -> *mut c_void;
}

macro_rules! parameters {
    ($($type:ty),*) => {
        $(impl Parameter for $type {
            fn pointer(&self) -> *mut c_void {
                std::ptr::from_ref(self).cast_mut().cast()
            }
        })*
    };
}

parameters!(u32, u64);
