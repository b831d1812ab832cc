//! Random bytes and changed files: an answer, and no memory that the file's size does not account for.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;

use gradlens::weights::sae::Sae;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::damage::{CONTAINERS, folder};
use crate::raw::{Raw, read};
use crate::reference::entry;
use crate::write::{put, torch_archive, zip};

thread_local! {
    /// The most bytes that this thread asked for at once.
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator, which notes how much is asked for.
struct Noting;

// SAFETY: every call goes to the system's allocator as it is; noting asks for no memory.
unsafe impl GlobalAlloc for Noting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.set(LARGEST.get().max(layout.size()));
        // SAFETY: the caller's promises are those of `System`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LARGEST.set(LARGEST.get().max(layout.size()));
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.set(LARGEST.get().max(size));
        // SAFETY: as above.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Noting = Noting;

/// The most bytes that `work` asks for at once, on this thread.
pub fn largest_request<T>(work: impl FnOnce() -> T) -> (T, usize) {
    LARGEST.set(0);
    (work(), LARGEST.get())
}

/// Opens what is in `folder` and looks at its vectors; files of a few kilobytes must not need more than this at once.
fn opens(folder: &Path) {
    let (sae, largest) = largest_request(|| read(folder));
    match sae {
        Ok(Sae { weights, .. }) => {
            let (features, width) = (weights.num_features(), weights.width());
            assert!(weights.encoder_bias.len() == features && weights.decoder_bias.len() == width);
            for matrix in [&weights.encoder, &weights.decoder] {
                let _ = entry(matrix, 0, 0) + entry(matrix, features - 1, width - 1);
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    // Buffers of files, and of the directory of a zip archive some hundred bytes for each of its own.
    assert!(largest <= 8 << 20, "{largest} bytes at once");
}

/// Operations of the unpickler with arguments that fit, in any order.
fn operations() -> impl Strategy<Value = Vec<u8>> {
    let globals = prop::sample::select(vec![
        b"ccollections\nOrderedDict\n".to_vec(),
        b"ctorch._utils\n_rebuild_tensor_v2\n".to_vec(),
        b"ctorch\nFloatStorage\n".to_vec(),
        b"X\x07\0\0\0storage".to_vec(),
        b"X\x01\0\0\x000".to_vec(),
        b"X\x04\0\0\0bias".to_vec(),
    ]);
    let codes: Vec<u8> = b"(NK)]}tseuaqrhjQRb.MJG\x85\x86\x87\x88\x89\x8a\x8c\x93\x94".to_vec();
    let operation = prop_oneof![
        (prop::sample::select(codes), prop::collection::vec(0u8..6, 0..3)).prop_map(|(code, rest)| [
            vec![code],
            rest
        ]
        .concat()),
        globals,
    ];
    prop::collection::vec(operation, 0..40).prop_map(|parts| [b"\x80\x02".to_vec(), parts.concat()].concat())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn pickles_of_any_operations(pickle in operations(), stop in any::<bool>()) {
        let root = tempfile::tempdir().unwrap();
        let mut pickle = pickle;
        if stop {
            pickle.push(b'.');
        }
        put(root.path(), "ae.pt", torch_archive(pickle, vec![vec![0; 64]]));
        opens(root.path());
    }

    #[test]
    fn pickles_of_any_bytes(pickle in prop::collection::vec(any::<u8>(), 0..200)) {
        let root = tempfile::tempdir().unwrap();
        put(root.path(), "ae.pt", torch_archive(pickle.clone(), vec![]));
        opens(root.path());
        put(root.path(), "ae.pt", pickle);
        opens(root.path());
    }

    #[test]
    fn headers_of_any_text(
        text in r#"\{?('descr'|'shape'|'fortran_order'|: ?|True|False|'<f[248]'|[(),0-9 ]){0,14}\}?"#,
        version in 0u8..5,
        bytes in prop::collection::vec(any::<u8>(), 0..40),
        deflate in any::<bool>(),
    ) {
        let root = tempfile::tempdir().unwrap();
        let mut array = vec![0x93, b'N', b'U', b'M', b'P', b'Y', version, 0];
        array.extend((text.len() as u16).to_le_bytes());
        if version > 1 {
            array.extend([0, 0]);
        }
        array.extend(text.bytes());
        array.extend(bytes);
        let names = ["W_enc.npy", "W_dec.npy", "b_enc.npy", "b_dec.npy", "threshold.npy"];
        put(root.path(), "params.npz", zip(&names.map(|name| (name.to_owned(), array.clone(), deflate))));
        opens(root.path());
    }

    #[test]
    fn configurations_of_any_text(
        text in r#"\{?("(k|architecture|normalize_activations|d_in|metadata|topk|standard|jumprelu)"|[:,{}\[\]0-9.e-]|null|true){0,16}\}?"#,
    ) {
        let root = tempfile::tempdir().unwrap();
        for (weights, config) in [
            ("sae_weights.safetensors", "cfg.json"),
            ("sae.safetensors", "cfg.json"),
            ("params.safetensors", "config.json"),
            ("checkpoints/final.safetensors", "hyperparams.json"),
            ("ae.pt", "config.json"),
        ] {
            let folder = root.path().join(weights.replace('/', "_"));
            put(&folder, weights, "");
            put(&folder, config, &text);
            opens(&folder);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1000) })]

    /// Files of every container with some bytes changed, most of them where headers and directories are.
    #[test]
    fn changed_files(
        container in 0..CONTAINERS,
        changes in prop::collection::vec((any::<Index>(), any::<u8>(), 0u8..3), 1..6),
        cut in any::<Index>(),
        keep in prop::bool::weighted(0.8),
    ) {
        let (root, file) = folder(&Raw::new(1), container);
        let mut bytes = std::fs::read(&file).unwrap();
        for (index, byte, place) in changes {
            let end = 400.min(bytes.len());
            let at = match place {
                0 => index.index(bytes.len()),
                1 => bytes.len() - 1 - index.index(end),
                _ => index.index(end),
            };
            bytes[at] = byte;
        }
        if !keep {
            bytes.truncate(cut.index(bytes.len()));
        }
        std::fs::write(&file, bytes).unwrap();
        opens(root.path());
    }
}
