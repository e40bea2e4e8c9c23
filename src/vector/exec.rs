//! How ops run their tasks: the caller's threads, through one callback. This crate starts no thread for an
//! op.

use crate::error::{Error, Result};
use std::ops::Range;
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

/// Which pieces of work tasks take, by runs of tasks that take as many each: what an op holds for its tasks does not grow with
/// their number.
pub(crate) struct Tasks(Vec<TaskRun>);

struct TaskRun {
    /// Tasks up to here.
    end: usize,
    /// The first piece, and how many each task takes.
    start: usize,
    each: usize,
}

impl Tasks {
    /// Tasks of at least `least` words of work: neighbouring pieces, each worth so many words, go together. What is left over at
    /// the end goes with the last task.
    pub(crate) fn of(least: usize, pieces: impl IntoIterator<Item = usize>) -> Self {
        let (mut tasks, mut words, mut count) = (Self(Vec::new()), 0usize, 0);
        for piece in pieces {
            (words, count) = (words.saturating_add(piece), count + 1);
            if words >= least {
                tasks.push(count);
                (words, count) = (0, 0);
            }
        }
        if count > 0 {
            let last = tasks.pop();
            tasks.push(last + count);
        }
        tasks
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.0.last().map_or(0, |run| run.end)
    }

    /// The pieces of one of them.
    fn pieces(&self, task: usize) -> Range<usize> {
        let i = self.0.partition_point(|run| run.end <= task);
        let (run, before) = (&self.0[i], i.checked_sub(1).map_or(0, |before| self.0[before].end));
        let start = run.start + (task - before) * run.each;
        start..start + run.each
    }

    /// One more task, of so many pieces.
    fn push(&mut self, each: usize) {
        let (end, start) = (self.len(), self.pieces_end());
        match self.0.last_mut().filter(|run| run.each == each) {
            Some(run) => run.end += 1,
            None => self.0.push(TaskRun { end: end + 1, start, each }),
        }
    }

    /// Without the last task; how many pieces it had.
    fn pop(&mut self) -> usize {
        let Some(each) = self.0.last().map(|run| run.each) else { return 0 };
        let before = self.0.len().checked_sub(2).map_or(0, |before| self.0[before].end);
        if let Some(run) = self.0.last_mut() {
            run.end -= 1;
            if run.end == before {
                self.0.pop();
            }
        }
        each
    }

    fn pieces_end(&self) -> usize {
        self.len().checked_sub(1).map_or(0, |last| self.pieces(last).end)
    }
}

/// Run fallible pieces of work, piece `i` worth `words[i]` words, as tasks of at least `least` of them; of
/// several errors the one of the lowest piece is given back. Every op shares its work out through here.
pub(crate) fn try_run(
    exec: &dyn Executor,
    least: usize,
    words: impl IntoIterator<Item = usize>,
    piece: impl Fn(usize) -> Result<()> + Sync,
) -> Result<()> {
    let tasks = Tasks::of(least, words);
    let first: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    exec.run(tasks.len(), &|task| {
        if let Err(e) = tasks.pieces(task).try_for_each(&piece) {
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
        let ends = |least: usize, pieces: &[usize]| -> Vec<usize> {
            let tasks = Tasks::of(least, pieces.iter().copied());
            let each: Vec<_> = (0..tasks.len()).map(|task| tasks.pieces(task)).collect();
            assert!(each.iter().zip(each.iter().skip(1)).all(|(a, b)| a.end == b.start));
            assert!(each.first().is_none_or(|first| first.start == 0));
            each.iter().map(|pieces| pieces.end).collect()
        };
        assert_eq!(ends(100, &[]), [0; 0]);
        assert_eq!(ends(100, &[0, 0, 0]), [3]);
        assert_eq!(ends(100, &[30; 3]), [3]);
        assert_eq!(ends(100, &[100; 3]), [1, 2, 3]);
        assert_eq!(ends(100, &[60; 7]), [2, 4, 7]);
        assert_eq!(ends(100, &[60; 5]), [2, 5]);
        assert_eq!(ends(100, &[300, 1, 1, 99, 99]), [1, 5]);
        assert_eq!(ends(100, &[usize::MAX, usize::MAX]), [1, 2]);
        assert_eq!(ends(1, &[5, 0, 5, 0]), [1, 4]);
        assert_eq!(ends(2, &[1, 1, 2, 2, 1, 1, 1]), [2, 3, 4, 7]);
    }

    #[test]
    fn what_is_held_for_tasks_does_not_grow_with_their_number() {
        let tasks = Tasks::of(1, std::iter::repeat_n(1, 1 << 20).chain([0; 3]));
        assert_eq!((tasks.len(), tasks.0.len()), (1 << 20, 2));
        assert_eq!(tasks.pieces((1 << 20) - 1), (1 << 20) - 1..(1 << 20) + 3);
    }
}
