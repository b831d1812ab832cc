//! Samples → ragged passes, made ahead of their use on a thread of their own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::panics::message;
use super::text::{TextCounts, Texts};
use super::tokens::{Sample, Tokens};
use super::wait::wait;
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;

/// N tokens of B whole samples, ragged, in corpus order. Samples without tokens are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Token ids `[N]`.
    pub ids: Vec<u32>,
    /// Where samples start and end in `ids` [B+1]: 0, …, N; strictly rising.
    pub cu_seqlens: Vec<usize>,
    /// Which kept text each sample is, from 0 `[B]`; rising, with gaps only where a text has no tokens.
    pub samples: Vec<u64>,
    /// Σ max(T−1, 0) over the batch of each sample `[B]`: the consecutive `batch_size` kept texts it belongs to.
    pub batch_targets: Vec<u64>,
}

impl Pass {
    /// B.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether the pass holds no sample; [`Passes`] gives none such.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }
}

/// How to pack.
#[derive(Clone, Copy, Debug)]
pub struct PassSpec {
    /// N at most; a single longer sample is a pass of its own.
    pub tokens_per_pass: usize,
    /// Kept texts of one batch, for [`Pass::batch_targets`] alone: packing does not depend on it. That many samples
    /// are held back until their batch is complete, so give 1 where batches mean nothing. 0 counts as 1.
    pub batch_size: usize,
}

/// What was met so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceCounts {
    /// Texts read, kept and left out.
    pub texts: TextCounts,
    /// Kept texts cut to `max_length`.
    pub truncated: u64,
    /// Tokens of all kept texts.
    pub tokens: u64,
    /// Kept texts of a single token: they have no loss.
    pub one_token: u64,
    /// Kept texts without any token: no pass holds them.
    pub no_token: u64,
    /// Whether all texts have been read: the counts of texts are final.
    pub all_read: bool,
}

/// Texts tokenised at once at most, so that all threads have work.
const BLOCK_TEXTS: usize = 512;
/// Bytes of text tokenised at once, give or take the last text.
const BLOCK_BYTES: usize = 4 << 20;
/// Passes that wait for the consumer.
const PASSES_AHEAD: usize = 2;
/// How long a drop waits for the thread: one that computes ends soon; one that hangs in a read may never.
const PATIENCE: Duration = Duration::from_millis(500);

/// The passes of a dataset. Dropping it ends its thread, or leaves it to itself where it hangs in a read.
pub struct Passes {
    /// `None` once all came.
    made: Option<Receiver<Made>>,
    thread: Option<JoinHandle<()>>,
    counts: SourceCounts,
    interrupt: Interrupt,
    /// Tells the thread that nobody wants more.
    unwanted: Arc<AtomicBool>,
}

enum Made {
    Pass(Pass, SourceCounts),
    End(Result<SourceCounts>),
}

/// The consumer is gone.
struct Unwanted;

impl Passes {
    /// Starts reading `texts` in the background.
    pub fn start(texts: Texts, tokens: Tokens, spec: PassSpec) -> Self {
        let encode = move |texts: &[String]| tokens.encode(texts);
        Self::with(texts, encode, spec)
    }

    fn with<E>(texts: Texts, encode: E, spec: PassSpec) -> Self
    where
        E: Fn(&[String]) -> Result<Vec<Sample>> + Send + 'static,
    {
        let (sender, made) = sync_channel(PASSES_AHEAD);
        let unwanted = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&unwanted);
        let maker = move || {
            let mut packer = Packer::new(spec, sender.clone());
            // Where nobody listens any more there is nobody to tell.
            let _ = match make(texts, encode, &mut packer, &stop) {
                Ok(Ok(())) => sender.send(Made::End(Ok(packer.counts))),
                Ok(Err(error)) => sender.send(Made::End(Err(error))),
                Err(Unwanted) => Ok(()),
            };
        };
        let (made, thread) = match std::thread::Builder::new().name("source".into()).spawn(maker) {
            Ok(thread) => (made, Some(thread)),
            Err(cause) => {
                let (sender, made) = sync_channel(1);
                let error = Error::new("cannot start a thread to read the dataset").found(cause);
                let _ = sender.send(Made::End(Err(error)));
                (made, None)
            }
        };
        let (counts, interrupt) = (SourceCounts::default(), Interrupt::new());
        Self { made: Some(made), thread, counts, interrupt, unwanted }
    }

    /// With `interrupt`, upon which the wait for the next pass ends with an error.
    pub fn interruptible(mut self, interrupt: Interrupt) -> Self {
        self.interrupt = interrupt;
        self
    }

    /// What was read when the latest pass was complete (reading is ahead of the passes); final after the last.
    pub fn counts(&self) -> SourceCounts {
        self.counts
    }
}

impl Iterator for Passes {
    type Item = Result<Pass>;

