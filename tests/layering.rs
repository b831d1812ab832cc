//! The house's rules that the compiler does not hold: which module imports which, where names of architectures
//! occur, how long files are, where the program may stop by itself.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use gradlens::model::arch::ARCHITECTURES;

/// Lines of a file: about 400, and nobody splits a file for the last few.
const MAX_LINES: usize = 450;
/// Models whose names are those of architectures, or of rows that are planned.
const FAMILIES: [&str; 8] = ["llama", "mistral", "qwen", "qwen2", "zephyr", "yi", "mixtral", "gemma"];
/// A model, not an architecture: the default of the command line.
const DEFAULT_MODEL: &str = "Qwen/Qwen2.5-0.5B";
/// Releases of SAEs, which are formats.
const RELEASES: [&str; 4] = ["Llama Scope", "Gemma Scope", "gemma-scope", "Qwen-Scope"];

struct Source {
    /// From the root of the repository.
    path: String,
    text: String,
}

impl Source {
    /// Without the lines that are comments.
    fn code(&self) -> String {
        let code = self.text.lines().filter(|line| !line.trim_start().starts_with("//"));
        code.flat_map(|line| [line, "\n"]).collect()
    }

    /// Without its module of tests, which ends a file; empty for a file of tests.
    fn without_tests(&self) -> String {
        let code = self.code();
        match code.split_once("#[cfg(test)]\nmod tests {") {
            _ if self.path.ends_with("tests.rs") => String::new(),
            Some((before, _)) => before.to_owned(),
            None => code,
        }
    }

    /// `engine` for `src/engine.rs` and everything in `src/engine/`.
    fn module(&self) -> &str {
        let name = self.path.trim_start_matches("src/").split('/').next().unwrap();
        name.trim_end_matches(".rs")
    }

    /// How many modules deep the file is: 1 for `src/a.rs` and `src/a/mod.rs`, 2 for `src/a/b.rs`.
    fn depth(&self) -> usize {
        self.path.trim_start_matches("src/").trim_end_matches("/mod.rs").split('/').count()
    }
}

/// Every `.rs` below `folder`, sorted.
fn sources(folder: &str) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut waiting = vec![root.join(folder)];
    let mut found: Vec<PathBuf> = Vec::new();
    while let Some(folder) = waiting.pop() {
        for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            match path.is_dir() {
                true => waiting.push(path),
                false if path.extension().is_some_and(|e| e == "rs") => found.push(path),
                false => {}
            }
        }
    }
    found.sort();
    let read = |path: PathBuf| Source {
        path: path.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/"),
        text: fs::read_to_string(&path).unwrap(),
    };
    found.into_iter().map(read).collect()
}

/// The order as `src/lib.rs` states it: module → rank. Modules in braces share one.
fn order(lib: &str) -> BTreeMap<String, usize> {
    let line = lib.lines().find(|line| line.matches('←').count() > 5).expect("lib.rs states the order");
    let line = line.trim_start_matches("//!").trim().trim_matches('`');
    let modules = |part: &str| -> Vec<String> {
        part.trim_matches(['{', '}']).split(',').map(|name| name.trim().to_owned()).collect()
    };
    let ranks = line.split('←').map(str::trim).enumerate();
    ranks.flat_map(|(rank, part)| modules(part).into_iter().map(move |name| (name, rank))).collect()
}

/// The modules that follow each `root` (`crate::`) in `code`: one, or those of a group in braces.
fn roots(code: &str, root: &str) -> Vec<String> {
    let identifier = |text: &str| -> String {
        text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    };
    let mut found = Vec::new();
    for (at, _) in code.match_indices(root) {
        let whole_word = !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        if !whole_word {
            continue;
        }
        let rest = &code[at + root.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            found.push(identifier(rest));
            continue;
        };
        let (mut level, mut start) = (1, true);
        for (at, c) in group.char_indices() {
            if start && level == 1 && !c.is_whitespace() && c != '}' {
                found.push(identifier(&group[at..]));
                start = false;
            }
            match c {
                '{' => level += 1,
                '}' => level -= 1,
                ',' if level == 1 => start = true,
                _ => {}
            }
            if level == 0 {
                break;
            }
        }
    }
    found
}

/// What breaks the order in one file, as lines to print.
fn breaches(source: &Source, order: &BTreeMap<String, usize>) -> Vec<String> {
    let module = source.module();
    let code = source.code();
    let mut wrong = Vec::new();
    for import in roots(&code, "crate::") {
        let allowed = match (module, import.as_str()) {
            _ if import == module => true,
            // The command line is written in the words of the stages.
            ("cli", "backend" | "engine" | "stats" | "transform" | "weights" | "error") => true,
            ("plan", "cli") => true,
            _ => match (order.get(module), order.get(&import)) {
                (Some(here), Some(there)) => there < here,
                _ => false,
            },
        };
        if !allowed {
            wrong.push(format!("{}: {module} must not import {import}", source.path));
        }
    }
    // Neither by the back door: out of the own module with `super::`, or through the crate's name.
    let (file, inline) = code.split_once("mod tests {").unwrap_or((&code, ""));
    for (text, depth) in [(file, source.depth()), (inline, source.depth() + 1)] {
        if text.contains(&"super::".repeat(depth)) {
            wrong.push(format!("{}: `super::` leaves {module}; say crate::", source.path));
        }
    }
    if module != "main" && !roots(&code, "gradlens::").is_empty() {
        wrong.push(format!("{}: say crate:: instead of gradlens::", source.path));
    }
    wrong
}

