//! What is said about the column that should hold the texts, for every format that has columns.

use crate::error::Error;

/// Columns named in an error at most.
pub(super) const COLUMNS_SHOWN: usize = 24;

/// No such column; `columns` are the first [`COLUMNS_SHOWN`] that there are, `whole` is what has them: "an object".
pub(super) fn missing(column: &str, columns: &[String], whole: &str) -> Error {
    let found = match columns.is_empty() {
        true => format!("{whole} without columns"),
        false => format!("columns {}", columns.join(", ")),
    };
    let example = columns.first().map_or("NAME", String::as_str);
    Error::new(format!("the dataset has no column {column:?}"))
        .expected(format!("a column {column:?}"))
        .found(found)
        .hint(format!("name the column that holds the text, such as --text_column {example}"))
}

/// The column holds something else than a text.
pub(super) fn not_a_text(column: &str, found: &str) -> Error {
    Error::new(format!("column {column:?} of the dataset is not a text"))
        .expected("a string")
        .found(found)
        .hint("--text_column names another column")
}
