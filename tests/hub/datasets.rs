//! Configurations, splits and kinds of file.

use std::collections::BTreeMap;

use crate::content::{TRAIN, WIKITEXT, other_texts, packed_lines, texts};
use crate::repo::{Content, Kind, Repository};
use crate::world::{World, local_arrays};

#[test]
fn packed_lines_of_json() {
    let world = World::new();
    world.hub.add(packed_lines("org/lines", &texts("mistral")));
    world.ok("layer --dataset org/lines --save_outputs");
    assert_eq!(world.arrays(""), local_arrays("qwen2", &texts("mistral"), ""));
}

#[test]
fn another_split() {
    let world = World::new();
    world.ok("layer --dataset_split validation --save_outputs");
    let path = "wikitext-2-raw-v1/validation-00000-of-00001.parquet";
    assert_eq!(world.arrays(""), local_arrays("qwen2", &other_texts(path), ""));
    assert!(!world.has_blob(&world.dataset(), TRAIN), "only the split that was asked for");
}

/// Its training split is two files, read in their order.
#[test]
fn another_configuration() {
    let world = World::new();
    world.ok("layer --dataset_config wikitext-103-raw-v1 --save_outputs --num_samples 4");
    let paths = [0, 1].map(|n| format!("wikitext-103-raw-v1/train-{n:05}-of-00002.parquet"));
    let texts = paths.map(|path| other_texts(&path)).concat();
    assert_eq!(world.arrays(""), local_arrays("qwen2", &texts, "--num_samples 4"));
}

#[test]
fn an_unknown_configuration() {
    let world = World::new();
    let configs = ["wikitext-103-raw-v1", "wikitext-103-v1", "wikitext-2-raw-v1", "wikitext-2-v1"];
    let run = world.misuse("layer --dataset_config wikitext-7", &["\"wikitext-7\"", "--dataset_config"]);
    for config in configs {
        run.err(config);
    }
    world.misuse("layer --dataset_split dev", &["dev", "--dataset_split", "test", "train", "validation"]);
}

#[test]
fn a_dataset_without_files_that_can_be_read() {
    let world = World::new();
    let mut files = world.dataset().files("main").clone();
    files.retain(|path, _| !path.ends_with(".parquet"));
    world.hub.add(Repository::new(Kind::Dataset, WIKITEXT, files));
    world.fails("layer", &[WIKITEXT]);
}

#[test]
fn a_column_that_is_not_there() {
    let world = World::new();
    world.fails("layer --text_column body", &["body", "text", "--text_column"]);
}

/// Of a large repository the facts name a thousand files; the rest is in its listing, page by page.
#[test]
fn a_dataset_of_very_many_files() {
    let world = World::new();
    let all = texts("qwen2");
    let mut files: BTreeMap<String, Content> = BTreeMap::new();
    for number in 0..2300 {
        let path = format!("a/{number:04}.md");
        files.insert(path.clone(), Content::new(&path, path.as_bytes()));
    }
    for (part, texts) in all.chunks(all.len().div_ceil(2)).enumerate() {
        let path = format!("data/train-{part:05}-of-00002.jsonl");
        files.insert(path.clone(), Content::new(&path, crate::content::json_lines(texts)));
    }
    world.hub.add(Repository::new(Kind::Dataset, "org/many", files));
    world.ok("layer --dataset org/many --save_outputs");
    assert_eq!(world.arrays(""), local_arrays("qwen2", &all, ""));
}

/// Weights are large: what is wrong with the texts is found before they are fetched.
#[test]
fn a_slip_in_the_texts_costs_no_download() {
    let world = World::new();
    world.dir.write("rows.jsonl", "{\"body\": \"no text\"}\n");
    for flags in
        ["--text_column body", "--dataset nothing.jsonl", "--dataset rows.jsonl", "--dataset org/none"]
    {
        world.fails(&format!("layer {flags}"), &["error: "]);
    }
    let fetched = world.hub.content_requests();
    assert!(!fetched.iter().any(|request| request.name == "model.safetensors"), "{fetched:#?}");
}

/// What a pipe gives comes once: nothing may be taken from it to be looked at while the weights are fetched.
#[cfg(unix)]
#[test]
fn texts_from_a_pipe_with_a_model_of_the_hub() {
    let world = World::new();
    let pipe = world.dir.path("pipe.jsonl");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let lines = crate::content::json_lines(&texts("qwen2"));
    let writer = std::thread::spawn(move || std::fs::write(pipe, lines).unwrap());
    let run = world.dir.run("layer --dataset pipe.jsonl --save_outputs");
    run.check(run.code == Some(0), "must succeed");
    writer.join().unwrap();
    assert_eq!(world.arrays(""), local_arrays("qwen2", &texts("qwen2"), ""));
}
