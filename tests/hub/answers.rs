//! What the loopback hub answers to which request.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::hash;
use crate::http::{Head, Reply, encode};
use crate::repo::{Content, Files, Kind, Repository};
use crate::server::{Fault, Place, State, spoil};

/// Place, name for the log, and the answer.
pub fn answer(state: &State, head: &Head, cdn: bool) -> (Place, String, Reply) {
    let (parts, query) = head.parts();
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    match parts.as_slice() {
        _ if cdn => large_file(state, head, &parts.join("/"), query),
        ["api", "resolve-cache", kind, owner, name, sha, path @ ..] if !path.is_empty() => {
            let path = path.join("/");
            let reply = match open(state, head, kind_of(kind), &format!("{owner}/{name}"), true) {
                Ok(repository) => small_file(state, head, &repository, sha, &path),
                Err(refusal) => refusal,
            };
            (Place::Content, path, reply)
        }
        ["api", kind @ ("models" | "datasets"), rest @ ..] => {
            let end = rest.iter().position(|part| ["revision", "tree"].contains(part)).unwrap_or(rest.len());
            let id = rest[..end].join("/");
            let reply = failure(state, Place::Api, &id).unwrap_or_else(|| {
                match open(state, head, kind_of(kind), &id, false) {
                    Ok(repository) => api(head, &repository, &rest[end..], query),
                    Err(refusal) => refusal,
                }
            });
            (Place::Api, id, reply)
        }
        _ => {
            let (kind, rest) = match parts.as_slice() {
                ["datasets", rest @ ..] => (Kind::Dataset, rest),
                rest => (Kind::Model, rest),
            };
            let Some(at) = rest.iter().position(|part| *part == "resolve").filter(|at| at + 2 < rest.len())
            else {
                return (Place::Api, String::new(), error(404, "", "Sorry, we can't find the page"));
            };
            let path = rest[at + 2..].join("/");
            let reply = failure(state, Place::Resolve, &path).unwrap_or_else(|| {
                match open(state, head, kind, &rest[..at].join("/"), true) {
                    Ok(repository) => redirect(state, &repository, rest[at + 1], &path),
                    Err(refusal) => refusal,
                }
            });
            (Place::Resolve, path, reply)
        }
    }
}

fn kind_of(plural: &str) -> Kind {
    if plural == "datasets" { Kind::Dataset } else { Kind::Model }
}

fn error(status: u16, code: &str, message: &str) -> Reply {
    let reply = Reply::new(status, json!({ "error": message }).to_string())
        .header("Content-Type", "application/json")
        .header("X-Error-Message", message);
    if code.is_empty() { reply } else { reply.header("X-Error-Code", code) }
}

/// A whole answer that is a fault.
fn failure(state: &State, place: Place, name: &str) -> Option<Reply> {
    status(state.fault(place, name)?)
}

fn status(fault: Fault) -> Option<Reply> {
    let Fault::Status(status) = fault else { return None };
    let reply = error(status, "", "Something went wrong");
    Some(if status == 429 { reply.header("Retry-After", "1") } else { reply })
}

/// The repository, or why this request may not see it (`files`: its files).
fn open(state: &State, head: &Head, kind: Kind, id: &str, files: bool) -> Result<Repository, Reply> {
    let token = head.header("authorization");
    let opens = match token {
        Some(token) => {
            let known = state.tokens.lock().unwrap();
            let opens = token.strip_prefix("Bearer ").and_then(|token| known.get(token).cloned());
            opens.ok_or_else(|| error(401, "", "Invalid credentials in Authorization header"))?
        }
        None => Vec::new(),
    };
    let all = state.repositories.lock().unwrap();
    let found = all.iter().find(|repository| repository.kind == kind && repository.id == id);
    let opened = opens.iter().any(|opened| opened == id);
    match found {
        // To who may not know, a private repository is none, and to who gives no token none is said to be.
        None if token.is_none() => Err(error(401, "RepoNotFound", "Invalid username or password.")),
        Some(found) if found.private && !opened && token.is_none() => {
            Err(error(401, "RepoNotFound", "Invalid username or password."))
        }
        None => Err(error(404, "RepoNotFound", "Repository not found")),
        Some(found) if found.private && !opened => Err(error(404, "RepoNotFound", "Repository not found")),
        Some(found) if files && found.gated && !opened => {
            let restricted = format!("Access to {} {id} is restricted", kind.plural().trim_end_matches('s'));
            Err(match token {
                None => error(
                    401,
                    "GatedRepo",
                    &format!(
                        "{restricted}. You must have access to it and be authenticated to access it. Please log in."
                    ),
                ),
                Some(_) => error(
                    403,
                    "GatedRepo",
                    &format!(
                        "{restricted} and you are not in the authorized list. Visit its page to ask for access."
                    ),
                ),
            })
        }
        Some(found) => Ok(found.clone()),
    }
}

