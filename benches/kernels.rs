//! Every op of the CPU backend at the shapes of a 0.5B model (Qwen2.5-0.5B: bfloat16 weights, float32 sums).
//!
//! `cargo bench --bench kernels`; `-- linear` picks by name. Threads: `RAYON_NUM_THREADS`, else all cores.
//! Matrix products, attention and the loss report necessary FLOPs (criterion's `Gelem/s` is GFLOP/s); the
//! ops that move memory report the bytes they must read and write.

#![allow(clippy::unwrap_used, reason = "a bench that cannot start should stop")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gradlens::backend::cpu::{Buf, Cpu};
use gradlens::backend::{
    Backend, Chunk, FeatureSums, FeatureValues, Moments, Place, Positions, SaeBackend, SaeGradient,
    SampleRows,
};
use gradlens::model::op::{Attention, RmsNorm};
use gradlens::model::sae::{FeatureMatrix, InputNorm, SaeActivation, SaeWeights};
use gradlens::model::{Activation, Dtype, Tensor};

/// D.
const HIDDEN: usize = 896;
/// I.
const INNER: usize = 4864;
/// V.
const VOCAB: usize = 151_936;
/// H, K, Hd.
const NORM: RmsNorm = RmsNorm { eps: 1e-6, offset: 0.0 };

const ATTENTION: Attention =
    Attention { heads: 14, kv_heads: 2, head_dim: 64, window: None, scale: 0.125, softcap: None };
/// Width of k and of v, K·Hd.
const KV: usize = ATTENTION.kv_heads * ATTENTION.head_dim;
/// F.
const FEATURES: usize = 65_536;
/// Bytes of an activation's element.
const F32: usize = 4;

/// xorshift64: never time on zeros, nor on numbers that repeat within a cache line.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A weight of magnitude 2⁻⁷ to 2⁻³: random sign and mantissa, four exponents.
    fn weight(&mut self, shape: &[usize]) -> Tensor {
        let elements: usize = shape.iter().product();
        let mut bytes = Vec::with_capacity(elements * 2 + 8);
        while bytes.len() < elements * 2 {
            let random = self.bits();
            // Four bfloat16: sign, 8 bits of exponent, 7 bits of mantissa.
            let exponents = (random >> 8) & 0x0003_0003_0003_0003;
            let rest = random & 0x807F_807F_807F_807F;
            let four = rest | ((exponents + 0x0078_0078_0078_0078) << 7);
            bytes.extend_from_slice(&four.to_le_bytes());
        }
        Tensor::new(Dtype::BF16, shape.to_vec(), Arc::new(bytes), 0..elements * 2).unwrap()
    }

    /// The same in float32. An SAE's W_enc or W_dec.
    fn feature_matrix(&mut self, dtype: Dtype, features_first: bool) -> FeatureMatrix {
        let shape = if features_first { [FEATURES, HIDDEN] } else { [HIDDEN, FEATURES] };
        let mut tensor = self.weight(&shape);
        if dtype == Dtype::F32 {
            // The lower half: bits that are there already.
            let widen = |b: &[u8]| [b[0], b[1], b[0], b[1]];
            let bytes: Vec<u8> = tensor.bytes().chunks_exact(2).flat_map(widen).collect();
            let len = bytes.len();
            tensor = Tensor::new(dtype, shape.to_vec(), Arc::new(bytes), 0..len).unwrap();
        }
        FeatureMatrix { tensor, features_first }
    }

    /// An activation, uniform in −1 to 1. `[rows, width]`
    fn activation(&mut self, cpu: &Cpu<f32>, rows: usize, width: usize) -> Buf<f32> {
        let values: Vec<f32> =
            (0..rows * width).map(|_| (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect();
        cpu.from_slice(&values, width)
    }

    /// `samples` samples of `length` tokens.
    fn chunk(&mut self, samples: usize, length: usize) -> Chunk {
        Chunk {
            ids: (0..samples * length).map(|_| (self.bits() % VOCAB as u64) as u32).collect(),
            cu_seqlens: (0..=samples).map(|s| s * length).collect(),
            indices: (0..samples as u64).collect(),
            loss_scales: vec![1.0 / (length as f64 - 1.0); samples],
        }
    }
}

fn group<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    group
}

