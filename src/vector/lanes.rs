//! The bit streams of `exponent` (see `codec::exponent`), 32 words per step: what every fast decoder keeps
//! between steps, the portable decoder, and how a tile's stream is fed to one without ever being read past
//! its end. Equal to the codec's `Decoder` bit for bit, error for error. Must hold no exception, no product
//! and no intrinsic.
//!
//! **Floor.** Bytes: the base word, once, and the word's bits of stream. Operations, for 32 words of 16 bits
//! with AVX2 (`x86_64/lanes.rs`): 2 loads and 2 stores of words; 5 for their classes, 5 to look up widths; 2
//! for who takes a unit; about 18 on pointers and 10 to hand out the units; 10 for masks and halves; 8 to
//! join old bits and unit, 6 for the words; 22 for what is left of the bits and how many. About 90 (and some
//! 20 loads of tables, for want of registers): 23 to 30 cycles at 4 a cycle, 0.25 ns a word at 3.3 GHz,
//! beside 0.17 ns that one core takes to fetch a bf16 word at 12 GB/s. Measured: 0.33 with the other
//! hyperthread quiet, 0.38 with it busy. Lanes of 32 bits: 27 for 8 words, 0.62 measured. Portable: a dozen
//! dependent operations per word and the round trip of a lane through memory, no branch that depends on data:
//! 2.5 to 3.8 measured, where branches took 2 (few change) to 9.

use super::simd::{GROUP, Simd};
use crate::codec::ExponentTile;
use crate::codec::exponent::{CLASSES, STREAM_LANES, mantissa_bits};
use crate::codec::word::Word;
use crate::error::{Error, Result};
use crate::matrix::Dtype;

/// Words of a step, lanes of the encoding.
pub(crate) const STEP: usize = STREAM_LANES;

/// Words that products and restores decode at a time; a multiple of the group and of the encoding's 32 lanes.
pub(crate) const MICRO: usize = 1024;

/// Bytes that a step may take at most, for words of 4 bytes.
const MOST: usize = STEP * 4;

/// What the lanes hold between steps. After a step a lane has fewer bits than a unit: it took the unit
/// because it had fewer than it needed, and what it needed is gone.
#[derive(Clone, Copy)]
pub(crate) struct LaneBits<W> {
    /// The bits, the next one lowest, none above those held.
    pub(crate) bits: [W; STEP],
    /// How many bits are held.
    pub(crate) held: [W; STEP],
}

/// What a step needs to know of tile and dtype.
#[derive(Clone, Copy)]
pub(crate) struct Code<'a> {
    /// Bits by class of the base word, none above the word's.
    pub(crate) widths: &'a [u8; CLASSES],
    /// How far a word is shifted down for its class.
    pub(crate) shift: u32,
}

/// How far a run of steps came.
#[derive(Clone, Copy)]
pub(crate) struct Progress {
    /// Words decoded: all, or whole steps.
    pub(crate) words: usize,
    /// Bytes of stream taken.
    pub(crate) bytes: usize,
}

/// A word whose lanes have fast decoders.
pub(crate) trait Lane: Word {
    /// Decode step after step of `words`, as long as `units` has the bytes that any step may take (`STEP *
    /// BYTES`); the last step may be of fewer words. The base's words are those of `base`, as many bytes as
    /// `words` has, or in `words`.
    fn steps<S: Simd>(
        s: S,
        lanes: &mut LaneBits<Self>,
        code: Code<'_>,
        units: &[u8],
        base: Option<&[u8]>,
        words: &mut [Self],
    ) -> Progress;

    /// [`Simd::decode_dots32`] of f32 words; nothing of others.
    #[inline(always)]
    fn dots<S: Simd, const M: usize>(
        _s: S,
        _lanes: &mut LaneBits<Self>,
        _code: Code<'_>,
        _units: &[u8],
        _base: &[u8],
        _x: [&[[f32; GROUP]]; M],
        _acc: &mut [S::F; M],
    ) -> Progress {
        Progress { words: 0, bytes: 0 }
    }
}

macro_rules! lane {
    ($($word:ty: $in_place:ident, $from:ident $(, $dots:ident)?;)*) => {$(
        impl Lane for $word {
            #[inline(always)]
            fn steps<S: Simd>(
                s: S,
                lanes: &mut LaneBits<$word>,
                code: Code<'_>,
                units: &[u8],
                base: Option<&[u8]>,
                words: &mut [$word],
            ) -> Progress {
                match base {
                    None => s.$in_place(lanes, code, units, words),
                    Some(base) => s.$from(lanes, code, units, base, words),
                }
            }
            $(
                #[inline(always)]
                fn dots<S: Simd, const M: usize>(
                    s: S,
                    lanes: &mut LaneBits<Self>,
                    code: Code<'_>,
                    units: &[u8],
                    base: &[u8],
                    x: [&[[f32; GROUP]]; M],
                    acc: &mut [S::F; M],
                ) -> Progress {
                    s.$dots(lanes, code, units, base, x, acc)
                }
            )?
        }
    )*};
}

lane! {
    u16: lanes16, lanes16_from;
    u32: lanes32, lanes32_from, decode_dots32;
}

