//! Allocations and copies.

use crate::api::*;
use std::ptr::null_mut;

#[test]
fn copies_stay_inside_of_allocations() {
    let _context = Context::new(0);
    let pointer = alloc(16);
    assert!(pointer.is_multiple_of(256));
    // Nobody has written this memory.
    assert_eq!(read(pointer, 16), [u32::MAX; 16]);
    let data: Vec<u32> = (0..16).collect();
    write(pointer, &data);
    assert_eq!(read(pointer, 16), data);
    assert_eq!(read(pointer + 8, 4), [2, 3, 4, 5]);
    let mut host = [0_u32; 17];
    let to = host.as_mut_ptr().cast();
    fails(cuMemcpyDtoH_v2(to, pointer, 68), INVALID_VALUE, "68 bytes at");
    fails(cuMemcpyDtoH_v2(to, pointer + 64, 4), INVALID_VALUE, "beyond the allocation of 64 bytes");
    fails(cuMemcpyDtoH_v2(to, pointer - 4, 4), INVALID_VALUE, "cuMemcpyDtoH");
    fails(cuMemcpyDtoH_v2(null_mut(), pointer, 4), INVALID_VALUE, "null");
    fails(cuMemcpyHtoD_v2(pointer, pointer as *const _, 4), INVALID_VALUE, "is device memory");
    fails(cuMemsetD32Async(pointer, 0, 17, 0), INVALID_VALUE, "cuMemsetD32Async");
    ok(cuMemsetD32Async(pointer, 5, 16, 0));
    assert_eq!(read(pointer, 16), [5; 16]);
    ok(cuMemFree_v2(pointer));
    fails(cuMemFree_v2(pointer), INVALID_VALUE, "freed before");
    fails(cuMemcpyDtoH_v2(to, pointer, 4), INVALID_VALUE, "in no allocation");
    fails(cuMemAlloc_v2(&mut 0, 0), INVALID_VALUE, "no bytes");
    ok(cuMemFree_v2(0));
}

#[test]
fn pageable_memory_is_read_at_once_and_pinned_memory_later() {
    let _context = Context::new(0);
    let (pointer, stream) = (alloc(2), stream());
    let mut pageable = [1_u32];
    ok(cuMemcpyHtoDAsync_v2(pointer, pageable.as_ptr().cast(), 4, stream));
    std::hint::black_box(&mut pageable)[0] = 2;
    let pinned: *mut u32 = {
        let mut host = null_mut();
        ok(cuMemHostAlloc(&mut host, 4, 0));
        host.cast()
    };
    // SAFETY: four bytes that were allocated just now.
    unsafe { pinned.write(3) };
    ok(cuMemcpyHtoDAsync_v2(pointer + 4, pinned.cast(), 4, stream));
    // SAFETY: as above; nothing copies meanwhile.
    unsafe { pinned.write(4) };
    ok(cuStreamSynchronize(stream));
    assert_eq!(read(pointer, 2), [1, 4]);
    // To pinned memory, nothing is copied before somebody waits.
    ok(cuMemcpyDtoHAsync_v2(pinned.cast(), pointer, 4, stream));
    // SAFETY: as above.
    assert_eq!(unsafe { pinned.read() }, 4);
    ok(cuStreamSynchronize(stream));
    // SAFETY: as above.
    assert_eq!(unsafe { pinned.read() }, 1);
    // To pageable memory, everything is when the call returns.
    let mut host = [0_u32];
    ok(cuMemcpyDtoHAsync_v2(host.as_mut_ptr().cast(), pointer + 4, 4, stream));
    assert_eq!(host, [4]);
    // A copy finds its memory gone.
    ok(cuMemcpyDtoHAsync_v2(pinned.cast(), pointer, 4, stream));
    ok(cuMemFreeHost(pinned.cast()));
    fails(cuStreamSynchronize(stream), ILLEGAL_ADDRESS, "freed before the stream got to the copy");
}

#[test]
fn a_free_in_a_stream_happens_there() {
    let _context = Context::new(0);
    let (first, second) = (stream(), stream());
    let pointer = made(|pointer| cuMemAllocAsync(pointer, 4, first));
    ok(cuMemcpyDtoDAsync_v2(pointer, pointer, 4, second));
    ok(cuMemFreeAsync(pointer, first));
    // The memory is there until the first stream gets to the free; then the second one has lost it.
    ok(cuStreamSynchronize(first));
    fails(cuStreamSynchronize(second), ILLEGAL_ADDRESS, "freed before");
    // What has failed stays failed.
    fails(cuMemAlloc_v2(&mut 0, 4), ILLEGAL_ADDRESS, "freed before");
}

