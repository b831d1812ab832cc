//! The program, where there is a driver.

use std::env;
use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::process::ExitCode;

use cuemu::launcher::{self, Sanitizer};

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

pub fn main() -> ExitCode {
    match run(env::args_os().skip(1).collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: Vec<OsString>) -> Result<(), String> {
    let mut sanitizer = Sanitizer::None;
    let mut rest = arguments.as_slice();
    while let [first, others @ ..] = rest {
        match (first.to_str(), others) {
            (Some("--help" | "-h"), _) => {
                print!("{HELP}");
                return Ok(());
            }
            (Some("--sanitize"), [name, others @ ..]) => {
                sanitizer = sanitizer_named(name)?;
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
    let mut variables = vec![launcher::library_path()?, ("GRADLENS_CUDA_CODE", "ptx".into())];
    variables.extend(launcher::environment(sanitizer)?);
    let [program, arguments @ ..] = rest else {
        for (name, value) in variables {
            println!("export {name}={}", quoted(&value));
        }
        return Ok(());
    };
    let mut command = launcher::command(program, sanitizer);
    let error = command.args(arguments).envs(variables).exec();
    Err(format!("{}: {error}", command.get_program().display()))
}

fn sanitizer_named(name: &OsStr) -> Result<Sanitizer, String> {
    match name.to_str() {
        Some("address") => Ok(Sanitizer::Address),
        Some("thread") => Ok(Sanitizer::Thread),
        _ => Err(format!("--sanitize {}: expected address or thread", name.display())),
    }
}

/// For a shell: in single quotes.
fn quoted(value: &OsStr) -> String {
    format!("'{}'", value.to_string_lossy().replace('\'', r"'\''"))
}
