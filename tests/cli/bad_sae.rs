//! `gradlens sae`: where SAEs are looked for, and what is refused.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::dir::{Dir, Run};
use crate::files;
use crate::sae::{BATCH_TOPK, SAE, copy, with};

/// By the variable, and by the folder of the script, here or above.
#[test]
fn saes_that_the_command_line_does_not_name() {
    let dir = with("dl_batchtopk");
    dir.refuse(
        2,
        SAE,
        &["no SAEs are named", "GRADLENS_SAE", "mlp_out_layer_{layer}/trainer_0", "../dictionary"],
    );
    let run = dir.run_where("GRADLENS_SAE", BATCH_TOPK, &format!("{SAE} --dry_run"));
    run.check(run.code == Some(0), "must find it");
    let default = "dictionary_learning_demo/._qwen2.5_0.5B_Qwen_Qwen2.5-0.5B_batch_top_k_tokens500M";
    copy(&dir.path("saes"), &dir.path(default));
    dir.ok(&format!("{SAE} --dry_run")).out("layers       2 of 4: 1,3");
}

#[test]
fn one_sae_is_for_one_layer() {
    let dir = with("dl_batchtopk");
    let one = format!("{SAE} --sae saes/mlp_out_layer_3/trainer_0 --dry_run");
    dir.ok(&one).out("layers       1 of 4: 3");
    dir.ok(&format!("{one} --layers 3"));
    let says = ["this is the SAE of one layer", "found:    layer 3", "put {layer} where the path has"];
    dir.refuse(2, &format!("{one} --layers 1"), &says);
    dir.refuse(2, &format!("{one} --layers 1-3"), &says);
}

/// The folder of one SAE, of a layer that the model lacks.
#[test]
fn an_sae_beyond_the_model() {
    let dir = with("dl_batchtopk");
    edit(&dir, "saes/mlp_out_layer_3/trainer_0/config.json", |config| {
        config["trainer"]["layer"] = json!(9);
        config["trainer"]["submodule_name"] = json!("mlp_out_layer_9");
    });
    copy(&dir.path("saes/mlp_out_layer_3/trainer_0"), &dir.path("one"));
    let says = [
        "the model lacks the SAE's layer",
        "a layer from 0 to 3",
        "found:    layer 9",
        "is it the SAEs' model?",
    ];
    dir.refuse(1, &format!("{SAE} --sae one --dry_run"), &says);
}

#[test]
fn layers_without_an_sae() {
    let dir = with("dl_batchtopk");
    for sae in [BATCH_TOPK, "saes"] {
        let says = ["there are no SAEs of layers 0,2", "found:    SAEs of layers 1,3", "give --layers 1,3"];
        dir.refuse(1, &format!("{SAE} --sae {sae} --layers 0-3"), &says);
    }
    let says = ["there are no SAEs of the model's layers", "found:    none", "saes/x_0"];
    dir.refuse(1, &format!("{SAE} --sae saes/x_{{layer}}"), &says);
    dir.write("empty/notes.txt", "nothing");
    dir.refuse(1, &format!("{SAE} --sae empty"), &["no SAEs of the model's layers", "ae.pt"]);
    dir.refuse(1, &format!("{SAE} --sae ./nowhere/at/all"), &["neither on this machine", "nothing at"]);
}

#[test]
fn several_saes_of_a_layer() {
    let dir = with("dl_batchtopk");
    copy(&dir.path("saes/mlp_out_layer_3/trainer_0"), &dir.path("saes/mlp_out_layer_3/trainer_1"));
    let says = [
        "there are 2 SAEs of layer 3",
        "saes/mlp_out_layer_{layer}/trainer_0",
        "saes/mlp_out_layer_{layer}/trainer_1",
        "choose one kind",
    ];
    dir.refuse(2, &format!("{SAE} --sae saes"), &says);
    dir.ok(&format!("{SAE} --sae {BATCH_TOPK} --dry_run"));
}

/// Changes the configuration of dictionary_learning at `path`.
fn edit(dir: &Dir, path: &str, change: impl FnOnce(&mut Value)) {
    let mut config = files::json(&dir.path(path));
    change(&mut config);
    dir.write(path, config.to_string());
}

