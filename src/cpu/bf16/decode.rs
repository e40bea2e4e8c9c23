//! Up to sixteen rows of x of tenants with `exponent` deltas: words are decoded in registers and multiplied
//! at once.
//!
//! ```text
//! for each band of rows of W, for each pass of tenants over it:
//!     for each row, for each tile of it: 32 words of the base a step, decoded for every tenant of the pass, times its x
//!     then the entries of each tenant, tile after tile
//! ```
//!
//! A pass is up to eight tenants with a row of x each and one width table, whose streams take their units in
//! the same steps, so that classes, widths and who takes a unit are computed once; or two tenants with tables
//! of their own; or one with up to four rows of x. A tenant with more rows has its tiles decoded into
//! scratch, and multiplied as words in memory are. Rows are read whole, however narrow the tiles: the streams
//! of all tiles of a band are under way together.
//!
//! **Floor** (cycles for 32 words): decoding and one product 7.0 on Zen 5, 13.7 on Zen 4 (two passes for each
//! instruction of 512 bits), where memory takes 9.3 and 11 to 17; each tenant of two 5.3 on Zen 5, of eight
//! with one table 3.1. So one tenant is bound by bytes, 16 + bits of each word; more are bound by decoding.
//!
//! **Order** of one output: one sum of sixteen lanes over all columns, then the entries of tile after tile,
//! four partial sums in turn.
//!
//! **Tried** (Zen 4): tiles of 64 rows and 1024 columns, one after another, for x to stay in a first cache of
//! 32 KiB: 1.4 to 1.7 ms in place of 1.2 for one tenant of 4096 x 4096, since memory is then read by 2 KiB,
//! and nothing for eight.

#![allow(
    clippy::needless_range_loop,
    reason = "arrays indexed in step are what the unrolled loops keep in registers"
)]

use super::few::Few;
use crate::codec::{Encoding, Entries, ExponentTile, Grid, Rect, Tile, disorder, outside};
use crate::cpu::dot::{Rows, Strides};
use crate::cpu::job::{Block, LinearJob, Segment};
use crate::cpu::plan::BLOCK;
use crate::cpu::scratch::Scratch;
use crate::error::{Error, Result};
use crate::vector::bf16dot::{Bf16Dot, Bf16Task};
use crate::vector::float::Float;
use crate::vector::lanes::Code;
use crate::vector::simd::{Kernel, SIMD_LANES, Simd};
use std::ops::Range;

/// The base's words are asked for so many bytes ahead of their use: 2 KB are 0.86 of dense, 4 0.94, 8 0.98,
/// 16 0.99.
const AHEAD: usize = 8192;
/// Bits of a bf16 word below its exponent.
const SHIFT: u32 = 7;

/// One tenant of a block, and which of the block's rows of x are its.
#[derive(Clone, Copy)]
struct StreamTenant<'s, 'a> {
    segment: &'s Segment<'a>,
    j: usize,
    m: usize,
}

impl StreamTenant<'_, '_> {
    fn grid(&self) -> Grid {
        self.segment.weights.grid()
    }
}

impl<D: Float> LinearJob<'_, D> {
    /// A block of rows of x on the words of `exponent` deltas, tenant beside tenant. The words are bf16, the
    /// machine has a bf16 dot product, and the block's rows of W begin and end with tiles of every segment.
    pub(in crate::cpu) fn decoded<S: Simd>(
        &self,
        s: S,
        block: Block,
        segments: &[Segment<'_>],
        sc: &mut Scratch,
    ) -> Result<()> {
        let rows = (block.r1 - block.r0).next_multiple_of(SIMD_LANES);
        let strides = Strides { row: 1, column: rows };
        sc.sums.zeroed(rows * block.m);
        let done = s.with_bf16_dot(Decoded { job: self, block, segments, strides, sc: &mut *sc });
        done.ok_or_else(|| Error::internal("no bf16 dot product"))??;
        let sums = std::mem::take(&mut sc.sums);
        let done = self.finish(s, block, segments, (sums.all(), strides), sc);
        sc.sums = sums;
        done
    }
}

