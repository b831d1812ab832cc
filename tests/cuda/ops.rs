//! Every op of the list on the device against the CPU in float64, over one table of ragged shapes.

use gradlens::backend::cpu::Cpu;
use gradlens::backend::cuda::{Buf, CudaBackend, CudaLower, Format, Tensor};
use gradlens::backend::{Backend, Chunk};
use gradlens::model::op::{Attention, RmsNorm};
use gradlens::model::{self, Activation, Dtype, Packing};

use super::common::{Random, relative_l2, tensor};
use super::machine::{Machine, machine};

/// Lengths of the samples of a chunk: one token, none, more than a tile of attention.
const LENGTHS: &[&[usize]] = &[&[1], &[3, 1, 5], &[2, 0, 70, 1, 9], &[130]];
const FORMATS: [Format; 2] = [Format::F32, Format::Bf16];

/// Relative L2. float32: 2⁻²⁴·√depth and what elementary functions add. bfloat16: inputs, weights and what goes from
/// one product to the next are rounded to 2⁻⁹, each op once or twice; errors of different elements are independent, so
/// their norm is that of one.
fn bound(format: Format) -> f64 {
    format.pick(3e-6, 3.0 / 512.0 * 1.5)
}

struct Pair {
    cuda: CudaBackend,
    cpu: Cpu<f64>,
    format: Format,
}

impl Pair {
    fn new(machine: &Machine, format: Format) -> Self {
        Self { cuda: machine.backend(CudaLower { format, fuse: false }), cpu: Cpu::new(), format }
    }

    fn upload(&self, values: &[f64], width: usize) -> Tensor {
        let values: Vec<f32> = values.iter().map(|value| *value as f32).collect();
        Buf::from_host(&self.cuda.cuda().device.memory, &values, width).unwrap().into()
    }

    fn weight(&self, tensor: &model::Tensor) -> Tensor {
        let room = self.cuda.room(&[tensor]).unwrap();
        self.cuda.load(room, &[tensor], Packing::Stacked).unwrap()
    }

    fn near(&self, what: &str, found: &Tensor, wanted: &[f64]) {
        let found: Vec<f64> = found.to_host().unwrap().into_iter().map(f64::from).collect();
        let error = relative_l2(&found, wanted);
        assert!(error <= bound(self.format), "{what} {:?}: relative error {error:e}", self.format);
    }

    /// A backward that starts from nothing, and one that adds to what is there.
    fn adds(&self, what: &str, width: usize, wanted: &[f64], backward: impl Fn(Option<Tensor>) -> Tensor) {
        self.near(what, &backward(None), wanted);
        let start = numbers(99, wanted.len());
        let sum: Vec<f64> = wanted.iter().zip(&start).map(|(a, b)| a + b).collect();
        self.near(what, &backward(Some(self.upload(&start, width))), &sum);
    }
}

/// Numbers that both formats hold exactly.
fn numbers(seed: u64, len: usize) -> Vec<f64> {
    Random::new(seed).normals(len).into_iter().map(|v| half::bf16::from_f64(v).to_f64()).collect()
}

fn chunk(lengths: &[usize], vocab: usize) -> Chunk {
    let mut random = Random::new(4);
    let mut cu_seqlens = vec![0];
    for length in lengths {
        cu_seqlens.push(cu_seqlens.last().unwrap() + length);
    }
    let ids = (0..*cu_seqlens.last().unwrap()).map(|_| random.below(vocab) as u32).collect();
    let loss_scales = (0..lengths.len()).map(|s| 0.5 + s as f64).collect();
    Chunk { ids, cu_seqlens, indices: (0..lengths.len() as u64).collect(), loss_scales }
}

fn each(check: impl Fn(&Pair)) {
    let Some(machine) = machine() else { return };
    FORMATS.into_iter().for_each(|format| check(&Pair::new(&machine, format)));
}

#[test]
fn embed() {
    each(|pair| {
        let chunk = chunk(&[3, 1, 5], 7);
        let table = tensor(Dtype::BF16, &[7, 20], &numbers(1, 140));
        let wanted = pair.cpu.embed(&table, 1.0, &chunk).unwrap();
        let placed = pair.cuda.place(chunk.clone()).unwrap();
        pair.near("embed", &pair.cuda.embed(&pair.weight(&table), 1.0, &placed).unwrap(), &wanted);
    });
}

