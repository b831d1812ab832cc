//! A dataset repository's list of files → those of one configuration and split, in order. Nothing is fetched here.
//!
//! What the README declares counts; where it declares nothing, the names of the files tell, as the `datasets` library
//! and its uploads have them; where those tell nothing either, everything is for training, as in that library.

use std::collections::HashSet;

use globset::{GlobBuilder, GlobMatcher};

use super::files::{CONVERT, KINDS, kind_of, some_of};
use super::readme::{Config, configs};
use crate::error::{Error, Result};
use crate::units::natural;

/// The folder of the files of a dataset that has one configuration.
const DATA: &str = "data";
/// What a configuration is called that needs no name.
const DEFAULT: &str = "default";
/// The split that everything belongs to where nothing has the name of one.
const TRAIN: &str = "train";
/// Words that name a split.
const SPLITS: [&str; 10] =
    ["train", "training", "test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev"];
/// Files that are about the data and hold none.
const FACTS: [&str; 4] = ["config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json"];

/// The files to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// The configuration, where the dataset has names for such.
    pub config: Option<String>,
    /// Paths within the repository, in the order of reading; at least one.
    pub files: Vec<String>,
}

/// The files that make up `split` of `config`, or of the configuration that is to be taken when none is named. `files`
/// are all paths of the repository, `readme` is the text of its README.md.
///
/// Errors have no place but a flag or README.md; whoever knows the dataset's name adds it.
pub fn files_of(files: &[String], readme: Option<&str>, config: Option<&str>, split: &str) -> Result<Chosen> {
    let mut all: Vec<&str> = files.iter().map(String::as_str).filter(|file| !hidden(file)).collect();
    all.sort_by(|a, b| natural(a, b));
    let named = Named { files: all.iter().copied().filter(|file| kind_of(file).is_some()).collect() };
    let declared = readme.map_or(Ok(Vec::new()), configs)?;
    if declared.is_empty() {
        if named.files.is_empty() {
            return Err(nothing_readable(&all));
        }
        return named.choose(config, split);
    }
    let chosen = pick(&declared, config)?;
    let found = match &chosen.splits {
        Some(splits) => by_pattern(&all, &chosen.folder, splits, split)?,
        None => named.of_declared(chosen, split)?,
    };
    Ok(Chosen { config: Some(chosen.name.clone()), files: found })
}

/// Other programs' leavings, such as `.gitattributes` and `.cache/x.json`.
fn hidden(file: &str) -> bool {
    file.split('/').any(|part| part.starts_with('.'))
}

/// The configuration named `asked`, or else the one marked as the default, the one called so, or the only one.
fn pick<'a>(declared: &'a [Config], asked: Option<&str>) -> Result<&'a Config> {
    let called = |name: &str| declared.iter().find(|config| config.name == name);
    let names = || declared.iter().map(|config| config.name.clone()).collect();
    match asked {
        Some(name) => called(name).ok_or_else(|| no_such_config(name, names())),
        None => {
            let marked = declared.iter().find(|config| config.default).or_else(|| called(DEFAULT));
            let only = declared.first().filter(|_| declared.len() == 1);
            marked.or(only).ok_or_else(|| which_config(names()))
        }
    }
}

fn by_pattern(
    all: &[&str],
    folder: &str,
    splits: &[(String, Vec<String>)],
    split: &str,
) -> Result<Vec<String>> {
    let patterns: Vec<&String> =
        splits.iter().filter(|(name, _)| name == split).flat_map(|(_, patterns)| patterns).collect();
    if patterns.is_empty() {
        return Err(no_such_split(split, splits.iter().map(|(name, _)| name.clone()).collect()));
    }
    let mut seen = HashSet::new();
    let mut matched: Vec<&str> = Vec::new();
    for pattern in &patterns {
        let matcher = glob(folder, pattern)?;
        matched.extend(all.iter().copied().filter(|file| matcher.is_match(file) && seen.insert(*file)));
    }
    let readable: Vec<String> =
        matched.iter().filter(|file| kind_of(file).is_some()).map(|file| (*file).to_owned()).collect();
    match (readable.is_empty(), matched.is_empty()) {
        (false, _) => Ok(readable),
        (true, false) => Err(nothing_readable(&matched)),
        (true, true) => {
            let patterns: Vec<String> = patterns.into_iter().cloned().collect();
            Err(Error::new("the dataset has none of the files that its README.md declares")
                .expected(format!("files {} for split {split:?}", patterns.join(", ")))
                .found(listed(all)))
        }
    }
}

