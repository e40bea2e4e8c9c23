//! Some rows and columns of the fine-tuned matrix: only the tiles that they touch are read, and of those no
//! more than the encoding asks for. Every dtype; equal to the same part of `resident::restore` bit for bit.
//!
//! What a part of a tile costs. `raw`, `unchanged`: its words. `sparse`: its words, and the gaps of the
//! tile's records up to where every row asked is past the last column asked; a difference is read only where
//! it belongs to a word asked. `exponent`: lanes carry bits from word to word, in rows from left to right and
//! on to the next row, so every word of the tile before the last one asked is decoded; what is stored apart
//! is found by halving.

use super::exec::{Executor, LEAST_WORDS, try_run};
use super::float::{BF16, F16, F32};
use super::lanes::{self, Lane, MICRO};
use super::records::Records;
use super::simd::Simd;
use super::tile::{Change, Stripe, Sums, Xor, fill_tile, set_apart};
use crate::codec::word::{Word, with_word};
use crate::codec::{Encoding, ExponentTile, GapKind, Grid, Rect, SparseTile, Tile, exponent};
use crate::error::{Error, Result};
use crate::matrix::{Dtype, Matrix, Shape};
use crate::resident::Resident;
use std::ops::Range;
use std::sync::Mutex;

/// See [`super::delta_restore_region`].
pub(super) fn region_of<S: Simd>(
    s: S,
    delta: &Resident<'_>,
    base: &Matrix<'_>,
    (rows, columns): (Range<usize>, Range<usize>),
    out: &mut [u8],
    exec: &dyn Executor,
) -> Result<()> {
    delta.check_base(base)?;
    let (shape, w) = (base.shape(), base.dtype().word_bytes());
    check_range("rows", &rows, shape.n, shape)?;
    check_range("columns", &columns, shape.k, shape)?;
    let row_bytes = columns.len() * w;
    let want = rows.len() * row_bytes;
    if out.len() != want {
        let found = out.len();
        return Err(Error::mismatch(format!(
            "out has {found} bytes, but rows {rows:?} and columns {columns:?} take {want}"
        )));
    }
    if want == 0 {
        return Ok(());
    }
    let grid = delta.grid();
    let (first, last) = (rows.start / grid.tile_rows, rows.end.div_ceil(grid.tile_rows));
    // The rows of out that each band of tiles covers: the first and the last band may be cut.
    let mut rest = out;
    let mut bands = Vec::with_capacity(last - first);
    for band in first..last {
        let (top, bottom) = (band * grid.tile_rows, (band + 1) * grid.tile_rows);
        let rows = top.max(rows.start)..bottom.min(rows.end);
        let (part, tail) = rest.split_at_mut(rows.len() * row_bytes);
        rest = tail;
        bands.push((rows, Mutex::new(part)));
    }
    let whole = columns.start / grid.tile_cols * grid.tile_cols
        ..columns.end.next_multiple_of(grid.tile_cols).min(shape.k);
    let words = bands.iter().map(|(rows, _)| match delta.header().encoding {
        Encoding::Exponent => (rows.end - rows.start / grid.tile_rows * grid.tile_rows) * whole.len(),
        _ => rows.len() * columns.len(),
    });
    try_run(exec, LEAST_WORDS, words, |i| {
        let (rows, part) = &bands[i];
        let mut part = part.lock().unwrap_or_else(|p| p.into_inner());
        let across = grid.tile_cols_count();
        for tc in columns.start / grid.tile_cols..columns.end.div_ceil(grid.tile_cols) {
            let index = (first + i) * across + tc;
            let rect = grid.rect(index);
            let cut = Rect {
                r0: rows.start,
                r1: rows.end,
                c0: rect.c0.max(columns.start),
                c1: rect.c1.min(columns.end),
            };
            let (from, to) = ((cut.c0 - columns.start) * w, (cut.c1 - columns.start) * w);
            let stripe = Stripe { stride: row_bytes, from, to, rows: cut.rows() };
            if cut == rect {
                fill_tile(s, delta, index, stripe, &mut part, Some(base))?;
            } else {
                fill_part(s, delta, index, cut, stripe, &mut part, base)?;
            }
        }
        Ok(())
    })
}

fn check_range(what: &str, range: &Range<usize>, size: usize, shape: Shape) -> Result<()> {
    if range.start <= range.end && range.end <= size {
        return Ok(());
    }
    Err(Error::invalid(format!("{what} {range:?} are not within 0..{size} of a matrix of {shape}")))
}

