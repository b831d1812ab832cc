//! Files → texts → token ids → ragged passes.
//!
//! [`Texts`] reads a dataset one text at a time, [`Tokens`] turns texts into the ids that transformers would give,
//! and [`Passes`] does both on a thread of its own and packs whole samples into passes of about N tokens. Nothing
//! here grows with the size of the dataset. [`files_of`] tells which files of a dataset repository are meant;
//! bringing them here is another module's work.

mod column;
mod files;
mod json;
mod layout;
mod lines;
mod pack;
mod pages;
mod panics;
mod parquet;
mod readme;
mod rebuild;
mod special;
mod text;
mod thrift;
mod tokens;
mod wait;

pub use files::is_readable;
pub use layout::{Chosen, files_of};
pub use pack::{Pass, PassSpec, Passes, SourceCounts};
pub use special::Specials;
pub use text::{TextCounts, TextSpec, Texts, nothing_kept};
pub use tokens::{Sample, Tokens};
pub use wait::count;
