//! What the program says: results to stdout, everything else to stderr, and a copy of both for `runtime_output.txt`.

use std::io::{self, Write};
use std::sync::Mutex;

/// The copy stops growing here: it holds our own lines, so a larger one means a fault elsewhere.
const KEPT_BYTES: usize = 8 << 20;

/// Prints lines and remembers them. Shared by reference; the lines of several threads do not mix.
///
/// The progress bar does not go through here: its redraws belong on the terminal only.
#[derive(Debug)]
pub struct Log {
    kept: Mutex<Kept>,
    printing: bool,
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
    /// Prints and keeps.
    pub fn new() -> Self {
        Self { kept: Mutex::default(), printing: true }
    }

    /// Keeps without printing: for a library's user, and for tests.
    pub fn silent() -> Self {
        Self { kept: Mutex::default(), printing: false }
    }

    /// A result, to stdout. `text` is one or more lines, the last without its newline.
    pub fn out(&self, text: &str) {
        self.say(text, &mut io::stdout());
    }

    /// Something the user should look at, to stderr after `warning: `.
    pub fn warn(&self, text: &str) {
        self.say(&format!("warning: {text}"), &mut io::stderr());
    }

    /// What is going on, to stderr.
    pub fn note(&self, text: &str) {
        self.say(text, &mut io::stderr());
    }

    /// Everything said so far, for `runtime_output.txt`.
    pub fn text(&self) -> String {
        let kept = self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match kept.left_out_lines {
            0 => kept.text.clone(),
            count => format!("{}({count} further lines are not kept)\n", kept.text),
        }
    }

    fn say(&self, text: &str, stream: &mut dyn Write) {
        // A thread that panicked while talking leaves the text whole enough to go on with.
        let mut kept = self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if self.printing {
            // A closed pipe (`| head`) is no reason to lose a long run: the results are in files.
            let _ = writeln!(stream, "{text}").and_then(|()| stream.flush());
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
        assert_eq!(log.text(), "reading\nwarning: few texts\na\nb\n");
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
