//! The bit streams of `exponent` with AVX2: see `vector::lanes` for what they are and `portable` there for
//! their meaning. The AVX-512 instance uses this code too. Must not check what `vector::lanes` checks.

use super::avx2::Avx2;
use crate::codec::exponent::CLASSES;
use crate::vector::lanes::{Code, LaneBits, Progress, STEP};
use std::arch::x86_64::*;

/// Row `m` gives lane `l` of eight the rank of bit `l` among the bits of `m`: which unit the lane takes.
static RANKS: [[u8; 8]; 256] = {
    let mut rows = [[0; 8]; 256];
    let mut m = 0;
    while m < 256 {
        let (mut lane, mut rank) = (0, 0);
        while lane < 8 {
            rows[m][lane] = rank;
            rank += (m >> lane & 1) as u8;
            lane += 1;
        }
        m += 1;
    }
    rows
};

/// The same as a shuffle of the bytes of eight 16-bit units; lanes that take none get zero.
static UNITS: [[u8; 16]; 256] = {
    let mut rows = [[0x80; 16]; 256];
    let mut m = 0;
    while m < 256 {
        let mut lane = 0;
        while lane < 8 {
            if m >> lane & 1 == 1 {
                rows[m][2 * lane] = 2 * RANKS[m][lane];
                rows[m][2 * lane + 1] = 2 * RANKS[m][lane] + 1;
            }
            lane += 1;
        }
        m += 1;
    }
    rows
};

/// `STEP` bytes of ones, then as many zeros: from `STEP - n` on they say which lanes of a step of `n` words
/// are there.
static ACTIVE: [u8; 2 * STEP] = {
    let mut bytes = [0; 2 * STEP];
    let mut i = 0;
    while i < STEP {
        bytes[i] = 0xFF;
        i += 1;
    }
    bytes
};

/// Sixteen 16-bit values as two shuffle tables: low bytes, high bytes.
const fn table(values: [u16; 16]) -> [[u8; 16]; 2] {
    let mut bytes = [[0; 16]; 2];
    let mut i = 0;
    while i < 16 {
        [bytes[0][i], bytes[1][i]] = values[i].to_le_bytes();
        i += 1;
    }
    bytes
}

/// `2^i`, `2^(15 - i)`, `2^(i + 1) - 1`.
static TABLES: [[[u8; 16]; 2]; 3] = {
    let mut values = [[0u16; 16]; 3];
    let mut i = 0;
    while i < 16 {
        values[0][i] = 1 << i;
        values[1][i] = 1 << (15 - i);
        values[2][i] = 0xFFFF >> (15 - i);
        i += 1;
    }
    [table(values[0]), table(values[1]), table(values[2])]
};

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn load<T: bytemuck::Pod, const N: usize>(from: &[T; N]) -> __m256i {
    const { assert!(size_of::<[T; N]>() >= 32) };
    // SAFETY: the array holds at least 32 bytes of plain data, the load asks no alignment.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn store_half<T: bytemuck::Pod, const N: usize>(v: __m256i, to: &mut [T; N]) {
    const { assert!(size_of::<[T; N]>() >= 32) };
    // SAFETY: the array takes at least 32 bytes, any bytes are a T, the store asks no alignment.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), v) }
}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn load16(from: &[u8; 16]) -> __m128i {
    // SAFETY: the array holds the 16 bytes, the load asks no alignment.
    unsafe { _mm_loadu_si128(from.as_ptr().cast()) }
}

/// Sixteen bytes in both halves.
#[target_feature(enable = "avx2")]
#[inline]
fn twice(from: &[u8; 16]) -> __m256i {
    _mm256_broadcastsi128_si256(load16(from))
}

/// Which lanes of a step of `words` words are there, a byte each.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn active(words: usize) -> __m256i {
    let from = STEP - words.min(STEP);
    // SAFETY: `from <= 32`, so the 32 bytes from there on are within the array's 64.
    unsafe { _mm256_loadu_si256(ACTIVE.as_ptr().add(from).cast()) }
}

/// The widths table, looked up by a shuffle of each half.
#[derive(Clone, Copy)]
pub(super) struct Widths {
    low: __m256i,
    high: __m256i,
}

