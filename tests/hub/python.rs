//! The cache is the one of huggingface_hub: what either has fetched, the other finds. Runs where `GRADLENS_HUB_PYTHON`
//! names a Python that has that package.

use std::env;

use serde_json::{Map, Value, json};

use crate::content::{TRAIN, is_needed, texts};
use crate::dir::Run;
use crate::hash;
use crate::repo::{Kind, Repository};
use crate::server::Hub;
use crate::world::{SECRET, World, check_cache, local_arrays};

/// The dataset's description, whose head names the files of its configurations.
const CARD: &str = "README.md";

/// Runs `cache.py` in the world's environment; `None`, with the reason, where there is no such Python.
fn python(world: &World, mode: &str) -> Option<Run> {
    let Some(python) = env::var_os("GRADLENS_HUB_PYTHON") else {
        let required = env::var_os("GRADLENS_REQUIRE_HUB").is_some();
        let reason =
            "set GRADLENS_HUB_PYTHON to a Python with huggingface_hub to have the cache shared with it";
        assert!(!required, "GRADLENS_REQUIRE_HUB: {reason}");
        eprintln!("skipped: {reason}");
        return None;
    };
    let wanted = json!([
        wanted(&world.model(), is_needed),
        wanted(&world.dataset(), |path| [TRAIN, CARD].contains(&path))
    ]);
    let mut command = world.dir.command(python);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hub/cache.py")).args([mode, &wanted.to_string()]);
    // Notices about newer versions, and progress bars, have no place in a test's output.
    command.env("HF_HUB_DISABLE_TELEMETRY", "1").env("HF_HUB_DISABLE_PROGRESS_BARS", "1");
    let run = world.dir.finish(&mut command);
    run.check(run.code == Some(0), "huggingface_hub must agree");
    eprint!("{}", run.stdout);
    Some(run)
}

/// The files of a repository that `cache.py` is to look after.
fn wanted(repository: &Repository, which: impl Fn(&str) -> bool) -> Value {
    let files = repository.files("main").iter().filter(|(path, _)| which(path));
    let files = files.map(|(path, content)| (path.clone(), json!(hash::etag(&content.bytes, true))));
    let kind = if repository.kind == Kind::Model { "model" } else { "dataset" };
    let commit = repository.sha("main");
    json!({ "kind": kind, "id": repository.id, "commit": commit, "files": Value::Object(files.collect::<Map<_, _>>()) })
}

#[track_caller]
fn nothing_was_fetched(hub: &Hub) {
    let fetched = hub.content_requests();
    assert!(fetched.is_empty(), "{fetched:#?}");
}

/// Our server is one that huggingface_hub takes for the hub, and reads every file from.
#[test]
fn python_fetches_and_finds() {
    let world = World::new();
    if python(&world, "download").is_none() {
        return;
    }
    let fetched = world.hub.content_requests();
    for path in ["config.json", "model.safetensors", TRAIN] {
        assert_eq!(fetched.iter().filter(|request| request.name == path).count(), 1, "{fetched:#?}");
    }
    python(&world, "find");
    assert!(world.hub.requests().is_empty());
    // What is asked of the program's cache holds for the one it is modelled on.
    check_cache(&world.home("hub"));
    assert!(world.cache().len() > 10);
}

#[test]
fn python_finds_what_the_program_fetched() {
    let world = World::new();
    world.ok("layer --save_outputs");
    world.hub.requests();
    if python(&world, "find").is_none() {
        return;
    }
    assert!(world.hub.requests().is_empty());
    // Online it looks for news, and has all the files.
    python(&world, "download");
    nothing_was_fetched(&world.hub);
}

#[test]
fn the_program_finds_what_python_fetched() {
    let world = World::new();
    if python(&world, "download").is_none() {
        return;
    }
    world.hub.requests();
    world.ok("layer --save_outputs --output_dir online");
    nothing_was_fetched(&world.hub);
    let mut world = world;
    world.dir.set("HF_HUB_OFFLINE", "1");
    world.ok("layer --save_outputs --output_dir offline");
    assert!(world.hub.requests().is_empty());
    let expected = local_arrays("qwen2", &texts("qwen2"), "");
    assert_eq!(world.arrays("online"), expected);
    assert_eq!(world.arrays("offline"), expected);
    // And Python still finds everything in what the program has left.
    python(&world, "find");
}

/// The script's users go on as they were: same file name, same flags, a gated model, the wikitext of the defaults.
#[test]
fn a_job_of_the_scripts_runs_unchanged() {
    let Some(python) = env::var_os("GRADLENS_HUB_PYTHON") else {
        eprintln!("skipped: GRADLENS_HUB_PYTHON names no Python");
        return;
    };
    let (world, id) = (World::with_token(), "meta-llama/Llama-3.1-8B");
    world.hub.add(crate::content::model(id, "llama3").gated());
    world.hub.token(SECRET, &[id]);
    let mut command = world.dir.command(python);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/python/layer_gradient_analysis.py"));
    command.args(["--model_name", id, "--layers", "0,2", "--save_outputs"]);
    let run = world.dir.finish(command.env("GRADLENS_BIN", env!("CARGO_BIN_EXE_gradlens")));
    run.check(run.code == Some(0), "must succeed");
    let folder = world.dir.made("");
    let name = folder.file_name().unwrap().to_string_lossy().into_owned();
    let start = "layer_activations_model_meta-llama_Llama-3.1-8B_num_samples_500_batch_size_4_layers_0_2_";
    assert!(name.starts_with(start), "{name}");
    assert_eq!(world.arrays(""), local_arrays("llama3", &texts("qwen2"), "--layers 0,2"));
}
