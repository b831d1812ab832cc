//! What the environment changes. Each of these tests starts this program again, in another environment, to
//! run one of the ignored tests below.

use std::env;
use std::process::{Command, Output};

use cuemu::launcher::{self, Sanitizer};

use crate::api::*;

fn again(test: &str, through: &[&str], variables: &[(&str, &str)]) -> Output {
    let program = env::current_exe().unwrap();
    let mut words: Vec<String> = through.iter().map(|word| (*word).to_string()).collect();
    words.push(program.display().to_string());
    words.extend(["--exact", &format!("environment::{test}"), "--ignored", "--nocapture"].map(String::from));
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).envs(variables.iter().copied());
    command.output().unwrap()
}

#[track_caller]
fn passes(output: &Output) {
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("1 passed"), "{text}");
}

#[test]
fn memory_is_limited_and_counted() {
    passes(&again(
        "of_one_small_device",
        &[],
        &[("CUEMU_MEMORY", "1000"), ("CUEMU_DEVICES", "1"), ("CUEMU_CC", "80")],
    ));
}

#[test]
#[ignore = "needs its environment"]
fn of_one_small_device() {
    fails(cuCtxSynchronize(), 3, "cuInit");
    let context = Context::new(0);
    assert_eq!(made(cuDeviceGetCount), 1);
    assert_eq!(made(|value| cuDeviceGetAttribute(value, 97, 0)), 163 << 10);
    assert_eq!(
        cuTensorMapEncodeTiled(&mut TensorMap([0; 16]), 9, 1, 0, &1, &1, &1, &1, 0, 0, 0, 0),
        NOT_SUPPORTED
    );
    let info = || {
        let mut total = 0;
        (made(|free| cuMemGetInfo_v2(free, &mut total)), total)
    };
    assert_eq!(info(), (1000, 1000));
    let first = made(|pointer| cuMemAlloc_v2(pointer, 600));
    fails(cuMemAlloc_v2(&mut 0, 401), OUT_OF_MEMORY, "401 bytes were asked for, 400 of the 1000");
    let second = made(|pointer| cuMemAlloc_v2(pointer, 400));
    assert_eq!((info().0, cuemu_live_allocations()), (0, 2));
    ok(cuMemFree_v2(second));
    assert_eq!((info().0, cuemu_live_allocations()), (400, 1));
    // A free that waits in a stream is waited for before an allocation fails.
    let stream = stream();
    ok(cuMemFreeAsync(first, stream));
    assert_eq!(info().0, 400);
    let all = made(|pointer| cuMemAllocAsync(pointer, 1000, stream));
    let pool = made(|pool| cuDeviceGetDefaultMemPool(pool, 0));
    assert_eq!(made(|bytes: *mut u64| cuMemPoolGetAttribute(pool, 7, bytes.cast())), 1000);
    ok(cuMemFreeAsync(all, stream));
    // What a context leaves behind goes with it.
    alloc(1);
    drop(context);
    assert_eq!(cuemu_live_allocations(), 0);
}

#[test]
fn mistakes_are_told() {
    passes(&again("of_a_wrong_variable", &[], &[("CUEMU_POLICY", "sideways")]));
    passes(&again("without_a_compiler", &[], &[("CUEMU_CXX", "/nowhere/g++")]));
    passes(&again("without_a_cache", &[], &[("CUEMU_CACHE", "/proc/nowhere")]));
}

#[test]
#[ignore = "needs its environment"]
fn of_a_wrong_variable() {
    fails(cuInit(0), INVALID_VALUE, "CUEMU_POLICY=sideways: expected one of fifo, reverse");
}

#[test]
#[ignore = "needs its environment"]
fn without_a_compiler() {
    let _context = Context::new(0);
    fails(cuMemAlloc_v2(&mut 0, 4), 221, "CUEMU_CXX");
}

#[test]
#[ignore = "needs its environment"]
fn without_a_cache() {
    let _context = Context::new(0);
    fails(cuMemAlloc_v2(&mut 0, 4), 304, "set CUEMU_CACHE to a folder that can be written");
}

#[test]
fn schedules_come_from_the_environment_and_from_calls() {
    passes(&again("of_a_schedule", &[], &[("CUEMU_POLICY", "reverse"), ("CUEMU_POISON", "0x12345678")]));
}

#[test]
#[ignore = "needs its environment"]
fn of_a_schedule() {
    let context = Context::new(0);
    let mut schedule = cuemu::driver::Schedule::default();
    assert_eq!(cuemu_schedule_bytes(), size_of_val(&schedule));
    ok(cuemu_get_schedule(&mut schedule));
    assert_eq!((schedule.policy, schedule.poison), (1, 0x1234_5678));
    let pointer = alloc(1);
    assert_eq!(read(pointer, 1), [0x1234_5678]);
    // Two streams that write the same word: the older one comes last.
    let write_twice = || {
        let streams = [stream(), stream()];
        ok(cuMemsetD32Async(pointer, 1, 1, streams[0]));
        ok(cuMemsetD32Async(pointer, 2, 1, streams[1]));
        ok(cuCtxSynchronize());
        read(pointer, 1)[0]
    };
    assert_eq!(write_twice(), 1);
    schedule.policy = 0;
    ok(cuemu_set_schedule(&schedule));
    assert_eq!(write_twice(), 2);
    schedule.policy = 9;
    assert_eq!(cuemu_set_schedule(&schedule), INVALID_VALUE);
    // A failure can be forgotten.
    ok(cuMemFreeAsync(pointer, 0));
    ok(cuMemFreeAsync(pointer, 0));
    fails(cuCtxSynchronize(), INVALID_VALUE, "freed before");
    cuemu_reset();
    ok(cuCtxSynchronize());
    drop(context);
}

