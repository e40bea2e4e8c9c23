//! What a delta is, one tile at a time, in plain scalar code: the meaning that every fast path must equal bit for bit.
//!
//! A matrix is cut into tiles ([`Grid`]); every encoding stores a tile so that it is decoded from its own bytes and the
//! base words of the same tile, and nothing else. [`decode_tile`] is the oracle. This module knows no layout of a whole
//! blob (that is `resident`) and no file (that is `package`).
#![forbid(unsafe_code)]

mod apart;
pub mod exponent;
mod grid;
pub mod predicted;
pub mod sparse;
pub mod split;
pub mod word;

pub(crate) use apart::{Apart, Change, Changes, Overrides, disorder, outside};
pub use apart::{Entries, Exceptions};
pub use exponent::ExponentTile;
pub use grid::{Grid, Rect};
pub use sparse::{GapKind, SparseTile};

use crate::error::{Error, Result};
use crate::matrix::Dtype;
use word::{Word, with_word};

/// How a matrix's delta is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Encoding {
    /// Nothing: fine_tuned equals base.
    Unchanged = 0,
    /// 16 rows side by side: column gap and exact difference of each changed word. The fast one.
    Sparse = 1,
    /// Wrapping difference of every word, in a width that follows from the base word's exponent. The small one.
    Exponent = 2,
    /// The fine-tuned words.
    Raw = 3,
}

impl Encoding {
    /// Every encoding, in the order of their codes.
    pub const ALL: [Self; 4] = [Self::Unchanged, Self::Sparse, Self::Exponent, Self::Raw];

    /// The encoding of a format code, or `None` for an unknown one.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    /// Its name in documents and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unchanged => "unchanged",
            Self::Sparse => "sparse",
            Self::Exponent => "exponent",
            Self::Raw => "raw",
        }
    }
}

impl std::fmt::Display for Encoding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What the caller would rather have: fewer nanoseconds per product, or fewer bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Prefer {
    /// `sparse` as long as it is worth its bytes.
    Speed,
    /// The smallest encoding.
    Memory,
}

impl std::str::FromStr for Prefer {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "speed" => Ok(Self::Speed),
            "memory" => Ok(Self::Memory),
            _ => Err(Error::invalid(format!("prefer must be \"speed\" or \"memory\", not {s:?}"))),
        }
    }
}

/// One tile's bytes. Columns and positions are relative to the tile.
#[derive(Clone, Copy, Debug)]
pub enum Tile<'a> {
    /// Nothing changed.
    Unchanged,
    /// See [`sparse`].
    Sparse(SparseTile<'a>),
    /// See [`exponent`].
    Exponent(ExponentTile<'a>),
    /// The fine-tuned words themselves.
    Raw(RawTile<'a>),
}

/// The fine-tuned words of one tile, row after row of a wider matrix.
#[derive(Clone, Copy, Debug)]
pub struct RawTile<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) stride: usize,
    pub(crate) row_bytes: usize,
}

impl<'a> RawTile<'a> {
    /// Row `r` of the tile: `cols` little-endian words.
    pub fn row(&self, r: usize) -> &'a [u8] {
        &self.bytes[r * self.stride..r * self.stride + self.row_bytes]
    }
}

/// Decode one tile, the slow and plain way.
///
/// `words` holds the `rows` x `cols` base words of the tile (little-endian, row after row, any alignment) on entry and
/// the fine-tuned ones on exit; `tile_cols` is the grid's nominal tile width.
///
/// # Errors
/// `Corrupt` where the tile's bytes contradict themselves or the base; `Truncated` where they end early. `words` then
/// holds unspecified words.
pub fn decode_tile(
    tile: &Tile<'_>,
    dtype: Dtype,
    rows: usize,
    cols: usize,
    tile_cols: usize,
    words: &mut [u8],
) -> Result<()> {
    debug_assert_eq!(words.len(), rows * cols * dtype.word_bytes());
    with_word!(dtype, W => {
        if let Ok(words) = bytemuck::try_cast_slice_mut::<u8, W>(words) {
            return decode_words::<W>(tile, dtype, rows, cols, tile_cols, words);
        }
        let mut copy: Vec<W> = words.chunks_exact(W::BYTES).map(W::load).collect();
        decode_words::<W>(tile, dtype, rows, cols, tile_cols, &mut copy)?;
        words.copy_from_slice(bytemuck::cast_slice(&copy));
        Ok(())
    })
}

pub(crate) fn decode_words<W: Word>(
    tile: &Tile<'_>,
    dtype: Dtype,
    rows: usize,
    cols: usize,
    tile_cols: usize,
    words: &mut [W],
) -> Result<()> {
    match tile {
        Tile::Unchanged => Ok(()),
        Tile::Raw(raw) => {
            for (r, row) in words.chunks_exact_mut(cols).enumerate() {
                row.iter_mut().zip(raw.row(r).chunks_exact(W::BYTES)).for_each(|(o, b)| *o = W::load(b));
            }
            Ok(())
        }
        Tile::Sparse(t) => {
            t.decode::<W>(dtype, rows, cols, words)?;
            t.exceptions.apply((cols, tile_cols), words)
        }
        Tile::Exponent(t) => {
            t.decode::<W>(dtype, rows, cols, words)?;
            t.entries.apply(dtype, (cols, tile_cols), words)?;
            t.exceptions.apply((cols, tile_cols), words)
        }
    }
}
