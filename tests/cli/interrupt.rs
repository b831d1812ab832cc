//! Ctrl-C and `kill`: the run stops at once, says what was done, and leaves nothing behind.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::dir::Dir;

/// From the signal to the end of the process.
const REACTION: Duration = Duration::from_secs(2);

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args(["-s", name, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

/// Sends a signal to a program that is at work, and checks the way it ends. `stderr` is what it has not said yet.
#[track_caller]
fn end(mut child: Child, name: &str, code: i32, stderr: &mut dyn Read) -> String {
    let sent = Instant::now();
    signal(&child, name);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if sent.elapsed() > 10 * REACTION {
            child.kill().unwrap();
            panic!("it goes on after {name}");
        }
        sleep(Duration::from_millis(5));
    };
    let took = sent.elapsed();
    let mut said = String::new();
    stderr.read_to_string(&mut said).unwrap();
    assert_eq!(status.code(), Some(code), "{said}");
    assert!(took < REACTION, "{took:?}");
    assert!(said.contains("error: interrupted\n  found:    "), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

/// Minutes of work for the tiny model.
fn long_dataset(dir: &Dir) {
    dir.write("long.jsonl", dir.read("model/corpus.jsonl").repeat(40_000));
}

#[test]
fn ctrl_c_while_computing() {
    let dir = Dir::with("qwen2");
    long_dataset(&dir);
    let before = dir.listing();
    let args = "layer --model_name model --dataset long.jsonl --aggregate_by gradients --num_samples 1000000";
    let mut quiet = dir.start(&format!("{args} --quiet --save_outputs"));
    let mut child =
        dir.start(&format!("{args} --save_outputs --output_dir new/results --save_consolidated run"));
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    // Where stderr is no terminal, the first line of progress comes after some seconds.
    let mut line = String::new();
    while !line.starts_with("computing: ") {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0, "it ended by itself");
    }
    for text in [" of 1,000,000 samples, ", " tokens/s, about ", " left\n"] {
        assert!(line.contains(text), "{line}");
    }
    assert!(dir.path("new/results").is_dir());
    let saved = dir.listing().len();
    let mut silence = quiet.stderr.take().unwrap();
    let quiet = end(quiet, "INT", 130, &mut silence);
    assert!(quiet.starts_with("error: interrupted"), "{quiet}");
    assert!(dir.listing().len() < saved, "of two runs in one folder each removes its own");
    let said = end(child, "INT", 130, &mut stderr);
    assert_eq!(dir.listing(), before, "nothing stays behind");
    let found = said.split("found:    ").nth(1).unwrap();
    assert!(
        found.contains(" of 1,000,000 samples done, ") && found.contains("; nothing was saved"),
        "{said}"
    );
    assert!(!found.starts_with("0 of"), "{said}");
}

/// A pipe that nobody writes to holds the reading thread where no signal reaches it.
#[test]
fn while_waiting_for_texts() {
    let dir = Dir::with("qwen2");
    let made = Command::new("mkfifo").arg(dir.path("pipe.jsonl")).status().unwrap();
    assert!(made.success());
    let before = dir.listing();
    for (flags, name, code, found) in [
        (
            "--save_outputs --output_dir new/results",
            "TERM",
            143,
            "0 of 500 samples done, 0 tokens; nothing was saved",
        ),
        ("--save_outputs --output_dir new/results", "INT", 130, "0 of 500 samples done"),
        ("--dry_run", "INT", 130, "the texts were still being read"),
    ] {
        let mut child = dir.start(&format!("layer --model_name model --dataset pipe.jsonl {flags}"));
        let mut stderr = child.stderr.take().unwrap();
        let started = Instant::now();
        while !flags.contains("dry_run") && !dir.path("new/results").is_dir() {
            assert!(started.elapsed() < 10 * REACTION, "it makes no folder");
            sleep(Duration::from_millis(5));
        }
        // Time enough to get to the texts: that cannot be watched from outside.
        sleep(Duration::from_millis(500));
        let waits = child.try_wait().unwrap().is_none();
        assert!(waits, "it ended by itself");
        let said = end(child, name, code, &mut stderr);
        assert!(said.contains(found), "{said}");
        assert_eq!(dir.listing(), before, "nothing stays behind");
    }
}