/// [`Lane::steps`] for words of at most 4 bytes, on any machine.
pub(crate) fn portable<W: Word>(
    lanes: &mut LaneBits<W>,
    code: Code<'_>,
    units: &[u8],
    words: &mut [W],
) -> Progress {
    let mut done = Progress { words: 0, bytes: 0 };
    for step in words.chunks_mut(STEP) {
        let Some(units) = units.get(done.bytes..done.bytes + STEP * W::BYTES) else { break };
        let mut taken = 0;
        for ((word, bits), held) in step.iter_mut().zip(&mut lanes.bits).zip(&mut lanes.held) {
            let w = u64::from(code.widths[(word.to_u64() >> code.shift & 31) as usize]);
            let have = held.to_u64();
            // All ones where the lane takes a unit. Lanes before this one took at most one each, so the load
            // stays within the step's units, wanted or not.
            let takes = u64::from(have < w).wrapping_neg();
            let unit = W::load(&units[taken..taken + W::BYTES]).to_u64() & takes;
            taken += W::BYTES & takes as usize;
            let lane = bits.to_u64() | unit << have;
            let bound = 1u64 << w;
            *word = word.plus(W::from_u64((lane & (bound - 1)).wrapping_sub(bound >> 1)));
            *bits = W::from_u64(lane >> w);
            *held = W::from_u64(have + (u64::from(W::BITS) & takes) - w);
        }
        done.words += step.len();
        done.bytes += taken;
    }
    done
}

/// Decodes a tile from its start, a run of columns at a time, in step order.
///
/// Runs must begin at a multiple of 32 columns and only a row's last run may end elsewhere.
pub(crate) struct Decoder<'a, W: Lane> {
    code: Code<'a>,
    lanes: LaneBits<W>,
    /// What is left of the stream, as long as that is no less than what a step may take.
    stream: &'a [u8],
    /// What is read after that: the end of the stream, followed by zeros, which a step may read,
    tail: [u8; 2 * MOST],
    /// and how far it is used, and where the zeros begin.
    left: Option<(usize, usize)>,
}

impl<'a, W: Lane> Decoder<'a, W> {
    /// A decoder that stands at the tile's first word.
    pub(crate) fn new(tile: &ExponentTile<'a>, dtype: Dtype) -> Self {
        Self {
            code: Code { widths: tile.widths, shift: mantissa_bits(dtype) },
            lanes: LaneBits { bits: [W::default(); STEP], held: [W::default(); STEP] },
            stream: tile.stream,
            tail: [0; 2 * MOST],
            left: None,
        }
    }

    /// Decode the next `words.len()` columns: base words in, fine-tuned ones out (exceptions apart). The
    /// base's words are those of `base`, as many bytes as `words` has, or in `words`.
    ///
    /// # Errors
    /// `Truncated` where the stream ends early: it is cut, or belongs to another base.
    pub(crate) fn advance<S: Simd>(
        &mut self,
        s: S,
        mut base: Option<&[u8]>,
        mut words: &mut [W],
    ) -> Result<()> {
        if self.left.is_none() {
            let done = W::steps(s, &mut self.lanes, self.code, self.stream, base, words);
            self.stream = &self.stream[done.bytes..];
            words = &mut words[done.words..];
            base = base.map(|base| &base[done.words * W::BYTES..]);
            if words.is_empty() {
                return Ok(());
            }
            self.tail[..self.stream.len()].copy_from_slice(self.stream);
            self.left = Some((0, self.stream.len()));
        }
        let Some((at, end)) = &mut self.left else { return Ok(()) };
        let done = W::steps(s, &mut self.lanes, self.code, &self.tail[*at..], base, words);
        *at += done.bytes;
        // Steps go on in the zeros; but where they stop for want of them, they have taken more than there
        // was.
        if *at > *end || done.words < words.len() {
            return Err(ended());
        }
        Ok(())
    }

    /// Decode the next words of `base` and multiply them at once, as far as [`Lane::dots`] goes. Gives how
    /// many words.
    pub(crate) fn dots<S: Simd, const M: usize>(
        &mut self,
        s: S,
        base: &[u8],
        x: [&[[f32; GROUP]]; M],
        acc: &mut [S::F; M],
    ) -> usize {
        if self.left.is_some() {
            return 0;
        }
        let done = W::dots(s, &mut self.lanes, self.code, self.stream, base, x, acc);
        self.stream = &self.stream[done.bytes..];
        done.words
    }

    /// To be called after the tile's last word: checks that the stream ends there.
    ///
    /// # Errors
    /// `Corrupt` if units are left over.
    pub(crate) fn finish(self) -> Result<()> {
        match self.left.map_or(self.stream.len(), |(at, end)| end.saturating_sub(at)) {
            0 => Ok(()),
            left => Err(unused(left)),
        }
    }
}

#[cold]
pub(crate) fn unused(left: usize) -> Error {
    Error::corrupt(format!(
        "a tile of encoding exponent leaves {left} bytes of its stream unused: corrupt, or of another base"
    ))
}

#[cold]
pub(crate) fn ended() -> Error {
    Error::truncated("a tile of encoding exponent needs more bits than it has: cut, or of another base")
}
