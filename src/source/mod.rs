//! Files → texts → token ids → ragged passes.
//!
//! [`Texts`] reads a dataset one text at a time, [`Tokens`] turns texts into the ids that transformers would give,
//! and [`Passes`] does both on a thread of its own and packs whole samples into passes of about N tokens. Nothing
//! here grows with the size of the dataset.

mod files;
mod json;
mod pack;
mod rebuild;
mod text;
mod tokens;
mod wait;

pub use pack::{Pass, PassSpec, Passes, SourceCounts};
pub use text::{TextCounts, TextSpec, Texts, nothing_kept};
pub use tokens::{Sample, Tokens};
pub use wait::count;
