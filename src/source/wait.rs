//! Waiting for a thread that reads: a slow disk or a pipe can hold it where no request to stop gets through.

use std::sync::mpsc::{Receiver, RecvTimeoutError, TrySendError, sync_channel};
use std::time::Duration;

use super::text::{TextCounts, Texts};
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;

/// Between two looks at the interrupt.
const LOOK: Duration = Duration::from_millis(50);
/// Texts between two messages.
const EVERY: u64 = 256;

/// Waits for the next message; `None` once there is no sender.
///
/// # Errors
/// Somebody asked to stop.
pub(super) fn wait<T>(messages: &Receiver<T>, interrupt: &Interrupt) -> Result<Option<T>> {
    loop {
        interrupt.check()?;
        match messages.recv_timeout(LOOK) {
            Ok(message) => return Ok(Some(message)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
        }
    }
}

enum Read {
    Some(TextCounts),
    All(Result<TextCounts>),
}

/// Reads all of `texts` and counts them, telling `met` the counts on the way.
///
/// # Errors
/// Texts that cannot be read; an interruption, upon which the reading thread is left to itself.
pub fn count(mut texts: Texts, interrupt: &Interrupt, met: impl Fn(TextCounts)) -> Result<TextCounts> {
    let (sender, read) = sync_channel(1);
    let reader = move || {
        while let Some(text) = texts.next() {
            if let Err(error) = text {
                let _ = sender.send(Read::All(Err(error)));
                return;
            }
            let counts = texts.counts();
            // A message that is not taken at once is none worth waiting for; without a listener reading is over.
            if counts.kept.is_multiple_of(EVERY)
                && matches!(sender.try_send(Read::Some(counts)), Err(TrySendError::Disconnected(_)))
            {
                return;
            }
        }
        let _ = sender.send(Read::All(Ok(texts.counts())));
    };
    std::thread::Builder::new()
        .name("source".into())
        .spawn(reader)
        .map_err(|cause| Error::new("cannot start a thread to read the dataset").found(cause))?;
    loop {
        match wait(&read, interrupt)? {
            Some(Read::Some(counts)) => met(counts),
            Some(Read::All(counts)) => return counts,
            None => {
                return Err(Error::new("reading the dataset failed inside gradlens")
                    .found("a panic, printed above")
                    .hint("please report this with the text that caused it"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use crate::source::TextSpec;
    use std::cell::RefCell;

    fn texts(lines: &str) -> Texts {
        let spec = TextSpec {
            dataset: "x".into(),
            text_column: "text".into(),
            min_chars: 1,
            num_samples: usize::MAX,
        };
        Texts::from_bytes("a.txt", lines.as_bytes().to_vec(), &spec).unwrap()
    }

    #[test]
    fn counts_are_those_of_the_texts() {
        let met = RefCell::new(Vec::new());
        let lines = "a\nlong\n".repeat(3 * EVERY as usize);
        let counts = count(texts(&lines), &Interrupt::new(), |counts| met.borrow_mut().push(counts.kept));
        assert_eq!(counts.unwrap(), TextCounts { read: 6 * EVERY, kept: 3 * EVERY, too_short: 3 * EVERY });
        assert!(met.borrow().is_sorted());
        let error = count(texts(""), &Interrupt::new(), |_| {}).unwrap_err();
        assert!(error.to_string().starts_with("the dataset has no texts"), "{error}");
    }

    #[test]
    fn a_request_ends_the_wait_for_a_message_that_never_comes() {
        let (_sender, messages) = sync_channel::<()>(1);
        let interrupt = Interrupt::new();
        let waiting = std::thread::spawn({
            let interrupt = interrupt.clone();
            move || wait(&messages, &interrupt)
        });
        std::thread::sleep(2 * LOOK);
        assert!(!waiting.is_finished());
        interrupt.request();
        let error = waiting.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), Kind::Interrupted { exit_code: 130 });
    }
}
