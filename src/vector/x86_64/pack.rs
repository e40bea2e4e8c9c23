//! Packing the bit streams of `exponent` from the last word to the first, and finding what differs, with
//! AVX2: see `vector::encode::exponent` for the idea. The AVX-512 instance uses this code too. Must check
//! nothing but its bounds.

use super::avx2::Avx2;
use super::differ::{differ16, differ32};
use super::lanes::{Widths, active, eight, load, load16, pick, spread, store_half, tables16};
use super::right::{RIGHT, RIGHT16};
use crate::vector::lanes::{Code, STEP};
use crate::vector::packer::{OpenUnit, Packed, Packer, SLACK};
use std::arch::x86_64::*;

/// Bytes below the end that a step may write: its units and the rest of the lowest vector.
const WINDOW16: usize = 2 * STEP + 16;
const WINDOW32: usize = 4 * STEP + 32;
const _: () = assert!(WINDOW16 <= SLACK && WINDOW32 <= SLACK);

/// 32 words of 16 bits.
pub(super) type Step16 = [u8; 2 * STEP];
/// 32 words of 32 bits.
pub(super) type Step32 = [u8; 4 * STEP];

/// A row as whole steps and what is left, which `padded` takes, followed by zeros.
pub(super) fn steps<'a, const N: usize>(row: &'a [u8], padded: &mut [u8; N]) -> (&'a [[u8; N]], usize) {
    let (whole, rest) = row.as_chunks::<N>();
    padded[..rest.len()].copy_from_slice(rest);
    (whole, rest.len())
}

/// Four vectors of a step.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn quarters(step: &Step32) -> [__m256i; 4] {
    let (parts, _) = step.as_chunks::<32>();
    [load(&parts[0]), load(&parts[1]), load(&parts[2]), load(&parts[3])]
}

/// Both vectors of a step.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn halves(step: &Step16) -> [__m256i; 2] {
    let (parts, _) = step.as_chunks::<32>();
    [load(&parts[0]), load(&parts[1])]
}

/// The widths of a step's words, packed (see `lanes::Words16`).
#[target_feature(enable = "avx2")]
#[inline]
fn widths16(widths: Widths, shift: __m128i, base: [__m256i; 2]) -> __m256i {
    let class = |v| _mm256_and_si256(_mm256_srl_epi16(v, shift), _mm256_set1_epi16(31));
    widths.of(_mm256_packus_epi16(class(base[0]), class(base[1])))
}

/// The widths of eight words of 32 bits.
#[target_feature(enable = "avx2")]
#[inline]
fn widths32(widths: Widths, shift: __m128i, base: __m256i) -> __m256i {
    let classes = _mm256_and_si256(_mm256_srl_epi32(base, shift), _mm256_set1_epi32(31));
    // The bytes above a class are given the top bit, so that their width is zero.
    widths.of(_mm256_or_si256(classes, _mm256_set1_epi32(!0xFF)))
}

/// The order of two packed vectors as that of the lanes.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn in_order(packed: __m256i) -> __m256i {
    _mm256_permute4x64_epi64::<0xD8>(packed)
}

/// Which lanes of eight are there in a step's quarters, as 32-bit lanes.
#[target_feature(enable = "avx2")]
#[inline]
fn present(words: usize) -> [__m256i; 4] {
    let mut bytes = [0u8; STEP];
    store_half(active(words), &mut bytes);
    let (bytes, _) = bytes.as_chunks::<8>();
    let quarter = |i: usize| _mm256_cvtepi8_epi32(eight(&bytes[i]));
    [quarter(0), quarter(1), quarter(2), quarter(3)]
}

