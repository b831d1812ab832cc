//! What is fetched, where it lies, and that results do not depend on where the files came from.

use std::collections::BTreeSet;
use std::fs;
use std::thread;

use crate::content::{DECOYS, MODEL, TRAIN, WIKITEXT, is_needed, model, packed_lines, texts};
use crate::server::{Place, Request};
use crate::world::{World, local_arrays};

/// The files whose bytes were asked for.
fn names(requests: &[Request]) -> BTreeSet<&str> {
    requests.iter().map(|request| request.name.as_str()).collect()
}

/// The command of the Python scripts' users, with nothing on the machine.
#[test]
fn the_defaults_from_an_empty_cache() {
    let world = World::new();
    let run = world.ok("layer --save_outputs");
    run.out("Results saved to:");
    let folder = world.dir.made("");
    let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
    let start = "layer_activations_model_Qwen_Qwen2.5-0.5B_num_samples_500_batch_size_4_layers_0to3_";
    assert!(name.starts_with(start), "{name}");
    let metadata = crate::files::json(&folder.join("metadata.json"));
    assert_eq!(metadata["experiment_info"]["model_name"], MODEL);
    assert_eq!(world.arrays(""), local_arrays("qwen2", &texts("qwen2"), ""));
}

#[test]
fn gradients_are_the_same_too() {
    let world = World::new();
    let flags = "--aggregate_by gradients --normalize_mode all --max_length 24";
    world.ok(&format!("layer --save_outputs {flags} --model_name {MODEL} --dataset {WIKITEXT}"));
    assert_eq!(world.arrays(""), local_arrays("qwen2", &texts("qwen2"), flags));
}

#[test]
fn only_what_is_needed_is_fetched_and_once() {
    let world = World::new();
    world.ok("layer --save_outputs");
    let fetched = world.hub.content_requests();
    let names = names(&fetched);
    for path in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", TRAIN] {
        assert!(names.contains(path), "{path} is missing in {names:?}");
        assert_eq!(
            fetched.iter().filter(|request| request.name == path).count(),
            1,
            "{path} is fetched again"
        );
    }
    // The README is a decoy of the model, and names the configurations of the dataset.
    let others = names.iter().filter(|path| !is_needed(path) && ![TRAIN, "README.md"].contains(path));
    assert_eq!(others.collect::<Vec<_>>(), Vec::<&&str>::new());
    for path in DECOYS {
        assert!(!world.has_blob(&world.model(), path), "{path} is in the cache");
    }
}

#[test]
fn a_sharded_model() {
    let world = World::new();
    for (id, golden) in [("mistralai/Mistral-7B-v0.1", "mistral"), ("org/three-shards", "qwen2_window")] {
        world.hub.add(model(id, golden));
        world.hub.requests();
        world.ok(&format!("layer --model_name {id} --save_outputs --output_dir {golden}"));
        let fetched = world.hub.content_requests();
        let names = names(&fetched);
        let shards = names.iter().filter(|path| path.starts_with("model-0")).count();
        assert_eq!(shards, if golden == "mistral" { 2 } else { 3 }, "{names:?}");
        assert!(names.iter().all(|path| is_needed(path) || ["README.md", TRAIN].contains(path)), "{names:?}");
        assert!(!names.contains("consolidated.safetensors"));
        assert_eq!(world.arrays(golden), local_arrays(golden, &texts("qwen2"), ""));
    }
}

#[test]
fn the_second_run_fetches_nothing() {
    let world = World::new();
    world.ok("layer --save_outputs --output_dir first");
    world.hub.requests();
    let cache = world.cache();
    world.ok("layer --save_outputs --output_dir second");
    let again = world.hub.requests();
    assert!(!again.iter().any(|request| request.place == Place::Content), "{again:#?}");
    assert_eq!(world.cache(), cache);
    assert_eq!(world.arrays("first"), world.arrays("second"));
}