#[test]
fn norm() {
    each(|pair| {
        // Runs of `run` neighbours, and a weight that is stored less 1.
        for (rows, width, run, offset) in
            [(1, 5, 5, 0.0), (3, 16, 16, 1.0), (11, 37, 37, 0.0), (5, 260, 260, 0.0), (7, 64, 16, 1.0)]
        {
            let norm = RmsNorm { eps: 1e-3, offset };
            let (x, dy) = (numbers(1, rows * width), numbers(2, rows * width));
            let weight = tensor(Dtype::F32, &[run], &numbers(3, run));
            let (cpu_x, cpu_dy) = (pair.cpu.from_slice(&x, width), pair.cpu.from_slice(&dy, width));
            let (cuda_x, cuda_dy, w) =
                (pair.upload(&x, width), pair.upload(&dy, width), pair.weight(&weight));
            let wanted = pair.cpu.norm(&cpu_x, &weight, norm).unwrap();
            pair.near("norm", &pair.cuda.norm(&cuda_x, &w, norm).unwrap(), &wanted);
            let wanted = pair.cpu.norm_backward(&cpu_x, &weight, norm, &cpu_dy, None).unwrap();
            pair.adds("norm backward", width, &wanted, |dx| {
                pair.cuda.norm_backward(&cuda_x, &w, norm, &cuda_dy, dx).unwrap()
            });
        }
    });
}

#[test]
fn linear() {
    each(|pair| {
        for (rows, width, out) in [(1, 7, 5), (3, 96, 64), (80, 9, 52), (71, 40, 1), (130, 24, 72)] {
            let (x, dy) = (numbers(1, rows * width), numbers(2, rows * out));
            let weight = tensor(Dtype::BF16, &[out, width], &numbers(3, out * width));
            let bias = tensor(Dtype::BF16, &[out], &numbers(4, out));
            let (cpu_x, cpu_dy) = (pair.cpu.from_slice(&x, width), pair.cpu.from_slice(&dy, out));
            let (cuda_x, cuda_dy) = (pair.upload(&x, width), pair.upload(&dy, out));
            let (w, b) = (pair.weight(&weight), pair.weight(&bias));
            let wanted = pair.cpu.linear(&cpu_x, &weight, Some(&bias)).unwrap();
            pair.near("linear", &pair.cuda.linear(&cuda_x, &w, Some(&b)).unwrap(), &wanted);
            let wanted = pair.cpu.linear_backward(&weight, &cpu_dy, None).unwrap();
            pair.adds("linear backward", width, &wanted, |dx| {
                pair.cuda.linear_backward(&w, &cuda_dy, dx).unwrap()
            });
        }
    });
}

#[test]
fn rope() {
    each(|pair| {
        for lengths in LENGTHS {
            let chunk = chunk(lengths, 10);
            let (heads, head_dim) = (3, 6);
            let width = heads * head_dim;
            let frequencies = [1.0f32, 0.3, 0.01];
            let placed = pair.cuda.place(chunk.clone()).unwrap();
            let cpu_table = pair.cpu.rope_table(&frequencies, chunk.longest()).unwrap();
            let cuda_table = pair.cuda.rope_table(&frequencies, chunk.longest()).unwrap();
            let x = numbers(1, chunk.num_tokens() * width);
            let (cpu_x, cuda_x) = (pair.cpu.from_slice(&x, width), pair.upload(&x, width));
            let wanted = pair.cpu.rope(&cpu_x, heads, &cpu_table, &chunk).unwrap();
            pair.near("rope", &pair.cuda.rope(&cuda_x, heads, &cuda_table, &placed).unwrap(), &wanted);
            let wanted = pair.cpu.rope_backward(&cpu_x, heads, &cpu_table, &chunk, None).unwrap();
            pair.adds("rope backward", width, &wanted, |dx| {
                pair.cuda.rope_backward(&cuda_x, heads, &cuda_table, &placed, dx).unwrap()
            });
        }
    });
}

#[test]
fn attend() {
    each(|pair| {
        for lengths in LENGTHS {
            for (heads, kv_heads, head_dim, window, softcap) in [
                (4, 2, 16, None, Some(0.9)),
                (2, 2, 8, Some(3), Some(0.7)),
                (3, 1, 4, Some(1), None),
                (2, 1, 64, Some(65), None),
            ] {
                let chunk = chunk(lengths, 10);
                let scale = (head_dim as f64).sqrt().recip();
                let attention = Attention { heads, kv_heads, head_dim, window, scale, softcap };
                let widths = [heads, kv_heads, kv_heads].map(|heads| heads * head_dim);
                let inputs = [0, 1, 2].map(|i| numbers(i as u64, chunk.num_tokens() * widths[i]));
                let dout = numbers(9, chunk.num_tokens() * widths[0]);
                let cpu = [0, 1, 2].map(|i| pair.cpu.from_slice(&inputs[i], widths[i]));
                let cuda = [0, 1, 2].map(|i| pair.upload(&inputs[i], widths[i]));
                let (cpu, cuda) = (cpu.each_ref(), cuda.each_ref());
                let placed = pair.cuda.place(chunk.clone()).unwrap();
                let what =
                    format!("attention {lengths:?} {heads}/{kv_heads} of {head_dim}, window {window:?}");
                let wanted = pair.cpu.attend(cpu, &attention, &chunk).unwrap();
                pair.near(&what, &pair.cuda.attend(cuda, &attention, &placed).unwrap(), &wanted);
                let dout_cpu = pair.cpu.from_slice(&dout, widths[0]);
                let wanted =
                    pair.cpu.attend_backward(cpu, &attention, &chunk, &dout_cpu, [None, None, None]).unwrap();
                let dout = pair.upload(&dout, widths[0]);
                let found =
                    pair.cuda.attend_backward(cuda, &attention, &placed, &dout, [None, None, None]).unwrap();
                // All three together: in a sample of one token dq and dk are zero, or what rounding leaves of it.
                let together = |parts: [Vec<f64>; 3]| parts.concat();
                let host = found
                    .each_ref()
                    .map(|part| part.to_host().unwrap().into_iter().map(f64::from).collect::<Vec<_>>());
                let error =
                    relative_l2(&together(host), &together(wanted.each_ref().map(|part| part.to_vec())));
                assert!(error <= bound(pair.format), "{what} backward: relative error {error:e}");
                let again =
                    pair.cuda.attend_backward(cuda, &attention, &placed, &dout, found.map(Some)).unwrap();
                for (again, once) in again.iter().zip(&wanted) {
                    let doubled: Vec<f64> = once.iter().map(|value| 2.0 * value).collect();
                    if doubled.iter().any(|value| value.abs() > 1e-9) {
                        pair.near(&what, again, &doubled);
                    }
                }
            }
        }
    });
}

