//! Activations and their derivatives against float64, by a kernel around each.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use cuemu::launcher::Sanitizer;
use gradlens::backend::cuda::launch::{Launch, int};
use gradlens::backend::cuda::{Buf, Sources};

use super::elementwise::EPSILON;
use super::faults::{Fault, WRONG, planted};
use super::machine::machine_with;

const FILE: &str = "activation.cu";

/// What these tests must notice.
pub const FAULTS: &[Fault] = &[
    Fault {
        name: "an exponential that overflows",
        file: "activation.cuh",
        from: "const float t = expf(-fabsf(x));",
        to: "const float t = expf(x < 0.f ? -x : x);",
        test: "activation::activations_and_derivatives",
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "a fast exponential",
        file: "activation.cuh",
        from: "const float t = expf(-fabsf(x));",
        to: "const float t = exp2f(-1.4426950f * fabsf(x));",
        test: "activation::activations_and_derivatives",
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "the other gelu",
        file: "activation.cuh",
        from: "if (activation == GELU_TANH) {",
        to: "if (activation != SILU) {",
        test: "activation::activations_and_derivatives",
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "a term of the slope forgotten",
        file: "activation.cuh",
        from: "return {value, fmaf(value, s.y, s.x)};",
        to: "return {value, s.x};",
        test: "activation::activations_and_derivatives",
        build: Sanitizer::None,
        reports: WRONG,
    },
];

/// 1 − erf x for x ≥ 0, to about 1e-15 relative: the series of erf, or the continued fraction of erfc.
fn erfc_of_positive(x: f64) -> f64 {
    let density = (-x * x).exp() * 2.0 / PI.sqrt();
    if x < 2.0 {
        // erf x = 2/√π·e^(−x²)·Σ 2ⁿ·x^(2n+1)/(1·3·…·(2n+1)): no term is negative.
        let (mut term, mut sum) = (x, x);
        for n in 1..80 {
            term *= 2.0 * x * x / f64::from(2 * n + 1);
            sum += term;
        }
        return 1.0 - density * sum;
    }
    let tail = (1..200).rev().fold(0.0, |tail, n| f64::from(n) / 2.0 / (x + tail));
    density / 2.0 / (x + tail)
}

/// Φ(g).
fn below(g: f64) -> f64 {
    let half = 0.5 * erfc_of_positive(g.abs() * FRAC_1_SQRT_2);
    if g < 0.0 { half } else { 1.0 - half }
}

fn sigmoid(x: f64) -> f64 {
    if x < 0.0 { x.exp() / (1.0 + x.exp()) } else { 1.0 / (1.0 + (-x).exp()) }
}

/// An activation as act(g) = g·s with a factor s; then act'(g) = s + g·s'.
struct Reference {
    name: &'static str,
    /// s and g·s'.
    parts: fn(f64) -> [f64; 2],
    /// The relative error of either, in units of EPSILON: see kernels/activation.cuh.
    units: fn(f64) -> f64,
}

fn tanh_argument(g: f64) -> f64 {
    2.0 * (2.0 / PI).sqrt() * (g + 0.044715 * g.powi(3))
}

/// By number.
const REFERENCES: [Reference; 3] = [
    Reference { name: "silu", parts: |g| [sigmoid(g), g * sigmoid(g) * sigmoid(-g)], units: |_| 12.0 },
    Reference {
        name: "gelu_tanh",
        parts: |g| {
            let (x, slope) = (tanh_argument(g), 2.0 * (2.0 / PI).sqrt() * (1.0 + 3.0 * 0.044715 * g * g));
            [sigmoid(x), g * sigmoid(x) * sigmoid(-x) * slope]
        },
        units: |g| 12.0 + 4.0 * tanh_argument(g).abs(),
    },
    Reference {
        name: "gelu_erf",
        parts: |g| [below(g), g * (-g * g / 2.0).exp() / (2.0 * PI).sqrt()],
        units: |g| 12.0 + 2.0 * g * g,
    },
];

#[test]
fn activations_and_derivatives() {
    let sources = Sources::embedded().and(FILE, include_str!("activation.cu"));
    let Some(machine) = machine_with(planted(sources)) else { return };
    let cuda = &machine.cuda;
    let memory = &cuda.device.memory;
    let mut x: Vec<f32> = (-2400..=2400).map(|i| i as f32 / 80.0 + 1e-3).collect();
    x.extend([0.0, -0.0, 1e-30, -1e-30, 88.5, -88.5, 120.0, -120.0, 1e3, -1e3, 1e4, -1e4, 1e12, -1e12]);
    let x_device = Buf::from_host(memory, &x, x.len()).unwrap();
    let kernel = cuda.kernel(FILE, "activations").unwrap();
    for (activation, reference) in (0..).zip(&REFERENCES) {
        let [value, slope] = [(); 2].map(|()| Buf::<f32>::new(memory, 1, x.len()).unwrap());
        let launch = Launch::new(&kernel, x.len().div_ceil(256), 256)
            .arg("const float* x", &x_device)
            .arg("int activation", activation)
            .arg("int count", int(x.len()))
            .arg("float* value", &value)
            .arg("float* slope", &slope);
        // SAFETY: all three have `count` elements.
        unsafe { launch.on(&cuda.device.compute) }.unwrap();
        let (values, slopes) = (value.to_host().unwrap(), slope.to_host().unwrap());
        let mut worst = [0.0_f64; 2];
        for ((x, value), slope) in x.iter().zip(values).zip(slopes) {
            let g = f64::from(*x);
            let [s, more] = (reference.parts)(g);
            let units = (reference.units)(g) * EPSILON;
            let found = [f64::from(value), f64::from(slope)];
            let wanted = [(g * s, (g * s).abs()), (s + more, s.abs() + more.abs())];
            for ((found, (wanted, size)), worst) in found.into_iter().zip(wanted).zip(&mut worst) {
                // Below the normal numbers the error is absolute.
                let bound = size * units + g.abs().max(1.0) * 3e-38;
                let error = (found - wanted).abs();
                assert!(error <= bound, "{} {x}: {found} instead of {wanted}", reference.name);
                *worst = worst.max(error / bound);
            }
        }
        println!("{}: at most {worst:.2?} of the bounds", reference.name);
    }
}