/// Where huggingface_hub has each file, to the letter. (That nothing else is there is checked after every run.)
#[test]
fn the_cache_is_laid_out_as_python_does_it() {
    let world = World::new();
    world.ok("layer --save_outputs");
    let cache = world.cache();
    for (repository, paths) in [
        (world.model(), vec!["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]),
        (world.dataset(), vec![TRAIN]),
    ] {
        let (folder, sha) = (repository.folder(), repository.sha("main"));
        assert_eq!(fs::read_to_string(world.home(&format!("hub/{folder}/refs/main"))).unwrap(), sha);
        for path in paths {
            let content = &repository.files("main")[path];
            let up = "../".repeat(2 + path.matches('/').count());
            let link = cache.get(&format!("{folder}/snapshots/{sha}/{path}"));
            assert_eq!(link, Some(&Some(format!("{up}blobs/{}", content.etag()))), "{path} in {cache:#?}");
            let bytes = fs::read(world.home(&format!("hub/{folder}/snapshots/{sha}/{path}"))).unwrap();
            assert_eq!(bytes, *content.bytes, "{path}");
        }
    }
}

/// A file that two commits share is one blob; so is one that is in the repository twice.
#[test]
fn blobs_are_shared() {
    let world = World::new();
    world.ok("layer --layers 0");
    let before = world.model();
    let mut files = before.files("main").clone();
    files.insert("tokenizer_config.json".into(), crate::repo::Content::new("tokenizer_config.json", "{}"));
    world.hub.add(before.commit("main", files));
    world.hub.requests();
    world.ok("layer --layers 0");
    let fetched = world.hub.content_requests();
    assert_eq!(names(&fetched), BTreeSet::from(["tokenizer_config.json"]));
    let weights = format!("/snapshots/{}/model.safetensors", world.model().sha("main"));
    assert!(world.cache().keys().any(|path| path.ends_with(&weights)));
}

#[test]
fn the_endpoint_may_end_in_a_slash() {
    let mut world = World::new();
    let endpoint = format!("{}/", world.hub.endpoint);
    world.dir.set("HF_ENDPOINT", &endpoint);
    world.ok("layer --layers 0");
    let doubled = world.hub.requests().into_iter().find(|request| request.target.starts_with("//"));
    assert!(doubled.is_none(), "{doubled:?}");
}

/// `HF_HUB_CACHE` moves the cache out of the Hugging Face home.
#[test]
fn the_cache_may_be_elsewhere() {
    let mut world = World::new();
    let elsewhere = world.dir.path("else/where");
    world.dir.set("HF_HUB_CACHE", elsewhere.to_str().unwrap());
    world.ok("layer --layers 0");
    crate::world::check_cache(&elsewhere);
    assert!(elsewhere.join(world.model().folder()).join("refs/main").is_file());
    assert!(!world.home("hub").exists());
}

/// A folder of the same name is what is meant, and needs no hub.
#[test]
fn a_folder_comes_before_the_hub() {
    let world = World::new();
    for (path, content) in crate::content::golden("yi") {
        world.dir.write(&format!("{MODEL}/{path}"), content.bytes.as_slice());
    }
    world.dir.write("texts.jsonl", crate::content::json_lines(&texts("qwen2")));
    let run = world.ok("layer --dataset texts.jsonl --save_outputs");
    run.check(world.hub.requests().is_empty(), "must ask no hub");
    assert_eq!(world.arrays(""), local_arrays("yi", &texts("qwen2"), ""));
}

/// A model of the hub on texts of this machine, and the other way round.
#[test]
fn hub_and_machine_mix() {
    let world = World::new();
    world.hub.add(packed_lines("org/lines", &texts("qwen2")));
    world.dir.write("texts.jsonl", crate::content::json_lines(&texts("qwen2")));
    world.ok("layer --dataset texts.jsonl --save_outputs --output_dir one");
    for (path, content) in crate::content::golden("qwen2") {
        world.dir.write(&format!("model/{path}"), content.bytes.as_slice());
    }
    world.hub.requests();
    world.ok("layer --model_name model --dataset org/lines --save_outputs --output_dir two");
    let asked = world.hub.requests();
    assert!(asked.iter().all(|request| request.target.contains("lines") || request.cdn), "{asked:#?}");
    let expected = local_arrays("qwen2", &texts("qwen2"), "");
    assert_eq!(world.arrays("one"), expected);
    assert_eq!(world.arrays("two"), expected);
}

/// Two programs that start together share the work, or at least do not spoil it.
#[test]
fn two_runs_at_once() {
    let world = World::new();
    thread::scope(|scope| {
        for parent in ["first", "second"] {
            let dir = &world.dir;
            scope.spawn(move || dir.ok(&format!("layer --save_outputs --output_dir {parent}")));
        }
    });
    // Looks at everything once both have ended.
    world.ok("layer --layers 0");
    assert_eq!(world.arrays("first"), world.arrays("second"));
    let fetched = world.hub.content_requests();
    let weights = fetched.iter().filter(|request| request.name == "model.safetensors").count();
    assert_eq!(weights, 1, "the second waits for the lock of the first");
}

/// The plan is made from the small files; the weights stay where they are.
#[test]
fn a_dry_run_fetches_no_weights() {
    let world = World::new();
    let run = world.ok(&format!("layer --model_name {MODEL} --dry_run --save_outputs"));
    run.out(MODEL).out("100,400");
    assert!(!world.has_blob(&world.model(), "model.safetensors"));
    let fetched = world.hub.content_requests();
    // The head of the file says the shapes, and may be read.
    let weights = fetched.iter().filter(|request| request.name.ends_with(".safetensors"));
    let sent: usize = weights.map(|request| request.sent).sum();
    assert!(sent < world.model().files("main")["model.safetensors"].bytes.len() / 2, "{fetched:#?}");
    // Nor is what a dry run leaves taken for a download.
    world.ok("layer --save_outputs");
    assert_eq!(world.arrays(""), local_arrays("qwen2", &texts("qwen2"), ""));
}
