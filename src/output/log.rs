//! What the program says: results to stdout, everything else to stderr, and a copy of both for `runtime_output.txt`.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use super::progress::{Bar, Screen, Unit};

/// The copy stops growing here: it holds our own lines, so a larger one means a fault elsewhere.
const KEPT_BYTES: usize = 8 << 20;

/// Prints lines and remembers them. Clones share both; the lines of several threads do not mix, and bars make room
/// for them. What bars draw is not remembered: it belongs on the terminal only.
#[derive(Clone, Debug)]
pub struct Log {
    lines: Arc<Lines>,
    /// Where progress is shown.
    screen: Screen,
}

#[derive(Debug)]
struct Lines {
    kept: Mutex<Kept>,
    /// Where they are printed, between the bars; `None`: not at all.
    printed: Option<Screen>,
}

#[derive(Debug, Default)]
struct Kept {
    text: String,
    left_out_lines: usize,
}

impl Default for Log {
    fn default() -> Self {
        Self::new()
    }
}

impl Log {
    /// Prints and keeps, and shows progress on stderr.
    pub fn new() -> Self {
        let screen = Screen::stderr();
        Self::with(Some(screen.clone()), screen)
    }

    /// Prints and keeps, and shows no progress.
    pub fn quiet() -> Self {
        Self::with(Some(Screen::Nowhere), Screen::Nowhere)
    }

    /// Keeps without printing: for a library's user, and for tests.
    pub fn silent() -> Self {
        Self::with(None, Screen::Nowhere)
    }

    fn with(printed: Option<Screen>, screen: Screen) -> Self {
        Self { lines: Arc::new(Lines { kept: Mutex::default(), printed }), screen }
    }

    /// The same outlets, with nothing said yet: for another run's `runtime_output.txt`.
    pub fn fresh(&self) -> Self {
        let printed = self.lines.printed.clone();
        Self { lines: Arc::new(Lines { kept: Mutex::default(), printed }), screen: self.screen.clone() }
    }

    /// A result, to stdout. `text` is one or more lines, the last without its newline.
    pub fn out(&self, text: &str) {
        self.lines.say(text, Some(&mut io::stdout()));
    }

    /// Something the user should look at, to stderr after `warning: `.
    pub fn warn(&self, text: &str) {
        self.lines.say(&format!("warning: {text}"), Some(&mut io::stderr()));
    }

    /// What ended the job, to stderr after `error: `.
    pub fn error(&self, text: &str) {
        self.lines.say(&format!("error: {text}"), Some(&mut io::stderr()));
    }

    /// What is going on, to stderr.
    pub fn note(&self, text: &str) {
        self.lines.say(text, Some(&mut io::stderr()));
    }

    /// Something for `runtime_output.txt` alone.
    pub fn keep(&self, text: &str) {
        self.lines.say(text, None);
    }

    /// Starts a phase of the work and shows how far it is, until the bar is dropped: a bar on the terminal, where
    /// several can stand at once; elsewhere a line after a few seconds and then ever more rarely, kept as lines are.
    /// `total` is how much there is to do, as far as that is known.
    pub fn bar(&self, phase: &str, unit: Unit, total: Option<u64>) -> Bar {
        let lines = Arc::clone(&self.lines);
        Bar::start(&self.screen, phase, unit, total, move |line| lines.say(line, Some(&mut io::stderr())))
    }

    /// Everything said so far, for `runtime_output.txt`.
    pub fn text(&self) -> String {
        let kept = self.lines.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match kept.left_out_lines {
            0 => kept.text.clone(),
            count => format!("{}({count} further lines are not kept)\n", kept.text),
        }
    }
}

impl Lines {
    fn say(&self, text: &str, stream: Option<&mut dyn Write>) {
        // A thread that panicked while talking leaves the text whole enough to go on with.
        let mut kept = self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let (Some(screen), Some(stream)) = (&self.printed, stream) {
            // A closed pipe (`| head`) is no reason to lose a long run: the results are in files.
            let _ = screen.without_bars(|| writeln!(stream, "{text}").and_then(|()| stream.flush()));
        }
        if kept.left_out_lines == 0 && kept.text.len() + text.len() < KEPT_BYTES {
            kept.text.push_str(text);
            kept.text.push('\n');
        } else {
            kept.left_out_lines += text.lines().count();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_what_was_said_in_order() {
        let log = Log::silent();
        log.note("reading");
        log.warn("few texts");
        log.out("a\nb");
        log.keep("more");
        log.error("no texts");
        assert_eq!(log.text(), "reading\nwarning: few texts\na\nb\nmore\nerror: no texts\n");
    }

    #[test]
    fn the_copy_is_bounded() {
        let log = Log::silent();
        log.out("short");
        log.out(&"x\n".repeat(KEPT_BYTES / 2));
        log.out("late");
        let text = log.text();
        assert!(
            text.starts_with("short\n(") && text.ends_with("further lines are not kept)\n"),
            "{text:.80}"
        );
    }
}
