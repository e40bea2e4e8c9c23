//! Counts that prove promises: how many panels were restored, how much scratch a thread took. Process-wide;
//! tests and the front ends read them, no op does.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

static PANELS_RESTORED: AtomicU64 = AtomicU64::new(0);
static SCRATCH_PEAK_BYTES: AtomicU64 = AtomicU64::new(0);

/// Panels of fine-tuned weights that products have restored into scratch since the last [`reset`]. Products
/// of at most 16 rows, and `mode = "deterministic"`, restore none while their results are finite.
pub fn panels_restored() -> u64 {
    PANELS_RESTORED.load(Relaxed)
}

/// The most scratch, in bytes, that one thread has held for ops since the last [`reset`].
pub fn scratch_peak_bytes() -> u64 {
    SCRATCH_PEAK_BYTES.load(Relaxed)
}

/// Set every counter to zero.
pub fn reset() {
    PANELS_RESTORED.store(0, Relaxed);
    SCRATCH_PEAK_BYTES.store(0, Relaxed);
}

/// Count a panel that was restored outside of this crate, with its `bytes` of scratch: mode "exact"
/// multiplies with the front end's own product.
pub fn note_foreign_panel(bytes: usize) {
    count_panel();
    note_scratch(bytes);
}

pub(crate) fn count_panel() {
    PANELS_RESTORED.fetch_add(1, Relaxed);
}

pub(crate) fn note_scratch(bytes: usize) {
    SCRATCH_PEAK_BYTES.fetch_max(bytes as u64, Relaxed);
}