#[target_feature(enable = "avx2,popcnt")]
fn sums16(code: Code<'_>, base: &[u8], sums: &mut [u16; STEP]) {
    let (widths, shift) = (Widths::new(code.widths), _mm_cvtsi32_si128(code.shift as i32));
    let zero = _mm256_setzero_si256();
    let (parts, _) = sums.as_chunks_mut::<16>();
    let mut sum = [load(&parts[0]), load(&parts[1])];
    let mut add = |w: __m256i| {
        sum[0] = _mm256_add_epi16(sum[0], _mm256_unpacklo_epi8(w, zero));
        sum[1] = _mm256_add_epi16(sum[1], _mm256_unpackhi_epi8(w, zero));
    };
    let mut padded = [0; 2 * STEP];
    let (whole, rest) = steps(base, &mut padded);
    whole.iter().for_each(|step| add(widths16(widths, shift, halves(step))));
    if rest > 0 {
        let there = in_order(active(rest / 2));
        add(_mm256_and_si256(widths16(widths, shift, halves(&padded)), there));
    }
    store_half(sum[0], &mut parts[0]);
    store_half(sum[1], &mut parts[1]);
}

#[target_feature(enable = "avx2,popcnt")]
fn sums32(code: Code<'_>, base: &[u8], sums: &mut [u32; STEP]) {
    let (widths, shift) = (Widths::new(code.widths), _mm_cvtsi32_si128(code.shift as i32));
    let (parts, _) = sums.as_chunks_mut::<8>();
    let mut sum = [load(&parts[0]), load(&parts[1]), load(&parts[2]), load(&parts[3])];
    let mut padded = [0; 4 * STEP];
    let (whole, rest) = steps(base, &mut padded);
    for step in whole {
        for (sum, base) in sum.iter_mut().zip(quarters(step)) {
            *sum = _mm256_add_epi32(*sum, widths32(widths, shift, base));
        }
    }
    if rest > 0 {
        let there = present(rest / 4);
        for ((sum, base), there) in sum.iter_mut().zip(quarters(&padded)).zip(there) {
            *sum = _mm256_add_epi32(*sum, _mm256_and_si256(widths32(widths, shift, base), there));
        }
    }
    sum.into_iter().zip(parts).for_each(|(sum, to)| store_half(sum, to));
}

/// 32 lanes of 16 bits.
struct Pack16 {
    widths: Widths,
    shift: __m128i,
    powers: [__m256i; 2],
    masks: [__m256i; 2],
    bits: [__m256i; 2],
    /// Packed.
    below: __m256i,
    changed: u64,
}

