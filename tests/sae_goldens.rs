//! The golden SAEs: whole, consistent, and compared in a way that notices errors.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/golden.rs"]
#[allow(dead_code, reason = "this binary runs no model")]
mod golden;
#[path = "common/sae_golden.rs"]
mod sae_golden;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};

use gradlens::backend::{FeatureSums, FeatureValues, Fit, Moments, Place, SaeGradient};
use sae_golden::{Of, SAE_GOLDENS, SaeGolden};

#[test]
fn every_case_is_listed_and_has_its_files() {
    let mut found: Vec<String> = fs::read_dir(golden::folder("sae"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    found.sort();
    assert_eq!(found, SAE_GOLDENS);
    for name in SAE_GOLDENS {
        let case = SaeGolden::open(name);
        assert_eq!(case.layers, [1, 3], "{name}");
        // dictionary_learning and sparsify name modules of Hugging Face, the others TransformerLens's hook points.
        let module = name.starts_with("dl_") || name.starts_with("sparsify_");
        assert_eq!(case.site, if module { "mlp" } else { "mlp_out" }, "{name}");
        for &layer in &case.layers {
            assert!(case.sae(layer).is_dir(), "{}", case.sae(layer).display());
        }
        assert_eq!(
            case.argument("--sae_norm_scale").is_some(),
            ["lens_jumprelu", "lens_topk_rescaled"].contains(name)
        );
    }
}

/// The golden model's samples: one of a single token, and the counts that follow.
fn lengths(case: &SaeGolden) -> Vec<f64> {
    let expected = golden::Expected::read(&golden::folder(&case.model).join("expected.safetensors"));
    expected.get("cu_seqlens").windows(2).map(|pair| pair[1] - pair[0]).collect()
}

#[test]
fn numbers_agree_with_each_other() {
    for name in SAE_GOLDENS {
        let case = SaeGolden::open(name);
        let lengths = lengths(&case);
        let tokens: f64 = lengths.iter().sum();
        assert_eq!(case.count("values_count") as f64, tokens);
        assert_eq!(case.count("gradients_count") as f64, tokens - 1.0);
        assert_eq!(case.count("fit_tokens") as f64, tokens - lengths.len() as f64);
        for &layer in &case.layers {
            let get = |array: &str| case.get(layer, Of::Every, array);
            let (mean, sum_sq, max) = (get("values.mean"), get("values.sum_sq"), get("values.max"));
            let (fired, max_at) = (get("values.fired"), get("values.max_at"));
            assert_eq!(mean.len(), case.features);
            let share = fired.iter().sum::<f64>() / (tokens * case.features as f64);
            assert!((share - case.of_layer(layer, "fired_share")).abs() < 1e-9, "{name}");
            for j in 0..case.features {
                let (sample, position) = (max_at[2 * j], max_at[2 * j + 1]);
                assert_eq!(fired[j] == 0.0, max[j] == 0.0);
                assert_eq!(fired[j] == 0.0, sample == -1.0);
                assert!(mean[j] * tokens <= max[j] * fired[j] * (1.0 + 1e-12));
                assert!(sum_sq[j] <= max[j] * max[j] * fired[j] * (1.0 + 1e-12));
                assert!(sample < 0.0 || position < lengths[sample as usize]);
                let active = get("gradients_active.mean_abs")[j];
                assert!(active <= get("gradients.mean_abs")[j]);
                assert!(get("attribution.mean_abs")[j] <= max[j] * active * (1.0 + 1e-12));
            }
        }
    }
}

/// The golden's own numbers as sums.
fn own_sums(case: &SaeGolden, layer: usize) -> FeatureSums {
    let get = |array: &str| case.get(layer, Of::Every, array).to_vec();
    let moments = |key: &str, count: u64| {
        let sum = |array: &str| get(array).iter().map(|mean| mean * count as f64).collect::<Vec<f64>>();
        Moments {
            sum: sum(&format!("{key}.mean")),
            sum_abs: sum(&format!("{key}.mean_abs")),
            count,
            ..Moments::new(case.features)
        }
    };
    let count = case.count("values_count");
    let sum: Vec<f64> = get("values.mean").iter().map(|mean| mean * count as f64).collect();
    let place = |pair: &[f64]| Place { sample: pair[0].max(0.0) as u64, position: pair[1].max(0.0) as u32 };
    FeatureSums {
        values: Some(FeatureValues {
            moments: Moments {
                sum_abs: sum.clone(),
                sum,
                sum_sq: get("values.sum_sq"),
                max_abs: get("values.max"),
                count,
                ..Moments::default()
            },
            fired: get("values.fired").iter().map(|&n| n as u64).collect(),
            max_at: get("values.max_at").chunks_exact(2).map(place).collect(),
        }),
        gradients: Some(moments("gradients", case.count("gradients_count"))),
        attribution: Some(moments("attribution", case.count("gradients_count"))),
    }
}

#[test]
fn a_comparison_notices_what_is_wrong() {
    let case = SaeGolden::open("dl_gated");
    let right = own_sums(&case, 1);
    case.check(1, Of::Every, SaeGradient::All, &right);
    type Spoil = fn(&mut FeatureSums);
    let spoils: [Spoil; 6] = [
        |sums| sums.values.as_mut().unwrap().fired[7] += 1,
        |sums| sums.values.as_mut().unwrap().moments.max_abs.iter_mut().for_each(|v| *v *= 1.0 + 2e-4),
        |sums| sums.values.as_mut().unwrap().max_at.iter_mut().for_each(|place| place.position += 1),
        |sums| sums.gradients.as_mut().unwrap().sum.iter_mut().for_each(|v| *v *= 1.0 + 2e-4),
        |sums| sums.gradients.as_mut().unwrap().count += 1,
        |sums| sums.attribution.as_mut().unwrap().sum_abs.reverse(),
    ];
    for spoil in spoils {
        let mut wrong = right.clone();
        spoil(&mut wrong);
        let check = || case.check(1, Of::Every, SaeGradient::All, &wrong);
        assert!(catch_unwind(AssertUnwindSafe(check)).is_err());
    }
    // Gradients of all features are not those of active ones, and the spliced model's are others again.
    assert!(catch_unwind(|| case.check(1, Of::Every, SaeGradient::Active, &right)).is_err());
    assert!(catch_unwind(|| case.check_replaced(1, Of::Every, &right)).is_err());
}

#[test]
fn positions_of_a_stride_are_other_numbers() {
    let case = SaeGolden::open("dl_batchtopk");
    for array in ["values.mean", "gradients.mean_abs", "attribution.mean_abs", "replace.gradients.mean_abs"] {
        let (every, third) = (case.get(1, Of::Every, array), case.get(1, Of::Third, array));
        assert!(common::relative_l2(third, every) > 1e-2, "{array}");
    }
}

#[test]
fn a_fit_is_compared_too() {
    let case = SaeGolden::open("lens_topk");
    let tokens = case.count("fit_tokens");
    let fit = Fit {
        tokens,
        fired: (case.of_layer(3, "l0") * tokens as f64).round() as u64,
        residual: case.of_layer(3, "fvu") * 10.0,
        sum: vec![0.0; 48],
        sum_sq: 10.0,
    };
    case.check_fit(3, &fit);
    assert!(catch_unwind(|| case.check_fit(1, &fit)).is_err());
}