/// The products of one block.
struct Decoded<'t, 'a, D: Float> {
    job: &'t LinearJob<'a, D>,
    block: Block,
    segments: &'t [Segment<'t>],
    strides: Strides,
    sc: &'t mut Scratch,
}

impl<D: Float> Bf16Task for Decoded<'_, '_, D> {
    type Out = Result<()>;

    #[inline(always)]
    fn run<S: Bf16Dot>(mut self, s: S) -> Result<()> {
        let tenant = |segment| {
            let part = self.block.part(segment);
            StreamTenant { segment, j: part.start, m: part.len() }
        };
        let mut tenants: Vec<_> = self.segments.iter().map(tenant).collect();
        // Alike side by side: of one grid, one table, and a row of x each.
        let key = |t: &StreamTenant<'_, '_>| {
            (t.m > 1, t.grid().tile_rows, t.grid().tile_cols, t.segment.weights.widths())
        };
        tenants.sort_by_cached_key(key);
        let height = tenants.iter().map(|t| t.grid().tile_rows).max().unwrap_or(SIMD_LANES);
        for r0 in (self.block.r0..self.block.r1).step_by(height) {
            let rows = r0..(r0 + height).min(self.block.r1);
            let mut rest = &tenants[..];
            let mut own: Option<StreamTenant<'_, '_>> = None;
            while let Some(first) = rest.first() {
                let alike = rest.iter().take(8).take_while(|t| first.m == 1 && key(t) == key(first)).count();
                let taken = match alike {
                    8 => self.alike::<S, 8>(s, rest, &rows)?,
                    4..8 => self.alike::<S, 4>(s, rest, &rows)?,
                    2..4 => self.alike::<S, 2>(s, rest, &rows)?,
                    _ if first.m > 1 => self.alone::<S>(s, *first, &rows)?,
                    // Tenants without their like go by two, if their tiles are cut alike.
                    _ => match own.replace(*first) {
                        Some(other) if other.grid() == first.grid() => {
                            own = None;
                            self.two(s, [other, *first], &rows)?
                        }
                        Some(other) => self.alone::<S>(s, other, &rows)?,
                        None => 1,
                    },
                };
                rest = &rest[taken..];
            }
            if let Some(tenant) = own {
                self.alone::<S>(s, tenant, &rows)?;
            }
        }
        Ok(())
    }
}

