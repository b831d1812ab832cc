//! A working folder with its own Hugging Face home, a hub, and runs of the program between them. What must hold after
//! every run is checked after every run.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::content::{MODEL, WIKITEXT, model, texts, wikitext};
use crate::dir::{Dir, Run};
use crate::files;
use crate::hash;
use crate::repo::{Kind, Repository};
use crate::server::Hub;

/// A token that is easy to find wherever it should not be.
pub const SECRET: &str = "hf_ThisIsTheSecretOfTheTests0123456789";
/// Where [`Dir`] puts `HF_HOME`.
const HOME: &str = "hf";

pub struct World {
    pub dir: Dir,
    pub hub: Hub,
}

impl World {
    /// With a hub that has the model and the dataset of the defaults.
    pub fn new() -> Self {
        let world = Self::empty();
        world.hub.add(model(MODEL, "qwen2"));
        world.hub.add(wikitext(&texts("qwen2")));
        world
    }

    /// With a hub that has nothing.
    pub fn empty() -> Self {
        let (mut dir, hub) = (Dir::new(), Hub::start());
        dir.set("HF_ENDPOINT", &hub.endpoint);
        Self { dir, hub }
    }

    /// With a token that the hub knows, given through `HF_TOKEN`.
    pub fn with_token() -> Self {
        let mut world = Self::new();
        world.hub.token(SECRET, &[]);
        world.dir.set("HF_TOKEN", SECRET);
        world
    }

    /// Below the Hugging Face home.
    pub fn home(&self, name: &str) -> PathBuf {
        self.dir.path(HOME).join(name)
    }

    /// The model of the defaults, as the hub has it.
    pub fn model(&self) -> Repository {
        self.hub.repository(Kind::Model, MODEL)
    }

    pub fn dataset(&self) -> Repository {
        self.hub.repository(Kind::Dataset, WIKITEXT)
    }

    /// Runs the program; `args` are separated by blanks.
    #[track_caller]
    pub fn run(&self, args: &str) -> Run {
        let run = self.dir.run(args);
        self.check(&run);
        run
    }

    /// Runs what must succeed, and leave nothing half done.
    #[track_caller]
    pub fn ok(&self, args: &str) -> Run {
        let run = self.run(args);
        run.check(run.code == Some(0), "must succeed");
        let left = self.cache().into_iter().find(|(path, _)| path.ends_with(".incomplete"));
        run.check(left.is_none(), &format!("must leave nothing half done: {left:?}"));
        run
    }

    /// Runs what must fail with an error of ours that holds every text of `says`, and saves no results.
    #[track_caller]
    pub fn fails(&self, args: &str, says: &[&str]) -> Run {
        self.ends(1, args, says)
    }

    /// The same for what is the command line's fault.
    #[track_caller]
    pub fn misuse(&self, args: &str, says: &[&str]) -> Run {
        self.ends(2, args, says)
    }

    #[track_caller]
    fn ends(&self, code: i32, args: &str, says: &[&str]) -> Run {
        let run = self.run(args);
        run.check(run.code == Some(code), &format!("must end with {code}"));
        // Progress may have come before.
        let at = run.stderr.lines().position(|line| line.starts_with("error: "));
        run.check(at.is_some(), "must have a line that begins with `error: `");
        run.check(run.stdout.is_empty(), "must leave stdout alone");
        for text in says {
            run.err(text);
        }
        let saved = self.dir.listing().into_iter().find(|name| name.starts_with("layer_activations_"));
        run.check(saved.is_none(), "must save no results");
        run
    }

    /// What holds after every run, whatever came of it.
    #[track_caller]
    fn check(&self, run: &Run) {
        run.check(!run.stderr.contains("panicked"), "must not panic");
        run.check(!self.hub.cdn_saw_a_token(), "must not show the token to another host");
        for text in [&run.stdout, &run.stderr] {
            run.check(!text.contains(SECRET), "must not print the token");
        }
        for (path, bytes) in read_all(&self.dir.path("")) {
            let found = bytes.windows(SECRET.len()).any(|window| window == SECRET.as_bytes());
            run.check(!found || path == Path::new(HOME).join("token"), &format!("the token is in {path:?}"));
        }
        let home = names(&self.dir.path(HOME));
        run.check(home.iter().all(|name| ["hub", "token"].contains(&name.as_str())), &format!("{home:?}"));
        check_cache(&self.home("hub"));
    }

    /// Everything in the cache: path → what a link points to, or nothing for a file.
    pub fn cache(&self) -> BTreeMap<String, Option<String>> {
        list(&self.home("hub"))
    }

