//! Encoded tiles, and the plain way of encoding them: what every fast encoder must equal bit for bit. Knows
//! no header.

use super::plan::Plan;
use crate::codec::sparse::Builder;
use crate::codec::word::{Word, with_word};
use crate::codec::{Apart, Encoding, Entries, Rect, Tile, exponent};
use crate::error::{Error, Result};
use crate::matrix::Dtype;
use std::ops::Range;

/// Tiles of one delta, encoded, in order: what [`super::Assembler::add`] takes. Pieces of a matrix are
/// independent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeltaPiece {
    /// Records, stream units or fine-tuned words: bytes of the delta's payload.
    pub payload: Vec<u8>,
    /// How many records or stream units each tile takes; zeros for `raw` and `unchanged`.
    pub units: Vec<u32>,
    /// Exact differences of words that a tile stores apart; only of `exponent` and dtypes that compute.
    pub entries: Listed,
    /// Fine-tuned words that a tile stores apart.
    pub exceptions: Listed,
    /// Words that differ from base.
    pub changed: u64,
}

/// What tiles store apart: entries, or exceptions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listed {
    /// How many each tile has.
    pub counts: Vec<u32>,
    /// Their positions in their tiles, u16 little-endian each.
    pub positions: Vec<u8>,
    /// Their words, little-endian: differences, or fine-tuned words.
    pub words: Vec<u8>,
}

impl Listed {
    fn clear(&mut self) {
        self.counts.clear();
        self.positions.clear();
        self.words.clear();
    }

    /// Append what one tile stores apart: its positions and words.
    fn list<W: Word>(&mut self, all: &[(u16, u64)]) {
        // A tile has at most 65536 words, and two entries for each at most.
        self.counts.push(all.len() as u32);
        for (position, word) in all {
            self.positions.extend_from_slice(&position.to_le_bytes());
            self.words.extend_from_slice(&word.to_le_bytes()[..W::BYTES]);
        }
    }

    /// Append what one tile stores apart, already encoded.
    fn copy(&mut self, positions: &[u8], words: &[u8]) {
        self.counts.push((positions.len() / 2) as u32);
        self.positions.extend_from_slice(positions);
        self.words.extend_from_slice(words);
    }

    /// Bytes beside the counts.
    pub fn bytes(&self) -> usize {
        self.positions.len() + self.words.len()
    }
}

impl DeltaPiece {
    /// Empty it, and keep its memory.
    pub fn clear(&mut self) {
        self.payload.clear();
        self.units.clear();
        self.entries.clear();
        self.exceptions.clear();
        self.changed = 0;
    }

    /// Close a tile of `units` units, and what it stores apart.
    pub(crate) fn close<W: Word>(&mut self, units: usize, entries: &[(u16, u64)], exceptions: &[(u16, u64)]) {
        // A tile has at most 65536 words, and two records for each at most.
        self.units.push(units as u32);
        self.entries.list::<W>(entries);
        self.exceptions.list::<W>(exceptions);
    }

    /// Append a tile that is already encoded.
    pub(crate) fn copy(&mut self, tile: &Tile<'_>, word_bytes: usize) -> Result<()> {
        let (units, entries, exceptions) = match tile {
            Tile::Sparse(t) => {
                self.payload.extend_from_slice(t.gaps);
                self.payload.extend_from_slice(t.differences);
                (t.records, Entries::default(), &t.exceptions)
            }
            Tile::Exponent(t) => {
                self.payload.extend_from_slice(t.stream);
                (t.stream.len() / word_bytes, t.entries, &t.exceptions)
            }
            Tile::Unchanged | Tile::Raw(_) => return Err(Error::internal("nothing to copy in such a tile")),
        };
        self.units.push(units as u32);
        self.entries.copy(entries.positions, entries.differences);
        self.exceptions.copy(exceptions.positions, exceptions.words);
        Ok(())
    }
}

/// Encode tiles `tiles` of the matrix that `plan` is for and append them to `out`.
///
/// `base` and `fine_tuned` hold the words of the region that the tiles cover, row after row without gaps, at
/// any alignment: whole bands (rows of tiles), or, of a matrix of one band, any run of tiles of a single row.
///
/// # Errors
/// `InvalidArgument` for tiles that are no such region, or a plan that no delta of `dtype` can have;
/// `Mismatch` for other lengths of words. `out` then holds unspecified bytes.
pub fn encode_tiles(
    plan: &Plan,
    dtype: Dtype,
    tiles: Range<usize>,
    base: &[u8],
    fine_tuned: &[u8],
    out: &mut DeltaPiece,
) -> Result<()> {
    let region = Region::new(plan, dtype, tiles, base, fine_tuned)?;
    if !plan.tiled() {
        region.flat(plan, count_changed(dtype, base, fine_tuned), out);
        return Ok(());
    }
    with_word!(dtype, W => {
        let (mut coder, mut b, mut f) = (Coder::<W>::default(), Vec::new(), Vec::new());
        for index in region.tiles.clone() {
            let rect = plan.grid.rect(index);
            b.clear();
            f.clear();
            for r in 0..rect.rows() {
                let span = region.row(&rect, r, W::BYTES);
                b.extend(base[span.clone()].chunks_exact(W::BYTES).map(W::load));
                f.extend(fine_tuned[span].chunks_exact(W::BYTES).map(W::load));
            }
            coder.tile(plan, dtype, rect.cols(), (&b, &f), out);
        }
    });
    Ok(())
}

