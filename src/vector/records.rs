//! The records of a `sparse` tile, one after the other: the walk that restores, embeddings, products and
//! gradients share. What they do with a record is theirs, and so is how the columns of its sixteen lanes are
//! kept: in an array of 16 bits each, where lanes are looked at one by one, or in a vector. The oracle
//! (`codec::sparse`) walks lane by lane, on purpose in another way. Must hold no word, no product and no
//! intrinsic.

use super::simd::{SIMD_LANES, Simd};
use crate::codec::SparseTile;
use crate::error::{Error, Result};
use std::iter::Zip;
use std::slice::ChunksExact;

/// Most records of a tile that [`within_tile`] lets through: sixteen million gaps of one byte stay below 2^32
/// columns.
const MOST: usize = 1 << 24;

/// The columns that the sixteen lanes of a tile have come to.
pub(crate) trait LaneColumns: Copy {
    /// Each lane's column after a gap of one byte.
    fn after(self, gaps: &[u8; SIMD_LANES]) -> Self;
    /// The columns themselves, little-endian.
    fn named(self, columns: &[u8; 2 * SIMD_LANES]) -> Self;
    /// Lane by lane the larger one.
    fn larger(self, other: Self) -> Self;
}

/// In 16 bits. A tile has at most 4096 columns, and a lane that comes to 65535 stays there, which is beyond
/// any tile.
impl LaneColumns for [u16; SIMD_LANES] {
    #[inline(always)]
    fn after(mut self, gaps: &[u8; SIMD_LANES]) -> Self {
        self.iter_mut().zip(gaps).for_each(|(column, gap)| *column = column.saturating_add(u16::from(*gap)));
        self
    }

    #[inline(always)]
    fn named(self, columns: &[u8; 2 * SIMD_LANES]) -> Self {
        std::array::from_fn(|lane| u16::from_le_bytes([columns[2 * lane], columns[2 * lane + 1]]))
    }

    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        std::array::from_fn(|lane| self[lane].max(other[lane]))
    }
}

/// In a vector of 32 bits each: wraps unless [`within_tile`] has counted the records.
#[derive(Clone, Copy)]
pub(crate) struct VectorColumns<S: Simd> {
    s: S,
    /// The columns.
    pub(crate) lanes: S::C,
}

impl<S: Simd> VectorColumns<S> {
    /// All lanes at column 0.
    #[inline(always)]
    pub(crate) fn new(s: S) -> Self {
        Self { s, lanes: s.columns() }
    }

    /// The columns as numbers.
    #[inline(always)]
    pub(crate) fn array(self) -> [u32; SIMD_LANES] {
        let mut lanes = [0; SIMD_LANES];
        self.s.store_columns(self.lanes, &mut lanes);
        lanes
    }

    /// The greatest of the lanes.
    #[inline(always)]
    pub(crate) fn greatest(self) -> u32 {
        self.array().into_iter().fold(0, u32::max)
    }
}

impl<S: Simd> LaneColumns for VectorColumns<S> {
    #[inline(always)]
    fn after(self, gaps: &[u8; SIMD_LANES]) -> Self {
        Self { lanes: self.s.add_gaps(self.lanes, gaps), ..self }
    }

    #[inline(always)]
    fn named(self, columns: &[u8; 2 * SIMD_LANES]) -> Self {
        Self { lanes: self.s.load_columns(columns), ..self }
    }

    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        Self { lanes: self.s.max_columns(self.lanes, other.lanes), ..self }
    }
}

/// A walk along the records of a tile whose gaps are of `GAP` bytes
/// ([`GapKind::bytes`](crate::codec::GapKind::bytes)).
///
/// Not an `Iterator`: its methods must be inlined into the kernel that walks, and those of adapters need not
/// be.
pub(crate) struct Records<'t, C, const GAP: usize> {
    /// Gaps and differences. Zipped they share one counter, where two would cost the gathered product 5 % of
    /// its instructions.
    records: Zip<ChunksExact<'t, u8>, ChunksExact<'t, u8>>,
    columns: C,
    largest: C,
}

impl<'t, C: LaneColumns, const GAP: usize> Records<'t, C, GAP> {
    /// At the first record of `tile`, whose words are of `word` bytes; `start` is column 0 in each lane.
    #[inline(always)]
    pub(crate) fn new(tile: &SparseTile<'t>, word: usize, start: C) -> Self {
        Self {
            records: tile
                .gaps
                .chunks_exact(SIMD_LANES * GAP)
                .zip(tile.differences.chunks_exact(SIMD_LANES * word)),
            columns: start,
            largest: start,
        }
    }

    /// The next record: the column of each lane, and sixteen differences.
    #[inline(always)]
    pub(crate) fn advance(&mut self) -> Option<(C, &'t [u8])> {
        let (gaps, differences) = self.records.next()?;
        self.columns = if GAP == 1 {
            self.columns.after(gaps.first_chunk()?)
        } else {
            let columns = self.columns.named(gaps.first_chunk()?);
            self.largest = self.largest.larger(columns);
            columns
        };
        Some((self.columns, differences))
    }

    /// The largest column that each lane came to.
    #[inline(always)]
    pub(crate) fn largest(self) -> C {
        // Columns of one byte only grow.
        if GAP == 1 { self.columns } else { self.largest }
    }
}

/// Run a kernel that walks `tile`, of `columns` columns, with [`VectorColumns`], and gives the largest one it
/// came to.
///
/// # Errors
/// `Corrupt` where there are so many records that columns could wrap, before the kernel runs, and where one
/// lies outside the tile.
pub(crate) fn within_tile(tile: &SparseTile<'_>, columns: usize, walk: impl FnOnce() -> u32) -> Result<()> {
    if tile.records > MOST {
        return Err(Error::corrupt(format!("{} records in one tile", tile.records)));
    }
    match walk() as usize {
        largest if largest >= columns && tile.records > 0 => {
            Err(Error::corrupt(format!("an entry names column {largest} of {columns}")))
        }
        _ => Ok(()),
    }
}
