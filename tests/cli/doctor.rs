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
    run.out("\nmodel        model, qwen2, 4 layers, on this machine\n").out("can run here");
    assert_eq!(dir.listing(), before);
}

#[test]
fn it_says_what_stands_in_the_way() {
    let dir = Dir::with("qwen2");
    let fails = |args: &str, out: &str, err: &str| {
        let run = dir.run(args);
        run.check(run.code == Some(1), "must end with 1");
        run.out("cannot run here").out(out).err("error: ").err(err);
    };
    fails("doctor", "\nmodel        the hub cannot be reached", "gradlens fetch");
    fails("doctor --model_name model", "\ntexts        the hub cannot be reached", "Salesforce/wikitext");
    let missing = DOCTOR.replace("corpus", "nothing");
    fails(&missing, "\ntexts        the dataset is not on this machine", "model/nothing.jsonl");
    std::fs::write(dir.path("model/config.json"), "{}").unwrap();
    fails(DOCTOR, "\nmodel        config.json", "model_type");
}

/// A token is found, and not shown.
#[test]
fn tokens_are_not_shown() {
    let dir = Dir::with("qwen2");
    let run = dir.run_where("HF_TOKEN", "hf_secret", DOCTOR);
    run.out("\ntoken        from HF_TOKEN\n");
    run.check(!run.stdout.contains("hf_secret") && !run.stderr.contains("hf_secret"), "must not show it");
}
