//! Threads for rows of equal work: `kernels/rows.cuh`.

use super::Kernel;
use super::launch::{Launch, int};

/// Threads of a block, `ROWS_THREADS` there.
const THREADS: usize = 256;
/// Pieces of a row that one thread has under way together, where there are as many.
const AT_ONCE: usize = 2;

/// How many threads share a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rows {
    rows: usize,
    lanes: usize,
}

impl Rows {
    /// `rows` rows of `pieces` each. How a row is shared depends on `pieces` alone.
    pub(super) fn new(rows: usize, pieces: usize) -> Self {
        Self { rows, lanes: pieces.div_ceil(AT_ONCE).next_power_of_two().min(THREADS) }
    }

    /// A launch without arguments.
    pub(super) fn launch(self, kernel: &Kernel) -> Launch<'_> {
        Launch::new(kernel, self.rows.div_ceil(THREADS / self.lanes), THREADS as u32)
    }

    /// The parameter `rows`.
    pub(super) fn rows(self) -> i64 {
        self.rows as i64
    }

    /// The parameter `lanes`.
    pub(super) fn lanes(self) -> i32 {
        int(self.lanes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_are_a_power_of_two_within_a_block() {
        for (pieces, lanes) in [(0, 1), (1, 1), (2, 1), (3, 2), (16, 8), (224, 128), (257, 256), (9000, 256)]
        {
            assert_eq!(Rows::new(5, pieces), Rows { rows: 5, lanes }, "{pieces}");
        }
    }
}
