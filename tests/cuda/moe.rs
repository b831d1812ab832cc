//! Mixtures of experts: which tokens go where, exactly; what comes of them, against float64.

use std::panic::{AssertUnwindSafe, catch_unwind};

use gradlens::backend::cuda::Buf;
use gradlens::backend::cuda::moe::Routing;
use half::bf16;

use super::elementwise::{EPSILON, Number, assert_near, assert_same, numbers, upload};
use super::machine::{Machine, Random, machine};

/// Tokens, experts, chosen ones, and how many experts nobody chooses.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub tokens: usize,
    pub experts: usize,
    pub top_k: usize,
    /// The first of them.
    pub shunned: usize,
}

pub const fn case([tokens, experts, top_k, shunned]: [usize; 4]) -> Case {
    Case { tokens, experts, top_k, shunned }
}

/// One token; one expert; all of them chosen; all tokens on one; more than a chunk of tokens; more experts than lanes,
/// some to a lane, and as many as there can be; no token.
const CASES: [Case; 10] = [
    case([1, 1, 1, 0]),
    case([1, 8, 2, 0]),
    case([5, 8, 8, 0]),
    case([67, 8, 2, 3]),
    case([150, 3, 1, 2]),
    case([300, 2, 2, 0]),
    case([600, 5, 2, 1]),
    case([40, 40, 3, 5]),
    case([3, 256, 5, 0]),
    case([0, 4, 2, 0]),
];

impl Case {
    /// Logits `[N, E]` of few different values, so that many are equal; those of shunned experts are far below.
    pub fn logits(self) -> Vec<f32> {
        let Self { tokens, experts, shunned, .. } = self;
        let mut random = Random::new((tokens * 31 + experts) as u64);
        let mut logit =
            |expert| (random.normal() * 6.0).round() / 2.0 - if expert < shunned { 40.0 } else { 0.0 };
        (0..tokens * experts).map(|at| logit(at % experts)).collect()
    }

    pub fn logits_on_device(self, machine: &Machine) -> Buf<f32> {
        Buf::from_host(&machine.cuda.device.memory, &self.logits(), self.experts).unwrap()
    }

    /// Scores and routing by the kernels.
    pub fn route(self, machine: &Machine) -> (Buf<f32>, Routing) {
        machine.cuda.route(&self.logits_on_device(machine), self.top_k).unwrap()
    }
}

/// What a routing is to hold.
struct Wanted {
    /// Of each token, upwards. `[N, k]`
    chosen: Vec<usize>,
    row_of: Vec<i32>,
    slots: Vec<i32>,
    experts: Vec<i32>,
}

/// By the definition: the k largest, of equal ones the lower expert; sorted by expert, then by token.
fn wanted(logits: &[f32], experts: usize, top_k: usize) -> Wanted {
    let mut chosen = Vec::new();
    for logits in logits.chunks(experts) {
        let mut order: Vec<usize> = (0..experts).collect();
        order.sort_by(|a, b| logits[*b].partial_cmp(&logits[*a]).unwrap());
        order.truncate(top_k);
        order.sort_unstable();
        chosen.extend(order);
    }
    let rows = (chosen.len() + experts * 127).next_multiple_of(128);
    let (mut row_of, mut slots) = (vec![-1; chosen.len()], vec![-1; rows]);
    let mut table = vec![-1; rows / 64 + 1];
    let mut row = 0_usize;
    for expert in 0..experts {
        row = row.next_multiple_of(128);
        for slot in (0..chosen.len()).filter(|slot| chosen[*slot] == expert) {
            (row_of[slot], slots[row], table[row / 64]) = (row as i32, slot as i32, expert as i32);
            row += 1;
        }
    }
    *table.last_mut().unwrap() = row.next_multiple_of(128) as i32;
    Wanted { chosen, row_of, slots, experts: table }
}

/// softmax over the chosen ones, in float64, and the largest distance below the largest.
fn softmax(logits: &[f32], chosen: &[usize]) -> (Vec<f64>, f64) {
    let of = |expert: &usize| f64::from(logits[*expert]);
    let largest = chosen.iter().map(of).fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = chosen.iter().map(|expert| (of(expert) - largest).exp()).collect();
    let sum: f64 = powers.iter().sum();
    let far = chosen.iter().map(|expert| largest - of(expert)).fold(0.0, f64::max);
    (powers.iter().map(|power| power / sum).collect(), far)
}