/// `2·rows·in·out` FLOPs in either direction: there are no weight gradients.
fn linear(c: &mut Criterion) {
    let (cpu, mut random) = (Cpu::new(), Random(1));
    let mut group = group(c, "linear");
    // Gate and up have one shape, as have q and o.
    for (name, inputs, outputs, has_bias) in [
        ("q", HIDDEN, HIDDEN, true),
        ("kv", HIDDEN, KV, true),
        ("o", HIDDEN, HIDDEN, false),
        ("gate_up", HIDDEN, INNER, false),
        ("down", INNER, HIDDEN, false),
    ] {
        let weight = random.weight(&[outputs, inputs]);
        let bias = has_bias.then(|| random.weight(&[outputs]));
        for rows in [256, 1024] {
            let x = random.activation(&cpu, rows, inputs);
            let dy = random.activation(&cpu, rows, outputs);
            group.throughput(Throughput::Elements((2 * rows * inputs * outputs) as u64));
            group.bench_function(BenchmarkId::new(format!("{name}/forward"), rows), |b| {
                b.iter(|| cpu.linear(black_box(&x), &weight, bias.as_ref()).unwrap())
            });
            group.bench_function(BenchmarkId::new(format!("{name}/backward"), rows), |b| {
                b.iter(|| cpu.linear_backward(&weight, black_box(&dy), None).unwrap())
            });
        }
    }
}

/// Causal attention: each query meets (T+1)/2 keys on average. Forward 2 products, backward 4 (the scores
/// it computes again are not counted), of 2·Hd FLOPs per query, key and head.
fn attend(c: &mut Criterion) {
    let (cpu, mut random) = (Cpu::new(), Random(2));
    let mut group = group(c, "attend");
    for (samples, length) in [(8, 128), (1, 1024)] {
        let chunk = random.chunk(samples, length);
        let rows = samples * length;
        let [q, dout] = [(); 2].map(|()| random.activation(&cpu, rows, HIDDEN));
        let [k, v] = [(); 2].map(|()| random.activation(&cpu, rows, KV));
        let pairs = samples * length * (length + 1) / 2;
        let product = (2 * pairs * ATTENTION.head_dim * ATTENTION.heads) as u64;
        let shape = format!("{samples}x{length}");
        group.throughput(Throughput::Elements(2 * product));
        group.bench_function(BenchmarkId::new("forward", &shape), |b| {
            b.iter(|| cpu.attend(black_box([&q, &k, &v]), &ATTENTION, &chunk).unwrap())
        });
        group.throughput(Throughput::Elements(4 * product));
        group.bench_function(BenchmarkId::new("backward", &shape), |b| {
            b.iter(|| {
                cpu.attend_backward(black_box([&q, &k, &v]), &ATTENTION, &chunk, &dout, [None, None, None])
                    .unwrap()
            })
        });
    }
}

/// The tied head: `2·N·V·D` FLOPs for the logits, as many for dx.
fn loss(c: &mut Criterion) {
    let (cpu, mut random) = (Cpu::new(), Random(3));
    let mut group = group(c, "loss");
    let weight = random.weight(&[VOCAB, HIDDEN]);
    let chunk = random.chunk(1, 129);
    let x = random.activation(&cpu, 129, HIDDEN);
    // The last token of a sample predicts nothing: 128 rows.
    let product = (2 * 128 * VOCAB * HIDDEN) as u64;
    for (name, want_gradient, products) in [("forward", false, 1), ("forward_and_gradient", true, 2)] {
        group.throughput(Throughput::Elements(products * product));
        group.bench_function(BenchmarkId::new(name, 128), |b| {
            b.iter(|| cpu.loss(black_box(&x), &weight, None, &chunk, want_gradient).unwrap())
        });
    }
}

