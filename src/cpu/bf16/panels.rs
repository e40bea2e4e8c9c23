//! Many rows of x: rows of W are restored, if they are not the base's, packed by pairs of columns into panels
//! of 64, and each panel multiplied with all rows of x of its tenant.
//!
//! ```text
//! for each 64 rows of W (or a tile's, where it has more), for each tenant, for each tile column:
//!     restore and pack the words of the rows
//!     for each block of columns, for each 6 rows of x: 24 vectors of sums, which are rows of y
//! ```
//!
//! The tenants lie inside the rows of W, so that W is read from memory once for all of them, and its next
//! rows are asked for evenly while these are multiplied; sums are rows of y, so that no lane is ever added to
//! another.
//!
//! **Floor**: the dot product unit, 0.55 cycles for 32 products on Zen 5, 1 on Zen 4. Restoring (5.1 cycles
//! for 32 words on Zen 5) and packing (64 shuffles for 512 words) are shared by all rows of x.
//!
//! **Order** of one output: pairs of columns in order, one chain for each tile column's blocks of
//! [`COLUMNS`].
//!
//! **Tried** (Zen 4): panels of 32 rows by 12 rows of x, 0.094 ms a row of x in place of 0.077 with 4096 x
//! 4096 (F.linear 0.073): twice the broadcasts.

use crate::cpu::counters;
use crate::cpu::dot::Strides;
use crate::cpu::job::{Block, LinearJob, Segment};
use crate::cpu::plan::{BLOCK, PANEL_SUMS};
use crate::cpu::scratch::Scratch;
use crate::error::{Error, Result};
use crate::vector::bf16dot::{Bf16Dot, Bf16Task, PANEL_ROWS, Pair};
use crate::vector::float::Float;
use crate::vector::packed::Panels;
use crate::vector::simd::{SIMD_LANES, Simd};
use std::ops::Range;

/// Columns of a block: of 64 rows of W 32 KiB, which stay in the first or second cache while six rows of x
/// after six pass by.
const COLUMNS: usize = 256;
/// Columns that are packed at a time from the base: 128 KiB of packed words and as many of the next ones in
/// the second cache.
const WIDTH: usize = 1024;
/// Rows of x side by side: with four vectors of W, 24 sums and 29 of 32 registers.
const ROWS_OF_X: usize = 6;
/// Bytes that are asked for ahead at most.
const MOST_AHEAD: usize = 256 << 10;
/// Bytes of a cache line.
const LINE: usize = 64;

impl<D: Float> LinearJob<'_, D> {
    /// Rows of W `block.r0..block.r1`, all rows of x of the tenants `segments`. The words are bf16 and the
    /// machine has a bf16 dot product; the rows begin and end with tiles of every segment.
    pub(in crate::cpu) fn packed<S: Simd>(
        &self,
        s: S,
        block: Block,
        segments: &[Segment<'_>],
        sc: &mut Scratch,
    ) -> Result<()> {
        let height = (block.r1 - block.r0).next_multiple_of(PANEL_ROWS);
        let strides = Strides { row: 1, column: height };
        for segment in segments {
            let places = segment.rows.start.max(block.m0)..segment.rows.end.min(block.m0 + block.m);
            for m0 in places.clone().step_by(PANEL_SUMS / height) {
                let part = Block { m0, m: (PANEL_SUMS / height).min(places.end - m0), ..block };
                sc.sums.zeroed(part.m * height);
                let done = s.with_bf16_dot(Packed { job: self, block: part, segment, height, sc: &mut *sc });
                done.ok_or_else(|| Error::internal("no bf16 dot product"))??;
                let sums = std::mem::take(&mut sc.sums);
                let done = (0..part.m).step_by(BLOCK).try_for_each(|j| {
                    let out = Block { m0: m0 + j, m: BLOCK.min(part.m - j), ..block };
                    let sums = &sums.all()[j * height..];
                    self.finish(s, out, std::slice::from_ref(segment), (sums, strides), sc)
                });
                sc.sums = sums;
                done?;
            }
        }
        Ok(())
    }
}

/// The products of one tenant's rows of x.
struct Packed<'t, 'a, D: Float> {
    job: &'t LinearJob<'a, D>,
    block: Block,
    segment: &'t Segment<'t>,
    /// Sums of one row of x: whole panels.
    height: usize,
    sc: &'t mut Scratch,
}

impl<D: Float> Bf16Task for Packed<'_, '_, D> {
    type Out = Result<()>;

