//! The host's side: devices, memory, streams, launches, the compiler and its cache.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use gradlens::backend::cuda::launch::Launch;
use gradlens::backend::cuda::staging::Staging;
use gradlens::backend::cuda::{Buf, Code, Cuda, CudaSpec, ModuleSpec, Nvrtc, Sources, devices};

use super::faults;
use super::machine::{Machine, Random, machine, machine_with};

/// A kernel for these tests: y[i] = factor·x[i].
const SCALE: &str = r#"
    extern "C" __global__ void __launch_bounds__(128)
    scale(const float* __restrict__ x, float* __restrict__ y, float factor, int len) {
      int i = blockIdx.x * 128 + threadIdx.x;
      if (i < len) y[i] = factor * x[i];
    }
"#;

fn scale_machine() -> Option<Machine> {
    machine_with(Sources::embedded().and("scale.cu", SCALE))
}

/// Launches `scale` with blocks of `threads`, on x and y of equal length.
fn scale(machine: &Machine, x: &Buf<f32>, y: &Buf<f32>, threads: u32) -> gradlens::error::Result<()> {
    let kernel = machine.cuda.kernel("scale.cu", "scale")?;
    let len = x.rows() * x.width();
    let launch = Launch::new(&kernel, len.div_ceil(128), threads)
        .arg("const float* x", x)
        .arg("float* y", y)
        .arg("float factor", 2.0)
        .arg("int len", len as i32);
    // SAFETY: both buffers have `len` elements.
    unsafe { launch.on(&machine.cuda.device.compute) }
}

#[test]
fn host_values_come_back() {
    let Some(machine) = machine() else { return };
    let memory = &machine.cuda.device.memory;
    let mut random = Random::new(1);
    for (rows, width) in [(1, 1), (3, 7), (100, 64), (0, 5)] {
        let values = random.f32(rows * width);
        let buf = Buf::from_host(memory, &values, width).unwrap();
        assert_eq!((buf.rows(), buf.width()), (rows, width));
        assert_eq!(buf.to_host().unwrap(), values);
        let values = random.bf16(rows * width);
        assert_eq!(Buf::from_host(memory, &values, width).unwrap().to_host().unwrap(), values);
    }
}

#[test]
fn a_kernel_runs_and_its_buffers_may_go_before_it_does() {
    let Some(machine) = scale_machine() else { return };
    let memory = &machine.cuda.device.memory;
    let values = Random::new(2).f32(1000);
    let y = Buf::<f32>::new(memory, 1, values.len()).unwrap();
    let x = Buf::from_host(memory, &values, values.len()).unwrap();
    scale(&machine, &x, &y, 128).unwrap();
    drop(x);
    // Memory that was x's a moment ago, in the order of the stream.
    let _overwritten = Buf::from_host(memory, &vec![f32::NAN; values.len()], values.len()).unwrap();
    let wanted: Vec<f32> = values.iter().map(|v| 2.0 * v).collect();
    assert_eq!(y.to_host().unwrap(), wanted);
}

#[test]
fn a_launch_must_match_its_kernel() {
    let Some(machine) = scale_machine() else { return };
    let memory = &machine.cuda.device.memory;
    let x = Buf::from_host(memory, &[1.0_f32; 8], 8).unwrap();
    let y = Buf::from_host(memory, &[0.0_f32; 8], 8).unwrap();
    let kernel = machine.cuda.kernel("scale.cu", "scale").unwrap();
    let swapped = Launch::new(&kernel, 1, 128).arg("float* y", &y).arg("const float* x", &x);
    let swapped = swapped.arg("float factor", 2.0).arg("int len", 8);
    let short =
        Launch::new(&kernel, 1, 128).arg("const float* x", &x).arg("float* y", &y).arg("float factor", 2.0);
    let wrong_type = Launch::new(&kernel, 1, 128).arg("const float* x", &x).arg("float* y", &y);
    let wrong_type = wrong_type.arg("float factor", 2).arg("int len", 8);
    let narrow = Buf::from_host(memory, &[half::bf16::ONE; 16], 16).unwrap();
    let wrong_element = Launch::new(&kernel, 1, 128).arg("const float* x", &narrow).arg("float* y", &y);
    let wrong_element = wrong_element.arg("float factor", 2.0).arg("int len", 8);
    let absent = Launch::new(&kernel, 1, 128).arg("const float* x", None::<&Buf<u32>>).arg("float* y", &y);
    let absent = absent.arg("float factor", 2.0).arg("int len", 8);
    // SAFETY: as below.
    let error = unsafe { wrong_element.on(&machine.cuda.device.compute) }.unwrap_err().to_string();
    assert!(error.contains("const float* x (a buffer of bf16), float* y"), "{error}");
    for launch in [swapped, short, wrong_type, wrong_element, absent] {
        // SAFETY: refused before anything runs.
        let error = unsafe { launch.on(&machine.cuda.device.compute) }.unwrap_err().to_string();
        assert!(error.contains("a launch does not match its kernel"), "{error}");
        assert!(error.contains("kernel scale of kernels/scale.cu, grid 1x1x1, block 128"), "{error}");
        assert!(error.contains("const float* x, float* y, float factor, int len"), "{error}");
    }
    assert_eq!(y.to_host().unwrap(), [0.0; 8]);
}

