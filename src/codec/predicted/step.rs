//! Words and their differences as symbols and raw bits.

use crate::codec::exponent::mantissa_bits;
use crate::codec::word::Word;
use crate::matrix::Dtype;

/// Octaves of base words.
pub(crate) const OCTAVES: usize = 256;
/// The symbol that says that all bits of the step follow raw. Zero has no sign, so its second symbol is free.
pub(crate) const ESCAPE: usize = 1;
/// Symbols of steps: all there are of words of four bytes.
pub(crate) const STEP_SYMBOLS: usize = 126;
/// Symbols of gaps: all there are in the largest tile.
pub(crate) const GAP_SYMBOLS: usize = 42;

/// Whether words of this dtype can be predicted: those of at most four bytes.
pub fn predictable(dtype: Dtype) -> bool {
    dtype.word_bytes() <= 4
}

const fn sign_of<W: Word>() -> u32 {
    1 << (W::BITS - 1)
}

/// How far a word's exponent field is from its lowest bit, and which of the bits from there on belong to it. Integers are
/// treated as floats of their size.
pub(crate) fn octave_shift<W: Word>(dtype: Dtype) -> u32 {
    mantissa_bits(dtype).min(W::BITS - 1)
}

/// The octave of a base word: its exponent field.
#[inline(always)]
pub(crate) fn octave<W: Word>(word: W, shift: u32) -> usize {
    ((word.to_u64() as u32 & (sign_of::<W>() - 1)) >> shift) as usize & (OCTAVES - 1)
}

/// The step from `base` to `fine_tuned`: how many words further from zero it lies, on the base's side of zero. It wraps:
/// `-2^(BITS-1) <= step < 2^(BITS-1)`.
#[inline(always)]
pub(crate) fn step<W: Word>(base: W, fine_tuned: W) -> i32 {
    let (b, f) = (base.to_u64() as u32, fine_tuned.to_u64() as u32);
    // Mirrored where the base is negative, so that it is not.
    let mirror = b & sign_of::<W>();
    let (b, f) = (b ^ mirror, f ^ mirror);
    let below_zero = f & sign_of::<W>() != 0;
    let place = if below_zero { f ^ (sign_of::<W>() - 1) } else { f };
    (place.wrapping_sub(b) << (32 - W::BITS)) as i32 >> (32 - W::BITS)
}

/// The word that lies `step` words further from zero than `base`.
#[inline(always)]
pub(crate) fn stepped<W: Word>(base: W, step: i32) -> W {
    let b = base.to_u64() as u32;
    let mirror = b & sign_of::<W>();
    let place = (b ^ mirror).wrapping_add(step as u32);
    let below_zero = place & sign_of::<W>() != 0;
    let word = if below_zero { place ^ (sign_of::<W>() - 1) } else { place };
    W::from_u64(u64::from(word ^ mirror))
}

/// A number as a symbol, its two leading bits and their place, and how many raw bits follow, which are its lowest.
#[inline(always)]
pub(crate) fn number(value: u32) -> (usize, u32) {
    let raw = (value | 2).ilog2() - 1;
    (2 * raw as usize + (value >> raw) as usize, raw)
}

/// Raw bits that follow a number's symbol, and the number if they are zero.
#[inline(always)]
pub(crate) fn number_of(symbol: usize) -> (u32, u32) {
    if symbol < 2 {
        return (0, symbol as u32);
    }
    let raw = (symbol as u32 >> 1) - 1;
    (raw, (2 | symbol as u32 & 1) << raw)
}

/// A step as a symbol and its raw bits' number; the raw bits are the lowest of its magnitude.
#[inline(always)]
pub(crate) fn step_symbol(step: i32) -> (usize, u32) {
    let (symbol, raw) = number(step.unsigned_abs());
    (2 * symbol + usize::from(step < 0), raw)
}

/// Raw bits that follow a step's symbol.
pub(crate) fn step_raw_bits<W: Word>(symbol: usize) -> u32 {
    if symbol == ESCAPE { W::BITS } else { number_of(symbol / 2).0 }
}

/// The step of a symbol and its raw bits.
#[inline(always)]
pub(crate) fn step_of<W: Word>(symbol: usize, raw: u32) -> i32 {
    if symbol == ESCAPE {
        return (raw << (32 - W::BITS)) as i32 >> (32 - W::BITS);
    }
    let magnitude = number_of(symbol / 2).1 | raw;
    if symbol & 1 == 1 { magnitude.wrapping_neg() as i32 } else { magnitude as i32 }
}

/// How many symbols the steps of a word have.
pub(crate) const fn step_symbols<W: Word>() -> usize {
    4 * (W::BITS as usize - 1) + 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_of_words_has_a_step_and_every_step_a_symbol() {
        let all = |w: u16| {
            let d = step(0x3F80u16 ^ w, w);
            assert_eq!(stepped(0x3F80u16 ^ w, d), w);
        };
        (0..=u16::MAX).for_each(all);
        for base in [0u16, 0x8000, 1, 0x8001, 0x7F80, 0xFF80, 0x7FFF, 0xFFFF, 0x3F80, 0xBF80] {
            for w in 0..=u16::MAX {
                let d = step(base, w);
                assert_eq!(stepped(base, d), w, "{base:04x} {w:04x}");
                let (symbol, raw) = step_symbol(d);
                assert!(symbol < step_symbols::<u16>() && raw == step_raw_bits::<u16>(symbol));
                assert_eq!(step_of::<u16>(symbol, d.unsigned_abs() & ((1 << raw) - 1)), d);
                assert_eq!(step_of::<u16>(ESCAPE, d as u32 & 0xFFFF), d);
                assert!(symbol != ESCAPE && (d == 0) == (base == w));
            }
        }
        for (base, w) in [(0u32, u32::MAX), (0x8000_0000, 0x7FFF_FFFF), (0, 0x8000_0000), (u32::MAX, 0)] {
            let d = step(base, w);
            assert_eq!(stepped(base, d), w);
            let (symbol, raw) = step_symbol(d);
            assert!(symbol < step_symbols::<u32>() && raw == step_raw_bits::<u32>(symbol));
            assert_eq!(step_of::<u32>(symbol, d.unsigned_abs() & ((1 << raw) - 1)), d);
        }
        for base in 0..=u8::MAX {
            (0..=u8::MAX).for_each(|w| assert_eq!(stepped(base, step(base, w)), w));
        }
    }

    #[test]
    fn a_step_away_from_zero_is_positive_on_both_sides() {
        assert_eq!((step(0x3F80u16, 0x3F81u16), step(0xBF80u16, 0xBF81u16)), (1, 1));
        assert_eq!((step(0x3F80u16, 0x3F7Fu16), step(0u16, 0x8000u16), step(0x8000u16, 0u16)), (-1, -1, -1));
    }
}