#[test]
fn sanitizers_report() {
    let program = env!("CARGO_BIN_EXE_cuemu");
    passes(&again("a_right_kernel", &[program], &[]));
    passes(&again("a_right_kernel", &[program, "--sanitize", "address"], &[]));
    passes(&again("a_right_kernel", &[program, "--sanitize", "thread", "--"], &[]));
    let output = again("a_race", &[program, "--sanitize", "thread"], &[]);
    let report = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && report.contains("ThreadSanitizer: data race"), "{report}");
    // Without the program, a sanitizer is not there.
    passes(&again("without_the_sanitizer", &[], &[("CUEMU_SANITIZER", "address")]));
}

#[test]
fn the_launcher_knows_the_environment() {
    let variables = [("CUEMU_CXX", "g++ -m64"), ("LD_PRELOAD", ""), ("TSAN_OPTIONS", "verbosity=0")];
    passes(&again("of_a_sanitizer", &[], &variables));
}

#[test]
#[ignore = "needs its environment"]
fn of_a_sanitizer() {
    assert_eq!(launcher::environment(Sanitizer::None), Ok(vec![]));
    let address = launcher::environment(Sanitizer::Address).unwrap();
    assert_eq!(address[0], ("CUEMU_SANITIZER", "address".into()));
    assert!(address[1].0 == "LD_PRELOAD" && std::path::Path::new(&address[1].1).is_file());
    assert_eq!(address[2], ("ASAN_OPTIONS", "detect_leaks=0".into()));
    // What is set stays.
    let thread = launcher::environment(Sanitizer::Thread).unwrap();
    assert_eq!(thread[2], ("TSAN_OPTIONS", "verbosity=0".into()));
    assert_eq!(launcher::command("some program", Sanitizer::None).get_program(), "some program");
    let echo = launcher::command("echo", Sanitizer::Thread).arg("answer").output().unwrap();
    assert_eq!(String::from_utf8_lossy(&echo.stdout), "answer\n");
    let (name, folders) = launcher::library_path().unwrap();
    assert_eq!(name, "LD_LIBRARY_PATH");
    assert!(env::split_paths(&folders).next().unwrap().join("libcuda.so").exists());
}

#[test]
#[ignore = "needs its environment"]
fn a_right_kernel() {
    let _context = Context::new(0);
    let pointer = alloc(100);
    fill(pointer, 100, 5, 0);
    assert_eq!(read(pointer, 100), [5; 100]);
}

#[test]
#[ignore = "needs its environment"]
fn a_race() {
    let _context = Context::new(0);
    let pointer = alloc(1);
    ok(launch(kernel("race"), (1, 32, 0), 0, &[&pointer]));
    ok(cuCtxSynchronize());
}

#[test]
fn fences_need_a_word_between_them() {
    let program = env!("CARGO_BIN_EXE_cuemu");
    let run = |fences| again("a_reduction", &[program, "--sanitize", "thread"], &[("TEST_FENCES", fences)]);
    for right in ["BOTH", "ORDERED"] {
        passes(&run(right));
    }
    for wrong in ["BEFORE", "AFTER", "NONE", "APART"] {
        let output = run(wrong);
        let report = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && report.contains("ThreadSanitizer: data race"),
            "{wrong}: {report}"
        );
    }
}

/// The last of four blocks adds up what all have written.
#[test]
#[ignore = "needs its environment"]
fn a_reduction() {
    let fence = |wanted: bool| if wanted { "membar.gl;" } else { "" };
    let fences = env::var("TEST_FENCES").unwrap();
    let ordered = if fences == "ORDERED" { ".acq_rel.gpu" } else { "" };
    let ptx = include_str!("reduction.ptx")
        .replace("BEFORE;", fence(matches!(fences.as_str(), "BOTH" | "BEFORE" | "APART")))
        .replace("AFTER;", fence(matches!(fences.as_str(), "BOTH" | "AFTER" | "APART")))
        .replace("ORDERED", ordered)
        .replace("APART", if fences == "APART" { "4" } else { "0" });
    let _context = Context::new(0);
    let (data, sums, counters) = (alloc(128), alloc(32), alloc(4));
    write(counters, &[0; 4]);
    let module = load(&ptx);
    let function = made(|function| cuModuleGetFunction(function, module, c"reduce".as_ptr()));
    ok(launch(function, (4, 32, 0), 0, &[&data, &sums, &counters]));
    ok(cuCtxSynchronize());
    if fences != "APART" {
        assert_eq!(read(sums, 32), (0..32).map(|i| 4 * i + 6).collect::<Vec<u32>>());
    }
}

#[test]
#[ignore = "needs its environment"]
fn without_the_sanitizer() {
    let _context = Context::new(0);
    fails(cuMemAlloc_v2(&mut 0, 4), 303, "cuemu --sanitize address COMMAND");
}
