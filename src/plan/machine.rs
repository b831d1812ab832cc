//! What this machine has.

use std::error::Error as _;

use crate::error::{Context, Error, Result};

/// 2³⁰ bytes.
pub(super) const GIB: f64 = (1u64 << 30) as f64;

/// Bytes of memory that are free now, inside the limits of the control group a cluster job runs in.
pub(super) fn free_memory() -> Result<u64> {
    let mut system = sysinfo::System::new().context("cannot tell how much memory is free")?;
    system.refresh_memory();
    let own = sysinfo::get_current_pid().ok();
    if let Some(pid) = own {
        system.refresh_processes(sysinfo::ProcessesToUpdate::Some(&[pid]), true);
    }
    // Of the limit, what this process and its siblings hold; pages of mapped files can be dropped and do not count.
    let limit = own
        .and_then(|pid| system.process(pid)?.cgroup_limits())
        .map_or(u64::MAX, |limits| limits.total_memory.saturating_sub(limits.rss));
    Ok(system.available_memory().min(limit))
}

/// Cores that this process may use.
pub(super) fn num_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Makes rayon's pool, which everything parallel uses, of this many threads.
///
/// A process has one such pool: a second run in it takes the pool as it is, which changes no result.
pub(super) fn use_threads(threads: usize) -> Result<()> {
    let made = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    match made {
        // A refusal of the system has a cause; without one the pool was there. (Where there is none, rayon panics
        // when it is asked for its number of threads.)
        Err(refusal) if refusal.source().is_some() || rayon::current_num_threads() != threads => {
            Err(Error::new(format!("cannot start {threads} threads"))
                .at("--threads")
                .expected("as many threads as the system grants, the same in all runs of one process")
                .found(refusal)
                .hint("leave --threads out for one thread per core"))
        }
        _ => Ok(()),
    }
}
