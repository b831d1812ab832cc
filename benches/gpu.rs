//! Times of the CUDA kernels on the device at hand: one JSON object a line, for `benches/peers/gpu_table.py`.
//!
//! `--test` runs every case once, in small, on whatever driver is found: that the bench works. Each case is
//! checked against float64 in a few places before it is timed. Inputs are random, and rotate through enough
//! copies that none is still in the L2 cache from the repetition before.

use std::env;
use std::process::ExitCode;

use cudarc::driver::sys::CUevent_flags;
use gradlens::backend::cuda::norm::NormSpec;
use gradlens::backend::cuda::{Buf, Cuda, CudaSpec, ModuleSpec, Nvrtc, Real};
use gradlens::error::{Error, Result};
use half::bf16;
use serde_json::json;

/// Tokens of a chunk.
const ROWS: usize = 8192;
/// Bytes of inputs to rotate through: more than three times the largest L2 cache.
const ROTATION_BYTES: usize = 192 << 20;
/// Timed repetitions, after [`WARM_UP`].
const REPETITIONS: usize = 30;
const WARM_UP: usize = 5;

/// Linear layers: model, layer, in, out.
const LAYERS: [(&str, &str, usize, usize); 12] = [
    ("Qwen2.5-0.5B", "qkv", 896, 1152),
    ("Qwen2.5-0.5B", "o", 896, 896),
    ("Qwen2.5-0.5B", "gate+up", 896, 9728),
    ("Qwen2.5-0.5B", "down", 4864, 896),
    ("Llama-3.1-8B", "qkv", 4096, 6144),
    ("Llama-3.1-8B", "o", 4096, 4096),
    ("Llama-3.1-8B", "gate+up", 4096, 28672),
    ("Llama-3.1-8B", "down", 14336, 4096),
    ("Yi-34B", "qkv", 7168, 9216),
    ("Yi-34B", "o", 7168, 7168),
    ("Yi-34B", "gate+up", 7168, 40960),
    ("Yi-34B", "down", 20480, 7168),
];
/// Hidden sizes of the same models.
const WIDTHS: [(&str, usize); 3] = [("Qwen2.5-0.5B", 896), ("Llama-3.1-8B", 4096), ("Yi-34B", 7168)];

fn main() -> ExitCode {
    let quick = env::args().any(|argument| argument == "--test");
    let spec =
        ModuleSpec::from_environment().map(|modules| CudaSpec { ordinal: 0, budget_bytes: None, modules });
    let cuda = match spec.and_then(Cuda::open) {
        Ok(cuda) => cuda,
        // Without a GPU there is nothing to measure, and that is no failure of `cargo bench`.
        Err(error) if env::var_os("GRADLENS_REQUIRE_CUDA").is_none() => {
            eprintln!("nothing measured: {error}");
            return ExitCode::SUCCESS;
        }
        Err(error) => return failed(&error),
    };
    let bench = Bench { cuda, quick };
    match bench.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

fn failed(error: &Error) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::FAILURE
}

struct Bench {
    cuda: Cuda,
    quick: bool,
}

/// What a case does at least.
struct Work {
    /// Multiplications and additions.
    flops: f64,
    /// Every input read once and every output written once.
    bytes: f64,
}

impl Bench {
    fn run(&self) -> Result<()> {
        let info = &self.cuda.device.info;
        let (major, minor) = Nvrtc::load()?.version;
        let (cc_major, cc_minor) = info.compute_capability;
        println!(
            "{}",
            json!({"device": info.name, "compute_capability": format!("{cc_major}.{cc_minor}"),
                "multiprocessors": info.multiprocessors, "total_bytes": info.total_bytes,
                "nvrtc": format!("{major}.{minor}"), "gradlens": env!("CARGO_PKG_VERSION")})
        );
        self.copy()?;
        let count = if self.quick { 1 } else { usize::MAX };
        for (model, width) in WIDTHS.into_iter().take(count) {
            self.norm::<bf16>(model, width)?;
            self.moments::<f32>(model, width)?;
            self.moments::<bf16>(model, width)?;
        }
        for (model, layer, in_features, out_features) in LAYERS.into_iter().take(count) {
            self.linear(&format!("{model} {layer}"), in_features, out_features)?;
        }
        Ok(())
    }

