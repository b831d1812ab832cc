//! Who gets to see the token: the hub, and nobody else. That it is in no output, in no file and never shown to the
//! content network is checked after every run of every test here; these have it in all the places it may come from.

use std::collections::BTreeSet;

use crate::content::{MODEL, model};
use crate::world::{SECRET, World};

/// What the hub was shown.
fn shown(world: &World) -> BTreeSet<Option<String>> {
    let requests = world.hub.requests();
    assert!(requests.iter().any(|request| request.cdn), "large files were fetched: {requests:#?}");
    requests.into_iter().filter(|request| !request.cdn).map(|request| request.authorization).collect()
}

fn bearer() -> BTreeSet<Option<String>> {
    BTreeSet::from([Some(format!("Bearer {SECRET}"))])
}

#[test]
fn from_the_environment() {
    // Copied with what is around it, as it comes out of files and secrets of build servers.
    for token in
        [SECRET.to_owned(), format!("{SECRET}\n"), format!("\r\n {SECRET}\r\n"), format!("  {SECRET}\t")]
    {
        let mut world = World::new();
        world.hub.token(SECRET, &[]);
        world.dir.set("HF_TOKEN", &token);
        world.ok("layer --save_outputs");
        assert_eq!(shown(&world), bearer(), "{token:?}");
    }
}

#[test]
fn from_the_token_file() {
    let world = World::new();
    world.hub.token(SECRET, &[]);
    world.dir.write("hf/token", format!("{SECRET}\n"));
    world.ok("layer --save_outputs");
    assert_eq!(shown(&world), bearer());
}

#[test]
fn the_environment_comes_before_the_file() {
    let mut world = World::new();
    world.hub.token(SECRET, &[]);
    world.dir.write("hf/token", "hf_another");
    world.dir.set("HF_TOKEN", SECRET);
    world.ok("layer --layers 0");
    assert_eq!(shown(&world), bearer());
}

#[test]
fn none_is_none() {
    for file in ["", "\n"] {
        let mut world = World::new();
        world.dir.set("HF_TOKEN", "");
        world.dir.write("hf/token", file);
        world.ok("layer --layers 0");
        assert_eq!(shown(&world), BTreeSet::from([None]));
    }
}

/// A line break inside must not become a header of its own.
#[test]
fn a_token_with_a_line_break_inside() {
    let mut world = World::new();
    world.hub.token(SECRET, &[]);
    let (start, end) = SECRET.split_at(10);
    for token in [format!("{start}\r\nX-Evil: {end}"), format!("{start}\n{end}")] {
        world.dir.set("HF_TOKEN", &token);
        let run = world.run("layer --layers 0");
        run.check(!run.stderr.contains(end), "must not print the token");
        // Refused by us, or joined as huggingface_hub does: never cut.
        for request in world.hub.requests() {
            let sent = request.authorization.unwrap_or_default();
            assert!(sent.is_empty() || sent.ends_with(end), "{sent:?}");
        }
    }
}

/// Every way of failing with a token has its text looked through.
#[test]
fn no_error_prints_it() {
    let world = World::with_token();
    world.hub.add(model("meta/gated", "yi").gated());
    world.fails("layer --model_name meta/gated", &[]);
    world.fails("layer --model_name no/model", &[]);
    world.fails("layer --revision nope", &[]);
    let mut wrong = World::new();
    wrong.dir.set("HF_TOKEN", SECRET);
    wrong.fails("layer", &[]);
    wrong.dir.write("hf/token", SECRET);
    wrong.dir.set("HF_TOKEN", "");
    wrong.fails("layer", &[]);
    wrong.dir.set("HF_ENDPOINT", "http://127.0.0.1:9");
    wrong.fails("layer", &["127.0.0.1:9"]);
}

/// In the address, as some write it: it must not come back in a message.
#[test]
fn a_password_in_the_endpoint_is_not_printed() {
    let mut world = World::new();
    let endpoint = world.hub.endpoint.replace("http://", &format!("http://user:{SECRET}@"));
    world.dir.set("HF_ENDPOINT", &endpoint);
    let run = world.run(&format!("layer --model_name {MODEL}"));
    run.check(!run.stderr.contains(SECRET), "must not print it");
}
