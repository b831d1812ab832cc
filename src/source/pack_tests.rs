//! Tests of `Passes`: what is packed where, and how the thread ends.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use proptest::prelude::*;

use super::*;
use crate::source::TextSpec;

fn texts(lines: &str, num_samples: usize) -> Texts {
    let spec =
        TextSpec { dataset: PathBuf::from("x"), text_column: "text".into(), min_chars: 0, num_samples };
    Texts::from_bytes("a.txt", lines.as_bytes().to_vec(), &spec).unwrap()
}

/// A stand-in for a tokenizer: a line `3` becomes three ids, `3!` three ids of a longer text.
fn encode(texts: &[String]) -> Result<Vec<Sample>> {
    let one = |text: &String| {
        let length: u32 = text.trim_end_matches('!').parse().unwrap();
        Sample { ids: (0..length).map(|i| length * 1000 + i).collect(), truncated: text.ends_with('!') }
    };
    Ok(texts.iter().map(one).collect())
}

fn lines(lengths: &[u32]) -> String {
    lengths.iter().map(|length| format!("{length}\n")).collect()
}

fn packed(lengths: &[u32], tokens_per_pass: usize, batch_size: usize) -> (Vec<Pass>, SourceCounts) {
    let spec = PassSpec { tokens_per_pass, batch_size };
    let mut passes = Passes::with(texts(&lines(lengths), usize::MAX), encode, spec);
    (passes.by_ref().map(Result::unwrap).collect(), passes.counts())
}

#[test]
fn a_pass_closes_before_it_overflows() {
    let (passes, counts) = packed(&[3, 4, 1, 0, 9, 2, 5], 8, 3);
    let samples: Vec<_> = passes.iter().map(|pass| pass.samples.clone()).collect();
    assert_eq!(samples, [vec![0, 1, 2], vec![4], vec![5, 6]]);
    assert_eq!(passes[0].cu_seqlens, [0, 3, 7, 8]);
    assert_eq!(passes[0].ids, [3000, 3001, 3002, 4000, 4001, 4002, 4003, 1000]);
    // Batches 3 4 1 | 0 9 2 | 5 have 2+3+0, 0+8+1 and 4 targets; the second is cut by a pass.
    assert_eq!(passes[0].batch_targets, [5, 5, 5]);
    assert_eq!(passes[1].batch_targets, [9]);
    assert_eq!(passes[2].batch_targets, [9, 4]);
    assert_eq!((counts.tokens, counts.one_token, counts.no_token), (24, 1, 1));
    assert_eq!(counts.texts, TextCounts { read: 7, kept: 7, too_short: 0 });
}

#[test]
fn truncated_texts_are_counted() {
    let spec = PassSpec { tokens_per_pass: 100, batch_size: 2 };
    let mut passes = Passes::with(texts("3!\n2\n4!\n", usize::MAX), encode, spec);
    assert_eq!(passes.by_ref().count(), 1);
    assert_eq!(passes.counts().truncated, 2);
}

#[test]
fn samples_without_tokens_make_no_pass() {
    assert_eq!(packed(&[0, 0], 8, 1).0, []);
}

#[test]
fn an_error_comes_after_the_passes_before_it() {
    let mut bytes = lines(&[5, 5, 5]).into_bytes();
    bytes.extend(b"\xFF\n");
    let spec =
        TextSpec { dataset: "x".into(), text_column: "text".into(), min_chars: 0, num_samples: usize::MAX };
    let texts = Texts::from_bytes("a.txt", bytes, &spec).unwrap();
    let mut passes = Passes::with(texts, encode, PassSpec { tokens_per_pass: 5, batch_size: 1 });
    assert_eq!(passes.next().unwrap().unwrap().samples, [0]);
    assert_eq!(passes.next().unwrap().unwrap().samples, [1]);
    let error = passes.next().unwrap().unwrap_err().to_string();
    assert!(error.contains("a.txt:4"), "{error}");
    assert!(passes.next().is_none());
}

#[test]
fn an_error_of_the_tokenizer_comes_out() {
    let fails = |_: &[String]| Err(Error::new("no such token"));
    let mut passes = Passes::with(texts("1\n", 1), fails, PassSpec { tokens_per_pass: 5, batch_size: 1 });
    assert_eq!(passes.next().unwrap().unwrap_err().to_string(), "no such token");
    assert!(passes.next().is_none());
}

#[test]
fn a_panic_comes_out_as_an_error() {
    let panics = |_: &[String]| -> Result<Vec<Sample>> { panic!("expected in this test") };
    let mut passes = Passes::with(texts("1\n", 1), panics, PassSpec { tokens_per_pass: 5, batch_size: 1 });
    let error = passes.next().unwrap().unwrap_err().to_string();
    assert!(error.contains("expected in this test"), "{error}");
    assert!(passes.next().is_none());
}

type Encode = Box<dyn Fn(&[String]) -> Result<Vec<Sample>> + Send>;

/// Counts calls; the weak one is gone once the thread is.
fn counting() -> (Encode, Arc<AtomicUsize>, Weak<()>) {
    let (calls, alive) = (Arc::new(AtomicUsize::new(0)), Arc::new(()));
    let (seen, weak) = (calls.clone(), Arc::downgrade(&alive));
    let counted = move |texts: &[String]| {
        let _alive = &alive;
        seen.fetch_add(1, Ordering::SeqCst);
        encode(texts)
    };
    (Box::new(counted), calls, weak)
}

