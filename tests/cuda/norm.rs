//! RMSNorm against float64.

use cuemu::launcher::Sanitizer;
use std::panic::{AssertUnwindSafe, catch_unwind};

use gradlens::backend::cuda::norm::NormSpec;
use gradlens::backend::cuda::{Buf, Real};

use super::faults::{Fault, WRONG};
use super::machine::{Machine, Random, machine};

/// What these tests must notice.
pub const FAULTS: &[Fault] = &[
    Fault {
        name: "missing barrier",
        file: "norm.cu",
        from: "__syncthreads();  // norm: the warps' sums are written",
        to: "",
        test: "norm::forward",
        build: Sanitizer::Thread,
        reports: &["ThreadSanitizer: data race"],
    },
    Fault {
        name: "missing barrier, without a sanitizer",
        file: "norm.cu",
        from: "__syncthreads();  // norm: the warps' sums are written",
        to: "",
        test: "norm::backward",
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "divergent barrier",
        file: "norm.cu",
        from: "__syncthreads();  // norm: the warps' sums are written",
        to: "if (in_warp < 16) __syncthreads();",
        test: "norm::forward",
        build: Sanitizer::None,
        reports: &["divergent", "deadlock"],
    },
    Fault {
        name: "lanes missing from a shuffle's mask",
        file: "norm.cu",
        from: "v[i] += __shfl_xor_sync(FULL_WARP, v[i], step)",
        to: "v[i] += __shfl_xor_sync(0x0000ffffu, v[i], step)",
        test: "norm::forward",
        build: Sanitizer::None,
        reports: &["mask 0000ffff does not contain the calling lane"],
    },
    Fault {
        name: "one group past the end of the rows",
        file: "norm.cu",
        from: "inside[i] = team.has_row() && team.column(i) < width;\n    row[i].clear()",
        to: "inside[i] = team.has_row() && team.column(i) <= width;\n    row[i].clear()",
        test: "norm::backward",
        build: Sanitizer::None,
        reports: &["out of bounds global"],
    },
    Fault {
        name: "past the end of a shared array",
        file: "norm.cu",
        from: "if (in_warp == 0) scratch[32 * i + (threadIdx.x >> 5)] = v[i];",
        to: "if (in_warp == 0) scratch[32 * i + 31 + (threadIdx.x >> 5)] = v[i];",
        test: "norm::forward",
        build: Sanitizer::None,
        reports: &["out of bounds shared write"],
    },
    Fault {
        name: "past the end of a shared array, with a sanitizer",
        file: "norm.cu",
        from: "if (in_warp == 0) scratch[32 * i + (threadIdx.x >> 5)] = v[i];",
        to: "if (in_warp == 0) scratch[32 * i + 31 + (threadIdx.x >> 5)] = v[i];",
        test: "norm::forward",
        build: Sanitizer::Address,
        reports: &["out of bounds shared write", "AddressSanitizer"],
    },
    Fault {
        name: "(1 + w) forgotten",
        file: "norm.cu",
        from: "row[i][k] *= scale[i].value(k) + weight_offset;",
        to: "row[i][k] *= scale[i].value(k);",
        test: "norm::forward",
        build: Sanitizer::None,
        reports: WRONG,
    },
];

/// (rows, width): every team of threads, with full and partial ones. Widths of a head, hidden sizes, neither.
const SHAPES: [(usize, usize); 12] = [
    (3, 1),
    (5, 7),
    (70, 4),
    (37, 64),
    (19, 100),
    (11, 128),
    (13, 256),
    (5, 260),
    (3, 896),
    (2, 3584),
    (1, 8192),
    (2, 5123),
];
const EPS: f32 = 1e-5;

/// An element type and how finely it rounds.
trait Checked: Real + PartialEq {
    /// Half a unit in the last place, relative; for float32 with the sums of squares and the reciprocal root.
    const ROUNDING: f64;
    fn of(value: f32) -> Self;
    fn wide(self) -> f64;
}

impl Checked for f32 {
    const ROUNDING: f64 = 1.5e-6;
    fn of(value: f32) -> Self {
        value
    }
    fn wide(self) -> f64 {
        self.into()
    }
}

