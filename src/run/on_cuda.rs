//! Passes on CUDA devices, one thread for each: pass p goes to device p mod n, sums are added in pass order, so they are
//! the same for any number of devices.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use super::results::Results;
use super::work::Work;
use crate::backend::cuda::{CudaBackend, CudaLower, CudaSpec};
use crate::engine::{Engine, EngineSpec, PassRun, PassTotals, Totals};
use crate::error::{Error, Kind, Result};
use crate::interrupt::Interrupt;
use crate::model::op::Site;
use crate::model::{Spec, Tensor};
use crate::plan::Plan;
use crate::source::Pass;
use crate::stats::{LayerMoments, MomentSink, SiteMoments, TokenPolicy};

/// What a device's thread is given.
struct Job {
    device: CudaSpec,
    lower: CudaLower,
    spec: Spec,
    tensors: Vec<Tensor>,
    engine: EngineSpec,
    policy: TokenPolicy,
    interrupt: Interrupt,
    /// What the device's memory is for.
    planned: String,
}

/// What a thread sends: that it is ready, and what a pass adds up to, by the pass's number.
enum Answer {
    Ready,
    Pass(u64, PassTotals, SiteMoments),
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
    early: BTreeMap<u64, (PassTotals, SiteMoments)>,
    totals: Totals,
    sites: SiteMoments,
    /// Stops the other devices when one has failed.
    stop: Interrupt,
    finished: bool,
}

impl OnCuda {
    /// Opens the devices and loads the model on each. `policy`: which tokens count.
    ///
    /// # Errors
    /// A device that cannot be opened or has no room for the model.
    pub(super) fn start(
        plan: &Plan,
        devices: &[CudaSpec],
        lower: CudaLower,
        policy: &TokenPolicy,
        interrupt: &Interrupt,
    ) -> Result<Self> {
        let (answer, answers) = channel();
        let stop = Interrupt::new();
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
                policy: policy.clone(),
                interrupt: interrupt.or(&stop),
                planned: plan.memory.to_string(),
            };
            let answer = answer.clone();
            let thread = std::thread::Builder::new().name(format!("cuda:{}", device.ordinal));
            // What a panic leaves behind is not looked at again.
            let thread = thread.spawn(move || {
                if catch_unwind(AssertUnwindSafe(|| job.run(&receiver, &answer))).is_err() {
                    let error =
                        Error::new("the thread of a device has panicked: this is a mistake in gradlens")
                            .hint("the message before this one says where; --device cpu may get round it");
                    send(&answer, Answer::Failed(error));
                }
            });
            threads.push(
                thread.map_err(|refusal| Error::new("cannot start a thread for a device").found(refusal))?,
            );
            passes.push(sender);
        }
        // The threads' own are left: when all have ended, nobody is waited for.
        drop(answer);
        let mut work = Self {
            passes: Some(passes),
            answers,
            threads,
            sent: 0,
            added: 0,
            early: BTreeMap::new(),
            totals: Totals::default(),
            sites: SiteMoments::new(),
            stop,
            finished: false,
        };
        let mut ready = 0;
        while ready < devices.len() {
            match work.answers.recv() {
                Ok(Answer::Ready) => ready += 1,
                Ok(answer) => work.take_in(answer)?,
                Err(_) => return Err(lost()),
            }
        }
        Ok(work)
    }

    fn take_in(&mut self, answer: Answer) -> Result<()> {
        match answer {
            Answer::Ready => {}
            Answer::Failed(error) => return Err(error),
            Answer::Pass(number, totals, sites) => {
                self.early.insert(number, (totals, sites));
                while let Some((totals, sites)) = self.early.remove(&self.added) {
                    self.added += 1;
                    self.totals.add(&totals);
                    for (place, moments) in sites {
                        self.sites.entry(place).or_default().add(&moments);
                    }
                }
            }
        }
        Ok(())
    }
}

/// The threads have ended, and none has said why.
fn lost() -> Error {
    Error::new("a device's thread ended early")
}

