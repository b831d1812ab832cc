//! SAELens.

use std::path::PathBuf;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::raw::{Raw, above, check, over, read, read_scaled, relu, says, scaled, times, top, vector};
use crate::write::{Array, put, put_json, safetensors};

/// √D / mean‖x‖ of nobody's data.
const S: f64 = 1.25;

fn entries(raw: &Raw) -> Vec<(&'static str, Array)> {
    vec![
        ("W_enc", raw.encoder(false)),
        ("b_enc", vector(&raw.encoder_bias)),
        ("W_dec", raw.decoder(true)),
        ("b_dec", vector(&raw.decoder_bias)),
    ]
}

fn folder(config: &Value, entries: &[(&str, Array)]) -> (TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    put(root.path(), "sae_weights.safetensors", safetensors(entries));
    put_json(root.path(), "cfg.json", config);
    let path = root.path().to_owned();
    (root, path)
}

/// `cfg.json` of version 6.
fn config(architecture: &str, more: Value) -> Value {
    let mut config = json!({
        "d_in": 6, "d_sae": 20, "dtype": "float32", "architecture": architecture, "normalize_activations": "none",
        "reshape_activations": "none", "apply_b_dec_to_input": true,
        "metadata": {"model_name": "some-model", "hook_name": "blocks.8.hook_mlp_out", "sae_lens_version": "6.2.0"},
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

#[test]
fn standard_in_both_generations() {
    let raw = Raw::new(1);
    let (_root, path) = folder(&config("standard", json!({})), &entries(&raw));
    let sae = read(&path).unwrap();
    let expected = |x: &[f64]| {
        let f = relu(&raw.hidden(&raw.centred(x)));
        (f.clone(), raw.decode(&f))
    };
    check(&sae, expected);
    assert_eq!((sae.about.layer, sae.about.hook.as_deref()), (Some(8), Some("blocks.8.hook_mlp_out")));
    assert_eq!(
        (sae.about.family.as_str(), sae.about.model_name.as_deref()),
        ("SAELens standard", Some("some-model"))
    );
    assert_eq!(sae.about.notes, [""; 0]);

    let old = json!({"hook_point": "blocks.3.hook_resid_pre", "hook_point_layer": 3, "d_in": 6, "d_sae": 20});
    // Early files keep a factor of 1 for each feature.
    let mut with_factor = entries(&raw);
    with_factor.push(("scaling_factor", vector(&[1.0; 20])));
    let (_root, path) = folder(&old, &with_factor);
    let sae = read(&path).unwrap();
    check(&sae, expected);
    assert_eq!((sae.about.layer, sae.about.hook.as_deref()), (Some(3), Some("blocks.3.hook_resid_pre")));

    with_factor.last_mut().unwrap().1 = vector(&[1.5; 20]);
    let (_root, path) = folder(&old, &with_factor);
    says(read(&path), &["scaling_factor", "hint: "]);
}

#[test]
fn the_decoder_bias_is_subtracted_or_not() {
    let raw = Raw::new(2);
    let (_root, path) = folder(&config("standard", json!({"apply_b_dec_to_input": false})), &entries(&raw));
    check(&read(&path).unwrap(), |x| {
        let f = relu(&raw.hidden(x));
        (f.clone(), raw.decode(&f))
    });
}

#[test]
fn top_k_in_both_generations() {
    let raw = Raw::new(3);
    let old = json!({
        "architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5},
        "hook_name": "blocks.1.attn.hook_z", "normalize_activations": false,
    });
    for config in [config("topk", json!({"k": 5})), old] {
        let (_root, path) = folder(&config, &entries(&raw));
        let sae = read(&path).unwrap();
        assert_eq!((sae.about.family.as_str(), sae.about.expected_l0), ("SAELens topk", Some(5.0)));
        assert_eq!(sae.about.notes.len(), usize::from(sae.about.layer == Some(1)), "heads are mentioned");
        check(&sae, |x| {
            let f = top(&raw.hidden(&raw.centred(x)), 5);
            (f.clone(), raw.decode(&f))
        });
    }
}

#[test]
fn top_k_of_features_scaled_by_decoder_norms() {
    let raw = Raw::new(4);
    let norms = raw.norms();
    let (_root, path) =
        folder(&config("topk", json!({"k": 5, "rescale_acts_by_decoder_norm": true})), &entries(&raw));
    check(&read(&path).unwrap(), |x| {
        let f = top(&times(&raw.hidden(&raw.centred(x)), &norms), 5);
        (f.clone(), raw.decode(&over(&f, &norms)))
    });
}

#[test]
fn jump_relu() {
    let raw = Raw::new(5);
    let mut with = entries(&raw);
    with.push(("threshold", vector(&raw.threshold)));
    let (_root, path) = folder(&config("jumprelu", json!({"apply_b_dec_to_input": false})), &with);
    let expected = |x: &[f64]| {
        let f = above(&raw.hidden(x), &raw.threshold);
        (f.clone(), raw.decode(&f))
    };
    check(&read(&path).unwrap(), expected);
    // A checkpoint of the training has logarithms.
    let logs: Vec<f64> = raw.threshold.iter().map(|t| t.ln()).collect();
    *with.last_mut().unwrap() = ("log_threshold", vector(&logs));
    let (_root, path) = folder(&config("jumprelu", json!({"apply_b_dec_to_input": false})), &with);
    check(&read(&path).unwrap(), expected);
}

fn gated(raw: &Raw) -> Vec<(&'static str, Array)> {
    let mut entries = entries(raw);
    entries.retain(|(name, _)| *name != "b_enc");
    entries.push(("b_mag", vector(&raw.encoder_bias)));
    entries.push(("b_gate", vector(&raw.gate)));
    entries.push(("r_mag", vector(&raw.magnitude)));
    entries
}

/// Of an input that has been normalised.
fn gated_features(raw: &Raw, x: &[f64]) -> Vec<f64> {
    let z = raw.product(&raw.centred(x));
    let h = |j: usize| raw.magnitude[j].exp() * z[j] + raw.encoder_bias[j];
    (0..20).map(|j| if z[j] + raw.gate[j] > 0.0 { h(j).max(0.0) } else { 0.0 }).collect()
}

#[test]
fn gates() {
    let raw = Raw::new(6);
    let (_root, path) = folder(&config("gated", json!({})), &gated(&raw));
    check(&read(&path).unwrap(), |x| {
        let f = gated_features(&raw, x);
        (f.clone(), raw.decode(&f))
    });
}

/// `expected_average_only_in`: the SAE is of s·x and gives back s·x̂.
#[test]
fn a_scale_that_the_user_gives() {
    let raw = Raw::new(7);
    let average = json!({"normalize_activations": "expected_average_only_in"});
    let (_root, path) = folder(&config("gated", average.clone()), &gated(&raw));
    check(&read_scaled(&path, S).unwrap(), |x| {
        let f = gated_features(&raw, &scaled(x, S));
        (f.clone(), scaled(&raw.decode(&f), 1.0 / S))
    });
    let mut jump = entries(&raw);
    jump.push(("threshold", vector(&raw.threshold)));
    let (_root, path) = folder(&config("jumprelu", average.clone()), &jump);
    check(&read_scaled(&path, S).unwrap(), |x| {
        let f = above(&raw.hidden(&raw.centred(&scaled(x, S))), &raw.threshold);
        (f.clone(), scaled(&raw.decode(&f), 1.0 / S))
    });
    // SAELens takes the norms of W_dec/s here.
    let mut rescaled = config("topk", json!({"k": 5, "rescale_acts_by_decoder_norm": true}));
    rescaled["normalize_activations"] = average["normalize_activations"].clone();
    let (_root, path) = folder(&rescaled, &entries(&raw));
    let norms = scaled(&raw.norms(), 1.0 / S);
    check(&read_scaled(&path, S).unwrap(), |x| {
        let f = top(&times(&raw.hidden(&raw.centred(&scaled(x, S))), &norms), 5);
        (f.clone(), scaled(&raw.decode(&over(&f, &norms)), 1.0 / S))
    });
    // Without it the files do not say what the SAE computes; a switch of early versions means the same.
    says(read(&path), &["do not say the scale", "hint: --sae_norm_scale"]);
    let (_root, path) = folder(&config("standard", json!({"normalize_activations": true})), &entries(&raw));
    says(read(&path), &["hint: --sae_norm_scale"]);
    // Where nothing asks for a scale, it changes nothing, and that is said.
    let (_root, plain) = folder(&config("standard", json!({})), &entries(&raw));
    let sae = read_scaled(&plain, S).unwrap();
    assert!(
        sae.weights.encoder_scale.is_none()
            && sae.about.notes[0].contains("--sae_norm_scale changes nothing")
    );
    let error = read_scaled(&path, -1.0).unwrap_err().to_string();
    assert!(error.contains("--sae_norm_scale is impossible"), "{error}");
}

#[test]
fn normalisation_of_each_token() {
    let raw = Raw::new(8);
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let (_root, path) = folder(
        &config("standard", json!({"normalize_activations": "constant_norm_rescale"})),
        &entries(&raw),
    );
    check(&read(&path).unwrap(), |x| {
        let s = 6f64.sqrt() / norm(x);
        let f = relu(&raw.hidden(&raw.centred(&scaled(x, s))));
        (f.clone(), scaled(&raw.decode(&f), 1.0 / s))
    });
    let (_root, path) =
        folder(&config("standard", json!({"normalize_activations": "layer_norm"})), &entries(&raw));
    check(&read(&path).unwrap(), |x| {
        let mean = x.iter().sum::<f64>() / 6.0;
        let centred: Vec<f64> = x.iter().map(|x| x - mean).collect();
        let sigma = norm(&centred) / 5f64.sqrt();
        let f = relu(&raw.hidden(&raw.centred(&scaled(&centred, 1.0 / (sigma + 1e-5)))));
        (f.clone(), raw.decode(&f).iter().map(|y| y * sigma + mean).collect())
    });
    let (_root, path) = folder(&config("standard", json!({"normalize_activations": "new"})), &entries(&raw));
    says(read(&path), &["normalize_activations", "layer_norm", "new"]);
}

#[test]
fn what_cannot_be_used_is_refused() {
    let raw = Raw::new(9);
    for (architecture, part) in [
        ("transcoder", "a transcoder computes"),
        ("jumprelu_skip_transcoder", "a transcoder computes"),
        ("temporal", "temporal"),
        ("matching_pursuit", "matching_pursuit"),
        ("abstopk", "negative features"),
    ] {
        let (_root, path) = folder(&config(architecture, json!({})), &entries(&raw));
        says(read(&path), &["an SAE cannot be used", part]);
    }
    let (_root, path) = folder(&config("standard", json!({"activation_fn": "tanh-relu"})), &entries(&raw));
    says(read(&path), &["tanh-relu", "relu or topk"]);
    let (_root, path) = folder(&config("topk", json!({})), &entries(&raw));
    says(read(&path), &["k of an SAE's configuration", "nothing"]);
}

/// W_enc `[F, D]` where `[D, F]` is right is a common mistake.
#[test]
fn matrices_the_wrong_way_round() {
    let raw = Raw::new(10);
    let mut wrong = entries(&raw);
    wrong[0].1 = raw.encoder(true);
    let (_root, path) = folder(&config("standard", json!({})), &wrong);
    says(read(&path), &["`W_dec`", "[6, 20], as `W_enc` says", "[20, 6]"]);
}
