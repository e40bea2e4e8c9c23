//! Scratch memory: per thread, reused, bounded. No op takes more than [`LIMIT`] bytes per thread, whatever m,
//! n and k: every buffer's size follows from a tile (at most 65536 words, 4096 columns) and a block of rows
//! of x.

use super::counters;
use std::cell::RefCell;

/// What one thread may hold, in bytes.
pub(crate) const LIMIT: usize = 2 << 20;

/// The buffers of one thread.
#[derive(Default)]
pub(crate) struct Scratch {
    /// x in split order, per row of x.
    pub(crate) split: Buffer<f32>,
    /// x for entries: rows in natural order, or transposed.
    pub(crate) entries: Buffer<f32>,
    /// Sums of a chunk.
    pub(crate) sums: Buffer<f32>,
    /// Vectors of sums, or a panel of restored weights.
    pub(crate) vectors: Buffer<f32>,
    /// Words of a tile (u64 for their alignment).
    pub(crate) words: Buffer<u64>,
    /// Sums of the decode path.
    pub(crate) sums_f64: Buffer<f64>,
    /// Which part of x `split` holds: number of the call, first place, first and last column.
    pub(crate) split_holds: Option<(u64, usize, usize, usize)>,
    /// Which part of x `entries` holds.
    pub(crate) entries_hold: Option<(u64, usize, usize, usize)>,
}

/// One buffer, which grows to what was asked most.
#[derive(Default)]
pub(crate) struct Buffer<T>(Vec<T>);

impl<T: Copy + Default> Buffer<T> {
    /// `len` values, unspecified ones.
    pub(crate) fn get(&mut self, len: usize) -> &mut [T] {
        if self.0.len() < len {
            // Not `resize`: it may take twice as much, and would copy.
            self.0 = Vec::new();
            self.0 = vec![T::default(); len];
        }
        &mut self.0[..len]
    }

    /// `len` zeros.
    pub(crate) fn zeroed(&mut self, len: usize) -> &mut [T] {
        let values = self.get(len);
        values.fill(T::default());
        values
    }

    /// All that it holds, at least what was last asked.
    pub(crate) fn all(&self) -> &[T] {
        &self.0
    }

    /// All that it holds, at least what was last asked.
    pub(crate) fn all_mut(&mut self) -> &mut [T] {
        &mut self.0
    }

    fn bytes(&self) -> usize {
        self.0.capacity() * size_of::<T>()
    }
}

impl Buffer<u64> {
    /// `len` bytes, unspecified ones, aligned to any word.
    pub(crate) fn bytes_mut(&mut self, len: usize) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(self.get(len.div_ceil(8)))[..len]
    }
}

impl Scratch {
    fn bytes(&self) -> usize {
        self.split.bytes()
            + self.entries.bytes()
            + self.sums.bytes()
            + self.vectors.bytes()
            + self.words.bytes()
            + self.sums_f64.bytes()
    }
}

/// Run `f` with this thread's scratch.
pub(crate) fn with<T>(f: impl FnOnce(&mut Scratch) -> T) -> T {
    thread_local! {
        static SCRATCH: RefCell<Scratch> = RefCell::default();
    }
    SCRATCH.with(|cell| match cell.try_borrow_mut() {
        Ok(mut scratch) => {
            let out = f(&mut scratch);
            let bytes = scratch.bytes();
            debug_assert!(bytes <= LIMIT, "{bytes} bytes of scratch");
            counters::note_scratch(bytes);
            out
        }
        // An executor that runs a task inside a task: give it buffers of its own.
        Err(_) => f(&mut Scratch::default()),
    })
}
