//! The AVX2 instance (with FMA, F16C and POPCNT): sixteen lanes in two 256-bit registers, low lanes first.
//! Every method is one or two instructions per register; nothing else belongs here.

use super::bits;
use super::lanes;
use crate::vector::bits::BitTask;
use crate::vector::lanes::{Code, LaneBits, Progress};
use crate::vector::packer::Packer;
use crate::vector::simd::{Kernel, SIMD_LANES, Simd};
use std::arch::x86_64::*;

/// Proof that the machine has AVX2, FMA, F16C and POPCNT: made by [`Avx2::detect`] and from the AVX-512 proof
/// only.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The instance, where the machine has its instructions.
    pub(crate) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("popcnt");
        has.then_some(Self(()))
    }
}

impl From<super::avx512::Avx512> for Avx2 {
    /// That proof was made where all that this one asks was found too.
    fn from(_: super::avx512::Avx512) -> Self {
        Self(())
    }
}

/// Sixteen f32, low lanes first.
#[derive(Clone, Copy)]
pub(crate) struct F(__m256, __m256);

/// Sixteen u32, low lanes first.
#[derive(Clone, Copy)]
pub(crate) struct C(__m256i, __m256i);

/// 32 bytes from `from[at..]`; `at + 32 <= N` by the callers' constants.
#[inline(always)]
fn bytes32<const N: usize>(_: Avx2, from: &[u8; N], at: usize) -> __m256i {
    let from = &from[at..at + 32];
    // SAFETY: the slice holds 32 bytes, the load asks no alignment, the token proves AVX.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

/// 16 bytes from `from[at..]`; `at + 16 <= N` by the callers' constants.
#[inline(always)]
fn bytes16<const N: usize>(_: Avx2, from: &[u8; N], at: usize) -> __m128i {
    let from = &from[at..at + 16];
    // SAFETY: the slice holds 16 bytes, the load asks no alignment, SSE2 is part of x86-64.
    unsafe { _mm_loadu_si128(from.as_ptr().cast()) }
}

/// Eight bf16 words at `from[at..]` as f32.
#[inline(always)]
fn bf16x8<const N: usize>(s: Avx2, from: &[u8; N], at: usize) -> __m256 {
    let words = bytes16(s, from, at);
    // SAFETY: the token proves AVX2. A bf16 is the upper half of an f32.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words))) }
}

/// Eight f16 words at `from[at..]` as f32.
#[inline(always)]
fn f16x8<const N: usize>(s: Avx2, from: &[u8; N], at: usize) -> __m256 {
    let words = bytes16(s, from, at);
    // SAFETY: the token proves F16C.
    unsafe { _mm256_cvtph_ps(words) }
}

/// Eight f32 words at `from[at..]`.
#[inline(always)]
fn f32x8<const N: usize>(s: Avx2, from: &[u8; N], at: usize) -> __m256 {
    let words = bytes32(s, from, at);
    // SAFETY: the token proves AVX.
    unsafe { _mm256_castsi256_ps(words) }
}

/// Eight little-endian u16 at `from[at..]`.
#[inline(always)]
fn u16x8<const N: usize>(s: Avx2, from: &[u8; N], at: usize) -> __m256i {
    let words = bytes16(s, from, at);
    // SAFETY: the token proves AVX2.
    unsafe { _mm256_cvtepu16_epi32(words) }
}

/// `table[at[from..from + 8]]`. Plain loads: on Zen the gather instruction takes more steps than they do, and
/// on Intel its mitigations make it slow.
///
/// # Safety
/// Every index is less than the table's length.
#[inline(always)]
unsafe fn picked(_: Avx2, table: &[f32], at: &[u32; SIMD_LANES], from: usize) -> __m256 {
    let (p, at) = (table.as_ptr(), &at[from..from + 8]);
    // SAFETY: the caller's promise for the loads; the token proves AVX.
    unsafe {
        _mm256_setr_ps(
            *p.add(at[0] as usize),
            *p.add(at[1] as usize),
            *p.add(at[2] as usize),
            *p.add(at[3] as usize),
            *p.add(at[4] as usize),
            *p.add(at[5] as usize),
            *p.add(at[6] as usize),
            *p.add(at[7] as usize),
        )
    }
}

/// Two vectors' lanes 8 apart added, then 4 apart: the first's four sums, then the second's.
#[inline(always)]
fn fours(_: Avx2, a: F, b: F) -> __m256 {
    // SAFETY: the token proves AVX.
    unsafe {
        let (a, b) = (_mm256_add_ps(a.0, a.1), _mm256_add_ps(b.0, b.1));
        _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b))
    }
}

