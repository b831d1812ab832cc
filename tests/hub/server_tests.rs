//! The loopback hub answers as the hub does, as far as that can be seen without a client.

use serde_json::Value;

use crate::content::{MODEL, TRAIN, WIKITEXT, model, texts, wikitext};
use crate::http::{Answer, ask};
use crate::repo::{Files, Kind};
use crate::server::{Fault, Hub, Place};

fn hub() -> Hub {
    let hub = Hub::start();
    hub.add(model(MODEL, "qwen2").commit("refs/pr/1", Files::new()));
    hub.add(wikitext(&texts("qwen2")));
    hub
}

fn json(answer: &Answer) -> Value {
    assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
    serde_json::from_slice(&answer.body).unwrap()
}

#[test]
fn facts_and_listings() {
    let hub = hub();
    let repository = hub.repository(Kind::Model, MODEL);
    let get = |path: &str| ask("GET", &format!("{}{path}", hub.endpoint), &[]);
    let info = json(&get(&format!("/api/models/{MODEL}/revision/main?blobs=true")));
    assert_eq!(info["id"], MODEL);
    assert_eq!(info["sha"], repository.sha("main"));
    let siblings = info["siblings"].as_array().unwrap();
    let file = |path: &str| siblings.iter().find(|sibling| sibling["rfilename"] == path).unwrap();
    let weights = &repository.files("main")["model.safetensors"];
    assert_eq!(file("model.safetensors")["lfs"]["sha256"], weights.etag());
    assert_eq!(file("model.safetensors")["size"], weights.bytes.len());
    assert_eq!(file("config.json")["blobId"], repository.files("main")["config.json"].etag());
    assert!(file("config.json").get("lfs").is_none());
    assert_eq!(json(&get(&format!("/api/models/{MODEL}")))["sha"], info["sha"]);
    // A branch with slashes is one part of the path.
    let branch = json(&get(&format!("/api/models/{MODEL}/revision/refs%2Fpr%2F1")));
    assert_eq!(branch["sha"], repository.sha("refs/pr/1"));
    let tree = json(&get(&format!("/api/datasets/{WIKITEXT}/tree/main?recursive=true")));
    let paths: Vec<&str> =
        tree.as_array().unwrap().iter().map(|entry| entry["path"].as_str().unwrap()).collect();
    assert!(paths.contains(&TRAIN) && paths.contains(&"wikitext-2-v1"), "{paths:?}");
    let top = json(&get(&format!("/api/datasets/{WIKITEXT}/tree/main")));
    assert_eq!(top.as_array().unwrap().len(), 6, "four folders and two files: {top}");
}

#[test]
fn files_and_ranges() {
    let hub = hub();
    let repository = hub.repository(Kind::Model, MODEL);
    let (small, large) =
        (&repository.files("main")["config.json"], &repository.files("main")["model.safetensors"]);
    let redirect = ask("HEAD", &format!("{}/{MODEL}/resolve/main/config.json", hub.endpoint), &[]);
    assert_eq!((redirect.status, redirect.header("x-repo-commit")), (307, repository.sha("main").as_str()));
    let url = format!("{}{}", hub.endpoint, redirect.header("location"));
    let answer = ask("GET", &url, &[]);
    assert_eq!((answer.status, &answer.body), (200, small.bytes.as_ref()));
    assert_eq!(answer.header("etag"), format!("\"{}\"", small.etag()));

    let redirect = ask("GET", &format!("{}/{MODEL}/resolve/main/model.safetensors", hub.endpoint), &[]);
    assert_eq!(redirect.status, 302);
    assert_eq!(redirect.header("x-linked-etag"), format!("\"{}\"", large.etag()));
    assert_eq!(redirect.header("x-linked-size"), large.bytes.len().to_string());
    let url = redirect.header("location");
    assert!(!url.starts_with(&hub.endpoint));
    assert_eq!(ask("GET", url, &[]).body, *large.bytes);
    let part = ask("GET", url, &[("Range", "bytes=100-199")]);
    assert_eq!((part.status, &part.body[..]), (206, &large.bytes[100..200]));
    assert_eq!(part.header("content-range"), format!("bytes 100-199/{}", large.bytes.len()));
    let rest = ask("GET", url, &[("range", "bytes=200000-")]);
    assert_eq!((rest.status, &rest.body[..]), (206, &large.bytes[200000..]));
    assert_eq!(ask("GET", url, &[("Range", "bytes=9999999-")]).status, 416);
    // The address opens as it was given only, and with no token.
    assert_eq!(ask("GET", &url.replace("Policy", "policy"), &[]).status, 403);
    assert!(!hub.cdn_saw_a_token());
    assert_eq!(ask("GET", url, &[("Authorization", "Bearer x")]).status, 400);
    assert!(hub.cdn_saw_a_token());
    let ranges: Vec<_> =
        hub.content_requests().into_iter().map(|request| (request.name, request.range)).collect();
    assert_eq!(ranges[0], ("config.json".into(), None));
    assert_eq!(ranges[2], ("model.safetensors".into(), Some("bytes=100-199".into())));
}

