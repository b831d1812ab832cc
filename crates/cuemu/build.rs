//! Gives the library the name under which a program looks for its CUDA driver: whoever has loaded this file,
//! from wherever, has loaded `libcuda.so`. And embeds the sources of the runtime, whichever there are.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=runtime");
    if env::var("CARGO_CFG_TARGET_OS").is_ok_and(|system| system == "linux") {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
    }

    let folder = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("runtime");
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)
        .expect("the runtime is part of this crate")
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "h" || ending == "cpp"))
        .collect();
    files.sort();
    let mut list = String::from("&[\n");
    for path in files {
        let name = path.file_name().expect("a file").to_string_lossy().into_owned();
        println!("cargo:rerun-if-changed={}", path.display());
        writeln!(list, "    ({name:?}, include_str!({:?})),", path.display().to_string()).expect("a string");
    }
    list.push_str("]\n");
    let out = Path::new(&env::var("OUT_DIR").expect("cargo sets it")).join("runtime.rs");
    fs::write(out, list).expect("OUT_DIR can be written");
}