#[test]
fn imports_point_one_way() {
    let sources = sources("src");
    let order = order(&sources.iter().find(|source| source.path == "src/lib.rs").unwrap().text);
    for source in &sources {
        let known = order.contains_key(source.module()) || ["lib", "cli"].contains(&source.module());
        assert!(known, "{} has no place in the order that src/lib.rs states", source.path);
    }
    let of_modules = sources.iter().filter(|source| source.path != "src/lib.rs");
    let wrong: Vec<String> = of_modules.flat_map(|source| breaches(source, &order)).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What the rule forbids is seen, and what it allows is not.
#[test]
fn the_order_can_be_broken() {
    let order = order("//! `error ← model ← {source, weights} ← stats ← engine ← plan ← run ← main`");
    assert_eq!((order["error"], order["source"], order["weights"], order["main"]), (0, 2, 2, 7));
    let count =
        |path: &str, text: &str| breaches(&Source { path: path.into(), text: text.into() }, &order).len();
    for (path, text, expected) in [
        ("src/engine/pass.rs", "use crate::stats::Sink;\nuse crate::engine::Model;", 0),
        ("src/stats/mod.rs", "use crate::engine::Engine;", 1),
        ("src/stats/mod.rs", "fn f() { crate::plan::g(crate::model::h()) }", 1),
        ("src/stats/mod.rs", "/// See [`crate::engine::Engine`].\n// crate::run", 0),
        ("src/source/text.rs", "use crate::weights::Checkpoint;", 1),
        (
            "src/weights/mod.rs",
            "use crate::{error::{Error, Result}, source::Texts,\n    stats::Sink, model};",
            2,
        ),
        ("src/engine/mod.rs", "use crate::cli::Args;", 1),
        ("src/plan/mod.rs", "use crate::cli::Args;\npub(crate) fn f() {}", 0),
        ("src/cli.rs", "use crate::engine::LossReduction;", 0),
        ("src/cli.rs", "use crate::plan::Plan;", 1),
        ("src/stats/mod.rs", "use super::engine::Engine;", 1),
        ("src/stats/moments.rs", "use super::Sink;", 0),
        ("src/stats/moments.rs", "use super::super::engine;", 1),
        ("src/error.rs", "#[cfg(test)]\nmod tests {\n    use super::*;\n}", 0),
        ("src/stats/mod.rs", "use gradlens::engine::Engine;", 1),
        ("src/main.rs", "use gradlens::run;", 0),
        ("src/hub.rs", "use crate::error::Error;", 1),
    ] {
        assert_eq!(count(path, text), expected, "{path}: {text}");
    }
}

/// The words of a text, as `\b` cuts them, in lower case.
fn words(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split(|c: char| !(c.is_alphanumeric() || c == '_')).map(str::to_lowercase)
}

#[test]
fn architectures_have_names_in_the_table_alone() {
    let mut names: Vec<String> = FAMILIES.iter().map(|name| (*name).to_owned()).collect();
    for row in ARCHITECTURES {
        names.push(row.model_type.to_lowercase());
        names.extend(row.classes.iter().map(|class| class.to_lowercase()));
    }
    let is_table = |path: &str| path == "src/model/arch.rs" || path.starts_with("src/model/arch/");
    let (table, others): (Vec<Source>, Vec<Source>) =
        sources("src").into_iter().partition(|source| is_table(&source.path));
    let named = |source: &Source| -> Vec<String> {
        let text = source.text.replace(DEFAULT_MODEL, "");
        let text = RELEASES.iter().fold(text, |text, release| text.replace(release, ""));
        let lines = text.lines().enumerate();
        let hits = lines.filter(|(_, line)| words(line).any(|word| names.contains(&word)));
        hits.map(|(at, line)| format!("{}:{}: {}", source.path, at + 1, line.trim())).collect()
    };
    assert!(table.iter().flat_map(named).count() > ARCHITECTURES.len(), "the search finds names");
    let wrong: Vec<String> = others.iter().flat_map(named).collect();
    assert!(wrong.is_empty(), "names of architectures outside the table:\n{}", wrong.join("\n"));
}

#[test]
fn files_are_short() {
    for Source { path, text } in sources("src").into_iter().chain(sources("tests")) {
        let lines = text.lines().count();
        assert!(lines <= MAX_LINES, "{path} has {lines} lines, more than {MAX_LINES}: split it by family");
    }
}

#[test]
fn nothing_is_unwrapped() {
    let mut in_tests = 0;
    for source in sources("src") {
        let code = source.without_tests();
        in_tests += source.code().matches(".unwrap()").count() - code.matches(".unwrap()").count();
        let line = code.lines().find(|line| line.contains(".unwrap()"));
        assert!(line.is_none(), "{}: {}", source.path, line.unwrap_or_default().trim());
    }
    assert!(in_tests > 10, "the search finds unwraps, in tests");
}
