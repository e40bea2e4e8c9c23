//! Whose turn it is, among threads that make things in any order and hand them over in one.
//!
//! Who has to wait looks for a while before going to sleep. What is made of a tensor of a few words takes microseconds, as
//! long as waking a thread: a million of them took two threads two to four times as long as one when each wait was a sleep
//! (`cargo bench --bench tensors`).

use crate::error::Error;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// How often a thread looks before it goes to sleep: 10 to 40 microseconds, by what a processor takes for a pause.
const LOOKS: usize = 1000;

pub(super) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The turns of some lanes, each of which goes from one to the next.
pub(super) struct Turns {
    /// How many turns of each lane are over.
    over: Vec<AtomicUsize>,
    stop: AtomicBool,
    /// Threads that sleep, or are about to.
    asleep: AtomicUsize,
    error: Mutex<Option<Error>>,
    ready: Condvar,
}

/// Stops all other threads if the one that holds it panics.
pub(super) struct StopOnPanic<'a>(pub(super) &'a Turns);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop.store(true, Ordering::SeqCst);
            self.0.wake();
        }
    }
}

impl Turns {
    pub(super) fn of(lanes: usize) -> Self {
        Self {
            over: (0..lanes).map(|_| AtomicUsize::new(0)).collect(),
            stop: AtomicBool::new(false),
            asleep: AtomicUsize::new(0),
            error: Mutex::new(None),
            ready: Condvar::new(),
        }
    }

    pub(super) fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn come(&self, lane: usize, turn: usize) -> bool {
        self.over[lane].load(Ordering::SeqCst) == turn || self.stopped()
    }

    /// Wait until `turn` of `lane` has come. Whether it has: all may have been stopped in place of that.
    pub(super) fn wait(&self, lane: usize, turn: usize) -> bool {
        for _ in 0..LOOKS {
            if self.come(lane, turn) {
                return !self.stopped();
            }
            std::hint::spin_loop();
        }
        // Who ends a turn looks for sleepers after that, and this one looks for its turn after it counts as one: in the one
        // order of all these accesses, one of the two sees the other.
        let held = lock(&self.error);
        self.asleep.fetch_add(1, Ordering::SeqCst);
        let held = self.ready.wait_while(held, |_| !self.come(lane, turn));
        self.asleep.fetch_sub(1, Ordering::SeqCst);
        drop(held.unwrap_or_else(PoisonError::into_inner));
        !self.stopped()
    }

    /// The turn of `lane` that has come is over.
    pub(super) fn next(&self, lane: usize) {
        self.over[lane].fetch_add(1, Ordering::SeqCst);
        self.wake();
    }

    /// Stop all threads. Of several errors the first is kept.
    pub(super) fn fail(&self, error: Error) {
        let mut held = lock(&self.error);
        *held = held.take().or(Some(error));
        self.stop.store(true, Ordering::SeqCst);
        drop(held);
        self.wake();
    }

    fn wake(&self) {
        if self.asleep.load(Ordering::SeqCst) > 0 {
            // Taken so that nobody is between looking and sleeping.
            drop(lock(&self.error));
            self.ready.notify_all();
        }
    }

    /// How it ended.
    pub(super) fn ended(&self) -> Result<(), Error> {
        lock(&self.error).take().map_or(Ok(()), Err)
    }
}