/// What moves memory: bytes that must be read and written, each once.
fn elementwise(c: &mut Criterion) {
    let (cpu, mut random) = (Cpu::new(), Random(4));
    let mut group = group(c, "elementwise");
    let chunk = random.chunk(8, 128);
    let rows = chunk.num_tokens();
    let narrow = (rows * HIDDEN * F32) as u64;
    let wide = (rows * INNER * F32) as u64;
    let [x, dy] = [(); 2].map(|()| random.activation(&cpu, rows, HIDDEN));

    let weight = random.weight(&[HIDDEN]);
    group.throughput(Throughput::Bytes(2 * narrow));
    group.bench_function("norm/forward", |b| b.iter(|| cpu.norm(black_box(&x), &weight, NORM).unwrap()));
    group.throughput(Throughput::Bytes(3 * narrow));
    group.bench_function("norm/backward", |b| {
        b.iter(|| cpu.norm_backward(black_box(&x), &weight, NORM, &dy, None).unwrap())
    });

    let inv_freq: Vec<f32> = (0..32).map(|j| 1e6f32.powf(-(j as f32) / 32.0)).collect();
    let table = cpu.rope_table(&inv_freq, chunk.longest()).unwrap();
    group.throughput(Throughput::Bytes(2 * narrow));
    group.bench_function("rope/forward", |b| {
        b.iter(|| cpu.rope(black_box(&x), ATTENTION.heads, &table, &chunk).unwrap())
    });
    group.bench_function("rope/backward", |b| {
        b.iter(|| cpu.rope_backward(black_box(&dy), ATTENTION.heads, &table, &chunk, None).unwrap())
    });

    let [gate, up, dout] = [(); 3].map(|()| random.activation(&cpu, rows, INNER));
    group.throughput(Throughput::Bytes(3 * wide));
    group.bench_function("gate/forward", |b| {
        b.iter(|| cpu.gate(black_box(&gate), &up, Activation::Silu).unwrap())
    });
    group.throughput(Throughput::Bytes(5 * wide));
    group.bench_function("gate/backward", |b| {
        b.iter(|| cpu.gate_backward(black_box(&gate), &up, Activation::Silu, &dout, [None, None]).unwrap())
    });

    let samples: Vec<_> = chunk.samples().collect();
    let mut sums = Moments::new(HIDDEN);
    group.throughput(Throughput::Bytes(narrow));
    group.bench_function("moments", |b| {
        b.iter(|| cpu.moments(black_box(&x), &samples, &mut sums).unwrap().unwrap())
    });
}

/// An SAE of 65,536 features over 1,024 tokens: `2·N·F·D` FLOPs for values, as many for gradients. About one feature in
/// a thousand fires.
fn sae(c: &mut Criterion) {
    let (cpu, mut random) = (Cpu::new(), Random(5));
    let mut group = group(c, "sae");
    let rows = 1024;
    let [x, dx] = [(); 2].map(|()| random.activation(&cpu, rows, HIDDEN));
    let whole = |s: usize| {
        let all = s * 128..(s + 1) * 128;
        SampleRows { sample: s as u64, all: all.clone(), runs: Vec::from([all]) }
    };
    let at = Positions { samples: (0..8).map(whole).collect() };
    let product = (2 * rows * FEATURES * HIDDEN) as u64;
    for (name, dtype, features_first) in
        [("f32", Dtype::F32, true), ("f32_dims_first", Dtype::F32, false), ("bf16", Dtype::BF16, true)]
    {
        let [encoder, decoder] = [(); 2].map(|()| random.feature_matrix(dtype, features_first));
        let mut sae = SaeWeights {
            encoder,
            decoder,
            norm: InputNorm::None,
            input_bias: None,
            encoder_scale: None,
            encoder_bias: vec![-3.0; FEATURES],
            activation: SaeActivation::Relu,
            decoder_scale: None,
            decoder_bias: vec![0.0; HIDDEN],
        };
        let values = || {
            let moments = Moments::new(FEATURES);
            Some(FeatureValues {
                moments,
                fired: vec![0; FEATURES],
                max_at: vec![Place::default(); FEATURES],
            })
        };
        let mut only_values = FeatureSums { values: values(), ..FeatureSums::default() };
        let gradients = || Some(Moments::new(FEATURES));
        let mut only_gradients = FeatureSums { gradients: gradients(), ..FeatureSums::default() };
        let mut all = FeatureSums { values: values(), gradients: None, attribution: gradients() };
        group.throughput(Throughput::Elements(product));
        for (activation, kind) in [("relu", SaeActivation::Relu), ("top_k", SaeActivation::TopK { k: 64 })] {
            sae.activation = kind;
            group.bench_function(BenchmarkId::new(format!("{name}/values"), activation), |b| {
                b.iter(|| {
                    cpu.features(&sae, &at, Some(black_box(&x)), None, SaeGradient::All, &mut only_values)
                        .unwrap()
                        .unwrap()
                })
            });
            group.bench_function(BenchmarkId::new(format!("{name}/attribution"), activation), |b| {
                b.iter(|| {
                    cpu.features(&sae, &at, Some(black_box(&x)), Some(&dx), SaeGradient::All, &mut all)
                        .unwrap()
                        .unwrap()
                })
            });
            group.bench_function(BenchmarkId::new(format!("{name}/reconstruct"), activation), |b| {
                b.iter(|| cpu.reconstruct(&sae, &at, black_box(&x), None, None).unwrap())
            });
        }
        group.bench_function(BenchmarkId::new(format!("{name}/gradients"), "all"), |b| {
            b.iter(|| {
                cpu.features(&sae, &at, None, Some(black_box(&dx)), SaeGradient::All, &mut only_gradients)
                    .unwrap()
                    .unwrap()
            })
        });
    }
}

criterion_group!(benches, linear, attend, loss, elementwise, sae);
criterion_main!(benches);
