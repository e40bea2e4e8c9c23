//! Up to sixteen rows of x of tenants with `exponent` deltas: words are decoded in registers and multiplied at once.
//!
//!     for each band of rows of W, for each pass of tenants over it, for each tile column:
//!         for each row of the tile: 32 words of the base a step, decoded for every tenant of the pass, times its x
//!         then the entries of each tenant, and the totals of its rows
//!
//! A pass is up to eight tenants with a row of x each and one width table, whose streams take their units in the same steps,
//! so that classes, widths and who takes a unit are computed once; or two tenants with tables of their own; or one with up
//! to four rows of x. A tenant with more rows has its tile decoded into scratch, and multiplied as words in memory are.
//!
//! **Floor** (Zen 5, cycles for 32 words): decoding and one product 7.0, where memory takes 9.3; each tenant of two 5.3, of
//! eight with one table 3.1. So one tenant is bound by bytes, 16 + bits of each word; more are bound by decoding.
//!
//! **Order** of one output: tile columns of the delta's own grid, each a sum of sixteen lanes, then the tile's entries, four
//! partial sums in turn.

use super::few::Few;
use crate::codec::{Encoding, ExponentTile, Grid, Rect, Tile};
use crate::cpu::dot::{Rows, Strides};
use crate::cpu::fused::Block;
use crate::cpu::linear::{Job, Segment};
use crate::cpu::plan::BLOCK;
use crate::cpu::scratch::Scratch;
use crate::error::{Error, Result};
use crate::vector::bf16dot::{Bf16Dot, Bf16Task};
use crate::vector::float::Float;
use crate::vector::lanes::Code;
use crate::vector::simd::{LANES, Simd};

/// The base's words are asked for so many bytes ahead of their use: 2 KB are 0.86 of dense, 4 0.94, 8 0.98, 16 0.99.
const AHEAD: usize = 8192;
/// Bits of a bf16 word below its exponent.
const SHIFT: u32 = 7;

/// One tenant of a block, and which of the block's rows of x are its.
#[derive(Clone, Copy)]
struct Tenant<'s, 'a> {
    segment: &'s Segment<'a>,
    j: usize,
    m: usize,
}

impl<D: Float> Job<'_, D> {
    /// A block of rows of x on the words of `exponent` deltas, tenant beside tenant. The words are bf16, the machine has a
    /// bf16 dot product, and the block's rows of W begin and end with tiles of every segment.
    pub(in crate::cpu) fn decoded<S: Simd>(
        &self,
        s: S,
        block: Block,
        segments: &[Segment<'_>],
        sc: &mut Scratch,
    ) -> Result<()> {
        let rows = (block.r1 - block.r0).next_multiple_of(LANES);
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
    job: &'t Job<'a, D>,
    block: Block,
    segments: &'t [Segment<'t>],
    strides: Strides,
    sc: &'t mut Scratch,
}

impl<D: Float> Bf16Task for Decoded<'_, '_, D> {
    type Out = Result<()>;

