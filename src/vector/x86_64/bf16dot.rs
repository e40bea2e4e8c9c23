//! Dot products of bf16 words, and `exponent` decoded into them, with AVX-512 BF16 and VBMI2: see `vector::bf16dot` for what
//! each method promises. Every loop is one idea; which rows meet which is the callers' business.
//!
//! **Floor** (Zen 5, a step of 32 words of W, instructions and cycles in the cache): a dot product 2 and 0.55; four rows by
//! four 27 and 10.1 for sixteen; decoding 17, with the product, its load and the lines asked for 26 and 7.0; of two tenants
//! with tables of their own 21 each and 5.3; of eight with one table 94 and 24.9 for all. Memory gives 32 words of W in 9.3 cycles to each of two cores.

#![allow(
    clippy::needless_range_loop,
    reason = "arrays indexed in step are what stays in registers; `array::map` is a call, with vectors in memory"
)]

use super::avx512_more::Avx512Bf16;
use super::lanes512::{Lanes16, Table16};
use crate::codec::ExponentTile;
use crate::error::Result;
use crate::vector::bf16dot::{Bf16Dot, PANEL_ROWS, Pair};
use crate::vector::lanes::{Code, ended, unused};
use crate::vector::simd::LANES;
use std::arch::x86_64::*;
use std::ops::Range;

/// Bytes of a step of 32 words, and of a cache line.
const STEP: usize = 64;
/// Units are asked for so many bytes ahead of their use.
const UNITS_AHEAD: usize = 1024;

/// The bit streams of `T` tenants with one width table: they take their units in the same steps.
pub(crate) struct Streams<'a, const T: usize> {
    units: [&'a [u8]; T],
    table: Table16,
    last: [__m512i; T],
    held: __m512i,
    /// Bytes taken, and bytes that there are, of each.
    at: usize,
    end: usize,
}

/// The bytes of a row that is read in steps: `whole` steps, then the words of `rest`.
#[derive(Clone, Copy)]
struct Steps {
    whole: usize,
    rest: __mmask32,
}

impl Steps {
    fn of(bytes: usize) -> Self {
        Self { whole: bytes / STEP, rest: (1 << (bytes % STEP / 2)) - 1 }
    }
}

#[inline(always)]
fn dot(acc: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: called from functions that have AVX-512 BF16 switched on; both types are 64 bytes of plain data.
    unsafe { _mm512_dpbf16_ps(acc, std::mem::transmute(a), std::mem::transmute(b)) }
}

