//! Streams: queues of work that is done when somebody waits for it, and by whoever waits.
//!
//! Every piece of work of a stream has a number. It may begin when the pieces before it are done, and those
//! pieces of other streams that it [depends on](Work::after): what an event recorded, or, between the default
//! stream and the streams that synchronise with it, everything submitted before. Nothing else happens, so a
//! wait that a program forgot makes it read old data. The schedule's policy decides the order of streams
//! when a whole context is waited for.

use std::collections::VecDeque;
use std::sync::{Condvar, PoisonError};
use std::thread;

use super::abi::{Handle, Out};
use super::context::{self, alive, current, working};
use super::device::api;
use super::error::{Code, Error, Result, no_panic};
use super::options::{Schedule, schedule};
use super::{State, state};
use std::ffi::c_void;

pub(super) const LEAST_PRIORITY: i32 = 0;
pub(super) const GREATEST_PRIORITY: i32 = -5;
const NON_BLOCKING: u32 = 1;

/// A piece of work of a stream: it is done when the stream has completed as many.
#[derive(Clone, Copy, Debug)]
pub(super) struct Point {
    pub(super) stream: Handle,
    pub(super) number: u64,
}

/// What is done, told whether the context has failed before.
pub(super) type Action = Box<dyn FnOnce(Option<&Error>) -> Result<()> + Send>;

struct Work {
    after: Vec<Point>,
    action: Action,
}

pub(super) struct Stream {
    pub(super) context: Handle,
    flags: u32,
    priority: i32,
    queue: VecDeque<Work>,
    submitted: u64,
    completed: u64,
    /// Somebody is doing a piece of work.
    busy: bool,
    /// Destroyed by the program; it goes when its queue is empty.
    destroyed: bool,
}

impl Stream {
    pub(super) fn new(context: Handle, flags: u32, priority: i32) -> Self {
        let queue = VecDeque::new();
        Self { context, flags, priority, queue, submitted: 0, completed: 0, busy: false, destroyed: false }
    }

    fn idle(&self) -> bool {
        self.completed == self.submitted
    }
}

/// Told whenever a piece of work is done.
static DONE: Condvar = Condvar::new();

/// The stream that a program means by `stream`: one of its own, or a default stream of this thread's context.
pub(super) fn resolve(state: &mut State, stream: Handle) -> Result<Handle> {
    match stream {
        0 | 1 => {
            let context = working(state)?;
            Ok(context::get(state, context)?.default_stream)
        }
        2 => {
            let context = working(state)?;
            let id = thread::current().id();
            if let Some(known) = context::get(state, context)?.thread_streams.get(&id) {
                return Ok(*known);
            }
            let handle = state.new_handle();
            state.streams.insert(handle, Stream::new(context, 0, 0));
            context::get(state, context)?.thread_streams.insert(id, handle);
            Ok(handle)
        }
        stream => {
            let context = get(state, stream)?.context;
            alive(state, context)?;
            Ok(stream)
        }
    }
}

fn get(state: &mut State, stream: Handle) -> Result<&mut Stream> {
    let known = state.streams.get_mut(&stream).filter(|stream| !stream.destroyed);
    known.ok_or_else(|| Error::new(Code::INVALID_HANDLE, "there is no such stream, or it was destroyed"))
}

/// The context of a stream that [`resolve`] gave.
pub(super) fn context_of(state: &State, stream: Handle) -> Result<Handle> {
    let known = state.streams.get(&stream);
    known.map(|stream| stream.context).ok_or_else(|| Error::plain(Code::INVALID_HANDLE))
}

/// The last piece of work that was submitted.
pub(super) fn now(state: &State, stream: Handle) -> Point {
    Point { stream, number: state.streams.get(&stream).map_or(0, |stream| stream.submitted) }
}

pub(super) fn is_done(state: &State, point: Point) -> bool {
    // A stream that is gone had nothing left to do.
    state.streams.get(&point.stream).is_none_or(|stream| stream.completed >= point.number)
}

/// Adds `action` to the end of a stream. If the context fails before, the action does not happen.
pub(super) fn submit(
    state: &mut State,
    stream: Handle,
    action: impl FnOnce() -> Result<()> + Send + 'static,
) -> Result<Point> {
    submit_always(
        state,
        stream,
        Vec::new(),
        Box::new(|failed| if failed.is_some() { Ok(()) } else { action() }),
    )
}

