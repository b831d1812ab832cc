//! Times of the CUDA kernels on the device at hand: one JSON object a line, for `benches/peers/gpu_table.py`.
//!
//! Each case is checked against float64 in a few places before it is timed. Inputs are random, and rotate
//! through enough copies that none is still in the L2 cache from the repetition before.
//!
//! `--test` runs every case once, in small, on whatever driver is found: that the bench works.

use std::env;
use std::process::ExitCode;

use cudarc::driver::result::memcpy_dtod_async;
use cudarc::driver::sys::CUevent_flags;
use gradlens::backend::cuda::linear::Direction;
use gradlens::backend::cuda::norm::NormSpec;
use gradlens::backend::cuda::{Buf, Cuda, CudaSpec, ModuleSpec, Nvrtc, Real};
use gradlens::error::{Error, Result};
use half::bf16;
use serde_json::{Value, json};

#[path = "gpu/linear.rs"]
mod linear;

/// Tokens of a chunk.
const ROWS: usize = 8192;
/// Bytes of inputs to rotate through: more than three times Hopper's L2 cache.
const ROTATION_BYTES: usize = 192 << 20;
/// Timed repetitions, after [`WARM_UP`].
const REPETITIONS: usize = 30;
const WARM_UP: usize = 5;
/// Copies that keep the device busy while the host asks for all repetitions.
const COPIES_AHEAD: usize = 4;
/// Half a unit of bfloat16 in the last place, relative.
const BF16_ROUNDING: f64 = 1.0 / 256.0;

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
/// Their last layers: model, hidden size, vocabulary.
const HEADS: [(&str, usize, usize); 2] = [("Qwen2.5-0.5B", 896, 151_936), ("Llama-3.1-8B", 4096, 128_256)];
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
    match Bench::new(cuda, quick).and_then(|bench| bench.run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

fn failed(error: &Error) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::FAILURE
}

/// What a case does at least.
struct Work {
    /// Multiplications and additions.
    flops: f64,
    /// Every input read once and every output written once.
    bytes: f64,
}

struct Bench {
    cuda: Cuda,
    quick: bool,
    /// Source and target of the copies between which everything is timed.
    large: [Buf<f32>; 2],
}

/// The driver's error in a sentence.
fn driver(error: cudarc::driver::DriverError) -> Error {
    Error::new("the driver refuses what the bench asks for").found(format!("{error:?}"))
}

impl Bench {
    fn new(cuda: Cuda, quick: bool) -> Result<Self> {
        let len = if quick { 1 << 16 } else { 1 << 28 };
        let [source, target] = [random(&cuda, 1, len, 1)?, Buf::new(&cuda.device.memory, 1, len)?];
        Ok(Self { cuda, quick, large: [source, target] })
    }

    fn run(&self) -> Result<()> {
        let info = &self.cuda.device.info;
        let nvrtc = Nvrtc::load()?;
        let ((major, minor), (cc_major, cc_minor)) = (nvrtc.version, info.compute_capability);
        println!(
            "{}",
            json!({"device": info.name, "compute_capability": format!("{cc_major}.{cc_minor}"),
                "multiprocessors": info.multiprocessors, "total_bytes": info.total_bytes,
                "nvrtc": format!("{major}.{minor}"), "nvrtc_path": nvrtc.path, "quick": self.quick,
                "gradlens": env!("CARGO_PKG_VERSION")})
        );
        let bytes = 2.0 * self.large[0].allocation().len() as f64;
        let copy = json!({"family": "copy", "case": "device to device"});
        self.time(copy, Work { flops: 0.0, bytes }, |_| self.copy())?;
        for (model, width) in WIDTHS {
            self.norm::<bf16>(model, width)?;
            self.moments::<f32>(model, width)?;
            self.moments::<bf16>(model, width)?;
        }
        for (model, layer, in_features, out_features) in LAYERS {
            let name = format!("{model} {layer}");
            for direction in [Direction::Forward, Direction::Backward] {
                self.linear::<bf16>(&name, direction, in_features, out_features)?;
                if model == LAYERS[0].0 {
                    self.linear::<f32>(&name, direction, in_features, out_features)?;
                }
            }
            match layer {
                "o" => self.add(&name, in_features, out_features)?,
                "gate+up" => self.gated(&name, in_features, out_features)?,
                "down" => self.gated_backward(&name, in_features, out_features)?,
                _ => {}
            }
        }
        for (model, width, vocabulary) in HEADS {
            self.exponentials(model, width, vocabulary)?;
        }
        Ok(())
    }

    fn rows(&self) -> usize {
        if self.quick { 40 } else { ROWS }
    }

