//! Gives the library the name under which a program looks for its CUDA driver: whoever has loaded this file,
//! from wherever, has loaded `libcuda.so`.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
}
