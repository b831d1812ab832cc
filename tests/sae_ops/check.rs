//! One SAE and one chunk through the backend, against the reference.

use gradlens::backend::cpu::{Buf, Cpu, Element};
use gradlens::backend::{
    FeatureSums, FeatureValues, Fit, Moments, Place, Positions, SaeBackend, SaeGradient,
};
use gradlens::model::sae::{InputNorm, SaeActivation, SaeWeights};

use crate::common::{Random, relative_l2};
use crate::reference::Reference;

/// F: 11·47, three tiles. D: odd.
pub const SHAPE: (usize, usize) = (517, 37);
pub const NORMS: [InputNorm; 3] = [InputNorm::None, InputNorm::RescaleToSqrtD, InputNorm::LayerNorm];
/// Float32 sums of a few dozen terms, added up in float64: 2⁻²⁴·√37, with room for cancellation.
pub const FLOAT32: f64 = 3e-6;
/// The same in float64.
pub const FLOAT64: f64 = 1e-13;
/// Features this close to firing or not are not compared.
pub const KINK: f64 = 1e-4;

pub fn activations(features: usize) -> Vec<SaeActivation> {
    let mut random = Random::new(77);
    let mut vector = || random.normals(features).into_iter().map(|v| v as f32 * 0.5).collect();
    vec![
        SaeActivation::Relu,
        SaeActivation::JumpRelu { threshold: vector() },
        SaeActivation::TopK { k: 5 },
        SaeActivation::TopK { k: features },
        SaeActivation::GroupMax { k: 11 },
        SaeActivation::GroupMax { k: 47 },
        SaeActivation::Gated { gate_bias: vector() },
    ]
}

pub fn all_sums(features: usize) -> FeatureSums {
    FeatureSums {
        values: Some(values_of(features)),
        gradients: Some(Moments::new(features)),
        attribution: Some(Moments::new(features)),
    }
}

pub fn values_of(features: usize) -> FeatureValues {
    FeatureValues {
        moments: Moments::new(features),
        fired: vec![0; features],
        max_at: vec![Place::default(); features],
    }
}

/// Values and gradients of a chunk; those of samples with one token are zero, as a backward pass leaves them.
pub fn inputs(at: &Positions, width: usize, seed: u64) -> [Vec<f64>; 2] {
    let mut random = Random::new(seed);
    let rows = at.samples.last().unwrap().all.end;
    let [x, mut dx] = [(); 2].map(|()| random.normals(rows * width));
    for rows in at.samples.iter().map(|sample| &sample.all).filter(|rows| rows.len() == 1) {
        dx[rows.start * width..rows.end * width].fill(0.0);
    }
    [x, dx]
}

pub fn buffer<T: Element>(cpu: &Cpu<T>, values: &[f64], width: usize) -> Buf<T> {
    cpu.from_slice(&values.iter().map(|&v| T::of(v)).collect::<Vec<_>>(), width)
}

/// Rounded as the device will see them.
pub fn rounded<T: Element>(values: &[f64]) -> Vec<f64> {
    values.iter().map(|&v| T::of(v).as_f64()).collect()
}

/// ‖a − b‖/‖b‖ over the features with `keep`.
pub fn error(a: &[f64], b: &[f64], keep: &[bool]) -> f64 {
    let kept = |v: &[f64]| v.iter().zip(keep).filter(|(_, keep)| **keep).map(|(v, _)| *v).collect::<Vec<_>>();
    relative_l2(&kept(a), &kept(b))
}

pub fn moments_of(rows: &[Vec<f64>], features: usize, count: u64) -> Moments {
    let mut moments = Moments { count, ..Moments::new(features) };
    for row in rows {
        for (j, v) in row.iter().enumerate() {
            moments.sum[j] += v;
            moments.sum_abs[j] += v.abs();
            moments.sum_sq[j] += v * v;
            moments.max_abs[j] = moments.max_abs[j].max(v.abs());
        }
    }
    moments
}

