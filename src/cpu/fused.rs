//! Small m: up to sixteen rows of x at a time, of one tenant or of many, on tiles that are never restored.
//!
//! Rows of x on the base's own words (the base itself, `unchanged`, `sparse`) are multiplied together: each
//! word of the base is read from memory once for all of them. Then each tenant's entries are added to its
//! rows' totals, its rows of x in L1 while a chunk of W passes by. Rows on words of their own (`exponent`,
//! `raw`) go through those, tenant by tenant.
//!
//! **Order** of one output, the same for every company: over blocks of [`BASE_COLUMNS`] columns the base
//! product (see `dot`), each added to the total; then the entries, tile column after tile column of the
//! delta's own grid (see `sparse`); then the bias. `exponent` and `raw`: the products of the tile columns of
//! the delta's own grid (see `exponent` for its entries).

use super::bf16::Few;
use super::dot::{Rows, Strides, TileProduct, ToSplit};
use super::exponent;
use super::job::{Block, LinearJob, Segment};
use super::plan::{BASE_COLUMNS, BLOCK, transposed};
use super::scratch::{Buffer, Scratch};
use super::sparse::{Gathered, Natural, Transposed};
use crate::codec::{Encoding, Grid, Rect, SparseTile, Tile};
use crate::error::{Error, Result};
use crate::vector::float::{Float, padded};
use crate::vector::records::within_tile;
use crate::vector::simd::{GROUP, SIMD_LANES, Simd};
use std::marker::PhantomData;
use std::ops::Range;

