//! Faults planted in kernels, each of which a test of its kernel must notice: a process of its own runs that
//! test with one place of one kernel changed, must fail, and must say what this fault makes it say.

use std::env;
use std::process::{Command, Output};

use gradlens::backend::cuda::Sources;

use super::machine::{RUNS_LINE, runs_here, skip_or_panic};
use super::{linear_faults, norm, stats};

/// Set in the processes started here: the name of a fault, or `none`.
const PLANT: &str = "GRADLENS_TEST_PLANT";

/// What kernels and runtime are compiled with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Build {
    Plain,
    /// AddressSanitizer.
    Address,
    /// ThreadSanitizer.
    Thread,
}
use Build::{Address, Plain, Thread};

pub struct Fault {
    pub name: &'static str,
    pub file: &'static str,
    pub from: &'static str,
    pub to: &'static str,
    /// The test that must notice, and with which build.
    pub test: &'static str,
    pub build: Build,
    /// One of these must be in what it prints.
    pub reports: &'static [&'static str],
}

/// Results that are off, as the kernels' tests report them.
pub const WRONG: &[&str] = &["instead of", "relative error", "other bytes under"];

/// All faults, each beside the test that must notice it.
fn faults() -> impl Iterator<Item = &'static Fault> {
    norm::FAULTS.iter().chain(stats::FAULTS).chain(linear_faults::FAULTS)
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
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads", "1"]);
    command.env(PLANT, fault).envs(variables.iter().copied());
    Child(command.output().unwrap())
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

/// What a process needs in its environment to run kernels of this build. `None`: the compiler lacks the
/// sanitizer; the reason was printed.
fn environment(build: Build) -> Option<Vec<(&'static str, String)>> {
    let (name, library, options) = match build {
        // Kernels that are run a few times.
        Plain => return Some(vec![("CUEMU_OPTIMIZE", "0".to_owned())]),
        Address => ("address", "libasan.so", ("ASAN_OPTIONS", "detect_leaks=0")),
        Thread => {
            ("thread", "libtsan.so", ("TSAN_OPTIONS", "ignore_noninstrumented_modules=1:halt_on_error=1"))
        }
    };
    let compiler = env::var("CUEMU_CXX").unwrap_or_else(|_| "g++".to_owned());
    let found = Command::new(&compiler).arg(format!("-print-file-name={library}")).output().unwrap();
    let path = String::from_utf8(found.stdout).unwrap().trim().to_owned();
    // The compiler answers with the bare name where it has no such file.
    if !path.starts_with('/') {
        skip_or_panic(&format!("{library} of {compiler}"));
        return None;
    }
    let (options, value) = options;
    let mut variables =
        vec![("CUEMU_SANITIZER", name.to_owned()), ("LD_PRELOAD", path), (options, value.to_owned())];
    // Without optimisation every register would be memory to watch.
    variables.push(("CUEMU_OPTIMIZE", "1".to_owned()));
    Some(variables)
}

fn run_with(build: Build, test: &str, fault: &str) -> Option<Child> {
    let variables = environment(build)?;
    let variables: Vec<(&str, &str)> =
        variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
    Some(run_child(test, fault, &variables))
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
fn in_linear() {
    all_are_noticed("linear.cu");
}

#[test]
fn in_linear_for_compute_capability_9_0() {
    all_are_noticed("linear_sm90.cu");
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
        Sources::embedded().with(fault.file, fault.from, fault.to).unwrap();
    }
}

/// Tests of kernels, which must be silent under both sanitizers.
const CLEAN: &[&str] = &[
    "norm::forward",
    "norm::backward",
    "stats::moments",
    "stats::the_first_sample_that_is_not_finite_is_named",
    "linear::mma_sync_gives_the_same_bits_under_all_schedules",
    "linear::wgmma_gives_the_same_bits_under_all_schedules",
];

/// The correct kernels, in every build, under schedules × poisons: not one report.
fn kernels_are_clean(build: Build, least_runs: usize) {
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
    kernels_are_clean(Plain, 200);
}

#[test]
fn kernels_are_clean_under_address_sanitizer() {
    kernels_are_clean(Address, 40);
}

#[test]
fn kernels_are_clean_under_thread_sanitizer() {
    kernels_are_clean(Thread, 20);
}