impl Simd for Avx2 {
    type F = F;
    type C = C;
    const NAME: &'static str = "avx2";
    const REGISTERS_4X4: bool = false;

    fn run<K: Kernel>(self, kernel: K) -> K::Out {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn inner<K: Kernel>(s: Avx2, kernel: K) -> K::Out {
            kernel.call(s)
        }
        // SAFETY: the token proves that the machine has the instructions that `inner` switches on.
        unsafe { inner(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, v: f32) -> F {
        // SAFETY: the token proves AVX.
        let v = unsafe { _mm256_set1_ps(v) };
        F(v, v)
    }

    #[inline(always)]
    fn load(self, from: &[f32; SIMD_LANES]) -> F {
        let p = from.as_ptr();
        // SAFETY: the array holds 16 f32 (8 at 0, 8 at 8), no alignment asked, the token proves AVX.
        unsafe { F(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }

    #[inline(always)]
    fn store(self, v: F, to: &mut [f32; SIMD_LANES]) {
        let p = to.as_mut_ptr();
        // SAFETY: the array holds 16 f32 (8 at 0, 8 at 8), no alignment asked, the token proves AVX.
        unsafe {
            _mm256_storeu_ps(p, v.0);
            _mm256_storeu_ps(p.add(8), v.1);
        }
    }

    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        // SAFETY: the token proves FMA.
        unsafe { F(_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
    }

    #[inline(always)]
    fn sum(self, v: F) -> f32 {
        // SAFETY: the token proves AVX. Lanes 8, 4, 2 and 1 apart are added in turn.
        unsafe {
            let a = _mm256_add_ps(v.0, v.1);
            let b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let c = _mm_add_ps(b, _mm_movehl_ps(b, b));
            _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)))
        }
    }

    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [F; 4]) -> [f32; 4] {
        let mut out = [0.0; 4];
        let (ab, cd) = (fours(self, a, b), fours(self, c, d));
        // SAFETY: the token proves AVX; the array takes the four f32 stored. Lanes 2 apart are added with all
        // four vectors side by side, then 1 apart.
        unsafe {
            let two = _mm256_add_ps(_mm256_shuffle_ps::<0x44>(ab, cd), _mm256_shuffle_ps::<0xEE>(ab, cd));
            let one = _mm256_add_ps(two, _mm256_movehdup_ps(two));
            // Even lanes hold a, c | b, d.
            let (low, high) = (_mm256_castps256_ps128(one), _mm256_extractf128_ps::<1>(one));
            let acbd = _mm_shuffle_ps::<0x88>(low, high);
            _mm_storeu_ps(out.as_mut_ptr(), _mm_shuffle_ps::<0xD8>(acbd, acbd));
        }
        out
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u8; 64]) -> (F, F) {
        let (a, b) = (bytes32(self, from, 0), bytes32(self, from, 32));
        // SAFETY: the token proves AVX2. A bf16 is the upper half of an f32; an even word is the low half of
        // its 32-bit lane, so shift it up; an odd word is there already, so clear the low half.
        unsafe {
            let high = _mm256_set1_epi32(!0xFFFF);
            (
                F(
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b)),
                ),
                F(
                    _mm256_castsi256_ps(_mm256_and_si256(a, high)),
                    _mm256_castsi256_ps(_mm256_and_si256(b, high)),
                ),
            )
        }
    }

    #[inline(always)]
    fn load_f16(self, from: &[u8; 64]) -> (F, F) {
        (F(f16x8(self, from, 0), f16x8(self, from, 16)), F(f16x8(self, from, 32), f16x8(self, from, 48)))
    }

    #[inline(always)]
    fn load_f32(self, from: &[u8; 128]) -> (F, F) {
        (F(f32x8(self, from, 0), f32x8(self, from, 32)), F(f32x8(self, from, 64), f32x8(self, from, 96)))
    }

    #[inline(always)]
    fn widen_bf16(self, from: &[u8; 32]) -> F {
        F(bf16x8(self, from, 0), bf16x8(self, from, 16))
    }

    #[inline(always)]
    fn widen_f16(self, from: &[u8; 32]) -> F {
        F(f16x8(self, from, 0), f16x8(self, from, 16))
    }

    #[inline(always)]
    fn widen_f32(self, from: &[u8; 64]) -> F {
        F(f32x8(self, from, 0), f32x8(self, from, 32))
    }

    #[inline(always)]
    fn columns(self) -> C {
        // SAFETY: the token proves AVX.
        let z = unsafe { _mm256_setzero_si256() };
        C(z, z)
    }

    #[inline(always)]
    fn add_gaps(self, c: C, gaps: &[u8; SIMD_LANES]) -> C {
        let g = bytes16(self, gaps, 0);
        // SAFETY: the token proves AVX2.
        unsafe {
            C(
                _mm256_add_epi32(c.0, _mm256_cvtepu8_epi32(g)),
                _mm256_add_epi32(c.1, _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(g))),
            )
        }
    }

    #[inline(always)]
    fn load_columns(self, from: &[u8; 32]) -> C {
        C(u16x8(self, from, 0), u16x8(self, from, 16))
    }

    #[inline(always)]
    fn max_columns(self, a: C, b: C) -> C {
        // SAFETY: the token proves AVX2.
        unsafe { C(_mm256_max_epu32(a.0, b.0), _mm256_max_epu32(a.1, b.1)) }
    }

    #[inline(always)]
    fn store_columns(self, c: C, to: &mut [u32; SIMD_LANES]) {
        let p = to.as_mut_ptr();
        // SAFETY: the array holds 16 u32 (8 at 0, 8 at 8), no alignment asked, the token proves AVX.
        unsafe {
            _mm256_storeu_si256(p.cast(), c.0);
            _mm256_storeu_si256(p.add(8).cast(), c.1);
        }
    }

    #[inline(always)]
    fn gather(self, table: &[f32], c: C) -> F {
        assert!(!table.is_empty() && table.len() <= 1 << 30, "a table of 1 to 2^30 values");
        let mut at = [0; SIMD_LANES];
        // SAFETY: the token proves AVX2.
        let clamped = unsafe {
            let last = _mm256_set1_epi32((table.len() - 1) as i32);
            C(_mm256_min_epu32(c.0, last), _mm256_min_epu32(c.1, last))
        };
        self.store_columns(clamped, &mut at);
        // SAFETY: every index was clamped, as an unsigned number, to the last of the table's at least one
        // values.
        unsafe { F(picked(self, table, &at, 0), picked(self, table, &at, 8)) }
    }

    #[inline(always)]
    fn prefetch(self, bytes: &[u8], at: usize) {
        // SAFETY: a prefetch never faults, whatever the address, and `wrapping_add` computes any.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(at).cast()) }
    }

    #[inline(always)]
    fn prefetch_far(self, bytes: &[u8], at: usize) {
        // SAFETY: a prefetch never faults, whatever the address, and `wrapping_add` computes any.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(bytes.as_ptr().wrapping_add(at).cast()) }
    }

    #[inline(always)]
    fn lanes16(self, lanes: &mut LaneBits<u16>, code: Code<'_>, units: &[u8], words: &mut [u16]) -> Progress {
        lanes::words16(self, lanes, code, units, words)
    }

    #[inline(always)]
    fn lanes32(self, lanes: &mut LaneBits<u32>, code: Code<'_>, units: &[u8], words: &mut [u32]) -> Progress {
        lanes::words32(self, lanes, code, units, words)
    }

    fn with_bits<T: BitTask>(self, task: T) -> T::Out {
        bits::with_bits(self, task)
    }

    fn packer(self) -> Option<impl Packer> {
        Some(self)
    }
}
