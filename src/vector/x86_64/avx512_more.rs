//! AVX-512 with more of its extensions: the same sixteen lanes as [`Avx512`], the same bits, and what the
//! extensions are for. Must hold no intrinsic.

use super::avx2::Avx2;
use super::avx512::Avx512;
use super::bits;
use super::lanes512::{self, From};
use super::lanes512_four_byte;
use crate::vector::bf16dot::Bf16Task;
use crate::vector::bits::BitTask;
use crate::vector::lanes::{Code, LaneBits, Progress};
use crate::vector::packer::Packer;
use crate::vector::simd::{GROUP, Kernel, SIMD_LANES, Simd};
use std::arch::x86_64::{__m512, __m512i};

/// Proof that the machine has VBMI2 and all that [`Avx512`] asks (Ice Lake, Zen 4 and newer).
#[derive(Clone, Copy)]
pub(crate) struct Avx512Vbmi2(Avx512);

/// Proof that the machine has the bf16 dot product and all that [`Avx512Vbmi2`] asks (Sapphire Rapids, Zen 4
/// and newer).
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bf16(Avx512Vbmi2);

impl Avx512Vbmi2 {
    /// The instance, where the machine has its instructions.
    pub(crate) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512vbmi2")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("avx512vl");
        Avx512::detect().filter(|_| has).map(Self)
    }
}

impl Avx512Bf16 {
    /// The instance, where the machine has its instructions.
    pub(crate) fn detect() -> Option<Self> {
        Avx512Vbmi2::detect().filter(|_| is_x86_feature_detected!("avx512bf16")).map(Self)
    }
}

impl std::convert::From<Avx512Bf16> for Avx512Vbmi2 {
    fn from(s: Avx512Bf16) -> Self {
        s.0
    }
}

impl std::convert::From<Avx512Vbmi2> for Avx512 {
    #[inline(always)]
    fn from(s: Avx512Vbmi2) -> Self {
        s.0
    }
}

impl std::convert::From<Avx512Bf16> for Avx512 {
    #[inline(always)]
    fn from(s: Avx512Bf16) -> Self {
        s.0.0
    }
}

/// An instance whose vectors are those of [`Avx512`], with other instructions switched on around kernels.
macro_rules! instance {
    ($name:ident, $called:literal, $features:literal, { $($more:item)* }) => {
        impl Simd for $name {
            type F = __m512;
            type C = __m512i;
            const NAME: &'static str = $called;
            const REGISTERS_4X4: bool = true;

            fn run<K: Kernel>(self, kernel: K) -> K::Out {
                #[target_feature(enable = $features)]
                fn inner<K: Kernel>(s: $name, kernel: K) -> K::Out {
                    kernel.call(s)
                }
                // SAFETY: the token proves that the machine has the instructions that `inner` switches on.
                unsafe { inner(self, kernel) }
            }

            instance! { @
                splat(v: f32) -> __m512;
                load(from: &[f32; SIMD_LANES]) -> __m512;
                store(v: __m512, to: &mut [f32; SIMD_LANES]) -> ();
                fma(a: __m512, b: __m512, c: __m512) -> __m512;
                sum(v: __m512) -> f32;
                load_bf16(from: &[u8; 64]) -> (__m512, __m512);
                load_f16(from: &[u8; 64]) -> (__m512, __m512);
                load_f32(from: &[u8; 128]) -> (__m512, __m512);
                widen_bf16(from: &[u8; 32]) -> __m512;
                widen_f16(from: &[u8; 32]) -> __m512;
                widen_f32(from: &[u8; 64]) -> __m512;
                columns() -> __m512i;
                add_gaps(c: __m512i, gaps: &[u8; SIMD_LANES]) -> __m512i;
                load_columns(from: &[u8; 32]) -> __m512i;
                max_columns(a: __m512i, b: __m512i) -> __m512i;
                store_columns(c: __m512i, to: &mut [u32; SIMD_LANES]) -> ();
                gather(table: &[f32], c: __m512i) -> __m512;
                prefetch(bytes: &[u8], at: usize) -> ();
                prefetch_far(bytes: &[u8], at: usize) -> ();
            }

            #[inline(always)]
            fn lanes16(self, lanes: &mut LaneBits<u16>, code: Code<'_>, units: &[u8], words: &mut [u16]) -> Progress {
                lanes512::words16(self.into(), lanes, code, units, From::There, words)
            }

            #[inline(always)]
            fn lanes16_from(
                self,
                lanes: &mut LaneBits<u16>,
                code: Code<'_>,
                units: &[u8],
                base: &[u8],
                words: &mut [u16],
            ) -> Progress {
                lanes512::words16(self.into(), lanes, code, units, From::Base(base), words)
            }

            #[inline(always)]
            fn lanes32(self, lanes: &mut LaneBits<u32>, code: Code<'_>, units: &[u8], words: &mut [u32]) -> Progress {
                lanes512_four_byte::words32(self.into(), lanes, code, units, From::There, words)
            }

            #[inline(always)]
            fn lanes32_from(
                self,
                lanes: &mut LaneBits<u32>,
                code: Code<'_>,
                units: &[u8],
                base: &[u8],
                words: &mut [u32],
            ) -> Progress {
                lanes512_four_byte::words32(self.into(), lanes, code, units, From::Base(base), words)
            }

            #[inline(always)]
            fn decode_dots32<const M: usize>(
                self,
                lanes: &mut LaneBits<u32>,
                code: Code<'_>,
                units: &[u8],
                base: &[u8],
                x: [&[[f32; GROUP]]; M],
                acc: &mut [__m512; M],
            ) -> Progress {
                lanes512_four_byte::decode_dots32(self.into(), lanes, code, units, base, x, acc)
            }

            fn with_bits<T: BitTask>(self, task: T) -> T::Out {
                bits::with_bits(<Avx2 as std::convert::From<Avx512>>::from(Into::<Avx512>::into(self)), task)
            }

            fn packer(self) -> Option<impl Packer> {
                Some(<Avx2 as std::convert::From<Avx512>>::from(Into::<Avx512>::into(self)))
            }

            $($more)*
        }
    };
    (@ $($method:ident($($arg:ident: $of:ty),*) -> $out:ty;)*) => {$(
        #[inline(always)]
        fn $method(self, $($arg: $of),*) -> $out {
            Into::<Avx512>::into(self).$method($($arg),*)
        }
    )*};
}

instance! { Avx512Vbmi2, "avx512vbmi2", "avx512f,avx512bw,avx512vl,avx512vbmi2,avx2,fma,f16c,popcnt", {} }
instance! { Avx512Bf16, "avx512bf16", "avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,f16c,popcnt,bmi2", {
    const BF16_DOT: bool = true;

    fn with_bf16_dot<T: Bf16Task>(self, task: T) -> Option<T::Out> {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,f16c,popcnt,bmi2")]
        fn inner<T: Bf16Task>(s: Avx512Bf16, task: T) -> T::Out {
            task.run(s)
        }
        // SAFETY: the token proves that the machine has the instructions that `inner` switches on.
        Some(unsafe { inner(self, task) })
    }
} }
