//! Buffers of activations, recycled: fresh memory costs a page fault per 4 KiB.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Freed buffers, kept for the next op: fresh memory costs a page fault per 4 KiB.
pub(super) struct Pool<T>(Mutex<Free<T>>);

/// What a [`Pool`] holds, in elements.
struct Free<T> {
    buffers: Vec<Vec<T>>,
    /// Elements of all buffers here.
    free: usize,
    /// Elements of all buffers handed out, now and at most.
    in_use: usize,
    peak: usize,
    /// Free elements that are kept in any case.
    slack: usize,
}

/// 256 MB of float32: the slots of a block come in a handful of sizes, and all of them should stay.
const SLACK: usize = 1 << 26;

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self::new(SLACK)
    }
}

impl<T> Pool<T> {
    pub(super) fn new(slack: usize) -> Self {
        Self(Mutex::new(Free { buffers: Vec::new(), free: 0, in_use: 0, peak: 0, slack }))
    }

    /// The smallest free vector of at least `len` elements that wastes at most an eighth: buffers live long,
    /// and the plan counts on their size. Without one the caller allocates, and free buffers are given back,
    /// the largest first, while the whole exceeds what was ever in use by more than a quarter (or the slack):
    /// ragged passes ask for new sizes each time, and the old ones must not pile up.
    pub(super) fn take(&self, len: usize) -> Option<Vec<T>> {
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |data: &Vec<T>| data.len() >= len && data.len() - len <= len / 8;
        let best = pool.buffers.iter().enumerate().filter(|(_, data)| fits(data));
        if let Some((index, _)) = best.min_by_key(|(_, data)| data.len()) {
            let best = pool.buffers.swap_remove(index);
            pool.free -= best.len();
            pool.in_use += best.len();
            pool.peak = pool.peak.max(pool.in_use);
            return Some(best);
        }
        pool.in_use += len;
        pool.peak = pool.peak.max(pool.in_use);
        let most = pool.peak + pool.slack.max(pool.peak / 4);
        if pool.free + pool.in_use > most {
            pool.buffers.sort_unstable_by_key(Vec::len);
            while pool.free + pool.in_use > most
                && let Some(data) = pool.buffers.pop()
            {
                pool.free -= data.len();
            }
        }
        None
    }

    fn give(&self, data: Vec<T>) {
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pool.in_use -= data.len();
        pool.free += data.len();
        pool.buffers.push(data);
    }
}

/// An activation, row-major `[rows, width]`; dereferences to its elements.
pub struct Buf<T> {
    /// At least rows·width elements; what lies beyond is not part of the buffer.
    pub(super) data: Vec<T>,
    pub(super) rows: usize,
    pub(super) width: usize,
    pub(super) pool: Arc<Pool<T>>,
}

impl<T> Buf<T> {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }
}

impl<T> Deref for Buf<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.data[..self.rows * self.width]
    }
}

impl<T> DerefMut for Buf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.data[..self.rows * self.width]
    }
}

impl<T> Drop for Buf<T> {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        if !data.is_empty() {
            self.pool.give(data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Cpu;
    use super::*;

    #[test]
    fn ragged_sizes_do_not_pile_up() {
        let cpu = Cpu::<f32> { pool: Arc::new(Pool::new(0)), ..Cpu::with_multiply_adds() };
        for n in (100..4000).rev().step_by(7) {
            let _two = [cpu.alloc(n, 1), cpu.alloc(n, 1)];
        }
        let pool = cpu.pool.0.lock().unwrap();
        let held: usize = pool.buffers.iter().map(Vec::len).sum();
        assert_eq!((pool.in_use, pool.free), (0, held));
        assert!(held <= 10_000, "{held} elements are held, of which 8,000 were ever in use");
    }

    #[test]
    fn a_freed_buffer_serves_the_next_of_its_size() {
        let cpu = Cpu::<f32>::new();
        let first = cpu.alloc(10, 10).as_ptr();
        assert_eq!(cpu.alloc(5, 19).as_ptr(), first);
        assert_ne!(cpu.alloc(5, 10).rows(), 10);
    }
}