#[test]
fn a_launch_must_be_on_its_buffers_stream() {
    let Some(machine) = scale_machine() else { return };
    let device = &machine.cuda.device;
    let x = Buf::from_host(&device.memory, &[1.0_f32; 8], 8).unwrap();
    let kernel = machine.cuda.kernel("scale.cu", "scale").unwrap();
    let launch = Launch::new(&kernel, 1, 128)
        .arg("const float* x", &x)
        .arg("float* y", &x)
        .arg("float factor", 2.0)
        .arg("int len", 8);
    // SAFETY: refused before anything runs.
    let error = unsafe { launch.on(&device.transfer) }.unwrap_err().to_string();
    assert!(error.contains("a launch on another stream than its memory's"), "{error}");
    assert!(error.contains("const float* x of another stream"), "{error}");
    // SAFETY: x has 8 elements.
    unsafe { launch.on(&device.compute) }.unwrap();
    assert_eq!(x.to_host().unwrap(), [2.0; 8]);
}

#[test]
fn a_block_larger_than_the_launch_bounds_is_refused() {
    let Some(machine) = scale_machine() else { return };
    let memory = &machine.cuda.device.memory;
    let x = Buf::from_host(memory, &[1.0_f32; 8], 8).unwrap();
    let error = scale(&machine, &x, &x, 256).unwrap_err().to_string();
    assert!(error.contains("the CUDA driver refused a launch"), "{error}");
    assert!(error.contains("kernel scale of kernels/scale.cu") && error.contains("block 256"), "{error}");
    // Refused, not failed: the device works on.
    scale(&machine, &x, &x, 128).unwrap();
    assert_eq!(x.to_host().unwrap(), [2.0; 8]);
}

#[test]
fn more_shared_memory_than_there_is_is_refused() {
    let Some(machine) = scale_machine() else { return };
    let kernel = machine.cuda.kernel("scale.cu", "scale").unwrap();
    kernel.allow_shared_bytes(machine.cuda.device.info.shared_bytes_per_block).unwrap();
    let error = kernel.allow_shared_bytes(1 << 20).unwrap_err().to_string();
    assert!(error.contains("does not give kernel scale 1048576 bytes of shared memory"), "{error}");
}

#[test]
fn an_upload_is_seen_after_its_event_and_not_before() {
    let Some(machine) = scale_machine() else { return };
    let device = &machine.cuda.device;
    let staging = Staging::new(&device.transfer).unwrap();
    // Through both pinned buffers, more than once each.
    let values = Random::new(3).f32(11 << 20);
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let x = Buf::from_host(&device.memory, &vec![0.0_f32; values.len()], values.len()).unwrap();
    let y = Buf::<f32>::new(&device.memory, 1, values.len()).unwrap();
    let ready = device.compute.record_event(None).unwrap();
    let upload = staging.upload(&bytes, x.allocation(), &ready).unwrap();
    if machine.emulated() {
        // The stand-in driver delays what nothing waits for, so a forgotten wait shows. (The first pieces are
        // there already: their pinned buffers were needed again.)
        scale(&machine, &x, &y, 128).unwrap();
        let stale = y.to_host().unwrap();
        assert_eq!(stale[..4], values[..4].iter().map(|v| 2.0 * v).collect::<Vec<_>>());
        assert_eq!(stale[values.len() - 1], 0.0);
    }
    upload.wait_on(&device.compute).unwrap();
    scale(&machine, &x, &y, 128).unwrap();
    let wanted: Vec<f32> = values.iter().map(|v| 2.0 * v).collect();
    assert!(y.to_host().unwrap() == wanted);

    let small = Buf::<f32>::new(&device.memory, 1, 2).unwrap();
    let error = staging.upload(&bytes, small.allocation(), &ready).err().unwrap().to_string();
    assert!(error.contains("larger than its target") && error.contains("at most 8 bytes"), "{error}");
}