impl Pack16 {
    #[target_feature(enable = "avx2")]
    #[inline]
    fn new(lanes: &OpenUnit<u16>, code: Code<'_>) -> Self {
        let two = |v: &[u16; STEP]| {
            let (parts, _) = v.as_chunks::<16>();
            [load(&parts[0]), load(&parts[1])]
        };
        let below = two(&lanes.below);
        let [powers, _, masks] = tables16();
        Self {
            widths: Widths::new(code.widths),
            shift: _mm_cvtsi32_si128(code.shift as i32),
            powers,
            masks,
            bits: two(&lanes.bits),
            below: _mm256_packus_epi16(below[0], below[1]),
            changed: 0,
        }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn save(&self, lanes: &mut OpenUnit<u16>) {
        let zero = _mm256_setzero_si256();
        let below = [_mm256_unpacklo_epi8(self.below, zero), _mm256_unpackhi_epi8(self.below, zero)];
        self.bits.into_iter().zip(lanes.bits.as_chunks_mut::<16>().0).for_each(|(v, to)| store_half(v, to));
        below.into_iter().zip(lanes.below.as_chunks_mut::<16>().0).for_each(|(v, to)| store_half(v, to));
    }

    /// One step, of which the words of `active` (packed) are there; others are equal. Gives how many units
    /// ended up at the end of `out`, and which words are misfits.
    #[target_feature(enable = "avx2,popcnt")]
    #[inline]
    fn step(
        &mut self,
        base: &Step16,
        tuned: &Step16,
        active: __m256i,
        out: &mut [u8; WINDOW16],
    ) -> (usize, u32) {
        let (base, tuned) = (halves(base), halves(tuned));
        let zero = _mm256_setzero_si256();
        let w = _mm256_and_si256(widths16(self.widths, self.shift, base), active);
        // 0xFF where w = 0: the mask and the half are zero there.
        let last = _mm256_add_epi8(w, _mm256_set1_epi8(-1));
        let (mask, half) = (pick(self.masks, last), pick(self.powers, last));

        // Where each word lies in its unit, and whether the unit is whole with it: it lies lowest, or begins
        // in the unit below (its low bits are what is left then).
        self.below = _mm256_and_si256(_mm256_sub_epi8(self.below, w), _mm256_set1_epi8(15));
        let lowest = _mm256_cmpeq_epi8(self.below, zero);
        let over = _mm256_cmpgt_epi8(_mm256_add_epi8(self.below, w), _mm256_set1_epi8(16));
        let whole = _mm256_or_si256(over, _mm256_and_si256(lowest, _mm256_cmpgt_epi8(w, zero)));
        let takes = _mm256_movemask_epi8(whole) as u32;
        let (whole, lowest, up) = (spread(whole), spread(lowest), pick(self.powers, self.below));

        let (mut fits, mut same, mut units) = ([zero; 2], [zero; 2], [zero; 2]);
        for i in 0..2 {
            let v = _mm256_add_epi16(_mm256_sub_epi16(tuned[i], base[i]), half[i]);
            fits[i] = _mm256_cmpeq_epi16(v, _mm256_and_si256(v, mask[i]));
            // A misfit's bits say that its word is unchanged.
            let kept = _mm256_blendv_epi8(half[i], v, fits[i]);
            same[i] = _mm256_cmpeq_epi16(base[i], tuned[i]);
            // Times a power of two: what stays in the unit, and what goes to the one above.
            let (low, high) = (_mm256_mullo_epi16(kept, up[i]), _mm256_mulhi_epu16(kept, up[i]));
            let ends = _mm256_or_si256(high, _mm256_and_si256(low, lowest[i]));
            units[i] = _mm256_or_si256(self.bits[i], ends);
            self.bits[i] = _mm256_or_si256(
                _mm256_andnot_si256(whole[i], self.bits[i]),
                _mm256_andnot_si256(lowest[i], low),
            );
        }
        let same = _mm256_movemask_epi8(_mm256_packs_epi16(same[0], same[1])) as u32;
        self.changed += u64::from(same.count_zeros());
        let fits = _mm256_packs_epi16(fits[0], fits[1]);
        let mut misfits = !_mm256_movemask_epi8(fits) as u32;
        if misfits != 0 {
            misfits = !_mm256_movemask_epi8(in_order(fits)) as u32;
        }
        (lay16(takes, units, out), misfits)
    }
}

/// Lay the units of the lanes of `takes` (packed) down at the end of `out`, in the order of the lanes. Gives
/// how many.
#[target_feature(enable = "avx2,popcnt")]
#[inline]
fn lay16(takes: u32, units: [__m256i; 2], out: &mut [u8; WINDOW16]) -> usize {
    // Eight lanes: their units, where their bits are, and which bits are those of the lanes after.
    let mut eight = |units: __m128i, at: u32, after: u32| {
        let after = (takes & after).count_ones() as usize;
        let packed = _mm_shuffle_epi8(units, load16(&RIGHT16[(takes >> at & 0xFF) as usize]));
        // SAFETY: the callers name 24 bits at most, so the 16 bytes end 48 bytes or less below the end of 80.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().add(WINDOW16 - 16 - 2 * after).cast(), packed) };
    };
    // From the last on: what a vector writes below its units is overwritten by those before.
    eight(_mm256_extracti128_si256::<1>(units[1]), 24, 0);
    eight(_mm256_castsi256_si128(units[1]), 8, 0xFF00_0000);
    eight(_mm256_extracti128_si256::<1>(units[0]), 16, 0xFF00_FF00);
    eight(_mm256_castsi256_si128(units[0]), 0, 0xFFFF_FF00);
    takes.count_ones() as usize
}

/// 32 lanes of 32 bits, eight to a vector.
struct Pack32 {
    widths: Widths,
    shift: __m128i,
    bits: [__m256i; 4],
    below: [__m256i; 4],
    changed: u64,
}

impl Pack32 {
    #[target_feature(enable = "avx2")]
    #[inline]
    fn new(lanes: &OpenUnit<u32>, code: Code<'_>) -> Self {
        let four = |v: &[u32; STEP]| {
            let (parts, _) = v.as_chunks::<8>();
            [load(&parts[0]), load(&parts[1]), load(&parts[2]), load(&parts[3])]
        };
        Self {
            widths: Widths::new(code.widths),
            shift: _mm_cvtsi32_si128(code.shift as i32),
            bits: four(&lanes.bits),
            below: four(&lanes.below),
            changed: 0,
        }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn save(&self, lanes: &mut OpenUnit<u32>) {
        self.bits.into_iter().zip(lanes.bits.as_chunks_mut::<8>().0).for_each(|(v, to)| store_half(v, to));
        self.below.into_iter().zip(lanes.below.as_chunks_mut::<8>().0).for_each(|(v, to)| store_half(v, to));
    }

    /// As [`Pack16::step`], with a vector of ones in `active` for every lane that is there.
    #[target_feature(enable = "avx2,popcnt")]
    #[inline]
    fn step(
        &mut self,
        base: &Step32,
        tuned: &Step32,
        active: [__m256i; 4],
        out: &mut [u8; WINDOW32],
    ) -> (usize, u32) {
        let (base, tuned) = (quarters(base), quarters(tuned));
        let (zero, one) = (_mm256_setzero_si256(), _mm256_set1_epi32(1));
        let (word, last) = (_mm256_set1_epi32(32), _mm256_set1_epi32(31));
        let lanes = |v| _mm256_movemask_ps(_mm256_castsi256_ps(v)) as u32;
        let (mut taken, mut misfits) = (0, 0);
        for i in (0..4).rev() {
            let w = _mm256_and_si256(widths32(self.widths, self.shift, base[i]), active[i]);
            let mask = _mm256_sub_epi32(_mm256_sllv_epi32(one, w), one);
            let half = _mm256_xor_si256(mask, _mm256_srli_epi32::<1>(mask));
            let below = _mm256_and_si256(_mm256_sub_epi32(self.below[i], w), last);
            let lowest = _mm256_cmpeq_epi32(below, zero);
            let over = _mm256_cmpgt_epi32(_mm256_add_epi32(below, w), word);
            let whole = _mm256_or_si256(over, _mm256_and_si256(lowest, _mm256_cmpgt_epi32(w, zero)));
            let takes = lanes(whole);

            let v = _mm256_add_epi32(_mm256_sub_epi32(tuned[i], base[i]), half);
            let fits = _mm256_cmpeq_epi32(v, _mm256_and_si256(v, mask));
            // A misfit's bits say that its word is unchanged.
            let kept = _mm256_blendv_epi8(half, v, fits);
            misfits |= (lanes(fits) ^ 0xFF) << (8 * i);
            self.changed += u64::from((lanes(_mm256_cmpeq_epi32(base[i], tuned[i])) ^ 0xFF).count_ones());
            let low = _mm256_sllv_epi32(kept, below);
            // A shift by 32 gives zero.
            let high = _mm256_srlv_epi32(kept, _mm256_sub_epi32(word, below));
            let ends = _mm256_or_si256(high, _mm256_and_si256(low, lowest));
            let units = _mm256_or_si256(self.bits[i], ends);
            self.bits[i] =
                _mm256_or_si256(_mm256_andnot_si256(whole, self.bits[i]), _mm256_andnot_si256(lowest, low));
            self.below[i] = below;

            let places = _mm256_cvtepu8_epi32(eight(&RIGHT[(takes & 0xFF) as usize]));
            let packed = _mm256_permutevar8x32_epi32(units, places);
            // SAFETY: the lanes after took at most eight units per vector, 24 in all, so the 32 bytes end 96
            // bytes or less below the end of 160.
            unsafe { _mm256_storeu_si256(out.as_mut_ptr().add(WINDOW32 - 32 - 4 * taken).cast(), packed) };
            taken += takes.count_ones() as usize;
        }
        (taken, misfits)
    }
}

/// The columns of a step's misfits, descending.
#[cold]
fn list(step: usize, mut misfits: u32, columns: &mut Vec<u16>) {
    while misfits != 0 {
        let lane = 31 - misfits.leading_zeros();
        misfits ^= 1 << lane;
        columns.push((step * STEP) as u16 + lane as u16);
    }
}

/// The two word sizes' rows differ in types only.
macro_rules! rows {
    ($($name:ident: $word:ty, $pack:ident, $bytes:literal, $window:ident, |$words:ident| $active:expr;)*) => {$(
        #[target_feature(enable = "avx2,popcnt")]
        fn $name(
            lanes: &mut OpenUnit<$word>,
            code: Code<'_>,
            (base, tuned): (&[u8], &[u8]),
            out: &mut [u8],
            columns: &mut Vec<u16>,
        ) -> Packed {
            let mut now = $pack::new(lanes, code);
            let mut padded = [[0; $bytes * STEP]; 2];
            let [left, right] = &mut padded;
            let (base, rest) = steps(base, left);
            let (tuned, _) = steps(tuned, right);
            let mut end = out.len();
            let mut step = |i: usize, base: &_, tuned: &_, active: _| {
                let Some(window) = out[..end].last_chunk_mut::<$window>() else { return false };
                let (taken, misfits) = now.step(base, tuned, active, window);
                end -= $bytes * taken;
                if misfits != 0 {
                    list(i, misfits, columns);
                }
                true
            };
            let mut whole = true;
            if rest > 0 {
                let $words = rest / $bytes;
                whole = step(base.len(), left, right, $active);
            }
            let $words = STEP;
            let all = $active;
            let mut steps = base.iter().zip(tuned).enumerate().rev();
            whole = whole && steps.all(|(i, (base, tuned))| step(i, base, tuned, all));
            now.save(lanes);
            Packed { bytes: out.len() - end, changed: now.changed, cut: !whole }
        }
    )*};
}

rows! {
    row16: u16, Pack16, 2, WINDOW16, |words| in_order(active(words));
    row32: u32, Pack32, 4, WINDOW32, |words| present(words);
}

impl Packer for Avx2 {
    fn sums16(self, code: Code<'_>, base: &[u8], sums: &mut [u16; STEP]) {
        // SAFETY: the token proves AVX2 and POPCNT.
        unsafe { sums16(code, base, sums) }
    }

