//! Runs a program on the stand-in CUDA driver.
//!
//! The library is called `libcuemu.so`, so that nothing finds it by accident; in a folder of its own it is
//! called `libcuda.so`, and `LD_LIBRARY_PATH` leads there.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{self, Command, ExitCode};

const HELP: &str = "\
Runs a program on a stand-in CUDA driver, which executes PTX on the CPU.

Usage: cuemu [--sanitize address|thread] [--] COMMAND [ARGUMENT]...
       cuemu [--sanitize address|thread]

Without a COMMAND, prints the lines that make a shell run every program so.

Options:
  --sanitize address  find accesses outside of variables and allocations (AddressSanitizer)
  --sanitize thread   find data races (ThreadSanitizer)
  --help              print this

Tests under a sanitizer: let cargo run their programs, not itself, on the driver:

  CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER='cuemu --sanitize thread --' cargo test

The environment of the emulated devices (CUEMU_POLICY, CUEMU_CC, ...) is described in the documentation of
the crate. Variables that are set already are kept.
";

fn main() -> ExitCode {
    match run(env::args_os().skip(1).collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: Vec<OsString>) -> Result<(), String> {
    let mut sanitizer = None;
    let mut rest = arguments.as_slice();
    while let [first, others @ ..] = rest {
        match (first.to_str(), others) {
            (Some("--help" | "-h"), _) => {
                print!("{HELP}");
                return Ok(());
            }
            (Some("--sanitize"), [name, others @ ..]) => {
                sanitizer = Some(Sanitizer::named(name)?);
                rest = others;
            }
            (Some("--"), _) => {
                rest = others;
                break;
            }
            (Some(option), _) if option.starts_with('-') => {
                return Err(format!("{option}: unknown, or its value is missing; see cuemu --help"));
            }
            _ => break,
        }
    }
    let variables = environment(sanitizer)?;
    let [program, arguments @ ..] = rest else {
        for (name, value) in variables {
            println!("export {name}={}", quoted(&value));
        }
        return Ok(());
    };
    let mut command = Command::new(program);
    if matches!(sanitizer, Some(Sanitizer::Thread)) && randomises_too_much() {
        command = Command::new("setarch");
        command.arg("-R").arg(program);
    }
    let error = command.args(arguments).envs(variables).exec();
    Err(format!("{}: {error}", command.get_program().display()))
}

/// ThreadSanitizer needs parts of the address space that more than 28 random bits may take.
fn randomises_too_much() -> bool {
    let bits = fs::read_to_string("/proc/sys/vm/mmap_rnd_bits").unwrap_or_default();
    bits.trim().parse::<u32>().is_ok_and(|bits| bits > 28)
}

#[derive(Clone, Copy)]
enum Sanitizer {
    Address,
    Thread,
}

impl Sanitizer {
    fn named(name: &OsStr) -> Result<Self, String> {
        match name.to_str() {
            Some("address") => Ok(Self::Address),
            Some("thread") => Ok(Self::Thread),
            _ => Err(format!("--sanitize {}: expected address or thread", name.display())),
        }
    }
}

/// What the program has to see.
fn environment(sanitizer: Option<Sanitizer>) -> Result<Vec<(&'static str, OsString)>, String> {
    let folder = library_folder()?;
    let mut variables = vec![
        ("LD_LIBRARY_PATH", joined(folder.into_os_string(), env::var_os("LD_LIBRARY_PATH"))),
        ("GRADLENS_CUDA_CODE", "ptx".into()),
    ];
    let Some(sanitizer) = sanitizer else { return Ok(variables) };
    let (name, library, options, value) = match sanitizer {
        Sanitizer::Address => ("address", "libasan.so", "ASAN_OPTIONS", "detect_leaks=0"),
        Sanitizer::Thread => {
            ("thread", "libtsan.so", "TSAN_OPTIONS", "ignore_noninstrumented_modules=1:halt_on_error=1")
        }
    };
    variables.push(("CUEMU_SANITIZER", name.into()));
    variables.push(("LD_PRELOAD", joined(sanitizer_library(library)?, env::var_os("LD_PRELOAD"))));
    variables.push((options, env::var_os(options).unwrap_or_else(|| value.into())));
    Ok(variables)
}

fn joined(first: OsString, others: Option<OsString>) -> OsString {
    let mut list = first;
    if let Some(others) = others.filter(|others| !others.is_empty()) {
        list.push(":");
        list.push(others);
    }
    list
}

/// A folder in which the driver is called `libcuda.so`.
fn library_folder() -> Result<PathBuf, String> {
    let program = env::current_exe().map_err(|error| format!("where this program is: {error}"))?;
    let home = program.parent().unwrap_or(Path::new("."));
    let candidates = [home.join("libcuemu.so"), home.join("deps").join("libcuemu.so")];
    // `cargo build` copies the library out of `deps`, `cargo test` does not: the newer one is right.
    let time = |path: &&PathBuf| fs::metadata(path).and_then(|data| data.modified()).ok();
    let library = candidates.iter().filter(|path| path.exists()).max_by_key(time).ok_or_else(|| {
        format!("{} is missing: build the whole package (cargo build -p cuemu)", candidates[0].display())
    })?;
    let folder = home.join("cuemu-driver");
    link(library, &folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    Ok(folder)
}

fn link(library: &Path, folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let name = folder.join("libcuda.so");
    if fs::read_link(&name).is_ok_and(|target| target == library) {
        return Ok(());
    }
    let fresh = folder.join(format!("libcuda.so.{}", process::id()));
    symlink(library, &fresh)?;
    fs::rename(&fresh, &name)
}

/// Where the compiler of the kernels has this library.
fn sanitizer_library(name: &str) -> Result<OsString, String> {
    let command = env::var("CUEMU_CXX").unwrap_or_else(|_| "g++".into());
    let mut words = command.split_whitespace();
    let compiler = words.next().unwrap_or("g++");
    let asked = Command::new(compiler).args(words).arg(format!("-print-file-name={name}")).output();
    let output = asked.map_err(|error| format!("{compiler}: {error}"))?;
    let path = String::from_utf8_lossy(&output.stdout).trim().to_string();
    // The compiler answers with the bare name if it has no such file. An empty answer is no path either.
    if Path::new(&path).is_absolute() {
        Ok(path.into())
    } else {
        Err(format!("{compiler} has no {name}: install the sanitizers of the compiler"))
    }
}

/// For a shell: in single quotes.
fn quoted(value: &OsStr) -> String {
    format!("'{}'", value.to_string_lossy().replace('\'', r"'\''"))
}
