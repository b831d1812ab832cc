//! Whole models in float64: the gradient shown at every site of every layer against central differences of the
//! total loss, for every row of the table of architectures.
//!
//! The op list is data, so "this value, a little changed" is an op more: each block gets a table of offsets, one row
//! per token, that is added to the site's value right before its tap. Every position has a token id of its own, so
//! one element of the table moves one element of the site.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "engine/movable.rs"]
mod movable;

use common::{Random, relative_l2, tensor, tolerance};
use gradlens::backend::Chunk;
use gradlens::backend::cpu::{Buf, Cpu};
use gradlens::engine::{Engine, EngineSpec, LossReduction};
use gradlens::error::{Kind, Result};
use gradlens::interrupt::Interrupt;
use gradlens::model::Dtype;
use gradlens::model::arch::ARCHITECTURES;
use gradlens::model::op::Site;
use gradlens::stats::{Sink, Splice, Tap};
use movable::{CASES, Case, LENGTHS, Movable, STEP, Shown, TOKENS, VOCAB, all_layers, pass, sample_of_row};

/// (row, dimension) of the places that are compared: every row, and every dimension somewhere.
fn places(d: usize) -> Vec<(usize, usize)> {
    (0..TOKENS).flat_map(|row| [(row, (5 * row) % d), (row, (7 * row + 1) % d)]).collect()
}

#[test]
fn every_architecture_has_a_case() {
    for row in ARCHITECTURES {
        assert!(CASES.iter().any(|case| case.model_type == row.model_type), "{}", row.model_type);
    }
}

#[test]
fn gradients_are_central_differences() {
    for Case { model_type, keys, without } in CASES {
        for site in Site::ALL {
            let Some(mut model) = Movable::at(site, model_type, keys) else {
                // Rows of experts are no rows of tokens.
                assert!(
                    site == Site::MlpHidden && keys.contains("experts"),
                    "{model_type}{keys} has no {site:?}"
                );
                continue;
            };
            let other = Movable::at(site, model_type, without).unwrap();
            let other = other.run(other.all_layers()).0;
            let (shown, _) = model.run(model.all_layers());
            let width = model.width;
            for layer in 0..3 {
                let (mut exact, mut numeric, mut of_other) = (vec![], vec![], vec![]);
                // Every row and dimension of the default site; of the others some.
                let places = places(width).into_iter().step_by(if site == Site::Mlp { 1 } else { 5 });
                for (row, dimension) in places {
                    let mut at = |by: f64| model.loss_moved(layer, row, dimension, by);
                    numeric.push((at(STEP) - at(-STEP)) / (2.0 * STEP));
                    exact.push(shown.gradient(layer)[row * width + dimension]);
                    of_other.push(other.gradient(layer)[row * width + dimension]);
                }
                let what = format!("{model_type}{keys} layer {layer} {}", site.name());
                let error = relative_l2(&exact, &numeric);
                assert!(error <= tolerance::FINITE_DIFFERENCES, "{what}: {error:e}");
                // Were the feature ignored, the comparison would see it.
                let distance = relative_l2(&of_other, &numeric);
                assert!(distance > 1e-3, "{what}: not tested, {distance:e}");
            }
        }
    }
}

/// Nothing reaches from one sample into another, and last tokens and one-token samples have no gradient.
#[test]
fn gradients_are_zero_where_nothing_is_predicted() {
    for Case { model_type, keys, .. } in CASES {
        let model = Movable::new(model_type, keys);
        let d = model.spec.hidden_size;
        let (shown, _) = model.run(all_layers());
        let samples = sample_of_row();
        for layer in 0..3 {
            for (row, gradient) in shown.gradient(layer).chunks(d).enumerate() {
                let last = samples.get(row + 1) != Some(&samples[row]);
                assert_eq!(gradient.iter().all(|g| *g == 0.0), last, "{model_type} layer {layer} row {row}");
            }
        }
    }
}

