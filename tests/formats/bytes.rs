//! `.npy`, `.npz` and pickle, byte for byte.

use flate2::read::DeflateDecoder;
use gradlens::output::pickle::Value;
use gradlens::output::{Array, npy, npz};
use ndarray::{Array0, Array1};
use ndarray_npy::{NpzReader, ReadNpyExt};
use proptest::prelude::*;
use std::io::{Cursor, Read};

/// A `.npy` file as NumPy's documentation describes it: the header padded so that data begins at byte 128.
fn expected_npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    let mut bytes = b"\x93NUMPY\x01\x00\x76\x00".to_vec();
    bytes.extend(format!("{text:<117}\n").bytes());
    bytes.extend(data);
    bytes
}

#[test]
fn npy_bytes_are_pinned() {
    let f32s = npy::bytes(Array::F32(&[1.0, -0.0])).expect("memory does not fail");
    assert_eq!(f32s, expected_npy("<f4", "(2,)", b"\x00\x00\x80\x3f\x00\x00\x00\x80"));
    let f64s = npy::bytes(Array::F64(&[1.0])).expect("memory does not fail");
    assert_eq!(f64s, expected_npy("<f8", "(1,)", b"\x00\x00\x00\x00\x00\x00\xf0\x3f"));
    let scalar = npy::bytes(Array::I64(-2)).expect("memory does not fail");
    assert_eq!(scalar, expected_npy("<i8", "()", b"\xfe\xff\xff\xff\xff\xff\xff\xff"));
    let empty = npy::bytes(Array::F32(&[])).expect("memory does not fail");
    assert_eq!(empty, expected_npy("<f4", "(0,)", b""));
}

/// The first entry of a zip archive: its name, its date and time fields, and what it inflates to.
fn first_entry(zip: &[u8]) -> (String, [u8; 4], Vec<u8>, usize) {
    let u16_at = |at: usize| usize::from(u16::from_le_bytes([zip[at], zip[at + 1]]));
    let u32_at = |at: usize| u16_at(at) | u16_at(at + 2) << 16;
    assert_eq!(&zip[..4], b"PK\x03\x04");
    assert_eq!(u16_at(8), 8, "the entry is not deflated");
    let (packed, name, extra) = (u32_at(18), u16_at(26), u16_at(28));
    let data = 30 + name + extra;
    let mut inflated = Vec::new();
    DeflateDecoder::new(&zip[data..data + packed]).read_to_end(&mut inflated).expect("a deflate stream");
    let clock = [zip[10], zip[11], zip[12], zip[13]];
    (String::from_utf8_lossy(&zip[30..30 + name]).into_owned(), clock, inflated, data + packed)
}

#[test]
fn npz_entries_are_pinned() {
    let metadata = Value::Dict(vec![("a".into(), Value::Dict(vec![(7_usize.into(), Value::Float(0.5))]))]);
    let entries = || [("layer_0_mean".to_owned(), Array::F32(&[1.0, 2.0]))];
    let zip = npz::bytes(entries(), Some(&metadata)).expect("memory does not fail");

    // 1980-01-01 00:00, zip's zero: the archive must not know when it was written.
    let epoch = [0, 0, 0x21, 0];
    let (name, clock, inflated, next) = first_entry(&zip);
    assert_eq!((name.as_str(), clock), ("layer_0_mean.npy", epoch));
    assert_eq!(inflated, npy::bytes(Array::F32(&[1.0, 2.0])).expect("memory does not fail"));

    let (name, clock, inflated, _) = first_entry(&zip[next..]);
    assert_eq!((name.as_str(), clock), ("metadata.npy", epoch));
    let pickle = b"\x80\x02cnumpy\narray\n(]}(X\x01\x00\x00\x00a}(K\x07G\x3f\xe0\x00\x00\x00\x00\x00\x00uuaX\x01\x00\x00\x00OtR.";
    assert_eq!(inflated, expected_npy("|O", "(1,)", pickle));

    assert_eq!(zip, npz::bytes(entries(), Some(&metadata)).expect("memory does not fail"));
}

#[test]
fn a_key_used_twice_is_refused() {
    let entries = [("x".to_owned(), Array::I64(1)), ("x".to_owned(), Array::I64(2))];
    let error = npz::bytes(entries, None).expect_err("two entries of one name").to_string();
    assert!(error.contains("key \"x\"") && error.contains("found:"), "{error}");
}

proptest! {
    // Failing cases are printed; a file of them beside the tests helps nobody.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn npy_round_trip(bits in prop::collection::vec(any::<u32>(), 0..200)) {
        let values: Vec<f32> = bits.iter().map(|&bits| f32::from_bits(bits)).collect();
        let bytes = npy::bytes(Array::F32(&values)).expect("memory does not fail");
        let read = Array1::<f32>::read_npy(bytes.as_slice()).expect("our own file");
        prop_assert_eq!(read.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), bits);
    }

    #[test]
    fn npz_round_trip(
        wide in prop::collection::vec(any::<u64>(), 0..200),
        narrow in prop::collection::vec(any::<u32>(), 0..200),
        count: i64,
    ) {
        let f64s: Vec<f64> = wide.iter().map(|&bits| f64::from_bits(bits)).collect();
        let f32s: Vec<f32> = narrow.iter().map(|&bits| f32::from_bits(bits)).collect();
        let zip = npz::bytes(
            [
                ("layer_3.mlp.values.sum".to_owned(), Array::F64(&f64s)),
                ("layer_3.mlp.values.count".to_owned(), Array::I64(count)),
                ("layer_3_mean".to_owned(), Array::F32(&f32s)),
            ],
            None,
        )
        .expect("memory does not fail");
        let mut read = NpzReader::new(Cursor::new(zip)).expect("our own archive");
        prop_assert_eq!(
            read.names().expect("names"),
            ["layer_3.mlp.values.sum", "layer_3.mlp.values.count", "layer_3_mean"]
        );
        let sum: Array1<f64> = read.by_name("layer_3.mlp.values.sum").expect("an entry");
        prop_assert_eq!(sum.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), wide);
        let mean: Array1<f32> = read.by_name("layer_3_mean").expect("an entry");
        prop_assert_eq!(mean.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), narrow);
        let read_count: Array0<i64> = read.by_name("layer_3.mlp.values.count").expect("an entry");
        prop_assert_eq!(read_count.into_scalar(), count);
    }
}
