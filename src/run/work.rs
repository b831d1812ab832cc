//! Where passes are computed, and what they add up to.

use super::on_cuda::OnCuda;
use super::results::Results;
use crate::backend::cpu::Cpu;
use crate::engine::{Engine, Totals};
use crate::error::Result;
use crate::interrupt::Interrupt;
use crate::plan::{Devices, Plan};
use crate::source::Pass;
use crate::stats::{MomentSink, SaeSink, TokenPolicy};

/// Computes passes, which it is handed in corpus order.
pub(super) trait Work {
    /// Takes a pass, and perhaps returns before it is computed.
    ///
    /// # Errors
    /// A NaN in the model, a device that failed, an interruption: in this pass or in one before.
    fn take(&mut self, pass: Pass) -> Result<()>;

    /// Whether passes are computed while the next one is waited for.
    fn goes_on(&self) -> bool;

    /// What the passes that are done add up to.
    fn totals(&self) -> &Totals;

    /// Waits for all passes; the sums of every wanted layer.
    ///
    /// # Errors
    /// As [`Work::take`].
    fn finish(&mut self) -> Result<Results>;
}

/// Passes one after the other on the CPU. Sums go on from pass to pass, so they do not depend on where one ends.
struct OnCpu<'a> {
    cpu: &'a Cpu<f32>,
    engine: Engine<'a, Cpu<f32>>,
    sink: CpuSink,
    totals: Totals,
}

/// What the passes are shown to.
enum CpuSink {
    Dimensions(MomentSink<Cpu<f32>>),
    Features(SaeSink<Cpu<f32>>),
    /// The same, with one layer's site replaced at a time.
    Spliced(SaeSink<Cpu<f32>>),
}

impl Work for OnCpu<'_> {
    fn take(&mut self, pass: Pass) -> Result<()> {
        let run = match &mut self.sink {
            CpuSink::Dimensions(sink) => {
                let run = self.engine.run(&pass, sink)?;
                sink.check(self.cpu)?;
                run
            }
            CpuSink::Features(sink) => self.engine.run(&pass, sink)?,
            CpuSink::Spliced(sink) => self.engine.run_spliced(&pass, sink)?,
        };
        self.totals.add(&run.settle(self.cpu)?);
        Ok(())
    }

    fn goes_on(&self) -> bool {
        false
    }

    fn totals(&self) -> &Totals {
        &self.totals
    }

    fn finish(&mut self) -> Result<Results> {
        Ok(match &mut self.sink {
            CpuSink::Dimensions(sink) => Results::Dimensions(sink.read(self.cpu)?),
            CpuSink::Features(sink) | CpuSink::Spliced(sink) => Results::Features(sink.take(self.cpu)?),
        })
    }
}

/// The devices of `plan`, with the model on them. `cpu`: the CPU, if it is the device; `policy`: which tokens count.
///
/// # Errors
/// A device that cannot be opened or has no room for the model.
pub(super) fn start<'a>(
    plan: &Plan,
    cpu: &'a Cpu<f32>,
    policy: &TokenPolicy,
    interrupt: &Interrupt,
) -> Result<Box<dyn Work + 'a>> {
    if let Devices::Cuda { devices, lower, .. } = &plan.devices {
        return Ok(Box::new(OnCuda::start(plan, devices, *lower, policy, interrupt)?));
    }
    let engine = Engine::new(cpu, &plan.spec, &plan.tensors, plan.engine.clone());
    let sink = match &plan.sae {
        None => {
            let sink = MomentSink::new(&plan.widths());
            CpuSink::Dimensions(sink.counting(policy.clone(), plan.engine.gradients))
        }
        Some(sae) => {
            let sink = SaeSink::new(sae.spec(plan.quantity, plan.transform.mode)).counting(policy.clone());
            match sae.is_spliced(plan.quantity) {
                true => CpuSink::Spliced(sink),
                false => CpuSink::Features(sink),
            }
        }
    };
    let engine = engine.interruptible(interrupt.clone());
    Ok(Box::new(OnCpu { cpu, engine, sink, totals: Totals::default() }))
}
