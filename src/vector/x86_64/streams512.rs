//! `exponent` decoded into dot products, with AVX-512 BF16 and VBMI2: 32 words are decoded in registers and
//! multiplied at once.
//!
//! **Floor** (Zen 5, a step of 32 words of W, instructions and cycles in the cache): decoding 17, with the
//! product, its load and the lines asked for 26 and 7.0; of two tenants with tables of their own 21 each and
//! 5.3; of eight with one table 94 and 24.9 for all. Zen 4 takes two passes for 512 bits: 13.7 in place of
//! 7.0.
#![allow(
    clippy::needless_range_loop,
    reason = "arrays indexed in step are what stays in registers; `array::map` is a call, with vectors in memory"
)]

use super::bf16dot::{STEP, Steps, dot, opaque};
use super::lanes512::Table16;
use std::arch::x86_64::*;

/// Units are asked for so many bytes ahead of their use.
const UNITS_AHEAD: usize = 1024;

/// The bit streams of `T` tenants with one width table: they take their units in the same steps.
pub(crate) struct Streams<'a, const T: usize> {
    pub(super) units: [&'a [u8]; T],
    pub(super) table: Table16,
    pub(super) last: [__m512i; T],
    pub(super) held: __m512i,
    /// Bytes taken, and bytes that there are, of each.
    pub(super) at: usize,
    pub(super) end: usize,
}

impl<const T: usize> Streams<'_, T> {
    /// One step of 32 words from byte `at` of `base` on: decoded for each tenant, and multiplied. With
    /// `SURE`, the units of a whole step are there; without, what is missing is zero, which `Bf16Dot::finish`
    /// notices. No other tenants are decoded meanwhile, if `alone`.
    ///
    /// # Safety
    /// `base` and every row of x hold the words of the step (`rest`, if not `WHOLE`) from byte `at` on. With
    /// `SURE`, each stream holds a step's bytes from `self.at` on.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,avx512bf16,popcnt,bmi2")]
    #[inline]
    unsafe fn step<const M: usize, const SURE: bool, const WHOLE: bool>(
        &mut self,
        alone: bool,
        base: *const u8,
        at: usize,
        rest: __mmask32,
        x: &[[*const u8; M]; T],
        sums: &mut [[__m512; M]; T],
    ) {
        // SAFETY: as the caller promises; a masked load reads its lanes only.
        let words = |from: *const u8| unsafe {
            let from = from.add(at);
            if WHOLE { _mm512_loadu_si512(from.cast()) } else { _mm512_maskz_loadu_epi16(rest, from.cast()) }
        };
        let base = words(base);
        let class = _mm512_srli_epi16::<7>(base);
        let mut width = _mm512_permutexvar_epi16(class, self.table.widths);
        if !WHOLE {
            width = _mm512_maskz_mov_epi16(rest, width);
        }
        let mask = _mm512_permutexvar_epi16(class, self.table.masks);
        // As in `Lanes16::step`, but for the blend, which is there for one tenant alone: others' chains hide
        // the latency.
        let most = _mm512_add_epi16(base, _mm512_srli_epi16::<1>(mask));
        let takes = _mm512_cmplt_epu16_mask(self.held, width);
        for t in 0..T {
            // SAFETY: as the caller promises; without `SURE` only bytes before the stream's end are read.
            let units = unsafe {
                let units = self.units[t].as_ptr();
                if SURE {
                    _mm512_loadu_si512(units.add(self.at).cast())
                } else {
                    let left = self.end.saturating_sub(self.at).min(STEP) as u32;
                    _mm512_maskz_loadu_epi8(_bzhi_u64(u64::MAX, left), units.wrapping_add(self.at).cast())
                }
            };
            let value = if alone {
                let unit = _mm512_maskz_expand_epi16(takes, units);
                let value = _mm512_shldv_epi16(unit, self.last[t], self.held);
                self.last[t] = _mm512_mask_blend_epi16(takes, self.last[t], unit);
                value
            } else {
                let next = _mm512_mask_expand_epi16(self.last[t], takes, units);
                let value = _mm512_shldv_epi16(next, self.last[t], self.held);
                self.last[t] = next;
                value
            };
            let mut word = _mm512_sub_epi16(most, _mm512_andnot_si512(value, mask));
            if !WHOLE {
                word = _mm512_maskz_mov_epi16(rest, word);
            }
            for j in 0..M {
                sums[t][j] = dot(sums[t][j], word, words(x[t][j]));
            }
        }
        self.held = _mm512_and_si512(_mm512_sub_epi16(self.held, width), _mm512_set1_epi16(15));
        self.at += 2 * takes.count_ones() as usize;
    }

    /// Steps that find all their units, whatever they take.
    fn sure(&self) -> usize {
        self.end.saturating_sub(self.at) / STEP
    }
}

