//! `gradlens doctor` on a machine without a network. With one: `tests/hub`.

use crate::dir::Dir;

const DOCTOR: &str = "doctor --model_name model --dataset model/corpus.jsonl";

#[test]
fn a_job_on_this_machine_can_run_without_a_hub() {
    let dir = Dir::with("qwen2");
    let before = dir.listing();
    let run = dir.ok(DOCTOR);
    for text in [
        "\nprocessor ",
        "\nthreads ",
        "\nmemory ",
        " free\n",
        "\nhub ",
        "cannot be reached",
        "\ntoken        none",
    ] {
        run.out(text);
    }
    run.out("\nmodel        model (qwen2)\n").out("\ntexts        on this machine\n").out("can run here");
    assert_eq!(dir.listing(), before);
}

#[test]
fn it_says_what_stands_in_the_way() {
    let dir = Dir::with("qwen2");
    let fails = |args: &str, code: i32, says: &str| {
        let run = dir.run(args);
        run.check(run.code == Some(code), &format!("must end with {code}"));
        run.out("cannot run here").err("error: ").err(says);
    };
    fails("doctor", 1, "gradlens fetch");
    fails("doctor --model_name model", 1, "Salesforce/wikitext");
    fails(&DOCTOR.replace("corpus", "nothing"), 1, "model/nothing.jsonl");
    fails(&format!("{DOCTOR} --text_column body"), 1, "column");
    fails(&format!("{DOCTOR} --layers 99 --save_outputs"), 2, "out of range");
    // Not only that files are there: what is in them.
    std::fs::rename(dir.path("model/tokenizer.json"), dir.path("model/t.json")).unwrap();
    fails(DOCTOR, 1, "tokenizer.json");
    std::fs::rename(dir.path("model/t.json"), dir.path("model/tokenizer.json")).unwrap();
    std::fs::write(dir.path("model/model.safetensors"), "x").unwrap();
    fails(DOCTOR, 1, "damaged");
    std::fs::write(dir.path("model/config.json"), "{}").unwrap();
    fails(DOCTOR, 1, "model_type");
}

/// A token is found, and not shown.
#[test]
fn tokens_are_not_shown() {
    let dir = Dir::with("qwen2");
    let run = dir.run_where("HF_TOKEN", "hf_secret", DOCTOR);
    run.out("\ntoken        from HF_TOKEN\n");
    run.check(!run.stdout.contains("hf_secret") && !run.stderr.contains("hf_secret"), "must not show it");
}
