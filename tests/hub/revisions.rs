//! Branches and commits.

use std::fs;

use crate::content::{MODEL, TRAIN, golden, parquet, texts};
use crate::repo::Content;
use crate::server::Place;
use crate::world::{World, local_arrays};

/// With another model on a branch whose name has slashes; as pull requests have.
fn world() -> World {
    let world = World::new();
    world.hub.add(world.model().commit("refs/pr/1", golden("yi")));
    world
}

#[test]
fn a_branch() {
    let world = world();
    world.ok("layer --revision refs/pr/1 --save_outputs");
    assert_eq!(world.arrays(""), local_arrays("yi", &texts("qwen2"), ""));
    let (folder, sha) = (world.model().folder(), world.model().sha("refs/pr/1"));
    assert_eq!(fs::read_to_string(world.home(&format!("hub/{folder}/refs/refs/pr/1"))).unwrap(), sha);
    let other = format!("{folder}/snapshots/{}", world.model().sha("main"));
    assert!(!world.cache().keys().any(|path| path.starts_with(&other)), "only what was asked for");
}

#[test]
fn a_commit() {
    let world = world();
    let sha = world.model().sha("refs/pr/1");
    world.ok(&format!("layer --revision {sha} --save_outputs"));
    assert_eq!(world.arrays(""), local_arrays("yi", &texts("qwen2"), ""));
    let refs = format!("{}/refs/", world.model().folder());
    assert!(!world.cache().keys().any(|path| path.starts_with(&refs)), "a commit is no branch");
    // It cannot change, so there is nothing to ask about what is there.
    world.hub.requests();
    let run = world.ok(&format!("layer --revision {sha} --layers 0"));
    let asked = world.hub.requests();
    let content = asked.iter().any(|request| request.place == Place::Content);
    run.check(!content, "must fetch nothing");
}

/// The branch of the first run has moved on by the second.
#[test]
fn a_branch_that_moves() {
    let world = World::new();
    world.ok("layer --save_outputs --output_dir before");
    let old = world.model().sha("main");
    world.hub.add(world.model().commit("main", golden("yi")));
    let new = world.model().sha("main");
    world.ok("layer --save_outputs --output_dir after");
    assert_eq!(world.arrays("before"), local_arrays("qwen2", &texts("qwen2"), ""));
    assert_eq!(world.arrays("after"), local_arrays("yi", &texts("qwen2"), ""));
    let folder = world.model().folder();
    assert_eq!(fs::read_to_string(world.home(&format!("hub/{folder}/refs/main"))).unwrap(), new);
    world.ok(&format!("layer --revision {old} --save_outputs --output_dir again"));
    assert_eq!(world.arrays("again"), world.arrays("before"));
}

/// The dataset's branch is another matter than the model's.
#[test]
fn a_revision_of_the_dataset() {
    let world = World::new();
    let mut files = world.dataset().files("main").clone();
    files.insert(TRAIN.into(), Content::new(TRAIN, parquet(&texts("mistral"))));
    world.hub.add(world.dataset().commit("next", files));
    world.ok("layer --dataset_revision next --save_outputs");
    assert_eq!(world.arrays(""), local_arrays("qwen2", &texts("mistral"), ""));
}

#[test]
fn a_revision_that_is_not_there() {
    let world = world();
    let missing = "0123456789abcdef0123456789abcdef01234567";
    for revision in ["no-such-branch", "no/such/branch", missing] {
        world.fails(&format!("layer --revision {revision}"), &[MODEL, revision, "hint: "]);
    }
    world.fails("layer --dataset_revision nope", &["nope", "hint: "]);
    assert!(!world.cache().keys().any(|path| path.contains("no-such") || path.contains(missing)));
}