/// Sends unless nobody listens any more, as after the failure of another device.
fn send(answers: &Sender<Answer>, answer: Answer) {
    let _ = answers.send(answer);
}

impl Work for OnCuda {
    fn take(&mut self, pass: Pass) -> Result<()> {
        while let Ok(answer) = self.answers.try_recv() {
            self.take_in(answer)?;
        }
        let Some(passes) = &self.passes else { return Err(lost()) };
        let device = (self.sent % passes.len() as u64) as usize;
        if passes[device].send((self.sent, pass)).is_err() {
            // Why it ended is among the answers; the others end when there are no more passes.
            self.passes = None;
            while let Ok(answer) = self.answers.recv() {
                self.take_in(answer)?;
            }
            return Err(lost());
        }
        self.sent += 1;
        Ok(())
    }

    fn goes_on(&self) -> bool {
        true
    }

    fn totals(&self) -> &Totals {
        &self.totals
    }

    fn finish(&mut self) -> Result<Results> {
        self.passes = None;
        while self.added < self.sent {
            match self.answers.recv() {
                Ok(answer) => self.take_in(answer)?,
                Err(_) => return Err(lost()),
            }
        }
        self.finished = true;
        self.sites.values_mut().for_each(LayerMoments::round);
        Ok(Results::Dimensions(std::mem::take(&mut self.sites)))
    }
}

impl Drop for OnCuda {
    fn drop(&mut self) {
        // Devices are closed before the process ends; on a failure nobody finishes a pass for nothing.
        self.passes = None;
        if !self.finished {
            self.stop.request();
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Job {
    /// Opens the device and computes passes until there are no more. What fails is among the answers.
    fn run(self, passes: &Receiver<(u64, Pass)>, answers: &Sender<Answer>) {
        let Self { device, lower, spec, tensors, engine, policy, interrupt, planned } = self;
        let ordinal = device.ordinal;
        let failed = |error: Error| {
            let error = match error.kind() {
                Kind::Interrupted { .. } => error,
                Kind::Failed | Kind::Usage => error.at(format!("cuda:{ordinal}")),
            };
            send(answers, Answer::Failed(error));
        };
        let backend = match CudaBackend::open(device, lower) {
            Ok(backend) => backend.planned_for(planned),
            Err(error) => return failed(error),
        };
        let (widths, gradients) = (engine.widths(&spec), engine.gradients);
        let engine = Engine::new(&backend, &spec, &tensors, engine).interruptible(interrupt);
        let mut worker = Worker { backend: &backend, engine, widths, policy, gradients, answers };
        if let Err(error) = worker.work(passes) {
            // Before the device is closed, which waits for what it is at.
            failed(error);
        }
    }
}

/// A device with the model on it.
struct Worker<'a> {
    backend: &'a CudaBackend,
    engine: Engine<'a, CudaBackend>,
    /// Of each wanted site.
    widths: BTreeMap<(usize, Site), usize>,
    policy: TokenPolicy,
    gradients: bool,
    answers: &'a Sender<Answer>,
}

impl Worker<'_> {
    fn work(&mut self, passes: &Receiver<(u64, Pass)>) -> Result<()> {
        self.engine.load()?;
        send(self.answers, Answer::Ready);
        // A pass is read back when the next one is under way.
        let mut before: Option<Ran> = None;
        while let Some((number, pass)) = next(passes, before.is_some()) {
            let ran = match pass {
                None => before.take(),
                Some(pass) => {
                    let sink = MomentSink::new(&self.widths);
                    let mut sink = sink.counting(self.policy.clone(), self.gradients);
                    let run = self.engine.run(&pass, &mut sink)?;
                    before.replace((number, run, sink))
                }
            };
            self.answer(ran)?;
        }
        self.answer(before)
    }

    /// Reads back what was asked for.
    fn answer(&self, ran: Option<Ran>) -> Result<()> {
        let Some((number, run, mut sink)) = ran else { return Ok(()) };
        let sites = sink.read(self.backend)?;
        send(self.answers, Answer::Pass(number, run.settle(self.backend)?, sites));
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
