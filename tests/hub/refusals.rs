//! What the hub does not have or does not give, and repositories that mean harm.

use std::env;
use std::fs;

use crate::content::{MODEL, WIKITEXT, golden, model, parquet, texts};
use crate::repo::{Content, Files, Kind, Repository};
use crate::world::{SECRET, World};

/// An id that is nowhere else on this machine.
const GATED: &str = "meta/gated";

#[test]
fn a_repository_that_is_not_there() {
    let world = World::with_token();
    world.fails("layer --model_name no/model", &["no/model", &world.hub.endpoint, "hint: "]);
    world.fails("layer --dataset no/texts", &["no/texts", "hint: "]);
    assert!(!world.cache().keys().any(|path| path.contains("no--")));
}

/// The hub does not tell strangers apart whether a repository is private or none: the advice is for both.
#[test]
fn a_repository_that_may_be_private() {
    let world = World::new();
    world.hub.add(model("me/private", "yi").private());
    for id in ["no/model", "me/private"] {
        world.fails(&format!("layer --model_name {id}"), &[id, "HF_TOKEN", "private"]);
    }
}

#[test]
fn a_private_repository_opens_to_its_token() {
    let world = World::with_token();
    world.hub.add(model("me/private", "yi").private());
    world.fails("layer --model_name me/private", &["me/private"]);
    world.hub.token(SECRET, &["me/private"]);
    world.ok("layer --model_name me/private --save_outputs");
}

#[test]
fn a_gated_model() {
    let mut world = World::new();
    world.hub.add(model(GATED, "yi").gated());
    let page = format!("{}/{GATED}", world.hub.endpoint);
    // Without a token.
    world.fails(&format!("layer --model_name {GATED}"), &[GATED, &page, "HF_TOKEN"]);
    // With one whose owner has not accepted the terms.
    world.hub.token(SECRET, &[]);
    world.dir.set("HF_TOKEN", SECRET);
    world.fails(&format!("layer --model_name {GATED}"), &[GATED, &page]);
    assert!(!world.cache().keys().any(|path| path.contains("/snapshots/") || path.contains("/blobs/")));
    world.hub.token(SECRET, &[GATED]);
    world.ok(&format!("layer --model_name {GATED} --save_outputs"));
}

/// The hub refuses it even where none is needed.
#[test]
fn a_token_that_is_not_valid() {
    let mut world = World::new();
    world.dir.set("HF_TOKEN", SECRET);
    let run = world.fails("layer", &["token", "HF_TOKEN", "hint: "]);
    run.check(!run.stderr.contains("private"), "the token is the trouble, not the repository");
}

#[test]
fn a_model_without_safetensors() {
    let world = World::new();
    let mut files = model("old/model", "qwen2").files("main").clone();
    files.retain(|path, _| !path.ends_with(".safetensors"));
    world.hub.add(Repository::new(Kind::Model, "old/model", files));
    world.fails("layer --model_name old/model", &["old/model", "safetensors", "pytorch_model.bin", "hint: "]);
    let fetched = world.hub.content_requests();
    assert!(!fetched.iter().any(|request| request.name.ends_with(".bin")), "{fetched:#?}");
}

#[test]
fn a_model_that_lacks_a_file() {
    for (golden, name) in [
        ("qwen2", "config.json"),
        ("qwen2", "tokenizer.json"),
        ("mistral", "model-00002-of-00002.safetensors"),
    ] {
        let world = World::new();
        let mut files = model("org/holes", golden).files("main").clone();
        files.remove(name);
        world.hub.add(Repository::new(Kind::Model, "org/holes", files));
        world.fails("layer --model_name org/holes", &["org/holes", name]);
    }
}

/// What is no id is said to be none, and asked of no hub.
#[test]
fn what_is_no_id() {
    let world = World::new();
    for name in ["./nowhere", "/nowhere/at/all", "a/b/c", "../up", "org/..", "org/na me", "org/"] {
        let run = world.dir.run_with("layer --model_name", &[name]);
        run.check(run.code == Some(1) || run.code == Some(2), "must fail");
        run.err("error: ").err("--model_name");
    }
    let asked = world.hub.requests();
    assert!(!asked.iter().any(|request| request.name != WIKITEXT), "{asked:#?}");
}

