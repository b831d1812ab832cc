//! Which folders hold SAEs, of which format, for which layer.

use std::fs;

use gradlens::weights::sae::{Format, Found, enumerate, enumerate_listing, files_of, recognise};
use serde_json::json;

use crate::raw::{read, says};
use crate::write::put;

const LISTING: &[&str] = &[
    "README.md",
    "config.json",
    "layers.2.mlp/cfg.json",
    "layers.2.mlp/sae.safetensors",
    "layers.10.mlp/cfg.json",
    "layers.10.mlp/sae.safetensors",
    "layers.10.mlp/notes.txt",
    "._run_org_model_batch/mlp_out_layer_3/trainer_0/ae.pt",
    "._run_org_model_batch/mlp_out_layer_3/trainer_0/config.json",
    "._run_org_model_batch/mlp_out_layer_3/trainer_0/checkpoints/ae_100.pt",
    "._run_org_model_batch/mlp_out_layer_3/trainer_10/ae.pt",
    "._run_org_model_batch/mlp_out_layer_3/trainer_2/ae.pt",
    "layer_4/width_16k/average_l0_72/params.npz",
    "mlp_out/layer_5_width_16k_l0_small/params.safetensors",
    "mlp_out/layer_5_width_16k_l0_small/config.json",
    "Base-L6M-8x/hyperparams.json",
    "Base-L6M-8x/lm_config.json",
    "Base-L6M-8x/checkpoints/final.safetensors",
    "blocks.7.hook_mlp_out/cfg.json",
    "blocks.7.hook_mlp_out/sae_weights.safetensors",
    "blocks.7.hook_mlp_out/sparsity.safetensors",
    "L8R/config.json",
    "L8R/sae_weights.safetensors",
    "scope/layer9.sae.pt",
    "scope/config.json",
    "circuit/layer_9.safetensors",
    "other/model.safetensors",
];

/// Path, format, layer and label of each.
type Row = (&'static str, Format, Option<usize>, &'static str);

const FOUND: &[Row] = &[
    (
        "._run_org_model_batch/mlp_out_layer_3/trainer_0",
        Format::DictionaryLearning,
        Some(3),
        "._run_org_model_batch/mlp_out_layer_{layer}/trainer_0",
    ),
    (
        "._run_org_model_batch/mlp_out_layer_3/trainer_2",
        Format::DictionaryLearning,
        Some(3),
        "._run_org_model_batch/mlp_out_layer_{layer}/trainer_2",
    ),
    (
        "._run_org_model_batch/mlp_out_layer_3/trainer_10",
        Format::DictionaryLearning,
        Some(3),
        "._run_org_model_batch/mlp_out_layer_{layer}/trainer_10",
    ),
    ("Base-L6M-8x", Format::LlamaScope, Some(6), "Base-L{layer}M-8x"),
    ("L8R", Format::Llamascopium, Some(8), "L{layer}R"),
    ("blocks.7.hook_mlp_out", Format::SaeLens, Some(7), "blocks.{layer}.hook_mlp_out"),
    ("circuit", Format::CircuitTracer, None, "circuit"),
    (
        "layer_4/width_16k/average_l0_72",
        Format::GemmaScope1,
        Some(4),
        "layer_{layer}/width_16k/average_l0_72",
    ),
    ("layers.2.mlp", Format::Sparsify, Some(2), "layers.{layer}.mlp"),
    ("layers.10.mlp", Format::Sparsify, Some(10), "layers.{layer}.mlp"),
    (
        "mlp_out/layer_5_width_16k_l0_small",
        Format::GemmaScope2,
        Some(5),
        "mlp_out/layer_{layer}_width_16k_l0_small",
    ),
    ("scope", Format::QwenScope, None, "scope"),
];

#[track_caller]
fn compare(found: &[Found], root: &std::path::Path) {
    let found: Vec<_> = found
        .iter()
        .map(|Found { path, format, layer, label }| {
            (path.strip_prefix(root).unwrap().to_str().unwrap().to_owned(), *format, *layer, label.clone())
        })
        .collect();
    let expected: Vec<_> =
        FOUND.iter().map(|(a, b, c, d)| ((*a).to_owned(), *b, *c, (*d).to_owned())).collect();
    assert_eq!(found, expected);
}

