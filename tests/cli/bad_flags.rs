//! Command lines that make no sense (status 2), and places that results cannot go to (status 1).

use crate::dir::{Dir, LAYER};

/// A run that would save, so that there is something it could leave behind.
fn save(rest: &str) -> String {
    format!("{LAYER} --save_outputs {rest}")
}

/// Only the hub has configs, splits and revisions.
#[test]
fn flags_of_the_hub_with_files_on_this_machine() {
    let dir = Dir::with("qwen2");
    for flag in ["--dataset_config", "--dataset_split", "--dataset_revision"] {
        dir.refuse(2, &save(&format!("{flag} x")), &["no configs, splits or revisions", flag, "\"x\""]);
    }
    dir.refuse(2, &save("--revision v2"), &["a folder has no revisions", "--revision", "v2"]);
}

#[test]
fn layers_out_of_range() {
    let dir = Dir::with("qwen2");
    for layers in ["4", "0-4", "0,1,99"] {
        let flag = format!("--layers {layers}");
        dir.refuse(2, &save(&flag), &["out of range", "layers from 0 to 3: the model has 4", "--layers"]);
    }
}

#[test]
fn layers_that_are_none() {
    let dir = Dir::with("qwen2");
    for layers in ["x", "", "1-", "-1", "0,,1", "0;1", "1.5", "99999999999999999999999"] {
        dir.refuse_with(2, &save("--layers"), &[layers], &["the layers cannot be read", "0-3,8,20-23"]);
    }
    dir.refuse(2, &save("--layers 3-1"), &["did you mean 1-3?"]);
}

#[test]
fn numbers_that_are_too_small() {
    let dir = Dir::with("qwen2");
    for flag in ["--num_samples", "--batch_size", "--max_length", "--threads", "--tokens_per_pass"] {
        dir.refuse(2, &save(&format!("{flag} 0")), &[flag, "expected: 1 or more", "found:    0"]);
        dir.refuse_by_clap(&save(&format!("{flag} some")), &[flag, "'some'"]);
        dir.refuse_by_clap(&save(&format!("{flag}=-1")), &[flag, "'-1'"]);
    }
    for memory in ["0", "-1", "nan", "inf"] {
        dir.refuse(2, &save(&format!("--memory {memory}")), &["--memory", "GiB, more than 0"]);
    }
    dir.refuse(2, "demo --num_samples 0", &["--num_samples", "1 or more"]);
    dir.refuse(2, "demo --threads 0", &["--threads", "1 or more"]);
}

#[test]
fn powers_that_are_none() {
    let dir = Dir::with("qwen2");
    for power in ["nan", "0", "-1", "inf", "-inf", "0.5,0", "1e999"] {
        let says = ["the power cannot be used", "--power", "a finite number greater than 0"];
        dir.refuse(2, &save(&format!("--power {power}")), &says);
    }
    for power in ["abc", "", "0.5,,2", "1,2,x"] {
        dir.refuse_with(2, &save("--power"), &[power], &["the power is not a number", "--power 2.0"]);
    }
}

#[test]
fn both_spellings_of_the_normalisation() {
    let dir = Dir::with("qwen2");
    let both = save("--normalize_gradients sum --normalize_mode sum");
    dir.refuse(2, &both, &["given twice", "--normalize_gradients and --normalize_mode"]);
}

#[test]
fn unknown_choices_list_the_known_ones() {
    let dir = Dir::with("qwen2");
    for (flag, known) in [
        ("--aggregate_by", "values, gradients"),
        ("--aggregation_mode", "mean, mean_abs, both"),
        ("--normalize_gradients", "none, sum_abs, sum, both, all"),
        ("--normalize_mode", "none, sum_abs, sum, both, all"),
        ("--loss_reduction", "sample, batch, token"),
        ("--dtype", "auto, float32, bfloat16"),
    ] {
        dir.refuse_by_clap(&save(&format!("{flag} nonsense")), &["'nonsense'", flag, known]);
    }
    dir.refuse_by_clap(&save("--model model"), &["--model", "--model_name"]);
    dir.refuse_by_clap("layers", &["'layers'", "'layer'"]);
}

#[test]
fn devices_that_are_not_there() {
    let dir = Dir::with("qwen2");
    // No driver is here (tests/cuda has one).
    for device in ["cuda", "cuda:1", "cuda:0,cuda:1"] {
        let flag = format!("--device {device}");
        dir.refuse(1, &save(&flag), &["no CUDA driver", "where:    --device", "--device cpu"]);
    }
    dir.refuse(2, &save("--device tpu"), &["no such device", "--device", "auto, cpu, cuda or cuda:N", "tpu"]);
    dir.refuse(2, &save("--device cuda:0,cpu"), &["do not go together", "cuda:0,cuda:1"]);
    dir.refuse(2, &save("--device_memory 2"), &["no CUDA device for a memory budget", "--memory"]);
    dir.refuse(2, &save("--dtype bfloat16"), &["bfloat16", "auto or float32", "exact in float32"]);
}

#[test]
fn outputs_that_cannot_be_written() {
    let dir = Dir::with("qwen2");
    dir.write("file", "x");
    dir.refuse(1, &save("--output_dir file"), &["file", "--output_dir", "something else of that name"]);
    dir.refuse(1, &save("--output_dir file/below"), &["file/below", "--output_dir"]);
    dir.refuse(1, "demo --output_dir file/below", &["file/below", "--output_dir"]);
    dir.refuse(1, &save("--output_dir new/a --save_consolidated no/r.npz"), &["no/r.npz", "the folder no"]);
    dir.refuse(1, &format!("{LAYER} --save_consolidated no/r.npz"), &["no/r.npz", "make the folder first"]);
    dir.refuse(1, &format!("{LAYER} --save_consolidated file/r.npz"), &["a file of that name"]);
    dir.refuse(1, &format!("{LAYER} --save_consolidated model"), &["over a folder", "add a file name"]);
}

/// Even root cannot write there, so the test means the same for everyone.
#[cfg(target_os = "linux")]
#[test]
fn outputs_on_a_system_that_takes_none() {
    let dir = Dir::with("qwen2");
    dir.refuse(1, &save("--output_dir /proc/results"), &["/proc/results", "--output_dir"]);
    dir.refuse(1, &format!("{LAYER} --save_consolidated /proc/r.npz"), &["/proc", "--save_consolidated"]);
}

/// A system that grants no threads is no reason to panic. (No address space has room for such a stack.)
#[cfg(target_pointer_width = "64")]
#[test]
fn threads_that_the_system_refuses() {
    let dir = Dir::with("qwen2");
    let before = dir.listing();
    let run = dir.run_where("RUST_MIN_STACK", "1125899906842624", &save("--threads 3"));
    dir.check_refusal(&run, 1, &before, &["cannot start 3 threads", "--threads", "hint: "]);
}

/// The status tells of the error even where nobody reads the message, as in `2>&1 | head -0`.
#[test]
fn nobody_reads_the_message() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_gradlens"));
    assert_eq!(command.args(["layer", "--device", "tpu"]).stderr(writer).status().unwrap().code(), Some(2));
}