/// Adds `action` to the end of a stream; it happens after the pieces of work `after`.
pub(super) fn submit_always(
    state: &mut State,
    stream: Handle,
    mut after: Vec<Point>,
    action: Action,
) -> Result<Point> {
    let context = context_of(state, stream)?;
    let default = context::get(state, context)?.default_stream;
    if stream == default {
        let blocking = |other: &Stream| other.context == context && other.flags & NON_BLOCKING == 0;
        let others = state.streams.iter().filter(|(handle, other)| **handle != stream && blocking(other));
        after.extend(others.map(|(handle, other)| Point { stream: *handle, number: other.submitted }));
    } else if state.streams.get(&stream).is_some_and(|stream| stream.flags & NON_BLOCKING == 0) {
        after.push(now(state, default));
    }
    after.retain(|point| !is_done(state, *point));
    let queue = state.streams.get_mut(&stream).ok_or_else(|| Error::plain(Code::INVALID_HANDLE))?;
    queue.queue.push_back(Work { after, action });
    queue.submitted += 1;
    Ok(Point { stream, number: queue.submitted })
}

/// Does the work of a stream up to `point`, and what that depends on.
pub(super) fn run_until(point: Point) {
    let mut state = state();
    loop {
        if is_done(&state, point) {
            return;
        }
        let Some(stream) = state.streams.get_mut(&point.stream) else { return };
        let context = stream.context;
        // Busy: somebody else does a piece of work of this stream.
        let work = if stream.busy { None } else { stream.queue.pop_front() };
        let Some(work) = work else {
            state = DONE.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        stream.busy = true;
        drop(state);
        work.after.into_iter().for_each(run_until);
        let failed = alive(&self::state(), context).err();
        let outcome = no_panic(|| (work.action)(failed.as_ref()));
        state = self::state();
        if let Err(error) = outcome
            && let Some(context) = state.contexts.get_mut(&context)
        {
            context.failed.get_or_insert(error);
        }
        if let Some(stream) = state.streams.get_mut(&point.stream) {
            stream.busy = false;
            stream.completed += 1;
            if stream.destroyed && stream.idle() {
                state.streams.remove(&point.stream);
            }
        }
        DONE.notify_all();
    }
}

/// Waits for `point`. An error if something failed in the context.
pub(super) fn wait(context: Handle, point: Point) -> Result<()> {
    run_until(point);
    alive(&state(), context)
}

/// Does one piece of work, if there is one up to `point`. Whether `point` is reached then.
///
/// For queries: a program that asks in a loop gets to the end.
pub(super) fn step(context: Handle, point: Point) -> Result<bool> {
    let next = {
        let state = state();
        let completed = state.streams.get(&point.stream).map_or(point.number, |stream| stream.completed);
        Point { number: point.number.min(completed + 1), ..point }
    };
    let done = is_done(&state(), point);
    if !done {
        run_until(next);
    }
    let state = state();
    alive(&state, context)?;
    Ok(done || is_done(&state, point))
}

/// Does all the work of a context, in an order that the schedule chooses.
pub(super) fn run_context(context: Handle) -> Result<()> {
    let schedule = schedule();
    let mut random = schedule.seed ^ 0x9E37_79B9_7F4A_7C15;
    loop {
        let pending = pending(context, &schedule);
        let Some((first, last)) = pending.first().zip(pending.last()) else {
            return alive(&state(), context);
        };
        match schedule.policy {
            Schedule::REVERSE => run_until(*last),
            Schedule::RANDOM => {
                // xorshift64
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let Point { stream, .. } = pending[(random % pending.len() as u64) as usize];
                let completed = state().streams.get(&stream).map_or(0, |stream| stream.completed);
                run_until(Point { stream, number: completed + 1 });
            }
            _ => run_until(*first),
        }
    }
}

/// The ends of all streams of a context that have work, the oldest stream or the most urgent one first.
fn pending(context: Handle, schedule: &Schedule) -> Vec<Point> {
    let state = state();
    let busy = state.streams.iter().filter(|(_, stream)| stream.context == context && !stream.idle());
    let mut ends: Vec<(i32, Point)> = busy
        .map(|(handle, stream)| (stream.priority, Point { stream: *handle, number: stream.submitted }))
        .collect();
    let by_priority = schedule.policy == Schedule::PRIORITY;
    ends.sort_by_key(|(priority, point)| (if by_priority { *priority } else { 0 }, point.stream));
    ends.into_iter().map(|(_, point)| point).collect()
}

fn create(stream: &Out<Handle>, flags: u32, priority: i32) -> Result<()> {
    if flags & !NON_BLOCKING != 0 {
        return Err(Error::invalid(format!("a stream has no flags {flags:#x}")));
    }
    let mut state = state();
    let context = working(&state)?;
    let handle = state.new_handle();
    let priority = priority.clamp(GREATEST_PRIORITY, LEAST_PRIORITY);
    state.streams.insert(handle, Stream::new(context, flags, priority));
    stream.put(handle)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamCreate(stream: Out<Handle>, flags: u32) -> i32 {
    api(|| create(&stream, flags, 0))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamCreateWithPriority(stream: Out<Handle>, flags: u32, priority: i32) -> i32 {
    api(|| create(&stream, flags, priority))
}

/// As on a GPU, destroying a stream does not wait for its work.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamDestroy_v2(stream: Handle) -> i32 {
    api(|| {
        let mut state = state();
        if stream <= 2 {
            return Err(Error::new(Code::INVALID_HANDLE, "a default stream cannot be destroyed"));
        }
        let known = get(&mut state, stream)?;
        known.destroyed = true;
        if known.idle() {
            state.streams.remove(&stream);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamSynchronize(stream: Handle) -> i32 {
    api(|| {
        let (context, point) = {
            let mut state = state();
            let stream = resolve(&mut state, stream)?;
            // Nothing, but the default stream gets to it when the streams that synchronise with it get there.
            (context_of(&state, stream)?, submit(&mut state, stream, || Ok(()))?)
        };
        wait(context, point)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamQuery(stream: Handle) -> i32 {
    api(|| {
        let (context, point) = {
            let mut state = state();
            let stream = resolve(&mut state, stream)?;
            (context_of(&state, stream)?, now(&state, stream))
        };
        if step(context, point)? { Ok(()) } else { Err(Error::plain(Code::NOT_READY)) }
    })
}

/// `CUstreamCallback`
type StreamCallback = unsafe extern "C" fn(Handle, i32, *mut c_void);
/// `CUhostFn`
type HostFunction = unsafe extern "C" fn(*mut c_void);

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamAddCallback(
    stream: Handle,
    callback: Option<StreamCallback>,
    data: Out<c_void>,
    _flags: u32,
) -> i32 {
    api(|| {
        let callback = callback.ok_or_else(|| Error::invalid("there is no function to call"))?;
        let data = data.address();
        let mut state = state();
        let resolved = resolve(&mut state, stream)?;
        let call = move |failed: Option<&Error>| {
            let status = failed.map_or(0, |error| error.code().0);
            // SAFETY: the program wants its function called, with its data, when the stream gets here.
            unsafe { callback(stream, status, data as *mut c_void) };
            Ok(())
        };
        submit_always(&mut state, resolved, Vec::new(), Box::new(call)).map(drop)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchHostFunc(
    stream: Handle,
    function: Option<HostFunction>,
    data: Out<c_void>,
) -> i32 {
    api(|| {
        let function = function.ok_or_else(|| Error::invalid("there is no function to call"))?;
        let data = data.address();
        let mut state = state();
        let stream = resolve(&mut state, stream)?;
        let call = move || {
            // SAFETY: the program wants its function called, with its data, when the stream gets here.
            unsafe { function(data as *mut c_void) };
            Ok(())
        };
        submit(&mut state, stream, call).map(drop)
    })
}

/// Reads something of a stream.
fn with_stream(stream: Handle, read: impl FnOnce(&Stream) -> Result<()>) -> i32 {
    api(|| {
        let mut state = state();
        current(&state)?;
        let stream = resolve(&mut state, stream)?;
        read(get(&mut state, stream)?)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamGetFlags(stream: Handle, flags: Out<u32>) -> i32 {
    with_stream(stream, |stream| flags.put(stream.flags))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamGetPriority(stream: Handle, priority: Out<i32>) -> i32 {
    with_stream(stream, |stream| priority.put(stream.priority))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamGetCtx(stream: Handle, context: Out<Handle>) -> i32 {
    with_stream(stream, |stream| context.put(stream.context))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamGetId(stream: Handle, id: Out<u64>) -> i32 {
    api(|| id.put(resolve(&mut state(), stream)? as u64))
}

/// No stream is ever captured: there are no graphs.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamIsCapturing(stream: Handle, status: Out<i32>) -> i32 {
    with_stream(stream, |_| status.put(0))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuThreadExchangeStreamCaptureMode(mode: Out<i32>) -> i32 {
    api(|| mode.put(0))
}
