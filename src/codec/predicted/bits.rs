//! Bit streams that are written from their end and read from their start, lowest bit first.
//!
//! A stream begins with zero bits up to a one, so that it can begin anywhere in its first byte.

use crate::error::{Error, Result};

/// Writes a stream backwards: what is written last is read first.
#[derive(Default)]
pub(crate) struct BitsBackwards {
    /// The bytes so far, last one first.
    reversed: Vec<u8>,
    held: u64,
    count: u32,
}

impl BitsBackwards {
    /// Put the `bits` (0 ..= 32) low bits of `value`, whose other bits are zero, before all others.
    #[inline(always)]
    pub(crate) fn put(&mut self, value: u32, bits: u32) {
        self.held = self.held << bits | u64::from(value);
        self.count += bits;
        if self.count >= 32 {
            self.count -= 32;
            let full = (self.held >> self.count) as u32;
            self.reversed.extend_from_slice(&full.to_be_bytes());
        }
    }

    /// Append the stream to `out`.
    pub(crate) fn finish(mut self, out: &mut Vec<u8>) {
        self.put(1, 1);
        // What is held goes to the end of the first bytes, so that their first bits are zero.
        let bytes = self.count.div_ceil(8);
        let first = if self.count == 0 { 0 } else { self.held << (64 - self.count) };
        self.reversed.extend_from_slice(&first.to_be_bytes()[..bytes as usize]);
        out.extend(self.reversed.iter().rev());
    }
}

/// Reads a stream forwards. Beyond its end there are zeros; [`BitReader::finish`] tells.
#[derive(Clone, Copy)]
pub(crate) struct BitReader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> BitReader<'a> {
    /// At the first bit behind the mark.
    pub(crate) fn new(bytes: &'a [u8]) -> Result<Self> {
        let first = bytes.first().ok_or_else(|| Error::truncated("a predicted tile without a stream"))?;
        if *first == 0 {
            return Err(Error::corrupt("a predicted tile whose stream begins with a byte of zeros"));
        }
        Ok(Self { bytes, at: first.trailing_zeros() as usize + 1 })
    }

    /// Which bit comes next.
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    /// Go on at bit `at`.
    pub(crate) fn go_to(&mut self, at: usize) {
        self.at = at;
    }

    /// The next bits, at least 57 of them, lowest first.
    #[inline(always)]
    pub(crate) fn peek(&self) -> u64 {
        let from = self.at >> 3;
        let bytes = match self.bytes.get(from..from + 8) {
            Some(&[a, b, c, d, e, f, g, h]) => u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            _ => self.last(from),
        };
        bytes >> (self.at & 7)
    }

    #[cold]
    fn last(&self, from: usize) -> u64 {
        let rest = self.bytes.get(from..).unwrap_or(&[]);
        rest.iter().take(8).rev().fold(0, |a, &b| a << 8 | u64::from(b))
    }

    /// Go on by `bits`.
    #[inline(always)]
    pub(crate) fn skip(&mut self, bits: u32) {
        self.at += bits as usize;
    }

    /// The next `bits` (0 ..= 32) bits.
    #[inline(always)]
    pub(crate) fn take(&mut self, bits: u32) -> u32 {
        let value = (self.peek() & ((1 << bits) - 1)) as u32;
        self.skip(bits);
        value
    }

    /// Whether more bits were taken than there are.
    pub(crate) fn is_beyond(&self) -> bool {
        self.at > 8 * self.bytes.len()
    }

    /// To be called at the end: all bits were taken, and no more.
    pub(crate) fn finish(&self) -> Result<()> {
        match 8 * self.bytes.len() {
            bits if self.at < bits => Err(Error::corrupt(format!(
                "a predicted tile leaves {} bits of its stream unused: corrupt, or of another base",
                bits - self.at
            ))),
            bits if self.at > bits => {
                Err(Error::truncated("a predicted tile needs more bits than it has: cut, or of another base"))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_come_back_in_the_other_order() {
        for count in 0..200u32 {
            let list: Vec<(u32, u32)> = (0..count)
                .map(|i| (i * 7 % 33, i.wrapping_mul(2_654_435_761)))
                .map(|(n, v)| (v & ((1u64 << n) - 1) as u32, n))
                .collect();
            let (mut w, mut bytes) = (BitsBackwards::default(), vec![]);
            list.iter().rev().for_each(|(v, n)| w.put(*v, *n));
            w.finish(&mut bytes);
            let mut r = BitReader::new(&bytes).unwrap();
            list.iter().for_each(|(v, n)| assert_eq!(r.take(*n), *v));
            r.finish().unwrap();
            r.skip(1);
            assert!(r.finish().is_err() && r.is_beyond());
        }
        assert!(BitReader::new(&[]).is_err() && BitReader::new(&[0, 1]).is_err());
    }
}
