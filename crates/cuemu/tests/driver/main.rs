//! The stand-in driver, called as a program calls it.
//!
//! Every test has contexts of its own. Those that need an environment of their own run in a process of their
//! own (`environment`).

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used)]

mod api;
mod environment;
mod launches;
mod memory;
mod streams;

use api::*;

#[test]
fn devices_describe_themselves() {
    ok(cuInit(0));
    assert_eq!(made(cuDriverGetVersion), 13000);
    assert_eq!(made(cuDeviceGetCount), 2);
    fails(cuDeviceGet(&mut 0, 2), INVALID_DEVICE, "there is no device 2");
    let mut name = [0; 32];
    ok(cuDeviceGetName(name.as_mut_ptr(), 32, 1));
    assert!(name.starts_with(b"CPU emulator 1\0"));
    let attribute = |number| made(|value| cuDeviceGetAttribute(value, number, 0));
    assert_eq!((attribute(75), attribute(76)), (9, 0));
    assert_eq!((attribute(97), attribute(8), attribute(10)), (227 << 10, 48 << 10, 32));
    assert_eq!(attribute(115), 1);
    assert_eq!(attribute(9999), 0);
}

#[test]
fn errors_have_names_and_texts() {
    let mut name = std::ptr::null();
    ok(cuGetErrorName(ILLEGAL_ADDRESS, &mut name));
    // SAFETY: a string that lives as long as the process.
    let name = unsafe { std::ffi::CStr::from_ptr(name) };
    assert_eq!(name.to_str(), Ok("CUDA_ERROR_ILLEGAL_ADDRESS"));
    assert_eq!(cuGetErrorName(12345, &mut std::ptr::null()), INVALID_VALUE);
    assert_eq!(text(0), "no error");
    assert_eq!(cuInit(1), INVALID_VALUE);
    // SAFETY: as above.
    let last = unsafe { std::ffi::CStr::from_ptr(cuemu_last_error()) };
    assert_eq!(last.to_str(), Ok("the flags of cuInit must be 0"));
}

#[test]
fn contexts_are_of_a_thread() {
    let context = Context::new(0);
    assert_eq!(made(cuCtxGetCurrent), context.0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert_eq!(made(cuCtxGetCurrent), 0);
            fails(cuMemAlloc_v2(&mut 0, 4), INVALID_CONTEXT, "no current context");
            ok(cuCtxPushCurrent_v2(context.0));
            ok(cuMemAlloc_v2(&mut 0, 4));
            assert_eq!(made(cuCtxPopCurrent_v2), context.0);
            fails(cuCtxPopCurrent_v2(std::ptr::null_mut()), INVALID_CONTEXT, "");
        });
    });
    let other = Context::new(1);
    ok(cuCtxDestroy_v2(other.0));
    ok(cuCtxPushCurrent_v2(context.0));
    fails(cuCtxSetCurrent(other.0), INVALID_CONTEXT, "destroyed");
    std::mem::forget(other);
}

#[test]
fn a_primary_context_is_counted() {
    ok(cuInit(0));
    let first = made(|context| cuDevicePrimaryCtxRetain(context, 1));
    assert_eq!(made(|context| cuDevicePrimaryCtxRetain(context, 1)), first);
    ok(cuCtxSetCurrent(first));
    let pointer = alloc(4);
    ok(cuDevicePrimaryCtxRelease_v2(1));
    assert_eq!(read(pointer, 4).len(), 4);
    ok(cuDevicePrimaryCtxRelease_v2(1));
    fails(cuMemAlloc_v2(&mut 0, 4), CONTEXT_IS_DESTROYED, "");
    assert_eq!(cuDevicePrimaryCtxRelease_v2(1), INVALID_CONTEXT);
}