#[test]
fn small_uploads_take_turns_at_the_pinned_buffers() {
    let Some(machine) = machine() else { return };
    let device = &machine.cuda.device;
    let staging = Staging::new(&device.transfer).unwrap();
    let zeros = || Buf::from_host(&device.memory, &[0.0_f32; 4], 4).unwrap();
    let (x, y) = (zeros(), zeros());
    let ready = device.compute.record_event(None).unwrap();
    let one = 1.0_f32.to_le_bytes();
    let first = staging.upload(&one, x.allocation(), &ready).unwrap();
    let second = staging.upload(&one, y.allocation(), &ready).unwrap();
    if machine.emulated() {
        // The second did not have to wait for the first one's buffer, so nobody has waited for either.
        assert_eq!((x.to_host().unwrap()[0], y.to_host().unwrap()[0]), (0.0, 0.0));
    }
    first.wait_on(&device.compute).unwrap();
    second.wait_on(&device.compute).unwrap();
    assert_eq!((x.to_host().unwrap()[0], y.to_host().unwrap()[0]), (1.0, 1.0));
}

#[test]
fn the_target_of_an_upload_may_go_before_it_arrives() {
    let Some(machine) = machine() else { return };
    let device = &machine.cuda.device;
    let staging = Staging::new(&device.transfer).unwrap();
    let values = Random::new(4).f32(1 << 16);
    let x = Buf::<f32>::new(&device.memory, 1, values.len()).unwrap();
    let ready = device.compute.record_event(None).unwrap();
    let upload = staging.upload(bytemuck::cast_slice(&values), x.allocation(), &ready).unwrap();
    drop(x);
    drop(upload);
    // Perhaps where x was: what was copied there must not come later.
    let y = Buf::from_host(&device.memory, &vec![7.0_f32; values.len()], values.len()).unwrap();
    device.compute.synchronize().unwrap();
    device.synchronize().unwrap();
    assert!(y.to_host().unwrap().iter().all(|v| *v == 7.0));
}

#[test]
fn sizes_that_no_device_has() {
    let Some(machine) = machine() else { return };
    let modules = ModuleSpec { sources: Sources::embedded(), code: Code::Ptx, cache: None };
    let cuda = Cuda::open(CudaSpec { ordinal: 0, budget_bytes: Some(u64::MAX), modules }).unwrap();
    let memory = &cuda.device.memory;
    let kept = Buf::<f32>::new(memory, 1, 100).unwrap();
    for (rows, width, limit) in [
        (usize::MAX, 2, "the device memory budget is exhausted"),
        (usize::MAX / 4, 2, "the device memory budget is exhausted"),
        (usize::MAX / 8, 2, "the device memory budget is exhausted"),
        (1 << 50, 2, "device memory is exhausted"),
    ] {
        let error = Buf::<f32>::new(memory, rows, width).err().unwrap().to_string();
        assert!(error.contains(limit) && error.contains("400 in use"), "{error}");
        assert_eq!(memory.used_bytes(), 400, "what could not be had is not counted");
    }
    drop(kept);
    assert_eq!(memory.used_bytes(), 0);
    drop(machine);
}

#[test]
fn host_values_are_whole_rows() {
    let Some(machine) = machine() else { return };
    for (len, width) in [(7, 2), (1, 0)] {
        let values = vec![0.0_f32; len];
        let copy = || Buf::from_host(&machine.cuda.device.memory, &values, width).map(|_| ());
        assert!(catch_unwind(AssertUnwindSafe(copy)).is_err(), "{len} in rows of {width}");
    }
}