/// `*` stays within a folder, `**` does not.
fn glob(folder: &str, pattern: &str) -> Result<GlobMatcher> {
    let within = pattern.trim_start_matches("./").trim_start_matches('/');
    let whole =
        if folder.is_empty() { within.to_owned() } else { format!("{}/{within}", globset::escape(folder)) };
    let glob = GlobBuilder::new(&whole).literal_separator(true).build();
    glob.map(|glob| glob.compile_matcher()).map_err(|cause| {
        Error::new("the description of the dataset has a pattern that cannot be read")
            .at("README.md")
            .expected("a path with *, ** or ?")
            .found(format!("{pattern:?}: {}", cause.kind()))
            .hint("download the dataset and give --dataset the files themselves")
    })
}

/// The files that can be read, in natural order, of a dataset whose file names tell the splits.
struct Named<'a> {
    files: Vec<&'a str>,
}

impl Named<'_> {
    fn choose(&self, asked: Option<&str>, split: &str) -> Result<Chosen> {
        let top = self.in_folders(&[DATA, ""], split);
        let unsplit = self.unsplit("").is_some();
        let folders = self.folders();
        if let Some(name) = asked {
            let folder = name.trim_matches('/');
            let below = format!("{folder}/");
            if !folder.is_empty() && self.files.iter().any(|file| file.starts_with(&below)) {
                let files = self.in_folders(&[folder], split);
                let files = files.map_or_else(|| self.otherwise(folder, &[folder], split), Ok)?;
                return Ok(Chosen { config: Some(folder.to_owned()), files });
            }
            return match top {
                Some(files) if name == DEFAULT => Ok(Chosen { config: None, files }),
                _ if name == DEFAULT && (unsplit || folders.is_empty()) => {
                    let files = self.otherwise("", &[DATA, ""], split)?;
                    Ok(Chosen { config: None, files })
                }
                top => {
                    let unnamed = (unsplit || top.is_some()).then(|| DEFAULT.to_owned());
                    Err(no_such_config(name, unnamed.into_iter().chain(folders).collect()))
                }
            };
        }
        if let Some(files) = top {
            return Ok(Chosen { config: None, files });
        }
        let mut having: Vec<(String, Vec<String>)> = folders
            .iter()
            .filter_map(|folder| Some((folder.clone(), self.in_folders(&[folder], split)?)))
            .collect();
        let at = having.iter().position(|(folder, _)| folder == DEFAULT);
        match (at, having.len()) {
            (None, 0) => {
                let places: Vec<&str> =
                    [DATA, ""].into_iter().chain(folders.iter().map(String::as_str)).collect();
                Ok(Chosen { config: None, files: self.otherwise("", &places, split)? })
            }
            (None, 2..) => Err(which_config(having.into_iter().map(|(folder, _)| folder).collect())),
            (at, _) => {
                let (config, files) = having.swap_remove(at.unwrap_or(0));
                Ok(Chosen { config: Some(config), files })
            }
        }
    }

    /// The files of a configuration that is declared without them.
    fn of_declared(&self, config: &Config, split: &str) -> Result<Vec<String>> {
        let own = match config.folder.as_str() {
            "" => vec![config.name.clone(), DATA.to_owned(), String::new()],
            folder => vec![folder.to_owned(), format!("{folder}/{DATA}")],
        };
        let folders: Vec<&str> = own.iter().map(String::as_str).collect();
        let by_name =
            config.folder.is_empty() && self.files.iter().any(|file| below(file, &config.name).is_some());
        let place = if by_name { &config.name } else { &config.folder };
        self.in_folders(&folders, split).map_or_else(|| self.otherwise(place, &folders, split), Ok)
    }

    /// What `split` is where no name in `folders` tells: everything below `place`, if that has no names of splits and
    /// this is the split for training.
    fn otherwise(&self, place: &str, folders: &[&str], split: &str) -> Result<Vec<String>> {
        match self.unsplit(place) {
            Some(files) if split == TRAIN => Ok(files),
            Some(_) => Err(no_such_split(split, vec![TRAIN.to_owned()])),
            None => Err(no_such_split(split, self.splits(folders))),
        }
    }

    /// All files below `place`, if none of their paths from there names a split.
    fn unsplit(&self, place: &str) -> Option<Vec<String>> {
        let mut all = Vec::new();
        for file in &self.files {
            let Some(rest) = below(file, place) else { continue };
            if FACTS.contains(&rest.rsplit('/').next().unwrap_or(rest)) {
                continue;
            }
            if names_split(rest) {
                return None;
            }
            all.push((*file).to_owned());
        }
        (!all.is_empty()).then_some(all)
    }

    /// What `folders` have of `split`, in the first way that gives any: `split-*` in one of them, as uploads are
    /// named, then `split.*`, then a folder of that name.
    fn in_folders(&self, folders: &[&str], split: &str) -> Option<Vec<String>> {
        let ways: [fn(&str) -> bool; 3] = [
            |rest| rest.starts_with('-') && !rest.contains('/'),
            |rest| rest.starts_with('.') && !rest.contains('/'),
            |rest| rest.starts_with('/'),
        ];
        ways.iter().flat_map(|way| folders.iter().map(move |folder| (way, *folder))).find_map(
            |(way, folder)| {
                let of_split = |file: &&&str| {
                    below(file, folder).and_then(|rest| rest.strip_prefix(split)).is_some_and(way)
                };
                let found: Vec<String> =
                    self.files.iter().filter(of_split).map(|file| (*file).to_owned()).collect();
                (!found.is_empty()).then_some(found)
            },
        )
    }

    /// The folders that hold files, which are configurations where nothing is declared.
    fn folders(&self) -> Vec<String> {
        let mut folders: Vec<String> =
            self.files.iter().filter_map(|file| Some(file.rsplit_once('/')?.0.to_owned())).collect();
        folders.retain(|folder| folder != DATA);
        folders.dedup();
        let mut seen = HashSet::new();
        folders.retain(|folder| seen.insert(folder.clone()));
        folders
    }

    /// The splits that the files right in `folders` are named after.
    fn splits(&self, folders: &[&str]) -> Vec<String> {
        let mut seen = HashSet::new();
        let files =
            folders.iter().flat_map(|folder| self.files.iter().filter_map(|file| below(file, folder)));
        let names = files.filter(|rest| !rest.contains('/')).filter_map(|rest| rest.split(['-', '.']).next());
        names.filter(|name| seen.insert(*name)).map(str::to_owned).collect()
    }
}

