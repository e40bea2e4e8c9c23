//! `delta_linear_grad_input`: `gx = grad @ W_ft` without a dense W_ft.
//!
//! A task is sixteen rows of grad and a strip of columns; it walks all rows of W. A lane is a row of grad, an
//! accumulator is sixteen lanes per column. **Order** of one output: rows of W by tile band; in a band first the words
//! of its rows, top down, then (`sparse`) its entries in the order of the stream, all by FMA. So the longest chain of
//! roundings is n plus the entries of the column. Outputs that are not finite are computed again in f64 from the
//! fine-tuned words.
#![allow(
    clippy::needless_range_loop,
    reason = "arrays indexed in step are what the unrolled loops keep in registers"
)]

use super::dot::Rows;
use super::exec::{Executor, try_run};
use super::exponent::{MICRO, Stream};
use super::float::Float;
use super::scratch::{self, Scratch};
use super::simd::{Kernel, LANES, Simd};
use super::weights::Weights;
use crate::codec::{Encoding, GapKind, Grid, Rect, SparseTile, Tile};
use crate::error::{Error, Result};
use std::marker::PhantomData;
use std::ops::Range;

/// Columns of a strip where a tile can be cut; the decode path takes no more at a time either.
const STRIP: usize = 1024;

/// Rows of W of one step: a band of tiles is done in steps of these.
const STEP: usize = LANES;

pub(super) struct Job<'a, D: Float> {
    pub(super) grad: &'a [u8],
    /// Rows of grad.
    pub(super) m: usize,
    /// Which rows of `grad` and of `out` they are; as they are if none.
    pub(super) order: Option<&'a [usize]>,
    pub(super) weights: Weights<'a>,
    pub(super) out: &'a [D::Shared],
}

/// Run a checked call; no dimension is zero but n.
pub(super) fn run<S: Simd, D: Float>(s: S, job: &Job<'_, D>, exec: &dyn Executor) -> Result<()> {
    let grid = job.weights.grid();
    // Lanes of `exponent` carry bits from column to column, so its tiles are not cut.
    let cut = job.weights.encoding() != Encoding::Exponent;
    let width = if cut { STRIP.min(grid.tile_cols) } else { grid.tile_cols };
    let strips = grid.shape.k.div_ceil(width);
    try_run(exec, strips * job.m.div_ceil(LANES), |task| {
        let c0 = task % strips * width;
        let columns = c0..(c0 + width).min(grid.shape.k);
        scratch::with(|sc| job.strip(s, &grid, columns, task / strips * LANES, sc))
    })
}