#[test]
fn memory_is_counted_and_kept_within_its_budget() {
    let Some(machine) = machine() else { return };
    let modules = ModuleSpec { sources: Sources::embedded(), code: Code::Ptx, cache: None };
    let cuda = Cuda::open(CudaSpec { ordinal: 0, budget_bytes: Some(10_000), modules }).unwrap();
    let memory = &cuda.device.memory;
    let first = Buf::<f32>::new(memory, 10, 100).unwrap();
    assert_eq!((memory.used_bytes(), memory.peak_bytes(), memory.budget_bytes()), (4_000, 4_000, 10_000));
    let error = Buf::<f32>::new(memory, 16, 100).err().unwrap().to_string();
    assert!(error.contains("the device memory budget is exhausted"), "{error}");
    assert!(
        error.contains("at most 10000 bytes") && error.contains("4000 in use and 6400 bytes more"),
        "{error}"
    );
    let second = Buf::<half::bf16>::new(memory, 30, 100).unwrap();
    drop(first);
    drop(second);
    assert_eq!((memory.used_bytes(), memory.peak_bytes()), (0, 10_000));
    drop(machine);
}

#[test]
fn a_device_that_is_not_there() {
    let Some(machine) = machine() else { return };
    let modules = ModuleSpec { sources: Sources::embedded(), code: Code::Ptx, cache: None };
    let error = Cuda::open(CudaSpec { ordinal: 99, budget_bytes: None, modules }).err().unwrap().to_string();
    assert!(error.contains("no such CUDA device") && error.contains("cuda:99"), "{error}");
    let all = devices().unwrap();
    assert!(error.contains(&format!("cuda:0 {}", all[0].name)), "{error}");
    assert!(!machine.emulated() || all.len() == 2, "the stand-in driver has two devices");
}

#[test]
fn a_source_that_does_not_compile() {
    let broken =
        Sources::embedded().and("broken.cu", "extern \"C\" __global__ void broken(int x) { return y; }");
    let Some(machine) = machine_with(broken) else { return };
    let error = machine.cuda.kernel("broken.cu", "broken").err().unwrap().to_string();
    assert!(error.contains("cannot compile this source") && error.contains("kernels/broken.cu"), "{error}");
    assert!(error.contains("identifier \"y\" is undefined"), "{error}");
    let error = machine.cuda.kernel("absent.cu", "absent").err().unwrap().to_string();
    assert!(error.contains("no such kernel file") && error.contains("absent.cu"), "{error}");
}

#[test]
fn an_entry_point_that_is_not_there() {
    let Some(machine) = scale_machine() else { return };
    let error = machine.cuda.kernel("scale.cu", "scales").err().unwrap().to_string();
    assert!(error.contains("no entry point scales") && error.contains("kernels/scale.cu"), "{error}");
}

