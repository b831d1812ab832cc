//! EleutherAI/sparsify.

use std::path::PathBuf;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::raw::{Raw, check, read, read_as_saelens, read_scaled, says, top, vector};
use crate::write::{Array, Kind, put, put_json, safetensors};

fn entries(raw: &Raw) -> Vec<(&'static str, Array)> {
    vec![
        ("encoder.weight", raw.encoder(true)),
        ("encoder.bias", vector(&raw.encoder_bias)),
        ("W_dec", raw.decoder(true)),
        ("b_dec", vector(&raw.decoder_bias)),
    ]
}

fn folder(config: &Value, entries: &[(&str, Array)]) -> (TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("layers.10.mlp");
    put(&folder, "sae.safetensors", safetensors(entries));
    put_json(&folder, "cfg.json", config);
    put_json(root.path(), "config.json", &json!({"sae": {}, "model": "org/model"}));
    (root, folder)
}

#[test]
fn top_k() {
    let raw = Raw::new(1);
    let config = json!({"d_in": 6, "k": 5, "num_latents": 20, "normalize_decoder": true, "signed": false});
    let (_root, folder) = folder(&config, &entries(&raw));
    let sae = read(&folder).unwrap();
    let about = &sae.about;
    assert_eq!((about.layer, about.hook.as_deref()), (Some(10), Some("layers.10.mlp")));
    assert_eq!((about.expected_l0, about.model_name.as_deref()), (Some(5.0), Some("org/model")));
    assert_eq!(about.notes, [""; 0]);
    for (sae, flag) in [
        (read_scaled(&folder, 2.0), "--sae_norm_scale"),
        (read_as_saelens(&folder), "--llamascope_convention"),
    ] {
        assert!(sae.unwrap().about.notes[0].starts_with(flag));
    }
    check(&sae, |x| {
        let f = top(&raw.hidden(&raw.centred(x)), 5);
        (f.clone(), raw.decode(&f))
    });
}

#[test]
fn group_max() {
    let raw = Raw::new(2);
    let bf16 = |(name, array): (&'static str, Array)| (name, array.kind(Kind::BF16));
    let entries: Vec<_> = entries(&raw).into_iter().map(bf16).collect();
    let config =
        json!({"d_in": 6, "k": 5, "num_latents": 0, "expansion_factor": 4, "activation": "groupmax"});
    let (_root, path) = folder(&config, &entries);
    let sae = read(&path).unwrap();
    // 6 × 4 features are not there: the weights are believed, and it is said.
    assert!(
        sae.about.notes[0].contains("F = 24") && sae.about.notes[0].contains("20"),
        "{:?}",
        sae.about.notes
    );
    check(&sae, |x| {
        let h = raw.hidden(&raw.centred(x));
        let f: Vec<f64> = h.chunks(4).flat_map(|group| top(group, 1)).collect();
        (f.clone(), raw.decode(&f))
    });
    let (_root, path) =
        folder(&json!({"d_in": 6, "k": 3, "num_latents": 20, "activation": "groupmax"}), &entries);
    says(read(&path), &["k of an SAE's configuration", "divisor of the 20 features"]);
}

#[test]
fn what_cannot_be_used_is_refused() {
    let raw = Raw::new(3);
    let of = |more: Value| {
        let mut config = json!({"d_in": 6, "k": 5, "num_latents": 20});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        folder(&config, &entries(&raw))
    };
    for key in ["transcode", "skip_connection"] {
        let (_root, path) = of(json!({key: true}));
        says(
            read(&path),
            &["a transcoder", "hint: a transcoder computes a module's output from the module's input"],
        );
    }
    let mut skips = entries(&raw);
    skips.push(("W_skip", Array::new(&[6, 6], &[0.0; 36])));
    let (_root, path) = folder(&json!({"d_in": 6}), &skips);
    says(read(&path), &["a transcoder"]);
    let (_root, path) = of(json!({"signed": true}));
    says(read(&path), &["negative features", "signed", "hint: "]);
    let (_root, path) = of(json!({"activation": "softmax"}));
    says(read(&path), &["activation", "topk or groupmax", "softmax"]);
    for k in [json!(0), json!(21), json!(-1), json!("5"), json!(2.5)] {
        let (_root, path) = of(json!({"k": k}));
        says(read(&path), &["k"]);
    }
    // Saved for encoding alone.
    let (_root, path) = folder(&json!({"d_in": 6, "k": 5}), &[("encoder.weight", raw.encoder(true))]);
    says(read(&path), &["lacks a tensor", "`W_dec`", "`encoder.weight`"]);
}
