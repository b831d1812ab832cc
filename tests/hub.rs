//! The program and the Hugging Face hub, on a hub of our own on this machine. One file per question:
//!
//! * `download`: what is fetched, where it lies, and that results do not depend on where the files came from
//! * `revisions`: branches and commits
//! * `datasets`: configurations, splits and kinds of file
//! * `faults`: servers that fail, connections that end, content that is wrong
//! * `refusals`: what the hub does not have or does not give, and repositories that mean harm
//! * `offline`: the cache without the hub, and `gradlens fetch`
//! * `sae`: SAEs on the hub
//! * `tls`: encrypted connections, and whom they trust
//! * `token`: who gets to see it
//! * `python`: the cache is the same for huggingface_hub
//!
//! and `server` with its parts is that hub, `content` what is on it, `world` a run between the two.
#![allow(clippy::unwrap_used)]

#[path = "hub/answers.rs"]
mod answers;
#[path = "hub/content.rs"]
mod content;
#[path = "hub/datasets.rs"]
mod datasets;
#[path = "cli/dir.rs"]
#[allow(dead_code, reason = "the tests of the command line use the rest")]
mod dir;
#[path = "hub/download.rs"]
mod download;
#[path = "hub/faults.rs"]
mod faults;
#[path = "cli/files.rs"]
#[allow(dead_code, reason = "the tests of the command line use the rest")]
mod files;
#[path = "hub/hash.rs"]
mod hash;
#[path = "hub/http.rs"]
mod http;
#[path = "hub/offline.rs"]
mod offline;
#[path = "hub/python.rs"]
mod python;
#[path = "hub/refusals.rs"]
mod refusals;
#[path = "hub/repo.rs"]
mod repo;
#[path = "hub/revisions.rs"]
mod revisions;
#[path = "hub/sae.rs"]
mod sae;
#[path = "hub/server.rs"]
mod server;
#[path = "hub/server_tests.rs"]
mod server_tests;
#[path = "hub/tls.rs"]
mod tls;
#[path = "hub/token.rs"]
mod token;
#[path = "hub/world.rs"]
mod world;
