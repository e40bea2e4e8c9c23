//! The bit streams of `exponent` on 32-bit words with AVX-512 VBMI2: as `lanes512`, sixteen lanes per vector;
//! and the same fused with products of f32 words.
//!
//! **Floor**: 2 times 17 instructions for a step of 32 words; 20 cycles and more on Zen 4, where memory takes
//! 20 to 30 for the base's words.
#![allow(clippy::needless_range_loop, reason = "arrays indexed in step are what stays in registers")]

use super::avx512_more::Avx512Vbmi2;
use super::lanes512::{From, store, words};
use crate::codec::exponent::CLASSES;
use crate::vector::lanes::{Code, LaneBits, Progress, STEP};
use std::arch::x86_64::*;

/// Words, and units, are asked for so many bytes ahead of their use.
const AHEAD: usize = 8192;
const UNITS_AHEAD: usize = 2048;

/// What a tile's widths say of 32-bit words: the width by class, sixteen classes a vector.
#[derive(Clone, Copy)]
struct Table32 {
    widths: [__m512i; 2],
    shift: __m128i,
}

impl Table32 {
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn new(code: &Code<'_>) -> Self {
        let table: [u32; CLASSES] = std::array::from_fn(|class| u32::from(code.widths[class]));
        let (halves, _) = table.as_chunks::<16>();
        let shift = _mm_cvtsi32_si128(code.shift as i32);
        Self { widths: [words(&halves[0]), words(&halves[1])], shift }
    }
}

/// 32 lanes of 32 bits, sixteen a vector; kept as those of 16 bits are.
#[derive(Clone, Copy)]
struct Lanes32 {
    last: [__m512i; 2],
    held: [__m512i; 2],
}

