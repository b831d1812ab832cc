//! How long the values of a site are: what tokens that stand out are measured against.

use std::collections::BTreeMap;

use super::policy::{Skipped, TokenPolicy};
use super::{Direction, Sink, Tap, not_finite};
use crate::backend::{Backend, Chunk};
use crate::error::Result;
use crate::model::op::Site;

/// Keeps ‖v‖₂ of every token that a policy counts, by layer and site.
pub struct NormSink {
    policy: TokenPolicy,
    /// And what is left out.
    norms: BTreeMap<(usize, Site), (Vec<f64>, Skipped)>,
}

impl NormSink {
    /// Of the tokens that `policy` leaves but for its rule of norms.
    pub fn new(policy: &TokenPolicy) -> Self {
        let policy = TokenPolicy { norms: None, ..policy.clone() };
        Self { policy, norms: BTreeMap::new() }
    }

    /// The median norms; the error holds what was left out where no token is left.
    pub fn medians(self) -> std::result::Result<BTreeMap<(usize, Site), f64>, Skipped> {
        let median = |(place, (mut norms, skipped)): ((usize, Site), (Vec<f64>, Skipped))| {
            norms.sort_unstable_by(f64::total_cmp);
            let upper = *norms.get(norms.len() / 2).ok_or(skipped)?;
            let lower = norms[(norms.len() - 1) / 2];
            Ok((place, (lower + upper) / 2.0))
        };
        self.norms.into_iter().map(median).collect()
    }
}

impl<B: Backend> Sink<B> for NormSink {
    fn push(&mut self, backend: &B, tap: Tap, chunk: &Chunk, x: &B::Buf) -> Result<()> {
        if tap.direction == Direction::Gradients {
            return Ok(());
        }
        let (positions, skipped) = self.policy.select(chunk, None);
        let of_rows = backend.row_norms(x)?;
        let (norms, all_skipped) = self.norms.entry((tap.layer, tap.site)).or_default();
        all_skipped.add(&skipped);
        for sample in &positions.samples {
            for row in sample.rows() {
                if !of_rows[row].is_finite() {
                    return Err(not_finite(tap, sample.sample));
                }
                norms.push(of_rows[row]);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;

    fn chunk(lengths: &[usize]) -> Chunk {
        let mut cu_seqlens = vec![0];
        lengths.iter().for_each(|length| cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + length));
        let ids = (0..lengths.iter().sum::<usize>() as u32).collect();
        let (indices, loss_scales) = ((0..lengths.len() as u64).collect(), vec![0.0; lengths.len()]);
        Chunk { ids, cu_seqlens, indices, loss_scales }
    }

    fn sink_of(policy: &TokenPolicy, layers: &[(usize, &[f64])], chunk: &Chunk) -> Result<NormSink> {
        let cpu = Cpu::<f64>::new();
        let mut sink = NormSink::new(policy);
        for direction in [Direction::Values, Direction::Gradients] {
            for &(layer, values) in layers {
                let tap = Tap { layer, site: Site::Mlp, direction };
                sink.push(&cpu, tap, chunk, &cpu.from_slice(values, 2))?;
            }
        }
        Ok(sink)
    }

    #[test]
    fn medians_are_of_the_tokens_that_are_left() {
        let chunk = chunk(&[3, 2]);
        let (one, two) = ([30.0, 40.0, 3.0, 4.0, 0.0, -7.0, 6.0, 8.0, 0.0, 0.0], [1.0; 10]);
        let medians = |policy: &TokenPolicy| {
            let sink = sink_of(policy, &[(1, &one), (4, &two)], &chunk).unwrap();
            sink.medians().map(|medians| (medians[&(1, Site::Mlp)], medians[&(4, Site::Mlp)]))
        };
        // 50, 5, 7 and 10, 0.
        assert_eq!(medians(&TokenPolicy::default()), Ok((7.0, 2f64.sqrt())));
        assert_eq!(medians(&TokenPolicy { first: 1, ..TokenPolicy::default() }), Ok((5.0, 2f64.sqrt())));
        // Of an even number, between the two in the middle.
        let special = TokenPolicy { special: vec![4], ..TokenPolicy::default() };
        assert_eq!(medians(&special), Ok((8.5, 2f64.sqrt())));
        let nothing = TokenPolicy { first: 3, stride: 2, ..TokenPolicy::default() };
        assert_eq!(medians(&nothing), Err(Skipped { stride: 2, first: 3, ..Skipped::default() }));
    }

    #[test]
    fn what_is_not_finite_is_named() {
        let values = [1.0, 1.0, 1.0, 1.0, f64::NAN, 1.0];
        let of = |policy: &TokenPolicy| sink_of(policy, &[(2, &values)], &chunk(&[1, 2])).map(drop);
        let error = of(&TokenPolicy::default()).unwrap_err().to_string();
        assert!(error.contains("layer 2, sample 1"), "{error}");
        assert!(of(&TokenPolicy { stride: 2, ..TokenPolicy::default() }).is_ok(), "it is left out");
    }
}
