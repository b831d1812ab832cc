//! Tests of `files_of`: repositories as they are on the hub, and what each error says.

use proptest::prelude::*;

use super::*;

fn list(files: &[&str]) -> Vec<String> {
    files.iter().map(|file| (*file).to_owned()).collect()
}

/// The configuration and the files.
#[track_caller]
fn chosen(
    files: &[&str],
    readme: Option<&str>,
    config: Option<&str>,
    split: &str,
) -> (Option<String>, Vec<String>) {
    let Chosen { config, files } = files_of(&list(files), readme, config, split).unwrap();
    (config, files)
}

#[track_caller]
fn refuses(files: &[&str], readme: Option<&str>, config: Option<&str>, split: &str, parts: &[&str]) {
    let error = files_of(&list(files), readme, config, split).unwrap_err().to_string();
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in:\n{error}");
    }
}

const WIKITEXT: [&str; 10] = [
    ".gitattributes",
    "README.md",
    "wikitext-103-raw-v1/train-00001-of-00002.parquet",
    "wikitext-103-raw-v1/train-00000-of-00002.parquet",
    "wikitext-103-v1/train-00000-of-00001.parquet",
    "wikitext-2-raw-v1/test-00000-of-00001.parquet",
    "wikitext-2-raw-v1/train-00000-of-00001.parquet",
    "wikitext-2-raw-v1/validation-00000-of-00001.parquet",
    "wikitext-2-v1/test-00000-of-00001.parquet",
    "wikitext-2-v1/train-00000-of-00001.parquet",
];

const WIKITEXT_README: &str = "---
annotations_creators:
- no-annotation
language:
- en
license:
- cc-by-sa-3.0
size_categories:
- 1M<n<10M
task_ids:
- language-modeling
pretty_name: WikiText
dataset_info:
- config_name: wikitext-103-raw-v1
  features:
  - name: text
    dtype: string
  splits:
  - name: train
    num_bytes: 546500949
configs:
- config_name: wikitext-103-raw-v1
  data_files:
  - split: test
    path: wikitext-103-raw-v1/test-*
  - split: train
    path: wikitext-103-raw-v1/train-*
- config_name: wikitext-103-v1
  data_files:
  - split: train
    path: wikitext-103-v1/train-*
- config_name: wikitext-2-raw-v1
  data_files:
  - split: test
    path: wikitext-2-raw-v1/test-*
  - split: train
    path: wikitext-2-raw-v1/train-*
  - split: validation
    path: wikitext-2-raw-v1/validation-*
- config_name: wikitext-2-v1
  data_files:
  - split: test
    path: wikitext-2-v1/test-*
  - split: train
    path: wikitext-2-v1/train-*
---

# Dataset Card for \"wikitext\"
";

#[test]
fn four_configurations() {
    let of = |config, split| chosen(&WIKITEXT, Some(WIKITEXT_README), Some(config), split);
    let (config, files) = of("wikitext-2-raw-v1", "train");
    assert_eq!(config.as_deref(), Some("wikitext-2-raw-v1"));
    assert_eq!(files, ["wikitext-2-raw-v1/train-00000-of-00001.parquet"]);
    assert_eq!(
        of("wikitext-2-raw-v1", "validation").1,
        ["wikitext-2-raw-v1/validation-00000-of-00001.parquet"]
    );
    assert_eq!(
        of("wikitext-103-raw-v1", "train").1,
        [
            "wikitext-103-raw-v1/train-00000-of-00002.parquet",
            "wikitext-103-raw-v1/train-00001-of-00002.parquet"
        ]
    );
    let refuse =
        |config, split, parts: &[&str]| refuses(&WIKITEXT, Some(WIKITEXT_README), config, split, parts);
    let all = "one of wikitext-103-raw-v1, wikitext-103-v1, wikitext-2-raw-v1, wikitext-2-v1";
    refuse(None, "train", &["several configurations", all, "--dataset_config wikitext-103-raw-v1"]);
    refuse(
        Some("wikitext-2"),
        "train",
        &["no configuration \"wikitext-2\"", "where:    --dataset_config", all],
    );
    refuse(
        Some("wikitext-2-v1"),
        "dev",
        &["no split \"dev\"", "where:    --dataset_split", "one of test, train"],
    );
    // Declared, but not there.
    let says = [
        "none of the files that its README.md declares",
        "wikitext-103-raw-v1/test-*",
        "\n  found:    README.md",
    ];
    refuse(Some("wikitext-103-raw-v1"), "test", &says);
}