/// Names that lead out of the cache, by relative and absolute paths.
fn harmful(world: &World) -> Vec<String> {
    let absolute = world.dir.path("absolute-evil").display().to_string();
    let up = (1..9).map(|n| format!("{}up-{n}-evil", "../".repeat(n)));
    let inside = (1..9).map(|n| format!("wikitext-2-raw-v1/{}in-{n}-evil", "../".repeat(n)));
    up.chain(inside).chain([absolute, "./dot/./../../dot-evil".into()]).collect()
}

/// Nothing of that name is anywhere: below the working folder, or where so many steps up lead.
#[track_caller]
fn no_harm(world: &World) {
    let escaped = world.dir.listing().into_iter().find(|name| name.contains("evil"));
    assert_eq!(escaped, None);
    for folder in [env::temp_dir(), env::current_dir().unwrap(), "/".into()] {
        let names = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name());
        let evil = names.map(|name| name.to_string_lossy().into_owned()).find(|name| name.contains("-evil"));
        assert_eq!(evil, None, "in {}", folder.display());
    }
}

#[test]
fn names_of_files_that_lead_out_of_the_cache() {
    let world = World::new();
    let mut files = model("mean/names", "qwen2").files("main").clone();
    // A backslash separates folders on some systems.
    for path in harmful(&world).into_iter().chain(["..\\..\\back-evil".into()]) {
        for ending in ["", ".safetensors", ".json"] {
            let path = format!("{path}{ending}");
            files.insert(path.clone(), Content::new(&path, "harm"));
        }
    }
    world.hub.add(Repository::new(Kind::Model, "mean/names", files));
    // Nobody needs them: whether that is an error is the program's business.
    world.run("layer --model_name mean/names --save_outputs");
    no_harm(&world);
}

#[test]
fn an_index_that_leads_out_of_the_cache() {
    for target in
        ["../../../../shard-evil.safetensors", "/shard-evil.safetensors", "a/../../../shard-evil.safetensors"]
    {
        let world = World::new();
        let mut files = golden("mistral");
        let index = String::from_utf8(files["model.safetensors.index.json"].bytes.to_vec()).unwrap();
        let second = "model-00002-of-00002.safetensors";
        let bytes = index.replace(second, target);
        files.insert("model.safetensors.index.json".into(), Content::new("x.json", bytes));
        let shard = files[second].clone();
        files.insert(target.into(), shard);
        world.hub.add(Repository::new(Kind::Model, "mean/index", files));
        world.fails("layer --model_name mean/index", &["model.safetensors.index.json"]);
        no_harm(&world);
    }
}

#[test]
fn a_dataset_that_leads_out_of_the_cache() {
    let world = World::new();
    let files = |path: &str, pattern: &str| -> Files {
        let card = format!(
            "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: \"{pattern}\"\n---\n"
        );
        [("README.md", card.into_bytes()), (path, parquet(&texts("qwen2")))]
            .map(|(path, bytes)| (path.to_owned(), Content::new(path, bytes)))
            .into()
    };
    for path in harmful(&world) {
        let path = format!("{path}.parquet");
        for pattern in [path.as_str(), "**"] {
            world.hub.add(Repository::new(Kind::Dataset, "mean/texts", files(&path, pattern)));
            let run = world.run("layer --dataset mean/texts");
            run.check(run.code == Some(1), "a file that cannot be had is an error");
            no_harm(&world);
        }
    }
}

/// The hub's answer is not what was asked for: a wrong address, a page to log in to a network.
#[test]
fn an_endpoint_that_is_no_hub() {
    let mut world = World::new();
    let endpoint = format!("{}/not/a/hub", world.hub.endpoint);
    world.dir.set("HF_ENDPOINT", &endpoint);
    world.fails("layer", &[&endpoint]);
    world.dir.set("HF_ENDPOINT", "not an address");
    let run = world.run("layer");
    run.check(run.code == Some(1) || run.code == Some(2), "must fail");
    run.err("HF_ENDPOINT").err("not an address");
}

/// The model of the defaults, to be sure that the refusals above are not for another reason.
#[test]
fn the_same_without_a_reason() {
    let world = World::new();
    world.hub.add(model(GATED, "yi"));
    world.ok(&format!("layer --model_name {GATED}"));
    world.ok(&format!("layer --model_name {MODEL}"));
}
