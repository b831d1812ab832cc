//! The kernels' sources, which the program carries, and what can be read off their text.

use std::borrow::Cow;
use std::collections::HashMap;

use crate::error::{Error, Result};

/// One file below `kernels/`.
macro_rules! kernel_file {
    ($name:literal) => {
        ($name, Cow::Borrowed(include_str!(concat!("../../../kernels/", $name))))
    };
}

/// The texts of all kernel files.
#[derive(Clone)]
pub struct Sources {
    files: Vec<(&'static str, Cow<'static, str>)>,
}

impl Sources {
    /// As they were when the program was built.
    pub fn embedded() -> Self {
        Self {
            files: vec![
                kernel_file!("attention.cu"),
                kernel_file!("attention.cuh"),
                kernel_file!("attention_any.cu"),
                kernel_file!("activation.cuh"),
                kernel_file!("attention_backward.cu"),
                kernel_file!("attention_mma.cuh"),
                kernel_file!("common.cuh"),
                kernel_file!("elementwise.cu"),
                kernel_file!("embed.cu"),
                kernel_file!("epilogue.cuh"),
                kernel_file!("hopper.cuh"),
                kernel_file!("linear.cu"),
                kernel_file!("linear_f32.cu"),
                kernel_file!("linear_sm90.cu"),
                kernel_file!("loss.cu"),
                kernel_file!("moe.cu"),
                kernel_file!("norm.cu"),
                kernel_file!("rope.cu"),
                kernel_file!("rows.cuh"),
                kernel_file!("stats.cu"),
            ],
        }
    }

    /// The same with one place of one file changed: how tests plant faults.
    ///
    /// # Errors
    ///
    /// No such file, or `from` does not occur in it exactly once.
    pub fn with(mut self, file: &str, from: &str, to: &str) -> Result<Self> {
        let missing = || Error::new("no such kernel file").found(file);
        let (_, text) = self.files.iter_mut().find(|(name, _)| *name == file).ok_or_else(missing)?;
        match text.matches(from).count() {
            1 => *text = Cow::Owned(text.replacen(from, to, 1)),
            count => {
                return Err(Error::new("a change needs exactly one place")
                    .at(file)
                    .expected(from)
                    .found(format!("{count} places")));
            }
        }
        Ok(self)
    }

    /// The same and one file more.
    pub fn and(mut self, file: &'static str, text: impl Into<Cow<'static, str>>) -> Self {
        self.files.push((file, text.into()));
        self
    }

    /// Names of the files that hold kernels.
    pub fn kernel_files(&self) -> impl Iterator<Item = &'static str> {
        self.files.iter().map(|(name, _)| *name).filter(|name| name.ends_with(".cu"))
    }

    /// The text of a file.
    pub fn text(&self, file: &str) -> Option<&str> {
        self.files.iter().find(|(name, _)| *name == file).map(|(_, text)| text.as_ref())
    }

    /// What kernel files may include: (name, text).
    pub fn headers(&self) -> Vec<(&str, &str)> {
        self.files
            .iter()
            .filter(|(name, _)| name.ends_with(".cuh"))
            .map(|(name, text)| (*name, text.as_ref()))
            .collect()
    }

    /// Name and parameters of each entry point of a file, as its text declares them. Entry points are written
    /// out (`extern "C" __global__ void …`), never by a macro, so that this finds them.
    pub fn entry_points(text: &str) -> HashMap<String, Vec<String>> {
        let text = without_comments(text);
        let declarations = text.split("extern \"C\" __global__").skip(1).filter_map(|rest| {
            // … __launch_bounds__(256, 2) name(parameters) {
            let head = &rest[..rest.find('{')?];
            let close = head.rfind(')')?;
            let open = matching_open(head, close)?;
            let name = head[..open].trim_end().rsplit(|c: char| !c.is_alphanumeric() && c != '_').next()?;
            Some((name.to_owned(), parameters(&head[open + 1..close])))
        });
        declarations.collect()
    }
}

/// The text with comments blanked out.
fn without_comments(text: &str) -> String {
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    let mut text = lines.flat_map(|line| [line, "\n"]).collect::<String>();
    while let Some(start) = text.find("/*") {
        let end = text[start..].find("*/").map_or(text.len(), |end| start + end + 2);
        text.replace_range(start..end, " ");
    }
    text
}

/// The parenthesis that `close` ends.
fn matching_open(text: &str, close: usize) -> Option<usize> {
    let mut level = 0;
    for (at, c) in text[..=close].char_indices().rev() {
        match c {
            ')' => level += 1,
            '(' => level -= 1,
            _ => {}
        }
        if level == 0 {
            return Some(at);
        }
    }
    None
}

/// The declarations of a parameter list, spaces normalised.
fn parameters(list: &str) -> Vec<String> {
    let each = list.split(',').map(normalised);
    each.filter(|parameter| !parameter.is_empty()).collect()
}

/// A C declaration with spaces only where words meet: `const float* __restrict__ x` and `const float *x` are
/// the same parameter.
pub(super) fn normalised(declaration: &str) -> String {
    let spaced =
        declaration.replace("__restrict__", " ").replace("__grid_constant__", " ").replace('*', " * ");
    spaced.split_whitespace().collect::<Vec<_>>().join(" ").replace(" *", "*")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_points_are_read_from_the_text() {
        let text = r#"
            // extern "C" __global__ void not_this(int x) {}
            extern "C" __global__ void __launch_bounds__(256, 2)
            first(const bf16* __restrict__ x, /* [N, D] */ float *y,
                  int rows) {
            }
            extern "C" __global__ void second() { if (x) {} }
        "#;
        let found = Sources::entry_points(text);
        assert_eq!(found.len(), 2);
        assert_eq!(found["first"], ["const bf16* x", "float* y", "int rows"]);
        assert!(found["second"].is_empty());
    }

    #[test]
    fn declarations_compare_without_spaces_and_qualifiers() {
        for same in ["const float* x", "const float *x", "const  float * __restrict__ x"] {
            assert_eq!(normalised(same), "const float* x");
        }
        assert_ne!(normalised("const float* x"), normalised("const float* y"));
    }

    #[test]
    fn a_change_needs_its_place() {
        let sources = Sources::embedded();
        assert!(sources.clone().with("nope.cu", "a", "b").is_err());
        assert!(sources.clone().with("common.cuh", "no such words", "").is_err());
        assert!(sources.clone().with("common.cuh", "__device__", "").is_err(), "occurs often");
        let changed = sources.with("common.cuh", "#pragma once", "#pragma twice").unwrap();
        assert!(changed.text("common.cuh").unwrap().contains("#pragma twice"));
    }
}
