//! Dot products of bf16 words as they are: what an instruction set with a bf16 dot product (`VDPBF16PS`)
//! gives to products in `mode = "fast"`. Must hold no algorithm of a whole product.
//!
//! **Arithmetic.** One instruction adds two products to each of sixteen f32 lanes. Products of two bf16 are
//! exact; each addition rounds to nearest, ties to even; denormals count as zero, in words and in sums. So an
//! output's error is that of the f32 chain, and at most `2^-126` times the largest other factor for each
//! denormal word.

use super::lanes::Code;
use super::simd::{SIMD_LANES, Simd};
use crate::codec::ExponentTile;
use crate::error::Result;
use std::ops::Range;

/// Rows of W of a packed panel: four vectors.
pub(crate) const PANEL_ROWS: usize = 64;

/// The words of one pair of columns of a panel: row after row, two words each.
pub(crate) type Pair = [u8; 4 * PANEL_ROWS];

/// Code that is generic over an instruction set with a bf16 dot product; [`Simd::with_bf16_dot`] runs it.
pub(crate) trait Bf16Task {
    /// What it gives back.
    type Out;
    /// Run on `s`.
    fn run<S: Bf16Dot>(self, s: S) -> Self::Out;
}

/// An instruction set with a bf16 dot product and a decoder of `exponent` in registers.
pub(crate) trait Bf16Dot: Simd {
    /// The bit streams of tiles of tenants with one width table, somewhere on their way: `T` of them.
    type Streams<'a, const T: usize>;

    /// `words[i] . x[j]` in sixteen partial sums each. All rows are equally long, in whole words. At each
    /// step of 32 columns `E` lines of cache are asked for, one after the other from byte `ahead` (wrapping)
    /// after the first word on.
    fn dots<const R: usize, const M: usize, const E: usize>(
        self,
        words: [&[u8]; R],
        x: [&[u8]; M],
        ahead: usize,
    ) -> [[Self::F; M]; R];

    /// The sums of sixteen vectors at once.
    fn sum16(self, v: &[Self::F; SIMD_LANES]) -> [f32; SIMD_LANES];

    /// The streams of tiles with one width table, at their first words; none if the streams are not equally
    /// long, which they are unless they belong to other bases.
    fn streams<'a, const T: usize>(
        self,
        tiles: [&ExponentTile<'a>; T],
        code: Code<'_>,
    ) -> Option<Self::Streams<'a, T>>;

    /// Decode the next words of `base`, a row of a tile from its first word to its last, for every tenant,
    /// and add their products with `M` rows of x for each to `sums`, sixteen partial sums each. The words are
    /// exact but for exceptions. The base's line `ahead` bytes (wrapping) after each one that is read is
    /// asked for meanwhile.
    fn decode_dots<const T: usize, const M: usize>(
        self,
        streams: &mut Self::Streams<'_, T>,
        base: &[u8],
        x: &[[&[u8]; M]; T],
        ahead: usize,
        sums: [[Self::F; M]; T],
    ) -> [[Self::F; M]; T];

    /// [`Self::decode_dots`] for two tenants with tables of their own and a row of x each.
    fn decode_dots_two(
        self,
        a: &mut Self::Streams<'_, 1>,
        b: &mut Self::Streams<'_, 1>,
        base: &[u8],
        x: [&[u8]; 2],
        ahead: usize,
        sums: [Self::F; 2],
    ) -> [Self::F; 2];

    /// After a tile's last word.
    ///
    /// # Errors
    /// `Truncated` or `Corrupt` where the streams end too early or too late.
    fn finish<const T: usize>(self, streams: &Self::Streams<'_, T>) -> Result<()>;

    /// Put sixteen rows of words into rows `at..at + 16` of a panel, pair of columns by pair of columns: 0,
    /// 16, 32 or 48. A row may be shorter than the panel's pairs, or empty: what is missing counts as zeros.
    fn pack(self, rows: [&[u8]; SIMD_LANES], panel: &mut [Pair], at: usize);

    /// `sums[j * stride + r] += panel row r . x[j]` for the panel's 64 rows, two columns after two columns.
    /// Each row of x has the panel's columns, but for the second one of the last pair. At each of the first
    /// pairs a line of cache is asked for, those of the bytes `ahead`, counted (wrapping) from the first of
    /// `near`.
    fn outer<const M: usize>(
        self,
        panel: &[Pair],
        x: [&[u8]; M],
        sums: &mut [f32],
        stride: usize,
        near: &[u8],
        ahead: Range<usize>,
    );
}
