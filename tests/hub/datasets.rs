//! Configurations, splits and kinds of file.

use crate::content::{TRAIN, WIKITEXT, other_texts, packed_lines, texts};
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
    world.hub.add(crate::repo::Repository::new(crate::repo::Kind::Dataset, WIKITEXT, files));
    world.fails("layer", &[WIKITEXT]);
}

#[test]
fn a_column_that_is_not_there() {
    let world = World::new();
    world.fails("layer --text_column body", &["body", "text", "--text_column"]);
}
