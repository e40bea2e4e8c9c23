//! `delta_embedding`: rows of fine-tuned tables, looked up one by one. No table is restored, and no tile that
//! no row needs is read.
//!
//! What a row costs depends on its encoding. `sparse`: the base's row, and the row's own lane of each of its
//! tiles: a fourth to a sixth of the time that the whole band of 16 rows takes (576 columns, 3 % changed, Zen
//! 3 under load). `raw`: a copy. `exponent`: lanes carry bits from row to row, so a band is decoded from its
//! first row to the last one needed, once for all rows of the tenant in it. Rows are shared out to threads in
//! pieces of [`PIECE`] bytes, or by band. Scratch is at most one row of a tile per thread, and 32 bytes per
//! row of the batch to sort them.

use super::arena::{Arena, Tenants};
use super::costs::Costs;
use super::job::check_words;
use super::scratch;
use crate::codec::word::{Word, with_word};
use crate::codec::{Encoding, ExponentTile, Grid, Tile, exponent};
use crate::error::{Error, Kind, Result};
use crate::matrix::{Matrix, Shape};
use crate::resident::Resident;
use crate::vector::dispatch::{Isa, on_isa};
use crate::vector::exec::{Executor, try_run};
use crate::vector::lanes::{self, Lane};
use crate::vector::region::{TilePart, patch_part};
use crate::vector::simd::Simd;
use crate::vector::tile::{Stripe, set_apart};
use std::sync::Mutex;

/// Bytes of looked-up rows that are worth a task, for encodings that patch row by row.
const PIECE: usize = 32 << 10;

/// What [`delta_embedding`] looks up.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddingArgs<'a> {
    /// Which row of the table each row of the batch is.
    pub indices: &'a [i64],
    /// The base's table, `[V, k]` of any dtype, any alignment.
    pub base: Matrix<'a>,
    /// The tenants' deltas. Base digests are not checked here.
    pub arena: Arena<'a>,
    /// Which slot each row of the batch belongs to; -1 is the base.
    pub tenant_of_row: &'a [i32],
}

/// Row i of `out [rows, k]` becomes row `indices[i]` of the fine-tuned table of row i's tenant, bit for bit;
/// an empty slot and -1 stand for the base's own table. Any dtype, any alignment.
///
/// Memory-safe on any bytes. What is not needed for the rows asked is not looked at: `Resident::check` tells
/// whether a delta is whole.
///
/// # Errors
/// `InvalidArgument` for an index beyond the table, a slot outside of the arena or a tenant that does not
/// exist; `Mismatch` where base, a used delta and out do not fit; `Corrupt` or `Truncated` for bad delta
/// bytes, `out` then holds unspecified words.
pub fn delta_embedding(args: &EmbeddingArgs<'_>, out: &mut [u8], exec: &dyn Executor) -> Result<()> {
    delta_embedding_on(Isa::active()?, args, out, exec)
}

/// [`delta_embedding`] on an instruction set of the caller's choice, for tests and benchmarks.
///
/// # Errors
/// As [`delta_embedding`]; `Unsupported` if the machine lacks `isa`.
pub fn delta_embedding_on(
    isa: Isa,
    args: &EmbeddingArgs<'_>,
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    on_isa!(isa, s => run_embedding(s, args, out, exec))?
}

/// One row to be looked up.
struct Row<'o> {
    index: usize,
    out: &'o mut [u8],
}

/// Rows of one tenant that one thread looks up; of a table with an `exponent` delta: those of one band, in
/// order.
struct Task<'t, 'o, 'a> {
    slot: usize,
    delta: Option<&'t Resident<'a>>,
    rows: &'t mut [Row<'o>],
}

