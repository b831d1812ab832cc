//! The front matter of a dataset's README.md: which configurations it declares, and which files belong to their splits.

use saphyr_parser::{Event, Parser};

use crate::error::{Error, Result};

/// Levels of lists and mappings in one another at most; real files have five.
const DEPTH: usize = 64;

/// One configuration of the dataset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Config {
    pub name: String,
    /// Whether it is the one to take when none is asked for.
    pub default: bool,
    /// The folder that patterns start from; empty for the dataset's own.
    pub folder: String,
    /// Split → patterns of its files, in order; `None` where the names of the files are to tell.
    pub splits: Option<Vec<(String, Vec<String>)>>,
}

/// YAML with every scalar as it is written, as none of ours is anything else: a configuration may be called `no`.
#[derive(Clone, Debug, PartialEq)]
enum Node {
    Text(String),
    List(Vec<Node>),
    Map(Vec<(Node, Node)>),
}

impl Node {
    fn get(&self, key: &str) -> Option<&Node> {
        let Self::Map(entries) = self else { return None };
        entries.iter().rev().find(|(name, _)| name.text() == Some(key)).map(|(_, value)| value)
    }

    fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A text, or a list of them.
    fn texts(&self) -> Option<Vec<String>> {
        match self {
            Self::Text(text) => Some(vec![text.clone()]),
            Self::List(items) => items.iter().map(|item| item.text().map(str::to_owned)).collect(),
            Self::Map(_) => None,
        }
    }
}

/// The configurations that `readme` declares, in its order; none where it declares none.
pub(super) fn configs(readme: &str) -> Result<Vec<Config>> {
    let Some((matter, first_line)) = front_matter(readme) else { return Ok(Vec::new()) };
    let matter = parse(matter, first_line)?;
    let declared = match matter.as_ref().and_then(|matter| matter.get("configs")) {
        None => return Ok(Vec::new()),
        Some(Node::Text(empty)) if empty.is_empty() => return Ok(Vec::new()),
        Some(Node::List(declared)) => declared,
        Some(_) => return Err(unclear("configs that are no list")),
    };
    declared.iter().map(config).collect()
}

fn config(declared: &Node) -> Result<Config> {
    let Node::Map(_) = declared else { return Err(unclear("a configuration that is no mapping")) };
    let text = |key: &str| match declared.get(key) {
        None => Ok(None),
        Some(node) => node.text().map(Some).ok_or_else(|| unclear(&format!("a {key} that is no text"))),
    };
    Ok(Config {
        name: text("config_name")?.unwrap_or("default").to_owned(),
        default: text("default")?.is_some_and(|value| value.eq_ignore_ascii_case("true")),
        folder: text("data_dir")?.unwrap_or_default().trim_start_matches("./").trim_matches('/').to_owned(),
        splits: declared.get("data_files").map(splits).transpose()?,
    })
}

/// A pattern, a list of patterns, a list of {split, path}, or a mapping from splits to patterns.
fn splits(data_files: &Node) -> Result<Vec<(String, Vec<String>)>> {
    let wrong = || unclear("data_files that are neither patterns nor splits with patterns");
    if let Some(patterns) = data_files.texts() {
        return Ok(vec![("train".to_owned(), patterns)]);
    }
    let pairs: Vec<(Option<&str>, Option<Vec<String>>)> = match data_files {
        Node::Map(entries) => entries.iter().map(|(split, paths)| (split.text(), paths.texts())).collect(),
        Node::List(items) => {
            let path = |item: &Node| item.get("path").and_then(Node::texts);
            let split = |item| Node::get(item, "split").map_or(Some("train"), Node::text);
            items.iter().map(|item| (split(item), path(item))).collect()
        }
        Node::Text(_) => Vec::new(),
    };
    pairs
        .into_iter()
        .map(|(split, patterns)| match (split, patterns) {
            (Some(split), Some(patterns)) => Ok((split.to_owned(), patterns)),
            _ => Err(wrong()),
        })
        .collect()
}

/// What stands between the lines `---` at the top, and the number (from 1) of its first line.
fn front_matter(readme: &str) -> Option<(&str, usize)> {
    let body = readme.trim_start_matches('\u{FEFF}').trim_start();
    let skipped = readme[..readme.len() - body.len()].matches('\n').count();
    let (opening, rest) = body.split_once('\n')?;
    if opening.trim_end() != "---" {
        return None;
    }
    let mut length = 0;
    for line in rest.split_inclusive('\n') {
        if line.trim_end() == "---" {
            return Some((&rest[..length], skipped + 2));
        }
        length += line.len();
    }
    None
}

/// The first document of `yaml`, built without recursion.
fn parse(yaml: &str, first_line: usize) -> Result<Option<Node>> {
    let wrong = |line: usize, what: &str| {
        Error::new("the description of the dataset is not valid YAML")
            .at(format!("README.md:{line}"))
            .expected("YAML between the lines `---`")
            .found(what)
            .hint("download the dataset and give --dataset the files themselves")
    };
    // Lists and mappings that are not closed yet, each with the anchor that names it; a mapping's keys and values by turns.
    let mut open: Vec<(Node, Vec<Node>, usize)> = Vec::new();
    let mut anchors: Vec<(usize, Node)> = Vec::new();
    let mut parser = Parser::new_from_str(yaml);
    while let Some(event) = parser.next_event() {
        let (event, span) =
            event.map_err(|cause| wrong(first_line + cause.marker().line() - 1, cause.info()))?;
        let line = first_line + span.start.line() - 1;
        let (node, anchor) = match event {
            Event::Scalar(text, _, anchor, _) => (Node::Text(text.into_owned()), anchor),
            Event::SequenceStart(anchor, _) | Event::MappingStart(anchor, _) if open.len() < DEPTH => {
                let kind = match event {
                    Event::SequenceStart(..) => Node::List(Vec::new()),
                    _ => Node::Map(Vec::new()),
                };
                open.push((kind, Vec::new(), anchor));
                continue;
            }
            Event::SequenceStart(..) | Event::MappingStart(..) => return Err(wrong(line, "too many levels")),
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some((Node::Map(_), items, anchor)) => {
                    let mut items = items.into_iter();
                    let pairs = std::iter::from_fn(|| items.next().zip(items.next())).collect();
                    (Node::Map(pairs), anchor)
                }
                Some((_, items, anchor)) => (Node::List(items), anchor),
                None => return Err(wrong(line, "an end without a start")),
            },
            // Only texts are repeated: copies of lists within lists could fill the memory.
            Event::Alias(id) => match anchors.iter().rev().find(|(anchor, _)| *anchor == id) {
                Some((_, node @ Node::Text(_))) => (node.clone(), 0),
                _ => (Node::Text(String::new()), 0),
            },
            Event::DocumentEnd => return Ok(None),
            _ => continue,
        };
        if anchor != 0 && matches!(node, Node::Text(_)) {
            anchors.push((anchor, node.clone()));
        }
        match open.last_mut() {
            Some((_, items, _)) => items.push(node),
            None => return Ok(Some(node)),
        }
    }
    Ok(None)
}

fn unclear(found: &str) -> Error {
    Error::new("the description of the dataset is unclear")
        .at("README.md")
        .expected("`configs`, a list of {config_name, data_files}")
        .found(found)
        .hint("download the dataset and give --dataset the files themselves")
}
