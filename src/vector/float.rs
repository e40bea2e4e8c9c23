//! The three dtypes that linear layers compute on, as kernels see them: how words become lanes and results
//! become words. Must hold no algorithm.

use super::lanes::Lane;
use super::simd::{GROUP, Simd};
use crate::codec::word::Word;
use crate::error::{Error, Result};
use crate::matrix::Dtype;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering::Relaxed};
use zerocopy::{FromBytes, IntoBytes, KnownLayout};

/// A computing dtype.
pub(crate) trait Float: Copy + Send + Sync + 'static {
    /// Its words.
    type Word: Lane;
    /// The bytes of [`GROUP`] words.
    type Group: Copy + AsRef<[u8]> + AsMut<[u8]>;
    /// A word that threads may write side by side.
    type Shared: FromBytes + IntoBytes + KnownLayout + Send + Sync;
    /// Bytes of a word.
    const BYTES: usize = <Self::Word as Word>::BYTES;
    /// The dtype.
    const DTYPE: Dtype;

    /// A group of zeros.
    fn zeros() -> Self::Group;
    /// The whole groups of a run of words, and what is left.
    fn groups(words: &[u8]) -> (&[Self::Group], &[u8]);
    /// A group as two vectors: the *split* order of the dtype (bf16: even words, odd words; else: first half,
    /// second).
    fn load<S: Simd>(s: S, group: &Self::Group) -> (S::F, S::F);
    /// Where in the split order of its group a word's value lies; `i < GROUP`.
    fn split_place(i: usize) -> usize;
    /// Sixteen words at `words[0]`, in order; `words` holds at least as many.
    fn widen<S: Simd>(s: S, words: &[u8]) -> S::F;
    /// The value of a word.
    fn value(word: Self::Word) -> f32;
    /// Round to nearest, ties to even.
    fn round(value: f32) -> Self::Word;
    /// [`Float::round`] of a finite value, without a branch where there is a way.
    fn round_finite(value: f32) -> Self::Word;
    /// The word of a value that the dtype holds exactly; the oracle's choice of others
    /// (`codec::split::narrow`).
    fn narrow(value: f32) -> Self::Word;
    /// Write a word.
    fn put(to: &Self::Shared, word: Self::Word);

    /// The value of the word at index `i` of a run.
    #[inline(always)]
    fn value_at(words: &[u8], i: usize) -> f32 {
        Self::value(Self::Word::load(&words[i * Self::BYTES..(i + 1) * Self::BYTES]))
    }

    /// Round an f64 once.
    fn round_f64(value: f64) -> Self::Word {
        let nearest = value as f32;
        Self::round(if Self::BYTES == 4 { nearest } else { to_odd(value, nearest) })
    }

    /// See `out` as words that threads may write side by side.
    fn share<'a>(out: &'a mut [u8], name: &str) -> Result<&'a [Self::Shared]> {
        let at = out.as_ptr().addr();
        match <[Self::Shared]>::mut_from_bytes(out) {
            Ok(shared) => Ok(shared),
            Err(_) => Err(Error::invalid(format!(
                "{name} at address {at:#x} is not aligned to the {} bytes of {}",
                Self::BYTES,
                Self::DTYPE
            ))),
        }
    }
}

/// f64 to f32 (`near` is the nearest), rounded to odd: rounding the result again, to a dtype of at most 22
/// bits, equals rounding once.
fn to_odd(value: f64, near: f32) -> f32 {
    if !near.is_finite() || f64::from(near) == value {
        return near;
    }
    // Of the two f32 around the value, the one whose last bit is set.
    let bits = near.to_bits();
    if bits & 1 == 1 {
        return near;
    }
    let away = f64::from(near).abs() < value.abs();
    f32::from_bits(if away { bits + 1 } else { bits - 1 })
}

