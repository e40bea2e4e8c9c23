//! The AVX-512 instance (F and BW, on top of FMA and F16C): sixteen lanes are one register.
//! Every method is one or two instructions; nothing else belongs here.

use super::avx2::Avx2;
use super::bits;
use super::lanes;
use crate::vector::bits::BitTask;
use crate::vector::lanes::{Code, LaneBits, Progress};
use crate::vector::packer::Packer;
use crate::vector::simd::{Kernel, SIMD_LANES, Simd};
use std::arch::x86_64::*;

/// Proof that the machine has AVX-512 F and BW, and all that [`Avx2`] asks: made by [`Avx512::detect`] only.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// The instance, where the machine has its instructions.
    pub(crate) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("popcnt");
        has.then_some(Self(()))
    }
}

/// 64 bytes from `from[at..]`; `at + 64 <= N` by the callers' constants.
#[inline(always)]
fn bytes64<const N: usize>(_: Avx512, from: &[u8; N], at: usize) -> __m512i {
    let from = &from[at..at + 64];
    // SAFETY: the slice holds 64 bytes, the load asks no alignment, the token proves AVX-512F.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

/// 32 bytes from `from[at..]`; `at + 32 <= N` by the callers' constants.
#[inline(always)]
fn half_bytes<const N: usize>(_: Avx512, from: &[u8; N], at: usize) -> __m256i {
    let from = &from[at..at + 32];
    // SAFETY: the slice holds 32 bytes, the load asks no alignment, the token proves AVX.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

impl Simd for Avx512 {
    type F = __m512;
    type C = __m512i;
    const NAME: &'static str = "avx512";
    const REGISTERS_4X4: bool = true;

    fn run<K: Kernel>(self, kernel: K) -> K::Out {
        #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
        fn inner<K: Kernel>(s: Avx512, kernel: K) -> K::Out {
            kernel.call(s)
        }
        // SAFETY: the token proves that the machine has the instructions that `inner` switches on.
        unsafe { inner(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, v: f32) -> __m512 {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_set1_ps(v) }
    }

    #[inline(always)]
    fn load(self, from: &[f32; SIMD_LANES]) -> __m512 {
        // SAFETY: the array holds 16 f32, no alignment asked, the token proves AVX-512F.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, v: __m512, to: &mut [f32; SIMD_LANES]) {
        // SAFETY: the array holds 16 f32, no alignment asked, the token proves AVX-512F.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        // SAFETY: the token proves AVX-512F. Lanes 8, 4, 2 and 1 apart are added in turn.
        unsafe {
            let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)));
            let a = _mm256_add_ps(_mm512_castps512_ps256(v), high);
            let b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let c = _mm_add_ps(b, _mm_movehl_ps(b, b));
            _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)))
        }
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u8; 64]) -> (__m512, __m512) {
        let a = bytes64(self, from, 0);
        // SAFETY: the token proves AVX-512F. A bf16 is the upper half of an f32; an even word is the low half
        // of its 32-bit lane, so shift it up; an odd word is there already, so clear the low half.
        unsafe {
            (
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(a)),
                _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32(!0xFFFF))),
            )
        }
    }

    #[inline(always)]
    fn load_f16(self, from: &[u8; 64]) -> (__m512, __m512) {
        let (a, b) = (half_bytes(self, from, 0), half_bytes(self, from, 32));
        // SAFETY: the token proves AVX-512F.
        unsafe { (_mm512_cvtph_ps(a), _mm512_cvtph_ps(b)) }
    }

    #[inline(always)]
    fn load_f32(self, from: &[u8; 128]) -> (__m512, __m512) {
        let (a, b) = (bytes64(self, from, 0), bytes64(self, from, 64));
        // SAFETY: the token proves AVX-512F.
        unsafe { (_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)) }
    }

    #[inline(always)]
    fn widen_bf16(self, from: &[u8; 32]) -> __m512 {
        // SAFETY: the token proves AVX-512F. A bf16 is the upper half of an f32.
        unsafe {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half_bytes(self, from, 0))))
        }
    }

    #[inline(always)]
    fn widen_f16(self, from: &[u8; 32]) -> __m512 {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_cvtph_ps(half_bytes(self, from, 0)) }
    }

    #[inline(always)]
    fn widen_f32(self, from: &[u8; 64]) -> __m512 {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_castsi512_ps(bytes64(self, from, 0)) }
    }

    #[inline(always)]
    fn columns(self) -> __m512i {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    fn add_gaps(self, c: __m512i, gaps: &[u8; SIMD_LANES]) -> __m512i {
        // SAFETY: the array holds 16 bytes, no alignment asked, the token proves AVX-512F.
        unsafe { _mm512_add_epi32(c, _mm512_cvtepu8_epi32(_mm_loadu_si128(gaps.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn load_columns(self, from: &[u8; 32]) -> __m512i {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_cvtepu16_epi32(half_bytes(self, from, 0)) }
    }

    #[inline(always)]
    fn max_columns(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_max_epu32(a, b) }
    }

    #[inline(always)]
    fn store_columns(self, c: __m512i, to: &mut [u32; SIMD_LANES]) {
        // SAFETY: the array holds 16 u32, no alignment asked, the token proves AVX-512F.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), c) }
    }

    #[inline(always)]
    fn gather(self, table: &[f32], c: __m512i) -> __m512 {
        assert!(!table.is_empty() && table.len() <= 1 << 30, "a table of 1 to 2^30 values");
        // SAFETY: every index is clamped, as an unsigned number, to the last of the table's values, of which
        // there is at least one and at most 2^30 (so that the instruction's signed index and its scale do not
        // wrap). The token proves AVX-512F.
        unsafe {
            let last = _mm512_set1_epi32((table.len() - 1) as i32);
            _mm512_i32gather_ps::<4>(_mm512_min_epu32(c, last), table.as_ptr())
        }
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
        lanes::words16(Avx2::from(self), lanes, code, units, words)
    }

    #[inline(always)]
    fn lanes32(self, lanes: &mut LaneBits<u32>, code: Code<'_>, units: &[u8], words: &mut [u32]) -> Progress {
        lanes::words32(Avx2::from(self), lanes, code, units, words)
    }

    fn with_bits<T: BitTask>(self, task: T) -> T::Out {
        bits::with_bits(Avx2::from(self), task)
    }

    fn packer(self) -> Option<impl Packer> {
        Some(Avx2::from(self))
    }
}