    /// Whether the cache has a blob of this file of `repository`, whole or in part.
    #[track_caller]
    pub fn has_blob(&self, repository: &Repository, path: &str) -> bool {
        let etag = repository.files("main")[path].etag();
        let start = format!("{}/blobs/{etag}", repository.folder());
        self.cache().keys().any(|path| path.starts_with(&start))
    }

    /// The arrays of the one results folder in `parent`.
    #[track_caller]
    pub fn arrays(&self, parent: &str) -> BTreeMap<String, Vec<u8>> {
        files::numbers(&self.dir.made(parent))
    }
}

/// The arrays of a run on a golden and on texts that lie on this machine.
#[track_caller]
pub fn local_arrays(golden: &str, texts: &[String], flags: &str) -> BTreeMap<String, Vec<u8>> {
    let dir = Dir::with(golden);
    dir.write("texts.jsonl", crate::content::json_lines(texts));
    dir.ok(&format!("layer --model_name model --dataset texts.jsonl --save_outputs {flags}"));
    let arrays = files::numbers(&dir.made(""));
    assert!(arrays.len() > 1, "{:?}", arrays.keys());
    arrays
}

fn names(folder: &Path) -> Vec<String> {
    if folder.is_dir() { files::names(folder) } else { Vec::new() }
}

/// Path → content of every file below `folder`; links are not followed.
fn read_all(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let all = list(folder).into_iter().filter(|(_, link)| link.is_none());
    all.map(|(path, _)| (path.clone().into(), fs::read(folder.join(path)).unwrap())).collect()
}

/// Path, with `/`, → target of a link, of everything below `folder` but folders.
fn list(folder: &Path) -> BTreeMap<String, Option<String>> {
    let mut found = BTreeMap::new();
    for name in names(folder) {
        let path = folder.join(&name);
        let about = path.symlink_metadata().unwrap();
        if about.is_symlink() {
            found.insert(name, Some(fs::read_link(path).unwrap().to_str().unwrap().to_owned()));
        } else if about.is_dir() {
            found.extend(list(&path).into_iter().map(|(below, link)| (format!("{name}/{below}"), link)));
        } else {
            found.insert(name, None);
        }
    }
    found
}

/// The layout that huggingface_hub documents, and that a file which can be seen is whole: every blob hashes to its
/// name, every snapshot consists of relative links to blobs, every branch is the hash of a commit.
#[track_caller]
pub fn check_cache(hub: &Path) {
    for (path, link) in list(hub) {
        let parts: Vec<&str> = path.split('/').collect();
        let text = || fs::read_to_string(hub.join(&path)).unwrap();
        match parts.as_slice() {
            ["CACHEDIR.TAG" | "version.txt"] => assert!(link.is_none(), "{path}"),
            [".locks", folder, lock] => assert!(is_repository(folder) && lock.ends_with(".lock"), "{path}"),
            [folder, "blobs", blob] if is_repository(folder) => {
                assert!(link.is_none(), "{path} is a link");
                if blob.ends_with(".incomplete") {
                    continue;
                }
                let bytes = fs::read(hub.join(&path)).unwrap();
                assert_eq!(*blob, hash::etag(&bytes, blob.len() == 64), "the content of {path} is another");
            }
            [folder, "refs", _, ..] if is_repository(folder) => {
                assert!(is_commit(&text()), "{path} holds {:?}", text());
            }
            [folder, "snapshots", commit, below @ ..] if is_repository(folder) && !below.is_empty() => {
                assert!(is_commit(commit), "{path}");
                let link = link.unwrap_or_else(|| panic!("{path} is no link"));
                let blob = link.strip_prefix(&format!("{}blobs/", "../".repeat(below.len() + 1)));
                let blob = blob.unwrap_or_else(|| panic!("{path} points to {link}"));
                assert!([40, 64].contains(&blob.len()), "{path} points to {link}");
                assert!(hub.join(folder).join("blobs").join(blob).is_file(), "{path} points to nothing");
            }
            [folder, ".no_exist", commit, _, ..] if is_repository(folder) => {
                assert!(is_commit(commit) && text().is_empty(), "{path}");
            }
            // Listings, as newer versions keep them.
            [folder, "trees", listing] if is_repository(folder) => {
                assert!(is_commit(listing.trim_end_matches(".json")), "{path}");
            }
            _ => panic!("{path} is no part of a cache"),
        }
    }
}

fn is_repository(folder: &str) -> bool {
    folder.starts_with("models--") || folder.starts_with("datasets--")
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}
