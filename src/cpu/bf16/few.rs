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
//! one to four at each step of 32 columns of this one; asked for by the first rows of x alone, four rows
//! take 0.95 ms in place of 0.62. One or two rows of x read a few rows of W from end to end, which the processor sees by itself:
//! asking for lines, too, took 4 to 8 % more there (Zen 5).
//!
//! Between the blocks of columns, sums of lanes become totals: sixteen at a time, of rows of W side by side for each row of x. A
//! check of place after place for each total took as long as the products (16 rows of x: 18 cycles for 32 words in place of 13).
//!
//! **Order** of one output: blocks of columns ([`COLUMNS`], [`COLUMNS_TWO`] for five to eight rows of x, [`COLUMNS_ONE`] for up to
//! four), each a sum of sixteen lanes.

#![allow(
    clippy::needless_range_loop,
    reason = "arrays indexed in step are what becomes instructions of vectors"
)]

use crate::cpu::dot::{Rows, Strides};
use crate::vector::bf16dot::{Bf16Dot, Bf16Task};
use crate::vector::simd::SIMD_LANES;
use std::ops::Range;

/// Columns of a block for more than eight rows of x: 16 rows of W of them (16 KiB) stay in the first cache while all rows of
/// x pass by.
const COLUMNS: usize = 512;
/// The same for five to eight rows, two passes; and for fewer, where each word is used once.
const COLUMNS_TWO: usize = 1024;
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
        // shared out among all passes over them. For one or two rows of x none.
        match self.x.len() {
            0 => {}
            1 => self.bands::<S, 4, 1, 0>(s, COLUMNS_ONE),
            2 => self.bands::<S, 8, 2, 0>(s, COLUMNS_ONE),
            3 | 4 => self.bands::<S, 4, 4, 4>(s, COLUMNS_ONE),
            5..=8 => self.bands::<S, 4, 4, 2>(s, COLUMNS_TWO),
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
                                lanes[filled + l * R + i] = *sum;
                            }
                        }
                        filled += R * M;
                        if filled == SIMD_LANES || r + R >= rows {
                            let first = r + R - filled / M;
                            self.add::<R, M>(&s.sum16(&lanes), r0 + first..r0 + (r + R).min(rows), j);
                            filled = 0;
                        }
                    }
                }
            }
        }
    }

    /// Add sums, `R` rows by `M` rows of x after `R` rows by as many, to the totals of those of the rows `rows` and of the rows of
    /// x from `j` on that are there.
    #[inline(always)]
    fn add<const R: usize, const M: usize>(
        &mut self,
        sums: &[f32; SIMD_LANES],
        rows: Range<usize>,
        j: usize,
    ) {
        let Strides { row, column } = self.strides;
        if rows.len() * M != SIMD_LANES || j + M > self.x.len() {
            return self.add_some::<R, M>(sums, rows, j);
        }
        // Every one is there, so that all loops are as long as the compiler knows, and become instructions of vectors.
        for g in 0..SIMD_LANES / (R * M) {
            let (sums, at) = (&sums[g * R * M..], (rows.start + g * R) * row + j * column);
            if row == 1 {
                for l in 0..M {
                    let at = at + l * column;
                    let totals = &mut self.sums[at..at + R];
                    for i in 0..R {
                        totals[i] += sums[l * R + i];
                    }
                }
            } else {
                for i in 0..R {
                    for l in 0..M {
                        self.sums[at + i * row + l * column] += sums[l * R + i];
                    }
                }
            }
        }
    }

    /// The same where rows of W or of x are missing.
    #[inline(never)]
    fn add_some<const R: usize, const M: usize>(
        &mut self,
        sums: &[f32; SIMD_LANES],
        rows: Range<usize>,
        j: usize,
    ) {
        let Strides { row, column } = self.strides;
        for (first, sums) in rows.clone().step_by(R).zip(sums.chunks_exact(R * M)) {
            for (l, sums) in sums.chunks_exact(R).enumerate().take(self.x.len() - j) {
                for (i, sum) in sums.iter().enumerate().take(rows.end - first) {
                    self.sums[(first + i) * row + (j + l) * column] += sum;
                }
            }
        }
    }
}
