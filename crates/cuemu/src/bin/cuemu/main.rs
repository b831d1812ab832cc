//! Runs a program on the stand-in CUDA driver.
//!
//! The library is called `libcuemu.so`, so that nothing finds it by accident; in a folder of its own it is
//! called `libcuda.so`, and `LD_LIBRARY_PATH` leads there.

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod program;

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
mod program {
    pub fn main() -> std::process::ExitCode {
        eprintln!("error: the stand-in CUDA driver needs Linux on x86-64");
        std::process::ExitCode::from(2)
    }
}

fn main() -> std::process::ExitCode {
    program::main()
}