impl<D: Float> LinearJob<'_, D> {
    /// A block of rows of x on the base's words, of the tenants `segments`.
    pub(super) fn shared<S: Simd>(
        &self,
        s: S,
        block: Block,
        segments: &[Segment<'_>],
        sc: &mut Scratch,
    ) -> Result<()> {
        // Of one tenant, x is at hand for the base and for the entries alike: sixteen rows of W at a time, so
        // that reading the base and computing with entries take turns. Of many, it would be converted again
        // and again.
        let whole = |grid: Grid| self.k <= grid.tile_cols.min(BASE_COLUMNS);
        let rows = match segments {
            [one] if whole(one.weights.grid()) => SIMD_LANES,
            _ => block.r1 - block.r0,
        };
        (block.r0..block.r1).step_by(rows).try_for_each(|r0| {
            let r1 = (r0 + rows).min(block.r1);
            self.rows_of_w(s, Block { r0, r1, ..block }, segments, sc)
        })
    }

    fn rows_of_w<S: Simd>(
        &self,
        s: S,
        block: Block,
        segments: &[Segment<'_>],
        sc: &mut Scratch,
    ) -> Result<()> {
        let rows = (block.r1 - block.r0).next_multiple_of(SIMD_LANES);
        let whole = matches!(segments, [one] if transposed(&one.weights, block.m));
        let strides =
            if whole { Strides { row: SIMD_LANES, column: 1 } } else { Strides { row: 1, column: rows } };
        sc.sums.zeroed(rows * if whole { SIMD_LANES } else { block.m });
        if self.bf16 {
            let rect = Rect { r0: block.r0, r1: block.r1, c0: 0, c1: self.k };
            self.few(s, self.base_rows(&rect), &rect, block, strides, sc);
        }
        for c0 in (0..if self.bf16 { 0 } else { self.k }).step_by(BASE_COLUMNS) {
            let columns = c0..(c0 + BASE_COLUMNS).min(self.k);
            self.split(s, block, &columns, BASE_COLUMNS, sc);
            for r0 in (block.r0..block.r1).step_by(SIMD_LANES) {
                let rect =
                    Rect { r0, r1: (r0 + SIMD_LANES).min(block.r1), c0: columns.start, c1: columns.end };
                self.product(s, self.base_rows(&rect), &rect, block, strides, sc);
            }
        }
        for segment in segments.iter().filter(|s| s.weights.encoding() == Encoding::Sparse) {
            self.changes(s, block, segment, strides, sc)?;
        }
        let sums = std::mem::take(&mut sc.sums);
        let done = self.finish(s, block, segments, (sums.all(), strides), sc);
        sc.sums = sums;
        done
    }

    /// A block of rows of x of one tenant, on words of its own.
    pub(super) fn own<S: Simd>(
        &self,
        s: S,
        block: Block,
        segment: &Segment<'_>,
        sc: &mut Scratch,
    ) -> Result<()> {
        let grid = segment.weights.grid();
        let across = grid.tile_cols_count();
        let rows = (block.r1 - block.r0).next_multiple_of(SIMD_LANES);
        let strides = Strides { row: 1, column: rows };
        sc.sums.zeroed(rows * block.m);
        let columns = |tc: usize| tc * grid.tile_cols..self.k.min((tc + 1) * grid.tile_cols);
        for tc in 0..across {
            if !self.bf16 {
                // Of as many tiles as the base's products take columns, so that x is still there for the next
                // rows of W.
                let c0 = columns(tc).start / BASE_COLUMNS * BASE_COLUMNS;
                self.split(s, block, &(c0..self.k.min(c0 + BASE_COLUMNS)), grid.tile_cols, sc);
            }
            for tr in block.r0 / grid.tile_rows..block.r1.div_ceil(grid.tile_rows) {
                let index = tr * across + tc;
                let tile = segment.weights.tile(index);
                tile.and_then(|tile| self.tile(s, &tile, &grid, index, block, strides, sc))
                    .map_err(|e| e.within(format_args!("{}, tile {index}", segment.name())))?;
            }
        }
        let sums = std::mem::take(&mut sc.sums);
        let done = self.finish(s, block, std::slice::from_ref(segment), (sums.all(), strides), sc);
        sc.sums = sums;
        done
    }

    fn base_rows(&self, rect: &Rect) -> Rows<'_> {
        let at = (rect.r0 * self.k + rect.c0) * D::BYTES;
        Rows { bytes: &self.base.bytes()[at..], stride: self.k * D::BYTES, len: rect.cols() * D::BYTES }
    }

    /// Columns of the block's rows of x as f32 in split order, unless this thread has them from its last
    /// task: all rows for `tile_cols` of them, then for the next. They begin at a multiple of
    /// [`BASE_COLUMNS`].
    fn split<S: Simd>(&self, s: S, block: Block, columns: &Range<usize>, tile_cols: usize, sc: &mut Scratch) {
        let key = Some((self.id, block.m0, columns.start, columns.end));
        if sc.split_holds == key {
            return;
        }
        let mut left = sc.split.get(block.m * padded(columns.len())).as_chunks_mut::<GROUP>().0;
        for c0 in columns.clone().step_by(tile_cols) {
            let tile = c0..(c0 + tile_cols).min(columns.end);
            let groups = padded(tile.len()) / GROUP;
            for j in 0..block.m {
                let to;
                (to, left) = left.split_at_mut(groups);
                let words = self.x_row(block.m0 + j, &tile);
                s.run(ToSplit::<D> { words, rows: 1, to, groups, dtype: PhantomData });
            }
        }
        sc.split_holds = key;
    }

    /// Where `split` has the values of some columns, of whole tiles.
    fn split_at(block: Block, rect: &Rect) -> Range<usize> {
        let from = block.m * (rect.c0 % BASE_COLUMNS);
        from..from + block.m * padded(rect.cols())
    }

    /// Columns of a tenant's rows of x as f32 in natural order, or transposed, unless this thread has them.
    fn natural<S: Simd>(
        &self,
        s: S,
        at: Range<usize>,
        columns: &Range<usize>,
        transposed: bool,
        sc: &mut Scratch,
    ) {
        let key = Some((self.id, at.start, columns.start, columns.end));
        if sc.entries_hold == key {
            return;
        }
        let width = columns.len();
        let to =
            if transposed { sc.entries.zeroed(width * SIMD_LANES) } else { sc.entries.get(width * at.len()) };
        for (j, at) in at.enumerate() {
            let to = &mut to[j * if transposed { 1 } else { width }..];
            let words = self.x_row(at, columns);
            s.run(Natural::<D> { words, rows: 1, columns: width, transposed, to, dtype: PhantomData });
        }
        sc.entries_hold = key;
    }

    /// Add one tile of a tenant's own words to the totals.
    #[allow(clippy::too_many_arguments)]
    fn tile<S: Simd>(
        &self,
        s: S,
        tile: &Tile<'_>,
        grid: &Grid,
        index: usize,
        block: Block,
        strides: Strides,
        sc: &mut Scratch,
    ) -> Result<()> {
        let rect = grid.rect(index);
        match tile {
            Tile::Exponent(t) => {
                let (x, partial) =
                    (&sc.split.all()[Self::split_at(block, &rect)], &mut [[0.0; SIMD_LANES]; BLOCK]);
                let x = x.as_chunks::<GROUP>().0;
                let sums = &mut sc.sums.all_mut()[(rect.r0 - block.r0) * strides.row..];
                exponent::product::<S, D>(
                    s,
                    t,
                    self.base_rows(&rect),
                    grid,
                    &rect,
                    (x, block.m),
                    partial,
                    (sums, strides),
                )
            }
            Tile::Raw(raw) => {
                let rows = Rows { bytes: raw.bytes, stride: raw.stride, len: raw.row_bytes };
                if self.bf16 {
                    self.few(s, rows, &rect, block, strides, sc);
                } else {
                    self.product(s, rows, &rect, block, strides, sc);
                }
                Ok(())
            }
            Tile::Unchanged | Tile::Sparse(_) => Err(Error::internal("a tile without words of its own")),
        }
    }

    /// [`Self::product`] by the bf16 dot product; no row of x is converted.
    fn few<S: Simd>(
        &self,
        s: S,
        words: Rows<'_>,
        rect: &Rect,
        block: Block,
        strides: Strides,
        sc: &mut Scratch,
    ) {
        let mut x: [&[u8]; BLOCK] = [&[]; BLOCK];
        for (j, x) in x.iter_mut().enumerate().take(block.m) {
            *x = self.x_row(block.m0 + j, &(rect.c0..rect.c1)).bytes;
        }
        let sums = &mut sc.sums.all_mut()[(rect.r0 - block.r0) * strides.row..];
        s.with_bf16_dot(Few { words, rows: rect.rows(), x: &x[..block.m], sums, strides });
    }

    /// The product of a tile's rows of words with the block's rows of x.
    fn product<S: Simd>(
        &self,
        s: S,
        words: Rows<'_>,
        rect: &Rect,
        block: Block,
        strides: Strides,
        sc: &mut Scratch,
    ) {
        let x = sc.split.all()[Self::split_at(block, rect)].as_chunks::<GROUP>().0;
        let groups = padded(rect.cols()) / GROUP;
        let partial = sc.vectors.get(SIMD_LANES * SIMD_LANES * BLOCK).as_chunks_mut::<SIMD_LANES>().0;
        for r in (0..rect.rows()).step_by(SIMD_LANES) {
            // The rows of W that follow are this thread's next ones, most often.
            let ahead = if rect.r0 + r + SIMD_LANES < self.n { SIMD_LANES * words.stride } else { 0 };
            let sums = &mut sc.sums.all_mut()[(rect.r0 - block.r0 + r) * strides.row..];
            s.run(TileProduct::<D> {
                words: Rows { bytes: &words.bytes[r * words.stride..], ..words },
                rows: SIMD_LANES.min(rect.rows() - r),
                x,
                groups,
                m: block.m,
                partial,
                sums,
                strides,
                ahead,
                share: TileProduct::<D>::share(groups, block.m),
                dtype: PhantomData,
            });
        }
    }

    /// Add a tenant's entries to its rows' totals.
    fn changes<S: Simd>(
        &self,
        s: S,
        block: Block,
        segment: &Segment<'_>,
        strides: Strides,
        sc: &mut Scratch,
    ) -> Result<()> {
        let grid = segment.weights.grid();
        let across = grid.tile_cols_count();
        let part = block.part(segment);
        let transposed = transposed(&segment.weights, part.len());
        for tc in 0..across {
            let rect = grid.rect(tc);
            let at = block.m0 + part.start..block.m0 + part.end;
            self.natural(s, at, &(rect.c0..rect.c1), transposed, sc);
            for tr in block.r0 / SIMD_LANES..block.r1.div_ceil(SIMD_LANES) {
                let index = tr * across + tc;
                let tile = segment.weights.tile(index);
                tile.and_then(|tile| {
                    let Tile::Sparse(tile) = tile else {
                        return Err(Error::internal("a sparse delta with a tile that is not"));
                    };
                    let sums = part.start * strides.column + (tr * SIMD_LANES - block.r0) * strides.row;
                    let sums = &mut sc.sums.all_mut()[sums..];
                    Entries::<D> { tile, m: part.len(), width: rect.cols(), transposed, dtype: PhantomData }
                        .add(s, &mut sc.entries, sums, strides)
                })
                .map_err(|e| e.within(format_args!("{}, tile {index}", segment.name())))?;
            }
        }
        Ok(())
    }
}

