//! Servers that fail, connections that end, content that is wrong.

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::content::{MODEL, TRAIN, texts};
use crate::repo::{Content, Kind, Repository};
use crate::server::{Fault, Place};
use crate::world::{World, local_arrays};

const WEIGHTS: &str = "model.safetensors";
const FOREVER: usize = usize::MAX;

/// The results of the defaults are there and right.
#[track_caller]
fn is_right(world: &World) {
    assert_eq!(world.arrays(""), local_arrays("qwen2", &texts("qwen2"), ""));
}

/// The weights are not to be seen, and once the hub is well a run succeeds.
#[track_caller]
fn nothing_is_seen_and_it_heals(world: &World) {
    assert!(!world.cache().keys().any(|path| path.contains("/snapshots/") && path.ends_with(WEIGHTS)));
    world.hub.heal();
    world.ok("layer --save_outputs");
    is_right(world);
}

#[test]
fn a_server_that_fails_and_recovers() {
    let world = World::with_token();
    world.hub.fault(Place::Api, MODEL, Fault::Status(500), 1);
    world.hub.fault(Place::Resolve, "config.json", Fault::Status(503), 1);
    world.hub.fault(Place::Content, WEIGHTS, Fault::Status(500), 2);
    world.hub.fault(Place::Content, TRAIN, Fault::Status(503), 1);
    world.ok("layer --save_outputs");
    is_right(&world);
}

#[test]
fn a_server_that_fails_for_good() {
    for (place, name) in [(Place::Api, MODEL), (Place::Resolve, WEIGHTS), (Place::Content, WEIGHTS)] {
        let world = World::with_token();
        world.hub.fault(place, name, Fault::Status(500), FOREVER);
        world.fails("layer --save_outputs", &["500", "hint: "]);
        nothing_is_seen_and_it_heals(&world);
    }
}

/// Who asks too often is told when to come back.
#[test]
fn a_server_that_is_asked_too_often() {
    let world = World::with_token();
    world.hub.fault(Place::Resolve, WEIGHTS, Fault::Status(429), 1);
    let start = Instant::now();
    world.ok("layer --save_outputs");
    assert!(start.elapsed() >= Duration::from_secs(1), "must wait for as long as it was told");
    is_right(&world);
}

#[test]
fn a_connection_that_ends_is_taken_up_again() {
    let world = World::with_token();
    world.hub.fault(Place::Content, WEIGHTS, Fault::Cut(100_000), 1);
    world.hub.fault(Place::Content, TRAIN, Fault::Cut(100), 1);
    world.ok("layer --save_outputs");
    is_right(&world);
    let fetched = world.hub.content_requests();
    for (name, cut) in [(WEIGHTS, 100_000), (TRAIN, 100)] {
        let starts: Vec<usize> =
            fetched.iter().filter(|request| request.name == name).map(|request| request.start()).collect();
        assert_eq!(starts, [0, cut], "{name}");
    }
}

/// The same when the program ended in between.
#[test]
fn a_later_run_takes_up_where_the_last_one_ended() {
    let world = World::with_token();
    world.hub.fault(Place::Content, WEIGHTS, Fault::Cut(100_000), 1);
    world.hub.fault(Place::Content, WEIGHTS, Fault::Status(500), FOREVER);
    world.fails("layer --save_outputs", &["500"]);
    world.hub.heal();
    world.hub.requests();
    world.ok("layer --save_outputs");
    is_right(&world);
    let fetched = world.hub.content_requests();
    let weights: Vec<_> = fetched.iter().filter(|request| request.name == WEIGHTS).collect();
    assert_eq!(weights.iter().map(|request| request.start()).collect::<Vec<_>>(), [100_000], "{weights:#?}");
}

/// What was left of another version of the file is not continued.
#[test]
fn a_file_that_changed_in_between_is_fetched_whole() {
    let world = World::with_token();
    world.hub.fault(Place::Content, WEIGHTS, Fault::Cut(100_000), 1);
    world.hub.fault(Place::Content, WEIGHTS, Fault::Status(500), FOREVER);
    world.fails("layer --save_outputs", &["500"]);
    world.hub.heal();
    world.hub.add(world.model().commit("main", crate::content::golden("yi")));
    // The leavings of the file before are nobody's business here.
    let run = world.run("layer --save_outputs");
    run.check(run.code == Some(0), "must succeed");
    assert_eq!(world.arrays(""), local_arrays("yi", &texts("qwen2"), ""));
}

/// A server, or something before it, that does not know ranges sends the file from its start.
#[test]
fn a_range_that_is_not_understood() {
    let world = World::with_token();
    world.hub.fault(Place::Content, WEIGHTS, Fault::Cut(100_000), 1);
    world.hub.fault(Place::Content, WEIGHTS, Fault::NoRange, FOREVER);
    world.ok("layer --save_outputs");
    is_right(&world);
}

/// The program notices by itself; how soon is what huggingface_hub's variable says.
#[test]
fn a_connection_that_falls_silent() {
    let mut world = World::with_token();
    world.dir.set("HF_HUB_DOWNLOAD_TIMEOUT", "1");
    world.hub.fault(Place::Content, WEIGHTS, Fault::Stall(100_000), 1);
    let start = Instant::now();
    world.ok("layer --save_outputs");
    assert!(start.elapsed() < Duration::from_secs(120));
    is_right(&world);
}