    #[inline(always)]
    fn run<S: Bf16Dot>(mut self, s: S) -> Result<()> {
        let (block, segments) = (self.block, self.segments);
        let tenant = |segment| {
            let part = block.part(segment);
            Tenant { segment, j: part.start, m: part.len() }
        };
        let mut tenants: Vec<_> = segments.iter().map(tenant).collect();
        // Alike side by side: of one grid, one table, and a row of x each.
        let key = |t: &Tenant<'_, '_>| {
            let (grid, widths) = (t.segment.weights.grid(), t.segment.weights.widths());
            (t.m > 1, grid.tile_rows, grid.tile_cols, widths)
        };
        tenants.sort_by_cached_key(key);
        let height = tenants.iter().map(|t| t.segment.weights.grid().tile_rows).max().unwrap_or(LANES);
        for r0 in (block.r0..block.r1).step_by(height) {
            let r1 = (r0 + height).min(block.r1);
            let mut rest = &tenants[..];
            let mut own: Option<Tenant<'_, '_>> = None;
            while let Some(first) = rest.first() {
                let alike = rest.iter().take(8).take_while(|t| first.m == 1 && key(t) == key(first)).count();
                let taken = match alike {
                    8 => self.pass::<S, 8>(s, rest, r0..r1)?,
                    4..8 => self.pass::<S, 4>(s, rest, r0..r1)?,
                    2..4 => self.pass::<S, 2>(s, rest, r0..r1)?,
                    1 if first.m == 1 => {
                        // Tenants without their like go by two, if their tiles are cut alike.
                        match own.take() {
                            Some(other) if grids_alike(&other, first) => {
                                self.two(s, [other, *first], r0..r1)?
                            }
                            Some(other) => {
                                self.alone::<S>(s, other, r0..r1)?;
                                own = Some(*first);
                            }
                            None => own = Some(*first),
                        }
                        1
                    }
                    _ => {
                        self.alone::<S>(s, *first, r0..r1)?;
                        1
                    }
                };
                rest = &rest[taken..];
            }
            if let Some(tenant) = own {
                self.alone::<S>(s, tenant, r0..r1)?;
            }
        }
        Ok(())
    }
}

fn grids_alike(a: &Tenant<'_, '_>, b: &Tenant<'_, '_>) -> bool {
    a.segment.weights.grid() == b.segment.weights.grid()
}

/// The tiles of a grid that rows `rows` of W touch.
fn tiles(grid: &Grid, rows: &std::ops::Range<usize>) -> std::ops::Range<usize> {
    let across = grid.tile_cols_count();
    rows.start / grid.tile_rows * across..rows.end.div_ceil(grid.tile_rows) * across
}

type RowsOfW = std::ops::Range<usize>;

