//! Pickles that are programs: none of them runs, and each is refused by the name of what it asks for.

use std::path::Path;
use std::process::Command;

use crate::raw::{Raw, check, read, relu, says, vector};
use crate::write::{Array, Item, pickle, put, tensors, torch_archive};

/// Pickles that create the file `marker` wherever Python loads them, and what each asks for.
fn exploits(marker: &Path) -> Vec<(Vec<u8>, &'static str)> {
    let command = format!("touch {}", marker.display());
    let short = |text: &str| [&[0x8c, text.len() as u8], text.as_bytes()].concat();
    let long = |text: &str| [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    vec![
        // GLOBAL and REDUCE, protocol 2.
        ([b"\x80\x02cos\nsystem\n".to_vec(), long(&command), b"\x85R.".to_vec()].concat(), "os.system"),
        // STACK_GLOBAL and REDUCE, protocol 4, with names from the stack.
        (
            [
                b"\x80\x04".to_vec(),
                short("os"),
                short("system"),
                b"\x93".to_vec(),
                short(&command),
                b"\x85R.".to_vec(),
            ]
            .concat(),
            "os.system",
        ),
        // Another module's name for the same function, and text commands.
        (format!("cposix\nsystem\n(S'{command}'\ntR.").into_bytes(), "posix.system"),
        // INST, which calls without REDUCE.
        (format!("(S'{command}'\nios\nsystem\n.").into_bytes(), "a string of Python 2"),
        ([b"\x80\x02(".to_vec(), long(&command), b"ios\nsystem\n.".to_vec()].concat(), "INST"),
        // Code of Python itself.
        (
            [
                b"\x80\x02cbuiltins\nexec\n".to_vec(),
                long(&format!("import os; os.system({command:?})")),
                b"\x85R.".to_vec(),
            ]
            .concat(),
            "builtins.exec",
        ),
        // In the middle of an honest dict.
        (
            [b"\x80\x02}(X\x01\x00\x00\x00kcos\nsystem\n".to_vec(), long(&command), b"\x85Ru.".to_vec()]
                .concat(),
            "os.system",
        ),
    ]
}

#[test]
fn exploits_do_not_run() {
    let root = tempfile::tempdir().unwrap();
    let marker = root.path().join("marker");
    for (pickle, name) in exploits(&marker) {
        put(root.path(), "ae.pt", torch_archive(pickle.clone(), vec![]));
        says(read(root.path()), &["a pickle asks for more than tensors: it was not run", name, "hint: "]);
        // The same without an archive, as PyTorch wrote it before version 1.6.
        put(root.path(), "ae.pt", &pickle);
        says(read(root.path()), &["ae.pt", "hint: "]);
        assert!(!marker.exists(), "{name} ran");
    }
}

/// They are no dummies: Python does run them.
#[test]
fn exploits_are_real() {
    let root = tempfile::tempdir().unwrap();
    let marker = root.path().join("marker");
    for (pickle, name) in exploits(&marker) {
        put(root.path(), "a.pkl", &pickle);
        let load = format!("import pickle; pickle.load(open({:?}, 'rb'))", root.path().join("a.pkl"));
        // No Python, no proof.
        let Ok(_) = Command::new("python3").args(["-c", &load]).output() else { return };
        assert!(marker.exists(), "{name} is no exploit");
        std::fs::remove_file(&marker).unwrap();
    }
}

#[test]
fn every_other_operation_is_refused() {
    let root = tempfile::tempdir().unwrap();
    for (pickle, part) in [
        (&b"\x80\x02ctorch\nload\n."[..], "`torch.load`"),
        (b"\x80\x02ctorch\nCharStorage\n.", "`torch.CharStorage`"),
        (b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n.", "`torch._utils._rebuild_sparse_tensor`"),
        (b"\x80\x02cnumpy.core.multiarray\nscalar\n.", "`numpy.core.multiarray.scalar`"),
        (b"\x80\x02c\x1b[2J\nx\n.", "`\u{fffd}[2J.x`"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
        (b"\x80\x02(ccollections\nOrderedDict\no.", "OBJ"),
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "BUILD"),
        (b"\x80\x02\x82\x01.", "EXT"),
        (b"\x80\x02P1\n.", "PERSID"),
        (b"\x80\x020.", "operation 0x30"),
        (b"\x80\x02}}R.", "a call of what is no known function"),
    ] {
        put(root.path(), "ae.pt", torch_archive(pickle.to_vec(), vec![]));
        says(read(root.path()), &["it was not run", part]);
    }
    for (pickle, part) in [
        (&b"\x80\x02"[..], "ends too early"),
        (b"\x80\x02.", "without its values"),
        (b"\x80\x02(.", "without its values"),
        (b"\x80\x02t.", "a group without its mark"),
        (b"\x80\x02}(K\x01u.", "a key without a value"),
        (b"\x80\x02NK\x01K\x01s.", "no dict"),
        (b"\x80\x02h\x07.", "a reference to nothing"),
        (b"\x80\x02X\xff\xff\xff\xffab.", "ends too early"),
        (b"\x80\x02X\x01\0\0\0\xff.", "UTF-8"),
        (b"\x80\x02\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x7f.", "more than 64 bits"),
        (b"\x80\x02NQ.", "an outside object"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "other arguments than PyTorch's"),
    ] {
        put(root.path(), "ae.pt", torch_archive(pickle.to_vec(), vec![]));
        says(read(root.path()), &["a pickle is damaged", part, "hint: "]);
    }
    put(root.path(), "ae.pt", torch_archive(b"\x80\x02]q\0h\0a.".to_vec(), vec![]));
    says(read(root.path()), &["holds no dict of tensors", "state_dict"]);
}

/// What newer protocols and modules' own state dicts have besides.
#[test]
fn harmless_operations_are_known() {
    let raw = Raw::new(1);
    let entries = tensors(&[
        ("encoder.weight", raw.encoder(true)),
        ("encoder.bias", vector(&raw.encoder_bias)),
        ("decoder.weight", raw.decoder(false)),
        ("decoder.bias", vector(&raw.decoder_bias)),
    ]);
    let (honest, storages) = pickle(&entries);
    let body = &honest[2..honest.len() - 1];
    // Protocol 4 with a frame, memoised; then a dict of metadata as the state of the dict.
    let framed = [b"\x80\x04\x95\0\0\0\0\0\0\0\0", body, b"\x94}(\x8c\x09_metadata}ub."].concat();
    // Lists, floats, None, tuples and integers of any length beside the tensors.
    let extra = b"(X\x01\0\0\0l]q\0(K\x01M\x02\x01J\xff\xff\xff\xff\x8a\0\x8a\x01\xffG?\xe0\0\0\0\0\0\0NN\x85N\x86\x88\x89\x87eNau.";
    let more = [b"\x80\x02", body, &extra[..extra.len() - 4], b"u."].concat();
    let root = tempfile::tempdir().unwrap();
    for pickle in [framed, more] {
        put(root.path(), "ae.pt", torch_archive(pickle, storages.clone()));
        check(&read(root.path()).unwrap(), |x| {
            let f = relu(&raw.hidden(x));
            (f.clone(), raw.decode(&f))
        });
    }
}

/// A dict in itself, and one that is there 2^40 times.
#[test]
fn dicts_without_end() {
    let root = tempfile::tempdir().unwrap();
    put(root.path(), "ae.pt", torch_archive(b"\x80\x02}q\0X\x01\0\0\0ah\0s.".to_vec(), vec![]));
    says(read(root.path()), &["holds no SAE of a known class", "no tensors"]);
    let mut bomb = b"\x80\x02}q\0".to_vec();
    for level in 0..200u8 {
        bomb.extend(b"}(");
        for name in 0..40u8 {
            bomb.extend([b'X', 1, 0, 0, 0, b'0' + name, b'h', level]);
        }
        bomb.extend([b'u', b'q', level + 1]);
    }
    bomb.push(b'.');
    put(root.path(), "ae.pt", torch_archive(bomb, vec![]));
    says(read(root.path()), &["holds more than can be right"]);
    // Nor must the arguments of a call be.
    let tuple = [&b"\x80\x02("[..], &[b'N'; 100_000], b"tq\0"].concat();
    let calls = b"ccollections\nOrderedDict\nh\x00R.".to_vec();
    put(root.path(), "ae.pt", torch_archive([tuple, calls].concat(), vec![]));
    says(read(root.path()), &["a call without arguments"]);
}

/// Pickled by hand: a tensor outside its storage, or with a storage outside its file.
#[test]
fn tensors_outside_their_storage() {
    let raw = Raw::new(2);
    let root = tempfile::tempdir().unwrap();
    type Change = fn(&mut Array);
    let wrong = |change: Change| {
        let mut array = raw.encoder(true);
        change(&mut array);
        let entries = vec![("encoder.weight".to_owned(), Item::Tensor(array))];
        let (pickle, storages) = pickle(&entries);
        (pickle, storages)
    };
    let cases: [(Change, &str); 6] = [
        (|array| array.shape = vec![21, 6], "shape [21, 6]"),
        (|array| array.offset = 1, "from 1 on"),
        (|array| array.strides = Some(vec![6, 2]), "strides [6, 2]"),
        (|array| array.strides = Some(vec![6]), "strides [6]"),
        // Expanded: a copy would be as large as one likes.
        (|array| (array.shape, array.strides) = (vec![1 << 30, 1 << 30], Some(vec![0, 0])), "strides [0, 0]"),
        (|array| array.strides = Some(vec![usize::MAX >> 33, 1 << 30]), "strides"),
    ];
    for (change, part) in cases {
        let (pickle, storages) = wrong(change);
        put(root.path(), "ae.pt", torch_archive(pickle, storages));
        says(read(root.path()), &["tensor `encoder.weight`", "is damaged", part]);
    }
    let (pickle, storages) = wrong(|_| ());
    put(root.path(), "ae.pt", torch_archive(pickle.clone(), vec![]));
    says(read(root.path()), &["`ae/data/0` is not there"]);
    put(root.path(), "ae.pt", torch_archive(pickle, vec![storages[0][1..].to_vec()]));
    says(read(root.path()), &["479 bytes for 120 elements of float32"]);
}
