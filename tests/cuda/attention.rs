//! Attention against float64: ragged samples, groups of query heads, windows, soft-caps, and every head dim that has
//! kernels of its own.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use gradlens::backend::cuda::attention::AttentionSpec;
use gradlens::backend::cuda::{Buf, Real};
use half::bf16;

use super::machine::{Machine, Random, machine, relative_error};

/// An operand's element.
trait Operand: Real + Into<f64> + PartialEq {
    /// Largest relative error of a number rounded to it.
    const UNIT: f64;
    /// Bound on the error of a sum, relative to its terms' absolute values. float32: a score is a sum of up to 256
    /// terms that is up to 4 in size, so it is off by about √256 · 4 units, and its exponential by as much.
    /// bfloat16: P or dS is rounded once, and for dS the output that delta is made from.
    const TERMS: f64;
    /// Bound on the relative error of a whole result.
    const WHOLE: f64;
    fn narrow(v: f32) -> Self;
}
impl Operand for f32 {
    const UNIT: f64 = 0.0;
    const TERMS: f64 = 64.0 / (1_u64 << 24) as f64;
    const WHOLE: f64 = 1e-6;
    fn narrow(v: f32) -> Self {
        v
    }
}
impl Operand for bf16 {
    const UNIT: f64 = 1.0 / 512.0;
    const TERMS: f64 = 2.5 / 512.0;
    const WHOLE: f64 = 2.0 / 512.0;
    fn narrow(v: f32) -> Self {
        Self::from_f32(v)
    }
}

/// A chunk of samples and one layer's attention over it.
struct Case<A> {
    cu_seqlens: Vec<usize>,
    spec: AttentionSpec,
    /// `[N, (H + 2K)·Hd]`
    qkv: Vec<A>,
    /// `[N, H·Hd]`
    dout: Vec<A>,
}

/// What float64 says. `sizes`: sums of the absolute values of what is added.
#[derive(Default)]
struct Wanted {
    out: Vec<f64>,
    out_sizes: Vec<f64>,
    lse: Vec<f64>,
    dqkv: Vec<f64>,
    dqkv_sizes: Vec<f64>,
}

/// What the kernels say.
#[derive(PartialEq)]
struct Found<A> {
    out: Vec<A>,
    lse: Vec<f32>,
    dqkv: Vec<A>,
}

fn spec(
    [heads, kv_heads, head_dim]: [usize; 3],
    window: Option<usize>,
    softcap: Option<f32>,
) -> AttentionSpec {
    // Scores of variance 16/9: rows that look at a few positions and rows that look at many.
    let scale = 4.0 / (head_dim as f32).sqrt();
    AttentionSpec { heads, kv_heads, head_dim, window, scale, softcap }
}

