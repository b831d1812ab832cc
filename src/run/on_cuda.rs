//! Passes on CUDA devices, one thread for each: pass p goes to device p mod n, sums are added in pass order, so they are
//! the same for any number of devices.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use super::work::{Layers, Work};
use crate::backend::cuda::{CudaBackend, CudaLower, CudaSpec};
use crate::engine::{Engine, EngineSpec, PassRun, PassTotals, Totals};
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::model::{Spec, Tensor};
use crate::plan::Plan;
use crate::source::Pass;
use crate::stats::MomentSink;

/// What a device's thread is given.
struct Job {
    device: CudaSpec,
    lower: CudaLower,
    spec: Spec,
    tensors: Vec<Tensor>,
    engine: EngineSpec,
    interrupt: Interrupt,
    /// What the device's memory is for.
    planned: String,
}

/// What a thread sends: that it is ready, and what a pass adds up to, by the pass's number.
enum Answer {
    Ready,
    Pass(u64, PassTotals, Layers),
    Failed(Error),
}

/// The devices' threads.
pub(super) struct OnCuda {
    /// Passes to each device; `None` when there are no more.
    passes: Option<Vec<SyncSender<(u64, Pass)>>>,
    answers: Receiver<Answer>,
    threads: Vec<JoinHandle<()>>,
    /// Passes handed out, and those that are added up.
    sent: u64,
    added: u64,
    /// Passes that were done before an earlier one.
    early: BTreeMap<u64, (PassTotals, Layers)>,
    totals: Totals,
    layers: Layers,
}

impl OnCuda {
    /// Opens the devices and loads the model on each.
    ///
    /// # Errors
    /// A device that cannot be opened or has no room for the model.
    pub(super) fn start(
        plan: &Plan,
        devices: &[CudaSpec],
        lower: CudaLower,
        interrupt: &Interrupt,
    ) -> Result<Self> {
        let (answer, answers) = channel();
        let mut passes = Vec::new();
        let mut threads = Vec::new();
        for device in devices {
            // One pass waits while one computes: the device never does.
            let (sender, receiver) = sync_channel(1);
            let job = Job {
                device: device.clone(),
                lower,
                spec: plan.spec.clone(),
                tensors: plan.tensors.clone(),
                engine: plan.engine.clone(),
                interrupt: interrupt.clone(),
                planned: plan.memory.to_string(),
            };
            let answer = answer.clone();
            let thread = std::thread::Builder::new().name(format!("cuda:{}", device.ordinal));
            let thread = thread.spawn(move || {
                if let Err(error) = job.run(&receiver, &answer) {
                    // Nobody listens where another device has failed.
                    let _ = answer.send(Answer::Failed(error));
                }
            });
            threads.push(
                thread.map_err(|refusal| Error::new("cannot start a thread for a device").found(refusal))?,
            );
            passes.push(sender);
        }
        let mut work = Self {
            passes: Some(passes),
            answers,
            threads,
            sent: 0,
            added: 0,
            early: BTreeMap::new(),
            totals: Totals::default(),
            layers: Layers::new(),
        };
        let mut ready = 0;
        while ready < devices.len() {
            match work.answers.recv() {
                Ok(Answer::Ready) => ready += 1,
                Ok(answer) => work.take_in(answer)?,
                Err(_) => return Err(work.lost()),
            }
        }
        Ok(work)
    }

    fn take_in(&mut self, answer: Answer) -> Result<()> {
        match answer {
            Answer::Ready => {}
            Answer::Failed(error) => return Err(error),
            Answer::Pass(number, totals, layers) => {
                self.early.insert(number, (totals, layers));
                while let Some((totals, layers)) = self.early.remove(&self.added) {
                    self.added += 1;
                    self.totals.add(&totals);
                    for (layer, moments) in layers {
                        self.layers.entry(layer).or_default().add(&moments);
                    }
                }
            }
        }
        Ok(())
    }

    /// A thread that ended without a word has panicked.
    fn lost(&mut self) -> Error {
        self.passes = None;
        for thread in self.threads.drain(..) {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
        Error::new("a device's thread ended early")
    }
}

impl Work for OnCuda {
    fn take(&mut self, pass: Pass) -> Result<()> {
        while let Ok(answer) = self.answers.try_recv() {
            self.take_in(answer)?;
        }
        let Some(passes) = &self.passes else { return Err(self.lost()) };
        let device = (self.sent % passes.len() as u64) as usize;
        if passes[device].send((self.sent, pass)).is_err() {
            // Why it ended is among the answers.
            while let Ok(answer) = self.answers.recv() {
                self.take_in(answer)?;
            }
            return Err(self.lost());
        }
        self.sent += 1;
        Ok(())
    }

    fn totals(&self) -> &Totals {
        &self.totals
    }

    fn finish(&mut self) -> Result<Layers> {
        self.passes = None;
        while self.added < self.sent {
            match self.answers.recv() {
                Ok(answer) => self.take_in(answer)?,
                Err(_) => return Err(self.lost()),
            }
        }
        Ok(std::mem::take(&mut self.layers))
    }
}

impl Drop for OnCuda {
    fn drop(&mut self) {
        // Devices are closed before the process ends.
        self.passes = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Job {
    fn run(self, passes: &Receiver<(u64, Pass)>, answer: &Sender<Answer>) -> Result<()> {
        let Self { device, lower, spec, tensors, engine, interrupt, planned } = self;
        let backend = CudaBackend::open(device, lower)?.planned_for(planned);
        let (layers, width) = (engine.layers.clone(), spec.hidden_size);
        let mut engine = Engine::new(&backend, &spec, &tensors, engine).interruptible(interrupt);
        engine.load()?;
        let send = |ran: Ran| -> Result<()> {
            let (number, run, mut sink) = ran;
            let layers = sink.read(&backend)?;
            // Nobody listens where another device has failed.
            let _ = answer.send(Answer::Pass(number, run.settle(&backend)?, layers));
            Ok(())
        };
        let _ = answer.send(Answer::Ready);
        // A pass is read back when the next one is under way.
        let mut before: Option<Ran> = None;
        while let Some((number, pass)) = next(passes, before.is_some()) {
            let Some(pass) = pass else {
                before.take().map(&send).transpose()?;
                continue;
            };
            let mut sink = MomentSink::new(&layers, width);
            let run = engine.run(&pass, &mut sink)?;
            before.replace((number, run, sink)).map(&send).transpose()?;
        }
        before.map(&send).transpose()?;
        Ok(())
    }
}

/// A pass that was asked for, by its number.
type Ran = (u64, PassRun<CudaBackend>, MomentSink<CudaBackend>);

/// The next pass; `Some((_, None))` where none is there yet and the one before can be read back meanwhile.
fn next(passes: &Receiver<(u64, Pass)>, pending: bool) -> Option<(u64, Option<Pass>)> {
    use std::sync::mpsc::TryRecvError;
    if pending {
        match passes.try_recv() {
            Ok((number, pass)) => return Some((number, Some(pass))),
            Err(TryRecvError::Empty) => return Some((0, None)),
            Err(TryRecvError::Disconnected) => return None,
        }
    }
    passes.recv().ok().map(|(number, pass)| (number, Some(pass)))
}