#[test]
fn an_allocation_in_a_stream_happens_there() {
    let reads = |pointer: u64, stream| ok(cuMemcpyDtoDAsync_v2(pointer + 4, pointer, 4, stream));
    let fills = |pointer: u64, stream| ok(cuMemsetD32Async(pointer, 1, 2, stream));
    let runs = |pointer: u64, stream| fill(pointer, 2, 1, stream);
    let frees = |pointer: u64, stream| ok(cuMemFreeAsync(pointer, stream));
    let uses: [&dyn Fn(u64, usize); 4] = [&reads, &fills, &runs, &frees];
    for used in uses {
        // Another stream that does not wait.
        let context = Context::new(0);
        let (first, second) = (stream(), stream());
        let pointer = made(|pointer| cuMemAllocAsync(pointer, 8, first));
        used(pointer, second);
        fails(cuStreamSynchronize(second), ILLEGAL_ADDRESS, "used before its allocation in stream order");
        drop(context);
        // The same stream; another one that waits; all of them after the host has waited.
        let _context = Context::new(0);
        let (first, second) = (stream(), stream());
        used(made(|pointer| cuMemAllocAsync(pointer, 8, first)), first);
        let pointer = made(|pointer| cuMemAllocAsync(pointer, 8, first));
        let event = made(|event| cuEventCreate(event, 0));
        ok(cuEventRecord(event, first));
        ok(cuStreamWaitEvent(second, event, 0));
        used(pointer, second);
        ok(cuStreamSynchronize(second));
        let pointer = made(|pointer| cuMemAllocAsync(pointer, 8, first));
        ok(cuStreamSynchronize(first));
        used(pointer, second);
        ok(cuStreamSynchronize(second));
    }
}

#[test]
fn kernels_reach_other_devices_with_peer_access_only() {
    let (one, zero) = (Context::new(1), Context::new(0));
    one.bind();
    let far = alloc(4);
    let failing = Context::new(0);
    let near = alloc(4);
    fill(near, 4, 1, 0);
    fill(far, 4, 1, 0);
    fails(
        cuCtxSynchronize(),
        ILLEGAL_ADDRESS,
        "memory of device 1 accessed by a kernel on device 0 without peer access",
    );
    drop(failing);
    // The kernel's own device, then its peer, by one kernel: then not any more.
    one.bind();
    fill(far, 4, 2, 0);
    ok(cuCtxSynchronize());
    zero.bind();
    ok(cuCtxEnablePeerAccess(one.0, 0));
    fill(far, 4, 3, 0);
    ok(cuCtxSynchronize());
    assert_eq!(read(far, 4), [3; 4]);
    ok(cuCtxDisablePeerAccess(one.0));
    fill(far, 4, 4, 0);
    fails(cuCtxSynchronize(), ILLEGAL_ADDRESS, "without peer access");
    one.bind();
    assert_eq!(read(far, 4), [3; 4]);
}

#[test]
fn devices_copy_to_each_other() {
    let (zero, one) = (Context::new(0), Context::new(1));
    let to = alloc(2);
    zero.bind();
    let from = alloc(2);
    write(from, &[7, 8]);
    fails(cuMemcpyPeerAsync(from, one.0, to, zero.0, 8, 0), INVALID_VALUE, "its context of device");
    ok(cuMemcpyPeerAsync(to, one.0, from, zero.0, 8, 0));
    ok(cuStreamSynchronize(0));
    one.bind();
    assert_eq!(read(to, 2), [7, 8]);
}

#[test]
fn tensor_maps_are_checked() {
    let _context = Context::new(0);
    let pointer = alloc(64 * 64);
    let mut map = TensorMap([0; 16]);
    let mut encode = |dims: [u64; 2], stride: u64, boxes: [u32; 2], base: u64| {
        let ones = [1; 2];
        cuTensorMapEncodeTiled(
            &mut map,
            9,
            2,
            base,
            dims.as_ptr(),
            &stride,
            boxes.as_ptr(),
            ones.as_ptr(),
            0,
            3,
            2,
            0,
        )
    };
    ok(encode([128, 64], 256, [64, 64], pointer));
    fails(
        encode([128, 64], 256, [128, 64], pointer),
        INVALID_VALUE,
        "the box is 256 bytes wide, the swizzle 128",
    );
    fails(encode([128, 64], 250, [64, 64], pointer), INVALID_VALUE, "stride 250");
    fails(encode([128, 65], 256, [64, 64], pointer), INVALID_VALUE, "beyond the allocation");
    fails(encode([120, 64], 256, [64, 64], pointer + 8), INVALID_VALUE, "aligned to 16");
    fails(encode([128, 64], 256, [64, 300], pointer), INVALID_VALUE, "box size 300");
    assert_eq!(map.0[0].to_le_bytes(), *b"tnsormap");
}

#[test]
fn kernels_reach_page_locked_memory() {
    let _context = Context::new(0);
    let mut host = vec![0_u32; 4];
    let address = host.as_mut_ptr() as u64;
    assert_eq!(cuMemHostUnregister(address), 713);
    ok(cuMemHostRegister_v2(address, 16, 0));
    assert_eq!(cuMemHostRegister_v2(address + 8, 16, 0), 712);
    let pointer = made(|pointer| cuMemHostGetDevicePointer_v2(pointer, address, 0));
    fill(pointer, 4, 6, 0);
    ok(cuStreamSynchronize(0));
    ok(cuMemHostUnregister(address));
    assert_eq!(host, [6; 4]);
    fails(cuMemHostGetDevicePointer_v2(&mut 0, address, 0), INVALID_VALUE, "page-locked");
}
