//! saprmarks/dictionary_learning.

use std::path::PathBuf;

use gradlens::model::Dtype;
use gradlens::model::sae::{FeatureMatrix, SaeActivation};
use serde_json::json;
use tempfile::TempDir;

use crate::raw::{Raw, above, check, over, read, relu, says, scalar, scaled, times, top, vector};
use crate::reference::entry;
use crate::write::{Array, Item, Kind, put, put_json, tensors, torch};

type Entries = Vec<(&'static str, Array)>;

/// A folder as the library's demo makes it.
fn folder(class: &str, k: Option<usize>, entries: &[(String, Item)]) -> (TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("mlp_out_layer_11/trainer_0");
    put(&folder, "ae.pt", torch(entries));
    let trainer = json!({
        "dict_class": class, "k": k, "layer": 11, "lm_name": "org/model", "submodule_name": "mlp_out_layer_11"
    });
    put_json(&folder, "config.json", &json!({"trainer": trainer, "buffer": {"ctx_len": 128}}));
    (root, folder)
}

fn linear(raw: &Raw, bias: &'static str) -> Entries {
    vec![
        ("encoder.weight", raw.encoder(true)),
        ("encoder.bias", vector(&raw.encoder_bias)),
        ("decoder.weight", raw.decoder(false)),
        (bias, vector(&raw.decoder_bias)),
    ]
}

fn batch(raw: &Raw, threshold: f64) -> Entries {
    let mut entries = linear(raw, "b_dec");
    entries.push(("k", scalar(5.0).kind(Kind::I32)));
    entries.push(("threshold", scalar(threshold)));
    entries
}

fn matrices(raw: &Raw) -> Entries {
    vec![
        ("W_enc", raw.encoder(false)),
        ("b_enc", vector(&raw.encoder_bias)),
        ("W_dec", raw.decoder(true)),
        ("b_dec", vector(&raw.decoder_bias)),
    ]
}

#[test]
fn auto_encoder() {
    let raw = Raw::new(1);
    let (_root, folder) = folder("AutoEncoder", None, &tensors(&linear(&raw, "bias")));
    let sae = read(&folder).unwrap();
    assert_eq!(sae.about.family, "dictionary_learning AutoEncoder");
    assert_eq!((sae.about.layer, sae.about.hook.as_deref()), (Some(11), Some("mlp_out_layer_11")));
    assert_eq!(sae.about.model_name.as_deref(), Some("org/model"));
    assert!(!sae.about.without_bos && sae.about.notes.is_empty());
    // Features are those of decoder rows of norm 1.
    check(&sae, |x| {
        let f = relu(&raw.hidden(&raw.centred(x)));
        (times(&f, &raw.norms()), raw.decode(&f))
    });
}

#[test]
fn an_auto_encoder_of_norm_1_is_left_alone() {
    let mut raw = Raw::new(2);
    let norms = raw.norms();
    raw.decoder.iter_mut().zip(norms).for_each(|(row, norm)| row.iter_mut().for_each(|w| *w /= norm));
    // In float32 the norms are 1 within rounding.
    let (_root, folder) = folder("AutoEncoder", None, &tensors(&linear(&raw, "bias")));
    let sae = read(&folder).unwrap();
    assert_eq!((sae.weights.encoder_scale.as_ref(), sae.weights.decoder_scale.as_ref()), (None, None));
    check(&sae, |x| {
        let f = relu(&raw.hidden(&raw.centred(x)));
        (f.clone(), raw.decode(&f))
    });
}

#[test]
fn auto_encoder_new() {
    let raw = Raw::new(3);
    let (_root, folder) = folder("AutoEncoderNew", None, &tensors(&linear(&raw, "decoder.bias")));
    check(&read(&folder).unwrap(), |x| {
        let f = relu(&raw.hidden(x));
        (f.clone(), raw.decode(&f))
    });
}

#[test]
fn top_k() {
    let raw = Raw::new(4);
    let (_root, folder) = folder("AutoEncoderTopK", Some(5), &tensors(&batch(&raw, -1.0)));
    let sae = read(&folder).unwrap();
    assert_eq!(sae.about.expected_l0, Some(5.0));
    check(&sae, |x| {
        let f = top(&raw.hidden(&raw.centred(x)), 5);
        (f.clone(), raw.decode(&f))
    });
}

#[test]
fn batch_top_k() {
    let raw = Raw::new(5);
    let (_root, folder) = folder("BatchTopKSAE", Some(5), &tensors(&batch(&raw, 0.75)));
    let sae = read(&folder).unwrap();
    assert_eq!(sae.about.expected_l0, Some(5.0));
    check(&sae, |x| {
        let f = above(&raw.hidden(&raw.centred(x)), &[0.75; 20]);
        (f.clone(), raw.decode(&f))
    });
}

#[test]
fn matryoshka() {
    let raw = Raw::new(6);
    let mut entries = matrices(&raw);
    entries.push(("k", scalar(5.0).kind(Kind::I32)));
    entries.push(("threshold", scalar(0.5)));
    entries.push(("group_sizes", vector(&[5.0, 15.0]).kind(Kind::I64)));
    let (_root, path) = folder("MatryoshkaBatchTopKSAE", Some(5), &tensors(&entries));
    check(&read(&path).unwrap(), |x| {
        let f = above(&raw.hidden(&raw.centred(x)), &[0.5; 20]);
        (f.clone(), raw.decode(&f))
    });
    entries.last_mut().unwrap().1 = vector(&[5.0, 16.0]).kind(Kind::I64);
    let (_root, path) = folder("MatryoshkaBatchTopKSAE", Some(5), &tensors(&entries));
    says(read(&path), &["group_sizes", "add up to 20", "21"]);
}

#[test]
fn gated() {
    let raw = Raw::new(7);
    let entries = vec![
        ("encoder.weight", raw.encoder(true)),
        ("decoder.weight", raw.decoder(false)),
        ("decoder_bias", vector(&raw.decoder_bias)),
        ("r_mag", vector(&raw.magnitude)),
        ("gate_bias", vector(&raw.gate)),
        ("mag_bias", vector(&raw.encoder_bias)),
    ];
    let (_root, folder) = folder("GatedAutoEncoder", None, &tensors(&entries));
    check(&read(&folder).unwrap(), |x| {
        let z = raw.product(&raw.centred(x));
        let h: Vec<f64> = (0..20).map(|j| raw.magnitude[j].exp() * z[j] + raw.encoder_bias[j]).collect();
        let f: Vec<f64> =
            (0..20).map(|j| if z[j] + raw.gate[j] > 0.0 { h[j].max(0.0) } else { 0.0 }).collect();
        (f.clone(), raw.decode(&f))
    });
}

#[test]
fn jump_relu() {
    let raw = Raw::new(8);
    let mut entries = matrices(&raw);
    entries.push(("threshold", vector(&raw.threshold)));
    let (_root, folder) = folder("JumpReluAutoEncoder", None, &tensors(&entries));
    check(&read(&folder).unwrap(), |x| {
        let f = above(&raw.hidden(x), &raw.threshold);
        (f.clone(), raw.decode(&f))
    });
}

/// The class follows from the tensors, but for top-k and batch top-k, which have the same.
#[test]
fn without_a_configuration() {
    let raw = Raw::new(9);
    let mut jump = matrices(&raw);
    jump.push(("threshold", vector(&raw.threshold)));
    let mut matryoshka = matrices(&raw);
    matryoshka.extend([("threshold", scalar(0.5)), ("group_sizes", vector(&[20.0]).kind(Kind::I64))]);
    let mut gated = linear(&raw, "decoder_bias");
    gated.extend([("r_mag", vector(&raw.magnitude)), ("gate_bias", vector(&raw.gate))]);
    gated.push(("mag_bias", vector(&raw.encoder_bias)));
    for (entries, class) in [
        (linear(&raw, "bias"), "AutoEncoder"),
        (linear(&raw, "decoder.bias"), "AutoEncoderNew"),
        (jump, "JumpReluAutoEncoder"),
        (matryoshka, "MatryoshkaBatchTopKSAE"),
        (gated, "GatedAutoEncoder"),
    ] {
        let (_root, folder) = folder(class, None, &tensors(&entries));
        std::fs::remove_file(folder.join("config.json")).unwrap();
        let about = read(&folder).unwrap().about;
        assert_eq!(about.family, format!("dictionary_learning {class}"));
        assert_eq!((about.layer, about.hook.as_deref()), (Some(11), Some("mlp_out_layer_11")));
    }
    let (_root, folder) = folder("BatchTopKSAE", None, &tensors(&batch(&raw, 0.5)));
    std::fs::remove_file(folder.join("config.json")).unwrap();
    says(read(&folder), &["dict_class", "AutoEncoderTopK", "BatchTopKSAE", "hint: fetch config.json"]);
}

/// A checkpoint in the middle of training, whose configuration lies above; and a backup with an optimiser.
#[test]
fn checkpoints_and_backups() {
    let raw = Raw::new(10);
    let expected = |x: &[f64]| {
        let f = above(&raw.hidden(&raw.centred(x)), &[0.75; 20]);
        (f.clone(), raw.decode(&f))
    };
    let state = tensors(&batch(&raw, 0.75));
    let (_root, path) = folder("BatchTopKSAE", Some(5), &state);
    put(&path, "checkpoints/ae_1500.pt", torch(&state));
    check(&read(&path.join("checkpoints/ae_1500.pt")).unwrap(), expected);

    let moments = vec![("exp_avg".to_owned(), Item::Tensor(raw.encoder(true)))];
    let backup = vec![
        ("step".to_owned(), Item::Number(3000)),
        ("optimizer".to_owned(), Item::Dict(vec![("state".to_owned(), Item::Dict(moments))])),
        ("ae".to_owned(), Item::Dict(state)),
    ];
    let (_root, path) = folder("BatchTopKSAE", Some(5), &backup);
    check(&read(&path).unwrap(), expected);
    // Biases of a backup are of activations that were divided by a factor; those of a finished SAE are not.
    let with = |factor: f64| {
        let mut backup = backup.clone();
        backup.push(("norm_factor".to_owned(), Item::Float(factor)));
        folder("BatchTopKSAE", Some(5), &backup)
    };
    let (_root, path) = with(1.5);
    check(&read(&path).unwrap(), |x| {
        let (f, y) = expected(&scaled(x, 1.0 / 1.5));
        (scaled(&f, 1.5), scaled(&y, 1.5))
    });
    let (_root, path) = with(0.0);
    says(read(&path), &["norm_factor of a training backup"]);
}

/// Rows, columns, gaps, another type: the numbers are the same, and nothing is copied that can stay where it lies.
#[test]
fn every_layout_is_read() {
    let raw = Raw::new(11);
    type Change = fn(Array) -> Array;
    let changes: [(Change, Dtype, bool); 6] = [
        (|array| array, Dtype::F32, true),
        (Array::columns, Dtype::F32, false),
        (Array::spread, Dtype::F32, true),
        (|array| array.columns().kind(Kind::F64), Dtype::F32, false),
        (|array| array.kind(Kind::BF16), Dtype::BF16, true),
        (|array| array.spread().kind(Kind::BF16), Dtype::BF16, true),
    ];
    for (change, dtype, features_first) in changes {
        let mut entries = linear(&raw, "decoder.bias");
        entries[0].1 = change(entries[0].1.clone());
        let (_root, folder) = folder("AutoEncoderNew", None, &tensors(&entries));
        let sae = read(&folder).unwrap();
        let FeatureMatrix { tensor, features_first: first } = &sae.weights.encoder;
        assert_eq!((tensor.dtype, *first), (dtype, features_first));
        for (f, row) in raw.encoder.iter().enumerate() {
            for (d, value) in row.iter().enumerate() {
                assert_eq!(entry(&sae.weights.encoder, f, d), *value);
            }
        }
    }
}

#[test]
fn a_stored_k_goes_before_that_of_the_configuration() {
    let raw = Raw::new(12);
    let (_root, path) = folder("AutoEncoderTopK", Some(7), &tensors(&batch(&raw, -1.0)));
    let sae = read(&path).unwrap();
    assert_eq!(sae.weights.activation, SaeActivation::TopK { k: 5 });
    assert!(
        sae.about.notes[0].contains("k = 7") && sae.about.notes[0].contains("k = 5"),
        "{:?}",
        sae.about.notes
    );
    // As a plain number, as some save it.
    let mut entries = tensors(&linear(&raw, "b_dec"));
    entries.push(("k".to_owned(), Item::Number(21)));
    let (_root, path) = folder("AutoEncoderTopK", None, &entries);
    says(read(&path), &["k is impossible", "1 to 20", "21"]);
}

#[test]
fn what_cannot_be_used_is_refused() {
    let raw = Raw::new(13);
    let (_root, path) = folder("BatchTopKSAE", Some(5), &tensors(&batch(&raw, -1.0)));
    says(read(&path), &["threshold has not been trained", "found:    -1", "hint: "]);
    let (_root, path) = folder("BatchTopKSAE", Some(5), &tensors(&linear(&raw, "b_dec")));
    says(read(&path), &["threshold has not been trained", "none"]);
    let (_root, path) = folder("CrossCoder", None, &tensors(&linear(&raw, "b_dec")));
    says(read(&path), &["trainer.dict_class", "CrossCoder", "BatchTopKSAE"]);

    let (_root, path) = folder("AutoEncoder", None, &tensors(&linear(&raw, "bias")));
    put_json(&path, "config.json", &json!({"buffer": {"io": "in_and_out"}}));
    says(read(&path), &["buffer.io", "hint: a transcoder computes"]);
    put_json(&path, "config.json", &json!({"buffer": {"io": "in"}}));
    assert!(read(&path).unwrap().about.hook.unwrap().starts_with("input of "));

    // Norms must not be divided by where there are none.
    let mut dead = Raw::new(13);
    dead.decoder[3] = vec![0.0; 6];
    let (_root, path) = folder("AutoEncoder", None, &tensors(&linear(&dead, "bias")));
    let sae = read(&path).unwrap();
    assert!(sae.weights.decoder_scale.as_ref().unwrap().iter().all(|scale| scale.is_finite()));
    let norms = dead.norms();
    check(&sae, |x| {
        let f = relu(&dead.hidden(&dead.centred(x)));
        (
            times(&f, &norms),
            dead.decode(&over(&times(&f, &norms), &norms.iter().map(|n| n.max(1e-9)).collect::<Vec<_>>())),
        )
    });
}
