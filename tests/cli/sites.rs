//! Several places in each block at once: their folders, their files, and what cannot be asked for.

use std::fs;
use std::path::PathBuf;

use crate::dir::{Dir, LAYER};
use crate::files::{Npz, json, names};

/// The folder of a site under `parent`.
fn folder(dir: &Dir, parent: &str, site: &str) -> PathBuf {
    let start = match site {
        "mlp" => "layer_activations_model_model_num_samples_8_batch_size_4_layers_0_2_".to_owned(),
        _ => format!("layer_activations_model_model_site_{site}_num_samples_8_batch_size_4_layers_0_2_"),
    };
    let all = names(&dir.path(parent));
    let own: Vec<&String> = all.iter().filter(|name| name.starts_with(&start)).collect();
    assert_eq!(own.len(), 1, "{site}: {all:?}");
    dir.path(parent).join(own[0])
}

/// Every site at once gives each the files that it would have alone.
#[test]
fn sites_together_are_sites_alone() {
    let sites = ["mlp", "mlp_out", "mlp_hidden", "attn_out", "resid_pre", "resid_mid", "resid_post"];
    let dir = Dir::with("gemma2");
    let args = format!("{LAYER} --num_samples 8 --layers 0,2 --aggregate_by gradients --save_outputs");
    // In any order, with blanks, one of them twice.
    let list = "resid_post, mlp,mlp_out,mlp_hidden,attn_out,resid_pre,resid_mid,mlp";
    let run =
        dir.run_with(&format!("{args} --output_dir all --save_consolidated all.npz"), &["--site", list]);
    run.check(run.code == Some(0), "all sites");
    assert_eq!(names(&dir.path("all")).len(), sites.len());
    for site in sites {
        run.out(&format!("gradients at {site} of the sample loss"));
        let own = folder(&dir, "all", site);
        let metadata = json(&own.join("metadata.json"));
        assert_eq!(metadata["run_info"]["site"], site);
        let width = if site == "mlp_hidden" { "intermediate_size" } else { "hidden_size" };
        let width = json(&dir.path("model/config.json"))[width].clone();
        assert_eq!(metadata["dimension_info"]["layer_2"], width, "{site}");
        let alone = format!("{args} --output_dir {site} --site {site} --save_consolidated {site}.npz");
        dir.ok(&alone);
        let alone = folder(&dir, site, site);
        assert_eq!(names(&own), names(&alone));
        for file in names(&own).iter().filter(|name| name.ends_with(".npy") || *name == "statistics.npz") {
            assert!(
                fs::read(own.join(file)).unwrap() == fs::read(alone.join(file)).unwrap(),
                "{site}: {file}"
            );
        }
        let keys = Npz::open(&own.join("statistics.npz")).keys();
        assert!(keys.contains(&format!("layer_0.{site}.gradients.sum")), "{keys:?}");
        // Each but the default has a file of its own.
        let together = if site == "mlp" { "all.npz".into() } else { format!("all_site_{site}.npz") };
        let key = "layer_2_mean_abs";
        assert_eq!(
            Npz::open(&dir.path(&together)).f32(key),
            Npz::open(&dir.path(&format!("{site}.npz"))).f32(key)
        );
    }
}

#[test]
fn sites_that_cannot_be_shown() {
    let dir = Dir::with("mixtral");
    for list in ["middle", "mlp,", "", "MLP", "mlp resid_mid"] {
        let says = ["there is no such site", "one of mlp, mlp_out", "comma list"];
        dir.refuse_with(2, LAYER, &["--site", list], &says);
    }
    let says = ["no such place", "mlp_hidden", "a mixture of experts", "hint:"];
    dir.refuse(2, &format!("{LAYER} --site resid_mid,mlp_hidden"), &says);
    dir.ok(&format!("{LAYER} --site resid_mid,attn_out --dry_run")).out("values at attn_out, resid_mid");
}

/// Rules are measured at each site by itself.
#[test]
fn norms_are_of_each_site() {
    let dir = Dir::with("gemma2");
    let args = "--num_samples 8 --layers 0,2 --save_outputs --max_norm_ratio 1.2 --site mlp,resid_mid";
    let run = dir.ok(&format!("{LAYER} {args} --output_dir out"));
    run.out("each layer at mlp\n").out("each layer at resid_mid\n");
    let of = |site| {
        let metadata = json(&folder(&dir, "out", site).join("metadata.json"));
        metadata["run_info"]["token_policy"].clone()
    };
    assert_ne!(of("mlp")["median_norms"], of("resid_mid")["median_norms"]);
    assert_ne!(
        of("mlp")["tokens_skipped"]["max_norm_ratio"],
        of("resid_mid")["tokens_skipped"]["max_norm_ratio"]
    );
}

/// If one cannot be put in place, none is.
#[test]
#[cfg(unix)]
fn sites_are_delivered_together() {
    let dir = Dir::with("qwen2");
    // A folder where the second site's file is to be, made when all has been checked.
    let args =
        format!("{LAYER} --aggregate_by gradients --site mlp,resid_post --save_outputs --output_dir out");
    let fifo = dir.path("texts.jsonl");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let child = dir.start(
        &args
            .replace("model/corpus.jsonl", "texts.jsonl")
            .replace("--output_dir", "--save_consolidated c --output_dir"),
    );
    let mut pipe = fs::OpenOptions::new().write(true).open(&fifo).unwrap();
    fs::create_dir_all(dir.path("c_site_resid_post.npz/x")).unwrap();
    std::io::Write::write_all(&mut pipe, &fs::read(dir.path("model/corpus.jsonl")).unwrap()).unwrap();
    drop(pipe);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("could not be written") && said.contains("c_site_resid_post.npz"), "{said}");
    assert!(!dir.path("c.npz").exists(), "{:?}", dir.listing());
    assert!(names(&dir.path("out")).is_empty(), "{:?}", dir.listing());
}