/// The words that a run of tiles covers, checked.
pub(crate) struct Region<'a> {
    pub(crate) tiles: Range<usize>,
    pub(crate) base: &'a [u8],
    pub(crate) fine_tuned: &'a [u8],
    /// Where it begins in the matrix.
    row: usize,
    column: usize,
    /// Words of one of its rows.
    width: usize,
}

impl<'a> Region<'a> {
    pub(crate) fn new(
        plan: &Plan,
        dtype: Dtype,
        tiles: Range<usize>,
        base: &'a [u8],
        fine_tuned: &'a [u8],
    ) -> Result<Self> {
        plan.check(dtype)?;
        let grid = &plan.grid;
        let across = grid.tile_cols_count().max(1);
        let bands = tiles.start.is_multiple_of(across) && tiles.end.is_multiple_of(across);
        if tiles.start > tiles.end || tiles.end > grid.tiles() || !(bands || grid.shape.n == 1) {
            return Err(Error::invalid(format!(
                "tiles {tiles:?} of {} are no whole rows of {across} tiles of a matrix of {}",
                grid.tiles(),
                grid.shape
            )));
        }
        let (mut row, mut column, mut rows, mut width) = (0, 0, 0, grid.shape.k);
        if !tiles.is_empty() {
            let (first, last) = (grid.rect(tiles.start), grid.rect(tiles.end - 1));
            (row, column, rows) = (first.r0, first.c0, last.r1 - first.r0);
            width = if bands { width } else { last.c1 - first.c0 };
        }
        let want = rows * width * dtype.word_bytes();
        for (name, words) in [("base", base), ("fine_tuned", fine_tuned)] {
            if words.len() != want {
                return Err(Error::mismatch(format!(
                    "{name} has {} bytes, but tiles {tiles:?} take {want}",
                    words.len()
                )));
            }
        }
        Ok(Self { tiles, base, fine_tuned, row, column, width })
    }

    /// Where the words of row `r` of a tile lie.
    pub(crate) fn row(&self, rect: &Rect, r: usize, word_bytes: usize) -> Range<usize> {
        let at = (rect.r0 - self.row + r) * self.width + rect.c0 - self.column;
        at * word_bytes..(at + rect.cols()) * word_bytes
    }

    /// Encodings without tiles: `raw`, the words as they are, and `unchanged`.
    pub(crate) fn flat(&self, plan: &Plan, changed: u64, out: &mut DeltaPiece) {
        if plan.encoding == Encoding::Raw {
            out.payload.extend_from_slice(self.fine_tuned);
        }
        out.changed += changed;
        self.tiles.clone().for_each(|_| out.close::<u8>(0, &[], &[]));
    }
}

/// How many words of two runs differ.
pub(crate) fn count_changed(dtype: Dtype, base: &[u8], fine_tuned: &[u8]) -> u64 {
    with_word!(dtype, W => {
        let words = base.chunks_exact(W::BYTES).zip(fine_tuned.chunks_exact(W::BYTES));
        words.filter(|(b, f)| b != f).count() as u64
    })
}

/// Encodes tile by tile; its memory is reused.
pub(crate) struct Coder<W: Word> {
    builder: Builder<W>,
    apart: Apart,
}

impl<W: Word> Default for Coder<W> {
    fn default() -> Self {
        Self { builder: Builder::default(), apart: Apart::default() }
    }
}

impl<W: Word> Coder<W> {
    /// Encode one tile, its words in rows of `cols`, as a tiled `plan` says.
    pub(crate) fn tile(
        &mut self,
        plan: &Plan,
        dtype: Dtype,
        cols: usize,
        (base, fine_tuned): (&[W], &[W]),
        out: &mut DeltaPiece,
    ) {
        let tile_cols = plan.grid.tile_cols;
        if plan.encoding == Encoding::Sparse {
            self.builder.collect(dtype, cols, tile_cols, base, fine_tuned);
            let units = self.builder.write(dtype, plan.gap, &mut out.payload);
            out.changed += self.builder.changed;
            out.close::<W>(units, &[], &self.builder.exceptions);
            return;
        }
        self.apart.clear();
        let from = out.payload.len();
        let to = (&mut out.payload, &mut self.apart);
        out.changed += exponent::encode(dtype, &plan.widths, (cols, tile_cols), (base, fine_tuned), to);
        let units = (out.payload.len() - from) / W::BYTES;
        out.close::<W>(units, &self.apart.entries, &self.apart.exceptions);
    }
}
