//! The portable instance of the vector trait: plain arrays, and the meaning that the fast instances must
//! equal bit for bit. Must not depend on any architecture.

use super::simd::{Kernel, SIMD_LANES, Simd};

/// The instance; every machine has it.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

/// The array `from[at..at + N]`; the callers' constants keep it within bounds.
#[inline(always)]
fn part<const N: usize>(from: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&from[at..at + N]);
    out
}

#[inline(always)]
fn bf16(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

#[inline(always)]
fn f16(bytes: [u8; 2]) -> f32 {
    half::f16::from_le_bytes(bytes).to_f32()
}

#[inline(always)]
fn map(mut value: impl FnMut(usize) -> f32) -> [f32; SIMD_LANES] {
    let mut out = [0.0; SIMD_LANES];
    for (i, o) in out.iter_mut().enumerate() {
        *o = value(i);
    }
    out
}

impl Simd for Scalar {
    type F = [f32; SIMD_LANES];
    type C = [u32; SIMD_LANES];
    const NAME: &'static str = "scalar";
    const REGISTERS_4X4: bool = false;

    fn run<K: Kernel>(self, kernel: K) -> K::Out {
        kernel.call(self)
    }

    #[inline(always)]
    fn splat(self, v: f32) -> Self::F {
        [v; SIMD_LANES]
    }

    #[inline(always)]
    fn load(self, from: &[f32; SIMD_LANES]) -> Self::F {
        *from
    }

    #[inline(always)]
    fn store(self, v: Self::F, to: &mut [f32; SIMD_LANES]) {
        *to = v;
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        map(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn sum(self, mut v: Self::F) -> f32 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                v[i] += v[i + half];
            }
        }
        v[0]
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u8; 64]) -> (Self::F, Self::F) {
        (map(|i| bf16(part(from, 4 * i))), map(|i| bf16(part(from, 4 * i + 2))))
    }

    #[inline(always)]
    fn load_f16(self, from: &[u8; 64]) -> (Self::F, Self::F) {
        (map(|i| f16(part(from, 2 * i))), map(|i| f16(part(from, 32 + 2 * i))))
    }

    #[inline(always)]
    fn load_f32(self, from: &[u8; 128]) -> (Self::F, Self::F) {
        let at = |i| f32::from_le_bytes(part(from, 4 * i));
        (map(at), map(|i| at(SIMD_LANES + i)))
    }

    #[inline(always)]
    fn widen_bf16(self, from: &[u8; 32]) -> Self::F {
        map(|i| bf16(part(from, 2 * i)))
    }

    #[inline(always)]
    fn widen_f16(self, from: &[u8; 32]) -> Self::F {
        map(|i| f16(part(from, 2 * i)))
    }

    #[inline(always)]
    fn widen_f32(self, from: &[u8; 64]) -> Self::F {
        map(|i| f32::from_le_bytes(part(from, 4 * i)))
    }

    #[inline(always)]
    fn columns(self) -> Self::C {
        [0; SIMD_LANES]
    }

    #[inline(always)]
    fn add_gaps(self, mut c: Self::C, gaps: &[u8; SIMD_LANES]) -> Self::C {
        for (c, &g) in c.iter_mut().zip(gaps) {
            *c = c.wrapping_add(u32::from(g));
        }
        c
    }

    #[inline(always)]
    fn load_columns(self, from: &[u8; 32]) -> Self::C {
        let mut c = [0; SIMD_LANES];
        for (i, c) in c.iter_mut().enumerate() {
            *c = u32::from(u16::from_le_bytes(part(from, 2 * i)));
        }
        c
    }

    #[inline(always)]
    fn max_columns(self, mut a: Self::C, b: Self::C) -> Self::C {
        for (a, b) in a.iter_mut().zip(b) {
            *a = (*a).max(b);
        }
        a
    }

    #[inline(always)]
    fn store_columns(self, c: Self::C, to: &mut [u32; SIMD_LANES]) {
        *to = c;
    }

    #[inline(always)]
    fn gather(self, table: &[f32], c: Self::C) -> Self::F {
        map(|i| table[(c[i] as usize).min(table.len() - 1)])
    }

    #[inline(always)]
    fn prefetch(self, _bytes: &[u8], _at: usize) {}

    #[inline(always)]
    fn prefetch_far(self, _bytes: &[u8], _at: usize) {}
}