impl Lanes32 {
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn load(lanes: &LaneBits<u32>) -> Self {
        let halves = |v: &[u32; STEP]| {
            let (v, _) = v.as_chunks::<16>();
            [words(&v[0]), words(&v[1])]
        };
        let (bits, held) = (halves(&lanes.bits), halves(&lanes.held));
        let up = |i: usize| _mm512_sllv_epi32(bits[i], _mm512_sub_epi32(_mm512_set1_epi32(32), held[i]));
        Self { last: [up(0), up(1)], held }
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    fn save(&self, lanes: &mut LaneBits<u32>) {
        let (bits, _) = lanes.bits.as_chunks_mut::<16>();
        let (held, _) = lanes.held.as_chunks_mut::<16>();
        for i in 0..2 {
            let down = _mm512_sub_epi32(_mm512_set1_epi32(32), self.held[i]);
            store(_mm512_srlv_epi32(self.last[i], down), &mut bits[i]);
            store(self.held[i], &mut held[i]);
        }
    }

    /// Sixteen lanes of a step: as a step of 16-bit words.
    #[target_feature(enable = "avx512f,avx512vbmi2,popcnt")]
    #[inline]
    fn half<const WHOLE: bool>(
        &mut self,
        i: usize,
        t: &Table32,
        base: __m512i,
        there: __mmask16,
        units: __m512i,
    ) -> (__m512i, usize) {
        let class = _mm512_srl_epi32(base, t.shift);
        let mut w = _mm512_permutex2var_epi32(t.widths[0], class, t.widths[1]);
        if !WHOLE {
            w = _mm512_maskz_mov_epi32(there, w);
        }
        let (last, held) = (self.last[i], self.held[i]);
        let takes = _mm512_cmplt_epu32_mask(held, w);
        let unit = _mm512_maskz_expand_epi32(takes, units);
        let value = _mm512_shldv_epi32(unit, last, held);
        self.last[i] = _mm512_mask_blend_epi32(takes, last, unit);
        self.held[i] = _mm512_and_si512(_mm512_sub_epi32(held, w), _mm512_set1_epi32(31));
        // All ones shifted down by 32 - w are the mask; then as with 16 bits.
        let mask = _mm512_srlv_epi32(_mm512_set1_epi32(-1), _mm512_sub_epi32(_mm512_set1_epi32(32), w));
        let most = _mm512_add_epi32(base, _mm512_srli_epi32::<1>(mask));
        let word = _mm512_sub_epi32(most, _mm512_andnot_si512(value, mask));
        (word, takes.count_ones() as usize)
    }
}

/// [`crate::vector::lanes::Lane::steps`] of 32-bit words.
pub(super) fn words32(
    _: Avx512Vbmi2,
    lanes: &mut LaneBits<u32>,
    code: Code<'_>,
    units: &[u8],
    from: From<'_>,
    words: &mut [u32],
) -> Progress {
    // SAFETY: the token proves AVX-512 F, BW, VBMI2 and POPCNT.
    unsafe { inner32(lanes, code, units, from, words) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn inner32(
    lanes: &mut LaneBits<u32>,
    code: Code<'_>,
    units: &[u8],
    from: From<'_>,
    to: &mut [u32],
) -> Progress {
    let base = from.address(to);
    let table = Table32::new(&code);
    let mut now = Lanes32::load(lanes);
    let (whole, rest) = (to.len() / STEP, to.len() % STEP);
    let (mut step, mut at) = (0, 0);
    loop {
        let sure = ((units.len() - at) / 128).min(whole - step);
        if sure == 0 {
            break;
        }
        for _ in 0..sure {
            for i in 0..2 {
                // SAFETY: whole steps lie within `to` and the base's words; `sure` steps of at most 128 bytes
                // each lie within `units` from where they begin, half of them for each half.
                unsafe {
                    let word = _mm512_loadu_si512(base.add(128 * step + 64 * i).cast());
                    let from = _mm512_loadu_si512(units.as_ptr().add(at).cast());
                    let (word, taken) = now.half::<true>(i, &table, word, 0, from);
                    _mm512_storeu_si512(to.as_mut_ptr().add(STEP * step + 16 * i).cast(), word);
                    at += 4 * taken;
                }
            }
            step += 1;
        }
    }
    let mut done = Progress { words: STEP * step, bytes: at };
    let last = units.get(at..).and_then(|u| u.first_chunk::<128>());
    if let Some(last) = last.filter(|_| step == whole && rest > 0) {
        let mut taken = 0;
        for i in 0..2 {
            let words = rest.saturating_sub(16 * i).min(16) as u32;
            let there = ((1u32 << words) - 1) as __mmask16;
            // SAFETY: only the lanes of `there` are read and written, and those words follow the whole steps;
            // the first half takes at most sixteen units of the 32, so the 64 bytes from there on are within
            // the 128.
            taken += unsafe {
                let from = _mm512_loadu_si512(last.as_ptr().add(4 * taken).cast());
                let base = _mm512_maskz_loadu_epi32(there, base.wrapping_add(128 * step + 64 * i).cast());
                let (word, taken) = now.half::<false>(i, &table, base, there, from);
                let to = to.as_mut_ptr().wrapping_add(STEP * step + 16 * i);
                _mm512_mask_storeu_epi32(to.cast(), there, word);
                taken
            };
        }
        done = Progress { words: to.len(), bytes: at + 4 * taken };
    }
    now.save(lanes);
    done
}

/// [`crate::vector::simd::Simd::decode_dots32`].
#[inline(always)]
pub(super) fn decode_dots32<const M: usize>(
    _: Avx512Vbmi2,
    lanes: &mut LaneBits<u32>,
    code: Code<'_>,
    units: &[u8],
    base: &[u8],
    x: [&[[f32; STEP]]; M],
    acc: &mut [__m512; M],
) -> Progress {
    // SAFETY: the token proves AVX-512 F, BW, VBMI2 and POPCNT.
    unsafe { inner_dots(lanes, code, units, base, x, acc) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
fn inner_dots<const M: usize>(
    lanes: &mut LaneBits<u32>,
    code: Code<'_>,
    units: &[u8],
    base: &[u8],
    x: [&[[f32; STEP]]; M],
    sums: &mut [__m512; M],
) -> Progress {
    let whole = base.len() / (4 * STEP);
    assert!(x.iter().all(|x| x.len() >= whole), "rows of x of the base's columns");
    let (table, mut now, mut acc) = (Table32::new(&code), Lanes32::load(lanes), *sums);
    let (mut step, mut at) = (0, 0);
    loop {
        // So many steps find their units, whatever they take.
        let sure = ((units.len() - at) / 128).min(whole - step);
        if sure == 0 {
            break;
        }
        for _ in 0..sure {
            for i in 0..2 {
                let from = base.as_ptr().wrapping_add(128 * step + 64 * i);
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD).cast());
                _mm_prefetch::<_MM_HINT_T0>(units.as_ptr().wrapping_add(at + UNITS_AHEAD).cast());
                // SAFETY: whole steps lie within the base's words; `sure` steps of at most 128 bytes each lie
                // within `units` from where they begin, half of them for each half.
                let (word, taken) = unsafe {
                    let word = _mm512_loadu_si512(from.cast());
                    now.half::<true>(i, &table, word, 0, _mm512_loadu_si512(units.as_ptr().add(at).cast()))
                };
                at += 4 * taken;
                for j in 0..M {
                    // SAFETY: a step of x holds two vectors, and x has every whole step.
                    let x = unsafe { _mm512_loadu_ps(x[j].as_ptr().add(step).cast::<f32>().add(16 * i)) };
                    acc[j] = _mm512_fmadd_ps(_mm512_castsi512_ps(word), x, acc[j]);
                }
            }
            step += 1;
        }
    }
    now.save(lanes);
    *sums = acc;
    Progress { words: STEP * step, bytes: at }
}