/// Put the fine-tuned words of `cut`, a part of tile `index`, in their places.
fn fill_part<S: Simd>(
    s: S,
    delta: &Resident<'_>,
    index: usize,
    cut: Rect,
    stripe: Stripe,
    words: &mut [u8],
    base: &Matrix<'_>,
) -> Result<()> {
    let (grid, dtype) = (delta.grid(), delta.header().dtype);
    let (rect, tile, w) = (grid.rect(index), delta.tile(index)?, dtype.word_bytes());
    let (rows, columns) = (cut.r0 - rect.r0..cut.r1 - rect.r0, cut.c0 - rect.c0..cut.c1 - rect.c0);
    let part =
        TilePart { rect, tile_cols: grid.tile_cols, rows: rows.clone(), columns: columns.clone(), dtype };
    let mut with_base = || {
        (0..stripe.rows)
            .for_each(|r| stripe.row(words, r).copy_from_slice(base.span(cut.r0 + r, cut.c0, cut.cols())))
    };
    let done = match &tile {
        Tile::Unchanged => {
            with_base();
            Ok(())
        }
        Tile::Raw(raw) => {
            let span = columns.start * w..columns.end * w;
            rows.clone().enumerate().for_each(|(r, row)| {
                stripe.row(words, r).copy_from_slice(&raw.row(row)[span.clone()]);
            });
            Ok(())
        }
        Tile::Sparse(t) => {
            with_base();
            with_word!(dtype, W => patch_part::<W>(t, &part, stripe, words))
        }
        Tile::Exponent(t) => match w {
            1 => part.by_oracle::<u8>(t, stripe, words, base),
            2 => part.by_lanes::<S, u16>(s, t, stripe, words, base),
            4 => part.by_lanes::<S, u32>(s, t, stripe, words, base),
            _ => part.by_oracle::<u64>(t, stripe, words, base),
        },
    };
    done.map_err(|e| e.within(format_args!("delta, tile {index}")))
}

/// A part of a tile: rows and columns counted from the tile's first.
pub(crate) struct TilePart {
    /// The whole tile.
    pub(crate) rect: Rect,
    /// Columns of a whole tile of the grid.
    pub(crate) tile_cols: usize,
    pub(crate) rows: Range<usize>,
    pub(crate) columns: Range<usize>,
    pub(crate) dtype: Dtype,
}

impl TilePart {
    fn by_lanes<S: Simd, W: Lane>(
        &self,
        s: S,
        tile: &ExponentTile<'_>,
        stripe: Stripe,
        words: &mut [u8],
        base: &Matrix<'_>,
    ) -> Result<()> {
        let mut decoder = lanes::Decoder::<W>::new(tile, self.dtype);
        let advance = |before: &[u8], run: &mut [W]| decoder.advance(s, Some(before), run);
        self.decode(tile, stripe, words, base, advance)
    }

    fn by_oracle<W: Word>(
        &self,
        tile: &ExponentTile<'_>,
        stripe: Stripe,
        words: &mut [u8],
        base: &Matrix<'_>,
    ) -> Result<()> {
        let mut decoder = exponent::Decoder::<W>::new(tile, self.dtype);
        let advance = |before: &[u8], run: &mut [W]| {
            run.iter_mut().zip(before.chunks_exact(W::BYTES)).for_each(|(word, b)| *word = W::load(b));
            decoder.advance(run)
        };
        self.decode(tile, stripe, words, base, advance)
    }

    /// Decode from the tile's first word to the part's last one, a run of columns at a time, and keep those
    /// of the part.
    fn decode<W: Word>(
        &self,
        tile: &ExponentTile<'_>,
        stripe: Stripe,
        words: &mut [u8],
        base: &Matrix<'_>,
        mut advance: impl FnMut(&[u8], &mut [W]) -> Result<()>,
    ) -> Result<()> {
        let mut run = [W::default(); MICRO];
        for r in 0..self.rows.end {
            let end = if r + 1 == self.rows.end { self.columns.end } else { self.rect.cols() };
            let before = base.span(self.rect.r0 + r, self.rect.c0, end);
            for (from, before) in (0..end).step_by(MICRO).zip(before.chunks(MICRO * W::BYTES)) {
                let run = &mut run[..before.len() / W::BYTES];
                advance(before, run)?;
                let kept = from.max(self.columns.start)..(from + run.len()).min(self.columns.end);
                if r < self.rows.start || kept.is_empty() {
                    continue;
                }
                let row = stripe.row(words, r - self.rows.start);
                let at = (kept.start - self.columns.start) * W::BYTES;
                let kept = bytemuck::cast_slice(&run[kept.start - from..kept.end - from]);
                row[at..at + kept.len()].copy_from_slice(kept);
            }
        }
        for (i, r) in self.rows.clone().enumerate() {
            let row = stripe.row(words, i);
            set_apart::<W>(&tile.entries, &tile.exceptions, self.dtype, self.places(r), row)?;
        }
        Ok(())
    }