impl Widths {
    #[target_feature(enable = "avx2")]
    #[inline]
    pub(super) fn new(widths: &[u8; CLASSES]) -> Self {
        let both = load(widths);
        Self {
            low: _mm256_permute2x128_si256::<0x00>(both, both),
            high: _mm256_permute2x128_si256::<0x11>(both, both),
        }
    }

    /// Widths of classes, a byte each; a class with its top bit set gets zero. A shuffle gives zero where the
    /// index has its top bit: so the low half sees 16 and above, and the high half what is below 16.
    #[target_feature(enable = "avx2")]
    #[inline]
    pub(super) fn of(self, classes: __m256i) -> __m256i {
        let low = _mm256_shuffle_epi8(self.low, _mm256_adds_epu8(classes, _mm256_set1_epi8(0x70)));
        let high = _mm256_shuffle_epi8(self.high, _mm256_sub_epi8(classes, _mm256_set1_epi8(16)));
        _mm256_or_si256(low, high)
    }
}

/// [`table`]'s values at 32 packed indices, as two vectors of 16-bit lanes; zero for an index of 0xFF.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn pick(table: [__m256i; 2], at: __m256i) -> [__m256i; 2] {
    let (low, high) = (_mm256_shuffle_epi8(table[0], at), _mm256_shuffle_epi8(table[1], at));
    [_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)]
}

/// [`TABLES`] as [`pick`] takes them.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn tables16() -> [[__m256i; 2]; 3] {
    let both = |t: usize| [twice(&TABLES[t][0]), twice(&TABLES[t][1])];
    [both(0), both(1), both(2)]
}

/// A byte per lane as two vectors of 16-bit lanes, the byte in both halves.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn spread(bytes: __m256i) -> [__m256i; 2] {
    [_mm256_unpacklo_epi8(bytes, bytes), _mm256_unpackhi_epi8(bytes, bytes)]
}

/// The units that 32 lanes take, handed out in the order of the lanes, and how many: the bits of `takes` are
/// packed.
#[target_feature(enable = "avx2,popcnt")]
#[inline]
fn units16(takes: u32, from: &[u8; 2 * STEP]) -> ([__m256i; 2], usize) {
    // Eight lanes: where their bits are, and which bits are those of the lanes before.
    let eight = |at: u32, before: u32| {
        let before = (takes & before).count_ones() as usize;
        // SAFETY: the callers name 24 bits at most, so the 16 bytes from 48 on at most are within the 64.
        let units = unsafe { _mm_loadu_si128(from.as_ptr().add(2 * before).cast()) };
        _mm_shuffle_epi8(units, load16(&UNITS[(takes >> at & 0xFF) as usize]))
    };
    let low = _mm256_set_m128i(eight(16, 0xFF), eight(0, 0));
    let high = _mm256_set_m128i(eight(24, 0xFF_FFFF), eight(8, 0xFF_00FF));
    ([low, high], takes.count_ones() as usize)
}

/// 32 lanes of 16 bits. Variable shifts are products with powers of two, which shuffles look up. What is a
/// byte per lane is *packed*: the order of two vectors after a pack, which an unpack takes back (lanes 0-7,
/// 16-23, 8-15, 24-31).
struct Words16 {
    widths: Widths,
    shift: __m128i,
    powers: [__m256i; 2],
    falling: [__m256i; 2],
    masks: [__m256i; 2],
    bits: [__m256i; 2],
    held: __m256i,
}

