//! Sum, Σ|v|, Σv² and max|v| of every dimension at every wanted tap.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{Direction, Sink, Tap};
use crate::backend::{Backend, Chunk, Moments};
use crate::error::{Error, Result};

/// Sums of one layer.
#[derive(Clone, Debug, Default)]
pub struct LayerMoments {
    /// Of the values; every token counts.
    pub values: Option<Moments>,
    /// Of the gradients; a sample with a single token has no loss and counts nowhere.
    pub gradients: Option<Moments>,
}

impl LayerMoments {
    /// The sums of one direction, if they were collected.
    pub fn get(&self, direction: Direction) -> Option<&Moments> {
        match direction {
            Direction::Values => self.values.as_ref(),
            Direction::Gradients => self.gradients.as_ref(),
        }
    }
}

/// Collects [`Moments`] of dimension D at the wanted layers.
#[derive(Clone, Debug)]
pub struct MomentSink {
    layers: BTreeMap<usize, LayerMoments>,
    width: usize,
}

impl MomentSink {
    /// For these layers; `width` is D.
    pub fn new(layers: &[usize], width: usize) -> Self {
        Self { layers: layers.iter().map(|&layer| (layer, LayerMoments::default())).collect(), width }
    }

    /// The sums so far, by layer.
    pub fn layers(&self) -> &BTreeMap<usize, LayerMoments> {
        &self.layers
    }
}

impl<B: Backend> Sink<B> for MomentSink {
    fn push(&mut self, backend: &B, tap: Tap, chunk: &Chunk, x: &B::Buf) -> Result<()> {
        let Some(layer) = self.layers.get_mut(&tap.layer) else { return Ok(()) };
        let (into, shortest) = match tap.direction {
            Direction::Values => (&mut layer.values, 1),
            Direction::Gradients => (&mut layer.gradients, 2),
        };
        let into = into.get_or_insert_with(|| Moments::new(self.width));
        let (indices, samples): (Vec<usize>, Vec<Range<usize>>) =
            chunk.samples().enumerate().filter(|(_, rows)| rows.len() >= shortest).unzip();
        backend.moments(x, &samples, into).map_err(|bad| {
            let sample = chunk.indices[indices[bad.0]];
            Error::new(format!(
                "not a finite number in the {} of the {} output",
                tap.direction,
                tap.site.name()
            ))
            .at(format!("layer {}, sample {sample} (counted from 0 among the kept texts)", tap.layer))
            .expected("finite values everywhere")
            .found("NaN or infinity")
            .hint("look for NaN in the checkpoint's weights, or an overflow of a half-precision checkpoint")
        })
    }
}