#[test]
fn route() {
    let Some(machine) = machine() else { return };
    for case in CASES.into_iter().filter(|case| machine.affordable(case.tokens * case.experts * 2)) {
        let Case { tokens, experts, top_k, .. } = case;
        let (logits, what) = (case.logits(), format!("{case:?}"));
        let on_device = case.logits_on_device(&machine);
        let (scores, row_of, slots, table) = machine.same_under_all_schedules(|| {
            let (scores, routing) = machine.cuda.route(&on_device, top_k).unwrap();
            assert_eq!((routing.tokens(), routing.top_k(), routing.expert_count()), (tokens, top_k, experts));
            let [row_of, slots, table] =
                [&routing.row_of, &routing.slots, &routing.experts].map(|buf| buf.to_host().unwrap());
            (scores.to_host().unwrap(), row_of, slots, table)
        });
        let wanted = wanted(&logits, experts, top_k);
        assert!(row_of == wanted.row_of, "{what}: rows {row_of:?} instead of {:?}", wanted.row_of);
        assert!(slots == wanted.slots, "{what}: other slots instead of theirs");
        assert!(table == wanted.experts, "{what}: experts {table:?} instead of {:?}", wanted.experts);
        for n in 0..tokens {
            let of_token = n * top_k..(n + 1) * top_k;
            let (wanted, far) = softmax(&logits[n * experts..][..experts], &wanted.chosen[of_token.clone()]);
            // The exponential 4, quotient and sum some; an argument is rounded once.
            let bound = |j: usize| wanted[j] * EPSILON * (16.0 + 2.0 * far + top_k as f64);
            assert_near(&scores[of_token], &wanted, bound, &format!("scores of {n}, {what}"));
        }
    }
}

/// Which experts and scores a token's logits give.
fn choice(machine: &Machine, logits: &[f32], top_k: usize) -> (Vec<usize>, Vec<f32>) {
    let on_device = Buf::from_host(&machine.cuda.device.memory, logits, logits.len()).unwrap();
    let (scores, routing) = machine.cuda.route(&on_device, top_k).unwrap();
    let (rows, table) = (routing.row_of.to_host().unwrap(), routing.experts.to_host().unwrap());
    let experts = rows.iter().map(|row| table[*row as usize / 64] as usize).collect();
    (experts, scores.to_host().unwrap())
}

#[test]
fn unusual_logits() {
    let Some(machine) = machine() else { return };
    let (nan, none) = (f32::NAN, f32::NEG_INFINITY);
    for (logits, experts) in [
        (vec![-0.0, 0.0, -1.0], vec![0]),
        (vec![0.0, -0.0, -1.0], vec![0]),
        (vec![-2.0, -1.0, -1.0], vec![1]),
        (vec![none, none, 3.0], vec![0, 2]),
        (vec![none, none, none], vec![0, 1]),
        (vec![1.0, nan, 5.0], vec![1, 2]),
        (vec![-nan, 7.0, 5.0, 6.0], vec![0, 1]),
        (vec![f32::MAX, f32::MIN, 0.0, 1e-45], vec![0, 3]),
    ] {
        let (found, scores) = choice(&machine, &logits, experts.len());
        assert!(found == experts, "{logits:?}: {found:?} instead of {experts:?}");
        let defined =
            logits.iter().all(|v| !v.is_nan()) && experts.iter().any(|expert| logits[*expert] > none);
        assert!(scores.iter().all(|score| score.is_nan() != defined), "{logits:?}: {scores:?}");
    }
    assert_eq!(choice(&machine, &[none, none, 3.0], 2).1, [0.0, 1.0]);
}

