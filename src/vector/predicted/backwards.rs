//! A stream written from its last symbol to its first, in which order tabled numeral systems are encoded. The same bits as
//! `codec::predicted::bits` writes.

use crate::codec::predicted::{LANES, unknown};
use crate::error::Result;

/// A stream in the making, from its last symbol to its first.
pub(super) struct Backwards {
    /// What is written ends at the buffer's end.
    pub(super) bytes: Vec<u8>,
    pub(super) at: BackwardsAt,
    pub(super) lanes: [u32; LANES],
    /// Symbols that are still to come.
    pub(super) left: usize,
}

/// Where a stream is written.
#[derive(Clone, Copy)]
pub(super) struct BackwardsAt {
    /// Where what is written begins.
    from: usize,
    /// Bits that are not written yet: the lowest `count`. What is above them was written.
    held: u64,
    count: u32,
    /// Whether every symbol was one that its predictor knows.
    pub(super) known: bool,
}

impl BackwardsAt {
    /// Put bits before all others: together with those put since the last [`BackwardsAt::flush`] at most 57.
    #[inline(always)]
    pub(super) fn put(&mut self, value: u64, bits: u32) {
        self.held = self.held << bits | value;
        self.count += bits;
    }

    /// Write what is held, but for less than a byte.
    #[inline(always)]
    pub(super) fn flush(&mut self, bytes: &mut [u8]) {
        let top = (self.held << 1) << (63 - self.count);
        bytes[self.from - 8..self.from].copy_from_slice(&top.to_le_bytes());
        self.from -= (self.count >> 3) as usize;
        self.count &= 7;
    }
}

impl Backwards {
    /// For `left` symbols by tables of `size` states.
    pub(super) fn new(size: u32, left: usize) -> Self {
        let bytes = vec![0; 4096];
        let at = BackwardsAt { from: bytes.len(), held: 0, count: 0, known: true };
        Self { bytes, at, lanes: [size; LANES], left }
    }

    /// Make room for so many more symbols, of at most 7 bytes each.
    #[inline(always)]
    pub(super) fn reserve(&mut self, symbols: usize) {
        if self.at.from < 7 * symbols + 16 {
            self.grow(7 * symbols + 16);
        }
    }

    #[cold]
    fn grow(&mut self, least: usize) {
        let (old, from) = (self.bytes.len(), self.at.from);
        let more = old.max(least);
        self.bytes.resize(old + more, 0);
        self.bytes.copy_within(from..old, from + more);
        self.at.from += more;
    }

    /// Append the whole stream to `out`: the lanes' first states, and the mark.
    pub(super) fn finish(mut self, log: u32, out: &mut Vec<u8>) -> Result<()> {
        if !self.at.known || self.left != 0 {
            return Err(unknown());
        }
        self.reserve(LANES + 1);
        for lane in self.lanes.into_iter().rev() {
            self.at.put(u64::from(lane - (1 << log)), log);
            self.at.flush(&mut self.bytes);
        }
        self.at.put(1, 1);
        let partial = usize::from(self.at.count & 7 != 0);
        self.at.flush(&mut self.bytes);
        out.extend_from_slice(&self.bytes[self.at.from - partial..]);
        Ok(())
    }
}