/// The streams of one tile column of a band, of the `T` tenants of a pass with `M` rows of x each.
struct Column<'t, 'a, S: Bf16Dot, const T: usize, const M: usize> {
    index: usize,
    rect: Rect,
    tiles: [ExponentTile<'a>; T],
    streams: S::Streams<'a, T>,
    x: [[&'t [u8]; M]; T],
}

impl<'t, D: Float> Decoded<'t, '_, D> {
    /// The first `T` of `tenants`, which are alike. Gives how many of them are done.
    #[inline(always)]
    fn alike<S: Bf16Dot, const T: usize>(
        &mut self,
        s: S,
        tenants: &[StreamTenant<'_, '_>],
        rows: &Range<usize>,
    ) -> Result<usize> {
        let Some(these) = tenants.first_chunk::<T>() else { return Err(Error::internal("too few tenants")) };
        self.pass::<S, T, 1>(s, these, rows)?;
        Ok(T)
    }

    /// One tenant with any rows of x. Gives one.
    #[inline(always)]
    fn alone<S: Bf16Dot>(
        &mut self,
        s: S,
        tenant: StreamTenant<'_, '_>,
        rows: &Range<usize>,
    ) -> Result<usize> {
        match tenant.m {
            1 => self.pass::<S, 1, 1>(s, &[tenant], rows)?,
            2 => self.pass::<S, 1, 2>(s, &[tenant], rows)?,
            3 | 4 => self.pass::<S, 1, 4>(s, &[tenant], rows)?,
            _ => {
                for index in tiles(&tenant.grid(), rows) {
                    self.through_memory(s, tenant, index)?;
                }
            }
        }
        Ok(1)
    }

    /// Tenants of one grid and one table, with at most `M` rows of x each: missing rows are the last once
    /// more.
    #[inline(always)]
    fn pass<S: Bf16Dot, const T: usize, const M: usize>(
        &mut self,
        s: S,
        tenants: &[StreamTenant<'_, '_>; T],
        rows: &Range<usize>,
    ) -> Result<()> {
        let grid = tenants[0].grid();
        let across = grid.tile_cols_count();
        for band in tiles(&grid, rows).step_by(across.max(1)) {
            let Some(mut columns) = self.columns::<S, T, M>(s, tenants, band..band + across)? else {
                for tenant in tenants {
                    for index in band..band + across {
                        self.through_memory(s, *tenant, index)?;
                    }
                }
                continue;
            };
            let rect = columns[0].rect;
            let mut lanes = [[[s.splat(0.0); SIMD_LANES]; M]; T];
            for r in 0..rect.rows() {
                let mut sums = [[s.splat(0.0); M]; T];
                for column in &mut columns {
                    let base = self.job.base.span(rect.r0 + r, column.rect.c0, column.rect.cols());
                    sums = s.decode_dots::<T, M>(&mut column.streams, base, &column.x, AHEAD, sums);
                }
                for t in 0..T {
                    for j in 0..M {
                        lanes[t][j][r % SIMD_LANES] = sums[t][j];
                    }
                }
                if r % SIMD_LANES == SIMD_LANES - 1 || r + 1 == rect.rows() {
                    for t in 0..T {
                        for j in 0..tenants[t].m.min(M) {
                            self.add(&s.sum16(&lanes[t][j]), &rect, r, tenants[t].j + j);
                        }
                    }
                }
            }
            for column in &columns {
                for t in 0..T {
                    let done = s.finish::<T>(&column.streams);
                    done.map_err(|e| named(e, &tenants[t], column.index))?;
                    self.entries(s, &column.tiles[t], &grid, &column.rect, &tenants[t])
                        .map_err(|e| named(e, &tenants[t], column.index))?;
                }
            }
        }
        Ok(())
    }

    /// Two tenants of one grid with tables of their own and a row of x each. Gives one: the other was passed
    /// before.
    #[inline(always)]
    fn two<S: Bf16Dot>(
        &mut self,
        s: S,
        tenants: [StreamTenant<'_, '_>; 2],
        rows: &Range<usize>,
    ) -> Result<usize> {
        let grid = tenants[0].grid();
        let across = grid.tile_cols_count();
        for band in tiles(&grid, rows).step_by(across.max(1)) {
            let [a, b] = [&tenants[0], &tenants[1]]
                .map(|t| self.columns::<S, 1, 1>(s, std::array::from_ref(t), band..band + across));
            let (Some(mut a), Some(mut b)) = (a?, b?) else {
                let last = (rows.start.max(grid.rect(band).r0))..grid.rect(band).r1;
                self.alone::<S>(s, tenants[0], &last)?;
                self.alone::<S>(s, tenants[1], &last)?;
                continue;
            };
            let rect = a[0].rect;
            let mut lanes = [[s.splat(0.0); SIMD_LANES]; 2];
            for r in 0..rect.rows() {
                let mut sums = [s.splat(0.0); 2];
                for (a, b) in a.iter_mut().zip(&mut b) {
                    let base = self.job.base.span(rect.r0 + r, a.rect.c0, a.rect.cols());
                    let x = [a.x[0][0], b.x[0][0]];
                    sums = s.decode_dots_two(&mut a.streams, &mut b.streams, base, x, AHEAD, sums);
                }
                (lanes[0][r % SIMD_LANES], lanes[1][r % SIMD_LANES]) = (sums[0], sums[1]);
                if r % SIMD_LANES == SIMD_LANES - 1 || r + 1 == rect.rows() {
                    self.add(&s.sum16(&lanes[0]), &rect, r, tenants[0].j);
                    self.add(&s.sum16(&lanes[1]), &rect, r, tenants[1].j);
                }
            }
            for (columns, tenant) in [(&a, &tenants[0]), (&b, &tenants[1])] {
                for column in columns {
                    s.finish::<1>(&column.streams).map_err(|e| named(e, tenant, column.index))?;
                    self.entries(s, &column.tiles[0], &grid, &column.rect, tenant)
                        .map_err(|e| named(e, tenant, column.index))?;
                }
            }
        }
        Ok(1)
    }

    /// The streams of a band of tiles, if all its words are multiplied as they are decoded.
    fn columns<'a, S: Bf16Dot, const T: usize, const M: usize>(
        &self,
        s: S,
        tenants: &[StreamTenant<'_, 'a>; T],
        indices: Range<usize>,
    ) -> Result<Option<Vec<Column<'t, 'a, S, T, M>>>> {
        let grid = tenants[0].grid();
        let mut columns = Vec::with_capacity(indices.len());
        for index in indices {
            let mut these = Vec::with_capacity(T);
            for tenant in tenants {
                these.push(tile(tenant, index)?);
            }
            if !these.iter().all(in_registers) {
                return Ok(None);
            }
            let rect = grid.rect(index);
            let Ok(tiles) = <[ExponentTile<'a>; T]>::try_from(these) else {
                return Err(Error::internal("a tile for each tenant"));
            };
            let code = Code { widths: tiles[0].widths, shift: SHIFT };
            let Some(streams) = s.streams::<T>(std::array::from_fn(|t| &tiles[t]), code) else {
                return Ok(None);
            };
            let x = |t: usize, j: usize| self.x(tenants[t].j + j.min(tenants[t].m - 1), &rect);
            let x = std::array::from_fn(|t| std::array::from_fn(|j| x(t, j)));
            columns.push(Column { index, rect, tiles, streams, x });
        }
        Ok(Some(columns))
    }

    /// A tile's own words in scratch, exceptions and all, times the tenant's rows of x.
    #[inline(always)]
    fn through_memory<S: Bf16Dot>(&mut self, s: S, tenant: StreamTenant<'_, '_>, index: usize) -> Result<()> {
        let rect = tenant.grid().rect(index);
        let len = rect.cols() * D::BYTES;
        let mut x: [&[u8]; BLOCK] = [&[]; BLOCK];
        for (j, x) in x.iter_mut().enumerate().take(tenant.m) {
            *x = self.x(tenant.j + j, &rect);
        }
        let words = self.sc.words.bytes_mut(rect.rows() * len);
        tenant.segment.restore(s, index, words)?;
        let at = rect.r0 - self.block.r0 + tenant.j * self.strides.column;
        let words = Rows { bytes: words, stride: len, len };
        let sums = &mut self.sc.sums.all_mut()[at..];
        Few { words, rows: rect.rows(), x: &x[..tenant.m], sums, strides: self.strides }.run(s);
        Ok(())
    }

    /// Columns of the block's row `j` of x.
    fn x(&self, j: usize, rect: &Rect) -> &'t [u8] {
        self.job.x_row(self.block.m0 + j, &(rect.c0..rect.c1)).bytes
    }