impl<A: Operand> Case<A> {
    fn new(lengths: &[usize], spec: AttentionSpec) -> Self {
        let mut cu_seqlens = vec![0];
        for length in lengths {
            cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + length);
        }
        let rows = cu_seqlens[lengths.len()];
        let mut random = Random::new((rows * 31 + spec.head_dim * 7 + spec.heads) as u64);
        let mut numbers = |count: usize| (0..count).map(|_| A::narrow(random.normal())).collect();
        let (qkv, dout) = (numbers(rows * spec.qkv_width()), numbers(rows * spec.out_width()));
        Self { cu_seqlens, spec, qkv, dout }
    }

    fn samples(&self) -> impl Iterator<Item = Range<usize>> {
        self.cu_seqlens.windows(2).map(|ends| ends[0]..ends[1])
    }

    /// Samples `which` alone.
    fn only(&self, which: Range<usize>) -> Self {
        let rows = self.cu_seqlens[which.start]..self.cu_seqlens[which.end];
        let of = |values: &[A], width: usize| values[rows.start * width..rows.end * width].to_vec();
        Self {
            cu_seqlens: self.cu_seqlens[which.start..=which.end].iter().map(|end| end - rows.start).collect(),
            spec: self.spec,
            qkv: of(&self.qkv, self.spec.qkv_width()),
            dout: of(&self.dout, self.spec.out_width()),
        }
    }

    fn wanted(&self) -> Wanted {
        let AttentionSpec { heads, kv_heads, head_dim, window, scale, softcap } = self.spec;
        let (width, out_width) = (self.spec.qkv_width(), self.spec.out_width());
        let rows = self.qkv.len() / width;
        let (scale, softcap) = (f64::from(scale), softcap.map(f64::from));
        let mut wanted = Wanted {
            out: vec![0.0; rows * out_width],
            out_sizes: vec![0.0; rows * out_width],
            lse: vec![0.0; rows * heads],
            dqkv: vec![0.0; rows * width],
            dqkv_sizes: vec![0.0; rows * width],
        };
        let qkv: Vec<f64> = self.qkv.iter().map(|v| (*v).into()).collect();
        let dout: Vec<f64> = self.dout.iter().map(|v| (*v).into()).collect();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        for sample in self.samples() {
            for (head, i) in (0..heads).flat_map(|head| sample.clone().map(move |i| (head, i))) {
                let kv_head = head / (heads / kv_heads);
                let q_at = i * width + head * head_dim;
                let k_at = |j: usize| j * width + (heads + kv_head) * head_dim;
                let v_at = |j: usize| k_at(j) + kv_heads * head_dim;
                let of = |at: usize| &qkv[at..at + head_dim];
                let first =
                    window.map_or(sample.start, |window| sample.start.max((i + 1).saturating_sub(window)));
                let raw: Vec<f64> = (first..=i).map(|j| scale * dot(of(q_at), of(k_at(j)))).collect();
                let scores: Vec<f64> =
                    raw.iter().map(|s| softcap.map_or(*s, |cap| cap * (s / cap).tanh())).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                wanted.lse[i * heads + head] = max + sum.ln();
                let p: Vec<f64> = scores.iter().map(|s| (s - max).exp() / sum).collect();
                let out_at = i * out_width + head * head_dim;
                for (j, p) in (first..).zip(&p) {
                    for (d, v) in of(v_at(j)).iter().enumerate() {
                        wanted.out[out_at + d] += p * v;
                        wanted.out_sizes[out_at + d] += (p * v).abs();
                    }
                }
                let dout = &dout[out_at..out_at + head_dim];
                let delta = dot(dout, &wanted.out[out_at..out_at + head_dim]);
                let size = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum::<f64>();
                let delta_size = size(dout, &wanted.out[out_at..out_at + head_dim]);
                for ((j, p), s) in (first..).zip(&p).zip(&scores) {
                    let slope = scale * softcap.map_or(1.0, |cap| 1.0 - (s / cap).powi(2));
                    let ds = slope * p * (dot(dout, of(v_at(j))) - delta);
                    // Of dout·v only what float32 loses counts, of delta all that rounding `out` did.
                    let ds_size = slope * p * (size(dout, of(v_at(j))) + delta_size);
                    for d in 0..head_dim {
                        for (at, term, size) in [
                            (q_at + d, ds * qkv[k_at(j) + d], ds_size * qkv[k_at(j) + d].abs()),
                            (k_at(j) + d, ds * qkv[q_at + d], ds_size * qkv[q_at + d].abs()),
                            (v_at(j) + d, p * dout[d], p * dout[d].abs()),
                        ] {
                            wanted.dqkv[at] += term;
                            wanted.dqkv_sizes[at] += size;
                        }
                    }
                }
            }
        }
        wanted
    }

    /// Forward and backward.
    fn run(&self, machine: &Machine) -> Found<A> {
        let memory = &machine.cuda.device.memory;
        let work = machine.cuda.attention_work(&self.cu_seqlens).unwrap();
        let qkv = Buf::from_host(memory, &self.qkv, self.spec.qkv_width()).unwrap();
        let dout = Buf::from_host(memory, &self.dout, self.spec.out_width()).unwrap();
        let (out, lse) = machine.cuda.attention_forward(&qkv, &self.spec, &work).unwrap();
        let dqkv = machine.cuda.attention_backward(&qkv, &out, &lse, &dout, &self.spec, &work).unwrap();
        Found { out: out.to_host().unwrap(), lse: lse.to_host().unwrap(), dqkv: dqkv.to_host().unwrap() }
    }

    /// Compares with float64, each element and the whole.
    fn check(&self, found: &Found<A>) {
        let wanted = self.wanted();
        let what = format!("{} {:?} of samples up to {:?}", A::NAME, self.spec, self.cu_seqlens);
        let wide = |found: &[A]| found.iter().map(|v| (*v).into()).collect::<Vec<f64>>();
        let (out, dqkv) = (wide(&found.out), wide(&found.dqkv));
        let lse: Vec<f64> = found.lse.iter().map(|v| f64::from(*v)).collect();
        let near = |name: &str, found: &[f64], wanted: &[f64], tolerances: &[f64], width: usize| {
            assert_eq!((found.len(), wanted.len()), (tolerances.len(), tolerances.len()));
            for (i, ((found, wanted), tolerance)) in found.iter().zip(wanted).zip(tolerances).enumerate() {
                assert!(
                    (found - wanted).abs() <= *tolerance,
                    "{name} of {what} at {}, {}: {found} instead of {wanted} ± {tolerance}",
                    i / width,
                    i % width
                );
            }
        };
        let tolerances = |wanted: &[f64], sizes: &[f64]| {
            let each = wanted.iter().zip(sizes);
            each.map(|(wanted, size)| A::TERMS * size + A::UNIT * wanted.abs()).collect::<Vec<_>>()
        };
        near("out", &out, &wanted.out, &tolerances(&wanted.out, &wanted.out_sizes), self.spec.out_width());
        near(
            "dqkv",
            &dqkv,
            &wanted.dqkv,
            &tolerances(&wanted.dqkv, &wanted.dqkv_sizes),
            self.spec.qkv_width(),
        );
        // Scores are float32 whatever the operands are.
        near("lse", &lse, &wanted.lse, &vec![4.0 * f32::TERMS; lse.len()], self.spec.heads);
        if out.is_empty() {
            return;
        }
        let errors = [relative_error(out, &wanted.out), relative_error(dqkv, &wanted.dqkv)];
        println!("{what}: relative errors {errors:?}");
        assert!(errors.iter().all(|error| *error <= A::WHOLE), "{what}: relative errors {errors:?}");
    }

    fn check_on(self, machine: &Machine) {
        self.check(&self.run(machine));
    }
}