impl<D: Float> Job<'_, D> {
    fn row(&self, j: usize) -> usize {
        self.order.map_or(j, |order| order[j])
    }

    fn strip<S: Simd>(
        &self,
        s: S,
        grid: &Grid,
        columns: Range<usize>,
        m0: usize,
        sc: &mut Scratch,
    ) -> Result<()> {
        let m = LANES.min(self.m - m0);
        sc.panel.zeroed(columns.len() * LANES);
        let across = grid.tile_cols_count();
        for band in 0..grid.tile_rows_count() {
            let index = band * across + columns.start / grid.tile_cols;
            self.tile(s, grid, index, &columns, m0, sc)
                .map_err(|e| e.within(format!("delta, tile {index}")))?;
        }
        let k = grid.shape.k;
        let mut again = 0u16;
        for (c, sums) in sc.panel.get(columns.len() * LANES).as_chunks::<LANES>().0.iter().enumerate() {
            for (j, v) in sums.iter().enumerate().take(m) {
                D::put(&self.out[self.row(m0 + j) * k + columns.start + c], D::round(*v));
                again |= u16::from(!v.is_finite()) << j;
            }
        }
        if again == 0 {
            return Ok(());
        }
        (columns.start..columns.end)
            .step_by(STRIP)
            .try_for_each(|c| self.wide(s, grid, c..(c + STRIP).min(columns.end), &columns, m0, again, sc))
    }

    /// Add one tile's rows to the strip.
    fn tile<S: Simd>(
        &self,
        s: S,
        grid: &Grid,
        index: usize,
        columns: &Range<usize>,
        m0: usize,
        sc: &mut Scratch,
    ) -> Result<()> {
        let rect = grid.rect(index);
        let tile = self.weights.tile(index)?;
        let mut g = [[0f32; LANES]; STEP];
        let sums = sc.panel.get(columns.len() * LANES).as_chunks_mut::<LANES>().0;
        let w = D::BYTES;
        let offset = (columns.start - rect.c0) * w;
        let len = columns.len() * w;
        if let Tile::Exponent(t) = &tile {
            let mut stream = Stream::<D>::new(t, grid.tile_cols);
            let mut words = [D::Word::default(); MICRO];
            for r in 0..rect.rows() {
                self.grads(m0, rect.r0 + r, 1, &mut g);
                for c in (0..rect.cols()).step_by(MICRO) {
                    let words = &mut words[..MICRO.min(rect.cols() - c)];
                    stream.decode(
                        s,
                        (r, c),
                        self.weights.base.span(rect.r0 + r, rect.c0 + c, words.len()),
                        words,
                    )?;
                    let bytes: &[u8] = bytemuck::cast_slice(words);
                    let rows = Rows { bytes, stride: bytes.len(), len: bytes.len() };
                    let sums = &mut sums[c..c + words.len()];
                    s.run(Outer::<D> { words: rows, rows: 1, g: &g, sums, dtype: PhantomData });
                }
            }
            return stream.finish();
        }
        for r in (0..rect.rows()).step_by(STEP) {
            let rows = STEP.min(rect.rows() - r);
            self.grads(m0, rect.r0 + r, rows, &mut g);
            let words = match &tile {
                Tile::Raw(raw) => {
                    Rows { bytes: &raw.bytes[r * raw.stride + offset..], stride: raw.stride, len }
                }
                _ => {
                    let at = (rect.r0 + r) * self.weights.base.row_bytes() + columns.start * w;
                    Rows {
                        bytes: &self.weights.base.bytes()[at..],
                        stride: self.weights.base.row_bytes(),
                        len,
                    }
                }
            };
            s.run(Outer::<D> { words, rows, g: &g, sums, dtype: PhantomData });
            if let Tile::Sparse(t) = &tile {
                self.entries(s, t, &rect, columns, &g, sums)?;
            }
        }
        Ok(())
    }

    fn entries<S: Simd>(
        &self,
        s: S,
        tile: &SparseTile<'_>,
        rect: &Rect,
        columns: &Range<usize>,
        g: &[[f32; LANES]; STEP],
        sums: &mut [[f32; LANES]],
    ) -> Result<()> {
        if tile.records > 1 << 24 {
            return Err(Error::corrupt(format!("{} records in one tile", tile.records)));
        }
        let from = (columns.start - rect.c0) as u32;
        let largest = s.run(OuterEntries::<D> { tile, g, sums, from, rows: rect.rows(), dtype: PhantomData });
        if largest as usize >= rect.cols() {
            return Err(Error::corrupt(format!("an entry names column {largest} of {}", rect.cols())));
        }
        Ok(())
    }

    /// `to[i][j]`: row `m0 + j` of grad at row `r0 + i` of W; zero beyond m.
    fn grads(&self, m0: usize, r0: usize, rows: usize, to: &mut [[f32; LANES]; STEP]) {
        let n = self.weights.base.shape().n;
        for j in 0..LANES.min(self.m - m0) {
            let row = &self.grad[(self.row(m0 + j) * n + r0) * D::BYTES..];
            (0..rows).for_each(|i| to[i][j] = D::value_at(row, i));
        }
    }

    /// Compute the non-finite outputs of `columns` again; bit j of `again` says that row `m0 + j` has some.
    fn wide<S: Simd>(
        &self,
        s: S,
        grid: &Grid,
        columns: Range<usize>,
        strip: &Range<usize>,
        m0: usize,
        again: u16,
        sc: &mut Scratch,
    ) -> Result<()> {
        let across = grid.tile_cols_count();
        let wide = sc.wide.zeroed(columns.len() * LANES);
        let n = grid.shape.n;
        for band in 0..grid.tile_rows_count() {
            let index = band * across + columns.start / grid.tile_cols;
            let rect = grid.rect(index);
            let words = sc.words.bytes_mut(rect.words() * D::BYTES);
            self.weights.words(s, index, words)?;
            for (r, row) in words.chunks_exact(rect.cols() * D::BYTES).enumerate() {
                let row = &row[(columns.start - rect.c0) * D::BYTES..];
                for j in (0..LANES).filter(|j| again >> j & 1 == 1) {
                    let g =
                        f64::from(D::value_at(&self.grad[self.row(m0 + j) * n * D::BYTES..], rect.r0 + r));
                    for c in 0..columns.len() {
                        wide[c * LANES + j] += g * f64::from(D::value_at(row, c));
                    }
                }
            }
        }
        let sums = sc.panel.get(strip.len() * LANES).as_chunks::<LANES>().0;
        for c in columns.clone() {
            for j in (0..LANES).filter(|j| again >> j & 1 == 1) {
                if !sums[c - strip.start][j].is_finite() {
                    let value = D::round_wide(wide[(c - columns.start) * LANES + j]);
                    D::put(&self.out[self.row(m0 + j) * grid.shape.k + c], value);
                }
            }
        }
        Ok(())
    }
}

