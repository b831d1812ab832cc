//! The cache without the hub, and `gradlens fetch`.

use std::fs;

use crate::content::{MODEL, TRAIN, WIKITEXT, texts};
use crate::server::{Fault, Hub, Place};
use crate::world::{World, local_arrays};

#[test]
fn offline_from_the_cache() {
    let mut world = World::new();
    world.ok("layer --layers 0");
    world.hub.requests();
    for value in ["1", "true", "YES", "on"] {
        world.dir.set("HF_HUB_OFFLINE", value);
        world.ok(&format!("layer --save_outputs --output_dir {value}"));
        assert_eq!(world.arrays(value), local_arrays("qwen2", &texts("qwen2"), ""));
    }
    assert!(world.hub.requests().is_empty());
    let sha = world.model().sha("main");
    world.ok(&format!("layer --revision {sha} --layers 0"));
    // What is no word for yes is no.
    world.dir.set("HF_HUB_OFFLINE", "0");
    world.ok("layer --layers 0");
    assert!(!world.hub.requests().is_empty());
}

/// What is missing is said, and how to get it.
#[test]
fn offline_without_the_files() {
    let mut world = World::new();
    world.dir.set("HF_HUB_OFFLINE", "1");
    world.fails("layer", &["HF_HUB_OFFLINE", "gradlens fetch"]);
    world.fails(
        &format!("layer --model_name {MODEL}"),
        &[MODEL, "HF_HUB_OFFLINE", "gradlens fetch --model_name"],
    );
    assert!(world.hub.requests().is_empty());
    assert!(world.cache().is_empty());
}

/// What is there may not be all of it.
#[test]
fn offline_with_a_part_of_the_files() {
    let mut world = World::new();
    world.ok("layer --layers 0");
    world.hub.requests();
    world.dir.set("HF_HUB_OFFLINE", "1");
    // Another branch or split than was fetched.
    world.fails("layer --revision other", &[MODEL, "other", "gradlens fetch"]);
    world.fails("layer --dataset_split test", &[WIKITEXT, "test"]);
    let repository = world.model();
    let (folder, sha) = (repository.folder(), repository.sha("main"));
    fs::remove_file(world.home(&format!("hub/{folder}/snapshots/{sha}/model.safetensors"))).unwrap();
    world.fails("layer", &["model.safetensors", MODEL, "gradlens fetch"]);
    assert!(world.hub.requests().is_empty());
}

#[test]
fn fetch_fills_the_cache() {
    let mut world = World::new();
    world.ok("fetch --dry_run").out("model    Qwen/Qwen2.5-0.5B, 1 file of ").out(" to download");
    assert!(!world.has_blob(&world.model(), "model.safetensors") && !world.has_blob(&world.dataset(), TRAIN));
    world.ok(&format!("fetch --model_name {MODEL} --dataset {WIKITEXT}"));
    assert!(world.has_blob(&world.model(), "model.safetensors") && world.has_blob(&world.dataset(), TRAIN));
    assert!(!world.has_blob(&world.model(), "pytorch_model.bin"));
    world.hub.requests();
    world.ok(&format!("fetch --model_name {MODEL} --dataset {WIKITEXT}"));
    assert!(world.hub.content_requests().is_empty(), "it is all there");
    world.dir.set("HF_HUB_OFFLINE", "1");
    world.ok("layer --save_outputs");
    assert_eq!(world.arrays(""), local_arrays("qwen2", &texts("qwen2"), ""));
    assert!(world.hub.requests().is_empty());
}

/// The same flags mean the same.
#[test]
fn fetch_takes_revisions_and_splits() {
    let mut world = World::new();
    world.hub.add(world.model().commit("next", crate::content::golden("yi")));
    let flags = format!("--model_name {MODEL} --revision next --dataset {WIKITEXT} --dataset_split test");
    world.ok(&format!("fetch {flags}"));
    world.dir.set("HF_HUB_OFFLINE", "1");
    world.ok(&format!("layer {flags} --save_outputs --output_dir out"));
    let path = "wikitext-2-raw-v1/test-00000-of-00001.parquet";
    assert_eq!(world.arrays("out"), local_arrays("yi", &crate::content::other_texts(path), ""));
    world.fails("layer", &["gradlens fetch"]);
}

/// A part of a dataset is no whole one: where more texts are wanted than it holds, that is said.
#[test]
fn offline_with_the_first_part_of_a_dataset() {
    let mut world = World::new();
    let flags = "--dataset_config wikitext-103-raw-v1";
    world.ok(&format!("layer {flags} --num_samples 1"));
    let [first, second] = [0, 1].map(|part| format!("wikitext-103-raw-v1/train-{part:05}-of-00002.parquet"));
    assert!(world.has_blob(&world.dataset(), &first) && !world.has_blob(&world.dataset(), &second));
    world.dir.set("HF_HUB_OFFLINE", "1");
    world.ok(&format!("layer {flags} --num_samples 1"));
    world.fails(&format!("layer {flags}"), &[&second, WIKITEXT, "gradlens fetch"]);
}

#[test]
fn fetch_says_what_is_wrong() {
    let world = World::new();
    world.fails("fetch --model_name no/model", &["no/model"]);
    world.fails(&format!("fetch --model_name {MODEL} --dataset no/texts"), &["no/texts"]);
    let run = world.dir.run("fetch --no_such_flag");
    run.check(run.code == Some(2), "must be a usage error");
}

/// The address of a hub that has gone.
fn unreachable() -> String {
    Hub::start().endpoint.clone()
}

#[test]
fn an_endpoint_that_cannot_be_reached() {
    let mut world = World::new();
    world.ok("layer --layers 0");
    let reachable = world.ok("layer --layers 0");
    reachable.check(!reachable.stderr.contains("cannot be reached"), "nothing to warn of");
    let endpoint = unreachable();
    world.dir.set("HF_ENDPOINT", &endpoint);
    // With a filled cache it is a warning.
    let run = world.ok("layer --save_outputs");
    run.err("warning: ").err("cannot be reached").err(MODEL);
    assert_eq!(world.arrays(""), local_arrays("qwen2", &texts("qwen2"), ""));
    // With an empty one an error.
    let mut empty = World::empty();
    empty.dir.set("HF_ENDPOINT", &endpoint);
    empty.fails("layer", &[&endpoint, "hint: "]);
    assert!(empty.cache().is_empty());
}

/// A hub that is down is no worse than none.
#[test]
fn a_hub_that_is_down() {
    let world = World::new();
    world.ok("layer --layers 0");
    world.hub.fault(Place::Api, MODEL, Fault::Status(503), usize::MAX);
    world.ok("layer --save_outputs").err("warning: ").err(MODEL);
    assert_eq!(world.arrays(""), local_arrays("qwen2", &texts("qwen2"), ""));
}
