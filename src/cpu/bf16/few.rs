//! Up to sixteen rows of x on rows of words as they lie in memory: the base's, or a `raw` delta's.
//!
//! ```text
//! for each band of 16 rows of W, for each block of columns, for each 4 rows of x, for each 4 rows of the band:
//!     16 sums of 16 lanes over the block; add their totals to the outputs
//! ```
//!
//! **Floor**: the words of W once from memory: 33.5 MB of 4096 x 4096 at 56 GB/s are 0.60 ms, 9.3 cycles of
//! each of two cores for 32 words (Zen 5, 4.2 GHz). Sixteen products of four rows by four take 27
//! instructions and 10.1 cycles for 128 words: memory up to 8 rows of x, the dot product (0.56 ms at 16 rows)
//! from there on. What decides is that memory never waits: the lines of the next band are asked for evenly,
//! one to eight at each step of 32 columns of this one; asked for by the first rows of x alone, four rows
//! take 0.95 ms in place of 0.62.
//!
//! **Order** of one output: blocks of columns ([`COLUMNS`], or [`COLUMNS_ONE`] for one row of x), each a sum
//! of sixteen lanes.

use crate::cpu::dot::{Rows, Strides};
use crate::vector::bf16dot::{Bf16Dot, Bf16Task};
use crate::vector::simd::SIMD_LANES;

/// Columns of a block: 16 rows of W of them (16 KiB) stay in the first cache while all rows of x pass by.
const COLUMNS: usize = 512;
/// The same where each word is used once or twice.
const COLUMNS_ONE: usize = 4096;

/// `sums[r * strides.row + j * strides.column] += words[r] . x[j]`.
pub(in crate::cpu) struct Few<'a> {
    /// The rows of words.
    pub(in crate::cpu) words: Rows<'a>,
    /// How many.
    pub(in crate::cpu) rows: usize,
    /// The rows of x, at most sixteen, each as long as the rows of words.
    pub(in crate::cpu) x: &'a [&'a [u8]],
    pub(in crate::cpu) sums: &'a mut [f32],
    pub(in crate::cpu) strides: Strides,
}

impl Bf16Task for Few<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Bf16Dot>(mut self, s: S) {
        // Rows by rows of x in registers, and lines asked for at each step: what 32 columns of the band take,
        // shared out among all passes over them.
        match self.x.len() {
            0 => {}
            1 => self.bands::<S, 4, 1, 4>(s, COLUMNS_ONE),
            2 => self.bands::<S, 8, 2, 8>(s, COLUMNS_ONE),
            3 | 4 => self.bands::<S, 4, 4, 4>(s, COLUMNS),
            5..=8 => self.bands::<S, 4, 4, 2>(s, COLUMNS),
            _ => self.bands::<S, 4, 4, 1>(s, COLUMNS),
        }
    }
}

impl Few<'_> {
    #[inline(always)]
    fn bands<S: Bf16Dot, const R: usize, const M: usize, const E: usize>(&mut self, s: S, columns: usize) {
        let bytes = 2 * columns;
        for r0 in (0..self.rows).step_by(SIMD_LANES) {
            let rows = SIMD_LANES.min(self.rows - r0);
            // How far the band's lines are asked for already, from its own first word on.
            let mut asked = 0;
            for from in (0..self.words.len).step_by(bytes) {
                let to = (from + bytes).min(self.words.len);
                for j in (0..self.x.len()).step_by(M) {
                    let mut lanes = [s.splat(0.0); SIMD_LANES];
                    let mut filled = 0;
                    for r in (0..rows).step_by(R) {
                        // Rows beyond the last are the last once more, and their sums are dropped.
                        let words =
                            std::array::from_fn(|i| self.words.part(r0 + (r + i).min(rows - 1), from, to));
                        let x = std::array::from_fn(|i| &self.x[(j + i).min(self.x.len() - 1)][from..to]);
                        let ahead = SIMD_LANES * self.words.stride + asked;
                        let ahead = ahead.wrapping_sub(r * self.words.stride + from);
                        let sums: [[S::F; M]; R] = s.dots::<R, M, E>(words, x, ahead);
                        asked += (to - from) / 64 * E * 64;
                        for (i, sums) in sums.iter().enumerate() {
                            for (l, sum) in sums.iter().enumerate() {
                                lanes[filled + i * M + l] = *sum;
                            }
                        }
                        filled += R * M;
                        if filled == SIMD_LANES || r + R >= rows {
                            self.add::<M>(&s.sum16(&lanes), r0 + (r + R - filled / M), j, rows + r0);
                            filled = 0;
                        }
                    }
                }
            }
        }
    }

    /// Add sums of rows from `r` on, `M` rows of x from `j` on for each, to the totals of those that are
    /// there.
    #[inline(always)]
    fn add<const M: usize>(&mut self, sums: &[f32; SIMD_LANES], r: usize, j: usize, end: usize) {
        for (i, sum) in sums.iter().enumerate() {
            let (r, j) = (r + i / M, j + i % M);
            if r < end && j < self.x.len() {
                self.sums[r * self.strides.row + j * self.strides.column] += sum;
            }
        }
    }
}
