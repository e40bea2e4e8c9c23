//! The vector trait that every kernel is written over: sixteen lanes, whatever the machine.
//!
//! Sixteen, because a `sparse` record is sixteen rows side by side, and because one width for every
//! instruction set means one summation order: **AVX2, AVX-512 and the portable instance give the same bits.**
//! (AVX2 holds a vector in two registers, which also gives one accumulator two independent chains.)
//!
//! A value of an instance is the proof that the machine has its instructions: it comes only from the
//! instance's `detect`. So every method here is safe to call, bounds are carried by array types or clamped,
//! and `unsafe` stays inside the architecture folders. This file must hold no intrinsic and no algorithm.

use super::bf16dot::Bf16Task;
use super::bits::{BitTask, plainly};
use super::lanes::{Code, LaneBits, Progress, portable};
use super::packer::{Never, Packer};

/// Lanes of a vector, on every instance.
pub(crate) const SIMD_LANES: usize = 16;

/// Words of one load group: two vectors.
pub(crate) const GROUP: usize = 2 * SIMD_LANES;

/// A kernel, compiled once per instance. `call` and everything it calls must be `#[inline(always)]`, so that
/// the whole kernel lands inside the instance's one function with the instructions switched on.
pub(crate) trait Kernel {
    /// What it gives back.
    type Out;
    /// Run on the instance `s`.
    fn call<S: Simd>(self, s: S) -> Self::Out;
}

/// Sixteen f32 lanes and sixteen u32 column lanes.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen u32.
    type C: Copy;
    /// Its name, as `XORZ_ISA` takes it.
    const NAME: &'static str;
    /// Whether there are registers for four by four vectors of sums.
    const REGISTERS_4X4: bool;

    /// Run `kernel` with this instance's instructions switched on.
    fn run<K: Kernel>(self, kernel: K) -> K::Out;

    /// All lanes `v`.
    fn splat(self, v: f32) -> Self::F;
    /// Load sixteen f32.
    fn load(self, from: &[f32; SIMD_LANES]) -> Self::F;
    /// Store sixteen f32.
    fn store(self, v: Self::F, to: &mut [f32; SIMD_LANES]);
    /// `a * b + c`, one rounding.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Sum of the lanes: halves are added until one is left (8, 4, 2, 1 apart).
    fn sum(self, v: Self::F) -> f32;

    /// Four sums at once, each in the order of [`Simd::sum`].
    #[inline(always)]
    fn sum4(self, v: [Self::F; 4]) -> [f32; 4] {
        [self.sum(v[0]), self.sum(v[1]), self.sum(v[2]), self.sum(v[3])]
    }

    /// 32 bf16 words as f32: the even-numbered ones, then the odd-numbered ones.
    fn load_bf16(self, from: &[u8; 64]) -> (Self::F, Self::F);
    /// 32 f16 words as f32, in order.
    fn load_f16(self, from: &[u8; 64]) -> (Self::F, Self::F);
    /// 32 little-endian f32 words of any alignment, in order.
    fn load_f32(self, from: &[u8; 128]) -> (Self::F, Self::F);

    /// Sixteen bf16 words as f32, in order.
    fn widen_bf16(self, from: &[u8; 32]) -> Self::F;
    /// Sixteen f16 words as f32, in order.
    fn widen_f16(self, from: &[u8; 32]) -> Self::F;
    /// Sixteen little-endian f32 words of any alignment.
    fn widen_f32(self, from: &[u8; 64]) -> Self::F;

    /// Columns all zero.
    fn columns(self) -> Self::C;
    /// `c + gaps`, wrapping.
    fn add_gaps(self, c: Self::C, gaps: &[u8; SIMD_LANES]) -> Self::C;
    /// Sixteen little-endian u16 columns.
    fn load_columns(self, from: &[u8; 32]) -> Self::C;
    /// Lane-wise larger column.
    fn max_columns(self, a: Self::C, b: Self::C) -> Self::C;
    /// Store sixteen columns.
    fn store_columns(self, c: Self::C, to: &mut [u32; SIMD_LANES]);
    /// `table[min(c, table.len() - 1)]` per lane. The table holds 1 to 2^30 values, or this panics.
    fn gather(self, table: &[f32], c: Self::C) -> Self::F;

    /// Ask for the cache line `at` bytes (wrapping) after the first of `bytes`, whatever is there.
    fn prefetch(self, bytes: &[u8], at: usize);
    /// The same, but to the second cache only, for what is not used at once.
    fn prefetch_far(self, bytes: &[u8], at: usize);

    /// Steps of `exponent` on 16-bit words: [`Lane::steps`](super::lanes::Lane::steps).
    #[inline(always)]
    fn lanes16(self, lanes: &mut LaneBits<u16>, code: Code<'_>, units: &[u8], words: &mut [u16]) -> Progress {
        portable(lanes, code, units, words)
    }

    /// [`Simd::lanes16`] of the words of `base`, as many bytes as `words` has.
    #[inline(always)]
    fn lanes16_from(
        self,
        lanes: &mut LaneBits<u16>,
        code: Code<'_>,
        units: &[u8],
        base: &[u8],
        words: &mut [u16],
    ) -> Progress {
        bytemuck::cast_slice_mut::<u16, u8>(words).copy_from_slice(base);
        self.lanes16(lanes, code, units, words)
    }

    /// Steps of `exponent` on 32-bit words: [`Lane::steps`](super::lanes::Lane::steps).
    #[inline(always)]
    fn lanes32(self, lanes: &mut LaneBits<u32>, code: Code<'_>, units: &[u8], words: &mut [u32]) -> Progress {
        portable(lanes, code, units, words)
    }

    /// [`Simd::lanes32`] of the words of `base`, as many bytes as `words` has.
    #[inline(always)]
    fn lanes32_from(
        self,
        lanes: &mut LaneBits<u32>,
        code: Code<'_>,
        units: &[u8],
        base: &[u8],
        words: &mut [u32],
    ) -> Progress {
        bytemuck::cast_slice_mut::<u32, u8>(words).copy_from_slice(base);
        self.lanes32(lanes, code, units, words)
    }

    /// Decode steps of `exponent` on the 32-bit words of `base`, whole ones whose units are surely there, and
    /// multiply them as f32 with `M` rows of x: `acc[j]` takes the first sixteen products of a step, then the
    /// other sixteen, by FMA. Gives how far it came; nothing is done where the instance has no registers for
    /// it.
    #[inline(always)]
    fn decode_dots32<const M: usize>(
        self,
        _lanes: &mut LaneBits<u32>,
        _code: Code<'_>,
        _units: &[u8],
        _base: &[u8],
        _x: [&[[f32; GROUP]]; M],
        _acc: &mut [Self::F; M],
    ) -> Progress {
        Progress { words: 0, bytes: 0 }
    }

    /// Whether the machine has a bf16 dot product.
    const BF16_DOT: bool = false;

    /// Run `task` with the machine's bf16 dot product, if it has one.
    fn with_bf16_dot<T: Bf16Task>(self, _task: T) -> Option<T::Out> {
        None
    }

    /// Run `task` with the instructions for bits that the machine has.
    fn with_bits<T: BitTask>(self, task: T) -> T::Out {
        plainly(task)
    }

    /// What encodes fast on this machine, if anything does.
    fn packer(self) -> Option<impl Packer> {
        None::<Never>
    }
}
