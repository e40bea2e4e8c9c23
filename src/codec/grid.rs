//! Tiles: how a matrix is cut. The unit of every encoding and of every access.

use crate::matrix::Shape;

/// The tiles of a matrix: band after band of rows, from left to right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// The matrix.
    pub shape: Shape,
    /// Rows of a full tile: a power of two, at least 16.
    pub tile_rows: usize,
    /// Columns of a full tile: a power of two, 256 ..= 4096; `tile_rows * tile_cols <= 65536`.
    pub tile_cols: usize,
}

/// The part of the matrix that one tile covers: rows `r0..r1`, columns `c0..c1`. Never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rect {
    /// First row.
    pub r0: usize,
    /// One past the last row.
    pub r1: usize,
    /// First column.
    pub c0: usize,
    /// One past the last column.
    pub c1: usize,
}

impl Rect {
    /// Rows of the tile.
    pub fn rows(&self) -> usize {
        self.r1 - self.r0
    }

    /// Columns of the tile.
    pub fn cols(&self) -> usize {
        self.c1 - self.c0
    }

    /// Words of the tile: at most 65536.
    pub fn words(&self) -> usize {
        self.rows() * self.cols()
    }
}

impl Grid {
    /// Rows of every `sparse` tile: one SIMD lane per row.
    pub const TILE_ROWS: usize = 16;
    /// The most words of a tile, so that a position fits 16 bits.
    pub const MAX_WORDS: usize = 1 << 16;
    /// Narrowest tile.
    pub const MIN_COLS: usize = 256;
    /// Widest tile.
    pub const MAX_COLS: usize = 4096;

    /// Tiles for `sparse`: 16 rows, as wide as allowed. Wide tiles pad less (measured: 4 % of the bytes at 3 % changed
    /// between 1024 and 4096 columns), and x for 4096 columns still fits L1.
    pub fn for_sparse(shape: Shape) -> Self {
        Self { shape, tile_rows: Self::TILE_ROWS, tile_cols: Self::cols_for(shape.k) }
    }

    /// The largest tiles for `exponent`: as many rows as 65536 words allow, since every tile ends 32 lanes on a word boundary,
    /// which on a 16 x 256 tile would cost 0.06 bits per element. Encoders take smaller ones where that is cheap
    /// (`resident::estimate`).
    pub fn for_exponent(shape: Shape) -> Self {
        let tile_cols = Self::cols_for(shape.k);
        let rows = shape.n.clamp(1, Self::MAX_WORDS).next_power_of_two();
        let tile_rows = rows.clamp(Self::TILE_ROWS, Self::MAX_WORDS / tile_cols);
        Self { shape, tile_rows, tile_cols }
    }

    fn cols_for(k: usize) -> usize {
        k.clamp(Self::MIN_COLS, Self::MAX_COLS).next_power_of_two()
    }

    /// Bands of tiles.
    pub fn tile_rows_count(&self) -> usize {
        self.shape.n.div_ceil(self.tile_rows)
    }

    /// Tiles in one band.
    pub fn tile_cols_count(&self) -> usize {
        self.shape.k.div_ceil(self.tile_cols)
    }

    /// All tiles; 0 for an empty matrix. At most the number of words, so it does not overflow.
    pub fn tiles(&self) -> usize {
        self.tile_rows_count() * self.tile_cols_count()
    }

    /// What tile `index` covers; `index < tiles()`.
    pub fn rect(&self, index: usize) -> Rect {
        let across = self.tile_cols_count();
        let (tr, tc) = (index / across, index % across);
        let (r0, c0) = (tr * self.tile_rows, tc * self.tile_cols);
        Rect {
            r0,
            r1: (r0 + self.tile_rows).min(self.shape.n),
            c0,
            c1: (c0 + self.tile_cols).min(self.shape.k),
        }
    }
}
