//! The built program in a fresh folder, as a user meets it. One file per question:
//!
//! * `help`: what the program says about itself and about a plan
//! * `bare`: a dry run of config.json alone
//! * `doctor`: what it finds, and what stands in the way of a job
//! * `results`: which files a run writes and what is in them
//! * `sae`: runs over SAE features, and what they write
//! * `sites`: several places in each block
//! * `policy`: which tokens count
//! * `same_bytes`: what must not change a result, and what must
//! * `screen`: what is printed, and what is kept for the file alone
//! * `interrupt`: Ctrl-C and `kill`
//! * `bad_flags`, `bad_model`, `bad_texts`, `bad_sae`: every wrong input, its message, and that nothing stays behind
#![allow(clippy::unwrap_used)]

#[path = "cli/bad_flags.rs"]
mod bad_flags;
#[path = "cli/bad_model.rs"]
mod bad_model;
#[path = "cli/bad_sae.rs"]
mod bad_sae;
#[path = "cli/bad_texts.rs"]
mod bad_texts;
#[path = "cli/bare.rs"]
mod bare;
#[path = "cli/dir.rs"]
mod dir;
#[path = "cli/doctor.rs"]
mod doctor;
#[path = "cli/files.rs"]
mod files;
#[path = "cli/help.rs"]
mod help;
#[cfg(unix)]
#[path = "cli/interrupt.rs"]
mod interrupt;
#[path = "cli/policy.rs"]
mod policy;
#[path = "cli/results.rs"]
mod results;
#[path = "cli/sae.rs"]
mod sae;
#[path = "cli/same_bytes.rs"]
mod same_bytes;
#[path = "cli/screen.rs"]
mod screen;
#[path = "cli/sites.rs"]
mod sites;