    /// Add the sums of the sixteen rows of a tile that end with row `r` to the totals of row `j` of x.
    #[inline(always)]
    fn add(&mut self, sums: &[f32; SIMD_LANES], rect: &Rect, r: usize, j: usize) {
        let first = r / SIMD_LANES * SIMD_LANES;
        let at = rect.r0 - self.block.r0 + first + j * self.strides.column;
        let totals = &mut self.sc.sums.all_mut()[at..at + r - first + 1];
        totals.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
    }

    /// The entries of a tile, for each of the tenant's rows of x.
    #[inline(always)]
    fn entries<S: Simd>(
        &mut self,
        s: S,
        tile: &ExponentTile<'_>,
        grid: &Grid,
        rect: &Rect,
        tenant: &StreamTenant<'_, '_>,
    ) -> Result<()> {
        if tile.entries.is_empty() {
            return Ok(());
        }
        for j in 0..tenant.m {
            let x = self.x(tenant.j + j, rect);
            let at = rect.r0 - self.block.r0 + (tenant.j + j) * self.strides.column;
            let sums = &mut self.sc.sums.all_mut()[at..at + rect.rows()];
            s.run(AddEntries { entries: tile.entries, tile_cols: grid.tile_cols, x, sums })?;
        }
        Ok(())
    }
}