impl<const T: usize> Streams<'_, T> {
    /// One step of 32 words from byte `at` of `base` on: decoded for each tenant, and multiplied. With `SURE`, the units of
    /// a whole step are there; without, what is missing is zero, which [`Bf16Dot::finish`] notices.
    ///
    /// # Safety
    /// `base` and every row of x hold the words of the step (`rest`, if not `WHOLE`) from byte `at` on. With `SURE`, each
    /// stream holds a step's bytes from `self.at` on.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,avx512bf16,popcnt,bmi2")]
    #[inline]
    unsafe fn step<const M: usize, const SURE: bool, const WHOLE: bool>(
        &mut self,
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
        let class = _mm512_srl_epi16(base, self.table.shift);
        let mut width = _mm512_permutexvar_epi16(class, self.table.widths);
        if !WHOLE {
            width = _mm512_maskz_mov_epi16(rest, width);
        }
        let mask = _mm512_permutexvar_epi16(class, self.table.masks);
        let from = _mm512_sub_epi16(base, _mm512_permutexvar_epi16(class, self.table.halves));
        let takes = _mm512_cmplt_epu16_mask(self.held, width);
        for t in 0..T {
            // SAFETY: as the caller promises; without `SURE` only bytes before the stream's end are read.
            let units = unsafe {
                let units = self.units[t].as_ptr().wrapping_add(self.at);
                if SURE {
                    _mm512_loadu_si512(units.cast())
                } else {
                    let left = self.end.saturating_sub(self.at).min(STEP) as u32;
                    _mm512_maskz_loadu_epi8(_bzhi_u64(u64::MAX, left), units.cast())
                }
            };
            let next = _mm512_mask_blend_epi16(takes, self.last[t], _mm512_maskz_expand_epi16(takes, units));
            let value = _mm512_shldv_epi16(next, self.last[t], self.held);
            self.last[t] = next;
            let mut word = _mm512_add_epi16(from, _mm512_and_si512(value, mask));
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

    /// Ask for units to come, a tenant's a step in turn.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn ask(&self, step: usize) {
        let units = self.units[step % T].as_ptr().wrapping_add(self.at + UNITS_AHEAD);
        _mm_prefetch::<_MM_HINT_T0>(units.cast());
        if T > 1 {
            _mm_prefetch::<_MM_HINT_T0>(units.wrapping_add(STEP).cast());
        }
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
fn decode_dots<const T: usize, const M: usize>(
    streams: &mut Streams<'_, T>,
    base: &[u8],
    x: &[[&[u8]; M]; T],
    ahead: usize,
) -> [[__m512; M]; T] {
    assert!(x.iter().flatten().all(|x| x.len() >= base.len()), "rows of x of the base's columns");
    let steps = Steps::of(base.len());
    let (base, x) = (base.as_ptr(), x.map(|x| x.map(<[u8]>::as_ptr)));
    let mut sums = [[_mm512_setzero_ps(); M]; T];
    // In registers, not in memory that something else might see.
    let mut now = Streams { ..*streams };
    let mut i = 0;
    while i < steps.whole {
        let sure = now.sure().min(steps.whole - i);
        for _ in 0..sure {
            ask(base, i * STEP + ahead);
            now.ask(i);
            // SAFETY: `whole` steps lie within base and x; `sure` of them, of at most 64 bytes each, within the streams.
            unsafe { now.step::<M, true, true>(base, i * STEP, 0, &x, &mut sums) };
            i += 1;
        }
        if i < steps.whole {
            // SAFETY: `whole` steps lie within base and x.
            unsafe { now.step::<M, false, true>(base, i * STEP, 0, &x, &mut sums) };
            i += 1;
        }
    }
    if steps.rest != 0 {
        // SAFETY: the words of `rest` follow the whole steps.
        unsafe { now.step::<M, false, false>(base, i * STEP, steps.rest, &x, &mut sums) };
    }
    (streams.last, streams.held, streams.at) = (now.last, now.held, now.at);
    sums
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,avx512bf16,popcnt,bmi2")]
#[inline]
fn decode_dots_two(
    a: &mut Streams<'_, 1>,
    b: &mut Streams<'_, 1>,
    base: &[u8],
    x: [&[u8]; 2],
    ahead: usize,
) -> [__m512; 2] {
    assert!(x.iter().all(|x| x.len() >= base.len()), "rows of x of the base's columns");
    let steps = Steps::of(base.len());
    let (base, x) = (base.as_ptr(), x.map(|x| [[x.as_ptr()]]));
    let mut sums = [[[_mm512_setzero_ps()]]; 2];
    let (mut p, mut q) = (Streams { ..*a }, Streams { ..*b });
    let mut i = 0;
    while i < steps.whole {
        let sure = p.sure().min(q.sure()).min(steps.whole - i);
        for _ in 0..sure {
            ask(base, i * STEP + ahead);
            p.ask(i);
            q.ask(i);
            // SAFETY: `whole` steps lie within base and x; `sure` of them, of at most 64 bytes each, within the streams.
            unsafe {
                p.step::<1, true, true>(base, i * STEP, 0, &x[0], &mut sums[0]);
                q.step::<1, true, true>(base, i * STEP, 0, &x[1], &mut sums[1]);
            }
            i += 1;
        }
        if i < steps.whole {
            // SAFETY: `whole` steps lie within base and x.
            unsafe {
                p.step::<1, false, true>(base, i * STEP, 0, &x[0], &mut sums[0]);
                q.step::<1, false, true>(base, i * STEP, 0, &x[1], &mut sums[1]);
            }
            i += 1;
        }
    }
    if steps.rest != 0 {
        // SAFETY: the words of `rest` follow the whole steps.
        unsafe {
            p.step::<1, false, false>(base, i * STEP, steps.rest, &x[0], &mut sums[0]);
            q.step::<1, false, false>(base, i * STEP, steps.rest, &x[1], &mut sums[1]);
        }
    }
    (a.last, a.held, a.at) = (p.last, p.held, p.at);
    (b.last, b.held, b.at) = (q.last, q.held, q.at);
    [sums[0][0][0], sums[1][0][0]]
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
fn dots<const R: usize, const M: usize, const E: usize>(
    words: [&[u8]; R],
    x: [&[u8]; M],
    ahead: usize,
) -> [[__m512; M]; R] {
    let bytes = words[0].len();
    let alike = words.iter().all(|w| w.len() == bytes) && x.iter().all(|x| x.len() == bytes);
    assert!(alike, "rows of one length");
    let steps = Steps::of(bytes);
    let (words, x) = (words.map(<[u8]>::as_ptr), x.map(<[u8]>::as_ptr));
    let mut sums = [[_mm512_setzero_ps(); M]; R];
    let mut next = words[0].wrapping_add(ahead);
    for i in 0..steps.whole {
        for _ in 0..E {
            _mm_prefetch::<_MM_HINT_T1>(next.cast());
            next = next.wrapping_add(STEP);
        }
        let mut loaded = [_mm512_setzero_si512(); R];
        for r in 0..R {
            // SAFETY: `whole` steps lie within every row.
            loaded[r] = unsafe { _mm512_loadu_si512(words[r].add(i * STEP).cast()) };
        }
        for j in 0..M {
            // SAFETY: as above.
            let x = unsafe { _mm512_loadu_si512(x[j].add(i * STEP).cast()) };
            for r in 0..R {
                sums[r][j] = dot(sums[r][j], loaded[r], x);
            }
        }
    }
    if steps.rest != 0 {
        let at = steps.whole * STEP;
        // SAFETY: the words of `rest` follow the whole steps of every row, and only they are read.
        let load = |from: *const u8| unsafe { _mm512_maskz_loadu_epi16(steps.rest, from.add(at).cast()) };
        for j in 0..M {
            for r in 0..R {
                sums[r][j] = dot(sums[r][j], load(words[r]), load(x[j]));
            }
        }
    }
    sums
}

/// Halves, quarters, pairs and lanes are added in turn, of as many vectors as are left side by side: 45 instructions.
#[target_feature(enable = "avx512f")]
#[inline]
fn sum16(a: &[__m512; LANES]) -> [f32; LANES] {
    let halves = |a: __m512, b: __m512| {
        _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xEE>(a, b))
    };
    let quarters = |a: __m512, b: __m512| {
        _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xDD>(a, b))
    };
    let pairs = |a: __m512, b: __m512| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    // A vector's sum is now in one 128-bit lane: i, i + 4, i + 8 and i + 12 side by side.
    let four = |i: usize| quarters(halves(a[i], a[i + 8]), halves(a[i + 4], a[i + 12]));
    let (even, odd) = (pairs(four(0), four(1)), pairs(four(2), four(3)));
    let (even, odd) = (_mm512_castps_pd(even), _mm512_castps_pd(odd));
    let low = _mm512_castpd_ps(_mm512_unpacklo_pd(even, odd));
    let high = _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd));
    let sums = _mm512_add_ps(low, high);
    // The 128-bit lanes are those of 0, 8, 4 and 12.
    let mut out = [0f32; LANES];
    // SAFETY: the array takes 16 f32, no alignment asked.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), _mm512_shuffle_f32x4::<0xD8>(sums, sums)) };
    out
}

