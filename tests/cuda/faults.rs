//! Faults planted in kernels, each of which a test of its kernel must notice: a process of its own runs that
//! test with one place of one kernel changed, must fail, and must say what this fault makes it say.

use std::env;
use std::process::{Command, Output};

use cuemu::launcher::{self, Sanitizer};
use gradlens::backend::cuda::Sources;

use super::machine::{RUNS_LINE, runs_here, skip_or_panic};
use super::{
    activation, atomics, attention_faults, elementwise_faults, linear_exponentials, linear_faults,
    linear_rotated, loss, norm, rope, stats,
};

/// Set in the processes started here: the name of a fault, or `none`.
const PLANT: &str = "GRADLENS_TEST_PLANT";

pub struct Fault {
    pub name: &'static str,
    pub file: &'static str,
    pub from: &'static str,
    pub to: &'static str,
    /// The test that must notice, and with which build.
    pub test: &'static str,
    pub build: Sanitizer,
    /// One of these must be in what it prints.
    pub reports: &'static [&'static str],
}

/// Results that are off, as the kernels' tests report them.
pub const WRONG: &[&str] = &["instead of", "relative error", "other bytes under"];

/// All faults, each beside the test that must notice it.
fn faults() -> impl Iterator<Item = &'static Fault> {
    norm::FAULTS
        .iter()
        .chain(stats::FAULTS)
        .chain(atomics::FAULTS)
        .chain(linear_faults::FAULTS)
        .chain(elementwise_faults::FAULTS)
        .chain(activation::FAULTS)
        .chain(linear_rotated::FAULTS)
        .chain(linear_exponentials::FAULTS)
        .chain(rope::FAULTS)
        .chain(loss::FAULTS)
        .chain(attention_faults::FAULTS)
}

/// Whether this process was started to run one test, under a sanitizer or with a fault.
pub fn is_child() -> bool {
    env::var_os(PLANT).is_some()
}

/// Whether this process was started with a fault.
pub fn is_planted() -> bool {
    env::var(PLANT).is_ok_and(|fault| fault != "none")
}

/// The kernels with the fault that this process was started for.
pub fn planted(sources: Sources) -> Sources {
    let Ok(wanted) = env::var(PLANT) else { return sources };
    match faults().find(|fault| fault.id() == wanted) {
        Some(fault) => sources.with(fault.file, fault.from, fault.to).unwrap(),
        None => {
            assert_eq!(wanted, "none", "{PLANT} names a fault");
            sources
        }
    }
}

impl Fault {
    fn id(&self) -> String {
        format!("{}: {}", self.file, self.name)
    }
}

/// How a process ended.
pub struct Child(Output);

/// Runs `test` of this binary in a process of its own with `fault` planted (`none`: with nothing changed).
pub fn run_child(test: &str, fault: &str, variables: &[(&str, &str)]) -> Child {
    let command = Command::new(env::current_exe().unwrap());
    Child(one_test(command, test, fault).envs(variables.iter().copied()).output().unwrap())
}

fn one_test(mut command: Command, test: &str, fault: &str) -> Command {
    command.args(["--exact", test, "--nocapture", "--test-threads", "1"]).env(PLANT, fault);
    command
}

/// The same, its kernels compiled with `sanitizer`. `None`: the compiler lacks it; the reason was printed.
fn run_with(sanitizer: Sanitizer, test: &str, fault: &str) -> Option<Child> {
    let variables = match launcher::environment(sanitizer) {
        Ok(variables) => variables,
        Err(reason) => {
            skip_or_panic(&reason);
            return None;
        }
    };
    let command = launcher::command(env::current_exe().unwrap(), sanitizer);
    let mut command = one_test(command, test, fault);
    // Kernels are run a few times; but without optimisation every register would be memory to watch.
    command.envs(variables).env("CUEMU_OPTIMIZE", if sanitizer == Sanitizer::None { "0" } else { "1" });
    Some(Child(command.output().unwrap()))
}

impl Child {
    /// Everything it printed.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.stdout).into_owned() + &String::from_utf8_lossy(&self.0.stderr)
    }

    /// Its one test ran and passed.
    pub fn assert_passed(&self) {
        let text = self.text();
        assert!(self.0.status.success() && text.contains("1 passed"), "{text}");
    }
}