#[test]
fn route_backward() {
    let Some(machine) = machine() else { return };
    for case in CASES.into_iter().filter(|case| machine.affordable(case.tokens * case.experts * 2)) {
        let Case { tokens, experts, top_k, .. } = case;
        let mut random = Random::new(7 + tokens as u64);
        let (dscores, base) = (random.f32(tokens * top_k), random.f32(tokens * experts));
        let (scores, routing) = case.route(&machine);
        let ds = Buf::from_host(&machine.cuda.device.memory, &dscores, top_k).unwrap();
        let [added, alone] = machine.same_under_all_schedules(|| {
            let so_far = upload(&machine, &base, experts, true);
            [Some(so_far), None].map(|so_far| {
                machine.cuda.route_backward(&scores, &routing, &ds, so_far).unwrap().to_host().unwrap()
            })
        });
        let chosen = wanted(&case.logits(), experts, top_k).chosen;
        let scores = scores.to_host().unwrap();
        // The jacobian of softmax, row by row.
        let gradient = |at: usize| {
            let (n, expert) = (at / experts, at % experts);
            let of = |values: &[f32], j: usize| f64::from(values[n * top_k + j]);
            let Some(own) = (0..top_k).find(|j| chosen[n * top_k + j] == expert) else { return (0.0, 0.0) };
            let s = |j: usize| of(&scores, j);
            let terms = (0..top_k).map(|j| of(&dscores, j) * s(j) * (f64::from(u8::from(j == own)) - s(own)));
            let sizes = (0..top_k).map(|j| (of(&dscores, j) * s(j) * s(own)).abs());
            (terms.sum::<f64>(), sizes.sum::<f64>() + (of(&dscores, own) * s(own)).abs())
        };
        // Scores are rounded: their sum is not 1 exactly.
        let bound = |at: usize| gradient(at).1 * EPSILON * (6.0 + 2.0 * top_k as f64);
        let wanted: Vec<f64> = (0..alone.len()).map(|at| gradient(at).0).collect();
        assert_near(&alone, &wanted, bound, &format!("dlogits {case:?}"));
        let wanted: Vec<f64> =
            wanted.iter().zip(&base).map(|(wanted, base)| wanted + f64::from(*base)).collect();
        let bound = |at: usize| bound(at) + wanted[at].abs() * EPSILON;
        assert_near(&added, &wanted, bound, &format!("dlogits added {case:?}"));
    }
}

/// Of rows: one thread, parts of a warp, warps; not whole vectors.
const WIDTHS: [usize; 6] = [1, 4, 7, 72, 301, 520];

/// Few rows and wide ones, many and narrow ones.
fn shapes(machine: &Machine) -> impl Iterator<Item = (Case, usize)> {
    let cases = [
        case([3, 1, 1, 0]),
        case([67, 4, 2, 1]),
        case([9, 3, 3, 0]),
        case([1, 2, 1, 0]),
        case([140, 2, 1, 1]),
    ];
    let all = WIDTHS.into_iter().zip(cases.into_iter().cycle()).map(|(width, case)| (case, width));
    let more = [(case([130, 4, 3, 0]), 6), (case([2, 1, 1, 0]), 264), (case([0, 2, 1, 0]), 8)];
    let elements =
        |(case, width): &(Case, usize)| Routing::rows_for(case.tokens, case.top_k, case.experts) * width;
    all.chain(more).filter(move |shape| machine.affordable(elements(shape)))
}

/// Values of all rows; NaN where a row is nobody's.
fn rows_of<T: Number>(random: &mut Random, routing: &Routing, width: usize) -> Vec<T> {
    let slots = routing.slots.to_host().unwrap();
    let row = |slot: &i32| match slot {
        -1 => vec![T::of(f32::NAN); width],
        _ => numbers(random, width),
    };
    slots.iter().flat_map(row).collect()
}

fn check_dispatch<X: Number>(machine: &Machine, case: Case, width: usize) {
    let (_, routing) = case.route(machine);
    let x: Vec<X> = numbers(&mut Random::new(width as u64), case.tokens * width);
    let on_device = upload(machine, &x, width, true);
    let out = machine
        .same_under_all_schedules(|| machine.cuda.dispatch(&on_device, &routing).unwrap().to_host().unwrap());
    let slots = routing.slots.to_host().unwrap();
    let row = |slot: &i32| match usize::try_from(*slot) {
        Ok(slot) => x[slot / case.top_k * width..][..width].to_vec(),
        Err(_) => vec![X::of(0.0); width],
    };
    let wanted: Vec<X> = slots.iter().flat_map(row).collect();
    assert_same(&out, &wanted, &format!("dispatch {} {case:?} x{width}", X::NAME));
}