/// Ask for the line that holds byte `at` (wrapping) after `from`.
#[inline(always)]
fn ask(from: *const u8, at: usize) {
    // SAFETY: a prefetch never faults, whatever the address, and `wrapping_add` computes any.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(at).cast()) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,avx512bf16,popcnt,bmi2")]
#[inline]
pub(super) fn decode_dots<const T: usize, const M: usize>(
    streams: &mut Streams<'_, T>,
    base: &[u8],
    x: &[[&[u8]; M]; T],
    ahead: usize,
    mut sums: [[__m512; M]; T],
) -> [[__m512; M]; T] {
    assert!(x.iter().flatten().all(|x| x.len() >= base.len()), "rows of x of the base's columns");
    let steps = Steps::of(base.len());
    let (base, x) = (base.as_ptr(), x.map(|x| x.map(<[u8]>::as_ptr)));
    // In registers, not in memory that something else might see.
    let mut now = Streams { ..*streams };
    let units = streams.units.map(<[u8]>::as_ptr);
    let (mut at, mut turn, end) = (0, 0, steps.whole * STEP);
    while at < end {
        let sure = at + now.sure().min((end - at) / STEP) * STEP;
        while at < sure {
            ask(base, at + ahead);
            // Of one tenant a step, a line for each one of up to two.
            ask(units[turn], now.at + UNITS_AHEAD);
            if T > 1 {
                ask(units[turn], now.at + UNITS_AHEAD + STEP);
            }
            turn = (turn + 1) % T;
            // SAFETY: `whole` steps lie within base and x; up to `sure`, of at most 64 bytes each, within the
            // streams.
            unsafe { now.step::<M, true, true>(T == 1, base, at, 0, &x, &mut sums) };
            at = opaque(at + STEP);
        }
        if at < end {
            // SAFETY: `whole` steps lie within base and x.
            unsafe { now.step::<M, false, true>(T == 1, base, at, 0, &x, &mut sums) };
            at += STEP;
        }
    }
    if steps.rest != 0 {
        // SAFETY: the words of `rest` follow the whole steps.
        unsafe { now.step::<M, false, false>(T == 1, base, at, steps.rest, &x, &mut sums) };
    }
    (streams.last, streams.held, streams.at) = (now.last, now.held, now.at);
    sums
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,avx512bf16,popcnt,bmi2")]
#[inline]
pub(super) fn decode_dots_two(
    a: &mut Streams<'_, 1>,
    b: &mut Streams<'_, 1>,
    base: &[u8],
    x: [&[u8]; 2],
    ahead: usize,
    sums: [__m512; 2],
) -> [__m512; 2] {
    assert!(x.iter().all(|x| x.len() >= base.len()), "rows of x of the base's columns");
    let steps = Steps::of(base.len());
    let (base, x) = (base.as_ptr(), x.map(|x| [[x.as_ptr()]]));
    let mut sums = [[[sums[0]]], [[sums[1]]]];
    let (mut p, mut q) = (Streams { ..*a }, Streams { ..*b });
    let (mut at, end) = (0, steps.whole * STEP);
    while at < end {
        let sure = at + p.sure().min(q.sure()).min((end - at) / STEP) * STEP;
        while at < sure {
            ask(base, at + ahead);
            ask(p.units[0].as_ptr(), p.at + UNITS_AHEAD);
            ask(q.units[0].as_ptr(), q.at + UNITS_AHEAD);
            // SAFETY: `whole` steps lie within base and x; up to `sure`, of at most 64 bytes each, within the
            // streams.
            unsafe {
                p.step::<1, true, true>(false, base, at, 0, &x[0], &mut sums[0]);
                q.step::<1, true, true>(false, base, at, 0, &x[1], &mut sums[1]);
            }
            at = opaque(at + STEP);
        }
        if at < end {
            // SAFETY: `whole` steps lie within base and x.
            unsafe {
                p.step::<1, false, true>(false, base, at, 0, &x[0], &mut sums[0]);
                q.step::<1, false, true>(false, base, at, 0, &x[1], &mut sums[1]);
            }
            at += STEP;
        }
    }
    if steps.rest != 0 {
        // SAFETY: the words of `rest` follow the whole steps.
        unsafe {
            p.step::<1, false, false>(false, base, at, steps.rest, &x[0], &mut sums[0]);
            q.step::<1, false, false>(false, base, at, steps.rest, &x[1], &mut sums[1]);
        }
    }
    (a.last, a.held, a.at) = (p.last, p.held, p.at);
    (b.last, b.held, b.at) = (q.last, q.held, q.at);
    [sums[0][0][0], sums[1][0][0]]
}