/// The same repository tells as much by its names alone, but for the order of its configurations.
#[test]
fn folders_are_configurations() {
    let of = |config, split| chosen(&WIKITEXT, None, Some(config), split);
    assert_eq!(of("wikitext-2-raw-v1", "train").1, ["wikitext-2-raw-v1/train-00000-of-00001.parquet"]);
    assert_eq!(of("wikitext-103-raw-v1", "train").1.len(), 2);
    let refuse = |config, split, parts: &[&str]| refuses(&WIKITEXT, None, config, split, parts);
    let all = "one of wikitext-2-raw-v1, wikitext-2-v1, wikitext-103-raw-v1, wikitext-103-v1";
    refuse(None, "train", &["several configurations", all]);
    refuse(Some("wikitext"), "train", &["no configuration \"wikitext\"", all]);
    refuse(Some("wikitext-2-raw-v1"), "dev", &["no split \"dev\"", "one of test, train, validation"]);
    // Only one has it.
    let (config, files) = chosen(&WIKITEXT, None, None, "validation");
    assert_eq!(config.as_deref(), Some("wikitext-2-raw-v1"));
    assert_eq!(files, ["wikitext-2-raw-v1/validation-00000-of-00001.parquet"]);
}

#[test]
fn one_configuration() {
    let files = [
        "README.md",
        "plain_text/test-00000-of-00001.parquet",
        "plain_text/train-00000-of-00001.parquet",
        "plain_text/unsupervised-00000-of-00001.parquet",
    ];
    let readme = "---
configs:
- config_name: plain_text
  data_files:
  - split: train
    path: plain_text/train-*
  - split: test
    path: plain_text/test-*
  - split: unsupervised
    path: plain_text/unsupervised-*
  default: true
train-eval-index:
- config: plain_text
---";
    for readme in [Some(readme), None, Some("# No front matter\n\n---\nconfigs: x\n---\n")] {
        for config in [None, Some("plain_text")] {
            let (config, files) = chosen(&files, readme, config, "train");
            assert_eq!(config.as_deref(), Some("plain_text"));
            assert_eq!(files, ["plain_text/train-00000-of-00001.parquet"]);
        }
    }
    refuses(&files, None, None, "dev", &["no split \"dev\"", "one of test, train, unsupervised"]);
}

#[test]
fn data_without_configurations() {
    let files =
        ["README.md", "data/train-10.parquet", "data/train-9.parquet", "data/test-0.parquet", "docs/a.txt"];
    for readme in [None, Some("---\nlicense: mit\n---\n# Data"), Some("")] {
        for config in [None, Some("default")] {
            let (config, files) = chosen(&files, readme, config, "train");
            assert_eq!(config, None);
            assert_eq!(files, ["data/train-9.parquet", "data/train-10.parquet"]);
        }
        refuses(&files, readme, Some("en"), "train", &["no configuration \"en\"", "one of default, docs"]);
        refuses(&files, readme, None, "dev", &["no split \"dev\"", "one of test, train"]);
    }
}