fn no_revision(revision: &str) -> Reply {
    error(404, "RevisionNotFound", &format!("Invalid rev id: {revision}"))
}

/// Files that the facts about a repository, and a page of its listing, have at most.
const PAGE: usize = 1000;

/// `rest` is what follows the id: `revision/{revision}`, `tree/{revision}/{folder}`, or nothing.
fn api(head: &Head, repository: &Repository, rest: &[&str], query: &str) -> Reply {
    let revision = rest.get(1).copied().unwrap_or("main");
    let Some((sha, files)) = repository.resolve(revision) else { return no_revision(revision) };
    let flag = |name: &str| query.split('&').any(|pair| pair.eq_ignore_ascii_case(&format!("{name}=true")));
    let json = |body: Value| {
        Reply::new(200, body.to_string()).header("Content-Type", "application/json; charset=utf-8")
    };
    if rest.first() != Some(&"tree") {
        return json(info(repository, sha, files, flag("blobs")));
    }
    let entries = tree(files, &rest[2..].join("/"), flag("recursive"));
    let cursor = query.split('&').find_map(|pair| pair.strip_prefix("cursor=")?.parse().ok()).unwrap_or(0);
    let page = json(entries.iter().skip(cursor).take(PAGE).cloned().collect());
    if cursor + PAGE >= entries.len() {
        return page;
    }
    let path = head.target.split('?').next().unwrap();
    let host = head.header("host").unwrap();
    let flags = if flag("recursive") { "recursive=true&" } else { "" };
    page.header("Link", format!("<http://{host}{path}?{flags}cursor={}>; rel=\"next\"", cursor + PAGE))
}

/// Bytes of the pointer that stands in Git for a large file.
fn pointer_size(content: &Content) -> usize {
    120 + content.size().to_string().len()
}

fn info(repository: &Repository, sha: &str, files: &Files, blobs: bool) -> Value {
    let sibling = |(path, content): (&String, &Content)| {
        let mut sibling = json!({ "rfilename": path });
        if blobs {
            sibling["size"] = json!(content.size());
            sibling["blobId"] = json!(blob_id(content));
            if content.lfs {
                let (sha256, size) = (content.etag(), content.size());
                sibling["lfs"] =
                    json!({ "sha256": sha256, "size": size, "pointerSize": pointer_size(content) });
            }
        }
        sibling
    };
    json!({
        "_id": &sha[..24],
        "id": repository.id,
        "author": repository.id.split('/').next(),
        "sha": sha,
        "lastModified": "2024-09-25T12:32:56.000Z",
        "private": repository.private,
        "gated": if repository.gated { json!("manual") } else { json!(false) },
        "disabled": false,
        "tags": ["safetensors", "region:us"],
        "downloads": 12_345,
        "likes": 67,
        // Of larger repositories they are not all.
        "siblings": files.iter().map(sibling).take(PAGE).collect::<Vec<Value>>(),
    })
}

/// Git's id of what Git holds: of a large file its pointer.
fn blob_id(content: &Content) -> String {
    if !content.lfs {
        return content.etag();
    }
    let (sha256, size) = (content.etag(), content.size());
    let pointer = format!("version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n");
    hash::etag(pointer.as_bytes(), false)
}

fn tree(files: &Files, folder: &str, recursive: bool) -> Vec<Value> {
    let start = if folder.is_empty() { String::new() } else { format!("{folder}/") };
    let mut folders = BTreeSet::new();
    let mut entries = Vec::new();
    for (path, content) in files {
        let Some(rest) = path.strip_prefix(&start) else { continue };
        let parents = rest.match_indices('/').map(|(at, _)| &path[..start.len() + at]);
        folders.extend(parents.take(if recursive { usize::MAX } else { 1 }));
        if !recursive && rest.contains('/') {
            continue;
        }
        let mut entry =
            json!({ "type": "file", "oid": blob_id(content), "size": content.size(), "path": path });
        if content.lfs {
            let (oid, size) = (content.etag(), content.size());
            entry["lfs"] = json!({ "oid": oid, "size": size, "pointerSize": pointer_size(content) });
        }
        entries.push(entry);
    }
    let folder = |path: &str| json!({ "type": "directory", "oid": hash::sha1(path.as_bytes()), "size": 0, "path": path });
    folders.into_iter().map(folder).chain(entries).collect()
}

