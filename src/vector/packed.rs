//! One tile's fine-tuned words, packed by pairs of columns into panels for the bf16 dot product: what
//! products with many rows stand on. Equal to `tile` and `Bf16Dot::pack` one after the other.
//!
//! ```text
//! for each 16 rows of the tile:  their words (the base's as they lie, or decoded into scratch, with entries), packed
//! then, in the panels:           entries of `sparse`, exceptions
//! ```
//!
//! Words are never copied before they are packed, and entries are added where the product will read them: a
//! copy of a tile of 16 x 4096 words drove the panel and the next rows of the base out of the second cache,
//! 1.1 ms of 5.0 with 32 rows of x (4096 x 4096, 0.5 % changed, Zen 4).

use super::bf16dot::{Bf16Dot, PANEL_ROWS, Pair};
use super::lanes::Decoder;
use super::simd::SIMD_LANES;
use super::tile::{Places, add_some, overwrite, patch_sparse};
use crate::codec::word::Word;
use crate::codec::{Rect, Tile, outside};
use crate::error::{Error, Result};
use crate::matrix::{Dtype, Matrix};
use crate::resident::Resident;

/// Bytes of a word.
const WORD: usize = 2;

/// Panels of 64 rows each, one after the other, of equally many pairs of columns.
pub(crate) struct Panels<'p> {
    /// Pair after pair of the first panel, then of the second.
    pub(crate) words: &'p mut [Pair],
    /// Pairs of columns of a panel.
    pub(crate) pairs: usize,
}

impl Panels<'_> {
    /// Put rows of words into rows `at..at + rows` (`at` a multiple of sixteen), sixteen at a time. What a
    /// last sixteen lacks is zeros.
    #[inline(always)]
    pub(crate) fn put<'r, S: Bf16Dot>(
        &mut self,
        s: S,
        at: usize,
        rows: usize,
        row: impl Fn(usize) -> &'r [u8],
    ) {
        for r in (0..rows).step_by(SIMD_LANES) {
            let sixteen = std::array::from_fn(|i| if r + i < rows { row(r + i) } else { &[][..] });
            let (p, place) = ((at + r) / PANEL_ROWS, (at + r) % PANEL_ROWS);
            s.pack(sixteen, &mut self.words[p * self.pairs..(p + 1) * self.pairs], place);
        }
    }

    /// Put the fine-tuned words of tile `index` of a delta of bf16 words into rows `at..` (`at` a multiple of
    /// sixteen). `words` is scratch for sixteen rows of the tile.
    ///
    /// # Errors
    /// `Corrupt` or `Truncated` for bad delta bytes; the panels then hold unspecified words.
    #[inline(always)]
    pub(crate) fn put_tile<S: Bf16Dot>(
        &mut self,
        s: S,
        (delta, base): (&Resident<'_>, &Matrix<'_>),
        index: usize,
        at: usize,
        words: &mut [u8],
    ) -> Result<()> {
        let (rect, tile_cols) = (delta.grid().rect(index), delta.grid().tile_cols);
        let done = delta.tile(index).and_then(|tile| {
            self.compact(s, &tile, base, (rect, tile_cols), at, words)?;
            let places = InPanels { at, rows: rect.rows(), columns: rect.cols(), pairs: self.pairs };
            let words: &mut [u8] = self.words.as_flattened_mut();
            match &tile {
                Tile::Sparse(t) => patch_sparse::<u16, _>(t, Dtype::BF16, tile_cols, places, words),
                Tile::Exponent(t) => overwrite::<u16, _>(&t.exceptions, tile_cols, places, words),
                Tile::Unchanged | Tile::Raw(_) => Ok(()),
            }
        });
        done.map_err(|e| e.within(format!("delta, tile {index}")))
    }

    /// What the compact code of a tile gives, and the entries of `exponent`, while those rows are in the
    /// first cache.
    #[inline(always)]
    fn compact<S: Bf16Dot>(
        &mut self,
        s: S,
        tile: &Tile<'_>,
        base: &Matrix<'_>,
        (rect, tile_cols): (Rect, usize),
        at: usize,
        words: &mut [u8],
    ) -> Result<()> {
        let before = |r: usize| base.span(rect.r0 + r, rect.c0, rect.cols());
        match tile {
            Tile::Unchanged | Tile::Sparse(_) => self.put(s, at, rect.rows(), before),
            Tile::Raw(raw) => self.put(s, at, rect.rows(), |r| raw.row(r)),
            Tile::Exponent(t) => {
                let (mut decoder, mut entries) = (Decoder::<u16>::new(t, Dtype::BF16), t.entries.changes());
                let len = rect.cols() * WORD;
                for r0 in (0..rect.rows()).step_by(SIMD_LANES) {
                    let rows = SIMD_LANES.min(rect.rows() - r0);
                    for (r, row) in words[..rows * len].chunks_exact_mut(len).enumerate() {
                        let row = bytemuck::try_cast_slice_mut(row)
                            .map_err(|_| Error::internal("scratch at an odd address"))?;
                        decoder.advance(s, Some(before(r0 + r)), row)?;
                    }
                    let places = InRows { first: r0, end: r0 + rows, columns: rect.cols() };
                    add_some::<u16, _>(&mut entries, Dtype::BF16, tile_cols, places, words)?;
                    self.put(s, at + r0, rows, |r| &words[r * len..(r + 1) * len]);
                }
                decoder.finish()?;
                if let Some(left) = entries.below(usize::MAX)? {
                    return Err(outside("entry", left.position));
                }
            }
        }
        Ok(())
    }
}

/// Places in scratch of some rows of a tile.
#[derive(Clone, Copy)]
struct InRows {
    first: usize,
    end: usize,
    columns: usize,
}

impl Places for InRows {
    fn rows(&self) -> usize {
        self.end
    }

    fn columns<W: Word>(&self) -> usize {
        self.columns
    }

    #[inline(always)]
    fn byte<W: Word>(&self, r: usize, c: usize) -> usize {
        // Entries ascend, so that no row lies before the first.
        ((r.saturating_sub(self.first)) * self.columns + c) * WORD
    }
}

/// A tile's places in panels.
#[derive(Clone, Copy)]
struct InPanels {
    /// The tile's first row.
    at: usize,
    rows: usize,
    columns: usize,
    pairs: usize,
}

impl Places for InPanels {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns<W: Word>(&self) -> usize {
        self.columns
    }

    #[inline(always)]
    fn byte<W: Word>(&self, r: usize, c: usize) -> usize {
        let (panel, row) = ((self.at + r) / PANEL_ROWS, (self.at + r) % PANEL_ROWS);
        (panel * self.pairs + c / 2) * size_of::<Pair>() + row * 2 * WORD + c % 2 * WORD
    }
}