/// Samples that end before, at and after the edges of tiles, single tokens, and none at all.
const LENGTHS: &[usize] = &[1, 64, 0, 65, 130, 63, 1];

#[test]
fn float32_matches_float64() {
    let Some(machine) = machine() else { return };
    for (heads, window, softcap) in [
        ([2, 1, 20], None, None),
        ([1, 1, 64], Some(40), Some(3.0)),
        ([7, 1, 6], Some(3), None),
        ([2, 2, 13], None, Some(2.0)),
    ] {
        Case::<f32>::new(LENGTHS, spec(heads, window, softcap)).check_on(&machine);
    }
    for (heads, window) in [([1, 1, 100], None), ([2, 1, 129], Some(33)), ([1, 1, 256], None)] {
        Case::<f32>::new(&[1, 33, 70], spec(heads, window, None)).check_on(&machine);
    }
}

#[test]
fn head_dims_without_tensor_core_kernels_match_float64() {
    let Some(machine) = machine() else { return };
    for heads in [[2, 1, 36], [2, 2, 7], [1, 1, 104], [1, 1, 200]] {
        Case::<bf16>::new(&[1, 33, 70], spec(heads, Some(40), Some(5.0))).check_on(&machine);
    }
}

/// Every head dim of kernels/attention.cu; GQA groups of 1, 2 and 7; windows below a tile, above one, and of all
/// rows; tiles enough that both stages are used again.
#[test]
fn tensor_cores_match_float64() {
    let Some(machine) = machine() else { return };
    for (heads, window, softcap) in [
        ([2, 1, 16], None, None),
        ([2, 2, 16], Some(5), Some(3.0)),
        ([7, 1, 32], Some(70), None),
        ([1, 1, 64], None, Some(2.0)),
        ([2, 1, 64], Some(100), None),
    ] {
        Case::<bf16>::new(LENGTHS, spec(heads, window, softcap)).check_on(&machine);
    }
    Case::<bf16>::new(&[200], spec([1, 1, 64], None, None)).check_on(&machine);
    for (heads, window, softcap) in [
        ([2, 1, 80], Some(33), None),
        ([1, 1, 96], None, Some(4.0)),
        ([1, 1, 128], None, None),
        ([2, 1, 128], Some(64), Some(3.0)),
        ([2, 1, 256], Some(20), Some(3.0)),
        ([1, 1, 256], None, None),
    ] {
        Case::<bf16>::new(&[1, 33, 101], spec(heads, window, softcap)).check_on(&machine);
    }
}

