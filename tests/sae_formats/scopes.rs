//! Gemma Scope 1 and 2, Llama Scope.

use std::path::PathBuf;

use gradlens::model::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::raw::{D, Raw, above, check, over, read, read_as_saelens, relu, says, scaled, times, vector};
use crate::write::{Array, Kind, npz, put, put_json, safetensors};

fn jump(raw: &Raw, [encoder, decoder]: [&'static str; 2]) -> Vec<(&'static str, Array)> {
    vec![
        (encoder, raw.encoder(false)),
        ("b_enc", vector(&raw.encoder_bias)),
        (decoder, raw.decoder(true)),
        ("b_dec", vector(&raw.decoder_bias)),
        ("threshold", vector(&raw.threshold)),
    ]
}

fn features(raw: &Raw, x: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let f = above(&raw.hidden(x), &raw.threshold);
    (f.clone(), raw.decode(&f))
}

#[test]
fn gemma_scope_1() {
    let raw = Raw::new(1);
    let root = tempfile::tempdir().unwrap();
    let folder = root
        .path()
        .join("models--google--gemma-scope-2b-pt-mlp/snapshots/0a/layer_5/width_16k/average_l0_72");
    let fortran = |(name, array): (&'static str, Array)| match array.shape.len() {
        2 => (name, array.columns()),
        _ => (name, array),
    };
    let of = |kind: Kind| move |(name, array): (&'static str, Array)| (name, array.kind(kind));
    let plain = jump(&raw, ["W_enc", "W_dec"]);
    let in_columns: Vec<_> = plain.iter().cloned().map(fortran).collect();
    let halves: Vec<_> = plain.iter().cloned().map(of(Kind::F16)).collect();
    let doubles: Vec<_> = in_columns.iter().cloned().map(of(Kind::F64)).collect();
    let small = jump(&raw, ["w_enc", "w_dec"]);
    let cases = [
        (&plain, Dtype::F32, false),
        (&in_columns, Dtype::F32, true),
        (&halves, Dtype::F16, false),
        (&doubles, Dtype::F32, true),
        (&small, Dtype::F32, false),
    ];
    for (entries, dtype, features_first) in cases {
        for deflate in [false, true] {
            put(&folder, "params.npz", npz(entries, deflate));
            let sae = read(&folder).unwrap();
            check(&sae, |x| features(&raw, x));
            assert_eq!(
                (sae.weights.encoder.tensor.dtype, sae.weights.encoder.features_first),
                (dtype, features_first)
            );
            assert_eq!(
                (sae.about.layer, sae.about.hook.as_deref()),
                (Some(5), Some("blocks.5.hook_mlp_out"))
            );
            assert_eq!((sae.about.expected_l0, sae.about.without_bos), (Some(72.0), true));
            assert_eq!(sae.about.notes, [""; 0]);
        }
    }
    // Elsewhere nothing says what it is of.
    let elsewhere = root.path().join("b");
    put(&elsewhere, "params.npz", npz(&plain, true));
    let about = read(&elsewhere.join("params.npz")).unwrap().about;
    assert_eq!((about.layer, about.hook.as_deref(), about.notes.len()), (None, None, 1));

    let transcoder = root.path().join("gemma-scope-2b-pt-transcoders/layer_5");
    put(&transcoder, "params.npz", npz(&plain, true));
    says(read(&transcoder), &["transcoders", "hint: a transcoder computes"]);
    let embedding = root.path().join("gemma-scope-2b-pt-res/embedding");
    put(&embedding, "params.npz", npz(&plain, true));
    says(read(&embedding), &["embeddings"]);
}

#[test]
fn gemma_scope_2() {
    let raw = Raw::new(2);
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("mlp_out_all/layer_7_width_16k_l0_small");
    let entries = jump(&raw, ["w_enc", "w_dec"]);
    put(&folder, "params.safetensors", safetensors(&entries));
    // Some folders have no configuration.
    let about = read(&folder).unwrap().about;
    assert_eq!((about.layer, about.hook.as_deref()), (Some(7), Some("blocks.7.hook_mlp_out")));

    let hook = "model.layers.7.post_feedforward_layernorm.output";
    let config = |more: Value| {
        let mut config = json!({
            "hf_hook_point_in": hook, "hf_hook_point_out": hook, "width": 20, "model_name": "m",
            "architecture": "jump_relu", "l0": 20, "affine_connection": false, "type": "sae",
        });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        put_json(&folder, "config.json", &config);
    };
    config(json!({}));
    let sae = read(&folder).unwrap();
    check(&sae, |x| features(&raw, x));
    assert_eq!((sae.about.layer, sae.about.hook.as_deref()), (Some(7), Some(hook)));
    assert_eq!((sae.about.expected_l0, sae.about.without_bos), (Some(20.0), true));

    for (more, part) in [
        (json!({"type": "transcoder"}), "hint: a transcoder computes"),
        (json!({"type": "clt"}), "hint: a transcoder computes"),
        (json!({"type": "crosscoder"}), "crosscoder"),
        (
            json!({"hf_hook_point_in": "model.layers.7.pre_feedforward_layernorm.output"}),
            "different hook points",
        ),
        (json!({"architecture": "topk"}), "jump_relu"),
    ] {
        config(more);
        says(read(&folder), &[part]);
    }
}

/// Activations as they are in training have these mean norms.
const NORM: f64 = 10.8125;

fn llama(raw: &Raw, more: Value) -> (TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("Base-L15M-8x");
    let entries = [
        ("encoder.weight", raw.encoder(true)),
        ("encoder.bias", vector(&raw.encoder_bias)),
        ("decoder.weight", raw.decoder(false)),
        ("decoder.bias", vector(&raw.decoder_bias)),
    ];
    let bf16 = entries.map(|(name, array)| (name, array.kind(Kind::BF16)));
    put(&folder, "checkpoints/final.safetensors", safetensors(&bf16));
    let mut config = json!({
        "hook_point_in": "blocks.15.hook_mlp_out", "hook_point_out": "blocks.15.hook_mlp_out", "d_model": 6, "d_sae": 20,
        "act_fn": "jumprelu", "jump_relu_threshold": 0.35546875, "norm_activation": "dataset-wise", "top_k": 50,
        "dataset_average_activation_norm": {"in": NORM, "out": NORM}, "sparsity_include_decoder_norm": true,
        "use_decoder_bias": true, "apply_decoder_bias_to_pre_encoder": false, "use_glu_encoder": false,
        "dtype": "torch.bfloat16",
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    put_json(&folder, "hyperparams.json", &config);
    (root, folder)
}

/// The release's own steps: parameters are freed of the activations' scale, then decoder rows get norm 1.
#[test]
fn llama_scope_as_its_makers_read_it() {
    let raw = Raw::new(3);
    let s = (D as f64).sqrt() / NORM;
    let (_root, path) = llama(&raw, json!({}));
    let sae = read(&path).unwrap();
    check(&sae, |x| {
        let encoder_bias = scaled(&raw.encoder_bias, 1.0 / s);
        let h: Vec<f64> = raw.product(x).iter().zip(&encoder_bias).map(|(z, b)| z + b).collect();
        let f = above(&times(&h, &raw.norms()), &[0.35546875; 20]);
        let zero = raw.decode(&[0.0; 20]);
        let rows = raw.decode(&over(&f, &raw.norms()));
        // The decoder's bias is of scaled activations.
        (f, rows.iter().zip(&zero).map(|(y, b)| y - b + b / s).collect())
    });
    assert_eq!((sae.about.layer, sae.about.hook.as_deref()), (Some(15), Some("blocks.15.hook_mlp_out")));
    assert_eq!((sae.about.convention.as_deref(), sae.about.without_bos), (Some("native"), true));
    assert!(sae.about.notes[0].contains("norms of decoder rows"), "{:?}", sae.about.notes);

    // Where norms played no part in training.
    let (_root, path) = llama(&raw, json!({"sparsity_include_decoder_norm": false, "act_fn": "relu"}));
    check(&read(&path).unwrap(), |x| {
        let f = relu(&raw.hidden(&scaled(x, s)));
        (scaled(&f, 1.0 / s), scaled(&raw.decode(&f), 1.0 / s))
    });
    // Scales that are in the weights already, and a bias that is subtracted.
    let more = json!({
        "norm_activation": "inference", "sparsity_include_decoder_norm": false, "apply_decoder_bias_to_pre_encoder": true
    });
    let (_root, path) = llama(&raw, more);
    check(&read(&path).unwrap(), |x| {
        let f = above(&raw.hidden(&raw.centred(x)), &[0.35546875; 20]);
        (f.clone(), raw.decode(&f))
    });
}

#[test]
fn llama_scope_as_saelens_reads_it() {
    let raw = Raw::new(4);
    let s = (D as f64).sqrt() / NORM;
    let (_root, path) = llama(&raw, json!({}));
    let sae = read_as_saelens(&path).unwrap();
    check(&sae, |x| {
        let f = above(&raw.hidden(&scaled(x, s)), &[0.35546875 * s; 20]);
        (f.clone(), scaled(&raw.decode(&f), 1.0 / s))
    });
    assert_eq!(sae.about.convention.as_deref(), Some("saelens"));
}

#[test]
fn what_cannot_be_used_of_llama_scope_is_refused() {
    let raw = Raw::new(5);
    for (more, part) in [
        (json!({"hook_point_in": "blocks.15.ln2.hook_normalized"}), "hint: a transcoder computes"),
        (json!({"act_fn": "topk"}), "act_fn"),
        (json!({"norm_activation": "token-wise"}), "token-wise"),
        (json!({"use_glu_encoder": true}), "use_glu_encoder"),
        (
            json!({"dataset_average_activation_norm": {"in": 0, "out": 1}}),
            "dataset_average_activation_norm.in",
        ),
        (json!({"dataset_average_activation_norm": null}), "dataset_average_activation_norm.in"),
        (json!({"jump_relu_threshold": -1}), "jump_relu_threshold"),
    ] {
        let (_root, path) = llama(&raw, more);
        says(read(&path), &[part]);
    }
}