/// Adds the entries of a tile, whose rows have the totals `sums`, times a row of x. A row's entries go to
/// four sums in turn, so that none waits for the one before.
struct AddEntries<'a> {
    entries: Entries<'a>,
    tile_cols: usize,
    x: &'a [u8],
    sums: &'a mut [f32],
}

impl Kernel for AddEntries<'_> {
    type Out = Result<()>;

    #[inline(always)]
    fn call<S: Simd>(self, _: S) -> Result<()> {
        let (positions, _) = self.entries.positions.as_chunks::<2>();
        let (differences, _) = self.entries.differences.as_chunks::<2>();
        let (words, _) = self.x.as_chunks::<2>();
        let (shift, mask) = (self.tile_cols.trailing_zeros(), self.tile_cols - 1);
        let (mut row, mut four) = (0, [0f32; 4]);
        // The positions of the last two entries; more than two may not be of one word.
        let mut last = [usize::MAX; 2];
        for (i, (position, difference)) in positions.iter().zip(differences).enumerate() {
            let position = usize::from(u16::from_le_bytes(*position));
            if last[1] != usize::MAX && (position < last[1] || position == last[0]) {
                return Err(disorder("entry", i, position));
            }
            last = [last[1], position];
            let (r, c) = (position >> shift, position & mask);
            let (Some(word), true) = (words.get(c), r < self.sums.len()) else {
                return Err(outside("entry", position));
            };
            if r != row {
                self.sums[row] += (four[0] + four[1]) + (four[2] + four[3]);
                (row, four) = (r, [0.0; 4]);
            }
            let sum = value(difference).mul_add(value(word), four[0]);
            // In turn without an index, which would lie in memory.
            four = [four[1], four[2], four[3], sum];
        }
        if let Some(total) = self.sums.get_mut(row) {
            *total += (four[0] + four[1]) + (four[2] + four[3]);
        }
        Ok(())
    }
}

/// The value of a bf16 word.
#[inline(always)]
fn value(word: &[u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(*word)) << 16)
}

/// The tiles of a grid that rows `rows` of W touch.
fn tiles(grid: &Grid, rows: &Range<usize>) -> Range<usize> {
    let across = grid.tile_cols_count();
    rows.start / grid.tile_rows * across..rows.end.div_ceil(grid.tile_rows) * across
}

/// A tenant's tile.
fn tile<'a>(tenant: &StreamTenant<'_, 'a>, index: usize) -> Result<ExponentTile<'a>> {
    match tenant.segment.weights.tile(index) {
        Ok(Tile::Exponent(tile)) => Ok(tile),
        Ok(_) => Err(Error::internal(format!("not a tile of {}", Encoding::Exponent))),
        Err(e) => Err(named(e, tenant, index)),
    }
}

/// Whether a tile's words times x are the decoded words times x and what its entries add: no exception lies
/// in between.
fn in_registers(tile: &ExponentTile<'_>) -> bool {
    tile.additive || tile.exceptions.is_empty()
}

#[cold]
fn named(e: Error, tenant: &StreamTenant<'_, '_>, index: usize) -> Error {
    e.within(format_args!("{}, tile {index}", tenant.segment.name()))
}