/// Ctrl-C while nothing comes: the program does not wait for the silence to end, and the next one goes on from there.
#[cfg(unix)]
#[test]
fn a_download_that_is_interrupted() {
    let mut world = World::with_token();
    world.dir.set("HF_HUB_DOWNLOAD_TIMEOUT", "60");
    world.hub.fault(Place::Content, WEIGHTS, Fault::Stall(100_000), FOREVER);
    let mut command = world.dir.command(env!("CARGO_BIN_EXE_gradlens"));
    command.args(["layer", "--save_outputs"]).stdout(Stdio::null()).stderr(Stdio::null());
    let mut program = command.spawn().unwrap();
    while !world.hub.content_requests().iter().any(|request| request.name == WEIGHTS) {
        assert!(program.try_wait().unwrap().is_none(), "it ended before it came to the weights");
        thread::sleep(Duration::from_millis(10));
    }
    // Time for what was sent to arrive.
    thread::sleep(Duration::from_millis(300));
    let pid = program.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let start = Instant::now();
    let status = program.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    assert!(start.elapsed() < Duration::from_secs(2), "after {:?}", start.elapsed());
    world.hub.heal();
    world.hub.requests();
    world.ok("layer --save_outputs");
    is_right(&world);
    let fetched = world.hub.content_requests();
    let weights: Vec<_> = fetched.iter().filter(|request| request.name == WEIGHTS).collect();
    assert_eq!(weights.iter().map(|request| request.start()).collect::<Vec<_>>(), [100_000], "{weights:#?}");
}

#[test]
fn a_file_of_the_wrong_size() {
    for (name, bytes) in [(WEIGHTS, 1000), (WEIGHTS, 0), ("config.json", 10)] {
        let world = World::with_token();
        world.hub.fault(Place::Content, name, Fault::Short(bytes), FOREVER);
        let run = world.fails("layer --save_outputs", &[name, "expected"]);
        run.check(!world.cache().keys().any(|path| path.ends_with(&format!("/{name}"))), "must not be seen");
        world.hub.heal();
        world.ok("layer --save_outputs");
        is_right(&world);
    }
}

/// An answer that ends in order and brings nothing new is a failed attempt, however often it comes.
#[test]
fn an_answer_that_brings_nothing_new() {
    let world = World::with_token();
    world.hub.fault(Place::Content, WEIGHTS, Fault::NoLength(1000), FOREVER);
    world.fails("layer --save_outputs", &[WEIGHTS, "expected", "hint: "]);
    let asked = world.hub.content_requests();
    assert!(asked.iter().filter(|request| request.name == WEIGHTS).count() < 20, "{asked:#?}");
    nothing_is_seen_and_it_heals(&world);
}

/// What came before may be damaged, as by a power cut: then the file is fetched once more, from its start.
#[test]
fn a_damaged_part_of_a_download() {
    let world = World::with_token();
    let (model, weights) = (world.model(), world.model().files("main")[WEIGHTS].clone());
    let part = world.home(&format!("hub/{}/blobs/{}.incomplete", model.folder(), weights.etag()));
    std::fs::create_dir_all(part.parent().unwrap()).unwrap();
    std::fs::write(&part, vec![0; weights.bytes.len() / 2]).unwrap();
    world.ok("layer --save_outputs");
    is_right(&world);
}

/// The hub announces more than there is.
#[test]
fn a_size_that_is_not_true() {
    let world = World::with_token();
    let mut files = world.model().files("main").clone();
    let real = files[WEIGHTS].clone();
    let more = Some(real.size() + 5);
    files.insert(WEIGHTS.into(), Content { claimed: more, ..real });
    world.hub.add(Repository::new(Kind::Model, MODEL, files));
    world.fails("layer --save_outputs", &[WEIGHTS]);
    assert!(!world.cache().keys().any(|path| path.contains("/snapshots/") && path.ends_with(WEIGHTS)));
}

#[test]
fn content_that_is_corrupt() {
    for name in [WEIGHTS, TRAIN] {
        let world = World::with_token();
        world.hub.fault(Place::Content, name, Fault::Corrupt, FOREVER);
        let repository = if name == WEIGHTS { world.model() } else { world.dataset() };
        let etag = repository.files("main")[name].etag();
        // What was announced is named, to be compared with what came.
        world.fails("layer --save_outputs", &[name, &etag]);
        assert!(!world.has_blob(&repository, name), "{:#?}", world.cache());
        world.hub.heal();
        world.ok("layer --save_outputs");
        is_right(&world);
    }
}

/// More than any disk has: found before the first byte is fetched.
#[test]
fn a_model_that_does_not_fit_the_disk() {
    let world = World::with_token();
    let mut files = world.model().files("main").clone();
    let real = files[WEIGHTS].clone();
    files.insert(WEIGHTS.into(), Content { claimed: Some(1 << 50), ..real });
    world.hub.add(Repository::new(Kind::Model, MODEL, files));
    world.fails("layer --save_outputs", &["TiB", "expected: ", "found:    ", "free"]);
    let fetched = world.hub.content_requests();
    assert!(!fetched.iter().any(|request| request.name == WEIGHTS), "{fetched:#?}");
}