#[test]
fn dropping_it_ends_the_thread_early() {
    let (counted, calls, alive) = counting();
    let many = texts(&"8\n".repeat(BLOCK_TEXTS * 100), usize::MAX);
    let mut passes =
        Passes::with(many, counted, PassSpec { tokens_per_pass: 8 * BLOCK_TEXTS, batch_size: 1 });
    passes.next().unwrap().unwrap();
    drop(passes);
    assert!(alive.upgrade().is_none(), "the thread lives on");
    // One pass per block: the taken one, those that wait, the one that waits to wait, and the one being filled.
    assert!(calls.load(Ordering::SeqCst) <= PASSES_AHEAD + 4, "{calls:?} blocks were read for one pass");
}

#[test]
fn it_ends_though_nothing_was_taken() {
    let (counted, _, alive) = counting();
    drop(Passes::with(
        texts(&"8\n".repeat(5000), usize::MAX),
        counted,
        PassSpec { tokens_per_pass: 8, batch_size: 3 },
    ));
    assert!(alive.upgrade().is_none());
}

/// A thread that hangs, here in its tokenizer as it may in a read, holds up neither a request to stop nor the drop.
#[test]
fn a_request_to_stop_ends_the_wait_for_a_pass() {
    let (_sender, never) = std::sync::mpsc::channel::<()>();
    let hangs = move |_: &[String]| -> Result<Vec<Sample>> {
        let _ = never.recv();
        Ok(Vec::new())
    };
    let interrupt = Interrupt::new();
    let passes = Passes::with(texts("1\n", 1), hangs, PassSpec { tokens_per_pass: 5, batch_size: 1 });
    let mut passes = passes.interruptible(interrupt.clone());
    let waiting = std::thread::spawn(move || {
        let next = passes.next();
        drop(passes);
        next
    });
    std::thread::sleep(PATIENCE / 4);
    assert!(!waiting.is_finished());
    let requested = Instant::now();
    interrupt.request();
    let error = waiting.join().unwrap().unwrap().unwrap_err();
    assert_eq!(error.kind(), crate::error::Kind::Interrupted { exit_code: 130 });
    assert!(requested.elapsed() < 4 * PATIENCE, "{:?}", requested.elapsed());
}

/// The progress bar's total: how many samples there are is known before the last of them is computed.
#[test]
fn passes_say_when_all_texts_are_read() {
    let lengths = vec![8; 5 * BLOCK_TEXTS];
    let spec = PassSpec { tokens_per_pass: 8 * BLOCK_TEXTS, batch_size: 1 };
    let mut passes = Passes::with(texts(&lines(&lengths), usize::MAX), encode, spec);
    let mut all_read = Vec::new();
    while let Some(pass) = passes.next() {
        pass.unwrap();
        all_read.push(passes.counts().all_read);
    }
    assert_eq!(all_read, [false, false, false, false, true]);
    assert_eq!(passes.counts().texts.kept, lengths.len() as u64);
    let (_, counts) = packed(&[3, 4], 8, 1);
    assert!(counts.all_read);
}

proptest! {
    #[test]
    fn nothing_is_lost_or_moved(
        lengths in prop::collection::vec(prop_oneof![0..4_u32, 0..40_u32], 1..60),
        tokens_per_pass in 0..50_usize,
        batch_size in 0..9_usize,
    ) {
        let (passes, counts) = packed(&lengths, tokens_per_pass, batch_size);
        let targets = |sample: usize| -> u64 {
            let size = batch_size.max(1);
            let start = sample / size * size;
            let batch = &lengths[start..lengths.len().min(start + size)];
            batch.iter().map(|&length| u64::from(length.saturating_sub(1))).sum()
        };
        let mut seen = Vec::new();
        let mut last_fill = None;
        for pass in &passes {
            prop_assert!(!pass.is_empty());
            prop_assert!(pass.ids.len() <= tokens_per_pass || pass.len() == 1);
            prop_assert_eq!(pass.cu_seqlens.len(), pass.len() + 1);
            prop_assert_eq!(pass.cu_seqlens[0], 0);
            prop_assert_eq!(pass.cu_seqlens[pass.len()], pass.ids.len());
            for (s, &sample) in pass.samples.iter().enumerate() {
                let length = lengths[sample as usize];
                let ids = &pass.ids[pass.cu_seqlens[s]..pass.cu_seqlens[s + 1]];
                prop_assert_eq!(ids, &(0..length).map(|i| length * 1000 + i).collect::<Vec<_>>()[..]);
                prop_assert_eq!(pass.batch_targets[s], targets(sample as usize));
                seen.push(sample as usize);
            }
            // Greedy: the first sample of a pass did not fit into the one before.
            if let Some(fill) = last_fill {
                prop_assert!(fill + pass.cu_seqlens[1] > tokens_per_pass);
            }
            last_fill = Some(pass.ids.len());
        }
        let full: Vec<usize> = (0..lengths.len()).filter(|&sample| lengths[sample] > 0).collect();
        prop_assert_eq!(seen, full);
        prop_assert_eq!(counts.tokens, lengths.iter().map(|&length| u64::from(length)).sum::<u64>());
    }
}