/// Every fault of `file` is noticed. All that are not are listed.
fn all_are_noticed(file: &str) {
    if is_child() || !runs_here() {
        return;
    }
    let faults: Vec<_> = faults().filter(|fault| fault.file == file).collect();
    assert!(!faults.is_empty());
    let mut unnoticed = Vec::new();
    for fault in faults {
        let Some(child) = run_with(fault.build, fault.test, &fault.id()) else { continue };
        let text = child.text();
        let ran = text.contains("running 1 test");
        let reported = fault.reports.iter().any(|report| text.contains(report));
        println!(
            "{:<70} {:<8} noticed: {}",
            fault.id(),
            format!("{:?}", fault.build),
            !child.0.status.success() && reported
        );
        if child.0.status.success() || !ran || !reported {
            unnoticed.push(format!("{} ({:?}), by {}:\n{text}", fault.id(), fault.build, fault.test));
        }
    }
    assert!(unnoticed.is_empty(), "{}", unnoticed.join("\n\n"));
}

#[test]
fn in_norm() {
    all_are_noticed("norm.cu");
}

#[test]
fn in_stats() {
    all_are_noticed("stats.cu");
}

#[test]
fn in_elementwise() {
    all_are_noticed("activation.cuh");
    all_are_noticed("embed.cu");
    all_are_noticed("elementwise.cu");
    all_are_noticed("rows.cuh");
}

#[test]
fn in_loss() {
    all_are_noticed("loss.cu");
}

#[test]
fn in_rope() {
    all_are_noticed("rope.cu");
}

#[test]
fn in_sums_by_atomics() {
    all_are_noticed("sum.cu");
}

#[test]
fn in_linear() {
    all_are_noticed("linear.cu");
}

#[test]
fn in_epilogues_of_linear() {
    all_are_noticed("epilogue.cuh");
}

#[test]
fn in_linear_of_float32() {
    all_are_noticed("linear_f32.cu");
}

#[test]
fn in_linear_for_compute_capability_9_0() {
    all_are_noticed("linear_sm90.cu");
}

#[test]
fn in_attention() {
    for file in ["attention.cuh", "attention.cu", "attention_mma.cuh", "attention_backward.cu"] {
        all_are_noticed(file);
    }
}

#[test]
fn in_attention_by_multiply_adds() {
    all_are_noticed("attention_any.cu");
}

#[test]
fn in_wrappers_of_instructions() {
    all_are_noticed("common.cuh");
    all_are_noticed("hopper.cuh");
}

/// Those for other builds than the one at hand too.
#[test]
fn every_fault_has_its_place() {
    for fault in faults() {
        atomics::sources().with(fault.file, fault.from, fault.to).unwrap();
    }
}

/// Tests of kernels, which must be silent under both sanitizers.
const CLEAN: &[&str] = &[
    "atomics::sum",
    "attention::multiply_adds_give_the_same_bits_under_all_schedules",
    "attention::tensor_cores_give_the_same_bits_under_all_schedules",
    "norm::forward",
    "norm::backward",
    "elementwise::embed",
    "elementwise::add",
    "elementwise::gate_forward",
    "elementwise::gate_backward",
    "elementwise::columns",
    "rope::rotation",
    "loss::finish",
    "stats::moments",
    "stats::the_first_sample_that_is_not_finite_is_named",
    "linear::mma_sync_gives_the_same_bits_under_all_schedules",
    "linear::wgmma_gives_the_same_bits_under_all_schedules",
    "linear::ffma_gives_the_same_bits_under_all_schedules",
    "linear_fused::mma_sync_gives_the_same_bits_under_all_schedules",
    "linear_fused::wgmma_gives_the_same_bits_under_all_schedules",
    "linear_fused::ffma_gives_the_same_bits_under_all_schedules",
    "linear_exponentials::soft_caps_give_the_same_bits_under_all_schedules",
    "linear_rotated::mma_sync_gives_the_same_bits_under_all_schedules",
    "linear_rotated::wgmma_gives_the_same_bits_under_all_schedules",
    "linear_rotated::ffma_gives_the_same_bits_under_all_schedules",
];

/// The correct kernels, in every build, under schedules × poisons: not one report.
fn kernels_are_clean(build: Sanitizer, least_runs: usize) {
    if is_child() || !runs_here() {
        return;
    }
    let mut runs = 0;
    for test in CLEAN {
        let Some(child) = run_with(build, test, "none") else { return };
        child.assert_passed();
        let text = child.text();
        let line = text.lines().rev().find_map(|line| line.split(RUNS_LINE).nth(1));
        runs += line.and_then(|count| count.trim().parse::<usize>().ok()).unwrap_or(0);
    }
    println!("{build:?}: {runs} runs");
    assert!(runs >= least_runs, "{runs} runs");
}

#[test]
fn kernels_are_clean_under_all_schedules() {
    kernels_are_clean(Sanitizer::None, 200);
}

#[test]
fn kernels_are_clean_under_address_sanitizer() {
    kernels_are_clean(Sanitizer::Address, 40);
}

#[test]
fn kernels_are_clean_under_thread_sanitizer() {
    kernels_are_clean(Sanitizer::Thread, 20);
}
