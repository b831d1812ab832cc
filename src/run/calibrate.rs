//! What norms are measured against: a look at the first samples before the run.

use std::collections::{BTreeMap, VecDeque};

use super::counting::nothing_left;
use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::CudaBackend;
use crate::engine::{Engine, EngineSpec};
use crate::error::{Error, Kind, Result};
use crate::interrupt::Interrupt;
use crate::model::op::Site;
use crate::plan::{Devices, Plan};
use crate::source::{Pass, Passes, SourceCounts};
use crate::stats::{NormSink, TokenPolicy};

/// Samples whose tokens the medians are of.
const SAMPLES: usize = 64;

/// Passes, of which some were looked at before their turn.
pub(super) struct Ahead {
    held: VecDeque<Pass>,
    passes: Passes,
}

impl Ahead {
    /// None was looked at.
    pub(super) fn new(passes: Passes) -> Self {
        Self { held: VecDeque::new(), passes }
    }

    /// The next pass, if there is one.
    ///
    /// # Errors
    /// Texts that cannot be read, an interruption.
    pub(super) fn next(&mut self) -> Result<Option<Pass>> {
        match self.held.pop_front() {
            Some(pass) => Ok(Some(pass)),
            None => self.passes.next().transpose(),
        }
    }

    /// As [`Passes::counts`].
    pub(super) fn counts(&self) -> SourceCounts {
        self.passes.counts()
    }

    /// The first `count` samples from `pass` on, which comes again.
    fn look(&mut self, pass: Pass, count: usize) -> Result<Vec<Pass>> {
        self.held.push_front(pass);
        while self.held.iter().map(Pass::len).sum::<usize>() < count {
            match self.passes.next().transpose()? {
                Some(pass) => self.held.push_back(pass),
                None => break,
            }
        }
        Ok(first_samples(&self.held, count))
    }
}

/// The first `count` samples: no more of the last pass, so that they do not depend on how samples are packed.
fn first_samples(passes: &VecDeque<Pass>, count: usize) -> Vec<Pass> {
    let mut left = count;
    let cut = |pass: &Pass| {
        let samples = pass.len().min(left);
        left -= samples;
        (samples > 0).then(|| Pass {
            ids: pass.ids[..pass.cu_seqlens[samples]].to_vec(),
            cu_seqlens: pass.cu_seqlens[..=samples].to_vec(),
            samples: pass.samples[..samples].to_vec(),
            batch_targets: pass.batch_targets[..samples].to_vec(),
        })
    };
    passes.iter().map_while(cut).collect()
}

/// Finds the medians that `policy` measures norms against, in the first samples of `passes` from `first` on. These come
/// again.
///
/// # Errors
/// A NaN in the model, rules that leave no token, a device that failed, an interruption.
pub(super) fn calibrate(
    plan: &Plan,
    cpu: &Cpu<f32>,
    policy: &mut TokenPolicy,
    passes: &mut Ahead,
    first: Pass,
    interrupt: &Interrupt,
) -> Result<()> {
    let passes = passes.look(first, SAMPLES)?;
    let medians = match &plan.devices {
        Devices::Cpu => medians(plan, cpu, policy, &passes, interrupt),
        // The others measure against the same.
        Devices::Cuda { devices, lower, .. } => {
            let Some(device) = devices.first() else { return Ok(()) };
            let found = CudaBackend::open(device.clone(), *lower)
                .map(|backend| backend.planned_for(plan.memory.to_string()))
                .and_then(|backend| medians(plan, &backend, policy, &passes, interrupt));
            found.map_err(|error| match error.kind() {
                Kind::Interrupted { .. } => error,
                Kind::Failed | Kind::Usage => error.at(format!("cuda:{}", device.ordinal)),
            })
        }
    }?;
    if let Some(rule) = &mut policy.norms {
        rule.medians = medians;
    }
    Ok(())
}

/// The median norm of each wanted layer and site, from a forward as far as the last of them.
fn medians<B: Backend>(
    plan: &Plan,
    backend: &B,
    policy: &TokenPolicy,
    passes: &[Pass],
    interrupt: &Interrupt,
) -> Result<BTreeMap<(usize, Site), f64>> {
    let spec = EngineSpec { gradients: false, ..plan.engine.clone() };
    let engine = Engine::new(backend, &plan.spec, &plan.tensors, spec);
    let mut engine = engine.interruptible(interrupt.clone());
    let mut sink = NormSink::new(policy);
    for pass in passes {
        engine.run(pass, &mut sink)?.settle(backend)?;
    }
    let tokens = passes.iter().map(|pass| pass.ids.len() as u64).sum();
    sink.medians().map_err(|skipped| -> Error {
        let samples = passes.iter().map(Pass::len).sum::<usize>();
        nothing_left(plan, &skipped, tokens)
            .at(format!("the first {samples} samples, whose median norm --max_norm_ratio asks for"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(samples: std::ops::Range<u64>) -> Pass {
        let count = samples.clone().count();
        Pass {
            ids: (0..2 * count as u32).collect(),
            cu_seqlens: (0..=count).map(|sample| 2 * sample).collect(),
            samples: samples.collect(),
            batch_targets: vec![1; count],
        }
    }

    #[test]
    fn passes_are_cut_behind_the_last_sample() {
        let passes: VecDeque<Pass> = [pass(0..3), pass(3..5), pass(5..9)].into();
        let of = |count| -> Vec<Vec<u64>> {
            let cut = first_samples(&passes, count);
            for pass in &cut {
                assert_eq!((pass.ids.len(), pass.cu_seqlens.len()), (2 * pass.len(), pass.len() + 1));
            }
            cut.into_iter().map(|pass| pass.samples).collect()
        };
        assert_eq!(of(2), [[0, 1]]);
        assert_eq!(of(3), [[0, 1, 2]]);
        assert_eq!(of(4), [vec![0, 1, 2], vec![3]]);
        assert_eq!(of(7), [vec![0, 1, 2], vec![3, 4], vec![5, 6]]);
        assert_eq!(of(64).iter().map(Vec::len).sum::<usize>(), 9);
    }
}
