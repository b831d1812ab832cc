//! Faults planted in kernels, each of which a test of its kernel must notice: a process of its own runs that
//! test with one line of one kernel changed, and must fail.

use std::env;
use std::process::{Command, Output};

use gradlens::backend::cuda::Sources;

/// Set in the processes started here: the name of a fault, or `none`.
const PLANT: &str = "GRADLENS_TEST_PLANT";

/// Whether this process was started to run one test, under a sanitizer or with a fault.
pub fn is_child() -> bool {
    env::var_os(PLANT).is_some()
}

/// The kernels with the fault that this process was started for.
pub fn planted(sources: Sources) -> Sources {
    sources
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
