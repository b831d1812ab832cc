//! What a program needs to run on the stand-in driver, under a sanitizer in particular: variables that have to
//! be set before it starts.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{self, Command};

pub use crate::driver::Sanitizer;

/// What the environment of a program has to have for `sanitizer`, beside what it has: `CUEMU_SANITIZER`, the
/// sanitizer's library in `LD_PRELOAD`, and its options, where the environment has none. Empty for
/// [`Sanitizer::None`].
///
/// # Errors
///
/// A sentence that names what is missing: the compiler, or its library.
pub fn environment(sanitizer: Sanitizer) -> Result<Vec<(&'static str, OsString)>, String> {
    let (library, options, value) = match sanitizer {
        Sanitizer::None => return Ok(Vec::new()),
        Sanitizer::Address => ("libasan.so", "ASAN_OPTIONS", "detect_leaks=0"),
        Sanitizer::Thread => {
            ("libtsan.so", "TSAN_OPTIONS", "ignore_noninstrumented_modules=1:halt_on_error=1")
        }
    };
    Ok(vec![
        ("CUEMU_SANITIZER", sanitizer.name().into()),
        ("LD_PRELOAD", joined(sanitizer_library(library)?, env::var_os("LD_PRELOAD"))),
        (options, env::var_os(options).unwrap_or_else(|| value.into())),
    ])
}

/// The variable that makes a program find the driver: `LD_LIBRARY_PATH`, with a folder in which
/// `libcuemu.so`, which lies beside the running program, is called `libcuda.so`. A program that loads
/// `libcuemu.so` by its path needs none.
///
/// # Errors
///
/// A sentence that tells what is missing.
pub fn library_path() -> Result<(&'static str, OsString), String> {
    Ok(("LD_LIBRARY_PATH", joined(library_folder()?.into_os_string(), env::var_os("LD_LIBRARY_PATH"))))
}

/// A command that runs `program`, with the environment yet to be set. Under a sanitizer, and where Linux
/// randomises addresses more than sanitizers can bear, that is `setarch -R program`.
pub fn command(program: impl AsRef<OsStr>, sanitizer: Sanitizer) -> Command {
    if sanitizer == Sanitizer::None || !randomises_too_much() {
        return Command::new(program);
    }
    let mut command = Command::new("setarch");
    command.arg("-R").arg(program);
    command
}

/// Sanitizers need parts of the address space that more than 28 random bits may take.
fn randomises_too_much() -> bool {
    let bits = fs::read_to_string("/proc/sys/vm/mmap_rnd_bits").unwrap_or_default();
    bits.trim().parse::<u32>().is_ok_and(|bits| bits > 28)
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
    let command = env::var("CUEMU_CXX").unwrap_or_default();
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