/// The reductions differ by a factor of each sample, and by nothing else.
#[test]
fn reductions_scale_the_gradients_of_each_sample() {
    let pass = pass();
    for Case { model_type, keys, .. } in CASES {
        let model = Movable::new(model_type, keys);
        let d = model.spec.hidden_size;
        let (plain, loss) = model.run(all_layers());
        for loss_reduction in [LossReduction::Sample, LossReduction::Batch] {
            let (shown, same_loss) = model.run(EngineSpec { loss_reduction, ..all_layers() });
            assert_eq!(loss, same_loss, "the reported loss is in nats over all targets");
            for layer in 0..3 {
                let expected: Vec<f64> = plain
                    .gradient(layer)
                    .iter()
                    .enumerate()
                    .map(|(at, gradient)| {
                        let sample = sample_of_row()[at / d];
                        gradient
                            / match loss_reduction {
                                LossReduction::Sample => (LENGTHS[sample] - 1).max(1) as f64,
                                _ => pass.batch_targets[sample] as f64,
                            }
                    })
                    .collect();
                let error = relative_l2(shown.gradient(layer), &expected);
                assert!(error < 1e-13, "{model_type} {} layer {layer}: {error:e}", loss_reduction.name());
            }
        }
    }
}

/// Kept or computed again, in one chunk or in many: the same bits at every token.
#[test]
fn the_way_of_working_shows_nowhere() {
    for Case { model_type, keys, .. } in CASES {
        let model = Movable::new(model_type, keys);
        let (expected, loss) = model.run(all_layers());
        for (keep_from, chunk_tokens) in [(3, 1000), (0, 1), (3, 1), (1, 16), (2, 10)] {
            let (shown, same_loss) = model.run(EngineSpec { keep_from, chunk_tokens, ..all_layers() });
            assert!(shown == expected, "{model_type}: kept from {keep_from}, chunks of {chunk_tokens}");
            assert!((loss - same_loss).abs() <= 1e-12 * loss, "{model_type}: {loss} {same_loss}");
        }
        for layers in [vec![0], vec![1, 2], vec![2]] {
            let (shown, _) = model.run(EngineSpec { layers: layers.clone(), ..all_layers() });
            for layer in layers {
                assert!(shown.gradient(layer) == expected.gradient(layer), "{model_type} layer {layer}");
            }
        }
    }
}

/// Asks to stop when it is shown the `left`-th chunk.
struct Stops {
    interrupt: Interrupt,
    left: usize,
}

impl Sink<Cpu<f64>> for Stops {
    fn push(&mut self, _: &Cpu<f64>, _: Tap, _: &Chunk, _: &Buf<f64>) -> Result<()> {
        assert!(!self.interrupt.requested(), "a chunk more is worked on");
        self.left -= 1;
        if self.left == 0 {
            self.interrupt.request();
        }
        Ok(())
    }
}

/// On either way, in every layer: the chunk at work is the last one.
#[test]
fn an_interruption_stops_between_chunks() {
    let model = Movable::new(CASES[0].model_type, CASES[0].keys);
    let cpu = Cpu::<f64>::new();
    // A chunk for each sample, in three layers, forward and backward; after the last one nothing is left to stop.
    let chunks = LENGTHS.len() * 3 * 2;
    for left in 1..chunks {
        let interrupt = Interrupt::new();
        let spec = EngineSpec { chunk_tokens: 1, ..all_layers() };
        let mut engine =
            Engine::new(&cpu, &model.spec, &model.tensors, spec).interruptible(interrupt.clone());
        let error = engine.run(&pass(), &mut Stops { interrupt, left }).err().unwrap();
        assert_eq!(error.kind(), Kind::Interrupted { exit_code: 130 }, "chunk {left}");
    }
}

/// Moves every row of a site by what its token id says.
struct Moved {
    /// `[V, D]`
    by: Vec<f64>,
    shown: Shown,
}