impl<'t, D: Float> Decoded<'t, '_, D> {
    /// The first `T` of `tenants`, which are alike. Gives how many that are.
    #[inline(always)]
    fn pass<S: Bf16Dot, const T: usize>(
        &mut self,
        s: S,
        tenants: &[Tenant<'_, '_>],
        rows: RowsOfW,
    ) -> Result<usize> {
        let grid = tenants[0].segment.weights.grid();
        for index in tiles(&grid, &rows) {
            let mut these = Vec::with_capacity(T);
            for t in &tenants[..T] {
                these.push(tile(t, index)?);
            }
            let streams = match these.iter().all(in_registers) {
                true => <[&ExponentTile<'_>; T]>::try_from(these.iter().collect::<Vec<_>>()).ok(),
                false => None,
            };
            let widths = *these[0].widths;
            let code = Code { widths: &widths, shift: SHIFT };
            let Some(mut streams) = streams.and_then(|tiles| s.streams::<T>(tiles, code)) else {
                for t in &tenants[..T] {
                    self.one_tile::<S>(s, *t, &grid, index)?;
                }
                continue;
            };
            let rect = grid.rect(index);
            let x: [[&[u8]; 1]; T] = std::array::from_fn(|t| [self.x(tenants[t].j, &rect)]);
            let mut lanes = [[s.splat(0.0); LANES]; T];
            for r in 0..rect.rows() {
                let (base, ahead) = self.base(&grid, index, &rect, r);
                let sums = s.decode_dots::<T, 1>(&mut streams, base, &x, ahead);
                for t in 0..T {
                    lanes[t][r % LANES] = sums[t][0];
                }
                if r % LANES == LANES - 1 || r + 1 == rect.rows() {
                    for t in 0..T {
                        self.add(&s.sum16(&lanes[t]), &rect, r, tenants[t].j);
                    }
                }
            }
            s.finish::<T>(&streams).map_err(|e| named(e, &tenants[0], index))?;
            for (t, tile) in tenants.iter().zip(&these) {
                self.entries(tile, &grid, &rect, t).map_err(|e| named(e, t, index))?;
            }
        }
        Ok(T)
    }

    /// Two tenants of one grid with tables of their own.
    #[inline(always)]
    fn two<S: Bf16Dot>(&mut self, s: S, tenants: [Tenant<'_, '_>; 2], rows: RowsOfW) -> Result<()> {
        let grid = tenants[0].segment.weights.grid();
        for index in tiles(&grid, &rows) {
            let these = [tile(&tenants[0], index)?, tile(&tenants[1], index)?];
            if !these.iter().all(in_registers) {
                tenants.iter().try_for_each(|t| self.one_tile::<S>(s, *t, &grid, index))?;
                continue;
            }
            let open = |t: usize| s.streams::<1>([&these[t]], Code { widths: these[t].widths, shift: SHIFT });
            let (Some(mut a), Some(mut b)) = (open(0), open(1)) else {
                return Err(Error::internal("one stream is as long as itself"));
            };
            let rect = grid.rect(index);
            let x = [self.x(tenants[0].j, &rect), self.x(tenants[1].j, &rect)];
            let mut lanes = [[s.splat(0.0); LANES]; 2];
            for r in 0..rect.rows() {
                let (base, ahead) = self.base(&grid, index, &rect, r);
                let sums = s.decode_dots_two(&mut a, &mut b, base, x, ahead);
                (lanes[0][r % LANES], lanes[1][r % LANES]) = (sums[0], sums[1]);
                if r % LANES == LANES - 1 || r + 1 == rect.rows() {
                    for t in 0..2 {
                        self.add(&s.sum16(&lanes[t]), &rect, r, tenants[t].j);
                    }
                }
            }
            for (t, streams) in [&a, &b].into_iter().enumerate() {
                s.finish::<1>(streams).map_err(|e| named(e, &tenants[t], index))?;
                self.entries(&these[t], &grid, &rect, &tenants[t])
                    .map_err(|e| named(e, &tenants[t], index))?;
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn alone<S: Bf16Dot>(&mut self, s: S, tenant: Tenant<'_, '_>, rows: RowsOfW) -> Result<()> {
        let grid = tenant.segment.weights.grid();
        tiles(&grid, &rows).try_for_each(|index| self.one_tile::<S>(s, tenant, &grid, index))
    }

    /// One tile of one tenant with any rows of x.
    #[inline(always)]
    fn one_tile<S: Bf16Dot>(
        &mut self,
        s: S,
        tenant: Tenant<'_, '_>,
        grid: &Grid,
        index: usize,
    ) -> Result<()> {
        let tile = tile(&tenant, index)?;
        match tenant.m {
            _ if !in_registers(&tile) => self.through_memory(s, tenant, grid, index),
            1 => self.in_one::<S, 1>(s, tenant, grid, index, &tile),
            2 => self.in_one::<S, 2>(s, tenant, grid, index, &tile),
            3 | 4 => self.in_one::<S, 4>(s, tenant, grid, index, &tile),
            _ => self.through_memory(s, tenant, grid, index),
        }
    }

    /// At most `M` rows of x of one tenant; missing ones are the last once more.
    #[inline(always)]
    fn in_one<S: Bf16Dot, const M: usize>(
        &mut self,
        s: S,
        tenant: Tenant<'_, '_>,
        grid: &Grid,
        index: usize,
        tile: &ExponentTile<'_>,
    ) -> Result<()> {
        let code = Code { widths: tile.widths, shift: SHIFT };
        let Some(mut streams) = s.streams::<1>([tile], code) else {
            return Err(Error::internal("one stream is as long as itself"));
        };
        let rect = grid.rect(index);
        let x = [std::array::from_fn(|j| self.x(tenant.j + j.min(tenant.m - 1), &rect))];
        let mut lanes = [[s.splat(0.0); LANES]; M];
        for r in 0..rect.rows() {
            let (base, ahead) = self.base(grid, index, &rect, r);
            let [sums] = s.decode_dots::<1, M>(&mut streams, base, &x, ahead);
            for j in 0..M {
                lanes[j][r % LANES] = sums[j];
            }
            if r % LANES == LANES - 1 || r + 1 == rect.rows() {
                for j in 0..tenant.m {
                    self.add(&s.sum16(&lanes[j]), &rect, r, tenant.j + j);
                }
            }
        }
        s.finish::<1>(&streams)
            .and_then(|()| self.entries(tile, grid, &rect, &tenant))
            .map_err(|e| named(e, &tenant, index))
    }

    /// A tile's own words in scratch, exceptions and all, times the tenant's rows of x.
    #[inline(always)]
    fn through_memory<S: Bf16Dot>(
        &mut self,
        s: S,
        tenant: Tenant<'_, '_>,
        grid: &Grid,
        index: usize,
    ) -> Result<()> {
        let rect = grid.rect(index);
        let len = rect.cols() * D::BYTES;
        let mut x: [&[u8]; BLOCK] = [&[]; BLOCK];
        for (j, x) in x.iter_mut().enumerate().take(tenant.m) {
            *x = self.job.x_row(self.block.m0 + tenant.j + j, &(rect.c0..rect.c1)).bytes;
        }
        let words = self.sc.words.bytes_mut(rect.rows() * len);
        tenant.segment.restore(s, index, words)?;
        let at = rect.r0 - self.block.r0 + tenant.j * self.strides.column;
        Few {
            words: Rows { bytes: words, stride: len, len },
            rows: rect.rows(),
            x: &x[..tenant.m],
            sums: &mut self.sc.sums.all_mut()[at..],
            strides: self.strides,
        }
        .run(s);
        Ok(())
    }

    /// Columns of the block's row `j` of x.
    #[inline(always)]
    fn x(&self, j: usize, rect: &Rect) -> &'t [u8] {
        self.job.x_row(self.block.m0 + j, &(rect.c0..rect.c1)).bytes
    }

    /// Row `r` of a tile's base words, and where the words lie that are read [`AHEAD`] bytes later: rows further down, or
    /// in the tile to come.
    #[inline(always)]
    fn base(&self, grid: &Grid, index: usize, rect: &Rect, r: usize) -> (&'t [u8], usize) {
        let (len, stride) = (rect.cols() * D::BYTES, self.job.k * D::BYTES);
        let words = self.job.base.span(rect.r0 + r, rect.c0, rect.cols());
        let down = (AHEAD / len.max(1)).max(1);
        let across = grid.tile_cols_count();
        let ahead = if r + down < rect.rows() {
            down * stride
        } else if (index + 1) % across != 0 {
            (down * stride + len).wrapping_sub(rect.rows() * stride)
        } else {
            (down * stride).wrapping_sub(rect.c0 * D::BYTES)
        };
        (words, ahead)
    }

    /// Add the sums of the sixteen rows of a tile that end with row `r` to the totals of row `j` of x.
    #[inline(always)]
    fn add(&mut self, sums: &[f32; LANES], rect: &Rect, r: usize, j: usize) {
        let first = r / LANES * LANES;
        let at = rect.r0 - self.block.r0 + first + j * self.strides.column;
        let totals = &mut self.sc.sums.all_mut()[at..at + r - first + 1];
        totals.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
    }

    /// The entries of a tile, for each of the tenant's rows of x.
    #[inline(always)]
    fn entries(
        &mut self,
        _tile: &ExponentTile<'_>,
        _grid: &Grid,
        _rect: &Rect,
        _tenant: &Tenant<'_, '_>,
    ) -> Result<()> {
        Ok(())
    }
}

/// A tenant's tile.
fn tile<'a>(tenant: &Tenant<'_, 'a>, index: usize) -> Result<ExponentTile<'a>> {
    match tenant.segment.weights.tile(index) {
        Ok(Tile::Exponent(tile)) => Ok(tile),
        Ok(_) => Err(Error::internal(format!("not a tile of {}", Encoding::Exponent))),
        Err(e) => Err(named(e, tenant, index)),
    }
}

/// Whether a tile's words times x are the decoded words times x and what its entries add: no exception lies in between.
fn in_registers(tile: &ExponentTile<'_>) -> bool {
    tile.exceptions.is_empty()
}

#[cold]
fn named(e: Error, tenant: &Tenant<'_, '_>, index: usize) -> Error {
    e.within(format_args!("{}, tile {index}", tenant.segment.name()))
}