/// Sixteen rows of sixteen pairs of words, to sixteen vectors of one pair each: 64 shuffles for 512 words.
#[target_feature(enable = "avx512f")]
#[inline]
fn transpose(mut a: [__m512i; LANES]) -> [__m512i; LANES] {
    let mut b = a;
    for i in 0..8 {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    for i in 0..4 {
        a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
        a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
    }
    for i in 0..4 {
        // a[i], a[i + 4], a[i + 8], a[i + 12]: rows 0-3, 4-7, 8-11 and 12-15 of pairs i, i + 4, i + 8 and i + 12.
        let even = |a, b| _mm512_shuffle_i32x4::<0x88>(a, b);
        let odd = |a, b| _mm512_shuffle_i32x4::<0xDD>(a, b);
        let (low, high) = ((a[i], a[i + 4]), (a[i + 8], a[i + 12]));
        b[i] = even(even(low.0, low.1), even(high.0, high.1));
        b[i + 8] = odd(even(low.0, low.1), even(high.0, high.1));
        b[i + 4] = even(odd(low.0, low.1), odd(high.0, high.1));
        b[i + 12] = odd(odd(low.0, low.1), odd(high.0, high.1));
    }
    b
}

#[target_feature(enable = "avx512f,avx512bw,bmi2")]
#[inline]
fn pack(rows: [&[u8]; LANES], panel: &mut [Pair], at: usize) {
    assert!(at.is_multiple_of(LANES) && at < PANEL_ROWS, "rows {at} of a panel");
    for (block, pairs) in panel.chunks_mut(LANES).enumerate() {
        let mut loaded = [_mm512_setzero_si512(); LANES];
        for r in 0..LANES {
            let left = rows[r].len().saturating_sub(block * STEP).min(STEP) as u32;
            let from = rows[r].as_ptr().wrapping_add(block * STEP).cast();
            // SAFETY: only bytes before the row's end are read; `wrapping_add` computes any address.
            loaded[r] = unsafe { _mm512_maskz_loadu_epi8(_bzhi_u64(u64::MAX, left), from) };
        }
        let transposed = transpose(loaded);
        for i in 0..LANES.min(pairs.len()) {
            let to = &mut pairs[i][4 * at..4 * at + STEP];
            // SAFETY: the slice takes 64 bytes, no alignment asked.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), transposed[i]) };
        }
    }
}

/// Vectors of a panel's rows.
const VECTORS: usize = PANEL_ROWS / LANES;

#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn outer<const M: usize>(
    panel: &[Pair],
    x: [&[u8]; M],
    sums: &mut [f32],
    stride: usize,
    (near, ahead): (*const u8, Range<usize>),
) {
    let last = 4 * panel.len().max(1) - 2;
    assert!(x.iter().all(|x| x.len() >= last), "rows of x of the panel's columns");
    assert!(M == 0 || sums.len() >= (M - 1) * stride + PANEL_ROWS, "sums for every row");
    let x_at = x.map(<[u8]>::as_ptr);
    let mut acc = [[_mm512_setzero_ps(); VECTORS]; M];
    for j in 0..M {
        for i in 0..VECTORS {
            // SAFETY: `sums` holds the panel's rows from `j * stride` on.
            acc[j][i] = unsafe { _mm512_loadu_ps(sums.as_ptr().add(j * stride + i * LANES)) };
        }
    }
    let (whole, odd) = if x.iter().all(|x| x.len() >= last + 2) { (panel, None) } else { split_last(panel) };
    let mut next = ahead.start;
    for (p, pair) in whole.iter().enumerate() {
        if next < ahead.end {
            _mm_prefetch::<_MM_HINT_T1>(near.wrapping_add(next).cast());
            next += STEP;
        }
        let mut w = [_mm512_setzero_si512(); VECTORS];
        for i in 0..VECTORS {
            // SAFETY: a pair holds the vectors; the rows of x hold four bytes at each of the whole pairs.
            w[i] = unsafe { _mm512_loadu_si512(pair.as_ptr().add(i * STEP).cast()) };
        }
        for j in 0..M {
            // SAFETY: as above.
            let two = unsafe { x_at[j].add(4 * p).cast::<i32>().read_unaligned() };
            let two = _mm512_set1_epi32(two);
            for i in 0..VECTORS {
                acc[j][i] = dot(acc[j][i], w[i], two);
            }
        }
    }
    if let Some(pair) = odd {
        for j in 0..M {
            let one = _mm512_set1_epi32(i32::from(u16::from_le_bytes([x[j][last - 2], x[j][last - 1]])));
            for i in 0..VECTORS {
                // SAFETY: a pair holds the vectors.
                let w = unsafe { _mm512_loadu_si512(pair.as_ptr().add(i * STEP).cast()) };
                acc[j][i] = dot(acc[j][i], w, one);
            }
        }
    }
    for j in 0..M {
        for i in 0..VECTORS {
            // SAFETY: `sums` takes the panel's rows from `j * stride` on.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr().add(j * stride + i * LANES), acc[j][i]) };
        }
    }
}