impl Sink<Cpu<f64>> for Moved {
    fn push(&mut self, cpu: &Cpu<f64>, tap: Tap, chunk: &Chunk, x: &Buf<f64>) -> Result<()> {
        self.shown.push(cpu, tap, chunk, x)
    }
}

impl Splice<Cpu<f64>> for Moved {
    fn replace(&mut self, cpu: &Cpu<f64>, tap: Tap, chunk: &Chunk, x: &Buf<f64>) -> Result<Buf<f64>> {
        self.shown.push(cpu, tap, chunk, x)?;
        let d = x.len() / chunk.ids.len();
        let by = chunk.ids.iter().flat_map(|&id| &self.by[id as usize * d..][..d]);
        let moved: Vec<f64> = x.iter().zip(by).map(|(x, by)| x + by).collect();
        Ok(cpu.from_slice(&moved, d))
    }
}

/// A spliced run is, layer by layer, a run of the model whose site is moved there and nowhere else.
#[test]
fn a_spliced_layer_is_a_moved_one() {
    for Case { model_type, keys, .. } in CASES {
        for site in Site::ALL {
            let Some(model) = Movable::at(site, model_type, keys) else { continue };
            // Of sites other than the default one a way or two.
            let ways: &[(&[usize], usize, usize)] = match site {
                Site::Mlp => &[(&[0, 1, 2], 0, 1000), (&[0, 2], 3, 10), (&[1], 2, 1)],
                _ => &[(&[0, 2], 3, 10)],
            };
            spliced_is_moved(model, &format!("{model_type} {}", site.name()), site, ways);
        }
    }
}

/// `ways`: layers, the layer from which on activations are kept, tokens of a chunk.
fn spliced_is_moved(mut model: Movable, what: &str, site: Site, ways: &[(&[usize], usize, usize)]) {
    let cpu = Cpu::<f64>::new();
    let width = model.width;
    let mut random = Random::new(11);
    // Exact in the table's float32.
    let by: Vec<f64> = (0..VOCAB * width).map(|_| random.below(65) as f64 / 64.0 - 0.5).collect();
    let (plain, loss) = model.run(model.all_layers());
    for &(layers, keep_from, chunk_tokens) in ways {
        let spec = EngineSpec { layers: layers.to_vec(), keep_from, chunk_tokens, ..model.all_layers() };
        let mut splice = Moved { by: by.clone(), shown: Shown::at(site) };
        let mut engine = Engine::new(&cpu, &model.spec, &model.tensors, spec);
        let totals = engine.run_spliced(&pass(), &mut splice).unwrap().settle(&cpu).unwrap();
        let own: f64 = totals.nats.unwrap().iter().sum();
        assert!((own - loss).abs() <= 1e-12 * loss, "{what}: the model's own loss, {own} {loss}");
        assert!(totals.spliced_nats.keys().eq(layers));
        for &layer in layers {
            assert!(splice.shown.values(layer) == plain.values(layer), "{what} layer {layer}: values");
            let index = model.offsets[layer].0;
            let moved = tensor(Dtype::F32, &[VOCAB, width], &by);
            let still = std::mem::replace(&mut model.tensors[index], moved);
            let (expected, moved_loss) = model.run(model.all_layers());
            model.tensors[index] = still;
            let error = relative_l2(splice.shown.gradient(layer), expected.gradient(layer));
            assert!(error < 1e-12, "{what} layer {layer}: {error:e}");
            let spliced: f64 = totals.spliced_nats[&layer].iter().sum();
            assert!((spliced - moved_loss).abs() <= 1e-12 * loss, "{what} layer {layer}: loss");
            // Were the layer not moved, or another one, the comparison would see it.
            let distance = relative_l2(plain.gradient(layer), expected.gradient(layer));
            assert!(distance > 1e-3, "{what}: {distance:e}");
        }
    }
}