macro_rules! floats {
    ($($name:ident: $word:ty, $shared:ty, $group:literal, $sixteen:literal, $load:ident, $widen:ident, $place:expr,
       $value:expr, $round:expr, $finite:expr, $narrow:expr;)*) => {$(
        /// The dtype of this name.
        #[derive(Clone, Copy)]
        pub(crate) struct $name;

        impl Float for $name {
            type Word = $word;
            type Group = [u8; $group];
            type Shared = $shared;
            const DTYPE: Dtype = Dtype::$name;

            #[inline(always)]
            fn zeros() -> Self::Group {
                [0; $group]
            }
            #[inline(always)]
            fn groups(words: &[u8]) -> (&[Self::Group], &[u8]) {
                words.as_chunks()
            }
            #[inline(always)]
            fn load<S: Simd>(s: S, group: &Self::Group) -> (S::F, S::F) {
                s.$load(group)
            }
            #[inline(always)]
            fn split_place(i: usize) -> usize {
                $place(i)
            }
            #[inline(always)]
            fn widen<S: Simd>(s: S, words: &[u8]) -> S::F {
                match words.first_chunk::<$sixteen>() {
                    Some(words) => s.$widen(words),
                    None => s.splat(f32::NAN),
                }
            }
            #[inline(always)]
            fn value(word: $word) -> f32 {
                $value(word)
            }
            #[inline(always)]
            fn round(value: f32) -> $word {
                $round(value)
            }
            #[inline(always)]
            fn round_finite(value: f32) -> $word {
                $finite(value)
            }
            #[inline(always)]
            fn narrow(value: f32) -> $word {
                $narrow(value)
            }
            #[inline(always)]
            fn put(to: &$shared, word: $word) {
                to.store(word, Relaxed);
            }
        }
    )*};
}

floats! {
    BF16: u16, AtomicU16, 64, 32, load_bf16, widen_bf16, |i: usize| i / 2 + i % 2 * (GROUP / 2),
        |w: u16| f32::from_bits(u32::from(w) << 16), |v: f32| half::bf16::from_f32(v).to_bits(),
        |v: f32| (v.to_bits().wrapping_add(0x7FFF + (v.to_bits() >> 16 & 1)) >> 16) as u16,
        |v: f32| (v.to_bits() >> 16) as u16;
    F16: u16, AtomicU16, 64, 32, load_f16, widen_f16, |i: usize| i,
        |w: u16| half::f16::from_bits(w).to_f32(), |v: f32| half::f16::from_f32(v).to_bits(),
        |v: f32| half::f16::from_f32(v).to_bits(), |v: f32| half::f16::from_f32(v).to_bits();
    F32: u32, AtomicU32, 128, 64, load_f32, widen_f32, |i: usize| i,
        f32::from_bits, f32::to_bits, f32::to_bits, f32::to_bits;
}

/// Words padded to whole groups.
#[inline(always)]
pub(crate) fn padded(words: usize) -> usize {
    words.next_multiple_of(GROUP)
}

/// Run `$body` with `$d` bound to the computing dtype `$dtype`; other dtypes are refused.
macro_rules! with_float {
    ($dtype:expr, $d:ident => $body:expr) => {
        match $dtype {
            crate::matrix::Dtype::BF16 => {
                type $d = crate::vector::float::BF16;
                $body
            }
            crate::matrix::Dtype::F16 => {
                type $d = crate::vector::float::F16;
                $body
            }
            crate::matrix::Dtype::F32 => {
                type $d = crate::vector::float::F32;
                $body
            }
            other => Err(crate::error::Error::unsupported(format!(
                "linear layers compute on F32, BF16 and F16, not on {other}"
            ))),
        }
    };
}
pub(crate) use with_float;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finite_values_are_rounded_without_a_branch_as_with_one() {
        // All exponents and signs, and around every tie of bf16: just below, on it, just above.
        let ties = (0..=u16::MAX).flat_map(|w| [0x7FFF, 0x8000, 0x8001].map(|low| u32::from(w) << 16 | low));
        let any = (0..u32::MAX).step_by(65_521);
        for value in ties.chain(any).map(f32::from_bits).filter(|v| v.is_finite()) {
            assert_eq!(BF16::round_finite(value), BF16::round(value), "{value:e}");
            assert_eq!(F16::round_finite(value), F16::round(value), "{value:e}");
            assert_eq!(F32::round_finite(value), value.to_bits(), "{value:e}");
        }
    }

    #[test]
    fn an_f64_is_rounded_once() {
        // Just above the middle of two bf16: rounding to f32 first would land on the middle, and then on
        // even.
        let value = 1.0 + 2f64.powi(-8) + 2f64.powi(-40);
        assert_eq!(BF16::round_f64(value), 0x3F81);
        assert_eq!(BF16::round_f64(-value), 0xBF81);
        let below = 1.0 + 2f64.powi(-8) + 2f64.powi(-7) - 2f64.powi(-40);
        assert_eq!(BF16::round_f64(below), 0x3F81);
        assert_eq!(F32::round_f64(f64::from(f32::MAX)), f32::MAX.to_bits());
        assert_eq!(F16::round_f64(f64::INFINITY), 0x7C00);
        assert_eq!(BF16::round_f64(1e300), 0x7F80);
    }
}