fn run_embedding<S: Simd>(s: S, args: &EmbeddingArgs<'_>, out: &mut [u8], exec: &dyn Executor) -> Result<()> {
    let (base, m) = (&args.base, args.indices.len());
    check_words("out", out, Shape { n: m, k: base.shape().k }, base.dtype())?;
    let tenants = Tenants::new(args.tenant_of_row, m, args.arena.slots.len())?;
    let mut groups = Vec::new();
    for (slot, rows) in tenants.groups() {
        let delta = slot.map_or(Ok(None), |slot| args.arena.delta(slot, base));
        let delta = delta.map_err(|e| if e.kind() == Kind::Mismatch { e.within("weight") } else { e })?;
        groups.push((slot, delta.filter(|d| d.header().encoding != Encoding::Unchanged), rows));
    }
    let mut rows = rows(args, tenants.order(), out)?;
    if base.row_bytes() == 0 {
        return Ok(());
    }
    let mut tasks = Vec::new();
    let mut rest = &mut rows[..];
    for (slot, delta, range) in &groups {
        let (mine, others) = rest.split_at_mut(range.len());
        rest = others;
        let (slot, delta) = (slot.unwrap_or_default(), delta.as_ref());
        let task = |rows| Mutex::new(Task { slot, delta, rows });
        match delta.filter(|d| d.header().encoding == Encoding::Exponent) {
            Some(d) => {
                let height = d.grid().tile_rows;
                mine.sort_unstable_by_key(|row| row.index);
                tasks.extend(mine.chunk_by_mut(|a, b| a.index / height == b.index / height).map(task));
            }
            None => tasks.extend(mine.chunks_mut((PIECE / base.row_bytes()).max(1)).map(task)),
        }
    }
    let words: Vec<_> =
        tasks.iter_mut().map(|task| task.get_mut().map_or(0, |task| task.words(base.shape().k))).collect();
    try_run(exec, Costs::active().least_words, words, |i| {
        let mut task = tasks[i].lock().unwrap_or_else(|p| p.into_inner());
        let slot = task.slot;
        task.run(s, base).map_err(|e| e.within(format_args!("slots[{slot}]")))
    })
}

/// The rows to look up, in the order `order`.
fn rows<'o>(args: &EmbeddingArgs<'_>, order: &[usize], out: &'o mut [u8]) -> Result<Vec<Row<'o>>> {
    let n = args.base.shape().n;
    let mut outs: Vec<&mut [u8]> = match args.base.row_bytes() {
        0 => args.indices.iter().map(|_| <&mut [u8]>::default()).collect(),
        bytes => out.chunks_exact_mut(bytes).collect(),
    };
    let row = |&i: &usize| match usize::try_from(args.indices[i]).ok().filter(|&index| index < n) {
        Some(index) => Ok(Row { index, out: std::mem::take(&mut outs[i]) }),
        None => Err(i),
    };
    let rows: std::result::Result<Vec<_>, usize> = order.iter().map(row).collect();
    rows.map_err(|i| {
        let index = args.indices[i];
        Error::invalid(format!("indices[{i}] is {index}, but weight has {n} rows"))
    })
}

impl Task<'_, '_, '_> {
    /// Words that are read for it.
    fn words(&self, k: usize) -> usize {
        let rows = match (self.delta, self.rows.last()) {
            (Some(d), Some(last)) if d.header().encoding == Encoding::Exponent => {
                last.index % d.grid().tile_rows + 1
            }
            _ => self.rows.len(),
        };
        rows * k
    }

    fn run<S: Simd>(&mut self, s: S, base: &Matrix<'_>) -> Result<()> {
        let Some(delta) = self.delta else {
            self.rows
                .iter_mut()
                .for_each(|row| row.out.copy_from_slice(base.span(row.index, 0, base.shape().k)));
            return Ok(());
        };
        if delta.header().encoding == Encoding::Exponent {
            return band(s, delta, base, self.rows);
        }
        self.rows.iter_mut().try_for_each(|row| by_row(delta, base, row))
    }
}