#[test]
fn dispatch() {
    let Some(machine) = machine() else { return };
    for (case, width) in shapes(&machine) {
        check_dispatch::<f32>(&machine, case, width);
        check_dispatch::<bf16>(&machine, case, width);
    }
}

fn check_gather<Y: Number>(machine: &Machine, case: Case, width: usize) {
    let Case { tokens, top_k, .. } = case;
    let (scores, routing) = case.route(machine);
    let mut random = Random::new((tokens + width) as u64);
    let rows: Vec<Y> = rows_of(&mut random, &routing, width);
    let base = random.f32(tokens * width);
    let on_device = upload(machine, &rows, width, true);
    let [out, alone, added] = machine.same_under_all_schedules(|| {
        let out = machine.cuda.combine(&on_device, &scores, &routing).unwrap();
        let [alone, added] = [None, Some(upload(machine, &base, width, true))]
            .map(|dx| machine.cuda.dispatch_backward(&on_device, &routing, dx).unwrap());
        [out, alone, added].map(|buf| buf.to_host().unwrap())
    });
    let (row_of, scores) = (routing.row_of.to_host().unwrap(), scores.to_host().unwrap());
    let check = |found: &[f32], weighted: bool, base: Option<&[f32]>, what: &str| {
        let terms = |at: usize| {
            let (rows, row_of, scores) = (&rows, &row_of, &scores);
            (0..top_k).map(move |j| {
                let slot = at / width * top_k + j;
                let row = rows[row_of[slot] as usize * width + at % width].wide();
                row * if weighted { f64::from(scores[slot]) } else { 1.0 }
            })
        };
        let base = |at: usize| base.map_or(0.0, |base| f64::from(base[at]));
        let wanted: Vec<f64> = (0..found.len()).map(|at| base(at) + terms(at).sum::<f64>()).collect();
        let size = |at: usize| base(at).abs() + terms(at).map(f64::abs).sum::<f64>();
        let bound = |at: usize| size(at) * EPSILON * (top_k + 1) as f64;
        assert_near(found, &wanted, bound, &format!("{what} {} {case:?} x{width}", Y::NAME));
    };
    check(&out, true, None, "combine");
    check(&alone, false, None, "dispatch backward");
    check(&added, false, Some(&base), "dispatch backward, added");
}

#[test]
fn combine() {
    let Some(machine) = machine() else { return };
    for (case, width) in shapes(&machine) {
        check_gather::<f32>(&machine, case, width);
        check_gather::<bf16>(&machine, case, width);
    }
}

fn check_combine_backward<Y: Number, A: Number>(machine: &Machine, case: Case, width: usize) {
    let Case { tokens, top_k, .. } = case;
    let (scores, routing) = case.route(machine);
    let mut random = Random::new((tokens + 3 * width) as u64);
    let rows: Vec<Y> = rows_of(&mut random, &routing, width);
    let dout = random.f32(tokens * width);
    let (rows_device, dout_device) =
        (upload(machine, &rows, width, true), upload(machine, &dout, width, true));
    let (drows, dscores) = machine.same_under_all_schedules(|| {
        let (drows, dscores) =
            machine.cuda.combine_backward::<Y, A>(&rows_device, &scores, &routing, &dout_device).unwrap();
        (drows.to_host().unwrap(), dscores.to_host().unwrap())
    });
    let [slots, row_of] = [&routing.slots, &routing.row_of].map(|buf| buf.to_host().unwrap());
    let scores = scores.to_host().unwrap();
    let what = format!("{} to {} {case:?} x{width}", Y::NAME, A::NAME);
    let row = |slot: &i32| match usize::try_from(*slot) {
        Ok(slot) => dout[slot / top_k * width..][..width].iter().map(|v| A::of(v * scores[slot])).collect(),
        Err(_) => vec![A::of(0.0); width],
    };
    let wanted: Vec<A> = slots.iter().flat_map(row).collect();
    assert_same(&drows, &wanted, &format!("drows {what}"));
    let terms = |slot: usize| {
        let (row, n) = (row_of[slot] as usize, slot / top_k);
        let (rows, dout) = (&rows, &dout);
        (0..width).map(move |c| rows[row * width + c].wide() * f64::from(dout[n * width + c]))
    };
    let wanted: Vec<f64> = (0..dscores.len()).map(|slot| terms(slot).sum()).collect();
    // A thread adds 8 products or, in rows of this width, some more; then threads are added.
    let bound = |slot: usize| terms(slot).map(f64::abs).sum::<f64>() * EPSILON * 24.0;
    assert_near(&dscores, &wanted, bound, &format!("dscores {what}"));
}

