//! `delta_linear`: which rows, tiles and rows of x go to which kernel, and what a result goes through on its way out.
//!
//! Small m (at most 16 rows of x a block; any m when deterministic): chunks of row-panels, column tile after column
//! tile, rows of x as f32 in scratch; per tile the base product, then the entries. No weight is restored.
//! Large m: a tile is restored into scratch as f32, then multiplied with every row of x.
//! Either way an output that is not finite is computed again from the fine-tuned words themselves, in f64 (see `wide`).
//!
//! **Longest chain of roundings** of one output (D of DESIGN section 5): small m: `tile_cols / 16 + 4` for a base
//! product, one per column tile, one per record of its lane (two bytes of gap or one, padding adds none), one for the
//! bias. Large m: `1024 / 16 + 4` for a block of 1024 columns, one per block, one for the bias.

use super::counters;
use super::dot::{PanelProduct, Rows, Split, Strides, TileProduct, ToSplit};
use super::exec::{Executor, try_run};
use super::float::{Float, padded};
use super::scratch::{self, Scratch};
use super::simd::{GROUP, LANES, Simd};
use super::sparse::{Gathered, Natural, TRANSPOSE_ROWS, Transposed};
use super::weights::Weights;
use super::{Mode, exponent, wide};
use crate::codec::{Encoding, Grid, Rect, SparseTile, Tile};
use crate::error::{Error, Result};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Rows of x of one block.
pub(super) const BLOCK: usize = LANES;

/// Rows of x above which a restored panel pays in `mode = "fast"`. Below, restoring costs as much as walking the entries
/// once more for the second block of rows (measured at 4096 x 4096 bf16, AVX2: equal at 32 rows from 3 to 30 % changed,
/// 10 to 30 % faster at 64).
pub(super) const PANEL_ABOVE: usize = 2 * BLOCK;

/// Totals of one task on a restored panel (512 KiB); more rows of x are done in blocks.
const PANEL_SUMS: usize = 1 << 17;

/// One call.
pub(super) struct Job<'a, D: Float> {
    /// No other call's.
    id: u64,
    pub(super) x: &'a [u8],
    pub(super) weights: Weights<'a>,
    pub(super) bias: Option<&'a [u8]>,
    pub(super) out: &'a [D::Shared],
    pub(super) grid: Grid,
    pub(super) n: usize,
    pub(super) k: usize,
}

/// What one call multiplies.
pub(super) struct Call<'a> {
    pub(super) x: &'a [u8],
    pub(super) m: usize,
    pub(super) weights: Weights<'a>,
    pub(super) bias: Option<&'a [u8]>,
    pub(super) mode: Mode,
}

/// Run a checked call.
pub(super) fn run<S: Simd, D: Float>(
    s: S,
    args: &Call<'_>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let shape = args.weights.base.shape();
    let job = Job::<D> {
        id: CALLS.fetch_add(1, Relaxed),
        x: args.x,
        weights: args.weights,
        bias: args.bias,
        out: D::share(out, "out")?,
        grid: args.weights.grid(),
        n: shape.n,
        k: shape.k,
    };
    if args.m > PANEL_ABOVE && args.mode == Mode::Fast {
        let block = PANEL_SUMS / job.grid.tile_rows;
        let bands = job.grid.tile_rows_count();
        return try_run(exec, bands * args.m.div_ceil(block), |task| {
            let m0 = task / bands * block;
            scratch::with(|sc| job.panels(s, task % bands, m0, block.min(args.m - m0), sc))
        });
    }
    let rows = job.chunk_rows();
    let chunks = job.n.div_ceil(rows);
    try_run(exec, chunks * args.m.div_ceil(BLOCK), |task| {
        let (r0, m0) = (task % chunks * rows, task / chunks * BLOCK);
        let block = Block { r0, r1: (r0 + rows).min(job.n), m0, m: BLOCK.min(args.m - m0) };
        scratch::with(|sc| job.fused(s, block, sc))
    })
}

/// Rows of W and rows of x of one task.
#[derive(Clone, Copy)]
struct Block {
    r0: usize,
    r1: usize,
    m0: usize,
    m: usize,
}

