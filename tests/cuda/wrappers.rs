//! Each wrapper of a PTX instruction on its own, exactly.
//!
//! The emulator could be wrong in a way that the kernels cannot show: a fragment layout or a swizzle that is
//! consistently wrong in the instruction that writes it and in the one that reads it. Here one small kernel
//! around each wrapper shows what its registers hold, and that is compared with
//!
//! 1. what the PTX ISA says, written out below from its tables, on its own;
//! 2. what a GPU gave, where that was recorded ([`golden`]): `GRADLENS_TEST_GPU=1 GRADLENS_TEST_RECORD=1`
//!    `cargo test --test cuda wrappers` writes it.
//!
//! The numbers are integers that bfloat16 holds and sums that float32 holds: any order of adding gives the same
//! bits, so nothing here needs a tolerance.

use gradlens::backend::cuda::launch::{Launch, Value};
use gradlens::backend::cuda::{Buf, Code, Element, Nvrtc, Sources};
use gradlens::error::Result;

use super::faults::planted;
use super::machine::{Machine, machine_with, skip_or_panic};

#[path = "wrappers/common.rs"]
mod common;
#[path = "wrappers/golden.rs"]
mod golden;
#[path = "wrappers/hopper.rs"]
mod hopper;
#[path = "wrappers/mistakes.rs"]
mod mistakes;

/// The kernels around the wrappers.
fn sources() -> Sources {
    Sources::embedded()
        .and(common::FILE, include_str!("wrappers/wrappers.cu"))
        .and(hopper::FILE, include_str!("wrappers/wrappers_sm90.cu"))
}

/// A wrapper on fixed data.
struct Case {
    /// Also of its golden file.
    name: &'static str,
    at: At,
    /// Launches the kernel and fetches what it wrote.
    run: Run,
    /// What the PTX ISA says that is.
    expected: Vec<u32>,
}

type Run = Box<dyn Fn(&Machine, &At) -> Result<Vec<u32>>>;

/// A kernel and the grid it is launched with.
struct At {
    file: &'static str,
    entry: &'static str,
    blocks: usize,
    threads: u32,
    shared_bytes: u32,
}

