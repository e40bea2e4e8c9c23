//! Code of single registers compiled with AVX2 and the instructions for bits that nearly all machines with AVX2 have: shifts by
//! any register, masks of the lowest bits (BMI1, BMI2), counts of zeros (LZCNT); and comparisons of 64 words with AVX2. Must
//! hold no algorithm.

use super::avx2::Avx2;
use super::pack::{Step16, Step32, halves, in_order, quarters};
use crate::codec::word::Word;
use crate::vector::bits::{BitTask, Masks, PlainMasks, RUN, plainly};
use std::arch::x86_64::*;

/// Run `task` with those instructions, where the machine has them all.
pub(super) fn with_bits<T: BitTask>(s: Avx2, task: T) -> T::Out {
    #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
    fn inner<T: BitTask>(s: Avx2, task: T) -> T::Out {
        task.call(WideMasks(s))
    }
    let has = is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("lzcnt")
        && is_x86_feature_detected!("popcnt");
    if !has {
        return plainly(task);
    }
    // SAFETY: the token proves AVX2, the rest was detected just now.
    unsafe { inner(s, task) }
}

/// Comparisons with AVX2, which the token proves.
#[derive(Clone, Copy)]
struct WideMasks(Avx2);

/// The bits of 32 words from masks of 16 bits each.
#[target_feature(enable = "avx2")]
#[inline]
fn bits16(masks: [__m256i; 2]) -> u64 {
    let bytes = in_order(_mm256_packs_epi16(masks[0], masks[1]));
    u64::from(_mm256_movemask_epi8(bytes) as u32)
}

/// The bits of 32 words from masks of 32 bits each.
#[target_feature(enable = "avx2")]
#[inline]
fn bits32(masks: [__m256i; 4]) -> u64 {
    let (low, high) = (_mm256_packs_epi32(masks[0], masks[1]), _mm256_packs_epi32(masks[2], masks[3]));
    // Lanes of 32 bits come out of two packs in the order 0, 4, 1, 5, 2, 6, 3, 7 of fours.
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    u64::from(_mm256_movemask_epi8(bytes) as u32)
}

#[target_feature(enable = "avx2")]
#[inline]
fn same16(a: &Step16, b: &Step16) -> u64 {
    let (a, b) = (halves(a), halves(b));
    bits16([_mm256_cmpeq_epi16(a[0], b[0]), _mm256_cmpeq_epi16(a[1], b[1])])
}

#[target_feature(enable = "avx2")]
#[inline]
fn same32(a: &Step32, b: &Step32) -> u64 {
    let (a, b) = (quarters(a), quarters(b));
    bits32(std::array::from_fn(|i| _mm256_cmpeq_epi32(a[i], b[i])))
}

#[target_feature(enable = "avx2")]
#[inline]
fn within16(words: &Step16, low: u32, len: u32) -> u64 {
    let (low, last) = (_mm256_set1_epi16(low as i16), _mm256_set1_epi16((len - 1) as i16));
    let is = |v: __m256i| {
        let place = _mm256_sub_epi16(_mm256_and_si256(v, _mm256_set1_epi16(i16::MAX)), low);
        _mm256_cmpeq_epi16(_mm256_min_epu16(place, last), place)
    };
    bits16(halves(words).map(is))
}

#[target_feature(enable = "avx2")]
#[inline]
fn within32(words: &Step32, low: u32, len: u32) -> u64 {
    let (low, last) = (_mm256_set1_epi32(low as i32), _mm256_set1_epi32((len - 1) as i32));
    let is = |v: __m256i| {
        let place = _mm256_sub_epi32(_mm256_and_si256(v, _mm256_set1_epi32(i32::MAX)), low);
        _mm256_cmpeq_epi32(_mm256_min_epu32(place, last), place)
    };
    bits32(quarters(words).map(is))
}

/// The bytes of a run as two steps of `N` bytes, if they are as many.
#[inline(always)]
fn steps_of<W: Word, const N: usize>(run: &[W; RUN]) -> Option<&[[u8; N]; 2]> {
    bytemuck::cast_slice::<W, u8>(run).as_chunks().0.try_into().ok()
}

impl Masks for WideMasks {
    #[inline(always)]
    fn differ<W: Word>(self, a: &[W; RUN], b: &[W; RUN]) -> u64 {
        if let (2, Some(a), Some(b)) = (W::BYTES, steps_of(a), steps_of(b)) {
            // SAFETY: the token proves AVX2.
            return unsafe { !(same16(&a[0], &b[0]) | same16(&a[1], &b[1]) << 32) };
        }
        if let (4, Some(a), Some(b)) = (W::BYTES, steps_of(a), steps_of(b)) {
            // SAFETY: the token proves AVX2.
            return unsafe { !(same32(&a[0], &b[0]) | same32(&a[1], &b[1]) << 32) };
        }
        PlainMasks.differ(a, b)
    }

    #[inline(always)]
    fn within<W: Word>(self, words: &[W; RUN], low: u32, len: u32) -> u64 {
        if let (2, Some(w)) = (W::BYTES, steps_of(words)) {
            // SAFETY: the token proves AVX2.
            return unsafe { within16(&w[0], low, len) | within16(&w[1], low, len) << 32 };
        }
        if let (4, Some(w)) = (W::BYTES, steps_of(words)) {
            // SAFETY: the token proves AVX2.
            return unsafe { within32(&w[0], low, len) | within32(&w[1], low, len) << 32 };
        }
        PlainMasks.within(words, low, len)
    }
}