    /// The positions of the part's words in row `r`; where it ends with the tile, also those that the tile
    /// lacks.
    fn places(&self, r: usize) -> Range<usize> {
        let end = if self.columns.end == self.rect.cols() { self.tile_cols } else { self.columns.end };
        r * self.tile_cols + self.columns.start..r * self.tile_cols + end
    }
}

/// Patch the words of a part of a `sparse` tile: the entries of its rows and columns, then the exceptions.
pub(crate) fn patch_part<W: Word>(
    tile: &SparseTile<'_>,
    part: &TilePart,
    stripe: Stripe,
    words: &mut [u8],
) -> Result<()> {
    match part.dtype {
        Dtype::BF16 => walk_part(tile, part, stripe, words, &mut Sums::<BF16>::new())?,
        Dtype::F16 => walk_part(tile, part, stripe, words, &mut Sums::<F16>::new())?,
        Dtype::F32 => walk_part(tile, part, stripe, words, &mut Sums::<F32>::new())?,
        _ => walk_part::<W, _>(tile, part, stripe, words, &mut Xor)?,
    }
    for (i, r) in part.rows.clone().enumerate() {
        let row = stripe.row(words, i);
        set_apart::<W>(&Default::default(), &tile.exceptions, part.dtype, part.places(r), row)?;
    }
    Ok(())
}

fn walk_part<W: Word, C: Change<W>>(
    tile: &SparseTile<'_>,
    part: &TilePart,
    stripe: Stripe,
    words: &mut [u8],
    change: &mut C,
) -> Result<()> {
    match tile.gap {
        GapKind::U8 => walk_part_gaps::<W, C, 1>(tile, part, stripe, words, change),
        GapKind::U16 => walk_part_gaps::<W, C, 2>(tile, part, stripe, words, change),
    }
}

/// The entries of a part's lanes, record after record. Columns are kept for all lanes alike, in vectors of 16
/// bits, and looked at one by one only where one is the part's.
fn walk_part_gaps<W: Word, C: Change<W>, const GAP: usize>(
    tile: &SparseTile<'_>,
    part: &TilePart,
    stripe: Stripe,
    words: &mut [u8],
    change: &mut C,
) -> Result<()> {
    let nothing = W::from_u64(C::NOTHING);
    // Columns of a tile are at most 4096. A lane that nobody asks for has none.
    let asked = |lane: usize, bound: usize| if part.rows.contains(&lane) { bound as u16 } else { 0 };
    let first = part.columns.start as u16;
    let width: [u16; Grid::TILE_ROWS] = std::array::from_fn(|lane| asked(lane, part.columns.len()));
    let end: [u16; Grid::TILE_ROWS] = std::array::from_fn(|lane| asked(lane, part.columns.end));
    let beyond: [u16; Grid::TILE_ROWS] =
        std::array::from_fn(
            |lane| if part.rows.contains(&lane) { part.rect.cols() as u16 } else { u16::MAX },
        );
    let mut records = Records::<_, GAP>::new(tile, W::BYTES, [0u16; Grid::TILE_ROWS]);
    for j in 0.. {
        let Some((at, differences)) = records.advance() else { break };
        let (mut hit, mut before) = (false, false);
        for lane in 0..Grid::TILE_ROWS {
            hit |= at[lane].wrapping_sub(first) < width[lane] || at[lane] >= beyond[lane];
            before |= at[lane] < end[lane];
        }
        if hit {
            for lane in part.rows.clone() {
                let difference = W::load(&differences[lane * W::BYTES..(lane + 1) * W::BYTES]);
                let c = usize::from(at[lane]);
                if difference == nothing || c < part.columns.start {
                    continue;
                }
                if c >= part.rect.cols() {
                    return Err(Error::corrupt(format!(
                        "lane {lane} names column {c} of {}",
                        part.rect.cols()
                    )));
                }
                if c >= part.columns.end {
                    continue;
                }
                // Columns of one byte only grow, so what came last for this word came last for the lane.
                if GAP == 2 && before_entry::<W>(tile, nothing, j, lane) != Some(c) {
                    change.forget(lane);
                }
                let row = stripe.row(words, lane - part.rows.start);
                let word = &mut row[(c - part.columns.start) * W::BYTES..][..W::BYTES];
                let now = change.change(lane, c, W::load(word), difference);
                word.copy_from_slice(bytemuck::bytes_of(&now));
            }
        }
        if GAP == 1 && !before {
            break;
        }
    }
    Ok(())
}

/// The column of the last entry of a lane before record `j` that does something, where gaps are columns.
fn before_entry<W: Word>(tile: &SparseTile<'_>, nothing: W, j: usize, lane: usize) -> Option<usize> {
    let difference =
        |j: usize| W::load(&tile.differences[(j * Grid::TILE_ROWS + lane) * W::BYTES..][..W::BYTES]);
    (0..j).rev().find(|j| difference(*j) != nothing).map(|j| tile.gap_at(j, lane))
}