    /// A layer's width; in quick runs smaller, and still one whose rows start on 16 bytes.
    fn layer_width(&self, full: usize) -> usize {
        if self.quick { (full / 32).next_multiple_of(8) } else { full }
    }

    /// How many copies of inputs and outputs of `bytes` in all to rotate through.
    fn copies(&self, bytes: usize) -> usize {
        if self.quick { 1 } else { ROTATION_BYTES.div_ceil(bytes).clamp(1, 64) }
    }

    /// `copies` arrays of random numbers.
    fn inputs<T: Number>(&self, copies: usize, width: usize, seed: usize) -> Result<Vec<Buf<T>>> {
        (0..copies).map(|copy| random(&self.cuda, self.rows(), width, seed + copy)).collect()
    }

    /// The roof of everything that is bound by memory: device to device.
    fn copy(&self) -> Result<()> {
        let [source, target] = [&self.large[0], &self.large[1]].map(Buf::allocation);
        let stream = self.cuda.device.compute.cu_stream();
        // SAFETY: both buffers have this length.
        unsafe { memcpy_dtod_async(target.address(), source.address(), source.len(), stream) }.map_err(driver)
    }

    /// Times `work` and prints the line of its case. `work` gets the number of the repetition.
    fn time(&self, case: Value, least: Work, work: impl Fn(usize) -> Result<()>) -> Result<()> {
        let stream = &self.cuda.device.compute;
        let (warm_up, repetitions, ahead) =
            if self.quick { (0, 1, 0) } else { (WARM_UP, REPETITIONS, COPIES_AHEAD) };
        for repetition in 0..warm_up {
            work(repetition)?;
        }
        // All repetitions are asked for while the device is still copying: what the host needs for a launch is
        // between no two events.
        for _ in 0..ahead {
            self.copy()?;
        }
        let mark = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(driver);
        let mut marks = Vec::new();
        for repetition in 0..repetitions {
            let start = mark()?;
            work(warm_up + repetition)?;
            marks.push((start, mark()?));
        }
        self.cuda.device.synchronize()?;
        let elapsed_us = |(start, end): &(_, _)| {
            cudarc::driver::CudaEvent::elapsed_ms(start, end).map(|ms| f64::from(ms) * 1e3).map_err(driver)
        };
        let mut times_us = marks.iter().map(elapsed_us).collect::<Result<Vec<_>>>()?;
        times_us.sort_by(f64::total_cmp);
        let median = times_us[times_us.len() / 2];
        let mut line = case;
        for (key, value) in [
            ("median_us", median),
            ("min_us", times_us[0]),
            ("max_us", times_us[times_us.len() - 1]),
            ("flops", least.flops),
            ("bytes", least.bytes),
            ("tflops", least.flops / median / 1e6),
            ("gb_per_s", least.bytes / median / 1e3),
        ] {
            line[key] = json!(value);
        }
        println!("{line}");
        Ok(())
    }

    /// h = x + delta with y = norm(h), and dx of norm(x): x and h in float32, delta, y and dy in `T`.
    fn norm<T: Number>(&self, model: &str, width: usize) -> Result<()> {
        let (rows, cuda) = (self.rows(), &self.cuda);
        let spec = NormSpec { eps: 1e-6, weight_offset: 0.0 };
        let weight = random::<f32>(cuda, 1, width, 2)?;
        let (elements, size) = ((rows * width) as f64, size_of::<T>() as f64);
        let copies = self.copies(rows * width * (4 + size_of::<T>()));
        let x = self.inputs::<f32>(copies, width, 3)?;
        let delta = self.inputs::<T>(copies, width, 99)?;
        let forward = |at: usize| cuda.add_norm::<T, T>(&x[at % copies], &delta[at % copies], &weight, spec);
        let backward =
            |at: usize| cuda.norm_backward(&x[at % copies], &weight, spec, &delta[at % copies], None);
        check_norm([&x[0], &weight, &forward(0)?.0, &backward(0)?], [&delta[0], &forward(0)?.1], spec)?;
        let case = |op: &str| {
            json!({"family": "norm", "case": format!("{model} {op}"), "op": op, "dtype": T::NAME,
                "rows": rows, "width": width, "copies": copies})
        };
        let work = Work { flops: 4.0 * elements, bytes: elements * (8.0 + 2.0 * size) };
        self.time(case("add+norm"), work, |at| forward(at).map(drop))?;
        let work = Work { flops: 8.0 * elements, bytes: elements * (8.0 + size) };
        self.time(case("backward"), work, |at| backward(at).map(drop))
    }

