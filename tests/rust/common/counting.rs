//! The system's allocator, counting for each thread what it holds and asks for, so that other tests of the
//! same process change no count. What is measured must run on the thread that measures: [`held_by`] says what
//! it did there.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// What one thread asked of the allocator.
#[derive(Clone, Copy)]
struct Counts {
    /// Bytes held; what another thread gave it to free makes this less than it truly is.
    held: isize,
    most_held: isize,
    largest: usize,
}

thread_local! {
    static COUNTS: Cell<Counts> = const { Cell::new(Counts { held: 0, most_held: 0, largest: 0 }) };
}

struct Counting;

fn note(layout: Layout, sign: isize) {
    // A thread that ends frees after its counts are gone.
    let _ = COUNTS.try_with(|counts| {
        let mut c = counts.get();
        c.held += sign * layout.size() as isize;
        c.most_held = c.most_held.max(c.held);
        if sign > 0 {
            c.largest = c.largest.max(layout.size());
        }
        counts.set(c);
    });
}

// SAFETY: every call is passed on to the system's allocator unchanged; counting allocates nothing, since the
// counts are a constant at first and need no destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout, 1);
        // SAFETY: the caller's own promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        note(layout, -1);
        // SAFETY: the caller's own promise, passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What a measured piece of work asked of the allocator, in bytes.
pub struct Held {
    /// The most that it held at once, beyond what was held before.
    pub most: usize,
    /// The largest single request.
    pub largest: usize,
    /// What it held when it was done, beyond what was held before: less than 0 where it freed what others had made.
    pub left: isize,
}

/// Do `work` on this thread.
pub fn held_by<T>(work: impl FnOnce() -> T) -> (T, Held) {
    let before = COUNTS.with(|counts| {
        let c = counts.get();
        counts.set(Counts { most_held: c.held, largest: 0, ..c });
        c.held
    });
    let result = work();
    let after = COUNTS.with(Cell::get);
    let most = (after.most_held - before).max(0) as usize;
    (result, Held { most, largest: after.largest, left: after.held - before })
}
