//! The weights of one product: a base, and what turns it into a fine-tune if anything does.

use crate::codec::{Encoding, Grid, Tile};
use crate::error::Result;
use crate::matrix::Matrix;
use crate::resident::Resident;
use crate::vector::simd::Simd;
use crate::vector::tile;

/// A base and its delta. An `unchanged` delta is none: whatever tiles its header names, a product with it has
/// the bits of one with the base alone.
#[derive(Clone, Copy)]
pub(super) struct Weights<'a> {
    pub(super) base: Matrix<'a>,
    pub(super) delta: Option<&'a Resident<'a>>,
}

impl<'a> Weights<'a> {
    pub(super) fn new(base: Matrix<'a>, delta: Option<&'a Resident<'a>>) -> Self {
        Self { base, delta: delta.filter(|d| d.header().encoding != Encoding::Unchanged) }
    }

    pub(super) fn encoding(&self) -> Encoding {
        self.delta.map_or(Encoding::Unchanged, |d| d.header().encoding)
    }

    /// How many words the delta says that it changes.
    pub(super) fn changed(&self) -> u64 {
        self.delta.map_or(0, |d| d.header().changed)
    }

    pub(super) fn grid(&self) -> Grid {
        self.delta.map_or_else(|| Grid::for_sparse(self.base.shape()), Resident::grid)
    }

    /// Bits by class of the base word, of `exponent`.
    pub(super) fn widths(&self) -> [u8; 32] {
        self.delta.map_or([0; 32], |d| d.header().widths)
    }

    pub(super) fn tile(&self, index: usize) -> Result<Tile<'a>> {
        self.delta.map_or(Ok(Tile::Unchanged), |d| d.tile(index))
    }

    /// The fine-tuned words of tile `index` of [`Self::grid`], row after row.
    pub(super) fn words<S: Simd>(&self, s: S, index: usize, words: &mut [u8]) -> Result<()> {
        if let Some(delta) = self.delta {
            return tile::tile_words(s, delta, &self.base, index, words);
        }
        let rect = self.grid().rect(index);
        let len = rect.cols() * self.base.dtype().word_bytes();
        for (r, row) in words.chunks_exact_mut(len).enumerate() {
            row.copy_from_slice(self.base.span(rect.r0 + r, rect.c0, rect.cols()));
        }
        Ok(())
    }
}
