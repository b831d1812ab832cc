//! Matrices of more than a megabyte, which never may be memory of our own: views of the file, or of a temporary one.

use std::path::Path;

use crate::common::Random;
use crate::fuzz::largest_request;
use crate::raw::read;
use crate::reference::entry;
use crate::write::{Array, Kind, npz, put, tensors, torch};

const F: usize = 1500;
const D: usize = 400;

/// Opens the SAE in `folder` and compares its matrices.
#[track_caller]
fn compare(folder: &Path, encoder: &[f64], decoder: &[f64]) {
    let (sae, largest) = largest_request(|| read(folder).unwrap());
    assert!(largest < F * D * 4 * 2 / 3, "{largest} bytes at once");
    let (features, width) = (sae.weights.num_features(), sae.weights.width());
    assert_eq!((features, width), (F, D));
    for f in 0..F {
        for d in 0..D {
            assert_eq!(entry(&sae.weights.encoder, f, d), encoder[d * F + f]);
            assert_eq!(entry(&sae.weights.decoder, f, d), decoder[f * D + d]);
        }
    }
}

#[test]
fn large_matrices_are_no_memory_of_ours() {
    let mut random = Random::new(1);
    let mut some = |n: usize| -> Vec<f64> {
        let halves = random.normals(n).into_iter().map(|x| half::bf16::from_f64(x).to_f64());
        halves.collect()
    };
    let (encoder, decoder) = (some(D * F), some(F * D));
    let root = tempfile::tempdir().unwrap();
    let vectors = [
        ("b_enc", Array::new(&[F], &some(F))),
        ("b_dec", Array::new(&[D], &some(D))),
        ("threshold", Array::new(&[F], &vec![0.5; F])),
    ];
    let all =
        |encoder: Array, decoder: Array| [&[("W_enc", encoder), ("W_dec", decoder)], &vectors[..]].concat();
    let encoder_array = Array::new(&[D, F], &encoder);
    let decoder_array = Array::new(&[F, D], &decoder);
    // Unpacked, widened, and both; rows and columns.
    for (kind, deflate) in [(Kind::F32, true), (Kind::F64, false), (Kind::F64, true), (Kind::F32, false)] {
        let plain = all(encoder_array.clone().kind(kind), decoder_array.clone().kind(kind).columns());
        put(root.path(), "a/params.npz", npz(&plain, deflate));
        compare(&root.path().join("a"), &encoder, &decoder);
    }
    // Gaps between elements.
    let spread = all(encoder_array.clone().spread(), decoder_array.clone().kind(Kind::BF16).spread());
    put(root.path(), "b/ae.pt", torch(&tensors(&spread)));
    compare(&root.path().join("b"), &encoder, &decoder);
}