impl<D: Float> Job<'_, D> {
    /// Rows of W of one small-m task: enough to pay for converting x, few enough for every thread to have some.
    fn chunk_rows(&self) -> usize {
        let most = if self.grid.tile_cols_count() == 1 { 64 } else { 256 };
        let tile = self.grid.tile_rows;
        self.n.div_ceil(16).min(most).next_multiple_of(tile)
    }

    /// Whether a block's entries go through the transposed kernel. Either kernel gives the same bits. Gathering costs
    /// about 6.5 ns a record and row of x on Zen 3, the transposed kernel 25 ns a record whatever m, and more where
    /// changes are so rare that every entry finds its row of x outside L2.
    fn transposed(&self, block: Block) -> bool {
        self.weights.encoding() == Encoding::Sparse
            && block.m >= TRANSPOSE_ROWS
            && self.weights.changed().saturating_mul(64) >= (self.n as u64).saturating_mul(self.k as u64)
    }

    /// `rows` rows of x from `m0` on, the columns of `rect`.
    pub(super) fn x_rows(&self, m0: usize, rect: &Rect) -> Rows<'_> {
        let at = (m0 * self.k + rect.c0) * D::BYTES;
        Rows { bytes: &self.x[at..], stride: self.k * D::BYTES, len: rect.cols() * D::BYTES }
    }

    fn base_rows(&self, rect: &Rect) -> Rows<'_> {
        let at = (rect.r0 * self.k + rect.c0) * D::BYTES;
        Rows {
            bytes: &self.weights.base.bytes()[at..],
            stride: self.k * D::BYTES,
            len: rect.cols() * D::BYTES,
        }
    }

    /// Small m: one block.
    fn fused<S: Simd>(&self, s: S, block: Block, sc: &mut Scratch) -> Result<()> {
        let across = self.grid.tile_cols_count();
        let rows = (block.r1 - block.r0).next_multiple_of(LANES);
        let transposed = self.transposed(block);
        let strides =
            if transposed { Strides { row: LANES, column: 1 } } else { Strides { row: 1, column: rows } };
        sc.sums.zeroed(rows * if transposed { LANES } else { block.m });
        for tc in 0..across {
            self.prepare(s, block, tc, sc);
            for tr in block.r0 / self.grid.tile_rows..block.r1.div_ceil(self.grid.tile_rows) {
                let index = tr * across + tc;
                self.tile(s, index, block, strides, sc)
                    .map_err(|e| e.within(format!("delta, tile {index}")))?;
            }
        }
        let sums = std::mem::take(&mut sc.sums);
        let done = self.finish(s, block, sums.all(), strides, sc);
        sc.sums = sums;
        done
    }

    /// x as f32 for tile column `tc`, unless this thread has it from its last task.
    fn prepare<S: Simd>(&self, s: S, block: Block, tc: usize, sc: &mut Scratch) {
        let key = Some((self.id, block.m0, tc));
        if sc.holds == key {
            return;
        }
        sc.holds = None;
        let rect = self.grid.rect(tc);
        let (words, width) = (self.x_rows(block.m0, &rect), padded(rect.cols()));
        let split = sc.split.get(block.m * width).as_chunks_mut::<GROUP>().0;
        s.run(ToSplit::<D> { words, rows: block.m, to: split, groups: width / GROUP, dtype: PhantomData });
        if self.weights.encoding() == Encoding::Sparse {
            let transposed = self.transposed(block);
            let columns = rect.cols();
            let to = if transposed {
                sc.entries.zeroed(columns * LANES)
            } else {
                sc.entries.get(columns * block.m)
            };
            s.run(Natural::<D> { words, rows: block.m, columns, transposed, to, dtype: PhantomData });
        }
        sc.holds = key;
    }

    /// Add one tile's part to the totals.
    fn tile<S: Simd>(
        &self,
        s: S,
        index: usize,
        block: Block,
        strides: Strides,
        sc: &mut Scratch,
    ) -> Result<()> {
        let rect = self.grid.rect(index);
        let tile = self.weights.tile(index)?;
        match &tile {
            Tile::Exponent(t) => {
                let (x, partial) = (sc.split.get(block.m * padded(rect.cols())), &mut [[0.0; LANES]; BLOCK]);
                let x = x.as_chunks::<GROUP>().0;
                let sums = &mut sc.sums.all_mut()[(rect.r0 - block.r0) * strides.row..];
                exponent::product::<S, D>(
                    s,
                    t,
                    self.base_rows(&rect),
                    &self.grid,
                    &rect,
                    (x, block.m),
                    partial,
                    |r, j, v| {
                        sums[r * strides.row + j * strides.column] += v;
                    },
                )
            }
            Tile::Raw(raw) => {
                let rows = Rows { bytes: raw.bytes, stride: raw.stride, len: raw.row_bytes };
                self.product(s, rows, &rect, block, strides, sc);
                Ok(())
            }
            Tile::Unchanged => {
                self.product(s, self.base_rows(&rect), &rect, block, strides, sc);
                Ok(())
            }
            Tile::Sparse(t) => {
                self.product(s, self.base_rows(&rect), &rect, block, strides, sc);
                self.entries(s, t, &rect, block, strides, sc)
            }
        }
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
        let width = padded(rect.cols());
        let x = sc.split.get(block.m * width).as_chunks::<GROUP>().0;
        let partial = sc.panel.get(LANES * LANES * BLOCK).as_chunks_mut::<LANES>().0;
        for r in (0..rect.rows()).step_by(LANES) {
            let sums = &mut sc.sums.all_mut()[(rect.r0 - block.r0 + r) * strides.row..];
            s.run(TileProduct::<D> {
                words: Rows { bytes: &words.bytes[r * words.stride..], ..words },
                rows: LANES.min(rect.rows() - r),
                x,
                groups: width / GROUP,
                m: block.m,
                partial,
                sums,
                strides,
                dtype: PhantomData,
            });
        }
    }

    /// The entries of a `sparse` tile.
    fn entries<S: Simd>(
        &self,
        s: S,
        tile: &SparseTile<'_>,
        rect: &Rect,
        block: Block,
        strides: Strides,
        sc: &mut Scratch,
    ) -> Result<()> {
        // So that sixteen one-byte gaps each cannot wrap a column.
        if tile.records > 1 << 24 {
            return Err(Error::corrupt(format!("{} records in one tile", tile.records)));
        }
        let sums = &mut sc.sums.all_mut()[(rect.r0 - block.r0) * strides.row..];
        let width = rect.cols();
        let largest = if strides.column == 1 {
            let x = sc.entries.get(width * LANES).as_chunks().0;
            s.run(Transposed::<D> { tile, x, sums: sums.as_chunks_mut().0, dtype: PhantomData })
        } else {
            let x = sc.entries.get(width * block.m);
            s.run(Gathered::<D> {
                tile,
                x,
                width,
                m: block.m,
                sums,
                stride: strides.column,
                dtype: PhantomData,
            })
        };
        if tile.records > 0 && largest as usize >= width {
            return Err(Error::corrupt(format!("an entry names column {largest} of {width}")));
        }
        Ok(())
    }

    /// Bias, rounding, and the way out; band by band, so that a band with non-finite outputs is done again.
    fn finish<S: Simd>(
        &self,
        s: S,
        block: Block,
        sums: &[f32],
        strides: Strides,
        sc: &mut Scratch,
    ) -> Result<()> {
        let tile_rows = self.grid.tile_rows;
        for band in block.r0 / tile_rows..block.r1.div_ceil(tile_rows) {
            let (r0, r1) = (band * tile_rows, ((band + 1) * tile_rows).min(self.n));
            let mut again = [0u16; 256];
            let mut any = false;
            for j in 0..block.m {
                for r in r0..r1 {
                    let total = sums[(r - block.r0) * strides.row + j * strides.column];
                    let value = self.bias.map_or(total, |b| total + D::value_at(b, r));
                    if value.is_finite() {
                        D::put(&self.out[(block.m0 + j) * self.n + r], D::round(value));
                    } else {
                        again[r - r0] |= 1 << j;
                        any = true;
                    }
                }
            }
            if any {
                wide::linear(s, self, band, block.m0, &again[..r1 - r0], sc)?;
            }
        }
        Ok(())
    }

    /// Large m: one band of rows of W and `m` rows of x, through restored tiles.
    fn panels<S: Simd>(&self, s: S, band: usize, m0: usize, m: usize, sc: &mut Scratch) -> Result<()> {
        let across = self.grid.tile_cols_count();
        let r0 = band * self.grid.tile_rows;
        let rows = (self.n - r0).min(self.grid.tile_rows);
        sc.sums.zeroed(m * rows);
        for tc in 0..across {
            let index = band * across + tc;
            let rect = self.grid.rect(index);
            let words = sc.words.bytes_mut(rect.words() * D::BYTES);
            self.weights.words(s, index, words)?;
            counters::count_panel();
            let len = rect.cols() * D::BYTES;
            let groups = padded(rect.cols()) / GROUP;
            let panel: &mut [Split] = sc.panel.get(rows * groups * GROUP).as_chunks_mut().0;
            let words = Rows { bytes: words, stride: len, len };
            s.run(ToSplit::<D> { words, rows, to: panel, groups, dtype: PhantomData });
            let x = self.x_rows(m0, &rect);
            let sums = sc.sums.all_mut();
            s.run(PanelProduct::<D> { x, m, panel, groups, rows, sums, dtype: PhantomData });
        }
        let sums = std::mem::take(&mut sc.sums);
        let strides = Strides { row: 1, column: rows };
        let done = (0..m).step_by(BLOCK).try_for_each(|j| {
            let block = Block { r0, r1: r0 + rows, m0: m0 + j, m: BLOCK.min(m - j) };
            self.finish(s, block, &sums.all()[j * rows..], strides, sc)
        });
        sc.sums = sums;
        done
    }
}