/// All pairs but the last, and the last, of which only one column is there.
fn split_last(panel: &[Pair]) -> (&[Pair], Option<&Pair>) {
    panel.split_last().map_or((panel, None), |(last, whole)| (whole, Some(last)))
}

impl Bf16Dot for Avx512Bf16 {
    type Streams<'a, const T: usize> = Streams<'a, T>;

    #[inline(always)]
    fn dots<const R: usize, const M: usize, const E: usize>(
        self,
        words: [&[u8]; R],
        x: [&[u8]; M],
        ahead: usize,
    ) -> [[__m512; M]; R] {
        // SAFETY: the token proves the instructions that `dots` has switched on.
        unsafe { dots::<R, M, E>(words, x, ahead) }
    }

    #[inline(always)]
    fn sum16(self, v: &[__m512; LANES]) -> [f32; LANES] {
        // SAFETY: the token proves AVX-512F.
        unsafe { sum16(v) }
    }

    fn streams<'a, const T: usize>(
        self,
        tiles: [&ExponentTile<'a>; T],
        code: Code<'_>,
    ) -> Option<Streams<'a, T>> {
        let end = tiles.first().map_or(0, |tile| tile.stream.len());
        let alike = tiles.iter().all(|tile| tile.stream.len() == end);
        // SAFETY: the token proves AVX-512 F and BW.
        let (table, lanes) = unsafe { (Table16::new(&code), Lanes16::empty()) };
        let (units, last) = (tiles.map(|tile| tile.stream), [lanes.last; T]);
        alike.then_some(Streams { units, table, last, held: lanes.held, at: 0, end })
    }

    #[inline(always)]
    fn decode_dots<const T: usize, const M: usize>(
        self,
        streams: &mut Streams<'_, T>,
        base: &[u8],
        x: &[[&[u8]; M]; T],
        ahead: usize,
    ) -> [[__m512; M]; T] {
        // SAFETY: the token proves the instructions that `decode_dots` has switched on.
        unsafe { decode_dots(streams, base, x, ahead) }
    }

    #[inline(always)]
    fn decode_dots_two(
        self,
        a: &mut Streams<'_, 1>,
        b: &mut Streams<'_, 1>,
        base: &[u8],
        x: [&[u8]; 2],
        ahead: usize,
    ) -> [__m512; 2] {
        // SAFETY: the token proves the instructions that `decode_dots_two` has switched on.
        unsafe { decode_dots_two(a, b, base, x, ahead) }
    }

    fn finish<const T: usize>(self, streams: &Streams<'_, T>) -> Result<()> {
        match streams.end.checked_sub(streams.at) {
            None => Err(ended()),
            Some(0) => Ok(()),
            Some(left) => Err(unused(left)),
        }
    }

    #[inline(always)]
    fn pack(self, rows: [&[u8]; LANES], panel: &mut [Pair], at: usize) {
        // SAFETY: the token proves the instructions that `pack` has switched on.
        unsafe { pack(rows, panel, at) }
    }

    #[inline(always)]
    fn outer<const M: usize>(
        self,
        panel: &[Pair],
        x: [&[u8]; M],
        sums: &mut [f32],
        stride: usize,
        near: &[u8],
        ahead: Range<usize>,
    ) {
        // SAFETY: the token proves the instructions that `outer` has switched on.
        unsafe { outer(panel, x, sums, stride, (near.as_ptr(), ahead)) }
    }
}
