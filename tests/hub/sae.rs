//! SAEs on the hub: which files of a repository `gradlens fetch --sae` and `gradlens sae` fetch.

use std::fs;
use std::path::Path;

use crate::files::numbers;
use crate::repo::{Content, Kind, Repository};
use crate::world::World;

const SAES: &str = "org/saes";

fn world() -> World {
    let world = World::new();
    let files = [
        "README.md",
        "resid_3/ae.pt",
        "mlp_out_layer_3/trainer_0/ae.pt",
        "mlp_out_layer_3/trainer_0/config.json",
        "mlp_out_layer_11/trainer_0/ae.pt",
        "mlp_out_layer_11/trainer_0/log.txt",
        "mlp_out_layer_x/trainer_0/ae.pt",
    ];
    let files = files.iter().map(|path| ((*path).to_owned(), Content::new(path, path.as_bytes())));
    world.hub.add(Repository::new(Kind::Model, SAES, files.collect()));
    world
}

fn fetched(world: &World) -> Vec<String> {
    let start =
        format!("models--org--saes/snapshots/{}/", world.hub.repository(Kind::Model, SAES).sha("main"));
    world.cache().keys().filter_map(|path| path.strip_prefix(&start).map(str::to_owned)).collect()
}

#[test]
fn a_layers_number_stands_for_all() {
    let world = world();
    world
        .ok(&format!("fetch --sae {SAES}/mlp_out_layer_{{layer}}/trainer_0"))
        .out(SAES)
        .out("SAEs     3 files");
    assert_eq!(
        fetched(&world),
        [
            "mlp_out_layer_11/trainer_0/ae.pt",
            "mlp_out_layer_3/trainer_0/ae.pt",
            "mlp_out_layer_3/trainer_0/config.json"
        ]
    );
    world.ok(&format!("fetch --sae {SAES}"));
    assert!(fetched(&world).contains(&"resid_3/ae.pt".to_owned()));
    assert!(!fetched(&world).iter().any(|path| path.ends_with(".md") || path.ends_with(".txt")));
}

/// A golden's SAEs of layers 1 and 3, and files that no run needs.
fn golden() -> World {
    let world = World::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/sae/dl_batchtopk");
    let mut files = vec![("README.md".to_owned(), Content::new("README.md", "about"))];
    for layer in [1, 3] {
        for name in ["ae.pt", "config.json"] {
            let path = format!("mlp_out_layer_{layer}/trainer_0/{name}");
            let bytes = fs::read(root.join(&path)).unwrap();
            files.push((path.clone(), Content::new(&path, bytes)));
        }
        let path = format!("mlp_out_layer_{layer}/trainer_0/checkpoints/ae_0.pt");
        files.push((path.clone(), Content::new(&path, "early")));
    }
    world.hub.add(Repository::new(Kind::Model, SAES, files.into_iter().collect()));
    world
}

/// Only what the wanted layers need comes; a dry run leaves it there; without the network the cache is enough.
#[test]
fn a_run_fetches_the_saes_of_its_layers() {
    let world = golden();
    let run = format!("sae --num_samples 3 --sae {SAES}");
    let plan = world.ok(&format!("{run} --dry_run"));
    plan.out("SAEs         org/saes, commit ")
        .out("4 files, ")
        .out("to be downloaded")
        .out("layers       2 of 4: 1,3");
    assert_eq!(fetched(&world), [""; 0]);
    world.ok(&format!("{run} --layers 3 --save_outputs --output_dir one"));
    assert_eq!(fetched(&world), ["mlp_out_layer_3/trainer_0/ae.pt", "mlp_out_layer_3/trainer_0/config.json"]);
    world.ok(&format!("{run}/mlp_out_layer_{{layer}}/trainer_0 --save_outputs --output_dir both"));
    assert_eq!(fetched(&world).len(), 4);
    let again = format!("{run} --save_outputs --output_dir again");
    let offline = world.dir.run_where("HF_HUB_OFFLINE", "1", &again);
    offline.check(offline.code == Some(0), "the cache has everything");
    let arrays = |parent: &str| numbers(&world.dir.made_sae(parent));
    assert_eq!(arrays("both"), arrays("again"));
    world.fails(&format!("{run} --layers 0"), &["no SAE of layer 0", "SAEs of layers 1,3"]);
    // A file of weights stands for its folder, whoever names it.
    world
        .ok(&format!("{run}/mlp_out_layer_{{layer}}/trainer_0/ae.pt --dry_run"))
        .out("layers       2 of 4: 1,3");
    world.ok(&format!("{run}/mlp_out_layer_3/trainer_0/ae.pt --dry_run")).out("layers       1 of 4: 3");
    world.fails(&format!("sae --sae {SAES} --sae_revision other"), &[SAES, "other"]);
}

/// A repository that is one SAE, whose layer only its configuration tells.
#[test]
fn a_repository_of_one_sae() {
    let world = World::new();
    let folder =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/sae/lens_topk/blocks.3.hook_mlp_out");
    let files = ["cfg.json", "sae_weights.safetensors"]
        .map(|name| (name.to_owned(), Content::new(name, fs::read(folder.join(name)).unwrap())));
    world.hub.add(Repository::new(Kind::Model, SAES, files.into_iter().collect()));
    let run = format!("sae --num_samples 3 --sae {SAES}");
    world.misuse(&format!("{run} --dry_run"), &["do not tell their layers", "--layers"]);
    world.ok(&format!("{run} --layers 3 --dry_run")).out("to be downloaded");
    world.ok(&run).out("    3        96");
    world.fails(&format!("{run} --layers 1"), &["of another layer", "an SAE of layer 1", "layer 3"]);
}

/// Known, and not read.
#[test]
fn formats_that_are_refused_by_name() {
    let world = World::new();
    let files = ["config.json", "layer3.sae.pt"].map(|name| (name.to_owned(), Content::new(name, "{}")));
    world.hub.add(Repository::new(Kind::Model, SAES, files.into_iter().collect()));
    world.fails(&format!("sae --num_samples 3 --sae {SAES}"), &["Qwen-Scope", "top-k without ReLU"]);
    assert_eq!(fetched(&world), [""; 0]);
}

/// Weights come with what describes them.
#[test]
fn a_file_is_fetched_with_its_folder() {
    let world = golden();
    world.ok(&format!("fetch --sae {SAES}/mlp_out_layer_3/trainer_0/ae.pt"));
    assert!(fetched(&world).contains(&"mlp_out_layer_3/trainer_0/config.json".to_owned()));
    assert!(!fetched(&world).iter().any(|path| path.contains("layer_1")));
}

#[test]
fn what_is_not_there_is_said() {
    let world = world();
    world.fails(&format!("fetch --sae {SAES}/mlp"), &["no SAE files", SAES, "mlp", "resid_3"]);
    world.fails("fetch --sae no/saes", &["no/saes", "hint: "]);
    for sae in ["saes", "/org/saes"] {
        world.misuse(&format!("fetch --sae {sae}"), &["--sae", "owner/name", "hint: "]);
    }
}
