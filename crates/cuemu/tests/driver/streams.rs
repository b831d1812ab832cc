//! The order of work, and what is seen without one.

use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::api::*;

fn event() -> usize {
    made(|event| cuEventCreate(event, 0))
}

#[test]
fn a_forgotten_wait_shows_old_data() {
    let _context = Context::new(0);
    let (from, to) = (alloc(1), alloc(1));
    let (writer, reader) = (stream(), stream());
    for wait in [false, true] {
        write(from, &[1]);
        ok(cuMemsetD32Async(from, 2, 1, writer));
        if wait {
            let event = event();
            ok(cuEventRecord(event, writer));
            ok(cuStreamWaitEvent(reader, event, 0));
            // The wait is for what was recorded, not for what the event becomes.
            ok(cuEventDestroy_v2(event));
        }
        ok(cuMemcpyDtoDAsync_v2(to, from, 4, reader));
        ok(cuStreamSynchronize(reader));
        assert_eq!(read(to, 1), [if wait { 2 } else { 1 }]);
        ok(cuCtxSynchronize());
        assert_eq!(read(from, 1), [2]);
    }
}

#[test]
fn the_default_stream_waits_for_blocking_streams_only() {
    let _context = Context::new(0);
    let pointer = alloc(2);
    write(pointer, &[0, 0]);
    let blocking = made(|stream| cuStreamCreate(stream, 0));
    ok(cuMemsetD32Async(pointer, 1, 1, blocking));
    ok(cuMemsetD32Async(pointer + 4, 1, 1, stream()));
    assert_eq!(read(pointer, 2), [1, 0]);
    // And the other way round.
    ok(cuMemsetD32Async(pointer, 5, 1, 0));
    ok(cuMemcpyDtoDAsync_v2(pointer + 4, pointer, 4, blocking));
    ok(cuStreamSynchronize(blocking));
    assert_eq!(read(pointer, 2), [5, 5]);
}

#[test]
fn events_answer_questions() {
    let _context = Context::new(0);
    let (pointer, stream) = (alloc(1), stream());
    let (start, end) = (event(), event());
    ok(cuEventQuery(start));
    fails(cuEventElapsedTime_v2(&mut 0.0, start, end), INVALID_HANDLE, "never recorded");
    ok(cuEventRecord(start, stream));
    ok(cuMemsetD32Async(pointer, 0, 1, stream));
    ok(cuEventRecord(end, stream));
    assert_eq!(cuEventElapsedTime_v2(&mut 0.0, start, end), NOT_READY);
    // Asking in a loop comes to an end.
    let mut questions = 0;
    while cuEventQuery(end) == NOT_READY {
        questions += 1;
    }
    assert!((1..5).contains(&questions));
    assert!(made(|time| cuEventElapsedTime_v2(time, start, end)) >= 0.0);
    ok(cuStreamQuery(stream));
    fails(
        cuEventElapsedTime_v2(&mut 0.0, start, made(|event| cuEventCreate(event, 2))),
        INVALID_HANDLE,
        "timing",
    );
    ok(cuEventDestroy_v2(end));
    fails(cuEventSynchronize(end), INVALID_HANDLE, "destroyed");
}

#[test]
fn work_of_a_destroyed_stream_is_done() {
    let _context = Context::new(0);
    let (pointer, stream) = (alloc(1), stream());
    ok(cuMemsetD32Async(pointer, 9, 1, stream));
    ok(cuStreamDestroy_v2(stream));
    fails(cuStreamSynchronize(stream), INVALID_HANDLE, "destroyed");
    ok(cuCtxSynchronize());
    assert_eq!(read(pointer, 1), [9]);
}

#[test]
fn host_functions_are_called_in_order() {
    static CALLS: AtomicU32 = AtomicU32::new(0);
    extern "C" fn append(digit: *mut c_void) {
        let add = |calls| Some(calls * 10 + digit as u32);
        CALLS.fetch_update(Ordering::SeqCst, Ordering::SeqCst, add).unwrap();
    }
    let _context = Context::new(0);
    let stream = stream();
    for digit in 1..4 {
        ok(cuLaunchHostFunc(stream, append, null_mut::<c_void>().wrapping_byte_add(digit)));
    }
    assert_eq!(CALLS.load(Ordering::SeqCst), 0);
    ok(cuStreamSynchronize(stream));
    assert_eq!(CALLS.load(Ordering::SeqCst), 123);
}

#[test]
fn several_threads_wait_for_one_stream() {
    let context = Context::new(0);
    let (pointer, first, second) = (alloc(1), stream(), stream());
    let event = event();
    for value in 0..200 {
        ok(cuMemsetD32Async(pointer, value, 1, first));
        ok(cuEventRecord(event, first));
        ok(cuStreamWaitEvent(second, event, 0));
        ok(cuEventRecord(event, second));
        ok(cuStreamWaitEvent(first, event, 0));
    }
    std::thread::scope(|scope| {
        for stream in [first, second, first, second] {
            let context = &context;
            scope.spawn(move || {
                context.bind();
                ok(cuStreamSynchronize(stream));
            });
        }
    });
    assert_eq!(read(pointer, 1), [199]);
}