    fn sums32(self, code: Code<'_>, base: &[u8], sums: &mut [u32; STEP]) {
        // SAFETY: the token proves AVX2 and POPCNT.
        unsafe { sums32(code, base, sums) }
    }

    fn pack16(
        self,
        lanes: &mut OpenUnit<u16>,
        code: Code<'_>,
        base: &[u8],
        fine_tuned: &[u8],
        out: &mut [u8],
        misfits: &mut Vec<u16>,
    ) -> Packed {
        // SAFETY: the token proves AVX2 and POPCNT.
        unsafe { row16(lanes, code, (base, fine_tuned), out, misfits) }
    }

    fn pack32(
        self,
        lanes: &mut OpenUnit<u32>,
        code: Code<'_>,
        base: &[u8],
        fine_tuned: &[u8],
        out: &mut [u8],
        misfits: &mut Vec<u16>,
    ) -> Packed {
        // SAFETY: the token proves AVX2 and POPCNT.
        unsafe { row32(lanes, code, (base, fine_tuned), out, misfits) }
    }

    fn differ16(self, base: &[u8], fine_tuned: &[u8], masks: &mut Vec<u32>) {
        // SAFETY: the token proves AVX2.
        unsafe { differ16(base, fine_tuned, masks) }
    }

    fn differ32(self, base: &[u8], fine_tuned: &[u8], masks: &mut Vec<u32>) {
        // SAFETY: the token proves AVX2.
        unsafe { differ32(base, fine_tuned, masks) }
    }
}