impl Words16 {
    #[target_feature(enable = "avx2")]
    #[inline]
    fn new(lanes: &LaneBits<u16>, code: Code<'_>) -> Self {
        let [powers, falling, masks] = tables16();
        let halves = |v: &[u16; STEP]| {
            let (halves, _) = v.as_chunks::<16>();
            [load(&halves[0]), load(&halves[1])]
        };
        let held = halves(&lanes.held);
        Self {
            widths: Widths::new(code.widths),
            shift: _mm_cvtsi32_si128(code.shift as i32),
            powers,
            falling,
            masks,
            bits: halves(&lanes.bits),
            held: _mm256_packus_epi16(held[0], held[1]),
        }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn save(&self, lanes: &mut LaneBits<u16>) {
        let zero = _mm256_setzero_si256();
        let held = [_mm256_unpacklo_epi8(self.held, zero), _mm256_unpackhi_epi8(self.held, zero)];
        for (v, to) in self.bits.into_iter().zip(lanes.bits.as_chunks_mut::<16>().0) {
            store_half(v, to);
        }
        for (v, to) in held.into_iter().zip(lanes.held.as_chunks_mut::<16>().0) {
            store_half(v, to);
        }
    }

    /// One step of 32 words, of which those of `active` (packed) are there. Gives the units taken.
    #[target_feature(enable = "avx2,popcnt")]
    #[inline]
    fn step(&mut self, words: &mut [u16; STEP], active: __m256i, units: &[u8; 2 * STEP]) -> usize {
        let (halves, _) = words.as_chunks_mut::<16>();
        let base = [load(&halves[0]), load(&halves[1])];
        let class = |v| _mm256_and_si256(_mm256_srl_epi16(v, self.shift), _mm256_set1_epi16(31));
        let classes = _mm256_packus_epi16(class(base[0]), class(base[1]));
        let w = _mm256_and_si256(self.widths.of(classes), active);

        let needs = _mm256_cmpgt_epi8(w, self.held);
        let takes = _mm256_movemask_epi8(needs) as u32;
        let (unit, taken) = units16(takes, units);

        // 0xFF where w = 0: nothing is taken, masked or shifted there.
        let last = _mm256_add_epi8(w, _mm256_set1_epi8(-1));
        let (mask, half) = (pick(self.masks, last), pick(self.powers, last));
        let up = pick(self.powers, self.held);
        // How far what goes on is shifted down: a fresh unit by the bits that old ones did not give.
        let down = _mm256_sub_epi8(w, _mm256_and_si256(needs, self.held));
        let down = pick(self.falling, _mm256_add_epi8(down, _mm256_set1_epi8(-1)));
        let (fresh, idle) = (spread(needs), spread(last));
        for i in 0..2 {
            let low = _mm256_or_si256(self.bits[i], _mm256_mullo_epi16(unit[i], up[i]));
            let difference = _mm256_sub_epi16(_mm256_and_si256(low, mask[i]), half[i]);
            store_half(_mm256_add_epi16(base[i], difference), &mut halves[i]);
            let rest = _mm256_or_si256(unit[i], _mm256_andnot_si256(fresh[i], self.bits[i]));
            let rest = _mm256_mulhi_epu16(rest, down[i]);
            self.bits[i] = _mm256_blendv_epi8(rest, self.bits[i], idle[i]);
        }
        let refill = _mm256_and_si256(needs, _mm256_set1_epi8(16));
        self.held = _mm256_sub_epi8(_mm256_add_epi8(self.held, refill), w);
        taken
    }
}

/// 32 lanes of 32 bits, eight to a vector.
struct Words32 {
    widths: Widths,
    shift: __m128i,
    bits: [__m256i; 4],
    held: [__m256i; 4],
}

impl Words32 {
    #[target_feature(enable = "avx2")]
    #[inline]
    fn new(lanes: &LaneBits<u32>, code: Code<'_>) -> Self {
        let quarters = |v: &[u32; STEP]| {
            let (v, _) = v.as_chunks::<8>();
            [load(&v[0]), load(&v[1]), load(&v[2]), load(&v[3])]
        };
        Self {
            widths: Widths::new(code.widths),
            shift: _mm_cvtsi32_si128(code.shift as i32),
            bits: quarters(&lanes.bits),
            held: quarters(&lanes.held),
        }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn save(&self, lanes: &mut LaneBits<u32>) {
        for (v, to) in self.bits.into_iter().zip(lanes.bits.as_chunks_mut::<8>().0) {
            store_half(v, to);
        }
        for (v, to) in self.held.into_iter().zip(lanes.held.as_chunks_mut::<8>().0) {
            store_half(v, to);
        }
    }

    /// One step of 32 words, of which those of `active` (a byte each, in order) are there. Gives the units
    /// taken.
    #[target_feature(enable = "avx2,popcnt")]
    #[inline]
    fn step(&mut self, words: &mut [u32; STEP], active: __m256i, units: &[u8; 4 * STEP]) -> usize {
        let (quarters, _) = words.as_chunks_mut::<8>();
        let (one, class) = (_mm256_set1_epi32(1), _mm256_set1_epi32(31));
        let mut present = [0u8; STEP];
        store_half(active, &mut present);
        let (present, _) = present.as_chunks::<8>();
        let mut taken = 0;
        for i in 0..4 {
            let base = load(&quarters[i]);
            let classes = _mm256_and_si256(_mm256_srl_epi32(base, self.shift), class);
            // The bytes above a class are given the top bit, so that their width is zero.
            let w = self.widths.of(_mm256_or_si256(classes, _mm256_set1_epi32(!0xFF)));
            let w = _mm256_and_si256(w, _mm256_cvtepi8_epi32(eight(&present[i])));
            let (bits, held) = (self.bits[i], self.held[i]);

            let needs = _mm256_cmpgt_epi32(w, held);
            let takes = _mm256_movemask_ps(_mm256_castsi256_ps(needs)) as u32;
            let ranks = _mm256_cvtepu8_epi32(eight(&RANKS[(takes & 0xFF) as usize]));
            // SAFETY: the lanes before took at most eight units per vector, 24 in all, so the 32 bytes from
            // 96 on at most are within the 128.
            let from = unsafe { _mm256_loadu_si256(units.as_ptr().add(4 * taken).cast()) };
            let unit = _mm256_and_si256(_mm256_permutevar8x32_epi32(from, ranks), needs);
            taken += takes.count_ones() as usize;

            let low = _mm256_or_si256(bits, _mm256_sllv_epi32(unit, held));
            let mask = _mm256_sub_epi32(_mm256_sllv_epi32(one, w), one);
            let half = _mm256_xor_si256(mask, _mm256_srli_epi32::<1>(mask));
            let difference = _mm256_sub_epi32(_mm256_and_si256(low, mask), half);
            store_half(_mm256_add_epi32(base, difference), &mut quarters[i]);
            // A fresh unit goes on without the bits that old ones did not give.
            let rest = _mm256_or_si256(unit, _mm256_andnot_si256(needs, bits));
            let down = _mm256_sub_epi32(w, _mm256_and_si256(needs, held));
            self.bits[i] = _mm256_srlv_epi32(rest, down);
            let refill = _mm256_and_si256(needs, _mm256_set1_epi32(32));
            self.held[i] = _mm256_sub_epi32(_mm256_add_epi32(held, refill), w);
        }
        taken
    }
}

/// Eight bytes, in the low half.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn eight(from: &[u8; 8]) -> __m128i {
    _mm_cvtsi64_si128(i64::from_le_bytes(*from))
}

/// The two word sizes' runs of steps differ in types only.
macro_rules! runs {
    ($($name:ident, $inner:ident: $word:ty, $lanes:ident, $bytes:literal, |$active:ident| $order:expr;)*) => {$(
        /// [`crate::vector::lanes::Lane::steps`].
        pub(super) fn $name(
            _: Avx2,
            lanes: &mut LaneBits<$word>,
            code: Code<'_>,
            units: &[u8],
            words: &mut [$word],
        ) -> Progress {
            // SAFETY: the token proves AVX2 and POPCNT.
            unsafe { $inner(lanes, code, units, words) }
        }

        #[target_feature(enable = "avx2,popcnt")]
        fn $inner(lanes: &mut LaneBits<$word>, code: Code<'_>, units: &[u8], words: &mut [$word]) -> Progress {
            let mut now = $lanes::new(lanes, code);
            let mut done = Progress { words: 0, bytes: 0 };
            let (steps, rest) = words.as_chunks_mut::<STEP>();
            let all = active(STEP);
            let mut ended = false;
            for step in steps {
                let Some(units) = units.get(done.bytes..).and_then(|u| u.first_chunk()) else {
                    ended = true;
                    break;
                };
                done.bytes += $bytes * now.step(step, all, units);
                done.words += STEP;
            }
            let units = units.get(done.bytes..).and_then(|u| u.first_chunk());
            if let Some(units) = units.filter(|_| !ended && !rest.is_empty()) {
                let mut step = [0; STEP];
                step[..rest.len()].copy_from_slice(rest);
                let $active = active(rest.len());
                done.bytes += $bytes * now.step(&mut step, $order, units);
                done.words += rest.len();
                rest.copy_from_slice(&step[..rest.len()]);
            }
            now.save(lanes);
            done
        }
    )*};
}

runs! {
    words16, inner16: u16, Words16, 2, |a| _mm256_permute4x64_epi64::<0xD8>(a);
    words32, inner32: u32, Words32, 4, |a| a;
}