impl Checked for half::bf16 {
    const ROUNDING: f64 = 1.0 / 256.0 + 1.5e-6;
    fn of(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn wide(self) -> f64 {
        self.to_f64()
    }
}

fn random<T: Checked>(random: &mut Random, len: usize) -> Vec<T> {
    random.f32(len).into_iter().map(T::of).collect()
}

/// y and r of one row in float64.
fn reference(h: &[f64], weight: &[f64]) -> (Vec<f64>, f64) {
    let mean = h.iter().map(|h| h * h).sum::<f64>() / h.len() as f64;
    let r = 1.0 / (mean + f64::from(EPS)).sqrt();
    (h.iter().zip(weight).map(|(h, w)| h * r * w).collect(), r)
}

fn wide<T: Checked>(values: &[T]) -> Vec<f64> {
    values.iter().map(|value| value.wide()).collect()
}

/// Every element within `rounding` of its own `scale`.
fn assert_near(found: &[f64], wanted: &[f64], scale: impl Fn(usize) -> f64, rounding: f64, what: &str) {
    assert_eq!(found.len(), wanted.len());
    for (index, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let error = (found - wanted).abs() / scale(index);
        // NaN is not near.
        assert!(error <= rounding, "{what} [{index}]: relative error {error:e}, {found} instead of {wanted}");
    }
}

/// `delta`: whether there is a residual addition before the norm.
fn check_forward<D: Checked, Y: Checked>(machine: &Machine, rows: usize, width: usize, delta: bool) {
    let cuda = &machine.cuda;
    let memory = &cuda.device.memory;
    let mut numbers = Random::new((rows * width) as u64);
    let (x, w) = (numbers.f32(rows * width), numbers.f32(width));
    let d: Vec<D> = random(&mut numbers, rows * width);
    let spec = NormSpec { eps: EPS, weight_offset: if delta { 1.0 } else { 0.0 } };
    let weight = Buf::from_host(memory, &w, width).unwrap();
    let (h, y) = machine.same_under_all_schedules(|| {
        let x = Buf::from_host(memory, &x, width).unwrap();
        if !delta {
            let y: Buf<Y> = cuda.norm(&x, &weight, spec).unwrap();
            return (x.to_host().unwrap(), y.to_host().unwrap());
        }
        let delta = Buf::from_host(memory, &d, width).unwrap();
        let (h, y) = cuda.add_norm::<D, Y>(&x, &delta, &weight, spec).unwrap();
        (h.to_host().unwrap(), y.to_host().unwrap())
    });
    let what = format!("{} {} {rows}x{width} delta {delta}", D::NAME, Y::NAME);
    for (index, (x, d)) in x.iter().zip(&d).enumerate() {
        let sum = if delta { x + d.wide() as f32 } else { *x };
        assert_eq!(h[index], sum, "{what}: h [{index}]");
    }
    let weight: Vec<f64> = w.iter().map(|w| f64::from(*w) + f64::from(spec.weight_offset)).collect();
    for (h, y) in h.chunks_exact(width).zip(y.chunks_exact(width)) {
        let (wanted, _) = reference(&wide(h), &weight);
        assert_near(&wide(y), &wanted, |index| wanted[index].abs() + 1e-30, Y::ROUNDING, &what);
    }
}

#[test]
fn forward() {
    let Some(machine) = machine() else { return };
    for (rows, width) in SHAPES.into_iter().filter(|(rows, width)| machine.affordable(rows * width)) {
        check_forward::<f32, f32>(&machine, rows, width, false);
        check_forward::<f32, half::bf16>(&machine, rows, width, false);
        check_forward::<half::bf16, half::bf16>(&machine, rows, width, true);
    }
    for (rows, width) in [(3, 7), (4, 64), (2, 896)] {
        check_forward::<f32, f32>(&machine, rows, width, true);
        check_forward::<f32, half::bf16>(&machine, rows, width, true);
        check_forward::<half::bf16, f32>(&machine, rows, width, true);
    }
}

#[test]
fn a_norm_per_head_is_a_norm_of_shorter_rows() {
    let Some(machine) = machine() else { return };
    let cuda = &machine.cuda;
    let memory = &cuda.device.memory;
    let (tokens, heads, head_dim) = (5, 3, 64);
    let mut numbers = Random::new(3);
    let x = numbers.f32(tokens * heads * head_dim);
    let weight = Buf::from_host(memory, &numbers.f32(head_dim), head_dim).unwrap();
    let spec = NormSpec { eps: EPS, weight_offset: 0.0 };
    let norm = |width: usize| {
        let x = Buf::from_host(memory, &x, width).unwrap();
        let y: Buf<f32> = cuda.norm(&x, &weight, spec).unwrap();
        assert_eq!((y.rows(), y.width()), (x.rows(), x.width()));
        let dx = cuda.norm_backward(&x, &weight, spec, &y, None).unwrap();
        (y.to_host().unwrap(), dx.to_host().unwrap())
    };
    assert!(norm(heads * head_dim) == norm(head_dim));
}

/// `so_far`: whether the gradient holds something already.
fn check_backward<G: Checked>(machine: &Machine, rows: usize, width: usize, so_far: bool) {
    let cuda = &machine.cuda;
    let memory = &cuda.device.memory;
    let mut numbers = Random::new((7 * rows * width) as u64);
    let (x, w, base) = (numbers.f32(rows * width), numbers.f32(width), numbers.f32(rows * width));
    let dy: Vec<G> = random(&mut numbers, rows * width);
    let spec = NormSpec { eps: EPS, weight_offset: if so_far { 1.0 } else { 0.0 } };
    let x_device = Buf::from_host(memory, &x, width).unwrap();
    let weight = Buf::from_host(memory, &w, width).unwrap();
    let dy_device = Buf::from_host(memory, &dy, width).unwrap();
    let dx = machine.same_under_all_schedules(|| {
        let base = so_far.then(|| Buf::from_host(memory, &base, width).unwrap());
        cuda.norm_backward(&x_device, &weight, spec, &dy_device, base).unwrap().to_host().unwrap()
    });
    let weight: Vec<f64> = w.iter().map(|w| f64::from(*w) + f64::from(spec.weight_offset)).collect();
    let what = format!("{} {rows}x{width} so far {so_far}", G::NAME);
    for row in 0..rows {
        let at = row * width..(row + 1) * width;
        let x = wide(&x[at.clone()]);
        let (_, r) = reference(&x, &weight);
        let g: Vec<f64> = wide(&dy[at.clone()]).iter().zip(&weight).map(|(dy, w)| dy * w).collect();
        let base: Vec<f64> =
            base[at.clone()].iter().map(|base| if so_far { f64::from(*base) } else { 0.0 }).collect();
        let products: Vec<f64> = g.iter().zip(&x).map(|(g, x)| g * x).collect();
        let factor = r.powi(3) / width as f64;
        let dot = products.iter().sum::<f64>();
        let wanted: Vec<f64> = (0..width).map(|j| base[j] + r * g[j] - x[j] * factor * dot).collect();
        // What cancels leaves the rounding of its terms.
        let terms = products.iter().map(|p| p.abs()).sum::<f64>();
        let scale = |j: usize| base[j].abs() + (r * g[j]).abs() + (x[j] * factor * terms).abs();
        assert_near(&wide(&dx[at]), &wanted, scale, f32::ROUNDING, &what);
    }
}

#[test]
fn backward() {
    let Some(machine) = machine() else { return };
    for (rows, width) in SHAPES.into_iter().filter(|(rows, width)| machine.affordable(rows * width)) {
        check_backward::<f32>(&machine, rows, width, true);
        check_backward::<half::bf16>(&machine, rows, width, true);
    }
    for (rows, width) in [(3, 7), (4, 64), (2, 896)] {
        check_backward::<f32>(&machine, rows, width, false);
        check_backward::<half::bf16>(&machine, rows, width, false);
    }
}

#[test]
fn rows_are_whole_norms() {
    let Some(machine) = machine() else { return };
    let cuda = &machine.cuda;
    let memory = &cuda.device.memory;
    let x = Buf::from_host(memory, &[1.0_f32; 24], 12).unwrap();
    let spec = NormSpec { eps: EPS, weight_offset: 0.0 };
    for (values, width) in [(vec![1.0_f32; 5], 5), (vec![1.0; 24], 24), (vec![1.0; 8], 4), (vec![], 0)] {
        let weight = Buf::from_host(memory, &values, width).unwrap();
        let forward = || cuda.norm::<f32>(&x, &weight, spec).map(|_| ());
        let backward = || cuda.norm_backward(&x, &weight, spec, &x, None).map(|_| ());
        assert!(catch_unwind(AssertUnwindSafe(forward)).is_err(), "a weight of {width}");
        assert!(catch_unwind(AssertUnwindSafe(backward)).is_err(), "a weight of {width}, backward");
    }
}