#[test]
fn files_at_the_top() {
    let jsonl = ["README.md", "train.jsonl", "test.jsonl.gz", "dataset_infos.json", "train.csv"];
    assert_eq!(chosen(&jsonl, None, None, "train"), (None, list(&["train.jsonl"])));
    assert_eq!(chosen(&jsonl, None, None, "test"), (None, list(&["test.jsonl.gz"])));
    refuses(&jsonl, None, None, "dev", &["no split \"dev\"", "one of dataset_infos, test, train"]);
    refuses(&jsonl, None, Some("en"), "train", &["no configuration \"en\"", "one of default"]);
    // A name that only begins like the split is another's; parts come before a whole.
    let parts = ["train-1.json", "train-0.json", "train.json", "trained.json", "train_2.json"];
    assert_eq!(chosen(&parts, None, None, "train").1, ["train-0.json", "train-1.json"]);
    let folders = ["en/train.jsonl", "de/train/b.jsonl", "de/train/a.jsonl", "train/x.txt"];
    assert_eq!(chosen(&folders, None, Some("en"), "train").1, ["en/train.jsonl"]);
    assert_eq!(chosen(&folders, None, Some("de"), "train").1, ["de/train/a.jsonl", "de/train/b.jsonl"]);
    assert_eq!(chosen(&folders, None, None, "train").1, ["train/x.txt"]);
    let default = ["other/train.jsonl", "default/train.jsonl"];
    assert_eq!(chosen(&default, None, None, "train").0.as_deref(), Some("default"));
}

/// Without the name of a split anywhere, all there is makes up the training split.
#[test]
fn files_that_name_no_split_are_for_training() {
    let all = |files: &[&str], config, expected: &[&str]| {
        assert_eq!(chosen(files, None, config, "train").1, expected, "{config:?} of {files:?}");
    };
    all(&["README.md", "corpus.jsonl"], None, &["corpus.jsonl"]);
    all(&["corpus.jsonl"], Some("default"), &["corpus.jsonl"]);
    let parts = ["part-10.parquet", "part-9.parquet", "notes.md", "part-0.parquet", "dataset_infos.json"];
    all(&parts, None, &["part-0.parquet", "part-9.parquet", "part-10.parquet"]);
    // Folders are no configurations by themselves, but can be asked for.
    let folders = ["b/2.txt", "b/1.txt", "a/c/x.jsonl"];
    for config in [None, Some("default")] {
        all(&folders, config, &["a/c/x.jsonl", "b/1.txt", "b/2.txt"]);
    }
    all(&folders, Some("b"), &["b/1.txt", "b/2.txt"]);
    refuses(&folders, None, Some("c"), "train", &["no configuration \"c\"", "one of default, a/c, b"]);
    // Only whole words are names of splits.
    all(&["trained.jsonl", "latest/devices.txt"], None, &["latest/devices.txt", "trained.jsonl"]);
    for (files, config) in [(&["README.md", "corpus.jsonl"][..], None), (&folders, Some("b")), (&parts, None)]
    {
        for split in ["test", "validation", "trai"] {
            let says = [&format!("no split {split:?}"), "where:    --dataset_split", "one of train\n"];
            refuses(files, None, config, split, &says);
        }
    }
}

/// Files beside a split are not taken for another one, nor is one split for another.
#[test]
fn a_name_of_a_split_anywhere_counts() {
    let names =
        ["my_test.jsonl", "x/val/1.txt", "corpus-dev.txt", "Test.jsonl", "eval1.json", "a b/valid 2.txt"];
    for name in names {
        let says = ["no split \"train\""];
        refuses(&["corpus.jsonl", name], None, None, "train", &says);
    }
    let upload = ["data/unsupervised-00000-of-00001.parquet"];
    refuses(&upload, None, None, "train", &["no split \"train\"", "one of unsupervised"]);
    let older = ["data/en-00000-of-00002-0123456789abcdef.parquet"];
    refuses(&older, None, None, "train", &["no split \"train\"", "one of en"]);
    // Such numbers alone name none.
    let numbered = ["part-00000-of-00001.parquet"];
    assert_eq!(chosen(&numbered, None, None, "train").1, numbered);
    // What has names of splits elsewhere does not change a folder that has none.
    let mixed = ["plain/1.txt", "plain/2.txt", "other/test.txt"];
    assert_eq!(chosen(&mixed, None, Some("plain"), "train").1, ["plain/1.txt", "plain/2.txt"]);
    refuses(&mixed, None, Some("other"), "train", &["no split \"train\"", "one of test"]);
    // The folder's own name is a configuration's.
    assert_eq!(chosen(&["dev/1.txt"], None, Some("dev"), "train").1, ["dev/1.txt"]);
}