    fn rows(&self) -> usize {
        if self.quick { 70 } else { ROWS }
    }

    /// How many copies of inputs of `bytes` in all to rotate through.
    fn copies(&self, bytes: usize) -> usize {
        if self.quick { 1 } else { ROTATION_BYTES.div_ceil(bytes).clamp(1, 64) }
    }

    /// Random numbers on the device, `[rows, width]`.
    fn random<T: Real + From32>(&self, rows: usize, width: usize, seed: u64) -> Result<Buf<T>> {
        // A million numbers repeated: as random as a kernel can tell, and soon made.
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5
        };
        let period: Vec<T> = (0..(1 << 20).min(rows * width)).map(|_| T::from32(uniform())).collect();
        let values: Vec<T> = period.iter().copied().cycle().take(rows * width).collect();
        Buf::from_host(&self.cuda.device.memory, &values, width)
    }

    /// Times `work` and prints the line of its case. `work` gets the number of the repetition.
    fn time(&self, case: serde_json::Value, least: Work, work: impl Fn(usize) -> Result<()>) -> Result<()> {
        let stream = &self.cuda.device.compute;
        let driver = |error| Error::new("the bench could not time a kernel").found(format!("{error:?}"));
        let (warm_up, repetitions) = if self.quick { (0, 1) } else { (WARM_UP, REPETITIONS) };
        for repetition in 0..warm_up {
            work(repetition)?;
        }
        let mark = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(driver);
        let mut times_us = Vec::new();
        for repetition in 0..repetitions {
            let start = mark()?;
            work(warm_up + repetition)?;
            let end = mark()?;
            self.cuda.device.synchronize()?;
            times_us.push(f64::from(start.elapsed_ms(&end).map_err(driver)?) * 1e3);
        }
        times_us.sort_by(f64::total_cmp);
        let median = times_us[times_us.len() / 2];
        let mut line = case;
        line["median_us"] = json!(median);
        line["min_us"] = json!(times_us[0]);
        line["max_us"] = json!(times_us[times_us.len() - 1]);
        line["tflops"] = json!(least.flops / median / 1e6);
        line["gb_per_s"] = json!(least.bytes / median / 1e3);
        println!("{line}");
        Ok(())
    }

    /// The roof of everything that is bound by memory: device to device.
    fn copy(&self) -> Result<()> {
        let len = if self.quick { 1 << 16 } else { 1 << 28 };
        let source = self.random::<f32>(1, len, 1)?;
        let target = Buf::<f32>::new(&self.cuda.device.memory, 1, len)?;
        let bytes = 4 * len;
        self.time(
            json!({"family": "copy", "case": "device to device"}),
            Work { flops: 0.0, bytes: 2.0 * bytes as f64 },
            |_| {
                let stream = &self.cuda.device.compute;
                let (from, to) = (source.allocation().address(), target.allocation().address());
                // SAFETY: both buffers have `bytes` bytes.
                let copied =
                    unsafe { cudarc::driver::result::memcpy_dtod_async(to, from, bytes, stream.cu_stream()) };
                copied.map_err(|error| Error::new("the bench could not copy").found(format!("{error:?}")))
            },
        )
    }

    fn norm<T: Real + From32>(&self, model: &str, width: usize) -> Result<()> {
        let rows = self.rows();
        let spec = NormSpec { eps: 1e-6, weight_offset: 0.0 };
        let weight = self.random::<f32>(1, width, 2)?;
        let elements = (rows * width) as f64;
        let copies = self.copies(rows * width * 6);
        let x = (0..copies)
            .map(|copy| self.random::<f32>(rows, width, 3 + copy as u64))
            .collect::<Result<Vec<_>>>()?;
        let delta = (0..copies)
            .map(|copy| self.random::<T>(rows, width, 99 + copy as u64))
            .collect::<Result<Vec<_>>>()?;
        let size = size_of::<T>() as f64;
        let case = |name: &str| json!({"family": "norm", "case": format!("{model} {name} {}", T::NAME), "rows": rows, "width": width});
        self.time(
            case("add+norm"),
            Work { flops: 4.0 * elements, bytes: elements * (8.0 + 2.0 * size) },
            |at| {
                let (_h, _y): (_, Buf<T>) =
                    self.cuda.add_norm(&x[at % copies], &delta[at % copies], &weight, spec)?;
                Ok(())
            },
        )?;
        self.time(case("backward"), Work { flops: 8.0 * elements, bytes: elements * (8.0 + size) }, |at| {
            self.cuda.norm_backward(&x[at % copies], &weight, spec, &delta[at % copies], None).map(|_| ())
        })
    }

    fn moments<T: Real + From32>(&self, model: &str, width: usize) -> Result<()> {
        let rows = self.rows();
        let copies = self.copies(rows * width * size_of::<T>());
        let x = (0..copies)
            .map(|copy| self.random::<T>(rows, width, 5 + copy as u64))
            .collect::<Result<Vec<_>>>()?;
        // Samples of 128 tokens.
        let starts = (0..rows).step_by(128);
        let samples: Vec<_> = starts.map(|start| start..(start + 128).min(rows)).collect();
        let case = json!({"family": "stats", "case": format!("{model} moments {}", T::NAME), "rows": rows, "width": width});
        let bytes = (rows * width * size_of::<T>()) as f64;
        let into = std::cell::RefCell::new(self.cuda.new_moments(width)?);
        self.time(case, Work { flops: 5.0 * (rows * width) as f64, bytes }, |at| {
            // Whether values are finite is not waited for here.
            let _check = self.cuda.add_moments(&x[at % copies], &samples, &mut into.borrow_mut())?;
            Ok(())
        })
    }

    fn linear(&self, name: &str, in_features: usize, out_features: usize) -> Result<()> {
        let rows = self.rows();
        let (in_features, out_features) =
            if self.quick { (in_features / 7, out_features / 9) } else { (in_features, out_features) };
        let weight = self.random::<bf16>(out_features, in_features, 7)?;
        let flops = 2.0 * (rows * in_features * out_features) as f64;
        let bytes = 2.0 * (rows * in_features + in_features * out_features + rows * out_features) as f64;
        for backward in [false, true] {
            let (from, to) = if backward { (out_features, in_features) } else { (in_features, out_features) };
            let copies = self.copies(2 * rows * (from + to)).min(4);
            let x = (0..copies)
                .map(|copy| self.random::<bf16>(rows, from, 8 + copy as u64))
                .collect::<Result<Vec<_>>>()?;
            let product = |at: usize| -> Result<Buf<bf16>> {
                match backward {
                    false => self.cuda.linear_forward(&x[at % copies], &weight, None),
                    true => self.cuda.linear_backward_as(&x[at % copies], &weight, None),
                }
            };
            check(&x[0], &weight, &product(0)?, backward)?;
            let direction = if backward { "backward" } else { "forward" };
            let case = json!({"family": "linear", "case": format!("{name} {direction}"), "rows": rows,
                "in": in_features, "out": out_features, "direction": direction});
            self.time(case, Work { flops, bytes }, |at| product(at).map(|_| ()))?;
        }
        Ok(())
    }
}