    #[inline(always)]
    fn run<S: Bf16Dot>(mut self, s: S) -> Result<()> {
        let (weights, block) = (&self.segment.weights, self.block);
        let grid = weights.grid();
        let width = if weights.delta.is_some() { grid.tile_cols } else { WIDTH };
        for (tc, c0) in (0..self.job.k).step_by(width).enumerate() {
            let columns = c0..(c0 + width).min(self.job.k);
            let mut panels = std::mem::take(&mut self.sc.vectors);
            let pairs = columns.len().div_ceil(2);
            let panel = panels.get(self.height / PANEL_ROWS * pairs * PANEL_ROWS);
            let words: &mut [Pair] = bytemuck::cast_slice_mut::<f32, u8>(panel).as_chunks_mut().0;
            let mut panel = Panels { words, pairs };
            let done: Result<()> = if let Some(delta) = weights.delta {
                let tiles = block.r0 / grid.tile_rows..block.r1.div_ceil(grid.tile_rows);
                tiles.into_iter().try_for_each(|tr| {
                    let index = tr * grid.tile_cols_count() + tc;
                    let rect = grid.rect(index);
                    let words =
                        self.sc.words.bytes_mut(rect.rows().min(SIMD_LANES) * columns.len() * D::BYTES);
                    counters::count_panel();
                    panel.put_tile(s, (delta, &weights.base), index, rect.r0 - block.r0, words)
                })
            } else {
                let row = |r: usize| self.job.base.span(block.r0 + r, columns.start, columns.len());
                panel.put(s, 0, block.r1 - block.r0, row);
                Ok(())
            };
            // Rows of the last panel that the matrix lacks are whatever was there: their sums are not looked
            // at.
            if done.is_ok() {
                let mut ahead = self.ahead(&columns, width);
                for (p, panel) in panel.words.chunks_exact(pairs.max(1)).enumerate() {
                    self.multiply(s, panel, p * PANEL_ROWS, &columns, &mut ahead);
                }
            }
            self.sc.vectors = panels;
            done.map_err(|e| self.segment.within(e))?;
        }
        Ok(())
    }
}

impl<D: Float> Packed<'_, '_, D> {
    /// The words of W that are packed after those of `columns`: the next columns of the same rows, or the
    /// next rows.
    fn ahead(&self, columns: &Range<usize>, width: usize) -> NextRows {
        let (stride, k) = (self.job.k * D::BYTES, self.job.k);
        let (row, from, to) = match columns.end < k {
            true => (self.block.r0, columns.end, (columns.end + width).min(k)),
            false => (self.block.r1, 0, width.min(k)),
        };
        let run = (to - from) * D::BYTES;
        let calls =
            (self.height / PANEL_ROWS) * columns.len().div_ceil(COLUMNS) * self.block.m.div_ceil(ROWS_OF_X);
        let share = (self.height * run).min(MOST_AHEAD).div_ceil(calls.max(1)).next_multiple_of(LINE);
        NextRows { start: row * stride + from * D::BYTES, stride, run, share, at: 0 }
    }

    /// Add the products of one panel, rows from `r` on of the block, with every row of x.
    #[inline(always)]
    fn multiply<S: Bf16Dot>(
        &mut self,
        s: S,
        panel: &[Pair],
        r: usize,
        columns: &Range<usize>,
        ahead: &mut NextRows,
    ) {
        for (i, panel) in panel.chunks(COLUMNS / 2).enumerate() {
            let from = columns.start + i * COLUMNS;
            let columns = from..(from + COLUMNS).min(columns.end);
            // In equal shares, so that no pass is left with few sums, which would wait for one another.
            let passes = self.block.m.div_ceil(ROWS_OF_X);
            let mut j = 0;
            for pass in 0..passes {
                let (at, lines) = (r + j * self.height, ahead.next());
                j += match (self.block.m - j).div_ceil(passes - pass) {
                    ROWS_OF_X.. => self.some::<S, ROWS_OF_X>(s, panel, at, &columns, j, lines),
                    5 => self.some::<S, 5>(s, panel, at, &columns, j, lines),
                    4 => self.some::<S, 4>(s, panel, at, &columns, j, lines),
                    3 => self.some::<S, 3>(s, panel, at, &columns, j, lines),
                    2 => self.some::<S, 2>(s, panel, at, &columns, j, lines),
                    _ => self.some::<S, 1>(s, panel, at, &columns, j, lines),
                };
            }
        }
    }

    /// `M` rows of x from `j` on; their sums begin at `at`. Gives `M`.
    #[inline(always)]
    fn some<S: Bf16Dot, const M: usize>(
        &mut self,
        s: S,
        panel: &[Pair],
        at: usize,
        columns: &Range<usize>,
        j: usize,
        lines: Range<usize>,
    ) -> usize {
        let x = std::array::from_fn(|i| self.job.x_row(self.block.m0 + j + i, columns).bytes);
        let sums = &mut self.sc.sums.all_mut()[at..];
        s.outer::<M>(panel, x, sums, self.height, self.job.base.bytes(), lines);
        M
    }
}

/// Rows of words that are to be asked for in equal shares, one after the other.
struct NextRows {
    /// The first row's first byte.
    start: usize,
    stride: usize,
    /// Bytes of a row.
    run: usize,
    share: usize,
    /// Bytes asked for.
    at: usize,
}

impl NextRows {
    /// The next share, to the end of its row.
    fn next(&mut self) -> Range<usize> {
        let (row, at) = (self.at / self.run.max(1), self.at % self.run.max(1));
        let share = self.share.min(self.run - at.min(self.run));
        self.at += share;
        let from = self.start + row * self.stride;
        from + at..from + at + share
    }
}
