//! Which of 32 words differ, with AVX2. Must not know what is done about it.

use super::pack::{Step16, Step32, halves, in_order, quarters, steps};
use crate::vector::lanes::STEP;
use std::arch::x86_64::*;

#[target_feature(enable = "avx2")]
pub(super) fn differ16(base: &[u8], tuned: &[u8], masks: &mut Vec<u32>) {
    let differ = |base: &Step16, tuned: &Step16| {
        let (b, t) = (halves(base), halves(tuned));
        let same = [_mm256_cmpeq_epi16(b[0], t[0]), _mm256_cmpeq_epi16(b[1], t[1])];
        !_mm256_movemask_epi8(in_order(_mm256_packs_epi16(same[0], same[1]))) as u32
    };
    let mut padded = [[0; 2 * STEP]; 2];
    let [left, right] = &mut padded;
    let ((base, rest), (tuned, _)) = (steps(base, left), steps(tuned, right));
    masks.extend(base.iter().zip(tuned).map(|(b, t)| differ(b, t)));
    if rest > 0 {
        masks.push(differ(left, right));
    }
}

#[target_feature(enable = "avx2")]
pub(super) fn differ32(base: &[u8], tuned: &[u8], masks: &mut Vec<u32>) {
    let differ = |base: &Step32, tuned: &Step32| {
        let (b, t) = (quarters(base), quarters(tuned));
        let same = |i: usize| _mm256_cmpeq_epi32(b[i], t[i]);
        let (low, high) = (_mm256_packs_epi32(same(0), same(1)), _mm256_packs_epi32(same(2), same(3)));
        // Lanes of 32 bits come out of two packs in the order 0, 4, 1, 5, 2, 6, 3, 7 of fours.
        let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        let bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
        !_mm256_movemask_epi8(bytes) as u32
    };
    let mut padded = [[0; 4 * STEP]; 2];
    let [left, right] = &mut padded;
    let ((base, rest), (tuned, _)) = (steps(base, left), steps(tuned, right));
    masks.extend(base.iter().zip(tuned).map(|(b, t)| differ(b, t)));
    if rest > 0 {
        masks.push(differ(left, right));
    }
}
