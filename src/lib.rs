//! Which dimensions of each layer's MLP output, or which features of sparse autoencoders (SAEs) there, are active, and
//! which does the loss depend on?
//!
//! One forward and one backward pass over a corpus serve every layer. The modules are listed in the order
//! in which a run passes through them; imports point one way:
//!
//! `{error, units} ← interrupt ← model ← {hub, source, weights, backend} ← stats ← engine ← transform ← output ← plan ← run ← main`
//!
//! (`cli` is read by `main` and `plan` only.) Each stage defines its own small input struct; `plan` fills
//! them and `run` passes them on, so no stage sees another's insides. A test holds this order.
//!
//! # Letters
//!
//! Shapes in comments and docs use these letters everywhere:
//!
//! | letter | meaning | letter | meaning |
//! |---|---|---|---|
//! | N | tokens in a pass | H | query heads |
//! | B | samples | K | key/value heads |
//! | T | tokens of one sample | Hd | head dim |
//! | T_s | length of sample s | V | vocabulary |
//! | D | hidden size | L | layers |
//! | I | MLP inner size | F | SAE features |
//!
//! Losses are in nats. Sizes in bytes say `_bytes`, times `_s` or `_ms`.

pub mod error;
pub mod units;

pub mod interrupt;
pub mod model;

pub mod backend;
pub mod hub;
pub mod source;
pub mod weights;

pub mod stats;

pub mod engine;

pub mod transform;

pub mod output;

pub mod cli;
pub mod plan;

pub mod run;
