//! Dot products of bf16 words with AVX-512 BF16: see `vector::bf16dot` for what
//! each method promises. Every loop is one idea; which rows meet which is the callers' business.
//!
//! **Floor** (Zen 5, a step of 32 words of W, instructions and cycles in the cache): a dot product 2 and
//! 0.55; four rows by four 27 and 10.1 for sixteen. Memory gives 32 words of W in 9.3 cycles to each of two
//! cores.

#![allow(
    clippy::needless_range_loop,
    reason = "arrays indexed in step are what stays in registers; `array::map` is a call, with vectors in memory"
)]

use super::avx512_more::Avx512Bf16;
use super::lanes512::{Lanes16, Table16};
use super::streams512::{Streams, decode_dots, decode_dots_two};
use crate::codec::ExponentTile;
use crate::error::Result;
use crate::vector::bf16dot::{Bf16Dot, PANEL_ROWS, Pair};
use crate::vector::lanes::{Code, ended, unused};
use crate::vector::simd::SIMD_LANES;
use std::arch::x86_64::*;
use std::ops::Range;

/// Bytes of a step of 32 words, and of a cache line.
pub(super) const STEP: usize = 64;

/// The bytes of a row that is read in steps: `whole` steps, then the words of `rest`.
#[derive(Clone, Copy)]
pub(super) struct Steps {
    pub(super) whole: usize,
    pub(super) rest: __mmask32,
}

impl Steps {
    pub(super) fn of(bytes: usize) -> Self {
        Self { whole: bytes / STEP, rest: (1 << (bytes % STEP / 2)) - 1 }
    }
}

#[inline(always)]
pub(super) fn dot(acc: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: called from functions that have AVX-512 BF16 switched on; both types are 64 bytes of plain
    // data.
    unsafe {
        let pairs = |v| std::mem::transmute::<__m512i, __m512bh>(v);
        _mm512_dpbf16_ps(acc, pairs(a), pairs(b))
    }
}

/// The same number, of which the compiler then knows nothing: else it steps a pointer for each row in place
/// of this one.
#[inline(always)]
pub(super) fn opaque(mut at: usize) -> usize {
    // SAFETY: no instruction at all.
    unsafe { std::arch::asm!("/* {0} */", inout(reg) at, options(pure, nomem, nostack, preserves_flags)) };
    at
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
    let next = words[0].wrapping_add(ahead);
    let (mut at, end) = (0, steps.whole * STEP);
    while at < end {
        for i in 0..E {
            _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(E * at + i * STEP).cast());
        }
        let mut loaded = [_mm512_setzero_si512(); R];
        for r in 0..R {
            // SAFETY: `whole` steps lie within every row.
            loaded[r] = unsafe { _mm512_loadu_si512(words[r].add(at).cast()) };
        }
        for j in 0..M {
            // SAFETY: as above.
            let x = unsafe { _mm512_loadu_si512(x[j].add(at).cast()) };
            for r in 0..R {
                sums[r][j] = dot(sums[r][j], loaded[r], x);
            }
        }
        at = opaque(at + STEP);
    }
    if steps.rest != 0 {
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

/// Halves, quarters, pairs and lanes are added in turn, of as many vectors as are left side by side: 45
/// instructions.
#[target_feature(enable = "avx512f")]
#[inline]
fn sum16(a: &[__m512; SIMD_LANES]) -> [f32; SIMD_LANES] {
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
    let mut out = [0f32; SIMD_LANES];
    // SAFETY: the array takes 16 f32, no alignment asked.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), _mm512_shuffle_f32x4::<0xD8>(sums, sums)) };
    out
}

/// Steps that rows are asked for ahead as they are packed.
const AHEAD: usize = 4;

/// Sixteen rows of sixteen pairs of words, to sixteen vectors of one pair each: 64 shuffles for 512 words.
#[target_feature(enable = "avx512f")]
#[inline]
fn transpose(mut a: [__m512i; SIMD_LANES]) -> [__m512i; SIMD_LANES] {
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
fn pack(rows: [&[u8]; SIMD_LANES], panel: &mut [Pair], at: usize) {
    assert!(at.is_multiple_of(SIMD_LANES) && at < PANEL_ROWS, "rows {at} of a panel");
    let whole = rows.iter().map(|row| row.len() / STEP).min().unwrap_or(0);
    for (block, pairs) in panel.chunks_mut(SIMD_LANES).enumerate() {
        let mut loaded = [_mm512_setzero_si512(); SIMD_LANES];
        for r in 0..SIMD_LANES {
            let from = rows[r].as_ptr().wrapping_add(block * STEP);
            _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD * STEP).cast());
            if block < whole {
                // SAFETY: `whole` steps lie within every row.
                loaded[r] = unsafe { _mm512_loadu_si512(from.cast()) };
            } else {
                let left = rows[r].len().saturating_sub(block * STEP).min(STEP) as u32;
                // SAFETY: only bytes before the row's end are read; `wrapping_add` computes any address.
                loaded[r] = unsafe { _mm512_maskz_loadu_epi8(_bzhi_u64(u64::MAX, left), from.cast()) };
            }
        }
        let transposed = transpose(loaded);
        for i in 0..SIMD_LANES.min(pairs.len()) {
            let to = &mut pairs[i][4 * at..4 * at + STEP];
            // SAFETY: the slice takes 64 bytes, no alignment asked.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), transposed[i]) };
        }
    }
}

/// Vectors of a panel's rows.
const VECTORS: usize = PANEL_ROWS / SIMD_LANES;

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
            acc[j][i] = unsafe { _mm512_loadu_ps(sums.as_ptr().add(j * stride + i * SIMD_LANES)) };
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
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr().add(j * stride + i * SIMD_LANES), acc[j][i]) };
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
    fn sum16(self, v: &[__m512; SIMD_LANES]) -> [f32; SIMD_LANES] {
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
        sums: [[__m512; M]; T],
    ) -> [[__m512; M]; T] {
        // SAFETY: the token proves the instructions that `decode_dots` has switched on.
        unsafe { decode_dots(streams, base, x, ahead, sums) }
    }

    #[inline(always)]
    fn decode_dots_two(
        self,
        a: &mut Streams<'_, 1>,
        b: &mut Streams<'_, 1>,
        base: &[u8],
        x: [&[u8]; 2],
        ahead: usize,
        sums: [__m512; 2],
    ) -> [__m512; 2] {
        // SAFETY: the token proves the instructions that `decode_dots_two` has switched on.
        unsafe { decode_dots_two(a, b, base, x, ahead, sums) }
    }

    fn finish<const T: usize>(self, streams: &Streams<'_, T>) -> Result<()> {
        match streams.end.checked_sub(streams.at) {
            None => Err(ended()),
            Some(0) => Ok(()),
            Some(left) => Err(unused(left)),
        }
    }

    #[inline(always)]
    fn pack(self, rows: [&[u8]; SIMD_LANES], panel: &mut [Pair], at: usize) {
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