#[test]
fn gate() {
    each(|pair| {
        let (rows, width) = (11, 7);
        let [g, u, dout] = [1, 2, 3].map(|seed| numbers(seed, rows * width));
        let cpu = [&g, &u, &dout].map(|values| pair.cpu.from_slice(values, width));
        let cuda = [&g, &u, &dout].map(|values| pair.upload(values, width));
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let wanted = pair.cpu.gate(&cpu[0], &cpu[1], activation).unwrap();
            pair.near("gate", &pair.cuda.gate(&cuda[0], &cuda[1], activation).unwrap(), &wanted);
            let wanted = pair.cpu.gate_backward(&cpu[0], &cpu[1], activation, &cpu[2], [None, None]).unwrap();
            let backward =
                |so_far| pair.cuda.gate_backward(&cuda[0], &cuda[1], activation, &cuda[2], so_far).unwrap();
            for (index, wanted) in wanted.iter().enumerate() {
                pair.adds("gate backward", width, wanted, |dx| {
                    let mut so_far = [None, None];
                    so_far[index] = dx;
                    let [dgate, dup] = backward(so_far);
                    if index == 0 { dgate } else { dup }
                });
            }
        }
    });
}

#[test]
fn add() {
    each(|pair| {
        let [a, b] = [1, 2].map(|seed| numbers(seed, 35));
        let sum: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
        let (a_device, b_device) = (pair.upload(&a, 7), pair.upload(&b, 7));
        pair.near("add", &pair.cuda.add(&a_device, &b_device).unwrap(), &sum);
        pair.adds("add backward", 7, &a, |dx| pair.cuda.add_backward(&a_device, dx).unwrap());
    });
}

#[test]
fn loss() {
    each(|pair| {
        for (lengths, vocab) in LENGTHS.iter().flat_map(|l| [(l, 10), (l, 130), (l, 257)]) {
            let chunk = chunk(lengths, vocab);
            let width = 16;
            let x = numbers(1, chunk.num_tokens() * width);
            let weight = tensor(Dtype::BF16, &[vocab, width], &numbers(2, vocab * width));
            let (nats, dx) =
                pair.cpu.loss(&pair.cpu.from_slice(&x, width), &weight, None, &chunk, true).unwrap();
            let placed = pair.cuda.place(chunk.clone()).unwrap();
            let (x, w) = (pair.upload(&x, width), pair.weight(&weight));
            let (found, found_dx) = pair.cuda.loss(&x, &w, None, &placed, true).unwrap();
            let found = pair.cuda.nats(found).unwrap();
            assert_eq!(found.len(), nats.len());
            let total: f64 = nats.iter().sum();
            for (found, nats) in found.iter().zip(&nats) {
                assert!((found - nats).abs() <= 2e-6 * total.max(1.0), "{found} instead of {nats}");
            }
            let (dx, found_dx) = (dx.unwrap(), found_dx.unwrap());
            if dx.iter().any(|value| *value != 0.0) {
                pair.near(&format!("loss {lengths:?} {vocab}"), &found_dx, &dx);
            }
            let host = found_dx.to_host().unwrap();
            for rows in chunk.samples().filter(|rows| !rows.is_empty()) {
                assert!(host[(rows.end - 1) * width..rows.end * width].iter().all(|value| *value == 0.0));
            }
            let (same, none) = pair.cuda.loss(&x, &w, None, &placed, false).unwrap();
            assert!(pair.cuda.nats(same).unwrap() == found && none.is_none());
        }
    });
}
