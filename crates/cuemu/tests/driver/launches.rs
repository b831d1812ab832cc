//! Modules, kernels, and what a launch is checked for.

use std::ffi::CString;
use std::ptr::null_mut;

use crate::api::*;

#[test]
fn a_kernel_runs() {
    let _context = Context::new(0);
    let pointer = alloc(100);
    fill(pointer, 90, 5, 0);
    let data = read(pointer, 100);
    assert_eq!(data[..90], [5; 90]);
    assert_eq!(data[90..], [u32::MAX; 10]);
    let counters = made(|counters: *mut cuemu::driver::Stats| cuemu_counters(counters));
    assert!(counters.blocks >= 2, "{counters:?}");
}

#[test]
fn kernels_are_lazy_too() {
    let _context = Context::new(0);
    let (pointer, stream) = (alloc(1), stream());
    fill(pointer, 1, 5, stream);
    assert_eq!(read(pointer, 1), [u32::MAX]);
    ok(cuStreamSynchronize(stream));
    assert_eq!(read(pointer, 1), [5]);
}

#[test]
fn parameters_are_copied_at_the_launch() {
    let _context = Context::new(0);
    let (pointer, stream) = (alloc(1), stream());
    let mut value = 5_u32;
    ok(launch(kernel("fill"), (1, 1, 0), stream, &[&pointer, &1_u32, &value]));
    value += 1;
    ok(cuStreamSynchronize(stream));
    assert_eq!((read(pointer, 1), value), (vec![5], 6));
}

#[test]
fn modules_are_checked() {
    let _context = Context::new(0);
    let load = |image: &[u8]| cuModuleLoadData(&mut 0, image.as_ptr().cast());
    fails(load(b"\x7fELF\x02\0"), NO_BINARY_FOR_GPU, "set GRADLENS_CUDA_CODE=ptx");
    fails(load(b".version 8.0\n.target sm_100\n\0"), NO_BINARY_FOR_GPU, "sm_100 does not run on");
    fails(
        load(b".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k()\n{\n nonsense.u32;\n ret;\n}\n\0"),
        INVALID_PTX,
        "nonsense",
    );
    let module = crate::api::load(include_str!("kernels.ptx"));
    let name = CString::new("nothing").unwrap();
    fails(cuModuleGetFunction(&mut 0, module, name.as_ptr()), NOT_FOUND, "it has: fill, stuck");
    ok(cuModuleUnload(module));
    fails(cuModuleGetFunction(&mut 0, module, name.as_ptr()), INVALID_HANDLE, "unloaded");
}

#[test]
fn launches_are_checked() {
    let _context = Context::new(0);
    let pointer = alloc(1);
    let (bounded, fill) = (kernel("bounded"), kernel("fill"));
    let try_fill = |shape| launch(fill, shape, 0, &[&pointer, &1_u32, &1_u32]);
    fails(try_fill((0, 1, 0)), INVALID_VALUE, "a grid of [0, 1, 1]");
    fails(try_fill((1, 1025, 0)), INVALID_VALUE, "a block of [1025, 1, 1]");
    fails(cuLaunchKernel(fill, 1, 65536, 1, 1, 1, 1, 0, 0, null_mut(), null_mut()), INVALID_VALUE, "65536");
    fails(
        cuLaunchKernel(fill, 1, 1, 1, 64, 32, 1, 0, 0, null_mut(), null_mut()),
        INVALID_VALUE,
        "2048 threads",
    );
    fails(cuLaunchKernel(fill, 1, 1, 1, 1, 1, 1, 0, 0, null_mut(), null_mut()), INVALID_VALUE, "parameter 0");
    let try_bounded = |threads, shared| launch(bounded, (1, threads, shared), 0, &[&pointer]);
    fails(try_bounded(33, 16), INVALID_VALUE, "the launch bound of 32");
    ok(try_bounded(32, 47 << 10));
    fails(try_bounded(32, 48 << 10), INVALID_VALUE, "MAX_DYNAMIC_SHARED_SIZE_BYTES");
    let most = (227 << 10) - 1024;
    fails(cuFuncSetAttribute(bounded, MAX_DYNAMIC_SHARED, most + 4), INVALID_VALUE, "1024 of variables");
    ok(cuFuncSetAttribute(bounded, MAX_DYNAMIC_SHARED, most));
    ok(try_bounded(1, most as u32));
    assert_eq!(read(pointer, 1), [7]);
    let attribute = |number| made(|value| cuFuncGetAttribute(value, number, bounded));
    assert_eq!((attribute(0), attribute(1), attribute(8)), (32, 1024, most));
    assert_eq!(cuFuncGetAttribute(&mut 0, 0, 12345), INVALID_HANDLE);
    let cooperative =
        |blocks| cuLaunchCooperativeKernel(kernel("stuck"), blocks, 1, 1, 1024, 1, 1, 0, 0, null_mut());
    fails(cooperative(9), COOPERATIVE_LAUNCH_TOO_LARGE, "8 are resident");
}

#[test]
fn streams_and_functions_belong_together() {
    let one = Context::new(1);
    let function = kernel("stuck");
    let zero = Context::new(0);
    fails(launch(function, (1, 1, 0), 0, &[]), INVALID_HANDLE, "different contexts");
    drop((zero, one));
}

#[test]
fn a_failure_stays() {
    let _context = Context::new(0);
    let (pointer, stream) = (alloc(8), stream());
    // One word too many.
    ok(launch(kernel("fill"), (1, 32, 0), stream, &[&pointer, &9_u32, &1_u32]));
    fails(cuStreamSynchronize(stream), ILLEGAL_ADDRESS, "fill: ");
    fails(cuMemAlloc_v2(&mut 0, 4), ILLEGAL_ADDRESS, "fill: ");
    fails(launch(kernel_of(pointer), (1, 1, 0), stream, &[]), ILLEGAL_ADDRESS, "fill: ");
    // Another context goes on.
    let other = Context::new(0);
    assert_eq!(read(alloc(1), 1), [u32::MAX]);
    drop(other);
}

/// Any handle: a failed context does not get as far as to look at it.
fn kernel_of(pointer: u64) -> usize {
    pointer as usize
}

#[test]
fn threads_that_do_not_meet_are_an_error() {
    let _context = Context::new(0);
    ok(launch(kernel("stuck"), (1, 32, 0), 0, &[&0_u32]));
    fails(cuStreamSynchronize(0), LAUNCH_FAILED, "barrier");
}
