//! Tests of `TokenPolicy`: each rule, their order, and that gradients follow values.

#![allow(clippy::single_range_in_vec_init, reason = "samples with one run")]

use super::*;
use crate::backend::cpu::Cpu;
use crate::stats::Direction;

/// Samples of 5, 1, 0 and 4 tokens; ids are 9 (special), and others.
fn chunk() -> Chunk {
    Chunk {
        ids: vec![9, 1, 2, 9, 3, 9, 9, 4, 5, 6],
        cu_seqlens: vec![0, 5, 6, 6, 10],
        indices: vec![3, 4, 6, 7],
        loss_scales: vec![0.0; 4],
    }
}

fn all() -> TokenPolicy {
    TokenPolicy::default()
}

fn runs(positions: &Positions) -> Vec<&[Range<usize>]> {
    positions.samples.iter().map(|sample| sample.runs.as_slice()).collect()
}

#[track_caller]
fn check(
    policy: &TokenPolicy,
    norms: Option<(&[f64], f64)>,
    expected: [&[Range<usize>]; 4],
    counts: [u64; 4],
) {
    let (positions, skipped) = policy.select(&chunk(), norms);
    assert_eq!(runs(&positions), expected);
    let [stride, first, special, norms] = counts;
    assert_eq!(skipped, Skipped { stride, first, special, norms });
    assert_eq!(positions.count(1) + skipped.total(), 10);
    let about: Vec<_> = positions.samples.iter().map(|sample| (sample.sample, sample.all.clone())).collect();
    assert_eq!(about, [(3, 0..5), (4, 5..6), (6, 6..6), (7, 6..10)]);
}

#[test]
fn each_rule_alone() {
    let none: &[Range<usize>] = &[];
    assert!(all().counts_all());
    let (positions, skipped) = all().select(&chunk(), None);
    let whole: Vec<_> = positions.samples.iter().map(|sample| sample.rows().collect::<Vec<_>>()).collect();
    assert_eq!(whole, [vec![0, 1, 2, 3, 4], vec![5], vec![], vec![6, 7, 8, 9]]);
    assert!(positions.samples.iter().all(|sample| sample.runs.len() <= 1) && skipped.total() == 0);

    let stride = TokenPolicy { stride: 3, ..all() };
    check(&stride, None, [&[0..1, 3..4], &[5..6], none, &[6..7, 9..10]], [5, 0, 0, 0]);
    let far = TokenPolicy { stride: usize::MAX, ..all() };
    check(&far, None, [&[0..1], &[5..6], none, &[6..7]], [7, 0, 0, 0]);
    let first = TokenPolicy { first: 2, ..all() };
    check(&first, None, [&[2..5], none, none, &[8..10]], [0, 5, 0, 0]);
    let special = TokenPolicy { special: vec![0, 9], ..all() };
    check(&special, None, [&[1..3, 4..5], none, none, &[7..10]], [0, 0, 4, 0]);
    // A norm at the limit counts, and so does what is not finite: it is to be found.
    let norms = [1.0, 2.0, 2.5, 1.0, 1.0, 3.0, 2.0, f64::NAN, f64::INFINITY, 9.0];
    let ruled = TokenPolicy { norms: Some(NormRule::default()), ..all() };
    check(&ruled, Some((&norms, 2.0)), [&[0..2, 3..5], none, none, &[6..9]], [0, 0, 0, 3]);
}

#[test]
fn a_token_counts_for_the_first_rule_that_leaves_it_out() {
    let norms = [5.0; 10];
    let policy = TokenPolicy { stride: 2, first: 1, special: vec![9], norms: Some(NormRule::default()) };
    // Positions 1 and 3 of samples; then positions 0, one of them of each sample with tokens; nothing special is left.
    check(&policy, Some((&norms, 5.0)), [&[2..3, 4..5], &[], &[], &[8..9]], [4, 3, 0, 0]);
    check(&policy, Some((&norms, 4.0)), [&[], &[], &[], &[]], [4, 3, 0, 3]);
    let policy = TokenPolicy { first: 0, ..policy };
    check(&policy, Some((&norms, 5.0)), [&[2..3, 4..5], &[], &[], &[8..9]], [4, 0, 3, 0]);
}

#[test]
fn gradients_follow_the_values_of_their_chunk() {
    let cpu = Cpu::<f64>::new();
    let medians = BTreeMap::from([((0, Site::Mlp), 1.0), ((1, Site::Mlp), 0.5)]);
    let policy = TokenPolicy { norms: Some(NormRule { ratio: 2.0, medians }), ..all() };
    let mut selection = Selection::new(policy, true);
    let tap = |layer, direction| Tap { layer, site: Site::Mlp, direction };
    let values = |from: f64| cpu.from_slice(&(0..10).map(|row| from - f64::from(row)).collect::<Vec<_>>(), 1);
    let mut chosen = Vec::new();
    for from in [9.0, 4.0] {
        for layer in [0, 1, 2] {
            let tap = tap(layer, Direction::Values);
            let x = values(from);
            chosen.push((layer, selection.of_values(&cpu, tap, &chunk(), &x).unwrap()));
        }
    }
    // Rows with |from − row| ≤ 2, ≤ 1, and all.
    let rows =
        |index: usize| -> Vec<usize> { chosen[index].1.samples.iter().flat_map(SampleRows::rows).collect() };
    assert_eq!((rows(0), rows(1), rows(2).len()), (vec![7, 8, 9], vec![8, 9], 10));
    assert_eq!((rows(3), rows(4), rows(5).len()), (vec![2, 3, 4, 5, 6], vec![3, 4, 5], 10));
    for layer in [2, 1, 0] {
        for (_, values) in chosen.iter().filter(|(of, _)| *of == layer) {
            assert_eq!(&selection.of_gradients(tap(layer, Direction::Gradients), &chunk()), values);
        }
    }
    assert!(selection.waiting.values().all(VecDeque::is_empty));
    let skipped = [0, 1, 2].map(|layer| selection.skipped(layer, Site::Mlp).norms);
    assert_eq!(skipped, [7 + 5, 8 + 7, 0]);
}

#[test]
fn values_alone_leave_nothing_behind() {
    let cpu = Cpu::<f64>::new();
    let medians = BTreeMap::from([((0, Site::Mlp), 1.0)]);
    let policy = TokenPolicy { norms: Some(NormRule { ratio: 2.0, medians }), ..all() };
    let mut selection = Selection::new(policy, false);
    let tap = Tap { layer: 0, site: Site::Mlp, direction: Direction::Values };
    selection.of_values(&cpu, tap, &chunk(), &cpu.from_slice(&[1.0; 10], 1)).unwrap();
    assert!(selection.waiting.is_empty());
}

#[test]
fn special_tokens_by_name() {
    let specials = Specials { bos: Some(7), in_front: None, all: vec![2, 7] };
    let ids = [SkipSpecial::None, SkipSpecial::Bos, SkipSpecial::All].map(|skip| skip.ids(&specials));
    assert_eq!(ids, [vec![], vec![7], vec![2, 7]]);
    assert!(SkipSpecial::Bos.ids(&Specials::default()).is_empty());
}