/// The entries of a `sparse` tile, for some rows of x.
struct Entries<'a, D> {
    tile: SparseTile<'a>,
    m: usize,
    /// Columns of the tile.
    width: usize,
    transposed: bool,
    dtype: PhantomData<D>,
}

impl<D: Float> Entries<'_, D> {
    fn add<S: Simd>(&self, s: S, x: &mut Buffer<f32>, sums: &mut [f32], strides: Strides) -> Result<()> {
        let (tile, width, m) = (&self.tile, self.width, self.m);
        let dtype = PhantomData;
        within_tile(tile, width, || {
            if !self.transposed {
                let stride = strides.column;
                return s.run(Gathered::<D> { tile, x: x.get(width * m), width, m, sums, stride, dtype });
            }
            let x = x.get(width * SIMD_LANES).as_chunks().0;
            if strides.column == 1 {
                return s.run(Transposed::<D> { tile, x, sums: sums.as_chunks_mut().0, dtype });
            }
            // Among other tenants' rows, totals lie by row of x.
            let mut lanes = [[0.0; SIMD_LANES]; SIMD_LANES];
            for (r, lanes) in lanes.iter_mut().enumerate() {
                (0..m).for_each(|j| lanes[j] = sums[j * strides.column + r]);
            }
            let largest = s.run(Transposed::<D> { tile, x, sums: &mut lanes, dtype });
            for (r, lanes) in lanes.iter().enumerate() {
                (0..m).for_each(|j| sums[j * strides.column + r] = lanes[j]);
            }
            largest
        })
    }
}