/// The same for a configuration that README.md declares without files.
#[test]
fn a_declared_configuration_without_names_of_splits() {
    let readme =
        "---\nconfigs:\n- config_name: a\n- config_name: b\n  data_dir: c/d\n- config_name: e\n---\n";
    let files = ["a/1.txt", "c/d/2.txt", "c/d/deep/3.txt", "c/test.txt"];
    let of = |config| chosen(&files, Some(readme), Some(config), "train");
    assert_eq!(of("a"), (Some("a".into()), list(&["a/1.txt"])));
    assert_eq!(of("b"), (Some("b".into()), list(&["c/d/2.txt", "c/d/deep/3.txt"])));
    refuses(&files, Some(readme), Some("e"), "train", &["no split \"train\""]);
    refuses(&files, Some(readme), Some("a"), "test", &["no split \"test\"", "one of train\n"]);
    let single = "---\nconfigs:\n- config_name: default\n---\n";
    let files = ["README.md", "corpus.jsonl", "more/corpus.jsonl"];
    assert_eq!(chosen(&files, Some(single), None, "train").1, ["corpus.jsonl", "more/corpus.jsonl"]);
    // The whole repository is looked at, not a folder of it.
    refuses(
        &["data/1.txt", "test.txt"],
        Some(single),
        None,
        "train",
        &["no split \"train\"", "one of 1, test"],
    );
    let upload = ["data/en-00000-of-00001.parquet"];
    refuses(&upload, Some(single), None, "train", &["no split \"train\"", "one of en"]);
}

