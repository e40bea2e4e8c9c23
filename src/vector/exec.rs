//! How ops run their tasks: the caller's threads, through one callback. This crate starts no thread for an op.

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

/// Run fallible tasks; of several errors the one of the lowest task is given back.
pub(crate) fn try_run(
    exec: &dyn Executor,
    tasks: usize,
    task: impl Fn(usize) -> Result<()> + Sync,
) -> Result<()> {
    let first: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    exec.run(tasks, &|i| {
        if let Err(e) = task(i) {
            let mut first = first.lock().unwrap_or_else(|p| p.into_inner());
            if first.as_ref().is_none_or(|(at, _)| i < *at) {
                *first = Some((i, e));
            }
        }
    })?;
    match first.into_inner().unwrap_or_else(|p| p.into_inner()) {
        Some((_, e)) => Err(e),
        None => Ok(()),
    }
}