#[test]
fn saes_of_another_layer_or_place() {
    let dir = with("dl_batchtopk");
    edit(&dir, "saes/mlp_out_layer_1/trainer_0/config.json", |config| {
        config["trainer"]["layer"] = json!(2);
        config["trainer"]["submodule_name"] = json!("mlp_out_layer_2");
    });
    let says =
        ["of another layer", "expected: an SAE of layer 1", "found:    layer 2", "where {layer} stands"];
    dir.refuse(1, &format!("{SAE} --sae {BATCH_TOPK}"), &says);
    let third = format!("{SAE} --sae {BATCH_TOPK} --layers 3");
    for place in ["blocks.3.hook_k", "blocks.3.ln2.hook_normalized"] {
        edit(&dir, "saes/mlp_out_layer_3/trainer_0/config.json", |config| {
            config["trainer"]["submodule_name"] = json!(place);
        });
        dir.refuse(1, &third, &["this place in the model cannot be looked at", "one of mlp, mlp_out"]);
    }
    dir.refuse(2, &format!("{third} --site middle"), &["--site", "middle", "resid_pre, resid_mid"]);
    dir.refuse(2, &format!("{third} --site mlp,resid_pre"), &["--site", "one site", "separate runs"]);
    let inner = format!("{third} --site mlp_hidden");
    dir.refuse(1, &inner, &["its width differs", "width 96, the inner size of the model's MLP"]);
    let taken = dir.ok(&format!("{third} --site mlp --dry_run"));
    taken.err("the SAE of layer 3 is taken for one of mlp, as --site says; its files say blocks.3.ln2");
    // The input of the module is another place than its output.
    edit(&dir, "saes/mlp_out_layer_3/trainer_0/config.json", |config| {
        config["trainer"]["submodule_name"] = json!("mlp_out_layer_3");
        config["buffer"]["io"] = json!("in");
    });
    dir.refuse(1, &third, &["this place in the model cannot be looked at", "input of mlp_out_layer_3"]);
    dir.ok(&format!("{third} --site mlp --dry_run"));
}

/// Of SAEs of several places, those of `--site` are meant.
#[test]
fn saes_of_several_places() {
    let dir = with("sparsify_topk");
    for layer in [1, 3] {
        let from = dir.path(&format!("saes/layers.{layer}.mlp"));
        copy(&from, &dir.path(&format!("saes/layers.{layer}")));
        copy(&from, &dir.path(&format!("saes/layers.{layer}.self_attn")));
    }
    let says = ["there are 3 SAEs of layer 1", "saes/layers.{layer}.self_attn", "--site"];
    dir.refuse(2, &format!("{SAE} --sae saes --dry_run"), &says);
    for site in ["mlp", "mlp_out", "attn_out", "resid_post"] {
        let plan = dir.ok(&format!("{SAE} --sae saes --site {site} --dry_run"));
        plan.out("layers       2 of 4: 1,3").out(&format!("values of features at {site}"));
    }
}

/// A folder without a layer's number: the files tell it.
#[test]
fn layers_that_only_files_tell() {
    let dir = with("dl_batchtopk");
    for (layer, name) in [(1, "a"), (3, "b")] {
        copy(
            &dir.path(&format!("saes/mlp_out_layer_{layer}/trainer_0")),
            &dir.path(&format!("plain/{name}/trainer_0")),
        );
    }
    dir.ok(&format!("{SAE} --sae plain --dry_run")).out("layers       2 of 4: 1,3");
}

/// The number of threads changes nothing, and can be chosen.
#[test]
fn any_number_of_threads() {
    let dir = with("dl_standard");
    let mut all = Vec::new();
    for threads in [1, 3] {
        let flags =
            format!("--aggregate_by attribution --threads {threads} --save_outputs --output_dir t{threads}");
        dir.ok(&format!("{SAE} --sae saes {flags}"));
        all.push(files::numbers(&dir.made_sae(&format!("t{threads}"))));
    }
    assert!(all[0] == all[1]);
}

/// In every quantity, of features that decide one by one and of such that compete.
#[test]
fn numbers_that_are_none_are_found() {
    for case in ["lens_standard", "lens_topk"] {
        let dir = with(case);
        let file = dir.path("saes/blocks.1.hook_mlp_out/sae_weights.safetensors");
        files::set_element(&file, "W_enc", 5, f32::NAN);
        for flags in [
            "",
            "--position_stride 200",
            "--aggregate_by gradients",
            "--aggregate_by attribution",
            "--aggregate_by gradients --sae_splice replace",
        ] {
            let says = ["not a finite number in the values of the SAE's features", "layer 1, sample 0"];
            dir.refuse(1, &format!("{SAE} --sae saes {flags} --save_outputs --output_dir new"), &says);
        }
        assert!(!dir.path("new").exists());
    }
}