#[test]
fn folders_are_found_in_natural_order() {
    let root = tempfile::tempdir().unwrap();
    LISTING.iter().for_each(|path| put(root.path(), path, ""));
    compare(&enumerate(root.path()).unwrap(), root.path());
    for (path, format, ..) in FOUND {
        assert_eq!(recognise(&root.path().join(path)).unwrap(), Some(*format), "{path}");
    }
    assert_eq!(recognise(root.path()).unwrap(), None);
    assert!(
        recognise(&root.path().join("nowhere")).is_err() && enumerate(&root.path().join("nowhere")).is_err()
    );
    // The folder of one SAE is itself.
    let one = enumerate(&root.path().join("layers.10.mlp")).unwrap();
    assert_eq!((one.len(), one[0].layer, one[0].label.as_str()), (1, Some(10), ""));
}

#[test]
fn listings_are_read_like_folders() {
    compare(&enumerate_listing(LISTING), std::path::Path::new(""));
    for (folder, files) in [
        ("layers.10.mlp", &["layers.10.mlp/sae.safetensors", "layers.10.mlp/cfg.json", "config.json"][..]),
        ("layer_4/width_16k/average_l0_72/", &["layer_4/width_16k/average_l0_72/params.npz"]),
        ("Base-L6M-8x", &["Base-L6M-8x/checkpoints/final.safetensors", "Base-L6M-8x/hyperparams.json"]),
        (
            "blocks.7.hook_mlp_out",
            &["blocks.7.hook_mlp_out/sae_weights.safetensors", "blocks.7.hook_mlp_out/cfg.json"],
        ),
        ("other", &[]),
        ("layer", &[]),
    ] {
        assert_eq!(files_of(LISTING, folder), files, "{folder}");
    }
    assert_eq!(files_of(&["ae.pt", "config.json", "x"], ""), ["ae.pt", "config.json"]);
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_end() {
    use std::os::unix::fs::symlink;
    let root = tempfile::tempdir().unwrap();
    // The hub's cache: files are links into a folder of blobs, and `main` is one of several snapshots.
    let cache = root.path().join("models--org--saes");
    put(&cache, "refs/main", "new\n");
    put(&cache, "blobs/aa", "");
    for snapshot in ["old", "new"] {
        let folder = cache.join(format!("snapshots/{snapshot}/layers.1.mlp"));
        fs::create_dir_all(&folder).unwrap();
        symlink("../../../../blobs/aa", folder.join("sae.safetensors")).unwrap();
    }
    let found = enumerate(&cache).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].path, cache.join("snapshots/new/layers.1.mlp"));
    // A link to a folder counts once, a link to a folder above not at all.
    let plain = root.path().join("plain");
    put(&plain, "layers.1.mlp/sae.safetensors", "");
    symlink("layers.1.mlp", plain.join("layers.2.mlp")).unwrap();
    symlink(".", plain.join("here")).unwrap();
    symlink(cache.join("snapshots"), plain.join("elsewhere")).unwrap();
    assert_eq!(enumerate(&plain).unwrap().len(), 3);
}

#[test]
fn what_is_no_sae_is_said() {
    let root = tempfile::tempdir().unwrap();
    LISTING.iter().for_each(|path| put(root.path(), path, ""));
    let at = |path: &str| read(&root.path().join(path));
    says(at("other"), &["no SAE of a known format is here", "model.safetensors", "ae.pt", "hint: "]);
    says(at("README.md"), &["no SAE of a known format is here", "README.md"]);
    says(at("layers.11.mlp"), &["there is no such SAE", "layers.10.mlp"]);
    says(at("nowhere/x"), &["there is no such SAE", "nor its parent"]);
    says(at("circuit"), &["circuit-tracer", "hint: a transcoder computes"]);
    says(at("scope"), &["Qwen-Scope", "without ReLU"]);
    for (kind, part) in [("clt", "hint: a transcoder"), ("lorsa", "calls it a lorsa"), ("sae", "batchtopk")] {
        let config = json!({"sae_type": kind, "act_fn": "batchtopk"}).to_string();
        put(root.path(), "L8R/config.json", config);
        says(at("L8R"), &["llamascopium", part]);
    }
    // Weights without their configuration, and the other way round.
    fs::remove_file(root.path().join("layers.2.mlp/cfg.json")).unwrap();
    says(at("layers.2.mlp"), &["configuration", "cfg.json", "hint: "]);
    fs::remove_file(root.path().join("Base-L6M-8x/checkpoints/final.safetensors")).unwrap();
    put(
        root.path(),
        "Base-L6M-8x/hyperparams.json",
        r#"{"dataset_average_activation_norm": {"in": 1, "out": 1}}"#,
    );
    says(at("Base-L6M-8x"), &["final.safetensors", "hint: "]);
}