fn same_bits<A: Operand>(machine: &Machine, lengths: &[usize], spec: AttentionSpec) {
    let case = Case::<A>::new(lengths, spec);
    case.check(&machine.same_under_all_schedules(|| case.run(machine)));
}

#[test]
fn multiply_adds_give_the_same_bits_under_all_schedules() {
    let Some(machine) = machine() else { return };
    same_bits::<f32>(&machine, &[1, 70], spec([2, 1, 12], None, Some(3.0)));
    same_bits::<f32>(&machine, &[9], spec([1, 1, 6], None, None));
    if machine.affordable(75 * 4 * 12) {
        same_bits::<f32>(&machine, &[75, 0, 3], spec([4, 2, 12], Some(20), None));
    }
}

#[test]
fn tensor_cores_give_the_same_bits_under_all_schedules() {
    let Some(machine) = machine() else { return };
    // Five tiles of 32 for two stages.
    same_bits::<bf16>(&machine, &[1, 133], spec([2, 1, 80], None, Some(3.0)));
    same_bits::<bf16>(&machine, &[75, 0, 3], spec([4, 2, 80], Some(20), None));
}

/// All lengths around the edges of tiles and below, in one chunk.
#[test]
fn every_length_from_1() {
    let Some(machine) = machine() else { return };
    let lengths: Vec<usize> = (1..=70).chain([95, 96, 97, 127, 128, 129, 159, 191, 192, 193, 200]).collect();
    Case::<bf16>::new(&lengths, spec([1, 1, 16], None, None)).check_on(&machine);
    Case::<bf16>::new(&lengths, spec([1, 1, 16], Some(31), None)).check_on(&machine);
    Case::<f32>::new(&lengths, spec([1, 1, 4], Some(64), None)).check_on(&machine);
}

#[test]
fn thousands_of_single_tokens() {
    let Some(machine) = machine() else { return };
    let mut lengths = vec![1; 3000];
    lengths[1000] = 66;
    let case = Case::<bf16>::new(&lengths, spec([1, 1, 16], None, None));
    let found = case.run(&machine);
    case.check(&found);
    // Alone a token sees itself: its output is its value.
    let v = case.qkv[3 * 16 - 16..3 * 16].to_vec();
    assert!(found.out[..16] == v);
}

#[test]
fn no_rows_is_no_work() {
    let Some(machine) = machine() else { return };
    for lengths in [&[][..], &[0, 0]] {
        assert!(Case::<f32>::new(lengths, spec([2, 1, 8], None, None)).run(&machine).dqkv.is_empty());
        assert!(Case::<bf16>::new(lengths, spec([2, 1, 16], None, None)).run(&machine).dqkv.is_empty());
    }
}