/// The rest of the path of a file that lies below `folder`, the repository itself being "".
fn below<'a>(file: &'a str, folder: &str) -> Option<&'a str> {
    match folder {
        "" => Some(file),
        _ => file.strip_prefix(folder)?.strip_prefix('/'),
    }
}

/// Whether a path says which split its file is of: in a word of its own, or as uploads number the files of a split of
/// any name (`data/unsupervised-00000-of-00001.parquet`).
fn names_split(path: &str) -> bool {
    let between = |c: char| "/-_. ".contains(c) || c.is_ascii_digit();
    // A capital keeps nobody from seeing a split in a name; to take `Test.jsonl` for training would be a mistake.
    let named = path.split(between).any(|word| SPLITS.contains(&word.to_lowercase().as_str()));
    named || below(path, DATA).is_some_and(is_shard)
}

/// Whether a name has the form `{split}-00000-of-00001`, whatever follows.
fn is_shard(name: &str) -> bool {
    let number = |text: &str| text.len() >= 5 && text.bytes().take(5).all(|byte| byte.is_ascii_digit());
    let parts: Vec<&str> = name.split('-').collect();
    let numbered =
        |four: &[&str]| number(four[1]) && four[1].len() == 5 && four[2] == "of" && number(four[3]);
    !name.contains('/') && parts.windows(4).any(numbered)
}

/// The names as an error lists them; dozens are of use, as one of them is to be given.
fn choices(names: &[String]) -> String {
    const SHOWN: usize = 60;
    let more = if names.len() > SHOWN { ", …" } else { "" };
    names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ") + more
}

fn which_config(names: Vec<String>) -> Error {
    let example = names.first().map_or("NAME", String::as_str).to_owned();
    Error::usage("the dataset has several configurations, and none is the default")
        .at("--dataset_config")
        .expected(format!("one of {}", choices(&names)))
        .found("no --dataset_config")
        .hint(format!("name one, such as --dataset_config {example}"))
}

fn no_such_config(name: &str, names: Vec<String>) -> Error {
    let expected = match names.is_empty() {
        true => "none: the dataset has no configurations".to_owned(),
        false => format!("one of {}", choices(&names)),
    };
    Error::usage(format!("the dataset has no configuration {name:?}"))
        .at("--dataset_config")
        .expected(expected)
        .found(format!("{name:?}"))
}

fn no_such_split(split: &str, splits: Vec<String>) -> Error {
    let error = Error::usage(format!("the dataset has no split {split:?}"))
        .at("--dataset_split")
        .found(format!("{split:?}"));
    match splits.is_empty() {
        true => error
            .expected("files named after a split, such as train-00000-of-00001.parquet")
            .hint("download the dataset and give --dataset the files themselves"),
        false => error.expected(format!("one of {}", choices(&splits))),
    }
}

fn nothing_readable(all: &[&str]) -> Error {
    Error::new("the dataset has no file that can be read")
        .expected(format!("files {KINDS}"))
        .found(listed(all))
        .hint(CONVERT)
}

fn listed(all: &[&str]) -> String {
    match all.is_empty() {
        true => "an empty repository".to_owned(),
        false => some_of(all.iter().map(|file| (*file).to_owned()).collect()),
    }
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
