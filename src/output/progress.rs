//! How far a phase is: a bar on the terminal or, where stderr is none, a line now and then.
//!
//! Who does the work only counts, which costs an atomic addition; a thread for each bar shows the numbers.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use crate::units::{size, thousands};

/// A phase that is over before this draws no bar: it would only flicker.
const BAR_AFTER: Duration = Duration::from_millis(300);
/// Between two redraws of a bar.
const REDRAW: Duration = Duration::from_millis(100);
/// Redraws of all bars together, per second at most.
const REDRAWS_PER_S: u8 = 20;
/// A phase that is over before this writes no line.
const FIRST_LINE: Duration = Duration::from_secs(5);
/// Each pause between lines is twice the one before, up to this: ten hours make 600 lines.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Stands for a total that nobody knows.
const UNKNOWN: u64 = u64::MAX;

/// What a phase counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Samples. Their lengths differ, so their rate says little and is not shown: [`Bar::detail`] can say tokens/s.
    Samples,
    /// Texts of a dataset.
    Texts,
    /// Bytes, shown in binary units.
    Bytes,
}

impl Unit {
    fn count(self, number: u64) -> String {
        match self {
            Self::Samples => format!("{} samples", thousands(number)),
            Self::Texts => format!("{} texts", thousands(number)),
            Self::Bytes => size(number),
        }
    }

    fn count_of(self, number: u64, total: u64) -> String {
        match self {
            Self::Bytes => format!("{} of {}", size(number), size(total)),
            _ => format!("{} of {}", thousands(number), self.count(total)),
        }
    }
}

/// Where progress is shown.
#[derive(Clone, Debug)]
pub(super) enum Screen {
    Nowhere,
    Lines,
    Bars(MultiProgress),
}

impl Screen {
    /// Bars where stderr is a terminal that can redraw a line.
    pub fn stderr() -> Self {
        let bars = MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(REDRAWS_PER_S));
        if bars.is_hidden() { Self::Lines } else { Self::Bars(bars) }
    }

    /// Prints something while no bar is in the way.
    pub fn without_bars<R>(&self, print: impl FnOnce() -> R) -> R {
        match self {
            Self::Bars(bars) => bars.suspend(print),
            Self::Lines | Self::Nowhere => print(),
        }
    }
}

/// A phase that is going on. Any thread may count; several bars may be up at once. Dropped, it is gone from the screen.
#[derive(Debug)]
pub struct Bar {
    phase: Arc<Phase>,
    /// The thread that shows it; it ends when the sender goes.
    shown: Option<(Sender<()>, JoinHandle<()>)>,
}

#[derive(Debug)]
struct Phase {
    name: String,
    unit: Unit,
    started: Instant,
    done: AtomicU64,
    /// Of `done`, what cost this phase no time.
    before: AtomicU64,
    total: AtomicU64,
    detail: Mutex<String>,
}

impl Bar {
    /// Starts a phase; `say` prints a line, on a screen of lines.
    pub(super) fn start(
        screen: &Screen,
        name: &str,
        unit: Unit,
        total: Option<u64>,
        say: impl Fn(&str) + Send + 'static,
    ) -> Self {
        let phase = Arc::new(Phase {
            name: name.to_owned(),
            unit,
            started: Instant::now(),
            done: AtomicU64::new(0),
            before: AtomicU64::new(0),
            total: AtomicU64::new(total.unwrap_or(UNKNOWN)),
            detail: Mutex::default(),
        });
        if matches!(screen, Screen::Nowhere) {
            return Self { phase, shown: None };
        }
        let (sender, stop) = channel();
        let (shown, screen) = (Arc::clone(&phase), screen.clone());
        let show = move || match screen {
            Screen::Bars(bars) => draw(&shown, &bars, &stop),
            Screen::Lines | Screen::Nowhere => write_lines(&shown, &stop, FIRST_LINE, say),
        };
        // Without a thread nothing is shown, which is no reason to stop the work.
        let thread = std::thread::Builder::new().name("progress".into()).spawn(show).ok();
        Self { phase, shown: thread.map(|thread| (sender, thread)) }
    }

    /// So much is done, what was here before ([`Bar::had`]) included.
    pub fn set(&self, done: u64) {
        self.phase.done.store(done, Ordering::Relaxed);
    }

    /// Of what is done, so much was here before and counts in no rate: the start of a download that is taken up
    /// again, a file that another program brought. What is done stays as it is, so that who finds such a file need
    /// not know how far the others are.
    pub fn had(&self, before: u64) {
        self.phase.before.store(before, Ordering::Relaxed);
    }