fn bits_do_not_depend_on_neighbours<A: Operand>(machine: &Machine, head_dim: usize) {
    let case = Case::<A>::new(&[5, 70, 1, 33], spec([2, 1, head_dim], Some(50), None));
    let all = case.run(machine);
    for (sample, rows) in case.samples().enumerate() {
        let alone = case.only(sample..sample + 1).run(machine);
        let of = |width: usize| rows.start * width..rows.end * width;
        assert!(alone.out == all.out[of(case.spec.out_width())], "out of sample {sample}");
        assert!(alone.lse == all.lse[of(case.spec.heads)], "lse of sample {sample}");
        assert!(alone.dqkv == all.dqkv[of(case.spec.qkv_width())], "dqkv of sample {sample}");
    }
    // Nor on what neighbours hold: a NaN stays in its sample.
    let mut spoilt = Case::<A>::new(&[5, 70, 1, 33], case.spec);
    let width = case.spec.qkv_width();
    for sample in [0, 2] {
        let rows = case.cu_seqlens[sample]..case.cu_seqlens[sample + 1];
        spoilt.qkv[rows.start * width..rows.end * width].fill(A::narrow(f32::NAN));
    }
    let found = spoilt.run(machine);
    for rows in [5..75, 76..109] {
        assert!(
            found.dqkv[rows.start * width..rows.end * width]
                == all.dqkv[rows.start * width..rows.end * width]
        );
    }
    assert!(found.dqkv[..width].iter().all(|v| (*v).into().is_nan()));
}

#[test]
fn bits_of_a_sample_do_not_depend_on_its_neighbours() {
    let Some(machine) = machine() else { return };
    bits_do_not_depend_on_neighbours::<f32>(&machine, 12);
    bits_do_not_depend_on_neighbours::<bf16>(&machine, 16);
    bits_do_not_depend_on_neighbours::<bf16>(&machine, 128);
}

/// Rows of a larger allocation.
#[test]
fn buffers_may_be_views() {
    let Some(machine) = machine() else { return };
    let case = Case::<bf16>::new(&[40, 3], spec([2, 1, 16], None, None));
    let wanted = case.run(&machine);
    let memory = &machine.cuda.device.memory;
    let view = |values: &[bf16], width: usize| {
        let padded = [&vec![bf16::NAN; width], values, &vec![bf16::NAN; 2 * width]].concat();
        Buf::from_host(memory, &padded, width).unwrap().view(1..44)
    };
    let work = machine.cuda.attention_work(&case.cu_seqlens).unwrap();
    let (qkv, dout) = (view(&case.qkv, case.spec.qkv_width()), view(&case.dout, case.spec.out_width()));
    let (out, lse) = machine.cuda.attention_forward(&qkv, &case.spec, &work).unwrap();
    let out_view = view(&out.to_host().unwrap(), case.spec.out_width());
    let dqkv = machine.cuda.attention_backward(&qkv, &out_view, &lse, &dout, &case.spec, &work).unwrap();
    assert!(out.to_host().unwrap() == wanted.out && dqkv.to_host().unwrap() == wanted.dqkv);
}

#[test]
fn a_window_of_all_positions_is_none() {
    let Some(machine) = machine() else { return };
    let run = |window| Case::<f32>::new(&[70, 3], spec([1, 1, 8], window, None)).run(&machine);
    for window in [70, 1000, usize::MAX] {
        assert!(run(Some(window)) == run(None), "a window of {window}");
    }
}

#[test]
fn shapes_that_do_not_match_are_not_launched() {
    let Some(machine) = machine() else { return };
    let right = spec([2, 1, 8], None, None);
    for wrong in [
        AttentionSpec { heads: 3, kv_heads: 2, ..right },
        AttentionSpec { kv_heads: 2, ..right },
        AttentionSpec { head_dim: 257, ..right },
        AttentionSpec { head_dim: 0, ..right },
        AttentionSpec { window: Some(0), ..right },
        AttentionSpec { scale: 0.0, ..right },
        AttentionSpec { softcap: Some(0.0), ..right },
    ] {
        let case = Case { spec: wrong, ..Case::<f32>::new(&[3, 4], right) };
        let run = || case.run(&machine).out;
        assert!(catch_unwind(AssertUnwindSafe(run)).is_err(), "{wrong:?}");
    }
    for cu_seqlens in [&[][..], &[1, 2], &[0, 3, 2]] {
        let work = || machine.cuda.attention_work(cu_seqlens).map(|_| ());
        assert!(catch_unwind(AssertUnwindSafe(work)).is_err(), "{cu_seqlens:?}");
    }
}