/// Some outputs of a product against float64.
fn check(x: &Buf<bf16>, weight: &Buf<bf16>, y: &Buf<bf16>, backward: bool) -> Result<()> {
    let (from, to, in_features) = (x.width(), y.width(), weight.width());
    let (x, weight, y) = (x.to_host()?, weight.to_host()?, y.to_host()?);
    for probe in 0..64 {
        let (row, column) = ((probe * 7919) % (y.len() / to), (probe * 104_729) % to);
        let weight_at = |k: usize| {
            if backward { weight[k * in_features + column] } else { weight[column * in_features + k] }
        };
        let terms = (0..from).map(|k| x[row * from + k].to_f64() * weight_at(k).to_f64());
        let (wanted, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
        let found = y[row * to + column].to_f64();
        // Half a bfloat16 unit of the result, and float32 sums.
        let tolerance = wanted.abs() / 256.0 + size * 1e-5;
        if (found - wanted).abs() > tolerance || found.is_nan() {
            return Err(Error::new("a product is wrong")
                .at(format!("row {row}, column {column}"))
                .expected(wanted)
                .found(found));
        }
    }
    Ok(())
}

/// Rounds from float32.
trait From32: Copy {
    fn from32(value: f32) -> Self;
}

impl From32 for f32 {
    fn from32(value: f32) -> Self {
        value
    }
}

impl From32 for bf16 {
    fn from32(value: f32) -> Self {
        Self::from_f32(value)
    }
}