#[test]
fn patterns() {
    let files = [
        "data/CC-MAIN-2013-20/000_00010.parquet",
        "data/CC-MAIN-2013-20/000_00009.parquet",
        "data/CC-MAIN-2014-10/000_00000.parquet",
        "data/stats.csv",
        "data/.hidden/x.parquet",
        "sample/10BT/000_00000.parquet",
    ];
    let readme = "---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/**/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
- config_name: CC-MAIN-2013-20
  data_files:
    train: [./data/CC-MAIN-2013-20/*10.parquet, 'data/CC-MAIN-2013-20/*']
- config_name: shallow
  data_files: data/*
- config_name: folder
  data_dir: data/CC-MAIN-2014-10
  data_files: [\"*.parquet\"]
- config_name: 2014
  data_files: data/CC-MAIN-2014-10/000_00000.parquet
---";
    let of = |config| chosen(&files, Some(readme), config, "train");
    assert_eq!(
        of(None),
        (
            Some("default".into()),
            list(&[
                "data/CC-MAIN-2013-20/000_00009.parquet",
                "data/CC-MAIN-2013-20/000_00010.parquet",
                "data/CC-MAIN-2014-10/000_00000.parquet",
            ])
        )
    );
    assert_eq!(of(Some("sample-10BT")).1, ["sample/10BT/000_00000.parquet"]);
    // The order of the patterns, and no file twice.
    assert_eq!(
        of(Some("CC-MAIN-2013-20")).1,
        ["data/CC-MAIN-2013-20/000_00010.parquet", "data/CC-MAIN-2013-20/000_00009.parquet",]
    );
    for name in ["folder", "2014"] {
        assert_eq!(of(Some(name)).1, ["data/CC-MAIN-2014-10/000_00000.parquet"], "{name}");
    }
    refuses(
        &files,
        Some(readme),
        Some("shallow"),
        "train",
        &["no file that can be read", "found:    data/stats.csv"],
    );
}

#[test]
fn which_configuration_is_the_default() {
    let files = ["a/train.txt", "b/train.txt"];
    let readme = |more: &str| format!("---\nconfigs:\n- config_name: a\n- config_name: b\n{more}---\n");
    let of = |readme: &str| chosen(&files, Some(readme), None, "train");
    assert_eq!(of(&readme("  default: true\n")), (Some("b".into()), list(&["b/train.txt"])));
    let named = readme("- config_name: default\n  data_dir: a/\n");
    assert_eq!(of(&named), (Some("default".into()), list(&["a/train.txt"])));
    refuses(&files, Some(&readme("")), None, "train", &["several configurations", "one of a, b"]);
    // A configuration may be called as YAML 1.1 calls false, and needs no name.
    let norwegian = "---\nconfigs:\n- config_name: no\n  data_files: a/*\n- data_files: b/*\n---\n";
    assert_eq!(chosen(&files, Some(norwegian), Some("no"), "train").1, ["a/train.txt"]);
    assert_eq!(of(norwegian), (Some("default".into()), list(&["b/train.txt"])));
}

#[test]
fn repositories_without_readable_files() {
    refuses(
        &["README.md", "data/train.csv"],
        None,
        None,
        "train",
        &["no file that can be read", "found:    README.md, data/train.csv", ".parquet", "to_parquet"],
    );
    refuses(&[".gitattributes"], None, None, "train", &["an empty repository"]);
}

#[test]
fn descriptions_that_are_wrong() {
    let refuse = |matter: &str, parts: &[&str]| {
        refuses(&["a/train.txt"], Some(&format!("\u{FEFF}\n---\n{matter}\n---\ntext")), None, "train", parts);
    };
    refuse("configs:\n- config_name: [a\nb: c", &["not valid YAML", "README.md:", "hint:"]);
    refuse("a: b: c", &["not valid YAML", "where:    README.md:3"]);
    refuse("configs: yes", &["unclear", "where:    README.md", "configs that are no list"]);
    refuse("configs: [a]", &["a configuration that is no mapping"]);
    refuse("configs:\n- config_name: [a]", &["a config_name that is no text"]);
    refuse("configs:\n- data_files:\n  - split: train", &["neither patterns nor splits"]);
    refuse("configs:\n- data_files:\n    train: {a: b}", &["neither patterns nor splits"]);
    refuse("configs:\n- data_files: 'a/[z-'", &["a pattern that cannot be read", "README.md", "\"a/[z-\""]);
    refuse(&format!("a: {}", "[".repeat(200)), &["not valid YAML", "too many levels"]);
    refuse(&"- ".repeat(100_000), &["not valid YAML", "too many levels"]);
}

proptest! {
    #[test]
    fn no_description_makes_it_panic(text in "(---\n)?((configs:|- |  |config_name: |data_files: |split: |path: |[a&*!?{}\\[\\]|>%@:,'\"#x/.]|\n){0,40})(\n---\n)?") {
        let _ = files_of(&list(&["a/train.txt", "data/x.parquet"]), Some(&text), None, "train");
    }

    #[test]
    fn any_names_do(
        files in prop::collection::vec("(a/|data/|é/|\\./){0,3}(train|test|é)?[-._/]?[0-9]{0,2}(\\.jsonl|\\.parquet|\\.csv)?", 0..12),
        config in prop::option::of("a|é|/|data|\\*"),
        split in "train|é|",
    ) {
        if let Ok(Chosen { files: found, .. }) = files_of(&files, None, config.as_deref(), &split) {
            prop_assert!(!found.is_empty());
            // Names that tell no split are all of train's.
            let whole = split == "train" && !found.iter().any(|file| file.contains("test"));
            prop_assert!(found.iter().all(|file| files.contains(file) && (whole || file.contains(&split))));
        }
    }
}