    fn next(&mut self) -> Option<Result<Pass>> {
        let next = match wait(self.made.as_ref()?, &self.interrupt) {
            Ok(Some(Made::Pass(pass, counts))) => {
                self.counts = counts;
                return Some(Ok(pass));
            }
            Ok(Some(Made::End(Ok(counts)))) => {
                self.counts = counts;
                None
            }
            Ok(Some(Made::End(Err(error)))) | Err(error) => Some(Err(error)),
            // The thread went without a word: it panicked.
            Ok(None) => {
                let cause = self.thread.take().map(JoinHandle::join);
                let cause = match cause {
                    Some(Err(panic)) => message(panic.as_ref()),
                    _ => "no reason given".into(),
                };
                Some(Err(Error::new("reading the dataset failed inside gradlens")
                    .found(cause)
                    .hint("please report this with the text that caused it")))
            }
        };
        self.made = None;
        next
    }
}

impl Drop for Passes {
    fn drop(&mut self) {
        // Without a receiver the thread's next send fails, and it ends.
        self.made = None;
        self.unwanted.store(true, Ordering::Relaxed);
        let dropped = Instant::now();
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            if dropped.elapsed() > PATIENCE {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        if let Some(thread) = self.thread.take() {
            // If it panicked, the panic has printed itself, and the passes it made are whole.
            let _ = thread.join();
        }
    }
}

/// Reads, tokenises and packs everything, until it is `unwanted`.
fn make<E>(
    mut texts: Texts,
    encode: E,
    packer: &mut Packer,
    unwanted: &AtomicBool,
) -> Result<Result<()>, Unwanted>
where
    E: Fn(&[String]) -> Result<Vec<Sample>>,
{
    let mut block = Vec::new();
    loop {
        block.clear();
        let mut bytes = 0;
        let mut failed = None;
        while block.len() < BLOCK_TEXTS && bytes < BLOCK_BYTES {
            if unwanted.load(Ordering::Relaxed) {
                return Err(Unwanted);
            }
            match texts.next() {
                Some(Ok(text)) => {
                    bytes += text.len();
                    block.push(text);
                }
                Some(Err(error)) => {
                    failed = Some(error);
                    break;
                }
                None => {
                    packer.counts.all_read = true;
                    break;
                }
            }
        }
        packer.counts.texts = texts.counts();
        // Texts before the damage are still good: the passes they fill come first, then the error.
        let samples = match encode(&block) {
            Ok(samples) => samples,
            Err(error) => return Ok(Err(error)),
        };
        for sample in samples {
            packer.push(sample)?;
        }
        if let Some(error) = failed {
            return Ok(Err(error));
        }
        if block.is_empty() {
            packer.finish()?;
            return Ok(Ok(()));
        }
    }
}

/// Fills passes greedily, a whole batch of samples at a time.
struct Packer {
    spec: PassSpec,
    out: SyncSender<Made>,
    /// The samples of the batch that is not complete yet.
    batch: Vec<Vec<u32>>,
    /// The kept text that is next.
    next_sample: u64,
    pass: Pass,
    counts: SourceCounts,
}

impl Packer {
    fn new(spec: PassSpec, out: SyncSender<Made>) -> Self {
        let pass = Pass::default();
        Self { spec, out, batch: Vec::new(), next_sample: 0, pass, counts: SourceCounts::default() }
    }

    fn push(&mut self, sample: Sample) -> Result<(), Unwanted> {
        self.counts.tokens += sample.ids.len() as u64;
        self.counts.truncated += u64::from(sample.truncated);
        self.counts.one_token += u64::from(sample.ids.len() == 1);
        self.counts.no_token += u64::from(sample.ids.is_empty());
        self.batch.push(sample.ids);
        if self.batch.len() >= self.spec.batch_size {
            return self.release();
        }
        Ok(())
    }

    /// Moves the batch into passes, now that its number of targets is known.
    fn release(&mut self) -> Result<(), Unwanted> {
        let targets = self.batch.iter().map(|ids| ids.len().saturating_sub(1) as u64).sum();
        for ids in std::mem::take(&mut self.batch) {
            let sample = self.next_sample;
            self.next_sample += 1;
            if ids.is_empty() {
                continue;
            }
            if !self.pass.is_empty() && self.pass.ids.len() + ids.len() > self.spec.tokens_per_pass {
                self.send()?;
            }
            let pass = &mut self.pass;
            if pass.is_empty() {
                pass.cu_seqlens.push(0);
            }
            pass.ids.extend_from_slice(&ids);
            pass.cu_seqlens.push(pass.ids.len());
            pass.samples.push(sample);
            pass.batch_targets.push(targets);
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), Unwanted> {
        self.release()?;
        if self.pass.is_empty() { Ok(()) } else { self.send() }
    }

    fn send(&mut self) -> Result<(), Unwanted> {
        let pass = std::mem::take(&mut self.pass);
        self.out.send(Made::Pass(pass, self.counts)).map_err(|_| Unwanted)
    }
}

#[cfg(test)]
#[path = "pack_tests.rs"]
mod tests;
