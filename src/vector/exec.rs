//! How ops run their tasks: the caller's threads, through one callback. This crate starts no thread for an
//! op.

use crate::error::{Error, Result};
use std::sync::Mutex;

/// The caller's threads. Results never depend on how many there are or on who runs which task.
pub trait Executor: Sync {
    /// Threads that `run` may use at once.
    fn threads(&self) -> usize;

    /// Call `task(i)` once for every `i < tasks`, in any order, on any threads, and return when all are done.
    ///
    /// # Errors
    /// Whatever kept a task from running.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()>;
}

/// The calling thread alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct Serial;

impl Executor for Serial {
    fn threads(&self) -> usize {
        1
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()> {
        (0..tasks).for_each(task);
        Ok(())
    }
}

/// Words of work that a task takes at least: some 5 us. Waking another thread for less takes longer, and on a
/// busy machine milliseconds. A caller's task is the unit of that: an op below it runs on the calling thread
/// alone.
pub(crate) const LEAST_WORDS: usize = 1 << 15;

/// Where tasks of at least `least` words of work end: neighbouring pieces, each worth so many words, go
/// together. What is left over at the end goes with the last task.
pub(crate) fn task_ends(least: usize, pieces: impl IntoIterator<Item = usize>) -> Vec<usize> {
    let (mut ends, mut words, mut count) = (Vec::new(), 0usize, 0);
    for piece in pieces {
        (words, count) = (words.saturating_add(piece), count + 1);
        if words >= least {
            ends.push(count);
            words = 0;
        }
    }
    match ends.last_mut() {
        Some(end) => *end = count,
        None if count > 0 => ends.push(count),
        None => {}
    }
    ends
}

/// Run fallible pieces of work, piece `i` worth `words[i]` words, as tasks of at least `least` of them; of
/// several errors the one of the lowest piece is given back. Every op shares its work out through here.
pub(crate) fn try_run(
    exec: &dyn Executor,
    least: usize,
    words: impl IntoIterator<Item = usize>,
    piece: impl Fn(usize) -> Result<()> + Sync,
) -> Result<()> {
    let ends = task_ends(least, words);
    let first: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    exec.run(ends.len(), &|task| {
        let start = task.checked_sub(1).map_or(0, |before| ends[before]);
        if let Err(e) = (start..ends[task]).try_for_each(&piece) {
            let mut first = first.lock().unwrap_or_else(|p| p.into_inner());
            if first.as_ref().is_none_or(|(at, _)| task < *at) {
                *first = Some((task, e));
            }
        }
    })?;
    match first.into_inner().unwrap_or_else(|p| p.into_inner()) {
        Some((_, e)) => Err(e),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_pieces_go_together_and_none_is_lost() {
        assert_eq!(task_ends(100, []), [0; 0]);
        assert_eq!(task_ends(100, [0, 0, 0]), [3]);
        assert_eq!(task_ends(100, [30; 3]), [3]);
        assert_eq!(task_ends(100, [100; 3]), [1, 2, 3]);
        assert_eq!(task_ends(100, [60; 7]), [2, 4, 7]);
        assert_eq!(task_ends(100, [300, 1, 1, 99, 99]), [1, 5]);
        assert_eq!(task_ends(100, [usize::MAX, usize::MAX]), [1, 2]);
        assert_eq!(task_ends(1, [5, 0, 5, 0]), [1, 4]);
    }
}
