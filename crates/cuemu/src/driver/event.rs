//! Events: places in a stream that a program can wait for.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use super::abi::{Handle, Out};
use super::context::working;
use super::device::api;
use super::error::{Code, Error, Result};
use super::stream::{self, Point, context_of, is_done, resolve, submit_always};
use super::{State, state};

const DISABLE_TIMING: u32 = 2;

pub(super) struct Event {
    pub(super) context: Handle,
    flags: u32,
    record: Option<Record>,
}

/// The last time that the event was recorded.
#[derive(Clone)]
struct Record {
    point: Point,
    /// When the stream got there.
    time: Arc<OnceLock<Instant>>,
}

fn get(state: &mut State, event: Handle) -> Result<&mut Event> {
    let known = state.events.get_mut(&event);
    known.ok_or_else(|| Error::new(Code::INVALID_HANDLE, "there is no such event, or it was destroyed"))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventCreate(event: Out<Handle>, flags: u32) -> i32 {
    api(|| {
        let mut state = state();
        let context = working(&state)?;
        let handle = state.new_handle();
        state.events.insert(handle, Event { context, flags, record: None });
        event.put(handle)
    })
}

/// Who waits for the event already goes on waiting.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventDestroy_v2(event: Handle) -> i32 {
    api(|| {
        let mut state = state();
        get(&mut state, event)?;
        state.events.remove(&event);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventRecord(event: Handle, stream: Handle) -> i32 {
    api(|| record(event, stream))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventRecordWithFlags(event: Handle, stream: Handle, _flags: u32) -> i32 {
    api(|| record(event, stream))
}

fn record(event: Handle, stream: Handle) -> Result<()> {
    let mut state = state();
    let stream = resolve(&mut state, stream)?;
    if get(&mut state, event)?.context != context_of(&state, stream)? {
        return Err(Error::new(Code::INVALID_HANDLE, "the event and the stream are of different contexts"));
    }
    let time = Arc::new(OnceLock::new());
    let reached = time.clone();
    let action = move |_: Option<&Error>| {
        reached.get_or_init(Instant::now);
        Ok(())
    };
    let point = submit_always(&mut state, stream, Vec::new(), Box::new(action))?;
    get(&mut state, event)?.record = Some(Record { point, time });
    Ok(())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamWaitEvent(stream: Handle, event: Handle, _flags: u32) -> i32 {
    api(|| {
        let mut state = state();
        let stream = resolve(&mut state, stream)?;
        // An event that was never recorded is nothing to wait for.
        let Some(record) = get(&mut state, event)?.record.clone() else { return Ok(()) };
        submit_always(&mut state, stream, vec![record.point], Box::new(|_| Ok(()))).map(drop)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventSynchronize(event: Handle) -> i32 {
    api(|| {
        let (context, record) = {
            let mut state = state();
            let event = get(&mut state, event)?;
            (event.context, event.record.clone())
        };
        record.map_or(Ok(()), |record| stream::wait(context, record.point))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventQuery(event: Handle) -> i32 {
    api(|| {
        let (context, record) = {
            let mut state = state();
            let event = get(&mut state, event)?;
            (event.context, event.record.clone())
        };
        match record {
            Some(record) if !stream::step(context, record.point)? => Err(Error::plain(Code::NOT_READY)),
            _ => Ok(()),
        }
    })
}

fn elapsed(milliseconds: &Out<f32>, start: Handle, end: Handle) -> Result<()> {
    let mut state = state();
    let mut times = [Instant::now(); 2];
    for (time, event) in times.iter_mut().zip([start, end]) {
        let event = get(&mut state, event)?;
        if event.flags & DISABLE_TIMING != 0 {
            return Err(Error::new(Code::INVALID_HANDLE, "the event was created without timing"));
        }
        let Some(record) = event.record.clone() else {
            return Err(Error::new(Code::INVALID_HANDLE, "the event was never recorded"));
        };
        if !is_done(&state, record.point) {
            return Err(Error::plain(Code::NOT_READY));
        }
        *time = record.time.get().copied().ok_or_else(|| Error::plain(Code::NOT_READY))?;
    }
    let [start, end] = times;
    let sign = if end >= start { 1.0 } else { -1.0 };
    let time = end.saturating_duration_since(start) + start.saturating_duration_since(end);
    milliseconds.put(sign * time.as_secs_f32() * 1e3)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventElapsedTime(milliseconds: Out<f32>, start: Handle, end: Handle) -> i32 {
    api(|| elapsed(&milliseconds, start, end))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventElapsedTime_v2(milliseconds: Out<f32>, start: Handle, end: Handle) -> i32 {
    api(|| elapsed(&milliseconds, start, end))
}
