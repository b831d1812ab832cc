//! Ctrl-C and `kill`: a request to stop, looked at wherever a run can stop and leave nothing half done.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::error::{Context, Error, Result};

/// Whether somebody asked the program to stop. Clones share the request.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    /// The number of the signal; 0 while nobody asked.
    signal: Arc<AtomicUsize>,
    /// Another request that counts as well.
    other: Option<Arc<AtomicUsize>>,
}

impl Interrupt {
    /// One that only [`Interrupt::request`] sets off, for library users and tests.
    pub fn new() -> Self {
        Self::default()
    }

    /// One that Ctrl-C (SIGINT) and `kill` (SIGTERM, which Slurm sends before it kills) set off. The second signal
    /// ends the process on the spot.
    ///
    /// # Errors
    /// The system refuses the handlers.
    pub fn on_signals() -> Result<Self> {
        let interrupt = Self::new();
        let once = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds `once` unset, and sets it.
            flag::register_conditional_shutdown(signal, exit_code(signal), Arc::clone(&once))
                .and_then(|_| flag::register(signal, Arc::clone(&once)))
                .and_then(|_| flag::register_usize(signal, Arc::clone(&interrupt.signal), signal as usize))
                .context("cannot listen for Ctrl-C")?;
        }
        Ok(interrupt)
    }

    /// Asks to stop, as Ctrl-C does.
    pub fn request(&self) {
        self.signal.store(SIGINT as usize, Ordering::SeqCst);
    }

    /// One that `other` sets off too.
    pub fn or(&self, other: &Self) -> Self {
        Self { signal: Arc::clone(&self.signal), other: Some(Arc::clone(&other.signal)) }
    }

    /// The number of the signal, or 0.
    fn signal(&self) -> usize {
        let own = self.signal.load(Ordering::SeqCst);
        let other = || self.other.as_ref().map_or(0, |other| other.load(Ordering::SeqCst));
        if own == 0 { other() } else { own }
    }

    /// Whether somebody asked.
    pub fn requested(&self) -> bool {
        self.signal() != 0
    }

    /// Fails once somebody asked.
    ///
    /// # Errors
    /// [`Kind::Interrupted`](crate::error::Kind::Interrupted).
    pub fn check(&self) -> Result<()> {
        match self.signal() {
            0 => Ok(()),
            signal => Err(Error::interrupted(exit_code(signal as i32) as u8)),
        }
    }
}

/// What shells expect of a process that a signal ended: 130 after Ctrl-C.
fn exit_code(signal: i32) -> i32 {
    128 + signal
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn a_request_is_seen_by_every_clone() {
        let interrupt = Interrupt::new();
        let clone = interrupt.clone();
        assert!(clone.check().is_ok());
        interrupt.request();
        assert!(clone.requested());
        assert_eq!(clone.check().unwrap_err().kind(), Kind::Interrupted { exit_code: 130 });
    }

    #[test]
    fn either_of_two_requests_counts() {
        let (one, two) = (Interrupt::new(), Interrupt::new());
        let either = one.or(&two);
        assert!(!either.requested());
        two.request();
        assert!(either.requested() && !one.requested());
    }
}