/// `sums[c] += words[i][c] * g[i]` for every row i of words and column c, row after row.
struct Outer<'a, D> {
    words: Rows<'a>,
    rows: usize,
    g: &'a [[f32; LANES]; STEP],
    sums: &'a mut [[f32; LANES]],
    dtype: PhantomData<D>,
}

impl<D: Float> Kernel for Outer<'_, D> {
    type Out = ();

    #[inline(always)]
    fn call<S: Simd>(mut self, s: S) {
        let mut r = 0;
        while r + 4 <= self.rows {
            self.some::<S, 4>(s, r);
            r += 4;
        }
        while r < self.rows {
            self.some::<S, 1>(s, r);
            r += 1;
        }
    }
}

impl<D: Float> Outer<'_, D> {
    #[inline(always)]
    fn some<S: Simd, const R: usize>(&mut self, s: S, r: usize) {
        let mut g = [s.splat(0.0); R];
        for i in 0..R {
            g[i] = s.load(&self.g[r + i]);
        }
        let mut values = [[0f32; LANES]; R];
        for (block, sums) in self.sums.chunks_mut(LANES).enumerate() {
            for i in 0..R {
                let words = &self.words.row(r + i)[block * LANES * D::BYTES..];
                if sums.len() == LANES {
                    s.store(D::widen(s, words), &mut values[i]);
                } else {
                    (0..sums.len()).for_each(|c| values[i][c] = D::value_at(words, c));
                }
            }
            for (c, sums) in sums.iter_mut().enumerate() {
                let mut acc = s.load(sums);
                for i in 0..R {
                    acc = s.fma(s.splat(values[i][c]), g[i], acc);
                }
                s.store(acc, sums);
            }
        }
    }
}

/// `sums[column - from] += diff * g[lane]` for the entries of a tile. Gives the largest column named.
struct OuterEntries<'a, D> {
    tile: &'a SparseTile<'a>,
    g: &'a [[f32; LANES]; STEP],
    sums: &'a mut [[f32; LANES]],
    from: u32,
    rows: usize,
    dtype: PhantomData<D>,
}

impl<D: Float> Kernel for OuterEntries<'_, D> {
    type Out = u32;

    #[inline(always)]
    fn call<S: Simd>(self, s: S) -> u32 {
        let mut columns = s.columns();
        let mut largest = columns;
        let gap = LANES * self.tile.gap.bytes();
        let diffs = self.tile.diffs.chunks_exact(LANES * D::BYTES);
        let (mut at, mut diff) = ([0u32; LANES], [0f32; LANES]);
        for (gaps, diffs) in self.tile.gaps.chunks_exact(gap).zip(diffs) {
            columns = match self.tile.gap {
                GapKind::U8 => gaps.first_chunk().map_or(columns, |g| s.add_gaps(columns, g)),
                GapKind::U16 => gaps.first_chunk().map_or(columns, |g| s.load_columns(g)),
            };
            largest = s.max_columns(largest, columns);
            s.store_columns(columns, &mut at);
            s.store(D::widen(s, diffs), &mut diff);
            for lane in 0..self.rows.min(LANES) {
                let column = at[lane].wrapping_sub(self.from) as usize;
                let Some(sums) = self.sums.get_mut(column) else { continue };
                s.store(s.fma(s.splat(diff[lane]), s.load(&self.g[lane]), s.load(sums)), sums);
            }
        }
        s.store_columns(largest, &mut at);
        at.into_iter().fold(0, u32::max)
    }
}
