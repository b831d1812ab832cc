//! SAEs in every format, as files that the tests write themselves, against each library's formulas; and files that are
//! damaged, foreign or malicious.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "sae_formats/damage.rs"]
mod damage;
#[path = "sae_formats/dictionary_learning.rs"]
mod dictionary_learning;
#[path = "sae_formats/folders.rs"]
mod folders;
#[path = "sae_formats/fuzz.rs"]
mod fuzz;
#[path = "sae_formats/large.rs"]
mod large;
#[path = "sae_formats/pickles.rs"]
mod pickles;
#[path = "sae_formats/raw.rs"]
mod raw;
#[path = "sae_formats/reference.rs"]
mod reference;
#[path = "sae_formats/saelens.rs"]
mod saelens;
#[path = "sae_formats/scopes.rs"]
mod scopes;
#[path = "sae_formats/sparsify.rs"]
mod sparsify;
#[path = "sae_formats/write.rs"]
mod write;
