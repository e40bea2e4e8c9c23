//! The doors: everything that leaves this crate for C or C++, and nothing that computes.
//!
//! [`capi`] is the plain C ABI (`csrc/xorz.h`) and `bridge` the typed door of our own shim. Each makes its
//! callers' arguments into those of the ops below, and guards each of its functions once: no panic passes a
//! door. No pointer is kept after a call returns, and neither torch nor Python is known.

use crate::error::{Error, Result};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

#[cfg(feature = "bridge")]
mod bridge;
pub mod capi;

/// Run `f`; a panic becomes an error of kind `Internal`.
///
/// # Errors
/// Those of `f`, and `Internal` for a panic.
pub fn guard<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| Err(panic_error(panic.as_ref())))
}

fn panic_error(panic: &(dyn Any + Send)) -> Error {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    Error::internal(format!("xorz has a defect, please report it (panic: {text})"))
}

/// Tasks handed to a foreign executor: whatever it does, each runs at most once, and no panic leaves a
/// worker.
pub struct Task<'a> {
    run: &'a (dyn Fn(usize) + Sync),
    started: Vec<AtomicBool>,
    done: AtomicUsize,
    failure: Mutex<Option<Error>>,
}

impl<'a> Task<'a> {
    /// `tasks` calls of `run`, to be made by somebody else.
    pub fn new(tasks: usize, run: &'a (dyn Fn(usize) + Sync)) -> Self {
        let started = (0..tasks).map(|_| AtomicBool::new(false)).collect();
        Self { run, started, done: AtomicUsize::new(0), failure: Mutex::new(None) }
    }

    /// Run task `index`, unless it is out of range or was started before. Never panics.
    pub fn call(&self, index: usize) {
        if self.started.get(index).is_none_or(|s| s.swap(true, Ordering::Relaxed)) {
            return;
        }
        match catch_unwind(AssertUnwindSafe(|| (self.run)(index))) {
            Ok(()) => {
                self.done.fetch_add(1, Ordering::Release);
            }
            Err(panic) => {
                let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
                failure.get_or_insert_with(|| panic_error(panic.as_ref()));
            }
        }
    }

    /// The outcome, once the executor has returned.
    ///
    /// # Errors
    /// `Internal` if a task panicked or was never run.
    pub fn finish(self) -> Result<()> {
        if let Some(e) = self.failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(e);
        }
        let (done, all) = (self.done.load(Ordering::Acquire), self.started.len());
        if done == all {
            Ok(())
        } else {
            Err(Error::internal(format!("the executor ran {done} of {all} tasks")))
        }
    }
}
