//! What fast encoders need of an instruction set, and the type of those that have nothing to give. Must hold
//! no algorithm: `exponent`, `sparse` and `count` beside this file do.

use crate::codec::word::Word;
use crate::vector::lanes::{Code, STEP};

/// What the lanes of a tile hold while its words are packed from the last to the first.
#[derive(Clone, Copy)]
pub(crate) struct OpenUnit<W> {
    /// The unit that is being filled from above: its bits so far, in place.
    pub(crate) bits: [W; STEP],
    /// How many bits of it still lie below: where the word that was packed last begins. 0 to `BITS - 1`.
    pub(crate) below: [W; STEP],
}

/// What packing one row gave.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Packed {
    /// Bytes of units, which end where the given buffer ends.
    pub(crate) bytes: usize,
    /// Words that differ.
    pub(crate) changed: u64,
    /// Whether the buffer was too small: nothing of this is right then.
    pub(crate) cut: bool,
}

/// Bytes that a buffer must have below the units that are still to come, since units are written in whole
/// vectors.
pub(crate) const SLACK: usize = 5 * STEP;

/// An instruction set with fast encoders. Rows are packed words of any alignment, base and fine_tuned of one
/// length.
pub(crate) trait Packer: Copy + Send + Sync + 'static {
    /// Add to each lane the bits that the words of a row take.
    fn sums16(self, code: Code<'_>, base: &[u8], sums: &mut [u16; STEP]);
    /// The same for 32-bit words.
    fn sums32(self, code: Code<'_>, base: &[u8], sums: &mut [u32; STEP]);

    /// Pack a row's words from the last to the first: units end up in their order, below what was packed
    /// before. `misfits` takes the columns of words whose difference does not fit, descending; their bits say
    /// that they are unchanged.
    fn pack16(
        self,
        lanes: &mut OpenUnit<u16>,
        code: Code<'_>,
        base: &[u8],
        fine_tuned: &[u8],
        out: &mut [u8],
        misfits: &mut Vec<u16>,
    ) -> Packed;
    /// The same for 32-bit words.
    fn pack32(
        self,
        lanes: &mut OpenUnit<u32>,
        code: Code<'_>,
        base: &[u8],
        fine_tuned: &[u8],
        out: &mut [u8],
        misfits: &mut Vec<u16>,
    ) -> Packed;

    /// Append, for each 32 words of a row of 16-bit words, which of them differ: bit `i` for word `i`.
    fn differ16(self, base: &[u8], fine_tuned: &[u8], masks: &mut Vec<u32>);
    /// The same for 32-bit words.
    fn differ32(self, base: &[u8], fine_tuned: &[u8], masks: &mut Vec<u32>);
}

/// The packer of instances without one: there is no value of it.
#[derive(Clone, Copy)]
pub(crate) enum Never {}

impl Packer for Never {
    fn sums16(self, _: Code<'_>, _: &[u8], _: &mut [u16; STEP]) {
        match self {}
    }
    fn sums32(self, _: Code<'_>, _: &[u8], _: &mut [u32; STEP]) {
        match self {}
    }
    fn pack16(
        self,
        _: &mut OpenUnit<u16>,
        _: Code<'_>,
        _: &[u8],
        _: &[u8],
        _: &mut [u8],
        _: &mut Vec<u16>,
    ) -> Packed {
        match self {}
    }
    fn pack32(
        self,
        _: &mut OpenUnit<u32>,
        _: Code<'_>,
        _: &[u8],
        _: &[u8],
        _: &mut [u8],
        _: &mut Vec<u16>,
    ) -> Packed {
        match self {}
    }
    fn differ16(self, _: &[u8], _: &[u8], _: &mut Vec<u32>) {
        match self {}
    }
    fn differ32(self, _: &[u8], _: &[u8], _: &mut Vec<u32>) {
        match self {}
    }
}

/// A word that packers take.
pub(crate) trait Lanes: Word {
    /// [`Packer::sums16`] of its size.
    fn sums<P: Packer>(p: P, code: Code<'_>, base: &[u8], sums: &mut [Self; STEP]);
    /// [`Packer::pack16`] of its size.
    fn pack<P: Packer>(
        p: P,
        lanes: &mut OpenUnit<Self>,
        code: Code<'_>,
        row: (&[u8], &[u8]),
        out: &mut [u8],
        misfits: &mut Vec<u16>,
    ) -> Packed;
    /// [`Packer::differ16`] of its size.
    fn differ<P: Packer>(p: P, base: &[u8], fine_tuned: &[u8], masks: &mut Vec<u32>);
}

macro_rules! lanes {
    ($($word:ty: $sums:ident, $pack:ident, $differ:ident;)*) => {$(
        impl Lanes for $word {
            fn sums<P: Packer>(p: P, code: Code<'_>, base: &[u8], sums: &mut [Self; STEP]) {
                p.$sums(code, base, sums);
            }
            fn pack<P: Packer>(
                p: P,
                lanes: &mut OpenUnit<Self>,
                code: Code<'_>,
                row: (&[u8], &[u8]),
                out: &mut [u8],
                misfits: &mut Vec<u16>,
            ) -> Packed {
                p.$pack(lanes, code, row.0, row.1, out, misfits)
            }
            fn differ<P: Packer>(p: P, base: &[u8], fine_tuned: &[u8], masks: &mut Vec<u32>) {
                p.$differ(base, fine_tuned, masks);
            }
        }
    )*};
}

lanes! {
    u16: sums16, pack16, differ16;
    u32: sums32, pack32, differ32;
}
