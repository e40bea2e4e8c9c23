//! What instruction sets give to code of single registers: it is compiled once more with instructions for bits, and is told
//! which of 64 words are so and so. Must hold no algorithm of a codec.

use crate::codec::word::Word;

/// Words looked at together.
pub(crate) const RUN: usize = 64;

/// Work on the bits of single registers, compiled once more for machines that have instructions for it. `call` and everything
/// hot that it calls must be `#[inline(always)]`.
pub(crate) trait BitTask {
    /// What it gives back.
    type Out;
    /// Run.
    fn call(self, masks: impl Masks) -> Self::Out;
}

/// Comparisons of a run of words: a bit for each.
pub(crate) trait Masks: Copy {
    /// Which words differ.
    #[inline(always)]
    fn differ<W: Word>(self, a: &[W; RUN], b: &[W; RUN]) -> u64 {
        mask(|i| a[i] != b[i])
    }

    /// Which words, of at most four bytes, lie in `low..low + len` but for their highest bit. `len` is not 0.
    #[inline(always)]
    fn within<W: Word>(self, words: &[W; RUN], low: u32, len: u32) -> u64 {
        let sign = 1u32 << (W::BITS - 1);
        mask(|i| (words[i].to_u64() as u32 & (sign - 1)).wrapping_sub(low) < len)
    }
}

/// Run `task` by portable code. Not inlined, so that it is compiled once.
#[inline(never)]
pub(crate) fn plainly<T: BitTask>(task: T) -> T::Out {
    task.call(PlainMasks)
}

/// The portable comparisons.
#[derive(Clone, Copy)]
pub(crate) struct PlainMasks;

impl Masks for PlainMasks {}

/// The bits that `is` says.
#[inline(always)]
fn mask(is: impl Fn(usize) -> bool) -> u64 {
    let flags: [u8; RUN] = std::array::from_fn(|i| u8::from(is(i)));
    let (eights, _) = flags.as_chunks::<8>();
    eights.iter().enumerate().fold(0, |mask, (i, eight)| {
        // Byte j, of 0 or 1, goes to bit 56 + j.
        let byte = u64::from_le_bytes(*eight).wrapping_mul(0x0102_0408_1020_4080) >> 56;
        mask | byte << (8 * i)
    })
}