    fn moments<T: Number>(&self, model: &str, width: usize) -> Result<()> {
        let rows = self.rows();
        let copies = self.copies(rows * width * size_of::<T>());
        let x = self.inputs::<T>(copies, width, 5)?;
        // Samples of 128 tokens.
        let starts = (0..rows).step_by(128);
        let samples: Vec<_> = starts.map(|start| start..(start + 128).min(rows)).collect();
        let into = std::cell::RefCell::new(self.cuda.new_moments(width)?);
        // Whether values are finite is not waited for where it is timed.
        let add = |at: usize| self.cuda.add_moments(&x[at % copies], &samples, &mut into.borrow_mut());
        add(0)?.wait()?.map_err(|_| Error::new("random numbers are taken for infinite"))?;
        let values = x[0].to_host()?;
        let found = into.borrow().to_host()?;
        for column in [0, width / 3, width - 1] {
            let values = || values.iter().skip(column).step_by(width).map(|value| (*value).into());
            let size: f64 = values().map(f64::abs).sum();
            let place = |what| format!("{what}, column {column}");
            near("a sum", || place("v"), found.sum[column], values().sum(), size * 1e-6)?;
            near("a sum", || place("|v|"), found.sum_abs[column], size, size * 1e-6)?;
            near("a sum", || place("v²"), found.sum_sq[column], values().map(|v| v * v).sum(), size * 1e-6)?;
        }
        let case = json!({"family": "stats", "case": format!("{model} moments"), "op": "moments",
            "dtype": T::NAME, "rows": rows, "width": width, "copies": copies});
        let elements = (rows * width) as f64;
        let work = Work { flops: 5.0 * elements, bytes: elements * size_of::<T>() as f64 };
        self.time(case, work, |at| add(at).map(drop))
    }
}

/// Random numbers on the device, `[rows, width]`.
fn random<T: Number>(cuda: &Cuda, rows: usize, width: usize, seed: usize) -> Result<Buf<T>> {
    // A million numbers repeated: as random as a kernel can tell, and soon made.
    let mut state = (seed as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5
    };
    let period: Vec<T> = (0..(1 << 20).min(rows * width)).map(|_| T::from32(uniform())).collect();
    let values: Vec<T> = period.iter().copied().cycle().take(rows * width).collect();
    Buf::from_host(&cuda.device.memory, &values, width)
}

/// NaN is not near.
fn near(what: &str, place: impl Fn() -> String, found: f64, wanted: f64, tolerance: f64) -> Result<()> {
    if (found - wanted).abs() <= tolerance {
        return Ok(());
    }
    Err(Error::new(format!("{what} is wrong"))
        .at(place())
        .expected(format!("{wanted} ± {tolerance:e}"))
        .found(found))
}

/// Some rows of h, y and dx against float64.
fn check_norm<T: Number>(
    [x, weight, h, dx]: [&Buf<f32>; 4],
    [delta, y]: [&Buf<T>; 2],
    spec: NormSpec,
) -> Result<()> {
    let width = weight.width();
    let [x, weight, h, dx] = [x.to_host()?, weight.to_host()?, h.to_host()?, dx.to_host()?];
    let [delta, y] = [delta.to_host()?, y.to_host()?];
    let inverse_root = |row: &[f32]| {
        let squares: f64 = row.iter().map(|v| f64::from(*v).powi(2)).sum();
        1.0 / (squares / width as f64 + f64::from(spec.eps)).sqrt()
    };
    let rows = x.len() / width;
    for row in [0, rows / 2, rows - 1] {
        let all = row * width..(row + 1) * width;
        let r_h = inverse_root(&h[all.clone()]);
        let r = inverse_root(&x[all.clone()]);
        let at = |i: usize| (f64::from(x[i]), f64::from(weight[i % width]), delta[i].into());
        let dot: f64 = all.clone().map(at).map(|(x, w, dy)| x * w * dy).sum();
        for i in all {
            let (x, w, d) = at(i);
            let place = || format!("row {row}, column {}", i % width);
            near("a sum", place, h[i].into(), x + d, 1e-6)?;
            let wanted = f64::from(h[i]) * r_h * w;
            near("a norm", place, y[i].into(), wanted, wanted.abs() * BF16_ROUNDING + 1e-6)?;
            let wanted = r * w * d - x * r.powi(3) / width as f64 * dot;
            near("a norm's gradient", place, dx[i].into(), wanted, 1e-5)?;
        }
    }
    Ok(())
}

/// What arrays hold here: rounded from float32, and exact in float64.
trait Number: Real + Into<f64> {
    fn from32(value: f32) -> Self;
}

impl Number for f32 {
    fn from32(value: f32) -> Self {
        value
    }
}

impl Number for bf16 {
    fn from32(value: f32) -> Self {
        Self::from_f32(value)
    }
}