/// A row of a table whose delta lets rows be read alone.
fn by_row(delta: &Resident<'_>, base: &Matrix<'_>, row: &mut Row<'_>) -> Result<()> {
    let (grid, dtype) = (delta.grid(), base.dtype());
    let (across, w) = (grid.tile_cols_count(), dtype.word_bytes());
    for index in row.index / grid.tile_rows * across..(row.index / grid.tile_rows + 1) * across {
        let rect = grid.rect(index);
        let (r, out) = (row.index - rect.r0, &mut row.out[rect.c0 * w..rect.c1 * w]);
        match delta.tile(index)? {
            Tile::Raw(raw) => out.copy_from_slice(raw.row(r)),
            Tile::Sparse(tile) => {
                out.copy_from_slice(base.span(row.index, rect.c0, rect.cols()));
                let (rows, columns) = (r..r + 1, 0..rect.cols());
                let part = TilePart { rect, tile_cols: grid.tile_cols, rows, columns, dtype };
                let stripe = Stripe { stride: out.len(), from: 0, to: out.len(), rows: 1 };
                with_word!(dtype, W => patch_part::<W>(&tile, &part, stripe, out))
                    .map_err(|e| e.within(format_args!("delta, tile {index}")))?;
            }
            Tile::Unchanged | Tile::Exponent(_) => {
                return Err(Error::internal(format!("tile {index} is not one of rows")));
            }
        }
    }
    Ok(())
}

/// Rows of one band of an `exponent` table, in order; a row may be asked more than once.
fn band<S: Simd>(s: S, delta: &Resident<'_>, base: &Matrix<'_>, rows: &mut [Row<'_>]) -> Result<()> {
    let (grid, dtype) = (delta.grid(), base.dtype());
    let across = grid.tile_cols_count();
    let band = rows.first().map_or(0, |row| row.index / grid.tile_rows);
    for index in band * across..(band + 1) * across {
        let Tile::Exponent(tile) = delta.tile(index)? else {
            return Err(Error::internal(format!("tile {index} is not of encoding exponent")));
        };
        let piece = BandTile { base, grid: &grid, index, tile: &tile };
        match dtype.word_bytes() {
            1 => piece.by_oracle::<u8>(rows),
            2 => piece.by_lanes::<S, u16>(s, rows),
            4 => piece.by_lanes::<S, u32>(s, rows),
            _ => piece.by_oracle::<u64>(rows),
        }
        .map_err(|e| e.within(format_args!("delta, tile {index}")))?;
    }
    Ok(())
}

/// One tile of a band.
struct BandTile<'t, 'a> {
    base: &'t Matrix<'a>,
    grid: &'t Grid,
    index: usize,
    tile: &'t ExponentTile<'a>,
}

impl BandTile<'_, '_> {
    fn by_lanes<S: Simd, W: Lane>(&self, s: S, rows: &mut [Row<'_>]) -> Result<()> {
        let mut decoder = lanes::Decoder::<W>::new(self.tile, self.base.dtype());
        self.decode(rows, |words: &mut [W]| decoder.advance(s, None, words))
    }

    fn by_oracle<W: Word>(&self, rows: &mut [Row<'_>]) -> Result<()> {
        let mut decoder = exponent::Decoder::<W>::new(self.tile, self.base.dtype());
        self.decode(rows, |words: &mut [W]| decoder.advance(words))
    }

    /// Decode row after row with `advance` down to the last one asked, and hand each to whom it concerns.
    fn decode<W: Word>(
        &self,
        rows: &mut [Row<'_>],
        mut advance: impl FnMut(&mut [W]) -> Result<()>,
    ) -> Result<()> {
        let rect = self.grid.rect(self.index);
        let mut next = rect.r0;
        scratch::with(|sc| {
            for same in rows.chunk_by_mut(|a, b| a.index == b.index) {
                let words = sc.words.bytes_mut(rect.cols() * W::BYTES);
                let asked = same[0].index;
                while next <= asked {
                    words.copy_from_slice(self.base.span(next, rect.c0, rect.cols()));
                    advance(bytemuck::cast_slice_mut(words))?;
                    next += 1;
                }
                let first = (asked - rect.r0) * self.grid.tile_cols;
                let (places, tile) = (first..first + self.grid.tile_cols, self.tile);
                set_apart::<W>(&tile.entries, &tile.exceptions, self.base.dtype(), places, words)?;
                same.iter_mut()
                    .for_each(|row| row.out[rect.c0 * W::BYTES..rect.c1 * W::BYTES].copy_from_slice(words));
            }
            Ok(())
        })
    }
}