#[test]
fn compiled_kernels_are_kept_and_damage_is_repaired() {
    let Some(machine) = machine() else { return };
    let folder = tempfile::tempdir().unwrap();
    let code = machine.code;
    let load = |text: &'static str| {
        let sources = Sources::embedded().and("scale.cu", text);
        let modules = ModuleSpec { sources, code, cache: Some(folder.path().to_owned()) };
        let cuda = Cuda::open(CudaSpec { ordinal: 0, budget_bytes: None, modules }).unwrap();
        cuda.kernel("scale.cu", "scale").unwrap();
    };
    let entries = || {
        let mut paths: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths
    };
    load(SCALE);
    let [entry] = entries().try_into().unwrap();
    let bytes = fs::read(&entry).unwrap();
    for damaged in [bytes[..bytes.len() / 2].to_vec(), b"not an entry".to_vec(), Vec::new()] {
        fs::write(&entry, damaged).unwrap();
        load(SCALE);
        assert!(fs::read(&entry).unwrap() == bytes, "rebuilt");
        assert_eq!(entries().len(), 1, "nothing else is left behind");
    }
    // What is there is used: an entry with another image and its right hash reaches the driver.
    load(concat!("// another text\n", r#"extern "C" __global__ void scale() {}"#));
    assert_eq!(entries().len(), 2, "another source has another entry");
}

/// Runs in a process of its own: nothing loaded the stand-in driver there.
#[test]
fn without_a_driver() {
    if !faults::is_child() {
        return faults::run_child("host::without_a_driver", "none", &[("LD_LIBRARY_PATH", "")])
            .assert_passed();
    }
    // A machine with a GPU has one.
    if let Err(error) = devices() {
        let error = error.to_string();
        assert!(
            error.contains("no CUDA driver on this machine") && error.contains("hint: --device cpu"),
            "{error}"
        );
    }
}

/// Runs in a process of its own: the compiler is looked for once.
#[test]
fn without_a_compiler() {
    if !faults::is_child() {
        let nowhere = [("GRADLENS_NVRTC", "/nowhere")];
        return faults::run_child("host::without_a_compiler", "none", &nowhere).assert_passed();
    }
    let error = Nvrtc::load().err().unwrap().to_string();
    assert!(error.contains("NVRTC, which compiles the CUDA kernels, was not found"), "{error}");
    assert!(
        error.contains("GRADLENS_NVRTC=/nowhere") && error.contains("pip install nvidia-cuda-nvrtc"),
        "{error}"
    );
}

/// A library that calls itself NVRTC 11.8, as `libnvrtc.so` in `folder`.
fn write_decoy(folder: &Path) {
    let (source, library) = (folder.join("decoy.cpp"), folder.join("libnvrtc.so"));
    let text = "extern \"C\" int nvrtcVersion(int* major, int* minor) { *major = 11; *minor = 8; return 0; }";
    fs::write(&source, text).unwrap();
    let compiler = env::var("CUEMU_CXX").unwrap_or_else(|_| "g++".to_owned());
    let compiled =
        Command::new(compiler).args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status();
    assert!(compiled.unwrap().success());
}

/// Runs in processes of its own: the compiler is looked for once.
#[test]
fn a_decoy_in_the_loaders_path_is_not_taken() {
    if faults::is_child() {
        let nvrtc = Nvrtc::load().unwrap();
        assert!(nvrtc.version.0 >= 12 && nvrtc.archs.contains(&90), "{nvrtc:?}");
        let text = "extern \"C\" __global__ void f() {}";
        nvrtc.compile("f.cu", text, &[], "sm_90a", Code::Cubin, &[]).unwrap();
        assert_eq!(nvrtc.path.as_ref().unwrap().parent().unwrap(), Path::new(&env::var("WANTED").unwrap()));
        return;
    }
    // Where the real one is, unless the loader knows it by itself.
    let Some(machine) = machine() else { return };
    let Some(real) = Nvrtc::load().unwrap().path.as_deref().and_then(Path::parent) else { return };
    drop(machine);
    let folder = tempfile::tempdir().unwrap();
    write_decoy(folder.path());
    let toolkit: PathBuf = folder.path().join("toolkit");
    fs::create_dir(&toolkit).unwrap();
    std::os::unix::fs::symlink(real, toolkit.join("lib64")).unwrap();
    let decoy = folder.path().to_str().unwrap();
    let (real, toolkit) = (real.to_str().unwrap(), toolkit.to_str().unwrap());
    let by_toolkit = format!("{toolkit}/lib64");
    for (named, cuda_home, wanted) in [(real, "", real), ("", toolkit, by_toolkit.as_str())] {
        let variables = [
            ("LD_LIBRARY_PATH", decoy),
            ("GRADLENS_NVRTC", named),
            ("CUDA_HOME", cuda_home),
            ("CUDA_PATH", ""),
            ("WANTED", wanted),
        ];
        faults::run_child("host::a_decoy_in_the_loaders_path_is_not_taken", "none", &variables)
            .assert_passed();
    }
}

/// Runs in a process of its own: the compiler is looked for once.
#[test]
fn an_old_compiler_is_named() {
    if faults::is_child() {
        let error = Nvrtc::load().err().unwrap().to_string();
        assert!(error.contains("libnvrtc of CUDA 12 or 13"), "{error}");
        assert!(error.contains("(NVRTC 11.8 at ") && error.contains("libnvrtc.so)"), "{error}");
        return;
    }
    if machine().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    write_decoy(folder.path());
    let variables = [("GRADLENS_NVRTC", folder.path().to_str().unwrap())];
    faults::run_child("host::an_old_compiler_is_named", "none", &variables).assert_passed();
}

/// Machine code does not run on the stand-in driver, which must say so.
#[test]
fn machine_code_is_refused_by_the_stand_in() {
    let Some(machine) = machine() else { return };
    if !machine.emulated() {
        return;
    }
    let sources = Sources::embedded().and("scale.cu", SCALE);
    let modules = ModuleSpec { sources, code: Code::Cubin, cache: None };
    let cuda = Cuda::open(CudaSpec { ordinal: 0, budget_bytes: None, modules }).unwrap();
    let error = cuda.kernel("scale.cu", "scale").err().unwrap().to_string();
    assert!(
        error.contains("could not load kernels/scale.cu") && error.contains("GRADLENS_CUDA_CODE=ptx"),
        "{error}"
    );
}
