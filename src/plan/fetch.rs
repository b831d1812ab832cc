//! Bringing files of the hub here, and showing it.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::error::Result;
use crate::hub::{Hub, Kind, Progress, Repo, RepoSpec, Settings};
use crate::interrupt::Interrupt;
use crate::output::Log;
use crate::output::progress::{Bar, Unit};
use crate::units::size;

/// The way to the hub; what nobody asks for is not even looked up.
#[derive(Clone)]
pub struct Fetcher {
    log: Log,
    interrupt: Interrupt,
    hub: OnceLock<Hub>,
}

impl Fetcher {
    /// One that says on `log` what it does.
    pub fn new(log: &Log, interrupt: &Interrupt) -> Self {
        Self { log: log.clone(), interrupt: interrupt.clone(), hub: OnceLock::new() }
    }

    /// The hub that the environment names.
    ///
    /// # Errors
    /// The environment makes no sense.
    pub fn hub(&self) -> Result<&Hub> {
        if let Some(hub) = self.hub.get() {
            return Ok(hub);
        }
        let log = self.log.clone();
        let hub = Hub::new(Settings::from_env()?, &self.interrupt, Arc::new(move |text| log.note(text)))?;
        Ok(self.hub.get_or_init(|| hub))
    }

    /// A repository, with a warning where it may be out of date.
    pub(super) fn open(&self, kind: Kind, id: &str, revision: &str) -> Result<Repo> {
        let spec = RepoSpec { kind, id: id.to_owned(), revision: revision.to_owned() };
        let repo = self.hub()?.open(&spec)?;
        if let Some(note) = repo.note() {
            self.log.warn(note);
        }
        Ok(repo)
    }

    /// Makes sure that these files are here.
    pub(super) fn get(&self, repo: &Repo, paths: &[impl AsRef<str>]) -> Result<()> {
        repo.get(paths, &Shown { log: &self.log, bar: Mutex::new(None) })
    }

    /// Who may ask to stop.
    pub(super) fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// For what has to be said on the way.
    pub(super) fn log(&self) -> &Log {
        &self.log
    }
}

/// A bar that is up while files come.
struct Shown<'a> {
    log: &'a Log,
    bar: Mutex<Option<Bar>>,
}

impl Shown<'_> {
    fn bar(&self, show: impl FnOnce(&mut Option<Bar>)) {
        show(&mut self.bar.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Progress for Shown<'_> {
    fn start(&self, id: &str, files: usize, bytes: u64) {
        let noun = if files == 1 { "file" } else { "files" };
        self.log.note(&format!("downloading {files} {noun} of {id}, {}", size(bytes)));
        self.bar(|bar| *bar = Some(self.log.bar("downloading", Unit::Bytes, Some(bytes))));
    }

    fn done(&self, bytes: u64) {
        self.bar(|bar| bar.iter().for_each(|bar| bar.set(bytes)));
    }

    fn had(&self, bytes: u64) {
        self.bar(|bar| bar.iter().for_each(|bar| bar.had(bytes)));
    }
}