    /// So much there is to do.
    pub fn set_total(&self, total: u64) {
        self.phase.total.store(total, Ordering::Relaxed);
    }

    /// Something to say beside the numbers: a rate in another unit, a file.
    pub fn detail(&self, text: impl Into<String>) {
        *self.phase.detail.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = text.into();
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some((sender, thread)) = self.shown.take() {
            drop(sender);
            // What is printed next must find the screen clear. If the thread panicked, that has printed itself.
            let _ = thread.join();
        }
    }
}

impl Phase {
    fn total(&self) -> Option<u64> {
        Some(self.total.load(Ordering::Relaxed)).filter(|&total| total != UNKNOWN)
    }

    /// `120 of 500 samples`, `14,616 tokens/s`, `about 12 s left`: what is known of it after `elapsed`.
    fn numbers(&self, elapsed: Duration) -> Vec<String> {
        let done = self.done.load(Ordering::Relaxed);
        let new = done.saturating_sub(self.before.load(Ordering::Relaxed));
        let per_s = new as f64 / elapsed.as_secs_f64();
        let mut parts = Vec::new();
        match self.total() {
            Some(total) => parts.push(self.unit.count_of(done.min(total), total)),
            None if done > 0 => parts.push(self.unit.count(done)),
            None => {}
        }
        if new > 0 && self.unit != Unit::Samples {
            parts.push(self.unit.count(per_s as u64) + "/s");
        }
        let detail = self.detail.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        if !detail.is_empty() {
            parts.push(detail);
        }
        parts.push(match self.total() {
            Some(total) if new > 0 && done < total => {
                format!("about {} left", duration((total - done) as f64 / per_s))
            }
            _ => format!("{} so far", duration(elapsed.as_secs_f64())),
        });
        parts
    }

    fn line(&self, elapsed: Duration) -> String {
        format!("{}: {}", self.name, self.numbers(elapsed).join(", "))
    }
}

/// Waits; `false` once the bar is gone.
fn goes_on(stop: &Receiver<()>, pause: Duration) -> bool {
    stop.recv_timeout(pause) == Err(RecvTimeoutError::Timeout)
}

fn write_lines(phase: &Phase, stop: &Receiver<()>, first: Duration, say: impl Fn(&str)) {
    let mut pause = first;
    while goes_on(stop, pause) {
        say(&phase.line(phase.started.elapsed()));
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn draw(phase: &Arc<Phase>, bars: &MultiProgress, stop: &Receiver<()>) {
    if !goes_on(stop, BAR_AFTER) {
        return;
    }
    let bar = ProgressBar::no_length().with_prefix(phase.name.clone()).with_style(style(phase, false));
    let bar = bars.add(bar);
    let mut length = None;
    loop {
        if length != phase.total() {
            length = phase.total();
            bar.set_style(style(phase, length.is_some()));
            bar.set_length(length.unwrap_or_default());
        }
        bar.set_position(phase.done.load(Ordering::Relaxed));
        bar.tick();
        if !goes_on(stop, REDRAW) {
            break;
        }
    }
    bar.finish_and_clear();
    bars.remove(&bar);
}

/// A bar where the total is known, else something that turns.
fn style(phase: &Arc<Phase>, total: bool) -> ProgressStyle {
    let template = if total { "{prefix} {wide_bar} {numbers}" } else { "{spinner} {prefix}  {numbers}" };
    let phase = Arc::clone(phase);
    let numbers = move |_: &ProgressState, line: &mut dyn fmt::Write| {
        // A line that cannot be written is not shown.
        let _ = line.write_str(&phase.numbers(phase.started.elapsed()).join("  "));
    };
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .with_key("numbers", numbers)
        .progress_chars("━╸─")
}

/// A time as people say it, in at most two units: `12 s`, `5 min`, `3 h 20 min`, `2 d 4 h`.
fn duration(seconds: f64) -> String {
    // A rate of almost nothing gives a time beyond all integers, which the cast cuts off.
    let seconds = seconds.round() as u64;
    let minutes = seconds / 60 + u64::from(seconds % 60 >= 30);
    match seconds {
        0..120 => format!("{seconds} s"),
        120..5_970 => format!("{minutes} min"),
        5_970..172_770 => format!("{} h {} min", minutes / 60, minutes % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3_600),
    }
}

#[cfg(test)]
#[path = "progress_tests.rs"]
mod tests;