#[test]
fn refusals() {
    let hub = hub();
    hub.add(model("meta/gated", "yi").gated());
    hub.add(model("meta/private", "yi").private());
    hub.token("good", &["meta/gated", "meta/private"]);
    hub.token("other", &[]);
    for (path, token, status, code) in [
        ("/api/models/no/where", "", 401, "RepoNotFound"),
        ("/api/models/no/where", "good", 404, "RepoNotFound"),
        ("/api/models/Qwen/Qwen2.5-0.5B", "wrong", 401, ""),
        ("/api/models/Qwen/Qwen2.5-0.5B/revision/nope", "", 404, "RevisionNotFound"),
        ("/Qwen/Qwen2.5-0.5B/resolve/nope/config.json", "", 404, "RevisionNotFound"),
        ("/Qwen/Qwen2.5-0.5B/resolve/main/nope.json", "", 404, "EntryNotFound"),
        ("/api/models/meta/gated", "", 200, ""),
        ("/meta/gated/resolve/main/config.json", "", 401, "GatedRepo"),
        ("/meta/gated/resolve/main/config.json", "other", 403, "GatedRepo"),
        ("/meta/gated/resolve/main/config.json", "good", 307, ""),
        ("/api/models/meta/private", "", 401, "RepoNotFound"),
        ("/api/models/meta/private", "other", 404, "RepoNotFound"),
        ("/api/models/meta/private", "good", 200, ""),
    ] {
        let bearer = format!("Bearer {token}");
        let headers: &[_] = if token.is_empty() { &[] } else { &[("Authorization", bearer.as_str())] };
        let answer = ask("GET", &format!("{}{path}", hub.endpoint), headers);
        assert_eq!(answer.status, status, "{path} {token}");
        if !code.is_empty() {
            assert_eq!(answer.header("x-error-code"), code, "{path} {token}");
        }
    }
}

#[test]
fn faults() {
    let hub = hub();
    let file = hub.repository(Kind::Model, MODEL).files("main")["model.safetensors"].clone();
    let resolve = format!("{}/{MODEL}/resolve/main/model.safetensors", hub.endpoint);
    hub.fault(Place::Resolve, "model.safetensors", Fault::Status(429), 1);
    let late = ask("GET", &resolve, &[]);
    assert_eq!((late.status, late.header("retry-after")), (429, "1"));
    let redirect = ask("GET", &resolve, &[]);
    let url = redirect.header("location");
    let name = "model.safetensors";
    hub.fault(Place::Content, name, Fault::Status(503), 2);
    hub.fault(Place::Content, name, Fault::Cut(1000), 1);
    hub.fault(Place::Content, name, Fault::Short(7), 1);
    hub.fault(Place::Content, name, Fault::NoRange, 1);
    hub.fault(Place::Content, name, Fault::Corrupt, 1);
    assert_eq!([ask("GET", url, &[]).status, ask("GET", url, &[]).status], [503, 503]);
    let cut = ask("GET", url, &[]);
    assert_eq!((cut.header("content-length"), cut.body.len()), (file.bytes.len().to_string().as_str(), 1000));
    let short = ask("GET", url, &[]);
    assert_eq!((short.header("content-length"), short.body.len()), ("7", 7));
    let whole = ask("GET", url, &[("Range", "bytes=5-")]);
    assert_eq!((whole.status, whole.body.len()), (200, file.bytes.len()));
    let corrupt = ask("GET", url, &[]);
    assert!(corrupt.body.len() == file.bytes.len() && corrupt.body != *file.bytes);
    assert_eq!(ask("GET", url, &[]).body, *file.bytes);
    let log = hub.content_requests();
    assert_eq!(log.iter().map(|request| request.start()).collect::<Vec<_>>(), [0, 0, 0, 0, 5, 0, 0]);
    assert_eq!(
        log.iter().map(|request| request.status).collect::<Vec<_>>(),
        [503, 503, 200, 200, 200, 200, 200]
    );
    assert_eq!((log[2].sent, log[3].sent), (1000, 7));
}