type Arguments = Vec<(&'static str, Value)>;

/// What no kernel has written.
const UNWRITTEN: u32 = 0xdead_beef;

impl At {
    /// Launches the kernel with these arguments, given its output, and returns the `len` words written there.
    fn launch(
        &self,
        machine: &Machine,
        len: usize,
        arguments: impl FnOnce(Value) -> Arguments,
    ) -> Result<Vec<u32>> {
        let out = upload(machine, &vec![UNWRITTEN; len])?;
        let kernel = machine.cuda.kernel(self.file, self.entry)?;
        kernel.allow_shared_bytes(self.shared_bytes)?;
        let launch = Launch::new(&kernel, self.blocks, self.threads).shared_bytes(self.shared_bytes);
        let arguments = arguments(Value::from(&out)).into_iter();
        let launch = arguments.fold(launch, |launch, (declaration, value)| launch.arg(declaration, value));
        // SAFETY: the cases give every kernel the memory that its text names; the callers keep it until this
        // returns, and `to_host` waits for the kernel.
        unsafe { launch.on(&machine.cuda.device.compute) }?;
        out.to_host()
    }
}

impl Case {
    fn outcome(&self, machine: &Machine) -> Result<Vec<u32>> {
        (self.run)(machine, &self.at)
    }
}

fn upload<T: Element>(machine: &Machine, values: &[T]) -> Result<Buf<T>> {
    Buf::from_host(&machine.cuda.device.memory, values, values.len())
}

/// The same memory as floats.
fn floats(words: Value) -> Value {
    match words {
        Value::Address { address, stream, .. } => Value::Address { address, element: "float", stream },
        other => other,
    }
}

/// Two elements to a word, as they lie in memory.
fn paired(elements: &[u16]) -> Vec<u32> {
    elements.chunks_exact(2).map(|elements| pair(elements[0], elements[1])).collect()
}

fn bits(values: impl IntoIterator<Item = f32>) -> Vec<u32> {
    values.into_iter().map(f32::to_bits).collect()
}

/// Two 16-bit elements in a register, the first in the low half.
fn pair(first: u16, second: u16) -> u32 {
    u32::from(first) | u32::from(second) << 16
}

/// The first words that differ.
fn difference(found: &[u32], wanted: &[u32]) -> String {
    if found.len() != wanted.len() {
        return format!("{} words instead of {}", found.len(), wanted.len());
    }
    let differing = found.iter().zip(wanted).enumerate().filter(|(_, (found, wanted))| found != wanted);
    let count = differing.clone().count();
    let first =
        differing.take(4).map(|(i, (found, wanted))| format!("word {i}: {found:08x}, not {wanted:08x}"));
    format!("{count} of {} words differ; {}", found.len(), first.collect::<Vec<_>>().join("; "))
}

/// Runs all cases, all schedules, and compares; everything that is wrong is said at the end, so that a recording
/// is complete.
fn check(machine: &Machine, cases: &[Case]) {
    let (mut wrong, mut missing) = (Vec::new(), Vec::new());
    for case in cases {
        let found = machine.same_under_all_schedules(|| case.outcome(machine).unwrap());
        golden::record_if_asked(machine, case.name, &found);
        if found != case.expected {
            wrong.push(format!("{}: not the PTX ISA's: {}", case.name, difference(&found, &case.expected)));
        }
        match golden::read(case.name) {
            None => missing.push(case.name),
            Some(golden) if golden.words != found => {
                let what = difference(&found, &golden.words);
                wrong.push(format!("{}: not what {} gave: {what}", case.name, golden.origin()));
            }
            Some(_) => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    if !missing.is_empty() {
        println!("no golden from hardware yet for: {}", missing.join(", "));
    }
}

#[test]
fn of_common_cuh() {
    let Some(machine) = machine_with(planted(sources())) else { return };
    check(&machine, &common::cases());
}

#[test]
fn of_hopper_cuh() {
    let Some(machine) = machine_with(planted(sources())) else { return };
    if hopper::runs_on(&machine) {
        check(&machine, &hopper::cases());
    }
}

/// A wrapper added to the headers needs a kernel here.
#[test]
fn every_instruction_has_a_kernel() {
    let sources = sources();
    let kernels = [common::FILE, hopper::FILE].map(|file| sources.text(file).unwrap()).concat();
    let mut wrappers = Vec::new();
    for (_, text) in sources.headers() {
        for function in text.split("__device__ __forceinline__").filter(|text| text.contains("asm")) {
            let name = function.split('(').next().unwrap().split_whitespace().next_back().unwrap();
            wrappers.push(name.to_owned());
        }
    }
    assert!(wrappers.len() >= 20, "{wrappers:?}");
    wrappers.retain(|name| !kernels.contains(name.as_str()));
    assert!(wrappers.is_empty(), "nothing runs {wrappers:?}");
}

/// The kernels are programs to a GPU's assembler too, which the stand-in driver does without.
#[test]
fn machine_code_is_made_without_a_warning() {
    let nvrtc = match Nvrtc::load() {
        Ok(nvrtc) => nvrtc,
        Err(error) => return skip_or_panic(&error.to_string()),
    };
    let sources = sources();
    for (file, arch) in [(common::FILE, "sm_80"), (common::FILE, "sm_90a"), (hopper::FILE, "sm_90a")] {
        let text = sources.text(file).unwrap();
        let cubin = nvrtc.compile(file, text, &sources.headers(), arch, Code::Cubin, &[]).unwrap();
        let quiet = !cubin.log.contains("warning") && !cubin.log.contains("Potential Performance Loss");
        assert!(quiet, "{file} {arch}: {}", cubin.log);
    }
}