/// There is no variance to explain where every sample's position 0 is all that is looked at.
#[test]
fn a_check_without_tokens() {
    let dir = with("dl_batchtopk");
    let run = dir.ok(&format!("{SAE} --sae saes --position_stride 200 --save_outputs --output_dir out"));
    run.check(
        !run.stdout.contains("how the SAEs fit") && !run.stderr.contains("does not fit"),
        "nothing to say",
    );
    let sae = &files::json(&dir.made_sae("out").join("metadata.json"))["run_info"]["sae"];
    assert_eq!([&sae["layers"]["layer_1"]["fvu"], &sae["layers"]["layer_1"]["l0"]], [&Value::Null; 2]);
}

#[test]
fn flags_that_change_nothing_are_said() {
    let dir = with("dl_batchtopk");
    let run = dir.ok(&format!("{SAE} --sae saes --sae_splice replace --sae_gradient active --dry_run"));
    run.err("--sae_splice replace changes nothing of values");
    run.err("--sae_gradient active changes nothing of values");
}

/// What waits for its gradient counts in the budget: less is kept of the model.
#[test]
fn the_budget_holds_what_saes_take() {
    let dir = with("dl_topk");
    let flags = "--aggregate_by attribution --tokens_per_pass 60000 --num_samples 100000 --dry_run";
    let row = |memory: &str| {
        let run = dir.ok(&format!("{SAE} --sae saes {flags} --memory {memory}"));
        run.stdout.lines().find(|line| line.starts_with("pass")).unwrap().to_owned()
    };
    assert!(row("8").ends_with("activations kept"), "{}", row("8"));
    assert!(row("0.05").ends_with("activations computed again"), "{}", row("0.05"));
}

#[test]
fn the_width_is_checked_before_anything_runs() {
    let dir = with("dl_batchtopk");
    let run =
        |model: &str| format!("sae --model_name {model} --dataset model/corpus.jsonl --sae {BATCH_TOPK}");
    let narrow = ["llama3", "llama_linear", "mistral", "zephyr", "yi"].into_iter().find(|name| {
        let config =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name).join("config.json");
        files::json(&config)["hidden_size"] != 48
    });
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(narrow.unwrap());
    let says = [
        "its width differs",
        "expected: width 32",
        "found:    width 48",
        "mlp_out_layer_1",
        "--model_name must be",
    ];
    dir.refuse(1, &run(&model.display().to_string()), &says);
}

#[test]
fn damaged_files() {
    let dir = with("dl_batchtopk");
    let file = "saes/mlp_out_layer_1/trainer_0/ae.pt";
    let whole = fs::read(dir.path(file)).unwrap();
    for cut in [0, 10, whole.len() / 2, whole.len() - 30] {
        dir.write(file, &whole[..cut]);
        dir.refuse(1, &format!("{SAE} --sae {BATCH_TOPK}"), &[file]);
    }
    for (case, file) in [
        ("lens_standard", "saes/blocks.1.hook_mlp_out/sae_weights.safetensors"),
        ("gemma_scope", "saes/gemma-scope-2b-pt-mlp/layer_1/width_97/average_l0_12/params.npz"),
    ] {
        let dir = with(case);
        let whole = fs::read(dir.path(file)).unwrap();
        dir.write(file, &whole[..whole.len() / 2]);
        dir.refuse(1, &format!("{SAE} --sae saes"), &[file]);
    }
}

#[test]
fn flags_that_make_no_sense() {
    let dir = with("lens_topk_rescaled");
    let run = |flags: &str| format!("{SAE} --sae saes {flags}");
    dir.refuse(1, &run(""), &["--sae_norm_scale"]);
    dir.refuse(2, &run("--sae_norm_scale 0"), &["the scale cannot be used", "above 0"]);
    dir.refuse(2, &run("--sae_norm_scale 1.75 --position_stride 0"), &["--position_stride", "1 or more"]);
    dir.refuse(2, &run("--device cuda"), &["SAEs do not run on CUDA devices yet", "leave --device out"]);
    dir.refuse_by_clap("layer --aggregate_by attribution", &["attribution"]);
    dir.refuse_by_clap("sae --aggregate_by sums", &["attribution"]);
    dir.refuse_by_clap("sae --sae_splice x", &["error, replace"]);
}

#[test]
fn an_sae_that_does_not_fit_is_said() {
    let dir = with("gemma_scope_2");
    let run = |output: &str| dir.ok(&format!("{SAE} --sae saes --save_consolidated {output}"));
    let good: Run = run("a.npz");
    good.check(!good.stderr.contains("does not fit"), "it fits");
    let file = dir.path("saes/mlp_out_all/layer_1_width_97_l0_small/params.safetensors");
    files::set_element(&file, "b_dec", 0, 1e3);
    run("b.npz").err("warning: the SAE of layer 1 does not fit: FVU ");
}