#[test]
fn combine_backward() {
    let Some(machine) = machine() else { return };
    for (case, width) in shapes(&machine) {
        check_combine_backward::<f32, f32>(&machine, case, width);
        check_combine_backward::<f32, bf16>(&machine, case, width);
        check_combine_backward::<bf16, bf16>(&machine, case, width);
    }
}

/// Where a row lies in its memory, and so whether its elements are moved together, changes no bit.
#[test]
fn alignment_changes_no_bit() {
    let Some(machine) = machine() else { return };
    let (case, width) = (case([1, 2, 2, 0]), 72);
    let (scores, routing) = case.route(&machine);
    let mut random = Random::new(4);
    let values = random.f32(width + 1);
    let rows =
        Buf::from_host(&machine.cuda.device.memory, &random.f32(routing.rows() * width), width).unwrap();
    let apart =
        Buf::from_host(&machine.cuda.device.memory, &values, width + 1).unwrap().elements(1..width + 1);
    let aligned = Buf::from_host(&machine.cuda.device.memory, &values[1..], width).unwrap();
    let run = |row: &Buf<f32>| {
        let dispatched = machine.cuda.dispatch(row, &routing).unwrap();
        let (drows, dscores) =
            machine.cuda.combine_backward::<f32, f32>(&rows, &scores, &routing, row).unwrap();
        let so_far = row.elements(0..width);
        let sum = machine.cuda.dispatch_backward(&rows, &routing, Some(so_far)).unwrap();
        [dispatched, drows, dscores, sum].map(|buf| buf.to_host().unwrap())
    };
    // The last one writes where it reads.
    assert!(run(&apart) == run(&aligned), "other bits where rows are not aligned");
}

fn refuses<T>(work: impl FnOnce() -> T) -> bool {
    catch_unwind(AssertUnwindSafe(work)).is_err()
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(machine) = machine() else { return };
    let (cuda, memory) = (&machine.cuda, &machine.cuda.device.memory);
    let zeros = |rows, width| Buf::<f32>::zeros(memory, rows, width).unwrap();
    assert!(refuses(|| cuda.route(&zeros(3, 4), 0)) && refuses(|| cuda.route(&zeros(3, 4), 5)));
    assert!(refuses(|| cuda.route(&zeros(3, 257), 2)));
    let (scores, routing) = cuda.route(&zeros(3, 4), 2).unwrap();
    let rows = zeros(routing.rows(), 8);
    assert!(refuses(|| cuda.dispatch(&zeros(4, 8), &routing)));
    assert!(refuses(|| cuda.combine(&rows, &zeros(3, 3), &routing)));
    assert!(refuses(|| cuda.combine(&rows.view(0..128), &scores, &routing)));
    assert!(refuses(|| cuda.dispatch_backward(&rows, &routing, Some(zeros(3, 7)))));
    assert!(refuses(|| cuda.route_backward(&scores, &routing, &zeros(2, 2), None)));
    assert!(refuses(|| cuda.combine_backward::<f32, f32>(&rows, &scores, &routing, &zeros(3, 7))));
    let narrow: Buf<bf16> = cuda.cast(&rows).unwrap();
    assert!(refuses(|| cuda.combine_backward::<bf16, f32>(&narrow, &scores, &routing, &zeros(3, 8))));
}