/// Signed sums are held against sums of magnitudes: they may cancel.
pub fn compare(what: &str, got: &Moments, want: &Moments, keep: &[bool], tolerance: f64) {
    assert_eq!(got.count, want.count, "{what}: count");
    let differences: Vec<f64> =
        got.sum.iter().zip(&want.sum).zip(&want.sum_abs).map(|((a, b), abs)| abs + a - b).collect();
    for (name, a, b) in [
        ("sum", &differences, &want.sum_abs),
        ("sum_abs", &got.sum_abs, &want.sum_abs),
        ("sum_sq", &got.sum_sq, &want.sum_sq),
        ("max_abs", &got.max_abs, &want.max_abs),
    ] {
        let error = error(a, b, keep);
        assert!(error <= tolerance, "{what}: {name} is off by {error:e}");
    }
}

/// Everything that the backend does for one SAE and one chunk against the reference.
pub fn check<T: Element>(cpu: &Cpu<T>, what: &str, sae: &SaeWeights, at: &Positions, tolerance: f64) {
    let (features, width) = (sae.num_features(), sae.width());
    let [x, dx] = inputs(at, width, 5).map(|v| rounded::<T>(&v));
    let reference = Reference::new(sae);
    let mut keep = vec![true; features];
    let (mut f, mut df, mut tokens, mut places) = (vec![], vec![], vec![], vec![]);
    for of in &at.samples {
        for row in of.rows() {
            let token = reference.token(&x[row * width..][..width]);
            if tolerance > FLOAT64 {
                keep.iter_mut().zip(&token.margin).for_each(|(keep, margin)| *keep &= *margin > KINK);
            }
            df.push(reference.gradient(token.factor, &dx[row * width..][..width]));
            f.push(token.f.clone());
            places.push(Place { sample: of.sample, position: (row - of.all.start) as u32 });
            tokens.push((row, token));
        }
    }
    assert!(keep.iter().filter(|keep| **keep).count() * 10 > features * 9, "{what}: all features are kinks");
    let (xb, dxb) = (buffer(cpu, &x, width), buffer(cpu, &dx, width));
    let only_active = |rows: &[Vec<f64>]| -> Vec<Vec<f64>> {
        let active = |f: &f64, d: &f64| if *f > 0.0 { *d } else { 0.0 };
        rows.iter().zip(&f).map(|(d, f)| f.iter().zip(d).map(|(f, d)| active(f, d)).collect()).collect()
    };
    let products: Vec<Vec<f64>> =
        f.iter().zip(&df).map(|(f, d)| f.iter().zip(d).map(|(f, d)| f * d).collect()).collect();

    for gradient in [SaeGradient::All, SaeGradient::Active] {
        let mut sums = all_sums(features);
        cpu.features(sae, at, Some(&xb), Some(&dxb), gradient, &mut sums).unwrap().unwrap();
        let values = sums.values.unwrap();
        compare(what, &values.moments, &moments_of(&f, features, at.count(1)), &keep, tolerance);
        assert_eq!(values.moments.sum, values.moments.sum_abs);
        for j in (0..features).filter(|&j| keep[j]) {
            let fired = f.iter().filter(|f| f[j] > 0.0).count() as u64;
            assert_eq!(values.fired[j], fired, "{what}: feature {j} fired");
            let best = (0..f.len()).fold(None, |best: Option<usize>, t| match best {
                _ if f[t][j] <= 0.0 => best,
                Some(best) if f[best][j] >= f[t][j] => Some(best),
                _ => Some(t),
            });
            let place = best.map_or(Place::default(), |t| places[t]);
            assert_eq!(values.max_at[j], place, "{what}: where {j} is largest");
        }
        let wanted = if gradient == SaeGradient::All { df.clone() } else { only_active(&df) };
        let wanted = moments_of(&wanted, features, at.count(2));
        compare(&format!("{what} {gradient:?}"), &sums.gradients.unwrap(), &wanted, &keep, tolerance);
        let wanted = moments_of(&products, features, at.count(2));
        compare(&format!("{what} attribution"), &sums.attribution.unwrap(), &wanted, &keep, tolerance);
    }

    let (mut values, mut fit) = (values_of(features), Fit::default());
    let spliced = cpu.reconstruct(sae, at, &xb, Some(&mut values), Some(&mut fit)).unwrap().unwrap();
    let mut all_values = FeatureSums { values: Some(values_of(features)), ..FeatureSums::default() };
    cpu.features(sae, at, Some(&xb), None, SaeGradient::All, &mut all_values).unwrap().unwrap();
    assert_eq!(Some(&values), all_values.values.as_ref(), "{what}: values beside a reconstruction");
    let mut expected = x.clone();
    let [mut residual, mut fired] = [0.0; 2];
    let mut near = vec![false; x.len()];
    for ((row, token), place) in tokens.iter().zip(&places) {
        let range = row * width..(row + 1) * width;
        if place.position > 0 {
            let pairs = x[range.clone()].iter().zip(&token.decoded);
            residual += pairs.map(|(a, b)| (a - b).powi(2)).sum::<f64>();
            fired += token.f.iter().filter(|f| **f > 0.0).count() as f64;
        }
        near[range.clone()].fill(tolerance > FLOAT64 && token.margin.iter().any(|margin| *margin <= KINK));
        expected[range].copy_from_slice(&token.decoded);
    }
    let got: Vec<f64> = spliced.iter().map(|v| v.as_f64()).collect();
    let settled: Vec<bool> = near.iter().map(|near| !near).collect();
    let off = error(&got, &expected, &settled);
    assert!(off <= tolerance, "{what}: reconstruction is off by {off:e}");
    // Position 0 of each sample is left out of the fit.
    let later = || tokens.iter().zip(&places).filter(|(_, place)| place.position > 0);
    assert_eq!(fit.tokens, later().count() as u64);
    if !near.contains(&true) {
        assert_eq!(fit.fired, fired as u64, "{what}: L0");
        assert!((fit.residual - residual).abs() <= 10.0 * tolerance * residual, "{what}: residual");
    }
    let sum_sq: f64 = later().flat_map(|((row, _), _)| &x[row * width..][..width]).map(|x| x * x).sum();
    assert!((fit.sum_sq - sum_sq).abs() <= 1e-12 * sum_sq, "{what}: Σ‖x‖²");

    let mut output = Moments::new(width);
    cpu.add_output_gradients(sae, at, Some(&xb), &dxb, &mut output).unwrap().unwrap();
    assert_eq!(output.count, at.count(2));
    let shortcut = cpu.decode_gradient(sae, &output.sum).unwrap();
    let all = moments_of(&df, features, 0);
    let differences: Vec<f64> =
        shortcut.iter().zip(&all.sum).zip(&all.sum_abs).map(|((a, b), abs)| abs + a - b).collect();
    assert!(relative_l2(&differences, &all.sum_abs) <= tolerance, "{what}: Σ dL/df by one product");
}

/// Sums, and the spliced rows, of one chunk.
pub fn everything<T: Element>(
    cpu: &Cpu<T>,
    sae: &SaeWeights,
    at: &Positions,
    [x, dx]: [&[f64]; 2],
    into: &mut (FeatureSums, FeatureSums, Fit, FeatureValues),
) -> Vec<T> {
    let width = sae.width();
    let (x, dx) = (buffer(cpu, x, width), buffer(cpu, dx, width));
    cpu.features(sae, at, Some(&x), Some(&dx), SaeGradient::All, &mut into.0).unwrap().unwrap();
    cpu.features(sae, at, Some(&x), Some(&dx), SaeGradient::Active, &mut into.1).unwrap().unwrap();
    cpu.reconstruct(sae, at, &x, Some(&mut into.3), Some(&mut into.2)).unwrap().unwrap().to_vec()
}

pub fn nothing(features: usize) -> (FeatureSums, FeatureSums, Fit, FeatureValues) {
    (all_sums(features), all_sums(features), Fit::default(), values_of(features))
}