/// Where a file is: a small one elsewhere on the hub, a large one on the other host.
fn redirect(state: &State, repository: &Repository, revision: &str, path: &str) -> Reply {
    let Some((sha, files)) = repository.resolve(revision) else { return no_revision(revision) };
    let Some(content) = files.get(path) else {
        return error(404, "EntryNotFound", "Entry not found").header("X-Repo-Commit", sha);
    };
    let (id, kind) = (&repository.id, repository.kind.plural());
    if !content.lfs {
        // With a query, as the hub has one; an address in it makes no absolute address of this one.
        let query = "from=https://example.org/x&etag=%22y%22";
        let location = format!("/api/resolve-cache/{kind}/{id}/{sha}/{}?{query}", encode(path, "/"));
        return Reply::new(307, format!("Temporary Redirect. Redirecting to {location}"))
            .header("X-Repo-Commit", sha)
            .header("Location", location);
    }
    let place = format!("repos/{}/{}", hash::sha1(format!("{kind}/{id}/{path}").as_bytes()), content.etag());
    let location = format!("{}/{place}?{}", state.cdn, signature(&place));
    state.large.lock().unwrap().insert(place, (path.to_owned(), content.clone()));
    Reply::new(302, "Found. Redirecting")
        .header("X-Repo-Commit", sha)
        .header("X-Linked-Size", content.size().to_string())
        .header("X-Linked-ETag", format!("\"{}\"", content.etag()))
        .header("Accept-Ranges", "bytes")
        .header("Location", location)
}

/// The query that opens a place on the second port, with the characters that such queries have.
fn signature(place: &str) -> String {
    let name = encode("inline; filename*=UTF-8''a b.bin; filename=\"a b.bin\";", "");
    let signature = hash::sha1(format!("signed {place}").as_bytes());
    format!("response-content-disposition={name}&Expires=1767225600&Policy=eyJ9~-__&Signature={signature}__")
}

fn small_file(state: &State, head: &Head, repository: &Repository, sha: &str, path: &str) -> Reply {
    let Some((sha, content)) = repository.resolve(sha).and_then(|(sha, files)| Some((sha, files.get(path)?)))
    else {
        return error(404, "EntryNotFound", "Entry not found");
    };
    bytes(state, head, path, content)
        .header("ETag", format!("\"{}\"", content.etag()))
        .header("X-Repo-Commit", sha)
}

fn large_file(state: &State, head: &Head, place: &str, query: &str) -> (Place, String, Reply) {
    let found = state.large.lock().unwrap().get(place).cloned();
    let Some((path, content)) = found.filter(|_| query == signature(place)) else {
        return (Place::Content, String::new(), Reply::new(403, "<Error><Code>AccessDenied</Code></Error>"));
    };
    // A signed address and a token are two kinds of credentials, and such hosts refuse both at once.
    let reply = match head.header("authorization") {
        Some(_) => Reply::new(400, "<Error><Code>InvalidArgument</Code></Error>"),
        // Its entity tag is its own: neither the hub's nor a hash of the content.
        None => bytes(state, head, &path, &content).header("ETag", "\"0123456789abcdef-5\""),
    };
    (Place::Content, path, reply)
}

/// The bytes of a file, or those that `Range` asks for.
fn bytes(state: &State, head: &Head, path: &str, content: &Content) -> Reply {
    let fault = if head.method == "GET" { state.fault(Place::Content, path) } else { None };
    if let Some(reply) = fault.and_then(status) {
        return reply;
    }
    let mut whole = content.bytes.to_vec();
    if matches!(fault, Some(Fault::Corrupt)) {
        let middle = whole.len() / 2;
        whole[middle] ^= 0x10;
    }
    if let Some(Fault::Short(bytes) | Fault::NoLength(bytes)) = fault {
        whole.truncate(bytes);
    }
    let length = whole.len();
    let range = head.header("range").filter(|_| !matches!(fault, Some(Fault::NoRange | Fault::NoLength(_))));
    let reply = match range.and_then(|range| range.strip_prefix("bytes=")?.split_once('-')) {
        None => Reply::new(200, whole),
        Some((start, end)) => {
            let start: usize = start.parse().unwrap_or(usize::MAX);
            let end = end.parse().map_or(length, |last: usize| (last + 1).min(length));
            if start >= end {
                return Reply::new(416, "").header("Content-Range", format!("bytes */{length}"));
            }
            Reply::new(206, &whole[start..end])
                .header("Content-Range", format!("bytes {start}-{}/{length}", end - 1))
        }
    };
    spoil(reply.header("Accept-Ranges", "bytes").header("Content-Type", "application/octet-stream"), fault)
}
